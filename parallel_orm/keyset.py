"""The order of a queryset as columns to compare: where a row stands, and what stands behind it.

A *keyset* is a total order over the rows: the terms of the queryset's ``order_by``, ended by the primary key. A *key*
is the values of those terms in one row. Keys are compared in the database alone, in its collation, never in Python.

The cursor predicate is the seek method of Markus Winand ("We need tool support for keyset pagination"). For two columns
it is written ``k >= a AND (k > a OR (k = a AND id > b))``: the first part, redundant in logic, is what lets PostgreSQL,
MariaDB and SQLite all start inside an index.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from django.core.exceptions import FieldDoesNotExist, FieldError
from django.db import connections
from django.db.models import (
    BooleanField,
    CharField,
    DecimalField,
    F,
    IntegerField,
    JSONField,
    Model,
    Q,
    QuerySet,
    TextField,
)
from django.db.models.expressions import Col, Combinable, CombinedExpression, OrderBy, RawSQL, Subquery
from django.db.models.functions import Now, Random
from django.db.models.sql import Query

Key = tuple[Any, ...]
Rows = TypeVar("Rows", bound="QuerySet[Any, Any]")

#: A condition that no row meets. Django turns it into an empty result without asking the database.
NOTHING = Q(pk__in=[])


class NotAKeyset(Exception):
    """This ordering cannot be compared column by column; the message says which part of it, and why."""


@dataclass(frozen=True, slots=True)
class Term:
    """One column of an order."""

    #: The look-up path from the model, as in ``filter()``: ``"author__name"``.
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
    """A total order over the rows of a model: no two rows have the same key, however many share a column."""

    terms: tuple[Term, ...]
    #: Whether the order is that of the primary key and of nothing else, forwards or backwards.
    is_primary_key: bool

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(term.path for term in self.terms)

    def reversed(self) -> Keyset:
        return replace(self, terms=tuple(term.reversed() for term in self.terms))

    def order(self, queryset: Rows) -> Rows:
        """Return the queryset in this order, whatever order it had."""
        ordered = queryset.order_by(*(term.order() for term in self.terms))
        ordered.query.standard_ordering = True  # a reverse() is already in the terms
        return ordered

    def after(self, key: Key) -> Q:
        """Rows that stand behind ``key``."""
        return self._behind(key, or_same=False)

    def until(self, key: Key) -> Q:
        """Rows that stand before ``key``, or on it."""
        return self.reversed()._behind(key, or_same=True)

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


def effective_ordering(query: Query) -> Sequence[Any]:
    """Return what Django's compiler orders by: ``extra``, ``order_by`` or ``Meta.ordering``, in that precedence."""
    if query.extra_order_by:
        return tuple(query.extra_order_by)
    if query.order_by or not query.default_ordering:
        return tuple(query.order_by)
    return tuple(query.get_meta().ordering or ())


def is_random(item: object) -> bool:
    return item in ("?", "-?") or isinstance(getattr(item, "expression", item), Random)


def keyset_of(queryset: QuerySet[Any, Any]) -> Keyset:
    """Return the order of a queryset as a keyset; without an order, that of the primary key.

    Raises :class:`NotAKeyset` where it orders by something that cannot be compared column by column.
    """
    model, query = queryset.model, queryset.query
    if query.extra_order_by:
        raise NotAKeyset("extra(order_by=...) is SQL that cannot be compared")
    nulls_last = bool(connections[queryset.db].features.nulls_order_largest)
    terms: list[Term] = []
    for item in effective_ordering(query):
        term = _term(query, model, item, vendor=connections[queryset.db].vendor, nulls_last_ascending=nulls_last)
        if not query.standard_ordering:
            term = term.reversed()
        if term.path in ("pk", model._meta.pk.attname, model._meta.pk.name):
            # The primary key decides every tie: nothing behind it matters.
            tail = primary_key(model, descending=term.descending)
            return Keyset((*terms, *tail.terms), is_primary_key=not terms)
        if term.path not in (earlier.path for earlier in terms):
            terms.append(term)
    return Keyset((*terms, *primary_key(model).terms), is_primary_key=not terms)


def _term(query: Query, model: type[Model], item: object, *, vendor: str, nulls_last_ascending: bool) -> Term:
    """Return one item of an ``order_by`` as a term."""
    if is_random(item):
        raise NotAKeyset('order_by("?") is another order each time')
    descending, nulls_first, nulls_last = False, None, None
    if isinstance(item, OrderBy):
        descending, nulls_first, nulls_last = item.descending, item.nulls_first, item.nulls_last
        item = item.expression
    if type(item) is F:  # not a slice of one
        path = str(getattr(item, "name"))  # noqa: B009 - the stubs do not know it
    elif isinstance(item, str):
        path, descending = item.removeprefix("-"), item.startswith("-")
    else:
        what = type(item).__name__ if isinstance(item, Combinable) else repr(item)
        raise NotAKeyset(f"it is ordered by the expression {what}")
    explicit = bool(nulls_first or nulls_last)
    return Term(
        path=path,
        descending=descending,
        nullable=_is_nullable(query, model, path, vendor),
        # Reversing an order reverses the place of the NULLs, on every database.
        nulls_last=bool(nulls_last) if explicit else nulls_last_ascending != descending,
        nulls_explicit=explicit,
    )


def _is_stable(expression: Any) -> bool:
    """Tell whether an annotation is the same for a row in each query: columns, and Django's functions of them."""
    if expression.contains_aggregate or expression.contains_over_clause:
        return False
    modules = tuple(f"django.db.models.{name}" for name in ("expressions", "lookups", "functions.", "sql.where"))
    return all(
        type(part).__module__.startswith(modules) and not isinstance(part, (Random, Now, Subquery, RawSQL))
        for part in parts(expression)
    )


def _refuse_what_does_not_come_back(path: str, expression: Any, vendor: str) -> None:
    """Refuse what Python gets otherwise than the database has it: as a bound it would skip rows, or find them again."""
    field = expression.output_field
    if isinstance(field, JSONField):
        raise NotAKeyset(f"{path!r} is JSON, whose null and order Python does not give back")
    if isinstance(field, DecimalField) and vendor == "sqlite":
        raise NotAKeyset(f"{path!r} is a decimal, which SQLite stores as a float and Django rounds")
    if isinstance(expression, Col):
        return
    divided = vendor == "mysql" and any(
        isinstance(part, CombinedExpression) and part.connector == Combinable.DIV for part in parts(expression)
    )
    if not isinstance(field, (CharField, TextField, BooleanField, IntegerField)) or divided:
        raise NotAKeyset(f"{path!r} is computed, and may not come back as the database has it")


def parts(expression: Any) -> Iterator[Any]:
    """Yield an expression and all that it is made of: ``flatten()``, which conditions do not have."""
    yield expression
    for source in getattr(expression, "get_source_expressions", list)():
        if source is not None:
            yield from parts(source)


def _is_nullable(query: Query, model: type[Model], path: str, vendor: str) -> bool:
    """Tell whether a path may be NULL; raise :class:`NotAKeyset` where it is no column that can be compared."""
    if path in query.annotations:
        if path not in query.annotation_select:
            raise NotAKeyset(f"{path!r} is an alias(), which cannot be selected; annotate() it")
        if not _is_stable(query.annotations[path]):
            raise NotAKeyset(f"{path!r} is computed, and may come out otherwise in the next query")
        if path.endswith("_"):
            raise NotAKeyset(f"{path!r} ends in an underscore, which no filter can name")
        _refuse_what_does_not_come_back(path, query.annotations[path], vendor)
        return True
    if path in query.extra:
        raise NotAKeyset(f"{path!r} comes from extra(select=...)")
    if path == "pk":
        return False
    pieces = path.split("__")
    try:
        steps, field, _targets, transforms = query.names_to_path(pieces, model._meta)
    except (FieldError, FieldDoesNotExist) as error:
        raise NotAKeyset(str(error)) from error
    if any(step.m2m for step in steps):
        raise NotAKeyset(f"{path!r} has many values for one row")
    if transforms:
        raise NotAKeyset(f"{path!r} is a transform of a column")
    related = getattr(field, "related_model", None)
    if field.is_relation and related is not None and pieces[-1] != getattr(field, "attname", None):
        if related._meta.ordering:
            raise NotAKeyset(f"{path!r} stands for the ordering of {related._meta.label}; name its columns")
        if not getattr(field, "concrete", False):
            raise NotAKeyset(f"{path!r} is a relation, not a column")
    if not field.is_relation:
        _refuse_what_does_not_come_back(path, field.get_col(model._meta.db_table), vendor)
    outer = any(not step.direct or getattr(step.join_field, "null", False) for step in steps)
    return outer or bool(getattr(field, "null", False))
