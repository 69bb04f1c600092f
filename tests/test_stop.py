"""What is stopped stops: on the server, at once, and nothing is left of it. And what fails, fails as Django's does."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import logging
import secrets
import socket
import threading
import time
from contextlib import contextmanager
from functools import partial

import psutil
import pytest
from asgiref.sync import sync_to_async
from asgiref.testing import ApplicationCommunicator
from django.core.asgi import get_asgi_application
from django.core.handlers.wsgi import WSGIHandler
from django.db import DatabaseError, InterfaceError, OperationalError, connections
from django.db.backends.signals import connection_created
from django.db.models import Prefetch
from django.http import HttpResponse
from django.test import Client, RequestFactory, override_settings
from django.urls import path

from parallel_orm import errors, events
from parallel_orm.chores import chores
from parallel_orm.connections import lender
from parallel_orm.executors.threads import background_threads
from tests.testapp.models import Article, Author, Tag
from tests.threads import all_done, submit

WAIT = 30

#: What a query that runs for a minute is told by, on the server. A SQLite of our own process is told by its function,
#: of a name that is known to do no more than read: else the query would be run inline.
LONG = {
    "postgresql": "(SELECT 1 FROM pg_sleep(60)) = 1",
    "mysql": "SLEEP(60) = 0",
    "sqlite": "sleep() = (WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 4000000000)"
    " SELECT max(x) FROM n)",
}

reached = threading.Semaphore(0)


@pytest.fixture
def _taught():
    def teach(connection, **_):
        if connection.vendor == "sqlite":
            connection.connection.create_function("sleep", 0, lambda: reached.release() or 1)

    while reached.acquire(blocking=False):
        pass
    connection_created.connect(teach)
    yield
    connection_created.disconnect(teach)


@pytest.fixture
def articles(alias):
    connections[alias].close()  # so that it is opened with what SQLite is taught
    author = Author.objects.using(alias).create(name="Ada")
    article = Article.objects.using(alias).create(name="one", author=author)
    article.tags.add(Tag.objects.using(alias).create(name="red"))
    return Article.objects.using(alias).order_by("pk")


def long(queryset):
    return queryset.extra(where=[LONG[connections[queryset.db].vendor]])


def until(condition, what):
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, what
        threading.Event().wait(0.005)  # the server is asked, and not besieged


class Asker:
    """A connection beside all others: the caller's own would wait for what is on its way."""

    def __init__(self):
        self._wrapper = None

    def ask(self, alias, question):
        if self._wrapper is None:
            self._wrapper = connections.create_connection(alias)
            self._wrapper.inc_thread_sharing()
        with self._wrapper.cursor() as cursor:
            cursor.execute(question)
            return cursor.fetchall()

    def close(self):
        if self._wrapper is not None:
            self._wrapper.close()
            self._wrapper = None


asker = Asker()


def running(alias):
    """Return how many of the long queries the server is at; asked of it."""
    question = {
        "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%pg_sleep(60)%'"
        " AND datname = current_database() AND pid <> pg_backend_pid()",
        "mysql": "SELECT count(*) FROM information_schema.processlist WHERE info LIKE '%SLEEP(60)%'"
        " AND db = database() AND id <> connection_id()",
    }[connections[alias].vendor]
    return asker.ask(alias, question)[0][0]


def wait_until_running(alias, number=1):
    if connections[alias].vendor == "sqlite":
        for _ in range(number):
            assert reached.acquire(timeout=WAIT)
    else:
        until(lambda: running(alias) == number, "the queries never began")


def wait_until_gone(alias):
    """Return when the server is at none of the long queries; fail long before one would end by itself."""
    if connections[alias].vendor == "sqlite":
        all_threads_free()
    else:
        until(lambda: running(alias) == 0, "the query runs on")


def all_threads_free():
    """Return when every background thread has done what was asked of it, and does the next."""
    threads = background_threads()
    together = threading.Barrier(threads.number)
    for future in [submit(together.wait, WAIT) for _ in range(threads.number)]:
        future.result(WAIT)
    all_done()


def others_connected(alias):
    """Return how many connections there are beside the caller's; asked of the server."""
    connection = connections[alias]
    connection.close()
    if connection.vendor == "sqlite":
        return sum(file.path == str(connection.settings_dict["NAME"]) for file in psutil.Process().open_files())
    question = {
        "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        " AND pid <> pg_backend_pid() AND backend_type = 'client backend'",
        "mysql": "SELECT count(*) FROM information_schema.processlist WHERE db = database() AND id <> connection_id()",
    }[connection.vendor]
    return asker.ask(alias, question)[0][0]


@pytest.fixture(autouse=True)
def _nothing_is_left(alias, _taught):
    """After each test: every thread serves again, none is missing, and no connection is open."""
    yield
    try:
        all_threads_free()
        drained()
        until(lambda: others_connected(alias) == 0, "a connection was left open")
        assert not lender._out[alias]
    finally:
        asker.close()  # else the next test asks the server of this one


@pytest.fixture
def busy():
    """Every background thread is held: whatever is started is not begun."""
    gate, threads = threading.Event(), background_threads()
    at_gate = threading.Barrier(threads.number + 1)

    def hold():
        at_gate.wait(WAIT)
        assert gate.wait(WAIT)

    for _ in range(threads.number):
        submit(hold)
    at_gate.wait(WAIT)
    yield
    gate.set()


def drained():
    told = threading.Event()
    chores.attend()  # a test that started nothing, run first, has not brought it
    chores.call(told.set)
    assert told.wait(WAIT)


@contextmanager
def heard(signal):
    """Yield the events of one kind."""
    found = []

    def hear(event, **_):
        found.append(event)

    signal.connect(hear)
    try:
        yield found
    finally:
        signal.disconnect(hear)


# --- cancel() ------------------------------------------------------------------------------


def test_cancel_reaches_the_server(articles, alias):
    """The answer is there while the server is at the query; and then that is gone too."""
    pending = long(articles).start_fetch().background["fetch"]
    wait_until_running(alias)
    assert pending.cancel() is True
    for _ in range(2):
        with pytest.raises(errors.Cancelled) as raised:
            pending.result(0)
    assert isinstance(raised.value, concurrent.futures.CancelledError)
    assert any(__file__ in note for note in raised.value.__notes__)
    assert pending.done()
    assert pending.cancel() is False
    wait_until_gone(alias)


def test_a_connection_that_was_cancelled_is_not_used_again(articles, alias, monkeypatch):
    """Where connections are kept, this one is not."""
    monkeypatch.setattr("parallel_orm.connections.under_test", lambda: False)
    try:
        pending = long(articles).start_first()
        wait_until_running(alias)
        wrapper = pending._read._running
        pending.cancel()
        wait_until_gone(alias)
        all_threads_free()
        assert wrapper.connection is None
        assert [idle.wrapper for idle in lender._idle[alias] if idle.wrapper is wrapper] == []
        assert articles.all().start_count().count() == 1
    finally:
        all_threads_free()
        lender.close_idle()


def test_cancel_of_what_nobody_has_begun(articles, alias, busy):
    pending = articles.start_fetch().background["fetch"]
    assert pending.cancel() is True
    assert pending.cancel() is False
    with pytest.raises(errors.Cancelled):
        list(articles)


def test_cancel_of_what_is_done(articles):
    pending = articles.start_fetch().background["fetch"]
    pending.result(WAIT)
    assert pending.cancel() is False
    assert len(articles) == 1


def test_cancel_while_a_prefetch_runs(articles, alias):
    """The first query is over, the second one is at it: it is stopped, and what follows is not begun."""
    slow = long(Author.objects.using(alias).filter(name="Ada"))
    started = articles.prefetch_related(Prefetch("author", slow), "author__notes").start_fetch()
    wait_until_running(alias)
    started.background["fetch"].cancel()
    wait_until_gone(alias)
    with pytest.raises(errors.Cancelled):
        list(started)


def test_cancel_stops_siblings_in_other_threads(articles, alias):
    """Two prefetches of one level, each running for a minute in a thread of its own."""
    slow = [Prefetch("author", long(Author.objects.using(alias))), Prefetch("tags", long(Tag.objects.using(alias)))]
    started = articles.prefetch_related(*slow).start_fetch()
    wait_until_running(alias, 2)
    started.background["fetch"].cancel()
    with pytest.raises(errors.Cancelled):
        list(started)
    wait_until_gone(alias)


def test_cancel_between_two_statements(articles, alias, monkeypatch):
    """While rows are made no query runs; the prefetch that would follow is not sent."""
    in_rows, go_on = threading.Event(), threading.Event()
    from_db = Article.from_db.__func__

    def hold(cls, *args, **kwargs):
        in_rows.set()
        assert go_on.wait(WAIT)
        return from_db(cls, *args, **kwargs)

    monkeypatch.setattr(Article, "from_db", classmethod(hold))
    pending = articles.prefetch_related("author", "tags").start_fetch().background["fetch"]
    assert in_rows.wait(WAIT)
    read = pending._read
    said = read._said
    pending.cancel()
    go_on.set()
    all_threads_free()
    assert len(said) == 1, "the article's own"
    assert not read._siblings, "nothing was started for what is not wanted"


# --- timeout= --------------------------------------------------------------------------------


def test_a_deadline_stops_the_query(articles, alias):
    pending = long(articles).start_fetch(timeout=3600).background["fetch"]
    wait_until_running(alias)
    pending._read._expire()  # what the timer calls: one of half a second may be faster than a busy machine
    with pytest.raises(errors.DeadlineExceeded, match="3600 seconds") as raised:
        pending.result(WAIT)
    assert isinstance(raised.value, TimeoutError)
    wait_until_gone(alias)


def test_a_deadline_holds_for_what_is_used_at_once(articles, alias):
    """A free thread is waited for: the caller's own connection would keep to no deadline."""
    queryset = long(articles)
    with pytest.raises(errors.DeadlineExceeded):
        queryset.start_count(timeout=0.5).count()
    wait_until_gone(alias)


def test_no_thread_is_waited_for_that_is_not_free(articles, busy):
    counted = articles.start_count(timeout=3600)
    assert (counted.count(), counted.background["count"].reason) == (1, "stolen")


def test_a_deadline_holds_when_nobody_asks_and_in_the_queue(articles, alias, busy):
    """Nothing has begun it, nobody waits: it is over all the same."""
    with heard(events.failed) as failed:
        queryset = articles.start_count(timeout=0.05)
        until(lambda: failed, "the deadline did not come")
    assert isinstance(failed[0].error, errors.DeadlineExceeded)
    with pytest.raises(errors.DeadlineExceeded):
        queryset.count()


def test_a_deadline_that_is_met_holds_nothing(articles):
    pending = articles.start_first(timeout=3600)
    pending.result(WAIT)
    assert pending._read._deadline is not None
    assert pending._read._deadline.call is None


def test_deadlines_come_in_their_order_whatever_the_order_they_were_set_in():
    came, last = [], threading.Event()
    for seconds in (0.05, 0.0, 0.02):
        chores.call_later(seconds, partial(came.append, seconds))
    chores.call_later(0.01, lambda: 1 / 0)  # disturbs nobody
    never = chores.call_later(0.01, partial(came.append, "never"))
    never.cancel()
    for _ in range(1_000):  # of which most are met long before
        chores.call_later(float("inf"), last.wait).cancel()
    chores.call_later(0.06, last.set)
    assert last.wait(WAIT)
    assert came == [0.0, 0.02, 0.05]


@pytest.mark.parametrize("timeout", [0, -1, True, "x", float("nan"), [1]], ids=str)
def test_a_timeout_that_is_none(articles, timeout):
    for start in (articles.start_fetch, articles.start_count, articles.start_exists, articles.start_first):
        with pytest.raises(errors.InvalidOption, match="timeout must be a number of seconds above 0"):
            start(timeout=timeout)
    assert dict(articles.background) == {}


# --- The end of a request ----------------------------------------------------------------------


class Site:
    """Views of the running test."""

    alias = ""
    started = None


def leaving(request):
    """Starts a query of a minute, and does not use it."""
    Site.started = long(Article.objects.using(Site.alias)).prefetch_related("tags").start_fetch()
    wait_until_running(Site.alias)
    connections[Site.alias].close()
    return HttpResponse("here")


async def leaving_async(request):
    Site.started = long(Article.objects.using(Site.alias)).start_fetch()
    await sync_to_async(wait_until_running)(Site.alias)
    await sync_to_async(connections.close_all)()
    return HttpResponse("here")


urlpatterns = [path("leaving", leaving), path("leaving-async", leaving_async)]


@pytest.fixture
def site(articles, alias, monkeypatch):
    monkeypatch.setattr(Site, "alias", alias)
    monkeypatch.setattr(Site, "started", None)
    with override_settings(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"]):
        yield
    Site.started = None


def answer_to(url):
    """As a server does it: the response is read, then closed."""
    environ = RequestFactory().get(url).environ
    response = WSGIHandler()(environ, lambda *args: None)
    content = b"".join(response)
    response.close()
    return content


def answer_async_to(url):
    async def visit():
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "path": url,
            "raw_path": url.encode(), "query_string": b"", "headers": [(b"host", b"testserver")],
        }  # fmt: skip
        site = ApplicationCommunicator(get_asgi_application(), scope)
        await site.send_input({"type": "http.request"})
        await site.receive_output(WAIT)
        content = (await site.receive_output(WAIT))["body"]
        await site.wait(WAIT)
        return content

    return asyncio.run(visit())


@pytest.mark.parametrize(
    "visit",
    [
        lambda: answer_to("/leaving"),
        lambda: Client().get("/leaving").content,
        lambda: answer_async_to("/leaving"),
        lambda: answer_async_to("/leaving-async"),
    ],
    ids=["wsgi", "client", "asgi", "asgi-async"],
)
def test_the_end_of_a_request_stops_what_it_left(site, alias, visit):
    """Told of once; and the queryset, used all the same, asks anew."""
    outside = Article.objects.using(alias).start_count()
    with heard(events.abandoned) as abandoned:
        assert visit() == b"here"
        wait_until_gone(alias)
        all_threads_free()
        drained()
        assert [(event.verb, event.alias) for event in abandoned] == [("fetch", alias)]
    assert outside.count() == 1
    assert Site.started.background["fetch"].was_left
    Site.started.query.where.children.clear()
    assert len(Site.started) == 1


def test_siblings_of_a_read_that_is_left_are_told_of_with_it(site, alias):
    def page(request):
        slow = [Prefetch("author", long(Author.objects.using(alias))), Prefetch("tags", long(Tag.objects.using(alias)))]
        Site.started = Article.objects.using(alias).prefetch_related(*slow).start_fetch()
        wait_until_running(alias, 2)
        return HttpResponse("here")

    urlpatterns.append(path("siblings", page))
    try:
        with override_settings(ROOT_URLCONF=tuple(urlpatterns)), heard(events.abandoned) as abandoned:
            answer_to("/siblings")
            wait_until_gone(alias)
            all_threads_free()
        assert [event.verb for event in abandoned] == ["fetch"]
    finally:
        urlpatterns.pop()


def test_what_others_started_is_not_touched(site, alias):
    """A request in another thread, and code outside of any, keep what they started when one ends."""
    here, go = threading.Event(), threading.Event()

    def other(request):
        mine = long(Article.objects.using(alias)).start_first()
        here.set()
        assert go.wait(WAIT)
        done = mine.done()
        mine.cancel()
        return HttpResponse(str(done))

    urlpatterns.extend([path("other", other), path("empty", lambda request: HttpResponse("empty"))])
    try:
        with override_settings(ROOT_URLCONF=tuple(urlpatterns)), concurrent.futures.ThreadPoolExecutor(2) as threads:
            outside = long(Article.objects.using(alias)).start_first()
            theirs = threads.submit(answer_to, "/other")
            assert here.wait(WAIT)
            assert threads.submit(answer_to, "/empty").result(WAIT) == b"empty"
            assert answer_to("/empty") == b"empty"
            assert not outside.done()
            go.set()
            assert theirs.result(WAIT) == b"False"
            outside.cancel()
    finally:
        del urlpatterns[-2:]


# --- Dropped ---------------------------------------------------------------------------------


def test_a_dropped_queryset_cancels_its_query(articles, alias):
    before = events.counts()["abandoned"]
    queryset = long(articles).start_fetch()
    wait_until_running(alias)
    with heard(events.abandoned) as abandoned:
        del queryset
        wait_until_gone(alias)
        drained()
        assert [event.verb for event in abandoned] == ["fetch"]
    assert events.counts()["abandoned"] == before + 1


def test_the_collector_drops_it_too(articles, alias):
    circle = [long(articles).start_first()]
    circle.append(circle)
    wait_until_running(alias)
    del circle
    gc.collect()
    wait_until_gone(alias)


@pytest.fixture
def logged():
    class Records(logging.Handler):
        def emit(self, record):
            found.append(record)

    found, handler, logger = [], Records(), logging.getLogger("parallel_orm")
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def test_a_failure_that_nobody_asked_for_is_logged_once(articles, logged):
    """With its traceback and the place; one that was asked for is not."""
    broken = articles.extra(where=["no_such_column = 1"])
    with heard(events.abandoned) as abandoned:
        pending = broken.all().start_first()
        pending._read.landed.result(WAIT)
        del pending
        drained()
        (record,) = logged
        assert len(abandoned) == 1
    assert record.levelno == logging.ERROR
    assert __file__ in record.getMessage()
    assert isinstance(record.exc_info[1], DatabaseError)
    assert record.exc_info[2] is not None
    logged.clear()
    pending = broken.all().start_first()
    with pytest.raises(DatabaseError):
        pending.result(WAIT)
    del pending
    drained()
    assert logged == []


def test_the_collector_may_drop_them_anywhere(articles, alias, monkeypatch):
    """With a collection at every allocation, observers that allocate and circles in several threads: no deadlock."""

    def observe(event, **_):
        [[] for _ in range(3)]

    signals = (events.started, events.finished, events.failed, events.abandoned, events.stolen)
    for signal in signals:
        signal.connect(observe)
    threshold = gc.get_threshold()
    number, workers = 12, 4

    def start_and_drop():
        try:
            for turn in range(number):
                circle = [articles.all().start_first(), articles.all().start_count(timeout=50)]
                circle.append(circle)
                if turn % 3 == 0:
                    circle[0].result(WAIT)
                if turn % 4 == 0:
                    circle[0].cancel()
                del circle
        finally:
            connections.close_all()

    threads = [threading.Thread(target=start_and_drop, daemon=True) for _ in range(workers)]
    gc.set_threshold(1)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads), "deadlock"
    finally:
        gc.set_threshold(*threshold)
        for signal in signals:
            signal.disconnect(observe)
    gc.collect()
    drained()


# --- Bad input ------------------------------------------------------------------------------


def both(queryset):
    """Return the exceptions of the inline call and of the background read, each where the result is used."""
    found = []
    for start in (lambda qs: qs, lambda qs: qs.start_fetch()):
        started = start(queryset.all())
        with pytest.raises((DatabaseError, InterfaceError)) as raised:
            list(started)
        found.append(raised.value)
        connections[queryset.db].close()
    return found


def assert_alike(inline, background):
    assert type(background) is type(inline)
    assert str(background) == str(inline)
    assert type(background.__cause__) is type(inline.__cause__)
    assert any("started at" in note and __file__ in note for note in background.__notes__)


@contextmanager
def an_alias_like(alias, **changes):
    """Yield an alias of its own, with other settings; gone afterwards."""
    name = f"{alias}_{secrets.token_hex(3)}"
    connections.settings[name] = {**connections.settings[alias], **changes}
    try:
        yield name
    finally:
        connections[name].close()
        all_threads_free()
        del connections[name]
        del connections.settings[name]
        lender._budgets.pop(name, None)


def not_on_sqlite(alias):
    if connections[alias].vendor == "sqlite":
        pytest.skip("has no server")


def test_nothing_listens(articles, alias):
    not_on_sqlite(alias)
    with socket.socket() as taken:  # bound, and not listening
        taken.bind(("127.0.0.1", 0))
        with an_alias_like(alias, HOST="127.0.0.1", PORT=str(taken.getsockname()[1])) as dead:
            inline, background = both(Article.objects.using(dead))
            assert isinstance(inline, OperationalError)
            assert_alike(inline, background)


def test_nothing_listens_and_it_is_awaited(articles, alias):
    """An await ends too, although no thread could ask."""
    not_on_sqlite(alias)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with an_alias_like(alias, HOST="127.0.0.1", PORT=str(taken.getsockname()[1])) as dead:
            with pytest.raises(OperationalError):
                list(Article.objects.using(dead))

            async def use():
                pending = Article.objects.using(dead).start_fetch().background["fetch"]
                with pytest.raises(OperationalError):
                    await asyncio.wait_for(pending._awaited(), WAIT)
                return pending.reason

            assert asyncio.run(use()) == "stolen"


def test_a_wrong_password(articles, alias):
    not_on_sqlite(alias)
    with an_alias_like(alias, USER=f"nobody_{secrets.token_hex(3)}", PASSWORD="wrong") as locked:
        inline, background = both(Article.objects.using(locked))
    assert isinstance(inline, OperationalError)
    assert_alike(inline, background)


def test_a_table_that_is_gone(articles, alias):
    inline, background = both(articles.extra(tables=["no_such_table"]))
    assert_alike(inline, background)


def test_a_statement_timeout(articles, alias):
    if connections[alias].vendor != "postgresql":
        pytest.skip("a setting of PostgreSQL")
    options = {**connections.settings[alias].get("OPTIONS", {}), "options": "-c statement_timeout=1000"}
    with an_alias_like(alias, OPTIONS=options) as hasty:
        inline, background = both(long(Article.objects.using(hasty)))
        assert "statement timeout" in str(inline)
        assert_alike(inline, background)
        assert Article.objects.using(hasty).start_count().count() == 1


def kill(alias):
    """End the connection that is at the long query."""
    if connections[alias].vendor == "postgresql":
        asker.ask(
            alias,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE state = 'active'"
            " AND query LIKE '%pg_sleep(60)%' AND datname = current_database() AND pid <> pg_backend_pid()",
        )
        return
    found = asker.ask(
        alias,
        "SELECT id FROM information_schema.processlist WHERE info LIKE '%SLEEP(60)%' AND db = database()"
        " AND id <> connection_id()",
    )
    for (number,) in found:
        asker.ask(alias, f"KILL {number}")


def test_a_backend_that_is_killed(articles, alias):
    not_on_sqlite(alias)
    inline = []

    def ask():
        try:
            list(long(Article.objects.using(alias)))
        except Exception as error:
            inline.append(error)
        finally:
            connections.close_all()

    thread = threading.Thread(target=ask)
    thread.start()
    wait_until_running(alias)
    kill(alias)
    thread.join(WAIT)
    started = long(articles).start_fetch()
    wait_until_running(alias)
    kill(alias)
    with pytest.raises(OperationalError) as raised:
        list(started)
    assert_alike(inline[0], raised.value)


def test_too_many_connections(articles, alias):
    """The role may have one: the caller's own answers then, and where it has none, it is refused as inline."""
    if connections[alias].vendor != "postgresql":
        pytest.skip("a limit of PostgreSQL's roles")
    role = f"lonely_{secrets.token_hex(4)}"
    with connections[alias].cursor() as cursor:
        cursor.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'alone' CONNECTION LIMIT 1")
        cursor.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}")
    try:
        with an_alias_like(alias, USER=role, PASSWORD="alone") as lonely:
            queryset = Article.objects.using(lonely)
            assert queryset.count() == 1  # and has the one connection from now on
            started = [queryset.all().start_count() for _ in range(3)]
            assert [each.count() for each in started] == [1, 1, 1]
            assert {each.background["count"].reason for each in started} == {"stolen"}
            taken = connections[lonely].connection
            connections[lonely].connection = None
            try:
                inline, background = both(queryset)
            finally:
                taken.close()
            assert "too many connections" in str(inline)
            assert_alike(inline, background)
    finally:
        with connections[alias].cursor() as cursor:
            cursor.execute(f"DROP OWNED BY {role}")
            cursor.execute(f"DROP ROLE {role}")
