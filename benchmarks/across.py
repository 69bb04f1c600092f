"""Four databases asked one after another, and by ``across()``: slow queries, trivial ones, merged walks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

from django.db import connections
from django.db.models import Avg, Count, Sum

from benchmarks.databases import database
from benchmarks.measure import alternate, show, timed, typical
from benchmarks.models import Article, table

NUMBER = 4
SLOW = {"postgresql": "pg_sleep(0.05) IS NOT NULL", "mysql": "SLEEP(0.05) = 0"}


@contextmanager
def shards(alias: str, rows: int) -> Iterator[list[str]]:
    """Make so many databases like one, each with a full table."""
    with ExitStack() as stack:
        names = []
        for number in range(NUMBER):
            name = f"{alias}_{number}"
            settings = connections.settings[alias]
            connections.settings[name] = {**settings, "NAME": f"{settings['NAME']}_{number}"}
            if connections[alias].vendor != "sqlite":
                stack.enter_context(database(name))
            stack.enter_context(table(name, rows))
            names.append(name)
        yield names


def run(databases: dict[str, str], *, rounds: int | None, rows: int | None) -> None:
    """Beside the same questions asked one after another, and beside the slowest of them alone."""
    alias, rounds, rows = next(iter(databases)), rounds or 7, rows or 250_000
    vendor = connections[alias].vendor
    with shards(alias, rows) as names:
        one, several = Article.objects.using(names[0]), Article.objects.across(*names)
        each = [Article.objects.using(name) for name in names]
        if vendor in SLOW:
            where = [SLOW[vendor]]
            taken = alternate(
                {
                    "one of them": timed(lambda: list(one.filter(pk=1).extra(where=where))),
                    "one after another": timed(lambda: [list(rows.filter(pk=1).extra(where=where)) for rows in each]),
                    "across()": timed(lambda: list(several.filter(pk=1).extra(where=where))),
                },
                rounds,
            )
            show(f"A query of 50 ms on {NUMBER} databases, {alias}", taken, ["one of them", "one after another"])
        for title, ask in QUESTIONS.items():
            taken = alternate(
                {
                    "one of them": typical(timed(lambda ask=ask: ask(one)), 20 if title in QUICK else 1),
                    "one after another": typical(
                        timed(lambda ask=ask: [ask(rows) for rows in each]), 20 if title in QUICK else 1
                    ),
                    "across()": typical(timed(lambda ask=ask: ask(several)), 20 if title in QUICK else 1),
                },
                rounds,
            )
            show(f"{title} of {rows:,} rows on each of {NUMBER}, {alias}", taken, ["one of them", "one after another"])
        taken = alternate(
            {
                "iterator() of each, chained": timed(
                    lambda: used(chain.from_iterable(rows.order_by("pk").iterator() for rows in each))
                ),
                "across().chunked_iterator()": timed(lambda: used(several.order_by("pk").chunked_iterator())),
                "across().iterator()": timed(lambda: used(several.order_by("pk").iterator())),
            },
            min(rounds, 3),
        )
        show(f"An ordered walk over {NUMBER} x {rows:,} rows, {alias}", taken, ["iterator() of each, chained"])


QUESTIONS: dict[str, Any] = {
    "get() by primary key": lambda rows: list(rows.filter(pk=1)),
    "exists()": lambda rows: rows.filter(pk=1).exists(),
    "count()": lambda rows: rows.count(),
    "aggregate()": lambda rows: rows.aggregate(Sum("words"), Avg("rating"), Count("pk")),
    "groups": lambda rows: list(rows.values("draft").annotate(words=Avg("words"))),
    "top 100": lambda rows: list(rows.order_by("-rating", "pk")[:100]),
}
#: Those that take less than a millisecond.
QUICK = ("get() by primary key", "exists()")


def used(rows: Iterator[Any]) -> None:
    """Look at each row."""
    for row in rows:
        row.words  # noqa: B018 - is the use
