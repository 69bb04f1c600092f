"""``parallel_map`` and its kin, over one queryset or several: what the methods and the functions of that name do."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from inspect import iscoroutinefunction
from typing import Any, TypedDict, cast

from django.db.models import QuerySet
from django.db.models.query import ModelIterable

from parallel_orm import errors, gather, guards
from parallel_orm.chunks import Chunk, describe_key
from parallel_orm.executors.choice import choose
from parallel_orm.failures import Failure
from parallel_orm.keeping import Combined, Everything, Keep
from parallel_orm.mapping import Run, mapping
from parallel_orm.merges import Merge
from parallel_orm.merging import merged
from parallel_orm.options import MAP_CHUNK_SIZE, OnError, Options, Progress
from parallel_orm.outcomes import named
from parallel_orm.plan import Plan, plan_map
from parallel_orm.questions import Fan
from parallel_orm.report import Call, Report
from parallel_orm.results import Results
from parallel_orm.work import Apply, name_of
from parallel_orm.workers import Hook

Rows = QuerySet[Any, Any]

#: Failures of a reduction that are logged one by one.
LOGGED = 10
_logger = logging.getLogger("parallel_orm")

#: What ``initial`` of a reduction is that has none.
NO_INITIAL: Any = object()


class SharedKnobs(TypedDict, total=False):
    """What maps and writes may be given by name; see :meth:`ParallelQuerySet.parallel_map`."""

    threads: int | None
    executor: Any
    chunk_size: int | None
    progress: Progress
    init_hook: Hook | None
    end_hook: Hook | None
    on_error: OnError
    max_failures: int | None
    retries: int
    timeout: float | None


class Knobs(SharedKnobs, total=False):
    """What all of the family may be given."""

    batched: bool
    consistent: bool


class MapKnobs(Knobs, total=False):
    ordered: bool
    skip_none: bool


class EachKnobs(Knobs, total=False):
    keys: bool


class ReduceKnobs(Knobs, total=False):
    skip_none: bool


def options_of(verb: str, kind: type[Any], processes: int | None, knobs: Any, **others: Any) -> Options:
    """Return the options of a call; refuse what the verb does not know, as Python does."""
    for name in knobs:
        if name not in kind.__optional_keys__:
            raise TypeError(f"{verb}() got an unexpected keyword argument {name!r}")
    return Options(processes=processes, **knobs, **others)


class MapCall:
    """One call of the family, planned: what it refuses it has refused."""

    def __init__(
        self,
        verb: str,
        querysets: Sequence[Rows],
        fn: Callable[[Any], Any],
        options: Options,
        keep: Keep = Everything,
        report: Report | None = None,
    ) -> None:
        self.verb, self.options, self.choice = verb, options, choose(options)
        fn = plain_callable(fn)
        querysets = self._spread(querysets, in_order=keep is Everything and options.ordered and not options.batched)
        if self.merge is not None:
            fn = self.merge.keyed(fn, skip_none=options.skip_none)
        self.work = Apply(
            fn,
            keep,
            options.skip_none,
            options.batched,
            options.on_error,
            options.retries,
            options.keys,
        )
        stays = self.choice.kind == "inline"
        self.plans: list[Plan] = []
        for queryset in querysets:
            with named(queryset.db) if self.is_across else nullcontext():
                self.plans.append(plan_map(verb, queryset, options, stays=stays))
        self.report = Report() if report is None else report
        self.report.reason = next((plan.inline for plan in self.plans if plan.inline is not None), None)
        self.report.call = asked_for(self)

    def _spread(self, querysets: Sequence[Rows], *, in_order: bool) -> Sequence[Rows]:
        """Return the querysets of all databases that are asked: some may be over several."""
        fans = [fan_of(self.verb, queryset) for queryset in querysets]
        #: How results of several databases come together, where these have an order.
        self.merge: Merge | None = None
        #: Whether there are several databases, whose chunks are worked on side by side.
        self.is_across = any(fan is not None for fan in fans)
        if in_order and any(fan is not None and fan.has_order for fan in fans):
            if len(fans) > 1:
                raise errors.order_of_several(self.verb)
            self.merge = Merge(self.verb, cast("Fan", fans[0]))
            return self.merge.querysets
        return [
            each
            for queryset, fan in zip(querysets, fans, strict=True)
            for each in ([queryset] if fan is None else fan.querysets.values())
        ]

    @classmethod
    def of_a_reduction(
        cls, verb: str, querysets: Sequence[Rows], fn: Callable[[Any], Any], combine: Any, options: Options
    ) -> MapCall:
        if options.on_error == "collect":
            raise errors.failures_have_no_place(verb)
        return cls(verb, querysets, fn, options, Combined(plain_callable(combine)))

    def mapped(self) -> Results[Any]:
        """Return the results, in a list."""
        report, options = self._watched(MapCall.mapped), self.options
        if not self.plans:
            return Results([], report)
        with self._running(report) as run:
            skips = options.on_error == "skip"
            found = gather.listed(run.outcomes, run.window, ordered=options.ordered, skips=skips)
        return Results(found if self.merge is None else self.merge.joined(found), report)

    def _running(self, report: Report, *, in_turn: bool = True) -> AbstractContextManager[Run]:
        """Have it under way; chunks of several databases in turn, or one database after the other."""
        in_turn = in_turn and self.is_across
        return mapping(self.plans, self.work, self.options, self.choice, report, in_turn=in_turn)

    def streamed(self) -> Generator[list[Any]]:
        """Yield the results chunk by chunk; what was written since the call is refused."""
        report, options = self._watched(MapCall.mapped), self.options
        if not self.plans:
            return
        for plan in self.plans:
            if plan.inline is None:
                guards.where_to_map(self.verb, plan.queryset)
        skips, merge = options.on_error == "skip", self.merge
        with self._running(report, in_turn=merge is not None or not options.ordered) as run:
            if merge is None:
                yield from gather.streamed(run.outcomes, run.window, run.supply, ordered=options.ordered, skips=skips)
                return
            passed = 0
            streams = gather.Streams(run.outcomes, run.window, run.supply, len(self.plans), skips=skips)
            pages = [map(merge.page, streams.of(number)) for number in range(len(self.plans))]
            for found in map(list, merged(pages, merge.terms)):
                for place, value in enumerate(found, passed):
                    if isinstance(value, Failure):
                        value.index = place
                passed += len(found)
                yield found

    def seen_through(self) -> Report:
        """Do it for what it does; return the report."""
        report = self._watched(MapCall.seen_through)
        if self.plans:
            with self._running(report) as run:
                gather.drained(run.outcomes, run.window, report.keys)
        return report

    def reduced(self, initial: Any) -> Any:
        """Return one value of all results."""
        assert isinstance(self.work.keep, Combined)
        values = [] if initial is NO_INITIAL else [initial]
        if self.plans:
            combine, number = self.work.keep.combine, len(self.plans)
            with self._running(self.report) as run:
                if self.is_across:
                    values = gather.reduced_by_plan(run.outcomes, run.window, run.supply, number, combine, values)
                else:
                    found = gather.streamed(run.outcomes, run.window, run.supply, ordered=True)
                    values = gather.reduced(found, combine, values)
            if self.report.failed:  # there is nowhere else to say so
                _logger.warning("%s() left out %d rows that failed: %s", self.verb, self.report.failed, self.report)
                for failure in self.report.errors[:LOGGED]:
                    _logger.warning("%s", failure, exc_info=failure.error)
        if not values:
            raise TypeError(f"{self.verb}() of no results, without an initial value")
        return values[0]

    def _watched(self, again: Callable[[MapCall], Any]) -> Report:
        self.report.retries_by(partial(self._retry, again))
        return self.report

    def _retry(self, again: Callable[[MapCall], Any], failures: Sequence[Failure]) -> Any:
        """Do the same for what failed alone."""
        call = MapCall.__new__(MapCall)
        call.__dict__.update(self.__dict__, report=Report(reason=self.report.reason, call=self.report.call))
        call.plans = [
            replace(plan, inline=again_inline(self, plan)).only(chunks)
            for number, plan in enumerate(self.plans)
            if (chunks := chunks_of([each for each in failures if each.chunk.plan == number], plan, self.options))
        ]
        return again(call)


def fan_of(verb: str, queryset: Any) -> Fan | None:
    """Return how several databases are asked for a queryset that is over these; None: it is of one."""
    fan: Fan | None = queryset._fan() if hasattr(queryset, "_fan") else None
    if fan is None:
        return None
    if fan.partial:
        raise fan.refusal(
            verb,
            "partial=True has no place to tell what is missing",
            "Take across() of those that answer, without partial=True.",
        )
    fan.refuse_what_has_no_chunks(verb)
    return fan


def asked_for(call: MapCall) -> Call:
    """Return what a call was asked for, for its report."""
    options, choice, plans = call.options, call.choice, call.plans
    return Call(
        call.verb,
        name_of(call.work),
        ", ".join(dict.fromkeys(plan.label for plan in plans)),
        "threads" if choice.is_threads else choice.kind,
        choice.number,
        chunk_size=options.rows_per_chunk(0) or None,
        on_error=options.on_error,
        retries=options.retries,
        batched=options.batched,
        consistent=options.consistent,
        instances=any(issubclass(plan.queryset._iterable_class, ModelIterable) for plan in plans),
        parts=all(plan.key_of is not None and plan.target_seconds is not None for plan in plans),
    )


def again_inline(call: MapCall, plan: Plan) -> str | None:
    """Return why a plan must run in this process now; refuse what was written since the call."""
    return plan.inline if plan.inline == "inline" else guards.where_to_map(call.verb, plan.queryset)[0]


def chunks_of(failures: Sequence[Failure], plan: Plan, options: Options) -> list[Chunk]:
    """Return the chunks of what failed, in their order: lost ones as they were, and rows by their primary keys."""
    lost = [replace(failure.chunk, attempt=0, plan=0) for failure in failures if failure.is_chunk]
    rows = sorted((each for each in failures if not each.is_chunk), key=lambda failure: failure.chunk.place)
    if any(failure.key is None or (options.batched and None in failure.key) for failure in rows):
        raise errors.nothing_to_retry("rows that do not tell their primary keys cannot be found again.")
    if options.batched:
        runs = [failure.key for failure in rows]
    else:
        size, failed = options.rows_per_chunk(MAP_CHUNK_SIZE), Counter(failure.key for failure in rows)
        keys = list(failed)
        runs = [tuple(keys[start : start + size]) for start in range(0, len(keys), size)]
        if guards.joins_of(plan.queryset).repeat_rows:
            refuse_part_of_a_row(plan, runs, failed)
    return [*lost, *(Chunk(len(lost) + index, plan.alias, keys=run) for index, run in enumerate(runs))]


def refuse_part_of_a_row(plan: Plan, runs: list[tuple[Any, ...]], failed: Counter[Any]) -> None:
    """Refuse rows that a join repeats and that failed some of the times: their keys bring all of their appearances."""
    for run in runs:
        there = Counter(plan.keys_of(Chunk(0, plan.alias, keys=run)))
        for key, number in there.items():
            if number > failed[key]:
                raise errors.nothing_to_retry(
                    f"a join gives the row with the primary key {describe_key(key)} {number} times, of which "
                    f"{failed[key]} failed, and these cannot be told apart."
                )


def plain_callable(fn: Any) -> Any:
    """Return a function that can be called in a worker, or refuse it."""
    if not callable(fn) or iscoroutinefunction(fn):
        raise errors.not_callable(fn)
    return fn
