"""Databases for one run, made at its start and dropped at its end: on the servers of the tests, and an SQLite file."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sqlite3
import tempfile
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests import servers

#: What there may be. ``postgres_bound``: psycopg 3 with parameters that the server binds.
ALIASES = ("postgres", "postgres_bound", "mariadb", "sqlite")


@contextmanager
def made(wanted: Collection[str] = ALIASES) -> Iterator[dict[str, str]]:
    """Set Django up with those that can be had; yield what each alias is, for people to read."""
    folder = Path(tempfile.mkdtemp(prefix="parallel-orm-benchmarks-"))
    started: list[servers.OwnServer] = []
    try:
        described = _found(wanted, started)
        run = f"parallel_orm_benchmarks_{os.getpid()}_{secrets.token_hex(3)}"
        databases: dict[str, Any] = {
            alias: {**settings, "NAME": f"{run}_{alias}"} for alias, (settings, _) in described.items()
        }
        on_servers = list(databases)
        if "sqlite" in wanted:
            databases["sqlite"] = {
                "ENGINE": "django.db.backends.sqlite3",
                "NAME": str(folder / "benchmarks.sqlite3"),
                "OPTIONS": {"timeout": 30},
            }
            described["sqlite"] = {}, f"SQLite {sqlite3.sqlite_version}, a file"
        os.environ["PARALLEL_ORM_BENCHMARK_DATABASES"] = json.dumps({"default": {}, **databases})
        os.environ["DJANGO_SETTINGS_MODULE"] = "benchmarks.settings"

        import django

        django.setup()
        with ExitStack() as stack:
            for alias in on_servers:
                stack.enter_context(database(alias))
            yield {alias: description for alias, (_, description) in described.items()}
    finally:
        for server in started:
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _found(wanted: Collection[str], started: list[servers.OwnServer]) -> dict[str, tuple[dict[str, Any], str]]:
    """Return the settings and a description for each alias whose server answers; say which do not."""
    described: dict[str, tuple[dict[str, Any], str]] = {}
    if {"postgres", "postgres_bound"} & {*wanted}:
        found = servers.find_postgres(started)
        if found.settings is None:
            print(f"No PostgreSQL: {found.how}\n")
        else:
            description = f"PostgreSQL {found.how.split(', ')[0]}"
            described["postgres"] = found.settings, description
            if find_spec("psycopg"):  # which Django prefers to psycopg2
                options = {**found.settings.get("OPTIONS", {}), "server_side_binding": True}
                bound = {**found.settings, "OPTIONS": options}
                described["postgres_bound"] = bound, f"{description} with server_side_binding"
    if "mariadb" in wanted:
        found = servers.find_mariadb()
        if found.settings is None:
            print(f"No MariaDB: {found.how}\n")
        else:
            described["mariadb"] = found.settings, f"MariaDB {found.how.split(', ')[0]}"
    return {alias: each for alias, each in described.items() if alias in wanted}


@contextmanager
def database(alias: str) -> Iterator[None]:
    from django.db import connections

    from parallel_orm.connections import lender
    from parallel_orm.executors.processes import end_pools

    connection = connections[alias]
    name = connection.ops.quote_name(connection.settings_dict["NAME"])
    with connection._nodb_cursor() as cursor:
        cursor.execute(f"CREATE DATABASE {name}")
    try:
        yield
    finally:
        # No database is dropped that somebody is connected to.
        end_pools()
        lender.close_idle()
        connections.close_all()
        with connection._nodb_cursor() as cursor:
            cursor.execute(f"DROP DATABASE {name}")
