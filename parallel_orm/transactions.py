"""A chunk of writes in one transaction: retried where it collided, split where a row of it fails, and what became of it
known.

All that is written for a chunk is committed once. Where a row fails, all of the chunk is undone, and then done in
parts, each within a savepoint of one transaction, until the guilty rows stand alone: the others are in that commit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import sleep
from typing import Any, Protocol

from django.db import DatabaseError, InterfaceError, OperationalError, connections, transaction

from parallel_orm import errors
from parallel_orm.outcomes import note
from parallel_orm.retries import backoff

#: How often a chunk is begun anew that others' locks were in the way of.
COLLISIONS = 8
#: What servers say of a deadlock, and of a transaction that cannot be had in the order of the others; by SQLSTATE on
#: PostgreSQL, by number on MySQL and MariaDB.
_STATES = frozenset(["40001", "40P01"])
_NUMBERS = frozenset([1020, 1205, 1213])


class Writer(Protocol):
    """What is written, row by row or all at once. Rows are named by their places among those of the chunk."""

    def load(self) -> int:
        """Have all rows as they are before they are written; return how many there are."""

    def write(self, places: Sequence[int]) -> None:
        """Write these rows; raise :class:`Guilty` where it is known which of them failed."""

    def renew(self, places: Sequence[int]) -> None:
        """Have these rows as they were before they were written."""


class Guilty(Exception):
    """Says which row failed; the error is its cause."""

    def __init__(self, place: int, error: Exception) -> None:
        super().__init__(place, error)
        self.place, self.error = place, error


class Settled(Exception):
    """Says that nothing is to be tried again, and why; the error, if there is one, is its cause."""

    @property
    def error(self) -> BaseException:
        assert self.__cause__ is not None
        return self.__cause__


class Unknown(Settled):
    """The connection was lost, or its thread interrupted, while the transaction was being committed."""


class CommittedAll(Settled):
    """The transaction was committed, and something that was to run behind that raised."""

    written: Written


class AtCommit(Exception):
    """The commit failed, and nothing was written."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


@dataclass(slots=True)
class Written:
    """What became of the rows of a chunk."""

    #: By place, what was raised.
    failed: dict[int, Exception] = field(default_factory=dict)
    #: How often something was tried again.
    retries: int = 0


@dataclass(frozen=True, slots=True)
class Transaction:
    """How the rows of a chunk are committed together."""

    alias: str
    #: Whether rows that fail are left out; else the first one undoes all.
    goes_on: bool = False
    #: How often a row is tried again that stands alone.
    retries: int = 0
    #: Called within, before anything is written; what it raises is nobody's fault but the chunk's.
    begin: Callable[[], object] = lambda: None
    #: Called within, with the places of the rows that failed, when all is written.
    end: Callable[[dict[int, Exception]], object] = lambda failed: None

    def write(self, writer: Writer) -> Written:
        """Write the rows, and commit them.

        :raises Guilty: a row failed, and nothing was written.
        :raises Settled: all was written, or nothing, or it is not known which; says so.
        """
        written, attempt, in_parts, checks = Written(), 0, False, False
        while True:
            try:
                with self._committed():
                    self.begin()
                    places = range(writer.load())
                    if in_parts:
                        self._in_parts(writer, places, written, checks=checks)
                    else:
                        writer.write(places)
                    refuse_spoiled(self.alias)
                    self.end(written.failed)
                return written
            except CommittedAll as settled:
                settled.written = written
                raise
            except Settled:
                raise
            except Exception as error:
                cause = error.error if isinstance(error, Guilty | AtCommit) else error
                written.failed.clear()
                if self._may_begin_anew(cause, attempt):
                    attempt += 1
                    written.retries += 1
                    sleep(backoff(attempt))
                    continue
                # What a commit finds wrong has no place; so in the end it is looked for before.
                was_in_vain = in_parts and (checks or not isinstance(error, AtCommit))
                in_parts, checks = True, isinstance(error, AtCommit)
                if is_lost(cause) or not (self.goes_on or self.retries) or was_in_vain:
                    if isinstance(error, AtCommit):
                        raise cause from cause.__cause__
                    raise

    def _may_begin_anew(self, error: Exception, attempt: int) -> bool:
        # Within somebody's own transaction a collision has undone that too, and it is theirs to begin anew.
        return attempt < COLLISIONS and is_collision(error) and not connections[self.alias].in_atomic_block

    def _in_parts(self, writer: Writer, everything: Sequence[int], written: Written, *, checks: bool) -> None:
        """Write the rows in parts, each of which is all there or not at all; note those that fail alone."""
        connection = connections[self.alias]
        parts: list[tuple[Sequence[int], int]] = [(everything, 0)]
        while parts:
            places, attempt = parts.pop()
            try:
                with transaction.atomic(using=self.alias):
                    writer.write(places)
                    refuse_spoiled(self.alias)
                    if checks:
                        connection.check_constraints()
            except Exception as error:
                cause = error.error if isinstance(error, Guilty) else error
                if is_collision(cause) or is_lost(cause):
                    raise
                writer.renew(places)
                if len(places) > 1:
                    parts += [(part, 0) for part in reversed(halves(places, error)) if part]
                elif attempt < self.retries:
                    written.retries += 1
                    sleep(backoff(attempt + 1))
                    parts.append((places, attempt + 1))
                elif self.goes_on:
                    written.failed[places[0]] = cause
                else:
                    if self.retries:
                        note(cause, f"after {self.retries} retries")
                    raise Guilty(places[0], cause) from cause

    @contextmanager
    def _committed(self) -> Iterator[None]:
        """Within: a transaction. Tell how a commit ended that raised."""
        connection = connections[self.alias]
        is_outermost, is_over, is_committed = not connection.in_atomic_block, False, False

        def committed() -> None:
            nonlocal is_committed
            is_committed = True

        try:
            with transaction.atomic(using=self.alias):
                if is_outermost:
                    transaction.on_commit(committed, using=self.alias)  # the first of all that run then
                # MySQL undoes all of a transaction at a deadlock, and goes on in a new one; this is gone then.
                mark = connection.vendor == "mysql" and connection.savepoint()
                yield
                if mark:
                    try:
                        connection.savepoint_commit(mark)
                    except OperationalError as error:
                        if is_lost(error):
                            raise
                        raise errors.undone_within() from error
                is_over = True
        except BaseException as error:
            if is_committed:
                raise CommittedAll from error
            if is_over and is_outermost:
                if not isinstance(error, Exception) or is_lost(error):
                    raise Unknown from error
                raise AtCommit(error) from error
            raise


def halves(places: Sequence[int], error: Exception) -> list[Sequence[int]]:
    """Return the parts in which to look for what failed: around the row that is known to have, or two halves."""
    if isinstance(error, Guilty):
        at = places.index(error.place)
        return [places[:at], places[at : at + 1], places[at + 1 :]]
    middle = len(places) // 2
    return [places[:middle], places[middle:]]


def refuse_spoiled(alias: str) -> None:
    """Refuse to go on in a transaction that can only be undone, because an error in it was caught and left at that.

    Django would undo it without a word at its end, PostgreSQL too.
    """
    connection: Any = connections[alias]
    status = getattr(getattr(connection.connection, "info", None), "transaction_status", None)
    if connection.needs_rollback or (connection.vendor == "postgresql" and status == _IN_ERROR):
        raise errors.spoiled_transaction()


#: What libpq calls a transaction in which a statement has failed.
_IN_ERROR = 3


def is_collision(error: BaseException | None) -> bool:
    """Tell whether a database gave a transaction up for the sake of others: the next time it may come through."""
    if not isinstance(error, OperationalError):
        return False
    cause: Any = error.__cause__
    if (getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None)) in _STATES:
        return True
    return bool(error.args) and (error.args[0] in _NUMBERS or "database is locked" in str(error.args[0]))


def is_lost(error: BaseException | None) -> bool:
    """Tell whether a connection was lost, or may have been: nothing more can be done on it."""
    if not isinstance(error, DatabaseError | InterfaceError) or is_collision(error):
        return False
    if isinstance(error, InterfaceError):
        return True
    return isinstance(error, OperationalError) and not _is_of_the_statement(error)


def _is_of_the_statement(error: OperationalError) -> bool:
    """Tell whether the connection itself is fine, as far as the driver tells: the server answered, with an error."""
    cause: Any = error.__cause__
    state = getattr(cause, "sqlstate", None) or getattr(cause, "pgcode", None)
    if state is not None:
        return not state.startswith(("08", "57P"))  # of connections, and of servers that shut down
    number = error.args[0] if error.args else None
    if isinstance(number, int):
        return number < _CLIENT and number not in _FAREWELLS
    return type(cause).__module__ == "sqlite3"


#: Where the numbers of errors begin that MySQL's client makes itself; and what its server says as it leaves.
_CLIENT = 2000
_FAREWELLS = frozenset([1053, 1927, 4031])
