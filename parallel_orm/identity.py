"""What tells the rows of a queryset apart.

Most often the primary key of the model. But rows may be groups, or have ``distinct()`` make one of several, or be those
of a union: then it is the columns by which they are grouped or compared, or nothing that a chunk could name.
"""

from __future__ import annotations

from typing import Any

from django.core.exceptions import FieldDoesNotExist
from django.db.models import Model, QuerySet
from django.db.models.expressions import Col, Ref
from django.db.models.query import FlatValuesListIterable, NamedValuesListIterable, ValuesIterable, ValuesListIterable
from django.db.models.sql import Query

Rows = QuerySet[Any, Any]

VALUES = (ValuesIterable, ValuesListIterable, NamedValuesListIterable, FlatValuesListIterable)


def identity_of(queryset: Rows) -> list[Any]:
    """Return the columns that no two rows share, as names and expressions; nothing where that is the primary key."""
    query: Any = queryset.query
    if query.distinct_fields:
        return [column_name(queryset.model, name) for name in query.distinct_fields]
    if query.distinct and not selects_primary_key(queryset):
        names = (*query.extra_select, *query.values_select, *query.annotation_select)
        return [column_name(queryset.model, name) for name in names]
    if is_grouped(query):
        return [_name_or_expression(query, column) for column in groups_of(query)]
    return []


def groups_of(query: Query) -> list[Any]:
    """Return by what SQL groups rows: what they were grouped by, and what else they have been given since."""
    found: list[Any] = list(query.group_by)  # type: ignore[arg-type]  # not of all rows
    known = list(map(source_of, found))
    for expression in (*query.select, *(Ref(name, each) for name, each in query.annotation_select.items())):
        source = source_of(expression)
        # None of an aggregate; of a subquery those that it refers to.
        for column in [] if source in known else source.get_group_by_cols():
            if column not in known:
                known.append(column)
                found.append(expression if column == source else column)
    return found


def source_of(expression: Any) -> Any:
    """Return what a name stands for; all else as it is."""
    return expression.get_source_expressions()[0] if isinstance(expression, Ref) else expression


def is_grouped(query: Query) -> bool:
    """Tell whether rows are groups of rows of the model, and not these rows with an aggregate each."""
    return isinstance(query.group_by, tuple) and not any(_is_primary_key(query, column) for column in query.group_by)


def _is_primary_key(query: Query, column: Any) -> bool:
    # Of the model's own table: a join may bring the same column of another row.
    return isinstance(column, Col) and column.alias == query.base_table and bool(column.target.primary_key)


def _name_or_expression(query: Query, column: Any) -> Any:
    if isinstance(column, Ref):
        name: str = column.refs  # type: ignore[attr-defined]
        return name if name in query.annotations else column.get_source_expressions()[0]
    if isinstance(column, Col) and column.alias == query.base_table:
        return column_name(query.model, column.target.attname)  # type: ignore[arg-type]
    return column


def column_name(model: type[Model], name: Any) -> Any:
    """Return the one name by which a column of the model itself is known here; of anything else, the name it has."""
    if name in ("pk", model._meta.pk.name, model._meta.pk.attname):
        return "pk"
    try:
        field: Any = model._meta.get_field(name)
    except (FieldDoesNotExist, TypeError, AttributeError):
        return name
    return field.attname if getattr(field, "concrete", False) and not field.many_to_many else name


def selects_primary_key(queryset: Rows) -> bool:
    """Tell whether each row brings its primary key: instances always do, dicts and tuples where it was asked for."""
    if not issubclass(queryset._iterable_class, VALUES):
        return True
    fields = fields_of(queryset) or tuple(queryset.query.values_select)
    names = {"pk", queryset.model._meta.pk.name, queryset.model._meta.pk.attname}
    return not fields or bool(names.intersection(field for field in fields if isinstance(field, str)))


def fields_of(queryset: Rows) -> tuple[Any, ...] | None:
    """Return what ``values()`` or ``values_list()`` was given; None where rows are instances."""
    fields: tuple[Any, ...] | None = queryset._fields  # type: ignore[attr-defined]
    return fields


def are_instances_of_one_table(query: Query) -> bool:
    """Tell whether the rows of a union, or of its like, are whole instances, which their primary key stands for."""
    return all(
        each.get_meta().concrete_model is query.get_meta().concrete_model
        and (each.default_cols or (bool(each.combinator) and are_instances_of_one_table(each)))
        and not (each.annotation_select or each.extra_select or each.values_select)
        and are_instances_of_one_table(each)
        for each in query.combined_queries
    )
