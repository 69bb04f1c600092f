"""What becomes of the outcomes: a list, a stream, one value. The first error ends it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from heapq import heappop, heappush
from itertools import count
from typing import Any

from parallel_orm.dispatch import Supply, Window
from parallel_orm.outcomes import Outcome


def listed(outcomes: Iterable[Outcome], window: Window, *, ordered: bool, skips: bool = False) -> list[Any]:
    """Join the lists of all chunks into one: in the order of the chunks, or as they came in.

    Failures stand in the places of their rows, or ``skips`` leaves them out.
    """
    values: dict[tuple[int, ...], list[Any]] = {}
    failing: dict[tuple[int, ...], Outcome] = {}
    for outcome in outcomes:
        place = outcome.chunk.place
        values[place] = outcome.result()
        if outcome.failures:
            failing[place] = replace(outcome, value=None)
        window.release()  # the whole list is the caller's to keep, so nothing waits for an earlier chunk
    joined: list[Any] = []
    passed = 0
    for place in sorted(values) if ordered else list(values):
        found = values.pop(place)
        passed += len(found)
        if place in failing:
            found = with_failures(failing[place], found, passed - len(found) if ordered else None, skips=skips)
        joined += found
    return joined


def streamed(
    outcomes: Iterable[Outcome], window: Window, supply: Supply, *, ordered: bool, skips: bool = False
) -> Iterator[Any]:
    """Yield what each chunk came to, as they come in, or each when all before it were; an error in its place too.

    An outcome that waits for an earlier one has its place in the window, so few of them do.
    """
    waiting: list[tuple[tuple[int, ...], int, Outcome]] = []
    numbers = count()  # no two outcomes are compared
    passed = 0
    for outcome in outcomes:
        place = outcome.chunk.place if ordered else ()
        heappush(waiting, (place, next(numbers), outcome))
        del outcome
        while waiting and not (ordered and supply.has_before(waiting[0][0])):
            *_, first = heappop(waiting)
            value = first.result()
            passed += len(value)
            if first.failures:
                value = with_failures(first, value, passed - len(value) if ordered else None, skips=skips)
            del first
            yield value
            del value
            window.release()


def with_failures(outcome: Outcome, values: list[Any], passed: int | None, *, skips: bool) -> list[Any]:
    """Return the results of a chunk with its failures in their places, or without these.

    They are told where they stand among all results, if so many were ``passed`` before.
    """
    places: set[int] = set()
    for failed, failure in zip(outcome.failed, outcome.failures, strict=True):
        if failed.place is not None:
            places.add(failed.place)
            values[failed.place] = failure
            failure.index = None if passed is None else passed + failed.place
    return [value for place, value in enumerate(values) if place not in places] if skips else values


def reduced(values: Iterable[list[Any]], combine: Callable[[Any, Any], Any], initial: list[Any]) -> list[Any]:
    """Combine what the chunks came to, each nothing or one value in a list; as it stands, nothing or one value."""
    for value in values:
        initial = [combine(initial[0], value[0])] if initial and value else initial or value
    return initial


class Streams:
    """The results of several plans, each plan's in its order, taken as they are needed.

    Whoever needs those of one plan may find all places of the window held by others, which wait for it: then the window
    has one place more. Chunks are sent in turn, so that this is seldom.
    """

    def __init__(
        self, outcomes: Iterator[Outcome], window: Window, supply: Supply, number: int, *, skips: bool = False
    ) -> None:
        self._outcomes, self._window, self._supply, self._skips = outcomes, window, supply, skips
        self._waiting: list[list[tuple[tuple[int, ...], int, Outcome]]] = [[] for _ in range(number)]
        self._numbers = count()
        self._is_over = False

    def of(self, plan: int) -> Iterator[list[Any]]:
        """Yield what the chunks of one plan came to."""
        waiting = self._waiting[plan]
        while True:
            while not waiting or self._supply.has_before(waiting[0][0], within=plan):
                if self._is_over or not (waiting or self._supply.has_more_of(plan)):
                    return
                if not (self._window.has_room or self._supply.is_at(plan)):
                    self._window.size += 1
                self._come()
            *_, outcome = heappop(waiting)
            value = outcome.result()
            if outcome.failures:
                value = with_failures(outcome, value, None, skips=self._skips)
            del outcome
            yield value
            del value
            self._supply.pass_on(plan)
            self._window.release()

    def _come(self) -> None:
        """Wait for the next outcome of any plan."""
        outcome = next(self._outcomes, None)
        if outcome is None:
            self._is_over = True
        else:
            heappush(self._waiting[outcome.chunk.plan], (outcome.chunk.place, next(self._numbers), outcome))


def reduced_by_plan(
    outcomes: Iterable[Outcome],
    window: Window,
    supply: Supply,
    number: int,
    combine: Callable[[Any, Any], Any],
    initial: list[Any],
) -> list[Any]:
    """Combine what the chunks of several plans came to: each plan's in its order, then one plan after the other."""
    waiting: list[list[tuple[tuple[int, ...], int, Outcome]]] = [[] for _ in range(number)]
    values: list[list[Any]] = [[] for _ in range(number)]
    numbers = count()
    for outcome in outcomes:
        plan = outcome.chunk.plan
        heappush(waiting[plan], (outcome.chunk.place, next(numbers), outcome))
        while waiting[plan] and not supply.has_before(waiting[plan][0][0], within=plan):
            *_, first = heappop(waiting[plan])
            values[plan] = reduced([first.result()], combine, values[plan])
            window.release()
    return reduced(values, combine, initial)


def drained(outcomes: Iterable[Outcome], window: Window, kept: list[Any]) -> None:
    """See all chunks through, and add what they came to, most often nothing, as they come in."""
    for outcome in outcomes:
        kept += outcome.result()
        window.release()
