"""Who does the work: finds or makes a :class:`concurrent.futures.Executor`.

Any object with ``submit`` is an executor; there is no base class of ours. A :class:`Workers` is what one call has of
one: how many tasks it takes at once, and how a chunk is sent to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass

from parallel_orm.chunks import Chunk
from parallel_orm.executors.inline import InlineExecutor
from parallel_orm.executors.processes import process_pool
from parallel_orm.executors.threads import call_threads
from parallel_orm.options import Options, from_settings
from parallel_orm.outcomes import Outcome
from parallel_orm.task import Job, Parcel, Task, name_of, run_parcel

#: Tasks out for each worker: one at work, one in its inbox, and some whose results wait for an earlier one.
TASKS_PER_WORKER = 4


@dataclass(frozen=True, slots=True)
class Workers:
    """What one call has of an executor."""

    #: Sends a chunk on its way. The future always has an outcome, unless the worker itself was lost.
    send: Callable[[Chunk], Future[Outcome]]
    #: How many tasks may be out: sent, and their outcomes not yet passed on.
    window: int
    #: How many tasks are worked on at once.
    number: int = 1

    @classmethod
    def so_many(cls, number: int, send: Callable[[Chunk], Future[Outcome]]) -> Workers:
        return cls(send, number * TASKS_PER_WORKER, number)


@contextmanager
def workers_for(job: Job, options: Options, *, inline: str | None = None) -> Iterator[Workers]:
    """Have workers for the length of one call.

    ``inline``, a reason, keeps the work on the caller's thread and connection. What would have travelled to a process
    is packed and opened all the same, so that a test finds what cannot travel.
    """
    if inline is not None:
        yield inline_workers(job) if options.threads is not None else rehearsing(job)
    elif options.threads is not None:
        with call_threads(options.threads) as threads:
            yield Workers.so_many(options.threads, lambda chunk: threads.submit(run_in_thread, job, chunk))
    else:
        assert options.processes is not None
        parcel = Parcel.of(job)
        with process_pool(options.processes, from_settings().START_METHOD) as pool:
            yield Workers.so_many(options.processes, lambda chunk: pool.submit(run_parcel, parcel, chunk))


def run_in_thread(job: Job, chunk: Chunk) -> Outcome:
    return Task(job, chunk).run_in_thread().traced()


def inline_workers(job: Job) -> Workers:
    """Have the caller's own thread and connection as the only worker, one chunk at a time."""
    executor: Executor = InlineExecutor()
    return Workers(lambda chunk: executor.submit(Task(job, chunk).run), window=1)


def rehearsing(job: Job) -> Workers:
    """Have the caller's thread as the only worker, and send everything to it as if it were another process."""
    executor: Executor = InlineExecutor()
    opened = Parcel.of(job).open()

    def run(chunk: Chunk) -> Outcome:
        return Task(opened, chunk).run().packed(name_of(job.work))

    return Workers(lambda chunk: executor.submit(run, chunk), window=1)
