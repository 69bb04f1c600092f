"""Moments and dates that psycopg2 reads, read by Python's own parser: the same values in a third of the time.

psycopg2 takes them apart in C, and then calls for a time zone, which for Django's connections is always the one of the
connection, whatever offset the text has. Where that is what would happen, and nobody has put a typecaster of his own in
its place, the driver is told to leave the text, and ``fromisoformat()`` does the same where rows are made of it. What
that cannot read (years before 1, infinity, other styles than ISO) psycopg2 reads as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, tzinfo
from importlib import import_module
from typing import Any

#: PostgreSQL's number of ``timestamp with time zone``.
WITH_ZONE = 1184
#: By the number of PostgreSQL's type, what psycopg2 calls its typecaster.
CASTERS = {WITH_ZONE: "DATETIMETZ", 1114: "DATETIME", 1082: "DATE"}


@dataclass(frozen=True, slots=True)
class Reader:
    """How the text of a column is read."""

    parse: Callable[[str], date]
    #: Reads what ``parse`` raises a ValueError for.
    known: Callable[[str], Any]
    #: Whether its moments have the time zone of the connection, and which one.
    has_zone: bool = False
    zone: tzinfo | None = None

    def __call__(self, text: str) -> Any:
        """Read it, as the function that is written for many rows does."""
        try:
            value: Any = self.parse(text)
        except ValueError:
            return self.known(text)
        return value if not self.has_zone or value.tzinfo is self.zone else value.replace(tzinfo=self.zone)


def tuples_of(rows: list[Any], readers: Mapping[int, Reader]) -> list[Any]:
    """Return the rows of a driver with nothing left as text."""
    if not readers:
        return rows
    read = [readers.get(place) for place in range(max(readers) + 1)]
    return [_read(row, read) for row in rows]


def _read(row: Sequence[Any], readers: Sequence[Reader | None]) -> tuple[Any, ...]:
    pairs = zip(row, readers, strict=False)
    head = [value if value is None or reader is None else reader(value) for value, reader in pairs]
    return (*head, *row[len(head) :])


def leave_moments(connection: Any, cursor: Any) -> None:
    """Have a cursor of Django's leave them as text, where :func:`readers_of` will read the same. To be called before it
    executes anything.
    """
    if getattr(getattr(connection, "Database", None), "__name__", "") != "psycopg2":
        return
    _psycopg: Any = import_module("psycopg2._psycopg")
    raw = cursor.cursor
    if not isinstance(raw, _psycopg.cursor):  # somebody's proxy
        return
    factory = raw.tzinfo_factory
    if factory is not None and getattr(factory, "__func__", factory).__module__ != "django.db.backends.postgresql.base":
        return
    own = raw.string_types or {}
    for number, name in CASTERS.items():
        known = getattr(_psycopg, name)
        if _psycopg.string_types.get(number) is known and number not in own | raw.connection.string_types:
            raw.string_types = own = {**own, number: _psycopg.UNICODE}


def readers_of(cursor: Any) -> dict[int, Reader]:
    """Return how to read the columns that a cursor of Django's leaves as text, by their places.

    To be called when it has executed, and before it fetches: what is within other values, as the bounds of a range are,
    is none of this.
    """
    raw = cursor.cursor
    types = getattr(raw, "string_types", None)
    if not types:
        return {}
    _psycopg: Any = import_module("psycopg2._psycopg")
    left = {number for number in CASTERS if types.get(number) is _psycopg.UNICODE}
    raw.string_types = {number: caster for number, caster in types.items() if number not in left}
    return {
        place: _reader(column.type_code, getattr(_psycopg, CASTERS[column.type_code]), cursor)
        for place, column in enumerate(raw.description or ())
        if column.type_code in left
    }


def _reader(number: int, caster: Callable[[str, Any], Any], cursor: Any) -> Reader:
    raw = cursor.cursor

    def known(text: str) -> Any:
        with cursor.db.wrap_database_errors:
            return caster(text, raw)

    if number == WITH_ZONE:
        return Reader(datetime.fromisoformat, known, True, raw.tzinfo_factory and cursor.db.timezone)
    return Reader(date.fromisoformat if CASTERS[number] == "DATE" else datetime.fromisoformat, known)
