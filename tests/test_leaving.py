"""Calls that are left half-way, where nobody could wait for them."""

from __future__ import annotations

import gc
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from django.db import connections

from parallel_orm import errors
from parallel_orm.executors import processes
from parallel_orm.leaving import may_wait
from tests import functions
from tests.testapp.models import Article

WAIT = 30
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


class Circle:
    """Is let go when circles are collected, with what it holds."""

    def __init__(self, stream):
        self.itself, self.stream = self, stream


@pytest.fixture
def collects_late():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def some(alias):
    Article.objects.using(alias).bulk_create(Article(rank=n) for n in range(20))
    return Article.objects.using(alias).order_by("pk")


@pytest.mark.parametrize("end_hook", [None, functions.index_of])
def test_a_worker_that_collects_its_own_stream_does_not_wait_for_itself(default, collects_late, end_hook):
    begun, dropped, worker = threading.Event(), threading.Event(), []

    def fn(row):
        if row.rank:
            worker.append(threading.current_thread())
            begun.set()
            assert dropped.wait(WAIT)
            gc.collect()
        return row.rank

    circle = Circle(some(default).parallel_imap(fn, threads=1, chunk_size=1, end_hook=end_hook))
    assert next(circle.stream) == 0
    assert begun.wait(WAIT)
    del circle
    dropped.set()
    worker[0].join(WAIT)
    assert not worker[0].is_alive()
    assert len(worker) == 1, "nothing else was begun"


def test_nor_does_the_manager_of_the_processes(default, collects_late, monkeypatch):
    """Or no map would ever have an answer again."""
    answer, collected = processes.answer, []

    def collecting(*args):
        answer(*args)
        collected.append(gc.collect())

    articles = some(default)
    circle = Circle(articles.parallel_imap(functions.rank, processes=1, chunk_size=1))
    assert next(circle.stream) == 0
    monkeypatch.setattr(processes, "answer", collecting)
    del circle
    results = []

    def map_again():
        results.extend(articles.parallel_map(functions.rank, processes=1, chunk_size=5))
        connections.close_all()

    again = threading.Thread(target=map_again, daemon=True)
    again.start()
    again.join(WAIT)
    assert results == [*range(20)]
    assert collected
    processes.end_pools()


@pytest.fixture(params=["threads", "processes", "foreign", "made"])
def on(request):
    if request.param == "foreign":
        with ThreadPoolExecutor(2) as threads:
            yield {"executor": threads}
    else:
        path = "concurrent.futures.ThreadPoolExecutor"
        yield {"executor": path} if request.param == "made" else {request.param: 2}


@pytest.mark.parametrize("consistent", [False, True])
def test_a_forked_child_lets_go_or_refuses(postgres, on, consistent):
    """And the parent goes on, whose workers end once."""
    stream = some(postgres).parallel_imap(
        functions.rank, chunk_size=1, consistent=consistent, end_hook=functions.index_of, **on
    )
    assert next(stream) == 0
    pools = [*processes._pools.values()]

    def refused():
        with pytest.raises(errors.ParallelORMError, match="forked"):
            list(stream)

    def let_go():
        stream.close()
        assert stream.report.end_results == []
        assert not any(pool._endings for pool in pools), "the parent's manager is told nothing"

    for leave in (let_go, refused):
        assert in_child(leave) == 0
    assert list(stream) == [*range(1, 20)]
    assert stream.report.end_results


def in_child(call):
    """Return how a child ends that makes this call."""
    pid = os.fork()
    if pid == 0:
        ending = 1
        threading.Timer(WAIT, os._exit, [2]).start()
        try:
            call()
            ending = 0
        finally:
            os._exit(ending)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_who_may_wait():
    assert may_wait(os.getpid())
    assert not may_wait(os.getpid() + 1)
    said = []
    ours = threading.Thread(target=lambda: said.append(may_wait(os.getpid())), name="parallel_orm-map_0")
    ours.start()
    ours.join()
    assert said == [False]
