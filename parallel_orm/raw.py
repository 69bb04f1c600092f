"""ParallelConnection: the same SQL on several connections at once, answered as one. Shaped like PEP 249's.

Each connection has a thread of its own for as long as it is used here, and whatever is done on it is done there, one
thing after the other.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Self, TypeVar
from weakref import WeakSet, finalize

from parallel_orm import errors
from parallel_orm.members import Answer, Member, all_at_once, is_pool, let_go
from parallel_orm.outcomes import note

Result = TypeVar("Result")

#: Rows that are fetched at once where nobody says how many.
BATCH = 2_000


class ParallelConnection:
    """Several connections as one: what is executed is executed on all of them at once, each in a thread of its own.

    :param connections: each one of: an alias of ``settings.DATABASES``; a PEP 249 connection, which stays open; a pool
        with ``getconn()`` and ``putconn()`` (psycopg2's, psycopg_pool's), whose connection is given back. Their number
        in this list is their index. SQLite's connections must be made with ``check_same_thread=False``.
    :raises parallel_orm.errors.InvalidOption: there is none, one is there twice, or is none of these.
    :raises parallel_orm.errors.UnknownAlias: there is no such alias.

    Exceptions are those of the drivers (of aliases, Django's), with the index of the connection as
    ``connection_index``, and a note that tells it. The first one ends what was asked for: the others are cancelled on
    their servers where their driver can do that. Transactions are each connection's own: an alias is in autocommit, as
    Django has it. To be used by one thread at a time.

    An alias within a ``TestCase``, or of SQLite in memory, is the caller's own connection.
    """

    def __init__(self, connections: Iterable[Any]) -> None:
        sources = [connections] if isinstance(connections, str) else list(connections)
        if not sources:
            raise errors.no_connections()
        for place, source in enumerate(sources):
            # A pool has another one each time.
            if not is_pool(source) and any(is_same(source, other) for other in sources[:place]):
                raise errors.connection_twice(source)
        self._lock = threading.Lock()
        self._is_closed, self._process = False, os.getpid()
        self._cursors: WeakSet[ParallelCursor] = WeakSet()
        self._members: list[Member] = []
        try:
            for index, source in enumerate(sources):
                self._members.append(Member.of(index, source))
            self._on_each(lambda member: member.open())
        except BaseException:
            self._is_closed = True
            for answer in let_go(self._members):
                answer.wait()
            raise
        self._finalizer = finalize(self, let_go, self._members)

    def __len__(self) -> int:
        return len(self._members)

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._is_closed

    def cursor(self, itersize: int | None = None) -> ParallelCursor:
        """Return a cursor over all connections.

        :param itersize: rows that are fetched at once, by cursors of the servers, so that no result is in memory as a
            whole. None: as each driver does it, which is all rows at once for most.
        """
        size: Any = itersize
        if size is not None and not (isinstance(size, int) and size is not True and size >= 1):
            raise errors.not_an_integer("itersize", itersize)
        self._refuse_closed()
        cursor = ParallelCursor(self, itersize)
        self._cursors.add(cursor)
        return cursor

    def execute(self, query: Any, args: Any = None, *, execute_on: Mapping[int, Any] | None = None) -> ParallelCursor:
        """Execute on a new cursor, and return it; see :meth:`ParallelCursor.execute`."""
        return self.cursor().execute(query, args, execute_on=execute_on)

    def executemany(self, query: Any, args: Iterable[Any]) -> ParallelCursor:
        """Execute on a new cursor, for each of ``args`` on each connection, and return it."""
        return self.cursor().executemany(query, args)

    def commit(self) -> None:
        """Commit on each connection, at once.

        They are not atomic together: where one fails, the others are committed all the same, and its exception says
        which are.
        """
        self._end(lambda member: member.commit(), "committed")

    def rollback(self) -> None:
        """Roll back on each connection, at once; on all of them, even if one fails."""
        self._end(lambda member: member.rollback(), "rolled back")

    def close(self) -> None:
        """Give back what came of pools and aliases; connections that were given stay open. Twice does nothing."""
        if not self._is_closed and self._process == os.getpid():
            with self._used():
                self._drop_results()
                self._is_closed = True
                if self._finalizer.detach() is not None:
                    for answer in let_go(self._members):
                        answer.wait()

    def __enter__(self) -> Self:
        self._refuse_closed()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Commit, or roll back after an exception; then close."""
        try:
            if not self._is_closed:
                with self._used():
                    self._drop_results()
                if error is None:
                    self.commit()
                else:
                    with suppress(Exception):  # the exception of the block is what is to be seen
                        self.rollback()
        finally:
            self.close()

    # --- How ------------------------------------------------------------------------------

    def _refuse_closed(self) -> None:
        if self._process != os.getpid():  # where its threads are
            raise errors.left_in_parent("a ParallelConnection")
        if self._is_closed:
            raise errors.connection_closed()

    def _drop_results(self) -> None:
        for cursor in self._cursors:
            cursor._drop()

    def _refuse_streams(self, but: ParallelCursor | None = None) -> None:
        """Refuse what would end the rows of a cursor whose driver has one result at a time on a connection."""
        for cursor in self._cursors:
            if cursor is not but and any(each in cursor._cursors and each.has_one_result for each in cursor._coming):
                raise errors.rows_to_come()

    @contextmanager
    def _used(self) -> Iterator[None]:
        """Refuse a second thread, within."""
        if not self._lock.acquire(blocking=False):
            raise errors.connection_in_use()
        try:
            yield
        finally:
            self._lock.release()

    def _on_each(self, function: Callable[[Member], Result], members: Sequence[Member] | None = None) -> list[Result]:
        """Call a function for each, in its thread; return what they return, in their order. The first error ends it."""
        return all_at_once(self._members if members is None else members, function)

    def _end(self, function: Callable[[Member], None], done: str) -> None:
        with self._used():
            self._refuse_closed()
            self._refuse_streams()
            answers: list[Answer[None]] = [each.ask(function) for each in self._members]
            failed, ended = [], []
            for member, answer in zip(self._members, answers, strict=True):
                try:
                    answer.wait()
                    ended.append(member.index)
                except Exception as error:
                    failed.append(error)
            if failed:
                note(failed[0], f"{done} on the connections {ended}" if ended else f"{done} on none of the connections")
                raise failed[0]


class ParallelCursor:
    """A cursor over several connections: its rows are those of the first one, then those of the next, and so on."""

    #: Rows of ``fetchmany()`` that is not told how many, as PEP 249 has it.
    arraysize = 1

    def __init__(self, connection: ParallelConnection, itersize: int | None) -> None:
        self.connection, self.itersize = connection, itersize
        self._cursors: dict[Member, Any] = {}
        self._description: Any = None
        self._rowcount = -1
        self._rows: deque[Any] = deque()
        #: Connections whose rows are to come, and what was asked of them.
        self._coming: deque[Member] = deque()
        self._asked: dict[Member, Answer[list[Any]]] = {}
        #: Rows that came with the execution.
        self._ready: dict[Member, list[Any]] = {}
        self._is_closed = False

    @property
    def description(self) -> Any:
        """The columns, as the first connection tells them; all have the same names. None: there are no rows to come."""
        return self._description

    @property
    def rowcount(self) -> int:
        """The rows of all connections; -1 where one of them does not tell."""
        return self._rowcount

    def execute(self, query: Any, args: Any = None, *, execute_on: Mapping[int, Any] | None = None) -> Self:
        """Execute a query on each connection at once, and wait until all have answered.

        :param args: its parameters, the same on each.
        :param execute_on: instead, for some connections alone, by their index: the parameters of each.
        :returns: the cursor.
        :raises parallel_orm.errors.UnequalResults: the columns of two connections differ.
        """
        if execute_on is None:
            parameters: dict[Member, Any] = dict.fromkeys(self.connection._members, args)
        elif args is not None:
            raise errors.args_twice()
        else:
            parameters = {self._member(index): each for index, each in sorted(execute_on.items())}
        return self._executed(lambda cursor, member: _execute(cursor, query, parameters[member]), list(parameters))

    def executemany(self, query: Any, args: Iterable[Any]) -> Self:
        """Execute a query for each of ``args``, on each connection; returns the cursor."""
        listed = list(args)
        return self._executed(lambda cursor, member: cursor.executemany(query, listed), self.connection._members)

    def fetchone(self) -> Any:
        """Return the next row; None: there are no more."""
        with self._fetching():
            return self._rows.popleft() if self._rows or self._refill() else None

    def fetchmany(self, size: int | None = None) -> list[Any]:
        """Return the next rows: so many, or ``arraysize``, or those that are left."""
        size = self.arraysize if size is None else size
        found: list[Any] = []
        with self._fetching():
            while len(found) < size and (self._rows or self._refill()):
                found.append(self._rows.popleft())
        return found

    def fetchall(self) -> list[Any]:
        """Return all rows that are left, in the order of the connections, which fetch them at once."""
        with self._fetching():
            found = list(self._rows)
            self._rows.clear()
            members, self._coming = list(self._coming), deque()
            ready, self._ready = self._ready, {}
            asked, self._asked = self._asked, {}
            more = [member for member in members if member in self._cursors]
            rests = dict(
                zip(more, all_at_once(more, lambda member: list(self._cursors[member].fetchall())), strict=True)
            )
            for member in members:  # each of which has done what it was asked before
                before = asked[member].wait() if member in asked else ()
                found += [*ready.get(member, ()), *before, *rests.get(member, ())]
        return found

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        with self._fetching():
            if self._rows or self._refill():
                return self._rows.popleft()
        raise StopIteration

    def setinputsizes(self, sizes: Any) -> None:
        """Does nothing, as PEP 249 allows."""

    def setoutputsize(self, size: Any, column: Any = None) -> None:
        """Does nothing, as PEP 249 allows."""

    def close(self) -> None:
        """Close it on each connection; the rows that are left are not fetched."""
        if not self._is_closed:
            self._is_closed = True
            if not self.connection.closed:
                with self.connection._used():
                    self._drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # --- How ------------------------------------------------------------------------------

    def _member(self, index: Any) -> Member:
        members = self.connection._members
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(members):
            raise errors.no_such_connection(index, len(members))
        return members[index]

    def _executed(self, execute: Callable[[Any, Member], object], members: Sequence[Member]) -> Self:
        size = self.itersize or BATCH

        def run(member: Member) -> tuple[Any, list[Any], Any, int]:
            cursor, rows = member.cursor(self.itersize), list[Any]()
            try:
                execute(cursor, member)
                number = int(cursor.rowcount)
                # psycopg2 knows the columns of a cursor of the server's from its first rows on.
                if cursor.description is not None or (self.itersize is not None and getattr(cursor, "name", None)):
                    rows = list(cursor.fetchmany(size))
                described = cursor.description
                if len(rows) < size:  # that was all
                    cursor.close()
                    cursor = None
                return cursor, rows, described, number
            except BaseException:
                with suppress(Exception):
                    cursor.close()
                raise

        self._refuse_closed()
        with self.connection._used():
            self.connection._refuse_streams(but=self)
            self._drop()
            found = self.connection._on_each(run, members)
            # Cursors that have more rows to give.
            self._cursors = {
                member: each[0] for member, each in zip(members, found, strict=True) if each[0] is not None
            }
            self._ready = {member: each[1] for member, each in zip(members, found, strict=True)}
            descriptions = [description for _, _, description, _ in found]
            for member, description in zip(members, descriptions, strict=True):
                if names_of(description) != names_of(descriptions[0]):
                    self._drop()
                    raise errors.unequal_results(
                        members[0].name, names_of(descriptions[0]), member.name, names_of(description)
                    )
            self._description = descriptions[0] if descriptions else None
            counts = [number for *_, number in found]
            self._rowcount = -1 if any(number < 0 for number in counts) else sum(counts)
            if self._description is not None:
                self._coming = deque(members)
        return self

    @contextmanager
    def _fetching(self) -> Iterator[None]:
        self._refuse_closed()
        with self.connection._used():
            if self._description is None:
                raise errors.nothing_to_fetch()
            yield

    def _refuse_closed(self) -> None:
        self.connection._refuse_closed()
        if self._is_closed:
            raise errors.cursor_closed()

    def _ask_ahead(self) -> None:
        """Have the connection whose turn it is, and the one behind it, fetch their next rows."""
        size = self.itersize or BATCH
        for member in list(self._coming)[:2]:
            if member not in self._asked and (cursor := self._cursors.get(member)) is not None:
                self._asked[member] = member.ask(partial(_fetch, cursor, size))

    def _refill(self) -> bool:
        """Take the next rows; False: there are none."""
        while self._coming:
            rows = self._ready.pop(self._coming[0], [])
            if not rows and self._coming[0] in self._cursors:
                self._ask_ahead()
                rows = self._asked.pop(self._coming[0]).wait()
            if rows:
                self._rows.extend(rows)
                self._ask_ahead()
                return True
            self._coming.popleft()
        return False

    def _drop(self) -> None:
        """Forget what was executed before."""
        asked, cursors = self._asked, self._cursors
        self._asked, self._ready, self._cursors, self._coming = {}, {}, {}, deque()
        self._rows.clear()
        self._description, self._rowcount = None, -1
        for answer in asked.values():
            with suppress(Exception):
                answer.wait()
        for closed in [member.ask(partial(_close, cursor)) for member, cursor in cursors.items()]:
            with suppress(Exception):  # whatever it was about, nobody wants it any more
                closed.wait()


def is_same(source: Any, other: Any) -> bool:
    """Tell whether two are one connection."""
    return source is other or (isinstance(source, str) and isinstance(other, str) and source == other)


def _fetch(cursor: Any, size: int, member: Member) -> list[Any]:
    return list(cursor.fetchmany(size))


def _close(cursor: Any, member: Member) -> None:
    cursor.close()


def _execute(cursor: Any, query: Any, args: Any) -> None:
    if args is None:  # in which a per cent sign is none of a parameter
        cursor.execute(query)
    else:
        cursor.execute(query, args)


def names_of(description: Any) -> list[str] | None:
    """Return the names of the columns; None: there are none."""
    return None if description is None else [column[0] for column in description]
