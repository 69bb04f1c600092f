"""The one task of this library, which Celery finds here in workers whose project has it in ``INSTALLED_APPS``."""

from __future__ import annotations

from typing import Any

from celery import shared_task
from celery.signals import worker_process_init, worker_ready

NAME = "parallel_orm.call"


# Not acknowledged late: what a lost worker was at is then not done again behind the caller's back, who is told instead.
@shared_task(  # type: ignore[untyped-decorator]
    bind=True, name=NAME, serializer="json", acks_late=False, track_started=False, ignore_result=False
)
def call(self: Any, message: str) -> str:
    """Answer a message of a :class:`parallel_orm.executors.celery.CeleryExecutor`."""
    from parallel_orm.executors.messages import answer

    return answer(message, is_redelivered=bool((self.request.delivery_info or {}).get("redelivered")))


def remember(**_: Any) -> None:
    """Note what code this worker has, in the process or before its threads that do its tasks."""
    from parallel_orm.proof import remember_modules

    remember_modules()


for _signal in (worker_process_init, worker_ready):
    _signal.connect(remember, weak=False, dispatch_uid=NAME)
