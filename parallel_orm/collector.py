"""Python's cyclic collector, paused for the moment in which many objects are made that all stay."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

from parallel_orm.options import from_settings

_lock = Lock()
_pauses = 0
_was_on = False


@contextmanager
def paused() -> Iterator[None]:
    """Within: no collection, in any thread. Short, please; nested and at once in several threads, if need be.

    Left off for whoever had it off, and where the setting ``PAUSE_GC`` is False nothing happens at all.
    """
    global _pauses, _was_on
    if not from_settings().PAUSE_GC:
        yield
        return
    with _lock:
        if not _pauses:
            _was_on = gc.isenabled()
            gc.disable()
        _pauses += 1
    try:
        yield
    finally:
        with _lock:
            _pauses -= 1
            if not _pauses and _was_on:
                gc.enable()


def forget() -> None:
    """In a forked child: whoever had paused it is not here."""
    global _lock, _pauses
    _lock = Lock()
    if _pauses and _was_on:
        gc.enable()
    _pauses = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=forget)
