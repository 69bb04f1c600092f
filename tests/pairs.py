"""Which of all that a test's parameters make together is enough."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

#: The database that all executors work on; the next one where it cannot be had.
FIRST = ["postgres", "mariadb", "default"]


def enough(product: Sequence[Mapping[str, Any]], name: str, apart: Collection[str] = ("on",)) -> set[int]:
    """Return the places of combinations that have every value, and each pair of values.

    What a database does with a query and what an executor does with a chunk do not interact: one database has all
    executors, and each of the others one that the test's name decides, so that over many tests they have all.

    :param product: of each combination its values, hashable, by the parameter's name.
    :param apart: the parameters that have nothing to do with the database.
    """
    first = min((values["alias"] for values in product if "alias" in values), key=FIRST.index, default=None)

    def pairs(values: Mapping[str, Any]) -> Iterator[frozenset[tuple[str, Any]]]:
        for one in values.items():
            yield frozenset([one])
        for pair in combinations(values.items(), 2):
            names = {parameter for parameter, _ in pair}
            if "alias" not in names or names.isdisjoint(apart) or values["alias"] == first:
                yield frozenset(pair)

    had = [set(pairs(values)) for values in product]
    places = random.Random(name).sample(range(len(product)), len(product))  # the same in every run
    missing, kept = set().union(*had), set()
    while missing:
        best = max(places, key=lambda place: len(had[place] & missing))
        kept.add(best)
        missing -= had[best]
    return kept
