"""Groups of several databases made into the groups of all: those of equal columns become one, their aggregates too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from django.db import Error, connections
from django.db.models import Max, Min, QuerySet
from django.db.models.expressions import Col
from django.db.models.query import (
    FlatValuesListIterable,
    NamedValuesListIterable,
    ValuesIterable,
    ValuesListIterable,
)
from django.db.models.utils import create_namedtuple_class

from parallel_orm.comparing import Comparison, NotComparable, comparison_of, comparison_of_values, refuse_unknown
from parallel_orm.identity import groups_of, source_of
from parallel_orm.merging import Term, in_order, sort_keys
from parallel_orm.ordering import parts as parts_of
from parallel_orm.recombining import CannotRecombine, Recombined, recombined
from parallel_orm.sortkeys import NAME, names_of, select, term_of

Rows = QuerySet[Any, Any]


@dataclass(frozen=True)
class Regrouping:
    """How groups of several databases are asked for, and put together."""

    querysets: Mapping[str, Rows]
    #: How many columns a row has that was asked for.
    width: int
    #: The columns behind these that tell groups apart, and how they compare.
    groups: list[tuple[int, Comparison]]
    #: The aggregates: where they stand, how they come together, and where their parts are.
    aggregates: list[tuple[int, Recombined, list[int]]]
    #: The order: the columns, and how they compare.
    order: list[tuple[int, Term]]
    #: The columns that tell the rows of a ``distinct()`` apart, and how they compare; None: each group is a row.
    apart: list[tuple[int, Comparison]] | None
    #: How those compare of which the least or the greatest is wanted.
    extremes: list[Comparison]
    kind: Any
    names: list[str]
    low: int
    high: int | None

    def join(self, answers: Mapping[str, list[tuple[Any, ...]]]) -> list[Any]:
        """Return the rows of all groups, as the queryset has them."""
        refuse_unknown([term.comparison for term in self._all_terms], answers)
        rows = [row for answer in answers.values() for row in answer]
        keys: list[Any] = [()] * len(rows)
        if self.groups:  # else it is one group, of all rows
            (keys,), _ = sort_keys([[[row[place] for row in rows] for place, _ in self.groups]], self._terms)
        together: dict[Any, list[tuple[Any, ...]]] = {}
        for row, key in zip(rows, keys, strict=True):
            together.setdefault(key, []).append(row)
        groups = list(together.values())
        found = [list(rows[0]) for rows in groups]
        for place, aggregate, parts in self.aggregates:
            wholes = aggregate.of_groups([[tuple(row[part] for part in parts) for row in rows] for rows in groups])
            for made, whole in zip(found, wholes, strict=True):
                made[place] = whole
        if self.apart is not None:
            found = self._once(found, self.apart)
        if self.order:
            columns = [[row[place] for row in found] for place, _ in self.order]
            (known,), backwards = sort_keys([columns], [term for _, term in self.order])
            found = in_order(found, known, backwards=backwards)
        return self._as_asked([row[: self.width] for row in found[self.low : self.high]])

    @property
    def _terms(self) -> list[Term]:
        return [Term(comparison) for _, comparison in self.groups]

    @property
    def _all_terms(self) -> list[Term]:
        others = [*self.extremes, *(comparison for _, comparison in self.apart or ())]
        return [*self._terms, *(term for _, term in self.order), *map(Term, others)]

    def _once(self, rows: list[list[Any]], apart: Sequence[tuple[int, Comparison]]) -> list[list[Any]]:
        """Return the rows that differ in these columns, and in what they are ordered by, as SQL has it."""
        columns = [[row[place] for row in rows] for place, _ in (*apart, *self.order)]
        (keys,), _ = sort_keys([columns], [*(Term(each) for _, each in apart), *(term for _, term in self.order)])
        once: dict[Any, list[Any]] = {}
        for row, key in zip(rows, keys, strict=True):
            once.setdefault(key, row)
        return list(once.values())

    def _as_asked(self, rows: list[list[Any]]) -> list[Any]:
        if self.kind is ValuesIterable:
            return [dict(zip(self.names, row, strict=True)) for row in rows]
        if self.kind is FlatValuesListIterable:
            return [row[0] for row in rows]
        if self.kind is NamedValuesListIterable:
            named = create_namedtuple_class(*self.names)
            return [tuple.__new__(named, row) for row in rows]
        return list(map(tuple, rows))


def regrouping(querysets: Mapping[str, Rows], low: int, high: int | None) -> Regrouping:
    """Return how the groups of a queryset come together, which has no limits itself.

    Raises :class:`~parallel_orm.comparing.NotComparable` and :class:`~parallel_orm.recombining.CannotRecombine`.
    """
    extremes: dict[str, Comparison] = {}
    asked = {alias: _Asked(alias, queryset, extremes) for alias, queryset in querysets.items()}
    first = next(iter(asked.values()))
    groups = [
        (place, comparison_of(name, {alias: each.expressions[place] for alias, each in asked.items()}))
        for name, place in first.group_places
    ]
    for name, annotation in first.annotations.items():
        if any(isinstance(each, Max | Min) for each in parts_of(annotation)):  # compares, where several have some
            extremes[name] = comparison_of(repr(name), {a: each.annotations[name] for a, each in asked.items()})
    order = []
    for number, (place, item) in enumerate(first.order):
        expressions = {alias: each.order_expressions[number] for alias, each in asked.items()}
        compare = comparison_of if place in first.expressions else comparison_of_values
        comparison = compare(first.all_names[place], expressions)
        order.append((place, term_of(item, comparison, first.alias)))
    apart = None
    if first.is_distinct:
        apart = [
            (place, comparison_of_values(repr(name), {alias: each.selected[place] for alias, each in asked.items()}))
            for place, name in enumerate(first.names)
        ]
    for each in list(asked.values())[1:]:
        assert each.all_names == first.all_names
    kind: Any = first.kind
    fields: Any = next(iter(querysets.values()))._fields  # type: ignore[attr-defined]
    names = first.names if kind is ValuesIterable else list(fields or first.names)
    return Regrouping(
        {alias: each.queryset for alias, each in asked.items()},
        len(first.names),
        groups,
        first.aggregates,
        order,
        apart,
        list(extremes.values()),
        kind,
        names,
        low,
        high,
    )


class _Asked:
    """The groups of one database, with the columns that tell them apart, and the parts of their aggregates.

    ``extremes`` will have how those compare of which the least or the greatest is wanted, by their names.
    """

    def __init__(self, alias: str, queryset: Rows, extremes: Mapping[str, Comparison]) -> None:
        self.alias = alias
        self.kind = queryset._iterable_class
        query: Any = queryset.query.clone()
        where: Any = query.where
        if where.contains_aggregate:
            raise CannotRecombine(
                "groups are filtered by an aggregate, of which each database knows a part: filter what comes of it"
            )
        if query.extra_order_by:
            raise NotComparable("groups are ordered by extra(order_by=...), which is SQL that cannot be compared")
        compiler = query.get_compiler(alias)
        compiler.setup_query()
        if query.extra_select:
            raise NotComparable("groups have a column of extra(), which is SQL that cannot be compared")
        self.names = names_of(query)
        self.selected = [expression for expression, *_ in compiler.select]
        self.is_distinct = bool(query.distinct)
        order = [resolved for resolved, _ in compiler.get_order_by()] if query.order_by else []
        self.expressions: dict[int, Any] = {}
        self.annotations = selected = dict(query.annotation_select)
        grouped = list(map(source_of, groups_of(query)))
        self._query, self._added = query, list(self.names)
        self.group_places = []
        for number, expression in enumerate(grouped):
            raw = _raw_of(alias, expression)
            place = self._add(f"{NAME}group_{number}", expression if raw is None else raw(expression))
            self.expressions[place] = expression
            self.group_places.append((_name(expression), place))
        self.aggregates: list[tuple[int, Recombined, list[int]]] = []
        vendor = connections[alias].vendor
        for name, annotation in selected.items():
            if not annotation.contains_aggregate or name not in self.names:
                continue
            compare = partial(extremes.__getitem__, name)
            found = recombined(name, annotation, annotation, vendor, compare)
            # In the place of the whole, which an alias may have too few rows for.
            first, *others = found.parts
            query.annotations[name] = first
            places = [self.names.index(name)]
            places += [self._add(f"{NAME}{name}_{number}", part) for number, part in enumerate(others)]
            self.aggregates.append((places[0], found, places))
        self.order, self.order_expressions = [], []
        for item in order:
            expression = item.expression
            name = getattr(expression, "refs", None)
            source = source_of(expression)
            if name is None:  # MySQL, to say where NULLs come, has the expression itself
                name = next((each for each, annotation in selected.items() if annotation == source), None)
            if source in grouped:
                place = self.group_places[grouped.index(source)][1]
            elif name in self.names:
                place = self.names.index(name)
            else:
                raise NotComparable(f"groups are ordered by {_name(expression)}, which they do not have")
            self.order.append((place, item))
            self.order_expressions.append(source)
        query.clear_ordering(force=True)
        query.clear_limits()
        self.queryset = queryset.all()
        self.queryset._iterable_class = ValuesListIterable
        self.queryset._query = query  # type: ignore[attr-defined]
        self.all_names = self._added

    def _add(self, name: str, expression: Any) -> int:
        select(self._query, name, expression)
        self._added.append(name)
        return len(self._added) - 1


def _raw_of(alias: str, expression: Any) -> Callable[[Any], Any] | None:
    """Return what is asked for instead of a column, if anything is."""
    try:
        return comparison_of(_name(expression), {alias: expression}).raw
    except Error:  # nobody says how its text is sorted, which is asked for as it is
        return None


def _name(expression: Any) -> str:
    return repr(expression.target.name if isinstance(expression, Col) else str(expression))
