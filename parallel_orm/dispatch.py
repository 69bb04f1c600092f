"""A bounded window of tasks in flight. Knows only chunks, futures and outcomes."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, wait
from queue import SimpleQueue

from parallel_orm.chunks import Chunk
from parallel_orm.errors import WorkerDied
from parallel_orm.forks import gate
from parallel_orm.outcomes import Outcome


class Window:
    """How many tasks may be out: sent, and their outcomes not yet passed on.

    Whoever gathers the outcomes releases a place for each one that it passes on, so that outcomes which wait for an
    earlier one are bounded too, however slow the caller is.
    """

    def __init__(self, size: int) -> None:
        self.size, self.out = size, 0

    @property
    def has_room(self) -> bool:
        return self.out < self.size

    def take(self) -> None:
        self.out += 1

    def release(self) -> None:
        self.out -= 1


def dispatch(
    chunks: Iterator[Chunk], send: Callable[[Chunk], Future[Outcome]], window: Window, *, label: str = "the queryset"
) -> Generator[Outcome]:
    """Send each chunk on its way and yield the outcomes as they come in.

    Lazy on both sides: chunks are taken as the window has room. A worker that was lost is an outcome whose error names
    the chunk. When the caller stops early, what was not begun is cancelled, and
    what was begun is waited for: nothing goes on behind the caller's back.
    """
    landed: SimpleQueue[Future[Outcome]] = SimpleQueue()
    flying: dict[Future[Outcome], Chunk] = {}
    try:
        while True:
            while window.has_room:
                with gate:  # cutting asks the database, while the worker for the last chunk may be forked
                    chunk = next(chunks, None)
                if chunk is None:
                    break
                future = send(chunk)
                flying[future] = chunk
                window.take()
                future.add_done_callback(landed.put)
            if not flying:
                return
            future = landed.get()
            outcome = outcome_of(future, flying.pop(future), label)
            del future  # it holds the rows, which are the caller's now
            yield outcome
            del outcome
    except KeyboardInterrupt:
        for future in flying:
            future.cancel()
        flying.clear()  # whoever owns the workers ends them
        raise
    finally:
        wait([future for future in flying if not future.cancel()])


def outcome_of(future: Future[Outcome], chunk: Chunk, label: str) -> Outcome:
    """Return what a future has: the outcome, or what became of the worker instead."""
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, WorkerDied) and error.chunk is None:
        died = WorkerDied(error.pid, error.exitcode, chunk, label)
        return Outcome(chunk, error=died)
    return Outcome(chunk, error=error)
