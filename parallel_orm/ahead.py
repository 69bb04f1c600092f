"""The next chunk of a walk, read in the background while the rows of the last one are used.

It must be what the caller's own connection would have read when the chunk is asked for. So it is read again there if
the caller has said anything on that connection meanwhile but reads, or has begun a transaction, or is another thread by
now; and it is not read ahead at all where a background read would have to stay on the caller's connection.
"""

from __future__ import annotations

from typing import Any

from django.db import connections

from parallel_orm import guards
from parallel_orm.background import start_read
from parallel_orm.bonds import FREE, bonds_of
from parallel_orm.outcomes import Outcome
from parallel_orm.plan import Plan
from parallel_orm.session import NOTHING, Session
from parallel_orm.task import Task
from parallel_orm.watch import watch_of

#: The least part of the time of a read that the use of its rows must take for the next read to be worth a thread.
SHARE = 0.25


def helps(read: float, used: float) -> bool:
    """Tell whether to read ahead, from the seconds that the last chunk took to be read, and to be used."""
    return used > read * SHARE


def may_read_ahead(plan: Plan) -> bool:
    """Tell whether another connection would read what the caller's would."""
    if plan.consistent or bonds_of(plan.queryset) is not FREE:
        return False
    stay, _ = guards.where_to_read(plan.alias)
    return stay is None and not watch_of(connections[plan.alias]).in_transaction


class Ahead:
    """One chunk on its way. Writes of the caller's tell it as they tell a read that they wait for."""

    session: Session = NOTHING

    def __init__(self, task: Task) -> None:
        self.task = task
        self._home: Any = connections[task.chunk.alias]
        self._is_stale = False
        watch_of(self._home).add(self)  # before the read itself, which then need not be waited for
        self._pending = start_read("chunk", task)

    def done(self) -> bool:
        return self._is_stale

    def settle(self, *, wait: bool) -> None:
        """The caller is about to say something that is no read."""
        self._is_stale = True
        self.drop()

    def outcome(self) -> Outcome | None:
        """Return the chunk; None where it is to be read again, on the caller's connection."""
        home: Any = connections[self.task.chunk.alias]
        if self._is_stale or home is not self._home or watch_of(home).in_transaction:
            self.drop()
            return None
        try:
            rows = self._pending.result()
        except Exception:  # of the other connection's, perhaps: the caller's own will tell
            return None
        return Outcome(self.task.chunk, rows, rows=len(rows), rest=self.task.rest_behind(rows))

    def drop(self) -> None:
        """Nobody will want it."""
        self._pending.cancel()
