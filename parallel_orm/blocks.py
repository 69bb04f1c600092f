"""Blocks of a PostgreSQL table: where its rows lie, which is where they stay for whoever reads a snapshot.

A row that is updated gets a new place, but a snapshot finds it at the old one until nobody reads that any more. Blocks
are read one after the other, while a key that is no serial number leads to another block with each row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from django.db import connections
from django.db.models import Field, QuerySet
from django.db.models.expressions import Col
from django.db.models.lookups import GreaterThanOrEqual, LessThan
from django.db.models.sql import Query

Rows = TypeVar("Rows", bound="QuerySet[Any, Any]")

#: Half-open, as in ``range()``: the first one, and the one that is no longer of them.
Blocks = tuple[int, int]


class _Block(Field):  # type: ignore[type-arg]
    """The block of a row, of which the system column ``ctid`` tells the place there too: ``(120,7)``."""

    def get_prep_value(self, value: int) -> str:
        return f"({value},0)"  # ahead of its first row

    def from_db_value(self, value: str, expression: Any, connection: Any) -> int:
        return int(value[1:].partition(",")[0])


_BLOCK = _Block()
_BLOCK.column = "ctid"  # and no name, as it belongs to no model


def in_blocks(queryset: Rows, blocks: Blocks) -> Rows:
    """Return what of a queryset lies in these blocks, in no order."""
    rows = queryset.order_by()
    block, (first, end) = _column(rows), blocks
    return rows.filter(GreaterThanOrEqual(block, first), LessThan(block, end))


def block_of_row(rows: QuerySet[Any, Any], place: int) -> int | None:
    """Return the block of the row that comes after so many others; None: there are no more than these."""
    return next(iter(rows.values_list(_column(rows), flat=True)[place : place + 1]), None)


def _column(rows: QuerySet[Any, Any]) -> Col:
    return Col(rows.query.get_initial_alias(), _BLOCK)


def is_one_table(queryset: QuerySet[Any, Any]) -> bool:
    """Tell whether a queryset is all rows of one table, with nothing joined and nothing computed."""
    query: Any = queryset.query
    meta = queryset.model._meta.concrete_model._meta
    parts = (query.where, query.annotations, query.extra, query.extra_tables, query.distinct, query.select_related)
    return (
        type(query) is Query
        and not any(parts)
        and query.group_by is None
        and len(query.alias_map) <= 1
        and len(meta.pk_fields) == 1
        and not meta.parents
    )


@dataclass(frozen=True, slots=True)
class Heap:
    """What PostgreSQL knows of a table whose rows lie in blocks of its own."""

    #: How many there are. Rows of a snapshot that was there before lie in no others.
    blocks: int
    #: How far the rows lie in the order of the primary key: 1 in that, -1 in the opposite, 0 in none.
    correlation: float


#: Asked while the table is locked as each of its readers locks it, to the end of the transaction: nothing moves all
#: rows to new blocks (``VACUUM FULL``, ``CLUSTER``) before the last of them is read.
_QUESTION = """
SELECT pg_relation_size(c.oid) / current_setting('block_size')::int, s.correlation
FROM pg_class c
JOIN pg_am am ON am.oid = c.relam AND am.amname = 'heap'
JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_stats s ON s.schemaname = n.nspname AND s.tablename = c.relname AND s.attname = %s AND NOT s.inherited
WHERE c.oid = %s::regclass AND c.relkind = 'r' AND NOT c.relhassubclass AND s.correlation IS NOT NULL
AND has_table_privilege(c.oid, 'SELECT') AND NOT EXISTS (SELECT FROM {} WHERE false)
"""


def heap_of(alias: str, model: Any) -> Heap | None:
    """Return what there is to know of a model's table; None for views, for partitioned, inherited and foreign tables,
    and without statistics. On the driver's own cursor, as it is no query of the user's.
    """
    wrapper: Any = connections[alias]
    wrapper.ensure_connection()
    table = wrapper.ops.quote_name(model._meta.db_table)
    with wrapper.wrap_database_errors, wrapper.connection.cursor() as cursor:
        cursor.execute(_QUESTION.format(table.replace("%", "%%")), [model._meta.pk.column, table])
        found = cursor.fetchone()
    return None if found is None else Heap(*found)
