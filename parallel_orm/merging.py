"""Sorted streams merged into one. Knows only columns of values, and how these compare.

The rows that all streams have reached are sorted together. Python's sort finds the runs that they come in and merges
them, so it is a merge of many ways in C (Tim Peters, listsort.txt); and rows that compare equal stay as they were:
those of the first stream first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, Protocol

from parallel_orm.comparing import Comparison

#: The values of one term of an order, of one row after the other.
Column = list[Any]


class Rows(Sized, Iterable[Any], Protocol):
    """Rows that may be made while they are iterated over, once."""


#: Rows that come in order, and the columns that they are ordered by.
Page = tuple[Rows, list[Column]]


@dataclass(frozen=True, slots=True)
class Term:
    """One term of an order."""

    comparison: Comparison
    descending: bool = False
    nulls_last: bool = False


class Buffer:
    """What is there of one stream."""

    def __init__(self, pages: Iterator[Page], columns: int) -> None:
        self._pages = pages
        self.rows: Iterator[Any] = iter(())
        #: How many of them are not passed on.
        self.left = 0
        self.columns: list[Column] = [[] for _ in range(columns)]
        #: Whether all that is left of it is here.
        self.is_last = False

    def fill(self) -> None:
        """Have rows, if there are any left."""
        while not self.left and not self.is_last:
            page = next(self._pages, None)
            if page is None:
                self.is_last = True
            else:
                rows, self.columns = page
                self.rows, self.left = iter(rows), len(rows)

    def pass_on(self, number: int) -> None:
        """Count so many rows as passed on."""
        self.left -= number
        self.columns = [column[number:] for column in self.columns]


def merged(streams: Sequence[Iterator[Page]], terms: Sequence[Term]) -> Iterator[Iterator[Any]]:
    """Yield the rows of sorted streams in their common order, some and then some; of equal ones those of the first
    first. What is left of some is passed over when the next are asked for.

    Holds a page of each stream. None is asked for its next one before all rows of the last one are passed on. Rows are
    taken one by one, so that those which are made then are made one by one.
    """
    buffers = [Buffer(stream, len(terms)) for stream in streams]
    while True:
        for buffer in buffers:
            buffer.fill()
        buffers = [buffer for buffer in buffers if buffer.left]
        if not buffers:
            return
        keys, backwards = sort_keys([buffer.columns for buffer in buffers], terms)
        # As far as the stream that ends first; what comes after its last row, nobody knows yet.
        bound: Any = None
        for number, (buffer, known) in enumerate(zip(buffers, keys, strict=True)):
            if not buffer.is_last and (bound is None or is_before(known[-1], bound[1], backwards=backwards)):
                bound = number, known[-1]
        numbers, found = list[int](), list[Any]()
        for number, (buffer, known) in enumerate(zip(buffers, keys, strict=True)):
            if bound is None:
                end = len(known)
            else:
                end = reach(known, bound[1], backwards=backwards, with_equal=number <= bound[0])
            numbers += [number] * end
            found += known[:end]
            buffer.pass_on(end)
        # Rows of one stream come as it has them: so it is enough to know whose turn it is.
        rows = map(
            next, map([buffer.rows for buffer in buffers].__getitem__, in_order(numbers, found, backwards=backwards))
        )
        yield rows
        deque(rows, maxlen=0)


def joined(pages: Sequence[Page], terms: Sequence[Term]) -> list[Any]:
    """Return the rows of sorted lists in their common order; of equal ones those of the first list first."""
    rows = [row for page, _ in pages for row in page]
    if not terms:
        return rows
    keys, backwards = sort_keys([columns for _, columns in pages], terms)
    return in_order(rows, [key for known in keys for key in known], backwards=backwards)


def in_order(rows: list[Any], keys: list[Any], *, backwards: bool) -> list[Any]:
    """Return rows sorted by their keys. Equal ones stay as they were."""
    places = sorted(range(len(rows)), key=keys.__getitem__, reverse=backwards)
    return [rows[place] for place in places]


def sort_keys(columns_of: Sequence[Sequence[Column]], terms: Sequence[Term]) -> tuple[list[list[Any]], bool]:
    """Return of each list a key for each of its rows, and whether the greatest comes first.

    The keys of one call compare with each other, and with no others.
    """
    if is_plain(columns_of, terms):
        return [as_keys(columns) for columns in columns_of], terms[0].descending
    numbers = [places([columns[place] for columns in columns_of], term) for place, term in enumerate(terms)]
    return [
        as_keys([[number[value] for value in column] for number, column in zip(numbers, columns, strict=True)])
        for columns in columns_of
    ], False


def as_keys(columns: Sequence[Column]) -> list[Any]:
    """Return the values of one row after the other."""
    return list(columns[0]) if len(columns) == 1 else list(zip(*columns, strict=True))


def is_plain(columns_of: Sequence[Sequence[Column]], terms: Sequence[Term]) -> bool:
    """Tell whether the values themselves are keys: compared by Python, in one direction, and all there."""
    return all(
        term.comparison.canonical is None and term.comparison.rank is None and term.descending == terms[0].descending
        for term in terms
    ) and not any(None in column for columns in columns_of for column in columns)


def places(columns: Sequence[Column], term: Term) -> dict[Any, int]:
    """Number the values of a term in its order; equal ones alike."""
    values = {value for column in columns for value in column}
    keys = term.comparison.keys(list(values))
    order = {key: place for place, key in enumerate(sorted(set(keys.values()), reverse=term.descending))}
    numbers = {value: order[key] for value, key in keys.items()}
    if None in values:
        numbers[None] = len(order) if term.nulls_last else -1
    return numbers


def is_before(one: Any, other: Any, *, backwards: bool) -> bool:
    """Tell whether a key stands before another one."""
    return bool(one > other if backwards else one < other)


def reach(keys: Sequence[Any], bound: Any, *, backwards: bool, with_equal: bool) -> int:
    """Return how many of these keys, which are in order, stand before a bound; or are equal to it, if asked."""
    low, high = 0, len(keys)
    while low < high:
        middle = (low + high) // 2
        before = is_before(keys[middle], bound, backwards=backwards)
        if before or (with_equal and keys[middle] == bound):
            low = middle + 1
        else:
            high = middle
    return low
