"""What the demo measures: each task done in Django's usual ways and in the library's.

Every function returns a `Trial`: what was done, the measured ways of doing it (the usual ones
first, the library's last), and what differed between their answers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

from flights import geo, notices, walk
from flights.compare import difference
from flights.dashboard import Dashboard
from flights.models import Flight, Notice

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PROJECT = Path(__file__).resolve().parent.parent

WRITES = 3_000
"""How many rows are written, each way, at most."""

NO_SIGNALS = "bulk_create(), no signals"
"""The way that leaves empty what receivers set."""

T = TypeVar("T")


@dataclass(frozen=True)
class Way:
    """One way of doing a task, measured."""

    name: str
    seconds: float
    rows: int | None = None
    memory: int | None = None
    """Bytes at the peak, above what the process held before it began."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the library told about the run; empty for Django's own ways."""


@dataclass(frozen=True)
class Trial:
    """A task, and the ways it was done; the last one is the library's."""

    task: str
    ways: list[Way]
    differences: list[str]
    """One sentence for each answer that was not equal to the first way's."""

    @property
    def usual(self) -> list[Way]:
        """Django's own ways."""
        return self.ways[:-1]

    @property
    def ours(self) -> Way:
        """The library's way."""
        return self.ways[-1]


def dashboard(rounds: int) -> Trial:
    """Six queries, one after another and started together: medians of alternating rounds."""
    expected = Dashboard().answers()
    differences = []
    alone: list[float] = []
    together: list[float] = []
    worked: list[float] = []
    reasons: Counter[str] = Counter()
    Dashboard().start().answers()
    for _ in range(rounds):
        seconds, answers = timed(lambda: Dashboard().answers())
        alone.append(seconds)
        differences.append(difference(expected, answers))
        page = Dashboard()
        seconds, answers = timed(lambda page=page: page.start().answers())
        together.append(seconds)
        differences.append(difference(expected, answers))
        timings = list(page.timings())
        worked.append(sum(timing.worked for timing in timings))
        reasons.update(timing.pending.reason for timing in timings if timing.pending.reason)
    return Trial(
        f"Dashboard: {len(expected)} queries",
        [
            Way("one after another", median(alone)),
            Way(
                "started together",
                median(together),
                facts={
                    "worked": median(worked),
                    "queries": rounds * len(expected),
                    "inline": reasons,
                },
            ),
        ],
        [f"Dashboard: {found}" for found in differences if found],
    )


def walks(last: int) -> Trial:
    """A walk over the flights up to the key `last`, each way in a fresh process."""
    found = {name: _child(name, last) for name in walk.WAYS}
    ways = [Way(name, answer["seconds"], answer["rows"], answer["memory"]) for name, answer in found.items()]
    expected, *others = ((answer["rows"], answer["digest"]) for answer in found.values())
    differences = [difference(expected, other) for other in others]
    return Trial(
        f"Walk: {ways[0].rows:,} flights",
        ways,
        [f"Walk: {text}" for text in differences if text],
    )


def work(last: int, processes: int) -> Trial:
    """Arithmetic on each of the flights up to the key `last`: in a loop, and on all cores."""
    flights = geo.with_wind().filter(pk__lte=last)
    looped, expected = timed(lambda: [geo.course(flight) for flight in flights.iterator()])
    bar = find_spec("tqdm") is not None
    mapped, answer = timed(lambda: flights.parallel_map(geo.course, processes=processes, progress=bar))
    report = answer.report
    found = difference(expected, list(answer))
    return Trial(
        f"Work: {len(expected):,} flights",
        [
            Way("loop over .iterator()", looped, len(expected)),
            Way(
                f".parallel_map(), {processes} processes",
                mapped,
                len(answer),
                facts={
                    "chunks": report.chunks,
                    "function": report.function_seconds,
                    "database": report.database_seconds,
                    "shipping": report.shipping_seconds,
                    "processes": processes,
                    "report": str(report),
                },
            ),
        ],
        [f"Work: {found}"] if found else [],
    )


def creating(last: int, processes: int) -> Trial:
    """Notices for late flights, whose references a receiver sets."""
    late = notices.late_flights(last, WRITES)
    create = Notice.objects.parallel_create
    found: dict[str, tuple[Way, list[tuple[Any, ...]]]] = {}
    for name, call in {
        "loop over save()": lambda: notices.loop(late),
        NO_SIGNALS: lambda: notices.bulk_create(late),
        f"a task a row, {notices.RECIPE_PROCESSES} processes": lambda: notices.recipe(late),
        ".parallel_create()": lambda: create(late, notices.make, processes),
        '.parallel_create(mode="bulk")': lambda: create(late, notices.make, processes, mode="bulk"),
    }.items():
        Notice.objects.all().delete()
        seconds, told = timed(call)
        found[name] = Way(name, seconds, len(late), facts=_told(told)), notices.told()
    Notice.objects.all().delete()
    _, expected = found["loop over save()"]
    differences = [
        difference(expected, answer) if name != NO_SIGNALS else difference(_unsigned(expected), _unsigned(answer))
        for name, (_, answer) in found.items()
    ]
    return Trial(
        f"Create: {len(late):,} notices",
        [way for way, _ in found.values()],
        [f"Create: {text}" for text in differences if text],
    )


def updating(last: int, processes: int) -> Trial:
    """What flights lost on their way, computed and saved."""
    keys = Flight.objects.filter(pk__lte=last).order_by("pk").values_list("pk", flat=True)
    flights = geo.with_wind().filter(pk__lte=list(keys[:WRITES])[-1])
    found: dict[str, tuple[Way, list[tuple[Any, ...]]]] = {}
    for name, call in {
        "loop over save()": lambda: notices.recompute_in_a_loop(list(flights)),
        ".parallel_update()": lambda: flights.parallel_update(notices.recompute, processes=processes),
        '.parallel_update(mode="bulk")': lambda: flights.parallel_update(
            notices.recompute, processes=processes, mode="bulk"
        ),
    }.items():
        flights.update(lost=None)
        seconds, told = timed(call)
        lost = list(flights.values_list("pk", "lost"))
        found[name] = Way(name, seconds, len(lost), facts=_told(told)), lost
    _, expected = found["loop over save()"]
    differences = [difference(expected, lost) for _, lost in found.values()]
    return Trial(
        f"Update: {len(expected):,} flights",
        [way for way, _ in found.values()],
        [f"Update: {text}" for text in differences if text],
    )


def _unsigned(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Notices without what a receiver set."""
    return [row[:-1] for row in rows]


def _told(report: Any) -> dict[str, Any]:
    """What the library told of a call that wrote; nothing of other calls."""
    return {} if report is None else {"report": str(report)}


def cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def timed(call: Callable[[], T]) -> tuple[float, T]:
    """How long a call took, in seconds, and what it gave."""
    started = perf_counter()
    answer = call()
    return perf_counter() - started, answer


def _child(way: str, last: int) -> dict[str, Any]:
    """Run `flights.walk` in a process of its own, with our environment, and read what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "flights.walk", way, "--last", str(last)],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout))
