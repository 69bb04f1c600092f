"""A worker, as the functions that it runs know it: with a state of its own for the length of one call."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any

from parallel_orm import errors
from parallel_orm.outcomes import note


@dataclass(slots=True)
class Worker:
    """One process or thread that works for one call."""

    #: From 0 up, unique among the workers of a call that are there at the same time. None in a process of somebody
    #: else's executor, which does not tell.
    index: int | None
    #: The process.
    pid: int
    #: Whatever functions and hooks keep there: a model that was loaded once, a session with a server.
    state: SimpleNamespace = field(default_factory=SimpleNamespace)


#: Called with the worker.
Hook = Callable[[Worker], Any]

#: The number of this process in its pool, where it is a worker process of ours.
slot: int | None = None

#: Tells the caller that a chunk begins, whose time counts from here on. The worker was made ready before.
begins: Callable[[], object] | None = None

_current: ContextVar[Worker | None] = ContextVar("parallel_orm_current_worker", default=None)


def current_worker() -> Worker:
    """Return the worker that runs the caller, in a function or a hook of a parallel call.

    :raises parallel_orm.errors.NoWorker: no parallel call runs the caller, or not in this thread.
    """
    worker = _current.get()
    if worker is None:
        raise errors.no_worker()
    return worker


class Crew:
    """The workers of one call that this process has: one for each of its threads that works for it.

    It travels as its hooks alone: each process has a crew of its own.
    """

    def __init__(self, init_hook: Hook | None = None, end_hook: Hook | None = None, home: int | None = None) -> None:
        self.init_hook, self.end_hook = init_hook, end_hook
        #: The process that made the call.
        self._home = os.getpid() if home is None else home
        self._members: dict[int, Worker] = {}
        self._numbers = count()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Within: :func:`current_worker` is that of this thread, which is made ready at first."""
        thread = threading.get_ident()
        worker = self._members.get(thread)
        if worker is None:
            worker = Worker(self._index(), os.getpid())
            if self.init_hook is not None:
                _call(self.init_hook, worker)
            self._members[thread] = worker
        token = _current.set(worker)
        try:
            yield
        finally:
            _current.reset(token)

    def leave(self) -> list[Any]:
        """See this thread's worker off, if it has one; return what its hook returns, in a list."""
        return self._see_off(self._members.pop(threading.get_ident(), None))

    def each_leaves(self) -> list[Callable[[], list[Any]]]:
        """Return what sees each worker off, in whichever thread, as :meth:`leave` does."""
        members = list(self._members.values())
        self._members.clear()
        return [partial(self._see_off, worker) for worker in members]

    def _see_off(self, worker: Worker | None) -> list[Any]:
        return [] if worker is None or self.end_hook is None else [_call(self.end_hook, worker)]

    def _index(self) -> int | None:
        if slot is None and os.getpid() != self._home:
            return None
        return next(self._numbers) if slot is None else slot

    def __reduce__(self) -> tuple[Any, ...]:
        return Crew, (self.init_hook, self.end_hook, self._home)


def all_of(calls: Iterable[Callable[[], list[Any]]]) -> Iterator[Any]:
    """Yield what is in the lists that these return, of all of them; then raise what the first one raised, if any."""
    first: Exception | None = None
    for call in calls:
        try:
            results = call()
        except Exception as error:
            if first is not None:
                note(first, f"the end_hook of another worker raised {error!r}")
            first = first or error
        else:
            yield from results
    if first is not None:
        raise first


def _call(hook: Hook, worker: Worker) -> Any:
    token = _current.set(worker)
    try:
        return hook(worker)
    finally:
        _current.reset(token)


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
