"""The test databases: made when a test first asks for one, empty for each that does."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests import servers

KINDS = {
    "default": "sqlite",
    "other": "sqlite",
    "memory": "sqlite",
    "postgres": "postgres",
    "mariadb": "mariadb",
}
"""Every alias, and the mark of the tests that use it."""

#: What else a test can need, with the mark of its name.
BROKERS: dict[str, Callable[[list[servers.OwnServer]], servers.Found]] = {
    "redis": servers.find_redis,
    "rabbitmq": servers.find_rabbitmq,
}
REQUIRABLE = {*KINDS.values(), *BROKERS}

_SQLITE = "django.db.backends.sqlite3"

# Django fills these when it makes a database and remembers their keys.
_KEPT = {"contenttypes.contenttype", "auth.permission"}


class Databases:
    """What is reachable in this run, and which of it the running test asked for."""

    def __init__(self) -> None:
        self.found: dict[str, servers.Found] = {}
        self.allowed: set[str] = set()
        required = os.environ.get("PARALLEL_ORM_REQUIRE", "")
        self.required = {kind.strip() for kind in required.split(",")} - {""}
        unknown = self.required - REQUIRABLE
        if unknown:
            raise pytest.UsageError(
                f"PARALLEL_ORM_REQUIRE: {', '.join(sorted(unknown))} is none of {', '.join(sorted(REQUIRABLE))}"
            )
        self._started: list[servers.OwnServer] = []
        self._made: dict[str, list[Any]] = {}
        self._tables: dict[str, list[str]] = {}
        self._used: set[str] = set()

    # --- Once per run -----------------------------------------------------------

    def find(self, folder: Path) -> dict[str, Any]:
        """Return ``DATABASES`` for the settings: all that is reachable."""
        run = f"{os.getpid()}_{secrets.token_hex(3)}"
        self.found = {
            "postgres": servers.find_postgres(self._started),
            "mariadb": servers.find_mariadb(),
        }
        settings: dict[str, Any] = {"memory": {"ENGINE": _SQLITE, "NAME": ":memory:"}}
        for alias in ("default", "other"):
            settings[alias] = {
                "ENGINE": _SQLITE,
                # No such folder: whoever opens this was not told of the test database.
                "NAME": str(folder / "not-the-test-database" / f"{alias}.sqlite3"),
                # Nobody reads it after a power cut.
                "OPTIONS": {"timeout": 30, "init_command": "PRAGMA synchronous=OFF"},
                "TEST": {"NAME": str(folder / f"{alias}.sqlite3")},
            }
        for alias, found in self.found.items():
            if found.settings is not None:
                settings[alias] = {
                    **found.settings,
                    "NAME": f"parallel_orm_{run}",
                    "TEST": {"NAME": f"test_parallel_orm_{run}"},
                }
        for each in settings.values():
            # Tables come straight from the models; each database can be made alone.
            each.setdefault("TEST", {}).update(MIGRATE=False, DEPENDENCIES=[])
        if "mariadb" in settings:
            settings["mariadb"]["TEST"]["CHARSET"] = "utf8mb4"
        return settings

    def close(self) -> None:
        """Drop what was made and stop what was started."""
        from django.db import connections
        from django.test.utils import teardown_databases

        try:
            with self.allowing(*self._made):
                for alias, made in self._made.items():
                    connections[alias].close()
                    self._end_sessions(alias)
                    teardown_databases(made, verbosity=0)
        finally:
            self._made.clear()
            self.stop()

    def stop(self) -> None:
        """Stop the servers that this run started."""
        while self._started:
            self._started.pop().stop()

    def is_reachable(self, alias: str) -> bool:
        found = self.found.get(alias)
        return found is None or found.settings is not None

    # --- Once per test ----------------------------------------------------------

    def require(self, alias: str) -> None:
        """Make `alias` usable and empty for the running test, or skip that test."""
        found = self.found.get(alias)
        if found is not None and found.settings is None:
            if KINDS[alias] in self.required:
                pytest.fail(f"{alias} is required but not reachable: {found.how}", pytrace=False)
            pytest.skip(f"{alias}: {found.how}")
        if alias in self.allowed:
            return  # another fixture of this test made it ready, and may have filled it since
        self.allowed.add(alias)
        if alias not in self._made:
            self._make(alias)
        if alias in self._used:
            self._used.discard(alias)
            empty(alias, self._tables[alias])

    def url_of(self, broker: str) -> str:
        """Return where a broker is, or skip the running test."""
        if broker not in self.found:
            self.found[broker] = BROKERS[broker](self._started)
        found = self.found[broker]
        if found.settings is None:
            if broker in self.required:
                pytest.fail(f"{broker} is required but not reachable: {found.how}", pytrace=False)
            pytest.skip(f"{broker}: {found.how}")
        return str(found.settings["URL"])

    @contextmanager
    def using(self, alias: str) -> Iterator[str]:
        """Hand `alias` to a test, and take back what that leaves of it."""
        from django.contrib.contenttypes.models import ContentType
        from django.db import connections

        self.require(alias)
        ContentType.objects.clear_cache()  # else an earlier test decides whether this one must ask
        self._used.add(alias)
        yield alias
        connection = connections[alias]
        left_open = connection.in_atomic_block
        connection.close()
        if left_open:
            # Its state can't be mended; the next user gets a new one.
            del connections[alias]
            pytest.fail(f"the test left a transaction open on {alias!r}", pytrace=False)

    @contextmanager
    def allowing(self, *aliases: str) -> Iterator[None]:
        """Let this process connect although no test asked for it."""
        before = set(self.allowed)
        self.allowed.update(aliases)
        try:
            yield
        finally:
            self.allowed = before

    # --- Inside -----------------------------------------------------------------

    def _make(self, alias: str) -> None:
        from django.db import connections
        from django.test.utils import setup_databases

        self._made[alias] = setup_databases(verbosity=0, interactive=False, aliases=[alias], serialized_aliases=[])
        self._tables[alias] = _tables(alias)
        connections[alias].close()

    def _end_sessions(self, alias: str) -> None:
        """PostgreSQL drops no database that somebody is connected to: a worker, say."""
        from django.db import connections

        if KINDS[alias] == "postgres":
            with connections[alias].cursor() as cursor:
                cursor.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            connections[alias].close()


def _tables(alias: str) -> list[str]:
    """Tables of the models that live on `alias`."""
    from django.apps import apps
    from django.db import connections

    existing = set(connections[alias].introspection.table_names())
    return [
        model._meta.db_table
        for model in apps.get_models(include_auto_created=True)
        if model._meta.label_lower not in _KEPT and model._meta.db_table in existing
    ]


def empty(alias: str, tables: list[str] | None = None) -> None:
    """Delete the rows of all models on `alias`: one look, then only where there are any."""
    from django.db import connections, transaction

    connection = connections[alias]
    names = [connection.ops.quote_name(table) for table in dict.fromkeys(tables or _tables(alias))]
    if not names:
        return
    looks = ", ".join(f"EXISTS (SELECT 1 FROM {name})" for name in names)
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT {looks}")
        filled = [name for name, is_filled in zip(names, cursor.fetchone(), strict=True) if is_filled]
    if not filled:
        return
    # Foreign keys are checked at commit (PostgreSQL, SQLite) or not at all (MariaDB).
    with connection.constraint_checks_disabled(), transaction.atomic(using=alias):
        with connection.cursor() as cursor:
            if connection.vendor == "postgresql":
                # A transaction that an earlier test left open is an error, not a hang.
                cursor.execute("SET LOCAL lock_timeout = '20s'")
            for name in filled:
                cursor.execute(f"DELETE FROM {name}")


@contextmanager
def tables(alias: str, *models: Any) -> Iterator[None]:
    """Within: these models, which have no tables, have some on `alias`."""
    from django.db import connections

    with connections[alias].schema_editor() as editor:
        for model in models:
            editor.create_model(model)
    try:
        yield
    finally:
        with connections[alias].schema_editor() as editor:
            for model in reversed(models):  # which may refer to those before
                editor.delete_model(model)
