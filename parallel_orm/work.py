"""Work: what is done with the rows of a chunk. A function is called for each of them, and what fails is kept apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from time import monotonic, perf_counter, sleep
from typing import Any, Protocol

from django.db import InterfaceError, OperationalError, connections
from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import QuerySet

from parallel_orm import errors
from parallel_orm.apart import kept_apart
from parallel_orm.chunks import Chunk, describe_key, keys_of
from parallel_orm.connections import interrupt
from parallel_orm.keeping import Everything, Keep, Kept
from parallel_orm.keyset import Key
from parallel_orm.options import OnError
from parallel_orm.outcomes import Failed, Stopwatch, note
from parallel_orm.retries import backoff
from parallel_orm.rows import listed, read
from parallel_orm.session import Session

Rows = QuerySet[Any, Any]


class ByPart(Protocol):
    """What is done with the rows of a chunk one by one, so that it is known how far it came."""

    @property
    def functions(self) -> list[Any]:
        """The user's own that it calls."""

    def part(
        self, rows: Rows, clock: Stopwatch, chunk: Chunk, key_of: Callable[[Any], Key] | None, stop: Stop | None = None
    ) -> Done:
        """Do the chunk, or its first rows until its time is over."""


class Work(Protocol):
    """What is done with the rows of a chunk."""

    def __call__(self, rows: Rows, clock: Stopwatch, /) -> tuple[Any, int]:
        """Return the value of the chunk, and how many rows it read."""


def fetch(rows: Rows, clock: Stopwatch, snapshot: str | None = None) -> tuple[list[Any], int]:
    """The rows themselves, as a list; as of a snapshot that another connection holds, or of now."""
    with clock("database"), Session(snapshot=snapshot).restored(connections[rows.db], reading=True):
        fetched = listed(read(rows))
    return fetched, len(fetched)


class Stop:
    """Tells threads to leave off, which nobody can end."""

    def __init__(self) -> None:
        self.is_set = False
        #: The connections that they are at work on.
        self.wrappers: set[BaseDatabaseWrapper] = set()

    def set(self) -> None:
        """Have them leave off, before their next rows; wait for it, but not for ever."""
        self.is_set = True
        until = monotonic() + STOPS_WITHIN
        while self.wrappers and monotonic() < until:
            for wrapper in list(self.wrappers):
                with suppress(Exception):
                    interrupt(wrapper)
            sleep(0.05)  # one that was about to ask hears nothing of it until it does


#: Seconds that threads have to leave off, before nobody tells them any more.
STOPS_WITHIN = 2.0


@dataclass(frozen=True, slots=True)
class Done:
    """What a function made of a chunk, or of its first rows."""

    #: What was kept of its results.
    value: list[Any]
    #: Rows done.
    rows: int
    #: Results that were left out.
    skipped: int = 0
    #: What was left undone.
    rest: Chunk | None = None
    #: What failed in the end.
    failed: tuple[Failed, ...] = ()
    #: How often a function was called again.
    retries: int = 0
    #: Of each result that was kept its key, as long as they are here; nothing where they are not needed.
    keys: Sequence[Any] = ()
    #: What was counted beside the rows, by name.
    counts: Mapping[str, int] = field(default_factory=dict)
    #: Rows that an earlier run had done.
    done_before: int = 0
    #: What raised when all of it was done, and committed.
    error: BaseException | None = None


@dataclass(slots=True)
class Missed:
    """A row, or a list of rows, whose function raised."""

    key: Any
    #: Which row of the chunk it is.
    row: int
    #: Where its result is to go.
    hole: int
    #: Where its key is among those of all results.
    place: int
    error: Exception
    #: Row or list as it was read last. The function may have changed it.
    item: Any


@dataclass(frozen=True, slots=True)
class Apply:
    """A function's result for each row, or for all rows of the chunk as a list."""

    function: Callable[[Any], Any]
    keep: Keep = Everything
    #: Whether results that are None are left out.
    skip_none: bool = False
    batched: bool = False
    #: What becomes of a row whose function raises.
    on_error: OnError = "raise"
    #: How often it is called again before.
    retries: int = 0
    #: Whether what is kept are the primary keys of the rows that succeeded.
    keys: bool = False
    #: Of what moment the rows are. The function itself sees now.
    snapshot: str | None = None
    #: Whether it is called in the transaction of a test, which must survive its database errors.
    in_test: bool = False

    @property
    def functions(self) -> list[Any]:
        return [self.function, getattr(self.keep, "combine", None)]

    @property
    def called(self) -> Callable[[Any], Any]:
        """The function as it is called."""
        return kept_apart(self.function) if self.in_test else self.function

    def part(
        self,
        rows: Rows,
        clock: Stopwatch,
        chunk: Chunk,
        key_of: Callable[[Any], Key] | None,
        stop: Stop | None = None,
    ) -> Done:
        """Do the chunk, or its first rows until its time is over.

        Where rows do not tell their keys, it takes the time it takes.
        """
        fetched, number = fetch(rows, clock, self.snapshot)
        items, keys = fetched, keys_of(fetched, rows)  # before the function changes them
        if self.batched:
            items, keys, key_of = ([fetched], [tuple(keys)], None) if fetched else ([], [], None)
        kept, missed = self.keep(), list[Missed]()
        take, function, skip_none = kept.take, self.called, self.skip_none
        keeps_keys = self.keys or self.on_error != "raise"
        now, end, done, skipped, kept_keys = perf_counter, inf, 0, 0, list[Any]()
        # The key of the row at hand, if it was read before the function had the row, which may change it. That is so
        # for the first row, and when the time is over for one row more, which is then the last.
        last: Key | None = None
        if fetched and chunk.seconds is not None and key_of is not None:
            last = key_of(fetched[0])
            # What is left is read once more: not for less than it takes to read.
            end = now() + max(chunk.seconds, clock.seconds["database"])
        with clock("function"):
            try:
                for item in items:
                    if stop is not None and stop.is_set:
                        raise errors.cancelled("as its call was interrupted")
                    try:
                        result = function(item)
                    except Exception as error:
                        if self.on_error == "raise" and not self.retries:
                            raise
                        missed.append(Missed(keys[done], done, kept.leave(), len(kept_keys), error, item))
                        kept_keys.append(keys[done])
                        renew_connections(error)
                    else:
                        if result is None and skip_none:
                            skipped += 1
                        else:
                            take(result)
                            if keeps_keys:
                                kept_keys.append(keys[done])
                    done += 1
                    if now() < end:
                        last = None
                    elif last is not None:
                        break
                    elif key_of is not None and done < number:
                        last = key_of(fetched[done])
            except BaseException as error:
                if done < len(items):  # else it was interrupted behind the last one
                    clock.key = keys[done]
                    note(error, self._place_of(done, keys[done]))
                raise
        retries, unfilled = (0, set[int]()) if not missed else self._again(rows, clock, kept, missed)
        if missed and self.on_error == "raise":
            first = missed[0]
            clock.key = first.key
            note(first.error, self._place_of(first.row, first.key))
            note(first.error, f"after {self.retries} retries")
            raise first.error
        failed, value = self._failed(kept, missed, unfilled), kept.sealed(unfilled)
        if self.keys:
            lost = {each.place for each in missed}
            value = [key for place, key in enumerate(kept_keys) if place not in lost]
            value = [key for batch in value for key in batch] if self.batched else value
        skipped, left = skipped + len(unfilled), [] if self.batched else fetched[done:]
        rest = None if not left or last is None or key_of is None else chunk.left(left, last, key_of)
        if self.on_error == "raise" or not kept.in_places:
            kept_keys = []
        elif unfilled:
            kept_keys = [key for place, key in enumerate(kept_keys) if place not in unfilled]
        return Done(value, number if self.batched else done, skipped, rest, failed, retries, kept_keys)

    def _place_of(self, place: int, key: Any) -> str:
        if self.batched:
            keys = " to ".join(map(describe_key, key[:1] + key[1:][-1:]))
            return f"at its batch of {len(key)} rows, primary keys {keys}"
        return f"at row {place} of its chunk, primary key {describe_key(key)}"

    def _again(self, rows: Rows, clock: Stopwatch, kept: Kept, missed: list[Missed]) -> tuple[int, set[int]]:
        """Call the function anew for what it raised for, with rows that are read anew; leave what fails in ``missed``.

        Return how often it was called, and the holes of results that are None and to be left out.
        """
        calls, unfilled = 0, set[int]()
        for attempt in range(1, self.retries + 1):
            if not missed:
                break
            sleep(backoff(attempt))
            self._read_anew(rows, clock, missed)
            still = []
            with clock("function"):
                for each in missed:
                    calls += 1
                    try:
                        result = self.called(each.item)
                    except Exception as error:
                        each.error = error
                        renew_connections(error)
                        still.append(each)
                        continue
                    if result is None and self.skip_none:
                        unfilled.add(each.hole)
                    else:
                        kept.fill(each.hole, result)
            missed[:] = still
        return calls, unfilled

    def _read_anew(self, rows: Rows, clock: Stopwatch, missed: list[Missed]) -> None:
        """Read the rows once more, as their function may have changed them.

        Those that are gone stay as they are, and those that a join repeats, whose keys do not tell them apart.
        """
        if self.batched:
            fetched, _ = fetch(rows.all(), clock, self.snapshot)
            for each in missed:
                each.item = fetched
            return
        keys = [each.key for each in missed if each.key is not None]
        if not keys:
            return
        fetched, _ = fetch(rows.filter(pk__in=keys), clock, self.snapshot)
        found = keys_of(fetched, rows)
        once, read_anew = only_once(found), dict(zip(found, fetched, strict=True))
        for each in missed:
            if each.key in once:
                each.item = read_anew[each.key]

    def _failed(self, kept: Kept, missed: list[Missed], unfilled: set[int]) -> tuple[Failed, ...]:
        for each in missed:
            note(each.error, self._place_of(each.row, each.key))
        places = [each.hole - sum(hole < each.hole for hole in unfilled) if kept.in_places else None for each in missed]
        rows = [len(each.key) if self.batched else 1 for each in missed]
        return tuple(
            Failed(place, each.key, each.error, number)
            for place, each, number in zip(places, missed, rows, strict=True)
        )


def only_once(keys: Sequence[Any]) -> set[Any]:
    """Return the keys that are there once."""
    return {key for key, number in Counter(keys).items() if number == 1}


def renew_connections(error: Exception) -> None:
    """Have connections that died under a function opened anew for the next row, as Django does for the next request."""
    if isinstance(error, OperationalError | InterfaceError):
        for connection in connections.all(initialized_only=True):
            if not connection.in_atomic_block:
                connection.close_if_unusable_or_obsolete()


def name_of(work: Work | ByPart) -> str:
    """Return what a message calls this work: the name of the user's function."""
    function = getattr(work, "function", None) or work
    return getattr(function, "__qualname__", None) or repr(function)
