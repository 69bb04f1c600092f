"""The testing kit: other executors, faults on request, functions that are not safe to run in parallel."""

from __future__ import annotations

import itertools
import os
import threading
import unittest
from concurrent.futures import ThreadPoolExecutor

import pytest
from django.db import OperationalError, transaction
from django.test import TestCase

from parallel_orm import Failure, errors
from parallel_orm.executors import choice
from parallel_orm.executors.processes import end_pools
from parallel_orm.faults import active
from parallel_orm.testing import assert_parallel_safe, fail_chunk, kill_worker, override_executor
from tests import functions
from tests.testapp.models import Article, Author

pytestmark = pytest.mark.pairs
ON = [{"processes": 2}, {"threads": 2}, {"executor": "inline"}]
on_each = pytest.mark.parametrize("on", ON, ids=["processes", "threads", "inline"])


@pytest.fixture(scope="module", autouse=True)
def _pools_end():
    yield
    end_pools()


@pytest.fixture(autouse=True)
def _nothing_is_left():
    yield
    assert not choice.overrides
    assert not active


@pytest.fixture
def articles(alias):
    Article.objects.using(alias).bulk_create(Article(name=f"name {n}", rank=n) for n in range(20))
    return Article.objects.using(alias).order_by("rank")


class TestOverrideExecutor:
    def test_every_call_uses_it(self, articles):
        for on in ON:
            with override_executor("inline"):
                results = articles.parallel_map(functions.pid, **on)
                assert set(results) == {os.getpid()}
                assert results.report.reason == "inline"
                with ThreadPoolExecutor(1) as pool, override_executor(pool):
                    assert articles.parallel_map(functions.pid, **on).report.reason is None
                assert articles.parallel_map(functions.pid, **on).report.reason == "inline"
            with override_executor("processes"):
                assert os.getpid() not in articles.parallel_map(functions.pid, **on)
        assert os.getpid() not in articles.parallel_map(functions.pid, 2)

    def test_one_within_the_other_ends_alone(self):
        with override_executor("inline"), override_executor("threads"):
            with override_executor("inline"):
                pass
            assert choice.overrides == ["inline", "threads"]

    def test_it_decorates(self, articles):
        @override_executor("inline")
        def decorated():
            return set(articles.parallel_map(functions.pid, 2))

        assert decorated() == {os.getpid()}

        @override_executor("inline")
        class Decorated(TestCase):
            def runTest(self):
                assert choice.overrides == ["inline"]

        result = unittest.TestResult()
        with_all = Decorated()
        with_all.databases = set()
        Decorated.databases = set()
        with_all.run(result)
        assert result.wasSuccessful(), result.errors + result.failures


class TestFailChunk:
    @on_each
    def test_the_chunk_fails(self, articles, on):
        with fail_chunk(1, ValueError("on request")), pytest.raises(ValueError, match="on request") as caught:
            articles.parallel_map(functions.rank, chunk_size=5, **on)
        assert any("chunk 1 " in line for line in caught.value.__notes__)
        assert articles.parallel_map(functions.rank, chunk_size=5, **on) == list(range(20))

    @on_each
    def test_with_an_exception_that_takes_other_arguments(self, articles, on):
        with fail_chunk(0, functions.Demanding(needed="this")), pytest.raises(functions.Demanding) as caught:
            articles.parallel_map(functions.rank, **on)
        assert caught.value.needed == "this"

    @on_each
    def test_it_is_tried_again(self, articles, on):
        with fail_chunk(1, OperationalError("gone"), times=2):
            results = articles.parallel_map(functions.rank, chunk_size=5, retries=2, **on)
            assert results == list(range(20))
            assert results.report.retries == 2
            with pytest.raises(OperationalError, match="gone"):
                articles.parallel_map(functions.rank, chunk_size=5, retries=1, **on)
            results = articles.parallel_map(functions.rank, chunk_size=5, on_error="collect", **on)
        assert [each.index for each in results if isinstance(each, Failure)] == [5, 6, 7, 8, 9]

    def test_it_decorates(self, articles):
        @fail_chunk(0, LookupError)
        def decorated():
            with pytest.raises(LookupError):
                articles.parallel_map(functions.rank, 2)

        decorated()


class TestKillWorker:
    @on_each
    def test_the_worker_dies(self, articles, on):
        with kill_worker(2), pytest.raises(errors.WorkerDied, match="SIGKILL") as caught:
            articles.parallel_map(functions.rank, chunk_size=5, **on)
        assert caught.value.chunk.index == 2
        assert (caught.value.pid == os.getpid()) is (on != {"processes": 2})

    @on_each
    def test_it_is_sent_again(self, articles, on):
        with kill_worker(0), kill_worker(3):
            results = articles.parallel_map(functions.rank, chunk_size=5, retries=1, **on)
        assert results == list(range(20))
        assert results.report.retries == 2
        with kill_worker(0, times=None), pytest.raises(errors.WorkerDied):
            articles.parallel_map(functions.rank, chunk_size=5, retries=1, **on)


# --- What is not safe -----------------------------------------------------------------

SETTING = 3
_counter = itertools.count()


def safe(row):
    return row.rank * 2


def safe_and_asking(row):
    return Author.objects.using(row._state.db).count()


def counting(row):
    return next(_counter)


def raising(row):
    raise ValueError(row.rank)


def locking(row):
    return Article.objects.using(row._state.db).select_for_update().get(pk=row.pk).rank


def locking_by_itself(row):
    with transaction.atomic(using=row._state.db):
        return Article.objects.using(row._state.db).select_for_update().get(pk=row.pk).rank


def on_commit(row):
    transaction.on_commit(print, using=row._state.db)


def of_a_global(row):
    return SETTING


class Running:
    """A running total."""

    def __init__(self):
        self.total = 0

    def __call__(self, row):
        self.total += row.rank
        return self.total


class First:
    """Does something else for its first row alone; in whatever order."""

    def __init__(self):
        self.been = False

    def __call__(self, row):
        been, self.been = self.been, True
        return been


def message(queryset, fn, **knobs):
    with pytest.raises(AssertionError) as caught:
        assert_parallel_safe(queryset, fn, **knobs)
    return str(caught.value)


@pytest.mark.parametrize("fn", [safe, safe_and_asking, raising, lambda row: row.name, locking_by_itself])
def test_what_is_safe(articles, fn):
    assert_parallel_safe(articles, fn)
    assert_parallel_safe(articles.none(), fn)


def test_what_depends_on_something(articles, monkeypatch):
    assert "state: two loops differ at primary keys" in message(articles, counting)
    said = message(articles, Running())
    assert "order: in another order" in said
    assert "state: in chunks of 1 rows" in said
    said = message(articles, First())
    assert said.startswith(f"{First()!r}"[:20])
    assert "state: in chunks of 1 rows" in said
    lock = threading.Lock()
    assert "unpicklable: <function" in message(articles, lambda row: lock is None)
    assert "unpicklable: its result for primary key" in message(articles, functions.held_lock)
    monkeypatch.setattr("tests.test_testing.SETTING", 4)
    said = message(articles, of_a_global)
    assert "process: in a worker process, other results at" in said
    assert said.count("  - ") == 1
    assert "and 15 more" in said


def test_results_may_be_as_good_as_the_same(articles):
    near = Running()
    assert "order" in message(articles, near)
    assert_parallel_safe(articles, near, equal=lambda one, other: True)


class InATestCase(TestCase):
    """Rows of the test are in no other process: they are sent there, or the function asks for nothing."""

    @classmethod
    def setUpTestData(cls):
        Article.objects.bulk_create(Article(name=f"name {n}", rank=n) for n in range(20))

    def test_it(self):
        articles = Article.objects.order_by("rank")
        assert_parallel_safe(articles, safe)
        assert_parallel_safe(articles, safe_and_asking)
        assert "calls on_commit()" in message(articles, on_commit)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tests.test_testing.SETTING", 4)
            assert "process: in a worker process" in message(articles, of_a_global)

    def test_faults(self):
        with fail_chunk(1, LookupError()), pytest.raises(LookupError):
            Article.objects.parallel_map(functions.rank, 2, chunk_size=5)
        with kill_worker(1):
            results = Article.objects.order_by("rank").parallel_map(functions.rank, 2, chunk_size=5, on_error="collect")
        assert [each.index for each in results if isinstance(each, Failure)] == [5, 6, 7, 8, 9]
        assert {type(each.error) for each in results.report.errors} == {errors.WorkerDied}


class WithLocks(TestCase):
    databases = {"postgres"}

    def test_locks(self):
        Article.objects.using("postgres").create(rank=1)
        articles = Article.objects.using("postgres")
        assert "locks rows (FOR UPDATE)" in message(articles, locking)
        assert_parallel_safe(articles, locking_by_itself)
