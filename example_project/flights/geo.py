"""Arithmetic on one flight, in pure Python: something for the processors to do.

The arithmetic is real, the meteorology is not: the wind on the ground in New York stands in for
the wind aloft.
"""

from __future__ import annotations

from functools import cache
from math import atan, atan2, cos, hypot, radians, sin, sqrt, tan
from typing import TYPE_CHECKING

from django.db.models import F

from flights.models import Airport, Flight

if TYPE_CHECKING:
    from django.db.models import QuerySet

MILE = 1.609344
"""Kilometres."""

CRUISE = 800.0
"""A usual speed through the air, in kilometres per hour."""

LEGS = 20
"""How many times the course of a flight is taken; it turns all the way along a great circle."""

STRONGEST_WIND = 200.0
"""Miles per hour; a report above this is a slip of the pen (see `Weather`)."""

Point = tuple[float, float]
"""Latitude and longitude, in radians."""

Course = tuple[int, float | None, float | None, float | None]
"""A flight's key, the kilometres to fly, the headwind in km/h, and the minutes lost on the way."""


def with_wind() -> QuerySet[Flight]:
    """Every flight, with the wind reported for its hour."""
    return Flight.objects.annotate(wind_dir=F("weather__wind_dir"), wind_speed=F("weather__wind_speed")).order_by("pk")


def course(flight: Flight) -> Course:
    """How far a flight of `with_wind()` had to go, against which wind, and what else it lost.

    What is not known is None: the distance to an airport that is not on file, the wind of an hour
    without a report, the minutes of a flight that never landed. The minutes lost are those in the
    air beyond what a plane at `CRUISE` needs for the distance against that wind.
    """
    places = airports()
    start, end = places[flight.origin_id], places.get(flight.dest)
    if end is None:
        return flight.pk, None, None, None
    kilometres = geodesic(start, end)
    speed, blows_from = flight.wind_speed, flight.wind_dir
    if speed is None or blows_from is None or speed > STRONGEST_WIND:
        return flight.pk, kilometres, None, None
    against = headwind(start, end, speed * MILE, radians(blows_from))
    if flight.air_time is None:
        return flight.pk, kilometres, against, None
    return flight.pk, kilometres, against, flight.air_time - 60 * kilometres / (CRUISE - against)


@cache
def airports() -> dict[str, Point]:
    """Where the airports are: one query per process, whichever process this runs in."""
    places = Airport.objects.values_list("faa", "lat", "lon")
    return {faa: (radians(lat), radians(lon)) for faa, lat, lon in places}


def geodesic(start: Point, end: Point) -> float:
    """Kilometres between two points on the WGS 84 ellipsoid, after Vincenty (1975).

    Not for points nearly opposite each other on the globe, where the iteration need not converge.
    """
    axis, flattening = 6378.137, 1 / 298.257223563
    minor = axis * (1 - flattening)
    turn = end[1] - start[1]
    u1, u2 = atan((1 - flattening) * tan(start[0])), atan((1 - flattening) * tan(end[0]))
    sin1, cos1, sin2, cos2 = sin(u1), cos(u1), sin(u2), cos(u2)
    lam = turn
    for _ in range(50):
        sin_lam, cos_lam = sin(lam), cos(lam)
        sin_arc = hypot(cos2 * sin_lam, cos1 * sin2 - sin1 * cos2 * cos_lam)
        if sin_arc == 0:
            return 0.0
        cos_arc = sin1 * sin2 + cos1 * cos2 * cos_lam
        arc = atan2(sin_arc, cos_arc)
        sin_azimuth = cos1 * cos2 * sin_lam / sin_arc
        cos_azimuth2 = 1 - sin_azimuth**2
        middle = cos_arc - 2 * sin1 * sin2 / cos_azimuth2 if cos_azimuth2 else 0.0
        c = flattening / 16 * cos_azimuth2 * (4 + flattening * (4 - 3 * cos_azimuth2))
        before = lam
        spread = middle + c * cos_arc * (2 * middle**2 - 1)
        lam = turn + (1 - c) * flattening * sin_azimuth * (arc + c * sin_arc * spread)
        if abs(lam - before) < 1e-12:
            break
    u = cos_azimuth2 * (axis**2 - minor**2) / minor**2
    a = 1 + u / 16384 * (4096 + u * (u * (320 - 175 * u) - 768))
    b = u / 1024 * (256 + u * (u * (74 - 47 * u) - 128))
    inner = cos_arc * (2 * middle**2 - 1)
    inner -= b / 6 * middle * (4 * sin_arc**2 - 3) * (4 * middle**2 - 3)
    return minor * a * (arc - b * sin_arc * (middle + b / 4 * inner))


def headwind(start: Point, end: Point, wind: float, blows_from: float) -> float:
    """The part of a wind that blows against the course, as a mean over the great circle.

    In the unit of `wind`; negative for a tailwind. `blows_from` is an angle from north, in radians.
    """
    along = _arc(start, end)
    if along == 0:
        return 0.0
    against, here = 0.0, start
    for leg in range(LEGS):
        against += wind * cos(bearing(here, end) - blows_from)
        here = between(start, end, along, (leg + 1) / LEGS)
    return against / LEGS


def bearing(start: Point, end: Point) -> float:
    """The course at `start` that leads to `end`, as an angle from north, in radians."""
    turn = end[1] - start[1]
    return atan2(
        sin(turn) * cos(end[0]),
        cos(start[0]) * sin(end[0]) - sin(start[0]) * cos(end[0]) * cos(turn),
    )


def between(start: Point, end: Point, along: float, part: float) -> Point:
    """The point that lies `part` of the way (0 to 1) on a great circle of the arc `along`."""
    a, b = sin((1 - part) * along) / sin(along), sin(part * along) / sin(along)
    x = a * cos(start[0]) * cos(start[1]) + b * cos(end[0]) * cos(end[1])
    y = a * cos(start[0]) * sin(start[1]) + b * cos(end[0]) * sin(end[1])
    z = a * sin(start[0]) + b * sin(end[0])
    return atan2(z, hypot(x, y)), atan2(y, x)


def _arc(start: Point, end: Point) -> float:
    """The angle between two points seen from the middle of a round Earth (haversine)."""
    a = sin((end[0] - start[0]) / 2) ** 2
    a += cos(start[0]) * cos(end[0]) * sin((end[1] - start[1]) / 2) ** 2
    return 2 * atan2(sqrt(a), sqrt(1 - a))
