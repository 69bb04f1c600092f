"""Tells what the demo measured: one table, where the library lost, and on what machine."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import django
from django.db import connection

from flights.measure import NO_SIGNALS, Trial, Way, cores

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

NOISE = 0.03
"""Differences of less than this share are called a draw."""


def table(trials: Iterable[Trial]) -> str:
    """All ways of all tasks, with ratios against the first way of each: 2.00x is twice as fast."""
    head = ("", "", "seconds", "rows/s", "peak MB", "speed", "memory")
    lines: list[tuple[str, ...] | None] = [head]
    for trial in trials:
        lines += [None, *(_cells(trial, way) for way in trial.ways)]
    widths = [max(len(line[i]) for line in lines if line) for i in range(len(head))]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join(rule if line is None else _row(line, widths) for line in lines)


def _cells(trial: Trial, way: Way) -> tuple[str, ...]:
    """What the table says of one way; nothing where nothing was measured."""
    first = trial.ways[0]
    return (
        trial.task if way is first else "",
        way.name,
        f"{way.seconds:.2f}",
        f"{way.rows / way.seconds:,.0f}" if way.rows else "",
        f"{way.memory / 1e6:,.1f}" if way.memory is not None else "",
        f"{first.seconds / way.seconds:.2f}x",
        f"{way.memory / first.memory:.2f}x" if way.memory and first.memory else "",
    )


def _row(cells: tuple[str, ...], widths: list[int]) -> str:
    """Two columns of words to the left, the numbers to the right."""
    words = [f"{cell:<{width}}" for cell, width in zip(cells[:2], widths[:2], strict=True)]
    numbers = [f"{cell:>{width}}" for cell, width in zip(cells[2:], widths[2:], strict=True)]
    return "  ".join(words + numbers).rstrip()


def losses(dashboard: Trial, walks: Trial, work: Trial, writes: Iterable[Trial], load: float | None) -> list[str]:
    """Where the library was slower or larger than a usual way, and what the numbers say of why."""
    found = [*_lost_together(dashboard), *_lost_walking(walks), *_lost_working(work)]
    for trial in writes:
        found += _lost_writing(trial)
    return _told(found, load)


def losses_of_shards(trials: Iterable[Trial], load: float | None) -> list[str]:
    """Which questions several databases answered slower than one."""
    found = [
        f"{trial.task}: {_percent(trial.ours, trial.usual[0])} slower than one database."
        for trial in trials
        if _slower(trial.ours, trial.usual[0])
    ]
    return _told(found, load)


def losses_of_work(trial: Trial, load: float | None) -> list[str]:
    """Than which usual way the workers of an engine were slower."""
    found = [
        f"{trial.task}, {trial.ours.name} against {usual.name}: {_percent(trial.ours, usual)} slower."
        for usual in trial.usual
        if _slower(trial.ours, usual)
    ]
    return _told(found, load)


def _told(found: list[str], load: float | None) -> list[str]:
    """What is found, or that there is nothing; and whether the machine was busy."""
    if found and load is not None and load > cores() / 2:
        found.append(
            f"{load:.1f} processes of others were at work on these {cores()} cores when it began. "
            "Working side by side needs cores that are free: run it again on a quiet machine."
        )
    return found or ["Nowhere in this run."]


def _lost_together(trial: Trial) -> Iterator[str]:
    alone, together = trial.usual[0], trial.ours
    if not _slower(together, alone):
        return
    facts = together.facts
    yield (
        f"Dashboard: started together, the queries took {_percent(together, alone)} longer than "
        f"one after another. "
        + (
            f"{sum(facts['inline'].values())} of {facts['queries']} did not run in the background "
            f"({', '.join(sorted(facts['inline']))}). "
            if facts["inline"]
            else ""
        )
        + f"At work they took {facts['worked']:,.0f} ms added up, against "
        f"{1000 * alone.seconds:,.0f} ms alone: "
        + (
            f"on {cores()} cores they slowed each other down, or the database already used the cores for each of them."
            if facts["worked"] > 1000 * alone.seconds * (1 + NOISE)
            else "handing them over cost more than running them side by side saved."
        )
    )


def _lost_walking(trial: Trial) -> Iterator[str]:
    ours = trial.ours
    for usual in trial.usual:
        against = f"{ours.name} against {usual.name}"
        if _slower(ours, usual):
            extra = 1e6 * (ours.seconds - usual.seconds) / (ours.rows or 1)
            yield (
                f"Walk, {against}: {_percent(ours, usual)} slower, {extra:.1f} microseconds a row. "
                "It asks one query per chunk and finds its place in the key each time, where the "
                "other asks once." + _bought(ours, usual)
            )
        if ours.memory and usual.memory and ours.memory > usual.memory * (1 + NOISE):
            yield (
                f"Walk, {against}: {ours.memory / 1e6:.1f} MB instead of "
                f"{usual.memory / 1e6:.1f} MB, as it has the next chunk on its way meanwhile."
            )


def _bought(ours: Way, usual: Way) -> str:
    """What the slower walk gave in exchange, if it was memory."""
    if ours.memory is None or not usual.memory or ours.memory * 2 > usual.memory:
        return ""
    return f" In exchange it held {ours.memory / 1e6:.0f} MB and not {usual.memory / 1e6:,.0f} MB."


def _lost_working(trial: Trial) -> Iterator[str]:
    loop, ours = trial.usual[0], trial.ours
    if not _slower(ours, loop):
        return
    facts, rows = ours.facts, ours.rows or 1
    worked = facts["function"] + facts["database"] + facts["shipping"]
    yield (
        f"Work: parallel_map took {_percent(ours, loop)} longer than the loop. In the workers a row "
        f"took {1e6 * facts['database'] / rows:.0f} microseconds to read, "
        f"{1e6 * facts['function'] / rows:.0f} in the function and "
        f"{1e6 * facts['shipping'] / rows:.0f} to pack, {worked:.1f} s added up, against "
        f"{loop.seconds:.1f} s in the loop. "
        + (
            "The same work cost more there than in one process, so the cores were not free for it."
            if worked > loop.seconds * 1.25
            else f"Starting {facts['processes']} processes and sending them their chunks cost more "
            f"than sharing that work saved."
        )
    )


def _lost_writing(trial: Trial) -> Iterator[str]:
    ours = [way for way in trial.ways if way.facts]
    for usual in (way for way in trial.ways if not way.facts):
        for way in ours:
            if _slower(way, usual):
                yield f"{trial.task}, {way.name} against {usual.name}: {_percent(way, usual)} slower" + (
                    ", and the receivers have heard of each row." if usual.name == NO_SIGNALS else "."
                )


def _slower(ours: Way, usual: Way) -> bool:
    return ours.seconds > usual.seconds * (1 + NOISE)


def _percent(ours: Way, usual: Way) -> str:
    return f"{100 * (ours.seconds / usual.seconds - 1):.0f} %"


def load_of_machine() -> float | None:
    """How many processes were at work in the last minute, whoever started them, if that is known."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def environment(load: float | None) -> str:
    """Machine, how busy it was, versions and database, in one line each."""
    return "\n".join(
        (
            f"Machine:  {_processor()}, {cores()} cores, {platform.system()}",
            "Load:     " + ("not known" if load is None else f"{load:.1f} processes at work before the start"),
            f"Python:   {platform.python_version()} ({sys.implementation.name})",
            f"Django:   {django.get_version()}",
            f"Database: {_database()}",
        )
    )


def _processor() -> str:
    """The processor's name where the system tells it, else its kind."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for entry in cpuinfo.read_text().splitlines():
            if entry.startswith("model name"):
                return entry.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _database() -> str:
    """The vendor with the version that the server or library has."""
    connection.ensure_connection()
    version = ".".join(str(part) for part in connection.get_database_version())
    return f"{connection.display_name} {version}"
