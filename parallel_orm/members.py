"""The members of a ParallelConnection: one connection each, and the thread in which it is used."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from importlib import import_module
from itertools import count
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from django.db import connections as django_connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.utils import CursorWrapper

from parallel_orm import errors, guards
from parallel_orm.connections import interrupt, lender
from parallel_orm.leaving import THREADS
from parallel_orm.outcomes import note
from parallel_orm.session import Session

Result = TypeVar("Result")

#: Seconds after which a member is told again to give up, the first time.
SOON = 0.02
_numbers = count()


class Answer(Generic[Result]):
    """What a thread will have found."""

    def __init__(self, member: Member, done: SimpleQueue[Answer[Result]] | None = None) -> None:
        self._member, self._done = member, done
        self._lock = threading.Lock()
        self._lock.acquire()
        self._result: Any = None
        self._error: BaseException | None = None

    def give(self, function: Callable[[Member], Result]) -> None:
        """Find it, here and now."""
        try:
            self._result = function(self._member)
        except BaseException as error:
            self._error = self._member.named(error)
        self._lock.release()
        if self._done is not None:
            self._done.put(self)

    def wait(self) -> Result:
        """Return it, or raise what was raised; as often as it is asked."""
        with self._lock:
            if self._error is not None:
                raise self._error
            return self._result  # type: ignore[no-any-return]

    @property
    def error(self) -> BaseException | None:
        """What was raised. Waits."""
        with self._lock:
            return self._error

    @property
    def is_there(self) -> bool:
        """Whether it was found, or something was raised."""
        return not self._lock.locked()

    def is_there_within(self, seconds: float) -> bool:
        """Wait for it, but no longer."""
        is_there = self._lock.acquire(timeout=seconds)
        if is_there:
            self._lock.release()
        return is_there


class Member:
    """A connection, and the thread in which it is used."""

    def __init__(self, index: int, name: str) -> None:
        self.index, self.name = index, name
        #: A PEP 249 connection, or Django's wrapper of one.
        self.connection: Any = None
        self._calls: SimpleQueue[tuple[Callable[[Member], Any], Answer[Any]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    @staticmethod
    def of(index: int, source: Any) -> Member:
        """Return what uses a source; refuse what is none."""
        if isinstance(source, str):
            guards.refuse_unknown(source)
            reason, session = guards.where_to_read(source)
            if reason in ("testcase", "memory"):
                return Here(index, source)
            return OfAlias(index, source, session)
        if is_pool(source):
            return OfPool(index, source)
        if callable(getattr(source, "cursor", None)) and callable(getattr(source, "commit", None)):
            return Given(index, source)
        raise errors.no_connection(source)

    def open(self) -> None:
        """Come by the connection, in its thread."""

    def let_go(self) -> None:
        """Give the connection back, in its thread."""

    def cursor(self, itersize: int | None) -> Any:
        """Return a cursor; one of the server's, where rows are to come by so many."""
        return self.connection.cursor() if itersize is None else streaming(self.connection, itersize)

    @property
    def has_one_result(self) -> bool:
        """Whether its driver gives up the rows of a streaming cursor when anything else is executed."""
        return driver_of(self.connection) in UNBUFFERED

    def commit(self) -> None:
        """Commit."""
        self.connection.commit()

    def rollback(self) -> None:
        """Roll back."""
        self.connection.rollback()

    def cancel(self) -> None:
        """Have the server give up what it is executing, if the driver can; from another thread."""
        for name in ("cancel_safe", "cancel", "interrupt"):
            if callable(method := getattr(self.connection, name, None)):
                method()
                return

    def ask(
        self, function: Callable[[Member], Result], done: SimpleQueue[Answer[Result]] | None = None
    ) -> Answer[Result]:
        """Have a function called in the thread; the answer is put to ``done`` when it is there."""
        answer = Answer(self, done)
        if self._thread is None:
            thread = threading.Thread(target=work, args=(self._calls,), name=f"{THREADS}raw_{self.index}", daemon=True)
            thread.start()
            self._thread = thread
        self._calls.put((function, answer))
        return answer

    def end(self) -> None:
        """Let the thread end when it has done what it was asked."""
        self._calls.put(None)

    def named(self, error: BaseException) -> BaseException:
        """Return an exception of it that says so."""
        with suppress(Exception):
            error.connection_index = self.index  # type: ignore[attr-defined]
        note(error, f"on connection {self.index} ({self.name})")
        return error


class Given(Member):
    """A connection of the caller's own."""

    def __init__(self, index: int, source: Any) -> None:
        super().__init__(index, type(source).__module__.partition(".")[0])
        self.connection = source

    def open(self) -> None:
        # SQLite's are bound to the thread that made them, unless they were made otherwise.
        sqlite: Any = sys.modules.get("sqlite3")
        if sqlite is not None and isinstance(self.connection, sqlite.Connection):
            try:
                self.connection.cursor().close()
            except Exception as error:
                raise errors.bound_to_its_thread() from error


class OfPool(Member):
    """A connection that a pool lends."""

    def __init__(self, index: int, pool: Any) -> None:
        super().__init__(index, f"{type(pool).__module__}.{type(pool).__qualname__}")
        self._pool = pool

    def open(self) -> None:
        self.connection = self._pool.getconn()

    def let_go(self) -> None:
        if self.connection is not None:
            connection, self.connection = self.connection, None
            with suppress(Exception):  # it may be broken, which the pool finds out
                connection.rollback()
            self._pool.putconn(connection)


class OfAlias(Member):
    """A connection of a database of Django's, lent for as long as it is used."""

    def __init__(self, index: int, alias: str, session: Session) -> None:
        super().__init__(index, alias)
        self._session, self._stack = session, ExitStack()

    def open(self) -> None:
        if lender.is_used_up(self.name):  # to wait might be to wait for oneself
            raise errors.no_connection_left(self.name)
        self.connection = self._stack.enter_context(lender.lent(self.name, self._session))
        self.connection.ensure_connection()

    def let_go(self) -> None:
        self._stack.close()

    def cursor(self, itersize: int | None) -> Any:
        wrapper: BaseDatabaseWrapper = self.connection
        if itersize is None:
            return wrapper.cursor()
        if wrapper.vendor == "mysql":
            wrapper.ensure_connection()
            return CursorWrapper(streaming(wrapper.connection, itersize), wrapper)
        return wrapper.chunked_cursor()

    @property
    def has_one_result(self) -> bool:
        return bool(self.connection.vendor == "mysql")

    def cancel(self) -> None:
        interrupt(self.connection)


class Here(OfAlias):
    """The caller's own connection, in the caller's own thread: there is no other that would see the same."""

    def __init__(self, index: int, alias: str) -> None:
        Member.__init__(self, index, alias)
        self.connection = django_connections[alias]

    def open(self) -> None: ...

    def let_go(self) -> None: ...

    def commit(self) -> None:
        """Nothing, as in a ``TestCase``."""

    def rollback(self) -> None:
        if self.connection.in_atomic_block:
            raise errors.rollback_of_a_test(self.name)

    def cancel(self) -> None: ...

    def ask(
        self, function: Callable[[Member], Result], done: SimpleQueue[Answer[Result]] | None = None
    ) -> Answer[Result]:
        answer = Answer(self, done)
        answer.give(function)
        return answer

    def end(self) -> None: ...


def work(calls: SimpleQueue[tuple[Callable[[Member], Any], Answer[Any]] | None]) -> None:
    """Do what a member is asked, one thing after the other, until it is to end."""
    while (call := calls.get()) is not None:
        function, answer = call
        answer.give(function)
        del call, function, answer  # else they are kept until the next one comes


def all_at_once(members: Sequence[Member], function: Callable[[Member], Result]) -> list[Result]:
    """Call a function for each member, in their threads at once; return what they return, in their order.

    The first error ends it: the others are cancelled, and waited for.
    """
    done: SimpleQueue[Answer[Result]] = SimpleQueue()
    answers: dict[Member, Answer[Result]] = {}
    failed: BaseException | None = None
    try:
        # What is done here and now comes last, when the others are at work.
        for member in sorted(members, key=lambda member: isinstance(member, Here)):
            answers[member] = member.ask(function, done)
        for _ in members:
            if (error := done.get().error) is not None:
                failed = error
                break
    except BaseException as error:  # Ctrl-C
        failed = error
    if failed is None:
        return [answers[member].wait() for member in members]
    cancel(answers)
    for member, answer in answers.items():
        other = answer.error
        if other is not None and other is not failed:
            note(failed, f"and on connection {member.index} ({member.name}) {type(other).__name__}: {other}")
    raise failed


def cancel(answers: Mapping[Member, Answer[Any]]) -> None:
    """Have members give up what they are at, and wait until they have."""
    pause = SOON
    while at_work := [member for member, answer in answers.items() if not answer.is_there]:
        for member in at_work:
            with suppress(Exception):
                member.cancel()
        # One that was about to ask its server has heard nothing of it.
        answers[at_work[0]].is_there_within(pause)
        pause = min(2 * pause, 1.0)


def let_go(members: Sequence[Member]) -> list[Answer[None]]:
    """Have all connections given back, and their threads end; return what tells when."""
    answers = [member.ask(lambda member: member.let_go()) for member in members]
    for member in members:
        member.end()
    return answers


# --- What drivers have --------------------------------------------------------------------


def is_pool(source: Any) -> bool:
    """Tell whether it lends connections."""
    return callable(getattr(source, "getconn", None)) and callable(getattr(source, "putconn", None))


#: Drivers whose streaming cursors are those of one result.
UNBUFFERED = ("pymysql", "MySQLdb")


def driver_of(connection: Any) -> str:
    """Return the name of the package of a connection."""
    return type(connection).__module__.partition(".")[0]


def streaming(connection: Any, itersize: int) -> Any:
    """Return a cursor whose rows stay on the server until they are fetched; the plain one where the driver has none."""
    driver = driver_of(connection)
    if driver in ("psycopg2", "psycopg"):
        name = f"parallel_orm_{next(_numbers)}"
        cursor = connection.cursor(name=name, withhold=bool(connection.autocommit))
        cursor.itersize = itersize
        return cursor
    if driver in UNBUFFERED:
        return connection.cursor(import_module(f"{driver}.cursors").SSCursor)
    return connection.cursor()
