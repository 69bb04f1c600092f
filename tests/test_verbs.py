"""Every verb and every way to consume: the answers of a plain queryset, with the queries of an evaluated one."""

# ruff: noqa: F811 - fixtures are imported

from __future__ import annotations

import copy
import datetime
import pickle
import threading

import django
import pytest
from django.contrib.contenttypes.models import ContentType
from django.contrib.contenttypes.prefetch import GenericPrefetch
from django.core import serializers
from django.core.paginator import Paginator
from django.db import DatabaseError, connections, transaction
from django.db.models import Count, Max, Prefetch, Sum
from django.db.models.sql.compiler import SQLCompiler
from django.template import Context, Engine
from django.test import override_settings
from django.test.utils import CaptureQueriesContext

import parallel_orm
from parallel_orm import ParallelQuerySet, Pending, errors
from tests.test_background import WAIT, articles, busy, landed, met  # noqa: F401
from tests.testapp.models import Article, Author, Label, Note, PlainArticle, Tag


@pytest.fixture
def executed(monkeypatch):
    """What is asked of the databases by anybody, in any thread: a list of tables of origin, one for each query."""
    asked = []
    execute = SQLCompiler.execute_sql

    def note_and_execute(self, *args, **kwargs):
        asked.append(self.query.get_meta().model_name)
        return execute(self, *args, **kwargs)

    monkeypatch.setattr(SQLCompiler, "execute_sql", note_and_execute)
    return asked


# --- The verbs that return a Pending ----------------------------------------------------

CALLS = {
    "get": lambda rows, key: (rows.start_get(pk=key), rows.get(pk=key)),
    "get, by position": lambda rows, key: (rows.filter(pk=key).start_get(), rows.filter(pk=key).get()),
    "first": lambda rows, key: (rows.start_first(), rows.first()),
    "first, unordered": lambda rows, key: (rows.order_by().start_first(), rows.order_by().first()),
    "first of a slice": lambda rows, key: (rows[3:].start_first(), rows[3:].first()),
    "last": lambda rows, key: (rows.start_last(), rows.last()),
    "last, by rank": lambda rows, key: (rows.order_by("rank", "pk").start_last(), rows.order_by("rank", "pk").last()),
    "aggregate": lambda rows, key: (
        rows.start_aggregate(Max("rank"), all=Sum("rank")),
        rows.aggregate(Max("rank"), all=Sum("rank")),
    ),
    "in_bulk": lambda rows, key: (rows.start_in_bulk([key, key + 1, -1]), rows.in_bulk([key, key + 1, -1])),
    "in_bulk, all": lambda rows, key: (rows.start_in_bulk(), rows.in_bulk()),
    "in_bulk, nothing": lambda rows, key: (rows.start_in_bulk([]), rows.in_bulk([])),
    "in_bulk, field": lambda rows, key: (
        rows.start_in_bulk([key], field_name="id"),
        rows.in_bulk([key], field_name="id"),
    ),
    "values": lambda rows, key: (rows.values("name").start_first(), rows.values("name").first()),
    "values_list": lambda rows, key: (
        rows.values_list("name", flat=True).start_get(pk=key),
        rows.values_list("name", flat=True).get(pk=key),
    ),
    "none, first": lambda rows, key: (rows.none().start_first(), None),
    "none, aggregate": lambda rows, key: (rows.none().start_aggregate(n=Count("pk")), {"n": 0}),
    "none, in_bulk": lambda rows, key: (rows.none().start_in_bulk(), {}),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_verb_answers_as_the_call_would(articles, call):
    pending, expected = CALLS[call](articles, articles[4].pk)
    assert isinstance(pending, Pending)
    assert pending.result(WAIT) == expected
    assert pending.result() is pending.result()
    assert pending.reason == ("empty" if call.startswith("none") else pending.reason)


@pytest.mark.parametrize("model", [Article, PlainArticle])
def test_exceptions_are_those_of_the_call(articles, alias, model):
    """Raised where the result is used, and of the model's own classes."""
    rows = Article.objects.using(alias)
    refused = {
        "missing": (rows.start_get(name="nobody"), Article.DoesNotExist),
        "several": (rows.start_get(rank=1), Article.MultipleObjectsReturned),
        "no such field": (rows.start_get(no_such=1), Exception),
        "sliced get": (rows.order_by("pk")[:3].start_get(pk=1), TypeError),
        "sliced last": (rows.order_by("pk")[:3].start_last(), TypeError),
        "sliced in_bulk": (rows.order_by("pk")[:3].start_in_bulk(), TypeError),
        "in_bulk by what is not unique": (rows.start_in_bulk(field_name="rank"), ValueError),
        "distinct fields": (rows.distinct("name").start_aggregate(Max("pk")), Exception),
        "broken": (rows.extra(where=["no_such_column = 1"]).start_first(), DatabaseError),
        "none": (rows.none().start_get(), Article.DoesNotExist),
    }
    if django.VERSION < (6, 1):  # which has learned it
        refused["in_bulk of values_list"] = rows.values_list("name").start_in_bulk(), TypeError
    for pending, kind in refused.values():
        for _ in range(2):
            with pytest.raises(kind) as raised:
                pending.result(WAIT)
        assert any("started at" in note and __file__ in note for note in raised.value.__notes__)


def test_an_evaluated_queryset(articles, executed):
    """first() comes of its rows, as Django takes it from there; what Django asks for is asked for."""
    len(articles)
    executed.clear()
    first = articles.start_first()
    assert first.result(WAIT) is articles[0]
    assert (first.reason, executed) == ("evaluated", [])
    key = articles[3].pk
    for pending in (articles.start_get(pk=key), articles.start_last(), articles.start_aggregate(Max("rank"))):
        landed(pending) if pending.reason is None else None
        assert pending.reason in (None, "stolen")
    del pending


def test_a_verb_on_related_managers(articles, alias):
    author = Author.objects.using(alias).create(name="Ada")
    tag = Tag.objects.using(alias).create(name="x")
    articles.filter(rank=1).update(author=author)
    articles.get(name="name 4").tags.add(tag)
    pendings = author.articles.start_get(name="name 4"), author.articles.start_aggregate(n=Count("pk"))
    assert pendings[0].result(WAIT).author is author
    assert pendings[1].result(WAIT) == {"n": 10}
    assert tag.articles.start_first().result(WAIT).name == "name 4"
    assert tag.articles.start_count().count() == tag.articles.count() == 1
    assert [t.name for t in articles.get(name="name 4").tags.start_fetch()] == ["x"]


class OwnQuerySet(ParallelQuerySet):
    def get(self, *args, **kwargs):
        return "own", super().get(*args, **kwargs)

    def first(self):
        return "own", super().first()

    def last(self):
        return "own", super().last()

    def aggregate(self, *args, **kwargs):
        return "own", super().aggregate(*args, **kwargs)

    def in_bulk(self, *args, **kwargs):
        return "own", super().in_bulk(*args, **kwargs)


def test_what_a_derived_class_made_of_the_method_is_called(articles, alias):
    rows = OwnQuerySet(Article, using=alias).order_by("pk")
    key = articles[2].pk
    assert rows.start_get(pk=key).result(WAIT) == rows.get(pk=key)
    assert rows.start_first().result(WAIT) == rows.first()
    assert rows.start_last().result(WAIT) == rows.last()
    assert rows.start_aggregate(Max("rank")).result(WAIT) == rows.aggregate(Max("rank"))
    assert rows.start_in_bulk([key]).result(WAIT) == rows.in_bulk([key])
    assert Note.mixed.using(alias).start_count().count() == Note.mixed.using(alias).count() == 1000


# --- start(*querysets) ------------------------------------------------------------------


def test_start_starts_the_fetch_of_each(articles, alias, met):
    met(3)
    keys = list(articles.values_list("pk", flat=True)[:3])
    querysets = [Article.objects.using(alias).filter(pk=key) for key in keys]
    started = parallel_orm.start(*querysets)
    assert isinstance(started, tuple)
    assert all(a is b for a, b in zip(started, querysets, strict=True))
    assert [landed(queryset.background["fetch"])[0].pk for queryset in started] == keys
    assert parallel_orm.start() == ()


def test_start_takes_raw_querysets_and_refuses_what_cannot_start(articles, alias):
    """Before it starts anything."""
    raw = Article.objects.raw("SELECT * FROM testapp_article", using=alias)
    (started,) = parallel_orm.start(raw)
    assert len(list(started)) == 30
    mine = articles.all()
    with pytest.raises(errors.InvalidOption, match="a QuerySet of testapp.PlainArticle, whose manager is no"):
        parallel_orm.start(mine, PlainArticle.objects.using(alias))
    with pytest.raises(errors.InvalidOption, match="not a list"):
        parallel_orm.start([mine])
    assert dict(mine.background) == {}


# --- Every way to consume ---------------------------------------------------------------

TEMPLATE = Engine().from_string(
    "{% if rows %}{{ rows|length }}{% for row in rows %}{{ row.name }}{% endfor %}{{ rows.0.pk }}{{ rows.count }}"
    "{{ rows.exists }}{% endif %}"
    "{% regroup rows by rank as ranks %}{% for rank in ranks %}{{ rank.grouper }}:{{ rank.list|length }} {% endfor %}"
)


def half_finished(rows):
    one = iter(rows)
    found = [next(one).pk, next(one).pk]
    return found + [row.pk for row in rows] + [row.pk for row in one]


def nested(rows):
    return [(a.pk, b.pk) for a in rows for b in rows if a.rank == b.rank][:50]


def refused(use):
    def used(rows):
        with pytest.raises((ValueError, TypeError, IndexError, Article.MultipleObjectsReturned)) as raised:
            use(rows)
        return raised.type, str(raised.value)

    return used


USES = {
    "list": lambda rows: [row.pk for row in rows],
    "nested loops": nested,
    "half-finished loop": half_finished,
    "len": len,
    "bool": bool,
    "index": lambda rows: (rows[0].pk, rows[29].pk),
    "index out of range": refused(lambda rows: rows[30]),
    "negative index": refused(lambda rows: rows[-1]),
    "negative slice": refused(lambda rows: rows[-3:]),
    "wrong index": refused(lambda rows: rows["x"]),
    "slice": lambda rows: [row.pk for row in rows[2:9]],
    "step": lambda rows: [row.pk for row in rows[2:20:3]],
    "open slice": lambda rows: [row.pk for row in rows[25:]],
    "in": lambda rows: (rows[3] in rows, Article(pk=-1) in rows),
    "contains": lambda rows: (rows.contains(rows[3]), rows.contains(Article(pk=-1))),
    "count": lambda rows: rows.count(),
    "exists": lambda rows: rows.exists(),
    "first": lambda rows: rows.first().pk,
    "last": lambda rows: rows.last().pk,
    "get of many": refused(lambda rows: rows.get()),
    "get": lambda rows: rows.get(name="name 3").pk,
    "filter": lambda rows: [row.pk for row in rows.filter(rank=1)],
    "iterator": lambda rows: [row.pk for row in rows.iterator()],
    "paginator": lambda rows: [[row.pk for row in page] for page in Paginator(rows, 7)],
    "or": lambda rows: [row.pk for row in rows.filter(rank=2) | rows.filter(rank=1)],
    "and": lambda rows: [row.pk for row in rows & rows.filter(rank=1)],
    "serialize": lambda rows: serializers.serialize("json", rows),
    "pickle": lambda rows: [row.pk for row in pickle.loads(pickle.dumps(rows))],
    "deepcopy": lambda rows: [row.pk for row in copy.deepcopy(rows)],
    "repr": repr,
    "reversed": lambda rows: [row.pk for row in reversed(rows)],
    "template": lambda rows: TEMPLATE.render(Context({"rows": rows})),
    "subquery": lambda rows: Article.objects.using(rows.db).filter(pk__in=rows).count(),
    "in_bulk": lambda rows: len(rows.in_bulk()),
    "earliest": lambda rows: rows.earliest("pk").pk,
    "aggregate": lambda rows: rows.aggregate(Max("rank")),
}


@pytest.mark.parametrize("use", USES)
def test_a_fetch_answers_as_an_evaluated_queryset(articles, executed, use):
    """The same answers as a plain queryset's, by as many queries as an evaluated one needs."""
    evaluated = articles.all()
    len(evaluated)
    executed.clear()
    expected = USES[use](evaluated)
    queries = len(executed)
    started = articles.all().start_fetch()
    started.background["fetch"].result(WAIT)
    executed.clear()
    assert USES[use](started) == expected
    assert len(executed) == queries
    assert USES[use](articles.all()) == expected
    assert USES[use](articles.all().start_fetch()) == expected


SHAPES = {
    "values": lambda rows: rows.values("name", "rank"),
    "values_list": lambda rows: rows.values_list("rank", "name"),
    "named": lambda rows: rows.values_list("rank", "name", named=True),
    "flat": lambda rows: rows.values_list("name", flat=True),
    "dates": lambda rows: rows.dates("published", "month"),
    "datetimes": lambda rows: rows.datetimes("published", "year"),
    "annotated": lambda rows: rows.values("rank").annotate(n=Count("pk")).order_by("rank"),
    "distinct": lambda rows: rows.order_by("rank").values_list("rank").distinct(),
    "union": lambda rows: rows.filter(rank=1).order_by().union(rows.filter(rank=2).order_by()).order_by("name"),
    "sliced": lambda rows: rows[3:9],
    "none": lambda rows: rows.none(),
    "empty": lambda rows: rows.filter(pk__in=[]),
    "nothing": lambda rows: rows.filter(name="nobody"),
    "related": lambda rows: rows.select_related("author").only("name", "author"),
    "deferred": lambda rows: rows.defer("score"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_rows(articles, alias, shape):
    """dates() needs no time zone of the database, datetimes() does where it shows other days."""
    if shape in ("dates", "datetimes"):
        if connections[alias].vendor == "mysql" and shape == "datetimes":
            with connections[alias].cursor() as cursor:
                cursor.execute("SELECT CONVERT_TZ('2004-01-01 12:00:00', 'UTC', 'Europe/Berlin')")
                if cursor.fetchone() == (None,):
                    pytest.skip("its time zone tables are not loaded")
        articles.filter(rank=1).update(published=datetime.datetime(2024, 3, 5, tzinfo=datetime.UTC))
    make = SHAPES[shape]
    expected = list(make(articles))
    started = make(articles).start_fetch().start_count().start_exists()
    assert (list(started), started.count(), started.exists(), bool(started)) == (
        expected,
        len(expected),
        bool(expected),
        bool(expected),
    )
    counted = make(articles).start_count()
    assert (counted.count(), counted.exists()) == (len(expected), bool(expected))
    if shape == "none":
        assert make(articles).start_fetch().background["fetch"].reason == "empty"


def test_raw_rows(articles, alias):
    """Looped over, indexed, counted by len(), prefetched: by one query and one for the prefetch."""
    tag = Tag.objects.using(alias).create(name="x")
    articles[0].tags.add(tag)
    raw = Article.objects.raw("SELECT * FROM testapp_article ORDER BY id", using=alias).prefetch_related("tags")
    keys = [row.pk for row in articles]
    raw.start_fetch().background["fetch"].result(WAIT)
    with CaptureQueriesContext(connections[alias]) as here:
        assert (len(raw), bool(raw), raw[0].name, [tag.name for tag in raw[0].tags.all()]) == (
            30,
            True,
            "name 0",
            ["x"],
        )
        assert [row.pk for row in raw] == keys
    assert len(here) == 0
    for verb in ("start_count", "start_exists"):
        with pytest.raises(errors.UnsupportedQuerySet):
            getattr(raw, verb)()


# --- No more queries than needed --------------------------------------------------------

STARTS = {
    ("fetch", "count"): 1,
    ("fetch", "exists", "count"): 1,
    ("count", "fetch"): 1,
    ("exists", "count", "fetch"): 1,
    ("exists", "count"): 1,
    ("count", "exists"): 1,
}


@pytest.mark.parametrize("verbs", STARTS, ids="-".join)
def test_what_another_start_will_answer_does_not_run(articles, busy, executed, verbs):
    """Counted where they are executed: one query answers all, whichever was started first."""
    started = articles.all()
    for verb in verbs:
        getattr(started, f"start_{verb}")()
    pendings = dict(started.background)
    assert (started.count(), started.exists()) == (30, True)
    if "fetch" in verbs:
        assert len(started) == 30
    busy()
    assert [pending.result(WAIT) for verb, pending in pendings.items() if verb != "fetch"] == [
        30 if verb == "count" else True for verb in pendings if verb != "fetch"
    ]
    assert len(executed) == STARTS[verbs]


def test_a_count_that_has_begun_goes_on(articles, met):
    """It is there sooner than the rows."""
    started = articles.start_count()
    assert landed(started.background["count"]) == 30
    met(2)
    started.start_fetch()
    assert started.background["count"].result(WAIT) == 30
    started.background["fetch"].cancel()


def test_a_count_does_not_fail_with_the_fetch_that_would_have_answered_it(articles, busy, monkeypatch):
    started = articles.start_count().start_exists()
    started.start_fetch()
    count, fetch = started.background["count"], started.background["fetch"]

    def fail(cls, *args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(Article, "from_db", classmethod(fail))
    assert count.result(WAIT) == 30
    with pytest.raises(ZeroDivisionError):
        fetch.result(WAIT)


@pytest.mark.parametrize("how", ["cancelled", "dropped"])
def test_a_count_outlives_the_fetch_that_would_have_answered_it(articles, busy, how):
    started = articles.start_count()
    started.start_fetch()
    count = started.background["count"]
    if how == "cancelled":
        assert started.background["fetch"].cancel()
    del started
    assert not count.done()
    assert count.result(WAIT) == 30


def test_a_count_that_will_be_answered_can_be_cancelled(articles, busy):
    started = articles.start_count()
    started.start_fetch()
    assert started.background["count"].cancel()
    with pytest.raises(errors.Cancelled):
        started.background["count"].result(WAIT)
    assert len(started) == started.count() == 30


def test_a_write_has_the_count_answered_before(articles, alias, busy):
    started = articles.start_count()
    started.start_fetch()
    count = started.background["count"]
    Article.objects.using(alias).create(name="later")
    assert (count.result(WAIT), len(started)) == (30, 30)


def test_a_fetch_that_cannot_be_started_leaves_the_count(articles, busy):
    started = articles.start_count()
    with pytest.raises(errors.InvalidOption):
        started.start_fetch(timeout=-1)
    assert started.count() == 30


# --- Prefetches side by side ------------------------------------------------------------


@pytest.fixture
def library(alias):
    """Authors with articles with tags and labels; some have nothing, some come twice."""
    authors = [Author.objects.using(alias).create(name=f"author {n}") for n in range(3)]
    tags = [Tag.objects.using(alias).create(name=f"tag {n}") for n in range(4)]
    kind = ContentType.objects.db_manager(alias).get_for_model(Article)
    for n in range(9):
        author = None if n % 4 == 3 else authors[n % 2]
        article = Article.objects.using(alias).create(name=f"name {n}", rank=n % 3, author=author)
        article.tags.add(*tags[: n % 4])
        Label.objects.using(alias).create(text=f"l{n}", content_type=kind, object_id=article.pk)
    for author in authors[:2]:
        Note.plain.using(alias).create(name=f"of {author.name}", author=author)
    return alias


def names_of(manager):
    return sorted(getattr(each, "name", None) or each.text for each in manager.all())


def of_article(article):
    author = article.author
    return (
        article.name,
        names_of(article.tags),
        names_of(article.labels),
        author and (author.name, names_of(author.articles), names_of(author.notes)),
        [names_of(tag.articles) for tag in article.tags.all()],
    )


LOOKUPS = {
    "strings": lambda alias: ["tags", "labels", "author"],
    "nested": lambda alias: ["author__articles", "author__notes", "tags__articles", "labels"],
    "deep": lambda alias: ["author__articles__tags", "author__articles__labels", "author__notes"],
    "unusual order": lambda alias: ["author__notes", "tags", "author", "author__articles", "tags"],
    "doubled": lambda alias: ["tags", "tags", "labels", "tags__articles"],
    "Prefetch": lambda alias: [
        Prefetch("tags", Tag.objects.using(alias).order_by("-name")),
        Prefetch("author", Author.objects.using(alias).all()),
        "author__articles",
        "author__notes",
    ],
    "to_attr": lambda alias: [
        Prefetch("tags", Tag.objects.using(alias).filter(name="tag 1"), to_attr="few"),
        Prefetch("tags", Tag.objects.using(alias).filter(name="tag 2"), to_attr="others"),
        "tags",
        "few__articles",
        "others__articles",
    ],
    "nested to_attr": lambda alias: [
        Prefetch("author__articles", Article.objects.using(alias).filter(rank=1), to_attr="first_rank"),
        Prefetch("author__articles", Article.objects.using(alias).filter(rank=2), to_attr="second_rank"),
        "author__notes",
        "author__first_rank__tags",
    ],
    "prefetches in prefetches": lambda alias: [
        Prefetch("author", Author.objects.using(alias).prefetch_related("articles", "notes")),
        "author__articles__tags",
        Prefetch("tags", Tag.objects.using(alias).prefetch_related("articles__labels", "articles__author")),
        "labels",
    ],
    "generic": lambda alias: [
        GenericPrefetch("labels__content", [Article.objects.using(alias).all()]),
        "labels__content_type",
        "tags",
    ],
    "to_attr of a field": lambda alias: [Prefetch("tags", to_attr="name"), "labels"],
    "back to the same": lambda alias: ["tags__articles__author", "author__articles__author", "author__notes"],
}


def attributes(instances):
    """All that is cached on instances and on what hangs below them."""

    def of(each, depth):
        if not hasattr(each, "_state") or depth > 4:
            return each
        kept = {name: [of(one, depth + 1) for one in found] for name, found in prefetched(each)}
        to_one = {
            name: of(one, depth + 1) for name, one in each._state.fields_cache.items() if one is None or depth < 3
        }
        return type(each).__name__, each.pk, kept, to_one

    return [of(each, 0) for each in instances]


def prefetched(instance):
    for name, found in getattr(instance, "_prefetched_objects_cache", {}).items():
        yield name, sorted(found, key=lambda one: one.pk)
    for name in ("few", "others", "first_rank", "second_rank"):
        if name in instance.__dict__:
            yield name, sorted(instance.__dict__[name], key=lambda one: one.pk)


@pytest.mark.parametrize("lookups", LOOKUPS)
def test_prefetches_are_those_of_django(library, executed, lookups):
    """The same objects below the same ones, by as many queries."""
    make = LOOKUPS[lookups]
    ContentType.objects.db_manager(library).get_for_model(Article)
    expected = Article.objects.using(library).order_by("pk").prefetch_related(*make(library))
    executed.clear()
    list(expected)
    queries = sorted(executed)
    executed.clear()
    started = Article.objects.using(library).order_by("pk").prefetch_related(*make(library)).start_fetch()
    landed(started.background["fetch"])
    assert attributes(started) == attributes(expected)
    assert sorted(executed) == queries
    assert [of_article(article) for article in started] == [of_article(article) for article in expected]


INVALID = {
    "no such": lambda alias: ["tags", "no_such", "labels"],
    "no relation": lambda alias: ["name", "labels"],
    "no such below": lambda alias: ["author__no_such", "author__notes", "tags"],
    "another queryset": lambda alias: ["tags", Prefetch("tags", Tag.objects.using(alias).all())],
    "another queryset below": lambda alias: [
        "author__notes",
        "author__articles",
        Prefetch("author__articles", Article.objects.using(alias).all()),
    ],
    "another queryset, after one of its own": lambda alias: [
        Prefetch("author", Author.objects.using(alias).prefetch_related("articles")),
        Prefetch("author__articles", Article.objects.using(alias).filter(rank=1)),
        "author__notes",
    ],
    "author after all": lambda alias: ["author__articles", Prefetch("author", Author.objects.using(alias).all())],
}


@pytest.mark.parametrize("lookups", INVALID)
def test_invalid_prefetches_are_refused_as_django_refuses_them(library, lookups):
    rows = Article.objects.using(library).order_by("pk").prefetch_related(*INVALID[lookups](library))
    with pytest.raises(Exception) as expected:
        list(rows.all())
    pending = rows.start_fetch().background["fetch"]
    with pytest.raises(type(expected.value)) as raised:
        landed(pending)
    with pytest.raises(type(expected.value)):  # asked for
        pending.result()
    assert str(raised.value) == str(expected.value)


@pytest.mark.parametrize("rows", ["nothing", "none", "no author"])
def test_prefetches_of_nothing(library, executed, rows):
    articles = Article.objects.using(library)
    queryset = {
        "nothing": articles.filter(name="nobody"),
        "none": articles.none(),
        "no author": articles.filter(author=None),
    }[rows].prefetch_related("author__articles", "author__notes", "tags")
    executed.clear()
    number = len(queryset.all())
    queries = sorted(executed)
    executed.clear()
    assert len(landed(queryset.start_fetch().background["fetch"])) == number
    assert sorted(executed) == queries


@pytest.fixture
def tables_meet(monkeypatch):
    """Make queries of these models wait for one another."""

    def meet(*names):
        barrier = threading.Barrier(len(names))
        execute = SQLCompiler.execute_sql

        def wait_and_execute(self, *args, **kwargs):
            if self.query.get_meta().model_name in names:
                barrier.wait(WAIT)
            return execute(self, *args, **kwargs)

        monkeypatch.setattr(SQLCompiler, "execute_sql", wait_and_execute)

    return meet


def test_siblings_meet_in_the_database(library, tables_meet):
    tables_meet("tag", "label", "author")
    rows = Article.objects.using(library).prefetch_related("tags", "labels", "author").start_fetch()
    assert len(landed(rows.background["fetch"])) == 9


def test_siblings_of_a_deeper_level_meet_too(library, tables_meet):
    tables_meet("note", "profile")
    rows = Article.objects.using(library).filter(name="name 0")
    rows = rows.prefetch_related("author__notes", "author__profile").start_fetch()
    assert len(landed(rows.background["fetch"])) == 1


def test_a_prefetch_of_another_database(library, other):
    """The query of a Prefetch goes where its queryset says."""
    Tag.objects.using(other).bulk_create(Tag(pk=tag.pk, name="there") for tag in Tag.objects.using(library))
    rows = Author.objects.using(library).order_by("pk")
    theirs = Prefetch("notes", Note.plain.using(other))
    started = rows.prefetch_related(theirs, "articles").start_fetch()
    found = landed(started.background["fetch"])
    assert [len(author.notes.all()) for author in found] == [0, 0, 0]
    assert [len(author.articles.all()) for author in found] == [
        len(author.articles.all()) for author in rows.prefetch_related(theirs, "articles")
    ]


def test_prefetches_in_a_transaction_are_inline(library):
    with transaction.atomic(using=library):
        Author.objects.using(library).create(name="mine")
        rows = Author.objects.using(library).prefetch_related("articles", "notes").start_fetch()
        with CaptureQueriesContext(connections[library]) as here:
            assert [len(author.articles.all()) + len(author.notes.all()) for author in rows][-1] == 0
        assert (len(rows), len(here), rows.background["fetch"].reason) == (4, 0, "transaction")


def test_prefetches_with_all_threads_held(library, busy):
    rows = Article.objects.using(library).prefetch_related("tags", "labels", "author__articles", "author__notes")
    assert len(rows.start_fetch()) == 9


def test_prefetches_with_one_connection(library):
    """The siblings cannot have one of their own: the thread that waits for them runs them."""
    with override_settings(PARALLEL_ORM={"CONNECTIONS": 1}):
        rows = Article.objects.using(library).prefetch_related(
            "tags__articles", "labels", "author__articles", "author__notes"
        )
        assert len(landed(rows.start_fetch().background["fetch"])) == 9
