"""``python -m benchmarks [background|page|map|walk ...] [--rounds N] [--rows N]``."""

from __future__ import annotations

import argparse
import signal
import sys
from importlib import import_module

from benchmarks.databases import made

MODULES = {
    "background": "benchmarks.background",
    "page": "benchmarks.page",
    "map": "benchmarks.maps",
    "walk": "benchmarks.walk",
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help=f"{', '.join(MODULES)}; all of them by default")
    parser.add_argument("--rounds", type=int, help="how often each variant is measured; each benchmark has a default")
    parser.add_argument("--rows", type=int, help="rows of the table; 1, 50,000 and 1,000,000 by default")
    given = parser.parse_args()
    if unknown := set(given.names) - set(MODULES):
        parser.error(f"{', '.join(sorted(unknown))}: there are {', '.join(MODULES)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Terminated."))  # so that the databases are dropped then too
    with made() as databases:
        from benchmarks.measure import environment, load

        for name in given.names or MODULES:
            print(f"## {name}\n\n{environment(databases)}\n", flush=True)
            import_module(MODULES[name]).run(databases, rounds=given.rounds, rows=given.rows)
            print(f"At the end: {load()}.\n", flush=True)


if __name__ == "__main__":
    main()
