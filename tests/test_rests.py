"""What is left of a chunk whose time is over: done by whoever is idle, each row once, in order."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading

import pytest
from django.db import connections
from django.db.models import Count, F
from django.db.models.functions import Lower
from django.test import override_settings

from parallel_orm import errors
from parallel_orm.chunks import Chunk
from parallel_orm.executors.processes import end_pools
from parallel_orm.outcomes import Stopwatch
from parallel_orm.work import Apply
from tests import functions
from tests.testapp.models import Article, Author, ByText, ByUuid, Pizzeria, RankedArticle, Restaurant, Seat, Tag

WAIT = 60
pytestmark = [pytest.mark.pairs, pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")]


@pytest.fixture(params=["processes", "threads"])
def on(request, monkeypatch):
    """Two workers for whom an hour passes with every look at the clock, so that each row is a part of its own."""
    monkeypatch.setattr("parallel_orm.work.perf_counter", itertools.count(step=3600).__next__)
    end_pools()
    with override_settings(PARALLEL_ORM={"START_METHOD": "fork"}):  # a fork has the same clock
        yield {request.param: 2}
    end_pools()


def some(alias):
    Article.objects.using(alias).bulk_create(
        Article(name=f"name {n % 4}", rank=n, score=n % 3 or None) for n in range(12)
    )
    return Article.objects.using(alias)


@pytest.fixture
def articles(alias):
    return some(alias)


def in_parts(queryset, on, function=functions.itself, chunk_size=5, **knobs):
    """Map, and see that each row was done by itself."""
    results = queryset.parallel_map(function, chunk_size=chunk_size, **on, **knobs)
    assert results.report.chunks == results.report.rows == len(results)
    return results


@pytest.mark.parametrize(
    "order",
    [(), ("pk",), ("-pk",), ("-name", "rank", "pk"), ("score", "-pk"), (F("score").desc(nulls_last=True), "pk")],
    ids=str,
)
def test_each_row_once_and_in_order(articles, on, order):
    queryset = articles.order_by(*order)
    expected = list(queryset.order_by("pk") if not order else queryset)
    assert in_parts(queryset, on) == expected
    assert sorted(in_parts(queryset, on, functions.key, ordered=False)) == sorted(row.pk for row in expected)
    assert in_parts(queryset.reverse(), on) == (expected if not order else expected[::-1])


def test_without_a_chunk_size(articles, on):
    assert in_parts(articles, on, chunk_size=None) == list(articles.order_by("pk"))
    assert in_parts(articles.order_by("-rank"), on, chunk_size=None) == list(articles.order_by("-rank"))


def test_keys_and_rows_of_every_kind(articles, alias, on):
    ByUuid.objects.using(alias).bulk_create(ByUuid(number=n) for n in range(6))
    ByText.objects.using(alias).bulk_create(ByText(code=f"{n % 5} {n}", number=n) for n in range(6))
    Seat.objects.using(alias).bulk_create(Seat(row=row, number=n) for row in "CAB" for n in (3, 1))
    for n in range(6):
        Pizzeria.objects.using(alias).create(name=f"place {n % 3}", stars=n, ovens=n)
    for model in (ByUuid, ByText, Seat, Restaurant, Pizzeria):
        rows = model.objects.using(alias)
        for queryset in (rows.order_by("pk"), rows.order_by("-pk")):
            assert in_parts(queryset, on, chunk_size=4) == list(queryset)
    seats = Seat.objects.using(alias).order_by("number", "row")
    assert in_parts(seats, on, chunk_size=4) == list(seats)
    places = Pizzeria.objects.using(alias).all()
    assert in_parts(places, on, chunk_size=4) == list(places.order_by("name", "pk")), "by its parent's ordering"
    ranked = RankedArticle.objects.using(alias)
    assert in_parts(ranked, on) == list(ranked.all())


def test_rows_as_the_queryset_has_them(articles, alias, on):
    author = Author.objects.using(alias).create(name="Ada")
    articles.update(author=author)
    by_key = articles.order_by("pk")
    for queryset in (
        by_key.values("pk", "name"),
        by_key.values_list("pk", "score"),
        by_key.values_list("pk", flat=True),
        by_key.only("name"),
        by_key.annotate(n=Count("tags")),
        author.articles.order_by("pk"),
        by_key[2:11],
        articles.order_by("-rank")[2:11],
        articles.filter(rank__lt=4).union(articles.filter(rank__gt=8)).order_by("-rank"),
        articles.values_list("score", flat=True).distinct().order_by("-score"),
        articles.values("score").annotate(n=Count("pk")).order_by("score"),
    ):
        assert in_parts(queryset, on) == list(queryset)
    related = by_key.select_related("author").prefetch_related("tags")
    assert in_parts(related, on, lambda row: (row.author.name, len(row.tags.all()))) == [("Ada", 0)] * 12


def test_distinct_fields(postgres, on):
    articles = Article.objects.using(postgres)
    articles.bulk_create(Article(name=f"name {n % 7}", rank=n) for n in range(12))
    queryset = articles.order_by("name", "-rank").distinct("name")
    assert in_parts(queryset, on, chunk_size=5) == list(queryset)


def test_chunks_that_cannot_come_apart_are_done_to_their_end(articles, alias, on):
    """Rows that do not bring their key, and those that a join repeats."""
    tags = [Tag.objects.using(alias).create(name=f"t{n}") for n in range(3)]
    for article in articles.all():
        article.tags.add(*tags[: article.rank % 4])
    joined = articles.filter(tags__name__startswith="t").order_by("pk")
    assert len(joined) > joined.distinct().count()
    for queryset, chunks in (
        (joined, 1),
        (articles.order_by("pk").values_list("rank"), 2),
        (articles.order_by("-rank").values("name"), 2),
    ):
        results = queryset.parallel_map(functions.itself, chunk_size=6 if chunks == 2 else 1000, **on)
        assert results == list(queryset)
        assert results.report.chunks == chunks


def test_functions_that_change_their_row(default, on):
    """Where its part ends is known before the function has the row."""

    def empty(row):
        return row.pop("pk")

    articles = some(default)
    keys = list(articles.order_by("pk").values_list("pk", flat=True))
    for order in ("pk", "-rank"):
        expected = keys if order == "pk" else keys[::-1]
        assert in_parts(articles.order_by(order), on, spoil) == expected
        assert in_parts(articles.order_by(order).values("pk", "name"), on, empty) == expected


def spoil(row):
    pk, row.pk = row.pk, 10**6
    return pk


@pytest.mark.parametrize(("size", "parts"), [(12, 3), (5, 5), (3, 4)])
def test_when_the_time_is_over_one_row_more_is_done(default, monkeypatch, size, parts):
    """Of the third row nobody knows the key any more, so the part ends behind the fourth; or with its chunk."""
    monkeypatch.setattr("parallel_orm.work.perf_counter", itertools.count(step=700).__next__)
    articles = some(default).order_by("pk")
    with override_settings(PARALLEL_ORM={"TARGET_SECONDS": 1000}):
        results = articles.parallel_map(spoil, threads=1, chunk_size=size)
    assert results == [row.pk for row in articles]
    assert results.report.chunks == parts


@pytest.mark.parametrize(("reading", "done"), [(10, 4), (5000, 9)])
def test_a_chunk_is_worked_on_for_as_long_as_it_was_read(default, monkeypatch, reading, done):
    """What is left is read once more: where that takes long, it must be worth it."""
    monkeypatch.setattr("parallel_orm.work.perf_counter", itertools.count(step=700).__next__)
    monkeypatch.setattr("parallel_orm.outcomes.perf_counter", itertools.count(step=reading).__next__)
    rows = some(default).order_by("pk")
    keys = [row.pk for row in rows]
    chunk = Chunk(0, default, until=(keys[-1],), seconds=2000)
    part = Apply(spoil).part(rows, Stopwatch(), chunk, lambda row: (row.pk,))
    left = part.rest
    assert (part.value, part.rows) == (keys[:done], done)
    assert (left.after, left.until, left.rows) == ((keys[done - 1],), (keys[-1],), 12 - done)


def test_ctrl_c_behind_the_last_row_stays_ctrl_c(default, monkeypatch):
    looks = itertools.count(1)

    def now():
        if next(looks) == 12:
            raise KeyboardInterrupt
        return 0.0

    monkeypatch.setattr("parallel_orm.work.perf_counter", now)
    with pytest.raises(KeyboardInterrupt):
        Apply(functions.rank).part(some(default), Stopwatch(), Chunk(0, default), None)


@pytest.mark.parametrize("order", ["pk", "rank"])
def test_rows_that_come_and_go_under_way(default, monkeypatch, order):
    """What is left is read anew: rows that are gone do not come, others come once, and those behind the end never."""
    monkeypatch.setattr("parallel_orm.work.perf_counter", itertools.count(step=3600).__next__)
    articles = some(default)

    def work(row):
        if row.rank == 3:
            articles.filter(rank__in=range(5, 8)).delete()
            articles.bulk_create(Article(rank=1000 + n) for n in range(5))
        return row.rank

    rows = articles.order_by(order)
    assert (rows[:12] if order == "rank" else rows).parallel_map(work, threads=1) == [0, 1, 2, 3, 4, 8, 9, 10, 11]


def test_what_is_left_is_as_of_the_same_moment(postgres, on):
    articles = Article.objects.using(postgres)
    articles.bulk_create(Article(name="old", rank=n) for n in range(20))

    def rewrite(row):
        rows = Article.objects.using(row._state.db)
        rows.filter(rank__gt=15).delete()
        rows.exclude(name="new").update(name="new")
        return row.name

    for order in ("pk", "-rank"):
        assert in_parts(articles.order_by(order), on, rewrite, consistent=True) == ["old"] * 20
        articles.all().delete()
        articles.bulk_create(Article(name="old", rank=n) for n in range(20))


def test_what_is_left_of_blocks_is_as_of_the_same_moment(postgres, on, monkeypatch):
    """Known by its keys, as rows do not bring their place."""
    monkeypatch.setattr("parallel_orm.plan.IN_ORDER", 2)
    rows = ByUuid.objects.using(postgres)
    rows.bulk_create(ByUuid(number=n) for n in range(20))
    with connections[postgres].cursor() as cursor:
        cursor.execute("ANALYZE testapp_byuuid")

    def rewrite(row):
        ByUuid.objects.using(row._state.db).filter(number__gt=15).delete()
        ByUuid.objects.using(row._state.db).update(number=-1)
        return row.number

    assert rows.explain_plan(ordered=False, consistent=True).settled().cut == "blocks"
    assert sorted(in_parts(rows, on, rewrite, None, ordered=False, consistent=True)) == list(range(20))


@pytest.mark.parametrize("order", ["pk", "-rank"])
def test_an_idle_worker_does_half_of_what_the_straggler_has_left(default, on, order):
    """All rows are in one chunk, and each but the first meets one of the other half: alone nobody ends any of them."""
    articles = some(default)
    rows = articles.exclude(rank=0).order_by(order)
    first = rows[0].rank
    with multiprocessing.Manager() as manager:
        barrier = threading.Barrier(2) if "threads" in on else manager.Barrier(2)

        def meet(row):
            if row.rank != first:
                barrier.wait(WAIT)
            return row.rank, (os.getpid(), threading.get_ident())

        with override_settings(PARALLEL_ORM={"START_METHOD": "fork", "TARGET_SECONDS": 1000}):
            results = rows.parallel_map(meet, chunk_size=1000, **on)
    assert [rank for rank, _ in results] == [row.rank for row in rows]
    assert len({who for _, who in results}) == 2


def test_the_report_and_the_progress_count_the_parts(default, on):
    articles = some(default)
    told = []
    results = articles.parallel_map(functions.pid, progress=lambda *done: told.append(done), chunk_size=6, **on)
    report = results.report
    assert (report.rows, report.succeeded, report.chunks) == (12, 12, 12)
    assert sum(report.workers.values()) == sum(report.by_alias.values()) == 12
    assert told == [(done, 12) for done in range(13)]


def test_an_error_names_the_part_and_the_row(default, on):
    articles = some(default)
    ahead, third = articles.get(rank=2), articles.get(rank=3)
    with pytest.raises(ValueError, match="rank three") as raised:
        articles.filter(rank__lt=4).order_by("pk").parallel_map(functions.fail_on_three, chunk_size=50, **on)
    notes = "\n".join(raised.value.__notes__)
    assert f"primary key {third.pk}" in notes
    assert "row 0 of its chunk" in notes
    assert f"in chunk 0 (behind {ahead.pk} and up to {third.pk})" in notes


def test_a_killed_worker_names_the_part(default, on):
    articles = some(default)
    if "threads" in on:
        return
    third = articles.get(rank=3)
    with pytest.raises(errors.WorkerDied, match="chunk 0") as raised:
        articles.filter(rank__lt=4).order_by("pk").parallel_map(functions.die_on_three, chunk_size=50, **on)
    assert raised.value.chunk.until == (third.pk,)
    assert len(articles.parallel_map(functions.pid, **on)) == 12


def test_what_is_left_is_cut_by_queries_for_bounds_alone(articles, on, alias):
    """The caller asks for the last key, the end of each chunk, and where what is left is cut in two; never for rows."""
    from django.test.utils import CaptureQueriesContext

    with CaptureQueriesContext(connections[alias]) as queries:
        in_parts(articles.order_by("pk"), on, chunk_size=1000)
    assert 2 < len(queries) < 12
    assert not any("name" in query["sql"] for query in queries)


def test_without_a_target_chunks_are_done_to_their_end(default, on):
    articles = some(default)
    settings = {"START_METHOD": "fork", "TARGET_SECONDS": None}
    with override_settings(PARALLEL_ORM=settings):
        assert articles.parallel_map(functions.pid, chunk_size=6, **on).report.chunks == 2


def test_a_fast_function_is_not_cut_short(default):
    """The clock as it is: a chunk that takes less than its time stays whole."""
    articles = some(default)
    with override_settings(PARALLEL_ORM={"TARGET_SECONDS": 3600}):
        assert articles.parallel_map(functions.pid, threads=2, chunk_size=6).report.chunks == 2


def test_in_this_process_chunks_stay_as_they_are(memory, on):
    """Nobody is idle there, and a test that counts queries counts the same each time."""
    articles = Article.objects.using(memory)
    articles.bulk_create(Article(rank=n) for n in range(50))
    report = articles.parallel_map(functions.pid, chunk_size=25, **on).report
    assert (report.reason, report.chunks) == ("memory", 2)


@pytest.mark.parametrize("order", ["pk", "rank"])
def test_later_chunks_are_as_large_as_the_last_ones_say(default, monkeypatch, order):
    """One worker has four chunks out; what comes back of them decides about the next ones."""
    articles = Article.objects.using(default)
    articles.bulk_create(Article(rank=n) for n in range(50))
    monkeypatch.setattr("parallel_orm.plan.MAP_CHUNK_SIZE", 3)
    monkeypatch.setattr("parallel_orm.pace.steered", lambda *_: 19)
    report = articles.order_by(order).parallel_map(functions.pid, threads=1).report
    assert report.chunks == 6, "four of 3 rows, and two of 19"
    assert articles.order_by(order).parallel_map(functions.pid, threads=1, chunk_size=5).report.chunks == 10
    assert list(articles.order_by(Lower("name"), order).parallel_map(functions.rank, threads=1)) == list(range(50))
