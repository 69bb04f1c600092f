"""Ways to cut, pure: keys in, chunks out. Nothing here knows a database.

Costs and balance of each way were measured for the design; ``docs/explanation/planning.md`` tells when which is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

from parallel_orm.chunks import Chunk

Key = tuple[Any, ...]
#: Says which key is so many rows behind another, or that there are fewer up to a last one.
Jump = Callable[[Key | None, Key, int], Key | None]


#: Chunks of fewer rows are cut from keys that are looked up for several of them at once.
FEW_ROWS = 250
#: How many keys are looked up then.
KEYS_AT_ONCE = 1000


class Lookout:
    """Jumps of few rows within keys that were looked up in one go: a query costs more than a few keys."""

    def __init__(self, jump: Jump, look: Callable[[Key | None, Key, int], Sequence[Key]]) -> None:
        self._jump, self._look = jump, look
        #: The keys behind one of them, and where the next jump begins.
        self._keys: Sequence[Key] = ()
        self._start = 0

    def __call__(self, after: Key | None, last: Key, rows: int) -> Key | None:
        if rows >= FEW_ROWS:
            self._keys = ()
            return self._jump(after, last, rows)
        if not (self._keys and self._find(after) + rows <= len(self._keys)):
            self._keys, self._start = self._look(after, last, KEYS_AT_ONCE), 0
            if len(self._keys) < rows:
                self._keys = ()
                return None
        self._start += rows
        return self._keys[self._start - 1]

    def _find(self, after: Key | None) -> int:
        """Return where the keys behind this one begin, which the last jump ended on; behind all of its equals."""
        while self._start < len(self._keys) and self._keys[self._start] == after:
            self._start += 1
        return self._start


@cache
def whole(alias: str) -> Chunk:
    """Cut nothing: one chunk that is the queryset."""
    return Chunk(index=0, alias=alias)


def by_jumps(
    alias: str, ends: Sequence[Key], size: Callable[[], int], jump: Jump, *, after: Key | None = None
) -> Iterator[Chunk]:
    """Cut lazily into half-open intervals of about ``size()`` rows, up to the last of ``ends``, frozen when planned.

    ``jump(after, last, rows)`` returns the key of the row so many rows behind the key ``after``, or None where fewer
    are left up to ``last``. The first interval is open below, so rows that come in ahead of the first key are not lost;
    nothing behind the last end is ever asked for, so a consumer that inserts rows cannot make this endless. Equal keys
    never part: an interval ends on a key and the next one begins behind it. Each of ``ends`` is the end of an interval.
    Begins behind the key ``after``, if one is given.
    """
    index = 0
    for last in ends:
        while (until := jump(after, last, size())) is not None and until != last:
            yield Chunk(index=index, alias=alias, after=after, until=until)
            after, index = until, index + 1
        yield Chunk(index=index, alias=alias, after=after, until=last)
        after, index = last, index + 1


def by_pages(alias: str, ends: Sequence[Key | None], size: int) -> Iterator[Chunk]:
    """Cut nothing ahead: intervals with a limit of ``size`` rows, each of which hands back its rest after a page.

    A page needs no look-up of its own for its bounds: the key of its last row is where the rest begins. An end that is
    None is one to be looked up when there is a rest.
    """
    after: Key | None = None
    for index, last in enumerate(ends):
        yield Chunk(index=index, alias=alias, after=after, until=last, limit=size)
        after = last


def by_keys(alias: str, keys: Sequence[Any], size: Callable[[], int]) -> Iterator[Chunk]:
    """Cut a list of primary keys into runs of ``size()``, in the order of the list."""
    start = index = 0
    while run := tuple(keys[start : start + size()]):
        yield Chunk(index=index, alias=alias, keys=run)
        start, index = start + len(run), index + 1


def by_blocks(alias: str, number: int, size: Callable[[], int], jump: Callable[[int, int], int]) -> Iterator[Chunk]:
    """Cut a table of so many blocks into runs with ``size()`` rows at most, or of one block.

    ``jump(first, rows)`` returns the block that has the row so many rows behind the beginning of the block ``first``.
    """
    first = index = 0
    while first < number:
        end = min(max(jump(first, size()), first + 1), number)
        yield Chunk(index=index, alias=alias, blocks=(first, end))
        first, index = end, index + 1


def in_two(chunk: Chunk, rows: int, jump: Jump) -> tuple[Chunk, Chunk | None]:
    """Cut a chunk behind its first ``rows`` rows, in the same way as it was cut; None: it has no more than these."""
    if chunk.keys is not None:
        return chunk.parted(rows) if len(chunk.keys) > rows else (chunk, None)
    assert chunk.until is not None
    until = jump(chunk.after, chunk.until, rows)
    return (chunk, None) if until is None or until == chunk.until else chunk.parted(rows, until)
