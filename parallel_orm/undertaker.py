"""The undertaker: a thread that does what a destructor must not do itself.

The garbage collector runs destructors at any moment, in any thread, within any lock that this thread holds. So a
destructor only says what is to be done.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue


class Undertaker:
    """One thread of a process, made when it may be needed first, for the calls that destructors ask for."""

    def __init__(self) -> None:
        # The one queue into which a destructor may put something.
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._has_left = False

    def attend(self) -> None:
        """Be there from now on. Not from a destructor."""
        if self._thread is not None:
            return
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._work, name="parallel_orm-undertaker", daemon=True)
                with suppress(RuntimeError):  # no new threads while the interpreter ends
                    thread.start()
                    self._thread = thread

    def call(self, function: Callable[[], None]) -> None:
        """Have this called soon, in its thread; at the end of the interpreter at once."""
        self._calls.put(function)
        if self._has_left:
            self.leave()

    def leave(self) -> None:
        """Do what is left; at the end of the interpreter."""
        self._has_left = True
        with suppress(Empty):
            while True:
                _do(self._calls.get_nowait())

    def _work(self) -> None:
        while True:
            function = self._calls.get()
            _do(function)
            del function  # else it is kept until the next one comes


def _do(function: Callable[[], None]) -> None:
    with suppress(Exception):  # of a logging handler, or while the interpreter ends
        function()


undertaker = Undertaker()
atexit.register(undertaker.leave)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=undertaker.__init__)  # type: ignore[misc]
