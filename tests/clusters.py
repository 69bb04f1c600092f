"""Clusters of Dask's on this machine, whose workers have settings of their own, as those of a project have."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
            dashboard_address=None,
            env=environment(**(env or {})),
            **others,
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client
