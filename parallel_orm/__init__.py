"""Django querysets on all cores and in the background.

    class Article(models.Model):
        objects = ParallelManager()

The flow, and the room of each stage::

    QuerySet  ->  Plan (lazy Chunks)  ->  Task  ->  Executor  ->  Outcome  ->  results
    queryset      plan, cutting,          task      executors/,   outcomes     gather,
    managers      keyset, chunks,         work      dispatch,     failures     results,
    family        guards, options         parcels   pace, retries              report,
    mapping                               workers   connections                advice
                                          capsule                              progress
                      background: one task, started now and read later
                      writes: a map whose chunks are transactions; raw: SQL on several connections at once

Everything public is imported from here; exceptions are in :mod:`parallel_orm.errors`.
"""

from parallel_orm import compat, errors
from parallel_orm.background import Pending
from parallel_orm.failures import Failure
from parallel_orm.managers import ParallelManager
from parallel_orm.plan import Plan
from parallel_orm.queryset import ParallelQuerySet, start
from parallel_orm.raw import ParallelConnection
from parallel_orm.report import Report, report_of
from parallel_orm.results import AsyncStream, Results, Stream
from parallel_orm.several import parallel_each, parallel_imap, parallel_map, parallel_reduce
from parallel_orm.workers import Worker, current_worker

__version__ = "0.1.0"

__all__ = [
    "AsyncStream",
    "Failure",
    "ParallelConnection",
    "ParallelManager",
    "ParallelQuerySet",
    "Pending",
    "Plan",
    "Report",
    "Results",
    "Stream",
    "Worker",
    "compat",
    "current_worker",
    "errors",
    "parallel_each",
    "parallel_imap",
    "parallel_map",
    "parallel_reduce",
    "report_of",
    "start",
]
