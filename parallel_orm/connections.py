"""A worker's connections: opened, checked, counted against a budget, given back.

A worker thread borrows its connections for one task and gives them back after it, so that they outlive the thread's
turn but not their welcome: one that nobody uses is closed after a few seconds, one older than ``CONN_MAX_AGE`` is not
lent again, and under Django's test runner every one is closed before the task's outcome is known (a test database with
an open connection cannot be dropped). The callers' own connections are theirs and never touched.
"""

from __future__ import annotations

import atexit
import os
import select
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any

from django.db import connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.backends.signals import connection_created

from parallel_orm.forks import gate
from parallel_orm.options import from_settings
from parallel_orm.session import NOTHING, Session
from parallel_orm.watch import watch_of

#: Seconds after which an idle connection is closed. Long enough for the next page of the same visitor, short enough
#: that a quiet site holds none. ``CONN_MAX_AGE`` bounds the age of a connection that is kept busy.
IDLE_SECONDS = 5.0
#: So in a worker process: the next map of the same page finds it open, and nothing is left soon after a call.
WORKER_IDLE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Idle:
    """A connection that waits for its next task."""

    wrapper: BaseDatabaseWrapper
    #: The settings that it was opened with: a test run changes them in place.
    settings: dict[str, Any]
    since: float
    #: Session variables that it has known, and cannot forget.
    variables: frozenset[str] = frozenset()


class Lender:
    """Lends the connections that this library opens in this process, to one thread at a time."""

    def __init__(self) -> None:
        # Guards the lists below and nothing slow: connections are opened and closed outside of it.
        self._lock = threading.Lock()
        self._idle: dict[str, list[Idle]] = defaultdict(list)
        self._budgets: dict[str, tuple[int, threading.BoundedSemaphore]] = {}
        self._sweeper: threading.Timer | None = None
        #: Seconds for which an idle connection stays open.
        self._patience = IDLE_SECONDS
        self._pid = os.getpid()
        self._keepsakes: list[object] = []
        self._lent = threading.local()
        #: How many of each alias are lent now.
        self._out: Counter[str] = Counter()

    @contextmanager
    def lent(
        self, alias: str, session: Session = NOTHING, *, reading: bool = False, in_own_thread: bool = False
    ) -> Iterator[BaseDatabaseWrapper]:
        """Within: ``connections[alias]`` of this thread is one of ours, counted, open or opened at first use.

        It has the session of the caller, for the length of this. Waits while the budget of the alias is used up. What
        the thread opened beside it (a router, a prefetch over another alias) is given back too. A thread of our own
        has none but what it is lent, as a rule, so that nobody need look for others.

        :raises SessionNotRestored: the session cannot be had on it.
        """
        budget = self._budget(alias)
        # A thread that has a place already waits for no other: it could wait for itself.
        if budget is not None and not budget.acquire(blocking=not self._depth()):
            budget = None
        try:
            with gate if reading else nullcontext():  # nobody sees that who forks
                self._lent.depth = self._depth() + 1
                own = take_out() if _opened.any or not in_own_thread else []
                _opened.any = False
                wrapper = self._take(alias, session.lasting)
                connections[alias] = wrapper
                try:
                    with nullcontext() if session is NOTHING else session.restored(wrapper, reading=reading):
                        watch_of(wrapper).given = session
                        yield wrapper
                finally:
                    watch_of(wrapper).given = NOTHING
                    if not reading and session.values:
                        discard(wrapper)
                    with self._lock:
                        self._out[alias] -= 1
                    is_alone = in_own_thread and not _opened.any and connections[alias] is wrapper
                    if is_alone:
                        del connections[alias]
                    for other in [wrapper] if is_alone else take_out():
                        self._put(other, session.lasting if other is wrapper else frozenset())
                    for other in own:
                        connections[other.alias] = other
                    _opened.any = bool(own)
        finally:
            self._lent.depth -= 1
            if budget is not None:
                budget.release()

    def _depth(self) -> int:
        """How many connections this thread has been lent, one within the other."""
        depth: int = getattr(self._lent, "depth", 0)
        return depth

    def is_used_up(self, alias: str) -> bool:
        """Tell whether whoever asks for one now would have to wait."""
        number = from_settings().connections_of(alias)
        return 0 < number <= self._out[alias]

    def close_idle(self, if_: Callable[[Idle], bool] = lambda idle: True) -> None:
        """Close the idle connections of which this is so; by default all."""
        closing: list[Idle] = []
        with gate:
            with self._lock:
                for alias, waiting in self._idle.items():
                    closing += [idle for idle in waiting if if_(idle)]
                    self._idle[alias] = [idle for idle in waiting if idle not in closing]
            for idle in closing:
                close_quietly(idle.wrapper)

    def forget(self) -> None:
        """In a forked child: leave the parent's connections alone, closing none, and begin anew.

        They are kept from the collector too, whose closing of one would end the parent's session with the server.
        """
        keepsakes = [*self._keepsakes, self._idle]
        self.__init__()  # type: ignore[misc]
        self._keepsakes = keepsakes

    def disinherit(self) -> None:
        """In a worker process: let go of what a fork brought along, so that no connection crosses."""
        self._keepsakes += take_out()

    def serve_calls(self) -> None:
        """In a worker process: keep connections from call to call, and no longer."""
        self._patience = WORKER_IDLE_SECONDS

    def _budget(self, alias: str) -> threading.BoundedSemaphore | None:
        number = from_settings().connections_of(alias)
        if not number:
            return None  # reads then run inline and do not come here; maps go on
        with self._lock:
            known, budget = self._budgets.get(alias, (0, None))
            if known != number or budget is None:
                budget = threading.BoundedSemaphore(number)
                self._budgets[alias] = (number, budget)
            return budget

    def _take(self, alias: str, variables: frozenset[str]) -> BaseDatabaseWrapper:
        """Return an idle connection that knows no other session variables than these, or one that is to be opened."""
        while True:
            with self._lock:
                waiting = self._idle[alias]
                # The last used first, so that the others come to rest.
                idle = next((each for each in reversed(waiting) if each.variables <= variables), None)
                number = from_settings().connections_of(alias) or 0
                full = idle is None and waiting and self._out[alias] + len(waiting) >= number
                found = waiting[0] if full else idle
                if found is not None:
                    waiting.remove(found)
                if not full:
                    self._out[alias] += 1
            if full and found is not None:  # make room for one
                close_quietly(found.wrapper)
                continue
            if found is None:
                # Closed by whichever thread finds it idle for too long.
                wrapper = connections.create_connection(alias)
                wrapper.inc_thread_sharing()
                return wrapper
            wrapper = found.wrapper
            wrapper.health_check_done = False  # type: ignore[attr-defined]
            if wrapper.settings_dict.get("CONN_MAX_AGE") != 0:
                wrapper.close_if_unusable_or_obsolete()
            if found.settings == _fixed(connections.settings[alias]) and not has_died(wrapper):
                return wrapper
            wrapper.close()
            with self._lock:
                self._out[alias] -= 1

    def _put(self, wrapper: BaseDatabaseWrapper, variables: frozenset[str]) -> None:
        reusable = (
            wrapper.connection is not None
            and not wrapper.in_atomic_block
            and not wrapper.needs_rollback
            and wrapper.get_autocommit()
            and may_be_kept(wrapper)
        )
        watch = watch_of(wrapper)
        if wrapper.errors_occurred or watch.spoiled or watch.begun:
            discard(wrapper)
            return
        if not reusable:
            close_quietly(wrapper)
            return
        wrapper.execute_wrappers.clear()
        wrapper.queries_log.clear()
        wrapper.run_on_commit.clear()
        watch.reading = None
        if not wrapper.allow_thread_sharing:
            wrapper.inc_thread_sharing()
        with self._lock:
            idle = Idle(wrapper, _fixed(wrapper.settings_dict), monotonic(), variables)
            self._idle[wrapper.alias].append(idle)
            self._sweep_later()

    def _sweep(self) -> None:
        """Close what has been idle for long enough, in the sweeper's thread, and come back while anything is left."""
        oldest = monotonic() - self._patience
        self.close_idle(lambda idle: idle.since <= oldest)
        with self._lock:
            self._sweeper = None
            self._sweep_later()

    def _sweep_later(self) -> None:
        """Have a sweeper come by when the first connection has been idle for long enough. With the lock held."""
        if self._sweeper is not None:
            return
        since = min((idle.since for waiting in self._idle.values() for idle in waiting), default=None)
        if since is not None:
            sweeper = threading.Timer(max(0.0, since + self._patience - monotonic()), self._sweep)
            sweeper.daemon = True
            sweeper.name = "parallel_orm-sweeper"
            with suppress(RuntimeError):  # no new threads while the interpreter ends, which closes them too
                sweeper.start()
                self._sweeper = sweeper


class _Opened(threading.local):
    #: Whether a connection may have been opened in this thread since all of its were taken out. (To look at each alias
    #: takes as long as to lend a connection does else.)
    any = True


_opened = _Opened()


def _note_opened(**_: Any) -> None:
    _opened.any = True


connection_created.connect(_note_opened, dispatch_uid="parallel_orm.connections")


def _fixed(settings: dict[str, Any]) -> dict[str, Any]:
    """Return what a connection was opened with; without what a backend notes there for itself (a tenant's schema)."""
    fixed = settings.copy()
    fixed.pop("SCHEMA", None)
    return fixed


def has_died(wrapper: BaseDatabaseWrapper) -> bool:
    """Tell whether a connection that was idle is closed, or was ended by its server meanwhile.

    What a server says without having been asked is its farewell, as a rule: so it is asked only where there is
    something to be read, or where a driver does not show. What dies after this look died under a query, which fails as
    it would inline; it is not made again, as nobody knows how far it went.
    """
    connection: Any = wrapper.connection
    if connection is None:
        return True
    if wrapper.vendor == "sqlite":
        return False
    with suppress(Exception):
        # PyMySQL keeps its socket to itself.
        if not _has_something_to_read(connection if hasattr(connection, "fileno") else connection._sock):
            return False
    return not wrapper.is_usable()


def _has_something_to_read(socket: Any) -> bool:
    if not hasattr(select, "poll"):
        return bool(select.select([socket], [], [], 0)[0])
    poll = select.poll()  # which, as select() does not, takes files of any number
    poll.register(socket, select.POLLIN)
    return bool(poll.poll(0))


def interrupt(wrapper: BaseDatabaseWrapper) -> None:
    """Have the server give up what this connection is executing; from another thread than its own.

    A driver's way to do so where it has one, ``KILL QUERY`` on a connection of its own on MySQL and MariaDB. The
    connection is not used again: a late cancellation would hit the next query.
    """
    connection: Any = wrapper.connection
    if connection is None:
        return
    wrapper.errors_occurred = True  # so that it is closed when it is given back
    if wrapper.vendor == "mysql":
        killer = connections.create_connection(wrapper.alias)
        killer.inc_thread_sharing()
        try:
            with killer.cursor() as cursor:
                cursor.execute(f"KILL QUERY {watch_of(wrapper).thread_id}")
        finally:
            killer.close()
    elif wrapper.vendor == "sqlite":
        connection.interrupt()
    elif hasattr(connection, "cancel_safe"):
        connection.cancel_safe()
    elif hasattr(connection, "cancel"):
        connection.cancel()


def take_out() -> list[BaseDatabaseWrapper]:
    """Take this thread's connections out of Django's hands, as they are, and return them."""
    wrappers = list(connections.all(initialized_only=True))
    for wrapper in wrappers:
        del connections[wrapper.alias]
    return wrappers


def close_quietly(wrapper: BaseDatabaseWrapper) -> None:
    """Close a connection that may be in a broken transaction, where ``close()`` alone would only mark it."""
    wrapper.in_atomic_block = False
    wrapper.savepoint_ids = []
    wrapper.needs_rollback = False
    wrapper.close()


def may_be_kept(wrapper: BaseDatabaseWrapper) -> bool:
    """Tell whether a lent connection stays open when it comes back, if nothing has happened to it."""
    return not wrapper.settings_dict["OPTIONS"].get("pool") and not under_test()  # a pool of Django's keeps it for all


def discard(wrapper: BaseDatabaseWrapper) -> None:
    """Close a connection whose session nobody is to find; in Django's pool neither, which takes no closed one back."""
    if wrapper.connection is not None and wrapper.settings_dict["OPTIONS"].get("pool"):
        with suppress(Exception):
            wrapper.connection.close()
    close_quietly(wrapper)


def under_test() -> bool:
    """Tell whether Django's test environment is set up, whose databases will be dropped."""
    utils = sys.modules.get("django.test.utils")
    return utils is not None and hasattr(utils._TestState, "saved_data")


lender = Lender()
atexit.register(lender.close_idle)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lender.forget)
