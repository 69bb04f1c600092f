"""Who does the work: finds or makes a :class:`concurrent.futures.Executor`.

Any object with ``submit`` is an executor; there is no base class of ours. A :class:`Workers` is what one call has of
one: how many tasks it takes at once, and how a chunk is sent to it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from parallel_orm import errors
from parallel_orm.chunks import Chunk
from parallel_orm.connections import under_test
from parallel_orm.errors import is_of_a_worker
from parallel_orm.executors.choice import Choice
from parallel_orm.executors.inline import InlineExecutor
from parallel_orm.executors.processes import process_pool
from parallel_orm.executors.threads import call_threads, in_each
from parallel_orm.leaving import may_wait
from parallel_orm.letters import Letter, run_letter
from parallel_orm.options import from_settings
from parallel_orm.outcomes import Outcome, note, packing
from parallel_orm.parcels import Parcel, run_parcel
from parallel_orm.task import Job, Task, see_off
from parallel_orm.work import Stop, name_of
from parallel_orm.workers import all_of

#: Tasks out for each worker: one at work, one in its inbox, and some whose results wait for an earlier one.
TASKS_PER_WORKER = 4

_logger = logging.getLogger("parallel_orm")


@dataclass(frozen=True, slots=True)
class Workers:
    """What one call has of an executor."""

    #: Sends a chunk on its way. The future always has an outcome, unless the worker itself was lost.
    send: Callable[[Chunk], Future[Outcome]]
    #: How many tasks may be out: sent, and their outcomes not yet passed on.
    window: int
    #: How many tasks are worked on at once.
    number: int = 1
    #: Does a chunk here that nobody has begun, where whoever waits can do so.
    steal: Callable[[Chunk], Outcome] | None = None

    @classmethod
    def so_many(
        cls,
        number: int,
        send: Callable[[Chunk], Future[Outcome]],
        steal: Callable[[Chunk], Outcome] | None = None,
    ) -> Workers:
        return cls(send, number * TASKS_PER_WORKER, number, steal)


@contextmanager
def workers_for(job: Job, choice: Choice, end_results: list[Any], *, inline: str | None = None) -> Iterator[Workers]:
    """Have workers for the length of one call; at its end, add to ``end_results`` what its ``end_hook`` returns.

    ``inline``, a reason, keeps the work on the caller's thread and connection. What would have travelled to a process
    is packed and opened all the same, so that a test finds what cannot travel.
    """
    process = os.getpid()
    if choice.kind == "inline" or (inline is not None and choice.is_threads):
        with inline_workers(job, end_results) as workers:
            yield workers
    elif inline is not None:
        with rehearsing(job, choice, end_results) as workers:
            yield workers
    elif choice.kind == "threads":
        job = replace(job, stop=Stop())
        with (
            call_threads(choice.number) as threads,
            ending(lambda: in_each(threads, choice.number, job, wait=may_wait(process)), end_results),
            stopping(job),
        ):
            yield Workers.so_many(choice.number, lambda chunk: threads.submit(run_in_thread, job, chunk))
    elif choice.kind == "processes":
        parcel = Parcel.of(job)
        with process_pool(choice.number, from_settings().START_METHOD) as pool:

            def end() -> Iterator[Any]:
                has_hook = job.crew is not None and job.crew.end_hook is not None
                at_rest, at_work = pool.end(parcel, has_hook=has_hook, wait=may_wait(process))
                if not has_hook:
                    at_work = []  # which need not be waited for
                return all_of(future.result for future in (*at_rest, *at_work))

            with ending(end, end_results):
                yield Workers.so_many(
                    choice.number, lambda chunk: pool.submit_within(job.timeout, run_parcel, parcel, chunk)
                )
    elif choice.kind == "engine":
        with choice.executor(waits=job.has_effects) as executor:
            if not (executor.supports_answers or (job.has_effects and not job.work_is_kept)):
                raise errors.no_answers()
            letter = Letter.of(job, by_value=executor.supports_by_value, engine=choice.name)
            run = run_letter if job.may_repeat else executor.once(run_letter)
            rests = under_test()
            yield Workers.so_many(executor.number, lambda chunk: executor.submit(run, letter, chunk, rests=rests))
    else:
        with choice.executor() as executor:
            if choice.is_threads:
                job = replace(job, stop=Stop())
                with ending(lambda: all_leave(job), end_results), stopping(job):
                    yield Workers.so_many(
                        choice.number,
                        lambda chunk: executor.submit(run_in_thread, job, chunk),
                        lambda chunk: run_in_thread(job, chunk),
                    )
            else:
                # Idle connections are closed in time, but not before a test drops its database.
                parcel, rests = Parcel.of(job), under_test()
                yield Workers.so_many(
                    choice.number, lambda chunk: executor.submit(run_parcel, parcel, chunk, rests=rests)
                )


@contextmanager
def ending(end: Callable[[], Iterable[Any]], end_results: list[Any]) -> Iterator[None]:
    """Afterwards have the workers end what they did for a call, however it ended; not where they were interrupted, and
    not in a forked child, whose parent has them.
    """
    process = os.getpid()
    try:
        yield
    except BaseException as error:
        if os.getpid() != process or (isinstance(error, KeyboardInterrupt) and not is_of_a_worker(error)):
            raise
        try:
            end_results.extend(end())
        except Exception as another:
            _logger.exception("the end_hook of a call that failed has failed too")
            note(error, f"its end_hook raised {another!r}")
        raise
    if os.getpid() == process:
        end_results.extend(end())


@contextmanager
def stopping(job: Job) -> Iterator[None]:
    """Where the caller is interrupted, have its threads leave off at their next row, and their queries cancelled."""
    try:
        yield
    except KeyboardInterrupt:
        if job.stop is not None:
            job.stop.set()
        raise


def run_in_thread(job: Job, chunk: Chunk) -> Outcome:
    return Task(job, chunk).run_in_thread().traced()


def all_leave(job: Job) -> Iterator[Any]:
    if job.crew is None or job.crew.end_hook is None:
        return iter(())
    return all_of(partial(job.capsule.run, see_off, job, leave) for leave in job.crew.each_leaves())


@contextmanager
def inline_workers(job: Job, end_results: list[Any]) -> Iterator[Workers]:
    """Have the caller's own thread and connection as the only worker, one chunk at a time."""
    with here(job, end_results, lambda chunk: Task(job, chunk).run()) as workers:
        yield workers


@contextmanager
def rehearsing(job: Job, choice: Choice, end_results: list[Any]) -> Iterator[Workers]:
    """Have the caller's thread as the only worker, and send everything to it as if it were another process."""
    as_json = choice.kind == "engine" and not choice.source.travels_by_value(choice.arguments)
    opened = Letter.of(job, by_value=False, engine=choice.name).open() if as_json else Parcel.of(job).open()

    def run(chunk: Chunk) -> Outcome:
        with packing(as_json=as_json):
            return Task(opened, chunk).run().packed(name_of(job.work))

    with here(opened, end_results, run) as workers:
        yield workers


@contextmanager
def here(job: Job, end_results: list[Any], run: Callable[[Chunk], Outcome]) -> Iterator[Workers]:
    executor: Executor = InlineExecutor()

    def at_work(chunk: Chunk) -> Outcome:
        if job.crew is None:
            return run(chunk)
        with job.crew.at_work():
            return run(chunk)

    with ending(lambda: [] if job.crew is None else all_of(job.crew.each_leaves()), end_results):
        yield Workers(lambda chunk: executor.submit(at_work, chunk), window=1)
