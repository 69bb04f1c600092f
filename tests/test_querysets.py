"""Every row of the table in docs/reference/querysets.md: the cut that is used, and that it gives what list() gives."""

from __future__ import annotations

import datetime
import re
from pathlib import Path

import pytest
from django.contrib.contenttypes.models import ContentType
from django.db import connections, transaction
from django.db.models import Avg, Count, Exists, F, FloatField, Max, OuterRef, Prefetch, Sum, Window
from django.db.models.expressions import RawSQL
from django.db.models.functions import Cast, Lower, Power, Random, RowNumber, TruncHour, Upper
from django.db.models.lookups import GreaterThanOrEqual

from parallel_orm import ParallelQuerySet, cutting, errors
from parallel_orm.ordering import is_random
from parallel_orm.workers import as_worker
from tests.testapp.models import (
    Article,
    Author,
    ByDecimal,
    ByMoment,
    ByText,
    ByUuid,
    ByWideDecimal,
    Everything,
    PlainArticle,
    Profile,
    RankedArticle,
    Restaurant,
    Seat,
    Tag,
    Visit,
)

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "querysets.md"
NEW_YEAR = datetime.datetime(2013, 1, 1, tzinfo=datetime.UTC)


def table():
    """The rows of the table, by their first cell: what the walk and the map do."""
    text = PAGE.read_text().split("## The table")[1].split("\n\n(a)")[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {first: (walk, map_) for first, _, walk, map_ in rows[2:]}


CASES = {
    "`all()`, `filter()`, `exclude()`": lambda a: [
        a.all(),
        a.filter(rank=1),
        a.exclude(score=None).order_by("pk"),
    ],
    "`only()`, `defer()`, `select_related()`, `annotate(Upper(...))`, `annotate(Exists(...))`, "
    "`alias(...)`": lambda a: [
        a.only("name"),
        a.defer("rank"),
        a.select_related("author"),
        a.annotate(up=Upper("name")),
        a.annotate(tagged=Exists(Tag.objects.filter(articles=OuterRef("pk")))).filter(tagged=True),
        a.alias(up=Upper("name")).filter(up="NAME 1").order_by("-pk"),
    ],
    "`extra(select=...)`": lambda a: [a.extra(select={"one": "1"}).order_by("pk")],
    "`prefetch_related()`, `Prefetch(to_attr=...)`": lambda a: [
        a.prefetch_related("tags", Prefetch("tags", Tag.objects.filter(name="t0"), "firsts")).order_by("pk")
    ],
    '`annotate(Count("tags"))`': lambda a: [a.annotate(n=Count("tags")).order_by("pk"), a.annotate(n=Count("tags"))],
    '`values("id", "name")`, `values_list("name", "id")`, `values_list("id", named=True)`, '
    '`values_list("pk", flat=True)`': lambda a: [
        a.values("id", "name").order_by("pk"),
        a.values(),
        a.values_list("name", "id"),
        a.values_list("id", named=True).order_by("-pk"),
        a.values_list("pk", flat=True),
    ],
    '`values("name")`, `values_list("name", flat=True)`': lambda a: [
        a.values("name").order_by("pk"),
        a.values_list("name", flat=True).order_by("-pk"),
    ],
    '`values("pk").annotate(Count("tags"))`': lambda a: [a.values("pk").annotate(n=Count("tags")).order_by("pk")],
    '`values("rank").annotate(Count("id"))`: groups, in no order or that of their columns': lambda a: [
        a.values("rank").annotate(n=Count("id")),
        a.values("rank").annotate(n=Count("id")).order_by("rank"),
        a.values("rank", "score").annotate(n=Count("id"), top=Sum("rank")).order_by("-rank", "score"),
        a.values("score").annotate(n=Count("id")).order_by(F("score").desc(nulls_last=True)),
        a.values_list("name", "rank").annotate(n=Count("id")).filter(n__gt=1).order_by("name", "-rank"),
        a.values("author").annotate(n=Count("id")).order_by("author"),
        a.annotate(low=Lower("name")).values("low").annotate(n=Count("id")).order_by("-low"),
        RankedArticle.objects.using(a.db).values("rank").annotate(n=Count("id")),
    ],
    "the same without the columns in the rows, or by columns of a relation: "
    '`values("author__name").annotate(...)`': lambda a: [
        a.values("rank").annotate(n=Count("id")).values("n").order_by("rank"),
        a.values("author__name").annotate(n=Count("id")).order_by("author__name"),
        a.values("author__name").annotate(n=Count("id")),
        a.values("tags__name").annotate(n=Count("id")).order_by("-tags__name"),
        a.values("tags__name").annotate(n=Count("id")),
    ],
    "groups in the order of an aggregate that is an integer, or of the largest or smallest of a column": lambda a: [
        a.values("rank").annotate(n=Count("id")).order_by("-n", "rank"),
        a.values("name").annotate(n=Count("id"), s=Sum("rank")).order_by("n", "-s", "name"),
        a.values("rank").annotate(last=Max("published")).order_by("-last", "rank"),
    ],
    'groups in the order of an aggregate that may be rounded: `Avg("rank")`': lambda a: [
        a.values("name").annotate(mean=Avg("rank")).order_by("mean")
    ],
    '`distinct()`, `values("pk", "rank").distinct()`': lambda a: [
        a.distinct().order_by("pk"),
        a.values("pk", "rank").distinct(),
    ],
    '`values("rank").distinct()`, `dates()`': lambda a: [
        a.values("rank").distinct(),
        a.values_list("rank", "score").distinct().order_by("score", "-rank"),
        a.values_list("name", flat=True).distinct().order_by("-name"),
        a.annotate(low=Lower("name")).values_list("low", "rank").distinct().order_by("low", "rank"),
        a.dates("published", "day"),
        a.dates("published", "month", order="DESC"),
    ],
    "the same ordered by a column that is not selected": lambda a: [
        a.values("name").distinct().order_by("rank", "name"),
        a.values_list("name", flat=True).distinct().order_by("-author__name", "name"),
    ],
    '`values("floating").distinct()` of something computed that may be rounded, `datetimes()`': lambda a: [
        a.annotate(root=Power("rank", 0.5)).values("root").distinct(),
        a.datetimes("published", "hour"),
    ],
    '`distinct("rank")` (PostgreSQL)': lambda a: [
        a.order_by("rank", "-name", "pk").distinct("rank"),
        a.order_by("-rank", "name", "-pk").distinct("rank"),
        a.order_by("-score", "rank", "-pk").distinct("rank", "score"),
        a.order_by("score", "-name", "pk").distinct("score").reverse(),
        a.order_by("score", "rank").distinct("score", "rank").values("score", "rank"),
        a.order_by("-score").distinct("score").values_list("score"),
        a.order_by("name", "rank", "-pk").distinct("name").values("name", "rank", "id"),
    ],
    'a join that repeats rows: `filter(tags__name__startswith="t")`, `extra(tables=...)`': lambda a: [
        a.filter(tags__name__startswith="t").order_by("pk"),
        a.extra(tables=["testapp_tag"]).order_by("pk"),
    ],
    "the same with `distinct()`, of instances": lambda a: [
        a.filter(tags__name__startswith="t").distinct().order_by("pk")
    ],
    "the same with an order by a column": lambda a: [a.filter(tags__name__startswith="t").order_by("name", "pk")],
    "the same with a slice": lambda a: [a.filter(tags__name__startswith="t").order_by("pk")[:9]],
    '`order_by("pk")`, `order_by("-pk")`': lambda a: [a.order_by("pk"), a.order_by("-pk"), a.order_by("id")],
    '`order_by("-rank", "name")`, `reverse()`, `Meta.ordering`': lambda a: [
        a.order_by("-rank", "name", "pk"),
        a.order_by("rank", "-name", "-pk").reverse(),
        a.order_by("name", "pk").values_list("pk", "name"),
        RankedArticle.objects.using(a.db).order_by("-rank", "name", "pk"),
    ],
    'the same of rows that do not bring these columns: `only("name").order_by("rank")`': lambda a: [
        a.only("name").order_by("rank", "pk"),
        a.values("name").order_by("rank", "pk"),
    ],
    'a nullable column; `F("score").desc(nulls_last=True)`': lambda a: [
        a.order_by("score", "pk"),
        a.order_by("-score", "-pk"),
        a.order_by("published", "-score", "pk"),
        *(
            a.order_by(F("score").asc(**{nulls: True}), "pk")
            if up
            else a.order_by(F("score").desc(**{nulls: True}), "pk")
            for nulls in ("nulls_first", "nulls_last")
            for up in (True, False)
        ),
    ],
    '`order_by("author")`': lambda a: [a.order_by("author", "pk"), a.order_by("-author_id", "pk")],
    '`order_by("author__name")`': lambda a: [a.order_by("author__name", "pk"), a.order_by("-author__born", "pk")],
    '`order_by("place")`, whose model has a `Meta.ordering`': lambda a: [
        Visit.objects.using(a.db).order_by("place", "pk")
    ],
    '`order_by(Lower("name"))`, `order_by("published__year")`, `annotate(low=Lower("name")).order_by("low")`, '
    '`alias(low=...).order_by("low")`': lambda a: [
        a.order_by(Lower("name"), "pk"),
        a.order_by(Lower("author__name").desc(), "-pk"),
        a.order_by("published__year", "-published__day", "pk"),
        a.annotate(low=Lower("name")).order_by("low", "-pk"),
        a.alias(low=Lower("name")).order_by("-low", "pk"),
        a.order_by(F("rank") + F("score"), "pk"),
        a.order_by((F("rank") * 2).desc(nulls_last=True), "pk").reverse(),
    ],
    "an order by a float, a decimal or a point in time that is computed; by JSON; by a decimal on SQLite; by text or "
    "bytes without a length on MySQL and MariaDB; by a field with a `from_db_value` of its own; "
    "`extra(order_by=...)`": lambda a: [
        a.order_by(Power("rank", 0.5), "pk"),
        a.order_by(Cast("score", FloatField()) / 3, "pk"),
        a.order_by(TruncHour("published").desc(), "pk"),
        a.extra(order_by=["-rank", "id"]),
        Everything.objects.using(a.db).order_by("mood", "pk"),
        *(
            [Everything.objects.using(a.db).order_by("decimal", "pk")]
            if connections[a.db].vendor == "sqlite"
            else [Profile.objects.using(a.db).order_by("bio", "pk")]
            if connections[a.db].vendor == "mysql"
            else [Everything.objects.using(a.db).order_by("json", "pk")]
        ),
    ],
    '`annotate(n=Count("tags")).order_by("n")`, `annotate(r=Random()).order_by("r")`': lambda a: [
        a.annotate(n=Count("tags")).order_by("-n", "pk")
    ],
    '`order_by("tags__name")`, `order_by("pk", "tags__name")`: many values for a row': lambda a: [
        a.order_by("tags__name"),
        a.order_by("pk", "tags__name"),
    ],
    '`annotate(t=F("tags__id")).distinct()`': lambda a: [a.annotate(t=F("tags__id")).distinct()],
    '`extra(select={"id": ...})`, `values(pk=...)`: a name that hides the key': lambda a: [
        a.extra(select={"id": "rank"}),
        a.values("name", pk=F("rank")),
    ],
    "a composite primary key with `distinct()`": lambda a: [Seat.objects.using(a.db).distinct()],
    '`order_by("?")`': lambda a: [a.order_by("?"), a.order_by(Random())],
    'a slice: `order_by("name")[10:410]`': lambda a: [a.order_by("name", "pk")[10:41], a.order_by("-pk")[:7]],
    'a slice of `order_by("?")`': lambda a: [a.order_by("?")[:50]],
    "a slice without an order": lambda a: [a.all()[:50]],
    "`union()`, `intersection()`, `difference()` of instances of one model, in an order or none, "
    "sliced or not": lambda a: [
        a.filter(rank=1).union(a.filter(rank=2)),
        a.filter(rank=1).union(a.filter(rank__gt=0), a.filter(tags__name="t0")).order_by("-name", "pk"),
        a.filter(rank=1).union(a.filter(rank__gt=0)).order_by("name", "-pk")[2:20],
        a.filter(rank__gt=0).intersection(a.filter(score=1)).order_by("pk"),
        a.filter(rank__gt=0).difference(a.filter(score=1)).order_by("-pk"),
        a.filter(rank=1).union(a.filter(rank=2), all=True).order_by("pk"),
        a.filter(rank=0).select_related("author").union(a.filter(rank=2).select_related("author")).order_by("pk"),
    ],
    "`union(all=True)` in which a row comes twice": lambda a: [
        a.filter(rank=1).union(a.filter(rank__gt=0), all=True).order_by("pk")
    ],
    "`union()`, `intersection()`, `difference()` of `values()`, of two models, or with annotations": lambda a: [
        a.values_list("name").union(a.values_list("name")),
        a.annotate(one=Upper("name")).union(a.annotate(one=Upper("name"))),
        a.values_list("pk", "name").difference(Tag.objects.using(a.db).values_list("pk", "name")),
    ],
    "a window function": lambda a: [
        a.annotate(n=Window(RowNumber(), order_by="pk")),
        a.order_by(Window(RowNumber(), order_by="rank"), "pk"),
    ],
    "`select_for_update()`": lambda a: [a.select_for_update().order_by("pk")],
    "`raw()`": lambda a: [Article.objects.using(a.db).raw("SELECT * FROM testapp_article")],
    "a key that is a uuid, text, a date and time, a decimal, bytes, or a foreign key": lambda a: [
        model.objects.using(a.db).order_by(order)
        for model in (ByUuid, ByText, ByMoment, ByDecimal, Profile)
        for order in ("pk", "-pk")
    ],
    "a decimal key of more than 15 digits on SQLite, which keeps 15": lambda a: [
        ByWideDecimal.objects.using(a.db).order_by("pk")
    ],
    "a model that inherits from another (its key is the link to its parent)": lambda a: [
        Restaurant.objects.using(a.db).order_by("pk"),
        Restaurant.objects.using(a.db).order_by("-pk"),
    ],
    "a composite primary key": lambda a: [
        Seat.objects.using(a.db).order_by("pk"),
        Seat.objects.using(a.db).order_by("-pk"),
        Seat.objects.using(a.db).all(),
    ],
    "a related manager of many to many: `tag.articles`": lambda a: [
        Tag.objects.using(a.db).order_by("pk")[0].articles.order_by("-pk"),
        Tag.objects.using(a.db).order_by("pk")[0].articles.all(),
    ],
    "a proxy model, a related manager: `author.articles`": lambda a: [
        RankedArticle.objects.using(a.db).order_by("pk"),
        Author.objects.using(a.db).order_by("pk")[0].articles.order_by("pk"),
    ],
    "an evaluated queryset": lambda a: [],
    "an empty queryset, `none()`": lambda a: [a.filter(rank=99), a.none()],
}


@pytest.fixture
def articles(alias):
    """Fifty articles with gaps in their keys, ties, and NULLs; and some rows of every other model."""
    Author.objects.using(alias).bulk_create(Author(name=f"author {n}", born=1900 + n if n else None) for n in range(4))
    Tag.objects.using(alias).bulk_create(Tag(name=f"t{n}") for n in range(3))
    authors, tags = (list(model.objects.using(alias).order_by("pk")) for model in (Author, Tag))
    articles = Article.objects.using(alias)
    articles.bulk_create(
        Article(
            pk=3 * n + (1000 if n > 30 else -40),
            name=f"{'NN' if n % 2 else 'nn'}ame {n % 7}",
            score=None if n % 5 == 0 else n % 4,
            rank=n % 3,
            published=None if n % 6 == 0 else NEW_YEAR + datetime.timedelta(days=50 * (n % 8), seconds=n),
            author=None if n % 9 == 0 else authors[n % 4],
        )
        for n in range(1, 51)
    )
    through = Article.tags.through
    through.objects.using(alias).bulk_create(
        through(article_id=pk, tag=tag)
        for n, pk in enumerate(articles.values_list("pk", flat=True))
        for tag in tags[: n % 4]
    )
    Everything.objects.using(alias).bulk_create(
        Everything(
            boolean=True, decimal=f"{n % 4}.10", json={"n": n % 3}, floating=n / 7, mood="Ab"[n % 2], binary=bytes([n])
        )
        for n in range(12)
    )
    ByUuid.objects.using(alias).bulk_create(ByUuid(number=n) for n in range(20))
    ByText.objects.using(alias).bulk_create(
        ByText(code=code) for code in ["", "a", "B", "b1", "ö2", "Ö3", "z z", "Z", "%"]
    )
    ByMoment.objects.using(alias).bulk_create(
        ByMoment(at=NEW_YEAR + datetime.timedelta(microseconds=n)) for n in range(9)
    )
    ByDecimal.objects.using(alias).bulk_create(ByDecimal(amount=f"{n - 4}.{n}5") for n in range(9))
    Profile.objects.using(alias).bulk_create(Profile(author=author, bio="b") for author in authors)
    for n in range(7):
        restaurant = Restaurant(name=f"r{n % 4}", stars=n % 3)
        restaurant.save(using=alias)
        Visit.objects.using(alias).create(place_id=restaurant.pk)
    Seat.objects.using(alias).bulk_create(Seat(row=row, number=n) for row in "CAB" for n in (3, 1, 2, 10))
    assert PlainArticle.objects.using(alias).count() == 50
    return articles


def multiset(rows):
    return sorted(rows, key=repr)


def detailed(rows):
    """Rows with what a row brings besides its columns."""
    return [
        (row, {name: value for name, value in vars(row).items() if name[0] != "_"}) if hasattr(row, "__dict__") else row
        for row in rows
    ]


def cut_of(cell):
    """The first word of a cell, which is a cut or ``refused``."""
    return re.match(r"\w+", cell).group()


def test_every_row_of_the_table_has_its_case():
    assert set(table()) == set(CASES)


def cases(articles, column):
    """Every queryset of every row, with what the table says of it."""
    for row, cells in table().items():
        vendor = connections[articles.db].vendor
        if ("PostgreSQL" in row and vendor != "postgresql") or ("key of more than" in row and vendor != "sqlite"):
            continue
        for number, queryset in enumerate(CASES[row](articles)):
            yield queryset, cells[column], f"{row}, {number}"


def hold(queryset, rows, expected, told):
    """In its order where it has one that leaves nothing open."""
    ordered = queryset.ordered and not any(map(is_random, queryset.query.order_by)) and "repeats" not in told
    if ordered:
        assert rows == expected, told
    else:
        assert multiset(rows) == multiset(expected), told


def test_the_walk(articles, alias):
    """It has the cut that the table says, and gives what list() gives."""
    for queryset, cell, told in cases(articles, 0):
        if cut_of(cell) == "refused":
            with pytest.raises(errors.UnsupportedQuerySet) as refusal:
                list(queryset.chunked_iterator(4))
            assert queryset.model._meta.label in str(refusal.value), told
            continue
        with transaction.atomic(using=alias):
            assert queryset.explain_plan(walk=True).cut == cut_of(cell), told
            expected = detailed(queryset)
            for chunk_size in (2, 7):
                hold(queryset, detailed(queryset.chunked_iterator(chunk_size)), expected, told)


def test_the_map(articles, monkeypatch):
    monkeypatch.setattr(cutting, "FEW_ROWS", 5)  # so that one of the two sizes is cut by a look-up for each chunk
    """It has the cut that the table says, and gives what list() gives."""
    for queryset, cell, told in cases(articles, 1):
        # As a worker, which maps on its own connection: a connection for each chunk would take its time here.
        with as_worker():
            if cut_of(cell) == "refused":
                with pytest.raises(errors.UnsupportedQuerySet) as refusal:
                    queryset.parallel_map(whole, threads=1)
                assert queryset.model._meta.label in str(refusal.value), told
            else:
                assert queryset.explain_plan().cut == cut_of(cell), told
                mapped = queryset.parallel_map(whole, threads=1, chunk_size=4)
                hold(queryset, detailed(mapped), detailed(queryset), told)
            if "`ordered=False`" in cell:
                assert queryset.explain_plan(ordered=False).cut == cut_of(cell.split("`ordered=False`: ")[1]), told
                mapped = queryset.parallel_map(whole, threads=1, chunk_size=9, ordered=False)
                assert multiset(detailed(mapped)) == multiset(detailed(queryset)), told


def whole(row):
    return row


def test_random_annotations_are_listed_once(articles):
    queryset = articles.annotate(r=Random()).order_by("r")
    assert {a.pk for a in queryset.chunked_iterator(7)} == set(articles.values_list("pk", flat=True))
    queryset = articles.annotate(r=RawSQL("rank + 1", ())).order_by("r", "pk")
    assert [a.pk for a in queryset.chunked_iterator(7)] == [a.pk for a in queryset]
    assert queryset.explain_plan(walk=True).cut == "keys"


def test_content_types_are_walked_as_any_model(default):
    """A model of Django's own, by a queryset that is made for it."""
    queryset = ParallelQuerySet(ContentType, using=default)
    assert list(queryset.chunked_iterator(2)) == list(ContentType.objects.using(default).order_by("pk"))


def test_what_only_django_can_cut_is_refused(default):
    """Each came out with other rows than list() has."""
    authors, articles = Author.objects.using(default), Article.objects.using(default)
    window = Window(RowNumber(), partition_by="born", order_by="name")
    refused = [
        articles.filter(rank=1).union(articles.filter(rank=2)).values_list("rank"),
        articles.filter(rank=1).union(articles.filter(rank=2)).values("name"),
        authors.extra(select={"year": "born"}).values("year").annotate(Count("pk")).order_by("year"),
        authors.values("born").alias(n=Count("born")).order_by("n"),
        authors.values("born").annotate(n=Count("born")).values("born").order_by("n"),
        authors.filter(GreaterThanOrEqual(window, 2)),
    ]
    for queryset in refused:
        with pytest.raises(errors.UnsupportedQuerySet):
            queryset.chunked_iterator(2)
        with pytest.raises(errors.UnsupportedQuerySet):
            queryset.parallel_map(str, threads=1)


def test_the_link_to_a_parent_stands_for_its_ordering(default):
    for name in ("c", "a", "b", "d"):
        Restaurant(name=name).save(using=default)
    restaurants = Restaurant.objects.using(default)
    for order in ("place_ptr", "-place_ptr", "place_ptr_id", "-pk"):
        queryset = restaurants.order_by(order)
        assert list(queryset.chunked_iterator(2)) == list(queryset)
        assert queryset.parallel_map(lambda row: row.pk, threads=1, chunk_size=2) == [row.pk for row in queryset]
