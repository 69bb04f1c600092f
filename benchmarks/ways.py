"""Ways to walk over a queryset, to use its rows, and the child process that does both once and tells what it took."""

from __future__ import annotations

import gc
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

#: Rows a page, of whoever lets us choose: Django's iterator() and chunked_iterator() have as many.
SIZE = 2_000


def chunkator(rows: Any) -> Iterable[Any]:
    from chunkator import chunkator

    return chunkator(rows, SIZE)


def queryset_iterator(rows: Any) -> Iterator[Any]:
    """Walk as the well-known snippet does: 1,000 rows behind the last primary key, and the garbage after each."""
    end = rows.order_by("-pk").values_list("pk", flat=True)[0]
    rows, last = rows.order_by("pk"), None
    while last != end:
        for row in (rows if last is None else rows.filter(pk__gt=last))[:1_000]:
            last = row.pk
            yield row
        gc.collect()


def offset_pages(rows: Any) -> Iterator[Any]:
    start = 0
    while page := list(rows[start : start + SIZE]):
        yield from page
        start += SIZE


OURS: dict[str, Callable[[Any], Iterable[Any]]] = {
    "chunked_iterator()": lambda rows: rows.chunked_iterator(),
    "chunks()": lambda rows: chain.from_iterable(rows.chunks()),
}
WAYS: dict[str, Callable[[Any], Iterable[Any]]] = {
    "iterator()": lambda rows: rows.iterator(),
    **OURS,
    "list()": list,
    "django-chunkator": chunkator,
    "queryset_iterator": queryset_iterator,
    "OFFSET pages": offset_pages,
}
#: Those that all are compared with.
BOTH = ("iterator()", "chunked_iterator()")


def can_be_had(way: str) -> bool:
    """Tell whether this way can be gone here; say so if not."""
    if way == "django-chunkator" and find_spec("chunkator") is None:
        print("django-chunkator is not installed, and left out.\n")
        return False
    return True


def rows_of(alias: str, way: str, kind: str = "instances") -> Any:
    """Return a queryset for a way: Django's own, unless the way is ours."""
    from benchmarks.models import Article, SignedArticle

    model = SignedArticle if kind == "select_related" else Article
    manager = model.objects if way in OURS else model.plain
    rows = manager.using(alias).order_by("pk")
    kinds = {"values_list": rows.values_list, "select_related": lambda: rows.select_related("author")}
    return kinds.get(kind, rows.all)()


# --- What a row is used for -----------------------------------------------------

#: Seconds that a consumer takes for a row, if any.
SECONDS = 20e-6


def nothing(rows: Iterable[Any], turns: int) -> int:
    seen = 0
    for _ in rows:
        seen += 1
    return seen


def computes(rows: Iterable[Any], turns: int) -> int:
    from benchmarks.work import spin

    seen = 0
    for row in rows:
        seen += 1
        spin(turns, row.pk)
    return seen


def waits(rows: Iterable[Any], turns: int) -> int:
    """Wait for something outside of Python; for 100 rows at once, as so short a sleep would last longer."""
    seen = 0
    for _ in rows:
        seen += 1
        if seen % 100 == 0:
            time.sleep(100 * SECONDS)
    return seen


CONSUMERS = {each.__name__: each for each in (nothing, computes, waits)}


# --- One walk, in a process of its own ------------------------------------------


@dataclass(frozen=True)
class Walk:
    way: str
    alias: str
    #: How many rows there are.
    rows: int
    kind: str = "instances"
    consumer: str = "nothing"
    #: Of a loop of Python that takes :data:`SECONDS`.
    turns: int = 0


class Children:
    """Measures a walk in one child process after the other."""

    def __init__(self, walk: Walk) -> None:
        self.walk = walk
        #: What each child told beside its time.
        self.processor: list[float] = []
        self.memory: list[float] = []

    def __call__(self) -> float:
        command = [sys.executable, "-m", "benchmarks.ways", json.dumps(asdict(self.walk))]
        told = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        self.processor.append(told["processor"])
        self.memory.append(told["memory"])
        return float(told["seconds"])


def child(walk: Walk) -> None:
    """Walk once and print what it took."""
    import django

    django.setup()
    go, rows, consume = WAYS[walk.way], rows_of(walk.alias, walk.way, walk.kind), CONSUMERS[walk.consumer]
    # What is imported and connected at first use is not what is measured. Few rows, or their memory would be reused.
    assert consume(go(rows.filter(pk=1)), walk.turns) == 1
    before, processor, began = peak_memory(), time.process_time(), time.perf_counter()
    seen = consume(go(rows), walk.turns)
    taken = {
        "seconds": time.perf_counter() - began,
        "processor": time.process_time() - processor,
        "memory": (peak_memory() - before) / 1e6,
    }
    assert seen == walk.rows, seen
    print(json.dumps(taken))


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
    child(Walk(**json.loads(sys.argv[1])))
