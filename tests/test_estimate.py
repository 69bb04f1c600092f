"""The worked estimate of ``benchmarks/``: its arithmetic, and a simulation, hold each other to account."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.estimate import FROM_CHUNKS, TOLERANCE, Fleet, estimate, simulate, told

#: Twenty workers, who have the most to do.
FLEET = Fleet(
    rows=2_000_000,
    workers=20,
    chunk_size=1_000,
    function=50e-6,
    reading=5e-6,
    query=1e-6,
    cores=8,
    jump=0.2e-3,
    caller=1e-3,
    broker=0.5e-3,
    overhead=2e-3,
    latency=0.2e-3,
    message=4_000,
    answer=500,
)

#: Fleets by who decides how fast they are.
DECIDED = {
    "workers": FLEET,
    "caller": replace(FLEET, function=1e-6),
    "broker": replace(FLEET, function=1e-6, broker=10e-3),
    "database": replace(FLEET, function=1e-6, query=30e-6, cores=4),
    "window": replace(FLEET, function=1e-6, caller=0.1e-3, broker=0.1e-3, jump=0.1e-3, workers=4, window=1),
}


@pytest.mark.parametrize("decides", DECIDED)
def test_simulation_takes_as_long_as_was_estimated(decides: str) -> None:
    """Whoever decides."""
    fleet = DECIDED[decides]
    found, simulated = estimate(fleet), simulate(fleet)
    assert found.bottleneck == decides
    assert simulated.seconds == pytest.approx(found.seconds, rel=TOLERANCE)
    for name in ("broker", "database"):  # the others are taken too while they wait for the database
        assert simulated.loads[name] == pytest.approx(found.loads[name], abs=TOLERANCE)


@pytest.mark.parametrize("workers", [1, 7, 100])
@pytest.mark.parametrize("chunk_size", [100, 3_000])
def test_estimate_holds_from_so_many_chunks_on(workers: int, chunk_size: int) -> None:
    """With few workers and with many, of small chunks and of large ones."""
    rows = workers * FROM_CHUNKS * chunk_size
    fleet = replace(FLEET, workers=workers, chunk_size=chunk_size, rows=rows)
    for seed in range(3):
        assert simulate(fleet, seed=seed).seconds == pytest.approx(estimate(fleet).seconds, rel=TOLERANCE)


def test_window_is_kept() -> None:
    """No more chunks are out than four a worker."""
    fleet = replace(FLEET, rows=300_000)
    assert simulate(fleet).most_out == fleet.workers * fleet.window


def test_arithmetic_by_hand() -> None:
    """Ten billion rows, as in the documentation: a second of work a chunk, which a hundred workers do."""
    fleet = replace(FLEET, rows=10_000_000_000, workers=100, chunk_size=10_000)
    found = estimate(fleet)
    assert (found.chunks, found.messages, found.connections) == (1_000_000, 2_000_000, 101)
    assert found.message_bytes == 1_000_000 * 4_500
    # A chunk: 2 ms beside its rows, 0.4 ms to the database and back, and 56 microseconds a row.
    assert found.limits["workers"] == pytest.approx(100 / (0.0024 + 0.56))
    assert found.seconds == pytest.approx(1_000_000 * 0.5624 / 100, rel=0.001)
    assert found.planning == pytest.approx(1_000_000 * 0.0006)
    assert found.limits["caller"] == pytest.approx(1 / 0.0016)
    assert found.bottleneck == "workers"


def test_it_is_told_with_what_went_into_it() -> None:
    """Every input is named, and what was simulated is compared."""
    fleet = replace(FLEET, rows=200_000)
    text = told(fleet, title="A fleet", simulated=simulate(fleet))
    assert all(f"| `{name}` |" in text for name in ("rows", "workers", "jump", "broker", "window"))
    assert "decided by | workers" in text
    assert "x the estimate" in text
