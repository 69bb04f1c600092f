"""Keys of rows: read of a row that brings its own, or listed."""

from __future__ import annotations

import operator
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from django.db.models import QuerySet
from django.db.models.expressions import Func, RawSQL
from django.db.models.query import FlatValuesListIterable, ModelIterable, ValuesIterable

from parallel_orm.identity import VALUES, column_name, fields_of
from parallel_orm.keyset import Key, Keyset
from parallel_orm.makers import keeps_as_it_is
from parallel_orm.ordering import parts

Rows = QuerySet[Any, Any]


def compact(keys: Rows) -> Sequence[Any]:
    """List primary keys in as little memory as they need: eight bytes each where they are integers."""
    listed: array[int] | list[Any] = array("q")
    stream = keys.iterator(chunk_size=10_000)
    for key in stream:
        try:
            listed.append(key)
        except (TypeError, OverflowError):  # of append() alone: what the database raises is the caller's
            return [*listed, key, *stream]
    return listed


def key_reader(queryset: Rows, keyset: Keyset) -> Callable[[Any], Key] | None:
    """Return how to read the key of a row, or None where rows do not bring it as the database has it."""
    query, model = queryset.query, queryset.model
    if type(queryset).__iter__ is not QuerySet.__iter__ or query.extra_select:
        return None
    if any(map(_may_return_sets, query.annotation_select.values())):
        return None
    if queryset._iterable_class is ModelIterable:
        if keyset.paths == ("pk",):
            return _KeyOf("pk")
        if query.deferred_loading[0] or not all(keeps_as_it_is(model, path) for path in keyset.paths):
            return None
        return _KeyOf(*keyset.paths)
    if queryset._iterable_class not in VALUES:
        return None
    fields = fields_of(queryset) or tuple(column.attname for column in model._meta.concrete_fields)
    given = [*fields, *(name for name in query.annotation_select if name not in fields)]
    known = [column_name(model, name) if isinstance(name, str) else None for name in given]
    if not all(path in known for path in keyset.paths):
        return None
    places = [known.index(path) for path in keyset.paths]
    kind: Any = queryset._iterable_class
    if kind is FlatValuesListIterable:
        return _key_itself if places == [0] else None
    return _KeyAt(*([given[place] for place in places] if kind is ValuesIterable else places))


def _may_return_sets(annotation: Any) -> bool:
    """Tell whether SQL that Django does not know may give the same row several times."""
    return any(
        type(part) is Func
        or isinstance(part, RawSQL)
        or getattr(part, "set_returning", False)
        or not type(part).__module__.startswith("django.db.models")
        for part in parts(annotation)
    )


def _key_itself(row: Any) -> Key:
    return (row,)


class _KeyOf:
    """Reads the key of an instance."""

    def __init__(self, *names: str) -> None:
        self.names, self.get = names, operator.attrgetter(*names)

    def __call__(self, row: Any) -> Key:
        key = self.get(row)
        return (key,) if len(self.names) == 1 else key


class _KeyAt:
    """Reads the key of a dict or a tuple."""

    def __init__(self, *places: str | int) -> None:
        self.places, self.get = places, operator.itemgetter(*places)

    def __call__(self, row: Any) -> Key:
        key = self.get(row)
        return (key,) if len(self.places) == 1 else key
