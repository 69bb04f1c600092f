"""Chores: one thread of this process for what must not be done where it comes up, or not yet.

The garbage collector runs destructors at any moment, in any thread, within any lock that this thread holds. So a
destructor only says what is to be done. And what is due in some seconds, a deadline or a look for idle connections,
need not have a thread of its own until then.
"""

from __future__ import annotations

import atexit
import heapq
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from time import monotonic

Call = Callable[[], object]

#: Seconds of a wait, of which there may be another: some systems take no more.
MOST_SECONDS = 3600.0


class Due:
    """A call that is to be made at its time, unless it is cancelled before."""

    __slots__ = ("call", "time")

    def __init__(self, seconds: float, call: Call) -> None:
        self.time = monotonic() + seconds
        self.call: Call | None = call

    def cancel(self) -> None:
        """Have it not made, and let go of what it would need."""
        self.call = None

    def __lt__(self, other: Due) -> bool:
        return self.time < other.time


class Chores:
    """The thread, made when it may be needed first, and what it is asked for. None of it may take long."""

    def __init__(self) -> None:
        # The one queue into which a destructor may put something.
        self._asked: SimpleQueue[Call | Due] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._has_left = False

    def attend(self) -> None:
        """Be there from now on. Not from a destructor."""
        if self._thread is not None:
            return
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._work, name="parallel_orm-chores", daemon=True)
                with suppress(RuntimeError):  # no new threads while the interpreter ends
                    thread.start()
                    self._thread = thread

    def call(self, function: Call) -> None:
        """Have this called soon, in its thread; at the end of the interpreter at once."""
        self._asked.put(function)
        if self._has_left:
            self.leave()

    def call_later(self, seconds: float, function: Call) -> Due:
        """Have this called in so many seconds, in its thread; not at all if the interpreter ends before."""
        self.attend()
        due = Due(seconds, function)
        self._asked.put(due)
        return due

    def leave(self) -> None:
        """Do what is left; at the end of the interpreter."""
        self._has_left = True
        with suppress(Empty):
            while True:
                asked = self._asked.get_nowait()
                if not isinstance(asked, Due):
                    _do(asked)

    def _work(self) -> None:
        waiting: list[Due] = []
        bound = 64
        while True:
            asked: Call | Due | None = None
            with suppress(Empty):
                wait = min(max(0.0, waiting[0].time - monotonic()), MOST_SECONDS) if waiting else None
                asked = self._asked.get(timeout=wait)
            if isinstance(asked, Due):
                heapq.heappush(waiting, asked)
                if len(waiting) > bound:  # most deadlines are met, long before they come
                    waiting = [due for due in waiting if due.call is not None]
                    heapq.heapify(waiting)
                    bound = 64 + 2 * len(waiting)
            elif asked is not None:
                _do(asked)
            asked = None  # else it is kept until the next one comes
            while waiting and waiting[0].time <= monotonic():
                if (call := heapq.heappop(waiting).call) is not None:
                    _do(call)
                del call


def _do(function: Call) -> None:
    with suppress(Exception):  # of a logging handler, or while the interpreter ends
        function()


chores = Chores()
atexit.register(chores.leave)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=chores.__init__)  # type: ignore[misc]
