"""What makes a function come to something else in parallel than in a loop: found by running it every way."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from django.db import connections
from django.db.models import QuerySet

from parallel_orm import errors, guards
from parallel_orm.chunks import describe_key, keys_of
from parallel_orm.executors.processes import process_pool
from parallel_orm.failures import message_of
from parallel_orm.family import MapCall
from parallel_orm.options import Options, from_settings
from parallel_orm.parcels import Parcel
from parallel_orm.task import Job
from parallel_orm.workers import Crew, as_worker

Function = Callable[[Any], Any]

#: Sizes of the chunks that it is run in.
SIZES = (1, 2, 3, 7)
#: Rows that a finding names.
SHOWN = 5


class Raised:
    """What a function raised, to be compared with what it came to another time."""

    def __init__(self, error: Exception) -> None:
        self.text = message_of(error)


def findings(queryset: QuerySet[Any, Any], fn: Function, equal: Callable[[Any, Any], bool]) -> list[str]:
    """Return what the results depend on, a line each; nothing where they depend on nothing but their rows.

    A function that was packed and opened again has its own copy of what it closes over, so each loop begins anew.
    """
    try:
        call = MapCall("assert_parallel_safe", [queryset], fn, Options(executor="inline"))
        parcel = Parcel.of(call.plans[0].job(call.work))
    except errors.NotPicklable as error:
        return [f"unpicklable: {error}"]

    def read() -> list[Any]:
        return list(queryset.all())

    rows = read()
    keys, order = keys_of(rows, queryset), range(len(rows))
    with listening(queryset.db) as heard:
        expected = loop(parcel, rows, [order])
    found = transaction_findings(heard)

    for key, result in zip(keys, expected, strict=True):
        try:
            pickle.loads(pickle.dumps(result))
        except Exception as error:
            if not isinstance(result, Raised):
                of = f"{describe_key(key)}: {type(error).__name__}: {error}"
                return [*found, f"unpicklable: its result for primary key {of}"]

    def differing(chunks: Sequence[Sequence[int]]) -> str:
        return rows_that_differ(expected, loop(parcel, read(), chunks), keys, equal)

    if where := differing([order]):
        return [*found, f"state: two loops differ at {where}: time, chance, or a global that it changes itself"]
    shuffled = random.Random(0).sample(order, len(order))  # noqa: S311 - the same each time
    if where := differing([order[::-1]]) or differing([shuffled]):
        found.append(f"order: in another order of the rows, other results at {where}")
    for size in SIZES:
        if where := differing([order[start : start + size] for start in range(0, len(rows), size)]):
            found.append(f"state: in chunks of {size} rows, each elsewhere, other results at {where}")
            break
    results = in_a_process(queryset, parcel, read(), asks=bool(heard))
    if isinstance(results, str):
        return [*found, results]
    if results is not None and (where := rows_that_differ(expected, results, keys, equal)):
        found.append(f"process: in a worker process, other results at {where}: {ELSEWHERE}")
    return found


#: What a worker process has not.
ELSEWHERE = (
    "something in the memory of this one (a global, a cache, something patched), or writes that are not committed"
)


def loop(parcel: Parcel, rows: Sequence[Any], chunks: Sequence[Sequence[int]]) -> list[Any]:
    """Return the results for rows, in their order, made chunk by chunk, by a function that is opened for each chunk."""
    results: dict[int, Any] = {}
    for chunk in chunks:
        job: Job = pickle.loads(parcel.job)
        with Crew().at_work():
            results |= {place: result_of(function_of(job), rows[place]) for place in chunk}
    return [results[place] for place in sorted(results)]


def function_of(job: Job) -> Function:
    function: Function = job.work.function  # type: ignore[union-attr]
    return function


def result_of(function: Function, row: Any) -> Any:
    try:
        return function(row)
    except Exception as error:
        return Raised(error)


def in_a_process(
    queryset: QuerySet[Any, Any], parcel: Parcel, rows: list[Any], *, asks: bool
) -> list[Any] | str | None:
    """Return the results of a worker process, or what keeps it from any. None: rows of a transaction are not there, and
    the function ``asks`` the database.
    """
    try:
        inline, _ = guards.where_to_map("assert_parallel_safe", queryset)
    except errors.ParallelORMError as error:
        return f"transaction: {error}"
    if inline is not None and asks:
        return None
    with process_pool(1, from_settings().START_METHOD) as pool:
        try:
            results: list[Any] = pool.submit(results_there, parcel, pickle.dumps(rows)).result()
        except Exception as error:
            return f"process: it could not be run in a worker process: {type(error).__name__}: {error}"
        finally:
            pool.end(parcel)
    return results


def results_there(parcel: Parcel, rows: bytes) -> list[Any]:
    """Call the function for these rows in a worker process."""
    job = parcel.open()

    def run() -> list[Any]:
        with as_worker(), Crew().at_work():
            return [result_of(function_of(job), row) for row in pickle.loads(rows)]

    return job.capsule.run(run)


def rows_that_differ(
    expected: list[Any], results: list[Any], keys: list[Any], equal: Callable[[Any, Any], bool]
) -> str:
    """Return the primary keys of the rows whose results differ, in words; nothing where none do."""
    if len(expected) != len(results):
        return "the number of rows"

    def are_same(one: Any, other: Any) -> bool:
        if isinstance(one, Raised) or isinstance(other, Raised):
            return isinstance(one, Raised) and isinstance(other, Raised) and one.text == other.text
        return bool(equal(one, other))

    pairs = zip(keys, expected, results, strict=True)
    found = [describe_key(key) for key, one, other in pairs if not are_same(one, other)]
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return f"primary keys {', '.join(found[:SHOWN])}{more}" if found else ""


@contextmanager
def listening(alias: str) -> Iterator[list[str]]:
    """Have a list of what is asked of a database within, and of callbacks that are left for the caller's commit."""
    connection = connections[alias]
    heard: list[str] = []
    depth, callbacks = len(connection.atomic_blocks), len(connection.run_on_commit)

    def listen(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        # Within an atomic() of the function's own, which is a savepoint of the caller's transaction, it may lock.
        heard.append(sql if len(connection.atomic_blocks) == depth else "")
        return execute(sql, params, many, context)

    with connection.execute_wrapper(listen):
        yield heard
    if connection.in_atomic_block and len(connection.run_on_commit) > callbacks:
        heard.append(ON_COMMIT)


#: What stands for a callback among the queries.
ON_COMMIT = "on_commit()"


def transaction_findings(heard: list[str]) -> list[str]:
    found = []
    if any(" FOR UPDATE" in sql.upper() for sql in heard):
        found.append("transaction: it locks rows (FOR UPDATE) without an atomic() of its own, which a worker has not")
    if ON_COMMIT in heard:
        found.append("transaction: it calls on_commit(), which runs at once in a worker, that is in no transaction")
    return found
