"""What is sent next, and a bounded window of tasks in flight. Knows only chunks, futures and outcomes."""

from __future__ import annotations

import os
from bisect import insort
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from operator import itemgetter
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any

from parallel_orm.chunks import Chunk
from parallel_orm.errors import ChunkTimedOut, WorkerDied, left_in_parent
from parallel_orm.forks import gate
from parallel_orm.leaving import may_wait
from parallel_orm.outcomes import Outcome, note
from parallel_orm.pace import Pace
from parallel_orm.retries import backoff, may_pass

#: Cuts a chunk behind so many rows; None: it has no more.
Cut = Callable[[Chunk, int], tuple[Chunk, Chunk | None]]


#: Seconds after which the caller does what nobody has begun, where it can.
STEAL_AFTER = 0.05
#: Seconds after which whoever waits looks around in any case: a Ctrl-C that comes just when it begins to wait is not
#: heard until then.
LOOKS_EVERY = 1.0


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


class InTurn(Iterator[Chunk]):
    """The chunks of several plans side by side: the next is of the plan that has the fewest out."""

    def __init__(self, plans: Iterable[Iterator[Chunk]]) -> None:
        self._left = dict(enumerate(plans))
        #: How many were taken of each, and what they came to not passed on.
        self.held: Counter[int] = Counter()

    def __contains__(self, plan: object) -> bool:
        return plan in self._left

    def __next__(self) -> Chunk:
        while self._left:
            plan = min(self._left, key=self.held.__getitem__)
            chunk = next(self._left[plan], None)
            if chunk is not None:
                self.held[plan] += 1
                return chunk
            del self._left[plan]
        raise StopIteration


class Supply:
    """The chunks that are still to be sent: what was left undone of others, then those of the plan.

    What is left is cut anew: into parts for all workers that are idle, so that these share what one of them was too
    slow for; and into parts as small as its rows are slow.
    """

    def __init__(
        self,
        planned: Iterator[Chunk],
        paces: Sequence[Pace],
        cut: Cut,
        retries: int = 0,
        may_pass: Callable[[Outcome], bool] = may_pass,
    ) -> None:
        #: By the numbers of the plans.
        self._paces = paces
        self._planned, self._cut, self._retries = planned, cut, retries
        self._may_pass = may_pass
        #: What is left, and how many rows of it to send at once. The first of the plan's order comes first, as the
        #: results of those behind it may have to wait for it.
        self._left: list[tuple[Chunk, int]] = []
        #: Whether nothing more is to be sent.
        self.is_over = False
        #: The places of the chunks that are being worked on.
        self._out: set[tuple[int, ...]] = set()
        #: Chunks that were lost, and when to send them again.
        self._later: list[tuple[float, Chunk]] = []

    def take(self, idle: int) -> Chunk | None:
        """Return the next chunk, for one of so many idle workers; None: there is none, unless more is left undone."""
        chunk = self._part(idle) if self._left else next(self._planned, None)
        if chunk is None:
            return None
        self._out.add(chunk.place)
        return replace(chunk, seconds=self._paces[chunk.plan].seconds)

    def has_before(self, place: tuple[int, ...], within: int | None = None) -> bool:
        """Tell whether there is anything to come, of what was taken or left undone, that stands before this place; of
        any plan, or ``within`` one.
        """
        if within is not None:
            return any(each < place for each in self._coming(within))
        return any(out < place for out in self._out) or bool(self._left and self._left[0][0].place < place)

    def is_at(self, plan: int) -> bool:
        """Tell whether a chunk of a plan is being worked on."""
        return any(out[0] == plan for out in self._out)

    def _coming(self, plan: int) -> Iterator[tuple[int, ...]]:
        """Yield the places of what was taken, or left undone, of one plan."""
        yield from (out for out in self._out if out[0] == plan)
        yield from (chunk.place for chunk, _ in self._left if chunk.plan == plan)

    def has_more_of(self, plan: int) -> bool:
        """Tell whether there may be anything to come of one plan, where chunks are taken in turn."""
        return not isinstance(self._planned, InTurn) or plan in self._planned or any(self._coming(plan))

    def pass_on(self, plan: int) -> None:
        """Learn that what a chunk of a plan came to was passed on."""
        if isinstance(self._planned, InTurn):
            self._planned.held[plan] -= 1

    def again(self) -> Chunk | None:
        """Return a chunk that was lost and is to be sent again now, or None. It has its place in the window still."""
        return self._later.pop(0)[1] if self.pause == 0 else None

    def end(self) -> None:
        """Have nothing more sent: what was not begun is not to be."""
        self.is_over = True
        self._planned, self._left, self._later = iter(()), [], []

    @property
    def pause(self) -> float | None:
        """Seconds until there is something to be sent again; None: there is nothing."""
        return max(0.0, self._later[0][0] - monotonic()) if self._later else None

    def hear(self, outcome: Outcome) -> bool:
        """Learn from what became of a chunk, and keep what is left of it; or all of it, if it is to be sent again.

        Tell whether it is not.
        """
        chunk = outcome.chunk
        if not self.is_over and chunk.attempt < self._retries and self._may_pass(outcome):
            again = replace(chunk, attempt=chunk.attempt + 1)
            insort(self._later, (monotonic() + backoff(again.attempt), again), key=itemgetter(0))
            return False
        self._out.discard(chunk.place)
        if outcome.error is None:
            pace = self._paces[chunk.plan]
            pace.learn(outcome.rows, outcome.timings)
            if outcome.rest is not None:
                self._put_back(outcome.rest, pace.rows_at(outcome.timings.function / outcome.rows))
        return True

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
    supply: Supply,
    send: Callable[[Chunk], Future[Outcome]],
    window: Window,
    *,
    label_of: Callable[[Chunk], str] = lambda chunk: "the queryset",
    steal: Callable[[Chunk], Outcome] | None = None,
    left: Callable[[Future[Outcome], Chunk], object] | None = None,
) -> Generator[Outcome]:
    """Send each chunk on its way and yield the outcomes as they come in.

    Lazy on both sides: chunks are taken as the window has room, and what was left undone of one is sent again. A worker
    that was lost is an outcome whose error names the chunk. When the caller stops early, what was not begun is
    cancelled, and what was begun is waited for: nothing goes on behind the caller's back.

    Where the caller can ``steal``, it does a chunk itself when none was begun: the workers may all be waiting for it.
    What was begun, and is not yielded, is ``left``: of an interrupted call it may not be done. So is the one that was
    yielded last, unless another was asked for: who was interrupted meanwhile may not have seen it.
    """
    landed: SimpleQueue[Future[Outcome]] = SimpleQueue()
    flying: dict[Future[Outcome], Chunk] = {}
    passing: dict[Future[Outcome], Chunk] = {}
    process = os.getpid()

    def fill() -> None:
        if os.getpid() != process:
            raise left_in_parent(label_of(Chunk(0, "")))
        while (chunk := supply.again()) or window.has_room:
            if chunk is None:
                with gate:  # cutting asks the database, while the worker for the last chunk may be forked
                    chunk = supply.take(window.workers - len(flying))
                if chunk is None:
                    break
                window.take()
            future = send(chunk)
            flying[future] = chunk
            future.add_done_callback(landed.put)

    window.refill = fill
    try:
        while True:
            fill()
            if supply.is_over:
                for future in [future for future in flying if future.cancel()]:
                    del flying[future]
            if not flying and supply.pause is None:
                return
            try:
                future = landed.get(timeout=patience(supply.pause, steal is not None))
            except Empty:  # it is time for what was lost, or for what nobody begins
                is_begun = any(future.running() or future.done() for future in flying)
                if steal is None or is_begun or not flying or not (future := next(iter(flying))).cancel():
                    continue
                outcome = steal(flying.pop(future))
            else:
                if future not in flying:
                    continue  # it was stolen
                if left is not None:
                    passing[future] = flying[future]
                outcome = outcome_of(future, flying.pop(future), label_of)
            del future  # it holds the rows, which are the caller's now
            if supply.hear(outcome):
                yield outcome
            passing.clear()
            del outcome
    except KeyboardInterrupt:
        let_go(flying)
        begun = {future: chunk for future, chunk in flying.items() if not future.cancel()}
        flying.clear()  # whoever owns the workers ends them
        if left is not None:
            begun |= passing
            passing.clear()
            for future, chunk in begun.items():
                left(future, chunk)
        raise
    finally:
        window.refill = None
        let_go(flying)
        if os.getpid() == process:  # else they are the parent's
            begun = {future: chunk for future, chunk in flying.items() if not future.cancel()}
            if may_wait(process):
                wait(begun)
            if left is not None:
                for future, chunk in (begun | passing).items():
                    left(future, chunk)


def let_go(futures: Iterable[Future[Outcome]]) -> None:
    """Release what a Ctrl-C has left locked by this thread, for which a worker's thread would wait for ever.

    It may come between the moment in which a lock is taken and the block that would release it.
    """
    for future in futures:
        condition: Any = getattr(future, "_condition", None)
        is_owned = getattr(condition, "_is_owned", None)
        while is_owned is not None and is_owned():
            condition.release()


def patience(pause: float | None, steals: bool) -> float:
    """Return how many seconds to wait for an outcome before looking around."""
    return min(LOOKS_EVERY if pause is None else pause, STEAL_AFTER if steals else LOOKS_EVERY)


def outcome_of(future: Future[Outcome], chunk: Chunk, label_of: Callable[[Chunk], str]) -> Outcome:
    """Return what a future has: the outcome, or what became of the worker instead."""
    error = future.exception()
    if error is None:
        outcome = future.result()
        # What nobody answered to names no chunk, and what has items comes back without them.
        return outcome if chunk.items is None and outcome.chunk.alias else replace(outcome, chunk=chunk)
    if isinstance(error, WorkerDied) and error.chunk is None:
        notes = getattr(error, "__notes__", ())
        error = WorkerDied(error.pid, error.exitcode, chunk, label_of(chunk))
        for line in notes:
            error.add_note(line)
    elif isinstance(error, ChunkTimedOut) and error.chunk is None:
        error = ChunkTimedOut(error.seconds, chunk, label_of(chunk))
    else:
        note(error, f"{chunk} of {label_of(chunk)} did not come back")
    return Outcome(chunk, error=error, stage="lost")
