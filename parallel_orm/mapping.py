"""A map under way: the outcomes of its chunks, from workers that are there for the length of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

from django.db import Error

from parallel_orm import errors, faults
from parallel_orm.chunks import Chunk
from parallel_orm.dispatch import Cut, InTurn, Supply, Window, dispatch
from parallel_orm.executors import workers_for
from parallel_orm.executors.choice import Choice
from parallel_orm.keeping import Everything, Nothing
from parallel_orm.options import Options
from parallel_orm.outcomes import Failed, Outcome, named, opened
from parallel_orm.pace import Pace
from parallel_orm.plan import Plan
from parallel_orm.progress import listener_for, told
from parallel_orm.report import Report, attach
from parallel_orm.retries import may_pass
from parallel_orm.snapshots import Snapshot, snapshot_of
from parallel_orm.task import Job
from parallel_orm.work import Apply
from parallel_orm.workers import Crew


@dataclass(frozen=True, slots=True)
class Run:
    """What those need who gather the outcomes."""

    outcomes: Iterator[Outcome]
    window: Window
    supply: Supply


@contextmanager
def mapping(
    plans: Sequence[Plan], work: Apply, options: Options, choice: Choice, report: Report, *, in_turn: bool = False
) -> Iterator[Run]:
    """Have each chunk of some plans worked on as it is taken; write down in the report what became of it.

    One plan after the other, or chunks of all plans ``in_turn``.
    """
    try:
        with ExitStack() as stack:
            yield _begun(plans, work, options, choice, report, stack, in_turn=in_turn)
    except BaseException as error:
        if not isinstance(error, GeneratorExit):
            attach(report, error)
        raise


def _begun(
    plans: Sequence[Plan],
    work: Apply,
    options: Options,
    choice: Choice,
    report: Report,
    stack: ExitStack,
    *,
    in_turn: bool,
) -> Run:
    snapshots: dict[str, Snapshot] = {}
    for plan in plans:
        if plan.alias not in snapshots:
            snapshot = snapshot_of(plan.alias, plan.session, wanted=plan.consistent)
            snapshots[plan.alias] = stack.enter_context(snapshot)
    inline = next((plan.inline for plan in plans if plan.inline is not None), None)
    goes_on = options.on_error != "raise" or options.retries > 0
    work = replace(work, in_test=inline == "testcase" and goes_on)
    first, *others = (plan.job(replace(work, snapshot=snapshots[plan.alias].name)) for plan in plans)

    def cut(chunk: Chunk, rows: int) -> tuple[Chunk, Chunk | None]:
        with named_of_several(plans, chunk.alias), snapshots[chunk.alias].here():
            return plans[chunk.plan].in_two(chunk, rows)

    def keys_of(chunk: Chunk) -> list[Any]:
        with named_of_several(plans, chunk.alias), snapshots[chunk.alias].here():
            return plans[chunk.plan].keys_of(chunk)

    paces = [plan.pace(choice_number(choice, inline)) for plan in plans]
    by_plan = (
        snapshots[plan.alias].within(chunks)
        for plan, chunks in zip(plans, chunks_of_several(plans, paces), strict=True)
    )
    chunks = InTurn(by_plan) if in_turn else chain.from_iterable(by_plan)
    job = replace(first, others=tuple(others))
    parts = Parts(job, chunks, paces, cut, lambda: sum(plan.count() for plan in plans), keys_of)
    spread = None if options.on_error == "raise" else partial(row_by_row, keys_of=keys_of, work=work)
    has_effects = work.keep is Nothing
    run = running(
        parts,
        options,
        choice,
        report,
        stack,
        inline=inline,
        spread=spread,
        has_effects=has_effects,
        may_repeat=not has_effects or options.retries > 0,
    )
    return replace(run, outcomes=no_more_than(options.max_failures, run.outcomes, report))


def choice_number(choice: Choice, inline: str | None) -> int:
    """Return how many workers there will be."""
    return 1 if inline is not None else choice.number


@dataclass(frozen=True, slots=True)
class Parts:
    """What a call is made of: its job, and the chunks of that."""

    job: Job
    chunks: Iterator[Chunk]
    #: By the numbers of the plans.
    paces: Sequence[Pace]
    cut: Cut
    #: How many rows there are, if anybody knows; asked for progress.
    count: Callable[[], int | None]
    #: Lists the primary keys of the rows of a chunk.
    keys_of: Callable[[Chunk], list[Any]] = lambda chunk: []


def running(
    parts: Parts,
    options: Options,
    choice: Choice,
    report: Report,
    stack: ExitStack,
    *,
    inline: str | None,
    spread: Callable[[Iterator[Outcome]], Iterator[Outcome]] | None = None,
    may_pass: Callable[[Outcome], bool] = may_pass,
    left: Callable[[Future[Outcome], Chunk], object] | None = None,
    most_out: int | None = None,
    has_effects: bool = False,
    may_repeat: bool = True,
) -> Run:
    """Have workers for the length of the stack, and the chunks worked on as the outcomes are taken.

    ``spread`` is given the outcomes before anybody counts them; ``left`` what nobody takes any more; ``most_out`` is
    how many chunks may be out at once, where that is few; ``has_effects`` and ``may_repeat`` are said of a job.
    """
    crew = Crew(options.init_hook, options.end_hook)
    job = replace(
        parts.job,
        crew=crew,
        timeout=options.timeout,
        faults=tuple(faults.active),
        has_effects=has_effects,
        may_repeat=may_repeat,
    )
    listener = stack.enter_context(listener_for(options.progress, job.label))
    workers = stack.enter_context(workers_for(job, choice, report.end_results, inline=inline))
    window = Window(workers.window if most_out is None else most_out, workers.number)
    supply = Supply(parts.chunks, parts.paces, parts.cut, options.retries, may_pass)
    outcomes: Iterator[Outcome] = stack.enter_context(
        closing(
            dispatch(
                supply,
                workers.send,
                window,
                label_of=job.place_of,
                steal=workers.steal,
                left=left,
            )
        )
    )
    if spread is not None:
        outcomes = spread(outcomes)
    return Run(told(report.watch(outcomes), listener, parts.count), window, supply)


def chunks_of_several(plans: Sequence[Plan], paces: Sequence[Pace]) -> Iterator[Iterator[Chunk]]:
    """Yield the chunks of one plan after the other, which know the number of theirs."""

    def numbered(number: int, plan: Plan, pace: Pace) -> Iterator[Chunk]:
        chunks = plan.chunks(pace)
        while True:
            with named_of_several(plans, plan.alias):
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk if number == 0 else replace(chunk, plan=number)

    for number, (plan, pace) in enumerate(zip(plans, paces, strict=True)):
        yield numbered(number, plan, pace)


def named_of_several(plans: Sequence[Plan], alias: str) -> AbstractContextManager[None]:
    """Within: an error says which database it is of, if a call asks several."""
    return named(alias) if any(plan.alias != alias for plan in plans) else nullcontext()


def row_by_row(outcomes: Iterator[Outcome], *, keys_of: Callable[[Chunk], list[Any]], work: Apply) -> Iterator[Outcome]:
    """Yield the outcomes; of a chunk that was lost as a whole each row as one that failed."""
    for outcome in outcomes:
        error = outcome.error
        if error is not None and is_of_the_rows(outcome):
            keys = keys_of(outcome.chunk)
            items = [tuple(keys)] if work.batched and keys else keys
            in_places = work.keep is Everything
            failed = tuple(
                Failed(place if in_places else None, key, error, len(keys) if work.batched else 1)
                for place, key in enumerate(items)
            )
            value = [None] * len(items) if in_places else []
            outcome = replace(outcome, value=value, error=None, rows=len(keys), failed=failed)
        yield outcome


def is_of_the_rows(outcome: Outcome) -> bool:
    """Tell whether an error is one of these rows, or of their worker; and not of how the call was made."""
    error = None if outcome.error is None else opened(outcome.error)
    if isinstance(error, errors.WorkerDied | errors.ChunkTimedOut | errors.NotPicklable):
        return True
    return isinstance(error, Error) and not isinstance(error, errors.ParallelORMError) and outcome.stage == "database"


def no_more_than(most: int | None, outcomes: Iterator[Outcome], report: Report) -> Iterator[Outcome]:
    """Yield the outcomes until there are more failures than so many."""
    for outcome in outcomes:
        if most is not None and report.failed > most:
            raise errors.too_many_failures(report.failed, most) from report.errors[-1].error
        yield outcome
