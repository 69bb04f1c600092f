"""A queryset on one database whose rows bring the values that they are ordered by, as that database has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, itemgetter
from typing import Any

from django.db import connections
from django.db.models import F, QuerySet
from django.db.models.expressions import Col, ColPairs, OrderBy, Ref
from django.db.models.functions import Random
from django.db.models.query import (
    FlatValuesListIterable,
    ModelIterable,
    NamedValuesListIterable,
    ValuesIterable,
    ValuesListIterable,
)
from django.db.models.sql import Query
from django.db.models.utils import create_namedtuple_class

from parallel_orm.comparing import Comparison, NotComparable, comparison_of
from parallel_orm.guards import is_of_one_table
from parallel_orm.makers import keeps_as_it_is
from parallel_orm.merging import Page, Term
from parallel_orm.ordering import effective_ordering, is_random
from parallel_orm.rows import Unmade, listed

Rows = QuerySet[Any, Any]
#: What a row has besides, while it is on its way.
NAME = "parallel_orm_key_"


@dataclass
class Sorted:
    """The rows of one database: with their sort keys, and without."""

    queryset: Rows
    #: What the rows are ordered by, of this database.
    order: list[OrderBy] = field(default_factory=list)
    #: How to read each of it of a row.
    readers: list[Callable[[Any], Any]] = field(default_factory=list)
    #: Which attributes of the instances these are; None where they are something else, or rows are to be stripped.
    attributes: list[str] | None = None
    #: Makes of rows what the queryset that was asked for gives.
    strip: Callable[[list[Any]], list[Any]] = list

    def page(self, rows: Unmade | list[Any]) -> Page:
        """Return rows as they are asked for, and the columns that they are ordered by."""
        if isinstance(rows, Unmade) and self.attributes is not None:
            found = rows.columns(self.attributes)
            if found is not None:
                return rows, found
        rows = listed(rows)
        columns = [list(map(reader, rows)) for reader in self.readers]
        return self.strip(rows), columns


def names_of(query: Query) -> list[str]:
    """Return the names of the columns of a row of values, as Django's ``values()`` has them."""
    selected: Any = getattr(query, "selected", None)
    return list(selected) if selected else [*query.extra_select, *query.values_select, *query.annotation_select]


def select(query: Any, name: str, expression: Any) -> None:
    """Have the rows of a query bring what is resolved already, behind all else, under this name."""
    query.annotations[name] = expression
    query.append_annotation_mask([name])
    if getattr(query, "selected", None):
        query.selected[name] = name


def term_of(item: OrderBy, comparison: Comparison, alias: str) -> Term:
    """Return one item of an order; NULLs stand where it says, or where the database puts them."""
    largest = bool(connections[alias].features.nulls_order_largest)
    explicit = item.nulls_first or item.nulls_last
    return Term(comparison, item.descending, bool(item.nulls_last) if explicit else largest != item.descending)


def sorted_rows(querysets: Mapping[str, Rows]) -> tuple[dict[str, Sorted], list[Term]]:
    """Return the same rows on several databases with what they are ordered by, and how that compares.

    Makes no query of the user's; may ask the catalogues. Raises :class:`~parallel_orm.comparing.NotComparable`.
    """
    read = {alias: _Reading(alias, queryset) for alias, queryset in querysets.items()}
    first = next(iter(read.values()))
    terms = []
    for place, item in enumerate(first.order):
        name = first.name_of(place)
        comparison = comparison_of(name, {alias: each.order[place].expression for alias, each in read.items()})
        terms.append(term_of(item, comparison, first.alias))
    return {alias: each.done([term.comparison.raw for term in terms]) for alias, each in read.items()}, terms


class _Reading:
    """How the order of a queryset is read of its rows, on one database."""

    def __init__(self, alias: str, queryset: Rows) -> None:
        self.alias, self.queryset = alias, queryset
        self.kind: Any = queryset._iterable_class
        self.order: list[OrderBy] = []
        query: Any = queryset.query
        if query.combinator:
            self.order = _order_of_combined(queryset)
            return
        ordering = effective_ordering(query)
        if any(map(is_random, ordering)):
            self.queryset = queryset.all()
            query = self.queryset.query
            # One number a row, by which it is ordered, and which it brings.
            select(query, f"{NAME}random", Random())
            query.order_by = tuple(f"{NAME}random" if is_random(item) else item for item in ordering)
        if query.extra_order_by:
            raise NotComparable("extra(order_by=...) is SQL that cannot be compared")
        if not ordering:
            return
        self._query = query.clone()
        if self.kind is ModelIterable and is_of_one_table(queryset):
            self.order = _one_by_one(_order_by_own_columns(self._query, ordering))
            return
        compiler = self._query.get_compiler(alias)
        compiler.setup_query()
        self.order = _one_by_one([resolved for resolved, _ in compiler.get_order_by()])

    def name_of(self, place: int) -> str:
        expression: Any = self.order[place].expression
        column = getattr(expression, "target", None)
        return repr(getattr(expression, "refs", None) or getattr(column, "name", None) or str(expression))

    def done(self, raws: Sequence[Callable[[Any], Any] | None]) -> Sorted:
        """Return the rows with their keys; ``raws`` make what is asked for instead of some columns."""
        if not self.order:
            return Sorted(self.queryset, attributes=[])
        query: Any = self.queryset.query
        if not query.combinator:
            query = self._query
        names, added = names_of(query), [name for name in query.annotations if name == f"{NAME}random"]
        readers, attributes = [], list[str]()
        for place, (item, raw) in enumerate(zip(self.order, raws, strict=True)):
            reader = None if raw is not None else self._reader(item.expression, names)
            if reader is None:
                if query.combinator:
                    raise NotComparable(f"a {query.combinator} is ordered by what its rows do not have")
                expression: Any = item.expression
                if isinstance(expression, Ref):
                    expression = expression.get_source_expressions()[0]
                name = f"{NAME}{place}"
                select(query, name, expression if raw is None else raw(expression))
                added.append(name)
                reader = self._reader_of(name, len(names_of(query)) - 1)
            elif isinstance(item.expression, Col):
                attributes.append(item.expression.target.attname)
            readers.append(reader)
        queryset = self.queryset.all()
        kind, width = self.kind, len(names_of(query)) - len(added)
        queryset._query = query  # type: ignore[attr-defined]
        if added and kind in (FlatValuesListIterable, NamedValuesListIterable):
            queryset._iterable_class = ValuesListIterable
        if not added:
            are_own = len(attributes) == len(readers)
            return Sorted(queryset, self.order, readers, attributes if are_own else None)
        if kind is NamedValuesListIterable:
            fields = self.queryset._fields or names[:width]  # type: ignore[attr-defined]
            return Sorted(queryset, self.order, readers, strip=_named(fields, width))
        return Sorted(queryset, self.order, readers, strip=_stripping(kind, added, width))

    def _reader(self, expression: Any, names: list[str]) -> Callable[[Any], Any] | None:
        """Return how to read something of the rows as they are; None where they do not have it."""
        query: Any = self.queryset.query
        if isinstance(expression, Ref):
            name: str = expression.refs  # type: ignore[attr-defined]
            if name in query.annotation_select or (name in names and self.kind is not ModelIterable):
                return self._reader_of(name, names.index(name) if name in names else 0)
            return None
        if self.kind is not ModelIterable or not isinstance(expression, Col) or query.deferred_loading[0]:
            return None
        model, column = self.queryset.model, expression.target
        is_own = expression.alias == query.get_meta().db_table and column in model._meta.local_concrete_fields
        return attrgetter(column.attname) if is_own and keeps_as_it_is(model, column.attname) else None

    def _reader_of(self, name: str, place: int) -> Callable[[Any], Any]:
        if self.kind is ModelIterable:
            return attrgetter(name)
        if self.kind is FlatValuesListIterable:
            return _RowOrItem(place)
        return itemgetter(name if self.kind is ValuesIterable else place)


class _RowOrItem:
    """Reads a flat row, or one that has been given keys."""

    def __init__(self, place: int) -> None:
        self.place = place

    def __call__(self, row: Any) -> Any:
        return row[self.place] if type(row) is tuple else row


def _order_by_own_columns(query: Query, names: Sequence[str]) -> list[OrderBy]:
    """Return what Django's compiler makes of such an order, which would make all else that is selected for it."""
    meta, table, found = query.get_meta(), query.get_initial_alias(), []
    for item in names:
        name = item.lstrip("-")
        column: Any = meta.pk if name == "pk" else meta.get_field(name)
        found.append(OrderBy(column.get_col(table), descending=item.startswith("-") is query.standard_ordering))
    return found


def _one_by_one(order: Iterable[OrderBy]) -> list[OrderBy]:
    """Return an order with the columns of a primary key of several in the place of that."""
    found = []
    for item in order:
        columns = item.expression.get_cols() if isinstance(item.expression, ColPairs) else [item.expression]
        found += [OrderBy(each, item.descending, item.nulls_first, item.nulls_last) for each in columns]
    return found


def _order_of_combined(queryset: Rows) -> list[OrderBy]:
    """Return the order of a union, whose items are names of what its rows have."""
    query: Any = queryset.query
    found = []
    for item in query.order_by:
        descending, nulls_first, nulls_last = False, None, None
        if isinstance(item, OrderBy):
            descending, nulls_first, nulls_last = item.descending, item.nulls_first, item.nulls_last
            item = item.expression
        name = getattr(item, "name", item)
        if not isinstance(name, str):
            raise NotComparable(f"a {query.combinator} is ordered by {item!r}")
        descending ^= name.startswith("-")
        name = name.lstrip("-")
        first = query.combined_queries[0]
        while first.combinator:
            first = first.combined_queries[0]
        resolved = first.annotations.get(name) or F(name).resolve_expression(first.clone())
        order = OrderBy(resolved, descending=descending, nulls_first=nulls_first, nulls_last=nulls_last)
        if not query.standard_ordering:
            order.reverse_ordering()
        if queryset._iterable_class is not ModelIterable:
            order.set_source_expressions([Ref(name, resolved)])
        found.append(order)
    return found


def _stripping(kind: Any, added: list[str], width: int) -> Callable[[list[Any]], list[Any]]:
    """Return what takes away what was added to rows of a kind."""

    def of_instances(rows: list[Any]) -> list[Any]:
        for row in rows:
            state = row.__dict__
            for name in added:
                del state[name]
        return rows

    def of_dicts(rows: list[Any]) -> list[Any]:
        for row in rows:
            for name in added:
                del row[name]
        return rows

    def of_tuples(rows: list[Any]) -> list[Any]:
        return [row[:width] for row in rows]

    def of_flat(rows: list[Any]) -> list[Any]:
        return [row[0] for row in rows]

    return {ModelIterable: of_instances, ValuesIterable: of_dicts, FlatValuesListIterable: of_flat}.get(kind, of_tuples)


def _named(names: Sequence[str], width: int) -> Callable[[list[Any]], list[Any]]:
    kind = create_namedtuple_class(*names)

    def strip(rows: list[Any]) -> list[Any]:
        return [tuple.__new__(kind, row[:width]) for row in rows]

    return strip
