"""The one task of this library, which Celery finds here in workers whose project has it in ``INSTALLED_APPS``."""

from __future__ import annotations

from functools import partial
from typing import Any

from celery import shared_task, states
from celery.backends.base import DisabledBackend
from celery.signals import worker_process_init, worker_ready

NAME = "parallel_orm.call"


# Not acknowledged late: what a lost worker was at is then not done again behind the caller's back, who is told instead.
@shared_task(  # type: ignore[untyped-decorator]
    bind=True, name=NAME, serializer="json", acks_late=False, track_started=False, ignore_result=False
)
def call(self: Any, message: str) -> str:
    """Answer a message of a :class:`parallel_orm.executors.celery.CeleryExecutor`."""
    from parallel_orm.executors.messages import Delivery, answer

    request = self.request
    delivery = Delivery(
        is_redelivered=bool((request.delivery_info or {}).get("redelivered")),
        is_taken_back=partial(_is_taken_back, self),
        is_heard=not request.ignore_result,
    )
    return answer(message, delivery)


def _is_taken_back(task: Any) -> bool:
    if task.request.is_eager or not keeps_answers(task.backend):
        return False
    return bool(task.backend.get_state(task.request.id) == states.REVOKED)


def keeps_answers(backend: Any) -> bool:
    """Tell whether what is in a result backend can be looked at from anywhere: ``rpc://`` sends it, and that is all."""
    return not isinstance(backend, DisabledBackend) and (
        hasattr(backend, "get_many") or not getattr(backend, "is_async", False)
    )


def remember(**_: Any) -> None:
    """Note what code this worker has, in the process or before its threads that do its tasks."""
    from parallel_orm.proof import remember_modules

    remember_modules()


for _signal in (worker_process_init, worker_ready):
    _signal.connect(remember, weak=False, dispatch_uid=NAME)
