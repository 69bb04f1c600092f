"""Reads awaited: side by side, without blocking the event loop, as inline in whatever must stay inline."""

# ruff: noqa: F811 - fixtures are imported

from __future__ import annotations

import asyncio
import contextvars
import json
import logging
import os
import subprocess
import sys
import textwrap
import threading

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from asgiref.testing import ApplicationCommunicator
from django.core.asgi import get_asgi_application
from django.core.exceptions import SynchronousOnlyOperation
from django.db import OperationalError, connections, transaction
from django.db.models import Max
from django.db.models.sql.compiler import SQLCompiler
from django.http import JsonResponse
from django.test import TestCase, override_settings
from django.test.utils import CaptureQueriesContext
from django.urls import path

from parallel_orm import ParallelQuerySet
from parallel_orm.connections import lender
from parallel_orm.executors.threads import BackgroundThreads
from tests.asynchronous import run
from tests.test_background import WAIT, articles, busy, hold_all_threads, met  # noqa: F401
from tests.testapp.models import Article, Author


@pytest.fixture
def queries_meet(monkeypatch):
    """Make every query wait until so many are at it at once."""

    def meet(number):
        barrier = threading.Barrier(number)
        execute = SQLCompiler.execute_sql

        def wait_and_execute(self, *args, **kwargs):
            barrier.wait(WAIT)
            return execute(self, *args, **kwargs)

        monkeypatch.setattr(SQLCompiler, "execute_sql", wait_and_execute)

    return meet


async def all_at_once(alias, key):
    """Every async verb of its own queryset, none of them started."""
    rows = Article.objects.using(alias)

    async def loop():
        return len([article async for article in rows.all()[:3]])

    return await asyncio.gather(
        rows.acount(),
        rows.filter(rank=1).acount(),
        rows.aget(pk=key),
        rows.filter(rank=7).aexists(),
        rows.order_by("pk").afirst(),
        rows.aaggregate(Max("rank")),
        rows.ain_bulk([key]),
        loop(),
    )


def test_gathered_async_methods_meet_in_the_database(articles, alias, queries_meet):
    """Eight at once, which one thread after the other never would; and the event loop goes on meanwhile."""
    first = articles[0]
    ticks = []

    async def use():
        everything = asyncio.ensure_future(all_at_once(alias, first.pk))
        while not everything.done():
            ticks.append(await asyncio.sleep(0))
        return await everything

    queries_meet(8)
    answers = run(use())
    assert answers == [30, 10, first, False, first, {"rank__max": 2}, {first.pk: first}, 3]
    assert len(ticks) > 1


def test_awaited_pendings_meet_in_the_database(articles, alias, met):
    keys = list(articles.values_list("pk", flat=True)[:4])

    async def use():
        started = [Article.objects.using(alias).start_get(pk=key) for key in keys]
        return [(await pending).pk for pending in started]

    met(4)
    assert run(use()) == keys


def test_to_open_a_connection_is_no_write(articles, alias, busy):
    """What is said on a new connection before its first query has no read wait, nor run one after the other there."""
    keys = list(articles.values_list("pk", flat=True)[:2])
    held, kept = [Article.objects.using(alias).filter(pk=key).start_fetch().background["fetch"] for key in keys]
    connections[alias].close()
    assert held.result(WAIT)[0].pk == keys[0]
    assert not kept.done()


def test_async_loops_of_gathered_tasks_meet(articles, alias, met):
    keys = list(articles.values_list("pk", flat=True)[:3])

    async def loop(key):
        return [article.pk async for article in Article.objects.using(alias).filter(pk=key)]

    async def use():
        return await asyncio.gather(*map(loop, keys))

    met(3)
    assert run(use()) == [[key] for key in keys]


async def page(request, alias, key):
    answers = await all_at_once(alias, key)
    return JsonResponse({"answers": [repr(answer) for answer in answers]})


urlpatterns = [path("<alias>/<int:key>", page)]


@override_settings(ROOT_URLCONF=__name__, MIDDLEWARE=[], ALLOWED_HOSTS=["*"])
def test_under_asgi_they_meet_too(articles, alias, queries_meet):
    first = articles[0]
    scope = {
        "type": "http",
        "method": "GET",
        "path": f"/{alias}/{first.pk}",
        "headers": [],
        "query_string": b"",
        "http_version": "1.1",
    }

    async def visit():
        visitor = ApplicationCommunicator(get_asgi_application(), scope)
        await visitor.send_input({"type": "http.request", "body": b""})
        head = await visitor.receive_output(WAIT)
        body = await visitor.receive_output(WAIT)
        await visitor.wait(WAIT)
        return head["status"], body["body"]

    queries_meet(8)
    status, body = run(visit())
    assert status == 200, body
    assert b'"30", "10"' in body


# --- Order, and what must stay ----------------------------------------------------------


def test_a_write_awaited_before_is_seen_and_one_awaited_after_is_not(articles, alias):
    async def use():
        await Article.objects.using(alias).acreate(name="before")
        pendings = [articles.all().start_count().background["count"], articles.all().start_aggregate(n=Max("rank"))]
        fetched = articles.all().start_fetch()
        await Article.objects.using(alias).acreate(name="after", rank=99)
        return [await pending for pending in pendings], len([row async for row in fetched]), await articles.acount()

    assert run(use()) == ([31, {"n": 2}], 31, 32)


class InATestCase(TestCase):
    databases = {"default"}

    async def test_an_async_test_sees_its_own_rows(self):
        """In the transaction of a TestCase, as inline, and the reason is told."""
        await Article.objects.acreate(name="mine")
        pending = Article.objects.start_first()
        answers = await asyncio.gather(pending, Article.objects.acount(), Article.objects.aexists())
        assert (answers[0].name, *answers[1:], pending.reason) == ("mine", 1, True, "testcase")


async def _write_and_ask(alias):
    await Article.objects.using(alias).acreate(name="mine")
    pending = Article.objects.using(alias).start_get(name="mine")
    found, counted = await asyncio.gather(pending, Article.objects.using(alias).acount())
    return found.name, counted, pending.reason


def test_within_a_sync_transaction(articles, alias):
    with transaction.atomic(using=alias):
        assert async_to_sync(_write_and_ask)(alias) == ("mine", 31, "transaction")
        transaction.set_rollback(True, using=alias)


def test_within_an_atomic_function_that_is_awaited(articles, alias):
    """Reads of the function are those of its transaction; afterwards it is over."""

    def write_and_ask():
        with transaction.atomic(using=alias):
            Article.objects.using(alias).create(name="mine")
            pending = Article.objects.using(alias).start_get(name="mine")
            answer = pending.result(WAIT).name, pending.reason
            transaction.set_rollback(True, using=alias)
        return answer

    async def use():
        answer = await sync_to_async(write_and_ask)()
        return answer, await articles.acount()

    assert run(use()) == (("mine", "transaction"), 30)


def test_a_transaction_in_the_thread_of_async_code(articles, alias):
    """Autocommit off, or a block that spans several awaits: what is awaited then is in it."""

    async def use():
        block = transaction.atomic(using=alias)
        await sync_to_async(block.__enter__)()
        try:
            return await _write_and_ask(alias)
        finally:
            await sync_to_async(transaction.set_rollback)(True, using=alias)
            await sync_to_async(block.__exit__)(None, None, None)

    assert run(use()) == ("mine", 31, "transaction")
    assert articles.count() == 30


# --- Cancelled, held up, ended ----------------------------------------------------------


def test_a_cancelled_task_disturbs_nothing(articles, alias, busy):
    """The Pending that it awaited answers the others, and whoever asks later."""
    pending = articles.start_count().background["count"]
    entered, gate = threading.Event(), threading.Event()

    def block():
        entered.set()
        assert gate.wait(WAIT)

    async def wait_for_it():
        return await pending

    async def use():
        blocked = asyncio.ensure_future(sync_to_async(block)())  # the thread that would run it
        await asyncio.to_thread(entered.wait, WAIT)
        tasks = [asyncio.ensure_future(wait_for_it()) for _ in range(3)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(wait_for_it(), 0.01)
        gate.set()
        await blocked
        assert await asyncio.gather(*tasks[1:]) == [30, 30]
        assert tasks[0].cancelled()
        return await pending

    assert run(use()) == 30
    assert pending.result() == 30


def test_a_task_that_is_cancelled_while_a_thread_reads(articles, alias, met):
    met(2)  # the thread, and who comes last
    pending = articles[:1].start_fetch().background["fetch"]

    async def use():
        task = asyncio.ensure_future(_wait(pending))
        await asyncio.sleep(0)
        while pending.queue_time is None:
            pass  # until a thread has begun it
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()
        assert not pending.done()
        other = asyncio.ensure_future(_wait(pending))
        await asyncio.gather(sync_to_async(list)(articles[:1]), other)
        return other.result()

    assert len(run(use())) == 1


async def _wait(pending):
    return await pending


def test_with_all_threads_held_they_come_all_the_same(articles, alias, busy):
    """More than there are threads, started and not started: run in the thread of Django's async methods."""

    async def use():
        pendings = [articles.all().start_count().background["count"] for _ in range(25)]
        return await asyncio.gather(*pendings, *[articles.acount() for _ in range(5)]), {p.reason for p in pendings}

    assert run(asyncio.wait_for(use(), WAIT)) == ([30] * 30, {"stolen"})


def test_what_was_not_given_to_the_threads_comes_all_the_same(articles, monkeypatch):
    """They had enough waiting at the start, and are free when it is awaited."""
    monkeypatch.setattr(BackgroundThreads, "are_swamped", True)
    assert run(asyncio.wait_for(articles.acount(), WAIT)) == 30


def test_what_needs_no_query_is_there_at_once(articles):
    len(articles)

    async def use():
        pendings = articles.none().start_in_bulk(), articles.start_first()
        return [(pending.done(), pending.reason[:]) for pending in pendings]

    assert run(use()) == [(True, "empty"), (True, "evaluated")]


def test_with_no_connection_to_be_had_they_come_all_the_same(articles, alias):
    """While the budget is used up, by whoever holds the last one and awaits."""
    with override_settings(PARALLEL_ORM={"CONNECTIONS": 1}), lender.lent(alias):
        assert run(asyncio.wait_for(articles.acount(), WAIT)) == 30


def test_a_server_that_refuses_is_told_where_it_is_awaited(postgres, monkeypatch):
    """No thread gets a connection, so the awaiting task asks on its own, and hears what it would have heard inline."""

    def refuse(self):
        raise OperationalError("refused")

    connections[postgres].close()
    monkeypatch.setattr(type(connections[postgres]), "get_new_connection", lambda self, params: refuse(self))

    async def use():
        return await asyncio.gather(
            *[Article.objects.using(postgres).acount() for _ in range(3)],
            Article.objects.using(postgres).start_first(),
            return_exceptions=True,
        )

    answers = run(asyncio.wait_for(use(), WAIT))
    assert [str(answer) for answer in answers] == ["refused"] * 4


def test_a_read_whose_event_loop_ended_before_it_began(articles):
    """Its loop is gone, and the thread that was to begin it was not free: it answers nevertheless."""
    entered, gate = threading.Event(), threading.Event()

    def block():
        entered.set()
        assert gate.wait(WAIT)

    async def use():
        blocked = asyncio.ensure_future(sync_to_async(block)())
        await asyncio.to_thread(entered.wait, WAIT)
        pending = articles.start_count().background["count"]
        blocked.cancel()
        return pending

    pending = asyncio.run(use())
    gate.set()
    assert pending.result(WAIT) == 30
    connections.close_all()


def test_an_event_loop_that_ends_is_not_missed(articles, met, caplog):
    """The answer comes when nobody waits any more: nothing is logged of it."""
    met(2)
    pending = articles[:1].start_fetch().background["fetch"]

    async def use():
        task = asyncio.ensure_future(_wait(pending))
        await asyncio.sleep(0)
        task.cancel()

    with caplog.at_level(logging.WARNING):
        asyncio.run(use())
        list(articles[:1])
        assert len(pending.result(WAIT)) == 1
    assert caplog.records == []
    connections.close_all()


SHUTDOWN = """
    import asyncio, os, django
    from django.conf import settings
    django.setup()
    from tests.testapp.models import Article

    async def main():
        Article.objects.using({alias!r}).start_fetch()
        asyncio.ensure_future(Article.objects.using({alias!r}).acount())
        held = Article.objects.using({alias!r}).extra(select={{"slept": "pg_sleep(0.3)"}}).start_fetch()
        task = asyncio.ensure_future(wait(held))
        await asyncio.sleep(0)
        return held

    async def wait(queryset):
        return [row async for row in queryset]

    held = asyncio.run(main())
    print("ended")
"""


def test_the_interpreter_ends_with_reads_under_way(postgres):
    """No warning of asyncio's, no traceback, no hang."""
    Article.objects.using(postgres).create(name="slow")
    databases = os.environ["PARALLEL_ORM_TEST_DATABASES"]
    settings = connections[postgres].settings_dict
    program = (
        textwrap.dedent(SHUTDOWN)
        .format(alias=postgres)
        .replace("django.setup()", f"settings.DATABASES['postgres']['NAME'] = {settings['NAME']!r}; django.setup()")
    )
    ended = subprocess.run(
        [sys.executable, "-W", "default", "-W", "ignore::ResourceWarning", "-c", program],
        env={**os.environ, "PARALLEL_ORM_TEST_DATABASES": databases},
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "ended\n", "")


# --- As Django's own --------------------------------------------------------------------


def test_async_methods_ask_each_time_and_leave_nothing(articles, alias):
    queryset = articles.all()

    async def use():
        before = await queryset.acount(), await queryset.aexists(), (await queryset.afirst()).name
        await Article.objects.using(alias).acreate(name="later")
        return before, await queryset.acount()

    assert run(use()) == ((30, True, "name 0"), 31)
    assert dict(queryset.background) == {}


def test_an_async_loop_leaves_the_rows_and_nothing_else(articles):
    queryset = articles.all()

    async def use():
        return len([row async for row in queryset]), len([row async for row in queryset])

    assert run(use()) == (30, 30)
    assert dict(queryset.background) == {}


def test_an_async_loop_that_failed_asks_again(articles, monkeypatch):
    queryset = articles.all()
    from_db = Article.from_db

    def fail(cls, *args, **kwargs):
        raise ZeroDivisionError

    async def use():
        monkeypatch.setattr(Article, "from_db", classmethod(fail))
        with pytest.raises(ZeroDivisionError):
            [row async for row in queryset]
        monkeypatch.setattr(Article, "from_db", from_db)
        return len([row async for row in queryset])

    assert run(use()) == 30


def test_tasks_that_loop_over_one_queryset_share_its_query(articles, alias):
    queryset = articles.all()

    async def loop():
        return [row async for row in queryset]

    async def use():
        return await asyncio.gather(loop(), loop(), loop())

    one, two, three = run(use())
    assert len(one) == 30
    assert all(a is b is c for a, b, c in zip(one, two, three, strict=True))


def test_what_is_evaluated_answers_without_a_query(articles, alias):
    """As Django has it: rows, count, existence and the first by the queryset's order."""
    len(articles)

    async def use():
        return await articles.acount(), await articles.aexists(), (await articles.afirst()).name

    with CaptureQueriesContext(connections[alias]) as here:
        assert run(use()) == (30, True, "name 0")
    assert len(here) == 0


def test_a_started_fetch_answers_afirst(articles, busy):
    started = articles.start_fetch()

    async def use():
        first = await started.afirst()
        return first, [row async for row in started]

    first, rows = run(use())
    assert rows[0] is first


def test_exceptions_of_aget(articles):
    async def use(**lookups):
        return await articles.aget(**lookups)

    with pytest.raises(Article.DoesNotExist):
        run(use(name="nobody"))
    with pytest.raises(Article.MultipleObjectsReturned):
        run(use(rank=1))


class OwnQuerySet(ParallelQuerySet):
    def count(self):
        return super().count() + 1000

    def get(self, *args, **kwargs):
        return "own"

    def exists(self):
        return "own"

    def first(self):
        return "own"

    def last(self):
        return "own"

    def aggregate(self, *args, **kwargs):
        return "own"

    def in_bulk(self, *args, **kwargs):
        return "own"

    def _fetch_all(self):
        super()._fetch_all()
        self._result_cache = self._result_cache[:2]


def test_async_methods_call_what_a_derived_class_made_of_them(articles, alias):
    rows = OwnQuerySet(Article, using=alias).order_by("pk")

    async def use():
        own = [
            await rows.aget(),
            await rows.aexists(),
            await rows.afirst(),
            await rows.alast(),
            await rows.aaggregate(),
            await rows.ain_bulk(),
        ]
        return own, await rows.acount(), len([row async for row in rows.all()])

    assert run(use()) == (["own"] * 6, 1030, 2)


def test_sync_use_in_an_event_loop_is_refused_as_django_refuses_it(articles):
    async def use():
        for sync_use in (len, bool, list, lambda rows: rows.count(), lambda rows: rows.first(), lambda rows: rows[0]):
            with pytest.raises(SynchronousOnlyOperation):
                sync_use(articles.all())
        pending = articles.start_count().background["count"]
        if not pending.done():
            with pytest.raises(SynchronousOnlyOperation):
                pending.result()
        return await pending, pending.result()

    assert run(use()) == (30, 30)


def test_related_managers_and_values(articles, alias):
    author = Author.objects.using(alias).create(name="Ada")
    articles.filter(rank=1).update(author=author)

    async def use():
        return await asyncio.gather(
            author.articles.acount(),
            author.articles.aexists(),
            author.articles.order_by("pk").values_list("name", flat=True).afirst(),
            Article.objects.using(alias).none().acount(),
            Article.objects.using(alias).none().afirst(),
        )

    assert run(use()) == [10, True, "name 1", 0, None]


seen = contextvars.ContextVar("seen", default="nobody")


def test_a_task_reads_in_its_own_context(articles, alias, monkeypatch):
    from_db = Article.from_db.__func__
    found = {}

    def look(cls, *args, **kwargs):
        article = from_db(cls, *args, **kwargs)
        found[article.name] = seen.get()
        return article

    monkeypatch.setattr(Article, "from_db", classmethod(look))

    async def as_somebody(name):
        seen.set(name)
        await articles.aget(name=name)

    async def use():
        await asyncio.gather(as_somebody("name 1"), as_somebody("name 2"))

    run(use())
    assert found == {"name 1": "name 1", "name 2": "name 2"}


BESIDE = """
    import asyncio, json, os, django
    from django.conf import settings
    server = json.loads(os.environ["SERVER"])
    settings.configure(
        INSTALLED_APPS=["django_async_backend", "parallel_orm"],
        DATABASES={
            "default": {"ENGINE": "django.db.backends.postgresql", **server},
            "theirs": {"ENGINE": "django_async_backend.db.backends.postgresql", **server},
        },
    )
    django.setup()
    from asgiref.sync import sync_to_async
    from django.db import connections, models
    from django_async_backend.db import async_connections
    from django_async_backend.db.models.base import AsyncModelMixin
    from django_async_backend.db.new_connection import async_new_connection
    from django_async_backend.db.transaction import async_atomic
    from parallel_orm import ParallelManager

    class Tag(AsyncModelMixin, models.Model):
        name = models.CharField(max_length=50)
        objects = ParallelManager()
        class Meta:
            app_label = "testapp"

    async def theirs():
        async with async_new_connection():
            return await Tag.async_objects.using("theirs").acount()

    async def main():
        ours = [Tag.objects.using(alias).acount() for alias in ("default", "theirs") for _ in range(3)]
        print(await asyncio.gather(*ours, theirs(), theirs()))
        async with async_new_connection():
            async with async_atomic(using="theirs"):
                await Tag.async_objects.using("theirs").acreate(name="mine")
                print(await Tag.async_objects.using("theirs").acount(), await Tag.objects.using("theirs").acount())
        print([tag.name async for tag in Tag.objects.using("theirs")])
        for connection in async_connections.all():
            await connection.close()
        await sync_to_async(connections.close_all)()

    asyncio.run(main())
"""


def test_beside_django_async_backend(postgres):
    """Both in one task and on one alias; its transaction is on a connection of its own, which ours do not see."""
    pytest.importorskip("django_async_backend")
    settings = connections[postgres].settings_dict
    server = {name: settings[name] for name in ("NAME", "USER", "PASSWORD", "HOST", "PORT")}
    ended = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error::RuntimeWarning", "-c", textwrap.dedent(BESIDE)],
        env={**os.environ, "SERVER": json.dumps(server)},
        capture_output=True,
        text=True,
        timeout=WAIT,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == ["[0, 0, 0, 0, 0, 0, 0, 0]", "1 0", "['mine']"]
