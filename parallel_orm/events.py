"""What observers hear of background reads: Django signals, and how often each was sent.

Every receiver is called with ``event``, an :class:`Event`, in the thread where it happened; the sender is the model.
What a receiver raises is logged by Django and disturbs nothing. The answer is handed over when the receivers have
returned, so they should be quick.
"""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass

from django.db.models import Model
from django.dispatch import Signal

#: A read was handed to the background threads.
started = Signal()
#: Whoever needed the answer ran the query, as no worker had begun it.
stolen = Signal()
#: The query ran within its start, on the caller's connection; ``event.reason`` says why.
inline = Signal()
#: The answer is there.
finished = Signal()
#: The query raised ``event.error``, or was cancelled.
failed = Signal()
#: What was started was never used: dropped, or left when its request ended.
abandoned = Signal()

_SIGNALS = {
    "started": started,
    "stolen": stolen,
    "inline": inline,
    "finished": finished,
    "failed": failed,
    "abandoned": abandoned,
}


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to one background read."""

    #: Which of the above.
    kind: str
    #: ``"fetch"``, ``"count"``, ``"get"``...
    verb: str
    model: type[Model]
    alias: str
    #: File and line where it was started.
    started_at: str
    #: Why it did not run in the background, as in ``Pending.reason``.
    reason: str | None = None
    #: Seconds, as in ``Pending``; None while they are not known.
    queue_time: float | None = None
    connect_time: float | None = None
    execute_time: float | None = None
    error: BaseException | None = None


_counts: Counter[str] = Counter()
# Reads land in several threads at once, and adding is not atomic. Reentrant: the collector may drop a Pending within.
_lock = threading.RLock()


def counts() -> dict[str, int]:
    """Return how often each kind happened in this process so far."""
    with _lock:
        return {kind: _counts[kind] for kind in _SIGNALS}


def has_observers(kind: str) -> bool:
    return bool(_SIGNALS[kind].receivers)


def count(kind: str) -> None:
    with _lock:
        _counts[kind] += 1


def tell(event: Event) -> None:
    """Tell the observers."""
    _SIGNALS[event.kind].send_robust(event.model, event=event)
