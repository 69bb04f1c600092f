"""Queries that Django's documentation explains itself by: a start in front of whatever evaluates them changes nothing.

After "Making queries", "Aggregation", "Query expressions", "Conditional expressions", "Database functions", "Managers",
"Performing raw SQL queries" and the reference of querysets; with models of the same names.
"""

from __future__ import annotations

import os
import pickle
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from itertools import cycle, islice
from typing import Any

import pytest
from django.core import serializers
from django.core.paginator import Paginator
from django.db.models import (
    Avg,
    Case,
    CharField,
    Count,
    DateField,
    Exists,
    ExpressionWrapper,
    F,
    FilteredRelation,
    FloatField,
    IntegerField,
    Max,
    Min,
    Model,
    OuterRef,
    Prefetch,
    Q,
    QuerySet,
    StdDev,
    Subquery,
    Sum,
    Value,
    When,
    Window,
)
from django.db.models import functions as db
from django.db.models.expressions import RawSQL
from django.db.models.fields.json import KT
from django.template import Context, Engine

from tests.manual.models import (
    Author,
    Blog,
    Book,
    Client,
    Company,
    Dog,
    Entry,
    EntryDetail,
    Experiment,
    Publisher,
    Restaurant,
    Store,
)
from tests.test_background import landed


@pytest.fixture
def manual(alias: str) -> Any:
    """Return what gives a model's manager; with a few rows of each, among them NULLs and what nobody refers to."""

    def of(model: Any) -> Any:
        return model.objects.using(alias)

    blogs = [of(Blog).create(name=name, tagline=f"All about {name}") for name in ("Beatles Blog", "Pop", "Cheddar")]
    authors = [
        of(Author).create(name=name, email=f"{name}@example.com", age=age, alias=nick, goes_by=goes)
        for name, age, nick, goes in [
            ("John", 40, None, "Johnny"),
            ("Paul", 42, "Macca", None),
            ("George", 38, None, None),
            ("Terry", 66, "Pratchett", "Terry"),
        ]
    ]
    for number in range(6):
        entry = of(Entry).create(
            blog=blogs[number % 2],
            headline=f"{'Lennon' if number % 3 == 0 else 'What'} {number}% would love",
            body_text="food" * number,
            pub_date=date(2005 + number % 3, 1 + number, 30 - number) if number != 1 else date(2008, 6, 1),
            mod_date=date(2009, 1, 1),
            number_of_comments=number * 3,
            number_of_pingbacks=number * 2 + 1,
            rating=number,
        )
        entry.authors.add(*authors[: 1 + number % 3])
        if number % 2:
            of(EntryDetail).create(entry=entry, details=f"details {number}")
    for name, data in [
        ("Rufus", {"breed": "labrador", "owner": {"name": "Bob", "other_pets": [{"name": "Fishy"}]}}),
        ("Meg", {"breed": "collie", "owner": None}),
        ("Fred", {}),
        ("Shep", None),
    ]:
        of(Dog).create(name=name, data=data)
    publishers = [of(Publisher).create(name=name) for name in ("BaloneyPress", "SalamiPress", "Nobody")]
    for number in range(5):
        book = of(Book).create(
            name=f"book {number}",
            pages=100 * number,
            price=Decimal("9.50") * (number + 1),
            rating=1.5 + number,
            publisher=publishers[number % 2],
            pubdate=date(2010 + number, 3, 1),
        )
        book.authors.add(authors[number % 3])
    of(Store).create(name="corner").books.add(*of(Book).all()[:3])
    of(Store).create(name="mall").books.add(*of(Book).all()[1:4])
    of(Company).create(name="Company AAA", ticker="AAA", num_employees=120, num_chairs=150)
    of(Company).create(name="Google", num_employees=50, num_chairs=30)
    for name, joined, kind in [("Jane", 30, "G"), ("James", 7, "R"), ("Jack", 365 * 3, "P")]:
        of(Client).create(name=name, account_registered_on=date(2026, 1, 1) - timedelta(days=joined), account_type=kind)
    for number in range(3):
        begins = datetime(2014, 6, 15 + number, 14, 30, 50, 321, tzinfo=UTC)
        of(Experiment).create(
            name=f"e{number}",
            start_datetime=begins,
            start_date=begins.date(),
            start_time=time(14, 30, 50),
            end_datetime=begins + timedelta(days=number),
        )
    of(Restaurant).create(name="Bob's Cafe", address="1 Main", serves_hot_dogs=True)
    return of


MAKING_QUERIES: dict[str, Any] = {
    "all": lambda of: of(Entry).all(),
    "filter": lambda of: of(Entry).filter(pub_date__year=2006),
    "chained": lambda of: (
        of(Entry)
        .filter(headline__startswith="What")
        .exclude(pub_date__gte=date(2008, 1, 1))
        .filter(pub_date__gte=date(2005, 1, 30))
    ),
    "slice": lambda of: of(Entry).order_by("headline")[1:4],
    "exact": lambda of: of(Entry).filter(headline__exact="What 1% would love"),
    "iexact": lambda of: of(Blog).filter(name__iexact="beatles blog"),
    "contains": lambda of: of(Entry).filter(headline__contains="%"),
    "regex": lambda of: of(Entry).filter(headline__regex=r"^(What|No) +"),
    "spans": lambda of: of(Entry).filter(blog__name="Beatles Blog"),
    "backwards": lambda of: of(Blog).filter(entry__headline__contains="Lennon"),
    "isnull": lambda of: of(Blog).filter(entry__authors__name__isnull=True),
    "one row": lambda of: of(Blog).filter(entry__headline__contains="Lennon", entry__pub_date__year=2005),
    "any rows": lambda of: of(Blog).filter(entry__headline__contains="Lennon").filter(entry__pub_date__year=2005),
    "exclude by a subquery": lambda of: of(Blog).exclude(
        entry__in=of(Entry).filter(headline__contains="Lennon", pub_date__year=2005)
    ),
    "F": lambda of: of(Entry).filter(number_of_comments__gt=F("number_of_pingbacks") * 2),
    "F of a sum": lambda of: of(Entry).filter(rating__lt=F("number_of_comments") + F("number_of_pingbacks")),
    "F across a relation": lambda of: of(Entry).exclude(authors__name=F("blog__name")),
    "F of a date": lambda of: of(Entry).filter(mod_date__gt=F("pub_date") + timedelta(days=3)),
    "transform in F": lambda of: of(Entry).filter(pub_date__year=F("mod_date__year")),
    "years": lambda of: (
        of(Entry)
        .values("pub_date__year")
        .annotate(
            top_rating=Subquery(
                of(Entry).filter(pub_date__year=OuterRef("pub_date__year")).order_by("-rating").values("rating")[:1]
            ),
            total_comments=Sum("number_of_comments"),
        )
    ),
    "pk__in": lambda of: of(Blog).filter(pk__in=[1, 4, 7]),
    "pk__gt": lambda of: of(Entry).filter(blog__pk__gt=0),
    "json key": lambda of: of(Dog).filter(data__breed="collie"),
    "json path": lambda of: of(Dog).filter(data__owner__other_pets__0__name="Fishy"),
    "json null": lambda of: of(Dog).filter(data__owner=None),
    "json missing": lambda of: of(Dog).filter(data__owner__isnull=True),
    "json KT": lambda of: (
        of(Dog)
        .annotate(first_breed=KT("data__breed"), owner_name=KT("data__owner__name"))
        .filter(first_breed__startswith="l")
    ),
    "has_key": lambda of: of(Dog).filter(data__has_any_keys=["owner", "breed"]),
    "Q": lambda of: of(Entry).filter(Q(headline__startswith="What") | ~Q(pub_date__year=2005), rating__gt=1),
    "related manager": lambda of: of(Blog).get(name="Pop").entry_set.filter(headline__contains="What"),
    "one to one": lambda of: of(Entry).filter(entrydetail__details__contains="details"),
    "an object as a value": lambda of: of(Entry).filter(blog=of(Blog).get(name="Pop")),
    "raw": lambda of: of(Author).raw("SELECT id, name, age FROM manual_author WHERE age > %s", [39]),
    "raw, deferred": lambda of: of(Author).raw("SELECT id, name FROM manual_author"),
    "raw, translated": lambda of: of(Author).raw(
        "SELECT id AS n, name AS who FROM manual_author", translations={"n": "id", "who": "name"}
    ),
    "multi-table inheritance": lambda of: of(Restaurant).filter(name="Bob's Cafe", serves_hot_dogs=True),
}

QUERYSETS: dict[str, Any] = {
    "annotate": lambda of: of(Blog).annotate(number_of_entries=Count("entry")).order_by("-number_of_entries", "pk"),
    "alias": lambda of: of(Blog).alias(entries=Count("entry")).filter(entries__gt=2),
    "order_by": lambda of: of(Entry).order_by("blog__name", "-headline"),
    "order by nulls": lambda of: of(Author).order_by(F("alias").asc(nulls_last=True), "pk"),
    "random, of one": lambda of: of(Blog).filter(name="Pop").order_by("?"),
    "reverse": lambda of: of(Entry).order_by("pk").reverse()[:5],
    "distinct": lambda of: of(Author).filter(entry__blog__name="Pop").distinct(),
    "values": lambda of: of(Blog).filter(name__startswith="Beatles").values(),
    "values of functions": lambda of: of(Blog).values(lower_name=db.Lower("name")),
    "values across": lambda of: of(Blog).values("name", "entry__headline"),
    "values_list": lambda of: of(Entry).values_list("id", db.Lower("headline")),
    "flat": lambda of: of(Entry).order_by("id").values_list("id", flat=True),
    "named": lambda of: of(Entry).values_list("id", "headline", named=True),
    "dates": lambda of: of(Entry).dates("pub_date", "month", order="DESC"),
    "datetimes": lambda of: of(Experiment).datetimes("start_datetime", "hour"),
    "none": lambda of: of(Entry).none(),
    "union": lambda of: of(Author).values_list("name").union(of(Publisher).values_list("name"), all=True),
    "intersection": lambda of: of(Entry).filter(rating__gt=1).intersection(of(Entry).filter(rating__lt=4)),
    "select_related": lambda of: of(Entry).filter(pub_date__gt=date(2006, 1, 1)).select_related("blog"),
    "prefetch_related": lambda of: of(Entry).prefetch_related("authors__book_set", "blog"),
    "Prefetch": lambda of: of(Blog).prefetch_related(
        Prefetch("entry_set", of(Entry).filter(rating__gt=2), to_attr="good"), "entry_set"
    ),
    "extra": lambda of: of(Entry).extra(
        select={"is_recent": "pub_date > '2006-01-01'"}, where=["headline LIKE %s"], params=["What%"]
    ),
    "extra with a subquery": lambda of: of(Blog).extra(
        select={"entry_count": "SELECT COUNT(*) FROM manual_entry WHERE manual_entry.blog_id = manual_blog.id"}
    ),
    "defer": lambda of: of(Entry).defer("body_text", "blog__tagline").select_related("blog"),
    "only": lambda of: of(Entry).only("headline"),
    "filtered relation": lambda of: (
        of(Blog)
        .annotate(good=FilteredRelation("entry", condition=Q(entry__rating__gt=2)))
        .filter(good__headline__contains="would")
    ),
    "exists": lambda of: of(Blog).filter(Exists(of(Entry).filter(blog=OuterRef("pk"), rating__gt=3))),
    "|": lambda of: of(Entry).filter(rating=1) | of(Entry).filter(rating=2),
    "&": lambda of: of(Entry).filter(rating__gt=1) & of(Entry).filter(rating__lt=3),
    "^": lambda of: of(Entry).filter(rating__gt=1) ^ of(Entry).filter(rating__lt=3),
    "RawSQL": lambda of: of(Entry).annotate(val=RawSQL("rating + %s", (1,))).filter(val__gt=2),
    "RawSQL in a filter": lambda of: of(Entry).filter(
        id__in=RawSQL("SELECT entry_id FROM manual_entrydetail WHERE details LIKE %s", ("details%",))
    ),
}

EXPRESSIONS: dict[str, Any] = {
    "aggregates": lambda of: of(Publisher).annotate(num_books=Count("book"), cheapest=Min("book__price")),
    "filtered aggregates": lambda of: of(Publisher).annotate(
        above_5=Count("book", filter=Q(book__rating__gt=4)), below_5=Count("book", filter=Q(book__rating__lte=4))
    ),
    "several aggregations": lambda of: of(Book).annotate(
        Count("authors", distinct=True), Count("store", distinct=True)
    ),
    "across relations": lambda of: of(Store).annotate(min_price=Min("books__price"), max_price=Max("books__price")),
    "filter, then annotate": lambda of: of(Publisher).filter(book__rating__gt=3.0).annotate(num_books=Count("book")),
    "annotate, then filter": lambda of: of(Publisher).annotate(num_books=Count("book")).filter(book__rating__gt=3.0),
    "groups": lambda of: of(Author).values("name").annotate(average_rating=Avg("book__rating")).order_by("name"),
    "employees": lambda of: (
        of(Company)
        .annotate(chairs_needed=F("num_employees") - F("num_chairs"))
        .filter(num_employees__gt=F("num_chairs"))
    ),
    "boolean": lambda of: (
        of(Company).filter(Q(num_employees__lt=60) | Q(ticker="AAA")).order_by(db.Length("name").asc())
    ),
    "expression in values": lambda of: of(Company).values(big=ExpressionWrapper(Q(num_chairs__gt=40), IntegerField())),
    "conditional": lambda of: (
        of(Client)
        .annotate(
            discount=Case(
                When(account_type="G", then=Value("5%")), When(account_type="P", then=Value("10%")), default=Value("0%")
            )
        )
        .values_list("name", "discount")
    ),
    "conditional on dates": lambda of: of(Client).filter(
        account_registered_on__lte=Case(
            When(account_type="G", then=date(2025, 12, 15)),
            When(account_type="P", then=date(2024, 1, 1)),
            output_field=DateField(),
        )
    ),
    "conditional sums": lambda of: of(Publisher).annotate(
        dear=Sum(Case(When(book__price__gt=20, then=1), default=0, output_field=IntegerField()))
    ),
    "window": lambda of: of(Book).annotate(
        avg_rating=Window(Avg("rating"), partition_by=[F("publisher")], order_by="pubdate"),
        number=Window(db.RowNumber(), order_by=F("pubdate").desc()),
    ),
    "cast": lambda of: of(Company).annotate(as_float=db.Cast("num_chairs", FloatField())),
    "coalesce": lambda of: of(Author).annotate(screen_name=db.Coalesce("alias", "goes_by", "name")),
    "greatest": lambda of: of(Entry).annotate(most=db.Greatest("number_of_comments", "number_of_pingbacks")),
    "nullif": lambda of: of(Author).annotate(other=db.NullIf("goes_by", "name")),
    "extract": lambda of: of(Experiment).annotate(
        year=db.ExtractYear("start_datetime"), week=db.ExtractWeek("start_date"), hour=db.ExtractHour("start_datetime")
    ),
    "trunc": lambda of: (
        of(Experiment).annotate(day=db.TruncDay("start_datetime")).values("day").annotate(n=Count("id"))
    ),
    "now": lambda of: of(Client).filter(account_registered_on__lte=db.Now()),
    "text": lambda of: of(Author).annotate(
        label=db.Concat("name", Value(" ("), "email", Value(")"), output_field=CharField()),
        up=db.Upper("name"),
        left=db.Left("name", 2),
        padded=db.LPad("name", 8, Value("abc")),
        place=db.StrIndex("name", Value("o")),
        other=db.Replace("name", Value("o"), Value("0")),
        part=db.Substr("name", 1, 3),
        digest=db.MD5("name"),
        trimmed=db.Trim("name"),
    ),
    "numbers": lambda of: of(Book).annotate(
        up=db.Ceil("rating"),
        down=db.Floor("rating"),
        near=db.Round("rating"),
        rest=db.Mod("rating", 2),
        root=db.Sqrt("rating"),
    ),
}

EXAMPLES = {"making queries": MAKING_QUERIES, "querysets": QUERYSETS, "expressions": EXPRESSIONS}

TEMPLATE = Engine().from_string(
    "{% if rows %}{{ rows|length }}{% for row in rows %}{{ forloop.counter }}{{ row.pk }}{% endfor %}{% endif %}"
)

#: What evaluates a queryset, one way or another.
WAYS: dict[str, Any] = {
    "list": list,
    "loop": lambda rows: [row for row in rows for _ in rows],
    "len": len,
    "bool": bool,
    "repr": repr,
    "index": lambda rows: rows[0],
    "negative index": lambda rows: rows[-1],
    "slice": lambda rows: list(rows[1:3]),
    "step": lambda rows: rows[:4:2],
    "in": lambda rows: next(iter(rows.iterator() if isinstance(rows, QuerySet) else rows), None) in rows,
    "count": lambda rows: rows.count(),
    "exists": lambda rows: rows.exists(),
    "first": lambda rows: rows.first(),
    "last": lambda rows: rows.last(),
    "get": lambda rows: rows.get(),
    "get by a filter": lambda rows: rows.get(pk__gt=0),
    "in_bulk": lambda rows: rows.in_bulk(),
    "iterator": lambda rows: list(rows.iterator(chunk_size=2)),
    "aggregate": lambda rows: rows.aggregate(Count("pk"), StdDev("pk")),
    "latest": lambda rows: rows.latest("pk"),
    "filter": lambda rows: list(rows.filter(pk__gt=1)),
    "values_list": lambda rows: list(rows.values_list("pk")),
    "or": lambda rows: list(rows | rows.all()),
    "subquery": lambda rows: list(rows.model.objects.using(rows.db).filter(pk__in=rows)),
    "pickle": lambda rows: list(pickle.loads(pickle.dumps(rows))),
    "template": lambda rows: TEMPLATE.render(Context({"rows": rows})),
    "page": lambda rows: list(Paginator(rows, 2).page(1)),
    "serialize": lambda rows: serializers.serialize("json", rows),
    "explain": lambda rows: bool(rows.explain()),
}


def seen(value: Any) -> Any:
    """Return what can be seen of a value: of a row all that it has, and all that has been fetched with it."""
    if isinstance(value, Model):
        state = {name: seen(held) for name, held in value.__dict__.items() if name != "_state"}
        cache = {name: seen(held) for name, held in value._state.fields_cache.items()}
        return type(value), state, cache, value._state.db, value._state.adding
    if isinstance(value, dict):
        return {name: seen(held) for name, held in value.items()}
    if isinstance(value, QuerySet):
        return [seen(row) for row in value]
    return [seen(each) for each in value] if isinstance(value, (list, tuple)) else value


def outcome(way: Any, rows: Any, *, is_ordered: bool) -> Any:
    try:
        found = seen(way(rows))
    except Exception as error:
        return type(error), str(error)
    return found if is_ordered or not isinstance(found, list) else sorted(found, key=repr)


#: Each example is evaluated in three ways in turn, one on each database; with ``PARALLEL_ORM_DOCUMENTATION=all`` in all
#: on each, for some minutes.
ALL = os.environ.get("PARALLEL_ORM_DOCUMENTATION") == "all"
DATABASES = ["default", "postgres", "mariadb"]

#: What an order decides.
BY_ORDER = {"index", "slice", "step", "repr", "template", "page", "serialize", "in"}

#: What is started, and whether it has come when it is used.
STARTS = [("fetch", False), ("fetch", True), ("count", True), ("exists", False)]


@pytest.mark.filterwarnings("ignore:Pagination may yield inconsistent results")
@pytest.mark.parametrize("page", EXAMPLES)
def test_a_start_in_front_changes_nothing(manual: Any, alias: str, page: str) -> None:
    def make(example: Any) -> Any:
        rows = example(manual)
        if isinstance(rows, QuerySet) and not (rows.ordered or rows.query.is_sliced or rows.query.combinator):
            return rows.order_by("pk") if rows._fields is None else rows  # type: ignore[attr-defined]
        return rows

    turns = cycle(WAYS)
    for name, example in EXAMPLES[page].items():
        ways = [*islice(turns, len(DATABASES))]
        is_ordered = bool(getattr(make(example), "ordered", False))
        for way in WAYS if ALL else ways[DATABASES.index(alias) :][:1]:
            if way in BY_ORDER and not is_ordered:
                continue
            inline = outcome(WAYS[way], make(example), is_ordered=is_ordered)
            for verb, is_waited_for in STARTS:
                rows = make(example)
                if not isinstance(rows, QuerySet) and verb != "fetch":
                    continue  # raw
                started = getattr(rows, f"start_{verb}")()
                if is_waited_for and started.background[verb].reason is None:
                    landed_quietly(started.background[verb])
                found = outcome(WAYS[way], started, is_ordered=is_ordered)
                assert found == inline, (name, way, verb, is_waited_for)


def landed_quietly(pending: Any) -> None:
    try:
        landed(pending)
    except Exception:
        return  # it is raised where it is used


@pytest.mark.parametrize("page", EXAMPLES)
def test_all_of_them_run_in_the_background(manual: Any, alias: str, page: str) -> None:
    for name, example in EXAMPLES[page].items():
        pending = example(manual).start_fetch().background["fetch"]
        if pending.reason != "empty":  # none()
            landed(pending)
            assert pending.reason is None, name
