"""Clusters of Dask's on this machine, whose workers have settings of their own, as those of a project have."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


def databases_of_workers() -> str:
    """Return ``PARALLEL_ORM_TEST_DATABASES`` for processes that nobody tells of the test databases."""
    databases = json.loads(os.environ["PARALLEL_ORM_TEST_DATABASES"])
    for settings in databases.values():
        settings["NAME"] = settings["TEST"].get("NAME", settings["NAME"])
    return json.dumps(databases)


def environment(**others: str) -> dict[str, str]:
    """Return what is different in the environment of such a process."""
    return {
        "DJANGO_SETTINGS_MODULE": "tests.settings",
        "PARALLEL_ORM_TEST_DATABASES": databases_of_workers(),
        **others,
    }


@contextmanager
def dask_cluster(workers: int = 2, env: Mapping[str, str] | None = None, **others: Any) -> Iterator[Any]:
    """Have a cluster of so many processes, and a client of it; skip the test where Dask is not installed."""
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",
            env=environment(**(env or {})),
            **others,
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client


@contextmanager
def threads_of_dask(number: int, **others: Any) -> Iterator[Any]:
    """Have a cluster within this process, of so many threads, and a client of it: quick to start, and easy to watch."""
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            processes=False, n_workers=1, threads_per_worker=number, dashboard_address="127.0.0.1:0", **others
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client


class ByHand:
    """A scheduler and workers that were started on the command line; which settings are theirs nobody has said."""

    def __init__(self, folder: Path, port: int) -> None:
        self.address, self._folder, self._started = f"tcp://127.0.0.1:{port}", folder, list[subprocess.Popen[bytes]]()
        self._port = port

    def scheduler(self) -> subprocess.Popen[bytes]:
        return self._start("scheduler", "--host", "127.0.0.1", "--port", str(self._port))

    def worker(self, *, nanny: bool = False) -> subprocess.Popen[bytes]:
        return self._start("worker", self.address, "--nthreads", "1", "--nanny" if nanny else "--no-nanny")

    def _start(self, what: str, *arguments: str) -> subprocess.Popen[bytes]:
        env = {**os.environ, **environment(), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        del env["DJANGO_SETTINGS_MODULE"]
        with (self._folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "dask", what, *arguments, "--dashboard-address", "127.0.0.1:0"],
                env=env,
                cwd=self._folder,
                stdout=log,
                stderr=log,
            )
        self._started.append(process)
        return process

    def stop(self) -> None:
        for process in reversed(self._started):
            process.kill()
            process.wait()


@contextmanager
def dask_by_hand(folder: Path) -> Iterator[ByHand]:
    pytest.importorskip("distributed")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    by_hand = ByHand(folder, port)
    try:
        yield by_hand
    finally:
        by_hand.stop()
