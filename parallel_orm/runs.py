"""Runs that may be begun again: each chunk exactly once, whatever ended the run before.

A chunk is written down when it is cut, with its bounds, before anybody works on it. In the transaction that writes its
rows its record is marked: so it is in the database with its rows, or not, and whoever else works on it waits for the
lock of the record, and then finds the mark. A second run with the same name takes the chunks as they are written down,
leaves out those that are marked, and goes on behind them.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

from django.apps import apps
from django.db import DatabaseError, IntegrityError, transaction
from django.db.models import Model
from django.utils.duration import duration_string

from parallel_orm import errors
from parallel_orm.chunks import Chunk
from parallel_orm.items import Feed, Items
from parallel_orm.keyset import Key
from parallel_orm.outcomes import Failed


@dataclass(frozen=True, slots=True)
class Record:
    """What is written down of a chunk, as whoever works on it knows it."""

    pk: int
    #: What was left to be done when it was sent.
    left: str | None = None

    def claim(self, alias: str) -> bool:
        """Mark it as done, in the transaction of its rows; False: somebody has done it."""
        as_sent = {"left__isnull": True} if self.left is None else {"left": self.left}
        return bool(_chunks(alias).filter(pk=self.pk, **as_sent).update(left="[]"))

    def settle(self, alias: str, failed: list[Any], rows: int) -> None:
        """Write down how many rows it has, and which of them failed."""
        changes: dict[str, Any] = {"rows": rows} if self.left is None else {}
        if failed:
            changes["left"] = json.dumps([_told(each) for each in failed])
        if changes:
            _chunks(alias).filter(pk=self.pk).update(**changes)

    def done(self, alias: str, model: Any, items: Items | None) -> tuple[int, tuple[Failed, ...]]:
        """Return how many rows the chunk has, and those that failed when it was done, by a worker that was lost."""
        rows, left = _chunks(alias).values_list("rows", "left").get(pk=self.pk)
        error, failed = errors.failed_in_lost_worker(), []
        for each in json.loads(left or "[]"):
            if items is None:
                failed.append(Failed(None, as_primary_key(read_key(model, each)), error))
            else:
                failed.append(Failed(items.places.index(each), None, error))
        return int(rows), tuple(failed)


def is_done(record: Record, alias: str) -> bool:
    """Tell whether a chunk is in the database, after whoever worked on it was lost. Waits for a commit under way."""
    with transaction.atomic(using=alias):
        found = _chunks(alias).select_for_update().get(pk=record.pk)  # on SQLite, which has one writer, a plain read
    return bool(found.left != record.left)


def _chunks(alias: str) -> Any:
    from parallel_orm.models import RunChunk

    return RunChunk._base_manager.using(alias)


class Ledger:
    """The records of one run, at the caller's."""

    def __init__(self, run_id: str, verb: str, model: type[Model], alias: str) -> None:
        self.run_id, self.verb, self.model, self.alias = run_id, verb, model, alias
        #: Rows that an earlier run has done.
        self.done_before = 0
        refuse_without_tables(alias)
        from parallel_orm.models import Run

        try:
            with transaction.atomic(using=alias):
                self.run, self.is_new = Run._base_manager.using(alias).get_or_create(
                    run_id=run_id, defaults={"verb": verb, "model": model._meta.label}
                )
        except DatabaseError as error:
            raise errors.no_tables_for_runs(alias) from error
        if (self.run.verb, self.run.model) != (verb, model._meta.label):
            raise errors.another_run(run_id, f"{self.run.verb}() of {self.run.model}")

    def known(self) -> Iterator[Any]:
        """Yield the records that there are, by number."""
        number = 0
        while records := list(_chunks(self.alias).filter(run=self.run, number__gte=number).order_by("number")[:1000]):
            yield from records
            number = records[-1].number + 1

    def noted(self, chunk: Chunk, bounds: Any) -> Chunk:
        """Write a new chunk down, and return it with its record."""
        try:
            with transaction.atomic(using=self.alias):
                record = _chunks(self.alias).create(run=self.run, number=chunk.index, bounds=json.dumps(bounds))
        except IntegrityError as error:
            raise errors.run_is_under_way(self.run_id) from error
        return replace(chunk, record=Record(record.pk))

    # --- Of items ---------------------------------------------------------------------

    def of_items(self, feed: Feed, size: int) -> Iterator[Chunk]:
        """Yield the chunks of items that are to be done: of those that are written down what is left, then new ones."""
        index = first = 0
        for record in self.known():
            start, stop = json.loads(record.bounds)
            values = feed.take(stop - start)
            if len(values) < stop - start and feed.error is None:
                raise errors.other_items(self.run_id, start + len(values), stop)
            items = Items(range(start, start + len(values)), values)
            if record.left is not None:
                left = json.loads(record.left)
                self.done_before += record.rows - len(left)
                items = Items(left, [values[place - start] for place in left if place - start < len(values)])
            if len(items) and feed.error is None:
                yield feed.chunk(record.number, items, Record(record.pk, record.left))
            index, first = record.number + 1, stop
        while values := feed.take(size):
            chunk = feed.chunk(index, Items(range(first, first + len(values)), values))
            yield self.noted(chunk, [first, first + len(values)])
            index, first = index + 1, first + len(values)

    # --- Of rows ------------------------------------------------------------------------

    def of_rows(
        self, ends: Callable[[], list[Key]], cut: Callable[[Key | None, list[Key], int], Iterator[Chunk]]
    ) -> Iterator[Chunk]:
        """Yield the chunks of rows that are to be done, up to the last row of the first run's beginning.

        ``cut`` gives those behind a key, numbered from an index on.
        """
        index, after = 0, None
        for record in self.known():
            bounds = json.loads(record.bounds)
            until = read_key(self.model, bounds["until"])
            chunk = Chunk(record.number, self.alias, after=read_key(self.model, bounds["after"]), until=until)
            if record.left is not None:
                left = tuple(as_primary_key(read_key(self.model, key)) for key in json.loads(record.left))
                self.done_before += record.rows - len(left)
                chunk = Chunk(record.number, self.alias, keys=left)
            if record.left is None or chunk.keys:
                yield replace(chunk, record=Record(record.pk, record.left))
            index, after = record.number + 1, until
        if self.is_new:
            found = ends()
            self.run.until = json.dumps(written_key(self.model, found[-1]) if found else None)
            self.run.save(using=self.alias, update_fields=["until"])
            last = found[-1] if found else None
        else:
            last = read_key(self.model, json.loads(self.run.until)) if self.run.until else None
            if not self.run.until:  # it ended before it had begun
                self.is_new = True
                yield from self.of_rows(ends, cut)
                return
        if last is None or last == after:
            return
        for chunk in cut(after, [last], index):
            bounds = {"after": written_key(self.model, chunk.after), "until": written_key(self.model, chunk.until)}
            yield self.noted(chunk, bounds)


def refuse_without_tables(alias: str) -> None:
    if not apps.is_installed("parallel_orm"):
        raise errors.no_tables_for_runs(alias)


# --- Keys, as JSON ------------------------------------------------------------------------


def _told(value: Any) -> Any:
    return [_written(part) for part in value] if isinstance(value, tuple) else _written(value)


def written_key(model: type[Model], key: Key | None) -> list[Any] | None:
    return None if key is None else [_written(value) for value in key]


def _written(value: Any) -> Any:
    if value is None or isinstance(value, str | int | bool):
        return value
    if isinstance(value, bytes | memoryview):
        return {"bytes": b64encode(bytes(value)).decode()}
    if isinstance(value, date | time):  # and moments; all of their digits
        return value.isoformat()
    if isinstance(value, timedelta):
        return duration_string(value)
    if isinstance(value, Decimal | UUID | float):
        return str(value)
    raise errors.key_cannot_be_written(value)


def read_key(model: type[Model], written: Any) -> Key | None:
    """Return a key as the fields of the primary key have it."""
    if written is None:
        return None
    values = written if isinstance(written, list) else [written]
    fields: Any = model._meta.pk_fields
    return tuple(_read(field, value) for field, value in zip(fields, values, strict=True))


def as_primary_key(key: Key | None) -> Any:
    """Return what an instance calls its primary key: the one value, or all of several columns."""
    return key[0] if key is not None and len(key) == 1 else key


def _read(field: Any, value: Any) -> Any:
    while field.remote_field is not None:
        field = field.target_field
    if isinstance(value, dict):
        return b64decode(value["bytes"])
    return field.to_python(value)
