"""A snapshot: one moment of a PostgreSQL database, read by as many connections as it takes.

It is held by a transaction on a connection of its own, beside those that the setting ``CONNECTIONS`` counts: a worker
that waited for a place in that budget would wait for its own call. Bounds of chunks are looked up there; workers read
their rows in transactions that take the snapshot over.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper

from parallel_orm.connections import close_quietly
from parallel_orm.session import Session

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One moment of a database; or none, where each query is to see its own."""

    #: What PostgreSQL calls it.
    name: str | None = None
    #: The connection that holds it.
    wrapper: BaseDatabaseWrapper | None = None

    @contextmanager
    def here(self) -> Iterator[None]:
        """Within: what this thread asks of the database is answered as of the snapshot."""
        if self.wrapper is None:
            yield
            return
        alias = self.wrapper.alias
        own: Any = connections[alias]
        # Seen and wrapped as on the caller's own.
        for name in ("queries_log", "force_debug_cursor", "execute_wrappers"):
            setattr(self.wrapper, name, getattr(own, name))
        connections[alias] = self.wrapper
        try:
            yield
        finally:
            connections[alias] = own

    def within(self, items: Iterator[Item]) -> Iterator[Item]:
        """Yield these, each made as of the snapshot."""
        while True:
            with self.here():
                item = next(items, None)
            if item is None:
                return
            yield item


@contextmanager
def snapshot_of(alias: str, session: Session, *, wanted: bool) -> Iterator[Snapshot]:
    """Hold a snapshot of a database, with the session of the caller, for the length of this; or none."""
    if not wanted:
        yield Snapshot()
        return
    wrapper, process = connections.create_connection(alias), os.getpid()
    wrapper.inc_thread_sharing()
    try:
        wrapper.ensure_connection()
        wrapper.set_autocommit(False)
        with wrapper.connection.cursor() as cursor:  # the driver's own: these are no queries of the user's
            cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            cursor.execute("SELECT pg_export_snapshot()")
            (name,) = cursor.fetchone()
        snapshot = Snapshot(name, wrapper)
        with snapshot.here(), session.restored(wrapper, reading=True):
            pass  # what is set for a transaction stays to its end
        yield snapshot
    finally:
        if os.getpid() == process:  # else it is the parent's
            close_quietly(wrapper)
