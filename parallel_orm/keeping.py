"""What a worker keeps of the results of a chunk, and sends home: always a list.

Results are taken one by one, in order. Where one is missing, a hole is left, which may be filled later.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any, Protocol


class Kept(Protocol):
    """What is kept of one chunk."""

    @property
    def take(self) -> Callable[[Any], object]:
        """Takes the next result."""

    @property
    def in_places(self) -> bool:
        """Whether each result has a place of its own."""

    def leave(self) -> int:
        """Leave a hole for the next result, and return its number."""

    def fill(self, hole: int, result: Any) -> None:
        """Put the result into its hole."""

    def sealed(self, without: Set[int]) -> list[Any]:
        """Return what is kept. Holes that were not filled are None, and those ``without`` are left out."""


#: Makes what keeps the results of one chunk.
Keep = Callable[[], Kept]


class Everything:
    """Keep each result."""

    in_places = True

    def __init__(self) -> None:
        self.results: list[Any] = []
        self.take = self.results.append

    def leave(self) -> int:
        self.results.append(None)
        return len(self.results) - 1

    def fill(self, hole: int, result: Any) -> None:
        self.results[hole] = result

    def sealed(self, without: Set[int]) -> list[Any]:
        if not without:
            return self.results
        return [result for place, result in enumerate(self.results) if place not in without]


class Nothing:
    """Keep none."""

    in_places = False

    def take(self, result: Any) -> None:
        pass

    def leave(self) -> int:
        return 0

    def fill(self, hole: int, result: Any) -> None:
        pass

    def sealed(self, without: Set[int]) -> list[Any]:
        return []


@dataclass(frozen=True, slots=True)
class Combined:
    """Keep one value, that of all results combined; none where there was no result."""

    combine: Callable[[Any, Any], Any]

    def __call__(self) -> Combining:
        return Combining(self.combine)


class Combining:
    """Results combined as they are taken; as far as the next hole."""

    in_places = False

    def __init__(self, combine: Callable[[Any, Any], Any]) -> None:
        self.combine = combine
        #: What lies before each hole, and in it: nothing, or one value in a list.
        self.parts: list[list[Any]] = [[]]

    def take(self, result: Any) -> None:
        part = self.parts[-1]
        if part:
            part[0] = self.combine(part[0], result)
        else:
            part.append(result)

    def leave(self) -> int:
        self.parts += [[], []]
        return len(self.parts) - 2

    def fill(self, hole: int, result: Any) -> None:
        self.parts[hole].append(result)

    def sealed(self, without: Set[int]) -> list[Any]:
        first, *others = self.parts
        self.parts = [first]
        for part in others:
            for value in part:
                self.take(value)
        return first
