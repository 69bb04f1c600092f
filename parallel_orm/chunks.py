"""A chunk: which rows belong together. It says so with keys, so it travels light and needs no rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from django.db.models import Model, QuerySet

from parallel_orm.errors import UnsupportedQuerySet

if TYPE_CHECKING:
    from parallel_orm.keyset import Key, Keyset

Rows = TypeVar("Rows", bound="QuerySet[Any, Any]")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows that are worked on together: an interval of keys, or a list of them, or all.

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
    #: No more rows than this; those that are left come back as another chunk.
    limit: int | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it says nothing, and so is all of the queryset."""
        return self.after is None and self.until is None and self.keys is None

    def narrow(self, queryset: Rows, keyset: Keyset | None) -> Rows:
        """Return the part of ``queryset`` that is this chunk, in the order of ``keyset``, or of the queryset."""
        if self.keys is not None:
            return queryset.filter(pk__in=self.keys)
        if keyset is None:
            return queryset
        narrowed = keyset.part(queryset, self.after, self.until)
        return narrowed if self.limit is None else narrowed[: self.limit]

    def rest(self, last: Key) -> Chunk | None:
        """Return what is left of this chunk behind the key ``last``, or None if that was its end."""
        if last == self.after:  # it would be walked for ever
            raise UnsupportedQuerySet(f"The key {last!r} does not come back from the database as it is there.")
        return None if last == self.until else replace(self, index=self.index + 1, after=last)

    def __str__(self) -> str:
        """Say which rows these are: ``chunk 3 (behind 2000 and up to 3000)``."""
        if self.keys is not None:
            span = f"{len(self.keys)} keys from {self.keys[0]!r} to {self.keys[-1]!r}"
        else:
            parts = [
                word + " " + ", ".join(repr(value) for value in key)
                for word, key in (("behind", self.after), ("up to", self.until))
                if key is not None
            ]
            span = " and ".join(parts) or "all rows"
        return f"chunk {self.index} ({span})"


def key_of_row(row: object) -> str:
    """Return the primary key of a row for a message, as far as the row tells."""
    if isinstance(row, Model):
        return repr(row.pk)
    key = row.get("pk", row.get("id")) if isinstance(row, dict) else None
    return "unknown" if key is None else repr(key)
