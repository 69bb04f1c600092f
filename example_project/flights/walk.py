"""One walk over the flights, measured in a process of its own.

    python -m flights.walk "chunked_iterator()" --last 336776

prints one line of JSON. The demo starts one such child for each way, as memory that one walk has
used is still counted as its process's when the next begins.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import django

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from django.db.models import QuerySet

    from flights.models import Flight

WAYS: dict[str, Callable[[QuerySet[Flight]], Iterable[Flight]]] = {
    "list(queryset)": list,
    ".iterator()": lambda queryset: queryset.iterator(),
    ".chunked_iterator()": lambda queryset: queryset.chunked_iterator(),
}


def walk(way: str, last: int) -> dict[str, Any]:
    """Walk over the flights up to the key `last`.

    Returns seconds, rows, the peak of memory above what the process held before, and a digest of
    the rows in their order.
    """
    from flights.models import Flight

    flights = Flight.objects.filter(pk__lte=last).order_by("pk")
    flights.first()
    before = peak_memory()
    started = perf_counter()
    digest, rows = hashlib.blake2b(digest_size=16), 0
    for flight in WAYS[way](flights):
        digest.update(line(flight))
        rows += 1
    return {
        "seconds": perf_counter() - started,
        "rows": rows,
        "memory": peak_memory() - before,
        "digest": digest.hexdigest(),
    }


def line(flight: Flight) -> bytes:
    """What the digest takes of a flight. It is part of every walk's time."""
    f = flight
    return (
        f"{f.pk} {f.time_hour.isoformat()} {f.airline_id} {f.number} {f.tailnum} {f.plane_id} "
        f"{f.origin_id} {f.dest} {f.weather_id} {f.dep_delay} {f.arr_delay} {f.air_time}\n"
    ).encode()


def peak_memory() -> int:
    """The most memory that this process has held so far, in bytes.

    On Linux from the process's own high-water mark, because `ru_maxrss` there survives `exec`: a
    child would begin with the peak of the parent that started it.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for entry in status.read_text().splitlines():
            if entry.startswith("VmHWM:"):
                return int(entry.split()[1]) * 1024
    import resource  # is not there on Windows

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--last", type=int, required=True, help="the last key of the walk")
    options = parser.parse_args()
    django.setup()
    print(json.dumps(walk(options.way, options.last)))


if __name__ == "__main__":
    main()
