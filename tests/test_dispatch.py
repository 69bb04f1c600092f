"""A bounded window of tasks in flight, without a database."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from parallel_orm import gather
from parallel_orm.chunks import Chunk
from parallel_orm.dispatch import Window, dispatch
from parallel_orm.errors import WorkerDied
from parallel_orm.outcomes import Outcome

WAIT = 30


def endless_chunks(taken: list[int] | None = None):
    for index in itertools.count():
        if taken is not None:
            taken.append(index)
        yield Chunk(index, "default")


def some_chunks(number: int):
    return itertools.islice(endless_chunks(), number)


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

    outcomes = dispatch(endless_chunks(taken), send, window := Window(4))
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
    results = gather.listed(dispatch(some_chunks(5), send, window), window, ordered=ordered)
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

        outcomes = dispatch(some_chunks(8), send, Window(8))
        assert isinstance(next(outcomes).error, ValueError)
        futures[-1].add_done_callback(lambda future: gate.set())  # called when it is cancelled
        outcomes.close()
        assert futures[1].done()
        assert 1 in ended
        assert set(ended) <= {1, 2}, "the one that ran, and at most the one that its thread had taken up"
        assert all(future.cancelled() for future in futures[3:])


def test_a_lost_worker_names_its_chunk():
    def send(chunk):
        future: Future[Outcome] = Future()
        future.set_exception(WorkerDied(42, -9))
        return future

    (outcome,) = dispatch(some_chunks(1), send, Window(1), label="shop.Order")
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
        gather.listed(dispatch(chunks(), lambda chunk: pool.submit(one, chunk), window), window, ordered=True)
