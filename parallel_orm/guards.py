"""Says no early, and says what to do instead; or says why the work stays on the caller's own connection."""

from __future__ import annotations

import re
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from django.core.exceptions import EmptyResultSet
from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import Aggregate, DecimalField, Model, QuerySet
from django.db.models.expressions import Col, RawSQL
from django.db.models.query import ModelIterable
from django.db.models.sql import Query
from django.db.models.sql.constants import INNER
from django.utils.connection import ConnectionDoesNotExist

from parallel_orm import errors, functions
from parallel_orm.bonds import FREE, Bonds
from parallel_orm.identity import are_instances_of_one_table, fields_of, identity_of
from parallel_orm.options import from_settings
from parallel_orm.ordering import effective_ordering, parts
from parallel_orm.session import NOTHING, Session
from parallel_orm.statements import Bond
from parallel_orm.watch import watch_of
from parallel_orm.workers import in_worker

Rows = QuerySet[Any, Any]

#: Why work ran in the caller's own thread, on its connection. ``Pending.reason`` is one of these words.
REASONS = {
    "stolen": "no worker had begun when the result was needed, so whoever needed it ran the query",
    "transaction": "the caller is in a transaction, of which another connection would not see all",
    "session": "the session of the caller's connection was changed by SQL in a way that no other can be given",
    "writes": "the SQL is not known to do nothing but read, or it belongs to the connection that it runs on",
    "empty": "the queryset is empty by itself, so that no query is needed",
    "evaluated": "the queryset had its rows already, so that they answered",
    "testcase": "the caller is in a TestCase, whose transaction another connection would not see",
    "memory": "the database is SQLite in memory, which has no other connections",
    "thread": "the caller's connection belongs to another thread, so that Django refuses its queries in this one",
    "wrapper": "the caller's connection has execute_wrappers, which another connection has not",
    "select_for_update": "the rows are to be locked, and a lock belongs to the connection that takes it",
    "shutdown": "the interpreter is ending and starts no more threads",
    "inline": 'executor="inline" was asked for',
    "nested": "the caller is itself run by a worker",
    "budget": "settings.PARALLEL_ORM['CONNECTIONS'] allows no connections for this database",
}


def connection_for(alias: str) -> BaseDatabaseWrapper:
    """Return the caller's connection, or refuse an alias that there is not."""
    try:
        return connections[alias]
    except ConnectionDoesNotExist:
        raise errors.unknown_alias(alias, list(connections.settings)) from None


def refuse_unknown(alias: str) -> None:
    """Refuse an alias that there is not, without making its connection."""
    if alias not in connections.settings:
        raise errors.unknown_alias(alias, list(connections.settings))


def where_to_read(alias: str, bonds: Bonds = FREE) -> tuple[str | None, Session]:
    """Return why a read must run on the caller's connection, as a word of :data:`REASONS`, or None; and else what
    another connection must be given to answer as this one would.
    """
    connection: Any = connection_for(alias)
    if not connection.allow_thread_sharing and connection._thread_ident != threading.get_ident():
        return "thread", NOTHING
    if connection.in_atomic_block:
        if is_testcase(connection):
            return "testcase", NOTHING
        if any(getattr(block, "_from_testcase", False) for block in connection.atomic_blocks):
            return "transaction", NOTHING
    if is_in_memory(connection):
        return "memory", NOTHING
    if bonds.bond is not None and bonds.bond is not Bond.CLOCK:
        return bonds.bond.value, NOTHING
    if connection.execute_wrappers:
        return "wrapper", NOTHING
    if from_settings().connections_of(alias) == 0:
        return "budget", NOTHING
    if bonds.functions and not functions.only_read(connection, bonds.functions):
        return Bond.OWN.value, NOTHING
    watch = watch_of(connection)
    if bonds.bond is Bond.CLOCK and watch.in_transaction:
        return bonds.bond.value, NOTHING
    session = watch.elsewhere()
    return (session, NOTHING) if isinstance(session, str) else (None, session)


def is_testcase(connection: BaseDatabaseWrapper) -> bool:
    """Tell whether the caller is in the blocks of Django's TestCase, and in no other."""
    blocks = connection.atomic_blocks
    return connection.in_atomic_block and all(getattr(block, "_from_testcase", False) for block in blocks)


def is_in_memory(connection: BaseDatabaseWrapper) -> bool:
    return connection.vendor == "sqlite" and bool(connection.is_in_memory_db())  # type: ignore[attr-defined]


def where_to_map(verb: str, queryset: Rows) -> tuple[str | None, Session]:
    """Return why a map must run in this process, or None, and what the workers' connections must be given; refuse where
    even inline it would not be as it would be outside.

    In a transaction that has not written, on READ COMMITTED, another connection sees what this one sees; where the
    database can tell so (PostgreSQL), the map goes on.
    """
    alias = queryset.db
    connection = connection_for(alias)
    if is_in_memory(connection):
        return "memory", NOTHING
    if any(getattr(block, "_from_testcase", False) for block in connection.atomic_blocks):
        return "testcase", NOTHING  # in a transaction of its own within it too: what fixtures wrote is nowhere else
    if in_worker():
        return "nested", NOTHING
    session = watch_of(connection).elsewhere()
    if session == "session":
        raise errors.refused_in_session(verb, alias)
    if isinstance(session, str):
        why = "that has written" if connection.vendor == "postgresql" else "(whether it has written cannot be told)"
        raise errors.refused_in_transaction(verb, alias, why)
    if session.snapshot is not None:
        raise errors.refused_in_transaction(verb, alias, "of isolation level REPEATABLE READ")
    return None, session


def where_to_write(verb: str, alias: str, *, stays: bool) -> tuple[str | None, Session]:
    """Return why writes must be made in this process, or None, and what the workers' connections must be given; refuse
    a transaction, whose locks the workers would wait for, while it waits for them.
    """
    connection = connection_for(alias)
    if stays:
        return "inline", NOTHING
    if is_in_memory(connection):
        return "memory", NOTHING
    if any(getattr(block, "_from_testcase", False) for block in connection.atomic_blocks):
        return "testcase", NOTHING
    if in_worker():
        return "nested", NOTHING
    watch = watch_of(connection)
    if connection.in_atomic_block or not connection.get_autocommit() or watch.in_transaction:
        raise errors.writes_in_transaction(verb, alias)
    session = watch.elsewhere()
    if isinstance(session, str):
        raise errors.refused_in_session(verb, alias)
    return None, session


def has_one_writer(alias: str) -> bool:
    """Tell whether a database lets no two transactions write at once."""
    return connection_for(alias).vendor == "sqlite"


def refuse_without_snapshots(verb: str, alias: str) -> None:
    """Refuse ``consistent=True`` where no snapshot can be had."""
    vendor = connection_for(alias).vendor
    if vendor != "postgresql":
        raise errors.no_snapshot(verb, alias, vendor)


def refuse_locks(verb: str, queryset: Rows) -> None:
    if queryset.query.select_for_update:
        raise errors.unsupported(
            verb,
            queryset.model._meta.label,
            "select_for_update() locks rows for the caller's transaction, and its workers are in none",
            "Drop select_for_update(), or loop over chunked_iterator() within atomic().",
        )


#: Digits of a number that SQLite keeps, which has floats for decimals; Django rounds to them.
EXACT_DIGITS = 15


def _is_sqlite(queryset: Rows) -> bool:
    return connections[queryset.db].vendor == "sqlite"


#: What is wrong with a window function, and the way out.
WINDOW = (
    "a window function sees the whole set, and a chunk is only a part of it",
    "Loop over iterator(), or compute the window in a subquery.",
)


def refuse_uncuttable(verb: str, queryset: Rows) -> None:
    """Refuse a queryset whose rows cannot be told apart by their columns, with the way out."""
    query = queryset.query
    problem = _why_uncuttable(queryset.model, query, queryset)
    if problem is not None:
        raise errors.unsupported(verb, queryset.model._meta.label, *problem)


def _why_uncuttable(model: type[Model], query: Query, queryset: Rows) -> tuple[str, str] | None:
    if query.combinator:
        if are_instances_of_one_table(query) and queryset._iterable_class is ModelIterable:
            return None
        return (
            f"its rows are those of a {query.combinator}, and no whole instances of one model",
            "Give the querysets one by one, or filter with Q objects and | instead.",
        )
    where: Any = query.where
    if where.contains_over_clause or any(each.contains_over_clause for each in query.annotations.values()):
        return WINDOW
    if query.group_by == ():
        return (
            "its rows are groups by nothing that its columns tell",
            "Group by columns, or loop over iterator().",
        )
    meta = model._meta
    names = {"pk", meta.pk.name, meta.pk.attname}
    if taken := names.intersection([*query.annotations, *query.extra]):
        return (
            f"{min(taken)!r} is not its primary key there, but something computed",
            "Give it another name.",
        )
    joins = joins_of(queryset)
    if joins.sees_many:
        return WINDOW
    if identity_of(queryset):
        return None
    if isinstance(meta.pk, DecimalField) and meta.pk.max_digits > EXACT_DIGITS and _is_sqlite(queryset):
        return (
            f"its primary key is a decimal of {meta.pk.max_digits} digits, of which SQLite keeps {EXACT_DIGITS}",
            "Loop over iterator().",
        )
    if query.distinct and len(meta.pk_fields) > 1:
        return (
            "distinct() over a primary key of several columns cannot be ordered by them (a limit of Django)",
            "Loop over iterator(), or filter by a subquery instead of a join.",
        )
    if joins.order_by_many:
        return (
            "it is ordered by something that a row has many of, so that rows come several times in its order",
            "Order by columns of the row itself, or by an aggregate of the many.",
        )
    return None


@dataclass(frozen=True, slots=True)
class Joins:
    """What the joins of a queryset do to its rows."""

    #: The same row of the model may come several times.
    repeat_rows: bool
    #: It is ordered by something of which a row has many, so that it comes once for each.
    order_by_many: bool
    #: A window function stands where a chunk would narrow what it sees.
    sees_many: bool = False


def joins_of(queryset: Rows) -> Joins:
    """Look at the joins of filters, values and order, as the compiler makes them. Makes no query."""
    if is_of_one_table(queryset):
        return Joins(repeat_rows=False, order_by_many=False)
    query = queryset.query.clone()
    compiler = query.get_compiler(queryset.db)
    try:
        _, order, _ = compiler.pre_sql_setup()
    except EmptyResultSet:
        return Joins(repeat_rows=False, order_by_many=False)
    many: set[str] = set()
    for alias, join in query.alias_map.items():  # a join comes behind its parent
        if getattr(join, "join_field", None) is None or not query.alias_refcount.get(alias):
            continue
        if join.parent_alias in many or not _finds_one(join):
            many.add(alias)
    order_by_many = any(alias in many for resolved, _ in order for alias in _aliases(resolved))
    collapsed = query.group_by is True or (query.distinct and fields_of(queryset) is None)
    if collapsed and many:  # what is selected, or grouped for HAVING, tells the appearances of a row apart again
        apart = [expression for expression, *_ in compiler.select] + [compiler.having]
        collapsed = not query.extra_select and not any(alias in many for each in apart for alias in _aliases(each))
    set_returning = any(getattr(each, "set_returning", False) for each in query.annotations.values())
    repeat_rows = set_returning or bool(query.extra_tables) or bool(many and not collapsed)
    raw = [part.sql for each in query.annotations.values() for part in parts(each) if isinstance(part, RawSQL)]
    raw += [sql for sql, _ in query.extra_select.values()]
    sees_many = any(getattr(resolved, "contains_over_clause", False) for resolved, _ in order) or any(
        re.search(r"(?i)\bover\s*(\(|\w)", sql) for sql in raw
    )
    return Joins(repeat_rows=repeat_rows or order_by_many, order_by_many=order_by_many, sees_many=sees_many)


def is_of_one_table(queryset: Any) -> bool:
    """Tell whether it is seen at a glance that there are no joins, as nothing is asked for but columns of the table."""
    query = queryset.query
    return (
        len(query.alias_map) < 2
        and not (query.annotations or query.extra or query.extra_tables or query.extra_order_by)
        and not (query.select_related or query.combinator or query.distinct or query.group_by)
        and all(
            isinstance(item, str) and item in _names_of_columns(queryset.model) for item in effective_ordering(query)
        )
    )


@cache
def _names_of_columns(model: Any) -> frozenset[str]:
    """Return by which names a model is ordered by its own columns, in either direction."""
    columns = [column for column in model._meta.local_concrete_fields if not column.is_relation]
    names = [column.name for column in columns] + ["pk"] * (model._meta.pk in columns)
    return frozenset([*names, *(f"-{name}" for name in names)])


def _finds_one(join: Any) -> bool:
    """Tell whether a join finds one row at most: by columns that are unique there."""
    if join.join_fields is None:
        return False
    found = {far for _, far in join.join_fields}
    return any(far.unique for far in found) or all(field in found for field in next(iter(found)).model._meta.pk_fields)


def drops_rows(queryset: Rows) -> bool:
    """Tell whether the order, by its joins, decides which rows there are."""
    query = queryset.query.clone()
    plain = query.clone()
    plain.clear_ordering(force=True)
    try:
        query.get_compiler(queryset.db).pre_sql_setup()
        plain.get_compiler(queryset.db).pre_sql_setup()
    except EmptyResultSet:
        return False
    return _inner_joins(query) != _inner_joins(plain)


def _inner_joins(query: Query) -> set[str]:
    joins = query.alias_map.items()
    return {alias for alias, join in joins if query.alias_refcount.get(alias) and join.join_type == INNER}


def _aliases(expression: Any) -> Iterator[str]:
    """Yield the tables whose columns an expression has outside of aggregates."""
    if isinstance(expression, Col):
        yield expression.alias
    elif hasattr(expression, "get_external_cols"):  # a Subquery; on Django 6.1 its Query
        for column in expression.get_external_cols():
            yield from _aliases(column)
    elif not isinstance(expression, Aggregate) and hasattr(expression, "get_source_expressions"):
        for source in expression.get_source_expressions():
            yield from _aliases(source)


def most_keys(connection: BaseDatabaseWrapper) -> int | None:
    """Return how many keys one query may list, leaving as much for the queryset's own parameters; None: any number."""
    limit: int | None = connection.features.max_query_params
    if connection.vendor == "sqlite":  # Django knows the least that any build allows
        connection.ensure_connection()
        limit = connection.connection.getlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER)
    return None if limit is None else limit // 2
