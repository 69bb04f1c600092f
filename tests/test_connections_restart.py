"""A server that is restarted: what was idle is renewed, what was under way fails as Django's does, nothing is left."""

from __future__ import annotations

import asyncio
import os
import threading

import psutil
import pytest
from django.core.exceptions import ImproperlyConfigured
from django.db import OperationalError, connections, transaction
from django.db.models import Prefetch
from django.test.utils import CaptureQueriesContext

from parallel_orm import errors
from parallel_orm.connections import lender
from tests.servers import OwnServer, Unavailable
from tests.test_neighbourhood import met
from tests.test_stop import (
    WAIT,
    all_threads_free,
    asker,
    assert_alike,
    both,
    until,
    wait_until_gone,
    wait_until_running,
)
from tests.testapp.models import Article, Author, Tag

__all__ = ["met"]  # a fixture

ALIAS = "restarted"


@pytest.fixture(
    scope="module",
    params=[pytest.param(kind, marks=getattr(pytest.mark, kind)) for kind in ("postgres", "mariadb")],
)
def server(request):
    """A server of this module's own, with one article by Ada."""
    own = OwnServer(request.param)
    try:
        settings = {**own.start(), "NAME": "restarted"}
        connections.settings[ALIAS] = connections.configure_settings({"default": {}, ALIAS: settings})[ALIAS]
        with connections[ALIAS]._nodb_cursor() as cursor:
            cursor.execute("CREATE DATABASE restarted")
        with connections[ALIAS].schema_editor() as editor:
            for model in (Author, Tag, Article):
                editor.create_model(model)
        author = Author.objects.using(ALIAS).create(name="Ada")
        Article.objects.using(ALIAS).create(name="one", author=author).tags.add(
            Tag.objects.using(ALIAS).create(name="red")
        )
        connections[ALIAS].close()
        yield own
    except (Unavailable, ImproperlyConfigured, OSError) as error:
        pytest.skip(f"no server of our own: {error}")
    finally:
        if ALIAS in connections.settings:
            connections[ALIAS].close()
            del connections[ALIAS]
            del connections.settings[ALIAS]
        own.stop()


def long(queryset):
    """Return a query of a minute, by a text that :func:`wait_until_running` knows."""
    if connections[ALIAS].vendor == "postgresql":
        return queryset.extra(where=["(SELECT 1 FROM pg_sleep(60)) = 1"])
    # A sleep ends well when its server ends, and BENCHMARK() is not known to read.
    tables = ", ".join(f"information_schema.collations {name}" for name in "abcde")
    return queryset.extra(where=[f"(SELECT count(*) FROM {tables} WHERE a.id <> 'SLEEP(60)') = 0"])


def sockets_to(server):
    """Return what this process holds of connections to the server, dead ones too."""
    port = connections.settings[ALIAS]["PORT"]
    return [each for each in psutil.Process().net_connections() if each.raddr and each.raddr.port == port]


_beside: list[threading.Thread] = []


def beside(call):
    """Have something done meanwhile."""
    _beside.append(threading.Thread(target=call))
    _beside[-1].start()


def bring_back(server):
    """Run it again, when it has been put down."""
    while _beside:
        _beside.pop().join(WAIT)
    server.resume()


def put_down(server):
    """Stop it; the asker's connection is as dead as the others."""
    asker.close()
    server.pause()


@pytest.fixture
def articles(server, monkeypatch):
    """Connections are kept, as outside of tests. Afterwards every thread serves, and no connection is open."""
    lender.close_idle()
    monkeypatch.setattr("parallel_orm.connections.under_test", lambda: False)
    try:
        yield Article.objects.using(ALIAS).order_by("pk")
        bring_back(server)
        connections[ALIAS].close()  # which may be dead, and is what a read is on that no thread has begun in time
        all_threads_free()
        assert Article.objects.using(ALIAS).start_count().count() == 1
        all_threads_free()
        assert not lender._out[ALIAS]
    finally:
        # Whatever went wrong here is not to go wrong in all tests behind this one.
        bring_back(server)
        lender.close_idle()
        connections[ALIAS].close()
        asker.close()
    until(lambda: not sockets_to(server), "a connection was left open")


def two_side_by_side(articles, barrier):
    """Return two fetches, each answered on a connection of its own while the other one was at it."""
    started = [articles.all().start_fetch(), articles.all().start_fetch()]
    barrier.wait(WAIT)
    for each in started:
        each.background["fetch"]._read.landed.result(WAIT)
    return started


def from_here_on_idle():
    all_threads_free()
    return [idle.wrapper for idle in lender._idle[ALIAS]]


def one_idle(articles):
    """Return a connection that served a read and waits for the next one."""
    pending = articles.all().start_first()
    pending._read.landed.result(WAIT)
    (wrapper,) = from_here_on_idle()
    return wrapper


@pytest.mark.parametrize("age", [0, 600, None])
@pytest.mark.parametrize("checks", [False, True])
def test_between_two_reads(server, articles, met, monkeypatch, age, checks):
    """The connections of before are stale: the reads are repeated on new ones, in the background, and seen once."""
    monkeypatch.setitem(connections.settings[ALIAS], "CONN_MAX_AGE", age)
    monkeypatch.setitem(connections.settings[ALIAS], "CONN_HEALTH_CHECKS", checks)
    barrier = met(3)
    two_side_by_side(articles, barrier)
    stale = from_here_on_idle()
    assert len(stale) == 2
    assert all(wrapper.connection is not None for wrapper in stale)
    connections[ALIAS].close()
    server.restart()
    with CaptureQueriesContext(connections[ALIAS]) as queries:
        started = two_side_by_side(articles, barrier)
        assert [[row.name for row in each] for each in started] == [["one"], ["one"]]
        assert {each.background["fetch"].reason for each in started} == {None}
    assert len(queries) == 2


@pytest.mark.parametrize("verb", ["count", "exists", "first", "fetch", "prefetch"])
def test_every_verb_answers_after_it(server, articles, verb):
    """One stale connection, one question."""
    ways = {
        "count": lambda: articles.start_count().background["count"],
        "exists": lambda: articles.start_exists().background["exists"],
        "first": articles.start_first,
        "fetch": lambda: articles.start_fetch().background["fetch"],
        "prefetch": lambda: articles.prefetch_related("author", "tags").start_fetch().background["fetch"],
    }
    stale = one_idle(articles)
    server.restart()
    pending = ways[verb]()
    pending._read.landed.result(WAIT)
    assert pending.result()
    assert pending.reason is None
    if verb == "prefetch":
        (article,) = pending.result()
        assert (article.author.name, [tag.name for tag in article.tags.all()]) == ("Ada", ["red"])
    assert stale.connection is None


def test_between_two_maps(server, articles):
    """Of threads, whose connections are the same, and of processes, which have kept theirs."""
    for workers in ({"threads": 2}, {"processes": 2}):
        assert list(articles.parallel_map(len_of_name, **workers)) == [3]
        server.restart()
        connections[ALIAS].close()
        assert list(articles.parallel_map(len_of_name, **workers)) == [3]


def len_of_name(row):
    return len(row.name)


def inline_in_a_thread(ask):
    """Have something asked as Django would, beside; return what is to be waited for, and what it raises comes there."""
    raised = []

    def run():
        try:
            ask()
        except Exception as error:
            raised.append(error)
        finally:
            connections.close_all()

    thread = threading.Thread(target=run)
    thread.start()

    def outcome():
        thread.join(WAIT)
        return raised[0]

    return outcome


def test_during_a_read(server, articles):
    """It fails as the same query does inline, where it is used; the next one answers. What had come, stays."""
    before = articles.all().start_fetch()
    before.background["fetch"]._read.landed.result(WAIT)
    inline = inline_in_a_thread(lambda: list(long(articles)))
    started = long(articles).start_fetch()
    wait_until_running(ALIAS, 2)
    put_down(server)
    with pytest.raises(OperationalError) as raised:
        list(started)
    assert started.background["fetch"].reason is None
    expected = inline()
    assert (type(raised.value), str(raised.value)) == (type(expected), str(expected))
    assert any("started at" in note and __file__ in note for note in raised.value.__notes__)
    assert [row.name for row in before] == ["one"]
    server.resume()
    assert articles.all().start_count().count() == 1


def test_during_two_prefetches(server, articles):
    """Each in a thread of its own: the fetch fails as a whole, both threads serve on."""
    slow = [Prefetch("author", long(Author.objects.using(ALIAS))), Prefetch("tags", long(Tag.objects.using(ALIAS)))]
    started = articles.prefetch_related(*slow).start_fetch()
    wait_until_running(ALIAS, 2)
    put_down(server)
    with pytest.raises(OperationalError):
        list(started)


def test_during_a_read_that_is_awaited(server, articles):
    async def use():
        pending = long(articles).start_fetch().background["fetch"]
        await asyncio.to_thread(wait_until_running, ALIAS)
        await asyncio.to_thread(put_down, server)
        with pytest.raises(OperationalError):
            await asyncio.wait_for(pending._awaited(), WAIT)

    asyncio.run(use())


def test_during_a_read_in_a_transaction(server, articles):
    """The caller's own connection died with it, as inline; it is mended by the same end of the same block."""

    def ask(started):
        with transaction.atomic(using=ALIAS):
            assert Article.objects.using(ALIAS).count() == 1
            list(started(long(articles)))

    inline = inline_in_a_thread(lambda: ask(lambda queryset: queryset))
    wait_until_running(ALIAS)

    def start(queryset):
        queryset.start_fetch()
        if connections[ALIAS].vendor == "postgresql":  # elsewhere it runs within the call
            wait_until_running(ALIAS, 2)
            put_down(server)
        return queryset

    if connections[ALIAS].vendor != "postgresql":
        beside(lambda: (wait_until_running(ALIAS, 2), put_down(server)))
    with pytest.raises(OperationalError) as raised:
        ask(start)
    assert type(raised.value) is type(inline())
    assert not connections[ALIAS].in_atomic_block
    bring_back(server)
    assert Article.objects.using(ALIAS).count() == 1


def test_a_write_that_waits_for_a_read_of_a_server_that_goes(server, articles):
    """The barrier ends with the read, whose failure stays with it; the write fails by itself, as inline."""
    assert articles.count() == 1
    started = long(articles).start_fetch()
    wait_until_running(ALIAS)
    beside(lambda: put_down(server))
    with pytest.raises(OperationalError):
        Article.objects.using(ALIAS).create(name="two")
    with pytest.raises(OperationalError):
        list(started)
    connections[ALIAS].close()


@pytest.mark.parametrize("kept", [False, True], ids=["nothing open", "one idle"])
def test_while_it_is_down(server, articles, kept):
    """Refused as inline, whether there was a connection before or not; several at once, too."""
    if kept:
        one_idle(articles)
    connections[ALIAS].close()
    put_down(server)
    inline, background = both(articles)
    assert_alike(inline, background)
    for started in [articles.all().start_count() for _ in range(10)]:
        with pytest.raises(OperationalError):
            started.count()
    pending = articles.all().start_first()

    async def use():
        with pytest.raises(OperationalError):
            await asyncio.wait_for(pending._awaited(), WAIT)

    asyncio.run(use())
    connections.close_all()


def test_a_cancel_that_comes_too_late(server, articles):
    """The query is gone with its server: there is nothing to stop, and nobody goes on trying."""
    pending = long(articles).start_first()
    wait_until_running(ALIAS)
    put_down(server)
    pending._read.landed.result(WAIT)
    assert pending.cancel() is False
    with pytest.raises(OperationalError):
        pending.result()
    pending = long(articles).start_first()
    with pytest.raises(OperationalError):
        pending.result()
    server.resume()
    pending = long(articles).start_first()
    wait_until_running(ALIAS)
    assert pending.cancel() is True
    with pytest.raises(errors.Cancelled):
        pending.result()
    wait_until_gone(ALIAS)


def test_a_child_of_a_process_whose_server_was_restarted(server, articles):
    """What it inherited is dead and the parent's: it opens its own."""
    one_idle(articles)
    connections[ALIAS].close()
    server.restart()
    child = os.fork()
    if child == 0:
        try:
            names = [row.name for row in articles.all().start_fetch()]
            os._exit(0 if names == ["one"] else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert articles.all().start_count().count() == 1
