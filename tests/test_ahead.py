"""The next chunk is read while this one is used, where that is the same; and stops when the loop is left."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref

import pytest
from asgiref.sync import sync_to_async
from django.db import connections, transaction
from django.test import override_settings
from django.test.utils import CaptureQueriesContext

from parallel_orm import events
from parallel_orm.ahead import Ahead, Effort, Opening, helps, is_idle
from parallel_orm.connections import lender
from parallel_orm.outcomes import Stopwatch
from parallel_orm.rows import Opened
from tests.testapp.models import Article

WAIT = 60


@pytest.fixture
def articles(alias, monkeypatch):
    """Fifty articles, whose walks find that reading ahead helps."""
    Article.objects.using(alias).bulk_create(Article(name=f"name {n % 7}", rank=n) for n in range(50))
    monkeypatch.setattr("parallel_orm.walk.helps", lambda read, used: True)
    return Article.objects.using(alias)


class Heard:
    """What became of the reads in the background."""

    def __init__(self):
        self.counts = {"started": 0, "finished": 0, "failed": 0}
        self.changed = threading.Condition()
        self.receivers = [(getattr(events, kind), self._receiver(kind)) for kind in self.counts]
        for signal, receiver in self.receivers:
            signal.connect(receiver)

    def _receiver(self, kind):
        def hear(**_):
            with self.changed:
                self.counts[kind] += 1
                self.changed.notify_all()

        return hear

    def wait_for(self, **counts):
        with self.changed:
            assert self.changed.wait_for(lambda: all(self.counts[k] >= n for k, n in counts.items()), WAIT), self.counts


@pytest.fixture
def heard():
    heard = Heard()
    yield heard
    for signal, receiver in heard.receivers:
        signal.disconnect(receiver)


ORDERS = [("pk",), ("-name", "pk"), ("author__name", "pk")]


@pytest.mark.parametrize("order", ORDERS, ids=["pages", "pages in another order", "ranges"])
def test_the_next_chunk_is_read_while_this_one_is_used(articles, heard, order):
    """The loop waits in the first chunk until the second one is there."""
    seen = []
    for article in articles.order_by(*order).chunked_iterator(20):
        if not seen:
            heard.wait_for(finished=1)
        seen.append(article)
    assert seen == list(articles.order_by(*order))
    assert heard.counts == {"started": 2, "finished": 2, "failed": 0}


def test_its_queries_are_seen_once(articles, alias):
    with CaptureQueriesContext(connections[alias]) as queries:
        assert len(list(articles.order_by("pk").chunked_iterator(20))) == 50
    assert len(queries) == 4, "the last key, and three pages"


def test_a_loop_that_writes_sees_its_writes(articles, heard):
    """Although the next chunk was read before; and from then on each chunk is read when it is needed."""
    seen = []
    for article in articles.order_by("pk").chunked_iterator(10):
        if not seen:
            heard.wait_for(finished=1)
            articles.filter(rank=10).update(name="by the loop")
            articles.filter(rank=11).delete()
        seen.append((article.rank, article.name))
    assert (10, "by the loop") in seen
    assert 11 not in dict(seen)
    assert len(seen) == 49
    assert heard.counts["started"] == 1


def test_a_transaction_in_the_loop_sees_its_own(articles, alias, heard):
    """A chunk that was read before the transaction is none of it."""
    walk = articles.order_by("pk").chunks(10)
    next(walk)
    heard.wait_for(finished=1)
    with transaction.atomic(using=alias):
        with CaptureQueriesContext(connections[alias]) as queries:
            assert [a.rank for a in next(walk)] == list(range(10, 20))
        assert len(queries) == 1, "read here"
        assert heard.counts["started"] == 1
    walk.close()


def test_where_it_would_not_be_the_same_it_is_not_done(articles, alias, heard, postgres):
    with transaction.atomic(using=alias):
        assert len(list(articles.chunked_iterator(10))) == 50
        assert len(list(articles.select_for_update().order_by("pk").chunked_iterator(10))) == 50
    with override_settings(PARALLEL_ORM={"CONNECTIONS": 0}):
        assert len(list(articles.chunked_iterator(10))) == 50
    list(Article.objects.using(postgres).chunked_iterator(10, consistent=True))
    assert heard.counts["started"] == 0


def test_left_half_way_it_leaves_nothing(articles, alias, heard):
    """The chunk on its way is dropped, and its connection comes back."""
    for article in articles.order_by("pk").chunked_iterator(10):
        if article.rank == 12:
            break
    heard.wait_for(started=2)
    until = time.monotonic() + WAIT
    while lender._out[alias] and time.monotonic() < until:
        time.sleep(0)
    assert lender._out[alias] == 0
    assert articles.count() == 50


def test_a_read_that_fails_there_is_made_here(articles, monkeypatch):
    """Too many connections, say: inline it would not have failed."""

    class Failing:
        def result(self):
            raise OSError

        def cancel(self):
            return False

    monkeypatch.setattr("parallel_orm.ahead.start_read", lambda verb, task: Failing())
    assert list(articles.order_by("pk").chunked_iterator(10)) == list(articles.order_by("pk"))


def test_in_a_coroutine(articles, heard):
    async def walk():
        seen = []
        async for article in articles.order_by("pk").achunked_iterator(20):
            if not seen:
                await asyncio.to_thread(heard.wait_for, finished=1)
            seen.append(article.rank)
        await sync_to_async(connections.close_all)()
        return seen

    assert asyncio.run(walk()) == list(range(50))


def test_memory_is_that_of_two_chunks(articles, heard):
    alive, most = [], 0
    for number, article in enumerate(articles.order_by("pk").chunked_iterator(5)):
        if number % 5 == 0 and number < 45:
            heard.wait_for(finished=number // 5 + 1)
        alive.append(weakref.ref(article))
        del article
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
    assert most <= 5, "and five of the next chunk, that nobody has seen"


def effort(seconds, busy):
    effort = Effort()
    effort.took(seconds, busy)
    return effort


def test_it_helps_where_one_waits_and_the_other_is_busy():
    """And never where both are busy: Python is, in one thread at a time."""
    waiting, busy, instant = effort(1.0, 0.0), effort(1.0, 0.9), effort(0.00001, 0.00001)
    assert helps(waiting, busy)
    assert helps(busy, waiting)
    assert helps(waiting, waiting)
    assert not helps(busy, busy)
    assert not helps(waiting, instant)
    assert not helps(Effort(), Effort())


def test_whoever_waits_for_long_enough_is_idle():
    working, waiting, hurried = effort(1.0, 0.9), effort(1.0, 0.1), effort(0.01, 0.0)
    reading = effort(0.1, 0.05)
    assert is_idle(reading, waiting)
    assert not is_idle(reading, working)
    assert not is_idle(reading, hurried)
    assert not is_idle(Effort(), Effort())


def test_an_effort_tells_waiting_from_being_busy():
    waiting, busy, known = Effort(), Effort(), Effort(is_busy=True)
    with waiting, known:
        threading.Event().wait(0.05)
    with busy:
        sum(range(1_000_000))
    assert waiting.seconds >= 0.05
    assert waiting.busy < waiting.seconds / 2
    assert 0 < busy.busy <= busy.seconds
    assert known.busy == known.seconds


def test_what_is_stale_is_dropped(articles, alias):
    """The barrier tells it before the read itself, which then is not waited for."""
    plan = articles.order_by("pk").explain_plan(10, walk=True)
    ahead = Ahead(plan, next(plan.chunks()))
    articles.update(name="x")
    assert ahead.done()
    assert ahead.rows() is None


def test_the_next_query_is_on_its_way_before_this_page_is_used(articles, monkeypatch):
    """It is waited for: else the thread would first come to it when the loop is done with this page."""
    monkeypatch.setattr("parallel_orm.ahead.MOMENT", WAIT)
    begun = threading.Event()
    opened_by = Opened.__init__

    def tell_and_open(self, queryset, sending):
        begun.set()
        opened_by(self, queryset, sending)

    monkeypatch.setattr(Opened, "__init__", tell_and_open)
    plan = articles.order_by("pk").explain_plan(10, walk=True)
    ahead = Ahead(plan, next(plan.chunks()))
    assert begun.is_set()
    assert [article.rank for article in ahead.rows()] == list(range(10))


def test_it_is_told_before_a_query_is_sent(articles, alias):
    sent = []
    with CaptureQueriesContext(connections[alias]) as queries:
        opened = Opened(articles.order_by("pk"), lambda: sent.append(len(queries)))
    assert (sent, len(queries)) == ([0], 1)
    assert len(opened.rows()) == 50


@pytest.mark.parametrize("idle", [False, True])
def test_a_loop_that_waits_is_spared_the_tuples(postgres, monkeypatch, idle):
    monkeypatch.setattr("parallel_orm.connections.under_test", lambda: False)
    opened, _ = Opening(idle=idle)(Article.objects.using(postgres), Stopwatch())
    assert (opened._cursor is None) is idle
    assert opened.rows() == []


@pytest.mark.parametrize("connection", ["kept open", "closed meanwhile", "closed at once"])
def test_an_answer_waits_with_the_driver(articles, postgres, heard, monkeypatch, connection):
    """What ran the query has given its connection back; where that is closed, the rows are read again, here."""
    Article.objects.using(postgres).bulk_create(Article(name="x", rank=n) for n in range(500))
    if connection != "closed at once":  # as in every test
        monkeypatch.setattr("parallel_orm.connections.under_test", lambda: False)
    monkeypatch.setattr("parallel_orm.walk.is_idle", lambda reading, using: False)
    fetched = []
    fetch = Opened.fetch

    def fetch_and_tell(self):
        if self._cursor is not None:
            fetched.append(threading.get_ident())
        fetch(self)

    monkeypatch.setattr(Opened, "fetch", fetch_and_tell)
    try:
        ranks = []
        for number, chunk in enumerate(articles.using(postgres).filter(name="x").order_by("pk").chunks(100), 1):
            heard.wait_for(finished=min(number, 4))
            if connection == "closed meanwhile":
                lender.close_idle()
            ranks += [article.rank for article in chunk]
        assert ranks == list(range(500))
        assert heard.counts == {"started": 4, "finished": 4, "failed": 0}
        here = [thread == threading.get_ident() for thread in fetched]
        # psycopg 3 needs no connection to make tuples of an answer.
        again = 4 * (connections[postgres].Database.__name__ == "psycopg2")
        expected = {"kept open": [True] * 5, "closed at once": [True] + [False] * 4}
        assert here == expected.get(connection, [True] * (5 + again))
    finally:
        lender.close_idle()
