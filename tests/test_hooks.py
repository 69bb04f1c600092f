"""What workers are told before their first row and behind their last one, whatever else happens to them."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import islice

import pytest
from django.db import connections

from parallel_orm import current_worker, errors, report_of
from parallel_orm.executors import processes
from tests import functions
from tests.testapp.models import Article

WAIT = 60


@pytest.fixture(autouse=True)
def _new_pools():
    processes.end_pools()
    yield
    processes.end_pools()


@pytest.fixture
def articles(default):
    Article.objects.bulk_create(Article(rank=n) for n in range(50))
    return Article.objects.order_by("rank")


def test_as_many_calls_as_there_are_share_a_pool(articles):
    """A worker keeps the state of each until that ends."""
    with ExitStack() as stack:
        hooks = {"init_hook": functions.make_ready, "end_hook": functions.what_was_seen}
        streams = [
            stack.enter_context(articles.parallel_imap(functions.see, 1, chunk_size=5, **hooks)) for _ in range(20)
        ]
        for stream in streams:
            assert next(stream) == 0
        for stream in streams:
            assert list(stream) == [*range(1, 50)]
            ((_, _, seen),) = stream.report.end_results
            assert seen == [*range(50)]


def test_a_worker_that_another_call_ends_costs_this_one_nothing(articles, tmp_path, monkeypatch):
    """It is told of the end while it works for the other, and does not come to it."""
    send_ending, others = processes.ProcessPool._send_ending, []

    def send_and_say_so(pool, ending):
        ended = send_ending(pool, ending)
        (tmp_path / "go").touch()
        return ended

    def the_other():
        try:
            articles.parallel_each(partial(functions.wait_and_end, folder=str(tmp_path)), 1)
        except errors.WorkerDied as error:
            others.append(error)
        finally:
            connections.close_all()

    def occupy(done, total):
        if done == total:
            monkeypatch.setattr(processes.ProcessPool, "_send_ending", send_and_say_so)
            other.start()
            while not (tmp_path / "begun").exists():
                assert other.is_alive()

    other = threading.Thread(target=the_other)
    results = articles.parallel_map(functions.rank, 1, end_hook=functions.index_of, progress=occupy)
    other.join(WAIT)
    assert results == [*range(50)]
    assert results.report.end_results == []
    assert len(others) == 1


def test_a_worker_that_is_killed_at_rest_has_no_end(articles):
    with articles.parallel_imap(functions.rank, 1, chunk_size=50, end_hook=functions.index_of) as stream:
        assert list(islice(stream, 50)) == [*range(50)]
        (pool,) = processes._pools.values()
        (worker,) = pool._workers
        os.kill(worker.process.pid, signal.SIGKILL)
    assert stream.report.end_results == []


def test_a_worker_that_ends_at_its_end_is_an_error(articles):
    with pytest.raises(errors.WorkerDied, match="exit code 3"):
        articles.parallel_map(functions.rank, 1, end_hook=functions.end_abruptly)


@pytest.mark.parametrize("name", ["init_hook", "end_hook"])
def test_a_hook_that_cannot_travel_is_named(articles, name):
    lock = threading.Lock()

    def hold(worker):
        lock.acquire()

    with pytest.raises(errors.NotPicklable, match="hold"):
        articles.parallel_map(functions.rank, 1, **{name: hold})


@pytest.mark.parametrize("on", ["threads", "foreign"])
def test_what_the_others_return_is_there_where_one_end_fails(articles, on):
    together = threading.Barrier(2)

    def meet(row):
        if not hasattr(current_worker().state, "met"):
            current_worker().state.met = True
            together.wait(WAIT)

    def end(worker):
        if worker.index == 0:
            raise LookupError("no")
        return worker.index

    with ThreadPoolExecutor(2) as threads, pytest.raises(LookupError) as caught:
        knobs = {"threads": 2} if on == "threads" else {"executor": threads}
        articles.filter(rank__lt=2).parallel_map(meet, chunk_size=1, end_hook=end, **knobs)
    assert report_of(caught.value).end_results == [1]


def test_a_function_that_raises_what_ctrl_c_does_leaves_nothing(articles):
    with pytest.raises(KeyboardInterrupt):
        articles.parallel_map(functions.interrupt, 1)
    assert set(articles.parallel_map(functions.jobs_kept, 1)) == {1}


def test_workers_of_a_child_process_are_numbered(articles):
    """They are this process's own, whoever its parent is."""
    import multiprocessing

    context = multiprocessing.get_context("fork")
    found = context.SimpleQueue()

    def child():
        found.put(articles.parallel_map(lambda row: current_worker().index, threads=2))

    process = context.Process(target=child)
    process.start()
    process.join(WAIT)
    assert process.exitcode == 0
    assert set(found.get()) <= {0, 1}
