"""Who may wait for workers where a call is left half-way: not these themselves, and not a forked child.

A stream that nobody holds any more is closed in whichever thread notices. Where circles are collected that may be one
that does its work or hands out its outcomes, and would wait for itself; a child has none of the parent's threads.
"""

from __future__ import annotations

import os
import threading

#: How the names of all threads begin that this library starts.
THREADS = "parallel_orm-"


def may_wait(process: int) -> bool:
    """Tell whether this thread may wait for what was begun in this process, by its id."""
    return os.getpid() == process and not threading.current_thread().name.startswith(THREADS)
