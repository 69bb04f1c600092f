"""Python on every row: a loop, ``parallel_map``, and what people use instead of it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from time import monotonic, perf_counter
from typing import Any

import django
import psutil

from benchmarks import work
from benchmarks.measure import Measure, alternate, show, timed, turns_that_take, typical
from benchmarks.models import Article, table
from parallel_orm.executors.processes import end_pools
from parallel_orm.options import default_start_method

#: Seconds of pure Python a row, and how many rows of it.
WORK = {50e-6: 50_000, 1e-3: 5_000}
PROCESSES = 2
#: Rows a chunk, of which each of the others gets the number that suits it best.
CHUNK_SIZES = (20, 100, 500, 2_500)

#: Maps the function over the rows, so many a chunk.
Map = Callable[[Any, Any, int], list[Any]]


def run(databases: dict[str, str], *, rounds: int | None, rows: int | None) -> None:
    alias = next(iter(databases))
    for seconds, number in WORK.items():
        with table(alias, rows or number):
            compare(alias, rows or number, rounds or 7, seconds)


def compare(alias: str, rows: int, rounds: int, seconds: float) -> None:
    turns = turns_that_take(seconds)
    function, plain = partial(work.compute, turns), Article.plain.using(alias).order_by("pk")
    queryset = Article.objects.using(alias).order_by("pk")
    with ExitStack() as stack:
        cold = timed(lambda: queryset.filter(pk__lte=PROCESSES).parallel_map(work.key, PROCESSES, chunk_size=1))
        end_pools()
        started = cold()
        ways: dict[str, Callable[[], list[int]]] = {
            "a loop over iterator()": lambda: [function(row) for row in plain.iterator()],
            "parallel_map": lambda: queryset.parallel_map(function, PROCESSES),
        }
        expected = ways["a loop over iterator()"]()
        for name, map_ in others(stack).items():
            best, taken = best_of({size: partial(map_, function, plain, size) for size in CHUNK_SIZES}, expected)
            ways[f"{name}, {best} a chunk"] = partial(map_, function, plain, best)
            print(f"{name}, by rows a chunk: " + ", ".join(f"{s}: {t * 1e3:,.0f} ms" for s, t in taken.items()) + ".")
        if find_spec("dask"):
            ways["dask.bag of key ranges, made by hand"] = partial(by_dask_ranges, stack, alias, turns, rows)
        for name, way in ways.items():
            assert way() == expected, name
        processor: dict[str, list[float]] = {name: [] for name in ways}
        taken_by = alternate({name: with_processor(way, processor[name]) for name, way in ways.items()}, rounds)
    title = f"{seconds * 1e6:,.0f} microseconds of Python a row, {rows:,} rows, {PROCESSES} processes, {alias}"
    print()
    show(f"{title}, time", taken_by, ["a loop over iterator()", "parallel_map"])
    show(f"{title}, processor time of all processes", processor, ["a loop over iterator()", "parallel_map"])
    print(f"Start of our {PROCESSES} workers and of the first map, apart from the above: {started * 1e3:,.0f} ms.\n")


def best_of(ways: dict[int, Callable[[], list[int]]], expected: list[int]) -> tuple[int, dict[int, float]]:
    """Return the best number of rows a chunk, and how long each took at best."""
    assert all(way() == expected for way in ways.values())
    taken = {size: min(values) for size, values in alternate({s: timed(w) for s, w in ways.items()}, 3).items()}
    return min(taken, key=lambda size: taken[size]), taken


def others(stack: ExitStack) -> dict[str, Map]:
    """Return what else maps over rows, with workers that are warm."""
    # Their workers start as ours do. They are given the rows, so they need Django to open them.
    context = multiprocessing.get_context(default_start_method())
    executor = stack.enter_context(ProcessPoolExecutor(PROCESSES, mp_context=context, initializer=django.setup))
    found: dict[str, Map] = {
        "ProcessPoolExecutor.map": lambda fn, rows, size: list(executor.map(fn, rows.iterator(), chunksize=size))
    }
    if find_spec("mpire"):
        from mpire import WorkerPool

        pool = stack.enter_context(WorkerPool(PROCESSES, start_method=default_start_method(), keep_alive=True))

        def by_mpire(fn: Any, rows: Any, size: int) -> list[Any]:
            number = rows.count()
            return list(pool.imap(fn, ((row,) for row in rows.iterator()), iterable_len=number, chunk_size=size))

        found["mpire"] = by_mpire
    if find_spec("joblib"):
        from joblib import Parallel, delayed

        def by_joblib(fn: Any, rows: Any, size: int) -> list[Any]:
            return list(Parallel(PROCESSES, batch_size=size)(delayed(fn)(row) for row in rows.iterator()))

        found["joblib"] = by_joblib
    if find_spec("dask"):
        from dask import bag

        def by_dask(fn: Any, rows: Any, size: int) -> list[Any]:
            return list(bag.from_sequence(rows.iterator(), partition_size=size).map(fn).compute(pool=executor))

        found["dask.bag of instances"] = by_dask
    for name in ("mpire", "joblib", "dask"):
        if not find_spec(name):
            print(f"{name} is not installed, and left out.")
    return found


def by_dask_ranges(stack: ExitStack, alias: str, turns: int, rows: int) -> list[int]:
    from dask import bag

    size = -(-rows // 20)
    ranges = [(start, start + size) for start in range(1, rows + 1, size)]
    executor = dask_executor(stack)
    parts = bag.from_sequence(ranges, partition_size=1).map(partial(work.compute_range, turns, alias))
    return list(parts.flatten().compute(pool=executor))


_executors: dict[int, ProcessPoolExecutor] = {}


def dask_executor(stack: ExitStack) -> ProcessPoolExecutor:
    """Return the same processes for all calls of a run."""
    if id(stack) not in _executors:
        context = multiprocessing.get_context(default_start_method())
        executor = ProcessPoolExecutor(PROCESSES, mp_context=context, initializer=django.setup)
        _executors[id(stack)] = stack.enter_context(executor)
    return _executors[id(stack)]


def with_processor(way: Callable[[], object], processor: list[float]) -> Measure:
    """Return a measure in seconds, which also notes the processor time of this process and of those below it."""

    def measure() -> float:
        with processor_time(processor):
            return timed(way)()

    return measure


@contextmanager
def processor_time(noted: list[float]) -> Iterator[None]:
    before = by_process()
    yield
    noted.append(sum(seconds - before.get(process, 0.0) for process, seconds in by_process().items()))


def by_process() -> dict[int, float]:
    own = psutil.Process()
    found: dict[int, float] = {}
    for process in [own, *own.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        found[process.pid] = times.user + times.system
    return found


# --- What a call, a chunk and a stream cost --------------------------------------------


def engine(databases: dict[str, str], *, rounds: int | None, rows: int | None) -> None:
    """The cost of a call and of a chunk, of a function that does nothing, and of what is uneven."""
    alias, rounds, rows = next(iter(databases)), rounds or 7, rows or 100_000
    with table(alias, rows):
        queryset = Article.objects.using(alias)
        queryset[:10].parallel_map(work.key, PROCESSES)
        small = queryset.filter(pk__lte=PROCESSES)
        title = f"{rows:,} rows, {PROCESSES} warm processes, {alias}"
        calls = {
            "until the function is called": typical(lambda: until_called(small), 20),
            "until the results are there": typical(
                timed(lambda: small.parallel_map(work.key, PROCESSES, chunk_size=1)), 20
            ),
        }
        show(f"A call over two rows, two chunks, {title}", alternate(calls, rounds), [])
        ways = {
            "a loop over iterator()": timed(
                lambda: [work.nothing(row) for row in Article.plain.using(alias).iterator()]
            ),
            "parallel_map": timed(lambda: queryset.parallel_map(work.nothing, PROCESSES)),
            "parallel_each": timed(lambda: queryset.parallel_each(work.nothing, PROCESSES)),
        }
        show(f"A function that does nothing, {title}", alternate(ways, rounds), ["a loop over iterator()"])
        chunks = 1_000
        some = queryset.filter(pk__lte=chunks)
        costs = {
            "parallel_map": lambda: timed(lambda: some.parallel_each(work.nothing, PROCESSES, chunk_size=1))() / chunks
        }
        show(f"A chunk of one row, among {chunks:,}, {title}", alternate(costs, rounds), [])
        first_result(queryset, rounds, title)
        uneven(queryset, rounds, rows, title)


def until_called(queryset: Any) -> float:
    began = monotonic()  # one clock for all processes
    return float(min(queryset.parallel_map(work.now, PROCESSES, chunk_size=1))) - began


def first_result(queryset: Any, rounds: int, title: str) -> None:
    function = partial(work.compute, turns_that_take(50e-6))

    def first() -> None:
        with queryset.parallel_imap(function, PROCESSES, chunk_size=1_000) as stream:
            next(stream)

    def began() -> float:
        start = perf_counter()
        stream = queryset.parallel_imap(function, PROCESSES, chunk_size=1_000)
        next(stream)
        taken = perf_counter() - start
        stream.close()
        return taken

    one = queryset.filter(pk__lte=1_000)
    ways = {
        "one chunk of 1,000 rows": timed(lambda: [function(row) for row in one.iterator()]),
        "the first of parallel_imap": began,
    }
    show(f"50 microseconds a row, the first result, {title}", alternate(ways, rounds), ["one chunk of 1,000 rows"])


def uneven(queryset: Any, rounds: int, rows: int, title: str) -> None:
    """Work and keys that lie unevenly, by what the workers had to do at least."""
    function = partial(work.compute_unevenly, turns_that_take(5e-6))
    even = partial(work.compute, turns_that_take(5e-6))
    skewed = queryset.filter(pk__gt=rows * 0.99) | queryset.filter(pk__lte=rows * 0.99, pk__endswith="7")

    def by_ideal(rows: Any, function: Any) -> Measure:
        def measure() -> float:
            report = rows.parallel_map(function, PROCESSES).report
            done = report.database_seconds + report.function_seconds + report.shipping_seconds
            return float(report.seconds / (done / PROCESSES))

        return measure

    ways = {
        "even": by_ideal(queryset, even),
        "1 % of the rows take 100 times as long": by_ideal(queryset, function),
        "keys with gaps": by_ideal(skewed, partial(work.compute, turns_that_take(50e-6))),
    }
    show(f"Seconds by those of an ideal split, {title}", alternate(ways, rounds), [], unit="x", factor=1)
