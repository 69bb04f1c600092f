"""Who does the work: the contract that holds for every executor, and what each can do."""

from __future__ import annotations

import multiprocessing
import os
import threading
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from operator import add
from time import monotonic

import pytest
from django.db import connections, transaction
from django.test import TestCase, override_settings

import parallel_orm
from parallel_orm import current_worker, errors
from parallel_orm.executors.processes import end_pools
from parallel_orm.options import from_settings
from parallel_orm.testing import override_executor
from tests import functions
from tests.clusters import dask_cluster
from tests.testapp.models import Article, Author, ByUuid

pytestmark = pytest.mark.pairs

OURS = {
    "forkserver": {"processes": 2},
    "spawn": {"processes": 2},
    "fork": {"processes": 2},
    "threads": {"threads": 2},
    "inline": {"executor": "inline"},
}
NAMED = ["processes", "threads", "crowd", "concurrent.futures.ThreadPoolExecutor", "tests.test_executors.POOL"]
POOL = ThreadPoolExecutor(2)


@pytest.fixture(scope="module", autouse=True)
def _pools_end():
    yield
    end_pools()


@pytest.fixture(scope="module")
def foreign():
    """Executors of the user's own."""
    with (
        ThreadPoolExecutor(2) as threads,
        ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as processes,
    ):
        yield {"foreign threads": threads, "foreign processes": processes, "foreign and odd": AtOnce()}


class AtOnce(Executor):
    """Does everything at once, in the thread that submits it, as people have them in their tests."""

    def submit(self, fn, /, *args, **kwargs):
        future: Future[object] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


@pytest.fixture(scope="module")
def dask():
    """A client of a cluster whose workers have settings of their own; started when a test first asks for it."""
    with dask_cluster() as client:
        yield client


@pytest.fixture(params=[*OURS, "foreign threads", "foreign processes", "foreign and odd", "dask"])
def on(request, foreign):
    method = request.param if request.param in ("spawn", "fork") else "forkserver"
    with override_settings(PARALLEL_ORM={"START_METHOD": method}):
        if request.param == "dask":
            yield {"executor": request.getfixturevalue("dask")}
        else:
            yield OURS[request.param] if request.param in OURS else {"executor": foreign[request.param]}


@pytest.fixture
def articles(alias):
    Article.objects.using(alias).bulk_create(Article(name=f"name {n}", rank=n, score=n % 5 or None) for n in range(50))
    return Article.objects.using(alias)


# --- The contract ---------------------------------------------------------------------


def test_the_family(articles, on):
    ordered = articles.order_by("-rank")
    ranks = list(range(49, -1, -1))
    assert ordered.parallel_map(functions.rank, chunk_size=7, **on) == ranks
    assert sorted(ordered.parallel_map(functions.rank, ordered=False, chunk_size=7, **on)) == sorted(ranks)
    assert list(ordered.parallel_imap(functions.rank, chunk_size=7, **on)) == ranks
    assert ordered.parallel_map(functions.ranks, batched=True, chunk_size=20, **on) == [
        ranks[:20],
        ranks[20:40],
        ranks[40:],
    ]
    assert ordered.parallel_reduce(lambda row: f"{row.rank},", add, chunk_size=7, **on) == "".join(
        f"{n}," for n in ranks
    )
    report = articles.parallel_each(functions.raise_score, chunk_size=7, **on)
    assert (report.rows, report.succeeded, report.failed) == (50, 50, 0)
    assert sum(report.workers.values()) == 50
    assert sorted(articles.values_list("score", flat=True)) == list(range(1000, 1050))
    factor = 3
    assert ordered.parallel_map(lambda row: row.rank * factor, **on) == [3 * n for n in ranks]


def test_errors_name_the_row(articles, on):
    with pytest.raises(ValueError, match="rank three: name 3") as caught:
        articles.order_by("rank").parallel_map(functions.fail_on_three, chunk_size=2, **on)
    key = articles.get(rank=3).pk
    assert any(f"primary key {key}" in line for line in caught.value.__notes__)
    assert any("chunk 1 " in line for line in caught.value.__notes__)


def test_nothing_is_kept_open(articles, alias, on):
    connections[alias].close()
    list(articles.parallel_imap(functions.rank, chunk_size=7, **on))
    with articles.parallel_imap(functions.rank, chunk_size=1, **on) as stream:
        next(stream)
    others = {
        "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        " AND pid <> pg_backend_pid() AND backend_type = 'client backend'",
        "mysql": "SELECT count(*) FROM information_schema.processlist WHERE db = database() AND id <> connection_id()",
        "sqlite": "SELECT 0",
    }[connections[alias].vendor]
    until, left = monotonic() + 60, 1
    while left and monotonic() < until:  # the server takes a moment to see that a client has gone
        with connections[alias].cursor() as cursor:
            cursor.execute(others)
            (left,) = cursor.fetchone()
    assert left == 0


def test_hooks(articles, on, request):
    """Each worker is made ready before its first row; a list of its own has all that it saw, in the end."""
    if request.node.callspec.params["on"] in ("foreign processes", "foreign and odd", "dask"):
        with pytest.raises(errors.InvalidOption, match="no way to reach each of its processes"):
            articles.parallel_map(functions.see, end_hook=functions.what_was_seen, **on)
        assert len(articles.parallel_map(functions.see, init_hook=functions.make_ready, chunk_size=5, **on)) == 50
        return
    results = articles.parallel_map(
        functions.see, init_hook=functions.make_ready, end_hook=functions.what_was_seen, chunk_size=5, **on
    )
    ends = results.report.end_results
    assert sorted(rank for _, _, seen in ends for rank in seen) == list(range(50))
    indexes = [index for index, _, _ in ends]
    assert len(set(indexes)) == len(indexes)
    assert set(indexes) <= set(range(4))
    assert {pid for _, pid, _ in ends} == {int(worker.partition("/")[0]) for worker in results.report.workers}


def test_state_is_for_one_call(articles, on):
    for _ in range(2):
        had = articles.order_by("rank").parallel_map(functions.has_state, chunk_size=5, **on)
        assert set(had) == {True, False}
        assert had[0] is False


def test_hooks_that_fail(articles, on):
    with pytest.raises(LookupError, match="no"):
        articles.parallel_map(functions.rank, init_hook=functions.refuse, chunk_size=5, **on)


def test_several_querysets(articles, alias, on):
    Author.objects.using(alias).create(name="Ada")
    ByUuid.objects.using(alias).bulk_create(ByUuid(number=n) for n in range(5))
    querysets = [
        articles.filter(rank__lt=10).order_by("-rank"),
        Author._base_manager.using(alias),
        articles.none(),
        articles.filter(rank__gte=40).order_by("rank").values("name"),
        ByUuid.objects.using(alias).order_by("number"),
    ]
    name = functions.name_of_anything
    expected = [name(row) for queryset in querysets for row in queryset]
    results = parallel_orm.parallel_map(querysets, name, chunk_size=3, **on)
    assert results == expected
    assert results.report.rows == len(expected)
    assert list(parallel_orm.parallel_imap(querysets, name, chunk_size=3, **on)) == expected
    assert parallel_orm.parallel_reduce(querysets, name, add, "", chunk_size=3, **on) == "".join(expected)
    assert parallel_orm.parallel_each(querysets, name, chunk_size=3, **on).rows == len(expected)
    results = parallel_orm.parallel_map(
        [articles.filter(rank__lt=9), articles.filter(rank__gte=9)], functions.fail_on_sevens, on_error="collect", **on
    )
    assert [each.index for each in sorted(results.report.errors, key=lambda each: each.index)] == [
        n for n in range(50) if n % 7 == 3
    ]
    assert len(results.report.retry()) == len(results.report.errors)


# --- Each by itself -------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMED)
def test_by_a_name(default, name):
    articles = Article.objects.using(default)
    articles.bulk_create(Article(name=f"name {n}", rank=n) for n in range(50))
    named = {"crowd": {"BACKEND": "concurrent.futures.ThreadPoolExecutor", "OPTIONS": {"max_workers": 3}}}
    with override_settings(PARALLEL_ORM={"PROCESSES": 2, "EXECUTORS": named}):
        results = articles.parallel_map(
            functions.see,
            executor=name,
            init_hook=functions.make_ready,
            end_hook=functions.what_was_seen,
            chunk_size=5,
        )
    assert sorted(results) == list(range(50))
    assert results.report.reason is None
    assert sorted(rank for _, _, seen in results.report.end_results for rank in seen) == list(range(50))


def test_of_no_querysets():
    assert parallel_orm.parallel_map([], functions.rank) == []
    assert list(parallel_orm.parallel_imap([], functions.rank)) == []
    assert parallel_orm.parallel_each([], functions.rank).rows == 0
    assert parallel_orm.parallel_reduce([], functions.rank, add, 5) == 5
    with pytest.raises(TypeError, match="of no results"):
        parallel_orm.parallel_reduce([], functions.rank, add)


def test_what_are_no_querysets(articles):
    for given in (articles, Article.objects, 3, [3], [articles, None]):
        with pytest.raises(errors.InvalidOption, match="takes an iterable of querysets"):
            parallel_orm.parallel_map(given, functions.rank)


def test_querysets_of_several_databases(default, other):
    for number, alias in enumerate((default, other)):
        Article.objects.using(alias).bulk_create(
            Article(name=alias, rank=n) for n in range(10 * number, 10 * number + 10)
        )
    querysets = [Article.objects.using(alias).order_by("rank") for alias in (default, other)]
    results = parallel_orm.parallel_map(querysets, functions.rank, 2, chunk_size=3)
    assert results == list(range(20))
    assert results.report.by_alias == {default: 10, other: 10}


def test_inline_is_the_callers_own_connection_and_transaction(articles, alias):
    with transaction.atomic(using=alias):
        articles.create(name="new", rank=1000)
        results = articles.order_by("-rank").parallel_map(functions.rank, executor="inline")
        assert results[0] == 1000
        assert results.report.reason == "inline"
        assert set(results.report.workers) == {f"{os.getpid()}/{threading.current_thread().name}"}
        held = threading.Lock()
        assert articles.parallel_map(lambda row: held is not None, executor="inline")[0], "nothing travels"


def test_what_was_given_stays_open_and_what_was_made_is_closed(articles):
    with ThreadPoolExecutor(1) as pool:
        for _ in range(2):
            assert len(articles.parallel_map(functions.rank, executor=pool)) == 50
    made = []

    class Made(ThreadPoolExecutor):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    assert len(articles.parallel_map(functions.rank, executor=Made)) == 50
    with pytest.raises(RuntimeError, match="after shutdown"):
        made[0].submit(print)


def test_a_map_within_the_pool_that_it_is_given(articles):
    """All of its threads wait for their maps, which wait for threads: whoever waits does the work."""
    with ThreadPoolExecutor(2) as pool:
        together = threading.Barrier(2)

        def mapped():
            together.wait(60)
            try:
                return articles.parallel_map(functions.rank, executor=pool, chunk_size=5)
            finally:
                connections.close_all()  # the threads' own, as a caller of them would

        futures = [pool.submit(mapped) for _ in range(2)]
        assert [sorted(future.result(60)) for future in futures] == [list(range(50))] * 2


def test_a_pool_that_is_broken(articles):
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with pytest.raises(Exception, match="terminated abruptly") as caught:
            articles.order_by("rank").parallel_map(functions.die_on_three, executor=pool, chunk_size=5)
    assert any("chunk 0 " in line and "testapp.Article" in line for line in caught.value.__notes__)


def test_an_error_names_the_model_of_its_chunk(articles, alias):
    authors = Author._base_manager.using(alias)
    authors.create(name="Ada")
    with pytest.raises(errors.WorkerDied, match=r"testapp\.Article") as caught:
        parallel_orm.parallel_map([authors.all(), articles.order_by("pk")], functions.die_on_three_articles, 2)
    assert caught.value.chunk.plan == 1


def test_what_makes_a_worker_ready_does_not_count(default):
    """A model that takes long to be loaded is loaded once; the time of a chunk begins behind it."""
    articles = Article.objects.using(default)
    articles.bulk_create(Article(name=f"name {n}", rank=n) for n in range(50))
    results = articles.parallel_map(functions.rank, 2, init_hook=functions.take_long, timeout=2, chunk_size=25)
    assert len(results) == 50
    with override_executor("threads"):
        assert len(articles.parallel_map(functions.rank, 2, timeout=2)) == 50


def test_a_snapshot_inline(postgres):
    Article.objects.using(postgres).create(rank=1)
    results = Article.objects.using(postgres).parallel_map(functions.rank, executor="inline", consistent=True)
    assert (results, results.report.reason) == ([1], "inline")


def test_settings_name_ours_with_numbers(articles):
    named = {
        "two": {"BACKEND": "processes", "OPTIONS": {"processes": 2}},
        "one thread": {"BACKEND": "threads", "OPTIONS": {"threads": 1}},
    }
    with override_settings(PARALLEL_ORM={"EXECUTORS": named, "PROCESSES": 1}):
        assert len(articles.parallel_map(functions.rank, executor="two").report.workers) >= 1
        results = articles.parallel_map(functions.rank, executor="one thread", chunk_size=5)
        assert len(results.report.workers) == 1


@pytest.mark.parametrize(
    ("executor", "message"),
    [
        (3, r"has no submit\(\)"),
        ("nobody", "no executor that is known here; there are 'inline', 'threads', 'processes'"),
        ("no.such.module", "cannot be imported"),
        ("tests.test_executors.OURS", "neither an executor nor makes one"),
        ("tests.functions.zero", None),
        ("builtins.dict", "which is no concurrent.futures.Executor"),
        ("celery", "finds no Celery app of this project"),
    ],
)
def test_bad_executors(articles, executor, message):
    with pytest.raises((errors.InvalidOption, TypeError), match=message):
        articles.parallel_map(functions.rank, executor=executor)
    with pytest.raises(errors.InvalidOption, match="has no threads"):
        articles.parallel_map(functions.rank, executor="processes", threads=3)


@pytest.mark.parametrize(
    "named",
    [
        3,
        {"a": 3},
        {"a": {}},
        {"a": {"BACKEND": 3}},
        {"a": {"BACKEND": "x", "OPTIONS": 3}},
        {"a": {"BACKEND": "x", "MORE": 1}},
        {"inline": {"BACKEND": "x"}},
        {"a": {"BACKEND": "processes", "OPTIONS": {"procesess": 1}}},
        {"a": {"BACKEND": "processes", "OPTIONS": {"processes": "1"}}},
        {"a": {"BACKEND": "threads", "OPTIONS": {"max_workers": 1}}},
        {"a": {"BACKEND": "inline", "OPTIONS": {"inline": 1}}},
    ],
    ids=str,
)
def test_bad_settings(named):
    with override_settings(PARALLEL_ORM={"EXECUTORS": named}), pytest.raises(errors.InvalidOption, match="EXECUTORS"):
        from_settings()


def test_processes_that_several_machines_share_tell_their_jobs_apart(articles, monkeypatch):
    """In containers process ids are alike."""
    end_pools()  # whose idle workers would not know their parent
    there = Executor()
    monkeypatch.setattr(there, "submit", functions.submit_here, raising=False)
    monkeypatch.setattr(os, "getpid", lambda: 1)
    for count in range(2):
        monkeypatch.setattr("parallel_orm.parcels._parcel_numbers", iter(range(9)), raising=False)
        assert articles.parallel_map(lambda row, count=count: count, executor=there) == [count] * 50


def test_nobody_works_here():
    with pytest.raises(errors.NoWorker, match="nothing of the kind is running here"):
        current_worker()


def test_end_hooks_of_a_call_that_fails(articles):
    for on in ({"processes": 2}, {"threads": 2}, {"executor": "inline"}):
        with pytest.raises(ValueError, match="rank 3") as caught:
            articles.order_by("rank").parallel_map(
                functions.fail_on_sevens,
                init_hook=functions.make_ready,
                end_hook=functions.what_was_seen,
                chunk_size=25,
                **on,
            )
        report = parallel_orm.report_of(caught.value)
        assert report is not None
        assert report.end_results
        with pytest.raises(LookupError, match="no"):
            articles.parallel_map(functions.rank, end_hook=functions.refuse, **on)
        with pytest.raises(ValueError, match="rank 3") as caught:
            articles.order_by("rank").parallel_map(functions.fail_on_sevens, end_hook=functions.refuse, **on)
        assert any("its end_hook raised LookupError" in line for line in caught.value.__notes__)


def test_an_end_result_that_cannot_travel(articles):
    with pytest.raises(Exception, match="pickle"):
        articles.parallel_map(functions.rank, 2, end_hook=functions.lock)


def test_hooks_ask_the_database_as_their_worker(articles, on):
    if "executor" in on and not isinstance(on["executor"], str) and not isinstance(on["executor"], ThreadPoolExecutor):
        pytest.skip("has no end_hook")
    alias = articles.db
    results = articles.parallel_map(
        functions.rank, end_hook=lambda worker: Article.objects.using(alias).count(), chunk_size=5, **on
    )
    assert set(results.report.end_results) == {50}


class InATestCase(TestCase):
    def test_hooks_and_executors(self):
        Article.objects.bulk_create(Article(name=f"name {n}", rank=n) for n in range(5))
        for on in ({"processes": 2}, {"threads": 2}, {"executor": "inline"}, {"executor": POOL}):
            results = Article.objects.parallel_map(
                functions.see, init_hook=functions.make_ready, end_hook=functions.what_was_seen, **on
            )
            assert results.report.end_results == [(0, os.getpid(), list(range(5)))]
        lock = threading.Lock()
        for on in ({"threads": 2}, {"executor": POOL}):  # which pack nothing elsewhere
            assert all(Article.objects.parallel_map(lambda row: lock is not None, **on))
