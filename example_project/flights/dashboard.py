"""The dashboard: six questions about a year of flights, each an ordinary queryset."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from django.db.models import Avg, Case, Count, F, Q, Value, When

from flights.models import Flight

if TYPE_CHECKING:
    from collections.abc import Iterator

    from django.db.models import QuerySet

    from parallel_orm import Pending

ON_TIME = Q(arr_delay__lte=15)
"""By the rule of the US Department of Transportation: at the gate within 15 minutes."""

SKY = Case(
    When(weather=None, then=Value("not reported")),
    When(weather__visib__lt=2, then=Value("fog or snow")),
    When(weather__precip__gte=0.1, then=Value("hard rain")),
    When(weather__precip__gt=0, then=Value("rain")),
    When(weather__wind_speed__gte=25, then=Value("strong wind")),
    default=Value("fair"),
)


def airlines() -> QuerySet[Any]:
    """How punctual each airline was, the best first."""
    return (
        Flight.objects.values(name=F("airline__name"))
        .annotate(
            flights=Count("pk"),
            delay=Avg("arr_delay"),
            on_time=100.0 * Count("pk", filter=ON_TIME) / Count("arr_delay"),
        )
        .order_by("-on_time", "name")
    )


def routes() -> QuerySet[Any]:
    """The eight daily routes with the longest delays on arrival."""
    return (
        Flight.objects.values("origin_id", "dest")
        .annotate(flights=Count("pk"), delay=Avg("arr_delay"))
        .filter(flights__gte=365)
        .order_by("-delay", "origin_id", "dest")[:8]
    )


def hours() -> QuerySet[Any]:
    """How many flights leave at each hour of the day, and how late."""
    return Flight.objects.values("hour").annotate(flights=Count("pk"), delay=Avg("dep_delay")).order_by("hour")


def skies() -> QuerySet[Any]:
    """What the weather at departure does to delays and cancellations."""
    return (
        Flight.objects.values(sky=SKY)
        .annotate(
            flights=Count("pk"),
            delay=Avg("dep_delay"),
            cancelled=100.0 * Count("pk", filter=Q(dep_time=None)) / Count("pk"),
        )
        .order_by("-delay", "sky")
    )


def made_up() -> QuerySet[Flight]:
    """Flights that left more than a quarter of an hour late and landed on time all the same."""
    return Flight.objects.filter(ON_TIME, dep_delay__gt=15)


def day_late() -> QuerySet[Flight]:
    """Flights that came a day late, or later. (There is none, so the whole table is read.)"""
    return Flight.objects.filter(arr_delay__gte=24 * 60)


@dataclass
class Dashboard:
    """The six questions together. Making one asks the database nothing."""

    made_up: QuerySet[Flight] = field(default_factory=made_up)
    day_late: QuerySet[Flight] = field(default_factory=day_late)
    airlines: QuerySet[Any] = field(default_factory=airlines)
    routes: QuerySet[Any] = field(default_factory=routes)
    skies: QuerySet[Any] = field(default_factory=skies)
    hours: QuerySet[Any] = field(default_factory=hours)

    def start(self) -> Dashboard:
        """Start all six in the background; whoever uses one later waits for that one only."""
        self.made_up.start_count()
        self.day_late.start_exists()
        self.airlines.start_fetch()
        self.routes.start_fetch()
        self.skies.start_fetch()
        self.hours.start_fetch()
        return self

    def answers(self) -> dict[str, Any]:
        """All six answers. Not a word here knows whether anything was started."""
        return {
            "made_up": self.made_up.count(),
            "day_late": self.day_late.exists(),
            "airlines": list(self.airlines),
            "routes": list(self.routes),
            "skies": list(self.skies),
            "hours": list(self.hours),
        }

    def timings(self) -> Iterator[Timing]:
        """How each question that was started fared."""
        for question in fields(self):
            for pending in getattr(self, question.name).background.values():
                yield Timing(question.name.replace("_", " "), pending)


@dataclass(frozen=True)
class Timing:
    """How one background query fared, in milliseconds. Ask when its answer is there."""

    question: str
    pending: Pending

    @property
    def waited(self) -> float:
        """From its start until it began."""
        return 1000 * (self.pending.queue_time or 0)

    @property
    def worked(self) -> float:
        """From there to its answer."""
        return 1000 * (self.pending.execute_time or 0)
