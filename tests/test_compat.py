"""The names of our predecessors: what they answered, where they could; an answer, where they could not."""

# ruff: noqa: F811 - fixtures are imported

from __future__ import annotations

import inspect
import multiprocessing
import os
import threading
from collections import Counter

import pytest
from django.db import connections
from django.db.models import Count, F, QuerySet
from django.test import TestCase, override_settings
from django.test.utils import CaptureQueriesContext

from parallel_orm import Pending, Worker, errors
from parallel_orm.compat import (
    AsyncQuerySet,
    Process,
    parallelized_multiple_querysets,
    parallelized_queryset,
    queryset_iterator,
)
from tests.asynchronous import run as run_async
from tests.test_background import WAIT, landed, met  # noqa: F401
from tests.testapp.models import (
    Article,
    AsyncArticle,
    Author,
    ByText,
    ByUuid,
    PlainArticle,
    RankedArticle,
    Seat,
    Tag,
)


@pytest.fixture
def articles(alias):
    """Thirty articles with gaps in their keys, by Django's own manager."""
    author = Author.objects.using(alias).create(name="Ada")
    tags = [Tag.objects.using(alias).create(name=f"t{n}") for n in range(3)]
    articles = Article.objects.using(alias).bulk_create(
        Article(
            pk=3 * n + (1000 if n > 20 else 1),
            name=f"name {n % 7}",
            rank=n % 4,
            score=n % 5 or None,
            author=author if n % 3 else None,
        )
        for n in range(30)
    )
    tagged = Article.tags.through
    tagged.objects.using(alias).bulk_create(
        tagged(article=article, tag=tag) for article in articles for tag in tags[: article.rank]
    )
    return PlainArticle.objects.using(alias)


# --- The "memory efficient queryset iterator" ---------------------------------------------


def walked_by_the_snippet(queryset, chunksize):
    """What the snippet gives, where it gives anything: pages behind key 0, up to the last key of its beginning."""
    by_key = queryset.order_by("pk")
    last, key, walked = by_key.last().pk, 0, []
    while key < last:
        page = list(by_key.filter(pk__gt=key)[:chunksize])
        walked += page
        key = page[-1].pk
    return walked


WALKS = {
    "all": lambda rows: rows.all(),
    "filtered": lambda rows: rows.filter(rank=2),
    "over a relation": lambda rows: rows.filter(author__name="Ada"),
    "distinct": lambda rows: rows.filter(tags__name__startswith="t").distinct(),
    "one": lambda rows: rows.filter(pk=4),
    "ordered": lambda rows: rows.order_by("-rank", "name"),
    "at random": lambda rows: rows.order_by("?"),
    "ordered by an expression": lambda rows: rows.order_by(F("score").desc(nulls_first=True)),
    "extra order": lambda rows: rows.extra(order_by=["-rank"]),
    "order of the model": lambda rows: RankedArticle._base_manager.using(rows.db).all(),
    "select_related": lambda rows: rows.select_related("author"),
    "annotated": lambda rows: rows.annotate(n=Count("tags")).filter(n__gte=1),
    "only": lambda rows: rows.only("name"),
}


@pytest.mark.parametrize("walk", WALKS)
def test_a_walk_is_that_of_the_snippet(articles, walk):
    """By ascending primary key, whatever the order was."""
    queryset = WALKS[walk](articles)
    for chunksize in (1, 7, 30, 1000):
        walked, expected = list(queryset_iterator(queryset, chunksize)), walked_by_the_snippet(queryset, chunksize)
        assert walked == expected
        assert [type(row) for row in walked] == [type(row) for row in expected]
        assert [row.__dict__.keys() for row in walked] == [row.__dict__.keys() for row in expected]
        assert {row._state.db for row in walked} == {articles.db}


def test_a_walk_without_a_size_is_of_thousands(default):
    """The chunks of the snippet: 1,000 rows."""
    Article.objects.using(default).bulk_create(Article(name=str(n)) for n in range(2_001))
    with CaptureQueriesContext(connections[default]) as queries:
        assert len(list(queryset_iterator(PlainArticle.objects.using(default)))) == 2_001
    assert sum("LIMIT 1000" in query["sql"] for query in queries) == 3


def test_a_walk_asks_nothing_before_its_first_row(articles):
    with CaptureQueriesContext(connections[articles.db]) as queries:
        walk = queryset_iterator(articles.all(), chunksize=10)
        assert not queries
        next(walk)
        assert len(queries) == 2, "a chunk, and where the rows end"
        list(walk)
        assert len(queries) <= 2 + 3


def test_a_walk_of_nothing(articles):
    """The snippet raised IndexError."""
    assert list(queryset_iterator(articles.filter(rank=99))) == []
    assert list(queryset_iterator(articles.none())) == []


@pytest.mark.parametrize("chunksize", [1, 2, 7])
def test_a_walk_by_keys_below_one(articles, chunksize):
    """The snippet began behind 0, and saw none of them."""
    for key in (-1, -7, -2):
        Article.objects.using(articles.db).create(pk=key, name="below")
    assert [row.pk for row in queryset_iterator(articles, chunksize)] == sorted(row.pk for row in articles.all())


@pytest.mark.parametrize("chunksize", [1, 3, 100])
def test_a_walk_by_keys_that_are_no_numbers(alias, chunksize):
    """The snippet compared them with 0."""
    ByUuid.objects.using(alias).bulk_create(ByUuid(number=n) for n in range(8))
    ByText.objects.using(alias).bulk_create(ByText(code=code) for code in ("b", "a", "é", "Z", "10", "9"))
    Seat.objects.using(alias).bulk_create(Seat(row=row, number=n) for row in "ba" for n in (2, 1, 10))
    for model in (ByUuid, ByText, Seat):
        walked = list(queryset_iterator(model.objects.using(alias), chunksize))
        assert walked == list(model.objects.using(alias).order_by("pk"))
        assert walked


def test_a_walk_ends_where_rows_vanish(articles):
    """The snippet asked for ever for a last row that was gone."""
    walk = queryset_iterator(articles, chunksize=5)
    walked = [next(walk).pk for _ in range(5)]
    articles.filter(pk__gt=walked[-1]).delete()
    assert [row.pk for row in walk] == []


def test_a_walk_ends_where_the_loop_adds_rows(articles):
    walked = []
    for row in queryset_iterator(articles, chunksize=4):
        walked.append(row.pk)
        assert len(walked) <= 30
        articles.create(pk=5_000 + len(walked), name="added")
    assert len(walked) == 30


def test_a_walk_of_what_stands_the_other_way_round(articles):
    """Ascending all the same: of a reversed queryset the snippet gave one page, backwards."""
    for queryset in (articles.reverse(), articles.order_by("-rank").reverse()):
        assert [row.pk for row in queryset_iterator(queryset, 7)] == sorted(row.pk for row in articles.all())


def test_a_walk_of_rows_that_are_no_instances(articles):
    """The snippet asked them for their key."""
    assert list(queryset_iterator(articles.values("name"), 7)) == list(articles.order_by("pk").values("name"))
    keys = list(articles.order_by("pk").values_list("pk", flat=True))
    assert list(queryset_iterator(articles.values_list("pk", flat=True), 7)) == keys


def test_a_slice_is_refused_by_name(articles):
    with pytest.raises(errors.UnsupportedQuerySet, match=r"queryset_iterator\(\).*slice.*chunked_iterator\(\)"):
        queryset_iterator(articles.order_by("name")[:5])


@pytest.mark.parametrize("chunksize", [0, -1, 2.5, "many", True])
def test_a_size_that_is_none(chunksize):
    """In the call, not at the first row; the snippet asked for 0 rows for ever."""
    with pytest.raises(errors.InvalidOption, match="must be a whole number of at least 1"):
        queryset_iterator(PlainArticle.objects.all(), chunksize)


# --- django-parallelized_querysets --------------------------------------------------------


def key(process, row):
    return row.pk


def score(process, row):
    return row.score


def doubled(process, row):
    return {"key": row.pk, "twice": 2 * row.rank}


def looped(querysets, function):
    """What the predecessor gives, where it gives anything, without its hooks: a loop, in any order."""
    results = (function(None, row) for queryset in querysets for row in queryset)
    return Counter(repr(result) for result in results if result is not None)


def counted(results):
    return Counter(map(repr, results))


MAPS = {
    **WALKS,
    "nothing": lambda rows: rows.filter(rank=99),
    "none": lambda rows: rows.none(),
    "repeated": lambda rows: rows.filter(tags__name__startswith="t"),
    "slice": lambda rows: rows.order_by("-rank", "pk")[3:11],
}


@pytest.mark.parametrize("rows", MAPS)
def test_results_are_those_of_a_loop(articles, rows):
    """As often as they come there, without None; and the rows themselves, where there is no function."""
    queryset = MAPS[rows](articles)
    for function in (key, score, doubled):
        assert counted(parallelized_queryset(queryset, 2, function)) == looped([queryset], function)
    found = parallelized_queryset(queryset, 2)
    assert isinstance(found, list)
    assert Counter(found) == Counter(queryset)
    assert {row._state.db for row in found} <= {articles.db}


@pytest.mark.parametrize("processes", [1, 2, None])
def test_several_querysets(articles, processes):
    """Of several models and classes, each in its own database."""
    querysets = [articles.filter(rank=1), Author.objects.using(articles.db), articles.none(), articles.filter(rank=1)]
    assert counted(parallelized_multiple_querysets(querysets, processes, key)) == looped(querysets, key)
    assert Counter(parallelized_multiple_querysets(iter(querysets), processes)) == Counter(
        row for queryset in querysets for row in queryset.all()
    )


def test_several_databases(default, other):
    for alias in (default, other):
        Article.objects.using(alias).create(name=alias)
    querysets = [PlainArticle.objects.using(alias) for alias in (default, other)]
    names = parallelized_multiple_querysets(querysets, 2, lambda process, row: (row.name, row._state.db))
    assert sorted(names) == [(default, default), (other, other)]


def test_of_nothing_at_all(default):
    assert parallelized_multiple_querysets([]) == []
    assert parallelized_multiple_querysets([PlainArticle.objects.using(default)], 2, key) == []


def begin(process):
    process.data["rows"] = 0
    process.most = 0


def note_row(process, row):
    process.data["rows"] += 1
    process.most = max(process.most, row.rank)


def tell(process):
    return {
        "rows": process.data["rows"],
        "most": process.most,
        "name": process.name,
        "pid": process.pid,
        "is its own": process.pid == process.ident == os.getpid(),
    }


def count_rows(process):
    return process.data["rows"]


def test_hooks_and_function_share_a_process(articles):
    """What one of them sets on it the others find: in each process once, in front of all rows and behind them."""
    told = parallelized_queryset(articles, 2, note_row, begin, tell)
    assert sum(each["rows"] for each in told) == 30
    assert max(each["most"] for each in told) == 3
    assert all(each["is its own"] for each in told)
    assert len({each["pid"] for each in told}) == len({each["name"] for each in told}) == len(told)
    assert os.getpid() not in {each["pid"] for each in told}


@pytest.mark.parametrize("processes", [2, None])
def test_processes_work_at_the_same_time(default, processes):
    """Two rows meet at a barrier: one after the other they never would."""
    articles = PlainArticle.objects.using(default)
    querysets = [articles.filter(pk=articles.create(name=name).pk) for name in "ab"]
    with multiprocessing.Manager() as manager, override_settings(PARALLEL_ORM={"PROCESSES": 2}):
        barrier = manager.Barrier(2)

        def meet(process, row):
            barrier.wait(WAIT)
            return process.name

        assert sorted(parallelized_multiple_querysets(querysets, processes, meet)) == ["Process-1", "Process-2"]


def test_a_process_has_a_name_where_workers_have_no_number():
    """As those of somebody else's executor."""
    assert (Process(Worker(None, 7)).name, Process(Worker(0, 7)).name) == ("Process-7", "Process-1")


def test_a_process_is_one_for_all_querysets(articles):
    told = parallelized_multiple_querysets([articles, articles.filter(rank=1)], 1, note_row, begin, tell)
    assert [each["rows"] for each in told] == [30 + 8]


def test_what_an_end_hook_returns_is_appended(articles):
    """Unless it is None; beside what the function returned."""
    results = parallelized_queryset(articles, 1, key, end_hook=lambda process: "ended")
    assert sorted(results[:-1]) == sorted(row.pk for row in articles.all())
    assert results[-1] == "ended"
    assert len(parallelized_queryset(articles, 1, key, end_hook=lambda process: None)) == 30
    assert len(parallelized_queryset(articles, 1, end_hook=lambda process: 0)) == 31


def test_a_process_begins_anew_with_each_call(articles):
    """The worker is kept, and what was set on it is not."""

    def first_seen(process, row):
        seen, process.seen = hasattr(process, "seen"), True
        return not seen or None

    for _ in range(2):
        assert parallelized_queryset(articles, 1, first_seen) == [True]


def test_a_function_that_raises(articles):
    """The predecessor waited for ever."""

    def fail(process, row):
        if row.rank == 3:
            raise ValueError(f"rank three: {row.pk}")

    with pytest.raises(ValueError, match="rank three"):
        parallelized_queryset(articles, 2, fail)


@pytest.mark.parametrize("hook", ["init_hook", "end_hook"])
def test_a_hook_that_raises(articles, hook):
    def fail(process):
        raise LookupError(process.name)

    with pytest.raises(LookupError, match="Process-"):
        parallelized_queryset(articles, 2, key, **{hook: fail})


def test_keys_that_the_predecessor_left_out(articles):
    for pk in (-1, -7):
        Article.objects.using(articles.db).create(pk=pk, name="below")
    ByUuid.objects.using(articles.db).bulk_create(ByUuid(number=n) for n in range(8))
    querysets = [articles, ByUuid.objects.using(articles.db)]
    assert counted(parallelized_multiple_querysets(querysets, 2, key)) == looped(querysets, key)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"processes": 0}, "processes must be a whole number"),
        ({"processes": "many"}, "processes must be"),
        ({"function": 3}, "must be a plain callable"),
        ({"init_hook": 3}, "init_hook must be"),
        ({"end_hook": "end"}, "end_hook must be"),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_used(default, arguments, message):
    with pytest.raises(errors.InvalidOption, match=message):
        parallelized_queryset(PlainArticle.objects.using(default), **arguments)


def test_refusals_name_what_was_called(articles):
    keys = articles.values("pk")
    with pytest.raises(errors.UnsupportedQuerySet, match=r"^parallelized_queryset\(\) cannot serve"):
        parallelized_queryset(keys.union(keys))
    with pytest.raises(errors.UnsupportedQuerySet, match=r"^queryset_iterator\(\) cannot serve"):
        queryset_iterator(keys.union(keys))
    lock = threading.Lock()
    with pytest.raises(errors.NotPicklable, match="locked_away"):

        def locked_away(process, row):
            return lock.locked()

        parallelized_queryset(articles, 2, locked_away)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (parallelized_queryset, {"queryset": ..., "processes": None}),
        (parallelized_multiple_querysets, {"querysets": ..., "processes": None}),
    ],
)
def test_arguments_are_those_of_the_predecessor(function, arguments):
    """Their names, their order, their defaults."""
    parameters = inspect.signature(function).parameters.values()
    given = {each.name: ... if each.default is each.empty else each.default for each in parameters}
    assert list(given.items()) == list({**arguments, "function": None, "init_hook": None, "end_hook": None}.items())
    assert {each.kind for each in parameters} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


def test_a_queryset_is_no_list_of_querysets(articles):
    with pytest.raises(errors.InvalidOption, match="takes a queryset or a manager, not a PlainArticle"):
        parallelized_multiple_querysets(articles.all())


# --- What they are given ------------------------------------------------------------------


def test_what_is_no_queryset_is_refused():
    for given in ([Article(name="in a list")], None, Article, PlainArticle.objects.raw("SELECT 1")):
        for walk_or_map in (queryset_iterator, parallelized_queryset):
            with pytest.raises(errors.InvalidOption, match=rf"^{walk_or_map.__name__}\(\) takes a queryset"):
                walk_or_map(given)


def test_a_manager_will_do(articles):
    author = Author.objects.using(articles.db).get()
    for manager in (PlainArticle.objects.db_manager(articles.db), author.articles):
        assert list(queryset_iterator(manager, 7)) == list(manager.order_by("pk"))
        assert Counter(parallelized_queryset(manager, 1)) == Counter(manager.all())


def test_the_queryset_stays_what_it_was(articles):
    """It is not evaluated, nor are its rows touched, or those that a manager has prefetched."""
    author = Author.objects.using(articles.db).prefetch_related("articles").get()
    unused, used, prefetched = articles.filter(rank=1), articles.filter(rank=1), author.articles.all()
    found = [*used, *prefetched]
    for given in (unused, used, author.articles):
        list(queryset_iterator(given, 2))
        parallelized_queryset(given, 1, key)
    assert unused._result_cache is None
    assert author.articles.all() is prefetched
    assert all(now is then for now, then in zip([*used, *prefetched], found, strict=True))


class WithAuthors(QuerySet):
    """A queryset class of a user's own."""

    def order_by(self, *names):
        return super().order_by(*names).select_related("author")


def test_querysets_of_a_class_of_their_own(articles):
    """What the class overrides stays overridden."""
    rows = WithAuthors(PlainArticle, using=articles.db)
    with CaptureQueriesContext(connections[articles.db]) as queries:
        assert {row.author.name for row in queryset_iterator(rows.exclude(author=None))} == {"Ada"}
    assert len(queries) == 1
    assert Counter(parallelized_queryset(rows, 1)) == Counter(rows)


# --- AsynchrORMous ------------------------------------------------------------------------


@pytest.fixture
def started(articles):
    return AsyncArticle.objects.using(articles.db).order_by("pk")


def test_starts_return_the_queryset_to_be_used_as_ever(started):
    expected = list(PlainArticle.objects.using(started.db).filter(rank=1).order_by("pk").values_list("pk", flat=True))
    uses = {
        "start_fetch": [
            (lambda rows: [row.pk for row in rows], expected),
            (len, 8),
            (bool, True),
            (lambda rows: rows.count(), 8),
            (lambda rows: rows.exists(), True),
        ],
        "start_count": [(lambda rows: rows.count(), 8), (lambda rows: rows.exists(), True)],
        "start_exists": [(lambda rows: rows.exists(), True)],
    }
    for start, consumers in uses.items():
        for use, answer in consumers:
            rows = started.filter(rank=1)
            assert getattr(rows, start)() is rows
            assert type(rows) is AsyncQuerySet
            landed(rows.background[start.removeprefix("start_")])
            connections[started.db].execute_wrappers.append(None)  # whoever asks now fails
            try:
                assert use(rows) == answer
            finally:
                connections[started.db].execute_wrappers.pop()
        nothing = getattr(started.filter(rank=99), start)()
        assert consumers[-1][0](nothing) is False


def test_the_manager_starts_too(started):
    assert AsyncArticle.objects.db_manager(started.db).start_count().count() == 30
    assert AsyncArticle.objects.db_manager(started.db).async_get(pk=4).result(WAIT).pk == 4


def test_async_get_runs_beside_the_caller(started, met):
    """Three readers meet inside their queries: one after the other they never would."""
    met(3)
    one, two, rows = started.async_get(pk=1), started.filter(pk=4).async_get(), started.filter(pk=7).start_fetch()
    assert isinstance(one, Pending)
    assert [landed(one).pk, landed(two).pk, rows[0].pk] == [1, 4, 7]
    assert type(one.result()) is AsyncArticle


def test_async_get_raises_what_get_raises(started):
    with pytest.raises(AsyncArticle.DoesNotExist):
        started.async_get(pk=-1).result(WAIT)
    with pytest.raises(AsyncArticle.MultipleObjectsReturned):
        started.async_get(rank=1).result(WAIT)


def test_async_get_can_be_awaited(started):
    async def get():
        return await started.async_get(pk=4)

    assert run_async(get()).pk == 4


class InATestCase(TestCase):
    databases = {"default"}

    def test_the_rows_of_the_test_are_seen(self):
        article = AsyncArticle.objects.create(name="in the test's transaction")
        self.assertEqual(AsyncArticle.objects.start_fetch()[0], article)
        self.assertEqual(AsyncArticle.objects.async_get().result(), article)
        self.assertEqual(parallelized_queryset(PlainArticle.objects.all(), 2, key), [article.pk])
        self.assertEqual(parallelized_queryset(PlainArticle.objects.all(), 2, note_row, begin, count_rows), [1])
        self.assertEqual(list(queryset_iterator(PlainArticle.objects.all())), [PlainArticle(pk=article.pk)])
