"""``manage.py parallel_map``: a function over every row, from the shell."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from django.core.management import CommandError, call_command
from django.db import connections
from django.db.models import Q
from django.test.utils import CaptureQueriesContext

from parallel_orm import ParallelQuerySet
from parallel_orm.executors.processes import end_pools
from parallel_orm.management.commands.parallel_map import Command, in_lines, queryset_of
from parallel_orm.report import Report
from tests.test_exit import SETTINGS
from tests.test_stop import until
from tests.testapp.models import Article, Author, PlainArticle

#: Seconds, far beyond what a program may take, and far below what its function would.
ALARM = 60


@pytest.fixture(scope="module", autouse=True)
def _pools_end():
    yield
    end_pools()


@pytest.fixture
def articles(alias):
    ada = Author.objects.using(alias).create(name="Ada")
    Article.objects.using(alias).bulk_create(
        Article(
            name=f"name {n}",
            rank=n,
            score=n % 3 or None,
            published=None if n % 2 else f"2024-01-{n + 1:02}T12:00:00Z",
            author=ada if n < 5 else None,
        )
        for n in range(30)
    )
    return Article.objects.using(alias)


@pytest.fixture
def command(articles):
    """Return what runs the command in this process; what it wrote comes back."""

    def run(function="raise_score", *options, model="testapp.Article", **others):
        out, err = io.StringIO(), io.StringIO()
        arguments = (model, f"tests.functions.{function}", "--using", articles.db, "--threads", "2", *options)
        try:
            call_command("parallel_map", *arguments, stdout=out, stderr=err, **others)
        finally:
            run.out, run.err = out.getvalue(), err.getvalue()
        return run.out

    return run


def test_it_calls_the_function_with_every_row(articles, command):
    assert re.match(r"30 rows in \d+ chunks, .* workers", command())
    assert sorted(articles.values_list("score", flat=True)) == [1000 + n for n in range(30)]


def test_advice_is_told(command, monkeypatch):
    monkeypatch.setattr(Report, "advice", lambda self: ["Rest.", "Sleep."])
    assert command().splitlines()[1:] == ["advice: Rest.", "advice: Sleep."]


def test_of_a_model_whose_manager_is_plain(articles, command):
    assert not isinstance(PlainArticle.objects.all(), ParallelQuerySet)
    assert "30 rows" in command(model="testapp.PlainArticle")
    assert sorted(articles.values_list("score", flat=True)) == [1000 + n for n in range(30)]


def test_lists_of_rows(articles, command):
    command("raise_scores", "--batched", "--chunk-size=7")
    assert sorted(articles.values_list("score", flat=True)) == [1000 + n for n in range(30)]


# --- Which rows -----------------------------------------------------------------

#: Options, and the rows that they are for.
ROWS = {
    "a number": (["--filter", "rank=3"], lambda rows: rows.filter(rank=3)),
    "a lookup": (["--filter", "rank__gte=20"], lambda rows: rows.filter(rank__gte=20)),
    "several": (
        ["--filter", "rank__gte=10", "--filter", "rank__lt=20"],
        lambda rows: rows.filter(rank__range=(10, 19)),
    ),
    "the same twice": (["--filter", "rank=1", "--filter", "rank=2"], lambda rows: rows.none()),
    "in": (["--filter", "rank__in=3,4,5"], lambda rows: rows.filter(rank__in=[3, 4, 5])),
    "range": (["--filter", "rank__range=3,5"], lambda rows: rows.filter(rank__in=[3, 4, 5])),
    "text with =": (["--filter", "name=a=b"], lambda rows: rows.none()),
    "text": (["--filter", "name__endswith=3"], lambda rows: rows.filter(rank__in=[3, 13, 23])),
    "isnull": (["--filter", "score__isnull=true"], lambda rows: rows.filter(score=None)),
    "not isnull": (["--filter", "score__isnull=False"], lambda rows: rows.exclude(score=None)),
    "a moment": (
        ["--filter", "published__gte=2024-01-20T00:00:00+00:00"],
        lambda rows: rows.filter(rank__gte=19).exclude(published=None),
    ),
    "a relation": (["--filter", "author__name=Ada"], lambda rows: rows.filter(rank__lt=5)),
    "a transform": (["--filter", "published__year=2024"], lambda rows: rows.exclude(published=None)),
    "exclude": (["--exclude", "rank__lt=25"], lambda rows: rows.filter(rank__gte=25)),
    "exclude twice": (
        ["--exclude", "rank=1", "--exclude", "score=2"],
        lambda rows: rows.exclude(Q(rank=1) | Q(score=2)),
    ),
    "the first ones": (["--order-by=-rank", "--limit", "3"], lambda rows: rows.filter(rank__gte=27)),
    "of two orders": (
        ["--order-by=-score", "--order-by=rank", "--limit=2", "--exclude=score__isnull=1"],
        lambda rows: rows.filter(rank__in=[2, 5]),
    ),
}


@pytest.mark.parametrize("case", ROWS)
def test_which_rows(articles, command, case):
    options, expected = ROWS[case]
    parser = Command().create_parser("manage.py", "parallel_map")
    arguments = ["testapp.Article", "tests.functions.rank", "--using", articles.db, *options]
    found = queryset_of(vars(parser.parse_args(arguments)))
    assert {row.rank for row in found} == {row.rank for row in expected(articles)}
    command("raise_score", *options)
    assert articles.filter(score__gte=1000).count() == len(found)


# --- What is refused ------------------------------------------------------------

REFUSED = {
    "an app": (
        ["nowhere.Article", "tests.functions.rank"],
        r"'nowhere.Article' is no app_label.Model.*testapp.A",
    ),
    "a model": (["testapp.Nothing", "tests.functions.rank"], r"doesn't have a 'Nothing' model. There are testapp.Art"),
    "no dot": (["Article", "tests.functions.rank"], r"'Article' is no app_label.Model"),
    "a module": (["testapp.Article", "tests.nowhere.rank"], r"'tests.nowhere.rank' cannot be imported: No module"),
    "a function": (
        ["testapp.Article", "tests.functions.nowhere"],
        r"does not define a \"nowhere\".*Give the dotted path",
    ),
    "no path": (["testapp.Article", "rank"], r"'rank' cannot be imported"),
    "no function": (["testapp.Article", "tests.functions.signal.SIGINT"], r"cannot be imported"),
    "no callable": (["testapp.Article", "tests.test_command.ALARM"], r"must be a plain callable"),
    "a field": (["--filter", "nothing=3"], r"--filter 'nothing=3': Cannot resolve keyword 'nothing'.*Choices are"),
    "a lookup": (["--filter", "rank__nothing=3"], r"--filter 'rank__nothing=3': Unsupported lookup 'nothing'"),
    "a field to exclude": (["--exclude", "nothing=3"], r"--exclude 'nothing=3': Cannot resolve"),
    "a number": (["--filter", "rank=many"], r"--filter 'rank=many': Field 'rank' expected a number but got 'many'"),
    "a moment": (["--filter", "published=soon"], r"--filter 'published=soon': “soon” value has an invalid format"),
    "isnull": (["--filter", "score__isnull=maybe"], r"isnull takes true or false, not 'maybe'"),
    "no value": (["--filter", "rank"], r"--filter 'rank' is not lookup=value"),
    "no name": (["--filter", "=3"], r"is not lookup=value"),
    "an order": (["--order-by", "nothing"], r"--order-by: Cannot resolve keyword 'nothing'"),
    "a limit": (["--limit", "0"], r"--limit must be at least 1, not 0"),
    "a database": (["--using", "nowhere"], r"There is no database 'nowhere'"),
    "a size": (["--chunk-size", "0"], r"chunk_size must be a whole number"),
    "workers": (["--processes", "2", "--threads", "2"], r"not both"),
    "an executor": (["--executor", "nothing"], r"executor='nothing' is no executor that is known"),
    "failures": (["--max-failures", "2"], r"max_failures= goes with"),
    "a folder": (["--report-html", "/nowhere/report.html"], r"/nowhere/report.html cannot be written: No such file"),
    "another folder": (["--failures", "/"], r"/ cannot be written: Is a directory"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(default, case):
    """With a word on what to do, before anything is done."""
    given, expected = REFUSED[case]
    arguments = (
        given if "." in given[0] or given[0] == "Article" else ["testapp.Article", "tests.functions.rank", *given]
    )
    with pytest.raises(CommandError, match=re.compile(expected, re.DOTALL)) as refused:
        call_command("parallel_map", *arguments, stdout=io.StringIO(), stderr=io.StringIO())
    assert refused.value.returncode == 1


# --- Failures -------------------------------------------------------------------


def sevens(articles):
    return {row.pk: row.rank for row in articles if row.rank % 7 == 3}


def test_what_failed_is_told_and_written(articles, command, tmp_path):
    page, lines = tmp_path / "report.html", tmp_path / "failures.jsonl"
    with pytest.raises(CommandError, match=r"(?s)^4 failed:\nprimary key \d+: ValueError: rank \d+\n") as failed:
        command("fail_on_sevens", "--on-error=skip", f"--report-html={page}", f"--failures={lines}")
    assert failed.value.returncode == 1
    assert command.out.startswith("30 rows")
    assert ", 4 failed" in command.out
    told = [json.loads(line) for line in lines.read_text().splitlines()]
    assert {each["key"]: each["error"] for each in told} == {
        key: f"ValueError: rank {rank}" for key, rank in sevens(articles).items()
    }
    assert "<h1>parallel_each(fail_on_sevens) of testapp.Article</h1>" in page.read_text()


def test_the_first_one_ends_it(articles, command, tmp_path):
    """With its row, its traceback and the report so far."""
    page, lines = tmp_path / "report.html", tmp_path / "failures.jsonl"
    with pytest.raises(CommandError, match=r"^ValueError: rank three") as failed:
        command("fail_on_three", f"--report-html={page}", f"--failures={lines}")
    key = articles.get(rank=3).pk
    assert f"primary key {key}" in str(failed.value)
    assert "in fail_on_three" in str(failed.value)
    assert isinstance(failed.value.__cause__, ValueError)
    assert ", 1 failed" in command.out
    assert json.loads(lines.read_text())["key"] == key
    assert "rank three" in page.read_text()


def test_more_failures_than_may_be(articles, command):
    with pytest.raises(CommandError, match=r"^TooManyFailures: 2 rows have failed, and max_failures=1"):
        command("fail_on_sevens", "--on-error=collect", "--max-failures=1", "--chunk-size=1")


def test_keys_of_any_kind_are_written(tmp_path):
    from parallel_orm.management.commands.parallel_map import as_json
    from tests.test_advice import failure

    broken = failure(ValueError("x"))
    broken.key = object()
    assert json.loads(as_json(broken))["key"] == str(broken.key)


def test_ctrl_c_stays_ctrl_c_where_python_calls(articles, command, tmp_path):
    lines = tmp_path / "failures.jsonl"
    with pytest.raises(KeyboardInterrupt):
        command("interrupt", f"--failures={lines}")
    assert command.out.startswith("0 rows")
    assert lines.exists()


# --- What is told ---------------------------------------------------------------


def test_a_dry_run_calls_nothing(articles, command):
    told = command("raise_score", "--dry-run", "--filter", "rank__lt=20", "--chunk-size=7")
    assert told.startswith("Plan for testapp.Article on")
    assert "ranges of 7 rows" in told
    assert told.endswith("workers:  2 (threads)\n")
    assert not articles.filter(score__gte=1000).exists()
    assert command.err == ""


def test_progress_in_lines(articles, command):
    command("rank", "--chunk-size=3")
    assert command.err.splitlines()[0] == "0 of 30 rows (0%)"
    assert command.err.splitlines()[-1] == "30 of 30 rows (100%)"
    for silent in ({"no_progress": True}, {"verbosity": 0}):
        with CaptureQueriesContext(connections[articles.db]) as queries:
            command("rank", **silent)
        assert command.err == ""
        assert not [query for query in queries if "COUNT" in query["sql"]]
    assert command.out == ""


def test_a_line_for_a_few_percent():
    lines = []
    tell = in_lines(lines.append)
    for done in range(1001):
        tell(done, 1000)
    assert len(lines) == 21
    assert lines[-2:] == ["950 of 1,000 rows (95%)", "1,000 of 1,000 rows (100%)"]
    in_lines(lines.append)(0, 0)
    assert lines[-1] == "0 of 0 rows (100%)"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal(articles, capfd):
    terminal = Terminal()
    call_command(
        "parallel_map", "testapp.Article", "tests.functions.rank", using=articles.db, threads=2,
        stdout=io.StringIO(), stderr=terminal,
    )  # fmt: skip
    assert terminal.getvalue() == ""
    assert "30/30" in capfd.readouterr().err


def test_lines_on_a_terminal_without_tqdm(articles, monkeypatch):
    """In no colour: they are no errors."""
    monkeypatch.setattr("parallel_orm.management.commands.parallel_map.find_spec", lambda name: None)
    terminal = Terminal()
    arguments = ("testapp.Article", "tests.functions.rank", "--using", articles.db, "--threads=2")
    call_command(Command(stdout=io.StringIO(), stderr=terminal, force_color=True), *arguments)
    assert terminal.getvalue().splitlines()[-1] == "30 of 30 rows (100%)"


# --- As a program ---------------------------------------------------------------


@pytest.fixture
def program(articles, tmp_path):
    """Return what starts the command as a program of its own, on this database."""
    wrapper = connections[articles.db]
    names = ("ENGINE", "NAME", "HOST", "PORT", "USER", "PASSWORD", "OPTIONS")
    database = {name: wrapper.settings_dict[name] for name in names}
    (tmp_path / "program_settings.py").write_text(SETTINGS.format(database=database))

    def start(function, *options):
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "django", "parallel_map", "testapp.Article", f"tests.functions.{function}"),
                *("--processes=2", *options),
            ],
            cwd=tmp_path,
            env=os.environ
            | {
                "PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(__file__).parent.parent)]),
                "DJANGO_SETTINGS_MODULE": "program_settings",
                "PARALLEL_ORM_TEST_GATE": str(tmp_path),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


@pytest.mark.once
def test_its_exit_status(articles, program):
    done = program("raise_score", "--filter=rank__lt=20")
    out, err = done.communicate(timeout=ALARM)
    assert (done.returncode, "20 rows in" in out) == (0, True), err
    assert "20 of 20 rows (100%)" in err
    assert articles.filter(score__gte=1000).count() == 20
    for options in (["--on-error=skip"], []):
        failed = program("fail_on_sevens", *options)
        out, err = failed.communicate(timeout=ALARM)
        assert failed.returncode == 1
        assert ("CommandError: 4 failed" in err, "CommandError: ValueError: rank" in err) == (
            bool(options),
            not options,
        )


@pytest.mark.once
@pytest.mark.pairs("whom")
@pytest.mark.parametrize("whom", ["the process", "its group"])
def test_ctrl_c(articles, program, tmp_path, whom):
    """It ends, with its report so far, and so do its workers; as a shell's Ctrl-C, which all of them hear, or alone."""
    running = program("say_and_hang", f"--failures={tmp_path / 'failures.jsonl'}")
    gate = tmp_path / "begun"
    until(gate.exists, "no worker has begun")
    family = psutil.Process(running.pid).children(recursive=True)
    assert family
    if whom == "the process":
        running.send_signal(signal.SIGINT)
    else:
        os.killpg(running.pid, signal.SIGINT)
    out, err = running.communicate(timeout=ALARM)
    assert running.returncode == 130, err
    assert out.startswith("0 rows")
    assert err.splitlines()[-1] == "CommandError: interrupted; what was under way is lost."
    gone, alive = psutil.wait_procs(family, timeout=ALARM)
    assert not alive, gone


def test_the_help_tells_each_option():
    parser = Command().create_parser("manage.py", "parallel_map")
    assert not [action.dest for action in parser._actions if not action.help]
