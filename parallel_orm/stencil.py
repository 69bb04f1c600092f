"""The SQL of what stands behind a key, made once: for the next key nothing but that is put in.

Django makes the SQL of a query anew each time that it is run, which takes as long as a small query itself. From one
page of a walk to the next, and from one jump to the next, the key that it begins behind is all that changes. Where that
is so for certain, a page or a jump is a queryset whose compiler has its SQL already. It is executed as any other one.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

from django.core.exceptions import EmptyResultSet, FullResultSet
from django.db import connections
from django.db.models import QuerySet
from django.db.models.expressions import Col, Subquery
from django.db.models.lookups import Lookup
from django.db.models.sql import Query

from parallel_orm.keyset import Term
from parallel_orm.makers import is_written_in
from parallel_orm.rows import is_read_as_djangos

Rows = QuerySet[Any, Any]


class Behind:
    """What of a queryset stands behind a key, for one key after the other. ``rows`` is in the order of ``term``."""

    def __init__(self, rows: Rows, term: Term) -> None:
        self._rows, self._term = rows, term
        self._span: tuple[int, int] | None = None
        self._stencil: Stencil | None = None
        #: Whether its SQL may be kept, as far as is known.
        self._may_be_kept = True

    def slice(self, value: Any, start: int, stop: int) -> Rows:
        """Return a slice of what stands behind the value of a key."""
        is_as_long = self._span == (start, stop)
        if is_as_long and self._stencil is not None and (part := self._stencil.part(value)) is not None:
            return part
        part = self._rows.filter(self._term.behind(value))[start:stop]
        self._stencil, self._span = None, (start, stop)
        # The length of the first pages changes with each. What is asked for as long as before may be so again.
        if is_as_long and self._may_be_kept:
            self._stencil = Stencil.of(part.all())  # a copy, which nobody fills with rows
            self._may_be_kept = self._stencil is not None
        return part


class Mark:
    """Where a parameter of the key stands among those of the query."""

    def __init__(self, place: int) -> None:
        self.place = place


class Stencil:
    """The SQL of a queryset but for the value of its last condition."""

    def __init__(
        self, rows: Rows, compiler: Any, lookup: Lookup[Any], sql: str, params: Sequence[Any], text: str
    ) -> None:
        self._rows, self._compiler, self._lookup = rows, compiler, lookup
        self._sql, self._params, self._text = sql, params, text

    @classmethod
    def of(cls, rows: Rows) -> Stencil | None:
        """Return that of a queryset; None where its SQL may depend on more, or is not Django's alone to make."""
        where = rows.query.where
        lookup = where.children[-1]
        if (
            where.connector != "AND"
            or not isinstance(lookup, Lookup)
            or type(lookup).__init__ is not Lookup.__init__
            or type(lookup.lhs) is not Col
            or not is_read_as_djangos(rows)
            or not is_written_in(type(rows.query).get_compiler, "django.db.models.sql.query")
        ):
            return None
        compiler = rows.query.get_compiler(using=rows.db)
        if not is_written_in(type(compiler).as_sql, "django.db.models.sql.compiler"):
            return None
        compile_node, texts, is_alone = compiler.compile, [], True

        def compile_and_mark(node: Any) -> tuple[str, Any]:
            nonlocal is_alone
            is_alone = is_alone and _is_djangos(node)
            sql, params = compile_node(node)
            if node is lookup:
                texts.append(sql)
                params = [Mark(place) for place in range(len(params))]
            return sql, params

        compiler.compile = compile_and_mark
        try:
            sql, params = compiler.as_sql()
        except (EmptyResultSet, FullResultSet):
            return None
        finally:
            del compiler.compile
        if not is_alone or len(texts) != 1:
            return None
        return cls(rows, compiler, lookup, sql, params, texts[0])

    def part(self, value: Any) -> Rows | None:
        """Return the queryset with another value, to be run and not to be narrowed; None where its SQL is another."""
        if type(value) is not type(self._lookup.rhs):
            return None
        try:
            lookup: Any = type(self._lookup)(self._lookup.lhs, value)
            text, values = self._compiler.compile(lookup)
        except (EmptyResultSet, FullResultSet):
            return None
        if text != self._text:
            return None
        params = tuple(values[each.place] if type(each) is Mark else each for each in self._params)
        part = self._rows._chain()  # type: ignore[attr-defined]
        part.query.get_compiler = _Ready(self._compiler, self._sql, params)
        return part  # type: ignore[no-any-return]


class _Ready:
    """In place of ``Query.get_compiler()``: a compiler that has its SQL, for the connection of whoever asks."""

    def __init__(self, compiler: Any, sql: str, params: Sequence[Any]) -> None:
        self._compiler, self._sql, self._params = compiler, sql, params

    def __call__(self, using: str | None = None, connection: Any = None, elide_empty: bool = True) -> Any:
        compiler = copy(self._compiler)
        compiler.connection = connection if using is None else connections[using]
        compiler.as_sql = self._as_sql
        return compiler

    def _as_sql(self, with_limits: bool = True, with_col_aliases: bool = False) -> tuple[str, Sequence[Any]]:
        return self._sql, self._params


def _is_djangos(node: Any) -> bool:
    """Tell whether the SQL of a part of a query is Django's to make, and made by this compiler alone."""
    return type(node).__module__.startswith("django.") and not isinstance(node, (Query, Subquery))
