"""Tests of the example itself: `python manage.py test`. They need no download."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import zipfile
from datetime import UTC, datetime
from importlib.util import find_spec
from io import StringIO
from math import isclose, radians
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

from django.core.management import CommandError, call_command
from django.db import connection, connections
from django.test import SimpleTestCase, TestCase, override_settings
from nyc import broker, databases

from flights import fleet, geo, loader, measure, notices, shards, source
from flights.compare import difference
from flights.models import Airline, Airport, Flight, Notice, Weather
from parallel_orm.connections import lender

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

    def test_receivers_have_heard_of_each_row(self) -> None:
        """A load sends the signals of `save()`."""
        assert Airline.objects.get().slug == "jetblue-airways"
        assert [flight.ident for flight in Flight.objects.order_by("pk")] == ["B61", "B6725", "B62"]

    def test_second_load_does_nothing(self) -> None:
        """Its chunks are recorded, with their rows."""
        before = list(Flight.objects.order_by("pk").values_list())
        load_few()
        assert list(Flight.objects.order_by("pk").values_list()) == before

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

    def test_short_files_are_an_error(self) -> None:
        """Three flights are not what was published."""
        with mock.patch.object(source, "find", return_value=members):
            with self.assertRaisesMessage(loader.LoadError, "3 flights of 336,776"):
                loader.load(None, Path())
        assert not loader.is_loaded()

    def test_load_that_was_interrupted_goes_on(self) -> None:
        """What was written before stays, and comes once."""

        def torn(name: str) -> bytes:
            return members(name) if name != "flights.csv.zip" else members(name)[:-9]

        with mock.patch.object(source, "find", return_value=torn), self.assertRaisesMessage(zipfile.BadZipFile, ""):
            loader.load(None, Path())
        assert not Flight.objects.exists()
        load_few()
        assert (Weather.objects.count(), Flight.objects.count()) == (1, 3)

    def test_rows_of_others_are_an_error(self) -> None:
        """Nobody knows what they are."""
        Airline.objects.create(carrier="B6", name="Somebody else")
        with self.assertRaisesMessage(loader.LoadError, "Empty them with `manage.py flush`"):
            load_few()

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
                creating=lambda last, processes: good,
                updating=lambda last, processes: good,
            ),
            self.assertRaisesMessage(CommandError, "row 3: 1 expected, 2 came"),
        ):
            call_command("demo", stdout=out)
        assert "2.00x" in out.getvalue()


class WritesTests(TestCase):
    """What the demo writes."""

    @classmethod
    def setUpTestData(cls) -> None:
        load_few()

    def test_notices_of_all_ways_but_one_are_equal(self) -> None:
        """`bulk_create()` alone leaves out what a receiver sets. A pool would not see this test's rows."""
        Flight.objects.update(arr_delay=33)
        with mock.patch.object(notices, "recipe", notices.loop):
            trial = measure.creating(Flight.objects.latest("pk").pk, 1)
        assert trial.differences == []
        assert [way.rows for way in trial.ways] == [3] * 5
        assert not Notice.objects.exists()

    def test_notice(self) -> None:
        """Made of what a query tells of a late flight."""
        (late,) = notices.late_flights(Flight.objects.latest("pk").pk, 9)
        notices.loop([late])
        notice = Notice.objects.get()
        assert notice.text == "JetBlue Airways 1 from JFK to LAX was 64 minutes late."
        assert len(notice.reference) == 12
        notices.bulk_create([late])
        assert Notice.objects.latest("pk").reference == ""

    def test_what_flights_lost(self) -> None:
        """Computed for those of which everything is known."""
        geo.airports.cache_clear()
        self.addCleanup(geo.airports.cache_clear)
        assert measure.updating(Flight.objects.latest("pk").pk, 1).differences == []
        assert [flight.lost is None for flight in Flight.objects.order_by("pk")] == [False, True, True]


SHARDS = [f"shard{place}" for place in range(3)]


class ShardsTests(TestCase):
    """The flights of three files, asked as one."""

    @classmethod
    def setUpTestData(cls) -> None:
        load_few()

    def setUp(self) -> None:
        if connection.vendor != "sqlite":
            self.skipTest("makes files of SQLite")
        folder = TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        default = {**connections.settings["default"], "NAME": Path(folder.name, "nyc.sqlite3")}
        made = databases.shards(default, len(SHARDS))
        assert list(made) == SHARDS
        connections.settings.update(made)
        self.addCleanup(self.forget)
        # Not before: the test would be in a transaction on each of them, and nothing in the background.
        self.enterContext(mock.patch.object(type(self), "databases", frozenset({"default", *SHARDS})))
        self.enterContext(
            override_settings(DATABASE_ROUTERS=["nyc.routers.Shards"], PARALLEL_ORM={"GROUPS": {"shards": SHARDS}})
        )
        full, _, odd = Flight.objects.order_by("pk")
        Flight.objects.filter(pk=full.pk).update(date="2013-01-31")
        Flight.objects.filter(pk=odd.pk).update(date="2013-12-01")
        self.last = odd.pk

    @staticmethod
    def forget() -> None:
        """Leave nothing open on the files."""
        lender.close_idle()
        for alias in SHARDS:
            connections[alias].close()
            del connections[alias], connections.settings[alias]

    def test_each_flight_is_on_the_shard_of_its_month(self) -> None:
        """Once, and with what it points to."""
        shards.split(SHARDS, self.last)
        months = [[flight.date.month for flight in Flight.objects.using(alias)] for alias in SHARDS]
        assert months == [[1], [7], [12]]
        assert [shards.home_of(month, SHARDS[:2]) for month in (1, 6, 7, 12)] == [
            "shard0",
            "shard0",
            "shard1",
            "shard1",
        ]
        assert {Airport.objects.using(alias).count() for alias in SHARDS} == {3}

    def test_split_follows_the_rows(self) -> None:
        """One that is there stays; one of fewer flights is made anew."""
        shards.split(SHARDS, self.last)
        with mock.patch.object(shards, "_copy", side_effect=AssertionError("again")):
            shards.split(SHARDS, self.last)
        shards.split(SHARDS, self.last - 1)
        assert [Flight.objects.using(alias).count() for alias in SHARDS] == [1, 1, 0]

    def test_demo(self) -> None:
        """All questions are answered as by the one database, and one that is not ends it."""
        out = StringIO()
        with mock.patch("flights.management.commands.demo.call_command"):
            call_command("demo", shards=3, rounds=1, stdout=out)
            assert "All answers are equal." in out.getvalue()
            assert all(f"Shards: {name}" in out.getvalue() for name in shards.QUESTIONS)
            Flight.objects.using(SHARDS[1]).update(arr_delay=-7)
            with self.assertRaisesMessage(CommandError, "Shards, aggregates: "):
                call_command("demo", shards=3, rounds=1, stdout=out)

    def test_bad_numbers(self) -> None:
        """A number that cannot be, and one that the settings have no databases for."""
        with mock.patch("flights.management.commands.demo.call_command"):
            with self.assertRaisesMessage(CommandError, "--shards must be 2 to 12"):
                call_command("demo", shards=13)
            with self.assertRaisesMessage(CommandError, "NYC_SHARDS=4"):
                call_command("demo", shards=4, stdout=StringIO())

    def test_option_decides_the_databases(self) -> None:
        """The environment has it, for child processes."""
        for argv in (["manage.py", "demo", "--shards", "3"], ["manage.py", "demo", "--shards=3"]):
            environ: dict[str, str] = {}
            databases.settle(argv, environ)
            assert environ == {"NYC_SHARDS": "3"}
        for asked, number in {"3": 3, "13": 0, "x": 0, "": 0}.items():
            with mock.patch.dict("os.environ", NYC_SHARDS=asked):
                assert databases.number_of_shards() == number


DEMO = """
import sys
from unittest import mock
from django.core.management import call_command
from flights import tests

call_command("migrate", verbosity=0)
tests.load_few()
with mock.patch.dict(tests.loader.PUBLISHED, {model: 0 for model in tests.NAMES}):
    with mock.patch("flights.loader.is_loaded", return_value=True):
        call_command("demo", executor=sys.argv[-1], processes=1)
"""
"""What another process does on a file of its own: that of a test is in memory, where no worker finds it."""


class FleetTests(TestCase):
    """The work by workers of Dask and of Celery."""

    @classmethod
    def setUpTestData(cls) -> None:
        load_few()

    def demo(self, engine: str) -> None:
        """Run the demo on three flights, with real workers."""
        if find_spec(fleet.ENGINES[engine]) is None:
            self.skipTest(f"{fleet.ENGINES[engine]} is not installed")
        with TemporaryDirectory() as folder:
            environ = os.environ | {
                "DATABASE_URL": f"sqlite:///{folder}/nyc.sqlite3",
                "DJANGO_SETTINGS_MODULE": "nyc.settings",
                "NYC_BROKER": f"{broker.FOLDER}{folder}/celery",
            }
            program = f"import django; django.setup()\n{DEMO}"
            done = subprocess.run(
                [sys.executable, "-c", program, engine],
                cwd=measure.PROJECT,
                env=environ,
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stdout + done.stderr
            assert "All answers are equal." in done.stdout
            assert f'.parallel_map(executor="{engine}")' in done.stdout
            assert not Path(folder, "celery").exists()

    def test_dask(self) -> None:
        """A cluster is made, and its answer is the loop's."""
        self.demo("dask")

    def test_celery(self) -> None:
        """A worker is started, its answer is the loop's, and it is gone, with its folder."""
        self.demo("celery")

    def test_worker_stops_however_the_demo_ends(self) -> None:
        """Ctrl-C is such an end."""
        if find_spec("celery") is None:
            self.skipTest("celery is not installed")
        with TemporaryDirectory() as folder:
            with mock.patch.dict("os.environ", NYC_BROKER=f"{broker.FOLDER}{folder}/celery"):
                with mock.patch.object(fleet, "answers", return_value=True):
                    with self.assertRaisesMessage(KeyboardInterrupt, ""), fleet.running("celery", 1) as executor:
                        assert executor == "celery"
                        raise KeyboardInterrupt
                with mock.patch.object(fleet, "answers", return_value=False):
                    with mock.patch.object(fleet, "PROJECT", Path(folder)):
                        with self.assertRaisesMessage(fleet.EngineError, "did not start"):
                            with fleet.running("celery", 1):
                                self.fail("there is no app in an empty folder")
            assert not Path(folder, "celery").exists()

    def test_answer_that_differs_ends_it(self) -> None:
        """By the call as it would be sent, which a test has done in its own process."""
        last = Flight.objects.latest("pk").pk
        geo.airports.cache_clear()
        self.addCleanup(geo.airports.cache_clear)
        assert fleet.trial("processes", "processes", last, 1).differences == []
        with mock.patch.object(fleet, "difference", return_value="row 0: 1 expected, 2 came"):
            assert "Work by dask: row 0" in fleet.trial("dask", "processes", last, 1).differences[0]

    def test_what_is_asked_for_must_be_there(self) -> None:
        """The way out is in the message."""
        with mock.patch("flights.management.commands.demo.call_command"):
            with mock.patch.object(fleet, "find_spec", return_value=None):
                with self.assertRaisesMessage(CommandError, "'.[demo,celery]'"):
                    call_command("demo", executor="celery", stdout=StringIO())
            with self.assertRaisesMessage(CommandError, "--at says where the workers of an --executor are"):
                call_command("demo", at="redis://localhost")
            with self.assertRaisesMessage(CommandError, "one of them at a time"):
                call_command("demo", shards=3, executor="dask")
        if find_spec("celery"):
            with mock.patch.dict("os.environ", NYC_BROKER="redis://localhost"):
                with self.assertRaisesMessage(fleet.EngineError, "unset it, or use --at"):
                    with fleet.running("celery", 1):
                        self.fail("nobody asked for Redis")

    def test_option_decides_the_broker(self) -> None:
        """The environment has it, for workers; a folder of the demo's own, or a broker that runs."""
        for argv, begins in {
            ("--executor", "celery"): f"{broker.FOLDER}{databases.DATA}/celery-",
            ("--executor=celery", "--at=redis://localhost"): "redis://localhost",
        }.items():
            environ: dict[str, str] = {}
            databases.settle(["manage.py", "demo", *argv], environ)
            assert environ["NYC_BROKER"].startswith(begins)
        for url, results in {"redis://there/1": "redis://there/1", "amqp://there": "rpc://"}.items():
            with mock.patch.dict("os.environ", NYC_BROKER=url):
                assert broker.configuration()["CELERY_RESULT_BACKEND"] == results

    def test_file_is_there_when_it_is_whole(self) -> None:
        """Whoever looks while it is written finds nothing of it."""
        if find_spec("celery") is None:
            self.skipTest("celery is not installed")
        from nyc import files

        found: list[bool] = []
        with TemporaryDirectory() as folder:
            path = Path(folder, "messages", "one.nyc.msg")
            whole = Path.write_bytes

            def look(unseen: Path, content: bytes) -> int:
                written = whole(unseen, content)
                found.append(path.exists() or unseen.name.endswith(".nyc.msg"))
                return written

            with mock.patch.object(Path, "write_bytes", look):
                files.write(path, b"all of it")
            assert path.read_bytes() == b"all of it"
        assert found == [False]


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
