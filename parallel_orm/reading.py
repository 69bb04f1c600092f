"""What a background read does with its queryset: fetch the rows, or call one of its methods."""

from __future__ import annotations

from typing import Any

from django.db.models import QuerySet, prefetch_related_objects

from parallel_orm.bonds import as_of_now
from parallel_orm.outcomes import Stopwatch
from parallel_orm.prefetch import prefetch_side_by_side
from parallel_orm.reads import running


def fill_cache(rows: Any, clock: Stopwatch) -> tuple[list[Any], int]:
    """What Django fills the result cache with; where that runs in the background, sibling prefetches side by side."""
    with clock("database"):
        found: Any = rows._iterable_class(rows) if isinstance(rows, QuerySet) else rows.iterator()
        cache = list(found)
        lookups, read = rows._prefetch_related_lookups, running.get()
        if lookups and cache and read is not None:
            prefetch_side_by_side(cache, lookups, read.beside)
        elif lookups:
            prefetch_related_objects(cache, *lookups)
    return cache, len(cache)


class Call:
    """What a method of the queryset returns: its own, or that of a derived class."""

    def __init__(self, method: str, *args: Any, **kwargs: Any) -> None:
        self.method = method
        self.args: tuple[Any, ...] = as_of_now(args)
        self.kwargs: dict[str, Any] = as_of_now(kwargs)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """All that it is called with."""
        return *self.args, *self.kwargs.values()

    def __call__(self, rows: Any, clock: Stopwatch) -> tuple[Any, int]:
        """Call it."""
        with clock("database"):
            return getattr(rows, self.method)(*self.args, **self.kwargs), 0
