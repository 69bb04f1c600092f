"""System checks: ``settings.PARALLEL_ORM`` says what it may say, and groups of databases are what across() needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

from django.apps import apps
from django.core.checks import CheckMessage, Error, Tags, Warning, register  # noqa: A004 - Django's name
from django.db import connections, router
from django.db.models import QuerySet

from parallel_orm.errors import InvalidOption
from parallel_orm.options import from_settings
from parallel_orm.queryset import ParallelQuerySet


@register()
def check_settings(**_: Any) -> list[CheckMessage]:
    """``parallel_orm.E001``: a setting has a value that cannot be used."""
    from_settings.cache_clear()
    try:
        from_settings()
    except InvalidOption as error:
        hint = "The settings reference lists each with its default: docs/reference/settings.md."
        return [Error(str(error), hint=hint, id="parallel_orm.E001")]
    return []


@register()
def check_groups(**_: Any) -> list[CheckMessage]:
    """``parallel_orm.W001``: two databases of a group are one; ``parallel_orm.W003``: they are of several kinds."""
    return [message for group, aliases in _groups() for message in _of_group(group, aliases)]


@register(Tags.database)
def check_tables(databases: Sequence[str] | None = None, **_: Any) -> list[CheckMessage]:
    """``parallel_orm.W002``: a database of a group lacks a table, or a column, of a model that may be on it."""
    found: list[CheckMessage] = []
    for group, aliases in _groups():
        for alias in aliases:
            if alias in (databases or ()):
                found += [_lacking(group, alias, what) for what in _lacks(alias)]
    return found


def _groups() -> list[tuple[str, tuple[str, ...]]]:
    try:
        return list(from_settings().GROUPS.items())
    except InvalidOption:  # which has a check of its own
        return []


def _of_group(group: str, aliases: Sequence[str]) -> Iterator[CheckMessage]:
    for one, other in combinations(aliases, 2):
        if _place(one) == _place(other):
            yield Warning(
                f"{one!r} and {other!r} of the group {group!r} are one database: across({group!r}) has its rows twice.",
                hint="Name it once in PARALLEL_ORM['GROUPS'].",
                id="parallel_orm.W001",
            )
    vendors = {alias: connections[alias].vendor for alias in aliases}
    if len(set(vendors.values())) > 1:
        told = ", ".join(f"{alias!r} is {vendor}" for alias, vendor in vendors.items())
        yield Warning(
            f"The databases of the group {group!r} are of several kinds, which across() refuses: {told}.",
            hint="Make a group of each kind.",
            id="parallel_orm.W003",
        )


def _place(alias: str) -> tuple[str, ...]:
    settings = connections.settings[alias]
    return tuple(str(settings.get(name)) for name in ("ENGINE", "NAME", "HOST", "PORT", "OPTIONS"))


def _lacks(alias: str) -> Iterator[str]:
    connection = connections[alias]
    with connection.cursor() as cursor:
        tables = set(connection.introspection.table_names(cursor, include_views=True))
        for model in apps.get_models():
            migrates = model._meta.can_migrate(connection) and router.allow_migrate_model(alias, model)
            if not (migrates and _is_ours(model)):
                continue
            table = model._meta.db_table
            if table not in tables:
                yield f"the table {table!r} of {model._meta.label}"
                continue
            columns = {each.name for each in connection.introspection.get_table_description(cursor, table)}
            wanted = [field.column for field in model._meta.local_concrete_fields if field.column is not None]
            yield from (f"the column {name!r} of {model._meta.label}" for name in wanted if name not in columns)


def _is_ours(model: Any) -> bool:
    kinds = [getattr(manager, "_queryset_class", QuerySet) for manager in model._meta.managers]
    return any(issubclass(kind, ParallelQuerySet) for kind in kinds)


def _lacking(group: str, alias: str, what: str) -> CheckMessage:
    return Warning(
        f"{alias!r}, of the group {group!r}, lacks {what}: across({group!r}) fails there.",
        hint=f"manage.py migrate --database {alias}, or say in a router's allow_migrate() that it is not there.",
        id="parallel_orm.W002",
    )
