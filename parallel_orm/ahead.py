"""The next chunk of a walk, read in the background while the rows of the last one are used.

It must be what the caller's own connection would have read when the chunk is asked for. So it is read again there if
the caller has said anything on that connection meanwhile but reads, or has begun a transaction, or is another thread by
now; and it is not read ahead at all where a background read would have to stay on the caller's connection.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from threading import Event
from time import perf_counter, thread_time
from typing import Any

from django.db import connections

from parallel_orm import guards
from parallel_orm.background import start_read
from parallel_orm.bonds import FREE, bonds_of
from parallel_orm.chunks import Chunk
from parallel_orm.connections import may_be_kept
from parallel_orm.cutting import whole
from parallel_orm.outcomes import Stopwatch
from parallel_orm.plan import Plan
from parallel_orm.rows import Opened, Unmade, is_read_as_djangos, listed, read
from parallel_orm.session import NOTHING, Session
from parallel_orm.task import Job, Task
from parallel_orm.watch import watch_of

#: Seconds that a thread costs: what reading ahead gains must be more.
COST = 0.0003
#: How much longer than it is busy something takes that never waits, on a machine that others use too.
BUSY = 1.25
#: Seconds that a thread is waited for, to send its query.
MOMENT = 0.001


class Effort(AbstractContextManager[None]):
    """How long something took, the last time; and for how much of that this thread was busy, and did not wait."""

    def __init__(self, *, is_busy: bool = False) -> None:
        self.seconds = self.busy = 0.0
        #: Whether it is known to be busy all the time.
        self._is_busy = is_busy

    def __enter__(self) -> None:
        self._began, self._busy = perf_counter(), thread_time()

    def __exit__(self, *exc_info: object) -> None:
        self.took(perf_counter() - self._began, thread_time() - self._busy)

    def took(self, seconds: float, busy: float) -> None:
        # On a machine that others use too, whoever is busy waits now and then. Another thread may have gone on with it.
        self.seconds, self.busy = seconds, seconds if self._is_busy else min(max(busy * BUSY, 0.0), seconds)


def helps(reading: Effort, using: Effort) -> bool:
    """Tell whether to read a chunk while the last one is used: it gains what one of them waits and the other is busy.

    Python is busy in one thread at a time, so both at once take at least as long as they are busy together.
    """
    both = max(reading.busy + using.busy, reading.seconds, using.seconds)
    return reading.seconds + using.seconds - both > COST


def is_idle(reading: Effort, using: Effort) -> bool:
    """Tell whether whoever uses a chunk waits meanwhile for as long as it is work to read the next one."""
    return using.seconds - using.busy > reading.busy


def may_read_ahead(plan: Plan) -> bool:
    """Tell whether another connection would read what the caller's would."""
    if plan.consistent or bonds_of(plan.queryset) is not FREE:
        return False
    stay, _ = guards.where_to_read(plan.alias)
    return stay is None and not watch_of(connections[plan.alias]).in_transaction


class Opening:
    """Work of a background read: run the query, and leave as much of the rest as can be to whoever uses the rows.

    psycopg has the whole answer then, and needs an open connection, but none of its own, to make tuples of it. Done by
    the thread that makes rows of them, that does not have two threads in each other's way; unless that one is ``idle``.
    """

    def __init__(self, *, idle: bool) -> None:
        self._idle = idle
        self._sent = Event()

    def __call__(self, rows: Any, clock: Stopwatch) -> tuple[Opened | list[Any], int]:
        if not is_read_as_djangos(rows) or rows._prefetch_related_lookups:
            self._sent.set()
            return listed(read(rows)), 0
        opened = Opened(rows, self._sent.set)
        wrapper = connections[rows.db]
        if self._idle or wrapper.vendor != "postgresql" or not may_be_kept(wrapper):
            opened.fetch()
        return opened, 0

    def wait(self) -> None:
        """Wait until the query is about to be sent, or for a moment.

        Whoever makes rows lets go of the interpreter a few milliseconds later, which is when a page is done.
        """
        self._sent.wait(MOMENT)


class Ahead:
    """One chunk on its way. Writes of the caller's tell it as they tell a read that they wait for."""

    session: Session = NOTHING

    def __init__(self, plan: Plan, chunk: Chunk, *, idle: bool = False) -> None:
        self._home: Any = connections[chunk.alias]
        self._alias = chunk.alias
        self._is_stale = False
        watch_of(self._home).add(self)  # before the read itself, which then need not be waited for
        opening = Opening(idle=idle)
        self._pending = start_read("chunk", Task(Job(plan.part(chunk), opening), whole(chunk.alias)))
        opening.wait()

    def done(self) -> bool:
        return self._is_stale

    def settle(self, *, wait: bool) -> None:
        """The caller is about to say something that is no read."""
        self._is_stale = True
        self.drop()

    def rows(self) -> Unmade | list[Any] | None:
        """Return the rows; None where they are to be read again, on the caller's connection."""
        home: Any = connections[self._alias]
        if self._is_stale or home is not self._home or watch_of(home).in_transaction:
            self.drop()
            return None
        try:
            opened = self._pending.result()
            return opened.rows() if isinstance(opened, Opened) else opened
        except Exception:  # of the other connection's, perhaps, which may be closed: the caller's own will tell
            return None

    def drop(self) -> None:
        """Nobody will want it."""
        self._pending.cancel()
