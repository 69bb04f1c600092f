"""An order as columns to compare: where a row stands, and what stands behind it.

A *keyset* is a total order over the rows: the terms of the queryset's ``order_by``, ended by what tells its rows apart,
which is the primary key as a rule. A *key* is the values of those terms in one row. Keys are compared in the database
alone, in its collation, never in Python.

The cursor predicate is the seek method of Markus Winand ("We need tool support for keyset pagination"). For two columns
it is written ``k >= a AND (k > a OR (k = a AND id > b))``: the first part, redundant in logic, is what lets PostgreSQL,
MariaDB and SQLite all start inside an index.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from django.db.models import F, Model, Q, QuerySet
from django.db.models.expressions import OrderBy

Key = tuple[Any, ...]
Rows = TypeVar("Rows", bound="QuerySet[Any, Any]")

#: A condition that no row meets. Django turns it into an empty result without asking the database.
NOTHING = Q(pk__in=[])


@dataclass(frozen=True, slots=True)
class Term:
    """One column of an order."""

    #: The look-up path from the model, as in ``filter()``: ``"author__name"``; or the name of what is computed.
    path: str
    descending: bool = False
    #: Whether there may be NULLs, and where they then stand.
    nullable: bool = False
    nulls_last: bool = False
    #: Whether the queryset said itself where they stand (else it is where this database puts them).
    nulls_explicit: bool = False

    def reversed(self) -> Term:
        return replace(self, descending=not self.descending, nulls_last=not self.nulls_last)

    def order(self) -> OrderBy:
        nulls = {"nulls_last" if self.nulls_last else "nulls_first": True} if self.nulls_explicit else {}
        return OrderBy(F(self.path), descending=self.descending, **nulls)

    def same(self, value: Any) -> Q:
        """Rows with this very value here."""
        return Q((f"{self.path}__isnull", True)) if value is None else Q((self.path, value))

    def behind(self, value: Any, *, or_same: bool = False) -> Q:
        """Rows that stand behind those with this value, or beside them too."""
        if value is None:
            if self.nulls_last:
                return self.same(None) if or_same else NOTHING
            return Q() if or_same else Q((f"{self.path}__isnull", False))
        lookup = ("lt" if self.descending else "gt") + ("e" if or_same else "")
        behind = Q((f"{self.path}__{lookup}", value))
        return behind | self.same(None) if self.nullable and self.nulls_last else behind


@dataclass(frozen=True, slots=True)
class Keyset:
    """A total order over the rows of a queryset: no two rows have the same key, however many share a column."""

    terms: tuple[Term, ...]
    #: Whether the order is that of the primary key and of nothing else, forwards or backwards.
    is_primary_key: bool = False
    #: What terms name that is no column: expressions, by the names that they are given.
    computed: tuple[tuple[str, Any], ...] = ()
    #: What a ``distinct(*fields)`` is ordered by besides, which decides which row of several it keeps; else None.
    tail: tuple[Any, ...] | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(term.path for term in self.terms)

    def reversed(self) -> Keyset:
        return replace(self, terms=tuple(term.reversed() for term in self.terms))

    def order(self, queryset: Rows) -> Rows:
        """Return the queryset in this order, whatever order it had."""
        named = queryset.alias(**dict(self.computed)) if self.computed else queryset
        ordered = named.order_by(*(term.order() for term in self.terms), *(self.tail or ()))
        ordered.query.standard_ordering = True  # a reverse() is already in the terms
        return ordered

    def part(self, queryset: Rows, after: Key | None, until: Key | None) -> Rows:
        """Return what of a queryset stands behind ``after``, and before ``until`` or on it, in this order."""
        ordering = self
        if self._is_null_in(after, until) and self.tail is None:  # there the first column orders nothing
            ordering = replace(self, terms=self.terms[1:])
        return ordering.order(queryset).filter(self.between(after, until))

    def keys_of(self, ordered: Rows) -> Any:
        """Return the keys of a queryset that :meth:`order` or :meth:`part` made."""
        names = dict(self.computed)
        return ordered.values_list(*(F(path) if path in names else path for path in self.paths))

    def _is_null_in(self, after: Key | None, until: Key | None) -> bool:
        """Tell whether the first column is NULL in all rows between these keys."""
        bounds = after is not None and until is not None and after[0] is None is until[0]
        return bounds and self.terms[0].nullable and len(self.terms) > 1

    def between(self, after: Key | None, until: Key | None) -> Q:
        """Rows that stand behind the key ``after``, and before the key ``until`` or on it; None: open on that side."""
        first, *others = self.terms
        keyset = self
        if after and until and self._is_null_in(after, until):
            rest = replace(self, terms=tuple(others))
            return first.same(None) & rest.between(after[1:], until[1:])
        bound = until if first.nulls_last else after
        if first.nullable and bound is not None and bound[0] is not None:
            # All NULLs stand beyond it. Without "OR k IS NULL" it is one range of an index.
            keyset = replace(self, terms=(replace(first, nullable=False), *others))
        condition = Q()
        if after is not None:
            condition &= keyset._behind(after, or_same=False)
        if until is not None:
            condition &= keyset.reversed()._behind(until, or_same=True)
        return condition

    def _behind(self, key: Key, *, or_same: bool) -> Q:
        *leading, (last_term, last_value) = zip(self.terms, key, strict=True)
        condition = last_term.behind(last_value, or_same=or_same)
        for term, value in reversed(leading):
            tie = term.same(value) & condition
            condition = term.behind(value, or_same=True) & (term.behind(value) | tie)
        return condition


def primary_key(model: type[Model], *, descending: bool = False) -> Keyset:
    """Return the order of the primary key, of one column or of several."""
    fields = model._meta.pk_fields
    paths = ["pk"] if len(fields) == 1 else [field.attname for field in fields]
    return Keyset(tuple(Term(path, descending) for path in paths), is_primary_key=True)


def carried(values: Iterable[Any]) -> Key:
    """Return the values of a key as they can be kept and sent: psycopg2 gives views of memory for binary ones."""
    return tuple(bytes(value) if isinstance(value, memoryview) else value for value in values)
