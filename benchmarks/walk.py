"""Walks over a big table: by what a row is, by what it is used for, beside their peers. Each in a fresh process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.measure import alternate, show, turns_that_take
from benchmarks.models import table
from benchmarks.ways import BOTH, SECONDS, Children, Walk, can_be_had


def run(databases: dict[str, str], *, rounds: int | None, rows: int | None) -> None:
    """By what a row is, and what it is used for."""
    rounds, rows, turns = rounds or 5, rows or 100_000, turns_that_take(SECONDS)
    for alias in databases:
        with table(alias, rows):
            compare("instances", (*BOTH, "chunks()", "list()"), rounds, alias=alias, rows=rows, everything=True)
            for kind in ("values_list", "select_related"):
                compare(kind, BOTH, rounds, alias=alias, rows=rows, kind=kind)
            for consumer in ("computes", "waits"):
                title = f"a loop that {consumer} for {SECONDS * 1e6:.0f} microseconds a row"
                compare(title, BOTH, rounds, alias=alias, rows=rows, consumer=consumer, turns=turns)


def peers(databases: dict[str, str], *, rounds: int | None, rows: int | None) -> None:
    """Other ways to walk in memory for a part of the table."""
    _beside(databases, (*BOTH, "django-chunkator", "queryset_iterator"), rounds, rows)


def offset(databases: dict[str, str], *, rounds: int | None, rows: int | None) -> None:
    """Pages by OFFSET, which take longer the further they are: quadratic."""
    _beside(databases, (*BOTH, "OFFSET pages"), rounds, rows)


def memory(databases: dict[str, str], *, rounds: int | None, rows: int | None) -> None:
    """Whether a table a hundred times as big takes more of it."""
    alias = next(iter(databases))
    for number in (100_000, rows or 10_000_000):
        with table(alias, number):
            compare("instances", BOTH, rounds or 1, alias=alias, rows=number, everything=True)


def _beside(databases: dict[str, str], ways: Sequence[str], rounds: int | None, rows: int | None) -> None:
    alias, rows = next(iter(databases)), rows or 1_000_000
    with table(alias, rows):
        compare("instances", ways, rounds or 3, alias=alias, rows=rows)


def compare(title: str, ways: Sequence[str], rounds: int, *, everything: bool = False, **walk: Any) -> None:
    """Show how long each way takes; if ``everything``, also the processor's time and how far the memory grew."""
    children = {way: Children(Walk(way, **walk)) for way in ways if can_be_had(way)}
    taken = alternate(children, rounds)
    title = f"A walk over {walk['rows']:,} rows of 7 columns, {walk['alias']}, {title}"
    show(f"{title}, time", taken, BOTH)
    if everything:
        processor = {way: child.processor for way, child in children.items()}
        show(f"{title}, processor time of the client", processor, BOTH)
        grown = {way: child.memory for way, child in children.items()}
        show(f"{title}, growth of the client's memory", grown, [], unit="MB", factor=1)
