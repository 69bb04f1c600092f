"""A walk over a big table: time, and how far the memory grows. Each in a fresh child process of its own."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from time import perf_counter, process_time

#: What a plain consumer may loop over.
VARIANTS: dict[str, Callable[..., Iterable[object]]] = {
    "iterator()": lambda alias: _articles().plain.using(alias).order_by("pk").iterator(),
    "chunked_iterator()": lambda alias: _articles().objects.using(alias).order_by("pk").chunked_iterator(),
    "list()": lambda alias: list(_articles().plain.using(alias).order_by("pk")),
}


def run(databases: dict[str, str], *, rounds: int | None, rows: int | None) -> None:
    from benchmarks.measure import alternate, show
    from benchmarks.models import drop_table, make_table

    rounds, rows = rounds or 5, rows or 1_000_000
    for alias in databases:
        make_table(alias, rows)
        try:
            children = {name: Children(name, alias, rows) for name in VARIANTS}
            taken = alternate(children, rounds)
        finally:
            drop_table(alias)
        title = f"A walk over {rows:,} rows of 7 columns, {alias}"
        show(f"{title}, time", taken, ["iterator()"])
        processor = {name: child.processor for name, child in children.items()}
        show(f"{title}, processor time of the client", processor, ["iterator()"])
        memory = {name: child.memory for name, child in children.items()}
        show(f"{title}, growth of the client's memory", memory, [], unit="MB", factor=1)


class Children:
    """Measures a variant in one child process after the other."""

    def __init__(self, name: str, alias: str, rows: int) -> None:
        self.arguments = [name, alias, str(rows)]
        self.processor: list[float] = []
        self.memory: list[float] = []

    def __call__(self) -> float:
        command = [sys.executable, "-m", "benchmarks.walk", *self.arguments]
        told = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        self.processor.append(told["processor"])
        self.memory.append(told["memory"])
        return float(told["seconds"])


# --- In the child ---------------------------------------------------------------


def child(name: str, alias: str, rows: int) -> None:
    """Walk once and print what it took."""
    import django

    django.setup()
    # What is imported and connected at first use is not what is measured. Few rows, or their memory would be reused.
    for manager in (_articles().plain, _articles().objects):
        assert list(manager.using(alias).filter(pk=1).iterator())
    assert list(_articles().objects.using(alias).filter(pk=1).chunked_iterator())
    before, processor, began, seen = peak_memory(), process_time(), perf_counter(), 0
    for _ in VARIANTS[name](alias):
        seen += 1
    taken = {
        "seconds": perf_counter() - began,
        "processor": process_time() - processor,
        "memory": (peak_memory() - before) / 1e6,
    }
    assert seen == rows
    print(json.dumps(taken))


def _articles() -> type:
    from benchmarks.models import Article

    return Article


def peak_memory() -> int:
    """Return the most bytes that this process ever had in memory.

    Linux hands the parent's ``ru_maxrss`` down to a child, which would hide growth below it, but tells the child's own.
    """
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    child(sys.argv[1], sys.argv[2], int(sys.argv[3]))
