"""A task: one chunk and what to do with it. :meth:`Task.run` is all that a worker does."""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from time import time
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import QuerySet

from parallel_orm import errors
from parallel_orm.capsule import Capsule, Locale
from parallel_orm.chunks import Chunk
from parallel_orm.connections import lender
from parallel_orm.faults import Fault
from parallel_orm.keyset import Key, Keyset
from parallel_orm.outcomes import Outcome, Stopwatch, note
from parallel_orm.session import NOTHING, Session
from parallel_orm.watch import watch_of
from parallel_orm.work import ByPart, Done, Stop, Work, name_of
from parallel_orm.workers import Crew, as_worker

Rows = QuerySet[Any, Any]


def is_in_transaction(wrapper: BaseDatabaseWrapper) -> bool:
    """Tell whether a connection is in a transaction; of MySQL, whose drivers do not tell, in one of Django's own."""
    if wrapper.vendor != "mysql":
        return watch_of(wrapper).in_transaction
    return wrapper.connection is not None and (wrapper.in_atomic_block or not wrapper.autocommit)


@dataclass(frozen=True)
class Job:
    """What all tasks of one call have in common."""

    #: What the chunks are parts of. Nobody else has this queryset, and nobody evaluates it.
    queryset: Rows
    work: Work | ByPart
    keyset: Keyset | None = None
    #: The key of a row, where what is left of a chunk begins behind the last row that is done.
    key_of: Callable[[Any], Key] | None = None
    #: What a worker's connection must be given.
    session: Session = NOTHING
    #: Who works for the call, where that may be more than one.
    crew: Crew | None = None
    #: Seconds that a chunk may take.
    timeout: float | None = None
    #: The jobs of the other plans of the call.
    others: tuple[Job, ...] = ()
    #: What a test has happen to its chunks.
    faults: tuple[Fault, ...] = ()
    capsule: Capsule | Locale = field(default_factory=Capsule)
    #: How its threads are stopped. It does not travel.
    stop: Stop | None = None
    #: Whether a chunk is done for what that does, so that it is not left to itself; and whether one that a lost worker
    #: had begun may be done by another, without the caller's sending it again. These do not travel either.
    has_effects: bool = False
    may_repeat: bool = True

    def of(self, chunk: Chunk) -> Job:
        """Return the job that a chunk is of."""
        return self if chunk.plan == 0 else self.others[chunk.plan - 1]

    @property
    def label(self) -> str:
        return str(self.queryset.model._meta.label)

    def place_of(self, chunk: Chunk) -> str:
        """Return what a chunk is of, for a message; with its database, if the call is over several."""
        label, mine = self.of(chunk).label, self.queryset.db
        is_over_several = any(each.queryset.db != mine for each in self.others)
        return f"{label} on {chunk.alias!r}" if is_over_several else label

    @property
    def functions(self) -> list[Any]:
        """The user's own that it calls."""
        found = [] if self.crew is None else [self.crew.init_hook, self.crew.end_hook]
        return found + getattr(self.work, "functions", [])

    @property
    def work_is_kept(self) -> bool:
        """Whether what was done stays done, whatever becomes of its outcome."""
        return bool(getattr(self.work, "commits", False))

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickling a QuerySet runs it, so its parts travel instead.
        state = self.queryset.__dict__
        return _rebuild_job, (
            type(self.queryset),
            state,
            self.work,
            self.keyset,
            self.key_of,
            self.session,
            self.crew,
            self.timeout,
            self.others,
            self.faults,
            self.capsule,
        )


def _rebuild_job(queryset_class: type[Rows], state: dict[str, Any], *parts: Any) -> Job:
    queryset = queryset_class.__new__(queryset_class)
    queryset.__dict__.update(state)
    return Job(queryset, *parts)


def at(queryset: Rows, alias: str) -> Rows:
    """Return a copy of a queryset, a raw one too, that asks this database whatever a router says later."""
    copy = queryset.using(alias)
    # A raw queryset forgets its prefetches here.
    copy._prefetch_related_lookups = queryset._prefetch_related_lookups  # type: ignore[attr-defined]
    return copy


@dataclass(frozen=True, slots=True)
class Task:
    """One chunk of a job, in the process that made the job."""

    job: Job
    chunk: Chunk

    def run(self) -> Outcome:
        """Do it here and now, on this thread's own connections."""
        chunk, clock, began = self.chunk, Stopwatch(), time()
        job = self.job.of(chunk)
        worker = f"{os.getpid()}/{threading.current_thread().name}"
        try:
            for fault in self.job.faults:
                fault(chunk)
            # A whole chunk is alone in its job, and the queryset is nobody else's: no copy is needed.
            rows = job.queryset if chunk.is_whole else chunk.narrow(at(job.queryset, chunk.alias), job.keyset)
            if hasattr(job.work, "part"):
                done = job.work.part(rows, clock, chunk, job.key_of, self.job.stop)
                for each in done.failed:  # or the traceback of each, in a thread, keeps all rows of its chunk
                    traceback.clear_frames(each.error.__traceback__)  # type: ignore[union-attr]
            else:
                done = Done(*job.work(rows, clock))
        except BaseException as error:
            if not chunk.is_whole:
                note(error, f"in {chunk} of {self.job.place_of(chunk)}")
            stage = clock.stage or "database"
            return Outcome(
                chunk,
                error=error,
                timings=clock.timings,
                worker=worker,
                began=began,
                stage=stage,
                key=clock.key,
                failed_place=clock.place,
                committed=clock.committed,
            )
        return Outcome(
            chunk,
            done.value,
            done.error,
            done.rows,
            done.skipped,
            done.rest,
            clock.timings,
            worker,
            began,
            clock.stage,
            failed=done.failed,
            retries=done.retries,
            keys=done.keys,
            counts=done.counts,
            done_before=done.done_before,
            committed=done.error is not None,
        )

    def run_and_close(self, wrapper: BaseDatabaseWrapper) -> Outcome:
        """Do it on a lent connection; a transaction that it leaves open there is rolled back, and no success."""
        was_open = is_in_transaction(wrapper)
        outcome = self.run()
        if outcome.error is not None or was_open or not is_in_transaction(wrapper):
            return outcome
        error = errors.left_a_transaction(name_of(self.job.work))
        note(error, f"in {self.chunk} of {self.job.place_of(self.chunk)}")
        return replace(outcome, value=None, error=error, failed=(), rest=None)

    def run_in_thread(self) -> Outcome:
        """Do it in another thread than the caller's: in a copy of the caller's context, on a lent connection."""
        return self.job.capsule.run(self._run_on_lent_connection)

    def _run_on_lent_connection(self) -> Outcome:
        crew, stop = self.job.crew, self.job.stop
        with as_worker(), lender.lent(self.chunk.alias, self.job.of(self.chunk).session) as wrapper:
            if stop is not None:
                stop.wrappers.add(wrapper)
            try:
                with nullcontext() if crew is None else crew.at_work():
                    return self.run_and_close(wrapper)
            finally:
                if stop is not None:
                    stop.wrappers.discard(wrapper)


def see_off(job: Job, leave: Callable[[], list[Any]]) -> list[Any]:
    """Have workers leave as they worked: on a lent connection."""
    with as_worker(), lender.lent(job.queryset.db, job.session):
        return leave()
