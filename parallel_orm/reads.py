"""Read: one query on its way, run once, by whoever comes first.

A read is handed to the background threads. Whoever comes first runs it: a thread that has a connection for it, or the
caller who needs the answer and finds it not begun ("stolen"). Nothing waits for a thread that will never be free.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import threading
import weakref
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Future
from contextlib import suppress
from contextvars import ContextVar, copy_context
from functools import partial
from inspect import currentframe
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any

from asgiref.sync import SyncToAsync, sync_to_async
from django.core.signals import request_finished, request_started
from django.db import OperationalError, connections
from django.db.backends.base.base import BaseDatabaseWrapper

from parallel_orm import errors, events, guards
from parallel_orm.bonds import FREE, Bonds
from parallel_orm.chores import Due, chores
from parallel_orm.connections import interrupt, lender
from parallel_orm.executors.threads import PATIENCE, BackgroundThreads, background_threads
from parallel_orm.forks import gate
from parallel_orm.outcomes import Landing, Outcome, Stopwatch, note
from parallel_orm.plan import plan_whole
from parallel_orm.seen import is_watched, show
from parallel_orm.session import NOTHING, Session, Tenant
from parallel_orm.task import Task
from parallel_orm.watch import Reading, Said, here, watch_of
from parallel_orm.work import Work
from parallel_orm.workers import as_worker

PACKAGE = str(Path(__file__).parent) + os.sep

#: Seconds after which a query that was to be cancelled, and runs on, is cancelled again: the first may have come
#: between two statements, where a server takes no notice.
AGAIN = 0.2

_logger = logging.getLogger("parallel_orm")


class Reason(str):
    """A word that says why a query did not run in the background; ``str()`` of it explains."""

    __slots__ = ()

    def __str__(self) -> str:
        return guards.REASONS[self[:]]


class Read:
    """One query on its way: run once, by a thread or by whoever needs it first."""

    session: Session = NOTHING
    reason: Reason | None = None
    queue_time: float | None = None
    connect_time: float | None = None
    execute_time: float | None = None
    #: Whether its request ended before anybody used it.
    left = False
    #: The caller's connection, until its queries have been shown there.
    _home: BaseDatabaseWrapper | None = None
    #: Which transaction of the caller's connection it was started in, or between which two.
    _turn = 0
    _in_transaction = False
    #: What was not executed elsewhere, as it may do more than read.
    _refused: BaseException | None = None
    #: The thread of the caller that runs it, while it does.
    _thread: int | None = None
    _running: BaseDatabaseWrapper | None = None
    _stopped: BaseException | None = None
    _deadline: Due | None = None
    #: Only of a start in a coroutine, which another thread begins.
    begun: Future[None] | None = None
    #: Whether its outcome is known, and about to land.
    _has_outcome = False
    #: Whether no thread will run it: whoever needs the answer must.
    _is_left_over = False
    #: What answers it too, so that its own query need not run.
    _leader: Read | None = None
    _answer: Callable[[Any], Any] = bool

    def __init__(self, verb: str, task: Task, seconds: float | None = None, bonds: Bonds = FREE) -> None:
        self.verb, self.alias, self.model = verb, task.chunk.alias, task.job.queryset.model
        self.bonds = bonds
        self.started_at = place_of_caller()
        self._chunk = task.chunk
        #: None once it has landed: with it go the queryset and the caller's context.
        self._task: Task | None = task
        self._seconds = seconds
        self._siblings: list[Read] = []
        self._said: list[Said] = []
        self._since = perf_counter()
        self._pid = os.getpid()
        # Taken by whoever runs it, never released: between a thread, the caller and other threads of the caller.
        self._claim = threading.Lock()
        # Guards what changes above and below. Reentrant, as the collector may drop a Pending anywhere.
        self._lock = threading.RLock()
        self.landed = Landing()
        self._to_wake: list[Callable[[], None]] = []

    # --- Beginning ----------------------------------------------------------------------

    def begin(self, stay: str | None = None, session: Session | None = None) -> None:
        """Decide where it runs and send it there; in the thread of the caller's connection."""
        try:
            task = self._task
            if task is None:  # it was cancelled before
                return
            if stay is None and session is None:
                stay, session = guards.where_to_read(self.alias, self.bonds)
            self.session = session or NOTHING
            home = self._home = connections[self.alias]
            if stay is None:
                watch = watch_of(home)
                self._turn = watch.turn
                if self.verb != PART:  # the parts of a read need not wait for each other
                    self._in_transaction = watch.in_transaction
                    watch.add(self)
                if self._seconds is not None:
                    self._deadline = chores.call_later(self._seconds, self._expire)
                self._tell("started")
                threads = background_threads()
                try:
                    if threads.are_swamped:
                        self._is_left_over = True
                    else:
                        threads.put(self._run_there)
                except RuntimeError:  # no new threads while the interpreter ends
                    stay = "shutdown"
        finally:
            if self.begun is not None:
                self.begun.set_result(None)
        if stay is not None:
            self._run_here(stay)
            return
        # The parts of a read are stopped with it.
        if self.verb != PART and (requested := _reads_of_request()) is not None:
            requested.add(self)

    def begin_soon(self) -> None:
        """In a coroutine: begin in the thread that has the connection of async code, before all that it does next."""
        self.begun = Future()
        once = threading.Lock()
        self._beginning = _send_off(sync_to_async(self._begin_quietly)(once))
        self._beginning.add_done_callback(partial(self._begin_nowhere, once))

    def _begin_quietly(self, once: threading.Lock) -> None:
        if not once.acquire(blocking=False):
            return
        try:
            self.begin()
        except BaseException as error:
            self._land(Outcome(self._chunk, error=error))

    def _begin_nowhere(self, once: threading.Lock, _: object) -> None:
        """The event loop has ended before that thread could begin: whoever needs the answer asks on their own."""
        if not once.acquire(blocking=False):
            return
        assert self.begun is not None
        self._leave_over()
        self.begun.set_result(None)

    # --- Running ------------------------------------------------------------------------

    def done(self) -> bool:
        return self.landed.done()

    def settle(self, *, wait: bool = True, timeout: float | None = None) -> None:
        """Run it now if nobody has begun it; else wait for it, if asked to."""
        if self._thread == threading.get_ident() and not self.done():
            return  # a statement of this very read, which is run here
        self._come_along()
        if (leader := self._leader) is not None:
            leader.settle(wait=wait, timeout=timeout)
            self.take()
        if not self.done():
            if self.begun is not None:
                self.begun.result(timeout)
            if wait and self._deadline is not None and self.is_about_to_begin:
                # On the caller's connection nothing would keep to the deadline.
                self._wait_until_tried(timeout)
            if not self._run_here() and wait:
                # A thread is at it, which may leave it over yet.
                self._wait_until_tried(timeout)
                self._run_here()
        if wait:
            self.landed.result(timeout)

    def _come_along(self) -> None:
        """In a forked child: the thread that had it was left behind in the parent."""
        if self._pid != os.getpid() and not self.done():
            self._pid, self._claim, self._lock = os.getpid(), threading.Lock(), threading.RLock()
            self.landed, self._leader, self._running, self._has_outcome = Landing(), None, None, False

    def _wait_until_tried(self, timeout: float | None) -> None:
        tried = threading.Lock()
        tried.acquire()
        self.when_tried(tried.release)
        if not tried.acquire(timeout=-1 if timeout is None else min(max(timeout, 0), threading.TIMEOUT_MAX)):
            raise TimeoutError

    @property
    def is_waiting(self) -> bool:
        """Tell whether nobody has begun it."""
        return not self._claim.locked() and not self.done()

    @property
    def is_about_to_begin(self) -> bool:
        """Tell whether a thread and a connection are there for it, or have begun it, so that there is no long wait for
        :meth:`when_tried`.
        """
        return not self.is_waiting or not (
            self._is_left_over or background_threads().are_busy or lender.is_used_up(self.alias)
        )

    def _run_here(self, stay: str | None = None) -> bool:
        """Run it in this thread if nobody has begun it; tell whether it was so."""
        task = self._task
        if task is None or not self._claimed():
            return False
        # Inline, the answer is that of the caller's connection, as broken as it may be.
        run = partial(self._run_stolen, task) if stay is None else task.run
        self._thread = threading.get_ident()
        try:
            outcome = task.job.capsule.run(run)  # as of the call, in time zone and language too
            if isinstance(outcome.error, KeyboardInterrupt | SystemExit):  # meant for the caller, and no answer
                raise outcome.error
        except BaseException:
            # Ctrl-C may come before the query too. Whoever needs the answer asks anew: a thread that found this one at
            # it does not come back.
            self._claim.release()
            self._leave_over()
            raise
        finally:
            self._thread = None
        if stay is None and self._refused is not None:
            stay = "writes"
        self.reason = Reason(stay or "stolen")
        try:
            self._tell("stolen" if stay is None else "inline")
        finally:  # whatever ends an observer
            self._land(outcome)
        return True

    def _home_as_it_was(self) -> BaseDatabaseWrapper | None:
        """Return this thread's connection if it would answer as it would have when the read was started."""
        home = connections[self.alias]
        tenant = self.session.tenant
        if (
            home is self._home
            and not home.needs_rollback
            and not home.closed_in_transaction
            and (tenant is None or tenant.same_as(Tenant.of(home)))
            and not (self.session.ends_with_transaction and watch_of(home).turn != self._turn)
        ):
            return home
        return None

    def _run_stolen(self, task: Task) -> Outcome:
        """Run it as it would have run at its start: in the caller's transaction only if it was started in that, and
        without the ``execute_wrappers`` that have come since.
        """
        home = self._home_as_it_was()
        if home is None:
            return self._run_lent(task)
        watch = watch_of(home)
        if watch.turn != self._turn and watch.in_transaction and self._refused is None:
            # Its query might be the first of that transaction, after which no level can be set and from which its
            # snapshot is; and its failure would be that of the transaction.
            return self._run_lent(task, home)
        return self._run_at_home(task, home)

    def _run_at_home(self, task: Task, home: BaseDatabaseWrapper) -> Outcome:
        wrappers, home.execute_wrappers = home.execute_wrappers, []
        try:
            return task.run()
        finally:
            home.execute_wrappers = wrappers

    def _run_lent(self, task: Task, home: BaseDatabaseWrapper | None = None) -> Outcome:
        """Run it on a lent connection; where none is to be had, and where it does more than read: at home, if any."""
        try:
            with as_worker(), lender.lent(self.alias, self.session, reading=True) as wrapper:
                wrapper.ensure_connection()
                outcome = self._run_on(wrapper, task)
            error: BaseException | None = self._refused
        except Exception as raised:
            outcome, error = None, raised
        if outcome is None and home is not None:
            return self._run_at_home(task, home)
        return outcome or Outcome(task.chunk, error=error)

    def when_tried(self, wake: Callable[[], None]) -> None:
        """Have this called when the answer is there, or is left to whoever needs it; in any thread."""
        with self._lock:
            if not self.done() and not self._is_left_over:
                self._to_wake.append(wake)
                return
        wake()

    def _leave_over(self) -> None:
        with self._lock:
            self._is_left_over = True
        self._wake()

    def _wake(self) -> None:
        with self._lock:
            to_wake, self._to_wake = self._to_wake, []
        for wake in to_wake:
            wake()

    def _run_there(self, threads: BackgroundThreads) -> None:
        if self._claim.locked():
            return  # the caller was first: no connection need be made ready
        # To its landing at once: a forked child finds either the task or the answer, and a fork that waits for a read
        # does not keep one from landing for which that waits in turn.
        with gate:
            task = self._task
            if task is None:  # it was cancelled
                return
            outcome = task.job.capsule.run(self._run_on_lent_connection, task)
            threads.count_as_done()
            if outcome is None:
                self._leave_over()
            else:
                self._land(outcome)

    def _run_on_lent_connection(self, task: Task) -> Outcome | None:
        outcome, is_refused = None, False
        began = perf_counter()
        try:
            with as_worker(), lender.lent(self.alias, self.session, reading=True, in_own_thread=True) as wrapper:
                with suppress(Exception):
                    wrapper.ensure_connection()
                _under_way.add(self)
                with self._lock:
                    if wrapper.connection is None or _leaving.is_set() or not self._claimed():
                        # No connection is to be had just now: whoever needs the answer asks on their own.
                        return None
                    self._running = wrapper
                self.connect_time = perf_counter() - began
                outcome = self._run_on(wrapper, task)
                is_refused = outcome is None
        except BaseException as error:
            # It could not be lent, or be given the caller's session: whoever needs the answer asks on their own. Or it
            # could not be given back.
            if outcome is None and self._claim.locked() and self._running is not None:
                return Outcome(task.chunk, error=error)
        finally:
            _under_way.discard(self)
        if is_refused:
            self.connect_time = None
            self._claim.release()
        return outcome

    def _run_on(self, wrapper: BaseDatabaseWrapper, task: Task) -> Outcome | None:
        """Run it on a worker's connection; None if it was about to do more than read, and has done nothing."""
        watch, outer = watch_of(wrapper), getattr(here, "reading", None)
        reading = Reading(self._said, self.bonds.functions, in_transaction=self._in_transaction)
        watch.reading = here.reading = reading
        token = running.set(self)
        try:
            outcome = task.run()
        finally:
            running.reset(token)
            here.reading = outer
            with self._lock:
                self._running = None
                watch.reading = watch.stopped = None
        refused: BaseException | None = reading.refused
        if refused is None and isinstance(outcome.error, BaseException) and _is_of_one_connection(outcome.error):
            refused = outcome.error
        if refused is None:
            return outcome
        self._refused, self._said = refused, []
        return None

    def beside(self, works: list[Callable[[], None]]) -> None:
        """Do several things at once, as parts of this read and in its session; return when all are done."""
        assert self._task is not None
        rows = self._task.job.queryset
        first, *others = works
        reads = [Read(PART, plan_whole(rows, _part(work)), bonds=self.bonds) for work in others]
        with self._lock:
            if self._stopped is not None:
                raise self._stopped
            self._siblings += reads
        for read in reads:
            read.started_at, read._in_transaction = self.started_at, self._in_transaction
            read.begin(session=self.session)
        outcomes = [plan_whole(rows, _part(first)).run()]
        for read in reads:
            read.settle()
            self._said += read._said
            outcomes.append(read.landed.result())
        for outcome in outcomes:
            outcome.result()

    # --- Being answered by another ------------------------------------------------------

    def hold(self) -> bool:
        """Have nobody begin it, if nobody has; until :meth:`follow`."""
        return not self.done() and self._claim.acquire(blocking=False)

    def follow(self, leader: Read | None, answer: Callable[[Any], Any]) -> None:
        """Take the answer from that of ``leader``; run after all if that has none."""
        self._leader, self._answer = leader, answer
        if leader is None:
            self._let_go()
            return
        me = weakref.ref(self)

        def take(_: object) -> None:
            if (read := me()) is not None:
                read.take()

        leader.landed.add_done_callback(take)

    def take(self) -> None:
        """Take the answer of the other one, if that is there."""
        with self._lock:
            leader = self._leader
            if leader is None or not leader.done():
                return
            outcome = leader.landed.result()
            if outcome.error is not None:
                self._let_go()
                return
            self.reason = leader.reason
            self._land(Outcome(self._chunk, self._answer(outcome.value)))

    def _let_go(self) -> None:
        self._leader = None
        self._claim.release()
        self._leave_over()

    def _claimed(self) -> bool:
        if not self._claim.acquire(blocking=False):
            return False
        self.queue_time = perf_counter() - self._since
        return True

    def _land(self, outcome: Outcome) -> None:
        with self._lock:
            if self._has_outcome:  # it was cancelled meanwhile
                return
            self._has_outcome = True
            if self._deadline is not None:
                self._deadline.cancel()
            if self.queue_time is not None:
                self.execute_time = perf_counter() - self._since - self.queue_time
            if isinstance(outcome.error, BaseException):
                note(outcome.error, f"the query was started at {self.started_at}")
            task, self._task = self._task, None  # which ends outside of the lock, as anything may hang on it
            self._leader = None
        del task
        # First: whoever has the answer finds that it has been told of.
        error = outcome.error if isinstance(outcome.error, BaseException) else None
        try:
            self._tell("finished" if error is None else "failed", error)
        finally:  # whatever ends an observer
            self.landed.set_result(outcome)
            self._wake()

    # --- Stopping -----------------------------------------------------------------------

    def cancel(self, error: BaseException) -> bool:
        """Have ``error`` be the answer, and the server give up the query. False where it is there already, or where
        the caller's own connection is at it.
        """
        self._come_along()
        with self._lock:
            if self.done() or (self._claim.locked() and self._running is None and self._leader is None):
                return False
            self._claim.acquire(blocking=False)
            self._stopped = error
            self._land(Outcome(self._chunk, error=error))
            if self._running is not None:
                self._interrupt_soon()
            siblings = list(self._siblings)
        for sibling in siblings:
            sibling.cancel(error)
        return True

    def _interrupt_soon(self) -> None:
        """In a thread of its own: it may have to connect."""
        thread = threading.Thread(target=self._interrupt, name="parallel_orm-interrupt", daemon=True)
        with suppress(RuntimeError):  # no new threads while the interpreter ends
            thread.start()

    def _interrupt(self) -> None:
        with gate, self._lock:  # held meanwhile, so that the connection is not given to somebody else
            if self._running is None:
                return
            watch_of(self._running).stopped = self._stopped
            try:
                interrupt(self._running)
            except Exception:
                _logger.warning("a query on %r could not be cancelled", self.alias, exc_info=True)
        chores.call_later(AGAIN, self._interrupt_soon)

    def _expire(self) -> None:
        assert self._seconds is not None
        with gate:
            self.cancel(errors.deadline_exceeded(self._seconds))

    def abandon(self) -> None:
        """Nobody will use it: cancel it if it is on its way, and tell of a failure that nobody will hear of."""
        if self.cancel(errors.cancelled("because nobody held its result any more")):
            self._tell("abandoned")
        elif self.done():
            self._abandon(self.landed.result())
        else:  # the answer is just about to be there
            self.landed.add_done_callback(lambda _: chores.call(self.abandon))

    def _abandon(self, outcome: Outcome) -> None:
        if isinstance(outcome.error, errors.Cancelled):
            return  # by whoever held it
        if isinstance(outcome.error, BaseException):
            _logger.error(
                "A background read failed and nobody asked for its result; it was started at %s",
                self.started_at,
                exc_info=outcome.error,
            )
        self._tell("abandoned")

    def leave(self) -> None:
        """Its request has ended."""
        if not self.done() and self.cancel(errors.cancelled("at the end of the request that started it")):
            self.left = True
            self._tell("abandoned")

    # --- Being seen ---------------------------------------------------------------------

    def shown(self) -> None:
        """Enter what it executed elsewhere among the queries of the caller who started it; once."""
        with self._lock:
            said, self._said = self._said, []
            home, self._home = self._home, None
        if home is None or not said:
            return
        for alias in dict.fromkeys(each.alias for each in said):
            show([each for each in said if each.alias == alias], home if alias == self.alias else connections[alias])

    @property
    def is_to_be_shown(self) -> bool:
        """Tell whether anybody watches the queries of the caller, and has not seen these."""
        return bool(self._said) and self._home is not None and is_watched(self._home)

    def _tell(self, kind: str, error: BaseException | None = None) -> None:
        events.count(kind)
        if events.has_observers(kind):
            times = self.queue_time, self.connect_time, self.execute_time
            reason = None if self.reason is None else self.reason[:]
            events.tell(
                events.Event(kind, self.verb, self.model, self.alias, self.started_at, reason, *times, error=error)
            )


#: What a read is called that is a part of another one.
PART = "prefetch"


def _part(work: Callable[[], None]) -> Work:
    def run(rows: Any, clock: Stopwatch) -> tuple[None, int]:
        work()
        return None, 0

    return run


#: The read that this thread is running in the background.
running: ContextVar[Read | None] = ContextVar("parallel_orm_running", default=None)


#: Reads that a background thread is at.
_under_way: set[Read] = set()
#: Set when the interpreter ends: what no thread has begun is not begun any more.
_leaving = threading.Event()


def _leave() -> None:
    """At the end of the interpreter: nobody will use them any more."""
    _leaving.set()
    until = monotonic() + PATIENCE
    while _under_way and monotonic() < until:
        for read in list(_under_way):
            read.cancel(errors.cancelled("at the end of the interpreter"))
            read._interrupt()  # here: there may be no new threads any more
        threading.Event().wait(AGAIN / 10)  # one that came before its query had reached the server was in vain


atexit.register(_leave)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_under_way.clear)  # they run in the parent


class _SentOff:
    """What is left of a coroutine that was run until it first waited: what eager tasks do since Python 3.12."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self._coroutine = coroutine
        self._waits_for: Any = None
        self._ended = False
        self._step(coroutine.send, None)

    def _step(self, send: Callable[[Any], Any], value: Any) -> None:
        try:
            self._waits_for = send(value)
        except StopIteration:
            self._ended = True

    def __await__(self) -> Generator[Any, Any, None]:
        while not self._ended:
            try:
                value = yield self._waits_for
            except BaseException as error:
                self._step(self._coroutine.throw, error)
            else:
                self._step(self._coroutine.send, value)


def _send_off(coroutine: Coroutine[Any, Any, Any]) -> asyncio.Task[None]:
    """Run a coroutine until it first waits, and have what is left of it done."""

    async def finish() -> None:
        await rest

    context = copy_context()  # asgiref notes there that its thread is taken
    rest = context.run(_SentOff, coroutine)
    return asyncio.get_running_loop().create_task(finish(), context=context)


def _is_of_one_connection(error: BaseException) -> bool:
    """Tell whether a query failed for want of what the caller's connection may have: a function that Python gave to
    SQLite, a collation.
    """
    return isinstance(error, OperationalError) and str(error).startswith(("no such function", "no such collation"))


def place_of_caller() -> str:
    """Return file and line of the innermost frame outside of this package, for a note."""
    frame = currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return "an unknown place" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


# --- The end of a request ---------------------------------------------------------------

# A request is told by its context: of the thread that serves it, or, under ASGI, the one that asgiref makes for it.
_reads_by_thread: ContextVar[weakref.WeakSet[Read] | None] = ContextVar("parallel_orm_reads", default=None)
_reads_by_context: weakref.WeakKeyDictionary[Any, weakref.WeakSet[Read]] = weakref.WeakKeyDictionary()


def _reads_of_request() -> weakref.WeakSet[Read] | None:
    """Return where the running request notes what it has started; None outside of one."""
    context = SyncToAsync.thread_sensitive_context.get(None)
    if context is None:
        return _reads_by_thread.get()
    return _reads_by_context.setdefault(context, weakref.WeakSet())


def _request_starts(**_: Any) -> None:
    _reads_by_thread.set(weakref.WeakSet())


def _request_ends(**_: Any) -> None:
    for read in list(_reads_of_request() or ()):
        read.leave()
    _reads_by_thread.set(None)


request_started.connect(_request_starts, dispatch_uid="parallel_orm")
request_finished.connect(_request_ends, dispatch_uid="parallel_orm")
