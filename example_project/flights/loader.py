"""Loads the published files into the database, on all cores, with the signals of each row.

Rows stream from the files into `parallel_create`; the flights are never in memory all at once. Each
file is a run with a name, whose chunks are recorded with their rows: a load that was interrupted,
in whatever way, goes on where it was when it is begun again. In the end the rows are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import date, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

from django.db import IntegrityError, connection, models

from flights import source
from flights.models import Airline, Airport, Flight, Plane, Weather

if TYPE_CHECKING:
    from pathlib import Path

PUBLISHED: dict[type[models.Model], int] = {
    Airline: 16,
    Airport: 1_458,
    Plane: 3_322,
    Weather: 26_115,
    Flight: 336_776,
}
"""How many rows each file has, in an order in which they can be loaded."""

M = TypeVar("M", bound=models.Model)
Progress = Callable[[str, int, Iterable[M]], Iterable[M]]
"""Shows the advance of what it passes on: `progress(title, total, items)`."""


class LoadError(Exception):
    """The tables hold something other than the published data; the message says what to do."""


def is_loaded() -> bool:
    """Whether every row is there."""
    return counts() == PUBLISHED


def counts() -> dict[type[models.Model], int]:
    """How many rows there are."""
    return {model: model._default_manager.count() for model in PUBLISHED}


def load(data: Path | None, cache: Path, progress: Progress | None = None) -> None:
    """Fill the tables from `data` (an sdist or wheel), or from where `source` finds it; go on with a load before."""
    members = source.find(data, cache)
    show = progress or (lambda title, total, items: items)
    for model, rows in (
        (Airline, airlines),
        (Airport, airports),
        (Plane, planes),
        (Weather, weather),
        (Flight, flights),
    ):
        title = str(model._meta.verbose_name_plural)
        items = show(title, PUBLISHED[model], rows(members))
        try:
            model.objects.parallel_create(items, mode="bulk", run_id=f"load {title}")
        except IntegrityError as error:
            raise LoadError(f"{error} {_told(counts())}") from error
    if not is_loaded():
        raise LoadError(_told(counts()))
    if connection.vendor in {"sqlite", "postgresql"}:
        # Fresh statistics, without which a planner guesses about a table that was empty just now.
        with connection.cursor() as cursor:
            cursor.execute("ANALYZE")


def _told(counts: dict[type[models.Model], int]) -> str:
    """A sentence on the tables whose rows are not as many as were published."""
    wrong = [
        f"{counts[model]:,} {model._meta.verbose_name_plural} of {published:,}"
        for model, published in PUBLISHED.items()
        if counts[model] != published
    ]
    return f"The tables hold {', '.join(wrong)}. Empty them with `manage.py flush`, and load again."


def airlines(members: source.Members) -> Iterator[Airline]:
    """`airlines.csv`, which fits the model as it is."""
    for row in source.rows(members, "airlines"):
        yield Airline(**row)


def airports(members: source.Members) -> Iterator[Airport]:
    r"""`airports.csv`. Editions of it write a missing time zone as `NA` or as `\N`."""
    for row in source.rows(members, "airports"):
        yield Airport(
            faa=row["faa"],
            name=row["name"],
            lat=float(row["lat"]),
            lon=float(row["lon"]),
            alt=int(row["alt"]),
            tz=int(row["tz"]),
            dst=row["dst"],
            tzone=None if row["tzone"] == r"\N" else text(row["tzone"]),
        )


def planes(members: source.Members) -> Iterator[Plane]:
    """`planes.csv`."""
    for row in source.rows(members, "planes"):
        yield Plane(
            tailnum=row["tailnum"],
            year=whole(row["year"]),
            type=row["type"],
            manufacturer=row["manufacturer"],
            model=row["model"],
            engines=int(row["engines"]),
            seats=int(row["seats"]),
            speed=whole(row["speed"]),
            engine=row["engine"],
        )


def weather(members: source.Members) -> Iterator[Weather]:
    """`weather.csv`; the moment is told by `time_hour`, so the columns that repeat it are left."""
    for row in source.rows(members, "weather"):
        yield Weather(
            origin_id=row["origin"],
            time_hour=moment(row["time_hour"]),
            temp=real(row["temp"]),
            dewp=real(row["dewp"]),
            humid=real(row["humid"]),
            wind_dir=whole(row["wind_dir"]),
            wind_speed=real(row["wind_speed"]),
            wind_gust=real(row["wind_gust"]),
            precip=float(row["precip"]),
            pressure=real(row["pressure"]),
            visib=float(row["visib"]),
        )


def flights(members: source.Members) -> Iterator[Flight]:
    """`flights.csv`, each flight with its plane, destination and weather where those exist.

    Reads the three other tables, so it starts when they are filled.
    """
    known_airports = set(Airport.objects.values_list("faa", flat=True))
    known_planes = set(Plane.objects.values_list("tailnum", flat=True))
    reports = {
        (origin, time_hour): pk for pk, origin, time_hour in Weather.objects.values_list("pk", "origin_id", "time_hour")
    }
    for row in source.rows(members, "flights"):
        time_hour = moment(row["time_hour"])
        tailnum = text(row["tailnum"])
        dest = row["dest"]
        yield Flight(
            date=day(row["year"], row["month"], row["day"]),
            hour=int(row["hour"]),
            minute=int(row["minute"]),
            time_hour=time_hour,
            airline_id=row["carrier"],
            number=int(row["flight"]),
            tailnum=tailnum,
            plane_id=tailnum if tailnum in known_planes else None,
            origin_id=row["origin"],
            dest=dest,
            dest_airport_id=dest if dest in known_airports else None,
            weather_id=reports.get((row["origin"], time_hour)),
            dep_time=whole(row["dep_time"]),
            dep_delay=whole(row["dep_delay"]),
            sched_arr_time=int(row["sched_arr_time"]),
            arr_time=whole(row["arr_time"]),
            arr_delay=whole(row["arr_delay"]),
            air_time=whole(row["air_time"]),
            distance=int(row["distance"]),
        )


def text(value: str) -> str | None:
    """Text that may be missing."""
    return None if value == "NA" else value


def whole(value: str) -> int | None:
    """A whole number that may be missing."""
    return None if value == "NA" else int(value)


def real(value: str) -> float | None:
    """A number that may be missing."""
    return None if value == "NA" else float(value)


@lru_cache(maxsize=1_000)
def moment(value: str) -> datetime:
    """An aware datetime in UTC, as in `2013-01-01T10:00:00Z`; many rows in a row share one."""
    return datetime.fromisoformat(value)


@lru_cache(maxsize=1_000)
def day(year: str, month: str, number: str) -> date:
    """A date in New York."""
    return date(int(year), int(month), int(number))
