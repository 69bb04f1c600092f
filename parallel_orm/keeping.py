"""What a worker keeps of the results of a chunk, and sends home: always in a list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

#: What takes each result when it is there, and what is kept of all of them.
Keep = Callable[[], tuple[Callable[[Any], object], list[Any]]]


def everything() -> tuple[Callable[[Any], object], list[Any]]:
    """Keep each result."""
    kept: list[Any] = []
    return kept.append, kept


def nothing() -> tuple[Callable[[Any], object], list[Any]]:
    """Keep none."""
    return _drop, []


def _drop(result: Any) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Combined:
    """Keep one value, that of all results combined; none where there was no result."""

    combine: Callable[[Any, Any], Any]

    def __call__(self) -> tuple[Callable[[Any], object], list[Any]]:
        kept: list[Any] = []
        combine = self.combine

        def take(result: Any) -> None:
            if kept:
                kept[0] = combine(kept[0], result)
            else:
                kept.append(result)

        return take, kept
