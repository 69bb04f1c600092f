"""Parallel create, update and delete: all that a loop does, nothing twice, nothing lost."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections import Counter
from pathlib import Path

import pytest
from django.core.exceptions import ValidationError
from django.core.files.base import ContentFile
from django.db import DatabaseError, IntegrityError, connections, models, transaction
from django.test import TestCase, override_settings
from django.test.utils import CaptureQueriesContext
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel_orm import errors, report_of
from parallel_orm.executors.processes import end_pools
from tests import functions
from tests.testapp.models import Author, Place
from tests.testapp.written import Berth, Buoy, CarFerry, Crew, Ferry, Flagship, Heard, Ship, Tug

pytestmark = pytest.mark.pairs
WAIT = 60
MODES = ["save", "bulk"]
ON = [{"processes": 2}, {"threads": 2}, {"executor": "inline"}]
on_each = pytest.mark.parametrize("on", ON, ids=["processes", "threads", "inline"])
in_each_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(scope="module", autouse=True)
def _pools_end():
    yield
    end_pools()


@pytest.fixture(autouse=True)
def _files(tmp_path):
    with override_settings(MEDIA_ROOT=str(tmp_path)):
        yield


@pytest.fixture
def ships(alias):
    return Ship.objects.using(alias)


def heard(alias):
    """Return what was heard, how often, and take it away."""
    said = Counter(Heard.objects.using(alias).values_list("what", "sender", "name", "told"))
    Heard.objects.using(alias).all().delete()
    return said


def contents(model, alias, *but):
    """Return the columns of all rows, but for those that time or chance decides."""
    meta = model._meta
    names = [each.attname for each in meta.concrete_fields if not each.primary_key and each.name not in but]
    names = [name for name in names if not name.endswith("_ptr_id")]
    return sorted(model._base_manager.using(alias).values_list(*names), key=repr)


NEVER_ALIKE = ("built", "changed", "log")
KINDS = {
    "concrete": (Ship, [{"name": f"ship {n}", "speed": n, "papers": {"n": [n]}} for n in range(25)]),
    "inherited": (Ferry, [{"name": f"ferry {n}", "decks": n} for n in range(25)]),
    "inherited twice": (CarFerry, [{"name": f"car ferry {n}", "lanes": n} for n in range(25)]),
    "proxy": (Flagship, [{"name": f"flagship {n}"} for n in range(25)]),
    "uuid": (Buoy, [{"name": f"buoy {n}"} for n in range(25)]),
    "composite": (Berth, [{"quay": "a", "number": n, "name": f"berth {n}"} for n in range(25)]),
}


@in_each_mode
@on_each
@pytest.mark.parametrize("kind", KINDS)
def test_creating_is_as_in_a_loop(alias, on, mode, kind):
    """Signals, their arguments and their number; what ``on_commit()`` was given; what is in the database."""
    model, items = KINDS[kind]
    for item in items:
        model.objects.using(alias).create(**item)
    expected, rows = heard(alias), contents(model, alias, *NEVER_ALIKE)
    model._base_manager.using(alias).all().delete()
    heard(alias)
    report = model.objects.using(alias).parallel_create(iter(items), chunk_size=7, mode=mode, keys=True, **on)
    assert heard(alias) == expected
    found = contents(model, alias, *NEVER_ALIKE)
    if mode == "bulk":  # which does not call save()
        rows, found = (contents_without_saves(each, model) for each in (rows, found))
    assert found == rows
    assert (report.rows, report.succeeded, report.failed, report.chunks) == (25, 25, 0, 4)
    assert sorted(report.keys, key=repr) == sorted(
        model._base_manager.using(alias).values_list("pk", flat=True), key=repr
    )
    if issubclass(model, Ship):
        assert not model._base_manager.using(alias).filter(models.Q(built=None) | models.Q(changed=None)).exists()


def contents_without_saves(rows, model):
    names = [each.attname for each in model._meta.concrete_fields if not each.primary_key]
    names = [name for name in names if not name.endswith("_ptr_id") and name not in NEVER_ALIKE]
    if "saves" not in names:
        return rows
    place = names.index("saves")
    return [row[:place] + row[place + 1 :] for row in rows]


@in_each_mode
@on_each
def test_many_to_many_relations_of_dictionaries(alias, ships, on, mode):
    crews = [Crew.objects.using(alias).create(name=name) for name in "ab"]
    items = [{"name": f"ship {n}", "crews": crews[: n % 3]} for n in range(9)]
    for item in items:
        ship = Ship.objects.using(alias).create(name=item["name"])
        ship.crews.set(item["crews"])
    expected = heard(alias)
    ships.all().delete()
    heard(alias)
    ships.parallel_create(items, chunk_size=4, mode=mode, **on)
    assert heard(alias) == expected
    assert [ship.crews.count() for ship in ships.order_by("pk")].count(2) == 3


@in_each_mode
@on_each
def test_files(alias, ships, on, mode):
    """Made in the worker: with an instance its content would be left behind."""
    ships.parallel_create(range(5), functions.ship_with_log, chunk_size=2, mode=mode, **on)
    assert sorted(Path(ship.log.path).read_text() for ship in ships) == ["log 0", "log 1", "log 2", "log 3", "log 4"]


def test_a_file_does_not_travel(ships):
    with pytest.raises(errors.NotPicklable, match="'log' of item 1 is not saved yet"):
        ships.parallel_create([Ship(name="a"), Ship(name="b", log=ContentFile(b"", "log"))], processes=2)
    assert not ships.exists()


@in_each_mode
@on_each
def test_instances_are_told_their_keys(ships, alias, on, mode):
    instances = [Ship(name=f"ship {n}") for n in range(9)]
    ships.parallel_create(instances, chunk_size=2, mode=mode, **on)
    keys = dict(ships.values_list("name", "pk"))
    assert {ship.name: ship.pk for ship in instances} == keys
    assert {(ship._state.adding, ship._state.db) for ship in instances} == {(False, alias)}


@on_each
def test_make_may_save_by_itself(ships, alias, on):
    """And others with it, in one transaction."""
    report = ships.parallel_create(range(6), functions.ship_with_tugs, chunk_size=4, keys=True, **on)
    assert report.succeeded == 6
    assert Tug.objects.using(alias).count() == 12
    assert sorted(report.keys) == sorted(ships.values_list("pk", flat=True))
    assert set(ships.values_list("saves", flat=True)) == {1}


@in_each_mode
@on_each
@pytest.mark.parametrize("on_error", ["collect", "skip"])
def test_poison_is_named_and_all_others_are_there(ships, alias, on, mode, on_error):
    """Rows that a receiver refuses, that are there already, that come twice, that are no rows at all."""
    ships.create(name="there")
    heard(alias)
    names = [f"ship {n}" for n in range(40)]
    for place, name in ((0, "poison first"), (7, "there"), (8, "poison"), (23, "ship 22"), (39, "poison last")):
        names[place] = name
    items = [{"name": name} for name in names]
    items[30] = {"title": "no field of it"}
    report = ships.parallel_create(items, chunk_size=10, mode=mode, on_error=on_error, keys=True, **on)
    assert sorted(each.index for each in report.errors) == [0, 7, 8, 23, 30, 39]
    by_place = {each.index: each for each in report.errors}
    assert {place: type(each.error) for place, each in by_place.items()} == {
        0: ValueError,
        7: IntegrityError,
        8: ValueError,
        23: IntegrityError,
        30: TypeError,
        39: ValueError,
    }
    assert all(by_place[place].value == items[place] for place in by_place)
    assert all(each.committed is False and each.traceback for each in report.errors)
    assert (report.rows, report.succeeded, report.failed) == (40, 34, 6)
    assert set(ships.values_list("name", flat=True)) == {name for name in names if "poison" not in name} - {
        "ship 30"
    } | {"there"}
    assert len(report.keys) == 34
    if mode == "save":
        # What was undone is heard no more: of each that is there once, of the others nothing.
        said = Counter(what for what, _, name, _ in heard(alias).elements() if name.startswith("ship"))
        assert said == {"pre_save": 34, "post_save": 34, "on_commit": 34}


def test_poison_at_any_place(default):
    """Of any chunk, in any number, found by Python or by the database: it is named, and nothing else is missing."""
    ships = Ship.objects.all()

    @settings(max_examples=40, deadline=None)
    @given(
        number=st.integers(1, 25),
        poison=st.dictionaries(st.integers(0, 24), st.sampled_from(["poison", "twice", "nobody"])),
        size=st.integers(1, 12),
        mode=st.sampled_from(MODES),
    )
    def hold(number, poison, size, mode):
        ships.all().delete()
        ships.create(name="there")
        items = [{"name": f"ship {place}"} for place in range(number)]
        guilty = {place: kind for place, kind in poison.items() if place < number}
        for place, kind in guilty.items():
            items[place] = {
                "poison": {"name": f"poison {place}"},
                "twice": {"name": "there"},
                "nobody": {"name": None},
            }[kind]
        report = ships.parallel_create(
            items, executor="inline", chunk_size=size, mode=mode, on_error="collect", keys=True
        )
        assert {failure.index for failure in report.errors} == set(guilty)
        assert all(failure.value is items[failure.index] for failure in report.errors)
        there = set(ships.values_list("name", flat=True))
        assert there == {"there"} | {f"ship {place}" for place in range(number) if place not in guilty}
        assert (report.succeeded, len(report.keys)) == (len(there) - 1, len(there) - 1)

    hold()


@on_each
def test_the_first_error_undoes_its_chunk_and_ends_the_call(ships, on):
    items = [{"name": "poison" if n == 55 else f"ship {n}"} for n in range(1000)]
    with pytest.raises(ValueError, match="poison is not to be saved") as caught:
        ships.parallel_create(iter(items), chunk_size=10, keys=True, **on)
    report = report_of(caught.value)
    names = set(ships.values_list("name", flat=True))
    assert report.succeeded == len(names) == len(report.keys) < 1000
    assert set(report.keys) == set(ships.values_list("pk", flat=True))
    assert not names & {f"ship {n}" for n in range(50, 60)}
    assert {f"ship {n}" for n in range(50)} <= names
    (failure,) = report.errors
    assert (failure.index, failure.value, failure.committed) == (55, items[55], False)
    assert any("item 55" in line for line in caught.value.__notes__)


@on_each
def test_an_iterable_that_raises(ships, on):
    """What came before is written, and said."""

    def items():
        yield from ({"name": f"ship {n}"} for n in range(25))
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more") as caught:
        ships.parallel_create(items(), chunk_size=10, **on)
    assert ships.count() == 25
    assert report_of(caught.value).succeeded == 25


def test_items_are_taken_as_they_are_needed(ships):
    taken, most = itertools.count(), []

    def items():
        for number in range(150):
            most.append(next(taken) - ships.count())
            yield {"name": f"ship {number}"}

    ships.parallel_create(items(), processes=1, chunk_size=10)
    assert max(most) <= 60, "of one worker with four chunks out, and one in the making"


def test_a_queryset_as_items_is_walked(ships, alias):
    """To loop over it would load all of it."""
    authors = Author.objects.using(alias)
    authors.bulk_create(Author(name=f"author {n}") for n in range(30))
    items = authors.order_by("name")
    ships.parallel_create(items, lambda author: Ship(name=author.name), executor="inline", chunk_size=7)
    assert ships.count() == 30
    assert items._result_cache is None


@in_each_mode
def test_full_clean(ships, mode):
    items = [{"name": f"ship {n}", "speed": n - 2, "class_of": "c", "papers": {"a": 1}, "log": "l"} for n in range(5)]
    report = ships.parallel_create(items, executor="inline", full_clean=True, on_error="collect", mode=mode)
    errors_of = {each.index: each.error for each in report.errors}
    assert sorted(errors_of) == [0, 1], errors_of
    assert {type(error) for error in errors_of.values()} == {ValidationError}


@pytest.mark.parametrize(
    ("item", "make", "error", "said"),
    [
        (1, lambda item: None, errors.BadItem, "returned None. make= must return an instance of testapp.Ship"),
        (1, lambda item: Author(), errors.BadItem, "returned an object of type Author"),
        (1, None, errors.BadItem, "an object of type int, neither an instance of testapp.Ship nor a dictionary"),
        (Author(name="a"), None, errors.BadItem, "type Author"),
        ({"nme": 1}, None, TypeError, "unexpected keyword arguments: 'nme'"),
        ({"name": "a", "port": Place(name="p")}, None, ValueError, "unsaved related object 'port'"),
        ({"name": None}, None, IntegrityError, "(?i)null"),
    ],
)
@in_each_mode
def test_items_that_cannot_be_written(ships, item, make, error, said, mode):
    with pytest.raises(error, match=said):
        ships.parallel_create([item], make, executor="inline", mode=mode)
    assert not ships.exists()


def test_an_instance_that_was_saved(ships):
    ship = ships.create(name="a")
    with pytest.raises(errors.BadItem, match=f"primary key {ship.pk}, which was saved before"):
        ships.parallel_create([ship], executor="inline")


def test_calls_that_are_refused(ships):
    for call, said in (
        (lambda: ships.parallel_create(5), "takes an iterable of items, not int"),
        (lambda: ships.parallel_create([], mode="fast"), 'mode must be "save" or "bulk"'),
        (lambda: ships.parallel_create([], full_clean=1), "full_clean"),
        (lambda: ships.parallel_create([], run_id=""), "1 to 200 characters"),
        (lambda: ships.parallel_update(len, fields=["nme"]), "has no field 'nme'"),
        (lambda: ships.parallel_update(len, fields=["id"]), "its primary key, generated, or no column"),
        (lambda: ships.parallel_update(len, fields=["double"]), "its primary key, generated, or no column"),
        (lambda: ships.parallel_update(len, fields="name"), r"\['name'\]"),
        (lambda: ships.parallel_update(5), "callable"),
        (lambda: ships.parallel_delete(mode="bulk"), "neither mode= nor full_clean="),
        (lambda: ships.parallel_update_or_create([], "name"), "list of the names"),
        (lambda: ships.parallel_update_or_create([], ["nme"]), "has no field 'nme'"),
    ):
        with pytest.raises(errors.InvalidOption, match=said):
            call()
    with pytest.raises(TypeError, match="unexpected keyword argument 'ordered'"):
        ships.parallel_create([], ordered=True)
    with pytest.raises(errors.UnsupportedQuerySet, match="its rows are values"):
        ships.values("name").parallel_update(len)
    with pytest.raises(TypeError, match="limit"):
        ships.order_by("pk")[:5].parallel_delete()
    with pytest.raises(TypeError, match="slice"):
        ships.order_by("pk")[:5].parallel_update(len)


# --- Update ---------------------------------------------------------------------------


def changed(row):
    """One third each: changes the row, tells what to change, changes nothing."""
    if row.pk % 3 == 0:
        row.speed += 10
        row.papers["n"] = row.speed
    if row.pk % 3 == 1:
        return {"class_of": "second"}
    return None


@in_each_mode
@on_each
@pytest.mark.parametrize("model", [Ship, CarFerry])
def test_updating_is_as_in_a_loop(alias, on, mode, model):
    rows = model.objects.using(alias)
    names = [f"ship {n}" for n in range(30)]
    rows.parallel_create([{"name": name, "class_of": "first"} for name in names], executor="inline")
    before = dict(rows.values_list("pk", "changed"))
    heard(alias)
    with transaction.atomic(using=alias):
        for row in rows.order_by("pk"):
            told = changed(row)
            if told:
                row.class_of = "second"
                row.save(update_fields=["class_of", "changed"], using=alias)
            elif row.pk % 3 == 0:
                row.save(update_fields=["speed", "papers", "changed"], using=alias)
        expected, after = heard(alias), contents(model, alias, *NEVER_ALIKE, "saves")
        transaction.set_rollback(True, using=alias)

    report = rows.parallel_update(changed, chunk_size=7, mode=mode, keys=True, **on)
    said = heard(alias)
    commits = Counter({each: number for each, number in said.items() if each[0] == "on_commit"})
    assert said - commits == expected
    assert contents(model, alias, *NEVER_ALIKE, "saves") == after
    touched = {pk for pk in before if pk % 3 != 2}
    assert sum(commits.values()) == len(touched)
    assert (report.rows, report.succeeded, report.skipped) == (30, 30, 30 - len(touched))
    assert set(report.keys) == touched
    assert {pk for pk, at in rows.values_list("pk", "changed") if at != before[pk]} == touched


def test_an_update_writes_what_changed_alone(ships, alias):
    ships.parallel_create([{"name": f"ship {n}"} for n in range(3)], executor="inline")

    def change(row):
        row.speed = 5
        row.class_of = "x"

    with CaptureQueriesContext(connections[alias]) as queries:
        ships.parallel_update(change, fields=["speed"], executor="inline")
    updates = [query["sql"] for query in queries if query["sql"].startswith("UPDATE")]
    assert len(updates) == 3
    assert all("class_of" not in sql and "changed" in sql and "speed" in sql for sql in updates)


@on_each
def test_rows_that_cannot_be_updated(ships, alias, on):
    ships.parallel_create([{"name": f"ship {n}"} for n in range(20)], executor="inline")
    keys = dict(ships.values_list("name", "pk"))
    heard(alias)

    def change(row):
        number = int(row.name.split()[1])
        if number == 3:
            raise LookupError("three")
        if number == 4:
            return {"name": "ship 5"}
        if number == 7:
            return {"nme": 5}
        if number == 8:
            row.pk = 10**6
        if number == 9:
            return 5
        row.speed = 100
        return None

    for mode in MODES:
        report = ships.parallel_update(change, chunk_size=8, on_error="collect", mode=mode, keys=True, **on)
        failed = {each.key: type(each.error) for each in report.errors}
        assert failed == {
            keys["ship 3"]: LookupError,
            keys["ship 4"]: IntegrityError,
            keys["ship 7"]: errors.InvalidOption,
            keys["ship 8"]: errors.BadItem,
            keys["ship 9"]: errors.BadItem,
        }
        assert ships.filter(speed=100).count() == 15
        assert report.skipped == (0 if mode == "save" else 15)
        assert ships.count() == 20
        with pytest.raises(LookupError) as caught:
            ships.parallel_update(change, chunk_size=8, mode=mode, executor="inline")
        assert any(f"primary key {keys['ship 3']}" in line for line in caught.value.__notes__)


@in_each_mode
def test_a_row_that_is_changed_again_begins_as_it_was(ships, mode):
    """Where its chunk was undone for the sake of another row: what the function did to it is undone too."""
    ships.parallel_create([{"name": f"ship {n}", "papers": {"n": [0]}} for n in range(12)], executor="inline")

    def change(row):
        row.speed += 1
        row.papers["n"][0] += 1
        if row.name in ("ship 5", "ship 9"):
            raise LookupError

    report = ships.parallel_update(change, executor="inline", on_error="skip", mode=mode)
    assert (report.succeeded, report.failed) == (10, 2)
    found = {(row.speed, row.papers["n"][0]) for row in ships.exclude(name__in=["ship 5", "ship 9"])}
    assert found == {(2, 1)}


def test_rows_deleted_under_way(ships, alias):
    """As a loop that saves one says it."""
    ships.parallel_create([{"name": f"ship {n}"} for n in range(10)], executor="inline")

    def change(row):
        if row.name == "ship 4":
            type(row).objects.using(row._state.db).filter(name="ship 6").delete()
        row.speed = 7

    for mode in MODES:
        ships.filter(name="ship 6").exists() or ships.create(name="ship 6")
        report = ships.order_by("pk").parallel_update(change, executor="inline", on_error="skip", mode=mode)
        ships.filter(speed=7).update(speed=1)
        if mode == "save" and report.errors:
            (failure,) = report.errors
            assert isinstance(failure.error, DatabaseError)
            assert "did not affect any rows" in str(failure.error)


@on_each
def test_locked_rows(ships, alias, on):
    """``select_for_update()`` holds within the transaction of each chunk."""
    ships.parallel_create([{"name": f"ship {n}"} for n in range(5)], executor="inline")
    report = ships.select_for_update().parallel_update(lambda row: {"speed": 9}, chunk_size=2, **on)
    assert report.succeeded == 5
    assert ships.filter(speed=9).count() == 5


# --- Delete ---------------------------------------------------------------------------


@on_each
def test_deleting_is_as_in_one(ships, alias, on):
    def fill():
        ships.parallel_create(range(20), functions.ship_with_tugs, executor="inline")
        heard(alias)

    fill()
    _, counts = ships.filter(speed__lt=100).delete()
    expected = heard(alias)
    fill()
    report = ships.filter(speed__lt=100).parallel_delete(chunk_size=6, keys=True, **on)
    assert heard(alias) == expected
    assert {name: number for name, number in report.counts.items() if number} == {n: c for n, c in counts.items() if c}
    assert (report.rows, report.succeeded, len(report.keys), report.chunks) == (20, 20, 20, 4)
    assert not ships.exists()


def test_rows_that_cannot_be_deleted(alias):
    """Stay, and are named; the others go."""
    authors = Author.objects.using(alias)
    authors.bulk_create(Author(name=f"author {n}") for n in range(10))
    kept = authors.order_by("pk")[4]

    def refuse(sender, instance, **kwargs):
        if instance.pk == kept.pk:
            raise LookupError

    models.signals.pre_delete.connect(refuse, sender=Author)
    try:
        report = authors.parallel_delete(threads=2, chunk_size=3, on_error="collect")
        with pytest.raises(LookupError) as caught:
            authors.parallel_delete(threads=2)
    finally:
        models.signals.pre_delete.disconnect(refuse, sender=Author)
    (failure,) = report.errors
    assert (failure.key, type(failure.error)) == (kept.pk, LookupError)
    assert list(authors) == [kept]
    assert report_of(caught.value).succeeded == 0


# --- Create or update -------------------------------------------------------------------


@on_each
def test_update_or_create(ships, alias, on):
    ships.parallel_create([{"name": f"ship {n}"} for n in range(5)], executor="inline")
    items = [{"name": f"ship {n}", "speed": n} for n in range(10)]
    report = ships.parallel_update_or_create(items, ["name"], chunk_size=4, **on)
    assert report.counts == {"created": 5, "updated": 5}
    assert dict(ships.values_list("name", "speed")) == {item["name"]: item["speed"] for item in items}
    report = ships.parallel_update_or_create(range(12), ["name"], functions.fast_ship, chunk_size=4, keys=True, **on)
    assert report.counts == {"created": 2, "updated": 10}
    assert set(ships.values_list("speed", flat=True)) == {50}
    assert sorted(report.keys) == sorted(ships.values_list("pk", flat=True))
    with pytest.raises(errors.BadItem, match="no value for 'name'"):
        ships.parallel_update_or_create([{"speed": 1}], ["name"], executor="inline")


def test_sqlite_has_one_writer(default):
    """Which the plan says, and the report."""
    ships = Ship.objects.all()
    report = ships.parallel_create([{"name": f"ship {n}"} for n in range(30)], processes=4, chunk_size=3)
    assert len(report.workers) == 1
    assert "one writer at a time" in str(ships.explain_plan())
    assert [line for line in report.advice() if "one writer at a time" in line]
    assert not ships.parallel_update(lambda row: {"speed": 2}, processes=1).advice()


# --- Where it is called ------------------------------------------------------------------


def test_related_managers(alias, ships):
    port = Place.objects.using(alias).create(name="port")
    crew = Crew.objects.using(alias).create(name="a")
    port.ships.parallel_create([{"name": "a"}, Ship(name="b")], processes=2, chunk_size=1)
    port.ships.parallel_create([3], lambda n: Ship(name=f"ship {n}"), executor="inline", mode="bulk")
    port.ships.parallel_update_or_create([{"name": "b", "speed": 8}], ["name"], executor="inline")
    assert dict(port.ships.values_list("name", "speed")) == {"a": 1, "b": 8, "ship 3": 1}
    with pytest.raises(errors.InvalidOption, match="many-to-many"):
        crew.ships.parallel_create([{"name": "c"}])
    assert port.ships.parallel_update(lambda row: {"speed": 2}, executor="inline").succeeded == 3
    assert port.ships.all().parallel_delete(executor="inline").succeeded == 3


def test_in_a_transaction(ships, alias):
    """Refused; inline it belongs to the transaction, and a chunk that fails is undone alone."""
    with transaction.atomic(using=alias):
        for call in (
            lambda: ships.parallel_create([{"name": "a"}]),
            lambda: ships.parallel_update(len),
            lambda: ships.parallel_delete(threads=2),
        ):
            with pytest.raises(errors.TransactionRefused, match='executor="inline"'):
                call()
        items = [{"name": name} for name in ("a", "b", "a", "c")]
        report = ships.parallel_create(items, executor="inline", on_error="skip", chunk_size=2)
        assert [each.index for each in report.errors] == [2]
        assert report.reason == "inline"
        assert ships.count() == 3
        transaction.set_rollback(True, using=alias)
    assert not ships.exists()


class TestInATestCase(TestCase):
    databases = {"default"}

    def test_it_runs_here(self):
        """On the connection of the test, and nothing of it stays."""
        with self.captureOnCommitCallbacks() as callbacks:
            report = Ship.objects.parallel_create([{"name": "a"}, {"name": "poison"}], processes=2, on_error="skip")
        assert report.reason == "testcase"
        assert len(callbacks) == 1, "of the row that was saved, and none of ours"
        assert Ship.objects.parallel_update(lambda row: {"speed": 4}, processes=2).succeeded == 1
        assert Ship.objects.get().speed == 4
        assert Ship.objects.all().parallel_delete(processes=2).succeeded == 1


def test_in_a_coroutine(ships):
    async def run():
        await ships.aparallel_create([{"name": "a"}, {"name": "b"}], processes=2)
        await ships.aparallel_update(lambda row: {"speed": 3}, processes=2)
        assert await ships.acount() == 2
        await ships.aparallel_update_or_create([{"name": "a", "speed": 5}], ["name"], processes=2)
        return await ships.aparallel_delete(processes=2)

    assert asyncio.run(run()).succeeded == 2


def test_a_receiver_that_catches_an_error_of_the_database(ships, alias):
    """Django and PostgreSQL would undo the chunk without a word."""
    ships.create(name="there")

    def careless(sender, instance, using, **kwargs):
        if instance.name == "ship 3":
            try:
                Crew.objects.using(using).create(name="x")
                Crew.objects.using(using).create(name="x")
            except IntegrityError:
                pass

    models.signals.post_save.connect(careless, sender=Ship)
    try:
        items = [{"name": f"ship {n}"} for n in range(6)]
        report = ships.parallel_create(items, executor="threads", on_error="collect")
    finally:
        models.signals.post_save.disconnect(careless, sender=Ship)
    if connections[alias].vendor == "postgresql" or report.errors:
        (failure,) = report.errors
        assert failure.index == 3
        assert "has spoiled the transaction" in str(failure.error)
    assert ships.count() == 7 - len(report.errors)


def test_what_raises_behind_the_commit(ships, alias):
    def raise_later(sender, instance, using, **kwargs):
        if instance.name == "ship 3":
            transaction.on_commit(lambda: 1 / 0, using=using)

    models.signals.post_save.connect(raise_later, sender=Ship)
    items = [{"name": f"ship {n}"} for n in range(6)]
    try:
        with pytest.raises(ZeroDivisionError) as caught:
            ships.parallel_create(items, threads=1)
        assert ships.count() == 6
        assert (report_of(caught.value).succeeded, report_of(caught.value).failed) == (6, 0)
        assert report_of(caught.value).errors[0].committed is True
        ships.all().delete()
        report = ships.parallel_create(items, threads=1, on_error="collect")
        assert (report.succeeded, len(report.errors), report.failed) == (6, 1, 0)
        with pytest.raises(errors.ParallelORMError, match="is in the database"):
            report.retry()
    finally:
        models.signals.post_save.disconnect(raise_later, sender=Ship)


def test_retry_does_what_failed(ships):
    items = [{"name": name} for name in ("a", "poison", "b")]
    report = ships.parallel_create(items, executor="inline", on_error="collect")
    report.errors[0].value["name"] = "healed"
    again = report.retry()
    assert (again.rows, again.succeeded) == (1, 1)
    assert ships.filter(name="healed").exists()


def test_rows_that_collide_are_written_all_the_same(ships, alias):
    """Two transactions that take two rows in opposite orders: the database gives one of them up."""
    if connections[alias].vendor == "sqlite":
        pytest.skip("has one writer")
    ships.parallel_create([{"name": "a"}, {"name": "b"}], executor="inline")
    both, turn = threading.Barrier(2), itertools.count()
    first = {}

    def collide(item):
        order = ["a", "b"] if item == 0 else ["b", "a"]
        rows = Ship.objects.using(alias)
        rows.filter(name=order[0]).update(speed=models.F("speed") + 1)
        if first.setdefault(item, next(turn)) is not None and item not in seen:
            seen.add(item)
            both.wait(WAIT)
        rows.filter(name=order[1]).update(speed=models.F("speed") + 1)
        return Ship(name=f"ship {item}")

    seen = set()
    report = ships.parallel_create([0, 1], collide, threads=2, chunk_size=1)
    assert report.succeeded == 2
    assert report.retries >= 1
    assert set(ships.filter(name__in="ab").values_list("speed", flat=True)) == {3}
