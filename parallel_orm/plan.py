"""Asks the database, chooses a cut, returns a Plan that can explain itself.

    one chunk            counts, existence, background fetches: any queryset, as it is
    pages                a walk whose rows tell their own key: a LIMIT each, the rest follows
    ranges               the default: half-open intervals between keys found by keyset jumps, lazily
    keys                 slices, and maps in an order other than the primary key's: a list of primary keys

What cannot be cut truthfully is refused in ``guards``.
"""

from __future__ import annotations

import operator
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from django.db.models import QuerySet
from django.db.models.expressions import CombinedExpression, Func, RawSQL, Value
from django.db.models.query import FlatValuesListIterable, ModelIterable, ValuesIterable, ValuesListIterable

from parallel_orm import cutting, errors, guards
from parallel_orm.chunks import Chunk
from parallel_orm.keyset import (
    Key,
    Keyset,
    NotAKeyset,
    effective_ordering,
    is_random,
    keyset_of,
    parts,
    primary_key,
)
from parallel_orm.options import MAP_CHUNK_SIZE, WALK_CHUNK_SIZE, Options
from parallel_orm.session import NOTHING, Session
from parallel_orm.task import Job, Task, Work, at

Rows = QuerySet[Any, Any]
Cut = Literal["pages", "ranges", "keys"]


@dataclass(frozen=True)
class Plan:
    """How a queryset is cut into chunks. Asks the database nothing until its chunks are taken."""

    #: What the chunks are parts of, as it is narrowed for each.
    queryset: Rows
    cut: Cut
    #: Why this cut.
    why: str
    #: Rows a chunk; a range may have more where keys repeat.
    chunk_size: int
    #: The order within and between chunks; None: the queryset's own.
    keyset: Keyset | None = None
    #: Reads the key of a row, for pages.
    key_of: Callable[[Any], Key] | None = None
    #: The queryset as it was asked for, to list its keys from.
    source: Rows | None = None
    #: Whether that list must be looked through for rows that a join repeats.
    may_repeat: bool = False
    #: Why the work stays in this process, or None.
    inline: str | None = None
    #: What the workers' connections must be given.
    session: Session = NOTHING
    alias: str = ""
    #: The method that was called, for what is refused later.
    verb: str = ""

    def job(self, work: Work, session: Session | None = None) -> Job:
        """Return the job that does ``work`` with each chunk."""
        return Job(self.queryset, work, self.keyset, self.key_of, self.session if session is None else session)

    def chunks(self) -> Iterator[Chunk]:
        """Yield the chunks, lazily: each query for a bound is made when its chunk is taken."""
        if self.cut == "keys":
            most = guards.most_keys(guards.connection_for(self.alias)) or self.chunk_size
            yield from cutting.by_keys(self.alias, self._list_keys(), min(self.chunk_size, most))
        elif (last := self._last_key()) is None:
            return
        elif self.cut == "pages":
            yield from cutting.by_pages(self.alias, last, self.chunk_size)
        else:
            yield from cutting.by_jumps(self.alias, last, self.chunk_size, self._jumper(last))

    def count(self) -> int:
        """Count the rows, for a progress bar. One query."""
        return bare(self.source if self.source is not None else self.queryset, self.alias).count()

    def _keys(self, keyset: Keyset) -> Rows:
        return keyset.order(bare(self.queryset, self.alias)).values_list(*keyset.paths)

    def _last_key(self) -> Key | None:
        assert self.keyset is not None
        return next(iter(self._keys(self.keyset.reversed())[:1]), None)

    def _jumper(self, last: Key) -> Callable[[Key | None, int], Key | None]:
        keyset = self.keyset
        assert keyset is not None
        keys = self._keys(keyset).filter(keyset.until(last))

        def jump(after: Key | None, size: int) -> Key | None:
            ahead = keys if after is None else keys.filter(keyset.after(after))
            key = next(iter(ahead[size - 1 : size]), None)
            if key is not None and key == after:  # it would be found for ever
                raise errors.unsupported(
                    self.verb,
                    self.queryset.model._meta.label,
                    f"the key {key!r} does not come back from the database as it is there",
                    "Order by other columns, or take order_by('pk').",
                )
            return key

        return jump

    def _list_keys(self) -> Sequence[Any]:
        assert self.source is not None
        keys = compact(bare(self.source, self.alias).values_list("pk", flat=True))
        if self.may_repeat and len(set(keys)) != len(keys):
            raise repeated_rows(self.verb, self.queryset)
        return keys

    def __str__(self) -> str:
        model = self.queryset.model._meta.label
        order = (
            ", ".join(("-" if t.descending else "") + t.path for t in self.keyset.terms) if self.keyset else "its own"
        )
        lines = [
            f"Plan for {model} on {self.alias!r}",
            f"  cut:    {self.cut} of {self.chunk_size} rows",
            f"  why:    {self.why}",
            f"  order:  {order}",
        ]
        if self.inline:
            lines.append(f"  where:  in this process ({self.inline})")
        return "\n".join(lines)


def bare(queryset: Rows, alias: str) -> Rows:
    """Return Django's own queryset of the same rows: for keys nobody's overrides, instances or prefetches matter."""
    query = queryset.query.chain()
    query.select_for_update = False  # its of=(...) names what keys have not; the rows themselves are locked
    return QuerySet(queryset.model, query=query, using=alias)


def compact(keys: Rows) -> Sequence[Any]:
    """List primary keys in as little memory as they need: eight bytes each where they are integers."""
    listed: array[int] | list[Any] = array("q")
    stream = keys.iterator(chunk_size=10_000)
    for key in stream:
        try:
            listed.append(key)
        except (TypeError, OverflowError):  # of append() alone: what the database raises is the caller's
            return [*listed, key, *stream]
    return listed


def plan_whole(queryset: Rows, work: Work) -> Task:
    """Plan what needs no cut, one query for the queryset as it is: a single task."""
    alias = queryset.db
    guards.refuse_unknown(alias)
    return Task(Job(at(queryset, alias), work), cutting.whole(alias))


def plan_walk(queryset: Rows, options: Options) -> Plan:
    """Plan a walk: one chunk after the other, on the caller's connection, in the order of the queryset."""
    verb, size = "chunked_iterator", options.rows_per_chunk(WALK_CHUNK_SIZE)
    guards.connection_for(queryset.db)
    queryset = at(queryset, queryset.db)
    guards.refuse_uncuttable(verb, queryset)
    if queryset.query.is_sliced:
        return _keys_plan(verb, queryset, size, "a slice has a fixed set of rows")
    try:
        keyset = keyset_of(queryset)
    except NotAKeyset as problem:
        raise errors.unsupported(
            verb,
            queryset.model._meta.label,
            f"it cannot be walked in its own order, {problem}",
            "Order by columns, or by the name of an annotate(), or take order_by('pk').",
        ) from problem
    if keyset.is_primary_key and not guards.joins_of(queryset).repeat_rows:
        key_of = key_reader(queryset)
        if key_of is not None:
            why = "rows tell their own primary key, so a page needs no look-up for its bounds"
            return Plan(queryset.all(), "pages", why, size, keyset, key_of, alias=queryset.db, verb=verb)
    why = "keyset jumps find the bounds, in the order of the queryset"
    return Plan(queryset.all(), "ranges", why, size, keyset, alias=queryset.db, verb=verb)


def plan_map(verb: str, queryset: Rows, options: Options) -> Plan:
    """Plan a map: chunks in any order, results in the order of the queryset."""
    size = options.rows_per_chunk(MAP_CHUNK_SIZE)
    guards.connection_for(queryset.db)
    queryset = at(queryset, queryset.db)
    inline, session = guards.where_to_map(verb, queryset)
    guards.refuse_locks(verb, queryset)
    guards.refuse_uncuttable(verb, queryset)
    if queryset.query.is_sliced:
        return _keys_plan(verb, queryset, size, "a slice has a fixed set of rows", inline, session)
    by_key = primary_key(queryset.model)
    if options.ordered or guards.drops_rows(queryset):
        try:
            keyset = keyset_of(queryset)
        except NotAKeyset:
            keyset = None
        random = any(is_random(item) for item in effective_ordering(queryset.query))
        if not random and (keyset is None or not keyset.is_primary_key):
            why = "results come in the order of the queryset, not the primary key's"
            return _keys_plan(verb, queryset, size, why, inline, session)
        by_key = by_key if keyset is None else keyset
    why = "keyset jumps along the primary key give even chunks, whatever its gaps"
    return Plan(
        queryset.all(), "ranges", why, size, by_key, inline=inline, session=session, alias=queryset.db, verb=verb
    )


def _keys_plan(
    verb: str, queryset: Rows, size: int, why: str, inline: str | None = None, session: Session = NOTHING
) -> Plan:
    """Plan by a list of the primary keys, in the order of the queryset, which each chunk repeats for its part."""
    source, part = queryset.all(), queryset.all()
    part.query.clear_limits()
    may_repeat = guards.joins_of(queryset).repeat_rows
    if may_repeat and queryset.query.is_sliced:  # which may end between two appearances of one row
        raise repeated_rows(verb, queryset)
    if not part.query.extra_order_by:
        ordering = _orders(part.query)
        # A tie must be broken alike in the list and in each part, or equal rows change places.
        keys = ("pk",) if len(queryset.model._meta.pk_fields) == 1 else ()
        part = part.order_by(*ordering, *keys)
        if not source.query.is_sliced:
            source = source.order_by(*ordering, *keys)
        elif not ordering and "?" not in source.query.order_by:
            source.query.add_ordering("pk")  # the method refuses what is sliced
    return Plan(
        part,
        "keys",
        why,
        size,
        source=source,
        may_repeat=may_repeat,
        inline=inline,
        session=session,
        alias=queryset.db,
        verb=verb,
    )


def _is_constant(query: Any, item: Any) -> bool:
    """Tell whether an order is by an annotation without columns, which the list of keys could not refer to."""
    item = getattr(item, "expression", item)
    name = getattr(item, "name", item)
    annotation = query.annotations.get(name.lstrip("-")) if isinstance(name, str) else None
    if annotation is None:
        return False
    return all(isinstance(part, Value | CombinedExpression) for part in parts(annotation))


def _orders(query: Any) -> list[Any]:
    """Return what of an order decides anything: not chance, and not what is the same for all rows."""
    return [item for item in effective_ordering(query) if not (is_random(item) or _is_constant(query, item))]


def repeated_rows(verb: str, queryset: Rows) -> errors.UnsupportedQuerySet:
    return errors.unsupported(
        verb,
        queryset.model._meta.label,
        "a join gives the same row several times, and a list of primary keys cannot tell its appearances apart",
        "Use distinct(), or order by pk and drop the slice.",
    )


def key_reader(queryset: Rows) -> Callable[[Any], Key] | None:
    """Return how to read the primary key of a row, or None where rows do not bring it."""
    meta = queryset.model._meta
    if len(meta.pk_fields) > 1 or type(queryset).__iter__ is not QuerySet.__iter__:
        return None
    if queryset.query.extra_select or any(map(_may_return_sets, queryset.query.annotation_select.values())):
        return None
    if queryset._iterable_class is ModelIterable:
        return _key_of_instance
    fields: tuple[Any, ...] = guards.fields_of(queryset) or tuple(column.attname for column in meta.concrete_fields)
    for name in ("pk", meta.pk.name, meta.pk.attname):
        if name in fields:
            if queryset._iterable_class is ValuesIterable:
                return _KeyAt(name)
            if queryset._iterable_class is ValuesListIterable and not queryset.query.extra_select:
                return _KeyAt(fields.index(name))
            if queryset._iterable_class is FlatValuesListIterable:
                return _key_itself
    return None


def _may_return_sets(annotation: Any) -> bool:
    """Tell whether SQL that Django does not know may give the same row several times."""
    return any(
        type(part) is Func or isinstance(part, RawSQL) or not type(part).__module__.startswith("django.db.models")
        for part in parts(annotation)
    )


def _key_of_instance(row: Any) -> Key:
    return (row.pk,)


def _key_itself(row: Any) -> Key:
    return (row,)


class _KeyAt:
    """Reads the key of a dict or a tuple."""

    def __init__(self, place: str | int) -> None:
        self.get = operator.itemgetter(place)

    def __call__(self, row: Any) -> Key:
        return (self.get(row),)
