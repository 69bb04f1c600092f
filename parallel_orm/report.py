"""What happened: rows, chunks, times, workers, failures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from time import perf_counter, time
from typing import Any, TypeVar

from parallel_orm import advice, errors
from parallel_orm.failures import Failure
from parallel_orm.outcomes import Failed, Outcome, Packed, opened
from parallel_orm.report_page import page_of

Result = TypeVar("Result")

#: How many chunks a timeline tells apart. Where there are more, neighbours of one worker become one.
SPANS = 2_000
#: The name under which an exception has its report.
REPORT = "_parallel_orm_report"


@dataclass(slots=True)
class Span:
    """What one worker did without a break: one chunk; of a long call, several in a row."""

    worker: str
    #: Of the first chunk.
    chunk: int
    chunks: int
    rows: int
    failed: int
    #: Seconds since the call began.
    began: float
    ended: float
    database: float
    function: float
    shipping: float
    #: What ended it, if that was an error.
    error: str = ""

    def with_next(self, other: Span) -> Span:
        """Return both as one."""
        return Span(
            self.worker,
            self.chunk,
            self.chunks + other.chunks,
            self.rows + other.rows,
            self.failed + other.failed,
            self.began,
            max(self.ended, other.ended),
            self.database + other.database,
            self.function + other.function,
            self.shipping + other.shipping,
            self.error or other.error,
        )


@dataclass(frozen=True, slots=True)
class Call:
    """What was asked for, as far as advice depends on it."""

    verb: str = ""
    #: The name of the function.
    function: str = ""
    #: The models.
    label: str = ""
    #: What worked: "inline", "threads", "processes", an "engine", or what was "given".
    kind: str = "processes"
    #: How many workers there could be.
    number: int = 1
    #: Rows a chunk, where somebody said it.
    chunk_size: int | None = None
    on_error: str = "raise"
    retries: int = 0
    batched: bool = False
    consistent: bool = False
    #: Whether rows were model instances.
    instances: bool = False
    #: Whether a chunk that took long could come apart.
    parts: bool = True
    #: Whether its chunks were transactions.
    writes: bool = False
    #: Whether no two of these could be at work at once, and more workers were asked for.
    has_one_writer: bool = False


@dataclass
class Report:
    """What one call did. Seconds of the workers are added up, so that they may be more than ``seconds``."""

    #: Rows done, those that failed too; without those of a chunk that ended the call.
    rows: int = 0
    #: Chunks that came back; one that came apart counts as its parts.
    chunks: int = 0
    #: Rows whose function returned.
    succeeded: int = 0
    #: Rows, or where ``batched`` lists of rows, whose function raised, or that were lost with their worker.
    failed: int = 0
    #: Results that were None, and left out; rows that an update left as they were.
    skipped: int = 0
    #: Rows that an earlier run with the same ``run_id`` had written; not among ``rows``.
    done_before: int = 0
    #: Of a delete the rows deleted by model, as Django's ``delete()`` tells; of ``parallel_update_or_create`` how many
    #: were "created" and "updated".
    counts: dict[str, int] = field(default_factory=dict)
    #: How often a function was called again for a row, or a chunk sent again that was lost.
    retries: int = 0
    #: One :class:`Failure` for each that failed, in the order in which they came in.
    errors: list[Failure] = field(default_factory=list)
    #: Primary keys of the rows that succeeded (of an update, that were changed), chunk by chunk as they came in; with
    #: ``keys=True``.
    keys: list[Any] = field(default_factory=list)
    #: From the first chunk that is sent to the last one that is back, as the caller waited.
    seconds: float = 0.0
    #: In the workers: reading rows, running the function, packing results.
    database_seconds: float = 0.0
    function_seconds: float = 0.0
    shipping_seconds: float = 0.0
    #: Of the first two those in which a worker computed. In the others it waited: for a server, for a lock, for a core.
    database_cpu_seconds: float = 0.0
    function_cpu_seconds: float = 0.0
    #: Of ``seconds`` those in which the caller took results: unpacked them and, of a stream, ran its loop.
    caller_seconds: float = 0.0
    #: Of the results that came from other processes, as they were packed.
    shipped_bytes: int = 0
    #: Rows by database.
    by_alias: dict[str, int] = field(default_factory=dict)
    #: Rows by worker, as "process id/thread".
    workers: dict[str, int] = field(default_factory=dict)
    #: What the ``end_hook`` of each worker returned.
    end_results: list[Any] = field(default_factory=list)
    #: Why the call ran in the caller's process ("testcase", "memory", "nested", "inline"), or None.
    reason: str | None = None
    #: What each worker did when; of a long call the chunks of a worker are told in groups.
    timeline: list[Span] = field(default_factory=list, repr=False)
    #: What was asked for.
    call: Call = field(default=Call(), repr=False)
    _again: Callable[[list[Failure]], Any] | None = field(default=None, repr=False, compare=False)

    @property
    def unknown(self) -> list[Failure]:
        """Those of ``errors`` of which nobody knows whether they are in the database: their worker was lost, or the
        connection at the commit. A chunk is there as a whole, or not at all.
        """
        return [failure for failure in self.errors if failure.committed is None]

    @property
    def rows_per_second(self) -> float:
        """Rows by the seconds that the caller waited."""
        return self.rows / self.seconds if self.seconds else 0.0

    @property
    def skew(self) -> float:
        """How unevenly the work was shared: the seconds that the busiest worker worked, by the mean of all workers.

        1.0 is even; 3.0 says that one had three times its share. Of the workers that took part; 1.0 where there is
        nothing to compare.
        """
        busy = self.busy_seconds
        worked = sum(busy.values())
        return max(busy.values()) * len(busy) / worked if worked else 1.0

    @property
    def busy_seconds(self) -> dict[str, float]:
        """How long each worker worked: read, ran the function, packed results."""
        busy: dict[str, float] = {}
        for span in self.timeline:
            if span.worker:  # else it was lost, and nobody knows
                busy[span.worker] = busy.get(span.worker, 0.0) + span.database + span.function + span.shipping
        return busy

    def advice(self) -> list[str]:
        """Return what to do about this call, a sentence each; nothing where its numbers prove nothing wrong."""
        return advice.of(self)

    def to_html(self, path: str | PathLike[str]) -> None:
        """Write this report to a file that any browser shows, and that needs nothing else.

        It has the numbers, the advice, a timeline of the chunks by worker, and the first 100 failures with their
        tracebacks: mind who may read these.
        """
        Path(path).write_text(page_of(self), encoding="utf-8", errors="backslashreplace")

    def watch(self, outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
        """Yield the outcomes with their errors as the caller will find them, and write down what they tell."""
        began, since = perf_counter(), time()
        for outcome in outcomes:
            self.chunks += 1
            self.retries += outcome.retries + outcome.chunk.attempt
            self.database_seconds += outcome.timings.database
            self.function_seconds += outcome.timings.function
            self.shipping_seconds += outcome.timings.shipping
            self.database_cpu_seconds += outcome.timings.database_cpu
            self.function_cpu_seconds += outcome.timings.function_cpu
            if isinstance(outcome.value, Packed):
                self.shipped_bytes += len(outcome.value.data)
            self.done_before += outcome.done_before
            for name, number in outcome.counts.items():
                self.counts[name] = self.counts.get(name, 0) + number
            if outcome.error is None or outcome.committed:
                self._count(outcome)
            if outcome.error is not None:
                error = outcome.error
                raised = opened(error)
                outcome = replace(outcome, error=raised)
                nobody = outcome.key is None and outcome.failed_place is None
                is_chunk = nobody and (outcome.stage != "function" or self.call.writes)
                failed = Failed(None, outcome.key, error, committed=outcome.committed)
                failure = Failure.of(failed, outcome.chunk, is_chunk=is_chunk)
                failure.error = raised
                self.errors.append(failure)
                self.failed += not outcome.committed
            if outcome.failed:
                failures = tuple(Failure.of(failed, outcome.chunk) for failed in outcome.failed)
                outcome = replace(outcome, failures=failures)
                self.errors += failures
                self.failed += len(failures)
            self._draw(outcome, since)
            self.seconds = perf_counter() - began
            yield outcome
            del outcome  # it may be large, and is the caller's now
            taken = perf_counter() - began
            self.caller_seconds += taken - self.seconds
            self.seconds = taken

    def _count(self, outcome: Outcome) -> None:
        rows, alias = outcome.rows, outcome.chunk.alias
        self.rows += rows
        self.succeeded += rows - sum(failed.rows for failed in outcome.failed)
        self.skipped += outcome.skipped
        self.by_alias[alias] = self.by_alias.get(alias, 0) + rows
        self.workers[outcome.worker] = self.workers.get(outcome.worker, 0) + rows

    def _draw(self, outcome: Outcome, since: float) -> None:
        timings, error = outcome.timings, outcome.error
        began = max(0.0, (outcome.began or time()) - since)  # what was lost, when it became known
        took = timings.database + timings.function + timings.shipping
        self.timeline.append(
            Span(
                outcome.worker,
                outcome.chunk.index,
                1,
                outcome.rows,
                len(outcome.failed),
                began,
                began + took,
                timings.database,
                timings.function,
                timings.shipping,
                "" if error is None else type(error).__name__,
            )
        )
        if len(self.timeline) > SPANS:
            self.timeline = in_pairs(self.timeline)

    def retries_by(self, again: Callable[[list[Failure]], Any]) -> None:
        """Have :meth:`retry` do this."""
        self._again = again

    def retry(self) -> Any:
        """Run what failed once more, and nothing else: the rows of ``errors``, found by their primary keys.

        They are read as they are now: those that are gone, or no longer pass the queryset's filter, do not come. What
        had not been begun when the call ended is not run.

        :returns: what the call did, for these rows: a list with a ``report`` for a map or a stream (in the order of the
            queryset, where the call was ordered), a report for ``parallel_each``. This report stays as it is.
        :raises parallel_orm.errors.ParallelORMError: rows do not tell their primary keys, a join repeats a row that
            failed some of the times, the call was a reduction, or this report was pickled. Besides, what the call
            itself may raise.
        """
        if self._again is None:
            raise errors.nothing_to_retry("this report was pickled, or is not of a call that maps rows.")
        return self._again(self.errors)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_again": None}

    def __str__(self) -> str:
        where = "" if self.reason is None else f", in the caller's process ({self.reason})"
        failed = f", {self.failed:,} failed" if self.failed else ""
        if unknown := len(self.unknown):
            failed += f" ({unknown:,} of them may be in the database)"
        if self.done_before:
            failed += f", {self.done_before:,} done before"
        if sent := self.counts.get("sent"):
            failed += f", {sent:,} chunks sent of which nothing is heard"
        retries = f", {self.retries:,} retries" if self.retries else ""
        skew = f" (skew {self.skew:.1f})" if self.skew >= advice.UNEVEN else ""
        return (
            f"{self.rows:,} rows in {self.chunks:,} chunks{failed}{retries}, {self.seconds:.2f} s "
            f"({self.rows_per_second:,.0f} rows/s), "
            f"{len(self.workers)} workers{skew}{where}; in the workers {self.database_seconds:.2f} s database, "
            f"{self.function_seconds:.2f} s function, {self.shipping_seconds:.2f} s packing results"
        )


def report_of(error: BaseException) -> Report | None:
    """Return the report, so far, of the parallel call that raised this exception, or one that it came from.

    None where there is none: what is refused was never begun.
    """
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        if isinstance(attached := at.__dict__.get(REPORT), Attached):
            return attached.report
        seen.add(id(at))
        at = at.__cause__ or at.__context__
    return None


def attach(report: Report, error: BaseException) -> None:
    """Let :func:`report_of` find the report of an exception."""
    error.__dict__[REPORT] = Attached(report)  # past a __setattr__ that forbids it


@dataclass(frozen=True)
class Attached:
    """The report of an exception, which stays where it is when the exception travels."""

    report: Report | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Attached, ()


def in_pairs(timeline: list[Span]) -> list[Span]:
    """Return a timeline of half as many spans, in which two of each worker are one."""
    by_worker: dict[str, list[Span]] = {}
    for span in timeline:
        by_worker.setdefault(span.worker, []).append(span)
    merged: list[Span] = []
    for spans in by_worker.values():
        merged += [spans[place].with_next(spans[place + 1]) for place in range(0, len(spans) - 1, 2)]
        merged += spans[len(spans) & ~1 :]
    return sorted(merged, key=lambda span: span.began)
