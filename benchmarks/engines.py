"""Two workers of ours, of Dask and of Celery: the same call, on the same rows."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from time import monotonic, sleep
from typing import Any
from unittest import mock

from benchmarks import work
from benchmarks.maps import PROCESSES, WORK, with_processor
from benchmarks.measure import Measure, alternate, show, timed, turns_that_take
from benchmarks.models import Article, table
from benchmarks.soak import peak

OURS, BAG = "our processes", "dask.bag.from_sequence(queryset)"
#: Chunks of one row: for what a chunk costs, and for what many of them leave in the caller's memory.
FEW, MANY = 300, 100_000


def run(databases: dict[str, str], *, rounds: int | None, rows: int | None) -> None:
    """Time by our own processes, of 1 ms and of 50 microseconds a row; and what a chunk costs."""
    alias = next(iter(databases))
    with engines() as knobs:
        for seconds, number in reversed(WORK.items()):
            number = number if rows is None else round(rows * number / max(WORK.values()))
            with table(alias, number):
                compare(alias, number, rounds or 7, seconds, knobs)
        with table(alias, FEW):
            cost_of_a_chunk(alias, rounds or 7, knobs)


def memory(databases: dict[str, str], *, rounds: int | None, rows: int | None) -> None:
    """How far the caller's memory grows while it plans and sends chunks of one row.

    First to an engine that has an answer at once, which shows the caller alone: it plans, and writes and seals messages
    as for Celery. Then to the engines.
    """
    alias, rows = next(iter(databases)), rows or MANY
    with engines() as knobs, table(alias, rows):
        queryset = Article.objects.using(alias)
        if "Celery" in knobs:
            from parallel_orm.executors.celery import SENT, CeleryExecutor, _land

            with mock.patch.object(CeleryExecutor, "_send", lambda self, call, *_: _land(call.future, SENT)):
                grow(queryset, rows, "nobody, who answers at once", knobs["Celery"])
        for name, given in knobs.items():
            grow(queryset, rows, name, given)


def grow(queryset: Any, rows: int, name: str, given: dict[str, Any]) -> None:
    queryset.filter(pk__lte=FEW).parallel_each(work.nothing, PROCESSES, chunk_size=1, **given)
    before = peak()
    report = queryset.parallel_each(work.nothing, PROCESSES, chunk_size=1, **given)
    assert report.chunks == rows
    print(
        f"{rows:,} chunks of one row by {name}, {report.seconds:.0f} s: "
        f"the caller's peak grew by {peak() - before:.1f} MB beyond that of {FEW:,}.\n",
        flush=True,
    )


@contextmanager
def engines() -> Iterator[dict[str, dict[str, Any]]]:
    """Have the engines that are installed; yield what a call takes for each, beside the number of processes."""
    knobs: dict[str, dict[str, Any]] = {OURS: {}}
    with ExitStack() as stack:
        if find_spec("distributed"):
            from parallel_orm.executors.dask import end_clients

            stack.callback(end_clients)
            knobs["Dask"] = {"executor": "dask"}
        else:
            print("distributed is not installed: Dask is left out.")
        if find_spec("celery") and find_spec("redis") and (url := stack.enter_context(redis())):
            stack.enter_context(celery_worker(url))
            knobs["Celery"] = {"executor": "celery"}
        else:
            print("celery, redis or a server of Redis is not there: Celery is left out.")
        yield knobs


def compare(alias: str, rows: int, rounds: int, seconds: float, knobs: dict[str, dict[str, Any]]) -> None:
    function = partial(work.compute, turns_that_take(seconds))
    queryset, plain = Article.objects.using(alias).order_by("pk"), Article.plain.using(alias).order_by("pk")
    expected = [function(row) for row in plain.iterator()]
    ways: dict[str, Callable[[], Any]] = {
        name: lambda given=given: queryset.parallel_map(function, PROCESSES, **given) for name, given in knobs.items()
    }
    if "Dask" in knobs and seconds < 1e-3:
        queryset[:10].parallel_map(work.key, PROCESSES, executor="dask")  # its workers have Django then
        ways[BAG] = lambda: by_bag(function, plain)
    for name, way in ways.items():
        assert list(way()) == expected, name
    baselines = [OURS, *([BAG] if BAG in ways else [])]
    processor: dict[str, list[float]] = {name: [] for name in ways}
    taken = alternate({name: with_processor(way, processor[name]) for name, way in ways.items()}, rounds)
    title = f"{seconds * 1e6:,.0f} microseconds of Python a row, {rows:,} rows, {PROCESSES} workers, {alias}"
    show(f"{title}, time", taken, baselines)
    show(f"{title}, processor time of all processes but the database's", processor, baselines)
    for name, given in knobs.items():
        print(f"{name}: {queryset.parallel_map(function, PROCESSES, **given).report}.")
    print()


def by_bag(function: Callable[[Any], int], rows: Any) -> list[int]:
    """As Dask's documentation has it, on the cluster that our call uses too."""
    from dask import bag

    from parallel_orm.executors.dask import _clients

    return list(bag.from_sequence(rows.all()).map(function).compute(scheduler=_clients[None]))


def cost_of_a_chunk(alias: str, rounds: int, knobs: dict[str, dict[str, Any]]) -> None:
    queryset = Article.objects.using(alias)

    def cost(given: dict[str, Any]) -> Measure:
        whole = timed(lambda: queryset.parallel_each(work.nothing, PROCESSES, chunk_size=1, **given))
        return lambda: whole() / FEW

    costs = {name: cost(given) for name, given in knobs.items()}
    show(f"A chunk of one row, among {FEW:,}, {PROCESSES} workers, {alias}", alternate(costs, rounds), [OURS])


# --- What Celery needs --------------------------------------------------------------------


@contextmanager
def redis() -> Iterator[str | None]:
    """Have a server of Redis of our own, on a port that is free, which keeps nothing; None: there is no program."""
    program = shutil.which("redis-server")
    if program is None:
        yield None
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tempfile.mkdtemp(prefix="parallel-orm-benchmarks-redis-")
    options = ["--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no", "--dir", folder]
    server = subprocess.Popen([program, *options], stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: answers(port), server, "redis-server")
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        end(server)
        shutil.rmtree(folder, ignore_errors=True)


def answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@contextmanager
def celery_worker(url: str) -> Iterator[None]:
    os.environ["PARALLEL_ORM_BENCHMARK_REDIS"] = url
    os.environ["PARALLEL_ORM_BENCHMARK_RUN"] = str(os.getpid())
    from benchmarks.fleet import app

    command = [sys.executable, "-m", "celery", "-A", "benchmarks.fleet", "worker", "--pool", "prefork"]
    worker = subprocess.Popen([*command, "--concurrency", str(PROCESSES), "--loglevel", "WARNING"])
    try:
        wait_until(lambda: bool(app.control.ping(timeout=0.5)), worker, "Celery's worker")
        yield
    finally:
        end(worker)


def wait_until(is_there: Callable[[], bool], process: subprocess.Popen[bytes], name: str) -> None:
    until = monotonic() + 60
    while not is_there():
        if process.poll() is not None or monotonic() > until:
            sys.exit(f"{name} does not start; it ended with {process.poll()}.")
        sleep(0.05)


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
