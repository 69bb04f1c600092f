"""How large chunks become, and how long they may take, from how long the last ones took."""

from __future__ import annotations

import pytest

from parallel_orm.outcomes import Timings
from parallel_orm.pace import MOST, PATIENCE, Pace, steered


@pytest.mark.parametrize(
    ("size", "rows", "timings", "expected"),
    [
        (1000, 1000, Timings(function=1.0), 1000),
        (1000, 1000, Timings(function=1.25), 800),
        (1000, 1000, Timings(function=0.8), 1250),
        (1000, 1000, Timings(function=0.001), 2000),
        (1000, 1000, Timings(function=500), 500),
        (1000, 10, Timings(function=0.01), 1000),
        (8000, 8000, Timings(function=0.001), MOST),
        (1, 1, Timings(function=500), 1),
        (1, 1, Timings(function=0.001), 2),
        (2000, 2000, Timings(function=0.5, database=0.125), 1600),
        (2000, 2000, Timings(function=0.5, database=500), 1000),
        (1000, 1000, Timings(function=0.5, database=500), 1000),
        (1000, 1000, Timings(function=2, database=500), 500),
        (1000, 1000, Timings(function=0, database=0), 2000),
    ],
    ids=str,
)
def test_a_chunk_becomes_as_large_as_its_time_says(size, rows, timings, expected):
    """A second of the function, a tenth to be read; at most twice as large or half; not below the first to be read."""
    assert steered(size, rows, timings, aim=1.0, reading=0.1, first=1000) == expected


def test_sizes_settle_where_chunks_take_the_target():
    pace = Pace(1000, target=2.0, steers=True)
    for _ in range(100):
        pace.learn(pace.rows, Timings(function=pace.rows * 0.003, database=pace.rows * 0.00001))
    assert (pace.rows, pace.aim, pace.seconds) == (667, 2.0, 2.0 * PATIENCE)
    for _ in range(100):
        pace.learn(pace.rows, Timings(function=pace.rows * 0.0004, database=pace.rows * 0.00001))
    assert pace.rows == 5000
    for _ in range(100):
        pace.learn(pace.rows, Timings(function=pace.rows * 0.0004, database=pace.rows * 0.00005))
    assert pace.rows == 4000, "rows that are slow to read are large"


def test_a_chunk_takes_a_share_of_what_the_call_has_taken():
    """So that the last one keeps nobody waiting for long: little at first, the target when it has gone on for long."""
    pace = Pace(1000, target=1.0, workers=2, steers=True)
    assert pace.aim == 0.1
    pace.learn(1000, Timings(function=2.0))
    assert pace.aim == 0.1
    pace.learn(1000, Timings(function=10.0, database=8.0))
    assert pace.aim == 0.5
    pace.learn(1000, Timings(function=1000.0))
    assert pace.aim == 1.0


def test_a_size_that_somebody_gave_is_kept():
    pace = Pace(7, target=1.0)
    pace.learn(7, Timings(function=0.001))
    assert (pace.rows, pace.seconds) == (7, PATIENCE)


def test_without_a_target_nothing_is_cut_short():
    pace = Pace(1000, target=None, steers=True)
    pace.learn(1000, Timings(function=0.001))
    assert (pace.rows, pace.seconds) == (1000, None)


def test_rows_that_were_slow_are_done_few_at_once():
    pace = Pace(1000, target=1.0)
    assert [pace.rows_at(seconds) for seconds in (0.25, 5.0)] == [4, 1]
    assert pace.rows_at(0.0) > 1000, "a clock that does not see them"
