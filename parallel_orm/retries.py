"""What is tried again, and when."""

from __future__ import annotations

from django.db import InterfaceError, OperationalError

from parallel_orm.errors import ChunkTimedOut, WorkerDied
from parallel_orm.outcomes import Outcome, opened

#: The first pause before something is tried again, in seconds; each of the next is twice as long.
BACKOFF = 0.1
#: The longest pause.
LONGEST_BACKOFF = 10.0

#: What may be over the next time: a worker was lost or too slow, a connection broke, a deadlock was resolved. (What a
#: function raises is tried again row by row, where it was raised.)
PASSING = (WorkerDied, ChunkTimedOut, OperationalError, InterfaceError)


def backoff(attempt: int) -> float:
    """Return how long to wait before attempt 1, 2, 3..., in seconds."""
    return min(BACKOFF * 2.0 ** min(attempt - 1, 16), LONGEST_BACKOFF)


def may_pass(outcome: Outcome) -> bool:
    """Tell whether the chunk may come through if it is sent again."""
    if outcome.error is None or outcome.stage == "function":
        return False
    return isinstance(opened(outcome.error), PASSING)
