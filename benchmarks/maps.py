"""Python on every row: a loop, ``parallel_map``, and ``ProcessPoolExecutor.map`` over ``iterator()``."""

from __future__ import annotations

import multiprocessing
import operator
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from time import perf_counter

import django

from benchmarks.measure import alternate, show, spin, timed, turns_that_take
from benchmarks.models import Article, table
from parallel_orm.executors.processes import end_pools
from parallel_orm.options import default_start_method

#: Seconds of pure Python a row.
SECONDS = 50e-6
PROCESSES = 2
#: Of which the executor gets the one that suits it best.
CHUNK_SIZES = (20, 100, 500, 2_500)


def compute(turns: int, row: Article) -> int:
    return spin(turns, row.pk)


def run(databases: dict[str, str], *, rounds: int | None, rows: int | None) -> None:
    rounds, rows = rounds or 7, rows or 50_000
    alias = next(iter(databases))
    with table(alias, rows):
        compare(alias, rows, rounds)


def compare(alias: str, rows: int, rounds: int) -> None:
    function = partial(compute, turns_that_take(SECONDS))
    queryset = Article.objects.using(alias).order_by("pk")
    # The executor's workers start as ours do. They are given the rows, so they need Django to open them.
    executor = ProcessPoolExecutor(
        PROCESSES, mp_context=multiprocessing.get_context(default_start_method()), initializer=django.setup
    )

    def loop() -> list[int]:
        return [function(row) for row in queryset.iterator()]

    def parallel() -> list[int]:
        return queryset.parallel_map(function, PROCESSES)

    def executed(chunk_size: int) -> list[int]:
        return list(executor.map(function, queryset.iterator(), chunksize=chunk_size))

    with executor:
        cold = cold_start(queryset.filter(pk__lte=PROCESSES).parallel_map)
        expected = loop()
        assert parallel() == expected
        tried = {size: partial(executed, size) for size in CHUNK_SIZES}
        assert all(each() == expected for each in tried.values())
        tuned = alternate({str(size): timed(each) for size, each in tried.items()}, 3)
        best = min(tuned, key=lambda size: min(tuned[size]))
        variants = {
            "a loop over iterator()": timed(loop),
            "parallel_map": timed(parallel),
            f"ProcessPoolExecutor.map, chunksize={best}": timed(tried[int(best)]),
        }
        taken = alternate(variants, rounds)
    title = f"{SECONDS * 1e6:.0f} microseconds of Python a row, {rows:,} rows, {PROCESSES} processes, {alias}"
    show(title, taken, ["a loop over iterator()", "parallel_map"])
    others = ", ".join(f"{size}: {min(values) * 1000:,.0f} ms" for size, values in tuned.items())
    print(f"The executor by chunksize (best of 3): {others}.")
    print(f"Start of our {PROCESSES} workers and of the first map, apart from the above: {cold * 1000:,.0f} ms.\n")


def cold_start(parallel_map: Callable[..., object]) -> float:
    """Seconds that a map of so many rows as processes takes when none of them has been started."""
    end_pools()
    began = perf_counter()
    parallel_map(operator.attrgetter("pk"), PROCESSES, chunk_size=1)
    return perf_counter() - began
