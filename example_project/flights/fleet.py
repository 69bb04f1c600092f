"""The arithmetic of `geo` on every flight, by the workers of Dask or Celery.

`running()` starts what that needs on this machine, and stops it however the demo ends; or takes what runs already. What
is then asked is the call of `measure.work`, with another `executor`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from shutil import rmtree
from time import monotonic
from typing import TYPE_CHECKING, Any

from nyc.broker import FOLDER

from flights import geo
from flights.compare import difference
from flights.measure import PROJECT, Trial, Way, timed

if TYPE_CHECKING:
    from collections.abc import Iterator

ENGINES = {"dask": "distributed", "celery": "celery"}
"""What can be asked for, and the package that it needs."""

STARTS_WITHIN = 60.0
"""Seconds for a worker to start, and to stop, before it is given up."""


class EngineError(Exception):
    """There is no such engine here, or it does not start; the message says what to do."""


@contextmanager
def running(name: str, number: int, at: str | None = None) -> Iterator[Any]:
    """Have workers; yield what `executor=` takes.

    `at` is where some run already: the address of Dask's scheduler; of Celery's broker the environment has it.
    """
    if find_spec(ENGINES[name]) is None:
        raise EngineError(
            f"{ENGINES[name]} is not installed. In the folder above: python -m pip install -e '.[demo,{name}]'"
        )
    with terminable():
        if name == "dask":
            with dask(at) as executor:
                yield executor
        elif at is not None:
            yield "celery"
        else:
            with celery_worker(number):
                yield "celery"


@contextmanager
def terminable() -> Iterator[None]:
    """Have SIGTERM end this process as Ctrl-C does, so that it stops what it has started."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# --- Dask ---------------------------------------------------------------------------------


@contextmanager
def dask(at: str | None) -> Iterator[Any]:
    """Have a cluster of this machine, which `executor="dask"` makes by itself; or a client of one that runs."""
    if at is None:
        from parallel_orm.executors.dask import end_clients

        try:
            yield "dask"
        finally:
            end_clients()  # else it ends with the process
        return
    from distributed import Client

    try:
        client = Client(at, timeout=10, set_as_default=False)
    except (OSError, ValueError) as exc:
        raise EngineError(f"No scheduler of Dask answers at {at}: {exc}") from exc
    with client:
        yield client


# --- Celery -------------------------------------------------------------------------------


@contextmanager
def celery_worker(number: int) -> Iterator[subprocess.Popen[bytes]]:
    """Have a worker of so many processes, over a folder of its own."""
    from nyc import celery as app

    url = str(os.environ.get("NYC_BROKER"))
    if not url.startswith(FOLDER):
        raise EngineError(f"The worker would need a folder, and NYC_BROKER is {url!r}: unset it, or use --at.")
    folder = Path(url.removeprefix(FOLDER))
    command = [sys.executable, "-m", "celery", "-A", "nyc", "worker", "--concurrency", str(number)]
    command += ["--loglevel", "WARNING", "--without-gossip", "--without-mingle"]
    with tempfile.TemporaryFile() as log:
        # Of a session of its own: Ctrl-C is for this process, which then stops it.
        worker = subprocess.Popen(
            command, cwd=PROJECT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            until = monotonic() + STARTS_WITHIN
            while not answers(app):
                if worker.poll() is not None or monotonic() > until:
                    log.seek(0)
                    raise EngineError(f"Celery's worker did not start:\n{log.read().decode(errors='replace')}")
            yield worker
        finally:
            stop(worker)
            rmtree(folder, ignore_errors=True)


def answers(app: Any) -> bool:
    """Whether any worker of the app says that it is there, within half a second."""
    try:
        return bool(app.control.ping(timeout=0.5))
    except Exception:  # it is just making its files
        return False


def stop(worker: subprocess.Popen[bytes]) -> None:
    """Have a worker finish the chunk that it is at, and end."""
    worker.terminate()
    try:
        worker.wait(STARTS_WITHIN)
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.pid, signal.SIGKILL)  # its processes too; nobody, if all went well
        worker.wait()


# --- The work -----------------------------------------------------------------------------


def trial(name: str, executor: Any, last: int, number: int | None) -> Trial:
    """Arithmetic on each of the flights up to the key `last`: in a loop, by processes of our own, and by an engine."""
    flights = geo.with_wind().filter(pk__lte=last)
    looped, expected = timed(lambda: [geo.course(flight) for flight in flights.iterator()])
    first = flights.filter(pk__lte=expected[0][0])
    bar = find_spec("tqdm") is not None
    ways, differences = [Way("loop over .iterator()", looped, len(expected))], []
    for title, knobs in {
        ".parallel_map()": {"processes": number},
        f'.parallel_map(executor="{name}")': {"processes": number, "executor": executor},
    }.items():
        first.parallel_map(geo.course, **knobs)  # the workers start, and prove themselves
        seconds, answer = timed(lambda knobs=knobs: flights.parallel_map(geo.course, progress=bar, **knobs))
        ways.append(Way(title, seconds, len(answer), facts={"report": str(answer.report)}))
        differences.append(difference(expected, list(answer)))
    return Trial(
        f"Work: {len(expected):,} flights", ways, [f"Work by {name}: {found}" for found in differences if found]
    )
