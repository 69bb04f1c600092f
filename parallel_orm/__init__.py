"""Django querysets on all cores and in the background.

    class Article(models.Model):
        objects = ParallelManager()

The flow, and the room of each stage::

    QuerySet  ->  Plan (lazy Chunks)  ->  Task  ->  Executor  ->  Outcome  ->  results
    queryset      plan, cutting,          task      executors/,   outcomes     gather,
    managers      keyset, chunks,                   dispatch, pace,            report,
    mapping       guards, options                   connections,               progress
                                                    capsule
                      background: one task, started now and read later

Everything public is imported from here; exceptions are in :mod:`parallel_orm.errors`.
"""

from parallel_orm import errors
from parallel_orm.background import Pending
from parallel_orm.managers import ParallelManager
from parallel_orm.plan import Plan
from parallel_orm.queryset import ParallelQuerySet, start
from parallel_orm.report import AsyncStream, Report, Results, Stream

__version__ = "0.1.0"

__all__ = [
    "AsyncStream",
    "ParallelManager",
    "ParallelQuerySet",
    "Pending",
    "Plan",
    "Report",
    "Results",
    "Stream",
    "errors",
    "start",
]
