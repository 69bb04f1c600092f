"""A watch over one connection: what was said on it that another connection should know, or must wait for.

Every connection is watched from its first moment, through the cursors that it makes. What is remembered is little:
names of session variables that were set, whether something was said that nobody can follow, whether this transaction
wrote. From that, and from one look at the server where it is not enough, :meth:`Watch.elsewhere` tells whether a read
may run on another connection, and what that must be given.

The write barrier is here too: while reads of this connection's caller are on their way, the first statement that does
not provably only read waits for them, or runs them itself.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from time import perf_counter
from typing import Any, Protocol

from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created

from parallel_orm.errors import NotARead, not_a_read
from parallel_orm.functions import only_read
from parallel_orm.options import from_settings
from parallel_orm.session import NOTHING, Session, Tenant, in_order
from parallel_orm.statements import (
    NO_TRACE,
    UNKNOWN,
    Bond,
    Trace,
    bond_of,
    functions_in_doubt,
    names_in,
    only_reads,
    trace_of,
)

_PLACE = "_parallel_orm_watch"


class Read(Protocol):
    """A read that is on its way, as far as the barrier knows it."""

    session: Session

    def done(self) -> bool: ...

    def settle(self, *, wait: bool) -> None:
        """Run it now if nobody has begun it; else wait for it, if asked to."""


@dataclass(frozen=True, slots=True)
class Said:
    """A statement as it was executed, for those who count and show the caller's queries."""

    alias: str
    sql: Any
    params: Any
    many: bool
    seconds: float
    #: What the driver says that it sent, where it tells.
    sent: Any


class Reading:
    """What is executed for one read in the background: written down, and nothing that may do more than read."""

    def __init__(self, said: list[Said], harmless: frozenset[str], *, in_transaction: bool) -> None:
        self.said = said
        self._harmless, self._in_transaction = harmless, in_transaction
        #: What was to be executed and was not; whatever has become of the exception.
        self.refused: NotARead | None = None

    def hear(self, wrapper: BaseDatabaseWrapper, text: str | None) -> None:
        """Refuse a statement that is bound to the connection of the caller, before it is executed, and all after it."""
        bond = Bond.OWN if text is None else bond_of(text, self._harmless)
        if bond is Bond.OWN and text is not None:
            names = functions_in_doubt(text, self._harmless)
            if names and only_read(wrapper, names):
                bond = bond_of(text, self._harmless | names)
        if self.refused is None and bond is not None and (bond is not Bond.CLOCK or self._in_transaction):
            self.refused = not_a_read(wrapper.alias, text)
        if self.refused is not None:
            raise self.refused


#: Of a thread that runs a read in the background: that reading, for the connections that it opens meanwhile too. A
#: prefetch may ask another database.
here = threading.local()


class Watch:
    """What is known of one connection, since it was opened."""

    def __init__(self, wrapper: BaseDatabaseWrapper) -> None:
        self.wrapper = wrapper
        #: Of a worker's connection: the read that it is lent for, and what stops it before its next statement.
        self.reading: Reading | None = getattr(here, "reading", None)
        self.stopped: BaseException | None = None
        #: What MySQL and MariaDB call the connection; its own thread alone may ask.
        self.thread_id: int | None = None
        #: Of a worker's connection: what it was given, which nobody has said on it.
        self.given: Session = NOTHING
        #: How often it may have come into another transaction, or into another state of one.
        self.turn = 0
        self._reads: list[weakref.ref[Read]] = []
        self._most_reads = 8
        self._settling = False
        self._begin(None, None)

    def _begin(self, connection: Any, birth: Any) -> None:
        """Know nothing yet, of a connection that was just opened; or of one that was open before anybody watched."""
        self._connection = connection
        self._birth = birth
        self._touched: set[str] = set()
        self._unknown = False
        self._values: Session | None = None
        #: Whether anything was said that the next user of a worker's connection must not find.
        self.spoiled = False
        self._end_transaction()

    def _end_transaction(self) -> None:
        #: Whether the transaction was begun by SQL, so that Django knows of none.
        self.begun = False
        self._wrote = False
        self._savepoint = False
        self._touched_here: set[str] = set()
        #: What a look at the server found, of a transaction in which nothing but reads was heard since.
        self._unwritten: Session | None = None

    # --- What is heard ------------------------------------------------------------------

    def born(self) -> None:
        # Django makes a new list of on_commit callbacks when the receivers of connection_created are done. What they
        # say is said on every connection, and so nothing that another one would miss; but variables are compared.
        connection: Any = self.wrapper.connection
        self._begin(connection, self.wrapper.run_on_commit)
        self.thread_id = connection.thread_id() if self.wrapper.vendor == "mysql" else None
        if self.given.values and self.reading is None:  # a function's connection was lost under it, and opened anew
            self.given.replay(self.wrapper)

    def hear(self, sql: Any, params: Any = None) -> None:
        """Take note of a statement before it is executed, and have it wait if reads must be done before."""
        if self.stopped is not None:
            raise self.stopped
        text = sql if isinstance(sql, str) else self._text(sql)
        trace = UNKNOWN if text is None else trace_of(text)
        if trace is not NO_TRACE and text is not None and text.startswith("SET search_path") and self._is_of_tenant():
            return  # its tenant is carried instead
        if self.reading is not None and not (trace.begins or trace.savepoint or trace.ends or self._is_opening()):
            self.reading.hear(self.wrapper, text)
        if trace is not NO_TRACE:
            self._remember(trace, params)
        if not self._reads and self._unwritten is None:
            return
        if self._is_opening():
            return
        if trace.savepoint:
            self.settle(wait=False, only=lambda read: read.session.ends_with_transaction)
            if text is not None and "rollback" in text.lower():
                self.turn += 1
        elif text is None or not only_reads(text):
            self._unwritten = None
            if not trace.level:  # a read that was run here before it would be in its way
                self.settle()

    def _is_opening(self) -> bool:
        """Tell whether what is said opens the connection: by Django, or on every one that is created."""
        return self.wrapper.connection is not self._connection or self.wrapper.run_on_commit is self._birth

    def _remember(self, trace: Trace, params: Any) -> None:
        if trace.ends:
            self.transaction_ends()
        self.begun = self.begun or trace.begins
        self._savepoint = self._savepoint or trace.savepoint
        self._wrote = self._wrote or trace.writes
        names = trace.names | names_in(params) if trace.names_in_params else trace.names
        untold = trace.unknown or (trace.names_in_params and params is None)  # of many parameters, none is looked at
        unknown = untold and self.wrapper.run_on_commit is not self._birth
        if names or unknown:
            # A variable of the user's own stays known to the session, empty.
            passing = {name for name in names if trace.local and "." not in name}
            self._touched_here |= passing
            self._touched |= names - passing
            self._unknown = self._unknown or unknown
            self._values = None
            self.spoiled = self.spoiled or self.wrapper.run_on_commit is not self._birth

    def _text(self, sql: Any) -> str | None:
        try:
            if isinstance(sql, bytes):
                return sql.decode()
            return str(sql.as_string(self.wrapper.connection))  # what psycopg composes
        except Exception:
            return None

    def _is_of_tenant(self) -> bool:
        """Tell whether a search path is set by the backend itself, before a cursor is used."""
        wrapper: Any = self.wrapper
        return Tenant.of(wrapper) is not None and getattr(wrapper, "_setting_search_path", True)

    def transaction_ends(self) -> None:
        """Before a commit, a rollback, a close: have what depends on this transaction begun."""
        if self._reads:
            self.settle(wait=False, only=lambda read: read.session.ends_with_transaction)
        self.turn += 1
        self._end_transaction()

    # --- The barrier --------------------------------------------------------------------

    def add(self, read: Read) -> None:
        """Have writes wait for this read."""
        if len(self._reads) >= self._most_reads:
            self._reads = [ref for ref in self._reads if (other := ref()) is not None and not other.done()]
            self._most_reads = 2 * len(self._reads) + 8  # so that many reads are not looked through for each
        self._reads.append(weakref.ref(read))

    def settle(self, *, wait: bool = True, only: Callable[[Read], bool] = lambda read: True) -> None:
        """Have the reads that are on their way done, or at least begun. What they raise stays with them."""
        if self._settling:  # by a statement of a read that is being run here, or of what prepares its cursor
            return
        self._settling = True
        try:
            for read in [ref() for ref in self._reads]:
                if read is not None and only(read):
                    read.settle(wait=wait)
            self._reads = [ref for ref in self._reads if (read := ref()) is not None and not read.done()]
        finally:
            self._settling = False

    # --- What another connection would see ------------------------------------------------

    def elsewhere(self) -> Session | str:
        """Return what another connection needs to read as this one does now; or why none can, as a reason.

        Asks the server only for what was not heard: once for each transaction, and where variables were set.
        """
        wrapper, tenant = self.wrapper, Tenant.of(self.wrapper)
        if self.given.ends_with_transaction:
            return "nested"
        if wrapper.connection is None:
            return NOTHING if tenant is None else Session(tenant=tenant)
        if wrapper.connection is not self._connection:
            self._begin(wrapper.connection, None)
            self._unknown = True  # nobody watched when it was opened
        in_transaction = self.in_transaction
        if not in_transaction:
            self._end_transaction()
        elif wrapper.vendor != "postgresql" or self._wrote or wrapper.needs_rollback:
            return "transaction"
        if wrapper.vendor != "postgresql":
            session: Session | str = "session" if self._touched or self._unknown else NOTHING
        elif in_transaction:
            session = self._unwritten or self._look(in_transaction=True)
            if isinstance(session, Session) and not session.values:
                self._unwritten = session
        elif not self._touched and not self._unknown:
            session = NOTHING
        else:
            session = self._values or self._look(in_transaction=False)
            if isinstance(session, Session):
                self._values = session
        if tenant is None or isinstance(session, str):
            return session
        if any(name == "search_path" for name, _ in session.values):
            return "session"  # one of the user's own: when the backend overrules it is the backend's affair
        return Session(session.values, session.snapshot, tenant)

    @property
    def in_transaction(self) -> bool:
        """Tell whether the connection is in a transaction, whoever began it."""
        wrapper = self.wrapper
        if wrapper.connection is None:
            return False
        return wrapper.in_atomic_block or not wrapper.autocommit or self._was_begun_by_hand()

    def _was_begun_by_hand(self) -> bool:
        """Tell whether there is a transaction that Django does not know of: somebody executed BEGIN."""
        connection: Any = self.wrapper.connection
        if self.wrapper.vendor == "sqlite":
            return bool(connection.in_transaction)
        if self.wrapper.vendor == "postgresql":
            return bool(connection.info.transaction_status in (2, 3))  # or has failed
        return self.begun  # of which these drivers tell nothing

    def _look(self, *, in_transaction: bool) -> Session | str:
        """Ask PostgreSQL, in one round trip, on the driver's own cursor: it is no query of the user's."""
        configured = from_settings().SESSION_VARIABLES
        names = sorted(self._touched.union(self._touched_here, configured or ()))
        columns = [
            "pg_current_xact_id_if_assigned() IS NULL",
            "current_setting('transaction_isolation')",
            "pg_my_temp_schema() = 0",
            *["current_setting(%s, true)"] * len(names),
        ]
        try:
            with self.wrapper.connection.cursor() as cursor:
                cursor.execute("SELECT " + ", ".join(columns), names)
                unwritten, isolation, no_tables, *found = cursor.fetchone()
                values = {name: value for name, value in zip(names, found, strict=True) if value is not None}
                if self._unknown:
                    if configured is None and self._birth is not None:
                        return "session"  # somebody's function may have set what nothing lists
                    cursor.execute(
                        "SELECT lower(name), setting FROM pg_settings WHERE source = 'session'"
                        " AND context IN ('user', 'superuser') AND left(name, 11) <> 'transaction'"
                    )
                    values = dict(cursor.fetchall()) | values
                if not no_tables:
                    return "session"
                if not in_transaction:
                    return Session(in_order(values))
                if not unwritten:
                    self._wrote = True
                    return "transaction"
                snapshot = None
                if isolation == "repeatable read" and not self._savepoint and not any(self.wrapper.savepoint_ids):
                    cursor.execute("SELECT pg_export_snapshot()")
                    (snapshot,) = cursor.fetchone()
                elif isolation not in ("read committed", "read uncommitted"):
                    return "transaction"
                return Session(in_order(values), snapshot)
        except Exception:  # a transaction that failed, a connection that died: the query itself will tell
            return "transaction" if in_transaction else "session"


def watch_of(wrapper: BaseDatabaseWrapper) -> Watch:
    """Return the watch over a connection, from now on if it had none."""
    watch: Watch | None = wrapper.__dict__.get(_PLACE)
    return _install(wrapper) if watch is None else watch


def _install(wrapper: Any) -> Watch:
    watch = wrapper.__dict__[_PLACE] = Watch(wrapper)
    make, make_debug = wrapper.make_cursor, wrapper.make_debug_cursor
    wrapper.make_cursor = _making_watched(make)
    # What is written down here is shown among the caller's queries, and in no log of a worker's connection.
    wrapper.make_debug_cursor = _making_watched(
        lambda cursor: make(cursor) if watch.reading is not None else make_debug(cursor)
    )
    for name in ("commit", "rollback", "set_autocommit", "close"):
        setattr(wrapper, name, _telling(watch, getattr(wrapper, name)))
    return watch


def _making_watched(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def make_watched(cursor: Any) -> Any:
        made = make(cursor)
        if not isinstance(made, _Watching):
            made.__class__ = _watched(type(made))  # type: ignore[arg-type]
        return made

    return make_watched


def _telling(watch: Watch, end: Callable[..., Any]) -> Callable[..., Any]:
    def tell_and_end(*args: Any, **kwargs: Any) -> Any:
        watch.transaction_ends()
        return end(*args, **kwargs)

    return tell_and_end


class _Watching:
    """What is mixed into Django's cursors. As every query of the project passes here: with as few calls as it can."""

    db: Any
    cursor: Any

    def _execute(self, sql: Any, params: Any, *context: Any) -> Any:
        watch: Watch = self.db.__dict__[_PLACE]
        watch.hear(sql, params)
        if watch.reading is None:
            return super()._execute(sql, params, *context)  # type: ignore[misc]
        return self._logged(watch.reading.said, super()._execute, sql, params, context, many=False)  # type: ignore[misc]

    def _executemany(self, sql: Any, params: Any, *context: Any) -> Any:
        watch: Watch = self.db.__dict__[_PLACE]
        watch.hear(sql)
        if watch.reading is None:
            return super()._executemany(sql, params, *context)  # type: ignore[misc]
        return self._logged(watch.reading.said, super()._executemany, sql, params, context, many=True)  # type: ignore[misc]

    def _logged(self, log: list[Said], execute: Any, sql: Any, params: Any, context: Any, *, many: bool) -> Any:
        began = perf_counter()
        try:
            return execute(sql, params, *context)
        finally:
            log.append(Said(self.db.alias, sql, params, many, perf_counter() - began, _sent(self.cursor)))

    def callproc(self, *args: Any, **kwargs: Any) -> Any:
        self.db.__dict__[_PLACE].hear(None)
        return super().callproc(*args, **kwargs)  # type: ignore[misc]


def _sent(cursor: Any) -> Any:
    """Return what a driver says that it sent: psycopg2, psycopg 3, MySQL's; None where it does not tell."""
    query = getattr(cursor, "query", None) or getattr(cursor, "_executed", None)
    return query or getattr(getattr(cursor, "_query", None), "query", None)


def _telling_and_passing(said: str | None) -> property:
    def tell_and_pass(self: Any) -> Any:
        self.db.__dict__[_PLACE].hear(said)
        raise AttributeError  # whereupon Python asks Django's __getattr__, which has the driver's

    return property(tell_and_pass)


#: The drivers' ways to the server beside ``execute``, and what is said by them; None: anything.
_BESIDE = {
    **dict.fromkeys(("copy", "copy_expert", "copy_from", "copy_to"), "COPY"),
    **dict.fromkeys(("stream", "executescript")),
}


@cache
def _watched(cursor_class: type[Any]) -> type[Any]:
    names: dict[str, Any] = {"__module__": cursor_class.__module__}
    for name, said in _BESIDE.items():
        method = getattr(cursor_class, name, None)
        names[name] = _telling_and_passing(said) if method is None else _heard(method, said)
    return type(cursor_class.__name__, (_Watching, cursor_class), names)


def _heard(method: Callable[..., Any], said: str | None) -> Callable[..., Any]:
    def hear_and_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.db.__dict__[_PLACE].hear(said)
        return method(self, *args, **kwargs)

    return hear_and_call


def _born(connection: Any, **_: Any) -> None:
    watch_of(connection).born()


connection_created.connect(_born, dispatch_uid="parallel_orm")
# Before the receivers of others, to hear what those set.
connection_created.receivers.insert(0, connection_created.receivers.pop())
