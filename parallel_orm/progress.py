"""Tells how far a call has come: to a bar, or to a callable of the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any

from parallel_orm import errors
from parallel_orm.options import Progress
from parallel_orm.outcomes import Outcome

#: Told after each chunk: rows done, and rows there are, or None if nobody knows.
Listener = Callable[[int, int | None], object]


@contextmanager
def listener_for(progress: Progress, label: str) -> Iterator[Listener | None]:
    """Return whom to tell: the callable itself, or one that draws a bar with its rate and the time left, or nobody."""
    if progress is None or progress is False:
        yield None
    elif progress is not True:
        yield progress
    else:
        try:
            from tqdm.auto import tqdm  # optional
        except ImportError as error:
            raise errors.missing_tqdm() from error

        with closing(tqdm(desc=label, unit=" rows", dynamic_ncols=True)) as bar:

            def draw(done: int, total: int | None) -> None:
                bar.total = total
                bar.update(done - bar.n)

            yield draw


def told(outcomes: Iterable[Outcome], listener: Listener | None, count: Callable[[], int | None]) -> Iterator[Outcome]:
    """Yield the outcomes as they are, telling the listener of each. ``count`` is asked once, for a listener only."""
    if listener is None:
        yield from outcomes
        return
    total: Any = count()
    done = 0
    listener(0, total)
    for outcome in outcomes:
        done += outcome.rows
        # Rows that came in since they were counted: better a total that grows than more than all.
        total = None if total is None else max(total, done)
        listener(done, total)
        yield outcome
