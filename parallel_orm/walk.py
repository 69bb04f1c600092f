"""A walk: the chunks of a plan, one after the other."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from contextlib import aclosing, closing
from typing import Any, TypeVar

from asgiref.sync import sync_to_async
from django.db import connections

from parallel_orm.ahead import Ahead, Effort, helps, is_idle, may_read_ahead
from parallel_orm.chunks import Chunk
from parallel_orm.outcomes import note
from parallel_orm.plan import Plan
from parallel_orm.rows import Unmade, listed, read
from parallel_orm.snapshots import snapshot_of

Item = TypeVar("Item")
Result = TypeVar("Result")
#: The rows of a chunk: in a list, or made when they are asked for.
ChunkRows = Unmade | list[Any]


def walk(plan: Plan) -> Generator[ChunkRows]:
    """Yield the rows of each chunk, read when it is asked for, on the connection of whoever asks.

    The next one is read meanwhile where that is the same, and where it helps.
    """
    ahead: Ahead | None = None
    # SQLite works in this very thread.
    reading, using = Effort(is_busy=connections[plan.alias].vendor == "sqlite"), Effort()
    is_quiet = True
    with snapshot_of(plan.alias, plan.session, wanted=plan.consistent) as snapshot:
        chunks = snapshot.within(plan.chunks())
        try:
            chunk = next(chunks, None)
            while chunk is not None:
                rows: ChunkRows | None = None
                if ahead is not None:
                    rows, is_quiet = ahead.rows(), not ahead.done()  # else the loop writes
                    ahead = None
                if rows is None:
                    with reading, snapshot.here():
                        rows = read_chunk(plan, chunk)
                with snapshot.here():
                    chunk = rest_of(plan, chunk, rows)
                if is_quiet and helps(reading, using) and may_read_ahead(plan):
                    chunk = chunk or next(chunks, None)
                    if chunk is not None:
                        ahead = Ahead(plan, chunk, idle=is_idle(reading, using))
                with using:
                    if rows:
                        yield rows
                    del rows  # before the next ones are made
                chunk = chunk or next(chunks, None)
        finally:
            if ahead is not None:  # the loop was left half-way
                ahead.drop()


def read_chunk(plan: Plan, chunk: Chunk) -> ChunkRows:
    """Read the rows of a chunk, here and now."""
    try:
        return read(plan.part(chunk))
    except BaseException as error:
        if not chunk.is_whole:
            note(error, f"in {chunk} of {plan.label}")
        raise


def rest_of(plan: Plan, chunk: Chunk, rows: ChunkRows) -> Chunk | None:
    """Return the next page, behind the last row of this one; None where this is no page, or was the last one."""
    if plan.key_of is None or chunk.limit is None or len(rows) != chunk.limit:
        return None
    limit = chunk.limit
    if plan.steers and isinstance(rows, Unmade):
        limit = as_large(limit, rows.size)
    return plan.rest(chunk, plan.key_of(rows.last() if isinstance(rows, Unmade) else rows[-1]), limit)


#: Bytes that the rows of a page come to, of what the driver gives: a page has a price of its own, worth some rows.
PAGE = 2_000_000
#: Rows that a page has at least, and at most, where nobody said how many.
LEAST, MOST = 100, 10_000
#: How much smaller than another one a number may be that is about as large.
ABOUT = 0.9


def as_large(limit: int, size: float) -> int:
    """Return how many rows the next page is to have, if those of this one, ``limit``, are ``size`` bytes each.

    As many as this one where that is about right: so it has the same SQL.
    """
    wanted = max(LEAST, min(MOST, int(PAGE / size)))
    if limit * ABOUT <= wanted <= limit / ABOUT:
        return limit
    return max(limit // 2, min(limit * 2, wanted))


def as_lists(chunks: Generator[ChunkRows]) -> Generator[list[Any]]:
    """Yield the rows of each chunk in a list."""
    with closing(chunks):
        for rows in chunks:
            yield listed(rows)
            del rows


def postponed(make: Callable[[], Generator[Item]]) -> Generator[Item]:
    """Yield what is planned when it is first asked for."""
    yield from make()


def one_by_one(chunks: Generator[ChunkRows]) -> Generator[Any]:
    """Yield the rows of one chunk after the other, or its results."""
    with closing(chunks):
        for rows in chunks:
            yield from rows
            del rows


def awaited_call(call: Callable[..., Result]) -> Callable[..., Coroutine[Any, Any, Result]]:
    """Return the same for a coroutine to wait for; it is made in the thread of Django's async code."""

    def make(*args: Any, **kwargs: Any) -> Result:
        try:
            return call(*args, **kwargs)
        except StopIteration as stop:  # which no future takes: its coroutine would wait for ever
            raise RuntimeError("coroutine raised StopIteration") from stop

    return sync_to_async(make)


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
