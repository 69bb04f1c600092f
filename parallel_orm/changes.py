"""What a worker does with a chunk of writes: create, update or delete its rows, all in one transaction."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import date, time, timedelta
from decimal import Decimal
from functools import cache
from typing import Any, Literal
from uuid import UUID

from django.core.exceptions import FieldDoesNotExist
from django.db.models import Field, FileField, Model, QuerySet
from django.db.models.expressions import DatabaseDefault

from parallel_orm import bulk, errors
from parallel_orm.chunks import Chunk, describe_key
from parallel_orm.items import Items, Refused
from parallel_orm.options import OnError
from parallel_orm.outcomes import Failed, Stopwatch, note
from parallel_orm.transactions import (
    CommittedAll,
    Guilty,
    Settled,
    Transaction,
    Unknown,
    Written,
    is_collision,
    is_lost,
    refuse_spoiled,
)
from parallel_orm.work import Done, Stop, fetch

Rows = QuerySet[Any, Any]
Mode = Literal["save", "bulk"]


class DoneBefore(Settled):
    """An earlier run has done the chunk."""


@dataclass(frozen=True, slots=True)
class Change:
    """Writes that are done chunk by chunk, each in one transaction."""

    #: What is done with each; the user's own.
    function: Callable[[Any], Any] | None = None
    mode: Mode = "save"
    on_error: OnError = "raise"
    retries: int = 0
    #: Whether the primary keys of what was written are to come back.
    keys: bool = False
    #: Whether each row is validated before it is saved.
    full_clean: bool = False

    #: Whether what was done stays done, whatever becomes of the outcome.
    commits = True

    @property
    def functions(self) -> list[Any]:
        return [] if self.function is None else [self.function]

    @abstractmethod
    def draft(self, rows: Rows, clock: Stopwatch, chunk: Chunk, stop: Stop | None) -> Draft:
        """Return what is to be written for a chunk."""

    def part(self, rows: Rows, clock: Stopwatch, chunk: Chunk, key_of: object = None, stop: Stop | None = None) -> Done:
        """Write the chunk; raise if nothing of it is in the database, or nobody knows."""
        draft, record = self.draft(rows, clock, chunk, stop), chunk.record

        def begin() -> None:
            if record is not None and not record.claim(chunk.alias):
                raise DoneBefore

        def end(failed: dict[int, Exception]) -> None:
            if record is not None:
                record.settle(chunk.alias, draft.told(failed), draft.number)

        transaction = Transaction(chunk.alias, self.on_error != "raise", self.retries, begin, end)
        behind: BaseException | None = None
        try:
            with clock("function"):
                written = transaction.write(draft)
        except DoneBefore:
            assert record is not None
            number, failed = record.done(chunk.alias, rows.model, chunk.items)
            # Sent again: it was this run that did it, with a worker that was lost then.
            return Done([], number, failed=failed) if chunk.attempt else Done([], 0, done_before=number - len(failed))
        except CommittedAll as settled:
            written, behind = settled.written, settled.error
            note(behind, "what its chunk wrote is in the database: this was raised behind the commit")
        except Unknown as settled:
            clock.committed = None
            note(settled.error, "whether its chunk is in the database is not known: this came at the commit")
            clock("database")
            raise settled.error from settled.error.__cause__
        except Guilty as guilty:
            clock.place, clock.key = guilty.place, draft.key_at(guilty.place)
            note(guilty.error, f"at {draft.place_of(guilty.place)}; nothing of its chunk is in the database")
            draft.undone()
            if is_lost(guilty.error) or is_collision(guilty.error):
                clock("database")  # not of the row
            raise guilty.error from guilty.error.__cause__
        except BaseException as error:
            draft.undone()
            if is_lost(error) or is_collision(error):
                clock("database")
            raise
        return draft.done(written, behind)


class Draft:
    """The rows of a chunk that are to be written, as they stand."""

    def __init__(self, change: Change, rows: Rows, clock: Stopwatch, chunk: Chunk, stop: Stop | None) -> None:
        self.change, self.rows, self.clock, self.chunk, self.stop = change, rows, clock, chunk, stop
        self.alias = chunk.alias
        #: How many they are.
        self.number = 0
        #: Places of rows that had not to be written.
        self.skipped: set[int] = set()
        #: What was counted, by place.
        self.counted: dict[int, Mapping[str, int]] = {}

    @abstractmethod
    def load(self) -> int: ...

    @abstractmethod
    def write_one(self, place: int) -> None:
        """Write one row."""

    @abstractmethod
    def key_at(self, place: int) -> Any:
        """Return the primary key of a row, None where it has none yet."""

    def renew(self, places: Sequence[int]) -> None:
        for place in places:
            self.skipped.discard(place)
            self.counted.pop(place, None)

    def undone(self) -> None:
        """Have the caller's own objects, where these are no copies, say that nothing of the chunk is written."""

    def write(self, places: Sequence[int]) -> None:
        for place in places:
            if self.stop is not None and self.stop.is_set:
                raise errors.cancelled("as its call was interrupted")
            try:
                self.write_one(place)
                refuse_spoiled(self.alias)
            except Exception as error:
                raise Guilty(place, error) from error

    def place_of(self, place: int) -> str:
        return f"primary key {describe_key(self.key_at(place))}"

    def told(self, failed: dict[int, Exception]) -> list[Any]:
        """Return which of the rows failed, as it is written down."""
        return [self.key_at(place) for place in failed]

    def ships_keys(self) -> bool:
        return self.change.keys

    def done(self, written: Written, behind: BaseException | None) -> Done:
        failed = []
        for place, error in written.failed.items():
            note(error, f"at {self.place_of(place)}")
            failed.append(Failed(place, self.key_at(place), error))
        keys = [
            self.key_at(place)
            for place in (range(self.number) if self.ships_keys() else ())
            if place not in written.failed and place not in self.skipped
        ]
        counts: Counter[str] = Counter()
        for counted in self.counted.values():
            counts.update(counted)
        skipped = len(self.skipped)
        return Done(keys, self.number, skipped, None, tuple(failed), written.retries, counts=dict(counts), error=behind)


# --- Create ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Create(Change):
    """Items become rows: instances are saved, dictionaries become instances, and ``function`` makes one of any item."""

    #: Values that each instance is given: those that a related manager stands for.
    given: Mapping[str, Any] = field(default_factory=dict)

    def draft(self, rows: Rows, clock: Stopwatch, chunk: Chunk, stop: Stop | None) -> Draft:
        return CreateDraft(self, rows, clock, chunk, stop)


class CreateDraft(Draft):
    change: Create

    def load(self) -> int:
        assert self.chunk.items is not None
        items = self.chunk.items
        if self.number:
            self.renew(range(self.number))
        self.items: Items = items
        self.number = len(items)
        self.made: list[Any] = [None] * self.number
        self.before = {place: Before(item) for place, item in enumerate(items.values) if isinstance(item, Model)}
        return self.number

    def renew(self, places: Sequence[int]) -> None:
        super().renew(places)
        for place in places:
            self.made[place] = None
            if place in self.before:
                self.before[place].restore()

    def undone(self) -> None:
        self.renew(range(self.number))

    def write(self, places: Sequence[int]) -> None:
        if self.change.mode == "save":
            super().write(places)
            return
        related: dict[int, dict[str, Any]] = {}
        unsaved: dict[int, Model] = {}
        for place in places:
            try:
                instance, related[place] = self._made(place)
                if instance._state.adding:
                    unsaved[place] = instance
            except Exception as error:
                raise Guilty(place, error) from error
        bulk.create(unsaved, self.alias, full_clean=self.change.full_clean)
        for place, values in related.items():
            try:
                relate(self.made[place], values)
            except Exception as error:
                raise Guilty(place, error) from error

    def write_one(self, place: int) -> None:
        instance, related = self._made(place)
        if instance._state.adding:
            if self.change.full_clean:
                bulk.clean(instance, self.alias)
            instance.save(force_insert=True, using=self.alias)
        relate(instance, related)

    def _made(self, place: int) -> tuple[Model, dict[str, Any]]:
        """Return the instance of an item, and what many-to-many relations it is to have."""
        model: Any = self.rows.model
        item, make = self.items.values[place], self.change.function
        related: dict[str, Any] = {}
        if isinstance(item, Refused):
            raise item.error
        if make is not None:
            instance = make(item)
            if not isinstance(instance, model):
                raise errors.made_something_else(make, instance, model)
        elif isinstance(item, model):
            instance = item
            if not instance._state.adding:
                raise errors.already_saved(instance)
        elif isinstance(item, Mapping):
            names = many_to_many(model)
            related = {name: value for name, value in item.items() if name in names}
            instance = model(**{name: value for name, value in item.items() if name not in related})
        else:
            raise errors.not_an_item(item, model)
        for name, value in self.change.given.items():
            setattr(instance, name, value)
        self.made[place] = instance
        return instance, related

    def key_at(self, place: int) -> Any:
        made = self.made[place]
        return None if made is None or made._state.adding else made.pk

    def place_of(self, place: int) -> str:
        return f"item {self.items.places[place]}"

    def told(self, failed: dict[int, Exception]) -> list[Any]:
        return [self.items.places[place] for place in failed]

    def ships_keys(self) -> bool:
        return self.change.keys or bool(self.before)


class Before:
    """An instance as it was before it was saved."""

    def __init__(self, instance: Model) -> None:
        self._instance = instance
        self._values, self._state = dict(instance.__dict__), (instance._state.adding, instance._state.db)

    def restore(self) -> None:
        instance = self._instance
        instance.__dict__.clear()
        instance.__dict__.update(self._values)
        instance._state.adding, instance._state.db = self._state


@cache
def many_to_many(model: Any) -> frozenset[str]:
    """Return the names of a model's many-to-many relations."""
    meta = model._meta
    named = {relation.get_accessor_name() for relation in meta.related_objects if relation.many_to_many}
    return frozenset([*(relation.name for relation in meta.many_to_many), *filter(None, named)])


def relate(instance: Model, related: Mapping[str, Any]) -> None:
    for name, value in related.items():
        getattr(instance, name).set(value)


# --- Create or update -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class UpdateOrCreate(Create):
    """Items become rows, or change those that have the same values in some fields."""

    unique_fields: tuple[str, ...] = ()

    def draft(self, rows: Rows, clock: Stopwatch, chunk: Chunk, stop: Stop | None) -> Draft:
        return UpdateOrCreateDraft(self, rows, clock, chunk, stop)


class UpdateOrCreateDraft(CreateDraft):
    change: UpdateOrCreate

    def write(self, places: Sequence[int]) -> None:
        Draft.write(self, places)

    def write_one(self, place: int) -> None:
        model: Any = self.rows.model
        item, unique, given = self.items.values[place], self.change.unique_fields, self.change.given
        if self.change.function is None and isinstance(item, Mapping):
            related = {name: item[name] for name in many_to_many(model) if name in item}
            values = {name: value for name, value in item.items() if name not in related}
        else:
            instance, related = self._made(place)
            if not instance._state.adding:
                return
            values = values_of(instance, unique)
            unique = tuple(attname_of(type(instance), name) for name in unique)
        # As Django's related managers do it: what they stand for is looked for too, and nobody else's rows are found.
        known = {*given, *(attname_of(model, name) for name in given)}
        if missing := [name for name in unique if name not in values and name not in known]:
            raise errors.lacks_unique_fields(missing)
        values = {name: value for name, value in values.items() if name not in known}
        found = {name: values.pop(name) for name in unique if name not in known}
        instance, created = self.rows.all().update_or_create(**found, **given, defaults=values)
        relate(instance, related)
        self.made[place] = instance
        self.counted[place] = {"created": int(created), "updated": int(not created)}

    def ships_keys(self) -> bool:
        return self.change.keys


def values_of(instance: Model, unique: Sequence[str]) -> dict[str, Any]:
    """Return what an instance that is not saved has in its columns, but for a primary key that nobody asked for."""
    wanted = {attname_of(type(instance), name) for name in unique}
    return {
        column.attname: getattr(instance, column.attname)
        for column in instance._meta.concrete_fields
        if column.attname in instance.__dict__
        and not column.generated
        and not isinstance(instance.__dict__[column.attname], DatabaseDefault)
        and not (getattr(column, "auto_now", False) or getattr(column, "auto_now_add", False))
        and (column.attname in wanted or not (column.primary_key or getattr(column.remote_field, "parent_link", False)))
    }


def attname_of(model: type[Model], name: str) -> str:
    """Return what an instance calls the column of a field."""
    column: Any = model._meta.pk if name == "pk" else model._meta.get_field(name)
    return str(column.attname)


# --- Update ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Update(Change):
    """A function changes rows, or says what is to be changed; what did change is saved."""

    #: What may be saved; None: whatever changed.
    fields: tuple[str, ...] | None = None

    def draft(self, rows: Rows, clock: Stopwatch, chunk: Chunk, stop: Stop | None) -> Draft:
        return UpdateDraft(self, rows, clock, chunk, stop)


class UpdateDraft(Draft):
    change: Update

    def load(self) -> int:
        self.fetched, self.number = fetch(self.rows.all(), Stopwatch())
        self.before = [Snapshot(row) for row in self.fetched]
        self.skipped, self.counted = set(), {}
        return self.number

    def renew(self, places: Sequence[int]) -> None:
        super().renew(places)
        for place in places:
            self.before[place].restore()

    def write(self, places: Sequence[int]) -> None:
        if self.change.mode == "save":
            super().write(places)
            return
        changed: dict[int, tuple[Model, list[str]]] = {}
        related: dict[int, dict[str, Any]] = {}
        for place in places:
            try:
                names, related[place] = self._changed(place)
                if names:
                    row = self.fetched[place]
                    if self.change.full_clean:
                        bulk.clean(row, self.alias)
                    changed[place] = row, names
            except Exception as error:
                raise Guilty(place, error) from error
        bulk.update(changed, self.alias)
        for place, values in related.items():
            try:
                relate(self.fetched[place], values)
            except Exception as error:
                raise Guilty(place, error) from error

    def write_one(self, place: int) -> None:
        names, related = self._changed(place)
        row = self.fetched[place]
        if names:
            if self.change.full_clean:
                bulk.clean(row, self.alias)
            row.save(update_fields=names, using=self.alias)
        relate(row, related)

    def _changed(self, place: int) -> tuple[list[str], dict[str, Any]]:
        """Have the function change a row; return which fields are to be saved, and which many-to-many relations."""
        row: Any = self.fetched[place]
        function = self.change.function
        assert function is not None
        result = function(row)
        related: dict[str, Any] = {}
        if isinstance(result, Mapping):
            names = many_to_many(row.__class__)
            related = {name: value for name, value in result.items() if name in names}
            for name, value in result.items():
                if name not in related:
                    if name not in settable(row.__class__):
                        raise errors.no_such_field(name, row.__class__)
                    setattr(row, name, value)
        elif result is not None and result is not row:
            raise errors.changed_nothing(function, result)
        before = self.before[place]
        if row.pk != before.key:
            raise errors.key_changed(before.key, row.pk)
        if row._state.fields_cache:
            # As save() does it: what was saved after it was set has its key now, and what was not is refused.
            fields = saved_of(row.__class__, self.change.fields)
            row._prepare_related_fields_for_save(operation_name="save", fields=fields)
        changed = before.changed(self.change.fields)
        if not changed and not related:
            self.skipped.add(place)
        return changed, related

    def key_at(self, place: int) -> Any:
        return self.before[place].key


#: Values that cannot be changed but by others.
PLAIN = (str, int, float, bool, bytes, type(None), Decimal, date, time, timedelta, UUID)


class Snapshot:
    """A row as it was read."""

    def __init__(self, row: Model) -> None:
        self._row, self._values, self.key = row, copied(row.__dict__), row.pk
        self._related = dict(row._state.fields_cache)

    def restore(self) -> None:
        self._row.__dict__.clear()
        self._row.__dict__.update(copied(self._values))
        self._row._state.fields_cache = dict(self._related)

    def changed(self, allowed: Sequence[str] | None) -> list[str]:
        """Return the names of the fields to be saved: those that have other values, with those that each save sets."""
        row, columns = self._row, saved_of(type(self._row), allowed)
        names = [column.name for column in columns if self._differs(column, row)]
        names = self._but_read_later(names)
        if names:
            names += [column.name for column in set_by_each_save(type(row)) if column.name not in names]
        return names

    def _but_read_later(self, names: list[str]) -> list[str]:
        """Leave out deferred fields that were read, and have the value that they have in the database."""
        model: Any = type(self._row)
        later = [column for column in columns_of(model) if column.name in names and column.attname not in self._values]
        if not later:
            return names
        attnames = [column.attname for column in later]
        there = model._base_manager.using(self._row._state.db).filter(pk=self.key).values_list(*attnames).first()
        values = [self._row.__dict__[attname] for attname in attnames]
        same = {column.name for column, a, b in zip(later, values, there or (), strict=False) if a == b}
        return [name for name in names if name not in same]

    def _differs(self, column: Any, row: Model) -> bool:
        there = row.__dict__
        if column.attname not in there:
            return False  # not read
        value = there[column.attname]
        if column.attname not in self._values:
            return True
        if isinstance(column, FileField) and not getattr(value, "_committed", True):
            return True
        before = self._values[column.attname]
        if value is before:
            return False
        try:
            return bool(value != before)
        except Exception:
            return True  # what cannot be compared is saved


def copied(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy that nobody changes by changing a value of these; Django's own notes are left as they are."""
    return {
        name: value if isinstance(value, PLAIN) or name.startswith("_") else _copy(value)
        for name, value in values.items()
    }


def _copy(value: Any) -> Any:
    try:
        return deepcopy(value)
    except Exception:
        return value


@cache
def columns_of(model: Any) -> list[Any]:
    """Return the fields that a save may be told to write."""
    return [column for column in model._meta.concrete_fields if not column.primary_key and not column.generated]


def saved_of(model: Any, allowed: Sequence[str] | None) -> list[Any]:
    """Return those of the fields that may be saved."""
    columns = columns_of(model)
    if allowed is None:
        return columns
    return [column for column in columns if column.name in allowed or column.attname in allowed]


@cache
def settable(model: Any) -> frozenset[str]:
    columns = columns_of(model)
    return frozenset([*(column.name for column in columns), *(column.attname for column in columns)])


@cache
def set_by_each_save(model: Any) -> list[Any]:
    """Return the fields that a save changes by itself, such as ``auto_now``."""
    return [column for column in columns_of(model) if getattr(column, "auto_now", False) or has_own_pre_save(column)]


def has_own_pre_save(column: Any) -> bool:
    """Tell whether somebody has written what a field does before a save, other than Django."""
    method = type(column).pre_save
    return method is not Field.pre_save and not method.__module__.startswith("django.db.models")


def refuse_unknown_fields(model: type[Model], names: Sequence[str]) -> None:
    """Refuse names that a save cannot be told to write."""
    for name in names:
        if name not in settable(model):
            try:
                model._meta.get_field(name)
            except FieldDoesNotExist:
                raise errors.no_such_field(name, model) from None
            raise errors.not_a_column(name, model)


# --- Delete ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Delete(Change):
    """Rows are deleted, with what Django deletes with them."""

    def draft(self, rows: Rows, clock: Stopwatch, chunk: Chunk, stop: Stop | None) -> Draft:
        return DeleteDraft(self, rows, clock, chunk, stop)


class DeleteDraft(Draft):
    def load(self) -> int:
        self.found = list(dict.fromkeys(self.rows.values_list("pk", flat=True)))  # a join may repeat them
        self.skipped, self.counted = set(), {}
        self.number = len(self.found)
        return self.number

    def write(self, places: Sequence[int]) -> None:
        if not places:
            return
        rows = self.rows.filter(pk__in=[self.found[place] for place in places]).order_by()
        deleted = rows.delete()
        if isinstance(deleted, tuple):  # else it is a delete() of somebody's own
            self.counted[places[0]] = deleted[1]

    def write_one(self, place: int) -> None:
        self.write([place])

    def key_at(self, place: int) -> Any:
        return self.found[place]
