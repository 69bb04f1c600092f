"""parallel_map's kin: the same rows to the same function, gathered otherwise."""

from __future__ import annotations

import asyncio
import functools as tools
import gc
import itertools
import operator
import sys
import threading
import weakref
from concurrent.futures import Future

import pytest
from asgiref.sync import sync_to_async
from django.db import connections, models, transaction
from django.db.models.functions import RowNumber
from django.test import TestCase, override_settings
from django.test.utils import CaptureQueriesContext

from parallel_orm import AsyncStream, Report, Stream, errors, gather, report_of
from parallel_orm.chunks import Chunk
from parallel_orm.dispatch import Supply, Window, dispatch
from parallel_orm.executors.processes import end_pools
from parallel_orm.outcomes import Outcome
from parallel_orm.pace import Pace
from tests import functions
from tests.testapp.models import Article, Tag

WAIT = 60
pytestmark = [pytest.mark.pairs, pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")]


@pytest.fixture(params=["processes", "threads", "inline", "parts"])
def on(request, monkeypatch):
    """Two workers, or the caller; or two for whom an hour passes with every row, so that each is a part of its own."""
    if request.param == "inline":
        with override_settings(PARALLEL_ORM={"TARGET_SECONDS": 0.001}), monkeypatch.context() as patch:
            patch.setattr("parallel_orm.guards.where_to_map", inline(patch))
            yield {}
    elif request.param == "parts":
        if "coroutine" in request.node.name and sys.modules.get("MySQLdb._mysql") is not None:
            pytest.skip("mysqlclient may end the session of another thread in a forked worker")
        monkeypatch.setattr("parallel_orm.work.perf_counter", itertools.count(step=3600).__next__)
        end_pools()
        with override_settings(PARALLEL_ORM={"START_METHOD": "fork"}):  # a fork has the same clock
            yield {"processes": 2}
        end_pools()
    else:
        yield {request.param: 2}


def inline(patch):
    from parallel_orm import guards

    where = guards.where_to_map
    return lambda *args: ("testcase", where(*args)[1])


@pytest.fixture
def articles(alias):
    Article.objects.using(alias).bulk_create(
        Article(name=f"name {n % 4}", rank=n, score=n % 3 or None) for n in range(40)
    )
    return Article.objects.using(alias).order_by("pk")


# --- parallel_imap --------------------------------------------------------------


@pytest.mark.parametrize("order", [("pk",), ("-pk",), ("-name", "rank", "pk")], ids=str)
def test_a_stream_is_the_map(articles, on, order):
    queryset = articles.order_by(*order)
    stream = queryset.parallel_imap(functions.rank, chunk_size=7, **on)
    assert isinstance(stream, Stream)
    assert stream.report.rows == 0
    expected = [row.rank for row in queryset]
    assert list(stream) == expected
    assert list(stream) == []
    assert (stream.report.rows, stream.report.succeeded) == (40, 40)
    assert sorted(queryset.parallel_imap(functions.rank, chunk_size=7, ordered=False, **on)) == sorted(expected)


def test_nothing_is_asked_before_the_first_result(articles, alias):
    with CaptureQueriesContext(connections[alias]) as queries:
        stream = articles.parallel_imap(functions.rank, threads=2, chunk_size=7)
        assert len(queries) == 0
    assert next(stream) == 0
    stream.close()
    with pytest.raises(StopIteration):
        next(stream)


def test_it_refuses_where_it_is_called(articles):
    with pytest.raises(errors.UnsupportedQuerySet, match=r"parallel_imap\(\)"):
        articles.annotate(n=models.Window(RowNumber())).parallel_imap(functions.rank)
    with pytest.raises(errors.InvalidOption, match="chunk_size"):
        articles.parallel_imap(functions.rank, chunk_size=0)


def test_it_refuses_what_was_written_since_the_call(articles, alias):
    """Bounds are looked up where the write is seen, and rows read where it is not."""
    stream = articles.parallel_imap(functions.rank, threads=2, chunk_size=7)
    with transaction.atomic(using=alias), pytest.raises(errors.TransactionRefused, match=r"parallel_imap\(\)"):
        articles.filter(rank__gt=20).delete()
        next(stream)


@pytest.mark.parametrize("ordered", [True, False])
def test_workers_wait_for_a_slow_caller(articles, ordered):
    """Four chunks a worker are done or under way, however long the caller takes."""
    done, begun = [], threading.Condition()

    def note(row):
        with begun:
            done.append(row.rank)
            begun.notify_all()
        return row.rank

    with articles.parallel_imap(note, threads=2, chunk_size=1, ordered=ordered) as stream:
        first = next(stream)
        with begun:
            assert begun.wait_for(lambda: len(done) == 8, WAIT), "two workers, four chunks each"
        second = next(stream)  # which passes the first one on
        with begun:
            assert begun.wait_for(lambda: len(done) == 9, WAIT)
        assert len({first, second}) == 2
    assert len(done) < 40
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("parallel_orm-map")]


def test_left_half_way_it_sees_what_is_under_way_to_its_end(articles):
    """And begins nothing else: by close(), by ``with``, and when nobody holds it."""
    for leave in ("close", "with", "drop"):
        done = []
        stream = articles.parallel_imap(lambda row, done=done: done.append(row.rank), threads=2, chunk_size=1)
        if leave == "with":
            with stream:
                next(stream)
        else:
            next(stream)
            if leave == "close":
                stream.close()
            else:
                del stream
                gc.collect()
        number = len(done)
        assert number < 40
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("parallel_orm-map")]
        assert len(done) == number


def test_an_error_comes_in_its_place(articles, on):
    """After the results before it, where these are in order."""
    stream, seen = articles.parallel_imap(functions.fail_on_three, chunk_size=1, **on), []
    with pytest.raises(ValueError, match="rank three") as caught:
        for rank in stream:
            seen.append(rank)  # noqa: PERF402
    assert seen == [0, 1, 2]
    assert any("in chunk 3" in note for note in caught.value.__notes__)


def test_results_are_let_go_when_they_are_passed_on(articles):
    class Result:
        pass

    stream = articles.parallel_imap(lambda row: Result(), threads=1, chunk_size=1)
    first = weakref.ref(next(stream))
    next(stream)
    gc.collect()
    assert first() is None
    stream.close()


def test_a_place_is_taken_again_while_others_wait_to_be_passed_on():
    """Chunks that wait for the caller keep no worker waiting: here the first one to come back is the last."""
    futures: list[Future[Outcome]] = []

    def send(chunk):
        futures.append(future := Future())
        if len(futures) == 3:
            for number in (2, 1, 0):
                futures[number].set_result(Outcome(Chunk(number, "default"), [number], rows=1))
        return future

    window = Window(3)
    supply = Supply((Chunk(n, "default") for n in range(9)), [Pace(1)], lambda chunk, rows: (chunk, None))
    outcomes = dispatch(supply, send, window)
    lists = gather.streamed(outcomes, window, supply, ordered=True)
    assert [next(lists), len(futures)] == [[0], 3]
    assert [next(lists), len(futures)] == [[1], 4]
    assert [next(lists), len(futures)] == [[2], 5]
    for future in futures[3:]:
        future.set_result(Outcome(Chunk(0, "default")))
    lists.close()
    outcomes.close()


def test_a_chunk_has_its_place_until_the_caller_comes_for_the_next():
    window = Window(4)
    window.take()
    window.take()
    outcomes = iter([Outcome(Chunk(n, "default"), [n]) for n in range(2)])
    lists = gather.streamed(outcomes, window, Supply(iter(()), [Pace(1)], None), ordered=True)
    assert (next(lists), window.out) == ([0], 2)
    assert (next(lists), window.out) == ([1], 1)


def test_a_part_waits_for_all_that_stands_before_it():
    """What is left of a chunk comes before the chunks behind it, however late it is done, and nothing gets stuck."""
    futures: dict[Chunk, Future[Outcome]] = {}

    def send(chunk):
        futures[chunk] = future = Future()
        answer(chunk)
        return future

    late = []

    def answer(chunk):
        if chunk.index == 0 and len(chunk.keys) > 1:  # comes apart
            rest = chunk.left([*chunk.keys[1:]], (chunk.keys[0],), lambda key: (key,))
            futures[chunk].set_result(Outcome(chunk, [chunk.keys[0]], rows=1, rest=rest))
        elif chunk.index == 0:
            late.append(chunk)
            futures[chunk].set_result(Outcome(chunk, list(chunk.keys), rows=1))
        else:
            futures[chunk].set_result(Outcome(chunk, list(chunk.keys), rows=len(chunk.keys)))

    def in_two(chunk, rows):
        return chunk.parted(rows) if len(chunk.keys) > rows else (chunk, None)

    planned = (Chunk(n, "default", keys=tuple(range(n * 4, n * 4 + 4))) for n in range(6))
    window = Window(2, workers=2)
    supply = Supply(planned, [Pace(4, 1.0)], in_two)
    lists = gather.streamed(dispatch(supply, send, window), window, supply, ordered=True)
    assert [*itertools.chain.from_iterable(lists)] == [*range(24)]
    assert late


# --- parallel_each --------------------------------------------------------------


def test_each_does_and_reports(articles, alias, on):
    """In a worker's own transaction, so the caller sees it."""
    report = articles.parallel_each(functions.raise_score, chunk_size=7, **on)
    assert isinstance(report, Report)
    assert (report.rows, report.succeeded, report.skipped) == (40, 40, 0)
    assert sorted(articles.values_list("score", flat=True)) == [1000 + n for n in range(40)]


def test_what_it_returns_is_dropped_at_once(articles):
    kept = []

    class Result:
        pass

    def make(row):
        result = Result()
        kept.append(weakref.ref(result))
        return result

    assert articles.parallel_each(make, threads=1).rows == 40
    assert all(ref() is None for ref in kept)


def test_what_cannot_travel_need_not(articles):
    assert articles.parallel_each(functions.lock, processes=1).rows == 40
    with pytest.raises(errors.NotPicklable):
        articles.parallel_map(functions.lock, processes=1)


def test_its_errors_are_those_of_a_map(articles, on):
    with pytest.raises(ValueError, match="rank three"):
        articles.parallel_each(functions.fail_on_three, chunk_size=7, **on)


# --- parallel_reduce ------------------------------------------------------------


def test_a_reduction_is_functools(articles, on):
    """Also of what is not commutative, in any order of the queryset."""
    for order in (("pk",), ("-pk",), ("-name", "rank", "pk")):
        queryset = articles.order_by(*order)
        expected = tools.reduce(operator.add, [f"{row.rank}," for row in queryset])
        assert queryset.parallel_reduce(functions.rank_and_comma, operator.add, chunk_size=7, **on) == expected
        begun = queryset.parallel_reduce(functions.rank_and_comma, operator.add, "begin:", chunk_size=7, **on)
        assert begun == f"begin:{expected}"
    assert articles.parallel_reduce(functions.rank, max, chunk_size=7, **on) == 39


def test_of_nothing(articles, on):
    nothing = articles.filter(rank=-1)
    assert nothing.parallel_reduce(functions.rank, operator.add, 5, **on) == 5
    assert nothing.parallel_reduce(functions.rank, operator.add, None, **on) is None
    with pytest.raises(TypeError, match="initial"):
        nothing.parallel_reduce(functions.rank, operator.add, **on)
    with pytest.raises(TypeError, match="initial"):
        articles.parallel_reduce(functions.nothing, operator.add, skip_none=True, **on)


def test_one_value_a_chunk_travels(articles):
    """What is combined is combined where it was made."""
    combined = []

    def combine(one, other):
        combined.append(threading.get_ident())
        return one + other

    assert articles.parallel_reduce(functions.rank, combine, threads=2, chunk_size=10) == sum(range(40))
    here = combined.count(threading.get_ident())
    assert here == 3, "four chunks"
    assert len(combined) == 39


def test_the_one_that_cannot_travel_is_named(articles):
    lock = threading.Lock()

    def combine(one, other):
        return one if lock else other

    with pytest.raises(errors.NotPicklable, match="combine"):
        articles.parallel_reduce(functions.rank, combine, processes=1)


def test_falsy_values_are_values(articles, on):
    assert articles.parallel_reduce(functions.zero, operator.add, chunk_size=7, **on) == 0
    assert articles.parallel_reduce(functions.nothing, functions.first, chunk_size=7, **on) is None
    assert articles.parallel_reduce(functions.zero, functions.first, None, chunk_size=7, **on) is None


# --- Batches, and results that are None -----------------------------------------


def test_a_batch_is_a_list_of_rows(articles, on):
    if on == {"processes": 2}:
        assert articles.parallel_map(functions.ranks, chunk_size=15, batched=True, **on) == [
            [*range(15)],
            [*range(15, 30)],
            [*range(30, 40)],
        ]
    results = articles.order_by("-rank").parallel_map(functions.ranks, chunk_size=15, batched=True, **on)
    assert results == [[*range(39, 24, -1)], [*range(24, 9, -1)], [*range(9, -1, -1)]]
    assert results.report.rows == results.report.succeeded == 40
    assert articles.parallel_reduce(functions.ranks, operator.add, chunk_size=15, batched=True, **on) == [*range(40)]
    assert [*articles.parallel_imap(functions.ranks, chunk_size=30, batched=True, **on)] == [
        [*range(30)],
        [*range(30, 40)],
    ]
    assert articles.parallel_each(functions.raise_scores, chunk_size=30, batched=True, **on).rows == 40
    assert sorted(articles.values_list("score", flat=True)) == [1000 + n for n in range(40)]
    assert articles.filter(rank=-1).parallel_map(functions.ranks, batched=True, **on) == []


def test_an_error_names_the_rows_of_its_batch(articles, on):
    keys = [row.pk for row in articles]

    def fail(rows):
        rows.clear()
        raise ValueError

    for size, expected in ((7, f"7 rows, primary keys {keys[0]} to {keys[6]}"), (1, f"1 rows, primary keys {keys[0]}")):
        with pytest.raises(ValueError) as raised:
            next(articles.parallel_imap(fail, chunk_size=size, batched=True, **on))
        assert f"parallel_orm: at its batch of {expected}" in raised.value.__notes__


def test_nones_are_kept_or_left_out(articles, on):
    scores = [n % 3 or None for n in range(40)]
    assert articles.parallel_map(functions.score, chunk_size=7, **on) == scores
    left = articles.parallel_map(functions.score, chunk_size=7, skip_none=True, **on)
    assert left == [score for score in scores if score is not None]
    assert (left.report.rows, left.report.succeeded, left.report.skipped) == (40, 40, 14)
    assert [*articles.parallel_imap(functions.score, chunk_size=7, skip_none=True, **on)] == left
    assert articles.parallel_reduce(functions.score, operator.add, chunk_size=7, skip_none=True, **on) == sum(left)
    batches = articles.parallel_map(functions.nothing, chunk_size=7, skip_none=True, batched=True, **on)
    assert (batches, batches.report.skipped) == ([], 6)


def test_bad_options(articles):
    for name in ("batched", "skip_none"):
        with pytest.raises(errors.InvalidOption, match=name):
            articles.parallel_map(functions.rank, **{name: 1})
    for verb in (articles.parallel_imap, articles.parallel_each):
        with pytest.raises(errors.InvalidOption, match="callable"):
            verb("rank")
    with pytest.raises(errors.InvalidOption, match="callable"):
        articles.parallel_reduce(functions.rank, None)
    raw = Article.objects.raw("SELECT * FROM testapp_article")
    for name in ("imap", "each", "reduce"):
        for verb in (f"parallel_{name}", f"aparallel_{name}"):
            with pytest.raises(errors.UnsupportedQuerySet, match="raw SQL"):
                getattr(raw, verb)(functions.rank)


# --- In coroutines --------------------------------------------------------------


def test_in_a_coroutine(articles, on):
    async def all_of_them():
        try:
            mapped = await articles.aparallel_map(functions.rank, chunk_size=7, **on)
            stream = articles.aparallel_imap(functions.rank, chunk_size=7, **on)
            assert isinstance(stream, AsyncStream)
            streamed = [rank async for rank in stream]
            assert stream.report.rows == 40
            report = await articles.aparallel_each(functions.rank, chunk_size=7, **on)
            reduced = await articles.aparallel_reduce(functions.rank, operator.add, chunk_size=7, **on)
            async with articles.aparallel_imap(functions.rank, chunk_size=1, **on) as left:
                async for _ in left:
                    break
            return mapped, streamed, report.rows, reduced
        finally:
            await sync_to_async(connections.close_all)()

    ranks = [*range(40)]
    assert asyncio.run(all_of_them()) == (ranks, ranks, 40, sum(ranks))


def test_what_ends_an_iteration_ends_no_coroutine(articles, on):
    """It is an error, as Python makes it one, and nobody waits for ever."""

    async def all_of_them():
        try:
            for call in (
                articles.aparallel_map(functions.stop, **on),
                articles.aparallel_each(functions.stop, **on),
                articles.aparallel_reduce(functions.stop, operator.add, **on),
                anext(articles.aparallel_imap(functions.stop, **on)),
            ):
                with pytest.raises(RuntimeError, match="raised StopIteration") as caught:
                    await asyncio.wait_for(call, WAIT)
                assert report_of(caught.value).errors[0].error.value == "rank"
        finally:
            await sync_to_async(connections.close_all)()

    asyncio.run(all_of_them())


def test_a_stream_in_a_coroutine_refuses_at_its_first_row(articles):
    async def refused():
        try:
            async for _ in articles.aparallel_imap(functions.rank, chunk_size=0):
                pass
        finally:
            await sync_to_async(connections.close_all)()

    with pytest.raises(errors.InvalidOption, match="chunk_size"):
        asyncio.run(refused())


class InATestCase(TestCase):
    databases = {"default"}

    def test_it_all_runs_on_the_tests_connection(self):
        Tag.objects.bulk_create(Tag(name=str(n)) for n in range(10))
        tags = Tag.objects.order_by("pk")
        stream = tags.parallel_imap(functions.name, chunk_size=3)
        assert [*stream] == [str(n) for n in range(10)]
        assert stream.report.reason == "testcase"
        assert tags.parallel_each(functions.rename, chunk_size=3).reason == "testcase"
        assert tags.parallel_reduce(functions.name, operator.add, chunk_size=3) == "x" * 10
