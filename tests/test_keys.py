"""Every kind of key, however it lies; and input that is bad for one: NaN, ties alone, NULLs alone, tables that go."""

from __future__ import annotations

import datetime
import decimal
import math
import threading
import uuid

import pytest
from django.db import DatabaseError, OperationalError, connections, transaction
from django.db.models.functions import Collate
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.databases import tables
from tests.functions import itself
from tests.testapp.models import (
    Article,
    Author,
    ByBytes,
    ByDecimal,
    ByMoment,
    ByText,
    ByUuid,
    ByWideDecimal,
    Diary,
    Everything,
    Pizzeria,
    Place,
    Profile,
    Seat,
)

WAIT = 60
MOMENTS = st.datetimes(datetime.datetime(1970, 1, 2), datetime.datetime(2037, 1, 1), timezones=st.just(datetime.UTC))
# Characters of several kinds, of which collations hold some equal that are not.
TEXTS = st.text("aAbBäÄßzZ09 -_%'\\\"é日", max_size=8)


def hold_by_key(rows, chunk_size):
    """Forwards and backwards a walk gives what list() gives, and so does a map."""
    for queryset in (rows.order_by("pk"), rows.order_by("-pk")):
        expected = [row.pk for row in queryset]
        assert [row.pk for row in queryset.chunked_iterator(chunk_size)] == expected
        assert list(queryset.values_list("pk", flat=True).chunked_iterator(chunk_size)) == expected
        ranges = [row.pk for row in queryset.only().extra(select={"one": "1"}).chunked_iterator(chunk_size)]
        assert ranges == expected, "by jumps"


KEYS = {
    "skewed integers": (
        Article,
        st.lists(
            st.one_of(st.integers(1000, 1030), st.integers(-(10**9), 10**9), st.sampled_from([-1, 0, 2**40])),
            unique=True,
            max_size=40,
        ),
        lambda key: Article(pk=key),
    ),
    "uuids": (
        ByUuid,
        st.lists(st.one_of(st.uuids(version=1), st.uuids(version=4)), unique=True, max_size=30),
        lambda key: ByUuid(pk=key),
    ),
    # Unique under any collation: MariaDB holds "a" and "A" for the same.
    "text": (
        ByText,
        st.lists(TEXTS, max_size=30).map(lambda texts: [f"{text}{n:02}" for n, text in enumerate(texts)]),
        lambda key: ByText(pk=key),
    ),
    "moments": (ByMoment, st.lists(MOMENTS, unique=True, max_size=30), lambda key: ByMoment(pk=key)),
    "decimals": (
        ByDecimal,
        st.lists(st.decimals(-(10**8), 10**8, places=3), unique=True, max_size=30),
        lambda key: ByDecimal(pk=key),
    ),
    "two columns": (
        Seat,
        st.lists(st.tuples(st.sampled_from("ABC"), st.integers(-3, 9)), unique=True, max_size=30),
        lambda key: Seat(row=key[0], number=key[1]),
    ),
}


@pytest.mark.parametrize("kind", KEYS)
def test_any_keys(alias, kind):
    model, keys, make = KEYS[kind]
    rows = model.objects.using(alias)

    @settings(max_examples=15, deadline=None)
    @given(keys=keys, chunk_size=st.integers(1, 9))
    def hold(keys, chunk_size):
        keys = [key for key in keys if key != 0 or alias != "mariadb"]  # where Django knows no such key
        rows.all().delete()
        rows.bulk_create(map(make, keys))
        assert rows.count() == len(keys)
        hold_by_key(rows, chunk_size)

    hold()


def test_wide_decimals(postgres, mariadb):
    for alias in (postgres, mariadb):
        rows = ByWideDecimal.objects.using(alias)
        rows.bulk_create(ByWideDecimal(pk=decimal.Decimal(10**18 + n) / 10**9) for n in range(20))
        hold_by_key(rows, 3)


def test_links_to_links(alias):
    Author.objects.using(alias).bulk_create(Author(name=f"a{n}") for n in range(9))
    Profile.objects.using(alias).bulk_create(Profile(author=author) for author in Author.objects.using(alias).all())
    Diary.objects.using(alias).bulk_create(Diary(profile=profile) for profile in Profile.objects.using(alias).all())
    for n in range(7):
        Pizzeria(name=f"p{n % 3}", stars=n % 2).save(using=alias)
    for model in (Profile, Diary, Pizzeria):
        hold_by_key(model.objects.using(alias), 2)
    for order in (("name", "-stars", "pk"), ("-stars", "ovens", "-pk")):
        named = Pizzeria.objects.using(alias).order_by(*order)
        assert list(named.chunked_iterator(2)) == list(named)


def test_bytes(alias):
    """psycopg2 gives them as views of memory, which cannot travel: keys are bytes."""
    if alias == "mariadb":
        return
    with tables(alias, ByBytes):
        rows = ByBytes.objects.using(alias)
        rows.bulk_create(ByBytes(code=bytes([n % 5, 255 - n]), number=n) for n in range(30))
        expected = [bytes(row.code) for row in rows.order_by("pk")]
        assert [bytes(row.code) for row in rows.order_by("pk").chunked_iterator(4)] == expected
        assert [bytes(key) for key in rows.order_by("pk").values_list("pk", flat=True).chunked_iterator(4)] == expected
        numbers = [row.number for row in rows.order_by("pk")]
        assert list(rows.order_by("pk").values_list("number", flat=True).chunked_iterator(4)) == numbers
        assert rows.order_by("pk").parallel_map(number_of, 2, chunk_size=4) == numbers
        assert rows.order_by("-number").parallel_map(number_of, 2, chunk_size=4) == list(range(29, -1, -1))
        assert [row.number for row in rows.order_by("number")[3:9].chunked_iterator(2)] == list(range(3, 9))


def number_of(row):
    return row.number


COLLATIONS = {
    "sqlite": ["NOCASE", "BINARY", "RTRIM"],
    "postgresql": ["C", "POSIX"],
    "mysql": ["utf8mb4_bin", "utf8mb4_unicode_ci"],
}


def test_collations(alias):
    """Text is compared in the database alone: what one collation holds equal, another parts."""
    names = ["a", "A", "ä", "Ä", "b", "B", "ab", "a b", "a-b", "Z", "z", "", " ", "é", "e", "_", "%", "10", "9"]
    Author.objects.using(alias).bulk_create(Author(name=name) for name in names * 2)
    authors = Author.objects.using(alias)
    for collation in COLLATIONS[connections[alias].vendor]:
        for by in (Collate("name", collation), Collate("name", collation).desc()):
            queryset = authors.order_by(by, "pk")
            assert queryset.explain_plan(walk=True).cut == "ranges"
            for chunk_size in (1, 3):
                assert list(queryset.chunked_iterator(chunk_size)) == list(queryset), collation
            assert queryset.parallel_map(itself, threads=1, chunk_size=7) == list(queryset)


def test_ties_alone_and_nulls_alone(alias):
    Article.objects.using(alias).bulk_create(Article(name="same", rank=1) for _ in range(20))
    articles = Article.objects.using(alias)
    for order in (("name",), ("-score",), ("score", "-published"), ("name", "rank", "-score")):
        walked = list(articles.order_by(*order).chunked_iterator(3))
        assert walked == list(articles.order_by(*order, "pk"))


def test_nan_and_infinity(alias):
    """Where a database has them they have their place; and nothing is lost beside them."""
    values = [0.0, -0.0, 1.5, -1.5, None, 1e308, 5e-324, 0.1, 0.2, 0.1 + 0.2]
    if alias != "mariadb":  # which has none of these
        values += [math.inf, -math.inf]
    if alias == "postgres":  # SQLite makes NULL of it
        values += [math.nan]
    everything = Everything.objects.using(alias)
    Everything.twice  # noqa: B018 - a generated column, which doubles them
    everything.bulk_create(Everything(boolean=True, date=None, floating=None) for _ in values * 2)
    table = Everything._meta.db_table
    with connections[alias].cursor() as cursor:
        if alias == "postgres":
            cursor.execute(f"ALTER TABLE {table} ALTER COLUMN twice DROP EXPRESSION")
        for row, value in zip(everything.order_by("pk"), values * 2, strict=True):
            if alias != "postgres" and value == 1e308:
                value = 1e307  # twice as much is none of their numbers
            cursor.execute(f"UPDATE {table} SET floating = %s WHERE id = %s", [value, row.pk])
    for order in ("floating", "-floating"):
        for chunk_size in (1, 2, 7):
            walked = [row.pk for row in everything.order_by(order, "pk").chunked_iterator(chunk_size)]
            assert walked == [row.pk for row in everything.order_by(order, "pk")], order


def test_a_key_that_is_changed_under_way(alias):
    """To be changed is to go and to come: it may come under either key, or both; the others come once."""
    ByText.objects.using(alias).bulk_create(ByText(code=f"k{n:02}", number=n) for n in range(20))
    rows = ByText.objects.using(alias)
    seen = []
    for row in rows.order_by("pk").chunked_iterator(4):
        if row.number == 2:
            rows.filter(number=15).update(code="a before all")
            rows.filter(number=0).update(code="z behind all")
        seen.append(row.number)
    assert [n for n in seen if n not in (0, 15)] == [n for n in range(20) if n not in (0, 15)]


def test_a_table_that_is_dropped_under_way(postgres, default):
    """An error of the database, and no short result."""
    for alias in (postgres, default):
        with connections[alias].schema_editor() as editor:
            editor.create_model(ByBytes)
        ByBytes.objects.using(alias).bulk_create(ByBytes(code=bytes([n]), number=n) for n in range(20))
        walk = ByBytes.objects.using(alias).chunked_iterator(4)
        next(walk)
        with connections[alias].schema_editor() as editor:
            editor.delete_model(ByBytes)
        with pytest.raises(DatabaseError):
            list(walk)
        assert Author.objects.using(alias).count() == 0, "the connection is as good as before"


def test_a_table_that_is_locked_under_way(postgres):
    """The database's own patience, and its own error."""
    Place.objects.using(postgres).bulk_create(Place(name=f"p{n}") for n in range(20))
    walk = Place.objects.using(postgres).order_by("pk").chunked_iterator(4)
    next(walk)
    locked, done = threading.Event(), threading.Event()

    def lock():
        try:
            with transaction.atomic(using=postgres), connections[postgres].cursor() as cursor:
                cursor.execute("LOCK TABLE testapp_place IN ACCESS EXCLUSIVE MODE")
                locked.set()
                assert done.wait(WAIT)
        finally:
            connections.close_all()

    thread = threading.Thread(target=lock)
    thread.start()
    try:
        assert locked.wait(WAIT)
        with connections[postgres].cursor() as cursor:
            cursor.execute("SET lock_timeout = '50ms'")
        with pytest.raises(OperationalError):
            list(walk)
    finally:
        done.set()
        thread.join(WAIT)
    assert len(list(Place.objects.using(postgres).chunked_iterator(4))) == 20


def test_keys_that_python_does_not_hash(postgres):
    from tests.testapp.postgres import ByList

    with tables(postgres, ByList):
        rows = ByList.objects.using(postgres)
        rows.bulk_create(ByList(code=[number % 3, number]) for number in range(25))
        hold_by_key(rows, 4)
        expected = [row.code for row in rows.order_by("pk")]
        assert rows.order_by("pk").parallel_map(lambda row: row.code, threads=2, chunk_size=4) == expected


@pytest.mark.parametrize("chunk_size", [10**12, 2**63, 10**30, None])
def test_chunks_larger_than_any_table(alias, chunk_size):
    ByUuid.objects.using(alias).bulk_create(ByUuid(pk=uuid.UUID(int=n), number=n) for n in range(9))
    for queryset in (
        ByUuid.objects.using(alias).order_by("pk"),
        ByUuid.objects.using(alias).order_by("number"),
        ByUuid.objects.using(alias).order_by("-number")[:7],
        ByUuid.objects.using(alias).values("number").order_by("-pk"),
    ):
        assert list(queryset.chunked_iterator(chunk_size)) == list(queryset)
