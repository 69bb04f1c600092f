"""A walk: the chunks of a plan, one after the other, as lists of rows."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing, closing
from typing import Any

from asgiref.sync import sync_to_async

from parallel_orm.plan import Plan
from parallel_orm.snapshots import snapshot_of
from parallel_orm.task import Task, fetch


def walk(plan: Plan) -> Generator[list[Any]]:
    """Yield the rows of each chunk, read when it is asked for, on the connection of whoever asks."""
    with snapshot_of(plan.alias, plan.session, wanted=plan.consistent) as snapshot:
        job, chunks = plan.job(fetch), snapshot.within(plan.chunks())
        chunk = next(chunks, None)
        while chunk is not None:
            with snapshot.here():
                outcome = Task(job, chunk).run()
            rows = outcome.result()
            chunk = outcome.rest
            del outcome
            if rows:
                yield rows
            del rows  # before the next ones are made
            if chunk is None:
                chunk = next(chunks, None)


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
