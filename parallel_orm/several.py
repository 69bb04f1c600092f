"""The family over several querysets, of one model or many, of one database or many: their rows, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar, Unpack

from django.db.models import Manager, QuerySet

from parallel_orm import errors
from parallel_orm.family import NO_INITIAL, EachKnobs, MapCall, MapKnobs, ReduceKnobs, options_of
from parallel_orm.keeping import Nothing
from parallel_orm.report import Report
from parallel_orm.results import Results, Stream
from parallel_orm.walk import one_by_one

Result = TypeVar("Result")
QuerySets = Iterable[QuerySet[Any, Any] | Manager[Any]]


def parallel_map(
    querysets: QuerySets, fn: Callable[[Any], Result], processes: int | None = None, **knobs: Unpack[MapKnobs]
) -> Results[Result]:
    """Call ``fn`` with every row of some querysets, on all cores, and return the results, in one list.

    As :meth:`~parallel_orm.ParallelQuerySet.parallel_map`, with its arguments and exceptions. ``ordered``: one queryset
    after the other, each in its own order. Any querysets will do, whatever their managers. The chunks of the next one
    are begun when the one before has no more. What one of them is refused for refuses the call, and where one must stay
    in this process all do.

    :param querysets: an iterable of querysets, or managers; of none there are no results.
    :returns: a list with one ``report``.
    :raises parallel_orm.errors.InvalidOption: it is no iterable of querysets, or one in it is raw.
    """
    options = options_of("parallel_map", MapKnobs, processes, knobs)
    return MapCall("parallel_map", querysets_of("parallel_map", querysets), fn, options).mapped()


def parallel_imap(
    querysets: QuerySets, fn: Callable[[Any], Result], processes: int | None = None, **knobs: Unpack[MapKnobs]
) -> Stream[Result]:
    """Map as :func:`parallel_map` does; return an iterator, as :meth:`~parallel_orm.ParallelQuerySet.parallel_imap`."""
    options = options_of("parallel_imap", MapKnobs, processes, knobs)
    call = MapCall("parallel_imap", querysets_of("parallel_imap", querysets), fn, options)
    return Stream(one_by_one(call.streamed()), call.report)


def parallel_each(
    querysets: QuerySets, fn: Callable[[Any], object], processes: int | None = None, **knobs: Unpack[EachKnobs]
) -> Report:
    """Call ``fn`` with every row of some querysets for what it does; return the report.

    As :meth:`~parallel_orm.ParallelQuerySet.parallel_each`.
    """
    options = options_of("parallel_each", EachKnobs, processes, knobs, ordered=False)
    return MapCall("parallel_each", querysets_of("parallel_each", querysets), fn, options, Nothing).seen_through()


def parallel_reduce(
    querysets: QuerySets,
    fn: Callable[[Any], Result],
    combine: Callable[[Result, Result], Result],
    initial: Result = NO_INITIAL,
    processes: int | None = None,
    **knobs: Unpack[ReduceKnobs],
) -> Result:
    """Return one value of the rows of some querysets, as :meth:`~parallel_orm.ParallelQuerySet.parallel_reduce`."""
    options = options_of("parallel_reduce", ReduceKnobs, processes, knobs)
    found = querysets_of("parallel_reduce", querysets)
    reduced: Result = MapCall.of_a_reduction("parallel_reduce", found, fn, combine, options).reduced(initial)
    return reduced


def querysets_of(verb: str, querysets: Any) -> list[QuerySet[Any, Any]]:
    """Return the querysets of a call over several; refuse what is none."""
    if isinstance(querysets, QuerySet | Manager) or not isinstance(querysets, Iterable):
        raise errors.no_querysets(verb, querysets)
    found = [each.all() if isinstance(each, Manager) else each for each in querysets]
    for each in found:
        if not isinstance(each, QuerySet):
            raise errors.no_querysets(verb, each)
    return found
