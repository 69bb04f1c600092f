"""A parcel: a job as it travels to another process, and what is done with it there."""

from __future__ import annotations

import importlib
import io
import os
import pickle
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol
from uuid import uuid4

import cloudpickle
from django.db.backends.base.base import BaseDatabaseWrapper
from django.utils.connection import ConnectionProxy

from parallel_orm import errors, workers
from parallel_orm.capsule import World
from parallel_orm.chunks import Chunk
from parallel_orm.connections import interrupt, lender
from parallel_orm.opened import Opened
from parallel_orm.outcomes import Outcome, note
from parallel_orm.task import Job, Task, see_off
from parallel_orm.work import name_of
from parallel_orm.workers import as_worker


class Packet(Protocol):
    """A job that is yet to be opened, where it has travelled to."""

    def open(self) -> Job:
        """Return the job, ready to be done here; raise what stands in the way of that."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """A job as it travels to another process: packed once a call, opened once a worker."""

    world: bytes
    job: bytes
    #: What it is called on the way, unique among all machines: their processes may share those of an executor.
    name: str = field(default_factory=lambda: uuid4().hex)

    @classmethod
    def of(cls, job: Job) -> Parcel:
        """Pack a job; raise :class:`~parallel_orm.errors.NotPicklable` naming what cannot travel."""
        try:
            data = dumps(job)
        except Exception as error:
            if guilty := that_cannot_travel(job, dumps):
                raise errors.function_not_picklable(guilty[0], error) from error
            raise errors.queryset_not_picklable(job.label, error) from error
        return cls(dumps(World.of_caller()), data)

    def open(self) -> Job:
        """Return the job, in a process that is a Django process from now on."""
        opened = _opened.get(self.name)
        if opened is None:
            try:
                world: World = pickle.loads(self.world)
                world.enter()
                opened = pickle.loads(self.job)
            except Exception as error:  # Django cannot be set up twice, so it is not tried again
                opened = error
            _opened.keep(self.name, opened, len(self.job))
            if workers.slot is None:  # it is of somebody else's executor: those of ours are told when calls end
                _opened.forget_oldest()
        if isinstance(opened, Exception):
            raise opened
        return opened


_opened: Opened[Job | Exception] = Opened()


_BY_NAME = (("django.conf", "settings"), ("django.db", "connections"), ("django.core.cache", "caches"))


class JobPickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Sends by their names what a function of ``__main__`` brings along of Django: settings, connections, caches."""

    def reducer_override(self, obj: Any) -> Any:
        for module, name in _BY_NAME:
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


def that_cannot_travel(job: Job, write: Callable[[Any], bytes]) -> list[Any]:
    """Return those functions of a job that cannot be written down so."""

    def can_travel(function: Any) -> bool:
        try:
            write(function)
        except Exception:
            return False
        return True

    return [function for function in job.functions if not can_travel(function)]


def run_parcel(parcel: Packet, chunk: Chunk, *, rests: bool = False) -> Outcome:
    """Do one chunk of a job in a worker process; value and error come back packed.

    Afterwards it ``rests``, and closes its connections, where nobody would tell it to at the end of the call.
    """
    try:
        job = parcel.open()
        outcome = job.capsule.run(_run_in_process, job, chunk)
        return outcome if chunk.items is None else replace(outcome, chunk=chunk.light)
    except Exception as error:
        note(error, f"{chunk} was not begun, its worker could not be made ready")
        return Outcome(chunk.light, error=error, worker=str(os.getpid())).packed("the worker")
    finally:
        if rests:
            lender.close_idle()


def _run_in_process(job: Job, chunk: Chunk) -> Outcome:
    with as_worker(), lender.lent(chunk.alias, job.of(chunk).session) as wrapper:
        with nullcontext() if job.crew is None else job.crew.at_work():
            outcome = run_in_time(Task(job, chunk), wrapper) if job.timeout else Task(job, chunk).run_and_close(wrapper)
            # Packed within: a result may be a queryset, which asks the database when it is pickled.
            return outcome.packed(name_of(job.work))


def run_in_time(task: Task, wrapper: BaseDatabaseWrapper) -> Outcome:
    """Do it; when its time is over, have the database give up what it is at. Whoever waits ends the process then."""
    seconds = task.job.timeout
    assert seconds is not None
    over = threading.Event()

    def interrupt_query() -> None:
        over.set()
        with suppress(Exception):
            interrupt(wrapper)

    if workers.begins is not None:
        workers.begins()
    timer = threading.Timer(seconds, interrupt_query)
    timer.daemon = True
    timer.start()
    outcome = task.run_and_close(wrapper)
    timer.cancel()
    timer.join()  # else it may interrupt the next one
    if over.is_set() and not (outcome.error is None and task.job.work_is_kept):
        return replace(
            outcome,
            value=None,
            error=errors.ChunkTimedOut(seconds, task.chunk, task.job.of(task.chunk).label),
            stage="lost",
        )
    return outcome


def end_of_call(name: str) -> list[Any]:
    """In a worker process, where it has worked for a call: forget all of it; return what its ``end_hook`` returns."""
    job = _opened.pop(name)
    if not isinstance(job, Job) or job.crew is None:
        return []
    return job.capsule.run(see_off, job, job.crew.leave)
