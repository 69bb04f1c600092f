"""What becomes of the outcomes: a list, a stream, one value. The first error ends it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from heapq import heappop, heappush
from itertools import count
from typing import Any

from parallel_orm.dispatch import Supply, Window
from parallel_orm.outcomes import Outcome


def listed(outcomes: Iterable[Outcome], window: Window, *, ordered: bool) -> list[Any]:
    """Join the lists of all chunks into one: in the order of the chunks, or as they came in."""
    values: dict[tuple[int, ...], list[Any]] = {}
    for outcome in outcomes:
        values[outcome.chunk.place] = outcome.result()
        window.release()  # the whole list is the caller's to keep, so nothing waits for an earlier chunk
    joined: list[Any] = []
    for place in sorted(values) if ordered else list(values):
        joined += values.pop(place)
    return joined


def streamed(outcomes: Iterable[Outcome], window: Window, supply: Supply, *, ordered: bool) -> Iterator[Any]:
    """Yield what each chunk came to, as they come in, or each when all before it were; an error in its place too.

    An outcome that waits for an earlier one has its place in the window, so few of them do.
    """
    waiting: list[tuple[tuple[int, ...], int, Outcome]] = []
    numbers = count()  # no two outcomes are compared
    for outcome in outcomes:
        place = outcome.chunk.place if ordered else ()
        heappush(waiting, (place, next(numbers), outcome))
        del outcome
        while waiting and not (ordered and supply.has_before(waiting[0][0])):
            *_, first = heappop(waiting)
            value = first.result()
            del first
            yield value
            del value
            window.release()


def reduced(values: Iterable[list[Any]], combine: Callable[[Any, Any], Any], initial: list[Any]) -> list[Any]:
    """Combine what the chunks came to, each nothing or one value in a list; as it stands, nothing or one value."""
    for value in values:
        initial = [combine(initial[0], value[0])] if initial and value else initial or value
    return initial


def drained(outcomes: Iterable[Outcome], window: Window) -> None:
    """See all chunks through, of which there is nothing to keep."""
    for outcome in outcomes:
        outcome.result()
        window.release()
