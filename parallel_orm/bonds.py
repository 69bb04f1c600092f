"""Bonds: what ties a queryset to the connection of its caller, found by one walk over all that its queries are made of.

    queryset, arguments -> Bonds: why it must stay, which functions the database is asked about, what may change

The walk comes with every start, so it is plain: a stack, a look-up by type, and nothing at all for columns and values.
It sees expressions and pieces of SQL. What only comes out when the SQL is made, or is asked beside it (a look-up with
SQL of its own, a receiver of a signal), is judged by its text before it is executed: see ``watch.Reading``.
"""

from __future__ import annotations

import datetime
import decimal
import uuid
from collections.abc import Iterator, KeysView, ValuesView
from contextlib import suppress
from copy import copy
from functools import cache
from typing import Any, NamedTuple

from django.db.models import Prefetch, QuerySet
from django.db.models.constants import LOOKUP_SEP
from django.db.models.expressions import BaseExpression, Col, ColPairs, F, Func, RawSQL, Ref, Value
from django.db.models.fields.related_lookups import RelatedIn
from django.db.models.lookups import FieldGetDbPrepValueIterableMixin, Lookup
from django.db.models.manager import BaseManager
from django.db.models.query import RawQuerySet
from django.db.models.query_utils import FilteredRelation
from django.db.models.sql import Query, RawQuery
from django.db.models.sql.where import ExtraWhere
from django.utils.tree import Node

from parallel_orm.statements import Bond, bond_of, bond_of_function, functions_in_doubt


class Bonds(NamedTuple):
    """What ties a queryset to the connection of its caller."""

    bond: Bond | None = None
    #: Functions that it calls and that are not known here, lower case. The database knows what they do.
    functions: frozenset[str] = frozenset()
    #: Whether it has a value that the caller may change: a dictionary, say.
    is_changeable: bool = False


FREE = Bonds()
"""Nothing."""


def bonds_of(queryset: Any, *arguments: Any) -> Bonds:
    """Return what ties a queryset, a raw one too, to the connection of its caller; with what a method is given."""
    stack: list[Any] = [queryset.query, *arguments]
    if queryset._prefetch_related_lookups:
        _push_prefetches(queryset.model, queryset._prefetch_related_lookups, stack)
    clock = is_changeable = False
    functions: frozenset[str] = frozenset()
    while stack:
        part = stack.pop()
        kind = _kinds.get(part.__class__)
        if kind is None:
            kind = _kinds[part.__class__] = _kind_of(part.__class__)
        if kind is _LEAF:
            continue
        if kind is _LOOKUP:
            if part.lhs.__class__ is not Col:
                stack.append(part.lhs)
            rhs = part.rhs
            if rhs.__class__ in _VALUES:
                continue
            if rhs.__class__ is not list or not isinstance(part, _WITH_LISTS):
                stack.append(rhs)
            elif not _VALUES.issuperset(map(type, rhs)):  # the list itself was made by Django
                stack += rhs
        elif kind is _QUERY:
            if part.select_for_update:
                return Bonds(Bond.LOCK)
            _push_query(part, stack)
        elif kind is _CHANGEABLE:
            is_changeable = True
            if isinstance(part, dict):
                stack += part.values()
            elif not isinstance(part, bytearray):
                stack += part
        elif kind is _EXPRESSION:
            stack += part.get_source_expressions()
        else:
            bond, names = kind(part, stack)
            if bond is Bond.CLOCK:
                clock = True
            elif bond is not None:
                return Bonds(bond)
            if names:
                functions |= names
    if not (clock or functions or is_changeable):
        return FREE
    return Bonds(Bond.CLOCK if clock else None, functions, is_changeable)


def _push_query(query: Any, stack: list[Any]) -> None:
    stack += query.where.children
    if query.annotations:
        stack += query.annotations.values()
    if query.order_by:
        stack += query.order_by
    elif query.default_ordering and query.model is not None:
        stack += query.model._meta.ordering or ()
    if query.select:
        stack += query.select
    if query.combined_queries:
        stack += query.combined_queries
    if query._filtered_relations:
        stack += query._filtered_relations.values()
    if query.extra or query.extra_order_by:
        stack += [_Sql(sql) for sql, _ in query.extra.values()]
        stack += [_Sql(sql) for sql in query.extra_order_by]


def _push_prefetches(model: Any, lookups: Any, stack: list[Any]) -> None:
    for lookup in lookups:
        if isinstance(lookup, Prefetch):
            if lookup.queryset is not None:
                stack.append(lookup.queryset)
            lookup = lookup.prefetch_through
        for manager in _managers_on(model, lookup):
            with suppress(Exception):  # where Django asks it, that will be seen
                stack.append(manager.get_queryset())


@cache
def _managers_on(model: Any, path: str) -> list[Any]:
    """Return the managers on the path of a prefetch whose querysets are other than all rows."""
    managers: list[Any] = []
    for name in path.split(LOOKUP_SEP):
        try:
            field = model._meta.get_field(name)
        except Exception:  # another name of the accessor, a property, a generic relation
            field = next((f for f in model._meta.related_objects if f.get_accessor_name() == name), None)
        model = getattr(field, "related_model", None)
        if model is None:
            break
        many = field.one_to_many or field.many_to_many
        manager = model._default_manager if many else model._base_manager
        if type(manager).get_queryset is not BaseManager.get_queryset:
            managers.append(manager)
    return managers


# --- What is looked at, by its type ------------------------------------------------------

#: A bond, and functions that are not known.
Found = tuple[Bond | None, frozenset[str]]

_NONE: frozenset[str] = frozenset()
_FOUND_NOTHING: Found = (None, _NONE)

#: Types of values that nobody can change.
_VALUES = frozenset(
    {
        *(type(None), bool, int, float, complex, str, bytes, decimal.Decimal, uuid.UUID),
        *(datetime.date, datetime.datetime, datetime.time, datetime.timedelta),
    }
)
#: Look-ups that make a list of what they are given.
_WITH_LISTS = (FieldGetDbPrepValueIterableMixin, RelatedIn)
#: Where the expressions are that Django vouches for.
_OF_DJANGO = ("django.db.models", "django.contrib.postgres", "django.contrib.gis")

_LEAF, _LOOKUP, _QUERY, _CHANGEABLE, _EXPRESSION = "leaf", "look-up", "query", "changeable", "expression"
_kinds: dict[type[Any], Any] = {}


class _Sql(NamedTuple):
    """A piece of SQL that stands in a query."""

    sql: str


def _kind_of(cls: type[Any]) -> Any:
    """Tell how one of this class is looked at: a word for what the walk itself does, or the function that does it."""
    for kind, classes in (
        (_LEAF, (Col, ColPairs, F, Ref, *_VALUES)),
        (_LOOKUP, (Lookup,)),
        (_QUERY, (Query,)),
        (_CHANGEABLE, (list, dict, set, bytearray)),
        (_function, (Func,)),
        (_value, (Value,)),
        (_raw, (RawSQL,)),
        (_EXPRESSION, (BaseExpression,)),
        (_node, (Node,)),
        (_piece, (_Sql,)),
        (_extra_where, (ExtraWhere,)),
        (_tuple, (tuple,)),
        (_filtered_relation, (FilteredRelation,)),
        (_queryset, (QuerySet, RawQuerySet)),
        (_raw_query, (RawQuery,)),
    ):
        if issubclass(cls, classes):
            return kind
    return _LEAF


def _function(part: Any, stack: list[Any]) -> Found:
    stack += part.get_source_expressions()
    extra, cls = part.extra, part.__class__
    if not extra and cls.__module__.startswith(_OF_DJANGO):
        return _function_named(cls, cls.function, cls.template)[0], _NONE
    return _function_named(cls, extra.get("function", part.function), extra.get("template", part.template))


@cache
def _function_named(cls: Any, function: str | None, template: str) -> Found:
    bond, names = bond_of_function((template or "").replace("%(function)s", function or ""))
    # The clock of a transaction is asked for on PostgreSQL, for which this text may not be, as with Now().
    return None if bond is Bond.CLOCK and hasattr(cls, "as_postgresql") else bond, names


def _value(part: Any, stack: list[Any]) -> Found:
    stack.append(part.value)
    return _FOUND_NOTHING


def _in_sql(sql: str) -> Found:
    bond = bond_of(sql)
    if bond is Bond.OWN and (names := functions_in_doubt(sql)):
        return bond_of(sql, names), names
    return bond, _NONE


def _raw(part: Any, stack: list[Any]) -> Found:
    stack.append(part.params)
    return _in_sql(f"SELECT {part.sql}")


def _piece(part: Any, stack: list[Any]) -> Found:
    return _in_sql(f"SELECT {part.sql}")


def _extra_where(part: Any, stack: list[Any]) -> Found:
    stack += [_Sql(sql) for sql in part.sqls]
    stack.append(part.params)
    return _FOUND_NOTHING


def _raw_query(part: Any, stack: list[Any]) -> Found:
    stack.append(part.params)
    return _in_sql(part.sql)


def _node(part: Any, stack: list[Any]) -> Found:
    stack += part.children
    return _FOUND_NOTHING


def _tuple(part: Any, stack: list[Any]) -> Found:
    if not _VALUES.issuperset(map(type, part)):
        stack += part
    return _FOUND_NOTHING


def _filtered_relation(part: Any, stack: list[Any]) -> Found:
    stack.append(part.condition)
    return _FOUND_NOTHING


def _queryset(part: Any, stack: list[Any]) -> Found:
    stack.append(part.query)
    _push_prefetches(part.model, part._prefetch_related_lookups, stack)
    return _FOUND_NOTHING


# --- As of the call ------------------------------------------------------------------------


def as_of_now(part: Any) -> Any:
    """Return a value, or a part of a query, with copies of what the caller may change in it later.

    Containers of Python's are copied all the way down, and what can be read but once becomes a list; expressions,
    queries and querysets that may hold such things are made anew. Other objects stay what they are.
    """
    if part.__class__ in _VALUES or isinstance(part, (Col, ColPairs, Ref)):
        return part
    if isinstance(part, (Iterator, KeysView, ValuesView)):
        part = list(part)
    if isinstance(part, (list, tuple, set, dict, bytearray)):
        return _container_as_of_now(part)
    if isinstance(part, Query):
        return _query_as_of_now(part)
    if isinstance(part, BaseExpression):
        return _expression_as_of_now(part)
    if isinstance(part, (QuerySet, RawQuerySet)):
        rows: Any = part
        return hold(rows._chain() if isinstance(part, QuerySet) else rows._clone())
    if isinstance(part, RawQuery):
        query: Any = part.clone(part.using)
        query.params = as_of_now(part.params)
        return query
    for kind, names in _HOLDERS.items():
        if isinstance(part, kind):
            part = copy(part)
            for name in names:
                setattr(part, name, as_of_now(getattr(part, name)))
    return part


#: Where the other parts of a query hold what may be changed.
_HOLDERS: dict[type[Any], tuple[str, ...]] = {
    Node: ("children",),
    ExtraWhere: ("sqls", "params"),
    FilteredRelation: ("condition", "resolved_condition"),
    Prefetch: ("queryset",),
}


def hold(rows: Any) -> Any:
    """Have a queryset that is nobody else's, a raw one too, ask as of now; return it."""
    query = as_of_now(rows.query)
    if isinstance(rows, QuerySet):
        rows._query = query  # type: ignore[attr-defined]  # to set query would make rows of values() of all
    else:
        rows.query = query
    rows._prefetch_related_lookups = as_of_now(rows._prefetch_related_lookups)
    return rows


def _container_as_of_now(part: Any) -> Any:
    if isinstance(part, tuple):
        values = [as_of_now(each) for each in part]
        return type(part)(*values) if hasattr(part, "_make") else tuple(values)
    held = copy(part)
    if isinstance(held, dict):
        for name, value in part.items():
            held[name] = as_of_now(value)
    elif isinstance(held, list):
        held[:] = [as_of_now(each) for each in part]
    return held


def _query_as_of_now(query: Any) -> Any:
    held = query.clone()
    for name in ("where", "annotations", "order_by", "select", "group_by", "combined_queries", "_filtered_relations"):
        setattr(held, name, as_of_now(getattr(held, name)))
    for alias, join in held.alias_map.items():
        if getattr(join, "filtered_relation", None) is not None:
            held.alias_map[alias] = join = copy(join)
            join.filtered_relation = as_of_now(join.filtered_relation)
    return held


def _expression_as_of_now(part: Any) -> Any:
    held = part.copy()
    if sources := held.get_source_expressions():
        held.set_source_expressions([as_of_now(source) for source in sources])
    for name in ("value", "params", "rhs"):  # of Value, RawSQL and Lookup
        if name in held.__dict__:
            setattr(held, name, as_of_now(held.__dict__[name]))
    return held
