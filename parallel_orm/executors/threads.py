"""Threads: one lasting pool for background reads, one for the length of each map that asks for threads."""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from time import monotonic
from typing import Any

from parallel_orm.leaving import THREADS, may_wait
from parallel_orm.options import from_settings
from parallel_orm.task import Job, see_off
from parallel_orm.workers import all_of

#: Seconds that the end of the interpreter waits for calls that are still running, which have been cancelled by then.
PATIENCE = 5.0

_logger = logging.getLogger("parallel_orm")

#: What a thread calls, with the pool that it is of.
Call = Callable[["BackgroundThreads"], object]


class BackgroundThreads:
    """Threads that call what is put to them, first come, first served, and tell how much is asked of them.

    Made one by one, as they are needed. They are daemons: a query that nobody can cancel does not keep the interpreter
    from ending. (An executor of the standard library makes a future of each call, which nobody would look at here, and
    takes ten times as long to be given it.)
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._calls: SimpleQueue[Call | None] = SimpleQueue()
        # Of each thread: whether the call that it is at has been counted as done.
        self._state = threading.local()
        self._threads: list[threading.Thread] = []
        # Guards what is below.
        self._lock = threading.Lock()
        # Calls that were put and are not done. (The queue alone has none that an idle thread is just about to take.)
        self._asked = 0
        self._is_closed = False

    @property
    def are_busy(self) -> bool:
        """Whether something waits for one of them."""
        return self._asked > self.number

    @property
    def are_swamped(self) -> bool:
        """Whether for each of them something waits already: what comes now is needed before its turn comes."""
        return self._asked >= 2 * self.number

    def put(self, call: Call) -> None:
        """Have this called soon, by one of the threads, with this pool; what it raises is logged.

        :raises RuntimeError: there are no threads any more, or yet: the interpreter ends.
        """
        with self._lock:
            if self._is_closed:
                raise RuntimeError("these threads are about to end")
            if len(self._threads) <= self._asked and len(self._threads) < self.number:
                self._start_one()
            self._asked += 1
        self._calls.put(call)

    def count_as_done(self) -> None:
        """Count the call that this thread is at as done: it is about to tell somebody, who may want the thread."""
        if not self._state.is_counted:
            self._state.is_counted = True
            with self._lock:
                self._asked -= 1

    def close(self) -> None:
        """Have the threads end when they have done what was put to them."""
        with self._lock:
            self._is_closed = True
            for _ in self._threads:
                self._calls.put(None)

    def join(self, timeout: float) -> None:
        """Wait until they have ended, so many seconds at most."""
        end = monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, end - monotonic()))

    def _start_one(self) -> None:
        name = f"{THREADS}read_{len(self._threads)}"
        thread = threading.Thread(target=self._work, name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError:  # as many as the system allows, or the interpreter ends
            if not self._threads:
                raise
        else:
            self._threads.append(thread)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            self._state.is_counted = False
            try:
                call(self)
            except BaseException:
                _logger.critical("a background thread was handed something that failed", exc_info=True)
            del call  # else it is kept until the next one comes
            self.count_as_done()


# Guards the pool below: two threads that need it first must not make two.
_lock = threading.Lock()
_pool: BackgroundThreads | None = None


def background_threads() -> BackgroundThreads:
    """Return the pool that background reads run on, with as many threads as ``THREADS`` says; made at first use.

    A pool of another size than asked for (the setting was changed, in a test) is left to finish what it has.
    """
    global _pool
    pool, size = _pool, from_settings().THREADS
    if pool is not None and pool.number == size:
        return pool
    with _lock:
        if _pool is None or _pool.number != size:
            if _pool is not None:
                _pool.close()
            _pool = BackgroundThreads(size)
        return _pool


@contextmanager
def call_threads(number: int) -> Iterator[ThreadPoolExecutor]:
    """Have a pool for one map. Its threads are its own, so that a long map does not keep a page's reads waiting."""
    threads, process = ThreadPoolExecutor(number, thread_name_prefix=f"{THREADS}map"), os.getpid()
    try:
        yield threads
    finally:
        threads.shutdown(wait=may_wait(process))


def in_each(threads: ThreadPoolExecutor, number: int, job: Job, *, wait: bool) -> Iterator[Any]:
    """See the workers of a call off, each in its own thread; yield what their hooks return, to who may ``wait``."""
    if job.crew is None or job.crew.end_hook is None:
        return iter(())
    # As each waits for the others, each has a thread of its own.
    together = threading.Barrier(number)

    def leave() -> list[Any]:
        together.wait()
        return job.capsule.run(see_off, job, crew.leave)

    crew, futures = job.crew, []
    try:
        futures = [threads.submit(leave) for _ in range(number)]
    except BaseException:
        together.abort()
        raise
    return all_of(future.result for future in (futures if wait else ()))


def _leave() -> None:
    """At the end of the interpreter."""
    if _pool is not None:
        _pool.close()
        _pool.join(PATIENCE)


def _forget() -> None:
    """In a forked child: the threads were left behind in the parent."""
    global _pool, _lock
    _lock, _pool = threading.Lock(), None


atexit.register(_leave)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
