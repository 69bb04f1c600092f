"""What a queryset over several databases asks of each, and how it makes one answer of theirs.

    rows          each database's in their order, merged; groups put together; what is distinct told apart once more
    count         added up; of rows that may be on several databases these are asked for
    exists        the first yes is enough
    aggregate     recombined of parts
    in_bulk       one dictionary; a key that two databases have is an error

A slice is asked of each database from its beginning to its end: ``limit + offset`` (as ShardingSphere rewrites it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from django.core.exceptions import FieldError
from django.db import connections
from django.db.models import Aggregate, QuerySet
from django.db.models.expressions import Ref
from django.db.models.sql import Query

from parallel_orm import errors
from parallel_orm.asking import Question
from parallel_orm.chunks import describe_key
from parallel_orm.comparing import Comparison, NotComparable, comparison_of, refuse_raw, refuse_unknown
from parallel_orm.guards import WINDOW
from parallel_orm.identity import VALUES, are_instances_of_one_table, is_grouped, selects_primary_key, source_of
from parallel_orm.merging import Page, Term, in_order, joined, merged, sort_keys
from parallel_orm.ordering import effective_ordering
from parallel_orm.outcomes import Stopwatch, named
from parallel_orm.reading import Call, fill_cache
from parallel_orm.recombining import CannotRecombine, Recombined, recombined
from parallel_orm.regrouping import regrouping
from parallel_orm.rows import listed
from parallel_orm.sortkeys import Sorted, names_of, sorted_rows

Rows = QuerySet[Any, Any]


@dataclass(frozen=True)
class Fan:
    """One queryset, as each of several databases is asked one question of it."""

    #: The queryset without its limits, on each database: nobody else's.
    querysets: Mapping[str, Rows]
    low: int = 0
    high: int | None = None
    timeout: float | None = None
    partial: bool = False
    tell: Callable[[Mapping[str, BaseException]], object] = lambda missing: None

    @property
    def first(self) -> Rows:
        return next(iter(self.querysets.values()))

    @property
    def label(self) -> str:
        return str(self.first.model._meta.label)

    @property
    def is_sliced(self) -> bool:
        return self.low > 0 or self.high is not None

    @property
    def has_order(self) -> bool:
        query: Any = self.first.query
        return bool(effective_ordering(query))

    @property
    def is_of_groups(self) -> bool:
        """Whether rows are groups, of which several databases may have the same."""
        return is_grouped(self.first.query)

    @property
    def may_have_twice(self) -> bool:
        """Whether two databases may have what is to come once."""
        query: Any = self.first.query
        if query.combinator == "union" and not query.combinator_all:
            return not self.is_of_instances
        return bool(query.distinct_fields or (query.distinct and not selects_primary_key(self.first)))

    @property
    def is_of_instances(self) -> bool:
        """Whether what is combined are whole instances of one table; of values, those with their primary keys."""
        return are_instances_of_one_table(self.first.query) and selects_primary_key(self.first)

    @property
    def is_whole(self) -> bool:
        """Whether what each database counts, or aggregates, is no part of what another one does."""
        return not (self.is_of_groups or self.may_have_twice)

    def refusal(self, verb: str, problem: object, instead: str = "") -> errors.UnsupportedQuerySet:
        aliases = ", ".join(map(repr, self.querysets))
        return errors.unsupported(
            verb, self.label, f"over several databases ({aliases}) {problem}", instead or "Ask each by using(alias)."
        )

    def question(
        self,
        verb: str,
        parts: Mapping[str, tuple[Rows, Any]],
        join: Callable[[Mapping[str, Any]], Any],
        is_enough: Callable[[Any], bool] = lambda answer: False,
    ) -> Question:
        return Question(verb, parts, join, is_enough, self.timeout, self.partial, self.tell)

    # --- The questions ------------------------------------------------------------------

    def rows(self, verb: str = "iteration") -> Question:
        """Ask for the rows."""
        self.refuse_what_sees_all(verb)
        if self.is_of_groups:
            try:
                groups = regrouping(self.querysets, self.low, self.high)
            except (NotComparable, CannotRecombine) as problem:
                raise self.refusal(verb, problem) from problem
            return self.question(
                "fetch", {alias: (rows, fetch) for alias, rows in groups.querysets.items()}, groups.join
            )
        found, terms, apart = self.sorted(verb)
        parts = {alias: (self.limited(each.queryset), fetch) for alias, each in found.items()}

        def join(answers: Mapping[str, list[Any]]) -> list[Any]:
            compared = [*(term.comparison for term in terms), *(() if apart is None else apart.comparisons)]
            refuse_unknown(compared, answers)
            pages = [found[alias].page(rows) for alias, rows in answers.items()]
            rows = joined(pages, terms) if apart is None else apart.join(pages, terms)
            return rows[self.low : self.high]

        return self.question("fetch", parts, join)

    def sorted(self, verb: str) -> tuple[dict[str, Sorted], list[Term], Apart | None]:
        """Return the rows of each database with what they are ordered by, how that compares, and what tells them apart
        where two databases may have the same.
        """
        try:
            apart = apart_of(self.querysets) if self.may_have_twice else None
            found, terms = sorted_rows(self.querysets)
            if apart is not None:
                ordered = [source_of(item.expression) for item in next(iter(found.values())).order]
                for place, (expression, comparison) in enumerate(zip(apart.selected, apart.comparisons, strict=True)):
                    if source_of(expression) not in ordered:  # by which they are told apart too
                        refuse_raw(f"column {place + 1}", comparison)
        except NotComparable as problem:
            raise self.refusal(
                verb,
                f"it is ordered, or distinct, by what they may compare otherwise: {problem}",
                "Order by other columns, or text by a collation that all have, such as Collate(name, 'C').",
            ) from problem
        return found, terms, apart

    def count(self, verb: str = "count") -> Question:
        """Ask how many rows there are."""
        if not self.is_whole:
            rows = self.rows(verb)
            return self.question(verb, rows.parts, lambda answers: len(rows.join(answers)))
        self.refuse_what_sees_all(verb)
        parts = {alias: (self.limited(rows), Call("count")) for alias, rows in self.querysets.items()}

        def join(answers: Mapping[str, int]) -> int:
            number = sum(answers.values())
            return max(0, (number if self.high is None else min(number, self.high)) - self.low)

        return self.question(verb, parts, join)

    def exists(self) -> Question:
        """Ask whether there is any row."""
        if self.low or not self.is_whole:
            # An order decides nothing here, and count() of some ordered unions fails (Django's own).
            fan = replace(self, querysets={alias: rows.order_by() for alias, rows in self.querysets.items()})
            count = (fan if self.is_whole else self).count("exists")
            return self.question("exists", count.parts, lambda answers: bool(count.join(answers)))
        self.refuse_what_sees_all("exists")
        parts = {alias: (self.limited(rows), Call("exists")) for alias, rows in self.querysets.items()}
        return self.question("exists", parts, lambda answers: any(answers.values()), bool)

    def in_bulk(self, id_list: Any, field_name: str) -> Question:
        """Ask for rows by their keys."""
        self.refuse_what_sees_all("in_bulk")
        keys = None if id_list is None else tuple(id_list)
        parts = {alias: (rows, Call("in_bulk", keys, field_name=field_name)) for alias, rows in self.querysets.items()}

        def join(answers: Mapping[str, dict[Any, Any]]) -> dict[Any, Any]:
            found: dict[Any, Any] = {}
            homes: dict[Any, str] = {}
            for alias, rows in answers.items():
                for key, row in rows.items():
                    if key in found:
                        raise self.first.model.MultipleObjectsReturned(
                            f"in_bulk() found {self.label} with {field_name} {describe_key(key)} on {homes[key]!r} and "
                            f"on {alias!r}."
                        )
                    found[key], homes[key] = row, alias
            return found

        return self.question("in_bulk", parts, join)

    def aggregate(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Question:
        """Ask for parts of aggregates."""
        self.refuse_what_sees_all("aggregate")
        if self.is_sliced or not self.is_whole:
            raise self.refusal(
                "aggregate",
                "rows of a slice, of a distinct() or of groups are not those of each database",
                "Aggregate what comes of it, or drop these.",
            )
        given = dict(kwargs)
        for each in args:
            try:
                name = each.default_alias
            except (AttributeError, TypeError):
                raise TypeError("Complex aggregates require an alias") from None
            if name in given:
                raise TypeError(
                    f"The named annotation '{name}' conflicts with the default name for another annotation."
                )
            given[name] = each
        vendor = connections[next(iter(self.querysets))].vendor
        aggregates: dict[str, Recombined] = {}
        compared: list[_Resolved] = []
        asked: dict[str, Any] = {}
        for name, expression in given.items():
            if not hasattr(expression, "resolve_expression"):
                raise TypeError("QuerySet.aggregate() received non-expression(s): " + f"{expression}.")
            comparing = _Resolved(name, expression, self.querysets)
            compared.append(comparing)
            first = next(iter(comparing.resolved().values()))  # an error of the caller's is theirs, here
            try:
                found = aggregates[name] = recombined(name, expression, first, vendor, comparing)
            except CannotRecombine as problem:
                raise self.refusal("aggregate", problem) from problem
            asked.update({f"{name}_{number}": part for number, part in enumerate(found.parts)})
        names = {name: [f"{name}_{number}" for number in range(len(each.parts))] for name, each in aggregates.items()}
        parts = {alias: (rows, Call("aggregate", **asked)) for alias, rows in self.querysets.items()}

        def join(answers: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
            for each in compared:
                each.answered.update(answers)
            try:
                return {
                    name: each.whole([tuple(answer[part] for part in names[name]) for answer in answers.values()])
                    for name, each in aggregates.items()
                }
            except NotComparable as problem:
                raise self.refusal("aggregate", problem) from problem

        return self.question("aggregate", parts, join)

    # --- Streams ------------------------------------------------------------------------

    def streamed(self, verb: str, pages_of: Callable[[Rows], Iterator[Any]]) -> Iterator[Iterable[Any]]:
        """Yield the rows, some and then some, each database's read page by page as ``pages_of`` gives them."""
        self.refuse_what_sees_all(verb)
        found, terms, apart = self.sorted(verb)
        if apart is not None:
            return iter([self.rows(verb).answered()])
        streams = []
        for alias, each in found.items():
            with named(alias):
                streams.append(_paged(alias, each, pages_of(self.limited(each.queryset))))
        found_rows = merged(streams, terms) if terms else in_turn(streams)
        return cut_out(map(listed, found_rows), self.low, self.high) if self.is_sliced else found_rows

    # --- What they have in common -------------------------------------------------------

    def limited(self, queryset: Rows) -> Rows:
        """Have as much of a database's rows as a slice may have."""
        if self.high is not None:
            queryset.query.set_limits(high=self.high)
        return queryset

    def refuse_what_has_no_chunks(self, verb: str) -> None:
        """Refuse what is not made of the rows that each database has of it."""
        if self.is_sliced or not self.is_whole:
            raise self.refusal(
                verb,
                "rows of a slice, of a distinct() or of groups are not those of each database",
                "Drop these, or filter(pk__in=...) the rows that are meant.",
            )
        self.refuse_what_sees_all(verb)

    def refuse_what_sees_all(self, verb: str) -> None:
        """Refuse what depends on rows of other databases."""
        query: Any = self.first.query
        expressions = [query.where, *query.annotations.values(), *query.order_by]
        if any(map(_has_window, expressions)):
            raise self.refusal(verb, WINDOW[0].replace("a chunk is only", "each database has only"), WINDOW[1])
        for each in query.combined_queries:
            if each.is_sliced or each.distinct or is_grouped(each):
                raise self.refusal(verb, "a union of slices, of groups or of what is distinct is not that of all rows")
        if query.combinator in ("intersection", "difference") and not self.is_of_instances:
            raise self.refusal(
                verb, f"values of {query.combinator}() may be on another database", "Combine whole instances."
            )


def _has_window(expression: Any) -> bool:
    # Of what is not resolved yet, contains_over_clause of the whole fails at the first F(). Not in a subquery.
    if getattr(expression, "contains_over_clause", False):
        return True
    sources: Any = () if isinstance(expression, Query) else getattr(expression, "get_source_expressions", tuple)()
    return any(map(_has_window, sources))


def _has_aggregate(expression: Any) -> bool:
    # What a name stands for is one of each row, in a query within.
    if isinstance(expression, Aggregate | Ref):
        return isinstance(expression, Aggregate)
    return any(map(_has_aggregate, expression.get_source_expressions()))


def fetch(rows: Any, clock: Stopwatch) -> tuple[list[Any], int]:
    """The rows, as the class of the queryset has them."""
    if getattr(rows, "_fills_plainly", bool)():
        return fill_cache(rows, clock)
    with clock("database"):
        found = list(rows)
    return found, len(found)


@dataclass(frozen=True, slots=True)
class Apart:
    """How what several databases have comes once."""

    #: Joins pages.
    join: Callable[[Sequence[Page], Sequence[Term]], list[Any]]
    #: How the columns compare that tell rows apart.
    comparisons: Sequence[Comparison] = ()
    #: These columns, on the first database.
    selected: Sequence[Any] = ()


def apart_of(querysets: Mapping[str, Rows]) -> Apart:
    """Return what joins the rows of databases that may have the same ones."""
    first = next(iter(querysets.values()))
    query: Any = first.query
    if query.distinct_fields:
        number = len(query.distinct_fields)
        if len(effective_ordering(query)) < number:
            raise NotComparable("it is distinct by columns that it is not ordered by")
        return Apart(lambda pages, terms: _once_by_order(pages, terms, number))
    if not issubclass(first._iterable_class, VALUES):
        raise NotComparable("it is not known what tells its rows apart")
    selects = {alias: _selected(alias, queryset) for alias, queryset in querysets.items()}
    one = next(iter(selects.values()))
    comparisons = [
        comparison_of(f"column {place + 1}", {alias: each[place] for alias, each in selects.items()})
        for place in range(len(one))
    ]
    return Apart(lambda pages, terms: _once(pages, terms, comparisons), comparisons, one)


def _selected(alias: str, queryset: Rows) -> list[Any]:
    query: Any = queryset.query.clone()
    while query.combinator:
        names = names_of(query)
        query = query.combined_queries[0].clone()
        if names and not query.values_select:  # values() of a union are those of its members
            query.set_values(names)
    compiler = query.get_compiler(alias)
    compiler.setup_query()
    return [expression for expression, *_ in compiler.select]


def _once(pages: Sequence[Page], terms: Sequence[Term], comparisons: Sequence[Comparison]) -> list[Any]:
    # Told apart by the order too: SQL has what a distinct query is ordered by among what it tells rows apart by.
    rows = [row for page, _ in pages for row in page]
    values = [
        tuple(row.values()) if isinstance(row, dict) else row if isinstance(row, tuple) else (row,) for row in rows
    ]
    columns = [list(column) for column in zip(*values, strict=True)] or [[] for _ in comparisons]
    order = [[value for _, known in pages for value in known[place]] for place in range(len(terms))]
    keys, _ = sort_keys([[*columns, *order]], [*map(Term, comparisons), *terms])
    first = dict(zip(reversed(keys[0]), reversed(range(len(rows))), strict=True))
    places = sorted(first.values())
    once = [rows[place] for place in places], [[column[place] for place in places] for column in order]
    return joined([once], terms)


def _once_by_order(pages: Sequence[Page], terms: Sequence[Term], number: int) -> list[Any]:
    keys, backwards = sort_keys([columns for _, columns in pages], terms)
    heads, _ = sort_keys([columns[:number] for _, columns in pages], terms[:number])
    rows = [row for page, _ in pages for row in page]
    together = list(zip(rows, (head for known in heads for head in known), strict=True))
    seen: set[Any] = set()
    found = []
    for row, head in in_order(together, [key for known in keys for key in known], backwards=backwards):
        if head not in seen:
            seen.add(head)
            found.append(row)
    return found


def _paged(alias: str, rows: Sorted, pages: Iterator[Any]) -> Iterator[Page]:
    while True:
        with named(alias):
            page = next(pages, None)
            if page is None:
                return
            found, columns = rows.page(page)
        yield found if isinstance(found, list) else _Made(alias, found), columns


@dataclass(frozen=True, slots=True)
class _Made:
    """Rows that are made while they are iterated over; what goes wrong then tells of which database they are."""

    alias: str
    rows: Any

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Any]:
        with named(self.alias):
            yield from self.rows


def in_turn(streams: Sequence[Iterator[Page]]) -> Iterator[Iterable[Any]]:
    """Yield a page of each stream in turn, as they have no order."""
    left = list(streams)
    while left:
        for stream in list(left):
            page = next(stream, None)
            if page is None:
                left.remove(stream)
            else:
                yield page[0]


def cut_out(lists: Iterator[list[Any]], low: int, high: int | None) -> Iterator[list[Any]]:
    """Yield what a slice has of the rows in these lists."""
    passed = 0
    for rows in lists:
        end = passed + len(rows)
        if end > low:
            found = rows[max(0, low - passed) : None if high is None else max(0, high - passed)]
            if found:
                yield found
        passed = end
        if high is not None and passed >= high:
            return


def pages(rows: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Yield rows in lists of so many."""
    while page := list(islice(rows, size)):
        yield page


@dataclass(frozen=True, slots=True)
class _Resolved:
    """Tells, if asked, how the values of an aggregate compare on the databases that have answered."""

    name: str
    expression: Any
    querysets: Mapping[str, Rows]
    answered: set[str] = field(default_factory=set)

    def resolved(self) -> dict[str, Any]:
        found = {}
        for alias, queryset in self.querysets.items():
            query: Any = queryset.query.clone()
            found[alias] = self.expression.resolve_expression(query, allow_joins=True, reuse=None, summarize=True)
            if not found[alias].contains_aggregate:
                raise TypeError(f"{self.name} is not an aggregate expression")
            source = found[alias]
            if isinstance(source, Aggregate) and any(map(_has_aggregate, source.source_expressions)):
                raise FieldError(f"Cannot compute {self.name}: it is an aggregate of an aggregate")
        return found

    def __call__(self) -> Comparison:
        there = {alias: each for alias, each in self.resolved().items() if alias in self.answered}
        comparison = comparison_of(repr(self.name), there)
        refuse_unknown([comparison], there)
        return comparison
