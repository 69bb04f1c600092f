"""A report as one HTML file: numbers, advice, failures, and a timeline of chunks by worker. It needs nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from math import ceil, log10
from typing import TYPE_CHECKING, Any

from django.template import Context, Engine

from parallel_orm.advice import in_words
from parallel_orm.failures import Failure, message_of

if TYPE_CHECKING:
    from parallel_orm.report import Report, Span

#: How many failures are shown.
FAILURES = 100
#: How many characters of a message, or of the end of a traceback.
CHARACTERS = 5_000
#: The least that is drawn, in percent of the width.
THIN = 0.05
#: About how many marks the axis has.
TICKS = 8


@dataclass(frozen=True, slots=True)
class Part:
    """Some seconds of a chunk. Places are in percent of the width."""

    name: str
    x: str
    width: str


@dataclass(frozen=True, slots=True)
class Drawn:
    """A chunk of the timeline."""

    x: str
    width: str
    told: str
    failed: bool
    parts: list[Part]


def page_of(report: Report) -> str:
    """Return the page. Whatever the report holds is text in it, and no HTML."""
    seconds = max([report.seconds, *(span.ended for span in report.timeline)], default=0.0) or 1.0
    call = report.call
    what = f"{call.verb}({call.function})" if call.function else call.verb or "A parallel call"
    shown = report.errors[:FAILURES]
    context = {
        "title": f"{what} of {call.label}" if call.label else what,
        "summary": str(report),
        "advice": report.advice(),
        "numbers": numbers_of(report),
        "lanes": [lane_of(worker, spans, seconds) for worker, spans in sorted(by_worker(report.timeline).items())],
        "ticks": ticks_of(seconds),
        "workers": workers_of(report),
        "failures": [told_of(failure) for failure in shown],
        "more": f"{len(report.errors) - len(shown):,}" if len(report.errors) > len(shown) else "",
    }
    template = files("parallel_orm").joinpath("report.html").read_text(encoding="utf-8")
    return Engine().from_string(template).render(Context(context))


def numbers_of(report: Report) -> list[tuple[str, str, str]]:
    """Return name, value and meaning of each number."""
    count, time = "{:,}".format, in_words
    return [
        ("rows", count(report.rows), "done, those that failed too"),
        ("succeeded", count(report.succeeded), "rows whose function returned"),
        ("failed", count(report.failed), "rows that failed"),
        ("skipped", count(report.skipped), "results that were None, and left out"),
        ("retries", count(report.retries), "times that something was tried again"),
        ("chunks", count(report.chunks), "that came back; one that came apart counts as its parts"),
        ("workers", count(len(report.workers)), "that took part"),
        ("skew", f"{report.skew:.1f}", "the busiest worker by the mean; 1.0 is even"),
        ("seconds", time(report.seconds), "from the call to its end"),
        ("rows a second", f"{report.rows_per_second:,.0f}", "as the caller waited"),
        ("database", time(report.database_seconds), "reading rows, in all workers"),
        ("... computing", time(report.database_cpu_seconds), "of this; the rest is waiting"),
        ("function", time(report.function_seconds), "running the function, in all workers"),
        ("... computing", time(report.function_cpu_seconds), "of this; the rest is waiting"),
        ("packing", time(report.shipping_seconds), "results, in all workers"),
        ("caller", time(report.caller_seconds), "taking results; of a stream its loop, too"),
        ("shipped", f"{report.shipped_bytes / 1e6:,.1f} MB", "of packed results"),
        *((f"rows of {alias}", count(rows), "by database") for alias, rows in report.by_alias.items()),
        *([("reason", report.reason, "why it ran in the caller's process")] if report.reason else []),
    ]


def by_worker(timeline: list[Span]) -> dict[str, list[Span]]:
    lanes: dict[str, list[Span]] = {}
    for span in timeline:
        lanes.setdefault(span.worker or "lost", []).append(span)
    return lanes


def lane_of(worker: str, spans: list[Span], seconds: float) -> dict[str, Any]:
    """Return what is drawn of one worker."""
    chunks, rows = sum(span.chunks for span in spans), sum(span.rows for span in spans)
    told = f"Worker {worker}: {chunks:,} chunks, {rows:,} rows"
    return {"worker": worker, "told": told, "chunks": [drawn(span, seconds) for span in spans]}


def drawn(span: Span, seconds: float) -> Drawn:
    """Return what is drawn of a chunk, or of several in a row: first reading, then the function, then packing."""
    parts, began = [], span.began
    for name in ("database", "function", "shipping"):
        took = getattr(span, name)
        if took:
            parts.append(Part(name, percent(began, seconds), percent(took, seconds)))
        began += took
    what = f"Chunk {span.chunk}" if span.chunks == 1 else f"{span.chunks:,} chunks from {span.chunk} on"
    times = ", ".join(
        f"{in_words(took)} {name}"
        for name, took in (("database", span.database), ("function", span.function), ("packing", span.shipping))
    )
    wrong = f"; {span.failed:,} failed" if span.failed else ""
    wrong += f"; {span.error}" if span.error else ""
    told = f"{what}: {span.rows:,} rows, {in_words(span.ended - span.began)} from {span.began:.2f} s on: {times}{wrong}"
    width = percent(max(span.ended - span.began, seconds * THIN / 100), seconds)
    return Drawn(percent(span.began, seconds), width, told, bool(wrong), parts)


def percent(part: float, seconds: float) -> str:
    return f"{part / seconds * 100:.3f}"


def ticks_of(seconds: float) -> list[dict[str, str]]:
    """Return the marks of the axis: at 1, 2 or 5 times a power of ten."""
    rough = seconds / TICKS
    power = 10.0 ** ceil(log10(rough) - 1)
    step = next((power * factor for factor in (1, 2, 5) if power * factor >= rough), power * 10)
    return [
        {"x": percent(number * step, seconds), "told": f"{number * step:.6g} s"}
        for number in range(int(seconds / step) + 1)
    ]


def workers_of(report: Report) -> list[dict[str, str]]:
    busy = report.busy_seconds
    return [
        {"name": name, "rows": f"{rows:,}", "seconds": f"{busy.get(name, 0.0):.2f}"}
        for name, rows in sorted(report.workers.items())
    ]


def told_of(failure: Failure) -> dict[str, str]:
    """Return what is shown of a failure, in a length that can be."""
    return {
        "key": "unknown" if failure.key is None else shortened(repr(failure.key)),
        "error": shortened(message_of(failure.error)),
        "traceback": failure.traceback[-CHARACTERS:],
        "chunk": shortened(str(failure.chunk)),
    }


def shortened(text: str) -> str:
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]}..."
