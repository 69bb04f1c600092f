"""Rows made fast are the rows that Django makes."""

from __future__ import annotations

import datetime
import decimal
import enum
import functools
import gc
import os
import pickle
import threading
import uuid
import weakref
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager

import pytest
from django.core.exceptions import FieldError
from django.db import connections, models
from django.db.models import Count, F, FilteredRelation, Model, Q, Value
from django.db.models.base import ModelState
from django.db.models.functions import Upper
from django.db.models.query import ModelIterable, RelatedPopulator
from django.db.models.signals import post_init, pre_init
from django.db.models.sql.compiler import SQLCompiler
from django.test import override_settings

from parallel_orm import collector, makers, rows
from parallel_orm.errors import InvalidOption
from parallel_orm.makers import is_plain
from parallel_orm.rows import Unmade, listed, read
from tests.databases import tables
from tests.testapp.fields import Columns, Measured
from tests.testapp.models import (
    Article,
    Author,
    ByText,
    ByUuid,
    Everything,
    Note,
    OwnNew,
    Pizzeria,
    Place,
    PlainArticle,
    Profile,
    RankedArticle,
    Restaurant,
    Seat,
    Tag,
    Visit,
    WithFile,
)


def parts(value, above=()):
    """All that a row is: of an instance its attributes in their order, its state, and what hangs on it."""
    if not isinstance(value, Model):
        return type(value), value if not isinstance(value, dict) else [(type(key), key, value[key]) for key in value]
    if any(value is each for each in above):
        return "the one above", len(above)
    above = (*above, value)
    columns = [(name, parts(each, above)) for name, each in vars(value).items() if name != "_state"]
    state = [
        (
            name,
            [(key, parts(each, above)) for key, each in kept.items()] if name == "fields_cache" else (type(kept), kept),
        )
        for name, kept in vars(value._state).items()
    ]
    return type(value), [(type(name), name) for name in vars(value)], columns, state


@pytest.fixture(autouse=True)
def every_row_is_worth_it(monkeypatch):
    monkeypatch.setattr(rows, "FEW", 0)


@pytest.fixture
def filled(alias):
    author = Author.objects.using(alias).create(name="Ada", born=1815)
    first = Article.objects.using(alias).create(
        name="a", author=author, published=datetime.datetime.now(datetime.UTC), rank=1
    )
    Article.objects.using(alias).create(name="b", score=3)
    first.tags.add(Tag.objects.using(alias).create(name="t"))
    ByUuid.objects.using(alias).create()
    ByText.objects.using(alias).create(code="x")
    Profile.objects.using(alias).create(author=author)
    Restaurant(name="r", stars=2).save(using=alias)
    Pizzeria(name="p", stars=1, ovens=3).save(using=alias)
    Place(name="q").save(using=alias)
    Visit.objects.using(alias).create(place=Place.objects.using(alias).get(name="p"))
    Seat.objects.using(alias).create(row="A", number=1)
    Note.plain.using(alias).create(name="n", author=author)
    WithFile.objects.using(alias).create(file="a.txt")
    for full in (True, False):
        Everything.objects.using(alias).create(
            boolean=full,
            decimal=decimal.Decimal("1.50") if full else None,
            date=datetime.date(2013, 1, 2) if full else None,
            time=datetime.time(1, 2, 3) if full else None,
            duration=datetime.timedelta(days=1, microseconds=5) if full else None,
            floating=1.5 if full else None,
            json={"a": [1, None, "x"]} if full else None,
            binary=b"\x00\xff" if full else None,
            uuid=uuid.UUID(int=5) if full else None,
            address="10.0.0.1" if full else None,
            mood="happy" if full else "",
        )
    return alias


class Column(enum.StrEnum):
    """Names of columns, and one that is no Python."""

    NAME = "name"
    OTHER = "other"
    ODD = "a-b"


ARTICLES, EVERYTHING = Article.objects.order_by("pk"), Everything.objects.order_by("pk")

#: What comes out the same, made by us.
MADE = {
    **{
        model.__name__: model._default_manager.order_by("pk")
        for model in (
            *(Article, PlainArticle, RankedArticle, Author, ByUuid, ByText, Profile, Place, Restaurant, Pizzeria),
            *(Seat, Everything, WithFile, Visit),
        )
    },
    "only": ARTICLES.only("name"),
    "only a foreign key": ARTICLES.only("author"),
    "defer": ARTICLES.defer("name", "author"),
    "only of a parent's": Pizzeria.objects.order_by("pk").only("name", "ovens"),
    "annotated": ARTICLES.annotate(shout=Upper("name"), tagged=Count("tags"), other=F("author__name")),
    "annotated with names that are no Python": ARTICLES.annotate(
        **{"class": F("name"), "ﬁ": F("rank"), "a-b": F("score"), "__debug__": F("rank")}
    ),
    "annotated with names of an enum": ARTICLES.annotate(**{Column.OTHER: F("rank"), Column.ODD: F("score")}),
    "extra": ARTICLES.extra(select={"one": "1", "two": "rank + 1"}),
    "extra and annotated": ARTICLES.annotate(shout=Upper("name")).extra(select={"one": "1"}).only("name"),
    "ordered by what is not selected": Article.objects.only("name").order_by("rank", "pk").distinct(),
    "values, ordered by what is not selected": Article.objects.order_by("rank", "pk").values("name").distinct(),
    "select_related": ARTICLES.select_related("author"),
    "select_related, of a parent": Visit.objects.order_by("pk").select_related("place"),
    "select_related, two steps": Profile.objects.order_by("pk").select_related("author__profile"),
    "select_related, backwards": Author.objects.order_by("pk").select_related("profile"),
    "select_related, to children": Place.objects.order_by("pk").select_related("restaurant__pizzeria"),
    "select_related, to a parent": Pizzeria.objects.order_by("pk").select_related("restaurant_ptr__place_ptr"),
    "select_related and only": ARTICLES.select_related("author").only("name", "author__name"),
    "select_related and annotated": ARTICLES.select_related("author").annotate(shout=Upper("author__name")),
    "a filtered relation": Author.objects.order_by("pk")
    .annotate(mine=FilteredRelation("profile", condition=Q(profile__bio="")))
    .select_related("mine"),
    "values": EVERYTHING.values(),
    "values of some": EVERYTHING.values("mood", "pk", shout=Upper("mood")),
    "values, named by an enum": ARTICLES.values(Column.NAME, **{Column.ODD: F("rank")}),
    "values of another's": ARTICLES.values("author__name", "author_id", "tags"),
    "values, grouped": Article.objects.values("author").annotate(n=Count("pk")).order_by("author"),
    "values, extra": ARTICLES.extra(select={"one": "1"}).values("name", "one"),
    "values_list": EVERYTHING.values_list(),
    "values_list of some": EVERYTHING.values_list("mood", "pk", Upper("mood"), Value(1)),
    "values_list, nothing to convert": ARTICLES.values_list("name", "rank"),
    "flat": EVERYTHING.values_list("mood", flat=True),
    "dates": Article.objects.exclude(published=None).dates("published", "year"),
    "a reverse()": ARTICLES.reverse(),
    "no rows": ARTICLES.filter(rank=-5),
    "surely no rows": ARTICLES.none(),
    "impossible": ARTICLES.filter(pk__in=[]),
}


@pytest.mark.parametrize("name", MADE)
def test_every_attribute_is_the_same(filled, name):
    """Types, values, order, state and related objects."""
    queryset = MADE[name].using(filled)
    made, djangos = read(queryset.all()), list(queryset)
    assert isinstance(made, Unmade) or (not djangos and made == [])
    assert len(made) == len(djangos)
    if djangos:
        last = made.last()
        *others, again = made
        assert again is last
        assert [parts(row) for row in (*others, last)] == [parts(row) for row in djangos]
    for row, django_s in zip(listed(read(queryset.all())), djangos, strict=True):
        assert row == django_s
        if isinstance(row, Model):
            assert pickle.loads(pickle.dumps(row)) == django_s
            assert row.get_deferred_fields() == django_s.get_deferred_fields()


def test_related_objects_that_are_known_hang_on_them(filled):
    author = Author.objects.using(filled).get()
    for known in (
        author.articles.order_by("pk"),
        author.articles.order_by("pk").select_related("author"),
        author.notes.all(),
    ):
        made = read(known.all())
        assert isinstance(made, Unmade)
        (row,), (djangos,) = made, known.all()
        assert [*vars(row)] == [*vars(djangos)]
        assert (row.author is author) is (djangos.author is author)
        assert row.author == author
    both = author.articles.all() | Article.objects.using(filled).filter(author=None)
    assert (
        [row.author for row in both.order_by("pk")]
        == [author, None]
        == [row.author for row in read(both.order_by("pk"))]
    )
    deferred = author.articles.defer("author")
    assert isinstance(read(deferred.all()), list)
    assert [parts(row)[2] for row in read(deferred.all())] == [parts(row)[2] for row in deferred]


def test_they_live_as_djangos_do(filled):
    """Relations are asked for and kept, changes are saved, a refresh reads anew."""
    (article,) = read(Article.objects.using(filled).filter(name="a"))
    assert article.author.name == "Ada"
    assert article._state.fields_cache
    article.author_id = None
    assert not article._state.fields_cache
    article.name = "changed"
    article.save()
    article.refresh_from_db()
    assert (article.name, article.author) == ("changed", None)
    one, other = read(Article.objects.using(filled).order_by("pk"))
    assert one._state is not other._state
    assert one._state.fields_cache is not other._state.fields_cache
    (deferred,) = read(Article.objects.using(filled).only("rank").filter(name="b"))
    assert (deferred.name, deferred.score) == ("b", 3)


def test_prefetches_are_made(filled):
    (article,) = read(Article.objects.using(filled).prefetch_related("tags").filter(name="a"))
    assert [tag.name for tag in article._prefetched_objects_cache["tags"]] == ["t"]


def test_what_else_django_makes(filled):
    """And comes out as its own."""
    for queryset in (
        Seat.objects.values("pk", "taken"),
        Seat.objects.values_list("pk", flat=True),
        Article.objects.order_by("pk").values_list("name", "rank", named=True),
        OwnNew.objects.all(),
        Article.objects.raw("SELECT * FROM testapp_article ORDER BY id"),
    ):
        rows = queryset.using(filled)
        made = read(queryset.using(filled))
        assert isinstance(made, list)
        assert [parts(row) for row in made] == [parts(row) for row in rows]
        assert made


def test_a_union_is_made_by_django(filled):
    """Which leaves the columns that only the order needs behind the others, but not in dictionaries."""

    def union():  # each for one use, as Django changes what it runs
        return Article.objects.using(filled).union(Article.objects.using(filled).filter(rank=1)).order_by("rank", "pk")

    for rows_of in (
        union,
        lambda: union().values_list("name"),
        lambda: union().values_list("name", flat=True),
        lambda: union().values("name"),
    ):
        assert [parts(row) for row in read(rows_of())] == [parts(row) for row in rows_of()]


def assert_same(queryset, made_by):
    """Compare what a row has, and what it says of it, which a descriptor may make of that."""
    made, djangos = read(queryset.all()), list(queryset)
    assert isinstance(made, made_by)
    for row, django_s in zip(made, djangos, strict=True):
        assert parts(row) == parts(django_s)
        for column in row._meta.concrete_fields:
            ours, theirs = getattr(row, column.attname), getattr(django_s, column.attname)
            assert (type(ours), str(ours)) == (type(theirs), str(theirs))
        assert parts(row) == parts(django_s)
    assert djangos


def test_every_field_of_djangos(alias):
    with tables(alias, Columns, Measured):
        first = Columns.objects.using(alias).create()
        Columns.objects.using(alias).create(empty="b.png", one=first)
        Measured.objects.using(alias).create()
        assert_same(Columns.objects.using(alias).order_by("pk"), Unmade)
        assert_same(Columns.objects.using(alias).select_related("one").order_by("pk"), Unmade)
        assert_same(Columns.objects.using(alias).order_by("pk").only("image", "slug"), Unmade)
        assert_same(Measured.objects.using(alias).all(), list)


def test_no_field_of_djangos_is_missing():
    abstract = {models.Field, models.ForeignObject, models.ManyToManyField, models.CompositePrimaryKey}
    classes = [each for each in vars(models).values() if isinstance(each, type) and issubclass(each, models.Field)]
    djangos = {each for each in classes if each.system_check_removed_details is None}
    compared = [*(queryset.model for queryset in MADE.values()), Columns, Measured]
    kinds = {type(column) for model in compared for column in model._meta.concrete_fields}
    assert djangos - abstract <= kinds


def test_every_field_of_postgres(postgres):
    from django.contrib.postgres.search import SearchVector
    from django.db.backends.postgresql.psycopg_any import DateRange, DateTimeTZRange, NumericRange

    from tests.testapp.postgres import Lists, Pairs, Spans

    day, moment = datetime.date(2020, 1, 2), datetime.datetime(2020, 1, 2, tzinfo=datetime.UTC)
    with connections[postgres].cursor() as cursor:
        cursor.execute("SELECT FROM pg_available_extensions WHERE name = 'hstore'")
        pairs = [Pairs] * len(cursor.fetchall())
        if pairs:
            cursor.execute("CREATE EXTENSION IF NOT EXISTS hstore")
    with tables(postgres, Lists, Spans, *pairs):
        Lists.objects.using(postgres).create(numbers=[1, None], days=[[day], [day]], keys=[uuid.UUID(int=5)])
        Lists.objects.using(postgres).create(numbers=[], words=SearchVector(Value("a fat cat")))
        Spans.objects.using(postgres).create(integers=NumericRange(1, 2))
        Spans.objects.using(postgres).create(
            integers=NumericRange(None, 5),
            big=NumericRange(1, 2**40),
            decimals=NumericRange(decimal.Decimal("1.5"), None),
            days=DateRange(day, day),
            moments=DateTimeTZRange(moment, None),
        )
        if pairs:
            with connections[postgres].cursor() as cursor:  # in Python only where the driver was told of the type
                cursor.execute("INSERT INTO testapp_pairs (pairs) VALUES ('a => 1, b => NULL')")
        for kind in (Lists, Spans, *pairs):
            assert_same(kind.objects.using(postgres).order_by("pk"), Unmade)


def test_fields_that_others_have_written(alias):
    for package in ("model_utils", "django_countries"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    from tests.testapp.others import Country, Monitored, Post, Tracked

    with tables(alias, Country, Monitored, Post, Tracked):
        Country.objects.using(alias).create(name="a", country="NZ", several=["AU", "NZ"])
        Country.objects.using(alias).create(name="b", country="AU", maybe="NZ")
        first = Post.objects.using(alias).create(text="short\n\n<!-- split -->\n\nlong")
        Post.objects.using(alias).create(text="short", status="published", after=first)
        Monitored.objects.using(alias).create(name="a")
        tracked = Tracked.objects.using(alias).create(name="a", country="NZ")
        Tracked.objects.using(alias).create(name="b", country="AU", after=tracked)
        assert_same(Country.objects.using(alias).order_by("pk"), Unmade)
        assert_same(Post.objects.using(alias).select_related("after").order_by("pk"), Unmade)
        assert_same(Post.objects.using(alias).only("text").order_by("pk"), Unmade)
        assert_same(Monitored.objects.using(alias).all(), list)
        (changed,) = read(Monitored.objects.using(alias).all())
        before, changed.name = changed.changed, "b"
        changed.save()
        assert changed.changed > before
        assert isinstance(read(Tracked.objects.using(alias).all()), list)
        for row in read(Tracked.objects.using(alias).select_related("after")):
            row.name = "c"
            assert list(row.tracker.changed()) == ["name"]


class Mixin:
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.noticed = True


class Beside(Tag, Mixin):
    """Django's ``__init__`` calls that of the mixin, at its end."""

    class Meta:
        proxy = True
        app_label = "testapp"


def test_where_a_model_would_notice_django_makes_them(filled, monkeypatch):
    def own(self, *args, **kwargs):
        raise AssertionError

    def is_made():
        return isinstance(read(ARTICLES.using(filled).select_related("author")), Unmade)

    assert is_plain(Tag)
    assert not is_plain(OwnNew)
    assert not is_plain(Beside)
    assert all(tag.noticed for tag in read(Beside._default_manager.using(filled)))
    assert is_made()
    for name in ("__init__", "__setattr__"):
        with monkeypatch.context() as patch:
            patch.setattr(Tag, name, own, raising=False)
            assert not is_plain(Tag), name
    with monkeypatch.context() as patch:
        patch.setattr(Tag, "from_db", classmethod(own))
        assert not is_plain(Tag)
    for signal in (pre_init, post_init):
        heard = []

        def hear(heard=heard, **kwargs):
            heard.append(kwargs["sender"])

        signal.connect(hear, sender=Author)
        try:
            assert not is_plain(Author)
            assert is_plain(Tag)
            assert not is_made(), "although it is the related object that somebody listens to"
            assert heard == [Author]
        finally:
            signal.disconnect(hear, sender=Author)
    assert is_made()


class Descriptor:
    """Keeps what it is given, and what it could see when it was."""

    def __set_name__(self, owner, name):
        self.name = name

    def __get__(self, instance, owner=None):
        return self if instance is None else instance.__dict__[self.name]

    def __set__(self, instance, value):
        instance.__dict__[self.name] = value
        instance.__dict__.setdefault("seen", []).append((value, instance._state.adding, [*vars(instance)]))


@pytest.mark.parametrize("name", ["name", "author_id", "rank"])
def test_a_descriptor_of_a_fields_own_is_told_as_django_tells_it(filled, monkeypatch, name):
    descriptor = Descriptor()
    descriptor.name = name
    monkeypatch.setattr(Article, name, descriptor)
    made = read(ARTICLES.using(filled))
    assert isinstance(made, Unmade)
    assert [parts(row) for row in made] == [parts(row) for row in ARTICLES.using(filled)]


def test_a_compiler_with_ways_of_its_own_is_left_alone(filled, monkeypatch):
    queryset = ARTICLES.using(filled)
    compiler = type(queryset.query.get_compiler(using=filled))

    class Own(compiler):
        def apply_converters(self, *args):
            return super().apply_converters(*args)

    monkeypatch.setattr(type(queryset.query), "get_compiler", lambda self, using: Own(self, connections[using], using))
    assert isinstance(read(queryset.all()), list)


@pytest.mark.parametrize("wraps", [True, False])
def test_whoever_stands_in_the_way_of_a_query_sees_it(filled, monkeypatch, wraps):
    """As profilers and caches do, who put a function of theirs in its place, and may make lists of what comes."""
    execute_sql, seen = SQLCompiler.execute_sql, []

    def listening(self, *args, **kwargs):
        seen.append(self.query.model)
        result = execute_sql(self, *args, **kwargs)
        return list(result) if isinstance(result, Iterable) else result

    monkeypatch.setattr(SQLCompiler, "execute_sql", functools.wraps(execute_sql)(listening) if wraps else listening)
    for name in ("values, ordered by what is not selected", "Article", "impossible"):
        queryset = MADE[name].using(filled)
        assert [parts(row) for row in read(queryset.all())] == [parts(row) for row in queryset]
    assert len(seen) == 6


@pytest.mark.parametrize(
    ("kind", "name"),
    [(Model, "__init__"), (Model, "from_db"), (ModelIterable, "__iter__"), (RelatedPopulator, "populate")],
    ids=lambda each: getattr(each, "__name__", each),
)
def test_what_somebody_puts_in_place_of_djangos_is_called(filled, monkeypatch, kind, name):
    djangos, called = getattr(kind, name), []
    function = getattr(djangos, "__func__", djangos)

    @functools.wraps(function)
    def own(*args, **kwargs):
        called.append(name)
        return function(*args, **kwargs)

    monkeypatch.setattr(kind, name, own if function is djangos else classmethod(own))
    queryset = ARTICLES.using(filled).select_related("author")
    read(queryset.all())
    times = len(called)
    list(queryset.all())
    assert called == [name] * times * 2
    assert called


def test_a_state_of_a_models_own_is_told(filled, monkeypatch):
    class State(ModelState):
        pass

    class Descriptor:
        def __set__(self, instance, state):
            instance.__dict__["_state"] = State()

    monkeypatch.setattr(Tag, "_state", Descriptor(), raising=False)
    assert [parts(tag) for tag in read(Tag.objects.using(filled))] == [parts(tag) for tag in Tag.objects.using(filled)]


def test_a_class_that_looks_at_its_attributes_is_asked(filled, monkeypatch):
    looked = []

    def look(self, name):
        looked.append(name)
        return object.__getattribute__(self, name)

    monkeypatch.setattr(Tag, "__getattribute__", look)
    read(Tag.objects.using(filled))
    made, looked = looked, []
    list(Tag.objects.using(filled))
    assert made == looked


def test_a_queryset_class_with_ways_of_its_own_is_left_alone(filled):
    class Own(models.QuerySet):
        def __iter__(self):
            return iter(["its own"])

    class OwnRows(models.query.ModelIterable):
        def __iter__(self):
            number = self.queryset.count()
            for row in super().__iter__():
                row.name = f"{row.name.upper()} of {number}"
                yield row

    assert read(Own(Tag, using=filled)) == ["its own"]
    queryset = Tag.objects.using(filled)
    queryset._iterable_class = OwnRows
    assert [tag.name for tag in read(queryset)] == ["T of 1"]


def test_few_rows_are_left_to_django(filled, monkeypatch):
    monkeypatch.setattr(rows, "FEW", 3)
    monkeypatch.setattr(makers._Code, "function", None)
    queryset = ARTICLES.using(filled).select_related("author").annotate(n=Count("tags"))
    made = read(queryset.all())
    assert isinstance(made, list)
    assert [parts(row) for row in made] == [parts(row) for row in queryset]
    assert read(EVERYTHING.using(filled).values_list()) == list(EVERYTHING.using(filled).values_list())


def test_an_error_of_a_converter_is_djangos(filled, monkeypatch):
    def broken(self, value, expression, connection):
        raise FieldError(f"no mood in {connection.alias}")

    monkeypatch.setattr(type(Everything._meta.get_field("mood")), "from_db_value", broken)
    with pytest.raises(FieldError, match=f"no mood in {filled}"):
        list(read(EVERYTHING.using(filled)))


class Moment(datetime.datetime):
    pass


@pytest.mark.parametrize("use_tz", [True, False])
def test_moments_are_those_of_djangos_converter(alias, use_tz):
    ZONE = datetime.timezone(datetime.timedelta(hours=2))
    connection = connections[alias]
    with override_settings(USE_TZ=use_tz):
        converters = connection.ops.get_db_converters(Article._meta.get_field("published").get_col("a"))
        for converter in converters:
            quick = makers._quick(converter, connection)
            assert (quick is not converter) is use_tz
            for value in (
                *(None, datetime.datetime(2020, 1, 2, 3, 4, 5, 6), datetime.datetime(2020, 3, 29, 2, 30, fold=1)),
                *("2020-01-02 03:04:05", datetime.datetime(2020, 1, 2, tzinfo=ZONE), Moment(2020, 1, 2)),
            ):
                assert outcome(quick, value, connection) == outcome(converter, value, connection), value
    assert converters or alias == "postgres" or not use_tz


def outcome(converter, value, connection):
    try:
        moment = converter(value, None, connection)
    except Exception as error:
        return type(error), str(error)
    return type(moment), moment, getattr(moment, "tzinfo", None), getattr(moment, "fold", None)


def test_rows_are_made_one_by_one(filled):
    """And nobody but the loop holds them."""
    made = iter(read(ARTICLES.using(filled)))
    first = weakref.ref(next(made))
    second = next(made)
    assert first() is None
    assert second.name == "b"


def test_nothing_is_left_for_the_cyclic_collector(filled):
    """But what Django leaves, before 6.1."""

    def left_by(make, queryset):
        gc.collect()
        [*make(queryset.all())]
        return gc.collect()

    gc.disable()
    try:
        for queryset in (ARTICLES.using(filled).select_related("author"), EVERYTHING.using(filled).values()):
            left_by(read, queryset)
            assert left_by(read, queryset) == left_by(list, queryset)
    finally:
        gc.enable()


def test_fetch_modes_are_kept(default):
    if not hasattr(models, "FETCH_PEERS"):
        pytest.skip("since Django 6.1")
    author = Author.objects.using(default).create(name="Ada")
    Article.objects.using(default).create(name="a", author=author)
    for mode in (models.FETCH_RAISE, models.FETCH_ONE):
        rows = Article.objects.using(default).select_related("author").fetch_mode(mode)
        made = read(rows.all())
        assert isinstance(made, Unmade)
        assert [parts(row) for row in made] == [parts(row) for row in rows]
    peers = Article.objects.using(default).fetch_mode(models.FETCH_PEERS)
    assert isinstance(read(peers.all()), list)
    assert all(len(row._state.peers) == 1 for row in read(peers))
    connections.close_all()


# --- The cyclic collector -------------------------------------------------------


def test_the_collector_pauses_while_a_list_is_made(filled):
    seen = []
    unmade = Unmade([(1,)], lambda given: (seen.append(gc.isenabled()) or row for row in given))
    assert listed(unmade) == [(1,)]
    assert seen == [False]
    assert gc.isenabled()
    with override_settings(PARALLEL_ORM={"PAUSE_GC": False}):
        listed(Unmade([(1,)], lambda given: (seen.append(gc.isenabled()) or row for row in given)))
    assert seen == [False, True]
    with override_settings(PARALLEL_ORM={"PAUSE_GC": 1}), pytest.raises(InvalidOption, match="PAUSE_GC"):
        listed(Unmade([], iter))


def test_pauses_nest_and_end_with_an_error():
    with pytest.raises(ZeroDivisionError), collector.paused(), collector.paused():
        raise ZeroDivisionError
    assert gc.isenabled()
    gc.disable()
    try:
        with collector.paused():
            pass
        assert not gc.isenabled(), "never switched on for who had it off"
    finally:
        gc.enable()


@contextmanager
def in_another_thread(*managers):
    """Within: another thread is within these."""
    entered, leave = threading.Event(), threading.Event()

    def be_within():
        with ExitStack() as stack:
            for manager in managers:
                stack.enter_context(manager)
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=be_within)
    thread.start()
    try:
        assert entered.wait(60)
        yield
    finally:
        leave.set()
        thread.join(60)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_a_forked_child_has_no_pause_of_another_thread():
    with in_another_thread(collector.paused(), collector._lock):
        child = os.fork()
        if child == 0:
            if collector._lock.locked() or not gc.isenabled():
                os._exit(1)
            with collector.paused():
                off = not gc.isenabled()
            os._exit(0 if off and gc.isenabled() else 2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert gc.isenabled()


def test_pauses_of_several_threads_overlap():
    with in_another_thread(collector.paused()):
        with collector.paused():
            pass
        assert not gc.isenabled(), "the other one is at it still"
    assert gc.isenabled()
