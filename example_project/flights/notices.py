"""What the demo writes: notices of delays, and the minutes that flights lost. In Django's usual ways and in ours."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any

import django

from flights import geo
from flights.models import Flight, Notice

if TYPE_CHECKING:
    from collections.abc import Iterable

LATE = 15
"""Minutes of delay that passengers are told about."""

RECIPE_PROCESSES = 4


def late_flights(last: int, most: int) -> list[dict[str, Any]]:
    """What notices are made of: so many late flights at most, up to the key `last`."""
    late = Flight.objects.filter(pk__lte=last, arr_delay__gt=LATE).order_by("pk")
    return list(late.values("pk", "airline__name", "number", "origin_id", "dest", "arr_delay")[:most])


def make(late: dict[str, Any]) -> Notice:
    """Make the notice of a late flight. It is not saved yet."""
    name = f"{late['airline__name']} {late['number']} from {late['origin_id']} to {late['dest']}"
    return Notice(flight_id=late["pk"], minutes=late["arr_delay"], text=f"{name} was {late['arr_delay']} minutes late.")


def loop(late: Iterable[dict[str, Any]]) -> None:
    """One after another."""
    for each in late:
        make(each).save()


def bulk_create(late: Iterable[dict[str, Any]]) -> None:
    """In bulk SQL: no receiver hears of it."""
    Notice.objects.bulk_create([make(each) for each in late], batch_size=1_000)


def save_one(late: dict[str, Any]) -> None:
    """Save one notice."""
    make(late).save()


def recipe(late: Iterable[dict[str, Any]]) -> None:
    """A process pool with a task for each row."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(RECIPE_PROCESSES, mp_context=context, initializer=django.setup) as pool:
        for done in as_completed([pool.submit(save_one, each) for each in late]):
            done.result()


def told() -> list[tuple[Any, ...]]:
    """All notices, as they are in the database."""
    return list(Notice.objects.order_by("flight_id").values_list("flight_id", "minutes", "text", "reference"))


def recompute(flight: Flight) -> None:
    """Set the minutes that a flight of `geo.with_wind()` lost on its way."""
    flight.lost = geo.course(flight)[3]


def recompute_in_a_loop(flights: Iterable[Flight]) -> None:
    """One after another."""
    for flight in flights:
        recompute(flight)
        if flight.lost is not None:
            flight.save(update_fields=["lost"])
