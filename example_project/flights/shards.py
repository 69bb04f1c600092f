"""The flights split by month over several databases, which answer as one.

`split()` copies them out of the one database, which keeps all: so that both can be asked the same questions. What
flights point to (airlines, airports, planes, weather) is on every shard, as each joins its own rows.
"""

from __future__ import annotations

from hashlib import sha256
from statistics import median
from typing import TYPE_CHECKING, Any

from django.core.management import call_command
from django.db import connection, connections
from django.db.models import Avg, Count, F, Max, Min, Q, StdDev, Sum

from flights.compare import difference
from flights.dashboard import ON_TIME
from flights.measure import Trial, Way, timed
from flights.models import Airline, Airport, Flight, Plane, Weather

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from django.db.models import Model, QuerySet

GROUP = "shards"
"""The group of the setting `PARALLEL_ORM["GROUPS"]` that `across()` is given."""

AT_ONCE = 1_000
"""Rows of one INSERT."""


def home_of(month: int, aliases: Sequence[str]) -> str:
    """The shard of a month's flights: each has months that follow each other."""
    return aliases[(month - 1) * len(aliases) // 12]


def split(aliases: Sequence[str], last: int) -> None:
    """Put the flights up to the key `last` on their shards, unless they are there."""
    flights = Flight.objects.filter(pk__lte=last)
    for alias in aliases:
        make(alias)
        months = [month for month in range(1, 13) if home_of(month, aliases) == alias]
        ours = flights.filter(date__month__in=months)
        wanted = {model: model._default_manager.all() for model in (Airline, Airport, Plane, Weather)} | {Flight: ours}
        if all(_same_keys(rows, model, alias) for model, rows in wanted.items()):
            continue
        for model in reversed(wanted):
            model._default_manager.using(alias).all().delete()
        for model, rows in wanted.items():
            _copy(rows.order_by("pk"), model, alias)
        if connections[alias].vendor in {"sqlite", "postgresql"}:
            with connections[alias].cursor() as cursor:
                cursor.execute("ANALYZE")


def make(alias: str) -> None:
    """Make a shard's database, where that is more than a file, and its tables."""
    if connection.vendor == "postgresql":
        name = connections[alias].settings_dict["NAME"]
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name])
            if cursor.fetchone() is None:
                # Of the collation that the one database has: else they would sort text each in its way.
                quoted = connection.ops.quote_name(name)
                cursor.execute(f"CREATE DATABASE {quoted} TEMPLATE template0 {_collation()}")
    call_command("migrate", database=alias, verbosity=0, interactive=False)


def _collation() -> str:
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT pg_encoding_to_char(encoding), datcollate, datctype FROM pg_database "
            "WHERE datname = current_database()"
        )
        return "ENCODING '{}' LC_COLLATE '{}' LC_CTYPE '{}'".format(*cursor.fetchone())


def _same_keys(rows: QuerySet[Any], model: type[Model], alias: str) -> bool:
    """Whether a shard has as many rows, between the same keys."""
    asked = {"rows": Count("pk"), "first": Min("pk"), "last": Max("pk")}
    return rows.aggregate(**asked) == model._default_manager.using(alias).aggregate(**asked)


def _copy(rows: Any, model: type[Model], alias: str) -> None:
    for chunk in rows.chunks(AT_ONCE):
        model._default_manager.using(alias).bulk_create(chunk)


# --- The questions --------------------------------------------------------------------------


def made_up(rows: Any) -> int:
    """How many left late and landed on time."""
    return int(rows.filter(ON_TIME, dep_delay__gt=15).count())


def day_late(rows: Any) -> bool:
    """Whether any came a day late."""
    return bool(rows.filter(arr_delay__gte=24 * 60).exists())


def latest(rows: Any) -> list[Any]:
    """The hundred that came latest, with their airlines."""
    found = rows.order_by(F("arr_delay").desc(nulls_last=True), "pk").select_related("airline")[:100]
    return [(flight.pk, str(flight), flight.airline.name, flight.arr_delay) for flight in found]


def airlines(rows: Any) -> list[Any]:
    """How many flights each airline had, how many on time, and how late on average."""
    found = rows.values(name=F("airline__name")).annotate(
        flights=Count("pk"), on_time=Count("pk", filter=ON_TIME), delay=Avg("arr_delay")
    )
    return [_rounded(group) for group in found.order_by("-flights", "name")]


def hours(rows: Any) -> list[Any]:
    """How many leave at each hour, and how late."""
    found = rows.values("hour").annotate(flights=Count("pk"), delay=Avg("dep_delay")).order_by("hour")
    return [_rounded(group) for group in found]


def year(rows: Any) -> dict[str, Any]:
    """The year in numbers. (Django's StdDev on SQLite fails where a value is NULL: hence the filter.)"""
    found = rows.filter(arr_delay__isnull=False).aggregate(
        flights=Count("pk"),
        miles=Sum("distance"),
        earliest=Min("arr_delay"),
        latest=Max("arr_delay"),
        delay=Avg("arr_delay"),
        spread=StdDev("arr_delay"),
        from_newark=Sum("distance", filter=Q(origin="EWR")),
    )
    return _rounded(found)


def walk(rows: Any) -> dict[str, Any]:
    """All of them in the order of their departures, in chunks; told by a digest."""
    digest, number = sha256(), 0
    for flight in rows.order_by("time_hour", "pk").chunked_iterator():
        digest.update(f"{flight.pk} {flight.time_hour} {flight.tailnum}\n".encode())
        number += 1
    return {"rows": number, "digest": digest.hexdigest()}


QUESTIONS: dict[str, Callable[[Any], Any]] = {
    "count": made_up,
    "exists": day_late,
    "top 100": latest,
    "groups by airline": airlines,
    "groups by hour": hours,
    "aggregates": year,
    "ordered walk": walk,
}
"""What is asked, by what the table calls it. Each takes a queryset of flights, wherever they are."""


def _rounded(found: dict[str, Any]) -> dict[str, Any]:
    """Floats to ten digits: of an average the last bits depend on the order of adding up."""
    return {name: float(f"{value:.10g}") if isinstance(value, float) else value for name, value in found.items()}


def trials(aliases: Sequence[str], last: int, rounds: int) -> Iterable[Trial]:
    """Each question asked of one database and across all: medians of alternating rounds, and whether both agree."""
    one = Flight.objects.filter(pk__lte=last)
    # The shards hold no others.
    several = Flight.objects.across(GROUP)
    several.count()  # which connects to each
    for name, ask in QUESTIONS.items():
        alone: list[float] = []
        across: list[float] = []
        differences = []
        for _ in range(rounds):
            seconds, expected = timed(lambda ask=ask: ask(one.all()))
            alone.append(seconds)
            seconds, answer = timed(lambda ask=ask: ask(several.all()))
            across.append(seconds)
            differences.append(difference(expected, answer))
        yield Trial(
            f"Shards: {name}",
            [Way("one database", median(alone)), Way(f"across(), {len(aliases)} databases", median(across))],
            [f"Shards, {name}: {found}" for found in differences if found],
        )
