"""For tests of code that uses this library: other executors, faults on request, functions that are not safe.

Within Django's ``TestCase`` every map runs in the test's own process, on its connection, and packs and opens what would
have travelled. What is here goes further.
"""

from __future__ import annotations

import operator
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from django.db.models import QuerySet
from django.test.utils import TestContextDecorator

from parallel_orm import errors, faults, workers
from parallel_orm.chunks import Chunk
from parallel_orm.executors import choice
from parallel_orm.outcomes import PackedError, pack_error
from parallel_orm.safety import findings

__all__ = ["assert_parallel_safe", "fail_chunk", "kill_worker", "override_executor"]

Rows = QuerySet[Any, Any]


class override_executor(TestContextDecorator):
    """Have every parallel call use this executor, whatever it asks for: a context manager, and a decorator of functions
    and of ``TestCase`` classes. The innermost counts. Background reads are not concerned.

    :param executor: as the argument ``executor`` of ``parallel_map``. ``"inline"``: on the caller's connection, with
        nothing packed, so that a debugger stops in the function.
    """

    def __init__(self, executor: Any) -> None:
        super().__init__()
        self.executor = executor

    def enable(self) -> None:
        """Begin."""
        choice.overrides.append(self.executor)

    def disable(self) -> None:
        """End."""
        choice.overrides.pop()


class _Injected(TestContextDecorator):
    """Has a fault in every parallel call that is made within."""

    def __init__(self, fault: faults.Fault) -> None:
        super().__init__()
        self.fault = fault

    def enable(self) -> None:
        faults.active.append(self.fault)

    def disable(self) -> None:
        faults.active.remove(self.fault)


@dataclass(eq=False)
class _AtChunk:
    """A fault that strikes whoever begins a chunk, so many times."""

    index: int
    times: int | None

    def __call__(self, chunk: Chunk) -> None:
        is_begun = chunk.index == self.index and not any(chunk.part)
        if is_begun and (self.times is None or chunk.attempt < self.times):
            self.strike(chunk)

    def strike(self, chunk: Chunk) -> None:
        raise NotImplementedError


@dataclass(eq=False)
class _Fail(_AtChunk):
    exception: BaseException | type[BaseException]

    def strike(self, chunk: Chunk) -> None:
        raise self.exception

    def __reduce__(self) -> tuple[Any, ...]:
        # Not every exception can be pickled, so it travels as those of workers do.
        given = pack_error(self.exception) if isinstance(self.exception, BaseException) else self.exception
        return _rebuild_fail, (self.index, self.times, given)


def _rebuild_fail(index: int, times: int | None, given: Any) -> _Fail:
    return _Fail(index, times, given.open() if isinstance(given, PackedError) else given)


@dataclass(eq=False)
class _Kill(_AtChunk):
    def strike(self, chunk: Chunk) -> None:
        if workers.slot is None:  # a thread, or the test itself, which nobody would want to have killed
            raise errors.WorkerDied(os.getpid(), -9, chunk)
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))


def fail_chunk(
    index: int, exception: BaseException | type[BaseException], *, times: int | None = None
) -> TestContextDecorator:
    """Have the chunk of this index fail with an exception before its rows are read: a context manager and a decorator.

    In every parallel call within, of any executor; in the caller's process too; of several querysets in each. Mind that
    chunks are as large as ``chunk_size=`` says: give one, for there to be more than chunk 0.

    :param exception: one that cannot be pickled is a ``RemoteError`` elsewhere. An error of the database counts as one
        of reading the chunk: it is tried again (an ``OperationalError``), and fails each row where failures are
        collected or skipped. Any other ends the call.
    :param times: how many attempts of a chunk, in each call. None: all; 1: a chunk that is sent again (``retries=``)
        comes through.
    """
    return _Injected(_Fail(index, times, exception))


def kill_worker(chunk: int, *, times: int | None = 1) -> TestContextDecorator:
    """Have the worker process killed that begins the chunk of this index: a context manager and a decorator.

    Where no process of ours does the work (threads, a ``TestCase``, somebody else's executor), the chunk fails as if it
    had been: with :class:`~parallel_orm.errors.WorkerDied`.

    :param chunk: its index; of a call over several querysets, in each.
    :param times: how many attempts of a chunk, in each call. 1: a chunk that is sent again (``retries=``) comes
        through; None: all.
    """
    return _Injected(_Kill(chunk, times))


def assert_parallel_safe(
    queryset: Rows, fn: Callable[[Any], Any], *, equal: Callable[[Any, Any], bool] = operator.eq
) -> None:
    """Fail the test, saying why, if ``fn`` may come to something else in parallel than in a loop.

    The function is called for each row about ten times: in a loop, twice; backwards, shuffled, in chunks of many sizes;
    and in a worker process; each time a copy of it that was packed and opened. What it does happens as often, so give
    it few rows, and a test database. Found is what depends

    - on the order of the rows, or on those before it (a running total, a cache that fills);
    - on state of this process that a worker has not (a global that a test sets, something patched);
    - on the caller's transaction (locks of rows, callbacks for its commit);
    - on something that cannot travel: what the function closes over, and what it returns.

    Within a ``TestCase`` a worker process cannot see the rows of the test: there they are sent to it, if the function
    asks no database; use a ``TransactionTestCase`` to have one checked that does. Two runs that differ from each other
    by themselves (time, chance) are found too, and nothing else is then said of the results. Exceptions are compared by
    type and text; no ``init_hook`` is called.

    :param equal: tells whether two results are as good as the same.
    :raises AssertionError: with a line for each kind of dependence, and the rows that show it.
    """
    if found := findings(queryset, fn, equal):
        name = getattr(fn, "__qualname__", repr(fn))
        lines = "\n".join(f"  - {line}" for line in found)
        raise AssertionError(f"{name} is not safe to run in parallel over {queryset.model._meta.label}:\n{lines}")
