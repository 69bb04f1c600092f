"""Whoever only swaps the manager sees no difference; every door leads to the verbs."""

from __future__ import annotations

import copy
import pickle
from contextlib import ExitStack

import pytest
from django.contrib.contenttypes.models import ContentType
from django.db import connections, models, transaction
from django.db.migrations.state import ModelState
from django.db.migrations.writer import MigrationWriter
from django.db.models import Count, Prefetch, Q
from django.db.models.query import QuerySet
from django.test.utils import CaptureQueriesContext

from parallel_orm import ParallelManager, ParallelQuerySet
from parallel_orm.managers import parallel
from tests.asynchronous import run as run_async
from tests.testapp.models import (
    Article,
    Author,
    MixedQuerySet,
    Note,
    OwnManager,
    PlainArticle,
    QuietQuerySet,
    ShoutingQuerySet,
    Tag,
)


@pytest.fixture
def rows(alias):
    ContentType.objects.db_manager(alias).get_for_models(Article, PlainArticle)  # asked once, then remembered
    author = Author.objects.using(alias).create(name="Ada")
    tags = [Tag.objects.using(alias).create(name=f"t{n}") for n in range(3)]
    for n in range(12):
        article = Article.objects.using(alias).create(name=f"n{n}", rank=n % 3, author=author if n % 2 else None)
        article.tags.add(*tags[: n % 4])
    return alias


USES = {
    "list": lambda qs: [a.pk for a in qs],
    "len": len,
    "bool": bool,
    "index": lambda qs: qs[2].pk,
    "slice": lambda qs: [a.pk for a in qs[2:7]],
    "step": lambda qs: [a.pk for a in qs[1:9:3]],
    "evaluated slice": lambda qs: (len(qs), [a.pk for a in qs[1:9:3]]),
    "count": lambda qs: qs.count(),
    "evaluated count": lambda qs: (len(qs), qs.count(), qs.exists(), qs.first().pk, qs[0].pk),
    "exists": lambda qs: qs.exists(),
    "contains": lambda qs: qs.contains(qs[0]),
    "in": lambda qs: qs[0] in qs,
    "first and last": lambda qs: (qs.first().pk, qs.last().pk),
    "get": lambda qs: qs.get(name="n3").pk,
    "iterator": lambda qs: [a.pk for a in qs.iterator(chunk_size=5)],
    "in_bulk": lambda qs: sorted(qs.in_bulk()),
    "aggregate": lambda qs: qs.aggregate(n=Count("tags")),
    "annotate": lambda qs: [a.n for a in qs.annotate(n=Count("tags"))],
    "values": lambda qs: list(qs.values("name", "author__name")),
    "select_related": lambda qs: [a.author and a.author.name for a in qs.select_related("author")],
    "prefetch": lambda qs: [[t.name for t in a.tags.all()] for a in qs.prefetch_related("tags")],
    "prefetch with a queryset": lambda qs: [
        [t.name for t in a.found]
        for a in qs.prefetch_related(Prefetch("tags", Tag.objects.filter(name="t0"), to_attr="found"))
    ],
    "or": lambda qs: [a.pk for a in (qs.filter(rank=1) | qs.filter(name="n3"))],
    "and": lambda qs: [a.pk for a in (qs.filter(rank=1) & qs.filter(author=None))],
    "xor": lambda qs: [a.pk for a in (qs.filter(rank=1) ^ qs.filter(author=None))],
    "union": lambda qs: sorted(a.pk for a in qs.filter(rank=1).order_by().union(qs.filter(rank=2).order_by())),
    "none": lambda qs: (list(qs.none()), qs.none().count()),
    "subquery": lambda qs: [a.pk for a in qs.filter(pk__in=qs.filter(rank=1).values("pk"))],
    "deepcopy": lambda qs: [a.pk for a in copy.deepcopy(qs)],
    "pickle": lambda qs: [a.pk for a in pickle.loads(pickle.dumps(qs))],
    "pickled query": lambda qs: pickle.loads(pickle.dumps(qs.query)).get_count(using=qs.db),
    "dates": lambda qs: list(qs.dates("published", "year")),
    "update": lambda qs: (qs.update(rank=7), {a.rank for a in qs}),
    "delete": lambda qs: (qs.filter(rank=1).delete()[0], qs.count()),
    "update after use": lambda qs: (len(qs), qs.update(rank=8), {a.rank for a in qs}),
    "create": lambda qs: (qs.create(name="new").name, qs.get_or_create(name="new")[1]),
    "update_or_create": lambda qs: qs.update_or_create(name="n1", defaults={"rank": 5})[1],
    "bulk": lambda qs: (len(qs.bulk_create([qs.model(name="b")])), qs.bulk_update(qs.filter(name="b"), ["rank"])),
    "complex": lambda qs: [a.pk for a in qs.filter(Q(tags__name="t0") | Q(author__name="Ada")).distinct().reverse()],
    "async": lambda qs: run_async(_async(qs)),
}


async def _async(qs):
    rows = [a.pk async for a in qs]
    iterated = [a.pk async for a in qs.aiterator()]
    return (
        rows,
        iterated,
        await qs.acount(),
        await qs.aexists(),
        (await qs.afirst()).pk,
        await qs.aaggregate(n=Count("pk")),
    )


@pytest.mark.parametrize("use", USES)
def test_a_swapped_manager_changes_no_result_and_no_query(rows, use):
    """The same uses through Django's own manager and through ours, queries counted and compared."""
    answers, queries = [], []
    for model in (PlainArticle, Article):
        with ExitStack() as stack:
            if use != "async":  # which asks from another thread
                stack.enter_context(transaction.atomic(using=rows))
            captured = stack.enter_context(CaptureQueriesContext(connections[rows]))
            answers.append(USES[use](model.objects.using(rows).order_by("name")))
            queries.append(len(captured))
            if use != "async":
                transaction.set_rollback(True, using=rows)
    assert answers[0] == answers[1]
    assert queries[0] == queries[1]
    connections.close_all()


def test_every_door_leads_to_the_verbs(rows):
    author = Author.objects.using(rows).get()
    tag = Tag.objects.using(rows).first()
    for queryset in (
        Article.objects.using(rows),
        Article._default_manager.using(rows),
        author.articles.all(),
        author.articles.filter(rank=1),
        tag.articles.all(),
        Article.objects.using(rows).first().tags.all(),
        Note.objects.using(rows),
        Note.quiet.using(rows),
        Note.mixed.using(rows),
    ):
        assert isinstance(queryset, ParallelQuerySet)
    for manager in (
        Article.objects.db_manager(rows),
        author.articles,
        tag.articles,
        Note.objects.db_manager(rows),
        Note.quiet.db_manager(rows),
    ):
        assert manager.start_count().count() == manager.all().count()
        assert list(manager.chunked_iterator(5)) == list(manager.order_by("pk"))


def test_an_own_queryset_class_keeps_its_methods_and_its_overrides(alias):
    Note.objects.using(alias).bulk_create([Note(name="a!"), Note(name="b")])
    for manager in (Note.objects, Note.mixed):
        queryset = manager.using(alias)
        assert isinstance(queryset, ShoutingQuerySet)
        assert isinstance(queryset, ParallelQuerySet)
        assert [note.name for note in queryset.loud()] == ["a!"]
        assert queryset.loud().count() == 1001
        assert queryset.loud().start_count().count() == 1001, "in the background too"
    assert [note.name for note in Note.objects.db_manager(alias).loud()] == ["a!"]
    assert [note.name for note in Note.quiet.using(alias).quiet()] == ["b"]
    assert isinstance(Note.mixed.using(alias), MixedQuerySet)
    assert parallel(ShoutingQuerySet) is parallel(ShoutingQuerySet)
    assert parallel(QuietQuerySet) is QuietQuerySet
    assert parallel(QuerySet) is not QuerySet


def test_overrides_stay_and_are_called_once(alias):
    """Of a plain class mixed in on either side, and of a class derived from ours; inline and started alike."""

    class Wrapping:
        def count(self, plus=1):
            return super().count() + plus

        def exists(self):
            return not super().exists()

        def _fetch_all(self):
            super()._fetch_all()
            self.fetched = getattr(self, "fetched", 0) + 1

        def __iter__(self):
            return (("wrapped", row) for row in super().__iter__())

        def explain_plan(self):
            return "my own"

    class Plain(Wrapping, QuerySet):
        pass

    class Derived(Wrapping, ParallelQuerySet):
        pass

    class Mixed(ParallelQuerySet, Plain):
        pass

    Article.objects.using(alias).bulk_create(Article() for _ in range(4))
    for queryset_class in (parallel(Plain), Derived, Mixed):
        queryset = queryset_class(Article, using=alias)
        assert queryset.count() == queryset.all().start_count().count() == 5
        assert queryset.exists() is queryset.all().start_exists().exists() is False
        inline, started = queryset.all(), queryset.all().start_fetch()
        assert list(inline) == list(started)
        assert started[0] == inline[0] == Article.objects.using(alias).order_by("pk")[0]
        assert started.fetched == inline.fetched
        assert list(queryset.chunked_iterator(3)) == list(queryset)
    assert parallel(Plain)(Article, using=alias).count(plus=2) == 6
    assert parallel(Plain)(Article, using=alias).explain_plan() == "my own"


def test_many_to_many_counts_ask_the_through_table_alone(rows):
    """Django's short cut, which it takes for its own manager class alone."""
    article = Article.objects.using(rows).get(name="n3")
    with CaptureQueriesContext(connections[rows]) as captured:
        assert (article.tags.count(), article.tags.exists()) == (3, True)
    assert len(captured) == 2
    assert not [query for query in captured if "JOIN" in query["sql"]]
    assert article.tags.filter(name="t0").count() == 1


def test_mixed_querysets_are_pickled_and_copied(alias):
    Note.objects.using(alias).bulk_create([Note(name="a!"), Note(name="b")])
    queryset = Note.objects.using(alias).loud()
    for again in (pickle.loads(pickle.dumps(queryset)), copy.deepcopy(queryset), copy.copy(queryset)):
        assert type(again) is type(queryset)
        assert [note.name for note in again] == ["a!"]


def test_managers_in_migrations():
    """use_in_migrations serializes each door, and what is written can be read again."""
    managers = dict(ModelState.from_model(Note).managers)
    assert list(managers) == ["objects"]
    text, imports = MigrationWriter.serialize(managers["objects"])
    assert text == "tests.testapp.models.OwnManager()"

    class Door(ParallelManager):
        use_in_migrations = True

    for manager, expected in (
        (ParallelManager(), "parallel_orm.managers.ParallelManager()"),
        (QuietQuerySet.as_manager(), "tests.testapp.models.QuietQuerySet.as_manager()"),
        (OwnManager(), "tests.testapp.models.OwnManager()"),
    ):
        manager.use_in_migrations = True
        text, imports = MigrationWriter.serialize(manager)
        assert text == expected
        namespace: dict[str, object] = {}
        for line in imports:
            exec(line, namespace)
        assert type(eval(text, namespace)).__mro__[1:] == type(manager).__mro__[1:]


def test_the_manager_itself():
    assert issubclass(ParallelManager, models.Manager)
    assert ParallelManager() == ParallelManager()
    assert ParallelManager.__name__ == "ParallelManager"
    assert ParallelManager.from_queryset(QuietQuerySet).__name__ == "ParallelManagerFromQuietQuerySet"
    assert isinstance(Article.objects.all(), ParallelQuerySet)
    assert type(Article.objects.all()) is ParallelQuerySet
    assert Article.objects.all().background == {}


def test_raw_querysets_are_djangos_own_besides(alias):
    Article.objects.using(alias).create(name="here")
    raw = Article.objects.raw("SELECT * FROM testapp_article", using=alias)
    assert isinstance(raw, models.query.RawQuerySet)
    assert [a.name for a in raw] == [a.name for a in raw.using(alias)] == ["here"]
    assert [a.name for a in raw.prefetch_related("tags")] == ["here"]
