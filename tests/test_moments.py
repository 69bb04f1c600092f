"""Moments that are read fast are those that psycopg2 reads."""

from __future__ import annotations

import datetime
import zoneinfo

import pytest
from django.db import connections
from django.test import override_settings

from parallel_orm import moments
from parallel_orm.moments import read_moments_fast
from parallel_orm.rows import read
from tests.testapp.models import Article, Everything

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


def outcome(connection, sql, *, fast):
    with connection.cursor() as cursor:
        if fast:
            read_moments_fast(connection, cursor)
            assert cursor.cursor.string_types
        try:
            cursor.execute(sql)
            (value,) = cursor.fetchone()
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
                    assert outcome(psycopg2, sql, fast=True) == outcome(psycopg2, sql, fast=False), (style, sql)


def test_the_time_zone_of_the_connection_counts(psycopg2, monkeypatch):
    psycopg2.close()
    monkeypatch.setitem(psycopg2.settings_dict, "TIME_ZONE", "Europe/Paris")
    for name in ("timezone", "timezone_name"):
        psycopg2.__dict__.pop(name, None)
    try:
        sql = "SELECT '2020-10-25 01:30:00+00'::timestamptz"
        fast = outcome(psycopg2, sql, fast=True)
        assert fast == outcome(psycopg2, sql, fast=False)
        assert fast[2] == zoneinfo.ZoneInfo("Europe/Paris")
    finally:
        psycopg2.close()
        for name in ("timezone", "timezone_name"):
            psycopg2.__dict__.pop(name, None)


def test_rows_are_read_so(psycopg2, postgres, monkeypatch):
    now = datetime.datetime.now(datetime.UTC)
    Article.objects.using(postgres).create(name="a", published=now)
    Everything.objects.using(postgres).create(boolean=True, date=now.date())
    asked = []
    monkeypatch.setattr(
        moments, "_moment", lambda zone, known: lambda text, cursor: asked.append(text) or known(text, cursor)
    )
    moments._caster.cache_clear()
    try:
        (article,) = read(Article.objects.using(postgres))
    finally:
        moments._caster.cache_clear()
    assert len(asked) == 1
    assert article.published == now
    (everything,) = read(Everything.objects.using(postgres))
    assert everything.date == now.date()


@pytest.mark.parametrize("where", ["connection", "everywhere"])
def test_a_typecaster_of_somebodys_own_stays(psycopg2, where):
    from psycopg2 import extensions

    own = extensions.new_type((1184,), "OWN", lambda text, cursor: f"own {text}")
    known = extensions.string_types[1184]
    extensions.register_type(own, *([psycopg2.connection] if where == "connection" else []))
    try:
        with psycopg2.cursor() as cursor:
            read_moments_fast(psycopg2, cursor)
            cursor.execute("SELECT '2020-01-01 00:00:00+00'::timestamptz")
            assert cursor.fetchone() == ("own 2020-01-01 00:00:00+00",)
    finally:
        extensions.register_type(known)


def test_a_time_zone_of_somebodys_own_stays(psycopg2):
    with psycopg2.cursor() as cursor:
        cursor.cursor.tzinfo_factory = datetime.timezone
        read_moments_fast(psycopg2, cursor)
        assert not cursor.cursor.string_types


def test_what_is_no_cursor_of_psycopg2_is_left_alone(psycopg2, default, monkeypatch):
    class Proxy:
        def __init__(self, cursor):
            self.cursor = cursor

        def __getattr__(self, name):
            return getattr(self.cursor, name)

    with psycopg2.cursor() as cursor:
        cursor.cursor = Proxy(cursor.cursor)
        read_moments_fast(psycopg2, cursor)
        assert not cursor.cursor.string_types
    with connections[default].cursor() as cursor:
        read_moments_fast(connections[default], cursor)
