"""chunked_iterator: the rows of list(queryset), in its order, in flat memory."""

from __future__ import annotations

import asyncio
import datetime
import gc
import uuid
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
from asgiref.sync import sync_to_async
from django.db import connections, transaction
from django.db.models import (
    Avg,
    Count,
    ExpressionWrapper,
    F,
    FilteredRelation,
    Func,
    IntegerField,
    Prefetch,
    Q,
    Value,
    Window,
)
from django.db.models.expressions import RawSQL
from django.db.models.functions import Coalesce, Lower, Power, RowNumber, TruncDay
from django.test.utils import CaptureQueriesContext
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from parallel_orm import errors, walk
from parallel_orm.ordering import keyset_of
from tests.testapp.models import (
    Article,
    Author,
    ByText,
    ByUuid,
    Everything,
    Label,
    Place,
    Profile,
    RankedArticle,
    Restaurant,
    Seat,
    Tag,
)

NEW_YEAR = datetime.datetime(2013, 1, 1, tzinfo=datetime.UTC)


@pytest.fixture
def articles(alias):
    """Fifty articles with gaps in their keys, ties, and NULLs in every column that may have them."""
    authors = [Author(name=f"author {n}", born=None if n == 1 else 1900 + n) for n in range(4)]
    Author.objects.using(alias).bulk_create(authors)
    authors = list(Author.objects.using(alias).order_by("pk"))
    Article.objects.using(alias).bulk_create(
        Article(
            pk=3 * n + (1000 if n > 30 else 1),
            name=f"name {n % 7}",
            score=None if n % 5 == 0 else n % 4,
            rank=n % 3,
            published=None if n % 6 == 0 else NEW_YEAR + datetime.timedelta(days=n % 8),
            author=None if n % 9 == 0 else authors[n % 4],
        )
        for n in range(50)
    )
    return Article.objects.using(alias)


def same(queryset, *, chunk_size=7):
    """Hold the walk of a queryset against its list; where its order leaves ties open, against the same rows."""
    return list(queryset.chunked_iterator(chunk_size)) == list(queryset)


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 49, 50, 51, 10**6, 10**30, None])
def test_every_row_once_in_the_order_of_the_primary_key(articles, chunk_size):
    walked = [article.pk for article in articles.chunked_iterator(chunk_size)]
    assert walked == list(articles.order_by("pk").values_list("pk", flat=True))


ORDERS = [
    ("pk",),
    ("-pk",),
    ("id",),
    ("name", "pk"),
    ("-name", "pk"),
    ("rank", "-name", "-pk"),
    ("score", "pk"),
    ("-score", "pk"),
    ("score", "-published", "rank", "pk"),
    (F("score").asc(nulls_first=True), "pk"),
    (F("score").asc(nulls_last=True), "pk"),
    (F("score").desc(nulls_first=True), "pk"),
    (F("score").desc(nulls_last=True), "-pk"),
    ("author__name", "pk"),
    ("-author__born", "author", "pk"),
    ("author_id", "pk"),
]


@pytest.mark.pairs
@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("chunk_size", [1, 7, 100])
def test_the_order_of_the_queryset_with_ties_and_nulls(articles, order, chunk_size):
    """Any order by columns, mixed directions, NULLs where the database or the queryset puts them."""
    assert same(articles.order_by(*order), chunk_size=chunk_size)
    assert same(articles.order_by(*order).reverse(), chunk_size=chunk_size)


@pytest.mark.parametrize("order", [("name",), ("-score",), ("author__born", "-rank")], ids=str)
def test_ties_are_broken_by_primary_key(articles, order):
    walked = list(articles.order_by(*order).chunked_iterator(4))
    assert walked == list(articles.order_by(*order, "pk"))


def test_every_order_ends_with_the_primary_key(default):
    """Else two rows may have the same key, and which of them comes first would be the database's choice each time."""
    articles = Article.objects.using(default)
    for queryset, paths in (
        (articles.all(), ("pk",)),
        (articles.order_by("name"), ("name", "pk")),
        (articles.order_by("-rank", "name", "rank"), ("rank", "name", "pk")),
        (articles.order_by("name", "-pk", "rank"), ("name", "pk")),
        (Seat.objects.using(default).order_by("taken"), ("taken", "row", "number")),
    ):
        assert keyset_of(queryset).paths == paths


def test_annotations_order_too(articles):
    """Stable ones: columns, and Django's functions of them."""
    annotated = articles.annotate(low=Lower("name"), some=Coalesce("score", -1), maybe=F("score") + F("rank"))
    for order in (("low", "pk"), ("-low", "some", "-pk"), ("maybe", "-low", "pk")):
        for chunk_size in (1, 7, 50):
            assert same(annotated.order_by(*order), chunk_size=chunk_size)
            assert same(annotated.order_by(*order).reverse(), chunk_size=chunk_size)


def test_meta_ordering_counts(alias, articles):
    """A model's own ordering, forwards and backwards, and dropped by order_by()."""
    ranked = RankedArticle.objects.using(alias)
    assert list(ranked.chunked_iterator(7)) == list(ranked.order_by("-rank", "name", "pk"))
    assert list(ranked.order_by().chunked_iterator(7)) == list(ranked.order_by("pk"))
    assert [a.rank for a in ranked.reverse().chunked_iterator(7)] == sorted(a.rank for a in ranked.all())


def test_every_kind_of_key(alias):
    """UUIDs, text, parent links, foreign keys and keys of two columns."""
    ByUuid.objects.using(alias).bulk_create(ByUuid(id=uuid.uuid5(uuid.NAMESPACE_DNS, str(n))) for n in range(1, 40))
    ByText.objects.using(alias).bulk_create(
        ByText(code=code)
        for code in ["", "a", "B", "b1", "ö2", "Ö3", "z z", "z-z", "ZZ", "10", "9", "é4", "e", "%", "_", "日本"]
    )
    Author.objects.using(alias).bulk_create(Author(name=f"a{n}") for n in range(20))
    Profile.objects.using(alias).bulk_create(Profile(author=a) for a in Author.objects.using(alias).all())
    for n in range(15):
        Restaurant(name=f"r{n % 4}", stars=n % 3).save(using=alias)
    Seat.objects.using(alias).bulk_create(Seat(row=row, number=n) for row in "CAB" for n in (3, 1, 2, 10))
    for model in (ByUuid, ByText, Profile, Restaurant, Place, Seat):
        rows = model.objects.using(alias)
        for queryset in (rows.order_by("pk"), rows.order_by("-pk")):
            assert list(queryset.chunked_iterator(4)) == list(queryset), model
        assert len(list(rows.chunked_iterator(4))) == rows.count()
    named = Restaurant.objects.using(alias).order_by("name", "-stars", "pk")
    assert list(named.chunked_iterator(2)) == list(named)


def test_rows_come_as_the_queryset_has_them(articles, alias):
    """values, values_list of each kind, only, defer, annotate, extra, select_related."""
    by_key = articles.order_by("pk")
    for queryset in (
        by_key.values(),
        by_key.values("name"),
        by_key.values("pk", "name"),
        by_key.values("name", upper=Lower("name")),
        by_key.values_list(),
        by_key.values_list("name"),
        by_key.values_list("name", "pk"),
        by_key.values_list("pk", flat=True),
        by_key.values_list("name", flat=True),
        by_key.values_list("name", "id", named=True),
        by_key.annotate(double=F("rank") * 2).values_list("double", "pk"),
        by_key.extra(select={"one": "1"}).values_list("one", "id"),
        by_key.distinct(),
        by_key.values("pk", "name").distinct(),
    ):
        assert list(queryset.chunked_iterator(7)) == list(queryset)
    (first, *_) = by_key.only("name").chunked_iterator(7)
    assert first.get_deferred_fields() == by_key.only("name")[0].get_deferred_fields() != set()
    connection = connections[alias]
    with CaptureQueriesContext(connection) as queries:
        names = [a.author and a.author.name for a in by_key.select_related("author").chunked_iterator(20)]
    assert len(queries) == 4  # the last key, and three pages
    assert names == [a.author and a.author.name for a in by_key]
    counted = by_key.annotate(double=F("rank") * 2, tagged=Count("tags"))
    assert [(a.pk, a.double, a.tagged) for a in counted.chunked_iterator(7)] == [
        (a.pk, a.double, a.tagged) for a in counted
    ]


def test_prefetches_are_made_a_chunk_at_a_time(articles, alias):
    tags = [Tag(name=f"t{n}") for n in range(3)]
    Tag.objects.using(alias).bulk_create(tags)
    tags = list(Tag.objects.using(alias).all())
    for n, article in enumerate(articles.order_by("pk")):
        article.tags.add(*tags[: n % 4])
    queryset = articles.order_by("pk").prefetch_related(
        "tags", Prefetch("tags", Tag.objects.filter(name="t0"), "firsts")
    )

    def names(article):
        return sorted(tag.name for tag in article.tags.all()), [tag.name for tag in article.firsts]

    expected = [names(article) for article in queryset]
    with CaptureQueriesContext(connections[alias]) as queries:
        walked = [names(article) for article in queryset.chunked_iterator(20)]
    assert walked == expected
    assert len(queries) == 1 + 3 * 3


def test_a_join_that_repeats_rows_repeats_them(articles, alias):
    """A row that a join gives several times comes as often as in the list, also across chunks of one."""
    tags = [Tag(name=f"t{n}") for n in range(4)]
    Tag.objects.using(alias).bulk_create(tags)
    tags = list(Tag.objects.using(alias).all())
    for n, article in enumerate(articles.order_by("pk")):
        article.tags.add(*tags[: n % 5])
    joined = articles.filter(tags__name__startswith="t").order_by("pk")
    expected = [a.pk for a in joined]
    assert len(expected) > len(set(expected))
    for chunk_size in (1, 2, 3, 50):
        assert [a.pk for a in joined.chunked_iterator(chunk_size)] == expected
        assert [a.pk for a in joined.distinct().chunked_iterator(chunk_size)] == sorted(set(expected))
        pairs = joined.values_list("pk", "tags__name")
        assert sorted(pairs.chunked_iterator(chunk_size)) == sorted(pairs)


def test_slices_keep_their_rows_and_their_order(articles):
    for queryset in (
        articles.order_by("-name", "pk")[3:33],
        articles.order_by("pk")[:10],
        articles.order_by("pk")[45:],
    ):
        assert list(queryset.chunked_iterator(4)) == list(queryset)
    assert list(articles[5:20].chunked_iterator(4)) == list(articles.order_by("pk")[5:20]), "as rows lie, else"
    assert list(articles.order_by("pk")[5:5].chunked_iterator()) == []


def test_empty_ones_end_at_once(alias):
    assert list(Article.objects.using(alias).chunked_iterator()) == []
    assert list(Article.objects.using(alias).none().chunked_iterator()) == []
    assert list(Article.objects.using(alias).filter(pk__in=[]).chunked_iterator()) == []


def test_the_number_of_queries(articles, alias):
    """Nothing before the first next(); then the last key and one query a page."""
    with CaptureQueriesContext(connections[alias]) as queries:
        walk = articles.chunked_iterator(20)
        assert len(queries) == 0
        next(walk)
        assert len(queries) == 2
        assert len(list(walk)) == 49
        assert len(queries) == 4


def test_a_walk_of_one_chunk_is_one_query(articles, alias):
    with CaptureQueriesContext(connections[alias]) as queries:
        assert len(list(articles.order_by("pk").chunked_iterator())) == articles.count()
    assert len(queries) == 2, "the walk's, and count()'s"


@pytest.mark.parametrize(
    ("text", "lengths"), [("x", [200, 400, 800, 100]), ("x" * 20_000, [200, 100, 100, 30])], ids=["slim", "wide"]
)
def test_pages_are_as_large_as_their_rows_are_small(alias, monkeypatch, text, lengths):
    """At most twice or half as large as the one before. Not where somebody said how many rows a chunk is to have."""
    monkeypatch.setattr("parallel_orm.plan.WALK_CHUNK_SIZE", 200)
    number = sum(lengths)
    authors = Author.objects.using(alias).bulk_create(Author(name="a") for _ in range(number))
    Profile.objects.using(alias).bulk_create([Profile(author=author, bio=text) for author in authors], batch_size=100)
    seen = []
    read_chunk = walk.read_chunk
    monkeypatch.setattr(walk, "read_chunk", lambda plan, chunk: seen.append(rows := read_chunk(plan, chunk)) or rows)
    monkeypatch.setattr(walk, "helps", lambda reading, using: False)  # what is read ahead is read by others
    profiles = Profile.objects.using(alias).order_by("pk")
    assert sum(1 for _ in profiles.chunked_iterator()) == number
    assert [len(rows) for rows in seen] == lengths
    seen.clear()
    assert sum(1 for _ in profiles.chunked_iterator(150)) == number
    assert {len(rows) for rows in seen[:-1]} == {150}
    assert {len(rows) for rows in profiles.chunks()} <= {200, number % 200}


def test_how_large_a_page_is():
    assert walk.as_large(2_000, size=450) == 4_000
    assert walk.as_large(3_000, size=450) == 4_444
    assert walk.as_large(4_444, size=455) == walk.as_large(4_444, size=445) == 4_444, "so its SQL is the same"
    assert walk.as_large(4_000, size=10) == 8_000
    assert walk.as_large(8_000, size=10) == 10_000
    assert walk.as_large(2_000, size=1_000_000) == 1_000
    assert walk.as_large(150, size=1_000_000) == 100


def test_rows_that_come_and_go(articles, alias):
    """Rows that are there throughout come once; a walk that inserts behind its own cursor ends."""
    before = list(articles.order_by("pk").values_list("pk", flat=True))
    gone, seen = set(before[10::10]), []
    for article in articles.chunked_iterator(4):
        seen.append(article.pk)
        Article(name="new", pk=article.pk + 100_000).save(using=alias, force_insert=True)
        if article.pk == before[8]:
            articles.filter(pk__in=gone).delete()
            Article(name="ahead", pk=before[-1] - 1).save(using=alias, force_insert=True)
    stayed = [pk for pk in before if pk not in gone]
    assert [pk for pk in seen if pk in set(stayed)] == stayed
    assert len(seen) == len(set(seen))
    assert not [pk for pk in seen if pk > before[-1]]


def test_ranges_end_too_when_rows_are_added_behind(articles, alias):
    """Where bounds are looked up, the look-ups stop at the last key of the beginning."""
    seen = 0
    for _ in articles.values_list("name", flat=True).chunked_iterator(4):
        seen += 1
        assert seen <= 50
        Article(name="behind", pk=10_000 + seen).save(using=alias, force_insert=True)
    assert seen == 50


def test_the_row_that_ended_a_page_may_vanish(articles):
    """The next page begins behind a key, not behind a row."""
    walked = []
    for article in articles.order_by("name", "pk").chunked_iterator(5):
        walked.append(article.pk)
        articles.filter(pk=article.pk).delete()
    assert len(walked) == 50


def test_memory_is_that_of_two_chunks(articles):
    """Rows of earlier chunks are let go while the walk goes on."""
    alive: list[weakref.ref[Article]] = []
    most = 0
    for article in articles.chunked_iterator(5):
        alive.append(weakref.ref(article))
        most = max(most, sum(ref() is not None for ref in alive))
        del article
    gc.collect()
    assert most <= 10


def test_a_walk_stays_in_the_callers_transaction(articles, alias):
    """It reads on the caller's connection, so it sees what the caller wrote, and select_for_update holds."""
    with transaction.atomic(using=alias):
        Article(name="mine", pk=5).save(using=alias, force_insert=True)
        assert 5 in {a.pk for a in articles.chunked_iterator(7)}
        locked = articles.select_for_update().order_by("pk")
        assert [a.pk for a in locked.chunked_iterator(7)] == [a.pk for a in locked]
        transaction.set_rollback(True, using=alias)


def test_a_walk_that_is_left_half_way_leaves_nothing(articles, alias):
    for article in articles.chunked_iterator(5):
        if article.pk > 20:
            break
    assert articles.count() == 50  # the connection is free


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.tuples(
            st.one_of(st.none(), st.integers(-2, 2)), st.integers(0, 2), st.sampled_from(["a", "B", "b", "A", ""])
        ),
        max_size=25,
    ),
    order=st.lists(
        st.sampled_from(["score", "-score", "rank", "-rank", "name", "-name"]),
        max_size=3,
        unique_by=lambda o: o.strip("-"),
    ),
    chunk_size=st.integers(1, 9),
    backwards=st.booleans(),
)
def test_every_row_once_in_order_for_any_rows_and_any_order(alias, rows, order, chunk_size, backwards):
    """The law, over NULLs, ties, text that a collation holds equal, and chunks of any size."""
    articles = Article.objects.using(alias)
    articles.all().delete()
    articles.bulk_create(Article(score=score, rank=rank, name=name) for score, rank, name in rows)
    queryset = articles.order_by(*order, "pk")
    if backwards:
        queryset = queryset.reverse()
    assert [a.pk for a in queryset.chunked_iterator(chunk_size)] == [a.pk for a in queryset]


def refused(queryset):
    with pytest.raises(errors.UnsupportedQuerySet) as refusal:
        queryset.chunked_iterator()
    return str(refusal.value)


def test_what_cannot_be_walked_truthfully_is_refused_by_name(articles):
    assert "union" in refused(articles.values("pk").union(articles.values("pk")))
    assert "window" in refused(articles.annotate(n=Window(RowNumber(), order_by="pk")))
    assert "groups" in refused(articles.values("rank").annotate(n=Avg("rank")).order_by("n"))
    assert "another order each time" in refused(articles.order_by("?"))
    assert "has many of" in refused(articles.order_by("tags__name"))
    assert "has many of" in refused(articles.order_by("pk", "tags__name"))
    assert "has many of" in refused(articles.distinct().order_by("tags__name"))
    assert "raw SQL" in refused(Article.objects.raw("SELECT * FROM testapp_article"))
    assert "distinct" in refused(articles.datetimes("published", "hour"))
    for verb in ("chunks", "achunked_iterator", "achunks"):
        with pytest.raises(errors.UnsupportedQuerySet, match=verb):
            getattr(articles.order_by("?"), verb)()
        with pytest.raises(errors.UnsupportedQuerySet, match=verb):
            getattr(Article.objects.raw("SELECT 1"), verb)()


def test_a_generic_relation_repeats_rows_too(default):
    """Its join says that it finds one row; its columns say that it may find many."""
    articles = Article.objects.using(default)
    articles.bulk_create(Article(rank=n) for n in range(50))
    for n, article in enumerate(articles.order_by("pk")):
        for _ in range(n % 3):
            Label.objects.using(default).create(content=article, text="l")
    labelled = articles.filter(labels__text="l").order_by("pk")
    expected = [a.pk for a in labelled]
    assert len(expected) > len(set(expected))
    for chunk_size in (1, 2, 50):
        assert [a.pk for a in labelled.chunked_iterator(chunk_size)] == expected
    with pytest.raises(errors.UnsupportedQuerySet, match="same row several times"):
        labelled.order_by("name", "pk").parallel_map(len, threads=2)


def test_what_is_selected_of_many_repeats_rows_under_distinct(articles, alias, default):  # default: content types
    tags = [Tag.objects.using(alias).create(name=f"t{n}") for n in range(3)]
    for n, article in enumerate(articles.order_by("pk")):
        article.tags.add(*tags[: n % 4])
    for queryset in (
        articles.annotate(t=F("tags__id")).distinct(),
        articles.annotate(t=F("tags__id"), n=Count("labels")),
    ):
        expected = sorted((a.pk, a.t or 0) for a in queryset)
        assert len(expected) > 50
        for chunk_size in (1, 3):
            assert sorted((a.pk, a.t or 0) for a in queryset.chunked_iterator(chunk_size)) == expected


def test_orders_that_do_not_come_back_as_they_are_stored(articles, alias):
    """As a bound such a value would skip rows, or find the same one for ever: keys are listed instead, and why."""
    Everything.objects.using(alias).bulk_create(
        Everything(boolean=True, decimal=f"{n % 3}.10", json=[n % 4, None][n % 2], mood="aBc"[n % 3]) for n in range(9)
    )
    everything = Everything.objects.using(alias)
    listed = [
        (everything.order_by("mood", "pk"), "from_db_value"),
        (articles.order_by(TruncDay("published"), "pk"), "may not come back"),
        (articles.annotate(root=Power("rank", 0.5)).order_by("root", "pk"), "may not come back"),
        (
            articles.annotate(whole=ExpressionWrapper(F("rank") * 0.5, IntegerField())).order_by("whole", "pk"),
            "come back",
        ),
        (articles.annotate(r=RawSQL("rank + 0", ())).order_by("r", "pk"), "otherwise in the next query"),
        (
            articles.annotate(r=Func("rank", function="ABS", output_field=IntegerField())).order_by("r", "pk"),
            "otherwise",
        ),
        (articles.annotate(n=Count("tags")).order_by("n", "pk"), "otherwise in the next query"),
        (articles.extra(order_by=["rank", "-id"]), "SQL that cannot be compared"),
    ]
    if connections[alias].vendor == "sqlite":
        listed.append((everything.order_by("decimal", "pk"), "decimal"))
    if connections[alias].vendor == "postgresql":
        listed.append((everything.order_by("json", "pk"), "JSON"))
    for queryset, why in listed:
        plan = queryset.explain_plan(walk=True)
        assert (plan.cut, why in plan.why) == ("keys", True), plan
        assert same(queryset, chunk_size=4), why
    if connections[alias].vendor != "sqlite":
        assert everything.order_by("decimal", "pk").explain_plan(walk=True).cut == "pages"
        assert same(everything.order_by("decimal", "pk"), chunk_size=2)
    hot = articles.annotate(hot=Q(rank__gt=1)).order_by("hot", "pk")
    assert hot.explain_plan(walk=True).cut == "ranges"
    assert same(hot)


def test_long_text_on_mariadb(mariadb):
    """It is sorted by its first 1,024 bytes, but compared by all: as a bound it would part what sorts as equal."""
    authors = Author.objects.using(mariadb).bulk_create(Author(name=str(n)) for n in range(4))
    authors = Author.objects.using(mariadb).order_by("pk")
    Profile.objects.using(mariadb).bulk_create(
        Profile(author=author, bio="x" * 2000 + end) for author, end in zip(authors, "bacd", strict=True)
    )
    assert same(Profile.objects.using(mariadb).order_by("bio", "pk"), chunk_size=1)


def test_every_chunk_as_a_list(articles, alias):
    """None of them is empty, and each is a list of its own."""
    assert [len(rows) for rows in articles.chunks(20)] == [20, 20, 10]
    assert [row for rows in articles.order_by("-name", "pk").chunks(7) for row in rows] == list(
        articles.order_by("-name", "pk")
    )
    assert list(articles.none().chunks()) == list(Article.objects.using(alias).filter(rank=9).chunks()) == []
    with CaptureQueriesContext(connections[alias]) as queries:
        chunks = articles.chunks(25)
        assert len(queries) == 0
        next(chunks)
        assert len(queries) == 2
        chunks.close()


def test_in_a_coroutine(articles, alias):
    """In the thread that has the connections of async code; a loop that is left half-way ends the walk."""

    async def walk():
        rows = [row.pk async for row in articles.achunked_iterator(7)]
        lists = [len(rows) async for rows in articles.achunks(20)]
        async for _row in articles.order_by("-pk").achunked_iterator(3):
            break
        with pytest.raises(errors.InvalidOption):
            articles.achunked_iterator(0)
        await sync_to_async(connections.close_all)()
        return rows, lists, _row.pk

    pks = list(articles.order_by("pk").values_list("pk", flat=True))
    assert asyncio.run(walk()) == (pks, [20, 20, 10], pks[-1])


def test_names_that_hide_the_key(articles):
    assert "'id' is not its primary key" in refused(articles.extra(select={"id": "rank"}))
    assert "'pk' is not its primary key" in refused(articles.values("name", pk=F("rank")))


def test_groups_by_another_rows_key_are_groups(articles):
    for queryset in (
        Author.objects.using(articles.db).values("articles__id").annotate(n=Count("pk")).order_by("articles__id"),
        articles.values("author__id").annotate(n=Count("pk")).order_by("author__id"),
    ):
        assert same(queryset, chunk_size=3)


def test_groups_of_what_they_are_given_later(articles):
    """SQL groups by that too, so it tells groups apart."""
    ranks = articles.values("rank").annotate(n=Count("pk"))
    for queryset in (ranks.annotate(late=F("name")), ranks.values("score", "n"), ranks.annotate(late=F("score") * 2)):
        assert sorted(queryset.chunked_iterator(3), key=repr) == sorted(queryset, key=repr)


def test_windows_in_an_order_or_in_sql_are_refused(articles):
    window = Window(RowNumber(), order_by="rank")
    with pytest.raises(errors.UnsupportedQuerySet, match="window"):
        articles.order_by(window, "pk").parallel_map(len, threads=2)
    assert "window" in refused(articles.extra(select={"n": "row_number() over (order by rank)"}))


def test_rows_locked_of_several_tables(articles, alias):
    if not connections[alias].features.has_select_for_update_of:
        return
    with transaction.atomic(using=alias):
        locked = articles.filter(author__isnull=False).select_related("author").select_for_update(of=("self", "author"))
        assert len(list(locked.chunked_iterator(7))) == locked.count()


def test_an_order_whose_join_decides_which_rows_there_are(articles):
    born = FilteredRelation("author", condition=Q(author__born__gt=1901))
    joined = articles.annotate(born=born).order_by("born__name", "pk")
    expected = [a.pk for a in joined]
    for ordered in (True, False):
        results = joined.parallel_map(lambda a: a.pk, threads=2, chunk_size=7, ordered=ordered)
        assert sorted(results) == sorted(expected)


def test_an_order_by_what_is_the_same_for_all(articles):
    constant = articles.annotate(k=Value(1), q=Value("q")).order_by("k", "-q", "-rank", "pk")
    assert constant.parallel_map(lambda a: a.pk, threads=2, chunk_size=7) == [a.pk for a in constant]


def test_an_error_while_keys_are_listed_is_the_callers(default, monkeypatch):
    ByText.objects.using(default).bulk_create(ByText(code=str(n)) for n in range(9))
    given = iter(range(5))

    def convert(value, expression, connection):
        next(given, None) is not None or int(None)  # a TypeError, as append() raises one
        return int(value)

    field = ByText._meta.pk
    monkeypatch.setattr(field, "from_db_value", convert, raising=False)
    for cached in ("db_returning", "cached_col"):
        field.__dict__.pop(cached, None)
    with pytest.raises(TypeError):
        list(ByText.objects.using(default).order_by("code")[:9].chunked_iterator(2))


@pytest.mark.parametrize("chunk_size", [0, -1, 1.5, "10", True, False])
def test_a_chunk_size_that_is_none(chunk_size):
    with pytest.raises(errors.InvalidOption, match="chunk_size must be a whole number"):
        Article.objects.chunked_iterator(chunk_size)


def test_a_database_that_there_is_not():
    with pytest.raises(errors.UnknownAlias, match="no database 'nowhere'"):
        Article.objects.using("nowhere").chunked_iterator()


def test_conditions_of_the_queryset_go_on(articles):
    queryset = (
        articles.filter(Q(score__gt=1) | Q(score=None)).exclude(name="name 3").annotate(x=Value(1)).order_by("-pk")
    )
    assert same(queryset)


def test_in_a_coroutine_whose_thread_has_no_connection(articles):
    """Nothing is asked where Django allows no query; on MariaDB, which must be, in the thread of async code."""

    async def walk():
        queryset = articles.filter(Q(author__name="author 1") | Q(rank=1)).annotate(low=Lower("name"), n=Count("tags"))
        walks = [
            queryset.order_by("pk"),
            queryset.order_by("low", "-score"),
            queryset.order_by("n"),
            articles.values("rank").annotate(n=Count("pk")),
            articles.order_by("pk")[3:9],
        ]
        found = [[row async for row in each.achunked_iterator(7)] for each in walks]
        await sync_to_async(connections.close_all)()
        return list(map(len, found))

    with ThreadPoolExecutor(1) as thread:
        lengths = thread.submit(lambda: asyncio.run(walk())).result(60)
    assert lengths[:2] == [lengths[0]] * 2
    assert lengths[3:] == [3, 6]


def test_nothing_stays_open_between_chunks(articles, alias):
    """Each chunk may find another session of the server, as behind PgBouncer in transaction mode."""
    for queryset in (
        articles.order_by("pk"),
        articles.order_by("-name", "pk"),
        articles.order_by("author__name", "pk").values("name"),
        articles.order_by(TruncDay("published"), "-pk"),
        articles.order_by("pk")[5:40],
        articles.values("rank").annotate(n=Count("pk")).order_by("rank"),
    ):
        expected, walked = list(queryset), []
        for rows in queryset.chunks(7):
            walked += rows
            connections[alias].close()
        assert walked == expected


def test_without_server_side_cursors(postgres, monkeypatch):
    monkeypatch.setitem(connections[postgres].settings_dict, "DISABLE_SERVER_SIDE_CURSORS", True)
    articles = Article.objects.using(postgres)
    articles.bulk_create(Article(rank=n) for n in range(30))
    for queryset in (articles.order_by("pk"), articles.order_by("-rank"), articles.order_by("-rank")[3:20]):
        assert list(queryset.chunked_iterator(7)) == list(queryset)
