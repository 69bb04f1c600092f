"""A report as a page: what a browser makes of it, and that nothing in it is taken for HTML."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from itertools import pairwise

import pytest
from django.utils import translation

from parallel_orm.chunks import Chunk
from parallel_orm.executors.processes import end_pools
from parallel_orm.failures import Failure
from parallel_orm.outcomes import Failed
from parallel_orm.report import Call, Report, Span
from parallel_orm.report_page import FAILURES, page_of, ticks_of
from tests import functions
from tests.testapp.models import Article

#: Seconds, far beyond what a page takes.
ALARM = 90

HOSTILE = "</pre></style></script><script>document.title='owned'</script><img src=x onerror=document.title='owned'>"

#: Tells the places of what was drawn, and that what it says to the console is heard.
PROBE = """
<script>
addEventListener("load", () => {
  const box = (each) => { const { left, right, width } = each.getBoundingClientRect(); return [left, right, width]; };
  const told = {
    title: document.title,
    lang: document.documentElement.lang,
    lanes: [...document.querySelectorAll(".lane")].map((lane) => ({
      name: lane.querySelector(".name").textContent,
      box: box(lane.querySelector("svg")),
      chunks: [...lane.querySelectorAll("g.chunk")].map((chunk) => ({
        told: chunk.querySelector("title").textContent,
        box: box(chunk.querySelector("rect.all")),
        parts: [...chunk.querySelectorAll("rect:not(.all)")].map((part) => [
          part.getAttribute("class"), getComputedStyle(part).fill, ...box(part),
        ]),
        marked: chunk.querySelector("text") !== null,
      })),
    })),
    headers: [...document.querySelectorAll("th")].map((each) => each.scope),
    images: document.images.length,
    wide: document.documentElement.scrollWidth > innerWidth,
    back: getComputedStyle(document.body).backgroundColor,
    text: getComputedStyle(document.body).color,
  };
  console.error("the probe is heard");
  const place = document.createElement("output");
  place.textContent = JSON.stringify(told);
  document.body.append(place);
});
</script>
"""


@pytest.fixture
def browse(tmp_path):
    """Return what opens a page in a browser, and tells what is seen and what the console said."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium on the PATH")

    def browse(page, *options):
        policy = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
        assert policy.search(page)
        probed = tmp_path / "page.html"
        probed.write_text(policy.sub("", page).replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
        done = subprocess.run(
            [
                *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"),
                *(f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,800", *options),
                *("--dump-dom", probed.as_uri()),
            ],
            capture_output=True,
            text=True,
            timeout=ALARM,
            check=True,
        )
        found = re.search(r"<output>(.*?)</output>", done.stdout, re.DOTALL)
        assert found, done.stderr
        said = re.findall(r':CONSOLE[^"]*"([^"]*)"', done.stderr)
        told = found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        return json.loads(told), said

    return browse


def failure(key, text=HOSTILE):
    try:
        raise ValueError(text)
    except ValueError as error:
        return Failure.of(Failed(None, key, error), Chunk(3, "default", after=("<b>",), until=("</b>",)))


@pytest.fixture
def report():
    """Two workers, of which one failed, and a chunk that was lost."""
    return Report(
        rows=400,
        chunks=5,
        failed=1,
        seconds=10.0,
        workers={"7/MainThread": 300, "8/MainThread": 100},
        by_alias={"default": 400},
        timeline=[
            Span("7/MainThread", 0, 1, 100, 0, 0.0, 2.0, 0.5, 1.0, 0.5),
            Span("7/MainThread", 2, 2, 200, 0, 4.0, 9.0, 1.0, 2.0, 0.0),
            Span("8/MainThread", 1, 1, 100, 1, 0.0, 10.0, 0.0, 10.0, 0.0, "ValueError"),
            Span("", 4, 1, 0, 0, 5.0, 5.0, 0.0, 0.0, 0.0, "WorkerDied"),
        ],
        errors=[failure(HOSTILE)],
        call=Call("parallel_map", "<lambda>", "shop.Book"),
    )


def test_what_a_browser_shows(report, browse):
    """A lane for each worker, chunks where their time was, parts one after the other; and no word of the console."""
    seen, said = browse(page_of(report))
    assert said == ["the probe is heard"]
    assert (seen["title"], seen["lang"]) == ("parallel_map(<lambda>) of shop.Book", "en")
    assert (seen["images"], seen["wide"]) == (0, False)
    assert [lane["name"] for lane in seen["lanes"]] == ["7/MainThread", "8/MainThread", "lost"]
    assert set(seen["headers"]) == {"row", "col"}
    busy, failed, lost = seen["lanes"]
    left, _, width = busy["box"]
    assert width > 500

    def share(box):
        return [round((x - left) / width, 2) for x in box[:2]]

    assert [share(chunk["box"]) for chunk in busy["chunks"]] == [[0.0, 0.2], [0.4, 0.9]]
    assert [(name, *share(box)) for name, _, *box in busy["chunks"][0]["parts"]] == [
        ("database", 0.0, 0.05),
        ("function", 0.05, 0.15),
        ("shipping", 0.15, 0.2),
    ]
    assert len({fill for _, fill, *_ in busy["chunks"][0]["parts"]}) == 3
    assert [share(chunk["box"]) for chunk in failed["chunks"]] == [[0.0, 1.0]]
    assert [chunk["marked"] for lane in seen["lanes"] for chunk in lane["chunks"]] == [False, False, True, True]
    assert lost["chunks"][0]["box"][2] > 0
    assert busy["chunks"][0]["told"] == (
        "Chunk 0: 100 rows, 2.0 s from 0.00 s on: 500 ms database, 1.0 s function, 500 ms packing"
    )
    assert busy["chunks"][1]["told"].startswith("2 chunks from 2 on: 200 rows, 5.0 s from 4.00 s on")
    assert failed["chunks"][0]["told"].endswith("; 1 failed; ValueError")


def test_light_and_dark(report, browse):
    """What is written differs from what it is written on, in both."""
    light, _ = browse(page_of(report))
    dark, said = browse(page_of(report), "--blink-settings=preferredColorScheme=0")

    def brightness(color):
        return sum(map(int, re.findall(r"\d+", color)[:3]))

    assert brightness(light["back"]) - brightness(light["text"]) > 450
    assert brightness(dark["text"]) - brightness(dark["back"]) > 450
    assert said == ["the probe is heard"]


def test_nothing_is_taken_for_html(report):
    report.workers[HOSTILE] = report.by_alias[HOSTILE] = 1
    report.timeline.append(Span(HOSTILE, 4, 1, 1, 0, 0.0, 1.0, 0.0, 1.0, 0.0, HOSTILE))
    report.call = Call(HOSTILE, HOSTILE, HOSTILE)
    report.reason = HOSTILE
    page = page_of(report)
    assert "onerror" in page
    assert "<img" not in page
    assert "<script" not in page
    assert "<b>" not in page


def test_it_needs_nothing_else(report):
    """And its policy would forbid it."""
    page = page_of(report)
    assert "default-src 'none'; style-src 'unsafe-inline'" in page
    assert not re.search(r"""\s(src|href|srcset|action)=|url\(|@import""", re.sub(r"&lt;.*?&gt;", "", page))


def test_failures_are_shown_up_to_a_number(report):
    report.errors = [failure(f"key {number}") for number in range(FAILURES + 20)]
    page = page_of(report)
    assert "key 99" in page
    assert "key 100" not in page
    assert f"The first {FAILURES}; 20 more are in the report." in page
    assert page.count("<summary>") == FAILURES


class Mute(Exception):
    def __str__(self):
        raise RuntimeError


def test_whatever_failed_is_written(report, tmp_path):
    """Text that is no text, that is long, and that cannot be made."""
    report.errors = [failure(1, "\ud800"), failure(2, "x" * 1_000_000), failure(None)]
    report.errors[2].error = Mute()
    report.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "\\ud800" in page
    assert len(page) < 100_000
    assert "Mute: &lt;its text could not be made&gt;" in page


def test_a_report_of_nothing_is_a_page(tmp_path):
    Report().to_html(str(tmp_path / "report.html"))
    page = (tmp_path / "report.html").read_text()
    assert "Timeline" not in page
    assert "Failures" not in page
    assert "<title>A parallel call</title>" in page


def test_numbers_are_the_same_in_every_language(report):
    with translation.override("de"):
        german = page_of(report)
    assert german == page_of(report)


@pytest.mark.parametrize(
    ("seconds", "last", "number"),
    [(0.0004, "0.0004 s", 9), (1.0, "1 s", 6), (12.4, "12 s", 7), (3600.0, "3500 s", 8), (86_400.0, "80000 s", 5)],
)
def test_the_axis_has_round_marks(seconds, last, number):
    ticks = ticks_of(seconds)
    assert (ticks[-1]["told"], len(ticks)) == (last, number)
    assert float(ticks[-1]["x"]) <= 100


def test_of_a_real_call(default, browse, tmp_path):
    """The chunks of each worker are where it was, and no two of them at once."""
    Article.objects.bulk_create(Article(name=f"name {n}", rank=n) for n in range(200))
    report = Article.objects.parallel_each(functions.fail_on_sevens, 2, chunk_size=5, on_error="skip")
    end_pools()
    report.to_html(tmp_path / "report.html")
    seen, said = browse((tmp_path / "report.html").read_text())
    assert said == ["the probe is heard"]
    assert seen["title"] == "parallel_each(fail_on_sevens) of testapp.Article"
    assert {lane["name"] for lane in seen["lanes"]} == {*report.workers}
    assert sum(len(lane["chunks"]) for lane in seen["lanes"]) == 40
    for lane in seen["lanes"]:
        boxes = sorted(chunk["box"] for chunk in lane["chunks"])
        assert all(one[1] <= other[0] + 1 for one, other in pairwise(boxes))
        assert lane["box"][0] <= boxes[0][0]
        assert boxes[-1][1] <= lane["box"][1] + 1
