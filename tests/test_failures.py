"""What becomes of rows that fail: nothing is lost, nothing is silent."""

from __future__ import annotations

import gc
import logging
import pickle
import weakref
from functools import partial
from operator import add

import pytest
from django.db import IntegrityError, connections, transaction
from django.db.models import Count, F
from django.test import TestCase

from parallel_orm import Failure, errors, parallel_map, report_of
from parallel_orm.executors.processes import end_pools
from tests import functions
from tests.test_executors import foreign
from tests.testapp.models import Article, Tag

__all__ = ["foreign"]  # a fixture

pytestmark = pytest.mark.pairs

SEVENS = [n for n in range(50) if n % 7 == 3]


@pytest.fixture(scope="module", autouse=True)
def _pools_end():
    yield
    end_pools()


@pytest.fixture(params=["processes", "threads", "inline", "foreign threads", "foreign processes"])
def on(request, foreign):
    if request.param in foreign:
        return {"executor": foreign[request.param]}
    return {"inline": {"executor": "inline"}, "processes": {"processes": 2}, "threads": {"threads": 2}}[request.param]


@pytest.fixture
def articles(alias):
    Article.objects.using(alias).bulk_create(Article(name=f"name {n}", rank=n) for n in range(50))
    return Article.objects.using(alias)


def keys(articles, ranks=SEVENS):
    return list(articles.filter(rank__in=ranks).order_by("rank").values_list("pk", flat=True))


def test_collected_failures_stand_in_their_places(articles, on):
    results = articles.order_by("-rank").parallel_map(functions.fail_on_sevens, on_error="collect", chunk_size=8, **on)
    assert [None if isinstance(each, Failure) else each for each in results] == [
        None if n in SEVENS else n for n in reversed(range(50))
    ]
    failures = [each for each in results if isinstance(each, Failure)]
    assert [results.index(each) for each in failures] == [each.index for each in failures]
    assert [each.key for each in failures] == keys(articles)[::-1]
    for failure, rank in zip(failures, reversed(SEVENS), strict=True):
        assert isinstance(failure.error, ValueError)
        assert str(failure.error) == f"rank {rank}"
        assert f"primary key {failure.key}" in failure.error.__notes__[0]
        assert 'raise ValueError(f"rank {row.rank}")' in failure.traceback
        assert failure.value is None
        assert failure.chunk.alias == articles.db
    report = results.report
    assert sorted(report.errors, key=lambda failure: failure.index) == failures
    assert (report.rows, report.succeeded, report.failed) == (50, 50 - len(SEVENS), len(SEVENS))


def test_skipped_failures_are_left_out_and_reported(articles, on):
    results = articles.order_by("rank").parallel_map(functions.fail_on_sevens, on_error="skip", chunk_size=8, **on)
    assert results == [n for n in range(50) if n not in SEVENS]
    assert [(each.index, each.key) for each in sorted(results.report.errors, key=lambda each: each.index)] == list(
        zip(SEVENS, keys(articles), strict=True)
    ), "the index counts those that are skipped"
    assert results.report.failed == len(SEVENS)


@pytest.mark.parametrize("on_error", ["collect", "skip"])
def test_nones_are_left_out_beside_failures(articles, on, on_error):
    results = articles.order_by("rank").parallel_map(
        functions.none_or_fail, on_error=on_error, skip_none=True, chunk_size=8, **on
    )
    expected = [n if n % 7 != 3 else "failed" for n in range(50) if n % 2 or n % 7 == 3]
    failures = {each.index: each for each in results.report.errors}
    assert sorted(failures) == [place for place, each in enumerate(expected) if each == "failed"]
    if on_error == "collect":
        assert ["failed" if isinstance(each, Failure) else each for each in results] == expected
    else:
        assert results == [each for each in expected if each != "failed"]


def test_unordered_failures_have_no_index(articles, on):
    results = articles.parallel_map(functions.fail_on_sevens, on_error="collect", ordered=False, chunk_size=8, **on)
    failures = [each for each in results if isinstance(each, Failure)]
    assert sorted(each.key for each in failures) == keys(articles)
    assert {each.index for each in failures} == {None}


def test_a_stream_collects(articles, on):
    with articles.order_by("rank").parallel_imap(
        functions.fail_on_sevens, on_error="collect", chunk_size=8, **on
    ) as stream:
        found = list(stream)
    assert [each.index for each in found if isinstance(each, Failure)] == SEVENS
    assert len(found) == 50
    assert stream.report.failed == len(SEVENS)


def test_each_reports(articles, on):
    report = articles.parallel_each(functions.fail_on_sevens, on_error="skip", keys=True, chunk_size=8, **on)
    assert sorted(each.key for each in report.errors) == keys(articles)
    assert sorted(report.keys) == keys(articles, [n for n in range(50) if n not in SEVENS])
    assert {each.index for each in report.errors} == {None}


def test_a_batch_fails_as_a_whole(articles, on):
    results = articles.order_by("rank").parallel_map(
        functions.fail_on_a_seven, batched=True, on_error="collect", chunk_size=5, **on
    )
    bad = [n // 5 for n in SEVENS]
    assert [place for place, each in enumerate(results) if isinstance(each, Failure)] == bad
    assert [each for each in results if not isinstance(each, Failure)] == [
        sum(range(5 * n, 5 * n + 5)) for n in range(10) if n not in bad
    ]
    failures = sorted(results.report.errors, key=lambda each: each.index)
    assert [list(each.key) for each in failures] == [keys(articles, range(5 * n, 5 * n + 5)) for n in bad]
    assert (results.report.rows, results.report.failed) == (50, len(bad))
    assert results.report.succeeded == 50 - 5 * len(bad)


def test_a_reduction_skips_and_says_so(articles, on, caplog):
    with caplog.at_level(logging.WARNING, "parallel_orm"):
        total = articles.parallel_reduce(functions.fail_on_sevens, add, on_error="skip", chunk_size=8, **on)
    assert total == sum(n for n in range(50) if n not in SEVENS)
    assert f"left out {len(SEVENS)} rows" in caplog.text
    with pytest.raises(errors.InvalidOption, match="no place for a Failure"):
        articles.parallel_reduce(functions.rank, add, on_error="collect", **on)


def test_raised_errors_have_the_report_so_far(articles, on):
    with pytest.raises(ValueError, match="rank 3") as caught:
        articles.order_by("rank").filter(rank__lt=8).parallel_map(functions.fail_on_sevens, chunk_size=2, **on)
    report = report_of(caught.value)
    assert report is not None
    (failure,) = report.errors
    assert failure.error is caught.value
    assert [failure.key] == keys(articles, [3])
    assert (report.failed, failure.index) == (1, None)
    with pytest.raises(RuntimeError) as wrapped:
        raise RuntimeError("of the user's") from caught.value
    assert report_of(wrapped.value) is report
    assert report_of(ValueError()) is None
    again = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(again, ValueError)
    assert report_of(again) is None, "it stays where it is"


def test_reports_and_failures_travel(articles):
    results = articles.parallel_map(functions.fail_on_sevens, 2, on_error="collect")
    again = pickle.loads(pickle.dumps(results))
    assert [each.key for each in again.report.errors] == [each.key for each in results.report.errors]
    assert [type(each.error) for each in again.report.errors] == [ValueError] * len(SEVENS)
    with pytest.raises(errors.ParallelORMError, match="was pickled"):
        again.report.retry()
    strange = articles.parallel_map(functions.raise_strange, 2, on_error="skip")
    assert type(pickle.loads(pickle.dumps(strange.report)).errors[0].error) is errors.RemoteError


def test_too_many_failures_end_it(articles, on):
    with pytest.raises(errors.TooManyFailures, match="max_failures=2") as caught:
        articles.parallel_map(functions.fail_on_sevens, on_error="collect", max_failures=2, chunk_size=5, **on)
    assert isinstance(caught.value.__cause__, ValueError)
    report = report_of(caught.value)
    assert report is not None
    assert report.failed == len(report.errors) == 3
    assert articles.parallel_map(functions.fail_on_sevens, on_error="skip", max_failures=len(SEVENS), **on)


def test_rows_without_keys_fail_too(articles, on):
    grouped = articles.values("name").annotate(n=Count("pk")).order_by("name")
    results = grouped.parallel_map(lambda row: 1 / (row["n"] - 1), on_error="collect", **on)
    assert {type(each.error) for each in results} == {ZeroDivisionError}
    assert {each.key for each in results} == {None}
    assert len(results) == 50
    with pytest.raises(errors.ParallelORMError, match="do not tell their primary keys"):
        results.report.retry()


@pytest.mark.parametrize(
    "rows", [lambda a: a.values("rank", "id"), lambda a: a.values_list("rank", "pk"), lambda a: a.values("pk")]
)
def test_values_tell_their_keys(articles, rows):
    def fail(row):
        raise ValueError(row)

    results = rows(articles.order_by("rank")).parallel_map(fail, 2, on_error="collect")
    assert [each.key for each in results] == keys(articles, range(50))
    flat = articles.order_by("rank").values_list("pk", flat=True).parallel_map(fail, 2, on_error="collect")
    assert [each.key for each in flat] == keys(articles, range(50))


def test_what_failed_keeps_no_rows(articles):
    """The traceback of an exception knows the frames that it came through."""
    for on in ({"threads": 2}, {"executor": "inline"}):
        rows = []

        def fail_once(row, rows=rows):
            rows.append(weakref.ref(row))
            if row.rank == 30:
                raise ValueError

        report = articles.order_by("rank").parallel_each(fail_once, on_error="skip", **on)
        gc.collect()
        assert report.failed == 1
        assert [row() for row in rows if row() is not None] == []


def test_a_failure_keeps_its_slots(articles, on):
    (failure,) = articles.filter(rank=3).parallel_map(functions.raise_slotted, on_error="collect", **on)
    assert isinstance(failure.error, functions.Slotted)
    assert failure.error.code == 404
    assert pickle.loads(pickle.dumps(failure)).error.code == 404


def test_a_failure_whose_text_cannot_be_made_has_one(articles, on):
    (failure,) = articles.filter(rank=3).parallel_map(functions.raise_textless, on_error="collect", **on)
    assert "Textless" in str(failure)


# --- Tried again ----------------------------------------------------------------------


@pytest.fixture
def _quick(monkeypatch):
    """Pauses that are as good as none, here and in the workers that are started from here."""
    monkeypatch.setattr("parallel_orm.retries.BACKOFF", 0.001)


@pytest.mark.usefixtures("_quick")
def test_a_row_is_tried_again_as_it_was_read(articles, on, tmp_path):
    function = functions.FailsAtFirst(str(tmp_path), 2)
    results = articles.order_by("rank").parallel_map(function, retries=2, chunk_size=10, **on)
    assert results == [f"name {n}" for n in range(50)]
    assert results.report.retries == 2 * len(SEVENS)
    assert results.report.failed == 0
    with pytest.raises(ValueError, match="not yet") as caught:
        articles.parallel_map(functions.FailsAtFirst(str(tmp_path), 9), retries=1, chunk_size=10, **on)
    assert any("after 1 retries" in line for line in caught.value.__notes__)
    results = articles.parallel_map(
        functions.FailsAtFirst(str(tmp_path), 99), retries=1, on_error="skip", chunk_size=10, **on
    )
    assert results.report.failed == len(SEVENS)
    assert len(results) == 50 - len(SEVENS)


@pytest.mark.usefixtures("_quick")
def test_in_a_reduction_a_row_that_is_tried_again_has_its_place(articles, on, tmp_path):
    """Text is not commutative."""
    function = functions.FailsAtFirst(str(tmp_path), 1)
    found = articles.order_by("rank").parallel_reduce(function, add, "", retries=1, chunk_size=10, **on)
    assert found == "".join(f"name {n}" for n in range(50))


@pytest.mark.usefixtures("_quick")
def test_a_batch_is_tried_again(articles, on, tmp_path):
    one = functions.FailsAtFirst(str(tmp_path), 1)
    results = articles.order_by("rank").parallel_map(
        lambda rows: [one(row) for row in rows], batched=True, retries=3, chunk_size=10, **on
    )
    assert [name for names in results for name in names] == [f"name {n}" for n in range(50)]


@pytest.fixture
def tagged(articles):
    """One row three times, one once: by a join, each with its own tag."""
    first, second = articles.order_by("pk")[:2]
    tags = [Tag.objects.using(articles.db).create(name=f"tag {n}") for n in range(3)]
    first.tags.add(*tags)
    second.tags.add(tags[2])
    return articles.filter(tags__isnull=False).annotate(tag=F("tags__name")).order_by("pk")


@pytest.mark.usefixtures("_quick")
def test_a_row_that_a_join_repeats_is_tried_again_as_itself(tagged, on, tmp_path):
    """Its key brings its other appearances too."""
    results = tagged.parallel_map(partial(functions.tag_that_fails_at_first, folder=str(tmp_path)), retries=1, **on)
    assert sorted(results) == ["tag 0", "tag 1", "tag 2", "tag 2"]


@pytest.mark.usefixtures("_quick")
def test_results_that_cannot_travel_end_the_call_beside_rows_tried_again(articles, tmp_path):
    function = partial(functions.fails_at_first_and_cannot_travel, folder=str(tmp_path))
    with pytest.raises(errors.NotPicklable):
        articles.order_by("rank").parallel_map(function, 2, retries=1)


def test_a_connection_that_was_lost_comes_back_with_its_session(postgres):
    """Else the rows behind it are somebody else's, or nobody's."""
    Article.objects.using(postgres).bulk_create(Article(name=str(n), rank=n) for n in range(8))
    with connections[postgres].cursor() as cursor:
        cursor.execute("SELECT set_config('app.tenant', 'mine', false)")
    articles = Article.objects.using(postgres).order_by("rank")
    for on in ({"processes": 1}, {"threads": 1}):
        results = articles.parallel_map(functions.tenant_and_two_losses, on_error="collect", **on)
        assert ["failed" if isinstance(each, Failure) else each for each in results] == [
            *["mine"] * 3,
            "failed",
            "mine",
            "closed",
            *["mine"] * 2,
        ]


def test_a_chunk_is_sent_again_when_its_worker_dies(articles, tmp_path):
    function = functions.FailsAtFirst(str(tmp_path), 1, kill=True)
    results = articles.order_by("rank").parallel_map(function, 2, retries=len(SEVENS), chunk_size=25)
    assert results == [f"name {n}" for n in range(50)]
    assert results.report.retries == len(SEVENS), "one for each death"


@pytest.mark.parametrize("ordered", [True, False])
def test_a_stream_waits_for_what_is_sent_again(articles, tmp_path, ordered):
    """Its place in the window is kept, however many chunks behind it wait to be passed on."""
    function = functions.FailsAtFirst(str(tmp_path), 1, kill=True)
    found = list(articles.order_by("rank").parallel_imap(function, 2, retries=1, chunk_size=1, ordered=ordered))
    assert (found if ordered else sorted(found, key=lambda name: int(name[5:]))) == [f"name {n}" for n in range(50)]


def test_the_rows_of_a_chunk_that_was_lost_fail_one_by_one(articles):
    results = articles.order_by("-rank").parallel_map(functions.die_on_three, 2, on_error="collect", chunk_size=5)
    assert [each if isinstance(each, int) else None for each in results] == [
        n if n > 4 else None for n in reversed(range(50))
    ]
    failures = results[-5:]
    assert {type(each.error) for each in failures} == {errors.WorkerDied}
    assert [each.index for each in failures] == [45, 46, 47, 48, 49]
    assert [each.key for each in failures] == keys(articles, range(5))[::-1]
    assert len(articles.parallel_map(functions.die_on_sevens, 2, on_error="skip", chunk_size=1)) == 50 - len(SEVENS)


def test_results_that_cannot_travel_fail_alone(articles):
    results = articles.order_by("rank").parallel_map(functions.unpicklable_sevens, 2, on_error="collect", chunk_size=10)
    failures = [each for each in results if isinstance(each, Failure)]
    assert [each.index for each in failures] == SEVENS
    assert [each.key for each in failures] == keys(articles)
    assert {type(each.error) for each in failures} == {errors.NotPicklable}
    assert [each for each in results if isinstance(each, int)] == [n for n in range(50) if n not in SEVENS]


def test_what_is_no_row_of_the_call_is_raised_all_the_same(articles):
    with pytest.raises(SystemExit):
        articles.parallel_map(lambda row: exit(3), 2, on_error="collect")
    with pytest.raises(LookupError, match="no"):
        articles.parallel_map(functions.rank, 2, on_error="collect", init_hook=functions.refuse)


# --- What failed, once more -----------------------------------------------------------


def test_retry_runs_what_failed_and_nothing_else(articles, on, tmp_path):
    function = functions.FailsAtFirst(str(tmp_path), 1)
    results = articles.order_by("-rank").parallel_map(function, on_error="skip", chunk_size=10, **on)
    again = results.report.retry()
    assert again == [f"name {n}" for n in reversed(SEVENS)], "in the order of the queryset"
    assert (again.report.rows, again.report.failed) == (len(SEVENS), 0)
    assert results.report.failed == len(SEVENS), "as it was"
    report = articles.parallel_each(functions.fail_on_sevens, on_error="skip", **on)
    again = report.retry()  # which raises nothing, as the call did not
    assert (again.rows, again.failed) == (len(SEVENS), len(SEVENS))
    assert again.retry().failed == len(SEVENS)


def test_retry_of_batches(articles, on):
    results = articles.parallel_map(functions.fail_on_a_seven, batched=True, on_error="collect", chunk_size=5, **on)
    again = results.report.retry()
    assert [list(each.key) for each in again] == [list(each.key) for each in results if isinstance(each, Failure)]


def test_retry_of_rows_that_a_join_repeats(tagged, on, tmp_path):
    function = partial(functions.tag_that_fails_at_first, folder=str(tmp_path))
    results = tagged.parallel_map(function, on_error="skip", chunk_size=2, **on)
    assert results == []
    assert sorted(results.report.retry()) == ["tag 0", "tag 1", "tag 2", "tag 2"]
    next(tmp_path.glob("* tag 1")).unlink()
    some = tagged.parallel_map(function, on_error="skip", **on)
    assert sorted(some) == ["tag 0", "tag 2", "tag 2"]
    with pytest.raises(errors.ParallelORMError, match="3 times, of which 1 failed"):
        some.report.retry()


def test_retry_of_what_was_raised(articles, on, tmp_path):
    with pytest.raises(ValueError, match="not yet") as caught:
        articles.order_by("rank").parallel_map(functions.FailsAtFirst(str(tmp_path), 1), **on)
    assert report_of(caught.value).retry() == ["name 3"]


def test_retry_of_a_chunk_that_was_lost(articles, tmp_path):
    with pytest.raises(errors.WorkerDied) as caught:
        articles.order_by("rank").filter(rank__lt=7).parallel_map(
            functions.FailsAtFirst(str(tmp_path), 1, kill=True), 2, chunk_size=5
        )
    assert report_of(caught.value).retry() == [f"name {n}" for n in range(5)]


@pytest.mark.parametrize("leave", ["atomic", "autocommit", "begin"])
@pytest.mark.parametrize("on", [{"processes": 2}, {"threads": 2}], ids=["processes", "threads"])
def test_a_transaction_that_is_left_open_is_no_success(articles, on, leave):
    """What was written in it is rolled back when the connection is given back."""
    if leave == "begin" and connections[articles.db].vendor == "mysql":
        pytest.skip("its drivers do not tell")

    def write(row):
        connection = connections[row._state.db]
        if leave == "atomic":
            transaction.atomic(using=row._state.db).__enter__()
        elif leave == "autocommit":
            connection.set_autocommit(False)
        else:
            connection.cursor().execute("BEGIN")
        type(row).objects.using(row._state.db).filter(pk=row.pk).update(score=1)

    for knobs in ({}, {"on_error": "collect"}):
        with pytest.raises(errors.TransactionRefused, match="has left a transaction open") as caught:
            articles.filter(rank=3).parallel_each(write, **on) if not knobs else articles.filter(rank=3).parallel_map(
                write, **on, **knobs
            )
        assert any("chunk 0" in line for line in caught.value.__notes__)
    assert articles.get(rank=3).score is None
    assert len(articles.parallel_map(functions.rank, **on)) == 50


def test_retry_of_a_chunk_of_a_later_queryset(articles, tmp_path):
    function = functions.FailsAtFirst(str(tmp_path), 1, kill=True)
    querysets = [articles.filter(rank__in=[1, 2]), articles.filter(rank__in=[3, 4]).order_by("-rank")]
    with pytest.raises(errors.WorkerDied) as caught:
        parallel_map(querysets, function, 2)
    assert report_of(caught.value).retry() == ["name 4", "name 3"]


# --- Its time ---------------------------------------------------------------------------


@pytest.mark.pairs("function")
@pytest.mark.parametrize(
    "function",
    [
        functions.hang_on_three,
        functions.busy_on_three,
        pytest.param(functions.slow_query_on_three, marks=pytest.mark.everywhere),
    ],
)
def test_a_chunk_that_takes_too_long_is_ended(articles, function):
    with pytest.raises(errors.ChunkTimedOut, match="timeout of 0.5 seconds") as caught:
        articles.order_by("rank").parallel_map(function, 2, chunk_size=10, timeout=0.5)
    assert caught.value.chunk.index == 0
    assert isinstance(caught.value, TimeoutError)
    results = articles.order_by("rank").parallel_map(function, 2, chunk_size=10, timeout=0.5, on_error="collect")
    assert [each.index for each in results.report.errors] == list(range(10))
    assert results[10:] == list(range(10, 50))


def test_what_cannot_be_ended_is_refused(articles, foreign):
    for on in ({"threads": 2}, {"executor": foreign["foreign threads"]}, {"executor": foreign["foreign processes"]}):
        with pytest.raises(errors.InvalidOption, match="cannot be ended from outside"):
            articles.parallel_map(functions.rank, timeout=1, **on)


class InATestCase(TestCase):
    """Everything happens in this process, and means the same."""

    def test_failures(self):
        Article.objects.bulk_create(Article(name=f"name {n}", rank=n) for n in range(50))
        articles = Article.objects.order_by("rank")
        results = articles.parallel_map(functions.fail_on_sevens, on_error="collect", timeout=60)
        assert [each.index for each in results if isinstance(each, Failure)] == SEVENS
        results = articles.parallel_map(functions.unpicklable_sevens, on_error="skip")
        assert results == [n for n in range(50) if n not in SEVENS]
        assert results.report.reason == "testcase"


class InATestCaseOnPostgreSQL(TestCase):
    """Where an error of the database is the end of a transaction, which a worker has not."""

    databases = ("postgres",)

    def test_failures_of_the_database(self):
        Article.objects.using("postgres").bulk_create(Article(name=f"name {n}", rank=n) for n in range(9))
        articles = Article.objects.using("postgres").order_by("rank")
        for knobs in ({"on_error": "collect"}, {"on_error": "collect", "retries": 1}):
            results = articles.parallel_map(functions.insert_again_at_three, 2, **knobs)
            assert ["failed" if isinstance(each, Failure) else each for each in results] == [
                0,
                1,
                2,
                "failed",
                *range(4, 9),
            ]
            assert isinstance(results[3].error, IntegrityError)
        report = articles.parallel_each(functions.rename_and_fail, 2, on_error="skip")
        assert report.failed == 9
        assert articles.filter(name="x").count() == 9, "what was written is there, as in a worker's connection"


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"on_error": "ignore"}, "on_error must be"),
        ({"on_error": None}, "on_error must be"),
        ({"retries": -1}, "retries must be"),
        ({"retries": None}, "retries must be"),
        ({"retries": True}, "retries must be"),
        ({"retries": 1.5}, "retries must be"),
        ({"max_failures": -1, "on_error": "skip"}, "max_failures must be"),
        ({"max_failures": 3}, "the first one ends the call"),
        ({"timeout": 0}, "timeout must be"),
        ({"timeout": -1}, "timeout must be"),
        ({"timeout": True}, "timeout must be"),
        ({"timeout": float("nan")}, "timeout must be"),
        ({"timeout": float("inf")}, "timeout must be"),
        ({"timeout": "1"}, "timeout must be"),
        ({"init_hook": 3}, "init_hook must be"),
        ({"end_hook": "end"}, "end_hook must be"),
    ],
    ids=str,
)
def test_bad_knobs(articles, knobs, message):
    with pytest.raises(errors.InvalidOption, match=message):
        articles.parallel_map(functions.rank, **knobs)
    with pytest.raises(TypeError, match=r"parallel_each\(\) got an unexpected keyword argument 'ordered'"):
        articles.parallel_each(functions.rank, ordered=True)
