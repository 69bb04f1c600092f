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
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

from flights import geo, walk
from flights.compare import difference
from flights.dashboard import Dashboard

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PROJECT = Path(__file__).resolve().parent.parent

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
    mapped, answer = timed(lambda: flights.parallel_map(geo.course, processes=processes))
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
                },
            ),
        ],
        [f"Work: {found}"] if found else [],
    )


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
