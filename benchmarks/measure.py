"""Rounds of alternating variants, and the table that they make."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import django

#: Does the thing once and returns what it took, in any unit.
Measure = Callable[[], float]


def timed(function: Callable[[], object]) -> Measure:
    """Return a measure of ``function`` in seconds."""

    def measure() -> float:
        began = perf_counter()
        function()
        return perf_counter() - began

    return measure


def typical(measure: Measure, times: int) -> Measure:
    """Return the measure of a typical one among so many: they are shorter than what disturbs them."""
    return lambda: statistics.median(measure() for _ in range(times))


def turns_that_take(seconds: float) -> int:
    """How many turns :func:`spin` needs for that, on this machine when nobody disturbs it: the best of many tries."""
    from benchmarks.work import spin  # needs Django, which is set up by then

    turns = 10_000
    return round(turns * seconds / min(timed(lambda: spin(turns, 0))() for _ in range(200)))


def alternate(variants: Mapping[str, Measure], rounds: int) -> dict[str, list[float]]:
    """Measure each variant once a round, each round beginning with another one.

    Whatever else the machine does then falls on all of them alike, and their ratios within a round can be compared.
    """
    names = list(variants)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            taken[name].append(variants[name]())
    return taken


@dataclass(frozen=True)
class Spread:
    """The median of several rounds, and how far they went."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def told(self, digits: int, factor: float = 1.0) -> str:
        median, least, most = (f"{value * factor:,.{digits}f}" for value in (self.median, self.least, self.most))
        return f"{median} ({least}-{most})"


def ratio(taken: Mapping[str, list[float]], name: str, baseline: str) -> Spread:
    """How many times as long as the baseline, round by round."""
    return Spread.of([mine / theirs for mine, theirs in zip(taken[name], taken[baseline], strict=True)])


def show(
    title: str, taken: Mapping[str, list[float]], baselines: Sequence[str], *, unit: str = "ms", factor: float = 1e3
) -> None:
    """Print a table in Markdown: each variant, and its ratio to each baseline; medians, least and most in brackets."""
    digits = 0 if factor * max(map(max, taken.values())) >= 1_000 else 2
    rows = [["", unit, *(f"x {baseline}" for baseline in baselines)]]
    for name, values in taken.items():
        ratios = ["1" if name == baseline else ratio(taken, name, baseline).told(2) for baseline in baselines]
        rows.append([name, Spread.of(values).told(digits, factor), *ratios])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(f"{title}; medians (least-most) of {len(next(iter(taken.values())))} rounds\n")
    for number, row in enumerate(rows):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print()


def environment(databases: Mapping[str, str]) -> str:
    """Describe what it was measured on, down to how busy the machine was."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows do not tell
        cores = os.cpu_count() or 1
    return (
        f"{cores} cores, {platform.machine()}, {load()}; {platform.python_implementation()} "
        f"{platform.python_version()}, Django {django.__version__}; {'; '.join(databases.values())}"
    )


def load() -> str:
    """Say how many others wanted the cores in the last minute: a ratio of parallel work means little among many."""
    return f"load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "load unknown"
