"""Long runs: workers that are killed at random, and the memory of the caller."""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import threading
from operator import add

import psutil

from benchmarks import work
from benchmarks.maps import PROCESSES
from benchmarks.measure import timed
from benchmarks.models import Article, table
from parallel_orm.executors.processes import WORKER_NAME, _pools, end_pools

#: Seconds between two deaths, at most.
BETWEEN = 1.0


def kill(databases: dict[str, str], *, rounds: int | None, rows: int | None) -> None:
    """Sum the keys of a big table while workers are killed at random; the sum must be exact."""
    alias, rows = next(iter(databases)), rows or 5_000_000
    with table(alias, rows):
        queryset = Article.objects.using(alias)
        queryset[:10].parallel_map(work.key, PROCESSES)
        over, killed = threading.Event(), 0

        def killer() -> None:
            nonlocal killed
            chance = random.Random(0)
            while not over.wait(chance.random() * BETWEEN):
                pids = [pid for pool in _pools.values() for pid in pool.pids()]
                if pids:
                    os.kill(chance.choice(pids), signal.SIGKILL)
                    killed += 1

        thread = threading.Thread(target=killer)
        thread.start()
        try:
            total = 0
            seconds = 0.0

            def sum_up() -> None:
                nonlocal total
                total = queryset.parallel_reduce(work.key, add, 0, PROCESSES, retries=20)

            seconds = timed(sum_up)()
        finally:
            over.set()
            thread.join()
        assert total == rows * (rows + 1) // 2, "the sum is not exact"
        end_pools()
        left = [process for process in psutil.Process().children(recursive=True) if WORKER_NAME in process.name()]
        print(
            f"{rows:,} rows, {killed} workers killed in {seconds:.0f} s: the sum is exact, {len(left)} workers left.\n"
        )


def each(databases: dict[str, str], *, rounds: int | None, rows: int | None) -> None:
    """How far the memory of the caller grows in a long ``parallel_each``."""
    alias, rows = next(iter(databases)), rows or 5_000_000
    with table(alias, rows):
        queryset = Article.objects.using(alias)
        queryset[:10].parallel_map(work.key, PROCESSES)
        before = peak()
        seconds = timed(lambda: queryset.parallel_each(work.nothing, PROCESSES))()
        print(
            f"parallel_each over {rows:,} rows, {seconds:.0f} s: the caller's peak grew by {peak() - before:.1f} MB.\n"
        )


def peak() -> float:
    """Return the most memory that this process had so far, in MB."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
