"""Several databases asked at once: one background read each, and one answer of theirs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any

from asgiref.sync import sync_to_async
from django.db import Error

from parallel_orm import errors
from parallel_orm.background import Pending, refuse_to_wait, start_read
from parallel_orm.outcomes import note
from parallel_orm.plan import plan_whole
from parallel_orm.reads import Reason
from parallel_orm.work import Rows, Work

#: Seconds that others have to answer too when enough is known, before their queries are cancelled: most quick ones do,
#: and to cancel one takes longer.
GRACE = 0.003
#: Seconds after which whoever waits looks around: for a Ctrl-C, and for what no thread will begin.
LOOKS_EVERY = 0.5


@dataclass(frozen=True)
class Question:
    """What several databases are asked, and what is made of their answers."""

    verb: str
    #: Of each database what is asked, a queryset of this question's own, and how.
    parts: Mapping[str, tuple[Rows, Work]]
    #: Makes one answer of those that there are, by alias.
    join: Callable[[Mapping[str, Any]], Any]
    #: Tells of an answer that it is enough.
    is_enough: Callable[[Any], bool] = lambda answer: False
    #: Seconds for each.
    timeout: float | None = None
    #: Whether those that fail are left out.
    partial: bool = False
    #: Told which those were, before the answer is made.
    tell: Callable[[Mapping[str, BaseException]], object] = lambda missing: None

    def asked(self) -> PendingAcross:
        """Ask all of them, at once."""
        started: dict[str, Pending] = {}
        try:
            for alias, (rows, work) in self.parts.items():
                stay = "empty" if rows.query.is_empty() else None
                started[alias] = start_read(self.verb, plan_whole(rows, work, is_own=True), self.timeout, stay)
        except BaseException:
            for pending in started.values():
                pending.cancel()
            raise
        return PendingAcross(self, started)

    def answered(self) -> Any:
        """Ask all of them, and return the answer."""
        return self.asked().result()


class PendingAcross(Pending):
    """The answer of several databases that were asked at once, when it comes. See :class:`Pending`.

    ``alias`` names all of them, ``reason`` is that of the first that did not answer in the background, and times are
    those of the slowest.
    """

    def __init__(self, question: Question, members: Mapping[str, Pending]) -> None:
        self._question, self._members = question, members
        self._asked = False
        self._leader = None
        self._joined: tuple[Any, BaseException | None] | None = None

    @property
    def alias(self) -> str:
        return ", ".join(self._members)

    @property
    def reason(self) -> Reason | None:
        return next((each.reason for each in self._members.values() if each.reason is not None), None)

    @property
    def queue_time(self) -> float | None:
        return self._slowest("queue_time")

    @property
    def connect_time(self) -> float | None:
        return self._slowest("connect_time")

    @property
    def execute_time(self) -> float | None:
        return self._slowest("execute_time")

    def _slowest(self, name: str) -> float | None:
        times = [getattr(each, name) for each in self._members.values()]
        return None if None in times else max(times, default=None)

    def done(self) -> bool:
        """Tell whether all answers are there, or what failed is known."""
        return self._joined is not None or all(each.done() for each in self._members.values())

    def result(self, timeout: float | None = None) -> Any:
        """Return the answer; the same one each time. The first database that fails ends the others.

        As :meth:`Pending.result`; what is raised says which database it is of.
        """
        if self._joined is None:
            if not self.done():
                refuse_to_wait()
            try:
                self._wait(timeout)
            except TimeoutError:
                raise
            except BaseException:  # Ctrl-C: nobody waits for them any more
                self.cancel()
                raise
            self._join()
        assert self._joined is not None
        answer, error = self._joined
        if error is not None:
            raise error
        return answer

    def cancel(self) -> bool:
        """Cancel what is under way, on the servers too; tell whether anything was."""
        cancelled = [each.cancel() for each in self._members.values()]
        return any(cancelled)

    @property
    def was_left(self) -> bool:
        return self._joined is None and any(each.was_left for each in self._members.values())

    def _wait(self, timeout: float | None) -> None:
        """Return when enough is known. What no thread can begin is run here."""
        until = None if timeout is None else monotonic() + timeout
        told: SimpleQueue[Pending] = SimpleQueue()
        waiting = set(self._members.values())
        enough = threading.Event()

        def tell(pending: Pending) -> None:
            # In the thread that brings it. To be woken for each takes about as long as a quick query.
            if pending.done():
                waiting.discard(pending)
                if not enough.is_set() and self._knows_enough(pending):
                    enough.set()
                elif waiting:
                    return
            told.put(pending)

        for pending in self._members.values():
            pending._read.when_tried(partial(tell, pending))
        while True:
            for pending in list(waiting):
                if enough.is_set():
                    break
                if not pending._read.is_about_to_begin and self._question.timeout is None:
                    pending._read.settle(wait=False)  # whoever needs it runs it
                if pending.done():
                    waiting.discard(pending)
                    if self._knows_enough(pending):
                        enough.set()
            if enough.is_set() or not waiting:
                break
            patience = LOOKS_EVERY if until is None else min(LOOKS_EVERY, until - monotonic())
            try:
                pending = told.get(timeout=max(patience, 0.0))
            except Empty:
                if until is not None and monotonic() >= until:
                    raise TimeoutError(f"No answer within {timeout} seconds; the queries go on.") from None
                continue
            if not pending.done():  # no thread could: its connection, or its session
                pending._read.settle(wait=False)
                pending._read.when_tried(partial(tell, pending))
        until = monotonic() + GRACE
        while waiting and (patience := until - monotonic()) > 0:
            with suppress(Empty):
                told.get(timeout=patience)

    def _knows_enough(self, pending: Pending) -> bool:
        """Tell whether the others need not answer any more, after one that is done."""
        outcome = pending._read.landed.result()
        if outcome.error is not None:
            return not self._may_be_missing(outcome.error)
        return self._question.is_enough(outcome.value)

    def _may_be_missing(self, error: Any) -> bool:
        return self._question.partial and isinstance(error, Error | errors.DeadlineExceeded)

    def _join(self) -> None:
        """Make one answer of what is known. What is not needed any more is cancelled."""
        self._asked = True
        answers: dict[str, Any] = {}
        missing: dict[str, BaseException] = {}
        first: BaseException | None = None
        known = {alias: pending for alias, pending in self._members.items() if pending.done()}
        for alias, pending in self._members.items():
            if alias not in known:
                pending.cancel()
        for alias, pending in known.items():
            try:
                answers[alias] = pending.result()
            except BaseException as error:
                note(error, f"on database {alias!r}, of {self.alias}")
                if self._may_be_missing(error):
                    missing[alias] = error
                elif first is None:
                    first = error
                else:
                    note(first, f"and on database {alias!r} {type(error).__name__}: {error}")
        for pending in self._members.values():
            pending._asked = True
        if first is None and missing and not answers:
            first = next(iter(missing.values()))
        try:
            if first is not None:
                raise first
            self._question.tell(missing)
            self._joined = self._question.join(answers), None
        except Exception as error:
            self._joined = None, error

    async def _awaited(self) -> Any:
        if self._joined is None:
            waits = {asyncio.ensure_future(pending._arrived()): pending for pending in self._members.values()}
            try:
                left = set(waits)
                while left:
                    done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
                    if any(waits[each].done() and self._knows_enough(waits[each]) for each in done):
                        if left:
                            await asyncio.wait(left, timeout=GRACE)
                        break
            finally:
                for wait in waits:
                    wait.cancel()
            await sync_to_async(self._join)()
        return self.result()

    async def _arrived(self) -> None:
        await self._awaited()

    def _answer(self) -> Any:
        return self.result()

    @property
    def _read(self) -> Any:
        return _Reads(self)

    @_read.setter
    def _read(self, read: Any) -> None: ...

    def __del__(self) -> None:
        """Its members are dropped with it, and cancel what nobody wants."""

    def __repr__(self) -> str:
        return f"<PendingAcross on {self.alias}: {'done' if self.done() else 'pending'}>"


@dataclass(frozen=True, slots=True)
class _Reads:
    """What a :class:`~parallel_orm.background.Background` asks of a read, of several."""

    pending: PendingAcross

    @property
    def left(self) -> bool:
        return self.pending.was_left

    def hold(self) -> bool:
        """Refuse to follow another one: its parts are begun already."""
        return False
