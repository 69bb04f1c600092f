"""Keeps a fork of this process apart from what other threads do for this library just then.

What a thread holds at the moment of a fork stays held in the child, where nobody is left to release it. Python renews
its own locks there and we renew ours, but nobody renews those of a database driver (all connections to SQLite share one
for its memory: a child of an unlucky moment can never open another) and some of :mod:`multiprocessing`. So a fork waits
until they are free, and who would take them waits for the fork.
"""

from __future__ import annotations

import os
import threading

#: Seconds that a fork waits at most: a query may take its time, or wait for what the forking thread has locked.
PATIENCE = 1.0


class Gate:
    """Lets through either forks or what must not be forked; no thread waits for itself.

    Within ``with gate:`` no other thread forks. Each side says first that it is there and looks then for the other, so
    that passing takes no lock while nobody forks.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        #: How often each thread has entered.
        self._inside: dict[int, int] = {}
        self._forking: set[int] = set()

    def __enter__(self) -> None:
        me = threading.get_ident()
        depth = self._inside.get(me, 0)
        self._inside[me] = depth + 1
        while depth == 0 and self._forking and not self._forking <= {me}:
            self._leave(me)
            with self._changed:
                self._changed.wait_for(lambda: self._forking <= {me})
            self._inside[me] = 1

    def __exit__(self, *exc_info: object) -> None:
        me = threading.get_ident()
        depth = self._inside.get(me, 0)
        if depth > 1:
            self._inside[me] = depth - 1
        else:
            self._leave(me)

    def _leave(self, me: int) -> None:
        self._inside.pop(me, None)
        if self._forking:
            with self._changed:
                self._changed.notify_all()

    def before_fork(self) -> None:
        me = threading.get_ident()
        with self._changed:
            self._forking.add(me)
            self._changed.wait_for(lambda: set(self._inside) <= {me}, PATIENCE)

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
