"""The items of an iterable, cut into chunks as they are asked for: a generator of millions is never listed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from django.core.files import File
from django.db.models import FileField, Model
from django.db.models.fields.files import FieldFile

from parallel_orm import errors
from parallel_orm.chunks import Chunk
from parallel_orm.outcomes import Packed, pack

if TYPE_CHECKING:
    from parallel_orm.runs import Record


@dataclass(frozen=True, slots=True)
class Items:
    """Some of the items, and where each stands among all of them. They travel as bytes, packed where they are sent."""

    places: Sequence[int]
    values: Sequence[Any]

    @property
    def told(self) -> Items:
        """Where they stand, without themselves."""
        return Items(self.places, ())

    def __len__(self) -> int:
        return len(self.values)

    def __reduce__(self) -> tuple[Any, ...]:
        try:
            for place, value in zip(self.places, self.values, strict=False):
                refuse_unsaved_files(value, place)
            packed = pack(self.values)
        except Exception:
            packed = pack([as_it_travels(place, value) for place, value in zip(self.places, self.values, strict=False)])
        return _opened, (self.places, packed)

    def __str__(self) -> str:
        return f"items {self.places[0]} to {self.places[-1]}" if len(self.places) > 1 else f"item {self.places[0]}"


@dataclass(frozen=True, slots=True)
class Refused:
    """What travels instead of an item that cannot: why it cannot."""

    error: Exception


def as_it_travels(place: int, value: Any) -> Any:
    try:
        refuse_unsaved_files(value, place)
        pack(value)
    except errors.NotPicklable as error:
        return Refused(error)
    except Exception as error:
        return Refused(errors.item_not_picklable(place, value, error))
    return value


def _opened(places: Sequence[int], packed: Packed) -> Items:
    try:
        return Items(places, packed.open())
    except Exception as error:  # which of them it is nobody can tell
        return Items(places, [Refused(error)] * len(places))


def refuse_unsaved_files(value: Any, place: int) -> None:
    """Refuse an instance with a file that is not in its storage yet: pickling would leave the content behind."""
    if not isinstance(value, Model):
        return
    for field in value._meta.concrete_fields:
        file = value.__dict__.get(field.attname) if isinstance(field, FileField) else None
        if isinstance(file, File) and not (isinstance(file, FieldFile) and file._committed):  # type: ignore[attr-defined]
            raise errors.file_does_not_travel(place, field.name)


class Feed:
    """An iterable as chunks of items. Where it raises, the items before that are a chunk all the same."""

    def __init__(self, items: Iterable[Any], alias: str) -> None:
        self._items, self._alias = iter(items), alias
        #: What the iterable raised.
        self.error: Exception | None = None

    def chunks(self, size: int) -> Iterator[Chunk]:
        """Yield chunks of so many items."""
        index = first = 0
        while values := self.take(size):
            yield self.chunk(index, Items(range(first, first + len(values)), values))
            index, first = index + 1, first + len(values)

    def chunk(self, index: int, items: Items, record: Record | None = None) -> Chunk:
        return Chunk(index, self._alias, items=items, rows=len(items), record=record)

    def take(self, number: int) -> list[Any]:
        """Return the next items, so many or those that are left."""
        values: list[Any] = []
        if self.error is None:
            try:
                for value in islice(self._items, number):
                    values.append(value)  # noqa: PERF402 - what came before an error is kept
            except Exception as error:
                self.error = error
        return values


def length_of(items: Iterable[Any]) -> Callable[[], int | None]:
    """Return what tells how many items there are, if they do."""

    def count() -> int | None:
        try:
            return len(items)  # type: ignore[arg-type]
        except TypeError:
            return None

    return count
