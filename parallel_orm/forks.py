"""Keeps a fork of this process apart from what other threads do for this library just then.

What a thread holds at the moment of a fork stays held in the child, where nobody is left to release it. Python renews
its own locks there and we renew ours, but nobody renews those of a database driver (all connections to SQLite share one
for its memory: a child of an unlucky moment can never open another) and some of :mod:`multiprocessing`. So a fork waits
until they are free, and who would take them waits for the fork.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

#: Seconds that a fork waits at most: a query may take its time, or wait for what the forking thread has locked.
PATIENCE = 1.0


class Gate:
    """Lets through either forks or what must not be forked; no thread waits for itself."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside: set[int] = set()
        self._forking: set[int] = set()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within: no other thread forks."""
        me = threading.get_ident()
        if me in self._inside:
            yield
            return
        with self._changed:
            self._changed.wait_for(lambda: self._forking <= {me})
            self._inside.add(me)
        try:
            yield
        finally:
            with self._changed:
                self._inside.discard(me)
                self._changed.notify_all()

    def before_fork(self) -> None:
        me = threading.get_ident()
        with self._changed:
            self._forking.add(me)
            self._changed.wait_for(lambda: self._inside <= {me}, PATIENCE)

    def after_fork(self) -> None:
        with self._changed:
            self._forking.discard(threading.get_ident())
            self._changed.notify_all()

    def forget(self) -> None:
        """In a forked child: whoever was inside is not here."""
        self.__init__()  # type: ignore[misc]


gate = Gate()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=gate.before_fork, after_in_parent=gate.after_fork, after_in_child=gate.forget)
