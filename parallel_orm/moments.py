"""Moments and dates that psycopg2 reads, read by Python's own parser: the same values in half of the time.

psycopg2 takes them apart in C, and then calls for a time zone, which for Django's connections is always the one of the
connection, whatever offset the text has. Where that is what would happen, and nobody has put a typecaster of his own in
its place, ``fromisoformat()`` does the same at once. What it cannot read (years before 1, infinity, other styles than
ISO) psycopg2 reads as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import date, datetime
from functools import cache
from importlib import import_module
from typing import Any

#: PostgreSQL's number of ``timestamp with time zone``.
WITH_ZONE = 1184
#: By the number of PostgreSQL's type, what psycopg2 calls its typecaster.
CASTERS = {WITH_ZONE: "DATETIMETZ", 1114: "DATETIME", 1082: "DATE"}

Cast = Callable[[str | None, Any], Any]


def read_moments_fast(connection: Any, cursor: Any) -> None:
    """Have a cursor of Django's read them so, where it comes to the same. To be called before it executes anything."""
    if getattr(getattr(connection, "Database", None), "__name__", "") != "psycopg2":
        return
    _psycopg: Any = import_module("psycopg2._psycopg")
    raw = cursor.cursor
    factory = raw.tzinfo_factory
    if factory is not None and getattr(factory, "__func__", factory).__module__ != "django.db.backends.postgresql.base":
        return
    zone = None if factory is None else connection.timezone
    for number, name in CASTERS.items():
        known = getattr(_psycopg, name)
        if _psycopg.string_types.get(number) is known and number not in raw.connection.string_types:
            with suppress(TypeError):  # somebody's proxy of a cursor
                _psycopg.register_type(_caster(number, zone), raw)


@cache
def _caster(number: int, zone: Any) -> Any:
    _psycopg: Any = import_module("psycopg2._psycopg")
    known = getattr(_psycopg, CASTERS[number])
    if number == WITH_ZONE:
        cast = _moment(zone, known)
    else:
        cast = _read(date.fromisoformat if known is _psycopg.DATE else datetime.fromisoformat, known)
    return _psycopg.new_type((number,), CASTERS[number], cast)


def _moment(zone: Any, known: Cast) -> Cast:
    def cast(text: str | None, cursor: Any) -> datetime | None:
        try:
            moment = datetime.fromisoformat(text)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            return known(text, cursor)  # type: ignore[no-any-return]
        return moment if moment.tzinfo is zone else moment.replace(tzinfo=zone)

    return cast


def _read(parse: Callable[[str], date], known: Cast) -> Cast:
    def cast(text: str | None, cursor: Any) -> Any:
        try:
            return parse(text)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            return known(text, cursor)

    return cast
