"""Runs that end half-way, however they end: what is in the database is known, and a second run does what is left."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import uuid
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path

import pytest
from django.db import InterfaceError, OperationalError, connections, models
from django.test import override_settings

from parallel_orm import errors, report_of
from parallel_orm.executors.processes import end_pools
from parallel_orm.models import Run, RunChunk
from parallel_orm.runs import read_key, written_key
from parallel_orm.testing import kill_worker
from tests import functions
from tests.testapp.models import ByDecimal, ByMoment, ByText, ByUuid, Diary, Seat
from tests.testapp.written import Heard, Ship

WAIT = 60
#: Moments at which callers are killed. More are asked for by the environment, when somebody has the time.
MOMENTS = int(os.environ.get("PARALLEL_ORM_KILLS", "1"))


@pytest.fixture(scope="module", autouse=True)
def _pools_end():
    yield
    end_pools()


@pytest.fixture
def ships(alias):
    return Ship.objects.using(alias)


def items(number=40):
    return ({"name": f"ship {n}"} for n in range(number))


def faster(row):
    row.speed += 1


def test_a_second_run_does_nothing(ships, alias):
    first = ships.parallel_create(items(), processes=2, chunk_size=7, run_id="import")
    again = ships.parallel_create(items(), processes=2, chunk_size=7, run_id="import")
    assert (first.rows, first.done_before) == (40, 0)
    assert (again.rows, again.chunks, again.done_before) == (0, 0, 40)
    assert ships.count() == 40
    for _ in range(2):
        report = ships.parallel_update(faster, processes=2, chunk_size=7, run_id="faster")
    assert (report.rows, report.done_before) == (0, 40)
    assert set(ships.values_list("speed", flat=True)) == {2}
    for _ in range(2):
        report = ships.all().parallel_delete(processes=2, chunk_size=7, run_id="away")
    assert (report.rows, report.done_before) == (0, 40)
    assert set(RunChunk.objects.using(alias).values_list("left", flat=True)) == {"[]"}
    assert Run.objects.using(alias).count() == 3


@pytest.mark.parametrize("again", [7, 3, None])
def test_a_second_run_goes_on_where_the_first_ended(ships, again):
    """In the chunks of the first, whatever their size is now."""

    def broken():
        yield from items(25)
        raise LookupError

    with pytest.raises(LookupError):
        ships.parallel_create(broken(), threads=2, chunk_size=7, run_id="import")
    assert ships.count() == 25
    report = ships.parallel_create(items(), threads=2, chunk_size=again, run_id="import")
    assert (report.rows, report.done_before) == (15, 25)
    assert ships.count() == 40


def test_the_chunk_of_an_error_is_done_by_the_second_run(ships):
    names = [f"ship {n}" for n in range(40)]
    names[18] = "poison"
    with pytest.raises(ValueError, match="poison"):
        ships.parallel_create(({"name": name} for name in names), executor="inline", chunk_size=5, run_id="import")
    assert ships.count() == 15
    names[18] = "healed"
    report = ships.parallel_create(({"name": name} for name in names), processes=2, chunk_size=5, run_id="import")
    assert (report.rows, report.done_before) == (25, 15)
    assert sorted(ships.values_list("name", flat=True)) == sorted(names)


def test_rows_that_failed_are_done_by_the_second_run(ships):
    """They alone."""
    names = [f"ship {n}" for n in range(20)]
    names[3], names[17] = "poison a", "poison b"
    report = ships.parallel_create(
        ({"name": name} for name in names), processes=2, chunk_size=5, run_id="import", on_error="skip"
    )
    assert sorted(failure.index for failure in report.errors) == [3, 17]
    with pytest.raises(errors.ParallelORMError, match="make the same call again"):
        report.retry()
    names[3] = "healed"
    report = ships.parallel_create(
        ({"name": name} for name in names), processes=2, chunk_size=5, run_id="import", on_error="skip"
    )
    assert (report.rows, report.succeeded, report.done_before) == (2, 1, 18)
    assert [(failure.index, failure.value) for failure in report.errors] == [(17, {"name": "poison b"})]
    names[17] = "healed too"
    report = ships.parallel_create(({"name": name} for name in names), chunk_size=5, run_id="import")
    assert (report.rows, report.done_before) == (1, 19)
    assert sorted(ships.values_list("name", flat=True)) == sorted(names)


def test_rows_that_could_not_be_updated_are_updated_by_the_second_run(ships):
    ships.parallel_create(items(20), executor="inline")
    guilty = ships.order_by("pk")[8].pk

    def change(row):
        if row.pk == guilty:
            raise LookupError
        row.speed += 1

    report = ships.parallel_update(change, threads=2, chunk_size=6, run_id="faster", on_error="collect")
    assert [failure.key for failure in report.errors] == [guilty]
    report = ships.parallel_update(faster, threads=2, chunk_size=6, run_id="faster")
    assert (report.rows, report.done_before) == (1, 19)
    assert set(ships.values_list("speed", flat=True)) == {2}


def test_rows_that_came_after_the_first_run_began_are_none_of_it(ships):
    ships.parallel_create(items(20), executor="inline")
    guilty = ships.order_by("pk")[11].pk

    def change(row):
        if row.pk == guilty:
            raise LookupError
        row.speed += 1

    with pytest.raises(LookupError):
        ships.parallel_update(change, executor="inline", chunk_size=4, run_id="faster")
    ships.create(name="new")
    ships.filter(name="ship 15").delete()
    report = ships.parallel_update(faster, executor="inline", chunk_size=4, run_id="faster")
    assert (report.rows, report.done_before) == (11, 8)
    assert dict(ships.values_list("name", "speed")) == {f"ship {n}": 2 for n in range(20) if n != 15} | {"new": 1}


# --- What is lost -----------------------------------------------------------------------


def test_a_worker_that_is_killed(ships):
    """Without records nobody knows of its chunk, and nothing of it is tried again."""
    with kill_worker(1), pytest.raises(errors.WorkerDied) as caught:
        ships.parallel_create(items(), processes=2, chunk_size=10, retries=3)
    report = report_of(caught.value)
    assert report.succeeded == ships.count()
    (failure,) = report.unknown
    assert failure.is_chunk
    assert "items 10 to 19" in str(failure)
    assert any("is not known" in line for line in caught.value.__notes__)
    ships.all().delete()
    with kill_worker(1):
        report = ships.parallel_create(items(), processes=2, chunk_size=10, on_error="collect")
    assert sorted(failure.index for failure in report.unknown) == list(range(10, 20))
    assert [failure.value for failure in report.unknown] == [{"name": f"ship {n}"} for n in range(10, 20)]
    assert ships.count() == report.succeeded == 30
    assert "10 of them may be in the database" in str(report)
    with pytest.raises(errors.ParallelORMError, match="nobody knows"):
        report.retry()


def test_with_records_it_is_known(ships):
    with kill_worker(1), pytest.raises(errors.WorkerDied) as caught:
        ships.parallel_create(items(), processes=2, chunk_size=10, run_id="import")
    report = report_of(caught.value)
    assert report.unknown == []
    assert ships.count() == report.succeeded
    with kill_worker(2):
        report = ships.parallel_create(items(), processes=2, chunk_size=10, run_id="import", retries=1)
    assert ships.count() == 40
    assert report.rows + report.done_before == 40


@pytest.mark.parametrize("moment", ["before the commit", "behind the commit"])
def test_a_worker_that_is_killed_around_its_commit(ships, tmp_path, moment):
    """The record says which it was."""
    report = ships.parallel_create(
        [{"name": f"{moment} {n}", "papers": {"killed": str(tmp_path / "killed")}} for n in range(30)],
        functions.ship_that_kills,
        processes=2,
        chunk_size=10,
        run_id="import",
        retries=1,
        on_error="collect",
    )
    assert (tmp_path / "killed").exists()
    assert (report.succeeded, report.failed, report.unknown) == (30, 0, [])
    assert ships.count() == 30


def test_rows_that_failed_in_a_worker_that_was_lost_then(ships, tmp_path):
    """Are known from the record, if not why."""
    for retries, name in ((1, "a"), (0, "b")):
        ships.all().delete()
        items = [{"name": f"behind the commit {n}", "papers": {"killed": str(tmp_path / name)}} for n in range(30)]
        items[12]["name"] = "poison"
        options = {"processes": 2, "chunk_size": 10, "run_id": name, "on_error": "collect"}
        report = ships.parallel_create(items, functions.ship_that_kills, retries=retries, **options)
        assert (tmp_path / name).exists()
        (failure,) = report.errors
        assert (failure.index, failure.value["name"], type(failure.error)) == (12, "poison", errors.RunRefused)
        assert (report.succeeded, report.failed, report.unknown) == (29, 1, [])
        items[12]["name"] = "healed"
        again = ships.parallel_create(items, functions.ship_that_kills, **options)
        assert (again.rows, again.succeeded, again.done_before) == (1, 1, 29)


def test_a_connection_that_is_lost_before_the_commit(ships, alias, tmp_path):
    """Nothing of the chunk is there, which is known, so it may be sent again."""
    if connections[alias].vendor == "sqlite":
        pytest.skip("has no server")

    def marked(name):
        return [{"name": f"ship {n}", "papers": {"ended": str(tmp_path / name)}} for n in range(30)]

    make = functions.ship_that_ends_the_connection
    report = ships.parallel_create(marked("a"), make, 2, chunk_size=10, retries=2)
    assert (report.succeeded, report.failed) == (30, 0)
    assert ships.count() == 30
    ships.all().delete()
    with pytest.raises((OperationalError, InterfaceError)) as caught:
        ships.parallel_create(marked("b"), make, 2, chunk_size=10)
    report = report_of(caught.value)
    assert report.unknown == []
    assert report.succeeded == ships.count()


def test_a_connection_that_is_lost_at_the_commit(postgres):
    """Nobody knows, and it is said."""
    ships = Ship.objects.using(postgres)
    wrapper = type(connections[postgres])
    commit = wrapper._commit

    def lost(self):
        if Heard.objects.using(self.alias).filter(name="ship 15", what="post_save").exists():
            raise OperationalError("server closed the connection unexpectedly")
        commit(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wrapper, "_commit", lost)
        report = ships.parallel_create(items(30), threads=1, chunk_size=10, on_error="collect", retries=1)
    assert sorted(failure.index for failure in report.unknown) == list(range(10, 20))
    assert report.succeeded == 20


@pytest.mark.parametrize("on", [{"processes": 2}, {"threads": 2}], ids=["processes", "threads"])
def test_ctrl_c(ships, on):
    """What was at work is said to be unknown, unless it has come back; nothing else is there."""
    caller = os.getpid()

    def make(number):
        if number == 35:
            os.kill(caller, signal.SIGINT)
            if "processes" in on:  # else nobody could end it
                threading.Event().wait()
        return Ship(name=f"ship {number}")

    with pytest.raises(KeyboardInterrupt) as caught:
        ships.parallel_create(range(1000), make, chunk_size=10, **on)
    report = report_of(caught.value)
    numbers = {int(name.split()[1]) for name in ships.values_list("name", flat=True)}
    unknown = {number for failure in report.unknown for number in failure.chunk.items.places}
    assert 35 in unknown or 35 not in numbers
    assert len(numbers - unknown) <= report.succeeded <= len(numbers)
    assert all(set(range(n - n % 10, n - n % 10 + 10)) <= numbers for n in numbers), "whole chunks"
    assert len(numbers) < 1000


SETTINGS = """
try:
    import MySQLdb
except ImportError:
    import pymysql
    pymysql.install_as_MySQLdb()
DATABASES = {databases!r}
INSTALLED_APPS = ["django.contrib.contenttypes", "parallel_orm", "tests.testapp"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True
"""
PROGRAM = """
import django
django.setup()
from tests.testapp.written import Ship
from tests import functions
rows = Ship.objects.using({alias!r})
print("begun", flush=True)
if {verb!r} == "create":
    report = rows.parallel_create(range(300), functions.plain_ship, 2, chunk_size=10, run_id="run")
elif {verb!r} == "update":
    report = rows.parallel_update(functions.faster, None, 2, chunk_size=10, run_id="run")
else:
    report = rows.all().parallel_delete(2, chunk_size=10, run_id="run")
print(report.rows, report.done_before, flush=True)
"""


def program(tmp_path, alias, verb):
    settings = {key: value for key, value in connections.settings[alias].items() if key != "TEST"}
    script = tmp_path / "script.py"
    script.write_text(PROGRAM.format(alias=alias, verb=verb))
    (tmp_path / "settings_of_it.py").write_text(SETTINGS.format(databases={"default": settings, alias: settings}))
    return subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
        env={
            **os.environ,
            "PYTHONPATH": f"{Path(__file__).parent.parent}{os.pathsep}{tmp_path}",
            "DJANGO_SETTINGS_MODULE": "settings_of_it",
        },
    )


@pytest.mark.once
@pytest.mark.parametrize("verb", ["create", "update", "delete"])
def test_callers_that_are_killed(ships, alias, tmp_path, verb):
    """At any moment. The second run has every row written exactly once, while workers of the first may be at it yet."""
    chance = random.Random(f"{alias} {verb}")
    for moment in range(MOMENTS):
        Run.objects.using(alias).all().delete()
        ships.all().delete()
        if verb != "create":
            ships.bulk_create(Ship(name=f"ship {n}") for n in range(300))
        done_when = chance.randrange(0, 300, 10)
        first = program(tmp_path, alias, verb)
        assert first.stdout.readline() == "begun\n", first.stderr.read()

        def number_done():
            if verb == "update":
                return ships.filter(speed=2).count()
            return ships.count() if verb == "create" else 300 - ships.count()

        while first.poll() is None and number_done() < done_when:
            threading.Event().wait(0.005)  # the database is asked, and not besieged
        first.send_signal(signal.SIGKILL)
        first.communicate(timeout=WAIT)
        second = program(tmp_path, alias, verb)
        out, err = second.communicate(timeout=WAIT)
        assert second.returncode == 0, err
        rows, before = map(int, out.splitlines()[-1].split())
        assert rows + before == 300, (moment, done_when)
        if verb == "delete":
            assert not ships.exists()
        else:
            assert ships.count() == 300
            assert len(set(ships.values_list("name", flat=True))) == 300
            assert set(ships.values_list("speed", flat=True)) == {2 if verb == "update" else 1}


# --- What is refused ----------------------------------------------------------------------


def test_runs_that_are_refused(ships, alias):
    ships.parallel_create(items(20), executor="inline", chunk_size=5, run_id="import")
    with pytest.raises(errors.RunRefused, match=r"that of parallel_create\(\) of testapp.Ship"):
        ships.parallel_update(faster, run_id="import")
    with pytest.raises(errors.RunRefused, match="had 15 items or more, and there are only 12 now"):
        ships.parallel_create(items(12), executor="inline", run_id="import")
    RunChunk.objects.using(alias).filter(number=3).update(number=4)
    with pytest.raises(errors.RunRefused, match="cannot have a run_id"):
        ships.filter(pk__in=[1]).union(ships.filter(pk__in=[2])).parallel_update(faster, run_id="b")
    with override_settings(INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth", "tests.testapp"]):
        with pytest.raises(errors.RunRefused, match="Add 'parallel_orm' to INSTALLED_APPS"):
            ships.parallel_create(items(), run_id="c")


def test_two_runs_of_one_name_at_once(ships, alias):
    """The second one to write a chunk down is refused; no row is there twice."""

    def meanwhile():
        for number, item in enumerate(items(30)):
            if number == 10:
                ships.parallel_create(items(30), executor="inline", chunk_size=5, run_id="import")
            yield item

    with pytest.raises(errors.RunRefused, match="is under way in another process"):
        ships.parallel_create(meanwhile(), executor="inline", chunk_size=5, run_id="import")
    assert ships.count() == 30


@pytest.mark.parametrize(
    ("model", "key"),
    [
        (Ship, (5,)),
        (ByUuid, (uuid.UUID(int=7),)),
        (ByText, ("a 'key' \u20ac",)),
        (ByMoment, (datetime(2020, 1, 2, 3, 4, 5, 678901, tzinfo=UTC),)),
        (ByDecimal, (Decimal("1.250"),)),
        (Seat, ("a", 3)),
        (Diary, (8,)),
    ],
)
def test_keys_are_read_as_they_were_written(model, key):
    assert read_key(model, json.loads(json.dumps(written_key(model, key)))) == key


def test_keys_of_other_fields():
    for number, (field, value) in enumerate(
        {
            models.DateField: date(2020, 1, 2),
            models.TimeField: time(1, 2, 3, 4),
            models.DurationField: timedelta(days=3, microseconds=5),
            models.BinaryField: b"\x00\xff",
            models.FloatField: 0.1,
        }.items()
    ):
        model = type(f"Keyed{number}", (), {})
        model._meta = type("Meta", (), {"pk_fields": [field(primary_key=True)]})
        assert read_key(model, json.loads(json.dumps(written_key(model, (value,))))) == (value,)
    with pytest.raises(errors.RunRefused, match="of type list"):
        written_key(Ship, ([1],))
