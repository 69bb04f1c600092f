"""What is sent next, and a bounded window of tasks in flight. Knows only chunks, futures and outcomes."""

from __future__ import annotations

import os
from bisect import insort
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, wait
from dataclasses import replace
from queue import SimpleQueue

from parallel_orm.chunks import Chunk
from parallel_orm.errors import WorkerDied, left_in_parent
from parallel_orm.forks import gate
from parallel_orm.leaving import may_wait
from parallel_orm.outcomes import Outcome
from parallel_orm.pace import Pace

#: Cuts a chunk behind so many rows; None: it has no more.
Cut = Callable[[Chunk, int], tuple[Chunk, Chunk | None]]


class Window:
    """How many tasks may be out: sent, and their outcomes not yet passed on.

    Whoever gathers the outcomes releases a place for each one that it passes on, so that outcomes which wait for an
    earlier one are bounded too, however slow the caller is.
    """

    def __init__(self, size: int, workers: int = 1) -> None:
        self.size, self.workers, self.out = size, workers, 0
        #: Has the places that are free taken again.
        self.refill: Callable[[], object] | None = None

    @property
    def has_room(self) -> bool:
        return self.out < self.size

    def take(self) -> None:
        self.out += 1

    def release(self) -> None:
        """Give a place back, which the next task gets at once."""
        self.out -= 1
        if self.refill is not None:
            self.refill()


class Supply:
    """The chunks that are still to be sent: what was left undone of others, then those of the plan.

    What is left is cut anew: into parts for all workers that are idle, so that these share what one of them was too
    slow for; and into parts as small as its rows are slow.
    """

    def __init__(self, planned: Iterator[Chunk], pace: Pace, cut: Cut) -> None:
        self._planned, self._pace, self._cut = planned, pace, cut
        #: What is left, and how many rows of it to send at once. The first of the plan's order comes first, as the
        #: results of those behind it may have to wait for it.
        self._left: list[tuple[Chunk, int]] = []
        #: The places of the chunks that are being worked on.
        self._out: set[tuple[int, ...]] = set()

    def take(self, idle: int) -> Chunk | None:
        """Return the next chunk, for one of so many idle workers; None: there is none, unless more is left undone."""
        chunk = self._part(idle) if self._left else next(self._planned, None)
        if chunk is None:
            return None
        self._out.add(chunk.place)
        return replace(chunk, seconds=self._pace.seconds)

    def has_before(self, place: tuple[int, ...]) -> bool:
        """Tell whether there is anything to come, of what was taken or left undone, that stands before this place."""
        return any(out < place for out in self._out) or bool(self._left and self._left[0][0].place < place)

    def hear(self, outcome: Outcome) -> None:
        """Learn from what became of a chunk, and keep what is left of it."""
        self._out.discard(outcome.chunk.place)
        if outcome.error is None:
            self._pace.learn(outcome.rows, outcome.timings)
            if outcome.rest is not None:
                self._put_back(outcome.rest, self._pace.rows_at(outcome.timings.function / outcome.rows))

    def _part(self, idle: int) -> Chunk:
        known = sum(chunk.rows or 0 for chunk, _ in self._left)
        chunk, rows = self._left.pop(0)
        rows = min(rows, -(-known // max(idle, 1)))
        if chunk.rows is not None and chunk.rows > rows:
            chunk, rest = self._cut(chunk, rows)
            if rest is not None:
                self._put_back(rest, rows * 2)  # in the hope that what was slow is over
        return chunk

    def _put_back(self, chunk: Chunk, rows: int) -> None:
        insort(self._left, (chunk, rows), key=lambda left: left[0].place)


def dispatch(
    supply: Supply, send: Callable[[Chunk], Future[Outcome]], window: Window, *, label: str = "the queryset"
) -> Generator[Outcome]:
    """Send each chunk on its way and yield the outcomes as they come in.

    Lazy on both sides: chunks are taken as the window has room, and what was left undone of one is sent again. A worker
    that was lost is an outcome whose error names the chunk. When the caller stops early, what was not begun is
    cancelled, and what was begun is waited for: nothing goes on behind the caller's back.
    """
    landed: SimpleQueue[Future[Outcome]] = SimpleQueue()
    flying: dict[Future[Outcome], Chunk] = {}
    process = os.getpid()

    def fill() -> None:
        if os.getpid() != process:
            raise left_in_parent(label)
        while window.has_room:
            with gate:  # cutting asks the database, while the worker for the last chunk may be forked
                chunk = supply.take(window.workers - len(flying))
            if chunk is None:
                break
            future = send(chunk)
            flying[future] = chunk
            window.take()
            future.add_done_callback(landed.put)

    window.refill = fill
    try:
        while True:
            fill()
            if not flying:
                return
            future = landed.get()
            outcome = outcome_of(future, flying.pop(future), label)
            del future  # it holds the rows, which are the caller's now
            supply.hear(outcome)
            yield outcome
            del outcome
    except KeyboardInterrupt:
        for future in flying:
            future.cancel()
        flying.clear()  # whoever owns the workers ends them
        raise
    finally:
        window.refill = None
        if os.getpid() == process:  # else they are the parent's
            begun = [future for future in flying if not future.cancel()]
            if may_wait(process):
                wait(begun)


def outcome_of(future: Future[Outcome], chunk: Chunk, label: str) -> Outcome:
    """Return what a future has: the outcome, or what became of the worker instead."""
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, WorkerDied) and error.chunk is None:
        died = WorkerDied(error.pid, error.exitcode, chunk, label)
        return Outcome(chunk, error=died)
    return Outcome(chunk, error=error)
