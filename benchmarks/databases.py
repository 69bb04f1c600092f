"""Databases for one run, made at its start and dropped at its end: a PostgreSQL one, and an SQLite file."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from tests import servers


@contextmanager
def made() -> Iterator[dict[str, str]]:
    """Set Django up with the databases that can be had; yield what each alias is, for people to read."""
    folder = Path(tempfile.mkdtemp(prefix="parallel-orm-benchmarks-"))
    started: list[servers.OwnServer] = []
    try:
        found = servers.find_postgres(started)
        databases: dict[str, Any] = {
            "default": {},
            "sqlite": {
                "ENGINE": "django.db.backends.sqlite3",
                "NAME": str(folder / "benchmarks.sqlite3"),
                "OPTIONS": {"timeout": 30},
            },
        }
        descriptions = {"sqlite": f"SQLite {sqlite3.sqlite_version}, a file"}
        if found.settings is None:
            print(f"No PostgreSQL: {found.how}\n")
        else:
            name = f"parallel_orm_benchmarks_{os.getpid()}_{secrets.token_hex(3)}"
            databases["postgres"] = {**found.settings, "NAME": name}
            descriptions = {"postgres": f"PostgreSQL {found.how.split(', ')[0]}", **descriptions}
        os.environ["PARALLEL_ORM_BENCHMARK_DATABASES"] = json.dumps(databases)
        os.environ["DJANGO_SETTINGS_MODULE"] = "benchmarks.settings"

        import django

        django.setup()
        with _postgres_database() if "postgres" in databases else nullcontext():
            yield descriptions
    finally:
        for server in started:
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _postgres_database() -> Iterator[None]:
    from django.db import connections

    from parallel_orm.connections import lender
    from parallel_orm.executors.processes import end_pools

    connection = connections["postgres"]
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
