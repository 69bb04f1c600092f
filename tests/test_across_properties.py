"""Whatever several databases are asked, they answer as one that has all their rows, or refuse."""

from __future__ import annotations

import datetime as dt
import os
import uuid
from contextlib import ExitStack
from decimal import Decimal
from itertools import islice

import pytest
from django.db import connections
from django.db.models import (
    Avg,
    BooleanField,
    Case,
    CharField,
    Count,
    ExpressionWrapper,
    F,
    Max,
    Min,
    Q,
    StdDev,
    Sum,
    Value,
    When,
)
from django.db.models.functions import Cast, Coalesce, Length, Lower, Mod, Upper
from django.test import override_settings
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

from parallel_orm import collations, errors
from tests.conftest import _run
from tests.shards import databases_like
from tests.test_across import plain
from tests.testapp.models import Everything, Place, Restaurant, Sale, Seat, Shop

#: Many with PARALLEL_ORM_EXAMPLES=1000, say.
EXAMPLES = settings(
    max_examples=int(os.environ.get("PARALLEL_ORM_EXAMPLES", "8")),
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # to shrink takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
MODELS = (Shop, Sale, Everything, Place, Restaurant, Seat)
TEXTS = [
    "",
    " ",
    "a",
    "A",
    "a ",
    "B",
    "b",
    "ä",
    "Z",
    "z",
    "_",
    "a b",
    "ab",
    "é",
    "ss",
    "ß",
    "10",
    "9",
    "日本",
    "😀",
    "x" * 40,
]
#: Of which MariaDB finds no two equal.
APART = ["", "a", "b", "z", "_", "a b", "ab", "10", "9", "日本"]
DAY = dt.datetime(2026, 10, 25, 0, 0, tzinfo=dt.UTC)


@pytest.fixture(scope="module")
def made(pytestconfig):
    found, stack = {}, ExitStack()
    yield found, stack
    with pytestconfig.stash[_run].databases.allowing(*found):
        stack.close()


@pytest.fixture
def four(alias, made):
    """One database, and three beside it, with the tables of these models."""
    found, stack = made
    if alias not in found:
        found[alias] = stack.enter_context(databases_like(alias, 4, "property", MODELS))
    yield found[alias]
    for name in found[alias]:
        connections[name].close()


def emptied(aliases):
    for name in aliases:
        for model in (Sale, Shop, Everything, Restaurant, Place, Seat):
            model.objects.using(name).all()._raw_delete(name)


def spread(rows, homes, aliases):
    """Save rows on the first database, and each on one of the others."""
    one, *several = aliases
    if rows:
        type(rows[0]).objects.using(one).bulk_create(rows)
    for place, name in enumerate(several):
        there = [row for row, home in zip(rows, homes, strict=False) if home % len(several) == place]
        if there:
            type(rows[0]).objects.using(name).bulk_create(there)


def some(values):
    return st.none() | values


def floats(vendor):
    odd = [1e300, 5e-324, -0.0, 0.0, 0.1, 0.30000000000000004, 0.3]
    if vendor != "mysql":
        odd += [float("inf"), float("-inf")]
    if vendor == "postgresql":
        odd.append(float("nan"))
    return st.sampled_from(odd)


def sales(vendor):
    texts = APART if vendor == "mysql" else TEXTS
    moments = st.integers(0, 40).map(lambda n: DAY + dt.timedelta(minutes=15 * n, microseconds=n % 3))
    return st.fixed_dictionaries(
        {
            "number": st.integers(-2, 2),
            "amount": some(st.integers(-300, 300).map(lambda n: Decimal(n) / 100)),
            "weight": some(floats(vendor)),
            "name": some(st.sampled_from(texts)),
            "at": some(moments),
            "day": some(st.integers(0, 60).map(lambda n: DAY.date() + dt.timedelta(n))),
            "took": some(st.integers(-5, 5).map(lambda n: dt.timedelta(seconds=n, microseconds=n % 2))),
            "code": some(st.integers(0, 3).map(lambda n: uuid.UUID(int=n << 64 | (3 - n) << 90, version=4))),
            "shop_id": some(st.integers(1, 3)),
        }
    )


ORDERED_BY = {
    **{name: F(name) for name in ("number", "amount", "weight", "name", "at", "day", "took", "code", "shop_id")},
    "shop": F("shop"),
    "shop__name": F("shop__name"),
    "length": Length("name"),
    "lower": Lower("name"),
    "mod": Mod("pk", 3),
    "sum": F("number") + F("pk") % 4,
    "coalesce": Coalesce("name", Value("m")),
    "condition": Q(number__gt=0),
}

WAYS = {
    "asc": lambda each: each.asc(),
    "desc": lambda each: each.desc(),
    "nulls first": lambda each: each.asc(nulls_first=True),
    "nulls last": lambda each: each.asc(nulls_last=True),
    "desc nulls first": lambda each: each.desc(nulls_first=True),
    "desc nulls last": lambda each: each.desc(nulls_last=True),
}

FILTERS = {
    "all": lambda rows: rows,
    "number": lambda rows: rows.filter(number__gte=0),
    "not number": lambda rows: rows.exclude(number=1),
    "name": lambda rows: rows.filter(Q(name__gt="a") | Q(amount=None)),
    "shop": lambda rows: rows.filter(shop__name__gte="e"),
    "none": lambda rows: rows.none(),
    "nothing": lambda rows: rows.filter(pk__in=[]),
    "or": lambda rows: rows.filter(number=1) | rows.filter(number=-1),
    "alias": lambda rows: rows.alias(twice=F("number") * 2).filter(twice__lt=3),
}

SHAPES = {
    "instances": lambda rows: rows,
    "only": lambda rows: rows.only("name"),
    "defer": lambda rows: rows.defer("name", "at"),
    "annotated": lambda rows: rows.annotate(big=F("amount") * 2, up=Upper("name")),
    "select related": lambda rows: rows.select_related("shop"),
    "prefetched": lambda rows: rows.prefetch_related("shop"),
    "values": lambda rows: rows.values("pk", "name", "shop__name"),
    "values of all": lambda rows: rows.values(),
    "values list": lambda rows: rows.values_list("shop__name", "pk", "amount"),
    "expressions": lambda rows: rows.values_list("pk", Lower("name"), F("number") + 1),
    "flat": lambda rows: rows.values_list("pk", flat=True),
    "flat text": lambda rows: rows.values_list("name", flat=True),
    "named": lambda rows: rows.values_list("pk", "number", named=True),
    "extra": lambda rows: rows.extra(select={"two": "1 + 1"}),
    "extra values": lambda rows: rows.extra(select={"two": "1 + 1"}).values_list("two", "pk"),
    "union": lambda rows: rows.order_by().union(rows.order_by().filter(number=2)),
    "intersection": lambda rows: rows.order_by().intersection(rows.order_by().filter(number__gte=0)),
    "difference": lambda rows: rows.order_by().difference(rows.order_by().filter(number__gte=1)),
}

ASKED = {
    "list": list,
    "started": lambda rows: list(rows.start_fetch()),
    "iterator": lambda rows: list(rows.iterator(3)),
    "walk": lambda rows: list(rows.chunked_iterator(2)),
    "count": lambda rows: rows.count(),
    "exists": lambda rows: rows.exists(),
    "first": lambda rows: rows.first(),
    "last": lambda rows: rows.last(),
    "reversed": lambda rows: list(rows.reverse()),
    "second": lambda rows: list(rows[1:2]),
    "step": lambda rows: list(rows[::3]),
    "started first": lambda rows: rows.start_first().result(),
    "bool": bool,
}


def same(ask, one, several):
    """Both answer alike, or both raise the same; or several databases refuse."""
    try:
        found = ask(several)
    except errors.UnsupportedQuerySet as refusal:
        note(str(refusal))
        return
    except Exception as error:  # as one database has it
        with pytest.raises(type(error)):
            ask(one)
        return
    try:
        expected = ask(one)
    except TypeError as error:  # Django's, of a slice of an ordered union of nothing
        if "item assignment" not in str(error):
            raise
    else:
        assert odd(plain(found)) == odd(plain(expected))


def odd(value):
    """Make NaN equal to itself."""
    if isinstance(value, dict):
        return {key: odd(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [odd(each) for each in value]
    if isinstance(value, memoryview):
        return bytes(value)
    return "NaN" if value != value else value


@given(data=st.data())
@EXAMPLES
def test_rows(alias, four, data):
    """Any rows, in any databases, in any order, in any shape."""
    vendor = connections[alias].vendor
    found = data.draw(st.lists(st.tuples(sales(vendor), st.integers(0, 2)), max_size=14))
    emptied(four)
    for name in four:
        Shop.objects.using(name).bulk_create([Shop(pk=1, name="a"), Shop(pk=2, name="B"), Shop(pk=3, name="é")])
    spread([Sale(pk=pk + 1, **fields) for pk, (fields, _) in enumerate(found)], [home for _, home in found], four)
    pick = lambda choices: data.draw(st.sampled_from(sorted(choices)))  # noqa: E731
    for _ in range(4):
        shape = pick(SHAPES)
        if shape in ("union", "intersection", "difference"):
            by = data.draw(st.lists(st.sampled_from(["number", "-name", "at", "-weight", "shop_id"]), max_size=3))
            order = [*by, data.draw(st.sampled_from(["pk", "-pk"]))]
        else:
            by = data.draw(
                st.lists(st.tuples(st.sampled_from(sorted(ORDERED_BY)), st.sampled_from(sorted(WAYS))), max_size=3)
            )
            order = [WAYS[way](as_expression(ORDERED_BY[name])) for name, way in by]
            order.append(data.draw(st.sampled_from(["pk", "-pk"])))
        filtered, asked = pick(FILTERS), pick(ASKED)
        low, high = data.draw(st.tuples(some(st.integers(0, 5)), some(st.integers(5, 12))))
        note(f"{shape} {filtered} {by} {asked} [{low}:{high}]")

        def ask(rows, shape=shape, filtered=filtered, asked=asked, order=order, low=low, high=high):
            rows = SHAPES[shape](FILTERS[filtered](rows)).order_by(*order)
            return ASKED[asked](rows[low:high] if (low, high) != (None, None) and asked != "reversed" else rows)

        same(ask, Sale.objects.using(four[0]), Sale.objects.across(*four[1:]))


def as_expression(each):
    return ExpressionWrapper(each, BooleanField()) if isinstance(each, Q) else each


AGGREGATES = {
    "n": Count("pk"),
    "names": Count("name"),
    "some": Count("pk", filter=Q(number__gt=0)),
    "sum": Sum("number"),
    "sums": Sum("amount"),
    "least": Min("amount"),
    "most": Max("name"),
    "last": Max("at"),
    "average": Avg("number"),
    "averages": Avg("amount", filter=Q(number__lt=2)),
    "default": Sum("number", filter=Q(name="a"), default=7),
    "heaviest": Max("weight"),
    "lightest": Min("weight"),
    "spread": StdDev("number"),
}
GROUPS = {
    "number": "number",
    "name": "name",
    "shop": "shop__name",
    "day": "day",
    "amount": "amount",
    "weight": "weight",
    "took": "took",
    "code": "code",
    "at": "at",
}


@given(data=st.data())
@EXAMPLES
def test_groups_and_what_is_distinct(alias, four, data):
    """Groups, distinct values and aggregates of any rows."""
    vendor = connections[alias].vendor
    found = data.draw(st.lists(st.tuples(sales(vendor), st.integers(0, 2)), max_size=14))
    emptied(four)
    for name in four:
        Shop.objects.using(name).bulk_create([Shop(pk=1, name="a"), Shop(pk=2, name="B"), Shop(pk=3, name="é")])
    spread([Sale(pk=pk + 1, **fields) for pk, (fields, _) in enumerate(found)], [home for _, home in found], four)
    one, several = Sale.objects.using(four[0]), Sale.objects.across(*four[1:])
    names = st.lists(st.sampled_from(sorted(AGGREGATES)), min_size=1, max_size=3, unique=True)
    columns = st.lists(st.sampled_from(sorted(GROUPS.values())), min_size=1, max_size=2, unique=True)
    for _ in range(3):
        asked = {name: AGGREGATES[name] for name in data.draw(names)}
        by = data.draw(columns)
        order = [data.draw(st.sampled_from(["", "-"])) + name for name in data.draw(st.permutations(by))]
        low, high = data.draw(st.tuples(some(st.integers(0, 2)), some(st.integers(2, 6))))
        is_sliced = (low, high) != (None, None)
        note(f"{sorted(asked)} of {by} by {order} [{low}:{high}]")
        if "spread" not in asked or vendor == "postgresql":
            close(lambda rows, asked=asked: rows.aggregate(**asked), one, several)

            def groups(rows, asked=asked, by=by, order=order, low=low, high=high, is_sliced=is_sliced):
                rows = rows.values(*by).annotate(**asked).order_by(*order)
                return list(rows[low:high] if is_sliced else rows)

            close(groups, one, several)

        def distinct(rows, by=by, order=order, low=low, high=high, is_sliced=is_sliced):
            rows = rows.values_list(*by).distinct().order_by(*order)
            return list(rows[low:high] if is_sliced else rows)

        same(distinct, one, several)
        same(lambda rows, by=by: rows.values(*by).distinct().count(), one, several)
        same(lambda rows, by=by: rows.values(*by).order_by().annotate(n=Count("pk")).count(), one, several)
        if vendor == "postgresql":
            same(lambda rows, by=by, order=order: list(rows.order_by(*order, "pk").distinct(*by)), one, several)


def close(ask, one, several):
    """As :func:`same`; floats may differ in their last digits."""

    def near(value):
        if isinstance(value, dict):
            return {key: near(each) for key, each in value.items()}
        if isinstance(value, list):
            return [near(each) for each in value]
        return round(value, 3) if isinstance(value, (float, Decimal)) and value == value else value

    same(lambda rows: near(ask(rows)), one, several)


def everything(vendor):
    return st.fixed_dictionaries(
        {
            "boolean": st.booleans(),
            "decimal": some(st.integers(-(10**8) + 1, 10**8 - 1).map(lambda n: Decimal(n) / 100)),
            "date": some(st.dates(dt.date(1000, 1, 1), dt.date(9999, 12, 31))),
            "time": some(st.times()),
            "duration": some(st.integers(-(10**12), 10**12).map(lambda n: dt.timedelta(microseconds=n))),
            "floating": some(st.floats(-1e9, 1e9)),
            "json": some(st.sampled_from([1, "a", {"a": [1]}])),
            "binary": some(st.binary(max_size=3)),
            "uuid": some(st.uuids(version=4) | st.uuids(version=1)),
            "address": some(st.sampled_from(["10.0.0.1", "9.0.0.1", "::1", "fe80::1", "ff::", "10.0.0.10"])),
            "mood": st.sampled_from(["", "a", "b"]),
        }
    )


@given(data=st.data())
@EXAMPLES
def test_every_kind_of_column(alias, four, data):
    vendor = connections[alias].vendor
    found = data.draw(st.lists(st.tuples(everything(vendor), st.integers(0, 2)), max_size=14))
    emptied(four)
    spread([Everything(pk=pk + 1, **each) for pk, (each, _) in enumerate(found)], [home for _, home in found], four)
    one, several = Everything.objects.using(four[0]), Everything.objects.across(*four[1:])
    names = st.sampled_from([field.name for field in Everything._meta.fields])
    for name in data.draw(st.lists(names, min_size=2, max_size=2, unique=True)):
        for order in ([name, "pk"], [f"-{name}", "pk"]):
            note(str(order))
            same(lambda rows, order=order: list(rows.order_by(*order)), one, several)
            same(lambda rows, order=order: list(rows.order_by(*order).values("pk").iterator(2)), one, several)
        same(lambda rows, name=name: list(rows.values_list(name, flat=True).distinct().order_by(name)), one, several)
        same(lambda rows, name=name: rows.aggregate(a=Min(name), b=Max(name)), one, several)
        same(lambda rows, name=name: list(rows.values(name).annotate(n=Count("pk")).order_by(name)), one, several)


@given(data=st.data())
@EXAMPLES
def test_models_of_several_tables_and_keys_of_several_columns(alias, four, data):
    emptied(four)
    stars = data.draw(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["a", "b", "é"]), st.integers(0, 2))))
    for pk, (number, text, home) in enumerate(stars):
        for name in (four[0], four[1 + home]):
            Restaurant(pk=pk + 1, name=text, stars=number).save(using=name)
    both = Restaurant.objects.using(four[0]), Restaurant.objects.across(*four[1:])
    for order in ("stars", "pk"), ("-name", "-pk"), ("place_ptr__name", "stars", "-pk"), ("place_ptr", "pk"):
        note(str(order))
        same(lambda rows, order=order: list(rows.order_by(*order)), *both)
        same(lambda rows, order=order: list(rows.order_by(*order).values("stars", "name")), *both)
        same(lambda rows, order=order: list(rows.order_by(*order).only("stars").chunked_iterator(3)), *both)
    same(lambda rows: [row.name for row in rows], *both)
    same(lambda rows: [row.name for row in rows.reverse()], *both)
    same(lambda rows: list(rows.values("name").annotate(n=Sum("stars")).order_by("n", "name")), *both)
    places = Place.objects.using(four[0]), Place.objects.across(*four[1:])
    same(lambda rows: list(rows.order_by("restaurant__stars", "pk")), *places)
    same(lambda rows: list(rows.select_related("restaurant").order_by("-pk")), *places)
    seats = st.tuples(st.sampled_from("abc"), st.integers(1, 3))
    chosen = data.draw(st.dictionaries(seats, st.integers(0, 2)))
    spread([Seat(row=row, number=number) for row, number in chosen], list(chosen.values()), four)
    both = Seat.objects.using(four[0]), Seat.objects.across(*four[1:])
    for order in ("pk",), ("-pk",), ("number", "-row"), ("taken", "pk"):
        note(str(order))
        same(lambda rows, order=order: list(rows.order_by(*order)), *both)
        same(lambda rows, order=order: list(rows.order_by(*order).values_list("pk", flat=True)), *both)
        same(lambda rows, order=order: list(rows.order_by(*order)[1:4].values("row", "pk")), *both)
        same(lambda rows, order=order: list(rows.order_by(*order).chunked_iterator(2)), *both)
    same(lambda rows: rows.count(), *both)
    same(lambda rows: rows.in_bulk([("a", 1), ("b", 2)]), *both)
    same(lambda rows: rows.aggregate(n=Count("pk")), *both)


def test_the_hour_that_comes_twice(alias, four):
    """Times of a zone compare as the moments that they are, where the database keeps moments."""
    emptied(four)
    for name in four:
        connections[name].close()
        connections.settings[name]["TIME_ZONE"] = "Europe/Amsterdam"
        for cached in ("timezone", "timezone_name"):
            connections[name].__dict__.pop(cached, None)
        connections[name].settings_dict["TIME_ZONE"] = "Europe/Amsterdam"
    try:
        rows = [Sale(pk=n + 1, at=DAY + dt.timedelta(minutes=20 * n)) for n in range(6)]
        if connections[alias].vendor != "postgresql":
            rows = rows[:3]  # the others have the same times there
        spread(rows, [0, 1, 2, 1, 0, 2], four)
        both = Sale.objects.using(four[0]), Sale.objects.across(*four[1:])
        same(lambda rows: list(rows.order_by("at").values_list("pk", flat=True)), *both)
        same(lambda rows: list(rows.order_by("-at").values_list("pk", flat=True).iterator(1)), *both)
        same(lambda rows: list(rows.values("at").distinct().order_by("at")), *both)
        same(lambda rows: [row["n"] for row in rows.values("at").annotate(n=Count("pk")).order_by("at")], *both)
        same(lambda rows: [row["n"] for row in rows.values("at").annotate(n=Max("pk")).order_by("-at")], *both)
        for rows in both:
            in_order = rows.order_by("at").values_list("pk", flat=True)
            assert list(islice(in_order.chunked_iterator(1), 9)) == list(in_order)
        same(lambda rows: rows.filter(pk__lt=5).aggregate(Min("at"), Max("at")), *both)
        if connections[alias].vendor == "postgresql":
            with pytest.raises(errors.UnsupportedQuerySet, match="an hour comes twice a year"):
                both[1].values("at").distinct().count()
            with pytest.raises(errors.UnsupportedQuerySet, match="an hour comes twice a year"):
                list(both[1].values("number").annotate(m=Max("at")).order_by("m"))
        with override_settings(USE_TZ=False, TIME_ZONE="Europe/Amsterdam"):
            same(lambda rows: list(rows.order_by("at").values_list("pk", flat=True)), *both)
    finally:
        for name in four:
            connections[name].close()
            connections.settings[name].pop("TIME_ZONE", None)
            connections[name].settings_dict["TIME_ZONE"] = None
            for cached in ("timezone", "timezone_name"):
                connections[name].__dict__.pop(cached, None)


def test_text_whose_column_has_a_collation(alias, four):
    """What is made of a column, or refers to it, is sorted by the collation that it has in SQL, not in the column."""
    vendor = connections[alias].vendor
    if vendor == "sqlite":
        pytest.skip("a column keeps the collation that it was made with")
    alter = {
        "postgresql": 'ALTER TABLE testapp_sale ALTER COLUMN name TYPE varchar(40) COLLATE "C"',
        "mysql": "ALTER TABLE testapp_sale MODIFY name varchar(40) COLLATE utf8mb4_bin",
    }[vendor]
    back = {
        "postgresql": 'ALTER TABLE testapp_sale ALTER COLUMN name TYPE varchar(40) COLLATE "default"',
        "mysql": "ALTER TABLE testapp_sale MODIFY name varchar(40)",
    }[vendor]
    emptied(four)
    for name in four:
        with connections[name].cursor() as cursor:
            cursor.execute(alter)
    collations._known.clear()
    try:
        texts = ["a", "B", "c", "D", "é", "F"]
        spread([Sale(pk=n + 1, name=text) for n, text in enumerate(texts)], [0, 1, 2, 1, 0, 2], four)
        both = Sale.objects.using(four[0]), Sale.objects.across(*four[1:])
        made = {
            "column": F("name"),
            "cast": Cast("name", CharField(max_length=40)),
            "case": Case(*(When(name=text, then=Value(text)) for text in texts), output_field=CharField(max_length=9)),
            "wrapper": ExpressionWrapper(F("name"), CharField(max_length=40)),
        }
        for expression in made.values():
            same(lambda rows, by=expression: list(rows.order_by(by, "pk").values_list("name", flat=True)), *both)
    finally:
        for name in four:
            with connections[name].cursor() as cursor:
                cursor.execute(back)
        collations._known.clear()
