"""What there is before rows come: few rows, the first of many, a database that is far away, all bounds of a plan."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

from django.db import connections

from benchmarks.measure import alternate, show, timed, typical
from benchmarks.models import Article, table
from benchmarks.proxy import LATENCY, far
from benchmarks.ways import BOTH, WAYS, nothing, rows_of
from parallel_orm.chunks import Chunk
from parallel_orm.plan import Plan

#: Walks a round, where there are few rows.
WALKS = 20
#: Rows a chunk, in the plan of a map.
CHUNK_SIZE = 10_000


def small(databases: dict[str, str], *, rounds: int | None, rows: int | None) -> None:
    """Walks over few rows, and the first row of a walk over many."""
    rounds, rows = rounds or 11, rows or 100_000
    for alias in databases:
        for few in (100, 1_000):
            with table(alias, few):
                compare(f"A walk over {few:,} rows, {alias}", typical_walk, alias, rounds)
        with table(alias, rows):
            compare(f"The first of {rows:,} rows, {alias}", first_row, alias, rounds)


def far_away(databases: dict[str, str], *, rounds: int | None, rows: int | None) -> None:
    """Walks where each answer of the server takes its time to arrive."""
    rounds, rows = rounds or 5, rows or 100_000
    for alias in databases:
        if connections[alias].vendor != "sqlite":
            with table(alias, rows), far(alias) as there:
                title = f"A walk over {rows:,} rows, {LATENCY * 1000:.0f} ms from the database, {alias}"
                compare(title, whole_walk, there, rounds)


def planning(databases: dict[str, str], *, rounds: int | None, rows: int | None) -> None:
    """All bounds of the plan of a map."""
    rounds, rows = rounds or 7, rows or 1_000_000
    for alias in databases:
        plan = Article.objects.using(alias).order_by("pk").explain_plan(CHUNK_SIZE)
        with table(alias, rows):
            number = len(bounds(plan))
            taken = alternate({"all bounds": timed(partial(bounds, plan))}, rounds)
        show(f"The plan of a map over {rows:,} rows in {number} chunks, {alias}", taken, [])


def bounds(plan: Plan) -> list[Chunk]:
    return list(plan.chunks())


def compare(title: str, measure: Callable[[str, str], float], alias: str, rounds: int) -> None:
    variants = {way: partial(measure, alias, way) for way in BOTH}
    alternate(variants, 1)
    show(title, alternate(variants, rounds), BOTH)


def whole_walk(alias: str, way: str) -> float:
    return timed(lambda: nothing(WAYS[way](rows_of(alias, way)), 0))()


def typical_walk(alias: str, way: str) -> float:
    return typical(partial(whole_walk, alias, way), WALKS)()


def first_row(alias: str, way: str) -> float:
    began = perf_counter()
    rows: Any = iter(WAYS[way](rows_of(alias, way)))
    next(rows)
    taken = perf_counter() - began
    rows.close()
    return taken
