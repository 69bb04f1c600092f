"""A chunk: which rows belong together. It says so with keys, so it travels light and needs no rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar

from django.db.models import Model, QuerySet

from parallel_orm.blocks import in_blocks
from parallel_orm.errors import UnsupportedQuerySet
from parallel_orm.identity import fields_of
from parallel_orm.keyset import carried

if TYPE_CHECKING:
    from parallel_orm.blocks import Blocks
    from parallel_orm.items import Items
    from parallel_orm.keyset import Key, Keyset
    from parallel_orm.runs import Record

Rows = TypeVar("Rows", bound="QuerySet[Any, Any]")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows that are worked on together: an interval of keys, or a list of them, or blocks of the table, or all.

    Chunks of one plan are disjoint and their union is the queryset.
    """

    #: The place of the chunk in the plan, from 0.
    index: int
    #: The database that has the rows.
    alias: str
    #: The rows stand behind this key; None: from the first row on.
    after: Key | None = None
    #: The rows stand before this key, or on it; None: to the last row.
    until: Key | None = None
    #: The primary keys of the rows, instead of an interval.
    keys: tuple[Any, ...] | None = None
    #: What is to be written, instead of rows that are there.
    items: Items | None = field(default=None, repr=False)
    #: The blocks of the table that the rows lie in, instead of an interval.
    blocks: Blocks | None = None
    #: No more rows than this; those that are left come back as another chunk.
    limit: int | None = None
    #: Which part of a chunk this is that has come apart. Parts compare as their rows stand.
    part: tuple[int, ...] = (0,)
    #: How many rows it has, where that is known.
    rows: int | None = None
    #: After so many seconds of a function's work the rows that are left come back as another part; None: never.
    seconds: float | None = None
    #: How often it was sent before, and lost.
    attempt: int = 0
    #: The record of it, in the table of a run that may be begun again.
    record: Record | None = None
    #: Of which plan it is, where one call has several; counted from 0.
    plan: int = 0

    @property
    def place(self) -> tuple[int, ...]:
        """Where its rows stand among those of all chunks, to be compared."""
        return (self.plan, self.index, *self.part)

    @property
    def is_whole(self) -> bool:
        """Whether it says nothing, and so is all of the queryset."""
        return (
            self.after is None
            and self.until is None
            and self.keys is None
            and self.blocks is None
            and self.items is None
        )

    def narrow(self, queryset: Rows, keyset: Keyset | None) -> Rows:
        """Return the part of ``queryset`` that is this chunk, in the order of ``keyset``, or of the queryset."""
        if self.keys is not None:
            rows = queryset.filter(pk__in=self.keys)
            return rows if keyset is None else keyset.order(rows)
        if self.blocks is not None:
            return in_blocks(queryset, self.blocks)
        if self.items is not None:
            return queryset
        if keyset is None:
            return queryset
        narrowed = keyset.part(queryset, self.after, self.until)
        return narrowed if self.limit is None else narrowed[: self.limit]

    @property
    def light(self) -> Chunk:
        """The same without its items, which whoever sent it has."""
        return self if self.items is None else replace(self, items=self.items.told)

    def rest(self, last: Key) -> Chunk | None:
        """Return what is left of this chunk behind the key ``last``, or None if that was its end."""
        self._refuse_standstill(last)
        return None if last == self.until else replace(self, index=self.index + 1, after=last)

    def left(self, rows: list[Any], last: Key, key_of: Callable[[Any], Key]) -> Chunk:
        """Return the part that is left when the row of the key ``last`` is done: ``rows``, as they were read.

        Of an interval it is all that stands behind that key, of a list or of blocks the keys of these rows.
        """
        self._refuse_standstill(last)
        rest = replace(self, part=behind(self.part), rows=len(rows), attempt=0)
        if self.keys is None and self.blocks is None:
            return replace(rest, after=carried(last))
        return replace(rest, keys=tuple(carried(key_of(row))[0] for row in rows))

    def parted(self, rows: int, until: Key | None = None) -> tuple[Chunk, Chunk]:
        """Cut it in two behind its first ``rows`` rows; of an interval the last one of these has the key ``until``."""
        first = replace(self, part=(*self.part, 0), rows=rows)
        second = replace(self, part=behind(self.part), rows=None if self.rows is None else self.rows - rows)
        if self.keys is None:
            return replace(first, until=until), replace(second, after=until)
        return replace(first, keys=self.keys[:rows]), replace(second, keys=self.keys[rows:])

    def _refuse_standstill(self, last: Key) -> None:
        if last == self.after:  # it would be read for ever
            raise UnsupportedQuerySet(f"The key {last!r} does not come back from the database as it is there.")

    def __str__(self) -> str:
        """Say which rows these are: ``chunk 3 (behind 2000 and up to 3000)``."""
        if self.keys is not None:
            span = f"{len(self.keys)} keys from {self.keys[0]!r} to {self.keys[-1]!r}"
        elif self.items is not None:
            span = str(self.items)
        elif self.blocks is not None:
            span = f"blocks {self.blocks[0]} to {self.blocks[1] - 1}"
        else:
            parts = [
                word + " " + ", ".join(repr(value) for value in key)
                for word, key in (("behind", self.after), ("up to", self.until))
                if key is not None
            ]
            span = " and ".join(parts) or "all rows"
        return f"chunk {self.index} ({span})"


def behind(part: tuple[int, ...]) -> tuple[int, ...]:
    """Return the part behind this one, and behind all parts into which this one comes apart."""
    return (*part[:-1], part[-1] + 1)


def keys_of(rows: Sequence[Any], queryset: QuerySet[Any, Any]) -> list[Any]:
    """Return the primary keys of rows of a queryset, None each where they do not bring them."""
    if not rows:
        return []
    first, pk = rows[0], queryset.model._meta.pk
    names = ("pk", pk.attname, pk.name)
    given = fields_of(queryset)
    if isinstance(first, Model):
        return list(map(attrgetter("pk" if len(first._meta.pk_fields) > 1 else first._meta.pk.attname), rows))
    if isinstance(first, dict):
        name = next((name for name in names if name in first), None)
        return [None if name is None else row[name] for row in rows]
    if given and not queryset.query.extra_select:
        place = next((place for place, name in enumerate(given) if name in names), None)
        if place is not None:
            return [row[place] for row in rows] if isinstance(first, tuple) else list(rows)
    return [None] * len(rows)


def describe_key(key: object) -> str:
    """Return a primary key for a message."""
    return "unknown" if key is None else repr(key)
