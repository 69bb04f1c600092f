"""What a map over very many rows by a fleet of workers comes to, and a simulation that holds the arithmetic to account.

    caller (plans, sends, hears) -> broker -> idle worker -> database -> the function -> broker -> caller

Each chunk passes all of these. Whoever is busy longest with a chunk, of all that are of its kind, decides how many
chunks a second there are: :func:`estimate`. :func:`simulate` sends each chunk on its way instead, and sees.

``python -m benchmarks estimate`` measures what goes into it: times of a jump, a message, a row.
"""

from __future__ import annotations

import os
import pickle
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from heapq import heappop, heappush
from math import ceil
from statistics import mean
from time import perf_counter, process_time
from typing import Any
from unittest import mock

#: How far estimate and simulation may be apart, as a share of the time. The estimate knows only the busiest: where two
#: are about as busy, they also wait for each other.
TOLERANCE = 0.1
#: From how many chunks a worker on it holds: with fewer, the beginning and the end are most of it.
FROM_CHUNKS = 20


@dataclass(frozen=True)
class Fleet:
    """What there is to do, and what each part of it takes."""

    #: How many there are to be done.
    rows: int
    #: Worker processes, on all machines together.
    workers: int
    #: Rows a chunk.
    chunk_size: int
    #: Seconds of a worker for the function, a row.
    function: float
    #: Seconds of a worker to read a row and make an instance of it.
    reading: float
    #: Seconds of a core of the database for a row.
    query: float
    #: Cores of the database.
    cores: int
    #: Seconds of a core of the database to find where a chunk ends; the caller waits for it.
    jump: float
    #: Seconds of the caller's process for a chunk: to write the message, to send it, and to hear what became of it.
    caller: float
    #: Seconds of the broker, or of the scheduler, for a chunk.
    broker: float
    #: Seconds of a worker for a chunk, beside its rows.
    overhead: float
    #: Seconds from one machine to another.
    latency: float
    #: Bytes of the message that a chunk is sent with, and of its answer.
    message: int
    answer: int
    #: Chunks that may be out, for each worker (``parallel_orm.executors.TASKS_PER_WORKER``).
    window: int = 4

    @property
    def chunks(self) -> int:
        """How many there are."""
        return ceil(self.rows / self.chunk_size)

    @property
    def at_work(self) -> float:
        """Seconds for which a chunk has a worker, where it does not wait for the database."""
        return self.overhead + 2 * self.latency + self.chunk_size * (self.query + self.reading + self.function)

    @property
    def on_its_way(self) -> float:
        """Seconds from the moment when the caller looks for a chunk until it has its answer, if nobody is busy."""
        return self.jump + self.caller + self.broker + 6 * self.latency + self.at_work


@dataclass(frozen=True)
class Estimate:
    """What it comes to."""

    chunks: int
    seconds: float
    #: How many chunks a second each part could do, if it were alone.
    limits: dict[str, float]
    #: For how much of the time each part is busy.
    loads: dict[str, float]
    #: Seconds of the caller that go into planning, among others' work.
    planning: float
    messages: int
    message_bytes: int
    rows_per_second: float
    #: Connections to the database: one a worker, and the caller's.
    connections: int

    @property
    def bottleneck(self) -> str:
        """Which part decides."""
        return min(self.limits, key=self.limits.__getitem__)


def estimate(fleet: Fleet) -> Estimate:
    """Return what it comes to: as many chunks a second as the busiest part can do, and the way of one of them."""
    limits = {
        "workers": fleet.workers / fleet.at_work,
        "caller": 1 / (fleet.jump + fleet.caller + 2 * fleet.latency),
        "broker": 1 / fleet.broker,
        "database": fleet.cores / (fleet.jump + fleet.chunk_size * fleet.query),
        "window": fleet.workers * fleet.window / fleet.on_its_way,
    }
    rate = min(limits.values())
    seconds = fleet.chunks / rate + fleet.on_its_way
    return Estimate(
        chunks=fleet.chunks,
        seconds=seconds,
        limits=limits,
        loads={name: fleet.chunks / seconds / limit for name, limit in limits.items()},
        planning=fleet.chunks * (fleet.jump + 2 * fleet.latency),
        messages=2 * fleet.chunks,
        message_bytes=fleet.chunks * (fleet.message + fleet.answer),
        rows_per_second=fleet.rows / seconds,
        connections=fleet.workers + 1,
    )


# --- The simulation -----------------------------------------------------------------------


class Station:
    """Somebody who serves so many at once, in the order in which they came."""

    def __init__(self, loop: Loop, servers: int = 1) -> None:
        self._loop, self._idle = loop, servers
        self._waiting: deque[Callable[[], None]] = deque()
        #: Seconds for which its servers were taken, added up.
        self.busy = 0.0

    def take(self, then: Callable[[], None]) -> None:
        """Go on as soon as a server is free, and have it."""
        if self._idle:
            self._idle -= 1
            self.busy -= self._loop.now
            then()
        else:
            self._waiting.append(then)

    def leave(self) -> None:
        """Give the server back: the next one has it."""
        if self._waiting:
            self._waiting.popleft()()
        else:
            self._idle += 1
            self.busy += self._loop.now

    def serve(self, seconds: float, then: Callable[[], None]) -> None:
        """Have a server for so long, and go on."""

        def leave() -> None:
            self.leave()
            then()

        self.take(lambda: self._loop.after(seconds, leave))


class Loop:
    """Does what is due, in the order of its time."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._number = 0

    def after(self, seconds: float, then: Callable[[], None]) -> None:
        """Do something so many seconds from now."""
        self._number += 1
        heappush(self._due, (self.now + seconds, self._number, then))

    def run(self) -> None:
        """Go on until nothing is due."""
        while self._due:
            self.now, _, then = heappop(self._due)
            then()


@dataclass(frozen=True)
class Simulated:
    """What came of it."""

    seconds: float
    chunks: int
    #: For how much of the time each part was busy.
    loads: dict[str, float]
    #: The most chunks that were out.
    most_out: int


def simulate(fleet: Fleet, *, seed: int = 0, varies: float = 0.5) -> Simulated:
    """Send each chunk on its way; what a database and a function take of one ``varies`` by so much of it."""
    return _Simulation(fleet, random.Random(seed), varies).run()


class _Simulation:
    def __init__(self, fleet: Fleet, chance: random.Random, varies: float) -> None:
        self.fleet, self.chance, self.varies = fleet, chance, varies
        self.loop = Loop()
        self.caller, self.broker = Station(self.loop), Station(self.loop)
        self.workers = Station(self.loop, fleet.workers)
        self.database = Station(self.loop, fleet.cores)
        self.left, self.out, self.most_out, self.done = fleet.chunks, 0, 0, 0
        self.is_planning = False

    def run(self) -> Simulated:
        self.fill()
        self.loop.run()
        assert self.done == self.fleet.chunks
        fleet, seconds = self.fleet, self.loop.now
        return Simulated(
            seconds,
            self.done,
            {
                "workers": self.workers.busy / seconds / fleet.workers,
                "caller": self.caller.busy / seconds,
                "broker": self.broker.busy / seconds,
                "database": self.database.busy / seconds / fleet.cores,
            },
            self.most_out,
        )

    def fill(self) -> None:
        """The caller looks for the end of one chunk after the other, while the window has room."""
        if self.is_planning or not self.left or self.out >= self.fleet.workers * self.fleet.window:
            return
        self.is_planning = True
        self.left -= 1
        self.out += 1
        self.most_out = max(self.most_out, self.out)
        self.caller.take(self.plan)

    def plan(self) -> None:
        # The database looks, and the caller waits for it.
        self.loop.after(self.fleet.latency, lambda: self.database.serve(self.fleet.jump, self.planned))

    def planned(self) -> None:
        self.loop.after(self.fleet.latency + self.fleet.caller / 2, self.sent)

    def sent(self) -> None:
        self.is_planning = False
        self.caller.leave()
        self.loop.after(self.fleet.latency, lambda: self.broker.serve(self.fleet.broker / 2, self.brought))
        self.fill()

    def brought(self) -> None:
        self.loop.after(self.fleet.latency, lambda: self.workers.take(self.begun))

    def begun(self) -> None:
        amount = self.fleet.chunk_size * self.chance.uniform(1 - self.varies, 1 + self.varies)
        query, rest = amount * self.fleet.query, amount * (self.fleet.reading + self.fleet.function)
        latency = self.fleet.latency

        def asked() -> None:
            self.database.serve(query, lambda: self.loop.after(latency + rest, self.answered))

        self.loop.after(self.fleet.overhead + latency, asked)

    def answered(self) -> None:
        self.workers.leave()
        self.loop.after(self.fleet.latency, lambda: self.broker.serve(self.fleet.broker / 2, self.heard))

    def heard(self) -> None:
        self.loop.after(self.fleet.latency, lambda: self.caller.serve(self.fleet.caller / 2, self.passed_on))

    def passed_on(self) -> None:
        self.out -= 1
        self.done += 1
        self.fill()


# --- Told -------------------------------------------------------------------------------


def told(fleet: Fleet, *, title: str, simulated: Simulated | None = None, how: str = "") -> str:
    """Return inputs, estimate, and simulation as text in Markdown."""
    found = estimate(fleet)
    lines = [f"{title}\n", "| given | |", "|---|---|"]
    lines += [f"| `{field.name}` | {_number(getattr(fleet, field.name))} |" for field in fields(fleet)]
    lines += ["", "| estimated | |", "|---|---|"]
    lines += [
        f"| chunks | {found.chunks:,} |",
        f"| time | {_span(found.seconds)}, {found.rows_per_second:,.0f} rows/s |",
        f"| decided by | {found.bottleneck} |",
        f"| planning, among it | {_span(found.planning)} of the caller |",
        f"| messages | {found.messages:,}, {found.message_bytes / 1e9:,.2f} GB |",
        f"| messages a second | {found.messages / found.seconds:,.0f} |",
        f"| bytes a second | {found.message_bytes / found.seconds / 1e6:,.2f} MB |",
        f"| connections | {found.connections} |",
        "| busy | " + ", ".join(f"{name} {load:.0%}" for name, load in found.loads.items()) + " |",
        "| could do, chunks/s | " + ", ".join(f"{name} {rate:,.0f}" for name, rate in found.limits.items()) + " |",
    ]
    if simulated is not None:
        ratio = simulated.seconds / (estimate_of(fleet, simulated.chunks).seconds)
        lines += [
            f"| simulated{how} | {_span(simulated.seconds)}: {ratio:.3f} x the estimate of as many chunks |",
            "| busy in it | " + ", ".join(f"{name} {load:.0%}" for name, load in simulated.loads.items()) + " |",
        ]
    return "\n".join([*lines, ""])


def estimate_of(fleet: Fleet, chunks: int) -> Estimate:
    """Return the estimate for as many chunks of the same size."""
    return estimate(replace(fleet, rows=chunks * fleet.chunk_size))


def _number(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value * 1e3:,.3g} ms" if value >= 1e-3 else f"{value * 1e6:,.3g} microseconds"


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.1f} s"
    return f"{seconds / 60:,.0f} minutes" if seconds < 7_200 else f"{seconds / 3_600:,.1f} hours"


# --- Measured -----------------------------------------------------------------------------

#: The example: ten billion rows, a hundred workers, and a database of sixteen cores in the same network.
ROWS, WORKERS, CORES, LATENCY = 10_000_000_000, 100, 16, 0.25e-3
#: Seconds of the function a row, and the rows a chunk to which they lead: a second of work, or the most of a chunk.
EXAMPLES = {50e-6: 10_000, 1e-3: 1_000}
#: The most chunks to simulate: a million of them take a minute.
MOST_SIMULATED = 1_000_000


def run(databases: dict[str, str], *, rounds: int | None, rows: int | None) -> None:
    """Measure what goes into it, on a table as given, and print what it comes to."""
    from benchmarks.engines import OURS, engines
    from benchmarks.models import table

    alias, rows = next(iter(databases)), rows or 1_000_000
    with engines() as knobs, table(alias, rows):
        costs = {name: of_a_chunk(alias, given) for name, given in knobs.items() if name != OURS}
        for function, chunk_size in EXAMPLES.items():
            measured = of_rows(alias, chunk_size, rounds or 5)
            for name, given in costs.items():
                fleet = Fleet(
                    rows=ROWS,
                    workers=WORKERS,
                    chunk_size=chunk_size,
                    function=function,
                    cores=CORES,
                    latency=LATENCY,
                    **measured,
                    **given,
                )
                title = f"{ROWS:,} rows, {function * 1e6:,.0f} microseconds of Python each, by {WORKERS} of {name}"
                chunks = min(fleet.chunks, MOST_SIMULATED)
                simulated = simulate(replace(fleet, rows=chunks * chunk_size))
                how = f", {chunks:,} chunks" if chunks < fleet.chunks else ""
                print(told(fleet, title=title, simulated=simulated, how=how), flush=True)
                ratio = simulated.seconds / estimate_of(fleet, chunks).seconds
                if abs(ratio - 1) > TOLERANCE:
                    sys.exit(f"The simulation takes {ratio:.2f} x the estimate.")


def of_rows(alias: str, chunk_size: int, rounds: int) -> dict[str, float]:
    """Measure what a jump takes, what a row takes of the database, and of who reads it: processor time, of many."""
    from benchmarks.latency import bounds
    from benchmarks.models import Article

    queryset = Article.objects.using(alias).order_by("pk")
    plan, server = queryset.explain_plan(chunk_size), server_of(alias)
    began, served, jumps = process_time(), server(), 0
    for _ in range(rounds * 5):
        jumps += len(bounds(plan))
    jump = (process_time() - began + server() - served) / jumps
    began, served, rows = process_time(), server(), 0
    for number in range(rounds * 100_000 // chunk_size):
        first = number * chunk_size % 100_000
        rows += len(list(queryset.filter(pk__gt=first, pk__lte=first + chunk_size)))
    return {"jump": jump, "reading": (process_time() - began) / rows, "query": (server() - served) / rows}


def server_of(alias: str) -> Callable[[], float]:
    """Return what tells the processor seconds that the server has spent for this connection, or that passed for it."""
    import psutil
    from django.db import connections

    connection = connections[alias]
    if connection.vendor == "postgresql":
        connection.ensure_connection()
        with connection.connection.cursor() as cursor:  # the driver's own: this says nothing of what is asked later
            cursor.execute("SELECT pg_backend_pid(), (inet_server_addr() = inet_client_addr()) IS NOT FALSE")
            process, is_here = cursor.fetchone()
        if is_here and psutil.pid_exists(process) and "postgres" in psutil.Process(process).name():
            return lambda: sum(psutil.Process(process).cpu_times()[:2])
    return lambda: perf_counter() - process_time()  # of another machine, or no process of its own: all but ours


def of_a_chunk(alias: str, given: dict[str, Any]) -> dict[str, Any]:
    """Measure what a chunk of one row costs by an engine: processor time of each process, and bytes.

    Celery's caller looks for the answers of all chunks that are out, so as many are out as a fleet has. Where the
    scheduler is in the caller's process, as of Dask's cluster on one machine, half of the time is counted for each.
    """
    import psutil

    from benchmarks import work
    from benchmarks.engines import FEW
    from benchmarks.maps import PROCESSES, by_process
    from benchmarks.models import Article

    number = WORKERS if given["executor"] == "celery" else PROCESSES
    rows = Article.objects.using(alias).filter(pk__lte=FEW * 3)

    def call() -> int:
        return int(rows.parallel_each(work.nothing, number, chunk_size=1, **given).chunks)

    with measuring(given["executor"]) as (messages, answers):
        call()
    before = by_process()
    chunks = call()
    spent = {process: seconds - before.get(process, 0.0) for process, seconds in by_process().items()}
    caller = spent.pop(os.getpid())
    servers = [process for process in spent if psutil.Process(process).name().startswith("redis-server")]
    broker = sum(map(spent.pop, servers))
    if given["executor"] == "dask":
        caller = broker = caller / 2
    return {
        "caller": caller / chunks,
        "broker": broker / chunks,
        "overhead": sum(spent.values()) / chunks,
        "message": round(mean(messages)),
        "answer": round(mean(answers)),
    }


@contextmanager
def measuring(engine: str) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the bytes of messages, and of answers, without the envelopes that the engine puts them into."""
    messages: list[int] = []
    answers: list[int] = []
    if engine == "celery":
        from parallel_orm.executors import celery

        write, read = celery.message_of, celery.answer_of

        def written(*args: Any, **kwargs: Any) -> str:
            messages.append(len(message := write(*args, **kwargs)))
            return message

        def answered(answer: str, message: str) -> Any:
            answers.append(len(answer))
            return read(answer, message)

        with mock.patch.object(celery, "message_of", written), mock.patch.object(celery, "answer_of", answered):
            yield messages, answers
    else:
        from parallel_orm.executors.dask import DaskExecutor

        submit = DaskExecutor.submit

        def submitted(self: Any, *args: Any, **kwargs: Any) -> Any:
            messages.append(len(pickle.dumps((args, kwargs))))
            future = submit(self, *args, **kwargs)
            future.add_done_callback(lambda done: answers.append(len(pickle.dumps(done.result()))))
            return future

        with mock.patch.object(DaskExecutor, "submit", submitted):
            yield messages, answers
