"""Results of several databases in the common order of their rows: each travels with what its row is ordered by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from django.db.models import QuerySet

from parallel_orm.failures import Failure
from parallel_orm.merging import Column, in_order, sort_keys
from parallel_orm.questions import Fan

Rows = QuerySet[Any, Any]


@dataclass(frozen=True, repr=False)
class Keyed:
    """Calls a function with a row, and returns with its result what the row is ordered by."""

    function: Callable[[Any], Any]
    readers: Sequence[Callable[[Any], Any]]
    strip: Callable[[list[Any]], list[Any]]
    skip_none: bool

    def __repr__(self) -> str:  # the name of it in messages
        return str(getattr(self.function, "__qualname__", None) or repr(self.function))

    def __call__(self, row: Any) -> Any:
        key = tuple(reader(row) for reader in self.readers)  # before the function changes it
        (row,) = self.strip([row])
        result = self.function(row)
        return None if result is None and self.skip_none else (key, result)


class Merge:
    """How the results of one queryset over several databases come together."""

    def __init__(self, verb: str, fan: Fan) -> None:
        self._rows, self._terms, _ = fan.sorted(verb)

    @property
    def querysets(self) -> list[Rows]:
        """The querysets of the databases, whose rows bring their keys."""
        return [each.queryset for each in self._rows.values()]

    @property
    def terms(self) -> Sequence[Any]:
        """How the keys compare."""
        return self._terms

    def keyed(self, function: Callable[[Any], Any], *, skip_none: bool) -> Keyed:
        """Return what is called in the function's place."""
        first = next(iter(self._rows.values()))
        return Keyed(function, first.readers, first.strip, skip_none)

    def page(self, values: Sequence[Any]) -> tuple[list[Any], list[Column]]:
        """Return results without their keys, and the columns of these; failures have the keys of their rows."""
        keys = self._keys_of([value for value in values if isinstance(value, Failure)])
        found, results, last = [], [], None
        for value in values:
            key, result = (keys.get(id(value), last), value) if isinstance(value, Failure) else value
            found.append(key)
            results.append(result)
            last = key
        # A row that is gone stands beside its neighbour; of the first ones the next is that.
        there = next((key for key in found if key is not None), (None,) * len(self._terms))
        return results, [list(column) for column in zip(*(there if key is None else key for key in found), strict=True)]

    def _keys_of(self, failures: Sequence[Failure]) -> dict[int, Any]:
        """Look up what the rows of failures are ordered by, as these bring their primary keys alone."""
        keys: dict[int, Any] = {}
        for alias, rows in self._rows.items():
            here = [failure for failure in failures if failure.chunk.alias == alias and failure.key is not None]
            if not here:
                continue
            by_key = {
                key: tuple(reader(row) for reader in rows.readers)
                for key, row in rows.queryset.in_bulk([failure.key for failure in here]).items()
            }
            keys.update({id(failure): by_key[failure.key] for failure in here if failure.key in by_key})
        return keys

    def joined(self, values: list[Any]) -> list[Any]:
        """Return the results of one database after the other in the common order."""
        results, columns = self.page(values)
        if not results:
            return results
        (keys,), backwards = sort_keys([columns], self._terms)
        results = in_order(results, keys, backwards=backwards)
        for place, result in enumerate(results):
            if isinstance(result, Failure):
                result.index = place
        return results
