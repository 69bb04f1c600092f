"""A bounded window of tasks in flight, without a database."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from parallel_orm import cutting, gather
from parallel_orm.chunks import Chunk
from parallel_orm.dispatch import Supply, Window, dispatch
from parallel_orm.errors import WorkerDied
from parallel_orm.outcomes import Outcome, Timings
from parallel_orm.pace import PATIENCE, Pace

WAIT = 30


def endless_chunks(taken: list[int] | None = None):
    for index in itertools.count():
        if taken is not None:
            taken.append(index)
        yield Chunk(index, "default")


def some_chunks(number: int):
    return itertools.islice(endless_chunks(), number)


def planned(chunks):
    """A supply of chunks that never come apart."""
    return Supply(chunks, [Pace(1)], lambda chunk, rows: (chunk, None))


def one(chunk: Chunk) -> Outcome:
    return Outcome(chunk, [chunk.index], rows=1)


def test_the_window_bounds_what_is_out():
    """However many chunks there are, no more are taken and sent than the window has room for."""
    taken: list[int] = []
    futures: list[Future[Outcome]] = []

    def send(chunk):
        future: Future[Outcome] = Future()
        future.set_running_or_notify_cancel()
        futures.append(future)
        if len(futures) == 1:
            future.set_result(one(chunk))
        return future

    outcomes = dispatch(planned(endless_chunks(taken)), send, window := Window(4))
    assert next(outcomes).value == [0]
    assert taken == [0, 1, 2, 3]
    futures[1].set_result(one(Chunk(1, "default")))
    assert next(outcomes).value == [1]
    assert taken == [0, 1, 2, 3], "an outcome that nobody has passed on still holds its place"
    window.release()
    futures[2].set_result(one(Chunk(2, "default")))
    assert next(outcomes).value == [2]
    assert taken == [0, 1, 2, 3, 4]
    for future in futures:
        if not future.done():
            future.set_result(one(Chunk(9, "default")))
    outcomes.close()


def test_what_was_only_sent_is_of_its_chunk():
    """An engine that gives no answers says that a chunk was sent, not which: so nothing is kept of those that were."""

    def send(chunk):
        future: Future[Outcome] = Future()
        future.set_result(Outcome(Chunk(0, ""), [], counts={"sent": 1}))
        return future

    supply, window = planned(some_chunks(100)), Window(4)
    for number, outcome in enumerate(dispatch(supply, send, window)):
        assert outcome.chunk == Chunk(number, "default")
        window.release()
    assert not supply.has_before((1,)), "all have been heard of"


@pytest.mark.parametrize("ordered", [True, False])
def test_results_are_gathered_in_order_or_as_they_come(ordered):
    """Done in reverse, but for the last, the results stand in the plan's order, or in that of their arrival."""
    sent: dict[int, Future[Outcome]] = {}

    def send(chunk):
        sent[chunk.index] = future = Future()
        if len(sent) == 5:
            for index in reversed(range(5)):
                sent[index].set_result(one(Chunk(index, "default")))
        return future

    window = Window(5)
    results = gather.listed(dispatch(planned(some_chunks(5)), send, window), window, ordered=ordered)
    assert results == ([0, 1, 2, 3, 4] if ordered else [3, 2, 1, 0, 4])


def test_after_an_error_nothing_goes_on_behind_the_callers_back():
    """What was not begun is cancelled, and what was begun is waited for."""
    gate, begun, ended = threading.Event(), threading.Event(), []

    def work(chunk):
        if chunk.index == 0:
            assert begun.wait(WAIT)
            return Outcome(chunk, error=ValueError("zero"))
        begun.set()
        assert gate.wait(WAIT)
        ended.append(chunk.index)
        return one(chunk)

    futures = []

    with ThreadPoolExecutor(2) as pool:

        def send(chunk):
            futures.append(pool.submit(work, chunk))
            return futures[-1]

        outcomes = dispatch(planned(some_chunks(8)), send, Window(8))
        assert isinstance(next(outcomes).error, ValueError)
        futures[-1].add_done_callback(lambda future: gate.set())  # called when it is cancelled
        outcomes.close()
        assert futures[1].done()
        assert 1 in ended
        assert set(ended) <= {1, 2}, "the one that ran, and at most the one that its thread had taken up"
        assert all(future.cancelled() for future in futures[3:])


@pytest.mark.parametrize("asks_for_more", [False, True])
def test_the_last_outcome_is_left_unless_another_was_asked_for(asks_for_more):
    """Who was interrupted while it was passed on may not have seen it."""
    left = []
    with ThreadPoolExecutor(1) as pool:
        chunks = planned(some_chunks(2))
        outcomes = dispatch(
            chunks, lambda chunk: pool.submit(one, chunk), Window(1), left=lambda future, chunk: left.append(chunk)
        )
        first = next(outcomes)
        assert first.chunk.index == 0
        if asks_for_more:
            outcomes_left = [*outcomes]
            assert not outcomes_left
        outcomes.close()
    assert [chunk.index for chunk in left] == ([] if asks_for_more else [0])


def test_a_lost_worker_names_its_chunk():
    def send(chunk):
        future: Future[Outcome] = Future()
        future.set_exception(WorkerDied(42, -9))
        return future

    (outcome,) = dispatch(planned(some_chunks(1)), send, Window(1), label_of=lambda chunk: "shop.Order")
    assert isinstance(outcome.error, WorkerDied)
    assert outcome.error.chunk == Chunk(0, "default")
    assert "chunk 0" in str(outcome.error)
    assert "shop.Order" in str(outcome.error)
    assert "SIGKILL" in str(outcome.error)


def test_a_planner_that_fails_half_way_ends_the_call():
    """An error of the planner is raised after the chunks that came before it, and leaves nothing running."""

    def chunks():
        yield Chunk(0, "default")
        raise LookupError("the table is gone")

    with ThreadPoolExecutor(1) as pool, pytest.raises(LookupError):
        window = Window(4)
        gather.listed(dispatch(planned(chunks()), lambda chunk: pool.submit(one, chunk), window), window, ordered=True)


def of_keys(number: int, index: int = 0) -> Chunk:
    return Chunk(index, "default", keys=tuple(range(number)))


def some_done(chunk: Chunk, done: int, seconds: float = 1e-6) -> Outcome:
    """What comes back when the time is over behind so many rows, each of which took so long."""
    left = chunk.left(list(chunk.keys[done:]), (chunk.keys[done - 1],), lambda key: (key,))
    return Outcome(chunk, list(chunk.keys[:done]), rows=done, rest=left, timings=Timings(function=done * seconds))


def in_two(chunk, rows):
    return cutting.in_two(chunk, rows, None)


def test_what_is_left_goes_before_what_is_planned():
    """The first of it first: a caller who takes results in order waits for that one."""
    supply = Supply((of_keys(4, index) for index in range(9)), [Pace(4, 1.0)], in_two)
    zero, one, two = (supply.take(1) for _ in range(3))
    supply.hear(some_done(two, 1))
    supply.hear(some_done(zero, 3))
    supply.hear(Outcome(one, error=ValueError()))
    taken = [supply.take(0) for _ in range(3)]
    assert [(chunk.index, chunk.keys) for chunk in taken] == [(0, (3,)), (2, (1, 2, 3)), (3, (0, 1, 2, 3))]
    assert {chunk.seconds for chunk in taken} == {PATIENCE * 1.0}


@pytest.mark.parametrize(("idle", "sizes"), [(0, [99]), (1, [99]), (2, [50, 49]), (4, [25, 25, 25, 24])])
def test_idle_workers_share_what_one_was_too_slow_for(idle, sizes):
    """Half of it goes to the one idle worker beside the one that was at it."""
    supply = Supply(iter([of_keys(100)]), [Pace(100, 1.0)], in_two)
    supply.hear(some_done(supply.take(idle), 1))
    taken = [supply.take(idle - number) for number in range(len(sizes))]
    assert [len(chunk.keys) for chunk in taken] == sizes
    assert [key for chunk in taken for key in chunk.keys] == list(range(1, 100))
    assert supply.take(idle) is None


def test_slow_rows_are_sent_a_few_at_once():
    """As many as take the target; then twice as many each time, as the others may be quick."""
    supply = Supply(iter([of_keys(100)]), [Pace(100, 1.0)], in_two)
    supply.hear(some_done(supply.take(1), 10, seconds=0.2))
    taken = iter(lambda: supply.take(0), None)
    assert [len(chunk.keys) for chunk in taken] == [5, 10, 20, 40, 15]


@pytest.mark.parametrize("ordered", [True, False])
def test_a_chunk_that_comes_apart_is_done_to_its_end(ordered):
    """A row at a time, by two workers, each row once."""
    out = []

    def send(chunk):
        out.append(chunk.place)
        future: Future[Outcome] = Future()
        future.set_result(some_done(chunk, 1) if len(chunk.keys) > 1 else Outcome(chunk, list(chunk.keys), rows=1))
        return future

    window = Window(8, workers=2)
    supply = Supply(iter([of_keys(20)]), [Pace(20, 1.0)], in_two)
    results = gather.listed(dispatch(supply, send, window), window, ordered=ordered)
    assert (results if ordered else sorted(results)) == list(range(20))
    assert len(set(out)) == len(out) == 20


def test_a_worker_that_is_lost_names_the_part():
    def send(chunk):
        future: Future[Outcome] = Future()
        if len(chunk.keys) == 3:
            future.set_result(some_done(chunk, 1))
        else:
            future.set_exception(WorkerDied(42, -9))
        return future

    supply = Supply(iter([of_keys(3)]), [Pace(3, 1.0)], in_two)
    first, second = dispatch(supply, send, Window(2))
    assert first.error is None
    assert "chunk 0 (2 keys from 1 to 2)" in str(second.error)


class Interrupted(Future[Outcome]):
    """A future in whose lock Ctrl-C comes: it was taken, and the block that would release it never began."""

    def add_done_callback(self, function):
        self._condition.acquire()
        raise KeyboardInterrupt


@pytest.mark.parametrize("place", [0, 1])
def test_ctrl_c_leaves_no_future_locked(place):
    """Else the thread that answers it waits for ever: also where the caller's release() sends the next chunk."""
    futures: list[Future[Outcome]] = []

    def send(chunk):
        future: Future[Outcome] = Interrupted() if len(futures) == place else Future()
        futures.append(future)
        if place > chunk.index:
            future.set_result(one(chunk))
        return future

    window = Window(1)

    def use():
        outcomes = dispatch(planned(some_chunks(3)), send, window)
        try:
            for _ in outcomes:
                window.release()
        finally:
            outcomes.close()

    with pytest.raises(KeyboardInterrupt):
        use()
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(futures[place]._condition.acquire, timeout=1).result(WAIT)
