"""Celery apps of the tests, as a project may have them; ``app`` is that of a worker, which its environment tells where
its servers are.
"""

from __future__ import annotations

import os
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
            "worker_max_tasks_per_child": 200,
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
