"""consistent=True: all rows as of one moment, whatever others write meanwhile."""

from __future__ import annotations

import threading
import time

import pytest
from django.db import NotSupportedError, connections, transaction
from django.db.models import Count
from django.test import TestCase
from django.test.utils import CaptureQueriesContext

from parallel_orm import errors, walk
from tests.testapp.models import Article, Tag

WAIT = 60


@pytest.fixture
def articles(postgres):
    Article.objects.using(postgres).bulk_create(Article(name=f"name {n % 7}", rank=n, score=0) for n in range(50))
    return Article.objects.using(postgres)


def elsewhere(function):
    """Do something on another connection, and come back when it is committed."""

    def run():
        try:
            function()
        finally:
            connections.close_all()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(WAIT)
    assert not thread.is_alive()


def rewrite(articles):
    """All that a writer can do: change, delete, add behind and ahead."""
    articles.filter(rank__gte=25).delete()
    articles.update(score=99, name="rewritten")
    articles.bulk_create(Article(name="new", rank=1000 + n) for n in range(10))


@pytest.mark.parametrize(
    "of",
    [
        lambda a: a.order_by("pk"),
        lambda a: a.order_by("name", "pk"),
        lambda a: a.order_by("-name", "pk").values_list("name", "score"),
        lambda a: a.order_by("-rank")[5:45],
        lambda a: a.values("score").annotate(n=Count("pk")),
    ],
    ids=["pages", "other order", "values", "slice", "groups"],
)
def test_a_walk_sees_one_moment(articles, of):
    """Under a writer at work between its chunks."""
    queryset = of(articles)
    expected = [vars(row) if hasattr(row, "pk") else row for row in queryset]
    walked = []
    for row in queryset.chunked_iterator(4, consistent=True):
        if not walked:
            elsewhere(lambda: rewrite(articles))
        walked.append(vars(row) if hasattr(row, "pk") else row)
    for row in (*expected, *walked):
        isinstance(row, dict) and row.pop("_state", None)
    assert walked == expected
    assert articles.count() == 35, "and what comes after it sees now"


def test_where_the_rows_end_is_of_that_moment(articles, monkeypatch):
    """The end is asked for when there is a first chunk: by then others have deleted it."""
    read_chunk, ranks = walk.read_chunk, [*range(50)]

    def read_and_delete(plan, chunk):
        rows = read_chunk(plan, chunk)
        elsewhere(lambda: articles.filter(rank__gte=20).delete())
        return rows

    monkeypatch.setattr(walk, "read_chunk", read_and_delete)
    assert [article.rank for article in articles.order_by("pk").chunked_iterator(10, consistent=True)] == ranks


def test_a_walk_without_it_does_not(articles):
    """The test above could fail."""
    walked = []
    for row in articles.order_by("pk").chunked_iterator(4):
        if not walked:
            elsewhere(lambda: rewrite(articles))
        walked.append(row.score)
    assert 99 in walked


def test_prefetches_are_of_that_moment(articles, postgres):
    tag = Tag.objects.using(postgres).create(name="before")
    tag.articles.add(*articles.all())
    names = []
    for article in articles.order_by("pk").prefetch_related("tags").chunked_iterator(10, consistent=True):
        if not names:
            elsewhere(lambda: Tag.objects.using(postgres).update(name="after"))
        names += [tag.name for tag in article.tags.all()]
    assert names == ["before"] * 50


@pytest.mark.parametrize("on", [{"threads": 2}, {"processes": 2}], ids=str)
def test_workers_share_one_moment(articles, on):
    """A writer comes between the first chunk and the others: results are those of the call."""
    expected = [(row.pk, row.score) for row in articles.order_by("pk")]
    written = []

    def told(done, total):
        if done and not written:
            written.append(done)
            elsewhere(lambda: rewrite(articles))

    results = articles.order_by("pk").parallel_map(pk_and_score, chunk_size=1, progress=told, consistent=True, **on)
    assert written
    assert results == expected


def pk_and_score(row):
    return row.pk, row.score


def test_the_function_sees_now_and_may_write(articles):
    """Its own queries are outside of the snapshot's transactions."""

    def mark(row):
        assert not connections["postgres"].in_atomic_block
        type(row).objects.using("postgres").filter(pk=row.pk).update(score=row.score + 1)
        return row.score

    assert articles.parallel_map(mark, threads=2, chunk_size=10, consistent=True) == [0] * 50
    assert set(articles.values_list("score", flat=True)) == {1}


def test_it_holds_nothing_when_it_is_left_half_way(articles, postgres):
    held = (
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE datname = current_database() AND state = 'idle in transaction' AND pid <> pg_backend_pid()"
    )
    walk = articles.chunked_iterator(4, consistent=True)
    next(walk)
    with connections[postgres].cursor() as cursor:
        cursor.execute(held)
        assert cursor.fetchone() == (1,)
        walk.close()
        until, left = time.monotonic() + WAIT, 1
        while left and time.monotonic() < until:  # the server takes a moment to see that a client has gone
            cursor.execute(held)
            (left,) = cursor.fetchone()
        assert left == 0


def test_its_queries_are_seen(articles, postgres):
    with CaptureQueriesContext(connections[postgres]) as queries:
        assert len(list(articles.chunked_iterator(25, consistent=True))) == 50
    assert len(queries) == 3, "the last key, and two pages"


def test_where_it_is_refused(articles, postgres, default):
    for queryset in (Article.objects.using(default),):
        for call in (
            lambda q=queryset: q.chunked_iterator(consistent=True),
            lambda q=queryset: q.parallel_map(pk_and_score, threads=1, consistent=True),
        ):
            with pytest.raises(NotSupportedError, match="needs a snapshot"):
                call()
    with pytest.raises(errors.InvalidOption, match="consistent must be True or False"):
        articles.chunked_iterator(consistent="yes")
    with pytest.raises(errors.UnsupportedQuerySet, match="locks rows"):
        articles.select_for_update().chunked_iterator(consistent=True)
    with transaction.atomic(using=postgres):
        assert len(list(articles.chunked_iterator(consistent=True))) == 50
        articles.update(score=3)
        with pytest.raises(errors.TransactionRefused):
            articles.chunked_iterator(consistent=True)


def test_mariadb_has_none(mariadb):
    with pytest.raises(NotSupportedError, match="mysql"):
        Article.objects.using(mariadb).chunked_iterator(consistent=True)


class InATestCase(TestCase):
    databases = {"postgres"}

    def test_it_stays_in_the_tests_transaction(self):
        Article.objects.using("postgres").create(rank=1)
        articles = Article.objects.using("postgres")
        self.assertEqual([a.rank for a in articles.chunked_iterator(consistent=True)], [1])
        self.assertEqual(len(articles.parallel_map(pk_and_score, threads=1, consistent=True)), 1)
