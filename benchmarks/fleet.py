"""The Celery app of the benchmarks, which a worker process of theirs finds here."""

from __future__ import annotations

import os

from celery import Celery

app = Celery("benchmarks", broker=os.environ["PARALLEL_ORM_BENCHMARK_REDIS"])
app.conf.result_backend = os.environ["PARALLEL_ORM_BENCHMARK_REDIS"]
app.conf.broker_connection_retry_on_startup = True
app.conf.task_default_queue = f"benchmarks-{os.environ['PARALLEL_ORM_BENCHMARK_RUN']}"
app.autodiscover_tasks(["parallel_orm"])
