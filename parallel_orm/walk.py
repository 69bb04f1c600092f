"""A walk: the chunks of a plan, one after the other, as lists of rows."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing, closing
from time import perf_counter
from typing import Any

from asgiref.sync import sync_to_async

from parallel_orm.ahead import Ahead, helps, may_read_ahead
from parallel_orm.plan import Plan
from parallel_orm.snapshots import snapshot_of
from parallel_orm.task import Task, fetch


def walk(plan: Plan) -> Generator[list[Any]]:
    """Yield the rows of each chunk, read when it is asked for, on the connection of whoever asks.

    The next one is read meanwhile where that is the same, and where the last one took its time to be used.
    """
    ahead: Ahead | None = None
    read, is_quiet = 0.0, True
    with snapshot_of(plan.alias, plan.session, wanted=plan.consistent) as snapshot:
        job, chunks = plan.job(fetch), snapshot.within(plan.chunks())
        try:
            chunk, used = next(chunks, None), 0.0
            while chunk is not None:
                outcome = None
                if ahead is not None:
                    outcome, ahead = ahead.outcome(), None
                    is_quiet = outcome is not None  # else the loop writes
                if outcome is None:
                    began = perf_counter()
                    with snapshot.here():
                        outcome = Task(job, chunk).run()
                    read = perf_counter() - began
                rows, chunk = outcome.result(), outcome.rest
                del outcome
                if is_quiet and helps(read, used) and may_read_ahead(plan):
                    chunk = chunk or next(chunks, None)
                    if chunk is not None:
                        ahead = Ahead(Task(job, chunk))
                began = perf_counter()
                if rows:
                    yield rows
                del rows  # before the next ones are made
                used = perf_counter() - began
                chunk = chunk or next(chunks, None)
        finally:
            if ahead is not None:  # the loop was left half-way
                ahead.drop()


def postponed(make: Callable[[], Generator[list[Any]]]) -> Generator[list[Any]]:
    """Yield what a walk yields that is planned when it is first asked for."""
    yield from make()


def one_by_one(chunks: Generator[list[Any]]) -> Generator[Any]:
    """Yield the rows of one list after the other."""
    with closing(chunks):
        for rows in chunks:
            yield from rows
            del rows


async def awaited(chunks: Generator[list[Any]]) -> AsyncGenerator[list[Any]]:
    """Yield the same lists in a coroutine; they are read in the thread of Django's async code."""
    take: Any = sync_to_async(next)
    try:
        while (rows := await take(chunks, None)) is not None:
            yield rows
            del rows
    finally:
        await sync_to_async(chunks.close)()


async def awaited_one_by_one(chunks: Generator[list[Any]]) -> AsyncGenerator[Any]:
    """Yield the rows of these lists in a coroutine."""
    async with aclosing(awaited(chunks)) as lists:
        async for rows in lists:
            for row in rows:
                yield row
            del rows
