"""The public names of our predecessors, over our engine: same signatures, same results.

    parallelized_queryset, parallelized_multiple_querysets      django-parallelized_querysets
    AsyncManager, AsyncQuerySet                                 AsynchrORMous
    queryset_iterator                                           the "memory efficient queryset iterator" snippet

For code that is there already: change its import, and nothing else. Querysets may come from any manager, and are left
as they are. What each name is called here stands in its page of the how-to guides, "Coming from ...".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial, wraps
from typing import Any, TypeVar

from django.db.models import Model, QuerySet
from django.db.models.manager import BaseManager

from parallel_orm import errors
from parallel_orm.background import Pending
from parallel_orm.family import MapCall, plain_callable
from parallel_orm.managers import ParallelManager
from parallel_orm.options import Options
from parallel_orm.plan import plan_walk
from parallel_orm.queryset import ParallelQuerySet
from parallel_orm.walk import one_by_one, walk
from parallel_orm.workers import Worker, current_worker

__all__ = [
    "AsyncManager",
    "AsyncQuerySet",
    "Process",
    "parallelized_multiple_querysets",
    "parallelized_queryset",
    "queryset_iterator",
]

M = TypeVar("M", bound=Model, covariant=True)
Row = TypeVar("Row", covariant=True)


class Process:
    """What django-parallelized_querysets gives to ``function`` and the hooks: a worker, for the length of one call.

    ``name``; ``pid``, also as ``ident``; ``data``, a dictionary; and whatever attribute they set.
    """

    def __init__(self, worker: Worker) -> None:
        number = worker.pid if worker.index is None else worker.index + 1
        self.name = f"Process-{number}"
        self.pid = self.ident = worker.pid
        self.data: dict[Any, Any] = {}


def parallelized_queryset(
    queryset: Any,
    processes: int | None = None,
    function: Callable[[Any, Any], Any] | None = None,
    init_hook: Callable[[Any], object] | None = None,
    end_hook: Callable[[Any], Any] | None = None,
) -> list[Any]:
    """Call ``function`` with a process and a row, for every row, on all cores, and return the results, in no order.

    The same as :func:`parallelized_multiple_querysets` of one queryset.
    """
    return parallelized_multiple_querysets([queryset], processes, function, init_hook, end_hook)


def parallelized_multiple_querysets(
    querysets: Iterable[Any],
    processes: int | None = None,
    function: Callable[[Any, Any], Any] | None = None,
    init_hook: Callable[[Any], object] | None = None,
    end_hook: Callable[[Any], Any] | None = None,
) -> list[Any]:
    """Call ``function`` with a process and a row, for every row of these querysets, on all cores; return the results.

    As :func:`~parallel_orm.parallel_map`, which raises what this raises. Unlike the predecessor it raises what the
    function raises, and takes primary keys of any type and sign. A queryset may be a manager, too.

    :param processes: how many at once; the setting ``PROCESSES``, else as many as there are cores.
    :param function: is given a :class:`Process` and a row. None: the rows themselves come back.
    :param init_hook: called with the :class:`Process` in each one, in front of its first row.
    :param end_hook: called with it behind its last row; what it returns is appended to the results.
    :returns: a list in no order, without results that are None.
    :raises parallel_orm.errors.InvalidOption: an argument has a value that cannot be used.
    """
    rows = [_rows_of("parallelized_queryset", queryset) for queryset in querysets]
    fn = _itself if function is None else _of_process_and_row(plain_callable(function))
    options = Options(processes=processes, ordered=False, skip_none=True, init_hook=init_hook, end_hook=end_hook)
    options = replace(  # the hooks that were given are looked at by now
        options, init_hook=partial(_begin, init_hook), end_hook=end_hook and partial(_end, end_hook)
    )
    results = MapCall("parallelized_queryset", rows, fn, options).mapped()
    return [*results, *(ended for ended in results.report.end_results if ended is not None)]


def _itself(row: Any) -> Any:
    return row


def _of_process_and_row(function: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    @wraps(function)  # whose name messages tell
    def of_row(row: Any) -> Any:
        return function(current_worker().state.process, row)

    return of_row


def _begin(init_hook: Callable[[Any], object] | None, worker: Worker) -> None:
    worker.state.process = Process(worker)
    if init_hook is not None:
        init_hook(worker.state.process)


def _end(end_hook: Callable[[Any], Any], worker: Worker) -> Any:
    return end_hook(worker.state.process)


class AsyncQuerySet(ParallelQuerySet[M, Row]):
    """AsynchrORMous' queryset: ``start_fetch()``, ``start_count()``, ``start_exists()``, and ``async_get()``.

    Each ``start_...()`` returns this very queryset, to be used as ever; see
    :meth:`~parallel_orm.ParallelQuerySet.start_fetch`.
    """

    def async_get(self, *args: Any, **kwargs: Any) -> Pending:
        """Start ``get(*args, **kwargs)`` in the background; its :class:`~parallel_orm.Pending` has the row.

        ``result()`` of it, or ``await``, gives the row, or raises ``DoesNotExist`` or ``MultipleObjectsReturned``.
        The same as :meth:`~parallel_orm.ParallelQuerySet.start_get`.
        """
        return self.start_get(*args, **kwargs)


class AsyncManager(ParallelManager.from_queryset(AsyncQuerySet)[M]):  # type: ignore[misc]
    """AsynchrORMous' manager: its querysets are :class:`AsyncQuerySet`."""


def queryset_iterator(queryset: Any, chunksize: int = 1000) -> Iterator[Any]:
    """Walk the rows of a queryset by ascending primary key, whatever its order, in memory for two chunks.

    As :meth:`~parallel_orm.ParallelQuerySet.chunked_iterator`, which keeps the queryset's order. Unlike the snippet it
    takes primary keys of any type and sign, gives nothing for an empty queryset, and ends when rows vanish meanwhile.

    :param queryset: a queryset, or a manager.
    :param chunksize: rows a chunk.
    :returns: an iterator; nothing is asked before its first ``next()``, then one query for each chunk, and one for the
        last key.
    :raises parallel_orm.errors.UnsupportedQuerySet: a slice, which cannot be put in another order; and what
        ``chunked_iterator`` refuses.
    :raises parallel_orm.errors.InvalidOption: ``chunksize`` is no whole number of at least 1, ``queryset`` none.
    """
    rows = _rows_of("queryset_iterator", queryset)
    if rows.query.is_sliced:
        raise errors.unsupported(
            "queryset_iterator",
            rows.model._meta.label,
            "it is a slice, which cannot be put in the order of its primary key",
            "Use chunked_iterator(), which walks a slice in its own order.",
        )
    if not rows.query.standard_ordering:
        rows = rows.reverse()  # else "pk" would be descending
    plan = plan_walk(rows.order_by("pk"), Options(chunk_size=chunksize), "queryset_iterator")
    return one_by_one(walk(plan))


def _rows_of(caller: str, queryset: Any) -> QuerySet[Any, Any]:
    """Return the queryset, or that of a manager; refuse what is neither."""
    if not isinstance(queryset, QuerySet | BaseManager):
        raise errors.not_a_queryset(caller, queryset)
    return queryset.all()
