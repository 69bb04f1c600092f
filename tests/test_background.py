"""start_fetch, start_count, start_exists: run in the background, used as ever."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import datetime
import io
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from contextvars import ContextVar

import pytest
from asgiref.local import Local
from asgiref.sync import async_to_sync
from django.core.exceptions import SynchronousOnlyOperation
from django.core.paginator import Paginator
from django.db import DatabaseError, connections, router, transaction
from django.db.models import Prefetch, QuerySet
from django.db.models.functions import TruncDate
from django.db.transaction import TransactionManagementError
from django.template import Context, Engine
from django.test import TestCase, TransactionTestCase, override_settings
from django.test.testcases import DatabaseOperationForbidden
from django.test.utils import CaptureQueriesContext
from django.utils import timezone, translation

from parallel_orm import ParallelManager, ParallelQuerySet, Pending, errors, events
from parallel_orm.connections import lender
from parallel_orm.executors.threads import background_threads
from parallel_orm.outcomes import Landing
from parallel_orm.plan import plan_whole
from parallel_orm.prefetch import prefetch_side_by_side
from parallel_orm.queryset import fill_cache
from parallel_orm.watch import watch_of
from tests.asynchronous import run as run_async
from tests.testapp.models import Article, Author
from tests.threads import all_done, submit

WAIT = 30


tenant: ContextVar[str] = ContextVar("tenant")
local = Local()


@pytest.fixture
def articles(alias):
    Article.objects.using(alias).bulk_create(Article(name=f"name {n}", rank=n % 3) for n in range(30))
    return Article.objects.using(alias).order_by("pk")


def hold_all_threads(gate):
    """Return once every background thread is at the gate, and so has done all that was asked of it before."""
    threads = background_threads()
    at_gate = threading.Barrier(threads.number + 1)

    def hold():
        at_gate.wait(WAIT)
        assert gate.wait(WAIT)

    held = [submit(hold) for _ in range(threads.number)]
    at_gate.wait(WAIT)
    return held


@pytest.fixture
def busy():
    """All background threads at a gate: whatever is started now is not begun. Yields what opens the gate."""
    gate = threading.Event()
    hold_all_threads(gate)
    yield gate.set
    gate.set()


@pytest.fixture
def met(monkeypatch):
    """Make every instance that is read wait until so many readers are at it at once."""

    def meet(number):
        barrier = threading.Barrier(number)
        from_db = Article.from_db.__func__

        def wait_and_make(cls, *args, **kwargs):
            barrier.wait(WAIT)
            return from_db(cls, *args, **kwargs)

        monkeypatch.setattr(Article, "from_db", classmethod(wait_and_make))

    return meet


def landed(pending):
    """Wait for the thread, without taking the work from it as result() would."""
    return pending._read.landed.result(WAIT).result()


def no_queries(alias):
    return CaptureQueriesContext(connections[alias])


def test_four_fetches_run_side_by_side(articles, alias, met):
    """Four readers meet inside their queries: one after the other they never would."""
    keys = list(articles.values_list("pk", flat=True)[:4])
    met(4)
    started = [Article.objects.using(alias).filter(pk=key).start_fetch() for key in keys]
    assert [landed(queryset.background["fetch"])[0].pk for queryset in started] == keys
    assert [queryset.background["fetch"].reason for queryset in started] == [None] * 4


def test_a_start_returns_the_same_queryset_at_once(articles, busy):
    for start in ("start_fetch", "start_count", "start_exists"):
        queryset = articles.all()
        assert getattr(queryset, start)() is queryset
        assert not queryset.background[start.removeprefix("start_")].done()


USES = {
    "list": list,
    "len": len,
    "bool": bool,
    "index": lambda qs: qs[3].pk,
    "slice": lambda qs: [a.pk for a in qs[2:9:3]],
    "in": lambda qs: Article(pk=qs.first().pk) in qs,
    "contains": lambda qs: qs.contains(Article.objects.using(qs.db).last()),
    "count": lambda qs: qs.count(),
    "exists": lambda qs: qs.exists(),
    "first": lambda qs: qs.first().pk,
    "repr": repr,
    "pickle": lambda qs: list(pickle.loads(pickle.dumps(qs))),
    "reversed": lambda qs: list(reversed(qs)),
    "or": lambda qs: list(qs | qs.filter(rank=1)),
    "paginator": lambda qs: [a.pk for a in Paginator(qs, 7).page(2)],
    "template": lambda qs: (
        Engine()
        .from_string(
            "{% if rows %}{{ rows|length }}{% for row in rows %}{{ row.name }}{% endfor %}{{ rows.0.pk }}"
            "{{ rows.count }}{% endif %}"
        )
        .render(Context({"rows": qs}))
    ),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    "starts", [["start_fetch"], ["start_count"], ["start_exists"], ["start_count", "start_fetch"]], ids=str
)
def test_every_use_gives_what_it_gives_without(articles, use, starts):
    started = articles.all()
    for start in starts:
        getattr(started, start)()
    assert USES[use](started) == USES[use](articles.all())


@pytest.mark.parametrize(
    "use", ["list", "len", "bool", "index", "slice", "count", "exists", "first", "repr", "reversed", "template"]
)
def test_a_fetch_answers_without_another_query(articles, alias, use):
    started = articles.start_fetch()
    started.background["fetch"].result(WAIT)
    with no_queries(alias) as queries:
        USES[use](started)
    assert len(queries) == 0


def test_a_count_answers_count_and_exists(articles, alias):
    started = articles.start_count()
    started.background["count"].result(WAIT)
    with no_queries(alias) as queries:
        assert started.count() == started.count() == 30
        assert started.exists() is True
    assert len(queries) == 0
    assert Article.objects.using(alias).none().start_count().exists() is False


def test_rows_that_are_there_answer_before_a_count_that_was_started(articles, alias):
    """As Django has it: count() of an evaluated queryset is the length of what it has."""
    started = articles.start_count()
    landed(started.background["count"])
    Article.objects.using(alias).create(name="later")
    assert (len(started), started.count()) == (31, 31)
    del started._result_cache
    assert dict(started.background) == {}


def test_values_and_prefetches_are_fetched_with_it(articles, alias):
    author = Author.objects.using(alias).create(name="Ada")
    articles.filter(rank=1).update(author=author)
    assert list(articles.values_list("name", flat=True).start_fetch())[:2] == ["name 0", "name 1"]
    authors = Author.objects.using(alias).prefetch_related("articles").start_fetch()
    authors.background["fetch"].result(WAIT)
    with no_queries(alias) as queries:
        assert [len(a.articles.all()) for a in authors] == [10]
    assert len(queries) == 0
    related = author.articles.all().start_fetch()
    related.background["fetch"].result(WAIT)
    with no_queries(alias) as queries:
        assert all(article.author is author for article in related)
    assert len(queries) == 0
    raw = Article.objects.raw("SELECT * FROM testapp_article WHERE name = %s", ["name 1"], using=alias)
    assert [article.rank for article in raw.prefetch_related("tags").start_fetch()] == [1]


def test_starting_twice_starts_once(articles, busy):
    queryset = articles.start_fetch()
    first = queryset.background["fetch"]
    assert queryset.start_fetch().background["fetch"] is first
    assert set(queryset.start_count().start_exists().background) == {"fetch"}


def test_on_an_evaluated_queryset_a_start_does_nothing(articles, alias):
    list(articles)
    with no_queries(alias) as queries:
        assert dict(articles.start_fetch().start_count().start_exists().background) == {}
    assert len(queries) == 0


def test_a_clone_knows_nothing_of_it(articles, busy):
    started = articles.start_fetch()
    assert dict(started.background) != {}
    for clone in (started.all(), started.filter(rank=1), copy.deepcopy(started)):
        assert dict(clone.background) == {}
    busy()
    assert dict(pickle.loads(pickle.dumps(started)).background) == {}


def test_what_clears_the_cache_drops_what_was_started(articles):
    """After update() and delete() a queryset is asked anew."""
    started = articles.start_fetch().start_count()
    started.background["fetch"].result(WAIT)
    started.update(rank=9)
    assert dict(started.background) == {}
    assert {article.rank for article in started} == {9}
    counted = articles.all().start_count()
    assert counted.count() == 30
    counted.delete()
    assert counted.count() == 0


def test_the_answer_is_as_of_the_call(articles, alias):
    """What was filtered by is what it was when the query was started."""
    queryset = articles.filter(rank=1).start_count()
    queryset.query.clear_where()
    assert queryset.count() == 10


def test_what_no_thread_has_begun_is_run_by_whoever_needs_it(articles, alias, busy):
    """With every thread held at a gate the answers still come: on the caller's own connection."""
    queryset = articles.start_fetch()
    counted = articles.all().start_count()
    with no_queries(alias) as queries:
        assert len(queryset) == counted.count() == 30
    assert len(queries) == 2
    assert queryset.background["fetch"].reason == "stolen"
    assert "no worker had begun" in str(queryset.background["fetch"].reason)
    assert queryset.background["fetch"].result() is queryset.background["fetch"].result()


def test_behind_a_full_round_of_others_nothing_is_queued(articles, busy):
    """It would be needed before its turn came: it stays with the caller, who asks for it."""
    number = background_threads().number
    queued = [articles.all().start_count() for _ in range(number)]
    left = articles.all().start_count()
    busy()
    assert [landed(queryset.background["count"]) for queryset in queued] == [30] * number
    assert not left.background["count"].done()
    assert (left.count(), left.background["count"].reason) == (30, "stolen")


def test_the_context_is_compared_by_what_it_holds(articles, busy):
    """Values of context variables are not asked whether they are equal: arrays, say, do not tell."""

    class Odd:
        __hash__ = None

        def __eq__(self, other):
            raise ValueError("neither true nor false")

    token = tenant.set(Odd())
    try:
        queryset = articles.start_count()
        tenant.set(Odd())
        assert queryset.count() == 30
    finally:
        tenant.reset(token)


def test_one_of_many_consumers_runs_it(articles, alias, busy):
    """Threads that need the same answer at once get the same one, from one query."""
    queryset = articles.start_fetch()
    barrier = threading.Barrier(4)

    def use():
        barrier.wait(WAIT)
        try:
            return queryset.background["fetch"].result(WAIT)
        finally:
            connections.close_all()

    with ThreadPoolExecutor(4) as threads:
        answers = [future.result(WAIT) for future in [threads.submit(use) for _ in range(4)]]
    assert all(answer is answers[0] for answer in answers)


def test_running_out_of_time_cancels_nothing(articles, met):
    met(2)
    pending = articles[:1].start_fetch().background["fetch"]
    while pending.queue_time is None:
        pass  # until a thread has begun it
    with pytest.raises(TimeoutError, match="the query goes on"):
        pending.result(timeout=0.01)
    list(articles[:1])  # the second reader, for whom the first one waits
    assert len(pending.result(WAIT)) == 1


def test_an_exception_arrives_where_the_result_is_used(articles, alias):
    """With its own type, each time, and a note where the query was started."""
    broken = articles.extra(where=["no_such_column = 1"])
    for start, use in (
        ("start_fetch", list),
        ("start_count", lambda qs: qs.count()),
        ("start_exists", lambda qs: qs.exists()),
    ):
        started = getattr(broken.all(), start)()
        for _ in range(2):
            with pytest.raises(DatabaseError, match="no_such_column") as raised:
                use(started)
        assert any("started at" in note and __file__ in note for note in raised.value.__notes__)
    assert articles.all().start_count().count() == 30, "the thread and its connection survive"


def test_a_table_that_is_gone(alias):
    queryset = Article.objects.using(alias).extra(tables=["no_such_table"]).start_fetch()
    with pytest.raises(DatabaseError, match="no_such_table"):
        list(queryset)


@pytest.mark.parametrize("start", ["start_fetch", "start_count", "start_exists"])
def test_a_database_that_there_is_not(start):
    with pytest.raises(errors.UnknownAlias, match="no database 'nowhere' in settings.DATABASES; there are default, "):
        getattr(Article.objects.using("nowhere"), start)()


def test_a_transaction_is_answered_on_its_own_connection(articles, alias):
    """What the transaction wrote is seen; the reason says where it ran."""
    with transaction.atomic(using=alias):
        Article.objects.using(alias).create(name="mine")
        started = [articles.all().start_fetch(), articles.all().start_count(), articles.all().start_exists()]
        with no_queries(alias) as queries:
            assert len(started[0]) == started[1].count() == 31
            assert started[2].exists()
        assert len(queries) == 0
        assert {p.reason for qs in started for p in qs.background.values()} == {"transaction"}
        assert "another connection would not see" in str(started[0].background["fetch"].reason)
        transaction.set_rollback(True, using=alias)
    connections[alias].set_autocommit(False)
    try:
        Article.objects.using(alias).create(name="mine")
        manual = articles.all().start_count()
        assert (manual.count(), manual.background["count"].reason) == (31, "transaction")
        connections[alias].rollback()
    finally:
        connections[alias].set_autocommit(True)
    outside = articles.all().start_count()
    assert outside.background["count"].result(WAIT) == 30


def test_a_broken_transaction_refuses_what_is_started_in_it(articles, alias):
    """As Django refuses every query there, until the rollback; another connection would answer."""
    with transaction.atomic(using=alias):
        Article.objects.using(alias).create(name="mine")
        transaction.set_rollback(True, using=alias)
        started = articles.start_fetch()
        with pytest.raises(TransactionManagementError):
            list(started)
        assert started.background["fetch"].reason == "transaction"


def test_a_connection_of_another_thread_is_refused(articles, alias):
    """As Django refuses every query on it; another connection would answer."""
    of_another = connections[alias]

    def use():
        connections[alias] = of_another
        started = articles.all().start_fetch()
        with pytest.raises(DatabaseError, match="created in a thread"):
            list(started)
        del connections[alias]
        return started.background["fetch"].reason

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(use).result(WAIT) == "thread"


def test_memory_has_no_other_connection(memory):
    Article.objects.using(memory).create(name="here")
    started = Article.objects.using(memory).start_count()
    assert (started.count(), started.background["count"].reason) == (1, "memory")


def test_locks_stay_on_the_callers_connection(articles, alias):
    """Outside of a transaction select_for_update fails as it does without a start, where it is used."""
    if not connections[alias].features.has_select_for_update:
        assert len(articles.select_for_update().start_fetch()) == 30
        return
    started = articles.select_for_update().start_fetch()
    assert started.background["fetch"].reason == "select_for_update"
    with pytest.raises(TransactionManagementError):
        list(started)


def test_wrappers_of_the_callers_connection_see_its_queries(articles, alias):
    seen = []

    def wrapper(execute, sql, params, many, context):
        seen.append(sql)
        return execute(sql, params, many, context)

    with connections[alias].execute_wrapper(wrapper):
        started = articles.start_count()
    assert (started.count(), started.background["count"].reason, len(seen)) == (30, "wrapper", 1)


@override_settings(PARALLEL_ORM={"CONNECTIONS": 0})
def test_no_connections_means_inline(articles):
    started = articles.start_count()
    assert (started.count(), started.background["count"].reason) == (30, "budget")


def test_connections_are_counted_against_the_budget(articles, alias, met):
    """Of eight threads only two read at once: a third waits for its connection, and can still be stolen."""
    with override_settings(PARALLEL_ORM={"CONNECTIONS": {alias: 2}, "THREADS": 8}):
        met(3)  # two readers and the thief: any more and they would not meet
        started = [articles[:1].start_fetch() for _ in range(3)]
        results = [queryset.background["fetch"].result(WAIT) for queryset in reversed(started)]
        assert [len(result) for result in results] == [1, 1, 1]
        assert sorted(str(q.background["fetch"].reason is None) for q in started) == ["False", "True", "True"]


def test_the_neighbourhood_of_the_caller(articles, monkeypatch):
    """Language, time zone and context variables in a thread are those of the call, not those of a later moment."""
    seen = []
    from_db = Article.from_db.__func__

    def look(cls, *args, **kwargs):
        seen.append((translation.get_language(), str(timezone.get_current_timezone()), tenant.get(), local.tenant))
        return from_db(cls, *args, **kwargs)

    monkeypatch.setattr(Article, "from_db", classmethod(look))
    token, local.tenant = tenant.set("theirs"), "theirs too"
    with translation.override("de"), timezone.override("Asia/Kathmandu"):
        pending = articles[:1].start_fetch().background["fetch"]
    tenant.reset(token)
    local.tenant = "nobody's"
    landed(pending)
    assert seen == [("de", "Asia/Kathmandu", "theirs", "theirs too")]


def test_a_stolen_read_has_the_neighbourhood_of_its_call(alias, busy):
    if connections[alias].vendor == "mysql":
        pytest.skip("its time zone tables may not be loaded")
    moment = datetime.datetime(2024, 1, 1, 20, tzinfo=datetime.UTC)
    Article.objects.using(alias).create(published=moment)
    days = Article.objects.using(alias).annotate(day=TruncDate("published")).values_list("day", flat=True)
    with timezone.override("Asia/Tokyo"):
        started = days.start_fetch()
    assert list(started) == [datetime.date(2024, 1, 2)]
    assert started.background["fetch"].reason == "stolen"


def test_an_interrupt_while_the_caller_reads_is_no_answer(articles, busy, monkeypatch):
    started = articles.start_fetch()
    from_db = Article.from_db

    def interrupted(cls, *args, **kwargs):
        monkeypatch.setattr(Article, "from_db", from_db)
        raise KeyboardInterrupt

    monkeypatch.setattr(Article, "from_db", classmethod(interrupted))
    with pytest.raises(KeyboardInterrupt):
        len(started)
    assert len(started) == 30


def test_an_interrupt_while_the_caller_waits_for_a_connection(default, busy, monkeypatch):
    """Before there is anything that could fail: the next use asks anew."""
    Article.objects.using(default).create(name="here")
    pending = Article.objects.using(default).start_fetch().background["fetch"]
    lent = lender.lent

    def interrupted(*args, **kwargs):
        monkeypatch.setattr(lender, "lent", lent)
        raise KeyboardInterrupt

    monkeypatch.setattr(lender, "lent", interrupted)
    with ThreadPoolExecutor(1) as other:  # where the caller's connection is not
        with pytest.raises(KeyboardInterrupt):
            other.submit(pending.result, WAIT).result(WAIT)
        assert other.submit(pending.result, WAIT).result(WAIT)[0].name == "here"


@pytest.mark.parametrize("way", ["result", "await"])
def test_an_interrupt_after_the_threads_have_left_it_to_the_caller(default, busy, monkeypatch, way):
    """They do not come back to it, and nobody waits for them."""
    Article.objects.using(default).create(name="here")
    pending = Article.objects.using(default).start_fetch(timeout=10 * WAIT).background["fetch"]
    from_db, gate = Article.from_db, threading.Event()

    def interrupted(cls, *args, **kwargs):
        monkeypatch.setattr(Article, "from_db", from_db)
        busy()
        hold_all_threads(gate)
        gate.set()
        hold_all_threads(gate)
        raise KeyboardInterrupt

    monkeypatch.setattr(Article, "from_db", classmethod(interrupted))
    # Too many wait for the threads, so that it is not waited for, as is done for the sake of a deadline.
    monkeypatch.setattr(type(pending._read), "is_about_to_begin", False)
    with pytest.raises(KeyboardInterrupt):
        pending.result()
    monkeypatch.undo()

    async def answer():
        return await asyncio.wait_for(pending, WAIT)

    assert len(pending.result(WAIT) if way == "result" else run_async(answer())) == 1


def test_an_observer_that_ends_its_thread(default, busy):
    """The answer lands all the same."""
    pending = Article.objects.using(default).start_fetch().background["fetch"]

    def leave(event, **_):
        raise SystemExit

    events.finished.connect(leave)
    try:
        busy()
        landed(pending)
    finally:
        events.finished.disconnect(leave)


def test_a_connection_that_an_observer_opened_stays_its_thread_s(default):
    """A read of the same thread is lent another one, and leaves that where it was."""
    seen = []

    def look(event, **_):
        with connections[default].cursor() as cursor:
            cursor.execute("SELECT 1")
        seen.append(connections[default])

    events.finished.connect(look)
    try:
        with override_settings(PARALLEL_ORM={"THREADS": 1}):
            for _ in range(3):
                landed(Article.objects.using(default).start_fetch().background["fetch"])
                all_done()
            submit(connections.close_all).result(WAIT)
    finally:
        events.finished.disconnect(look)
    assert len(seen) == 3
    assert len(set(map(id, seen))) == 1


def test_an_exception_that_takes_no_notes(articles, monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Frozen(Exception):
        code: int

    def fail(cls, *args, **kwargs):
        raise Frozen(3)

    monkeypatch.setattr(Article, "from_db", classmethod(fail))
    with pytest.raises(Frozen):
        landed(articles.start_fetch().background["fetch"])


def test_a_read_that_was_pending_when_the_process_forked(default, tmp_path, busy):
    """The child has no thread that could ever answer, so it asks itself."""
    Article.objects.using(default).create(name="here")
    started = Article.objects.using(default).start_fetch()
    busy()
    started.background["fetch"].result(WAIT)
    pending = started.background["fetch"]
    read = pending._read
    read.landed, read._claim = Landing(), threading.Lock()
    read._claim.acquire()
    read._task = plan_whole(started.all(), fill_cache)
    read._pid = -1  # of a parent
    assert len(pending.result(WAIT)) == 1


def test_the_router_is_asked_where_the_call_is_made(default, other, monkeypatch):
    Article.objects.using(other).create(name="there")
    caller = threading.current_thread()

    class Router:
        def db_for_read(self, model, **hints):
            return other if threading.current_thread() is caller else default

    monkeypatch.setattr(router, "routers", [Router()])
    queryset = Article.objects.all().start_fetch()
    queryset.background["fetch"].result(WAIT)
    assert [article._state.db for article in queryset] == [other]


def test_under_test_no_connection_outlives_its_task(articles, postgres_activity):
    """Asked of the server: once the answers are there, the threads hold no connection."""
    started = [articles.all().start_count() for _ in range(6)]
    assert [landed(queryset.background["count"]) for queryset in started] == [30] * 6
    assert not lender._idle[articles.db], "closed, and not only when it has been idle for long"
    until = time.monotonic() + WAIT
    while postgres_activity() > 1 and time.monotonic() < until:
        pass  # the server takes a moment to see that a client has gone
    assert postgres_activity() == 1, "the caller's own"


@pytest.fixture
def postgres_activity(request, alias):
    if connections[alias].vendor != "postgresql":
        pytest.skip("asks PostgreSQL")

    def count():
        with connections[alias].cursor() as cursor:
            cursor.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                " AND backend_type = 'client backend'"
            )
            return cursor.fetchone()[0]

    return count


def test_pending_tells_its_times(articles):
    pending = articles.start_fetch().background["fetch"]
    assert isinstance(pending, Pending)
    pending.result(WAIT)
    assert pending.done()
    assert pending.queue_time >= 0
    assert pending.execute_time > 0
    assert "done" in repr(pending)


def test_the_mapping_is_read_only(articles):
    assert repr(articles.start_count().background).startswith("{'count': <Pending on ")
    started = articles.start_count()
    with pytest.raises(TypeError):
        started.background["fetch"] = None
    with pytest.raises(AttributeError):
        started.background = {}


class InATestCase(TestCase):
    databases = {"default"}

    @classmethod
    def setUpTestData(cls):
        Article.objects.create(name="in the test's transaction")

    def test_the_test_sees_its_own_rows(self):
        """In the transaction of a TestCase everything is answered there, and counted as ever."""
        with self.assertNumQueries(1):
            started = Article.objects.start_fetch()
            assert [article.name for article in started] == ["in the test's transaction"]
        assert started.background["fetch"].reason == "testcase"

    def test_a_transaction_within(self):
        with transaction.atomic():
            started = Article.objects.start_count()
        assert (started.count(), started.background["count"].reason) == (1, "transaction")

    def test_a_database_that_the_test_does_not_name(self):
        """What Django forbids inline is forbidden in the background and in a map, and reads from no real database."""
        others = Article.objects.using("other")
        for use in (
            lambda: list(others.all().start_fetch()),
            lambda: others.all().start_count().count(),
            lambda: others.start_first().result(),
            lambda: others.parallel_map(id, threads=2),
        ):
            with pytest.raises(DatabaseOperationForbidden, match="queries to 'other' are not allowed"):
                use()


class InATransactionTestCase(TransactionTestCase):
    databases = {"default"}

    def test_it_truly_runs_in_the_background(self):
        Article.objects.create(name="committed")
        started = Article.objects.start_count()
        assert landed(started.background["count"]) == 1
        assert started.background["count"].reason is None


async def _use_async(queryset):
    return [article.pk async for article in queryset], await queryset.acount(), await queryset.aexists()


def test_async_uses(articles):
    started = articles.start_fetch()
    keys, count, exists = run_async(_use_async(started))
    assert (len(keys), count, exists) == (30, 30, True)
    connections.close_all()


def test_in_a_coroutine_a_start_begins_at_once(articles, alias, met):
    """Two reads of one coroutine meet in the database; what it writes afterwards is not in them."""
    met(2)
    one, two = (articles.all()[:1] for _ in range(2))

    async def use():
        one.start_fetch(), two.start_fetch()
        counted = articles.all().start_count()
        await Article.objects.using(alias).acreate(name="later")
        rows = [[article async for article in rows] for rows in (one, two)]
        return [len(each) for each in rows], await counted.acount(), await counted.background["count"]

    assert run_async(use()) == ([1, 1], 30, 30)
    assert {one.background["fetch"].reason, two.background["fetch"].reason} <= {None, "stolen"}  # by the write


def test_in_a_coroutine_of_a_transaction(articles, alias):
    """The transaction is that of the thread that runs Django's async methods for this coroutine: as inline."""

    async def in_a_transaction():
        await articles.acreate(name="mine")
        started = articles.all().start_fetch()
        return await started.acount(), len([article async for article in started]), started

    with transaction.atomic(using=alias):
        *counted, started = async_to_sync(in_a_transaction)()
        assert counted == [31, 31]
        assert started.background["fetch"].reason == "transaction"
        transaction.set_rollback(True, using=alias)
    connections.close_all()


def test_an_event_loop_is_not_blocked(articles, busy):
    """A sync use in a coroutine is refused as Django refuses it, and nothing is spoilt by it."""
    started = articles.start_fetch()

    async def use():
        with pytest.raises(SynchronousOnlyOperation):
            len(started)
        return len([article async for article in started])

    assert run_async(use()) == 30
    connections.close_all()


def test_rows_that_can_hold_no_prefetches_are_fetched_without(articles):
    """As Django does: a prefetch_related() before values() or values_list() is of no effect."""
    for queryset in (
        articles.prefetch_related("tags", "labels").values_list("pk", flat=True),
        articles.prefetch_related("tags").values_list("name", named=True),
        articles.prefetch_related("tags").values(),
    ):
        assert landed(queryset.all().start_fetch().background["fetch"]) == list(queryset)


def test_a_lookup_through_a_property_is_prefetched_after_those_before_it(articles, alias, monkeypatch):
    """As Django documents: what the property uses is fetched by then, and what is prefetched for it is kept."""
    author = Author.objects.using(alias).create(name="Ada")
    articles.filter(rank=1).update(author=author)
    first = property(lambda author: list(author.articles.all())[:1])
    monkeypatch.setattr(Author, "first_articles", first, raising=False)
    beside = []

    def in_the_worst_order(works):
        beside.append(len(works))
        for work in reversed(works):
            work()

    authors = list(Author.objects.using(alias))
    prefetch_side_by_side(authors, ["articles", "first_articles__tags"], in_the_worst_order)
    with no_queries(alias) as queries:
        assert [list(article.tags.all()) for author in authors for article in author.first_articles] == [[]]
    assert (len(queries), beside) == (0, [])
    prefetch_side_by_side(authors, ["articles__tags", "articles__labels", "notes"], in_the_worst_order)
    assert beside == [2, 2]


def test_what_a_background_read_starts_is_seen_with_it(articles, alias):
    class Counting(ParallelQuerySet):
        def get(self, *args, **kwargs):
            counted = self.all().start_count()
            assert landed(counted.background["count"]) == counted.count() == 30
            return super().get(*args, **kwargs)

    with CaptureQueriesContext(connections[alias]) as queries:
        pending = Counting(Article, using=alias).start_get(name="name 3")
        assert landed(pending).rank == 0
        assert (pending.result().name, pending.reason) == ("name 3", None)
    assert [query["sql"].startswith("SELECT COUNT(") for query in queries] == [True, False]


def test_what_a_prefetch_asks_of_another_database_is_seen_there(default, other, monkeypatch):
    """Among the queries of each connection are those that it would have made itself; afterwards nothing is noted."""
    monkeypatch.setattr("parallel_orm.connections.under_test", lambda: False)
    Article.objects.using(other).create(name="one", author_id=None)
    Author.objects.using(default).create(pk=1, name="Ada")
    there = Prefetch("articles", Article.objects.using(other))
    with CaptureQueriesContext(connections[default]) as own, CaptureQueriesContext(connections[other]) as others:
        started = Author.objects.using(default).prefetch_related(there).start_fetch()
        assert [author.name for author in landed(started.background["fetch"])] == ["Ada"]
        assert (len(started), started.background["fetch"].reason) == (1, None)
    assert (len(own), len(others)) == (1, 1)
    gate = threading.Event()
    held = hold_all_threads(gate)  # so that the connections were given back
    try:
        assert [watch_of(idle.wrapper).reading for alias in (default, other) for idle in lender._idle[alias]] == [
            None
        ] * 2
    finally:
        gate.set()
        [future.result(WAIT) for future in held]
        lender.close_idle()


@pytest.mark.parametrize("debug", [False, True])
def test_rows_that_are_copied_in_wait_for_the_reads_before_them(postgres, busy, debug, monkeypatch):
    """COPY is a way to the server beside execute(), of the driver's own cursor or of Django's for debugging."""
    started = Article.objects.using(postgres).start_fetch()
    connection = connections[postgres]
    monkeypatch.setattr(connection, "force_debug_cursor", debug)
    copy_in = "COPY testapp_article (name, rank) FROM STDIN"
    with connection.cursor() as cursor:
        if connection.Database.__name__ == "psycopg":
            with cursor.copy(copy_in) as rows:
                rows.write("copied\t1\n")
        else:
            cursor.copy_expert(copy_in, io.StringIO("copied\t1\n"))
    assert list(started) == []
    assert Article.objects.using(postgres).get().name == "copied"


@pytest.mark.parametrize("debug", [False, True])
def test_a_watched_cursor_has_what_it_has_unwatched(alias, debug):
    """No method more and none less: of the driver's that Django does not wrap neither."""
    connection = connections[alias]
    with CaptureQueriesContext(connection) if debug else nullcontext(), connection.cursor() as cursor:
        plain = type(cursor).__mro__[2](cursor.cursor, connection)
        assert type(plain).__module__.startswith("django."), type(cursor).__mro__
        for name in ("copy", "copy_expert", "copy_from", "copy_to", "callproc", "fetchmany", "nothing_of_the_kind"):
            assert hasattr(cursor, name) == hasattr(plain, name), name
        assert type(cursor).__name__ == type(plain).__name__


def test_idle_connections_are_given_back(articles, alias, monkeypatch):
    """Outside of a test an idle connection is kept for the next read, and closed when told."""
    monkeypatch.setattr("parallel_orm.connections.under_test", lambda: False)
    landed(articles.all().start_count().background["count"])
    kept = [idle.wrapper for idle in lender._idle[alias]]
    try:
        assert [wrapper.connection is not None for wrapper in kept] == [True]
        landed(articles.all().start_count().background["count"])
        assert [idle.wrapper for idle in lender._idle[alias]] == kept, "the same one served again"
    finally:
        lender.close_idle()
    assert [wrapper.connection for wrapper in kept] == [None]


def test_a_stolen_read_does_not_meet_wrappers_that_came_after_its_start(articles, alias, busy):
    started = articles.start_count()

    def refuse(*_):
        raise AssertionError("a query where none may be")

    with connections[alias].execute_wrapper(refuse):
        assert started.count() == 30
        assert connections[alias].execute_wrappers == [refuse]
    assert started.background["count"].reason == "stolen"


def test_arguments_are_as_of_the_start(articles, busy):
    keys = [articles[0].pk]
    names = {"pk__in": keys}
    numbers = [1]
    bulk, one = articles.start_in_bulk(keys), articles.start_get(**names)
    once = articles.start_in_bulk(iter(list(keys)))
    raw = articles.raw("SELECT * FROM testapp_article WHERE rank = %s", numbers).start_fetch()
    first = keys.pop()
    numbers[0] = 99
    assert (list(bulk.result()), one.result().pk, list(once.result()), len(raw)) == ([first], first, [first], 10)


class MarkingQuerySet(QuerySet):
    """Makes something of the rows when they come, as django-auto-prefetch does."""

    def _fetch_all(self):
        is_new = self._result_cache is None
        super()._fetch_all()
        if is_new:
            for row in self._result_cache:
                row.marks = getattr(row, "marks", 0) + 1


@pytest.mark.parametrize("use", [list, len, bool, lambda rows: rows[0], lambda rows: rows.count(), pickle.dumps])
def test_a_queryset_class_that_makes_something_of_its_rows_does_so_once(articles, alias, use):
    marking = ParallelManager.from_queryset(MarkingQuerySet)()
    marking.model = Article
    started = marking.using(alias).start_fetch()
    use(started)
    assert {row.marks for row in started} == {1}
