"""How large the chunks of a map are, and how long a worker is at one: steered by how long the last ones took.

A chunk costs about a millisecond beside its work, so the longer it takes the better; but at the end of a call all wait
for the last one. So a chunk is to take a small share of what the call has taken so far, up to a target: a quick call
ends in time, and a long one has few chunks.
"""

from __future__ import annotations

from parallel_orm.outcomes import Timings

#: How much of the target a chunk is to take at first, and its reading always.
FIRST = 1 / 10
#: How much of the time that the call has taken so far a chunk is to take later.
SHARE = 1 / 20
#: How much longer than it is to take a chunk may take, before what is left of it is taken from its worker.
PATIENCE = 2
#: The most rows of a chunk, as all of them are in memory at once.
MOST = 10_000
#: Seconds that anything takes, whatever the clock says.
LEAST = 1e-9


class Pace:
    """The rows of the next chunk, and the seconds that it may take.

    ``target`` is the most that a function is to take for a chunk; None: no chunk is cut short, none grows or shrinks.
    """

    def __init__(self, rows: int, target: float | None = None, workers: int = 1, *, steers: bool = False) -> None:
        self.rows = self._first = rows
        self._target, self._workers, self._steers = target, workers, steers and target is not None
        self._worked = 0.0

    @property
    def aim(self) -> float | None:
        """Seconds that the function is to take for the next chunk."""
        if self._target is None or not self._steers:
            return self._target
        return min(self._target, max(self._target * FIRST, self._worked / self._workers * SHARE))

    @property
    def seconds(self) -> float | None:
        """Seconds of work after which its worker hands back what is left of it; None: never."""
        return None if self.aim is None else self.aim * PATIENCE

    def rows_at(self, seconds: float) -> int:
        """Return how many rows to do at once that take so many seconds each."""
        return self.rows if self.aim is None else max(1, int(self.aim / max(seconds, LEAST)))

    def learn(self, rows: int, timings: Timings) -> None:
        """Take into account how long so many rows took."""
        self._worked += timings.database + timings.function
        if self._steers and self._target is not None and self.aim is not None and rows:
            self.rows = steered(self.rows, rows, timings, self.aim, self._target * FIRST, self._first)


def steered(size: int, rows: int, timings: Timings, aim: float, reading: float, first: int) -> int:
    """Return the next size, at most twice or half of this one: the rows that a function does in ``aim`` seconds.

    No more than are read in ``reading`` seconds, as large rows are slow to read, and all of a chunk are in memory; but
    never fewer than the ``first`` ones for that: to read fewer may take as long.
    """
    done, read = aim * rows / max(timings.function, LEAST), reading * rows / max(timings.database, LEAST)
    return round(min(max(min(done, max(read, first)), size / 2, 1), size * 2, MOST))
