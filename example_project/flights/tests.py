"""Tests of the example itself: `python manage.py test`. They need no download."""

from __future__ import annotations

import io
import tarfile
import zipfile
from datetime import UTC, datetime
from io import StringIO
from math import isclose, radians
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

from django.core.management import CommandError, call_command
from django.test import SimpleTestCase, TestCase

from flights import geo, loader, measure, source
from flights.compare import difference
from flights.models import Airport, Flight, Weather

FILES = {
    "airlines": "carrier,name\nB6,JetBlue Airways\n",
    "airports": (
        "faa,name,lat,lon,alt,tz,dst,tzone\n"
        "JFK,John F Kennedy Intl,40.639751,-73.778925,13,-5,A,America/New_York\n"
        "LAX,Los Angeles Intl,33.942536,-118.408075,126,-8,A,NA\n"
        "BOS,Boston,42.364347,-71.005181,19,-5,A,\\N\n"
    ),
    "planes": (
        "tailnum,year,type,manufacturer,model,engines,seats,speed,engine\n"
        "N1,NA,Fixed wing multi engine,AIRBUS,A320,2,180,NA,Turbo-fan\n"
    ),
    "weather": (
        "origin,year,month,day,hour,temp,dewp,humid,wind_dir,wind_speed,wind_gust,precip,pressure,"
        "visib,time_hour\n"
        "JFK,2013,7,1,5,70,60,50,270,20,NA,0,NA,10,2013-07-01T09:00:00Z\n"
    ),
    "flights": (
        "year,month,day,dep_time,sched_dep_time,dep_delay,arr_time,sched_arr_time,arr_delay,"
        "carrier,flight,tailnum,origin,dest,air_time,distance,hour,minute,time_hour\n"
        "2013,7,1,544,540,4,1004,900,64,B6,1,N1,JFK,LAX,330,2475,5,40,2013-07-01T09:00:00Z\n"
        "2013,7,1,NA,545,NA,NA,1022,NA,B6,725,NA,JFK,BQN,NA,1576,5,45,2013-07-01T09:00:00Z\n"
        "2013,7,2,600,600,0,700,700,0,B6,2,N2,JFK,BOS,50,187,6,0,2013-07-02T10:00:00Z\n"
    ),
}


def members(name: str) -> bytes:
    """The files above, as a release has them."""
    stem = name.partition(".")[0]
    if not name.endswith(".zip"):
        return FILES[stem].encode()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("flights.csv", FILES["flights"])
    return packed.getvalue()


def load_few() -> None:
    """Load the files above."""
    counts = {model: FILES[name].count("\n") - 1 for model, name in NAMES.items()}
    with (
        mock.patch.object(source, "find", return_value=members),
        mock.patch.object(loader, "PUBLISHED", counts),
    ):
        loader.load(None, Path())


NAMES = dict(
    zip(
        loader.PUBLISHED,
        ("airlines", "airports", "planes", "weather", "flights"),
        strict=True,
    )
)


class LoadedTests(TestCase):
    """What is in the tables after a load."""

    @classmethod
    def setUpTestData(cls) -> None:
        load_few()

    def test_gaps_are_null_and_codes_stay(self) -> None:
        """A flight keeps what was published, and points only to what there is."""
        full, cancelled, odd = Flight.objects.order_by("pk")
        assert (full.plane_id, full.dest_airport_id, full.dep_delay) == ("N1", "LAX", 4)
        assert (cancelled.tailnum, cancelled.plane, cancelled.dep_time) == (None,) * 3
        assert (cancelled.dest, cancelled.dest_airport) == ("BQN", None)
        assert (odd.tailnum, odd.plane, odd.weather) == ("N2", None, None)
        assert Flight.objects.select_related("dest_airport", "plane").count() == 3

    def test_weather_is_found_by_the_hour_in_utc(self) -> None:
        """New York's summer is four hours behind UTC."""
        flight = Flight.objects.earliest("pk")
        assert flight.weather == Weather.objects.get()
        assert flight.time_hour == datetime(2013, 7, 1, 9, tzinfo=UTC)
        assert (flight.date.isoformat(), flight.hour) == ("2013-07-01", 5)

    def test_missing_time_zones_of_both_spellings(self) -> None:
        r"""`NA` and `\N` are no names of time zones."""
        assert list(Airport.objects.order_by("faa").values_list("tzone", flat=True)) == [None, "America/New_York", None]

    def test_anything_but_all_or_nothing_is_an_error(self) -> None:
        """Tables with other rows are neither loaded nor empty."""
        with self.assertRaisesMessage(loader.LoadError, "3 flights of 336,776"):
            loader.is_loaded()

    def test_course(self) -> None:
        """What is not known stays unknown, and a west wind slows a flight to the west."""
        geo.airports.cache_clear()
        self.addCleanup(geo.airports.cache_clear)
        full, cancelled, odd = (geo.course(flight) for flight in geo.with_wind())
        assert abs(full[1] - 3983) < 2
        assert full[2] > 25
        assert full[3] is not None
        assert cancelled[1:] == (None, None, None)
        assert odd[2:] == (None, None)

    def test_page_is_the_same_either_way(self) -> None:
        """Both pages show the same numbers."""
        together, alone = (
            self.client.get(url).content.decode().partition("<main>")[2].partition("</main>")[0]
            for url in ("/", "/?inline=1")
        )
        assert together == alone
        self.assertInHTML('<td class="n">50.0 %</td>', together)


class LoadingTests(TestCase):
    """What a load that fails leaves behind."""

    def test_short_files_leave_nothing(self) -> None:
        """Three flights are not what was published."""
        with mock.patch.object(source, "find", return_value=members):
            with self.assertRaisesMessage(loader.LoadError, "Nothing was kept"):
                loader.load(None, Path())
        assert not loader.is_loaded()

    def test_empty_page(self) -> None:
        """Without flights, the page says what to do."""
        self.assertContains(self.client.get("/"), "manage.py load")


class SourceTests(SimpleTestCase):
    """Where the files come from, and what is said when they do not."""

    def test_wrong_archive_is_refused(self) -> None:
        """A file of the right name and other content."""
        with TemporaryDirectory() as folder:
            path = Path(folder, source.SDIST)
            with tarfile.open(path, "w:gz"):
                pass
            with self.assertRaisesMessage(source.SourceError, "its SHA-256 is"):
                source.find(path, Path(folder))

    def test_no_pip_says_what_to_do(self) -> None:
        """The way out is in the message."""
        failed = mock.Mock(returncode=1, stderr="python: No module named pip")
        with TemporaryDirectory() as folder, mock.patch("subprocess.run", return_value=failed):
            with mock.patch.object(source, "_installed", return_value=None):
                with self.assertRaisesMessage(source.SourceError, "has no pip") as caught:
                    source.find(None, Path(folder))
        assert "--data path/to/" in str(caught.exception)


class CompareTests(TestCase):
    """A demo that cannot fail proves nothing."""

    def test_difference(self) -> None:
        """Equal is None; else the first place is named."""
        assert difference([{"a": 1.5}], [{"a": 1.5}]) is None
        assert difference([(1, 2)], [(1, 3)]) == "row 0: row 1: 2 expected, 3 came"
        assert difference([1], [1, 1]) == "1 rows expected, 2 came"
        assert "on_time" in str(difference({"on_time": 1}, {"on_time": None}))

    def test_demo_fails_when_answers_differ(self) -> None:
        """One wrong answer is the end of the demo, after its table."""
        ways = [measure.Way("usual", 1.0, 10, 100), measure.Way("ours", 0.5, 10, 10)]
        good = measure.Trial("Good", ways, [])
        bad = measure.Trial("Bad", ways, ["Bad: row 3: 1 expected, 2 came"])
        out = StringIO()
        with (
            mock.patch("flights.management.commands.demo.call_command"),
            mock.patch("flights.management.commands.demo.last_key", return_value=1),
            mock.patch.multiple(
                measure,
                dashboard=lambda rounds: good,
                walks=lambda last: bad,
                work=lambda last, processes: good,
            ),
            self.assertRaisesMessage(CommandError, "row 3: 1 expected, 2 came"),
        ):
            call_command("demo", stdout=out)
        assert "2.00x" in out.getvalue()


class GeoTests(SimpleTestCase):
    """The arithmetic, against published numbers."""

    def test_geodesic(self) -> None:
        """Vincenty's own test line, Flinders Peak to Buninyong: 54,972.271 m."""
        flinders = radians(-37.95103341666667), radians(144.42486788888888)
        buninyong = radians(-37.65282113888889), radians(143.92649552777777)
        assert abs(geo.geodesic(flinders, buninyong) - 54.972271) < 1e-6

    def test_headwind(self) -> None:
        """Along the equator, an east wind meets who goes east."""
        start, end = (0.0, 0.0), (0.0, radians(30))
        assert isclose(geo.headwind(start, end, 10, radians(90)), 10)
        assert isclose(geo.headwind(start, end, 10, radians(270)), -10)
