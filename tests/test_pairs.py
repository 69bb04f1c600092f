"""What is left out of a product, and what is not."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from tests.pairs import FIRST, enough

AXES = {"alias": FIRST, "on": ["processes", "threads", "inline"], "mode": [1, 2], "kind": range(6)}


def made(names):
    return [dict(zip(names, values, strict=True)) for values in product(*(AXES[name] for name in names))]


@pytest.mark.parametrize("names", [("alias", "on"), ("alias", "on", "mode"), tuple(AXES), ("mode", "kind"), ("kind",)])
def test_each_pair_is_kept_but_of_databases_and_executors(names):
    everything = made(names)
    kept = [everything[place] for place in enough(everything, "test_x")]
    for one, other in combinations(names, 2):
        had = {(values[one], values[other]) for values in kept}
        if (one, other) == ("alias", "on"):
            assert {(FIRST[0], on) for on in AXES["on"]} <= had
            assert {alias for alias, _ in had} == set(FIRST)
        else:
            assert had == set(product(AXES[one], AXES[other]))
    assert {values[names[0]] for values in kept} == set(AXES[names[0]])


def test_how_many_they_are():
    assert len(enough(made(("alias", "on")), "test_x")) == 5
    assert len(enough(made(tuple(AXES)), "test_x")) == 18
    assert len(enough(made(("mode", "kind")), "test_x")) == 12


def test_the_same_tests_run_each_time_and_others_for_others():
    everything = made(tuple(AXES))
    assert enough(everything, "test_x") == enough(everything, "test_x") != enough(everything, "test_y")


def test_where_the_first_database_is_not_to_be_had():
    everything = [values for values in made(("alias", "on")) if values["alias"] != FIRST[0]]
    kept = [everything[place] for place in enough(everything, "test_x")]
    assert [values["alias"] for values in kept].count(FIRST[1]) == 3
