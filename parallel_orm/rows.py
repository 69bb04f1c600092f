"""The rows of a queryset: read at once, made when they are asked for.

A list of instances costs more to make than the same instances one after the other, each gone before the next one comes:
they take new memory, and the cyclic collector looks through them again and again. So what is kept of a chunk is what
the driver gave.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from django.core.exceptions import EmptyResultSet
from django.db.models import QuerySet
from django.db.models.query import ModelIterable, RelatedPopulator

from parallel_orm import collector
from parallel_orm.identity import VALUES
from parallel_orm.makers import Maker, is_djangos_own, is_written_in, maker_of
from parallel_orm.moments import Reader, leave_moments, readers_of, tuples_of

DJANGOS = (ModelIterable, *VALUES)
#: Fewer rows than this are not worth a function of their own.
FEW = 50
#: How many of the rows of a page are looked at for how large they are.
SAMPLE = 20


class Unmade:
    """The rows of a query as the driver gave them. To be iterated once."""

    def __init__(self, rows: list[Any], make: Maker, places: Callable[[], Mapping[str, int]] = dict) -> None:
        """``places`` tells where those attributes of the instances are that are as the driver gave them."""
        self._rows, self._make, self._places = rows, make, places
        self._last: list[Any] = []
        self._given: list[Any] = []
        self._number = len(rows)

    def __len__(self) -> int:
        return self._number

    @property
    def size(self) -> float:
        """About how many bytes one of them takes, as the driver gave it."""
        some = self._rows[:: max(1, len(self._rows) // SAMPLE)]
        return sum(sys.getsizeof(row) + sum(map(sys.getsizeof, row)) for row in some) / max(1, len(some))

    def last(self) -> Any:
        """Return the last row, ahead of the others: the very object that will come last."""
        if not self._last:
            self._given = [self._rows.pop()]
            self._last = [*self._make(self._given)]
        return self._last[0]

    def columns(self, names: Sequence[str]) -> list[list[Any]] | None:
        """Return these attributes, each of one instance after the other; None where these must be made for that."""
        places = self._places() if names else {}
        if not places.keys() >= set(names):
            return None
        return [[row[places[name]] for row in chain(self._rows, self._given)] for name in names]

    def __iter__(self) -> Iterator[Any]:
        return chain(self._make(self._rows), self._last)


def read(queryset: Any) -> Unmade | list[Any]:
    """Run the query and return its rows, by one query and those of its prefetches.

    They are in a list where they are few, where something is prefetched for them, and where they, or somebody else,
    would notice how and when they are made.
    """
    return Opened(queryset).rows() if is_read_as_djangos(queryset) else list(queryset)


class Opened:
    """A query that has been run, and whose rows may still be with the driver. Any thread may take them."""

    def __init__(self, queryset: Any, sending: Callable[[], object] = lambda: None) -> None:
        """``sending`` is called when nothing is left to do but to send the query."""
        self._queryset = queryset
        self._compiler = queryset.query.get_compiler(using=queryset.db)
        self._cursor, self._rows = _execute(self._compiler, sending)
        self._readers: dict[int, Reader] = {}

    def fetch(self) -> None:
        """Take the rows from the driver."""
        if self._cursor is None:
            return
        with self._cursor as cursor:
            readers = readers_of(cursor)
            self._rows = list(cursor.fetchall())
        self._cursor = None
        width = self._compiler.col_count
        if self._compiler.has_extra_select:  # columns that only the order needs
            self._rows = [row[:width] for row in self._rows]
        self._readers = {place: reader for place, reader in readers.items() if place < width}

    def rows(self) -> Unmade | list[Any]:
        """Return them, as :func:`read` does."""
        self.fetch()
        queryset, rows = self._queryset, self._rows
        make = maker_of(queryset, self._compiler, self._readers) if len(rows) >= FEW else None
        if make is not None and not queryset._prefetch_related_lookups:
            return Unmade(rows, make, self._places)
        if make is not None:
            made = listed(Unmade(rows, make))
        else:
            made = list(_as_django_makes(queryset, self._compiler, tuples_of(rows, self._readers)))
        queryset._result_cache = made
        queryset._fetch_all()  # what is left of it are prefetches
        return made

    def _places(self) -> dict[str, int]:
        """Return where the columns are that nothing is made of, by the attributes of the instances that have them."""
        compiler = self._compiler
        if self._queryset._iterable_class is not ModelIterable:
            return {}
        columns = [column for column, *_ in compiler.select[: compiler.col_count]]
        made = {*compiler.get_converters(columns), *self._readers}
        return {columns[each].target.attname: each for each in compiler.klass_info["select_fields"] if each not in made}


def _execute(compiler: Any, sending: Callable[[], object]) -> tuple[Any, list[Any]]:
    """Return a cursor that has run the query, as ``execute_sql()`` runs it, and no rows; or no cursor, and the rows."""
    if not is_written_in(type(compiler).execute_sql, "django.db.models.sql.compiler"):
        # Somebody listens there, or answers: a profiler, a cache.
        return None, [*chain.from_iterable(compiler.execute_sql())]
    try:
        sql, params = compiler.as_sql()
    except EmptyResultSet:
        sql = ""
    if not sql:
        return None, []
    cursor = compiler.connection.cursor()
    try:
        leave_moments(compiler.connection, cursor)
        sending()
        cursor.execute(sql, params)
    except BaseException:
        cursor.close()
        raise
    return cursor, []


def listed(rows: Iterable[Any]) -> list[Any]:
    """Return these rows in a list; the one that they are in, if they are."""
    if isinstance(rows, list):
        return rows
    with collector.paused():
        return list(rows)


def is_read_as_djangos(queryset: Any) -> bool:
    """Tell whether nobody reads in a way of their own, nor brings rows of their own kind.

    A union may: by its SQL Django changes what it selects, where it is ordered by something else.
    """
    return (
        isinstance(queryset, QuerySet)
        and queryset._iterable_class in DJANGOS
        and not queryset.query.combinator
        and all(
            is_written_in(getattr(kind, name), "django.db.models.query", "parallel_orm.queryset")
            for kind, name in (
                *((type(queryset), "__iter__"), (type(queryset), "_fetch_all")),
                *((queryset._iterable_class, "__iter__"), (RelatedPopulator, "populate")),
            )
        )
        and is_djangos_own(type(queryset.query.get_compiler(using=queryset.db)))
    )


def _as_django_makes(queryset: Any, compiler: Any, rows: list[Any]) -> Iterator[Any]:
    """Yield what Django makes of rows that are here already."""
    compiler.execute_sql = lambda *_, **__: [rows]
    queryset.query.get_compiler = lambda *_, **__: compiler
    try:
        yield from queryset._iterable_class(queryset)
    finally:
        del queryset.query.get_compiler
