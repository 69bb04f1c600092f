"""Pending: the answer of one query that was started now and is read later.

    Pending   what the caller holds: the answer, when it comes
    Read      what is on its way; held by the thread that runs it, and by nobody else but its Pending

So a Pending that is dropped tells that nobody wants the answer, and the read is cancelled.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import MappingProxyType
from typing import Any

from asgiref.sync import sync_to_async
from django.core.exceptions import SynchronousOnlyOperation

from parallel_orm import errors
from parallel_orm.bonds import FREE, bonds_of, hold
from parallel_orm.chores import chores
from parallel_orm.reads import Read, Reason
from parallel_orm.task import Task


class Pending:
    """The answer of one query that was started in the background, when it comes.

    Can be awaited, which gives what :meth:`result` returns. A Pending that nobody holds any more cancels its query;
    if that had failed and nobody asked, the exception is logged by the logger ``parallel_orm``.
    """

    def __init__(self, read: Read) -> None:
        self._read = read
        self._asked = False
        #: What answers this too; kept, as a Pending that is dropped cancels its query.
        self._leader: Pending | None = None
        chores.attend()

    @property
    def alias(self) -> str:
        """The database that is asked."""
        return self._read.alias

    @property
    def reason(self) -> Reason | None:
        """None where it ran in the background; else a word, such as ``"transaction"``, whose ``str()`` explains."""
        return self._read.reason

    @property
    def queue_time(self) -> float | None:
        """Seconds until it began, which is when its connection was there; None while it has not."""
        return self._read.queue_time

    @property
    def connect_time(self) -> float | None:
        """Seconds of these that it took to be lent a connection, and to open it where none was open; None while it has
        not begun, and where it ran on the caller's own.
        """
        return self._read.connect_time

    @property
    def execute_time(self) -> float | None:
        """Seconds from its beginning to its answer; None while there is none."""
        return self._read.execute_time

    def done(self) -> bool:
        """Tell whether the answer is there, or the failure. ``result()`` then does not wait.

        It may stay False until ``result()`` is asked for, which runs what no thread could get a connection for.
        """
        return self._read.done()

    def result(self, timeout: float | None = None) -> Any:
        """Return the answer; the same one each time.

        Waits for it, at most ``timeout`` seconds; then raises ``TimeoutError`` and leaves the query running. A query
        that no thread has begun is run here and now. Raises what the query raised, the same exception each time;
        :class:`~parallel_orm.errors.Cancelled` after :meth:`cancel`, and
        :class:`~parallel_orm.errors.DeadlineExceeded` after the ``timeout=`` of its start.
        """
        if not self.done():
            refuse_to_wait()
        try:
            self._read.settle(timeout=timeout)
        except TimeoutError:
            if not self.done():
                raise TimeoutError(f"No answer within {timeout} seconds; the query goes on.") from None
        return self._answer()

    def cancel(self) -> bool:
        """Cancel the query, on the server too if it runs there; tell whether that could be done.

        False where the answer was there already, and where the caller's own connection is at it. Else its use raises
        :class:`~parallel_orm.errors.Cancelled` from now on. Does not wait for the server.
        """
        return self._read.cancel(errors.cancelled("by its Pending's cancel()"))

    def __await__(self) -> Generator[Any, None, Any]:
        return self._awaited().__await__()

    async def _awaited(self) -> Any:
        await self._arrived()
        if self._read.is_to_be_shown:  # in the thread of the connection that they are shown on
            await sync_to_async(self._read.shown)()
        return self._answer()

    async def _arrived(self) -> None:
        read = self._read
        if self._leader is not None:
            await self._leader._arrived()
            read.take()
        if not read.done():
            if read.begun is not None:
                await _called_back(read.begun.add_done_callback)
            if not read.is_about_to_begin:
                # No thread will begin it soon: in the thread of the caller's own connection, then.
                await sync_to_async(read.settle)(wait=False)
            await _called_back(read.when_tried)
            if not read.done():  # a thread has left it over
                await sync_to_async(read.settle)(wait=False)
                await _called_back(read.landed.add_done_callback)

    def _answer(self) -> Any:
        self._asked = True
        self._read.shown()
        return self._read.landed.result().result()

    @property
    def was_left(self) -> bool:
        """Whether its request ended before it was used: the queryset then asks anew."""
        return self._read.left

    def __del__(self) -> None:
        read = self.__dict__.get("_read")
        if read is not None and not self._asked and not read.left:
            chores.call(read.abandon)

    def __repr__(self) -> str:
        state = "done" if self.done() else "pending"
        return f"<Pending on {self.alias!r}: {state}{'' if self.reason is None else f', {self.reason[:]}'}>"


def start_read(verb: str, task: Task, seconds: float | None = None, stay: str | None = None) -> Pending:
    """Start one read; in a coroutine too. ``seconds`` is its deadline, ``stay`` why it is to run here and now."""
    if seconds is not None and not (_is_number(seconds) and seconds > 0):
        raise errors.bad_timeout(seconds)
    bonds = FREE
    if stay is None:
        rows = task.job.queryset  # a copy, which nobody else has
        bonds = bonds_of(rows, *getattr(task.job.work, "arguments", ()))
        if bonds.is_changeable:
            hold(rows)
    read = Read(verb, task, seconds, bonds)
    if stay is None and loop_is_running() and not os.environ.get("DJANGO_ALLOW_ASYNC_UNSAFE"):
        read.begin_soon()
    else:
        read.begin(stay)
    return Pending(read)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def refuse_to_wait() -> None:
    """Refuse to block an event loop."""
    if loop_is_running() and not os.environ.get("DJANGO_ALLOW_ASYNC_UNSAFE"):
        raise SynchronousOnlyOperation(
            "The result is not there yet, and waiting for it would block the event loop. Await the Pending, use "
            "the queryset by an async method (async for, acount(), aexists()), or go by sync_to_async."
        )


def loop_is_running() -> bool:
    """Tell whether this is the thread of an event loop, where Django allows no query."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def _called_back(tell: Callable[[Callable[..., None]], object]) -> None:
    """Wait for a call from any thread. To be cancelled meanwhile, or to lose its event loop, disturbs nobody else."""
    loop = asyncio.get_running_loop()
    called = asyncio.Event()

    def wake(*_: object) -> None:
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(called.set)

    tell(wake)
    await called.wait()


class Background(Mapping[str, Pending]):
    """What was started on one queryset: ``"fetch"``, ``"count"``, ``"exists"``. Neither copied nor pickled with it."""

    def __init__(self) -> None:
        self._pending: dict[str, Pending] = {}

    def __getitem__(self, verb: str) -> Pending:
        return self._pending[verb]

    def __contains__(self, verb: object) -> bool:
        return verb in self._pending

    def __iter__(self) -> Iterator[str]:
        return iter(self._pending)

    def __len__(self) -> int:
        return len(self._pending)

    def add(self, verb: str, pending: Pending) -> None:
        self._pending[verb] = pending

    @contextmanager
    def holding(self, verbs: Iterable[str]) -> Iterator[list[Pending]]:
        """Within: have none of these begin that has not; they follow what is put into the list, if it is."""
        held = [(verb, self[verb]) for verb in verbs if verb in self and self[verb]._read.hold()]
        leaders: list[Pending] = []
        try:
            yield leaders
        finally:
            for verb, pending in held:
                leader = pending._leader = leaders[0] if leaders else None
                pending._read.follow(None if leader is None else leader._read, len if verb == "count" else bool)

    def forget_left(self) -> None:
        """Forget what a request left behind, to be asked for anew."""
        for verb, pending in [*self._pending.items()]:
            if pending._read.left:
                del self._pending[verb]

    def forget(self, verb: str, pending: Pending) -> None:
        if self._pending.get(verb) is pending:
            del self._pending[verb]

    def __repr__(self) -> str:
        return repr(self._pending)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of a queryset knows nothing of it: what pickle and deepcopy make of this is None.
        return type(None), ()


#: What ``queryset.background`` is before anything was started.
NOTHING_STARTED: Mapping[str, Pending] = MappingProxyType({})
