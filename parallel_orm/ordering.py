"""Reads the order of a queryset as a keyset, or says why it cannot be one.

A bound goes from the database to Python and back. So what Python gets otherwise than the database has it (a number that
was rounded, text that a field of the user's own has changed) is no keyset, nor is what comes out otherwise in the next
query: as a bound it would skip rows, or find the same ones for ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from django.core.exceptions import FieldDoesNotExist, FieldError
from django.db import connections
from django.db.models import (
    BinaryField,
    BooleanField,
    CharField,
    DateField,
    DateTimeField,
    DecimalField,
    DurationField,
    F,
    FloatField,
    IntegerField,
    JSONField,
    Max,
    Min,
    QuerySet,
    TextField,
)
from django.db.models.expressions import (
    Col,
    Combinable,
    CombinedExpression,
    Func,
    OrderBy,
    OrderByList,
    RawSQL,
    Subquery,
)
from django.db.models.functions import Now, Random
from django.db.models.sql import Query

from parallel_orm.identity import column_name, identity_of, is_grouped
from parallel_orm.keyset import Keyset, Term, primary_key

#: Where the expressions live of which it is known that they give the same for a row in each query.
STABLE = tuple(f"django.db.models.{name}" for name in ("expressions", "lookups", "functions.", "sql.where"))
#: What comes back from a computation as the database has it; and what it may have been rounded from.
EXACT = (CharField, TextField, BooleanField, IntegerField, DateField)
ROUNDED = (FloatField, DecimalField, DurationField)
#: Characters of which MySQL and MariaDB compare all when they sort, by two bytes each: ``max_sort_length``.
LONGEST = 500


class NotAKeyset(Exception):
    """This ordering cannot be compared column by column; the message says which part of it, and why."""


def effective_ordering(query: Query) -> Sequence[Any]:
    """Return what Django's compiler orders by: ``extra``, ``order_by`` or ``Meta.ordering``, in that precedence."""
    if query.extra_order_by:
        return tuple(query.extra_order_by)
    if query.order_by or not query.default_ordering or isinstance(query.group_by, tuple):
        return tuple(query.order_by)
    return tuple(query.get_meta().ordering or ())


def is_random(item: object) -> bool:
    return item in ("?", "-?") or isinstance(getattr(item, "expression", item), Random)


def keyset_of(queryset: QuerySet[Any, Any]) -> Keyset:
    """Return the order of a queryset as a keyset; without an order, that of what tells its rows apart.

    Raises :class:`NotAKeyset` where it orders by something that cannot be compared column by column.
    """
    model, query = queryset.model, queryset.query
    if query.extra_order_by:
        raise NotAKeyset("extra(order_by=...) is SQL that cannot be compared")
    reader = _Reader(queryset)
    ordering, ends = list(effective_ordering(query)), identity_of(queryset)
    if query.distinct_fields:
        return _of_distinct_fields(reader, ordering, ends)
    terms: list[Term] = []
    for item in ordering:
        term = reader.term(item)
        if not ends and term.path == "pk":
            # The primary key decides every tie: nothing behind it matters.
            tail = primary_key(model, descending=term.descending)
            return Keyset((*terms, *tail.terms), not terms, reader.computed)
        if term.path not in (earlier.path for earlier in terms):
            terms.append(term)
    if not ends:
        return Keyset((*terms, *primary_key(model).terms), not terms, reader.computed)
    terms += [term for term in map(reader.term, map(_column, ends)) if term.path not in (each.path for each in terms)]
    return Keyset(tuple(terms), computed=reader.computed)


def _of_distinct_fields(reader: _Reader, ordering: list[Any], ends: list[Any]) -> Keyset:
    """Return the order of ``distinct(*fields)``, whose rows differ in these fields, by which they are ordered first."""
    terms = [reader.term(item) for item in ordering[: len(ends)]] or [reader.term(_column(end)) for end in ends]
    if {term.path for term in terms} != set(ends):
        raise NotAKeyset("it is not ordered first by the fields of its distinct()")
    return Keyset(tuple(terms), computed=reader.computed, tail=tuple(map(reader.item, ordering[len(ends) :])))


def _column(name: Any) -> Any:
    # An F: as a name alone, a relation would stand for the ordering of its model.
    return F(name) if isinstance(name, str) else name


class _Reader:
    """Reads the items of an order as terms, and gives names to what is computed for them."""

    def __init__(self, queryset: QuerySet[Any, Any]) -> None:
        self.model, self.query = queryset.model, queryset.query
        connection = connections[queryset.db]
        self.vendor, self.zone = connection.vendor, connection.timezone_name
        self.nulls_last_ascending = bool(connection.features.nulls_order_largest)
        self.computed: tuple[tuple[str, Any], ...] = ()

    def term(self, item: Any) -> Term:
        """Return one item of an ``order_by`` as a term."""
        if is_random(item):
            raise NotAKeyset('order_by("?") is another order each time')
        descending, nulls_first, nulls_last, by_name = False, None, None, isinstance(item, str)
        if isinstance(item, OrderBy):
            descending, nulls_first, nulls_last = item.descending, item.nulls_first, item.nulls_last
            item = item.expression
        elif isinstance(item, str):
            item, descending = F(item.removeprefix("-")), item.startswith("-")
        if not hasattr(item, "resolve_expression") or isinstance(item, OrderByList):
            raise NotAKeyset(f"it is ordered by {item!r}")
        path, nullable = self._place(item, by_name=by_name)
        explicit = bool(nulls_first or nulls_last)
        # Reversing an order reverses the place of the NULLs, on every database.
        last = bool(nulls_last) if explicit else self.nulls_last_ascending != descending
        term = Term(path, descending, nullable, last, explicit)
        return term if self.query.standard_ordering else term.reversed()

    def item(self, item: Any) -> Any:
        """Return one item of an ``order_by`` in its own words, reversed where the queryset is."""
        if self.query.standard_ordering:
            return item
        if isinstance(item, str):
            return item.removeprefix("-") if item.startswith("-") else f"-{item}"
        reversed_item = item.copy() if isinstance(item, OrderBy) else item.asc()
        reversed_item.reverse_ordering()
        return reversed_item

    def _place(self, expression: Any, *, by_name: bool) -> tuple[str, bool]:
        """Return the path of a column, or the name given to what is computed; and whether it may be NULL."""
        path: Any = expression.name if type(expression) is F else None  # type: ignore[attr-defined]  # not a slice of one
        pk: Any = self.model._meta.pk
        # The name of a relation stands for the ordering of what it leads to, as _column() finds.
        is_ordering = by_name and path == pk.name != pk.attname and pk.related_model._meta.ordering
        if path is not None and column_name(self.model, path) == "pk" and not is_ordering:
            return "pk", False
        if path in self.query.extra:
            raise NotAKeyset(f"{path!r} comes from extra(select=...)")
        if path is not None and path not in self.query.annotations:
            column = self._column(path, by_name=by_name)
            if column is not None:
                return column
        try:
            resolved = expression.resolve_expression(self.query.clone(), allow_joins=True, reuse=None)
        except (FieldError, FieldDoesNotExist) as error:
            raise NotAKeyset(str(error)) from error
        self._refuse_what_does_not_come_back(path or type(expression).__name__, resolved)
        if path in self.query.annotation_select and not path.endswith("_"):
            return path, True
        if resolved.contains_aggregate:  # of groups: its name is selected, or else groups them otherwise
            raise NotAKeyset(f"{path or type(expression).__name__!r} is an aggregate that is not selected")
        name = f"parallel_orm_{len(self.computed)}"
        self.computed = (*self.computed, (name, expression))
        return name, True

    def _column(self, path: str, *, by_name: bool) -> tuple[str, bool] | None:
        """Return the path of a column, and whether it may be NULL; None where it is computed from one."""
        model, pieces = self.model, path.split("__")
        try:
            steps, field, _targets, transforms = self.query.names_to_path(pieces, model._meta)
        except (FieldError, FieldDoesNotExist) as error:
            raise NotAKeyset(str(error)) from error
        if transforms or any(step.m2m for step in steps):  # many values: of a group that is made of them
            return None
        if field.is_relation:
            related = getattr(field, "related_model", None)
            if not getattr(field, "concrete", False):
                raise NotAKeyset(f"{path!r} is a relation, not a column")
            if by_name and related is not None and related._meta.ordering and pieces[-1] != field.attname:
                raise NotAKeyset(f"{path!r} stands for the ordering of {related._meta.label}")
        else:
            self._refuse_what_does_not_come_back(path, field.get_col(model._meta.db_table))
        outer = any(not step.direct or getattr(step.join_field, "null", False) for step in steps)
        name = column_name(model, path) if len(pieces) == 1 else path
        return name, outer or bool(getattr(field, "null", False))

    def _refuse_what_does_not_come_back(self, name: str, expression: Any) -> None:
        field = expression._output_field_or_none
        if isinstance(field, JSONField):
            raise NotAKeyset(f"{name!r} is JSON, whose null and order Python does not give back")
        if isinstance(field, DateTimeField) and self.vendor == "postgresql" and self.zone != "UTC":
            raise NotAKeyset(f"{name!r} is a time of {self.zone}, where an hour comes twice a year")
        if isinstance(field, DecimalField) and self.vendor == "sqlite":
            raise NotAKeyset(f"{name!r} is a decimal, which SQLite stores as a float and Django rounds")
        is_long = isinstance(field, TextField | BinaryField) or (
            isinstance(field, CharField) and isinstance(expression, Col) and not 0 < (field.max_length or 0) <= LONGEST
        )
        if is_long and self.vendor == "mysql":
            raise NotAKeyset(f"{name!r} is sorted by its first 1,024 bytes here (max_sort_length)")
        if hasattr(field, "from_db_value") and not type(field).__module__.startswith("django."):
            raise NotAKeyset(f"{name!r} is made into something else by {type(field).__name__}.from_db_value()")
        if isinstance(expression, Col):
            return
        if not _is_stable(expression, grouped=is_grouped(self.query)):
            raise NotAKeyset(f"{name!r} is computed, and may come out otherwise in the next query")
        if not self._is_exact(expression):
            raise NotAKeyset(f"{name!r} is computed, and may not come back as the database has it")

    def _is_exact(self, expression: Any) -> bool:
        output = expression._output_field_or_none
        if isinstance(expression, Max | Min) and isinstance(expression.get_source_expressions()[0], Col):
            return True  # a value of the column itself
        if not isinstance(output, EXACT) or isinstance(output, DateTimeField):
            return False
        made_of = [getattr(part, "_output_field_or_none", None) for part in parts(expression)]
        if isinstance(output, IntegerField) and any(isinstance(field, ROUNDED) for field in made_of):
            return False
        return self.vendor != "mysql" or not any(
            isinstance(part, CombinedExpression) and part.connector == Combinable.DIV for part in parts(expression)
        )


def _is_stable(expression: Any, *, grouped: bool) -> bool:
    """Tell whether something is the same for a row in each query: columns, and Django's functions of them.

    Of groups, aggregates are: they belong to the row as a column does.
    """
    if expression.contains_over_clause or (expression.contains_aggregate and not grouped):
        return False
    known = (*STABLE, "django.db.models.aggregates") if grouped else STABLE
    return all(
        type(part).__module__.startswith(known)
        and type(part) is not Func
        and not isinstance(part, (Random, Now, Subquery, RawSQL))
        for part in parts(expression)
    )


def parts(expression: Any) -> Iterator[Any]:
    """Yield an expression and all that it is made of: ``flatten()``, which conditions do not have."""
    yield expression
    for source in getattr(expression, "get_source_expressions", list)():
        if source is not None:
            yield from parts(source)
