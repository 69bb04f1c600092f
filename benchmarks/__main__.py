"""``python -m benchmarks [name ...] [--on DATABASE] [--rounds N] [--rows N]``."""

from __future__ import annotations

import argparse
import signal
import sys
from pkgutil import resolve_name

from benchmarks.databases import ALIASES, made

BENCHMARKS = {
    "background": "benchmarks.background:run",
    "page": "benchmarks.page:run",
    "map": "benchmarks.maps:run",
    "engine": "benchmarks.maps:engine",
    "engines": "benchmarks.engines:run",
    "writes": "benchmarks.writes:run",
    "several": "benchmarks.several:run",
    "across": "benchmarks.across:run",
    "walk": "benchmarks.walk:run",
    "peers": "benchmarks.walk:peers",
    "far": "benchmarks.latency:far_away",
    "small": "benchmarks.latency:small",
    "planning": "benchmarks.latency:planning",
}
#: Run when asked for: they take very long, or gigabytes.
LONG = {
    "offset": "benchmarks.walk:offset",
    "memory": "benchmarks.walk:memory",
    "each": "benchmarks.soak:each",
    "kill": "benchmarks.soak:kill",
    "create": "benchmarks.writes:memory",
    "many": "benchmarks.engines:memory",
    "estimate": "benchmarks.estimate:run",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    names = f"{', '.join(BENCHMARKS)}; all of them by default, and not {', '.join(LONG)}, which are long"
    parser.add_argument("names", nargs="*", metavar="name", help=names)
    parser.add_argument("--on", action="append", choices=ALIASES, help="a database; all that answer by default")
    parser.add_argument("--rounds", type=int, help="how often each variant is measured; each benchmark has a default")
    parser.add_argument("--rows", type=int, help="rows of the table; each benchmark has a default")
    given = parser.parse_args()
    known = BENCHMARKS | LONG
    if unknown := set(given.names) - set(known):
        parser.error(f"{', '.join(sorted(unknown))}: there are {', '.join(known)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Terminated."))  # so that the databases are dropped then too
    with made(given.on or ALIASES) as databases:
        if not databases:
            parser.error(f"none of {', '.join(given.on or ALIASES)} can be had here")
        from benchmarks.measure import environment, load

        for name in given.names or BENCHMARKS:
            print(f"## {name}\n\n{environment(databases)}\n", flush=True)
            resolve_name(known[name])(databases, rounds=given.rounds, rows=given.rows)
            print(f"At the end: {load()}.\n", flush=True)


if __name__ == "__main__":
    main()
