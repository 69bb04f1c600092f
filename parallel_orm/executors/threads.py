"""Threads: one lasting pool for background reads, one for the length of each map that asks for threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from parallel_orm.options import from_settings


class BackgroundThreads(ThreadPoolExecutor):
    """Threads that tell how much is asked of them."""

    def __init__(self, number: int) -> None:
        super().__init__(number, thread_name_prefix="parallel_orm-read")
        self._number = number
        # What was submitted and is not done. (The queue alone would count what an idle thread is just about to take.)
        self._asked = 0
        self._counting = threading.Lock()

    @property
    def are_busy(self) -> bool:
        """Whether something waits for one of them."""
        return self._asked > self._number

    @property
    def are_swamped(self) -> bool:
        """Whether for each of them something waits already: what comes now is needed before its turn comes."""
        return self._asked >= 2 * self._number

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self._count(1)
        try:
            return super().submit(self._counted, fn, *args, **kwargs)
        except RuntimeError:
            self._count(-1)
            raise

    def _counted(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        try:
            return fn(*args, **kwargs)
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        with self._counting:
            self._asked += change


# Guards the pool below: two threads that need it first must not make two.
_lock = threading.Lock()
_pool: tuple[int, BackgroundThreads] | None = None


def background_threads() -> BackgroundThreads:
    """Return the pool that background reads run on, with as many threads as ``THREADS`` says; made at first use.

    A pool of another size than asked for (the setting was changed, in a test) is left to finish what it has.
    """
    global _pool
    size = from_settings().THREADS
    with _lock:
        if _pool is None or _pool[0] != size:
            if _pool is not None:
                _pool[1].shutdown(wait=False)
            _pool = size, BackgroundThreads(size)
        return _pool[1]


def call_threads(number: int) -> ThreadPoolExecutor:
    """Return a pool for one map. Its threads are its own, so that a long map does not keep a page's reads waiting."""
    return ThreadPoolExecutor(number, thread_name_prefix="parallel_orm-map")


def _forget() -> None:
    """In a forked child: the threads were left behind in the parent."""
    global _pool, _lock
    _lock, _pool = threading.Lock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
