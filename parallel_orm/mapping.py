"""A map under way: the outcomes of its chunks, from workers that are there for the length of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace

from parallel_orm.dispatch import Supply, Window, dispatch
from parallel_orm.executors import workers_for
from parallel_orm.options import Options
from parallel_orm.outcomes import Outcome
from parallel_orm.plan import Plan
from parallel_orm.progress import listener_for, told
from parallel_orm.report import Report
from parallel_orm.snapshots import snapshot_of
from parallel_orm.task import Apply


@dataclass(frozen=True, slots=True)
class Run:
    """What those need who gather the outcomes."""

    outcomes: Iterator[Outcome]
    window: Window
    supply: Supply


@contextmanager
def mapping(plan: Plan, work: Apply, options: Options, report: Report) -> Iterator[Run]:
    """Have each chunk of a plan worked on as it is taken; write down in the report what became of it."""
    with snapshot_of(plan.alias, plan.session, wanted=plan.consistent) as snapshot:
        job = plan.job(replace(work, snapshot=snapshot.name))
        with (
            listener_for(options.progress, job.label) as listener,
            workers_for(job, options, inline=plan.inline) as workers,
        ):
            window, pace = Window(workers.window, workers.number), plan.pace(workers.number)
            supply = Supply(snapshot.within(plan.chunks(pace)), pace, plan.in_two)
            with closing(dispatch(supply, workers.send, window, label=job.label)) as outcomes:
                yield Run(told(report.watch(outcomes), listener, plan.count), window, supply)
