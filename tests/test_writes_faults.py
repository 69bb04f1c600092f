"""Faults of parallel writes that were found by looking for them, each with what brings it about."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
from django.db import DatabaseError, IntegrityError, OperationalError, connections, models, transaction

from parallel_orm import errors, report_of
from parallel_orm.executors.processes import end_pools
from tests.testapp.models import Place
from tests.testapp.written import Engine, Motorboat, Ship, Tug

HERE = [{"executor": "inline"}, {"threads": 1}]
on_each = pytest.mark.parametrize("on", HERE, ids=["inline", "threads"])


@pytest.fixture(scope="module", autouse=True)
def _pools_end():
    yield
    end_pools()


@contextmanager
def receiving(receiver):
    """Within: every ship that was saved is told to a receiver."""
    models.signals.post_save.connect(receiver, sender=Ship)
    try:
        yield
    finally:
        models.signals.post_save.disconnect(receiver, sender=Ship)


def named(*names):
    return [{"name": name} for name in names]


# --- At the commit ----------------------------------------------------------------------


def test_a_commit_that_never_succeeds_ends_the_call(default, monkeypatch):
    """It was tried for ever: what the commit found, no check before it had found."""
    connection, commits = connections[default], []

    def commit():
        commits.append(1)
        assert len(commits) < 10
        connection.rollback()
        raise DatabaseError("the disk is full")

    monkeypatch.setattr(connection, "commit", commit)
    with pytest.raises(DatabaseError, match="disk is full") as caught:
        Ship.objects.parallel_create(named("a", "b"), executor="inline", on_error="collect")
    monkeypatch.undo()
    assert report_of(caught.value).succeeded == Ship.objects.count() == 0


def test_nothing_is_begun_behind_the_first_error(default):
    with pytest.raises(ValueError, match="poison"):
        Ship.objects.parallel_create(named("a", "poison", "b", "c"), executor="inline", chunk_size=1)
    assert [ship.name for ship in Ship.objects.all()] == ["a"]


def test_a_connection_that_is_lost_at_a_commit_is_of_its_chunk(default, monkeypatch):
    """As one that is lost before: where failures are collected the others go on."""
    connection, commits = connections[default], []
    commit = connection.commit

    def lost():
        commits.append(1)
        if len(commits) == 1:
            connection.rollback()
            raise OperationalError("server closed the connection unexpectedly")
        commit()

    monkeypatch.setattr(connection, "commit", lost)
    report = Ship.objects.parallel_create(named("a", "b", "c"), executor="inline", on_error="collect", chunk_size=2)
    assert [each.index for each in report.unknown] == [0, 1]
    assert (report.succeeded, report.failed) == (1, 2)


def behind_the_commit(error):
    """Return a receiver that has the commit of "last" followed by an error."""

    def receive(sender, instance, using, **kwargs):
        def fail():
            raise error

        if instance.name == "last":
            transaction.on_commit(fail, using=using)

    return receive


@on_each
def test_an_error_behind_the_commit_hides_no_failure(default, on):
    """Rows that had failed counted as written, and of those that were there no key was told."""
    with receiving(behind_the_commit(LookupError())):
        report = Ship.objects.parallel_create(named("a", "poison", "last"), on_error="collect", keys=True, **on)
    assert (report.rows, report.succeeded, report.failed) == (3, 2, 1)
    assert [(each.index, each.committed) for each in report.errors] == [(None, True), (1, False)]
    assert sorted(report.keys) == sorted(Ship.objects.values_list("pk", flat=True))


@on_each
def test_an_interrupt_behind_the_commit_is_told_as_such(default, on):
    with receiving(behind_the_commit(KeyboardInterrupt())), pytest.raises(KeyboardInterrupt) as caught:
        Ship.objects.parallel_create(named("a", "last", "b"), on_error="collect", chunk_size=2, **on)
    report = report_of(caught.value)
    assert {"a", "last"} <= set(Ship.objects.values_list("name", flat=True))
    assert report.succeeded == Ship.objects.count()


@pytest.mark.parametrize("on_error", ["raise", "collect"])
def test_a_transaction_that_ended_in_the_middle_is_no_success(mariadb, on_error):
    """As MySQL ends it at a deadlock whose error a receiver catches: rows before that were lost, and counted."""

    def careless(sender, instance, using, **kwargs):
        if instance.name == "c":
            with connections[using].cursor() as cursor:
                cursor.execute("ROLLBACK")

    ships = Ship.objects.using(mariadb)
    with receiving(careless), pytest.raises(errors.TransactionRefused) as caught:
        ships.parallel_create(named(*"abcdef"), threads=1, on_error=on_error)
    assert report_of(caught.value).succeeded == ships.count() == 0


# --- Create or update -------------------------------------------------------------------


@pytest.mark.parametrize("item", [{"name": "b", "speed": 5}, Ship(name="b", speed=5)], ids=["dict", "instance"])
def test_a_related_manager_takes_no_row_from_another(default, item):
    """As Django's: the other one's is not found, so that here a second one is refused."""
    mine, theirs = (Place.objects.create(name=name) for name in ("mine", "theirs"))
    theirs.ships.create(name="b")
    with pytest.raises(IntegrityError):
        mine.ships.update_or_create(name="b", defaults={"speed": 5})
    with pytest.raises(IntegrityError):
        mine.ships.parallel_update_or_create([item], ["name"], processes=1)
    assert theirs.ships.get().speed == 1
    report = mine.ships.parallel_update_or_create(named("c"), ["name", "port"], executor="inline")
    assert report.counts == {"created": 1, "updated": 0}
    report = mine.ships.parallel_update_or_create([Ship(name="c", speed=3)], ["name", "port"], executor="inline")
    assert report.counts == {"created": 0, "updated": 1}
    assert mine.ships.get().speed == 3


def test_rows_are_looked_for_where_the_queryset_is(default):
    """Not where the default manager is."""
    Ship.objects.create(name="b", speed=9)
    with pytest.raises(IntegrityError):
        Ship.objects.filter(speed=1).parallel_update_or_create(named("b"), ["name"], threads=1)


# --- Update ---------------------------------------------------------------------------


def test_a_related_object_that_is_saved_after_it_was_set(default):
    """Its key is not in the row before that is saved, so it seemed that nothing had changed."""
    ship = Ship.objects.create(name="a")

    def change(row):
        row.port = Place(name="new")
        row.port.save()

    report = Ship.objects.parallel_update(change, executor="inline")
    ship.refresh_from_db()
    assert (ship.port.name, report.skipped) == ("new", 0)


def test_an_unsaved_related_object_is_refused(default):
    Ship.objects.create(name="a")

    def change(row):
        row.port = Place(name="new")

    for mode in ("save", "bulk"):
        with pytest.raises(ValueError, match="unsaved related object 'port'"):
            Ship.objects.parallel_update(change, executor="inline", mode=mode)
    assert Ship.objects.parallel_update(change, ["speed"], executor="inline").skipped == 1


@pytest.mark.parametrize("mode", ["save", "bulk"])
def test_the_row_of_a_second_parent(alias, mode):
    """It has another key there, so that bulk SQL changed somebody else's, or nothing."""
    boats, engines = Motorboat.objects.using(alias), Engine.objects.using(alias)
    engines.bulk_create(Engine(fuel="none") for _ in range(2))
    boats.parallel_create([{"length": n, "fuel": "coal"} for n in range(4)], executor="inline", mode=mode)
    assert boats.parallel_update(lambda row: {"fuel": f"oil {row.length}"}, executor="inline", mode=mode).skipped == 0
    assert {boat.length: boat.fuel for boat in boats} == {n: f"oil {n}" for n in range(4)}
    assert engines.filter(fuel="none").count() == 2
    report = boats.parallel_update_or_create([Motorboat(length=1, fuel="gas")], ["length"], executor="inline")
    assert (report.counts["updated"], boats.get(length=1).fuel) == (1, "gas")


@pytest.mark.parametrize("mode", ["save", "bulk"])
def test_rows_that_a_join_repeats_are_updated(default, mode):
    """In bulk they seemed to be gone."""
    ship = Ship.objects.create(name="a")
    for _ in range(2):
        Tug.objects.create(ship=ship)
    rows = Ship.objects.filter(tugs__name="")
    assert rows.parallel_update(lambda row: {"speed": row.speed + 1}, executor="inline", mode=mode).succeeded == 2
    assert Ship.objects.get().speed == 2


def test_a_deferred_field_that_was_only_read_is_not_saved(default):
    Ship.objects.create(name="a", papers={"n": 1})
    rows = Ship.objects.only("name")
    assert rows.parallel_update(lambda row: row.papers.get("n") and None, executor="inline").skipped == 1
    report = rows.parallel_update(lambda row: row.papers.update(n=row.speed + 1), executor="inline")
    assert (report.skipped, Ship.objects.get().papers) == (0, {"n": 2})


# --- Instances ------------------------------------------------------------------------


@on_each
def test_instances_of_a_chunk_that_was_undone_are_not_saved(default, on):
    """They said that they were, with keys that no row has, so that they could not be given again."""
    ships = [Ship(name=name) for name in ("a", "poison", "b")]
    with pytest.raises(ValueError, match="poison"):
        Ship.objects.parallel_create(ships, **on)
    assert [(ship.pk, ship._state.adding) for ship in ships] == [(None, True)] * 3
    ships[1].name = "healed"
    assert Ship.objects.parallel_create(ships, **on).succeeded == 3


class Unpackable:
    def __reduce__(self):
        raise TypeError("it has a lock")


def broken():
    raise RuntimeError("it was packed elsewhere")


class Unopenable:
    def __reduce__(self):
        return broken, ()


def ship_of(item):
    return Ship(name=str(item))


def test_an_item_that_cannot_travel_fails_alone(default):
    """All of its chunk failed with it."""
    items = ["a", Unpackable(), "b"]
    report = Ship.objects.parallel_create(items, ship_of, processes=1, on_error="collect")
    (failure,) = report.errors
    assert (failure.index, failure.value, failure.committed) == (1, items[1], False)
    with pytest.raises(errors.NotPicklable, match="Item 1, Unpackable, .*it has a lock"):
        raise failure.error
    assert set(Ship.objects.values_list("name", flat=True)) == {"a", "b"}


def test_an_item_that_cannot_be_opened_fails_with_its_chunk(default):
    """It was said that nobody knows whether the chunk is in the database."""
    items = ["a", Unopenable(), "b"]
    report = Ship.objects.parallel_create(items, ship_of, processes=1, on_error="collect", chunk_size=2)
    assert [(each.index, type(each.error), each.committed) for each in report.errors] == [
        (0, RuntimeError, False),
        (1, RuntimeError, False),
    ]
    assert [ship.name for ship in Ship.objects.all()] == ["b"]


# --- Retry ----------------------------------------------------------------------------


def test_a_retry_leaves_out_what_is_committed(default):
    with receiving(behind_the_commit(LookupError())):
        report = Ship.objects.parallel_create(named("poison", "last"), executor="inline", on_error="collect")
    report.errors[1].value["name"] = "healed"
    assert report.retry().succeeded == 1
    assert Ship.objects.count() == 2


def test_a_retry_of_a_chunk_whose_items_nobody_has_is_refused(default, monkeypatch):
    """``make`` was called with None."""
    connection = connections[default]

    def commit():
        connection.rollback()
        raise IntegrityError

    monkeypatch.setattr(connection, "commit", commit)
    with pytest.raises(IntegrityError) as caught:
        Ship.objects.parallel_create(["a"], ship_of, executor="inline")
    monkeypatch.undo()
    with pytest.raises(errors.ParallelORMError, match="give its items again"):
        report_of(caught.value).retry()


# --- Delete ---------------------------------------------------------------------------


def test_rows_that_a_join_repeats_are_deleted_once(default):
    ship = Ship.objects.create(name="a")
    for _ in range(2):
        Tug.objects.create(ship=ship)
    report = Ship.objects.filter(tugs__name="").parallel_delete(executor="inline", keys=True)
    assert (report.rows, report.keys) == (1, [ship.pk])
