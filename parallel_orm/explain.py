"""What the database says of a plan: how many rows it expects, which index it would use, what to be warned of.

Asked by ``EXPLAIN``, so it costs no more than a look-up of a key or two; on SQLite, which has no estimates, by a count.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from django.core.exceptions import EmptyResultSet, FieldDoesNotExist
from django.db import connections
from django.db.models import QuerySet

from parallel_orm.keyset import Keyset

Rows = QuerySet[Any, Any]


@dataclass(frozen=True, slots=True)
class Access:
    """How the database would come by some rows."""

    #: How many it expects.
    rows: int
    #: The indexes that it would use.
    indexes: tuple[str, ...]
    #: Whether it would sort what it found.
    sorts: bool


def access_of(queryset: Rows) -> Access:
    """Return what ``EXPLAIN`` says of a queryset."""
    try:
        queryset.query.get_compiler(queryset.db).as_sql()
    except EmptyResultSet:
        return Access(0, (), sorts=False)
    vendor = connections[queryset.db].vendor
    if vendor == "sqlite":
        text = queryset.explain()
        names = re.findall(r"INDEX (\w+)|(INTEGER PRIMARY KEY)", text)
        indexes = tuple(dict.fromkeys(name or key.lower() for name, key in names))
        return Access(queryset.count(), indexes, "TEMP B-TREE FOR ORDER BY" in text)
    told = json.loads(queryset.explain(format="json"))
    if isinstance(told, str):  # which Django has packed once more, on MySQL and MariaDB
        told = json.loads(told)
    nodes = list(_dictionaries(told))
    if vendor == "postgresql":
        indexes = tuple(dict.fromkeys(node["Index Name"] for node in nodes if "Index Name" in node))
        sorts = any(node.get("Node Type") == "Sort" for node in nodes)
        return Access(int(told[0]["Plan"]["Plan Rows"]), indexes, sorts)
    tables = [node for node in nodes if "table_name" in node]
    rows = [node.get("rows") or node.get("rows_examined_per_scan") or 0 for node in tables]
    shares = [float(node.get("filtered", 100)) / 100 for node in tables]
    indexes = tuple(dict.fromkeys(node["key"] for node in tables if node.get("key")))
    sorts = any("filesort" in node or node.get("using_filesort") for node in nodes)
    expected = round(rows[0] * shares[0]) if tables else 0
    limit = queryset.query.high_mark
    return Access(expected if limit is None else min(expected, limit - queryset.query.low_mark), indexes, sorts)


def _dictionaries(told: Any) -> Iterator[dict[str, Any]]:
    if isinstance(told, dict):
        yield told
    for part in told.values() if isinstance(told, dict) else told if isinstance(told, list) else ():
        yield from _dictionaries(part)


def has_index_for(queryset: Rows, keyset: Keyset) -> bool:
    """Tell whether an index of the table begins with the columns of an order, its last tie-break left out."""
    connection: Any = connections[queryset.db]
    meta = queryset.model._meta
    terms = keyset.terms if keyset.is_primary_key else [term for term in keyset.terms if term.path != "pk"]
    wanted: list[tuple[str, bool]] = []
    for term in terms:
        try:
            field: Any = meta.pk if term.path == "pk" else meta.get_field(term.path)
        except FieldDoesNotExist:
            return False
        moved = term.nulls_explicit and term.nullable
        default = bool(connection.features.nulls_order_largest) != term.descending
        if field.model._meta.concrete_model is not meta.concrete_model or (moved and term.nulls_last != default):
            return False
        wanted.append((field.column, term.descending))
    with connection.cursor() as cursor:
        constraints = connection.introspection.get_constraints(cursor, meta.db_table)
    return any(_serves(each, wanted) for each in constraints.values() if any(map(each.get, KINDS)))


#: The constraints that have an index, as Django's introspection calls them.
KINDS = ("index", "unique", "primary_key")


def _serves(constraint: dict[str, Any], wanted: list[tuple[str, bool]]) -> bool:
    columns = constraint["columns"]
    if [column for column, _ in wanted] != columns[: len(wanted)]:
        return False
    orders = constraint.get("orders") or ["ASC"] * len(columns)
    turned = {(order == "DESC") != descending for order, (_, descending) in zip(orders, wanted, strict=False)}
    return len(turned) == 1
