"""A task: one chunk and what to do with it. :meth:`Task.run` is all that a worker does."""

from __future__ import annotations

import importlib
import io
import os
import pickle
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import count
from math import inf
from time import perf_counter
from typing import Any, Protocol

import cloudpickle
from django.db import connections
from django.db.models import QuerySet
from django.utils.connection import ConnectionProxy

from parallel_orm import errors
from parallel_orm.capsule import Capsule, Locale, World
from parallel_orm.chunks import Chunk, key_of_row
from parallel_orm.connections import lender
from parallel_orm.keeping import Keep, everything
from parallel_orm.keyset import Key, Keyset
from parallel_orm.outcomes import Outcome, Stopwatch, note
from parallel_orm.rows import listed, read
from parallel_orm.session import NOTHING, Session

Rows = QuerySet[Any, Any]

_in_worker: ContextVar[bool] = ContextVar("parallel_orm_in_worker", default=False)


def in_worker() -> bool:
    """Tell whether the caller is itself run by a worker of ours: a map that it starts then runs inline."""
    return _in_worker.get()


@contextmanager
def as_worker() -> Iterator[None]:
    token = _in_worker.set(True)
    try:
        yield
    finally:
        _in_worker.reset(token)


class Work(Protocol):
    """What is done with the rows of a chunk."""

    def __call__(self, rows: Rows, clock: Stopwatch, /) -> tuple[Any, int]:
        """Return the value of the chunk, and how many rows it read."""


def fetch(rows: Rows, clock: Stopwatch, snapshot: str | None = None) -> tuple[list[Any], int]:
    """The rows themselves, as a list; as of a snapshot that another connection holds, or of now."""
    with clock("database"), Session(snapshot=snapshot).restored(connections[rows.db], reading=True):
        fetched = listed(read(rows))
    return fetched, len(fetched)


@dataclass(frozen=True, slots=True)
class Done:
    """What a function made of a chunk, or of its first rows."""

    #: What was kept of its results.
    value: list[Any]
    #: Rows done.
    rows: int
    #: Results that were left out.
    skipped: int = 0
    #: What was left undone.
    rest: Chunk | None = None


@dataclass(frozen=True, slots=True)
class Apply:
    """A function's result for each row, or for all rows of the chunk as a list."""

    function: Callable[[Any], Any]
    keep: Keep = everything
    #: Whether results that are None are left out.
    skip_none: bool = False
    batched: bool = False
    #: Of what moment the rows are. The function itself sees now.
    snapshot: str | None = None

    def part(self, rows: Rows, clock: Stopwatch, chunk: Chunk, key_of: Callable[[Any], Key] | None) -> Done:
        """Do the chunk, or its first rows until its time is over.

        Where rows do not tell their keys, it takes the time it takes.
        """
        fetched, number = fetch(rows, clock, self.snapshot)
        take, kept = self.keep()
        function, skip_none, skipped = self.function, self.skip_none, 0
        if self.batched:
            keys = " to ".join(map(key_of_row, fetched[:1] + fetched[1:][-1:]))  # before the function changes them
            with clock("function"):
                try:
                    if fetched and not ((result := function(fetched)) is None and skip_none):
                        take(result)
                        return Done(kept, number)
                except BaseException as error:
                    note(error, f"at its batch of {number} rows, primary keys {keys}")
                    raise
            return Done(kept, number, skipped=number and 1)
        now, end, done = perf_counter, inf, 0
        # The key of the row at hand, if it was read before the function had the row, which may change it. That is so
        # for the first row, and when the time is over for one row more, which is then the last.
        last: Key | None = None
        if fetched and chunk.seconds is not None and key_of is not None:
            last = key_of(fetched[0])
            # What is left is read once more: not for less than it takes to read.
            end = now() + max(chunk.seconds, clock.seconds["database"])
        with clock("function"):
            try:
                for row in fetched:
                    result = function(row)
                    if result is None and skip_none:
                        skipped += 1
                    else:
                        take(result)
                    done += 1
                    if now() < end:
                        last = None
                    elif last is not None:
                        break
                    elif key_of is not None and done < number:
                        last = key_of(fetched[done])
            except BaseException as error:
                if done < number:  # else it was interrupted behind the last one
                    note(error, f"at row {done} of its chunk, primary key {key_of_row(fetched[done])}")
                raise
        left = fetched[done:]
        if not left or last is None or key_of is None:
            return Done(kept, done, skipped)
        return Done(kept, done, skipped, chunk.left(left, last, key_of))


@dataclass(frozen=True)
class Job:
    """What all tasks of one call have in common."""

    #: What the chunks are parts of. Nobody else has this queryset, and nobody evaluates it.
    queryset: Rows
    work: Work | Apply
    keyset: Keyset | None = None
    #: The key of a row, where what is left of a chunk begins behind the last row that is done.
    key_of: Callable[[Any], Key] | None = None
    #: What a worker's connection must be given.
    session: Session = NOTHING
    capsule: Capsule | Locale = field(default_factory=Capsule)

    @property
    def label(self) -> str:
        return str(self.queryset.model._meta.label)

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
        job, chunk, clock = self.job, self.chunk, Stopwatch()
        worker = f"{os.getpid()}/{threading.current_thread().name}"
        try:
            # A whole chunk is alone in its job, and the queryset is nobody else's: no copy is needed.
            rows = job.queryset if chunk.is_whole else chunk.narrow(at(job.queryset, chunk.alias), job.keyset)
            if isinstance(job.work, Apply):
                done = job.work.part(rows, clock, chunk, job.key_of)
            else:
                done = Done(*job.work(rows, clock))
        except BaseException as error:
            if not chunk.is_whole:
                note(error, f"in {chunk} of {job.label}")
            return Outcome(chunk, error=error, timings=clock.timings, worker=worker)
        return Outcome(chunk, done.value, None, done.rows, done.skipped, done.rest, clock.timings, worker)

    def run_in_thread(self) -> Outcome:
        """Do it in another thread than the caller's: in a copy of the caller's context, on a lent connection."""
        return self.job.capsule.run(self._run_on_lent_connection)

    def _run_on_lent_connection(self) -> Outcome:
        with as_worker(), lender.lent(self.chunk.alias, self.job.session):
            return self.run()


_parcel_numbers = count()


@dataclass(frozen=True, slots=True)
class Parcel:
    """A job as it travels to another process: packed once a call, opened once a worker."""

    world: bytes
    job: bytes
    #: What it is called on the way, unique among all processes of this machine.
    name: str = field(default_factory=lambda: f"{os.getpid()}.{next(_parcel_numbers)}")

    @classmethod
    def of(cls, job: Job) -> Parcel:
        """Pack a job; raise :class:`~parallel_orm.errors.NotPicklable` naming what cannot travel."""
        try:
            data = dumps(job)
        except Exception as error:
            if isinstance(job.work, Apply):
                for function in (job.work.function, getattr(job.work.keep, "combine", None)):
                    if not _is_picklable(function):
                        raise errors.function_not_picklable(function, error) from error
            raise errors.queryset_not_picklable(job.label, error) from error
        return cls(dumps(World.of_caller()), data)

    def open(self) -> Job:
        """Return the job, in a process that is a Django process from now on."""
        if self.name not in _opened:
            world: World = pickle.loads(self.world)
            world.enter()
            _opened[self.name] = pickle.loads(self.job)
            while len(_opened) > OPEN_PARCELS:
                _opened.popitem(last=False)
        return _opened[self.name]


#: Jobs that a worker process keeps unpacked: as many calls as are likely to share it at once.
OPEN_PARCELS = 4
_opened: OrderedDict[str, Job] = OrderedDict()


class JobPickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Sends Django's connections and caches, which a function of ``__main__`` brings along, by their names."""

    def reducer_override(self, obj: Any) -> Any:
        for module, name in (("django.db", "connections"), ("django.core.cache", "caches")):
            if obj is getattr(sys.modules.get(module), name, None):
                return getattr, (importlib.import_module(module), name)
        if type(obj) is ConnectionProxy:
            return ConnectionProxy, (obj.__dict__["_connections"], obj.__dict__["_alias"])
        return super().reducer_override(obj)


def dumps(value: object) -> bytes:
    """Pickle what goes to a worker, closures and functions of ``__main__`` by value."""
    file = io.BytesIO()
    JobPickler(file, pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()


def _is_picklable(value: object) -> bool:
    try:
        dumps(value)
    except Exception:
        return False
    return True


def run_parcel(parcel: Parcel, chunk: Chunk) -> Outcome:
    """Do one chunk of a job in a worker process; value and error come back packed."""
    try:
        job = parcel.open()
        return job.capsule.run(_run_in_process, job, chunk)
    except Exception as error:
        note(error, f"{chunk} was not begun, its worker could not be made ready")
        return Outcome(chunk, error=error, worker=str(os.getpid())).packed("the worker")


def _run_in_process(job: Job, chunk: Chunk) -> Outcome:
    with as_worker(), lender.lent(chunk.alias, job.session):
        # Packed within: a result may be a queryset, which asks the database when it is pickled.
        return Task(job, chunk).run().packed(name_of(job.work))


def name_of(work: Work | Apply) -> str:
    """Return what a message calls this work: the name of the user's function."""
    function = getattr(work, "function", work)
    return getattr(function, "__qualname__", None) or repr(function)
