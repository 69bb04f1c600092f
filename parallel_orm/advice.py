"""What to do about a call, in sentences: a pure function of its report.

A rule says something only where the numbers prove it, and then what to do; of a call that went well there is nothing
to be said.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from parallel_orm.errors import ChunkTimedOut, WorkerDied

if TYPE_CHECKING:
    from parallel_orm.report import Report

#: Seconds of waiting below which nobody need change anything.
WORTH = 0.2
#: The share of the workers' time from which on one thing is what they do.
MOST = 0.6
#: The share of the time from which on it is too much for what helps nobody: packing results, waiting between chunks.
MUCH = 0.3
#: How much of the time a loop may take that is called faster.
CLEARLY = 0.9
#: The skew from which on the work was shared unevenly.
UNEVEN = 1.5
#: Seconds of work below which a chunk is small.
SMALL = 0.02
#: Seconds of computing a second that are one core's, as threads have one together.
ONE_CORE = (0.8, 1.2)
#: Seconds that one snapshot may be held without a word.
LONG = 600.0


def of(report: Report) -> list[str]:
    """Return the advice of all rules."""
    rules = OF_WRITES if report.call.writes else RULES
    return [sentence for rule in rules if (sentence := rule(report))]


def a_loop(report: Report) -> str | None:
    """Chunks cost more than they save."""
    loop = report.database_seconds + report.function_seconds
    # A stream waits for whoever takes from it, and what failed or was tried again has taken time that is not told.
    if report.reason or not report.rows or is_stream(report) or report.failed or report.retries or small_chunks(report):
        return None
    if loop > report.seconds * CLEARLY:
        return None
    began = first_began(report)
    until = f", {in_words(began)} of it before the first worker began" if began > report.seconds * MUCH else ""
    walk = "chunks()" if report.call.batched else "chunked_iterator()"
    return (
        f"Reading and running the function took {in_words(loop / report.rows)} a row: a loop over {walk} is faster, "
        f"{in_words(loop)} or less instead of {in_words(report.seconds)}{until}."
    )


def the_database(report: Report) -> str | None:
    """Workers wait for the server."""
    waited, worked = report.database_seconds - report.database_cpu_seconds, worked_seconds(report)
    if report.reason or waited < WORTH or waited < worked * MOST or waited_for_a_core(report):
        return None
    return (
        f"The database is the bottleneck: the workers waited for it for {waited / worked:.0%} of their time, and more "
        "of them will not help for long. Have it read less: only() or values_list() of what the function needs, an "
        "index for the filter (see explain_plan())."
    )


def instances(report: Report) -> str | None:
    """Rows are made at more expense than they are used."""
    made, worked = report.database_cpu_seconds, worked_seconds(report)
    if not report.call.instances or made < WORTH or made < worked * MOST:
        return None
    return (
        f"Reading model instances kept the workers busy for {made / worked:.0%} of their time, the function for "
        f"{report.function_seconds / worked:.0%}: if it needs a few columns only, map values_list() of these, with the "
        "primary key among them."
    )


def results(report: Report) -> str | None:
    """Results are dear."""
    packing, worked, size = report.shipping_seconds, worked_seconds(report), report.shipped_bytes
    unpacking = 0.0 if is_stream(report) or not size else report.caller_seconds
    told = []
    if packing >= max(WORTH, worked * MUCH):
        told.append(f"packing them took {packing / worked:.0%} of the workers' time")
    if unpacking >= max(WORTH, report.seconds * MOST):
        told.append(f"unpacking them took {unpacking / report.seconds:.0%} of the caller's")
    if report.reason or not told or report.call.verb.endswith("each"):
        return None
    instead = ""
    if not report.call.verb.endswith("reduce"):
        instead = ", combine them with parallel_reduce(), or use parallel_each() where none are needed"
    return (
        f"The results are {size / 1e6:,.1f} MB, and {' and '.join(told)}: return less of each row, plain numbers and "
        f"text instead of objects{instead}."
    )


def the_callers_loop(report: Report) -> str | None:
    """A stream waits for whoever takes from it."""
    took = report.caller_seconds
    if not is_stream(report) or report.reason or took < WORTH or took < report.seconds * MOST:
        return None
    return (
        f"The loop over the results took {took / report.seconds:.0%} of the time, and the workers waited for it: do "
        "more of its work in the function. More workers will not help."
    )


def threads_that_compute(report: Report) -> str | None:
    """Threads take turns with one core."""
    computed = report.database_cpu_seconds + report.function_cpu_seconds
    cores = computed / report.seconds if report.seconds else 0.0
    least, most = ONE_CORE
    if (
        report.reason
        or report.call.kind != "threads"
        or len(report.workers) < 2
        or computed < WORTH
        or not least <= cores <= most
    ):
        return None
    return (
        f"{len(report.workers)} threads computed for {in_words(computed)} in {in_words(report.seconds)}: as they "
        "compute one at a time, one of them would do. Use processes=."
    )


def an_uneven_share(report: Report) -> str | None:
    """Some worker was at it when all others had nothing to do any more."""
    waited = waited_at_the_end(report)
    if report.reason or report.skew < UNEVEN or waited < max(WORTH, report.seconds * MUCH):
        return None
    longest = max(report.timeline, key=lambda span: span.ended - span.began)
    what = f"One worker worked {report.skew:.1f} times as long as all should have"
    if longest.chunks == 1:
        took = in_words(longest.ended - longest.began)
        what += f", and chunk {longest.chunk} alone took {took} for {longest.rows:,} rows"
    if report.call.batched:
        return f"{what}: a list is done by one worker, so make lists shorter, by a smaller chunk_size=."
    if not report.call.parts:
        return (
            f"{what}: its chunks cannot come apart. Use a smaller chunk_size=; where rows are values() or "
            "values_list(), add the primary key, by which what is left of a chunk can be told."
        )
    return f"{what}: map the rows that take longest in a call of their own, before the others."


def small_chunks(report: Report) -> str | None:
    """Somebody said a chunk_size that makes chunks of no work."""
    size, workers = report.call.chunk_size, len(report.workers)
    paid = workers * (report.seconds - first_began(report) - report.caller_seconds)
    worked = worked_seconds(report)
    idle = paid - worked
    if report.reason or size is None or report.call.batched or report.chunks < 10 * workers:
        return None
    if worked / report.chunks > SMALL or idle < max(WORTH, paid * MUCH) or report.skew >= UNEVEN:
        return None
    return (
        f"Chunks of {size:,} rows are too small: each was {in_words(worked / report.chunks)} of work, and its worker "
        f"waited {in_words(idle / report.chunks)} for the next one. Leave chunk_size= out, or make it larger."
    )


def few_chunks(report: Report) -> str | None:
    """There was nothing to do for some workers."""
    call, chunks = report.call, report.chunks
    if report.reason or not 0 < chunks < min(call.number, report.rows) or worked_seconds(report) / chunks < WORTH:
        return None
    if call.chunk_size is None and not call.batched:
        return None  # steered: what took long came apart
    what, fitting = "lists" if call.batched else "chunks", max(1, report.rows // (4 * call.number))
    return f"{chunks} {what} are work for {chunks} of {call.number} workers: use chunk_size={fitting:_}."


def few_connections(report: Report) -> str | None:
    """Threads wait for a connection."""
    call, workers = report.call, len(report.workers)
    paid = workers * (report.seconds - report.caller_seconds)
    if (
        report.reason
        or call.kind != "threads"
        or not 0 < workers < call.number
        or report.chunks < 2 * call.number
        or paid < WORTH
        or worked_seconds(report) < paid * MOST
    ):
        return None
    return (
        f"{workers} of {call.number} threads took part, and were busy: as many as may have a connection. Raise the "
        f"setting CONNECTIONS to {call.number}, if the database bears it."
    )


def retries(report: Report) -> str | None:
    """Something is tried again and again."""
    asked, again = report.call.retries, report.retries
    sent_again = any(failure.chunk.attempt for failure in report.errors)
    if asked and report.failed and again == report.failed * asked and not sent_again:
        return (
            f"retries={asked} helped nothing: what failed was tried again {again:,} times, and failed all the same. "
            "Leave it out until the causes in report.errors are mended."
        )
    if again * 100 < max(report.rows, 1):
        return None
    return (
        f"{again:,} times something was tried again, each after a pause: have fewer workers if what they use is "
        "overloaded or locked, or mend what raises."
    )


def lost_workers(report: Report) -> str | None:
    """Processes ended or were killed."""
    lost = {failure.chunk.place: failure.error for failure in report.errors if is_lost(failure.error)}
    if not lost:
        return None
    late = sum(isinstance(error, ChunkTimedOut) for error in lost.values())
    told = []
    if late < len(lost):
        told.append(
            f"{len(lost) - late:,} chunks were lost with their workers: if these were out of memory, use a smaller "
            "chunk_size= or fewer processes="
        )
    if late:
        told.append(f"{late:,} chunks took longer than timeout=: use a smaller chunk_size=, or a longer timeout=")
    return f"{'; '.join(told)}."


def failures(report: Report) -> str | None:
    """Rows failed, and the others went on."""
    kinds = Counter(type(failure.error).__name__ for failure in report.errors if not is_lost(failure.error))
    if not kinds or report.call.on_error == "raise":
        return None
    names = ", ".join(f"{number:,} {name}" for name, number in kinds.most_common(3))
    more = ", ..." if len(kinds) > 3 else ""
    return (
        f"{kinds.total():,} failed ({names}{more}): report.errors has primary keys and tracebacks. When the cause is "
        "mended, report.retry() does what failed, and nothing else."
    )


def a_long_snapshot(report: Report) -> str | None:
    """A transaction is kept open."""
    if report.reason or not report.call.consistent or report.seconds < LONG:
        return None
    return (
        f"consistent=True kept one snapshot for {in_words(report.seconds)}, in which the database could not clean up "
        "what was updated or deleted: leave it out where rows need not be as of one moment, or map a part at a time."
    )


def one_writer(report: Report) -> str | None:
    """More workers were asked for than may write at once."""
    if not report.call.has_one_writer or report.reason:
        return None
    return "SQLite has one writer at a time: one worker wrote, however many were asked for."


def unknown_writes(report: Report) -> str | None:
    """Nobody knows what is in the database."""
    if not (number := len(report.unknown)):
        return None
    return (
        f"Of {number:,} failures nobody knows whether their rows are in the database: report.unknown names them. A "
        "call with run_id= writes down what is, and is made again where this one was lost."
    )


RULES = (
    a_loop,
    the_database,
    instances,
    results,
    the_callers_loop,
    threads_that_compute,
    an_uneven_share,
    small_chunks,
    few_chunks,
    few_connections,
    retries,
    lost_workers,
    failures,
    a_long_snapshot,
)


#: Those for calls that write, where a chunk is a transaction.
OF_WRITES = (one_writer, retries, lost_workers, unknown_writes, failures)


def worked_seconds(report: Report) -> float:
    """Return what all workers did, in seconds."""
    return report.database_seconds + report.function_seconds + report.shipping_seconds


def waited_for_a_core(report: Report) -> bool:
    """Tell whether workers may have waited for a core, or threads for each other: their functions would have, too."""
    if report.function_cpu_seconds < report.function_seconds * MOST:
        return True
    return threads_that_compute(report) is not None


def first_began(report: Report) -> float:
    """Return when the first chunk was begun, in seconds since the call."""
    return min((span.began for span in report.timeline), default=0.0)


def waited_at_the_end(report: Report) -> float:
    """Return how long the workers had nothing to do any more, on average, when one of them was still at it."""
    ends: dict[str, float] = {}
    for span in report.timeline:
        ends[span.worker] = max(span.ended, ends.get(span.worker, 0.0))
    return max(ends.values()) - sum(ends.values()) / len(ends) if ends else 0.0


def is_stream(report: Report) -> bool:
    return report.call.verb.endswith("imap")


def is_lost(error: BaseException) -> bool:
    return isinstance(error, WorkerDied | ChunkTimedOut)


def in_words(seconds: float) -> str:
    """Return a time for people: ``12 us``, ``3.4 ms``, ``1.2 s``, ``12 min``."""
    if seconds == 0:
        return "0 s"
    if seconds >= 120:
        return f"{seconds / 60:.0f} min"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size or unit == "us":
            number = seconds / size
            return f"{number:.1f} {unit}" if number < 10 else f"{number:.0f} {unit}"
    raise AssertionError
