"""Asks the database, chooses a cut, returns a Plan that can explain itself.

    one chunk            counts, existence, background fetches: any queryset, as it is
    pages                a walk whose rows tell their own key: a LIMIT each, the rest follows
    ranges               the default: half-open intervals between keys found by keyset jumps, lazily
    keys                 slices, unions, orders that are no keyset, and maps in an order other than the primary key's:
                         a list of primary keys
    blocks               maps of a whole table as of one moment, in any order, where its rows do not lie as their keys

What cannot be cut truthfully is refused in ``guards``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from django.db.models import QuerySet
from django.db.models.constants import LOOKUP_SEP
from django.db.models.expressions import CombinedExpression, Value
from django.db.models.sql import Query

from parallel_orm import cutting, errors, guards
from parallel_orm.blocks import block_of_row, heap_of, in_blocks, is_one_table
from parallel_orm.chunks import Chunk
from parallel_orm.explain import Access, access_of, has_index_for
from parallel_orm.identity import identity_of, is_grouped
from parallel_orm.keys import compact, key_reader
from parallel_orm.keyset import Key, Keyset, Term, carried, primary_key
from parallel_orm.options import MAP_CHUNK_SIZE, WALK_CHUNK_SIZE, Options, from_settings
from parallel_orm.ordering import NotAKeyset, effective_ordering, is_random, keyset_of, parts
from parallel_orm.pace import Pace
from parallel_orm.session import NOTHING, Session
from parallel_orm.stencil import Behind
from parallel_orm.task import Job, Task, at
from parallel_orm.work import ByPart, Work

Rows = QuerySet[Any, Any]
Cut = Literal["pages", "ranges", "keys", "blocks"]
#: Returns what stands behind a key and up to another one, in the order of the plan.
Between = Callable[[Key | None, Key | None], Rows]


@dataclass(frozen=True)
class Plan:
    """How a queryset is cut into chunks. Asks the database nothing until its chunks are taken."""

    #: What the chunks are parts of, as it is narrowed for each.
    queryset: Rows = field(repr=False)
    cut: Cut
    #: Why this cut.
    why: str
    #: Rows a chunk, at first where they are steered; a range may have more where keys repeat.
    chunk_size: int
    #: The order within and between chunks; None: the queryset's own.
    keyset: Keyset | None = None
    #: Reads the key of a row, for pages, and for what is left of a chunk of a map.
    key_of: Callable[[Any], Key] | None = None
    #: The queryset as it was asked for, to list its keys from.
    source: Rows | None = field(default=None, repr=False)
    #: Whether that list must be looked through for rows that a join repeats.
    may_repeat: bool = False
    #: Whether chunks may become larger or smaller: pages to be as much to hold, those of a map to take as long.
    steers: bool = False
    #: Why the work stays in this process, or None.
    inline: str | None = None
    #: What the workers' connections must be given.
    session: Session = NOTHING
    #: Whether all of it is read as of one moment.
    consistent: bool = False
    #: Whether blocks would do as well as ranges. The database is asked which are faster, when chunks are taken.
    may_be_blocks: bool = False
    #: How many blocks there are, for a cut by them.
    blocks: int = 0
    #: The chunks, where they are known.
    given: tuple[Chunk, ...] | None = field(default=None, repr=False)
    #: Seconds that a chunk of a map is to take at most; None: as long as it takes.
    target_seconds: float | None = None
    alias: str = ""
    #: The method that was called, for what is refused later.
    verb: str = ""

    def job(self, work: Work | ByPart, session: Session | None = None) -> Job:
        """Return the job that does ``work`` with each chunk."""
        return Job(self.queryset, work, self.keyset, self.key_of, self.session if session is None else session)

    @property
    def label(self) -> str:
        return str(self.queryset.model._meta.label)

    def part(self, chunk: Chunk) -> Rows:
        """Return the part of the queryset that is a chunk."""
        if chunk.limit is None:
            return chunk.narrow(self._rows(), self.keyset)
        return self._slice(self._rows_between, chunk.after, chunk.until, 0, chunk.limit)

    def chunks(self, pace: Pace | None = None) -> Iterator[Chunk]:
        """Yield the chunks, lazily: each query for a bound is made when its chunk is taken, as large as it is then."""
        if self.given is not None:
            yield from self.given
            return
        if self.may_be_blocks:
            yield from self.settled().chunks(pace)
            return
        pace = pace or self.pace()
        if self.cut == "keys":
            most = self._most_keys()
            yield from cutting.by_keys(self.alias, self._list_keys(), lambda: min(pace.rows, most))
        elif self.cut == "blocks":
            most = self._most_keys()  # what is left of a chunk is a list of them
            yield from cutting.by_blocks(self.alias, self.blocks, lambda: min(pace.rows, most), self._jump_blocks)
        elif self.cut == "pages":
            assert self.keyset is not None
            ends = self.ends() if self.keyset.terms[0].nullable else [None]
            yield from cutting.by_pages(self.alias, ends, self.chunk_size)
        else:
            yield from cutting.by_jumps(self.alias, self.ends(), lambda: pace.rows, self.jumps())

    def settled(self) -> Plan:
        """Return the plan that will be followed: by blocks if they would do, and are faster. Asks the database."""
        if not self.may_be_blocks:
            return self
        settled, heap = replace(self, may_be_blocks=False), heap_of(self.alias, self.queryset.model)
        if heap is None or abs(heap.correlation) > IN_ORDER:
            return settled
        why = f"rows do not lie in the order of the primary key (correlation {heap.correlation:.2f}), and need no order"
        return replace(settled, cut="blocks", why=why, blocks=heap.blocks)

    def jumps(self) -> cutting.Jump:
        """Return what finds the end of one chunk after the other."""
        return cutting.Lookout(self._jump, self._look)

    def in_two(self, chunk: Chunk, rows: int) -> tuple[Chunk, Chunk | None]:
        """Cut a chunk behind its first ``rows`` rows; None: it has no more. One query for a range."""
        return cutting.in_two(chunk, rows, self._jump)

    def pace(self, workers: int = 1) -> Pace:
        """Return what steers the chunks of one call."""
        return Pace(self.chunk_size, self.target_seconds, workers, steers=self.steers)

    def rest(self, page: Chunk, last: Key, limit: int) -> Chunk | None:
        """Return what a full page leaves, behind the key of its last row, as the next page; None where that is nothing.

        A first page that was open above is as little as there may be, so where the rows end is asked, and frozen, here.
        """
        if page.until is None:
            page = replace(page, until=next(iter(self.ends()), last))
        rest = page.rest(last)
        return rest and replace(rest, limit=limit)

    def keys_of(self, chunk: Chunk) -> list[Any]:
        """List the primary keys of a chunk's rows; None each where these have none. One query."""
        rows = chunk.narrow(bare(self.queryset, self.alias), self.keyset)
        return [None] * rows.count() if identity_of(self.queryset) else list(rows.values_list("pk", flat=True))

    def only(self, chunks: Sequence[Chunk]) -> Plan:
        """Return the plan of some of its chunks alone."""
        return replace(self, given=tuple(chunks), may_be_blocks=False)

    def count(self) -> int:
        """Count the rows, for a progress bar. One query."""
        if self.given is not None:
            return sum(len(self.keys_of(chunk)) for chunk in self.given)
        return self._all_rows().count()

    def _keys(self, keyset: Keyset) -> Any:
        return keyset.keys_of(keyset.order(bare(self.queryset, self.alias)))

    def _rows(self) -> Rows:
        return at(self.queryset, self.alias)

    def _bare(self) -> Rows:
        return bare(self.queryset, self.alias)

    def _rows_between(self, after: Key | None, until: Key | None) -> Rows:
        assert self.keyset is not None
        return self.keyset.part(self._rows(), after, until)

    def _keys_between(self, after: Key | None, until: Key | None) -> Any:
        assert self.keyset is not None
        return self.keyset.keys_of(self.keyset.part(self._bare(), after, until))

    def _slice(self, between: Between, after: Key | None, until: Key | None, start: int, stop: int) -> Rows:
        """Return the slice of what stands between two keys, with the SQL of the last one, if it can be.

        It cannot where a second ``filter()`` would be another join, or another condition on groups.
        """
        assert self.keyset is not None
        term, *others = self.keyset.terms
        if after is None or others or term.nullable or LOOKUP_SEP in term.path or identity_of(self.queryset):
            return between(after, until)[start:stop]
        behind = next((behind for *known, behind in self._behind if known == [between, until]), None)
        if behind is None:
            behind = Behind(between(None, until), term)
            self._behind[:] = [*self._behind[-FEW:], (between, until, behind)]
        return behind.slice(after[0], start, stop)

    @cached_property
    def _behind(self) -> list[tuple[Between, Key | None, Behind]]:
        return []  # no dict: a key may have a list in it

    def ends(self) -> list[Key]:
        """Return the last key; before it the last one on the hither side of the NULLs, where a column may have them.

        A condition on both sides would be no range of an index.
        """
        assert self.keyset is not None
        backwards, first = self._keys(self.keyset.reversed()), self.keyset.terms[0]
        ends = [carried(key) for key in backwards[:1]]
        if ends and first.nullable and (ends[0][0] is None) is first.nulls_last:
            nearer = backwards.filter(**{f"{first.path}__isnull": not first.nulls_last})
            ends = [*(carried(key) for key in nearer[:1]), *ends]
        return ends

    def _jump(self, after: Key | None, last: Key, size: int) -> Key | None:
        return next(iter(self._found(after, last, size - 1, size)), None)

    def _look(self, after: Key | None, last: Key, number: int) -> list[Key]:
        return self._found(after, last, 0, number)

    def _found(self, after: Key | None, last: Key, start: int, stop: int) -> list[Key]:
        """Return the keys of a slice of the rows between two keys."""
        keys = [carried(key) for key in self._slice(self._keys_between, after, last, start, stop)]
        if keys and (key := keys[0]) == after:  # it would be found for ever
            raise errors.unsupported(
                self.verb,
                self.queryset.model._meta.label,
                f"the key {key!r} does not come back from the database as it is there",
                "Order by other columns, or take order_by('pk').",
            )
        return keys

    def _jump_blocks(self, first: int, rows: int) -> int:
        """Return the block that has the row so many rows behind the beginning of ``first``; or where to look again."""
        end = first + rows  # no more blocks than rows, so that a look is not long where few have any
        found = block_of_row(in_blocks(self._bare(), (first, end)), rows)
        return end if found is None else found

    def _most_keys(self) -> int:
        return guards.most_keys(guards.connection_for(self.alias)) or sys.maxsize

    def _list_keys(self) -> Sequence[Any]:
        keys = compact(self._listing())
        if self.may_repeat and len(set(keys)) != len(keys):
            raise repeated_rows(self.verb, self.queryset)
        return keys

    # --- What it tells of itself ----------------------------------------------------------

    @property
    def estimated_rows(self) -> int:
        """How many rows the database expects. Asks it, by ``EXPLAIN``; SQLite by a count."""
        return access_of(self._all_rows()).rows

    @property
    def estimated_chunks(self) -> int:
        """How many chunks these make."""
        return -(-self.estimated_rows // self.chunk_size)

    @property
    def fallback(self) -> str:
        """What would be done instead where this cut cannot be had."""
        return FALLBACKS[self.cut]

    @property
    def access(self) -> Access:
        """How the database comes by one chunk; by the list, of a cut by keys. Asks it."""
        if self.cut == "keys":
            return access_of(self._listing())
        if self.cut == "blocks":
            return access_of(in_blocks(self._bare(), (0, 1)))
        return access_of(self._second_chunk(*self._outer_keys()))

    @property
    def warnings(self) -> list[str]:
        """What makes this plan slow, or its chunks uneven. Asks the database."""
        found: list[str] = []
        keyset, queryset = self.keyset, bare(self.queryset, self.alias)
        if self.access.sorts and (keyset is None or not has_index_for(queryset, keyset)):
            each = "the list of keys is sorted" if self.cut == "keys" else "each chunk sorts all rows that are left"
            found.append(f"no index for this order: {each}")
        if self.cut != "keys" and not identity_of(self.queryset) and guards.joins_of(self.queryset).repeat_rows:
            found.append("skew: a join may repeat rows, whose appearances are never parted; chunks may be larger")
        if self.cut != "keys" and is_grouped(self.queryset.query):
            found.append("skew: rows are groups, and a chunk of many large ones is as much to read as all of them have")
        if self.cut != "keys" and keyset is not None and keyset.is_primary_key and (share := self._share_of_range()):
            found.append(f"skew: the keys fill {share:.1%} of their range; chunks are even all the same")
        return found

    def _all_rows(self) -> Rows:
        return bare(self.queryset if self.source is None else self.source, self.alias)

    def _listing(self) -> Any:
        return self._all_rows().values_list("pk", flat=True)

    def _outer_keys(self) -> tuple[Key | None, Key | None]:
        assert self.keyset is not None
        first = next((carried(key) for key in self._keys(self.keyset)[:1]), None)
        return first, next(reversed(self.ends()), None)

    def _second_chunk(self, after: Key | None, until: Key | None) -> Any:
        assert self.keyset is not None
        if self.cut == "pages":
            chunk = Chunk(1, self.alias, after=after, until=until, limit=self.chunk_size)
            return chunk.narrow(bare(self.queryset, self.alias), self.keyset)
        return self._keys_between(after, until)[: self.chunk_size]

    def _share_of_range(self) -> float | None:
        """Return how much of the range of integer keys there is, where that is little."""
        outer = self._outer_keys()
        if not all(key is not None and len(key) == 1 and type(key[0]) is int for key in outer):
            return None
        (first,), (last,) = outer  # type: ignore[misc]
        share = self.estimated_rows / (abs(last - first) + 1)
        return share if share < FULL else None

    def __str__(self) -> str:
        """Tell all of it. Asks the database for its estimates, at the time of this call."""
        if self.may_be_blocks:
            return str(self.settled())
        terms = [] if self.keyset is None else self.keyset.terms
        names = dict(self.keyset.computed) if self.keyset else {}
        order = ", ".join(("-" if term.descending else "") + str(names.get(term.path, term.path)) for term in terms)
        rows, access = self.estimated_rows, self.access
        lines = [
            f"Plan for {self.queryset.model._meta.label} on {self.alias!r}",
            f"  cut:      {self.cut} of {self.chunk_size} rows",
            f"  why:      {self.why}",
            f"  order:    {'none' if self.cut == 'blocks' else order or 'its own'}",
            f"  expected: {rows} rows in {-(-rows // self.chunk_size)} chunks",
            f"  index:    {', '.join(access.indexes) or 'none'}{', and a sort' if access.sorts else ''}",
            f"  fallback: {self.fallback}",
        ]
        if self.consistent:
            lines.append("  as of:    one moment, by an exported snapshot")
        if self.inline:
            lines.append(f"  where:    in this process ({self.inline})")
        if guards.has_one_writer(self.alias):
            lines.append("  writes:   one worker, as SQLite has one writer at a time")
        lines += [f"  warning:  {warning}" for warning in self.warnings]
        return "\n".join(lines)


#: What is done where a cut cannot be had.
FALLBACKS: dict[Cut, str] = {
    "pages": "ranges, where rows do not bring their key: one look-up of a bound more a chunk",
    "ranges": "a list of primary keys, where an order cannot be compared column by column",
    "blocks": "ranges, where rows lie in the order of their keys, or nothing is known of that",
    "keys": "none: what cannot be listed by primary key is refused",
}
#: Of how many intervals besides the last one the SQL is kept: a part of a map that comes apart has its own end.
FEW = 3
#: What a list of keys knows of a row.
ROW = Keyset((Term("pk"),))
#: The correlation of a primary key with where its rows lie from which on it leads to them as fast as they are read.
IN_ORDER = 0.9
#: The share of a range of integer keys below which it is worth a warning.
FULL = 0.5


def bare(queryset: Rows, alias: str) -> Rows:
    """Return Django's own queryset of the same rows: for keys nobody's overrides, instances or prefetches matter."""
    query = queryset.query.chain()
    query.select_related = False
    query.select_for_update = False  # its of=(...) names what keys have not; the rows themselves are locked
    return QuerySet(queryset.model, query=query, using=alias)


def plan_whole(queryset: Rows, work: Work, *, is_own: bool = False) -> Task:
    """Plan what needs no cut, one query for the queryset as it is: a single task. Of a copy, unless it is nobody else's
    already.
    """
    alias = queryset.db
    guards.refuse_unknown(alias)
    return Task(Job(queryset if is_own else at(queryset, alias), work), cutting.whole(alias))


def plan_walk(queryset: Rows, options: Options, verb: str = "chunked_iterator") -> Plan:
    """Plan a walk: one chunk after the other, on the caller's connection, in the order of the queryset."""
    guards.connection_for(queryset.db)
    queryset = at(queryset, queryset.db)
    if not options.consistent:
        return _cut_walk(verb, queryset, options)
    guards.refuse_without_snapshots(verb, queryset.db)
    inline, session = guards.where_to_map(verb, queryset)
    guards.refuse_locks(verb, queryset)
    return replace(_cut_walk(verb, queryset, options), session=session, consistent=inline != "testcase")


def _cut_walk(verb: str, queryset: Rows, options: Options) -> Plan:
    size = options.rows_per_chunk(WALK_CHUNK_SIZE)
    guards.refuse_uncuttable(verb, queryset)
    if why := _why_keys(queryset):
        return _keys_plan(verb, queryset, size, why)
    if any(map(is_random, effective_ordering(queryset.query))):
        raise errors.unsupported(
            verb,
            queryset.model._meta.label,
            'order_by("?") is another order each time',
            "Take order_by('pk'), or a slice of it, whose keys are listed once.",
        )
    try:
        keyset = keyset_of(queryset)
    except NotAKeyset as problem:
        if identity_of(queryset):
            raise no_keyset(verb, queryset, problem) from problem
        return _keys_plan(verb, queryset, size, f"its order cannot be compared column by column: {problem}")
    key_of = _reader_for(queryset, keyset)
    if key_of is not None:
        why = "rows tell their own key, so a page needs no look-up for its bounds"
        steers = verb == "chunked_iterator" and not options.has_chunk_size
        return Plan(queryset.all(), "pages", why, size, keyset, key_of, steers=steers, alias=queryset.db, verb=verb)
    why = "keyset jumps find the bounds, in the order of the queryset"
    return Plan(queryset.all(), "ranges", why, size, keyset, alias=queryset.db, verb=verb)


def plan_map(
    verb: str,
    queryset: Rows,
    options: Options,
    *,
    stays: bool = False,
    writes: tuple[str | None, Session] | None = None,
) -> Plan:
    """Plan a map: chunks in any order, results in the order of the queryset. It ``stays`` on the caller's connection
    where that is what was asked for. Where one that ``writes`` is done is known already, and it may lock its rows.
    """
    guards.connection_for(queryset.db)
    queryset = at(queryset, queryset.db)
    if options.consistent:
        guards.refuse_without_snapshots(verb, queryset.db)
    inline: str | None = "inline"
    session = NOTHING
    if writes is not None:
        inline, session = writes
    elif not stays or options.consistent:
        inline, session = guards.where_to_map(verb, queryset)
        inline = inline or ("inline" if stays else None)
    if writes is None:
        guards.refuse_locks(verb, queryset)
    plan = _cut_map(verb, queryset, options, inline, session)
    consistent = options.consistent and inline != "testcase"
    # A block may have more rows than a number that somebody chose.
    free = not (options.ordered or options.has_chunk_size)
    return replace(
        plan,
        consistent=consistent,
        may_be_blocks=consistent and free and plan.cut == "ranges" and is_one_table(queryset),
        key_of=None if options.batched else _reader_for(plan.queryset, plan.keyset or ROW),
        # In this process nobody is idle meanwhile, and the same queries are made each time.
        target_seconds=None if inline or writes else from_settings().TARGET_SECONDS,
        steers=not (options.has_chunk_size or options.batched or writes),
    )


def _reader_for(queryset: Rows, keyset: Keyset) -> Callable[[Any], Key] | None:
    """Return how to read the key of a row, or None where a chunk cannot come apart behind any row."""
    if not identity_of(queryset) and guards.joins_of(queryset).repeat_rows:
        return None
    return key_reader(queryset, keyset)


def _cut_map(verb: str, queryset: Rows, options: Options, inline: str | None, session: Session) -> Plan:
    size = options.rows_per_chunk(MAP_CHUNK_SIZE)
    guards.refuse_uncuttable(verb, queryset)
    if why := _why_keys(queryset):
        return _keys_plan(verb, queryset, size, why, inline, session)
    if identity_of(queryset):
        return _plan_map_of_own_rows(verb, queryset, size, inline, session)
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


def _plan_map_of_own_rows(verb: str, queryset: Rows, size: int, inline: str | None, session: Session) -> Plan:
    """Plan a map over rows that are none of the model's: groups, or what a ``distinct()`` has made one."""
    if any(map(is_random, effective_ordering(queryset.query))):
        queryset = queryset.order_by()
    try:
        keyset = keyset_of(queryset)
    except NotAKeyset as problem:
        raise no_keyset(verb, queryset, problem) from problem
    why = "keyset jumps along the columns that tell its rows apart, in the order of the queryset"
    alias = queryset.db
    return Plan(queryset.all(), "ranges", why, size, keyset, inline=inline, session=session, alias=alias, verb=verb)


def _why_keys(queryset: Rows) -> str | None:
    """Return why a queryset has a set of rows that no condition on their columns would narrow, or None."""
    if queryset.query.is_sliced:
        return "a slice has a fixed set of rows"
    if queryset.query.combinator:
        return f"the rows of a {queryset.query.combinator} are known by their primary keys alone"
    return None


def no_keyset(verb: str, queryset: Rows, problem: NotAKeyset) -> errors.UnsupportedQuerySet:
    return errors.unsupported(
        verb,
        queryset.model._meta.label,
        f"its rows are groups, or distinct by other columns than their primary key, and {problem}",
        "Order by the columns that tell them apart, or loop over iterator().",
    )


def _keys_plan(
    verb: str, queryset: Rows, size: int, why: str, inline: str | None = None, session: Session = NOTHING
) -> Plan:
    """Plan by a list of the primary keys, in the order of the queryset, which each chunk repeats for its part."""
    source, part = queryset.all(), queryset.all()
    if queryset.query.combinator:
        part.query = _of_the_table(queryset.query)
    part.query.clear_limits()
    may_repeat = bool(queryset.query.combinator) or guards.joins_of(queryset).repeat_rows
    if (
        may_repeat and queryset.query.is_sliced and not queryset.query.combinator
    ):  # which may end between two appearances of one row
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


def _of_the_table(combined: Query) -> Query:
    """Return the query of all rows of the table, in the order of a union of some, and with what comes with them."""
    query = Query(combined.model)
    query.order_by, query.standard_ordering = combined.order_by, combined.standard_ordering
    query.default_ordering = False
    query.select_related, query.deferred_loading = combined.select_related, combined.deferred_loading
    return query


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
        "it gives the same row several times, and a list of primary keys cannot tell its appearances apart",
        "Use distinct(), or a union() without all=True, or order by pk and drop the slice.",
    )
