"""Rows in bulk SQL, with the signals of each: all ``pre_save``, then the SQL, then all ``post_save``.

The one difference to saving them one by one is that order. What bulk SQL cannot do truthfully is saved one by one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from django.db import DatabaseError, connections, router
from django.db.models import AutoField, Model, signals

from parallel_orm.transactions import Guilty


def create(instances: Mapping[int, Model], alias: str, *, full_clean: bool = False) -> None:
    """Insert instances that are not saved yet; by place, so that it can be said which one failed."""
    by_class: dict[type[Model], dict[int, Model]] = defaultdict(dict)
    for place, instance in instances.items():
        by_class[type(instance)][place] = instance
    for model, those in by_class.items():
        if full_clean:
            each(those, lambda instance: clean(instance, alias))
        alone = {place: instance for place, instance in those.items() if not may_insert(model, instance, alias)}
        each(alone, lambda instance: instance.save(force_insert=True, using=alias))
        together = {place: instance for place, instance in those.items() if place not in alone}
        if together:
            _create(model, together, alias)


def _create(model: type[Model], those: Mapping[int, Model], alias: str) -> None:
    def prepare(instance: Any) -> None:
        instance._prepare_related_fields_for_save(operation_name="save")
        send(signals.pre_save, instance, alias, None)

    each(those, prepare)
    instances = list(those.values())
    concrete = model._meta.concrete_model
    assert concrete is not None
    if concrete._meta.parents:
        for table in tables_of(concrete):
            insert(table, instances, alias)
        for instance in instances:
            instance._state.adding, instance._state.db = False, alias
    else:
        concrete._base_manager.using(alias).bulk_create(instances)
    each(those, lambda instance: send(signals.post_save, instance, alias, None, created=True))


def update(changed: Mapping[int, tuple[Model, list[str]]], alias: str) -> None:
    """Update rows, each in some fields."""
    together: dict[tuple[type[Model], tuple[str, ...]], dict[int, Model]] = defaultdict(dict)
    for place, (row, names) in changed.items():
        together[type(row), tuple(names)][place] = row
    for (model, fields), those in together.items():
        alone = {place: row for place, row in those.items() if not may_update(row, fields)}
        each(alone, lambda row, fields=fields: row.save(update_fields=fields, using=alias))  # type: ignore[misc]
        if rest := {place: row for place, row in those.items() if place not in alone}:
            _update(model, fields, rest, alias)


def _update(model: type[Model], names: tuple[str, ...], those: Mapping[int, Model], alias: str) -> None:
    fields = [model._meta.get_field(name) for name in names]

    def prepare(row: Any) -> None:
        row._prepare_related_fields_for_save(operation_name="save", fields=fields)
        send(signals.pre_save, row, alias, frozenset(names))
        for field in fields:
            setattr(row, field.attname, field.pre_save(row, False))  # type: ignore[union-attr]

    each(those, prepare)
    concrete = model._meta.concrete_model
    assert concrete is not None
    last = {row.pk: row for row in those.values()}  # a join may repeat a row: the last one to write wins
    found = concrete._base_manager.using(alias).bulk_update(last.values(), names)
    if found < len(last):
        # As Django says of one; who of several it was is found out by those who asked.
        error_class = getattr(model, "NotUpdated", DatabaseError)
        raise error_class("Save with update_fields did not affect any rows.")
    each(those, lambda row: send(signals.post_save, row, alias, frozenset(names), created=False))


def clean(instance: Model, alias: str) -> None:
    """Validate an instance for the database that it is written to.

    Django looks for rows that are like it where reads go; if that is elsewhere, the database alone says what is unique.
    """
    instance._state.db = alias
    is_here = router.db_for_read(type(instance), instance=instance) == alias == router.db_for_read(type(instance))
    instance.full_clean(validate_unique=is_here, validate_constraints=is_here)


def each(those: Mapping[int, Any], act: Callable[[Any], object]) -> None:
    for place, instance in those.items():
        try:
            act(instance)
        except Exception as error:
            raise Guilty(place, error) from error


def send(
    signal: Any, instance: Model, alias: str, update_fields: frozenset[str] | None, *, created: bool | None = None
) -> None:
    """Send a signal as ``save()`` does."""
    concrete = instance._meta.concrete_model
    assert concrete is not None
    if concrete._meta.auto_created:
        return
    more = {} if created is None else {"created": created}
    signal.send(sender=type(instance), instance=instance, **more, update_fields=update_fields, raw=False, using=alias)


def may_insert(model: type[Model], instance: Model, alias: str) -> bool:
    """Tell whether ``save(force_insert=True)`` comes to plain inserts, whose keys come back."""
    concrete = model._meta.concrete_model
    assert concrete is not None
    tables = tables_of(concrete)
    if any(table._meta.order_with_respect_to for table in tables):
        return False  # counted anew for each
    if len(tables) > 1 and not _parents_are_new(concrete, instance):
        return False  # a row of a parent's table may be there
    if connections[alias].features.can_return_rows_from_bulk_insert:
        return True
    return instance.pk is not None and len(tables) == 1


def may_update(row: Any, names: Iterable[str]) -> bool:
    """Tell whether ``bulk_update()`` finds the row in all tables of these fields, where it looks for its primary key.

    In the table of a second parent it has another one, and what is there under that key is somebody else's.
    """
    tables = {row._meta.get_field(name).model for name in names}
    return all(getattr(row, table._meta.pk.attname) == row.pk for table in tables)


def _parents_are_new(model: type[Model], instance: Model) -> bool:
    """Tell whether the rows of all tables are to be inserted: Django updates those of a parent whose key is known."""
    for parent, link in model._meta.parents.items():
        keys = [getattr(instance, parent._meta.pk.attname), link and getattr(instance, link.attname)]
        default = parent._meta.pk.has_default() and not any(parent._meta.parents)
        if any(key is not None for key in keys) and not default:
            return False
        if not _parents_are_new(parent, instance):
            return False
    return True


@cache
def tables_of(model: type[Model]) -> list[type[Model]]:
    """Return the models whose tables have parts of a row, in the order in which these are inserted."""
    found: list[type[Model]] = []

    def add(each: type[Model]) -> None:
        for parent in each._meta.parents:
            assert parent._meta.concrete_model is not None
            add(parent._meta.concrete_model)
        if each not in found:
            found.append(each)

    add(model)
    return found


def insert(table: type[Model], instances: Iterable[Model], alias: str) -> None:
    """Insert what some instances have in one of their tables; give them what the database made up."""
    meta = table._meta
    parents: Any = meta.parents
    for parent, link in parents.items():
        for instance in instances if link is not None else ():
            setattr(instance, link.attname, getattr(instance, parent._meta.pk.attname))
            if link.is_cached(instance):
                link.delete_cached_value(instance)
    fields: list[Any] = [field for field in meta.local_concrete_fields if not field.generated]
    with_key, without_key = list[Any](), list[Any]()
    for instance in instances:
        if getattr(instance, meta.pk.attname) is None:
            setattr(instance, meta.pk.attname, meta.pk.get_pk_value_on_save(instance))
        (without_key if getattr(instance, meta.pk.attname) is None else with_key).append(instance)
    rows: Any = table._base_manager.using(alias)
    for those, columns in (
        (with_key, fields),
        (without_key, [field for field in fields if not isinstance(field, AutoField)]),
    ):
        if not those:
            continue
        returned = rows._batched_insert(those, columns, None)
        for instance, values in zip(those, returned, strict=bool(returned)):
            for field, value in zip(meta.db_returning_fields, values, strict=True):
                setattr(instance, field.attname, value)
