"""What becomes of the outcomes: one list. The first error ends it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from parallel_orm.dispatch import Window
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
