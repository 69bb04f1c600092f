"""across(): several databases answer as one that has the rows of all of them."""

from __future__ import annotations

import asyncio
import datetime as dt
import pickle
import random
import threading
import uuid
from collections import Counter
from contextlib import ExitStack
from decimal import Decimal
from gc import collect, get_objects

import pytest
from django.core.exceptions import FieldError
from django.db import ProgrammingError, connections, router
from django.db.models import (
    Avg,
    Case,
    CharField,
    Count,
    DecimalField,
    Exists,
    F,
    FloatField,
    Max,
    Min,
    Model,
    OuterRef,
    Prefetch,
    Q,
    StdDev,
    Subquery,
    Sum,
    UUIDField,
    Value,
    Variance,
    When,
    Window,
)
from django.db.models.functions import Coalesce, Collate, Concat, Length, Lower, Mod, Rank, TruncMonth
from django.db.models.sql.compiler import SQLCompiler
from django.test import override_settings

from parallel_orm import Failure, collations, comparing, errors, parallel_map
from parallel_orm.comparing import Comparison
from parallel_orm.merging import Term, merged
from parallel_orm.options import from_settings
from parallel_orm.sortkeys import _order_by_own_columns
from parallel_orm.testing import fail_chunk
from tests.asynchronous import run
from tests.conftest import _run
from tests.shards import databases_like
from tests.testapp.models import Sale, Seat, Shop

TEXTS = ["", "a", "A", "b", "B", "ä", "Ä", "z", "Zoe", "_", "a b", "ab", "É", "e", "10", "9", "日本", "😀"]
#: Of which MariaDB finds no two equal.
APART = ["", "a", "b", "z", "zoe", "_", "a b", "ab", "10", "9", "日本"]
MOMENT = dt.datetime(2026, 3, 28, 22, 0, tzinfo=dt.UTC)


@pytest.fixture(scope="module")
def made(pytestconfig):
    """What this module has made, by kind of database: several empty ones, and one beside several that are filled."""
    found, stack = {}, ExitStack()
    yield found, stack
    kinds = {place if isinstance(place, str) else place[0] for place in found}
    with pytestconfig.stash[_run].databases.allowing(*kinds):
        stack.close()


@pytest.fixture
def shards(alias, made):
    """Several databases, empty."""
    found, stack = made
    if alias not in found:
        found[alias] = stack.enter_context(databases_like(alias, 3))
    for name in found[alias]:
        for model in (Sale, Shop):
            model.objects.using(name).all().delete()
    yield found[alias]
    for name in found[alias]:
        connections[name].close()


@pytest.fixture
def both(alias, made):
    """The queryset of one database, and that of several which have its rows; for reading."""
    found, stack = made
    if (alias, "filled") not in found:
        one, *several = stack.enter_context(databases_like(alias, 4, "filled"))
        spread(sales(texts=APART if alias == "mariadb" else TEXTS), one, several)
        found[alias, "filled"] = one, several
    one, several = found[alias, "filled"]
    yield Sale.objects.using(one), Sale.objects.across(*several)
    for name in (one, *several):
        connections[name].close()


def sales(number=60, seed=1, texts=TEXTS):
    """Rows with NULLs and ties in all columns."""
    chance = random.Random(seed)

    def some(make):
        return None if chance.random() < 0.15 else make()

    return [
        Sale(
            pk=place + 1,
            number=chance.randrange(5),
            amount=some(lambda: Decimal(chance.randrange(-500, 1500)) / 100),
            weight=some(lambda: chance.choice([0.1, 0.25, -3.5, 1e10, 2.0])),
            name=some(lambda: chance.choice(texts)),
            at=some(lambda: MOMENT + dt.timedelta(minutes=30 * chance.randrange(20))),
            day=some(lambda: dt.date(2026, 1 + chance.randrange(4), 1 + chance.randrange(3))),
            took=some(lambda: dt.timedelta(seconds=chance.randrange(1000))),
            code=some(lambda: uuid.UUID(int=chance.getrandbits(128), version=4)),
            notes=some(lambda: {"a": chance.randrange(3)}),
        )
        for place in range(number)
    ]


def spread(rows, alias, shards, seed=1):
    """Save rows on the one database, and each on one of several; shops are on all of them."""
    chance = random.Random(seed)
    homes = [chance.choice(shards) for _ in rows]
    shops = [Shop(pk=place + 1, name=name) for place, name in enumerate(["north", "South", "east"])]
    for name in (alias, *shards):
        Shop.objects.using(name).bulk_create(shops)
    for row in rows:
        row.shop_id = chance.choice([None, 1, 2, 3])
    Sale.objects.using(alias).bulk_create(rows)
    for name in shards:
        Sale.objects.using(name).bulk_create([row for row, home in zip(rows, homes, strict=True) if home == name])
    return dict(zip([row.pk for row in rows], homes, strict=True))


def plain(value, exact=1e-12, within=()):
    """Make instances comparable."""
    if isinstance(value, Model):
        fields = {field.attname: value.__dict__.get(field.attname) for field in type(value)._meta.concrete_fields}
        others = {name: plain(each) for name, each in value.__dict__.items() if name not in fields and name[0] != "_"}
        around = (*within, id(value))
        related = {
            name: plain(each, exact, around)
            for name, each in value._state.fields_cache.items()
            if id(each) not in around  # as the two sides of a one-to-one relation are
        }
        return type(value).__name__, fields, others, related
    if isinstance(value, dict):
        return {key: plain(each, exact) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each, exact) for each in value]
    if isinstance(value, float):
        return pytest.approx(value, rel=exact)
    return value


def same(both, ask, *, ordered=True, exact=1e-12):
    """Whatever is asked, both answer the same."""
    one, several = (ask(queryset) for queryset in both)
    if not isinstance(one, (int, dict, Model, bool, type(None))):
        one, several = list(one), list(several)
        assert type(one[0]) is type(several[0]) if one else not several
        if not ordered:
            one, several = sorted(one, key=repr), sorted(several, key=repr)
    assert plain(one, exact) == plain(several, exact)
    return several


ORDERS = {
    "column": ["number", "pk"],
    "reversed": ["-number", "pk"],
    "mixed": ["-number", "amount", "-pk"],
    "decimal": ["amount", "pk"],
    "float": ["-weight", "pk"],
    "text": ["name", "pk"],
    "text reversed": ["-name", "pk"],
    "moment": ["at", "pk"],
    "day": ["-day", "-pk"],
    "duration": ["took", "pk"],
    "uuid": ["code", "pk"],
    "nulls first": [F("amount").asc(nulls_first=True), "pk"],
    "nulls last": [F("name").desc(nulls_last=True), "pk"],
    "related": ["shop__name", "pk"],
    "expression": [Mod("pk", 7), "-pk"],
    "length": [Length("name").desc(), "pk"],
    "lower": [Lower("name"), "pk"],
    "concat": [Concat("name", Value("-"), "name", output_field=CharField(max_length=90)), "pk"],
    "case": [Case(When(number=2, then=0), default=1), "pk"],
}


SHAPES = {
    "instances": lambda rows: rows,
    "values": lambda rows: rows.values("name", "number"),
    "flat": lambda rows: rows.values_list("pk", flat=True),
    "named": lambda rows: rows.values_list("pk", "shop__name", named=True),
    "only": lambda rows: rows.only("number"),
    "slice": lambda rows: rows[5:25],
    "reversed": lambda rows: rows.reverse()[3:],
    "annotated": lambda rows: rows.annotate(twice=F("number") * 2).select_related("shop"),
    "prefetched": lambda rows: rows.prefetch_related("shop__sales"),
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_order(both, order):
    """Rows come in the order of one database, however it sorts."""
    turn = list(ORDERS.values()).index(order)
    shapes = list(SHAPES.values())
    for shape in (shapes[0], *(shapes[(turn + place) % len(shapes)] for place in (1, 4))):
        same(both, lambda rows, shape=shape: shape(rows.order_by(*order)))
        same(both, lambda rows, shape=shape: shape(rows.order_by(*order)).iterator(7))


ASKED = {
    "count": lambda rows: rows.count(),
    "count of a slice": lambda rows: rows.order_by("pk")[10:20].count(),
    "count beyond": lambda rows: rows.order_by("pk")[55:90].count(),
    "exists": lambda rows: rows.filter(pk=3).exists(),
    "exists not": lambda rows: rows.filter(pk=-3).exists(),
    "exists behind": lambda rows: rows.order_by("pk")[59:].exists(),
    "exists not behind": lambda rows: rows.order_by("pk")[60:].exists(),
    "first": lambda rows: rows.first(),
    "last": lambda rows: rows.last(),
    "first in order": lambda rows: rows.order_by("-amount", "pk").first(),
    "first of none": lambda rows: rows.none().first(),
    "earliest": lambda rows: rows.filter(day__isnull=False).earliest("day", "pk"),
    "latest": lambda rows: rows.filter(at__isnull=False).latest("at", "pk"),
    "get": lambda rows: rows.get(pk=7),
    "contains": lambda rows: rows.contains(Sale(pk=7)),
    "in_bulk": lambda rows: rows.in_bulk([3, 4, 500]),
    "in_bulk of all": lambda rows: rows.in_bulk(),
    "index": lambda rows: rows.order_by("name", "pk")[17],
    "step": lambda rows: rows.order_by("name", "pk")[3:30:4],
    "dates": lambda rows: rows.dates("day", "month"),
    "dates reversed": lambda rows: rows.dates("day", "day", order="DESC"),
    "datetimes": lambda rows: rows.datetimes("at", "hour"),
    "distinct": lambda rows: rows.values("number").distinct().order_by("number"),
    "distinct text": lambda rows: rows.values_list("name", flat=True).distinct().order_by("name"),
    "distinct slice": lambda rows: rows.values_list("number", "day").distinct().order_by("number", "day")[2:9],
    "count of distinct": lambda rows: rows.values("number").distinct().count(),
    "distinct by another order": lambda rows: rows.values("number").distinct().order_by("-number"),
    "distinct by a column of no row": lambda rows: rows.values("number").distinct().order_by("name", "number"),
    "distinct flat by a column of no row": lambda rows: (
        rows.values_list("number", flat=True).distinct().order_by("-day", "number")[3:30]
    ),
    "exclude": lambda rows: rows.exclude(number=2).order_by("pk"),
    "own method": lambda rows: rows.dear().order_by("pk"),
    "or": lambda rows: (rows.filter(number=1) | rows.filter(number=3)).order_by("pk"),
    "and": lambda rows: (rows.filter(number=1) & rows.filter(pk__gt=30)).order_by("pk"),
    "join": lambda rows: rows.filter(shop__name="north").order_by("pk"),
    "subquery": lambda rows: rows.filter(shop__in=Shop.objects.filter(name__gte="e")).order_by("pk"),
    "exists subquery": lambda rows: rows.annotate(
        is_at=Exists(Shop.objects.filter(pk=OuterRef("shop"), name="east"))
    ).order_by("pk"),
    "alias": lambda rows: rows.alias(rest=Mod("pk", 5)).filter(rest=2).order_by("-rest", "pk"),
    "extra": lambda rows: rows.extra(select={"two": "1 + 1"}).order_by("pk"),
    "defer": lambda rows: rows.defer("name").order_by("pk"),
    "union": lambda rows: rows.filter(number=1).union(rows.filter(pk__lt=20)).order_by("pk"),
    "union of values": lambda rows: rows.values("number").union(rows.values("number")).order_by("-number"),
    "union all": lambda rows: (
        rows.filter(number=1).values("pk").union(rows.filter(pk__lt=20).values("pk"), all=True).order_by("pk")
    ),
    "intersection": lambda rows: rows.filter(number=1).intersection(rows.filter(pk__lt=40)).order_by("pk"),
    "difference": lambda rows: rows.filter(number=1).difference(rows.filter(pk__lt=40)).order_by("pk"),
    "union, then values": lambda rows: (
        rows.filter(number=1).union(rows.filter(pk__lt=40)).values_list("number", flat=True).order_by("-number")
    ),
    "union, then values with the key": lambda rows: (
        rows.filter(number=1).union(rows.filter(pk__lt=20)).values("pk", "name").order_by("pk")
    ),
    "count of a union's values": lambda rows: rows.filter(number=1).union(rows.filter(pk__lt=40)).values("day").count(),
    "count of a union": lambda rows: rows.filter(number=1).union(rows.filter(pk__lt=20)).count(),
    "of related rows": lambda rows: rows.values("shop__name", "pk").order_by("shop__name", "-pk"),
    "reverse of none": lambda rows: rows.none().reverse(),
    "empty filter": lambda rows: rows.filter(pk__in=[]).order_by("pk"),
    "bool": lambda rows: bool(rows.filter(number=1)),
    "len": lambda rows: len(rows.filter(number=1)),
}


@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
def test_as_on_one_database(both, ask):
    same(both, ask)


AGGREGATES = {
    "count": {"n": Count("pk"), "m": Count("name"), "star": Count("*")},
    "sum": {"n": Sum("number"), "a": Sum("amount"), "w": Sum("weight"), "t": Sum("took")},
    "extremes": {
        "a": Min("amount"),
        "b": Max("name"),
        "c": Min("name"),
        "d": Max("at"),
        "e": Min("day"),
    },
    "average": {"n": Avg("number"), "a": Avg("amount"), "w": Avg("weight"), "t": Avg("took")},
    "filtered": {
        "a": Sum("amount", filter=Q(number=1)),
        "b": Count("pk", filter=Q(number=2)),
        "c": Avg("number", filter=Q(number=9)),
    },
    "default": {"a": Sum("amount", filter=Q(number=9), default=Decimal(0)), "b": Max("number", default=5)},
    "expression": {"a": Sum(F("number") * 2 + 1), "b": Max(Length("name"))},
    "several types": {
        "a": Sum(F("amount") * F("weight"), output_field=FloatField()),
        "b": Avg(F("amount") * F("weight"), output_field=FloatField()),
    },
    "types of their own": {
        "a": Sum("number", output_field=DecimalField()),
        "b": Sum("amount", output_field=FloatField()),
        "c": Max("number", output_field=FloatField()),
    },
    "spread": {
        "a": Variance("number"),
        "b": StdDev("number"),
        "c": Variance("number", sample=True, filter=Q(pk__lt=50)),
        "d": StdDev("number", filter=Q(weight__isnull=False)),
    },
}


def exactness(both):
    """MariaDB gives variances of whole numbers four digits behind the point; across several they have all."""
    return 1e-3 if connections[both[0].db].vendor == "mysql" else 1e-12


def fails_of_none(both, asked):
    """Tell whether an aggregate is Django's own function of SQLite, which fails where there are too few values."""
    is_spread = any(isinstance(each, StdDev | Variance) for each in asked.values())
    return is_spread and connections[both[0].db].vendor == "sqlite"


@pytest.mark.parametrize("asked", AGGREGATES.values(), ids=AGGREGATES)
def test_aggregate(both, asked):
    same(both, lambda rows: rows.aggregate(**asked), exact=exactness(both))
    if not fails_of_none(both, asked):
        same(both, lambda rows: rows.filter(pk=-1).aggregate(**asked))
    same(both, lambda rows: rows.filter(number__in=[1, 3]).aggregate(**asked), exact=exactness(both))


def test_aggregate_of_what_each_row_has_of_others(both):
    """An aggregate that is annotated is one of each row, and so of one database."""
    sized = lambda rows: rows.annotate(n=Count("shop__name"))  # noqa: E731
    same(both, lambda rows: sized(rows).aggregate(Sum("n"), Avg("n"), Min("n"), m=Max(F("n") * 2)))
    with pytest.raises(FieldError, match="aggregate of an aggregate"):
        both[1].aggregate(a=Sum(Count("pk")))


def test_aggregate_by_its_own_name(both):
    same(both, lambda rows: rows.aggregate(Sum("number"), Max("amount")))


@pytest.mark.parametrize(
    "ask",
    [
        lambda rows: rows.aggregate(Max("notes")),
        lambda rows: list(rows.values("number").annotate(most=Max("notes"))),
    ],
    ids=["aggregate", "groups"],
)
def test_extremes_of_json(both, ask):
    """They cannot be compared, nor even be hashed."""
    if connections[both[0].db].vendor == "postgresql":
        pytest.skip("has none")
    with pytest.raises(errors.UnsupportedQuerySet, match="is a JSONField, which Python does not compare"):
        ask(both[1])


@pytest.mark.parametrize("asked", AGGREGATES.values(), ids=AGGREGATES)
def test_groups(both, asked):
    """The groups of all databases become those of one, in any shape and order."""
    if fails_of_none(both, asked):
        pytest.skip("Django's own function of SQLite fails where there are too few values")
    name, exact = next(iter(asked)), exactness(both)
    same(both, lambda rows: rows.values("number").annotate(**asked).order_by("number"), exact=exact)
    same(both, lambda rows: rows.values("number").annotate(**asked).order_by(name, "-number"), exact=exact)
    same(both, lambda rows: rows.annotate(**asked).order_by("pk"), exact=exact)
    two = lambda rows: rows.values("shop__name", "number").annotate(**asked)  # noqa: E731
    same(both, lambda rows: two(rows).order_by("-shop__name", "number"), exact=exact)
    same(both, lambda rows: two(rows).values_list("number", name).order_by("-number", "shop__name")[1:4], exact=exact)


def test_spread_of_one(both):
    """Where SQLite has no answer it is None, as everywhere else."""
    assert both[1].aggregate(a=StdDev("number", sample=True, filter=Q(pk=3))) == {"a": None}
    assert both[1].filter(pk=-1).aggregate(a=Variance("number")) == {"a": None}


def test_groups_of_other_shapes(both):
    same(
        both, lambda rows: rows.values("number").annotate(n=Count("pk")).values_list("n", flat=True).order_by("number")
    )
    same(both, lambda rows: rows.values("number").annotate(n=Count("pk")).values("n").order_by("-n", "number"))
    same(both, lambda rows: rows.annotate(m=TruncMonth("day")).values("m").annotate(n=Sum("number")).order_by("m"))
    same(both, lambda rows: rows.values("number").annotate(n=Count("pk")).count())
    same(both, lambda rows: rows.values("number").annotate(n=Count("pk")).exists())
    same(both, lambda rows: rows.values_list("number", named=True).annotate(n=Count("pk")).order_by("n", "number"))
    same(both, lambda rows: rows.values("name").annotate(n=Count("pk")).order_by("name"))
    same(both, lambda rows: rows.values("number").annotate(n=Count("pk")), ordered=False)
    same(both, lambda rows: rows.values(two=F("number") * 2).annotate(n=Count("pk")).order_by("two"))


def test_groups_of_what_they_are_given_later(both):
    """SQL groups by that too."""
    sized = lambda rows: rows.values("number").annotate(n=Count("pk"))  # noqa: E731
    found = same(both, lambda rows: sized(rows).annotate(late=F("shop__name")).order_by("number", "late"))
    assert len(found) > 5
    same(both, lambda rows: sized(rows).values_list("day", "n", "number").order_by("number", "day"))
    same(both, lambda rows: sized(rows).annotate(late=TruncMonth("day")).count())
    is_north = Exists(Shop.objects.filter(pk=OuterRef("shop"), name="north"))
    same(both, lambda rows: rows.values(here=is_north).annotate(n=Count("pk")).order_by("here"))


def test_one_group_of_all(both):
    """Groups by nothing are one, of the rows of all databases."""
    one = lambda rows: rows.values(x=Value(1)).annotate(n=Count("pk"), a=Sum("amount"), m=Max("name"))  # noqa: E731
    assert len(same(both, one)) == 1
    same(both, lambda rows: one(rows.filter(pk=-1)))


def test_groups_say_where_nulls_come(both):
    same(
        both,
        lambda rows: (
            rows.values("name").annotate(a=Sum("amount")).order_by(F("a").desc(nulls_last=True), F("name").asc())
        ),
    )


def test_extremes_of_groups_are_ranked_at_once(both, monkeypatch):
    """By one query, however many groups there are."""
    ranks_on, asked = comparing.ranks_on, []
    monkeypatch.setattr(comparing, "ranks_on", lambda *args: asked.append(args) or ranks_on(*args))
    name = linguistic(both[0].db)
    if "." in name:
        pytest.skip(f"Django refuses the name {name!r}")
    extremes = {"a": Max(Collate("name", name)), "b": Min(Collate("name", name))}
    rows = both[1].values("number").annotate(**extremes).order_by("number")
    found = list(rows)
    assert len(found) == 5
    assert len(asked) == 2
    folded = [{**row, "a": row["a"].lower(), "b": row["b"].lower()} for row in found]
    assert folded == [
        {**row, "a": row["a"].lower(), "b": row["b"].lower()}
        for row in both[0].values("number").annotate(**extremes).order_by("number")
    ]


def test_distinct_groups(both):
    """What several groups have in common comes once, and counts once."""

    def sizes(rows):
        return rows.values("day").annotate(n=Count("pk"), m=Max("name")).values_list("n", flat=True).distinct()

    assert len(same(both, lambda rows: sizes(rows).order_by("n"))) > 1
    same(both, lambda rows: sizes(rows).order_by("-n")[1:3])
    same(both, lambda rows: sizes(rows).count())
    same(both, lambda rows: sizes(rows).order_by("n", "day"))
    same(both, lambda rows: rows.values("day").annotate(m=Max("name")).values("m").distinct().order_by("m"))


def test_rows_know_where_they_live(alias, shards):
    homes = spread(sales(20), alias, shards)
    rows = list(Sale.objects.across(*shards).order_by("pk"))
    assert {row.pk: row._state.db for row in rows} == homes
    rows[3].number = 77
    rows[3].save()
    assert Sale.objects.using(homes[4]).get(pk=4).number == 77
    assert rows[3].shop is None or rows[3].shop._state.db == homes[4]


def test_related_rows(both):
    """Of a related manager: rows have the instance that it is of on its own database, and theirs on others."""
    one, several = both
    shop = Shop.objects.using(several.aliases[1]).get(pk=1)
    rows = list(shop.sales.across(*several.aliases).order_by("pk"))
    assert [row.pk for row in rows] == [row.pk for row in one.filter(shop=1).order_by("pk")]
    assert {row._state.db for row in rows} == set(several.aliases)
    for row in rows:
        assert row.shop._state.db == row._state.db
        assert (row.shop is shop) == (row._state.db == several.aliases[1])


def test_two_rows_of_one_key(alias, shards):
    """A key may be on two databases: that is never made one row, nor one chosen."""
    for name in shards[:2]:
        Sale.objects.using(name).create(pk=1, number=5)
    rows = Sale.objects.across(*shards)
    assert rows.count() == 2
    with pytest.raises(Sale.MultipleObjectsReturned):
        rows.get(pk=1)
    with pytest.raises(Sale.MultipleObjectsReturned):
        rows.start_get(pk=1).result()
    with pytest.raises(Sale.MultipleObjectsReturned, match=f"on '{shards[0]}' and on '{shards[1]}'"):
        rows.in_bulk([1])
    with pytest.raises(Sale.DoesNotExist):
        rows.get(pk=2)


def test_ties_come_in_the_order_of_the_aliases(alias, shards):
    for place, name in enumerate(shards):
        Sale.objects.using(name).bulk_create([Sale(pk=place * 10 + n + 1, number=n % 2) for n in range(4)])
    for order in (shards, shards[::-1]):
        rows = Sale.objects.across(*order).order_by("number")
        assert [row._state.db for row in rows] == [name for _ in range(2) for name in order for _ in range(2)]
        assert [row._state.db for row in rows.chunked_iterator(1)] == [row._state.db for row in rows]


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_walk(both, order):
    one, several = both
    expected = plain(list(one.order_by(*order)))
    for size in (3, 50):
        assert plain(list(several.order_by(*order).chunked_iterator(size))) == expected
    assert plain(list(several.order_by(*order)[4:31].chunked_iterator(5))) == expected[4:31]


def test_walk_of_values(both):
    one, several = both
    for shape in (
        lambda rows: rows.order_by("name", "pk").values_list("name", "pk"),
        lambda rows: rows.order_by("-at", "pk").values("pk"),
        lambda rows: rows.order_by("shop__name", "pk").values_list("pk", flat=True),
        lambda rows: rows.values("number").annotate(n=Count("pk")).order_by("number"),
        lambda rows: rows.values("number").distinct().order_by("number"),
    ):
        assert list(shape(several).chunked_iterator(5)) == list(shape(one))


PAGES_OF_MANY = {
    "key": lambda rows: rows.order_by("pk"),
    "backwards": lambda rows: rows.order_by("-pk"),
    "ties": lambda rows: rows.order_by("number", "pk"),
    "mixed": lambda rows: rows.order_by("-number", "day", "-pk"),
    "moments": lambda rows: rows.order_by("at", "pk"),
    "text": lambda rows: rows.order_by("name", "pk"),
    "uuids": lambda rows: rows.order_by("code", "pk"),
    "related": lambda rows: rows.select_related("shop").order_by("shop__name", "pk"),
    "prefetched": lambda rows: rows.prefetch_related("shop").order_by("number", "pk"),
    "some columns": lambda rows: rows.only("number").order_by("number", "pk"),
    "values": lambda rows: rows.order_by("number", "pk").values_list("pk", flat=True),
    "more values": lambda rows: rows.order_by("name", "pk").values("pk", "day"),
    "a slice": lambda rows: rows.order_by("number", "pk")[70:300],
}


@pytest.fixture
def many(shards, alias):
    """As ``both``, and so many rows that they are made when they are asked for."""
    one, *several = shards
    spread(sales(700, texts=APART if alias == "mariadb" else TEXTS), one, several)
    return Sale.objects.using(one), Sale.objects.across(*several)


@pytest.mark.parametrize("shape", PAGES_OF_MANY.values(), ids=PAGES_OF_MANY)
def test_walks_of_many(many, shape):
    one, several = map(shape, many)
    expected = plain(list(one))
    for size in (None, 60):
        assert plain(list(several.chunked_iterator(size))) == expected
    assert plain([row for rows in several.chunks(100) for row in rows]) == expected
    assert plain(list(several.iterator(90))) == expected


def test_a_walk_of_many_without_an_order(many):
    one, several = (rows.order_by() for rows in many)
    assert {row._state.db for row in several.chunked_iterator(60)} == set(several.aliases)
    assert sorted(row.pk for row in several.chunked_iterator(60)) == sorted(row.pk for row in one)


def test_rows_of_a_walk_are_made_one_by_one(many):
    """Of a page there is what the driver gave; and the last row, behind which the next page begins."""

    def alive():
        collect()
        # What is lazy is not to be asked what it is.
        return sum(type(each) is Sale and "mine" in vars(each) for each in get_objects())

    most = 0
    for number, row in enumerate(many[1].annotate(mine=Value(1)).order_by("pk").chunked_iterator(100), 1):
        assert row.pk == number
        del row
        if number in (40, 80, 160, 320):  # of a page that has few rows, as the last one may, all are made
            most = max(most, alive())
    assert number == 700
    assert 0 < most <= 4  # of each database: that last row, and the one that was given last


def test_what_goes_wrong_when_rows_are_made(many, monkeypatch):
    """Tells of which database they are."""
    several = many[1].order_by("pk")
    bad = Sale.objects.using(several.aliases[1]).order_by("pk")[20]
    convert = UUIDField.get_db_converters

    def fail(value, expression, connection):
        if connection.alias == bad._state.db and str(value) == str(bad.code):
            raise ValueError("not to be made")
        return value

    monkeypatch.setattr(UUIDField, "get_db_converters", lambda field, connection: [fail, *convert(field, connection)])
    with pytest.raises(ValueError, match="not to be made") as caught:
        list(several.chunked_iterator(100))
    assert any(repr(bad._state.db) in line for line in caught.value.__notes__)


def test_rows_that_are_passed_over():
    """What was left of some of a merge is not given for the next ones."""
    streams = [iter([([1, 4, 5], [[1, 4, 5]]), ([8, 9], [[8, 9]])]), iter([([2, 3, 7], [[2, 3, 7]])])]
    assert [next(rows) for rows in merged(streams, [Term(Comparison())])] == [1, 7, 8]


def test_started(both):
    one, several = both
    rows = several.order_by("name", "pk").start_fetch()
    assert plain(list(rows)) == plain(list(one.order_by("name", "pk")))
    assert several.filter(number=1).start_count().count() == one.filter(number=1).count()
    assert several.filter(number=1).start_exists().exists() is True
    assert plain(several.start_get(pk=5).result()) == plain(one.get(pk=5))
    assert plain(several.order_by("-amount", "pk").start_first().result()) == plain(
        one.order_by("-amount", "pk").first()
    )
    assert plain(several.start_last().result()) == plain(one.last())
    assert several.start_aggregate(n=Sum("number")).result() == one.aggregate(n=Sum("number"))
    assert set(several.start_in_bulk([1, 2]).result()) == {1, 2}
    pending = several.start_count().background["count"]
    assert pending.result(30) == one.count()
    assert pending.done()
    assert all(name in pending.alias for name in several.aliases)


def test_random_order(both):
    one, several = both
    assert sorted(row.pk for row in several.order_by("?")) == sorted(row.pk for row in one)
    drawn = {tuple(several.order_by("?")[:3].values_list("pk", flat=True)) for _ in range(20)}
    assert len(drawn) > 1
    assert not any(name.startswith("parallel_orm") for row in several.order_by("?") for name in row.__dict__)


REFUSED = {
    "create": lambda rows: rows.create(number=1),
    "get_or_create": lambda rows: rows.get_or_create(number=1),
    "bulk_create": lambda rows: rows.bulk_create([]),
    "bulk_update": lambda rows: rows.bulk_update([], ["number"]),
    "update_or_create": lambda rows: rows.update_or_create(number=1),
    "raw": lambda rows: rows.raw("SELECT 1"),
    "parallel_create": lambda rows: rows.parallel_create([]),
    "update": lambda rows: rows.update(number=1),
    "delete": lambda rows: rows.delete(),
    "db": lambda rows: rows.db,
    "a subquery": lambda rows: list(Shop.objects.filter(sales__in=rows)),
    "Subquery": lambda rows: list(Shop.objects.annotate(n=Subquery(rows.values("number")[:1]))),
    "Exists": lambda rows: list(Shop.objects.filter(Exists(rows))),
    "window": lambda rows: list(rows.annotate(r=Window(Rank(), order_by="number"))),
    "window in_bulk": lambda rows: rows.annotate(r=Window(Rank(), order_by="number")).in_bulk(),
    "window in an order": lambda rows: list(rows.order_by(F("number") + Window(Rank(), order_by="pk"))),
    "json order": lambda rows: list(rows.order_by("notes")),
    "extra order": lambda rows: list(rows.extra(order_by=["number"])),
    "extra order of groups": lambda rows: list(
        rows.values("number").annotate(n=Count("pk")).extra(order_by=["-number"])
    ),
    "or with one database": lambda rows: Sale.objects.all() | rows,
    "and with one database": lambda rows: Sale.objects.all() & rows,
    "or of one database": lambda rows: rows | Sale.objects.using(rows.aliases[0]),
    "or of other databases": lambda rows: rows | Sale.objects.across(*rows.aliases[:2]),
    "union with other databases": lambda rows: rows.union(Sale.objects.across(*rows.aliases[:2])),
    "union of one database": lambda rows: list(Sale.objects.using(rows.aliases[0]).union(rows)),
    "using none": lambda rows: rows.using(None),
    "prefetch": lambda rows: list(
        Shop.objects.using(rows.aliases[0]).prefetch_related(Prefetch("sales", queryset=rows))
    ),
    "distinct aggregate": lambda rows: rows.aggregate(n=Count("number", distinct=True)),
    "aggregate of aggregates": lambda rows: rows.aggregate(n=Sum("number") / Count("pk")),
    "aggregate of a slice": lambda rows: rows.order_by("pk")[:5].aggregate(n=Sum("number")),
    "aggregate of groups": lambda rows: rows.values("number").annotate(n=Count("pk")).aggregate(m=Max("n")),
    "groups filtered by an aggregate": lambda rows: list(rows.values("number").annotate(n=Count("pk")).filter(n=1)),
    "groups of distinct": lambda rows: list(rows.values("number").annotate(n=Count("shop", distinct=True))),
    "order of no type": lambda rows: list(rows.order_by(Coalesce("number", "name"))),
    "groups by extra()": lambda rows: list(rows.extra(select={"n": "number"}).values("n").annotate(m=Count("pk"))),
    "difference, then values": lambda rows: list(
        rows.filter(number=1).difference(rows.filter(number=1, pk__lt=40)).values_list("number", flat=True)
    ),
    "intersection of values": lambda rows: list(rows.values("number").intersection(rows.values("number"))),
    "union of slices": lambda rows: list(rows.order_by("pk")[:3].union(rows.order_by("pk")[:2])),
}


@pytest.mark.parametrize("ask", REFUSED.values(), ids=REFUSED)
def test_refused(both, ask):
    """What would not be that of all databases says so, names them, and says what to do."""
    with pytest.raises(errors.UnsupportedQuerySet, match=r"(?s)(several databases|databases).*[A-Z].*\."):
        ask(both[1])
    assert both[1].count() == 60


def test_bad_aliases(default, shards_of_default, postgres):
    rows = Sale.objects
    with pytest.raises(errors.UnknownAlias, match="nowhere"):
        rows.across("nowhere")
    with pytest.raises(errors.InvalidOption, match="no database"):
        rows.across()
    with pytest.raises(errors.InvalidOption, match=f"'{shards_of_default[0]}' twice"):
        rows.across(*shards_of_default, shards_of_default[0])
    with pytest.raises(errors.InvalidOption, match="'default' is sqlite, 'postgres' is postgresql"):
        rows.across("default", "postgres")
    with pytest.raises(errors.InvalidOption, match="not 5"):
        rows.across(5)
    with pytest.raises(errors.InvalidOption):
        rows.across("default", timeout=-1)
    with pytest.raises(errors.InvalidOption):
        rows.across("default", partial=1)
    with pytest.raises(ValueError, match="Negative indexing"):
        rows.across("default")[-1]


@pytest.fixture
def shards_of_default(default, made):
    found, stack = made
    if default not in found:
        found[default] = stack.enter_context(databases_like(default, 3))
    return found[default]


def test_groups_of_the_settings(default, other):
    with override_settings(PARALLEL_ORM={"GROUPS": {"pair": ["default", "other"]}}):
        assert Sale.objects.across("pair").aliases == ("default", "other")
        with pytest.raises(errors.InvalidOption, match="twice"):
            Sale.objects.across("default", "pair")


@pytest.mark.parametrize(
    ("groups", "problem"),
    [
        ([], "dictionary"),
        ({"all": ["default"]}, "another meaning"),
        ({"default": ["default"]}, "another meaning"),
        ({"pair": "default"}, "no list"),
        ({"pair": []}, "no list"),
        ({"pair": ["nowhere"]}, "'nowhere'"),
        ({"pair": ["default", "default"]}, "twice"),
    ],
)
def test_bad_groups(groups, problem):
    with override_settings(PARALLEL_ORM={"GROUPS": groups}), pytest.raises(errors.InvalidOption, match=problem):
        from_settings()


class Router:
    def allow_migrate(self, db, app_label, model_name=None, **hints):
        return db in ("default", "other") if model_name == "sale" else None


def test_all_databases_by_the_routers(default, other, monkeypatch):
    monkeypatch.setattr(router, "routers", [Router()])
    assert Sale.objects.across("all").aliases == ("default", "other")
    monkeypatch.setattr(Router, "allow_migrate", lambda *args, **hints: False)
    with pytest.raises(errors.InvalidOption, match=r"none has testapp\.Sale"):
        Sale.objects.across("all")


def test_writes(alias, shards):
    homes = spread(sales(30), alias, shards)
    rows = Sale.objects.across(*shards, writable=True)
    done = rows.filter(pk__lte=10).update(number=99)
    assert done == {name: sum(home == name for pk, home in homes.items() if pk <= 10) for name in shards}
    assert Sale.objects.across(*shards).filter(number=99).count() == 10
    done = rows.filter(number=99).delete()
    assert sum(number for number, _ in done.values()) == 10
    assert Sale.objects.across(*shards).count() == 20
    with pytest.raises(TypeError, match="Cannot update a query once a slice has been taken"):
        rows.order_by("pk")[5:].update(number=1)


def test_a_write_that_fails_says_what_is_done(alias, shards):
    spread(sales(30), alias, shards)
    rows = Sale.objects.across(*shards, writable=True)
    with connections[shards[1]].cursor() as cursor:
        cursor.execute("ALTER TABLE testapp_sale RENAME TO elsewhere")
    try:
        with pytest.raises(Exception, match="testapp_sale") as raised:
            rows.update(number=98)
        (told,) = [each for each in raised.value.__notes__ if "done before" in each]
        assert f"'{shards[1]}'" in told
        assert f"{{'{shards[0]}': {Sale.objects.using(shards[0]).count()}}}" in told
        assert f"not begun: ['{shards[2]}']" in told
        assert Sale.objects.using(shards[0]).filter(number=98).exists()
        assert not Sale.objects.using(shards[2]).filter(number=98).exists()
    finally:
        connections[shards[1]].close()
        with connections[shards[1]].cursor() as cursor:
            cursor.execute("ALTER TABLE elsewhere RENAME TO testapp_sale")


def test_keys_of_several_columns(default):
    """An order by the key is one by its columns."""
    with databases_like(default, 3, "seats", models=(Seat,)) as (one, *several):
        seats = [Seat(row=f"r{place % 3}", number=place) for place in range(12)]
        Seat.objects.using(one).bulk_create(seats)
        for place, name in enumerate(several):
            Seat.objects.using(name).bulk_create(seats[place::2])
        both = Seat.objects.using(one), Seat.objects.across(*several)
        same(both, lambda rows: rows.order_by("pk"))
        same(both, lambda rows: rows.order_by("-pk")[2:7])
        same(both, lambda rows: rows.first())
        same(both, lambda rows: rows.last())
        same(both, lambda rows: rows.order_by("-pk").values_list("pk", flat=True))
        same(both, lambda rows: rows.order_by("pk").iterator(2))
        same(both, lambda rows: rows.order_by("pk").chunked_iterator(2))


def test_pickle_and_copies(both):
    _, several = both
    rows = pickle.loads(pickle.dumps(several.order_by("pk")))
    assert [row.pk for row in rows] == list(range(1, 61))
    assert rows.filter(pk=3).get().pk == 3
    assert "SELECT" in str(several.query)
    assert repr(several.order_by("pk")[:1]).startswith("<SaleQuerySetAcross [<Sale")
    assert several.using(several.aliases[0]).db == several.aliases[0]
    assert type(several.using(several.aliases[0])) is type(Sale.objects.all())


def test_explain(both):
    text = both[1].filter(number=1).explain()
    assert all(f"{name}:" in text for name in both[1].aliases)
    plans = both[1].explain_plan()
    assert list(plans) == list(both[1].aliases)
    assert all(repr(name) in str(plans) for name in plans)


def test_text_that_is_equal_to_its_database(alias, shards):
    """What a database finds equal, upper and lower case, is a tie, which the next column breaks."""
    spread(sales(40), alias, shards)
    both = Sale.objects.using(alias), Sale.objects.across(*shards)
    same(both, lambda rows: rows.order_by("name", "pk"))
    same(both, lambda rows: rows.order_by("-name", "-pk").values_list("name", "pk"))
    groups = [{row["n"] for row in rows.values("name").annotate(n=Count("pk"))} for rows in both]
    assert groups[0] == groups[1]
    assert len(both[1].values("name").distinct()) == both[0].values("name").distinct().count()


def test_collation_of_the_users_own(both):
    """By a collation that is named, text is merged as it sorts."""
    name = {"sqlite": "NOCASE", "postgresql": "C", "mysql": "utf8mb4_bin"}[connections[both[1].aliases[0]].vendor]
    same(both, lambda rows: rows.order_by(Collate("name", name), "pk"))
    same(both, lambda rows: rows.order_by(Collate("name", name).desc(), "pk").values_list("name", flat=True))


#: By what text is sorted otherwise than by code points, and otherwise than by default.
LINGUISTIC = {"sqlite": "NOCASE", "mysql": "utf8mb4_unicode_ci"}
#: Of these a PostgreSQL has one or the other, as it was built and where it runs.
OF_POSTGRES = ["und-x-icu", "en_US.utf8", "C.utf8"]


def linguistic(alias):
    """Return a collation that is none of code points, or skip."""
    if connections[alias].vendor != "postgresql":
        return LINGUISTIC[connections[alias].vendor]
    with connections[alias].cursor() as cursor:
        cursor.execute("SELECT collname FROM pg_collation")
        there = {name for (name,) in cursor.fetchall()}
    for name in OF_POSTGRES:
        if name in there:
            return name
    pytest.skip("has no other collation")


def test_text_that_python_does_not_sort(both):
    """A database is asked for the ranks of what it sorts."""
    name = linguistic(both[0].db)
    if "." in name:
        pytest.skip(f"Django refuses the name {name!r}")
    same(both, lambda rows: rows.order_by(Collate("name", name), "pk"))
    same(both, lambda rows: rows.order_by(Collate("name", name).desc(), "-pk").values_list("pk", flat=True)[3:40])
    walked = [row.pk for row in both[1].order_by(Collate("name", name), "pk").chunked_iterator(4)]
    assert walked == [row.pk for row in both[0].order_by(Collate("name", name), "pk")]


def test_databases_that_sort_text_otherwise(alias):
    """Nobody can merge what they sort; by a collation that both are told it is merged."""
    name = linguistic(alias)
    with databases_like(alias, 2, "unlike") as (one, other):
        with connections[other].cursor() as cursor:
            if connections[alias].vendor == "sqlite":
                cursor.execute("ALTER TABLE testapp_sale DROP COLUMN name")
                cursor.execute(f"ALTER TABLE testapp_sale ADD COLUMN name varchar(40) COLLATE {name}")
            elif connections[alias].vendor == "mysql":
                cursor.execute("ALTER TABLE testapp_sale MODIFY name varchar(40) COLLATE utf8mb4_bin")
            else:
                cursor.execute(f'ALTER TABLE testapp_sale ALTER name TYPE varchar(40) COLLATE "{name}"')
        for place, each in enumerate((one, other)):
            Sale.objects.using(each).bulk_create(
                [Sale(pk=10 * place + n + 1, name=text) for n, text in enumerate(["b", "A", "a", "B"][place:])]
            )
        rows = Sale.objects.across(one, other)
        for ask in (
            lambda: list(rows.order_by("name")),
            lambda: list(rows.order_by("-number", "name")[:2]),
            lambda: rows.aggregate(Max("name")),
            lambda: list(rows.values("name").annotate(n=Count("pk"))),
            lambda: list(rows.values("name").distinct()),
            lambda: next(rows.order_by("name").chunked_iterator()),
            lambda: rows.order_by("name").parallel_map(key),
        ):
            with pytest.raises(errors.UnsupportedQuerySet, match=f"'{one}'.*'{other}'"):
                ask()
        agreed = {"sqlite": "BINARY", "postgresql": "C", "mysql": "utf8mb4_nopad_bin"}[connections[alias].vendor]
        assert [row.name for row in rows.order_by(Collate("name", agreed))] == ["A", "A", "B", "B", "a", "a", "b"]
        assert rows.order_by("pk").count() == 7
        for each in (one, other):
            connections[each].close()


def test_what_is_no_number_comes_last(postgres, shards_of_postgres):
    for place, name in enumerate(shards_of_postgres):
        values = [1.5, float("nan"), float("inf"), None, float("-inf")][place:]
        Sale.objects.using(name).all().delete()
        Sale.objects.using(name).bulk_create(
            [Sale(pk=10 * place + n + 1, weight=each) for n, each in enumerate(values)]
        )
        Sale.objects.using(postgres).bulk_create(Sale.objects.using(name))
    both = Sale.objects.using(postgres), Sale.objects.across(*shards_of_postgres)
    for order in (["weight", "pk"], ["-weight", "-pk"], [F("weight").desc(nulls_last=True), "pk"]):
        one, several = ([row.pk for row in rows.order_by(*order)] for rows in both)
        assert one == several
    for name in shards_of_postgres:
        connections[name].close()


@pytest.fixture
def shards_of_postgres(postgres, made):
    found, stack = made
    if postgres not in found:
        found[postgres] = stack.enter_context(databases_like(postgres, 3))
    return found[postgres]


# --- Maps -----------------------------------------------------------------------------------


def described(row):
    assert not any(name.startswith("parallel_orm") for name in row.__dict__)
    return row.pk, row.name, row._state.db


def key(row):
    return row.pk


def refusing_some(row):
    if row.pk % 7 == 0:
        raise ValueError(row.pk)
    return row.pk


def none_of_some(row):
    return None if row.pk % 5 == 0 else row.pk


WAYS = {"processes": {"processes": 2}, "threads": {"threads": 2}, "inline": {"executor": "inline"}}


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def way(request):
    return request.param


def test_map_in_the_order_of_all(both, way):
    one, several = both
    for order in (["name", "pk"], ["-amount", "pk"], [F("at").desc(nulls_first=True), "-pk"]):
        expected = [row.pk for row in one.order_by(*order)]
        assert several.order_by(*order).parallel_map(key, chunk_size=4, **way) == expected
        with several.order_by(*order).parallel_imap(key, chunk_size=4, **way) as stream:
            assert list(stream) == expected
        assert several.order_by(*order).parallel_map(none_of_some, skip_none=True, chunk_size=4, **way) == [
            each for each in expected if each % 5
        ]


def test_map_without_an_order(both, way):
    """One database after the other, each by primary key; or as they come in."""
    _, several = both
    expected = [row.pk for name in several.aliases for row in several.on(name).order_by("pk")]
    results = several.parallel_map(key, chunk_size=4, **way)
    assert results == expected
    assert results.report.by_alias == {name: several.on(name).count() for name in several.aliases}
    assert list(several.parallel_imap(key, chunk_size=4, **way)) == expected
    assert sorted(several.parallel_map(key, ordered=False, chunk_size=4, **way)) == sorted(expected)
    assert sorted(several.parallel_imap(key, ordered=False, chunk_size=4, **way)) == sorted(expected)
    assert {home for _, _, home in several.parallel_map(described, chunk_size=9, **way)} == set(several.aliases)


def test_each_and_reduce(both, way):
    _, several = both
    report = several.parallel_each(key, chunk_size=4, keys=True, **way)
    assert (report.rows, sorted(report.keys)) == (60, list(range(1, 61)))
    assert several.parallel_reduce(key, int.__add__, 0, chunk_size=4, **way) == sum(range(1, 61))
    order = several.order_by("name", "pk")
    in_turn = "".join(str(row.pk) for name in several.aliases for row in order.on(name))
    assert order.parallel_reduce(str_of_key, str.__add__, "", chunk_size=4, **way) == in_turn
    assert several.parallel_map(len, batched=True, ordered=False, chunk_size=10, **way).report.rows == 60


def str_of_key(row):
    return str(row.pk)


def test_failures_stand_in_their_places(both, way):
    """What failed is where its row is in the order of all, and can be done again."""
    one, several = both
    expected = [row.pk for row in one.order_by("-name", "pk")]
    order = several.order_by("-name", "pk")
    results = order.parallel_map(refusing_some, on_error="collect", chunk_size=4, **way)
    assert [each.key if isinstance(each, Failure) else each for each in results] == expected
    failures = [each for each in results if isinstance(each, Failure)]
    assert [results[each.index] for each in failures] == failures
    assert len(failures) == 8
    again = results.report.retry()
    assert again.report.failed == len(again) == 8
    stream = order.parallel_imap(refusing_some, on_error="collect", chunk_size=4, **way)
    assert [each.key if isinstance(each, Failure) else each for each in stream] == expected
    with pytest.raises(ValueError) as raised:
        order.parallel_map(refusing_some, chunk_size=4, **way)
    assert any("primary key" in each for each in raised.value.__notes__)


def test_chunks_of_all_databases_are_out_at_once(both):
    """Two workers meet at a barrier, each with a chunk of another database."""
    _, several = both
    first, second = (several.on(name) for name in several.aliases[:2])
    meeting, met = threading.Barrier(2), []

    def meet(row):
        if not met:
            homes.add(row._state.db)
            meeting.wait(60)
            met.append(row)
        return row.pk

    homes = set()
    rows = Sale.objects.across(*several.aliases[:2])
    rows.parallel_each(meet, threads=2, chunk_size=50)
    assert homes == {first.db, second.db}


def test_a_stream_holds_few_chunks_however_the_rows_lie(alias, shards):
    """All rows of one database come before those of the others: these wait, and are not read ahead."""
    for place, name in enumerate(shards):
        Sale.objects.using(name).bulk_create([Sale(pk=place * 1000 + n + 1, number=place) for n in range(200)])
    read = Counter()

    def count(row):
        read[row._state.db] += 1
        return row.pk

    rows = Sale.objects.across(*shards).order_by("number", "pk")
    with rows.parallel_imap(count, threads=2, chunk_size=5) as stream:
        first = [next(stream) for _ in range(150)]
        ahead = read[shards[1]] + read[shards[2]]
        assert first == list(range(1, 151))
        assert ahead <= 80, read
        assert len(list(stream)) == 450


def test_maps_that_are_refused(both):
    _, several = both
    with pytest.raises(errors.UnsupportedQuerySet, match="slice"):
        several.order_by("pk")[:5].parallel_map(key)
    with pytest.raises(errors.UnsupportedQuerySet, match="groups"):
        several.values("number").distinct().parallel_map(key)
    with pytest.raises(errors.UnsupportedQuerySet, match="partial"):
        Sale.objects.across(*several.aliases, partial=True).parallel_map(key)
    with pytest.raises(errors.InvalidOption, match="merged"):
        parallel_map([several.order_by("name"), several], key)
    assert len(parallel_map([several, several], key, executor="inline")) == 120
    with pytest.raises(errors.UnsupportedQuerySet, match="writable"):
        several.parallel_update(key)
    with pytest.raises(errors.UnsupportedQuerySet, match="writable"):
        several.parallel_delete()
    with pytest.raises(errors.UnsupportedQuerySet, match="slice"):
        several.order_by("pk")[:5].explain_plan()
    writable = Sale.objects.across(*several.aliases, writable=True)
    with pytest.raises(errors.UnsupportedQuerySet, match=r"distinct\(\)"):
        writable.order_by("number").distinct("number").parallel_update(key)
    with pytest.raises(errors.UnsupportedQuerySet, match="union of slices"):
        writable.order_by("pk")[:1].union(writable.order_by("-pk")[:1]).parallel_update(key)
    with pytest.raises(TypeError, match="slice"):
        writable.order_by("pk")[:5].parallel_update(key)


def test_plan_of_the_walk_of_a_slice(both):
    """Each database is asked from its beginning to the end of the slice."""
    plans = both[1].order_by("pk")[2:5].explain_plan(walk=True)
    assert {plan.count() for plan in plans.values()} == {5}


def doubled(row):
    row.number *= 2


def guilty(row):
    if row.pk == 5:
        raise ValueError("guilty")
    row.number += 100


def test_parallel_writes(alias, shards):
    homes = spread(sales(40), alias, shards)
    rows = Sale.objects.across(*shards, writable=True)
    expected = {pk: 2 * number for pk, number in Sale.objects.using(alias).values_list("pk", "number")}
    report = rows.parallel_update(doubled, chunk_size=6, processes=2)
    assert {row.pk: row.number for row in rows} == expected
    assert report.succeeded == 40
    assert report.by_alias == dict(Counter(homes.values()))
    report = rows.parallel_update(guilty, chunk_size=6, threads=2, on_error="skip")
    assert [failure.key for failure in report.errors] == [5]
    assert report.succeeded == 39
    with pytest.raises(errors.InvalidOption, match="run_id"):
        rows.parallel_update(doubled, run_id="one")
    report = rows.filter(pk__gt=10).parallel_delete(chunk_size=6, processes=2)
    assert report.succeeded == 30
    assert rows.all().count() == 10


def test_maps_in_a_coroutine(both):
    one, several = both

    async def use():
        order = several.order_by("name", "pk")
        rows = [row.pk async for row in order]
        walked = [row.pk async for row in order.achunked_iterator(7)]
        iterated = [row.pk async for row in order.aiterator(7)]
        mapped = await order.aparallel_map(key, threads=2)
        number, first = await several.acount(), await order.afirst()
        return rows, walked, iterated, list(mapped), number, first.pk, await several.aaggregate(n=Sum("number"))

    expected = [row.pk for row in one.order_by("name", "pk")]
    rows, walked, iterated, mapped, number, first, total = run(use())
    assert rows == walked == iterated == mapped == expected
    assert (number, first) == (60, expected[0])
    assert total == one.aggregate(n=Sum("number"))


@pytest.mark.parametrize("verb", ["acount", "aexists", "aget", "afirst", "alast", "aaggregate", "ain_bulk", "loop"])
def test_coroutines_meet_in_the_databases(both, verb, monkeypatch):
    """Two that are gathered ask two databases each, all at once: one after the other they would wait for ever."""
    one, several = both
    barrier, execute = threading.Barrier(4), SQLCompiler.execute_sql

    def meet(self, *args, **kwargs):
        barrier.wait(20)
        return execute(self, *args, **kwargs)

    async def ask(pk):
        rows = several.across(*several.aliases[:2]).filter(pk=pk).order_by("name")
        if verb == "loop":
            return [row.pk async for row in rows]
        return await getattr(rows, verb)(*([Max("name")] if verb == "aaggregate" else []))

    async def use():
        return await asyncio.gather(*map(ask, keys), return_exceptions=True)

    # Of both databases, and of none: no yes ends the other's query before that is asked.
    keys = (
        [-1, -2] if verb == "aexists" else list(Sale.objects.using(several.aliases[0]).values_list("pk", flat=True)[:2])
    )
    monkeypatch.setattr(SQLCompiler, "execute_sql", meet)
    answers = run(use())
    monkeypatch.undo()
    rows = {row.pk: row for row in one.filter(pk__in=keys)}
    expected = {
        "acount": lambda key: 1,
        "aexists": lambda key: False,
        "aget": rows.get,
        "afirst": rows.get,
        "alast": rows.get,
        "aaggregate": lambda key: {"name__max": rows[key].name},
        "ain_bulk": lambda key: {key: rows[key]},
        "loop": lambda key: [key],
    }[verb]
    assert answers == list(map(expected, keys))


def test_started_in_a_coroutine(both):
    """Where nothing is known of the collations yet: the catalogues are asked in another thread."""
    one, several = both

    async def use():
        collations._known.clear()
        rows = several.order_by("name", "pk").start_fetch()
        collations._known.clear()
        first = await several.order_by("-name", "pk").start_first()
        return [row async for row in rows], first

    rows, first = run(use())
    assert plain(rows) == plain(list(one.order_by("name", "pk")))
    assert plain(first) == plain(one.order_by("-name", "pk").first())


def test_started_as_it_would_be_asked(both):
    one, several = both
    rows, first = several.order_by("pk"), one.order_by("pk").first()
    assert len(rows) == 60
    assert rows.start_first().result() == first
    with pytest.raises(errors.UnsupportedQuerySet, match="locks rows"):
        several.select_for_update().start_get(pk=1)
    with pytest.raises(TypeError, match="in_bulk"):
        several[:3].start_in_bulk([1])


ASKED_OF_ONE_WITHOUT_TABLE = {
    "iterator": lambda rows: list(rows.order_by("pk").iterator()),
    "unordered": lambda rows: list(rows.iterator()),
    "walk": lambda rows: list(rows.order_by("pk").chunked_iterator(3)),
    "text": lambda rows: list(rows.order_by("name", "pk")),
    "explain": lambda rows: rows.explain(),
    "count": lambda rows: rows.count(),
    "first": lambda rows: rows.first(),
}


MAPPED = {
    "map": lambda rows, way: rows.order_by("number", "pk").parallel_map(key, **way),
    "map of pages": lambda rows, way: rows.parallel_map(key, **way),
    "imap": lambda rows, way: list(rows.parallel_imap(key, **way)),
    "each": lambda rows, way: rows.parallel_each(key, on_error="collect", **way),
    "reduce": lambda rows, way: rows.parallel_reduce(key, int.__add__, 0, **way),
    "update": lambda rows, way: rows.parallel_update(doubled, **way),
    "delete": lambda rows, way: rows.parallel_delete(**way),
    "plan": lambda rows, way: str(rows.explain_plan()),
}


def test_an_error_of_a_map_names_its_database(alias, shards):
    """One that comes while chunks are cut, and one that comes in a worker."""
    rows = Sale.objects.across(*shards, writable=True)
    for name in shards:
        Sale.objects.using(name).create(pk=1)
    with connections[shards[1]].cursor() as cursor:
        cursor.execute("ALTER TABLE testapp_sale RENAME TO elsewhere")
    connections[shards[1]].close()
    try:
        for verb, ask in MAPPED.items():
            with pytest.raises(Exception) as raised:  # psycopg2's own, of Django's iterator()
                ask(rows, {"threads": 2})
            assert any(repr(shards[1]) in each for each in raised.value.__notes__), verb
    finally:
        connections[shards[1]].close()
        with connections[shards[1]].cursor() as cursor:
            cursor.execute("ALTER TABLE elsewhere RENAME TO testapp_sale")
    for verb in ("map", "imap", "update"):
        with fail_chunk(0, ProgrammingError("lost")), pytest.raises(ProgrammingError) as raised:
            MAPPED[verb](rows, {"threads": 2})
        assert any(f"testapp.Sale on '{alias}_shard" in each for each in raised.value.__notes__), verb


def test_a_table_that_one_does_not_have(alias, shards):
    """Whatever is asked, the error names the database; or the queryset says which is missing."""
    collations._known.clear()
    with connections[shards[1]].cursor() as cursor:
        cursor.execute("ALTER TABLE testapp_sale RENAME TO elsewhere")
    connections[shards[1]].close()
    try:
        for verb, ask in ASKED_OF_ONE_WITHOUT_TABLE.items():
            try:
                ask(Sale.objects.across(*shards))
            except Exception as error:
                told = [str(error), *getattr(error, "__notes__", [])]
                assert any(repr(shards[1]) in each for each in told), verb
            else:
                pytest.fail(f"{verb} answered")
        rows = Sale.objects.across(*shards, partial=True)
        assert rows.first() is None
        assert set(rows.missing) == {shards[1]}
    finally:
        connections[shards[1]].close()
        with connections[shards[1]].cursor() as cursor:
            cursor.execute("ALTER TABLE elsewhere RENAME TO testapp_sale")
        collations._known.clear()


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("order", [("pk",), ("-number", "pk"), ("name", "-number"), ("id",)])
def test_an_order_by_own_columns_is_what_django_makes_of_it(default, order, backwards):
    """Of these it need not be asked, which takes as long as a quick query."""
    rows = Sale.objects.using(default).order_by(*order)
    rows = rows.reverse() if backwards else rows
    compiler = rows.query.clone().get_compiler(default)
    compiler.setup_query()
    theirs = [resolved for resolved, _ in compiler.get_order_by()]
    ours = _order_by_own_columns(rows.query.clone(), rows.query.order_by)
    assert ours == theirs
    assert [compiler.compile(each) for each in ours] == [compiler.compile(each) for each in theirs]
