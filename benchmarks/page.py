"""A page of six queries, far from its database, under ATOMIC_REQUESTS, under asyncio, and of a busy server."""

from __future__ import annotations

import asyncio
import statistics
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from time import perf_counter
from typing import Any

from asgiref.sync import sync_to_async
from django.db import connections, transaction

from benchmarks.measure import alternate, show, timed, typical
from benchmarks.models import Article, table
from benchmarks.proxy import LATENCY, far
from parallel_orm.options import from_settings

#: Seconds that the server spends on each of four queries under asyncio.
SLOW = 0.05
#: Threads of a web server, and pages that each of them serves in a round.
THREADS, PAGES = 32, 10


def run(databases: dict[str, str], *, rounds: int | None, rows: int | None) -> None:
    if "postgres" not in databases:
        print("This one needs PostgreSQL.\n")
        return
    with table("postgres", rows or 20_000):
        far_away(rounds or 21)
        break_even(rounds or 11)
        asyncio.run(under_asyncio(rounds or 11))
        busy_server(rounds or 5)


def queries(alias: str, manager: Any) -> list[Any]:
    """Six things that a page shows, none of which needs another."""
    articles = manager.using(alias)
    return [
        articles.filter(author_id=7)[:10],
        articles.filter(words__gt=4990)[:10],
        articles.order_by("-pk")[:10],
        articles.filter(pk__in=range(100, 110)),
        articles.filter(draft=True).order_by("pk")[:10],
        articles.filter(pk=1),
    ]


def inline(alias: str) -> None:
    for queryset in queries(alias, Article.plain):
        list(queryset)


def started(alias: str) -> None:
    for queryset in [queryset.start_fetch() for queryset in queries(alias, Article.objects)]:
        list(queryset)


def within(alias: str, page: Callable[[str], None]) -> Callable[[], None]:
    def atomically() -> None:
        with transaction.atomic(using=alias):
            page(alias)

    return atomically


def far_away(rounds: int) -> None:
    with far("postgres") as alias:
        started(alias)
        variants = {
            "inline": timed(lambda: inline(alias)),
            "started": timed(lambda: started(alias)),
            "inline, in a transaction": timed(within(alias, inline)),
            "started, in a transaction": timed(within(alias, started)),
        }
        taken = alternate(variants, rounds)
        title = f"A page of six queries, {LATENCY * 1000:.0f} ms from its database"
        show(title, taken, ["inline", "inline, in a transaction"])


def break_even(rounds: int) -> None:
    """Two queries at a time, of a duration that grows: from which on is it worth to start the first?"""
    best: list[tuple[float, float]] = []
    for milliseconds in (0.1, 0.25, 0.5, 1.0, 2.0, 5.0):
        slow = (
            Article.objects.using("postgres").filter(pk=1).extra(where=[f"pg_sleep({milliseconds / 1000}) IS NOT NULL"])
        )

        def one_after_another(slow: Any = slow) -> None:
            list(slow.all()), list(slow.all())

        def side_by_side(slow: Any = slow) -> None:
            first = slow.all().start_fetch()
            list(slow.all()), list(first)

        variants = {"inline": typical(timed(one_after_another), 40), "started": typical(timed(side_by_side), 40)}
        alternate(variants, 1)
        taken = alternate(variants, rounds)
        ratio = statistics.median(b / a for a, b in zip(taken["inline"], taken["started"], strict=True))
        best.append((milliseconds, ratio))
    print("Two queries, one of them started, x one after the other, by what the server spends on each\n")
    print("| " + " | ".join(f"{milliseconds} ms" for milliseconds, _ in best) + " |")
    print("|" + "---|" * len(best))
    print("| " + " | ".join(f"{ratio:.2f}" for _, ratio in best) + " |\n")


async def under_asyncio(rounds: int) -> None:
    where = [f"pg_sleep({SLOW}) IS NOT NULL"]
    ours = Article.objects.using("postgres").filter(pk=1).extra(where=where)
    djangos = Article.plain.using("postgres").filter(pk=1).extra(where=where)

    async def seconds(queryset: Any, number: int) -> float:
        began = perf_counter()
        await asyncio.gather(*[queryset.all().acount() for _ in range(number)])
        return perf_counter() - began

    await seconds(ours, 4)
    taken: dict[str, list[float]] = {"one alone": [], "four, Django's gather": [], "four, ours": []}
    for _ in range(rounds):
        taken["one alone"].append(await seconds(djangos, 1))
        taken["four, Django's gather"].append(await seconds(djangos, 4))
        taken["four, ours"].append(await seconds(ours, 4))
    show(f"asyncio.gather of acount(), {SLOW * 1000:.0f} ms each", taken, ["one alone"])
    await sync_to_async(connections.close_all)()


def busy_server(rounds: int) -> None:
    """So many threads serving pages at once that nothing can be gained: is anything lost?"""
    most = 0

    def serve(page: Callable[[str], None]) -> float:
        gate = threading.Barrier(THREADS + 1)

        def visitor() -> None:
            connections["postgres"].ensure_connection()
            gate.wait()
            try:
                for _ in range(PAGES):
                    page("postgres")
            finally:
                connections.close_all()

        with ThreadPoolExecutor(THREADS) as threads:
            served = [threads.submit(visitor) for _ in range(THREADS)]
            gate.wait()
            began = perf_counter()
            nonlocal most
            while not all(future.done() for future in served):
                with suppress(Exception), connections["postgres"].cursor() as cursor:
                    cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
                    most = max(most, cursor.fetchone()[0])
                threading.Event().wait(0.02)
            for future in served:
                future.result()
            return perf_counter() - began

    taken = alternate({"inline": lambda: serve(inline), "started": lambda: serve(started)}, rounds)
    show(f"{THREADS} threads that serve {PAGES} pages of six queries each", taken, ["inline"])
    budget = from_settings().connections_of("postgres")
    print(f"At most {most} connections were open: {THREADS} of the threads, 1 that looked, {budget} allowed to us.\n")
