"""parallel_map: Python over every row, on all cores, nothing lost."""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest
from django.db import DatabaseError, connections, transaction
from django.db.models import Avg, Count, F, Window
from django.db.models.functions import Lower, RowNumber
from django.test import TestCase, override_settings
from django.test.utils import CaptureQueriesContext
from django.utils import timezone, translation
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parallel_orm import Report, Results, errors
from parallel_orm.connections import lender
from parallel_orm.executors import processes
from parallel_orm.executors.processes import ProcessPool, end_pools, process_pool
from parallel_orm.options import from_settings
from tests import functions
from tests.testapp.models import Article, Author, ByText, ByUuid, Note, RankedArticle, Seat, Tag

pytestmark = pytest.mark.pairs
WAIT = 60
ON = [{"processes": 2}, {"threads": 2}]
on_each = pytest.mark.parametrize("on", ON, ids=["processes", "threads"])


@pytest.fixture
def articles(alias):
    Article.objects.using(alias).bulk_create(
        Article(name=f"name {n % 7}", rank=n, score=n % 5 or None) for n in range(50)
    )
    return Article.objects.using(alias)


@pytest.fixture(scope="module", autouse=True)
def _pools_end():
    yield
    end_pools()


@on_each
@pytest.mark.parametrize("chunk_size", [1, 7, 50, 1000])
def test_results_are_those_of_a_loop(articles, on, chunk_size):
    results = articles.parallel_map(functions.name_and_key, chunk_size=chunk_size, **on)
    assert results == [(a.name, a.pk) for a in articles.order_by("pk")]
    assert isinstance(results, Results)
    assert (results.report.rows, results.report.chunks) == (50, -(-50 // chunk_size))


@on_each
@pytest.mark.parametrize(
    "order",
    [
        ("pk",),
        ("-pk",),
        ("name",),
        ("-name", "rank"),
        ("score", "-pk"),
        (Lower("name").desc(), "rank"),
        ("author__name",),
    ],
    ids=str,
)
def test_results_come_in_the_order_of_the_queryset(articles, on, order):
    for queryset in (articles.order_by(*order), articles.order_by(*order).reverse()):
        expected = [(a.name, a.pk) for a in queryset]
        if order in (("name",), ("author__name",)):  # the list leaves ties open
            expected.sort(key=lambda row: ((row[0] if order == ("name",) else ""), row[1]))
            if not queryset.query.standard_ordering:
                expected.reverse()
        assert queryset.parallel_map(functions.name_and_key, chunk_size=7, **on) == expected


def test_unordered_results_are_all_there(articles):
    results = articles.order_by("name").parallel_map(functions.name_and_key, 2, chunk_size=3, ordered=False)
    assert sorted(results) == sorted((a.name, a.pk) for a in articles.all())
    random = articles.order_by("?").parallel_map(functions.name_and_key, 2, chunk_size=3)
    assert sorted(random) == sorted(results)


def test_meta_ordering_counts(articles, alias):
    ranked = RankedArticle.objects.using(alias)
    assert ranked.parallel_map(lambda a: a.rank, 2, chunk_size=7) == list(range(49, -1, -1))


@on_each
def test_any_callable(articles, on):
    factor = 3
    ranks = [a.rank for a in articles.order_by("pk")]
    for function in (
        lambda a: a.rank * factor,
        functools.partial(lambda factor, a: a.rank * factor, 3),
        functions.Methods(3),
        functions.Methods(3).method,
    ):
        assert articles.parallel_map(function, **on) == [rank * 3 for rank in ranks]


@on_each
def test_rows_come_as_the_queryset_has_them(articles, alias, on):
    author = Author.objects.using(alias).create(name="Ada")
    tag = Tag.objects.using(alias).create(name="t")
    articles.update(author=author)
    for article in articles.filter(rank__lt=5):
        article.tags.add(tag)
    by_key = articles.order_by("pk")
    assert by_key.values("rank").parallel_map(lambda row: row, **on) == list(by_key.values("rank"))
    assert by_key.values_list("rank", "name").parallel_map(lambda row: row, **on) == list(
        by_key.values_list("rank", "name")
    )
    assert by_key.values_list("rank", flat=True).parallel_map(lambda row: row, **on) == list(range(50))
    related = by_key.select_related("author").prefetch_related("tags").annotate(n=Count("tags"), double=F("rank") * 2)
    seen = related.parallel_map(
        lambda a: (a.author.name, [t.name for t in a.tags.all()], a.n, a.double), chunk_size=7, **on
    )
    assert seen == [("Ada", ["t"] if n < 5 else [], int(n < 5), 2 * n) for n in range(50)]
    assert by_key.only("rank").parallel_map(lambda a: sorted(a.get_deferred_fields()), **on)[0] == sorted(
        by_key.only("rank")[0].get_deferred_fields()
    )
    known = author.articles.order_by("pk").parallel_map(lambda a: a.author.name, **on)
    assert known == ["Ada"] * 50
    assert by_key[10:20].parallel_map(lambda a: a.rank, chunk_size=3, **on) == list(range(10, 20))
    assert articles.order_by("-rank")[:5].parallel_map(lambda a: a.rank, chunk_size=2, **on) == [49, 48, 47, 46, 45]
    assert articles[10:14].parallel_map(lambda a: a.rank, chunk_size=3, **on) == [10, 11, 12, 13], "by primary key"


def test_a_join_that_repeats_rows_repeats_them(articles, alias):
    tags = [Tag.objects.using(alias).create(name=f"t{n}") for n in range(3)]
    for article in articles.all():
        article.tags.add(*tags[: article.rank % 4])
    joined = articles.filter(tags__name__startswith="t").order_by("pk")
    expected = [a.pk for a in joined]
    assert len(expected) > len(set(expected))
    assert joined.parallel_map(lambda a: a.pk, 2, chunk_size=3) == expected
    with pytest.raises(errors.UnsupportedQuerySet, match="same row several times"):
        joined.order_by("name").parallel_map(functions.pid, 2)
    with pytest.raises(errors.UnsupportedQuerySet, match="same row several times"):
        joined.all()[:5].parallel_map(functions.pid, 2)
    by_tag = articles.filter(rank__lt=8)
    for order in ("tags__name", Lower("tags__name")):
        for queryset in (by_tag.order_by(order), by_tag.order_by("pk", order), by_tag.order_by(order)[:5]):
            for ordered in (True, False):
                with pytest.raises(errors.UnsupportedQuerySet, match="something that a row has many of"):
                    queryset.parallel_map(functions.pid, 2, ordered=ordered)
    counted = by_tag.annotate(n=Count("tags")).order_by("-n", "pk")
    assert counted.parallel_map(lambda a: (a.n, a.pk), 2, chunk_size=3) == [(a.n, a.pk) for a in counted]
    assert len(by_tag.order_by(Lower("author__name"))[:5].parallel_map(functions.pid, 2)) == 5
    assert joined.distinct().order_by("name").parallel_map(lambda a: a.pk, 2) == [
        a.pk for a in joined.distinct().order_by("name", "pk")
    ]


def test_lists_of_keys_longer_than_a_query_may_have_parameters(default):
    """SQLite refuses more than its limit; chunks of keys stay below it."""
    connection = connections[default]
    Article.objects.using(default).bulk_create(Article(rank=n) for n in range(100))
    before = connection.connection.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 60)
    try:
        walked = list(Article.objects.using(default).order_by("-rank")[:80].chunked_iterator(1000))
    finally:
        connection.connection.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, before)
    assert [article.rank for article in walked] == list(range(99, 19, -1))


def test_rows_that_are_none_of_the_models(articles):
    """Groups, what distinct() has made one, and unions travel to processes, and come back whole and in order."""
    for queryset in (
        articles.values("name").annotate(n=Count("pk")).order_by("-n", "name"),
        articles.values_list("score", flat=True).distinct().order_by("-score"),
        articles.order_by(Lower("name"), "-pk"),
        articles.filter(rank__lt=9).union(articles.filter(rank=30)).order_by("-rank"),
    ):
        assert queryset.parallel_map(functions.itself, 2, chunk_size=3) == list(queryset)
    groups = articles.values_list("score").annotate(n=Count("pk")).order_by("?")
    assert set(groups.parallel_map(functions.itself, 2, chunk_size=2)) == set(groups)


def test_other_keys(alias):
    ByUuid.objects.using(alias).bulk_create(ByUuid(number=n) for n in range(30))
    ByText.objects.using(alias).bulk_create(ByText(code=f"{n % 5} {n}", number=n) for n in range(30))
    Seat.objects.using(alias).bulk_create(Seat(row=row, number=n) for row in "CAB" for n in (3, 1, 2, 10))
    for model in (ByUuid, ByText, Seat):
        rows = model.objects.using(alias).order_by("pk")
        assert rows.parallel_map(lambda row: row.pk, 2, chunk_size=4) == [row.pk for row in rows]


@on_each
def test_nothing_to_do(alias, on):
    for queryset in (Article.objects.using(alias), Article.objects.using(alias).none()):
        results = queryset.parallel_map(functions.pid, **on)
        assert (results, results.report.rows) == ([], 0)


def test_two_processes_work_at_once(articles):
    """Two rows meet at a barrier in two processes: one after the other they never would."""
    with multiprocessing.Manager() as manager:
        barrier = manager.Barrier(2)

        def meet(row):
            barrier.wait(WAIT)
            return os.getpid()

        pids = articles.filter(rank__lt=2).parallel_map(meet, 2, chunk_size=1)
    assert len(set(pids)) == 2
    assert os.getpid() not in pids


def test_threads_work_at_once_in_this_process(articles):
    barrier = threading.Barrier(3)

    def meet(row):
        barrier.wait(WAIT)
        return os.getpid()

    assert articles.filter(rank__lt=3).parallel_map(meet, threads=3, chunk_size=1) == [os.getpid()] * 3


def test_processes_are_warm_for_the_next_call(articles):
    first = set(articles.parallel_map(functions.pid, 2, chunk_size=1))
    assert set(articles.parallel_map(functions.pid, 2, chunk_size=1)) <= first | {os.getpid()}
    assert os.getpid() not in first


@on_each
def test_an_exception_keeps_its_type_and_tells_where(articles, on):
    third = articles.get(rank=3)
    with pytest.raises(ValueError, match="rank three: name 3") as raised:
        articles.parallel_map(functions.fail_on_three, chunk_size=5, **on)
    notes = "\n".join(raised.value.__notes__)
    assert f"primary key {third.pk}" in notes
    assert "row 3 of its chunk" in notes
    assert "chunk 0" in notes
    assert "testapp.Article" in notes
    assert "in fail_on_three" in str(raised.value.__cause__)


def test_exceptions_that_cannot_be_rebuilt(articles):
    with pytest.raises(errors.RemoteError) as raised:
        articles.parallel_map(functions.raise_strange, 2)
    assert raised.value.type_name == "tests.functions.Strange"
    assert raised.value.message == "this and that"
    assert "in raise_strange" in raised.value.traceback
    assert any("primary key" in note for note in raised.value.__notes__)


@on_each
def test_exceptions_with_an_init_of_their_own(articles, on):
    """They arrive as they are, text and attributes too, whatever arguments they take."""
    with pytest.raises(functions.Doubled) as doubled:
        articles.parallel_map(functions.raise_doubled, **on)
    assert (str(doubled.value), doubled.value.code) == ("code 3", 3)
    with pytest.raises(functions.Demanding) as demanding:
        articles.parallel_map(functions.raise_demanding, **on)
    assert (str(demanding.value), demanding.value.needed) == ("demanding", "x")


def test_an_interrupt_of_a_function_is_no_interrupt_of_the_caller(articles):
    """It is raised as inline, and the workers, which others may be using, live on."""
    pids = set(articles.parallel_map(functions.pid, 2, chunk_size=1))
    with pytest.raises(KeyboardInterrupt):
        articles.parallel_map(functions.interrupt, 2)
    assert set(articles.parallel_map(functions.pid, 2, chunk_size=1)) & pids


def test_a_result_that_asks_the_database_when_it_is_packed(articles, alias):
    results = articles.order_by("pk").parallel_map(functions.queryset, 2)
    assert [[row.rank for row in rows] for rows in results] == [[n] for n in range(50)]
    test_workers_hold_no_connection_after_the_call(articles, alias)


def test_settings_that_the_test_runner_assigned_reach_the_worker(articles):
    """A worker of a test sends no mail either."""
    assert set(articles.parallel_map(functions.email_backend, 2)) == {"django.core.mail.backends.locmem.EmailBackend"}


def test_where_no_thread_can_be_started_it_is_an_error(articles, monkeypatch):
    def start(self):
        raise RuntimeError("can't start new thread")

    end_pools()
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="new thread"):
        articles.parallel_map(functions.pid, 2)
    monkeypatch.undo()
    assert len(articles.parallel_map(functions.pid, 2)) == 50


def test_threads_renew_a_connection_that_died_while_idle(postgres, monkeypatch):
    monkeypatch.setattr("parallel_orm.connections.under_test", lambda: False)
    articles = Article.objects.using(postgres)
    articles.bulk_create(Article(rank=n) for n in range(10))
    assert len(articles.parallel_map(functions.pid, threads=1)) == 10
    try:
        with connections[postgres].cursor() as cursor:
            cursor.execute(
                "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            assert cursor.fetchall()
        assert len(articles.parallel_map(functions.pid, threads=1)) == 10
    finally:
        lender.close_idle()


def test_exceptions_of_models_and_of_main_keep_their_type(articles):
    with pytest.raises(Article.DoesNotExist):
        articles.parallel_map(functions.raise_missing, 2)

    class Local(Exception):
        pass

    def fail(row):
        raise Local(row.rank)

    with pytest.raises(Local):
        articles.parallel_map(fail, 2)


def test_sys_exit_in_a_function_is_raised_as_inline(articles):
    with pytest.raises(SystemExit, match="3"):
        articles.parallel_map(lambda row: sys.exit(3), 2)
    assert articles.parallel_map(functions.pid, 2)


@pytest.mark.parametrize(
    ("function", "how"), [(functions.die_on_three, "SIGKILL"), (functions.leave_on_three, "exit code 7")]
)
def test_a_killed_worker_is_an_error_that_names_its_chunk(articles, function, how):
    """Never a hang and never a short result; and the pool serves the next call."""
    third = articles.get(rank=3)
    with pytest.raises(errors.WorkerDied, match=how) as raised:
        articles.order_by("pk").parallel_map(function, 2, chunk_size=2)
    chunk = raised.value.chunk
    assert (chunk.index, chunk.until) == (1, (third.pk,))
    assert "chunk 1" in str(raised.value)
    assert "testapp.Article" in str(raised.value)
    assert len(articles.parallel_map(functions.pid, 2, chunk_size=2)) == 50


def test_after_an_error_what_was_not_begun_is_not_run(articles, tmp_path):
    def touch(row):
        (tmp_path / str(row.rank)).touch()
        if row.rank == 0:
            raise ValueError

    with pytest.raises(ValueError):
        articles.order_by("pk").parallel_map(touch, 2, chunk_size=1)
    ran = {int(path.name) for path in tmp_path.iterdir()}
    articles.parallel_map(functions.pid, 2, chunk_size=1)
    assert {int(path.name) for path in tmp_path.iterdir()} == ran, "nothing goes on after the call"
    assert len(ran) < 50


def test_results_that_cannot_travel(articles):
    with pytest.raises(errors.NotPicklable, match="result of held_lock") as raised:
        articles.parallel_map(functions.held_lock, 2)
    assert any("chunk 0" in note for note in raised.value.__notes__)
    assert callable(articles.parallel_map(lambda row: lambda: row.rank, 2)[7]), "a lambda can"


def test_functions_that_cannot_travel(articles):
    lock = threading.Lock()
    with pytest.raises(errors.NotPicklable, match="use threads="):
        articles.parallel_map(lambda row: lock, 2)
    assert articles.parallel_map(lambda row: lock.locked(), threads=2) == [False] * 50


def test_querysets_that_cannot_travel(articles):
    queryset = articles.all()
    queryset.lock = threading.Lock()
    queryset._hints["lock"] = queryset.lock
    with pytest.raises(errors.NotPicklable, match="queryset of testapp.Article"):
        queryset.parallel_map(functions.pid, 2)


@on_each
def test_the_neighbourhood_of_the_caller(articles, on):
    with translation.override("de"), timezone.override("Asia/Kathmandu"):
        assert set(articles.parallel_map(functions.neighbourhood, **on)) == {("de", "Asia/Kathmandu")}
    assert set(articles.parallel_map(functions.neighbourhood, **on)) == {("en-us", "UTC")}


def test_settings_that_a_test_overrides_reach_the_worker(articles):
    from django.conf import settings as django_settings

    def setting(row):
        return getattr(django_settings, "OF_THIS_TEST", None)

    with override_settings(OF_THIS_TEST="seen"):
        assert set(articles.parallel_map(setting, 2)) == {"seen"}
    assert set(articles.parallel_map(setting, 2)) == {None}


@pytest.mark.parametrize("method", ["forkserver", "spawn", "fork"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_no_connection_crosses_into_a_worker(articles, method):
    """Under each start method a worker has its own connections alone, and the caller's goes on working."""
    with override_settings(PARALLEL_ORM={"START_METHOD": method, "PROCESSES": 2}):
        assert articles.parallel_map(functions.inherited_connections, chunk_size=10) == [[]] * 50
        assert articles.count() == 50
        with pytest.raises(errors.WorkerDied):
            articles.parallel_map(functions.die_on_three, chunk_size=10)
        assert articles.count() == 50, "the death of a worker does not end the caller's session"
        end_pools()
        assert articles.count() == 50


def test_workers_hold_no_connection_after_the_call(articles, alias):
    """Asked of the server."""
    if connections[alias].vendor != "postgresql":
        assert articles.parallel_map(functions.pid, 2)
        return
    pids = articles.parallel_map(functions.pid, 2, chunk_size=5)
    assert len(pids) == 50
    query = (
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
        " AND backend_type = 'client backend'"
    )
    until = time.monotonic() + WAIT
    left = 1
    while left and time.monotonic() < until:  # the server takes a moment to see that a client has gone
        with connections[alias].cursor() as cursor:
            cursor.execute(query)
            (left,) = cursor.fetchone()
    assert left == 0


def test_the_next_call_finds_the_connections_of_the_last_one_open(articles, alias, monkeypatch):
    """Not for long: a second later the server has its places back. Outside of a test run, that is."""
    if connections[alias].vendor != "postgresql":
        pytest.skip("asks PostgreSQL")
    monkeypatch.setattr(processes, "under_test", lambda: False)
    (backend,) = set(articles.parallel_map(functions.backend, 1, chunk_size=5))
    assert set(articles.parallel_map(functions.backend, 1, chunk_size=5)) == {backend}
    until, left = time.monotonic() + WAIT, 1
    while left and time.monotonic() < until:
        with connections[alias].cursor() as cursor:
            cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE pid = %s", [backend])
            (left,) = cursor.fetchone()
    assert left == 0


def test_workers_give_their_connections_back_when_the_call_ends(articles):
    """Before it returns, not when they have been idle for long."""
    articles.parallel_map(functions.pid, 2, chunk_size=5)
    with process_pool(2, from_settings().START_METHOD) as pool:
        assert [pool.submit(functions.kept_connections).result(WAIT) for _ in range(4)] == [0] * 4


@on_each
def test_a_map_within_a_map(articles, on):
    """Workers that map do it inline: no deadlock, no processes of processes."""
    assert set(articles.parallel_map(functions.count_nested, chunk_size=20, **on)) == {50}


def test_background_reads_within_a_map(articles):
    with override_settings(PARALLEL_ORM={"CONNECTIONS": 1, "THREADS": 1}):
        counts = articles.parallel_map(
            lambda row: Article.objects.using(row._state.db).start_count().count(), threads=3, chunk_size=10
        )
    assert counts == [50] * 50


def test_two_callers_at_once(articles):
    results = {}

    def call(number):
        try:
            results[number] = articles.parallel_map(lambda row: row.rank * number, 2, chunk_size=3)
        finally:
            connections.close_all()

    threads = [threading.Thread(target=call, args=(number,)) for number in range(1, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert results == {number: [rank * number for rank in range(50)] for number in range(1, 4)}


def test_own_queryset_classes_travel(alias):
    Note.objects.using(alias).bulk_create(Note(name=f"n{n}!") for n in range(10))
    assert Note.objects.using(alias).loud().parallel_map(lambda note: note.name, 2, chunk_size=3) == [
        f"n{n}!" for n in range(10)
    ]
    assert Note.mixed.using(alias).loud().parallel_map(lambda note: note.name, 2)[0] == "n0!"
    loud = functions.LoudQuerySet(Note, using=alias)
    loud.volume = 11
    assert len(loud.parallel_map(functions.pid, 2)) == 10


class TestProgress:
    def test_a_callable_is_told(self, articles):
        told = []
        articles.parallel_map(functions.pid, 2, chunk_size=20, progress=lambda done, total: told.append((done, total)))
        assert told[0] == (0, 50)
        assert told[-1] == (50, 50)
        assert len(told) == 4

    def test_true_draws_a_bar_with_rate_and_time_left(self, articles, capfd):
        articles.parallel_map(functions.pid, 2, chunk_size=20, progress=True)
        drawn = capfd.readouterr().err
        assert "testapp.Article: 100%" in drawn
        assert "50/50" in drawn
        assert "rows/s" in drawn

    def test_without_tqdm_it_says_what_to_install(self, articles, monkeypatch):
        monkeypatch.setitem(sys.modules, "tqdm.auto", None)
        with pytest.raises(errors.MissingExtra, match=r"django-parallel-orm\[progress\]"):
            articles.parallel_map(functions.pid, 2, progress=True)


class TestTransactions:
    def test_unwritten_on_postgres_it_runs_as_outside(self, articles, alias):
        with transaction.atomic(using=alias):
            if connections[alias].vendor == "postgresql":
                assert len(articles.parallel_map(functions.pid, 2)) == 50
            else:
                with pytest.raises(errors.TransactionRefused, match="Call it before the transaction"):
                    articles.parallel_map(functions.pid, 2)

    def test_after_a_write_it_is_refused(self, articles, alias):
        with transaction.atomic(using=alias):
            articles.update(name="mine")
            with pytest.raises(errors.TransactionRefused):
                articles.parallel_map(functions.pid, 2)
            with pytest.raises(errors.TransactionRefused):
                articles.parallel_map(functions.pid, threads=2)

    def test_under_repeatable_read_it_is_refused(self, postgres):
        with transaction.atomic(using=postgres):
            with connections[postgres].cursor() as cursor:
                cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            with pytest.raises(errors.TransactionRefused, match="REPEATABLE READ"):
                Article.objects.using(postgres).parallel_map(functions.pid, 2)

    def test_asking_is_no_query_of_the_users(self, postgres):
        with transaction.atomic(using=postgres), CaptureQueriesContext(connections[postgres]) as queries:
            Article.objects.using(postgres).parallel_map(functions.pid, 2)
        assert len(queries) == 1, "the last key"


class InATestCase(TestCase):
    databases = {"default"}

    def test_it_runs_in_this_process_and_packs_all_the_same(self):
        Article.objects.create(name="in the test's transaction", rank=3)
        results = Article.objects.parallel_map(functions.pid, 2)
        self.assertEqual((results, results.report.reason), ([os.getpid()], "testcase"))
        lock = threading.Lock()
        with self.assertRaises(errors.NotPicklable):
            Article.objects.parallel_map(lambda row: lock, 2)
        with self.assertRaises(errors.NotPicklable):
            Article.objects.parallel_map(functions.held_lock, 2)
        with transaction.atomic():
            Article.objects.create(name="in a transaction of its own")
            results = Article.objects.parallel_map(functions.pid, 2)
        self.assertEqual((results, results.report.reason), ([os.getpid()] * 2, "testcase"))
        with self.assertRaisesRegex(ValueError, "rank three"):
            Article.objects.parallel_map(functions.fail_on_three, 2)


def test_memory_runs_in_this_process(memory):
    Article.objects.using(memory).create(name="here")
    results = Article.objects.using(memory).parallel_map(functions.pid, 2)
    assert (results, results.report.reason) == ([os.getpid()], "memory")


BAD = [
    ({"processes": 0}, "processes must be a whole number"),
    ({"processes": -1}, "processes must be"),
    ({"processes": 1.5}, "processes must be"),
    ({"processes": True}, "processes must be"),
    ({"threads": 0}, "threads must be"),
    ({"processes": 2, "threads": 2}, "not both"),
    ({"chunk_size": 0}, "chunk_size must be"),
    ({"chunk_size": -5}, "chunk_size must be"),
    ({"chunk_size": "many"}, "chunk_size must be"),
    ({"progress": 3}, "progress must be"),
]


@pytest.mark.parametrize(("knobs", "message"), BAD, ids=str)
def test_bad_knobs(knobs, message):
    with pytest.raises(errors.InvalidOption, match=message):
        Article.objects.parallel_map(functions.pid, **knobs)


async def coroutine(row):
    return row


@pytest.mark.parametrize("fn", [None, 3, "name", coroutine])
def test_what_is_no_function(fn):
    with pytest.raises(errors.InvalidOption, match="must be a plain callable"):
        Article.objects.parallel_map(fn)


def test_a_database_that_there_is_not():
    with pytest.raises(errors.UnknownAlias):
        Article.objects.using("nowhere").parallel_map(functions.pid)


def test_what_cannot_be_cut_truthfully_is_refused_by_name(articles):
    for queryset, problem in (
        (articles.values("pk").union(articles.values("pk")), "union"),
        (articles.values("rank").annotate(n=Avg("pk")).order_by("n"), "groups"),
        (articles.annotate(n=Window(RowNumber(), order_by="pk")), "window"),
        (articles.select_for_update(), "locks rows"),
        (Article.objects.raw("SELECT 1"), "raw SQL"),
    ):
        with pytest.raises(errors.UnsupportedQuerySet, match=problem):
            queryset.parallel_map(functions.pid, 2)


def test_a_table_that_is_gone(articles):
    with pytest.raises(DatabaseError, match="no_such_table"):
        articles.extra(tables=["no_such_table"]).parallel_map(functions.pid, 2)


def test_an_evaluated_queryset_is_read_anew(articles):
    queryset = articles.order_by("pk")
    list(queryset)
    articles.filter(rank=0).delete()
    assert queryset.parallel_map(lambda row: row.rank, 2) == list(range(1, 50))


def test_the_plan_explains_itself(articles):
    plan = articles.order_by("-pk").explain_plan(chunk_size=10)
    assert (plan.cut, plan.chunk_size) == ("ranges", 10)
    assert "keyset jumps" in str(plan)
    assert "-pk" in str(plan)
    assert articles.order_by("name").explain_plan().cut == "keys"
    with pytest.raises(errors.UnsupportedQuerySet):
        articles.values("pk").union(articles.values("pk")).explain_plan()


def test_the_report(articles):
    report = articles.parallel_map(functions.pid, 2, chunk_size=10).report
    assert isinstance(report, Report)
    assert (report.rows, report.succeeded, report.chunks, report.reason) == (50, 50, 5, None)
    assert sum(report.workers.values()) == sum(report.by_alias.values()) == 50
    assert report.database_seconds > 0
    assert report.seconds > 0
    assert "50 rows in 5 chunks" in str(report)
    results = articles.parallel_map(functions.pid, 2)
    assert pickle.loads(pickle.dumps(results)).report == results.report


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ranks=st.lists(st.tuples(st.integers(-3, 3), st.one_of(st.none(), st.integers(0, 2))), max_size=30),
    order=st.lists(
        st.sampled_from(["score", "-score", "rank", "-rank", "name"]), max_size=2, unique_by=lambda o: o.strip("-")
    ),
    chunk_size=st.integers(1, 9),
)
def test_every_row_once_in_order_for_any_rows_and_any_order(alias, ranks, order, chunk_size):
    articles = Article.objects.using(alias)
    articles.all().delete()
    articles.bulk_create(Article(rank=rank, score=score) for rank, score in ranks)
    queryset = articles.order_by(*order, "pk")
    assert queryset.parallel_map(lambda a: a.pk, threads=2, chunk_size=chunk_size) == [a.pk for a in queryset]


# The pool itself.


@pytest.fixture
def pool():
    pool = ProcessPool(2, "forkserver")
    yield pool
    pool.kill()


def test_the_pool_is_an_executor(pool):
    assert [future.result(WAIT) for future in [pool.submit(pow, n, 2) for n in range(20)]] == [n * n for n in range(20)]
    with pytest.raises(ZeroDivisionError) as raised:
        pool.submit(divmod, 1, 0).result(WAIT)
    assert "divmod" in str(raised.value.__cause__) or "ZeroDivisionError" in str(raised.value.__cause__)


def test_a_death_costs_exactly_one_call(pool):
    """The other worker's call goes on, waiting ones are served, and the dead one's names its exit code."""
    with multiprocessing.Manager() as manager:
        gate, begun = manager.Event(), manager.Event()

        def hold():
            begun.set()
            assert gate.wait(WAIT)
            return "held"

        held = pool.submit(hold)
        assert begun.wait(WAIT)
        dead = pool.submit(os._exit, 5)
        after = [pool.submit(pow, n, 2) for n in range(5)]
        with pytest.raises(errors.WorkerDied) as raised:
            dead.result(WAIT)
        assert raised.value.exitcode == 5
        assert [future.result(WAIT) for future in after] == [0, 1, 4, 9, 16]
        gate.set()
        assert held.result(WAIT) == "held"


def test_a_worker_that_is_killed_while_idle_is_replaced(pool):
    pid = pool.submit(os.getpid).result(WAIT)
    os.kill(pid, 9)
    until = time.monotonic() + WAIT
    while pid in pool.pids() and time.monotonic() < until:
        pass
    assert pool.submit(os.getpid).result(WAIT) != pid


def test_an_idle_pool_ends_and_starts_again(monkeypatch):
    monkeypatch.setattr("parallel_orm.executors.processes.IDLE_SECONDS", 0.05)
    pool = ProcessPool(2, "forkserver")
    pid = pool.submit(os.getpid).result(WAIT)
    until = time.monotonic() + WAIT
    while pool._manager is not None and time.monotonic() < until:
        pass
    assert pool.pids() == []
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert pool.submit(pow, 2, 3).result(WAIT) == 8
    pool.shutdown()


def test_killing_the_pool_ends_what_it_does(pool):
    with multiprocessing.Manager() as manager:
        begun = manager.Event()

        def hold():
            begun.set()
            threading.Event().wait()

        held = pool.submit(hold)
        assert begun.wait(WAIT)
        pool.kill()
        with pytest.raises(errors.WorkerDied):
            held.result(WAIT)
        with pytest.raises(RuntimeError, match="shut down"):
            pool.submit(pow, 1, 1)


def test_what_was_not_begun_can_be_cancelled(pool):
    with multiprocessing.Manager() as manager:
        gate = manager.Event()
        held = [pool.submit(gate.wait, WAIT) for _ in range(2)]
        waiting = [pool.submit(pow, n, 2) for n in range(3)]
        while not all(future.running() for future in held):
            pass
        assert waiting[1].cancel()
        gate.set()
        assert waiting[2].result(WAIT) == 4
        assert waiting[1].cancelled()


# Whole programs.


def run_script(script: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a file as a user would, in a folder and without the settings of these tests."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    environment.pop("DJANGO_SETTINGS_MODULE", None)
    return subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=WAIT,
        env=environment,
        check=False,
        cwd=folder,
    )


def run_program(tmp_path: Path, program: str) -> subprocess.CompletedProcess[str]:
    """Run a script of a user's own, with its own SQLite file."""
    script = tmp_path / "script.py"
    database = {"ENGINE": "django.db.backends.sqlite3", "NAME": str(tmp_path / "db.sqlite3")}
    head = f"""
        import os, sys
        from django.conf import settings
        settings.configure(
            DATABASES={{"default": {database!r}}},
            INSTALLED_APPS=["django.contrib.contenttypes", "parallel_orm", "tests.testapp"],
            DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        )
        import django
        django.setup()
        from tests.testapp.models import Article
    """
    script.write_text(textwrap.dedent(head) + textwrap.dedent(program))
    return run_script(script, tmp_path)


MAKE = """
from django.core.management import call_command
call_command("migrate", run_syncdb=True, verbosity=0)
Article.objects.bulk_create(Article(name=str(n)) for n in range(30))
"""


def test_a_script_without_a_main_guard(tmp_path):
    """Its functions travel by value; its workers do not run it again; it ends by itself, its workers with it."""
    done = run_program(
        tmp_path,
        MAKE
        + """
print("once")
def own(row):
    return int(row.name) + 1, os.getpid()
results = Article.objects.parallel_map(own, 2, chunk_size=5)
print(sum(value for value, _ in results), os.getpid() in {pid for _, pid in results})
print(*{pid for _, pid in results})
""",
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[:2] == ["once", "465 False"]
    for pid in lines[2].split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_functions_of_a_script_use_djangos_connection_and_cache(tmp_path):
    done = run_program(
        tmp_path,
        MAKE
        + """
from django.core.cache import cache, caches
from django.db import connection, connections
def own(row):
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM testapp_article")
        return cursor.fetchone()[0], cache.get("none", 1), connections["default"].vendor, caches["default"] is not None
print(set(Article.objects.parallel_map(own, 2, chunk_size=5)))
""",
    )
    assert (done.returncode, done.stdout.strip()) == (0, "{(30, 1, 'sqlite', True)}"), done.stderr


def test_models_that_import_the_public_names(tmp_path):
    """A project with a settings module and an app of its own, started elsewhere: what most users have."""
    project = tmp_path / "project"
    (project / "shop").mkdir(parents=True)
    (project / "shop" / "__init__.py").touch()
    (project / "shop" / "models.py").write_text(
        textwrap.dedent("""
        from django.db import models
        from parallel_orm import ParallelManager
        class Order(models.Model):
            number = models.IntegerField()
            objects = ParallelManager()
        """)
    )
    database = {"ENGINE": "django.db.backends.sqlite3", "NAME": str(tmp_path / "shop.sqlite3")}
    (project / "site_settings.py").write_text(
        textwrap.dedent(f"""
        DATABASES = {{"default": {database!r}}}
        INSTALLED_APPS = ["shop"]
        DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
        """)
    )
    (project / "manage.py").write_text(
        textwrap.dedent("""
        import os, sys
        os.environ["DJANGO_SETTINGS_MODULE"] = "site_settings"
        import django
        django.setup()
        from django.core.management import call_command
        call_command("migrate", run_syncdb=True, verbosity=0)
        from shop.models import Order
        Order.objects.bulk_create(Order(number=n) for n in range(20))
        print(sum(Order.objects.parallel_map(lambda order: order.number, 2, chunk_size=5)))
        """)
    )
    done = run_script(project / "manage.py", tmp_path)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "190", "")


def test_workers_do_not_outlive_a_caller_that_is_killed(tmp_path):
    done = run_program(
        tmp_path,
        MAKE
        + """
pids = set(Article.objects.parallel_map(lambda row: os.getpid(), 2, chunk_size=5))
print(*pids, flush=True)
os.kill(os.getpid(), 9)
""",
    )
    assert done.returncode == -9, done.stderr
    until = time.monotonic() + WAIT
    left = [int(pid) for pid in done.stdout.split()]
    assert left
    while left and time.monotonic() < until:
        left = [
            pid for pid in left if Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text()
        ]
    assert left == []


def test_a_forked_child_maps_with_workers_of_its_own(tmp_path):
    """As a pre-forking web server does after its master has mapped."""
    done = run_program(
        tmp_path,
        MAKE
        + """
from django.db import connections
mine = set(Article.objects.parallel_map(lambda row: os.getpid(), 2, chunk_size=5))
Article.objects.start_count().count()
connections.close_all()
child = os.fork()
if child == 0:
    theirs = set(Article.objects.parallel_map(lambda row: os.getpid(), 2, chunk_size=5))
    counted = Article.objects.start_count()
    ok = counted.background["count"]._read.landed.result(30).result() == 30
    os._exit(0 if ok and len(theirs) and not theirs & mine else 1)
assert os.waitpid(child, 0)[1] == 0
print(len(Article.objects.parallel_map(lambda row: row.pk, 2)))
""",
    )
    assert (done.returncode, done.stdout.strip()) == (0, "30"), done.stderr


def test_a_fork_waits_for_a_read(tmp_path):
    """Its driver has a lock that nobody renews in the child; it lets go once somebody is about to fork."""
    done = run_program(
        tmp_path,
        MAKE
        + """
import threading
from django.db.backends.sqlite3.base import DatabaseWrapper
lock, opening, asked = threading.Lock(), threading.Event(), threading.Event()
connect = DatabaseWrapper.get_new_connection
def slowly(self, parameters):
    with lock:
        opening.set()
        asked.wait()
        return connect(self, parameters)
DatabaseWrapper.get_new_connection = slowly
os.register_at_fork(before=asked.set)  # the last comes first, so before the library's
started = Article.objects.start_count()
opening.wait()
child = os.fork()
if child == 0:
    os._exit(lock.locked())
print(os.waitpid(child, 0)[1], started.count())
""",
    )
    assert (done.returncode, done.stdout.split()) == (0, ["0", "30"]), done.stderr


def test_a_fork_does_not_keep_a_read_from_ending_that_it_waits_for(tmp_path):
    """One that has its parts done by other threads ends when these have landed."""
    done = run_program(
        tmp_path,
        MAKE
        + """
import threading
from parallel_orm.reads import Read, running
from parallel_orm.forks import gate
from parallel_orm.plan import plan_whole
begun, asked, waited = threading.Event(), threading.Event(), []
wait_for = gate._changed.wait_for
def watched(ready, *patience):
    if patience:
        asked.set()
    waited.append(wait_for(ready, *patience))
gate._changed.wait_for = watched
def part():
    begun.set()
    asked.wait()
def work(rows, clock):
    running.get().beside([begun.wait, part])
    return "answer", 0
read = Read("fetch", plan_whole(Article.objects.all(), work))
read.begin()
begun.wait()
child = os.fork()
if child == 0:
    os._exit(0)
print(os.waitpid(child, 0)[1], read.landed.result().value, all(waited))
""",
    )
    assert (done.returncode, done.stdout.split()) == (0, ["0", "answer", "True"]), done.stderr


def test_a_fork_waits_for_a_worker_that_starts(tmp_path):
    """Multiprocessing has a lock then, for which the child's first map would wait."""
    done = run_program(
        tmp_path,
        MAKE
        + """
import threading
from multiprocessing import forkserver
starting, asked = threading.Event(), threading.Event()
ensure = forkserver.ensure_running
def slowly():
    with forkserver._forkserver._lock:
        starting.set()
        asked.wait()
    ensure()
forkserver.ensure_running = slowly
os.register_at_fork(before=asked.set)
mapping = threading.Thread(target=lambda: Article.objects.parallel_map(lambda row: row.pk, 2))
mapping.start()
starting.wait()
child = os.fork()
if child == 0:
    os._exit(forkserver._forkserver._lock.locked())
mapping.join()
print(os.waitpid(child, 0)[1])
""",
    )
    assert (done.returncode, done.stdout.strip()) == (0, "0"), done.stderr


def test_a_forked_worker_waits_for_the_cutting_of_the_next_chunk(tmp_path):
    """The caller is in its driver while the first chunk has a worker forked."""
    done = run_program(
        tmp_path,
        MAKE
        + """
import itertools, threading
from django.db import connection
from parallel_orm.cutting import Lookout
settings.PARALLEL_ORM = {"START_METHOD": "fork"}
Lookout.__call__ = lambda self, *jump: self._jump(*jump)  # a query for each chunk
os.lock, cutting, asked = threading.Lock(), threading.Event(), threading.Event()
queries = itertools.count()
def slowly(execute, *args):
    if next(queries) != 2:  # after those for the last key and the end of the first chunk
        return execute(*args)
    with os.lock:
        cutting.set()
        asked.wait()
        return execute(*args)
def about_to_fork():
    cutting.wait()
    asked.set()
os.register_at_fork(before=about_to_fork)
with connection.execute_wrapper(slowly):
    print(*Article.objects.parallel_map(lambda row: int(os.lock.locked()), 1, chunk_size=10), sep="")
""",
    )
    assert (done.returncode, done.stdout.strip()) == (0, "0" * 30), done.stderr


@pytest.mark.parametrize("on", ["processes=2", "threads=2", "executor='concurrent.futures.ThreadPoolExecutor'"])
def test_ctrl_c_ends_the_workers(tmp_path, on):
    """Whatever they are doing: computing, or waiting; threads as soon as Python gets a word in."""
    done = run_program(
        tmp_path,
        MAKE
        + f"""
import signal, threading, time
from django.db import connection
caller, here = os.getpid(), "processes" in {on!r}
def interrupt(function):
    try:
        open(function, "x").close()
    except FileExistsError:
        return
    os.kill(caller, signal.SIGINT)
def wait(row):
    interrupt("wait")
    if here:
        time.sleep(600)
calls = []
def compute(row):
    calls.append(row)
    interrupt("compute")
    until = time.monotonic() + 0.2
    while time.monotonic() < until:
        pass
def ask(row):
    interrupt("ask")
    with connection.cursor() as cursor:
        cursor.execute("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n")
for function in (wait, compute, ask):
    try:
        Article.objects.parallel_map(function, {on}, chunk_size=15)
    except KeyboardInterrupt:
        print("interrupted")
print(len(calls) < 25)  # it was not seen through
print(len(Article.objects.parallel_map(lambda row: row.pk, {on})))
print([thread.name for thread in threading.enumerate() if "map" in thread.name])
""",
    )
    assert (done.returncode, done.stdout.split()) == (0, ["interrupted"] * 3 + ["True", "30", "[]"]), done.stderr


def test_ctrl_c_at_a_terminal(tmp_path):
    """The whole group of processes hears it; the caller alone decides, and ends with its bar in order."""
    script = tmp_path / "script.py"
    database = {"ENGINE": "django.db.backends.sqlite3", "NAME": str(tmp_path / "db.sqlite3")}
    script.write_text(
        f"""
import os, time
from django.conf import settings
settings.configure(
    DATABASES={{"default": {database!r}}},
    INSTALLED_APPS=["django.contrib.contenttypes", "parallel_orm", "tests.testapp"],
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
)
import django
django.setup()
from tests.testapp.models import Article
{MAKE}
def wait(row):
    print("pid", os.getpid(), flush=True)
    time.sleep(600)
Article.objects.parallel_each(wait, 2, chunk_size=5)
"""
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    environment.pop("DJANGO_SETTINGS_MODULE", None)
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=tmp_path,
        start_new_session=True,
    ) as caller:
        assert caller.stdout is not None
        pids = [int(caller.stdout.readline().split()[1]) for _ in range(2)]
        os.killpg(caller.pid, signal.SIGINT)
        _, said = caller.communicate(timeout=WAIT)
    assert caller.returncode == -signal.SIGINT
    assert said.strip().endswith("KeyboardInterrupt")
    assert "parallel_orm-worker" not in said, "workers say nothing of it"
    assert not any(psutil.pid_exists(pid) for pid in pids)
