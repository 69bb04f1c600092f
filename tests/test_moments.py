"""Moments that are read fast are those that psycopg2 reads."""

from __future__ import annotations

import datetime
import zoneinfo

import pytest
from django.db import connections
from django.test import override_settings

from parallel_orm import rows
from parallel_orm.makers import _Code
from parallel_orm.moments import leave_moments, readers_of, tuples_of
from parallel_orm.rows import read
from tests.testapp.models import Article, Author, Everything

pytestmark = pytest.mark.usefixtures("postgres")

MOMENTS = [
    *("2020-01-02 03:04:05.000006+00", "2020-01-02 03:04:05.1+00", "2020-07-02 00:00:00+02", "0001-01-01 00:00:00+00"),
    *("1890-01-01 00:00:00+00", "9999-12-31 23:59:59.999999+00", "10000-01-01 00:00:00+00", "infinity", "-infinity"),
    *("2020-01-01 00:00:00+00 BC", "2020-10-25 02:30:00+02", "2020-10-25 02:30:00+01", "2020-03-29 01:00:00+00"),
]
STYLES = ["ISO, MDY", "German", "Postgres", "SQL, DMY"]
ZONES = ["UTC", "Europe/Paris", "Asia/Kathmandu", "America/St_Johns"]


@pytest.fixture
def psycopg2(postgres):
    connection = connections[postgres]
    if connection.Database.__name__ != "psycopg2":
        pytest.skip("psycopg 3 reads moments itself")
    yield connection
    connection.close()


def by_a_function(found, readers):
    """Read them as walks read many rows."""
    code = _Code(1)
    code.read(readers)
    code.line("yield v0,")
    return list(code.function()(found))


def outcome(connection, sql, fast=None):
    """Return all that can be told of the value that is read, when the cursor has been closed; or of the error."""
    try:
        with connection.cursor() as cursor:
            if fast:
                leave_moments(connection, cursor)
                assert cursor.cursor.string_types
            cursor.execute(sql)
            readers, found = readers_of(cursor), cursor.fetchall()
        assert bool(readers) == bool(fast)
        ((value,),) = fast(found, readers) if fast else found
    except Exception as error:
        return type(error), str(error)
    return type(value), value, getattr(value, "tzinfo", None), getattr(value, "fold", None), repr(value)


@pytest.mark.parametrize("use_tz", [True, False])
@pytest.mark.parametrize("zone", ZONES)
def test_every_moment_is_the_same(psycopg2, zone, use_tz):
    """In any zone and style of the session, with the time zone of the connection or without one; errors too."""
    psycopg2.close()
    with override_settings(USE_TZ=use_tz):
        for style in STYLES:
            with psycopg2.cursor() as cursor:
                cursor.execute(f"SET DateStyle = '{style}'")
                cursor.execute(f"SET TIME ZONE '{zone}'")
            for text in [*MOMENTS, None]:
                for kind in ("timestamptz", "timestamp", "date"):
                    sql = f"SELECT {'NULL' if text is None else repr(text)}::{kind}"
                    known = outcome(psycopg2, sql)
                    assert outcome(psycopg2, sql, tuples_of) == known, (style, sql)
                    assert outcome(psycopg2, sql, by_a_function) == known, (style, sql)


def test_the_time_zone_of_the_connection_counts(psycopg2, monkeypatch):
    psycopg2.close()
    monkeypatch.setitem(psycopg2.settings_dict, "TIME_ZONE", "Europe/Paris")
    for name in ("timezone", "timezone_name"):
        psycopg2.__dict__.pop(name, None)
    try:
        sql = "SELECT '2020-10-25 01:30:00+00'::timestamptz"
        fast = outcome(psycopg2, sql, by_a_function)
        assert fast == outcome(psycopg2, sql, tuples_of) == outcome(psycopg2, sql)
        assert fast[2] == zoneinfo.ZoneInfo("Europe/Paris")
    finally:
        psycopg2.close()
        for name in ("timezone", "timezone_name"):
            psycopg2.__dict__.pop(name, None)


@pytest.mark.parametrize("few", [0, 50])
def test_rows_are_read_so(psycopg2, postgres, monkeypatch, few):
    """Instances and others, whether a function is made for them or Django makes them."""
    monkeypatch.setattr(rows, "FEW", few)
    left = []
    monkeypatch.setattr(rows, "readers_of", lambda cursor: left.append(readers := readers_of(cursor)) or readers)
    now = datetime.datetime.now(datetime.UTC)
    author = Author.objects.using(postgres).create(name="b")
    Article.objects.using(postgres).create(name="a", published=now, author=author)
    Article.objects.using(postgres).create(name="b", published=None)
    Everything.objects.using(postgres).create(boolean=True, date=now.date())
    articles = Article.objects.using(postgres).order_by("name")
    assert [article.published for article in read(articles)] == [now, None]
    assert [*read(articles.values_list("name", "published"))] == [("a", now), ("b", None)]
    assert [*read(articles.values_list("published", flat=True))] == [now, None]
    assert [*read(articles.values("published"))] == [{"published": now}, {"published": None}]
    assert [article.published for article in read(articles.prefetch_related("author"))] == [now, None]
    by_moment = articles.distinct().order_by("published").values_list("name")
    assert [*read(by_moment)] == [("a",), ("b",)], "a column that only the order needs"
    (everything,) = read(Everything.objects.using(postgres))
    assert everything.date == now.date()
    assert len(left) == 7
    assert all(left), "each was read by us"


def test_moments_within_other_values_are_none_of_it(psycopg2):
    """A range is read by psycopg2, and so are its bounds; an array too."""
    with psycopg2.cursor() as cursor:
        leave_moments(psycopg2, cursor)
        cursor.execute("SELECT tstzrange('2020-01-01', now()), ARRAY['2020-01-01'::timestamptz], now(), NULL::date, 1")
        readers = readers_of(cursor)
        (row,) = cursor.fetchall()
    assert sorted(readers) == [2, 3]
    ((between, array, moment, none, one),) = tuples_of([row], readers)
    assert isinstance(row[2], str)
    assert [type(each) for each in (between.lower, between.upper, array[0], moment)] == [datetime.datetime] * 4
    assert (none, one) == (None, 1)


@pytest.mark.parametrize("where", ["connection", "everywhere"])
def test_a_typecaster_of_somebodys_own_stays(psycopg2, where):
    from psycopg2 import extensions

    own = extensions.new_type((1184,), "OWN", lambda text, cursor: f"own {text}")
    known = extensions.string_types[1184]
    extensions.register_type(own, *([psycopg2.connection] if where == "connection" else []))
    try:
        with psycopg2.cursor() as cursor:
            leave_moments(psycopg2, cursor)
            cursor.execute("SELECT '2020-01-01 00:00:00+00'::timestamptz")
            assert not readers_of(cursor)
            assert cursor.fetchone() == ("own 2020-01-01 00:00:00+00",)
    finally:
        extensions.register_type(known)


def test_a_time_zone_of_somebodys_own_stays(psycopg2):
    with psycopg2.cursor() as cursor:
        cursor.cursor.tzinfo_factory = datetime.timezone
        leave_moments(psycopg2, cursor)
        assert not cursor.cursor.string_types


def test_what_is_no_cursor_of_psycopg2_is_left_alone(psycopg2, default, monkeypatch):
    class Proxy:
        def __init__(self, cursor):
            self.cursor = cursor

        def __getattr__(self, name):
            return getattr(self.cursor, name)

    with psycopg2.cursor() as cursor:
        cursor.cursor = Proxy(cursor.cursor)
        leave_moments(psycopg2, cursor)
        assert not cursor.cursor.string_types
    with connections[default].cursor() as cursor:
        leave_moments(connections[default], cursor)
