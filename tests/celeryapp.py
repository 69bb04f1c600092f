"""Celery apps of the tests, as a project may have them; ``app`` is that of a worker, which its environment tells where
its servers are.
"""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from secrets import token_hex
from time import monotonic
from typing import Any

from celery import Celery


def make_app(broker: str, backend: str | None, queue: str, **more: Any) -> Celery:
    app = Celery("tests", set_as_current=False)
    app.config_from_object(
        {
            "broker_url": broker,
            "result_backend": backend,
            "task_default_queue": queue,
            # Other runs may share the broker.
            "control_exchange": f"{queue}_control",
            "event_exchange": f"{queue}_events",
            "worker_prefetch_multiplier": 1,
            "broker_connection_retry_on_startup": True,
            # Of these nothing may matter.
            "task_acks_late": True,
            "task_reject_on_worker_lost": True,
            "task_ignore_result": True,
            "task_track_started": True,
            "worker_max_tasks_per_child": 50,
            **more,
        }
    )
    app.autodiscover_tasks(["parallel_orm"])
    return app


if "PARALLEL_ORM_TEST_BROKER" in os.environ:
    app = make_app(
        os.environ["PARALLEL_ORM_TEST_BROKER"],
        os.environ["PARALLEL_ORM_TEST_BACKEND"],
        os.environ["PARALLEL_ORM_TEST_QUEUE"],
    )


# --- What the workers run ------------------------------------------------------------------


def mark(row: Any, folder: str) -> int:
    """Leave a file for a row."""
    (Path(folder) / f"begun {row.rank}").touch()
    return int(row.rank)


def wait_at_gate(row: Any, folder: str) -> int:
    """Leave a file for a row; wait until somebody has opened the gate."""
    mark(row, folder)
    until = monotonic() + 60
    while not (Path(folder) / "open").exists() and monotonic() < until:
        threading.Event().wait(0.01)
    return int(row.rank)


def first_passes(row: Any, folder: str) -> int:
    return mark(row, folder) if row.rank == 0 else wait_at_gate(row, folder)


def die_at_first(row: Any, folder: str) -> int:
    """Be killed at row 3, the first time."""
    is_first = row.rank == 3 and not (Path(folder) / "begun 3").exists()
    mark(row, folder)
    if is_first:
        os.kill(os.getpid(), signal.SIGKILL)
    return int(row.rank)


def pid_of(row: Any) -> int:
    return os.getpid()


def name_of(row: Any) -> str:
    return str(row.name)


def much(row: Any) -> str:
    return token_hex(10_000)  # which can hardly be compressed


def touch(path: str) -> str:
    Path(path).touch()
    return "done"


def faster(ship: Any) -> None:
    ship.speed += 1


def ship_with_mark(item: Any, folder: str) -> Any:
    from tests.functions import plain_ship  # which needs Django set up

    (Path(folder) / f"made {item}").touch()
    return plain_ship(item)


def map_within(alias: str) -> list[int]:
    from tests.functions import rank
    from tests.testapp.models import Article

    return list(Article.objects.using(alias).order_by("rank").parallel_map(rank, 1, chunk_size=3, executor="celery"))


def hang() -> None:
    threading.Event().wait(60)
