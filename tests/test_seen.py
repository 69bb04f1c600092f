"""What ran in the background is seen as what ran inline: in the query log, the logger, the toolbar, the events."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from django.db import DatabaseError, connections, transaction
from django.db.backends.signals import connection_created
from django.test import TransactionTestCase, override_settings
from django.test.utils import CaptureQueriesContext

from parallel_orm import events
from parallel_orm.chores import chores
from tests.asynchronous import run as run_async
from tests.test_background import hold_all_threads
from tests.testapp.models import Article, Author, Tag
from tests.threads import all_done

WAIT = 30


@pytest.fixture
def articles(alias):
    authors = Author.objects.using(alias)
    author = authors.create(name="Ada")
    Article.objects.using(alias).bulk_create(Article(name=f"it's {n}%", rank=n % 3, author=author) for n in range(9))
    tag = Tag.objects.using(alias).create(name="red")
    tag.articles.set(Article.objects.using(alias).filter(rank=1))
    return Article.objects.using(alias).order_by("pk")


@pytest.fixture
def busy():
    """Every background thread is held: whatever is started is not begun."""
    gate = threading.Event()
    held = hold_all_threads(gate)
    yield
    gate.set()
    for future in held:
        future.result(WAIT)


def landed(pending):
    """Wait for the thread, without taking the work from it as result() would."""
    return pending._read.landed.result(WAIT)


def rows(queryset):
    pending = queryset.start_fetch().background["fetch"]
    return lambda: landed(pending), lambda: list(queryset)


def number(queryset):
    pending = queryset.start_count().background["count"]
    return lambda: landed(pending), queryset.count


def one(queryset):
    pending = queryset.start_get(rank=1, name="it's 1%")
    return lambda: landed(pending), pending.result


def broken(queryset):
    pending = queryset.extra(where=["no_such_column = %s"], params=["it's"]).start_fetch().background["fetch"]

    def use():
        with pytest.raises(DatabaseError, match="no_such_column"):
            pending.result()

    return lambda: landed(pending), use


def broken_inline(queryset):
    with pytest.raises(DatabaseError, match="no_such_column"):
        list(queryset.extra(where=["no_such_column = %s"], params=["it's"]))


def with_prefetches(queryset):
    return rows(queryset.filter(rank__lt=2).select_related("author").prefetch_related("tags", "author__notes"))


READS = {
    "fetch": (rows, list),
    "filtered": (
        lambda qs: rows(qs.filter(name="it's 1%", rank__in=[1, 2])),
        lambda qs: list(qs.filter(name="it's 1%", rank__in=[1, 2])),
    ),
    "count": (number, lambda qs: qs.count()),
    "get": (one, lambda qs: qs.get(rank=1, name="it's 1%")),
    "failure": (broken, broken_inline),
    "prefetches": (
        with_prefetches,
        lambda qs: list(qs.filter(rank__lt=2).select_related("author").prefetch_related("tags", "author__notes")),
    ),
}


def texts(captured):
    return sorted(query["sql"] for query in captured)


@pytest.mark.parametrize("read", READS)
def test_queries_are_captured_when_consumed_as_if_inline(articles, alias, read):
    """The same texts as inline; not before they are consumed, and not a second time."""
    start, inline = READS[read]
    with CaptureQueriesContext(connections[alias]) as expected:
        inline(articles.all())
    with CaptureQueriesContext(connections[alias]) as captured:
        wait, use = start(articles.all())
        wait()
        assert len(captured) == 0
        use()
        assert texts(captured) == texts(expected)
        use()
        assert len(captured) == len(expected)


@pytest.mark.parametrize("read", READS)
def test_a_caller_without_an_open_connection_is_shown_the_same(articles, alias, read):
    start, inline = READS[read]
    with CaptureQueriesContext(connections[alias]) as expected:
        inline(articles.all())
    expected = texts(expected)
    connections[alias].close()
    wait, use = start(articles.all())
    wait()
    connections[alias].force_debug_cursor = True
    try:
        connections[alias].queries_log.clear()
        use()
        shown = [query["sql"] for query in connections[alias].queries_log if "@@" not in query["sql"]]
    finally:
        connections[alias].force_debug_cursor = False
        connections[alias].queries_log.clear()
    assert sorted(shown) == expected


def test_a_capture_that_begins_after_the_start(articles, alias):
    wait, use = rows(articles)
    wait()
    with CaptureQueriesContext(connections[alias]) as captured:
        use()
    assert len(captured) == 1


def test_nothing_is_kept_where_nothing_captures(articles, alias):
    connections[alias].queries_log.clear()
    wait, use = rows(articles)
    wait(), use()
    assert list(connections[alias].queries_log) == []


def test_what_is_stolen_or_inline_is_counted_once(articles, alias, busy):
    with CaptureQueriesContext(connections[alias]) as captured:
        _, use = rows(articles.all())
        use(), use()
        assert len(captured) == 1
        with transaction.atomic(using=alias):
            Article.objects.using(alias).filter(rank=0).update(score=1)
            before = len(captured)
            _, use = rows(articles.all())
            use(), use()
            assert len(captured) == before + 1


def test_consumed_by_many_at_once_it_is_shown_once(articles, alias):
    wait, _ = rows(articles)
    wait()
    pending = articles.background["fetch"]
    at_once = threading.Barrier(4)
    with CaptureQueriesContext(connections[alias]) as captured:

        def use():
            at_once.wait(WAIT)
            pending.result()

        threads = [threading.Thread(target=use) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
    assert len(captured) == 1


class Records(logging.Handler):
    def __init__(self):
        super().__init__(logging.DEBUG)
        self.records = []

    def emit(self, record):
        if "testapp_article" in str(getattr(record, "sql", "")):
            self.records.append(record)


@pytest.fixture
def logged():
    handler, logger = Records(), logging.getLogger("django.db.backends")
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    yield handler.records
    logger.removeHandler(handler)
    logger.setLevel(level)
    logger.propagate = propagate


NAP = 0.2


@pytest.fixture
def nap(alias):
    """SQL that takes its time on the server."""

    def teach(connection, **_):
        if connection.vendor == "sqlite":
            connection.connection.create_function("sleep", 0, lambda: time.sleep(NAP) or 1)

    connection_created.connect(teach)
    connections[alias].close()
    yield {
        "sqlite": "sleep() = 1",
        "postgresql": f"(SELECT 1 FROM pg_sleep({NAP})) = 1",
        "mysql": f"SLEEP({NAP}) = 0",
    }[connections[alias].vendor]
    connection_created.disconnect(teach)


@pytest.mark.parametrize("debug", ["DEBUG", "force_debug_cursor"])
def test_the_logger_hears_once_with_the_query_s_own_time(articles, alias, logged, nap, debug, monkeypatch):
    """Once, when it is consumed; as the record of the inline query but for the seconds."""
    slow = articles.filter(name="it's 1%").extra(where=[nap])
    if debug == "force_debug_cursor":
        monkeypatch.setattr(connections[alias], "force_debug_cursor", True)
    with override_settings(DEBUG=debug == "DEBUG"):
        assert len(slow.all()) == 1
        (inline,) = logged
        logged.clear()
        connections[alias].queries_log.clear()
        wait, use = rows(slow.all())
        wait()
        assert logged == []
        use()
        (record,) = logged
        queries = list(connections[alias].queries_log)
    connections[alias].queries_log.clear()
    assert (record.sql, record.params, record.alias) == (inline.sql, inline.params, inline.alias)
    assert (record.msg, record.args[1:], record.levelno) == (inline.msg, inline.args[1:], inline.levelno)
    assert record.duration >= NAP
    assert record.args[0] == record.duration
    assert [(query["sql"], query["time"]) for query in queries] == [(record.sql, f"{record.duration:.3f}")]


def test_prefetches_in_other_threads_are_all_shown(articles, alias, monkeypatch):
    """Two sibling lookups meet in the database, so another thread ran one; both are in the caller's log."""
    met = threading.Barrier(2)
    for model in (Tag, Author):
        from_db = model.from_db.__func__

        def meet(cls, *args, _from_db=from_db, **kwargs):
            met.wait(WAIT)
            return _from_db(cls, *args, **kwargs)

        monkeypatch.setattr(model, "from_db", classmethod(meet))
    started = articles.filter(rank=1, name="it's 1%").prefetch_related("tags", "author")
    with CaptureQueriesContext(connections[alias]) as captured:
        wait, use = rows(started)
        wait(), use(), use()
    assert Counter(table for query in captured for table in tables(query["sql"])) == Counter(
        ["testapp_article", "testapp_tag", "testapp_author"]
    )


def tables(sql):
    first = sql.split(" FROM ", 1)[1].split()[0]
    return [first.strip('`"')]


def test_awaited_queries_are_shown(articles, alias):
    """Each awaited read is in the log of the connection that async code of this thread uses."""

    async def use():
        started = articles.all().start_fetch()
        await started.background["fetch"]
        return await started.background["fetch"]

    with CaptureQueriesContext(connections[alias]) as inline:
        list(articles.all())
        expected = texts(inline)
    with override_settings(DEBUG=True), Shown() as shown:
        run_async(use())
    assert shown == expected


class Shown(list):
    """The texts that the logger is told, whatever thread tells them."""

    def __enter__(self):
        self.handler, self.logger = Records(), logging.getLogger("django.db.backends")
        self.before = self.logger.level, self.logger.propagate
        self.logger.addHandler(self.handler)
        self.logger.setLevel(logging.DEBUG)
        self.logger.propagate = False
        return self

    def __exit__(self, *_):
        self.logger.removeHandler(self.handler)
        self.logger.level, self.logger.propagate = self.before
        self.logger.setLevel(self.before[0])
        self += [record.sql for record in self.handler.records]


class InATest(TransactionTestCase):
    databases = {"default"}

    def test_assert_num_queries_counts_them(self):
        """By Django's own assertion, whatever thread ran them."""
        Article.objects.create(name="one")
        with self.assertNumQueries(2):
            wait, use = rows(Article.objects.all())
            wait(), use(), use()
            wait, use = number(Article.objects.all())
            wait(), use()


# --- The debug toolbar -------------------------------------------------------------------


TOOLBAR = """
import json, sys
from django.conf import settings
import django
DATABASE = json.loads(sys.argv[1])
if DATABASE["ENGINE"].endswith("mysql"):
    try:
        import MySQLdb
    except ImportError:
        import pymysql
        pymysql.install_as_MySQLdb()
settings.configure(
    DEBUG=True, SECRET_KEY="s", ALLOWED_HOSTS=["*"], INTERNAL_IPS=["127.0.0.1"], ROOT_URLCONF="__main__",
    STATIC_URL="static/", USE_TZ=True, DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    DATABASES={"default": DATABASE}, PARALLEL_ORM={"CONNECTIONS": 4},
    LOGGING_CONFIG=None,
    INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth", "django.contrib.staticfiles",
                    "debug_toolbar", "parallel_orm", "tests.testapp"],
    MIDDLEWARE=["debug_toolbar.middleware.DebugToolbarMiddleware"],
    DEBUG_TOOLBAR_CONFIG={"TOOLBAR_STORE_CLASS": "debug_toolbar.store.MemoryStore",
                          "SHOW_TOOLBAR_CALLBACK": lambda request: True},
    TEMPLATES=[{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}],
)
django.setup()
import asyncio
from django.db import connection
from django.http import HttpResponse
from django.test import AsyncClient, Client
from django.urls import include, path
from tests.testapp.models import Article

NAP = {"postgresql": "(SELECT 1 FROM pg_sleep(0.2)) = 1", "mysql": "SLEEP(0.2) = 0", "sqlite": "1 = 1"}

def page(request):
    slow = Article.objects.filter(name="it's").extra(where=[NAP[connection.vendor]]).start_fetch()
    counted = Article.objects.start_count()
    slow.background["fetch"]._read.landed.result(30), counted.background["count"]._read.landed.result(30)
    list(slow), list(slow), counted.count()
    return HttpResponse("<html><body>here</body></html>")

async def async_page(request):
    slow = Article.objects.filter(name="it's").extra(where=[NAP[connection.vendor]]).start_fetch()
    await slow.background["fetch"]
    await Article.objects.acount()
    return HttpResponse("<html><body>here</body></html>")

def inline(request):
    list(Article.objects.filter(name="it's").extra(where=[NAP[connection.vendor]])), Article.objects.count()
    return HttpResponse("<html><body>here</body></html>")

urlpatterns = [path("page", page), path("async", async_page), path("inline", inline),
               path("__debug__/", include("debug_toolbar.urls"))]

def panel_of(response):
    from debug_toolbar.store import get_store
    assert b"here" in response.content, response.content
    return get_store().panel(response.headers["djdt-request-id"], "SQLPanel")

def told(stats):
    return [{name: query[name] for name in ("sql", "raw_sql", "params", "alias", "duration", "vendor")}
            for query in stats["queries"]]

client = Client()
answers = {name: told(panel_of(client.get("/" + name))) for name in ("inline", "page")}
async def visit():
    return await AsyncClient().get("/async")
answers["async"] = told(panel_of(asyncio.run(visit())))
print(json.dumps(answers))
"""


@pytest.fixture
def visited(alias, tmp_path):
    pytest.importorskip("debug_toolbar")
    Article.objects.using(alias).create(name="it's")
    settings = {
        key: value
        for key, value in connections[alias].settings_dict.items()
        if key in ("ENGINE", "NAME", "USER", "PASSWORD", "HOST", "PORT", "OPTIONS")
    }
    settings["NAME"] = str(settings["NAME"])
    program = tmp_path / "visit.py"
    program.write_text(TOOLBAR)
    root = str(Path(__file__).parents[1])
    done = subprocess.run(
        [sys.executable, str(program), json.dumps(settings)],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        cwd=root,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_debug_toolbar_shows_them_with_their_own_times(alias, visited):
    """A real request through its middleware: the panel's entries are those of the inline page."""

    def without_times(page):
        return sorted(
            (query["sql"], query["raw_sql"], query["params"], query["alias"], query["vendor"])
            for query in visited[page]
            if "testapp_article" in query["sql"]
        )

    assert len(without_times("inline")) == 2
    assert without_times("page") == without_times("inline")
    assert without_times("async") == without_times("inline")
    if connections[alias].vendor != "sqlite":
        assert max(query["duration"] for query in visited["page"]) >= 200
        assert max(query["duration"] for query in visited["async"]) >= 200


# --- Events --------------------------------------------------------------------------------


class Observed(list):
    def __enter__(self):
        for signal in SIGNALS:
            signal.connect(self.hear)
        self.before = events.counts()
        return self

    def __exit__(self, *_):
        for signal in SIGNALS:
            signal.disconnect(self.hear)

    def hear(self, sender, event, **_):
        assert sender is event.model
        self.append(event)

    @property
    def kinds(self):
        return Counter(event.kind for event in self)

    @property
    def counted(self):
        now = events.counts()
        return Counter({kind: now[kind] - self.before[kind] for kind in now if now[kind] != self.before[kind]})

    def of(self, kind):
        (event,) = [event for event in self if event.kind == kind]
        return event


SIGNALS = (events.started, events.stolen, events.inline, events.finished, events.failed, events.abandoned)


def test_a_read_in_the_background_is_started_and_finished(articles, alias):
    with Observed() as seen:
        wait, use = rows(articles)
        wait(), use(), use()
        all_done()  # the answer is there before it is told of
    assert seen.kinds == seen.counted == {"started": 1, "finished": 1}
    finished = seen.of("finished")
    assert (finished.verb, finished.model, finished.alias, finished.reason) == ("fetch", Article, alias, None)
    assert finished.started_at.startswith(__file__)
    assert finished.queue_time >= finished.connect_time >= 0
    assert finished.execute_time > 0
    assert finished.error is None


def test_a_stolen_read_is_told_of(articles, busy):
    with Observed() as seen:
        _, use = number(articles)
        use(), use()
    assert seen.kinds == seen.counted == {"started": 1, "stolen": 1, "finished": 1}
    assert (seen.of("stolen").verb, seen.of("stolen").reason) == ("count", "stolen")
    assert seen.of("finished").reason == "stolen"


def test_an_inline_read_is_told_of_with_its_reason(articles, alias):
    with Observed() as seen, transaction.atomic(using=alias):
        Article.objects.using(alias).filter(rank=0).update(score=1)
        _, use = number(articles)
        use()
    assert seen.kinds == seen.counted == {"inline": 1, "finished": 1}
    assert seen.of("inline").reason == "transaction"


def test_a_failed_read_is_told_of_with_its_error(articles):
    with Observed() as seen:
        wait, use = broken(articles)
        wait(), use()
        all_done()
    assert seen.kinds == seen.counted == {"started": 1, "failed": 1}
    assert isinstance(seen.of("failed").error, DatabaseError)


def drained():
    """Return when what was dropped has been told of."""
    told = threading.Event()
    chores.attend()  # a test that started nothing, run first, has not brought it
    chores.call(told.set)
    assert told.wait(WAIT)


def test_what_was_never_used_is_told_of_once(articles):
    """Done and dropped, or dropped on its way: abandoned, once."""
    with Observed() as seen:
        wait, use = rows(articles.all())
        wait()
        del wait, use
        all_done()
        drained()
    assert seen.kinds == seen.counted == {"started": 1, "finished": 1, "abandoned": 1}
    with Observed() as seen:
        pending = articles.start_first()
        landed(pending)
        pending.cancel()
        del pending
        all_done()
        drained()
    assert seen.kinds == {"started": 1, "finished": 1, "abandoned": 1}


def test_what_was_cancelled_by_hand_is_not_abandoned(articles, busy):
    with Observed() as seen:
        pending = articles.start_first()
        assert pending.cancel()
        del pending
        drained()
    assert seen.kinds == seen.counted == {"started": 1, "failed": 1}


def test_a_receiver_that_raises_disturbs_nothing(articles, busy):
    logging.getLogger("django.dispatch").addHandler(quiet := logging.NullHandler())
    try:

        def fail(**_):
            raise RuntimeError("of the receiver")

        for signal in SIGNALS:
            signal.connect(fail)
        try:
            _, use = rows(articles)
            assert len(use()) == 9
            dropped = articles.all().start_first()
            del dropped
            drained()
        finally:
            for signal in SIGNALS:
                signal.disconnect(fail)
        assert articles.all().start_count().count() == 9
    finally:
        logging.getLogger("django.dispatch").removeHandler(quiet)
