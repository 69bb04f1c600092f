"""Session: what a connection has by SQL or by its tenant that another one has not; carried, replayed, checked.

PostgreSQL alone can be asked for it, and has transactions that take it away again (``set_config(..., true)``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from django.db import transaction
from django.db.backends.base.base import BaseDatabaseWrapper

from parallel_orm.errors import SessionNotRestored


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whose schema a connection of django-tenants, or of a package with its interface, is to read."""

    tenant: Any
    include_public: bool

    @classmethod
    def of(cls, wrapper: BaseDatabaseWrapper) -> Tenant | None:
        """Return the tenant of a connection; None where its backend knows no tenants."""
        if not hasattr(wrapper, "set_tenant") or getattr(wrapper, "tenant", None) is None:
            return None
        return cls(wrapper.tenant, getattr(wrapper, "include_public_schema", True))  # type: ignore[attr-defined]

    def same_as(self, other: Tenant | None) -> bool:
        return (
            other is not None
            and self.tenant.schema_name == other.tenant.schema_name
            and self.include_public == other.include_public
        )

    def enter(self, wrapper: Any) -> None:
        """Have a connection read this tenant's schema: it says so to the server with its next cursor."""
        if not self.same_as(Tenant.of(wrapper)):
            wrapper.set_tenant(self.tenant, self.include_public)


@dataclass(frozen=True, slots=True)
class Session:
    """What another connection must be given to read as this one does."""

    #: Variables of the session with their values, by name.
    values: tuple[tuple[str, str], ...] = ()
    #: A snapshot that the caller's transaction exported, to be read instead of the newest rows.
    snapshot: str | None = None
    tenant: Tenant | None = None

    @property
    def ends_with_transaction(self) -> bool:
        """Tell whether the end of the caller's transaction may take it away."""
        return bool(self.values or self.snapshot)

    @property
    def lasting(self) -> frozenset[str]:
        """Names that stay known to a session when their transaction is over, empty: those of the user's own."""
        return frozenset(name for name, _ in self.values if "." in name)

    @contextmanager
    def restored(self, wrapper: BaseDatabaseWrapper, *, reading: bool) -> Iterator[None]:
        """Have it on a connection that is lent for one task; raise :class:`SessionNotRestored` where it cannot be had.

        For one that reads, variables are set for a transaction alone, whose end takes them away, whatever happens.
        For one that may write, whose transactions are its own, they are set for the session, to be closed after it.
        """
        if self.tenant is not None:
            self.tenant.enter(wrapper)
        if not self.ends_with_transaction:
            yield
        elif reading:
            with transaction.atomic(using=wrapper.alias):
                self._replay(wrapper, "true")
                yield
        else:
            wrapper.ensure_connection()
            self.replay(wrapper)
            yield

    def replay(self, wrapper: BaseDatabaseWrapper) -> None:
        """Have it for as long as the connection is open."""
        if self.values:
            refuse_pooler(wrapper)
        self._replay(wrapper, "false")

    def _replay(self, wrapper: BaseDatabaseWrapper, local: str) -> None:
        try:
            self._set_and_compare(wrapper, local)
        except Exception as error:
            raise SessionNotRestored(f"{type(error).__name__}: {error}") from error

    def _set_and_compare(self, wrapper: BaseDatabaseWrapper, local: str) -> None:
        # On the driver's own cursor: these are no queries of the user's.
        with wrapper.connection.cursor() as cursor:
            if self.snapshot is not None:
                cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                cursor.execute(f"SET TRANSACTION SNAPSHOT '{self.snapshot}'")
            if self.values:
                calls = ", ".join([f"set_config(%s, %s, {local})"] * len(self.values))
                cursor.execute(f"SELECT {calls}", [part for pair in self.values for part in pair])
                cursor.fetchone()
                names = [name for name, _ in self.values]
                cursor.execute("SELECT " + ", ".join(["current_setting(%s)"] * len(names)), names)
                found = tuple(zip(names, cursor.fetchone(), strict=True))
                if found != self.values:
                    raise ValueError(f"set {self.values}, found {found}")


def refuse_pooler(wrapper: BaseDatabaseWrapper) -> None:
    """Raise :class:`SessionNotRestored` where a pooler such as PgBouncer stands in front of the server: it may give the
    next transaction another session, and this one, with what was set in it, to anybody.
    """
    connection: Any = wrapper.connection
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        if cursor.fetchone() != (connection.info.backend_pid,):
            raise SessionNotRestored(
                f"{wrapper.alias!r} is reached through a pooler, where what is set for a session may be left to "
                "others. Do this outside of the transaction that sets it, or loop over chunked_iterator()."
            )


NOTHING = Session()
"""Nothing but what every connection has."""


def in_order(values: dict[str, str]) -> tuple[tuple[str, str], ...]:
    """Return variables in an order in which they can be set: who one is at first, what one may be at last."""
    places = {"session_authorization": 0, "role": 2}
    return tuple(sorted(values.items(), key=lambda item: (places.get(item[0], 1), item[0])))
