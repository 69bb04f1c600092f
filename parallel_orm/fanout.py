"""across(): a queryset over several databases, asked at once and answered as one.

It is the queryset that it was made of, with its own class and all of its methods: what each database is asked for is
that queryset ``using()`` it. What is defined here is what becomes of the answers; what needs one database is refused.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

from asgiref.sync import sync_to_async
from django.db import connections, router
from django.db.models import Model, QuerySet
from django.db.models.sql import Query

from parallel_orm import errors, writes
from parallel_orm.asking import PendingAcross, Question
from parallel_orm.options import Options, from_settings
from parallel_orm.outcomes import named, note
from parallel_orm.plan import Plan, plan_walk
from parallel_orm.questions import Fan, pages
from parallel_orm.report import Report
from parallel_orm.walk import awaited_one_by_one, walk

if TYPE_CHECKING:
    from parallel_orm.queryset import ParallelQuerySet

    _Base = ParallelQuerySet[Any, Any]
else:
    _Base = object  # which is mixed with the class of a queryset

Rows = QuerySet[Any, Any]

#: The name of all databases that have a model.
ALL = "all"
#: Rows that ``iterator()`` reads at a time, as Django's does.
PAGE = 2_000


@dataclass(frozen=True)
class Across:
    """Which databases, and how they are asked."""

    aliases: tuple[str, ...]
    partial: bool = False
    timeout: float | None = None
    writable: bool = False

    def __str__(self) -> str:
        return ", ".join(map(repr, self.aliases))


def across(queryset: Rows, aliases: tuple[Any, ...], *, partial: Any, timeout: Any, writable: Any) -> Any:
    """Return a queryset over several databases."""
    for name, value in (("partial", partial), ("writable", writable)):
        if not isinstance(value, bool):
            raise errors.not_a_bool(name, value)
    if timeout is not None:
        refuse_no_timeout(timeout)
    found = resolved(aliases, queryset.model)
    rows: Any = queryset.all()
    plain: Any = getattr(type(rows), "plain_class", type(rows))
    rows.__class__ = class_across(plain)
    rows._across = Across(found, partial, timeout, writable)
    rows._query = unasked(rows.query)
    return rows


def refuse_no_timeout(value: Any) -> None:
    """Refuse what is no number of seconds."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise errors.bad_timeout(value)


def resolved(names: tuple[Any, ...], model: type[Model]) -> tuple[str, ...]:
    """Return the aliases that are meant, which are of one vendor, and each there once."""
    groups, found = from_settings().GROUPS, list[str]()
    for name in names:
        if not isinstance(name, str):
            raise errors.no_alias(name)
        if name in connections.settings:
            found.append(name)
        elif name == ALL:
            found += [alias for alias in connections.settings if router.allow_migrate_model(alias, model)]
        elif name in groups:
            found += groups[name]
        else:
            raise errors.unknown_alias(name, [*connections.settings, *groups, ALL])
    if not found:
        raise errors.no_aliases(names, model._meta.label)
    twice = sorted({alias for alias in found if found.count(alias) > 1})
    if twice:
        raise errors.alias_twice(twice)
    vendors = {alias: connections[alias].vendor for alias in found}
    if len(set(vendors.values())) > 1:
        raise errors.several_vendors(vendors)
    return tuple(found)


# --- What cannot be compiled ----------------------------------------------------------------


class QueryAcross(Query):
    """The query of a queryset over several databases: nobody runs it as if it were that of one."""

    def get_compiler(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused."""
        raise self._refusal()

    def resolve_expression(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: each database would look for what all of them have."""
        raise self._refusal()

    def _refusal(self) -> errors.UnsupportedQuerySet:
        return errors.UnsupportedQuerySet(
            f"A queryset of {self.model and self.model._meta.label} over several databases cannot go to one, nor into "
            "the query of another queryset. Take using(alias) of it, or list its values first."
        )

    def sql_with_params(self) -> tuple[str, tuple[Any, ...]]:
        """Return what each database is asked for, for a look at it."""
        return asked(self).sql_with_params()


@cache
def _query_class(plain: Any) -> Any:
    return QueryAcross if plain is Query else type(f"{plain.__name__}Across", (QueryAcross, plain), {"plain": plain})


def unasked(query: Query) -> Query:
    """Return a query that nobody can run."""
    copy = query.clone()
    if not isinstance(copy, QueryAcross):
        kind: Any = type(copy)
        copy.__class__ = _query_class(kind)
    return copy


def asked(query: Query) -> Query:
    """Return a query as one database is asked for it."""
    return _to_be_asked(query.clone())


def _to_be_asked(copy: Any) -> Query:
    if isinstance(copy, QueryAcross):
        copy.__class__ = vars(type(copy)).get("plain", Query)
    if copy.combined_queries:
        copy.combined_queries = tuple(map(asked, copy.combined_queries))
    return copy  # type: ignore[no-any-return]


# --- The queryset ---------------------------------------------------------------------------


@cache
def class_across(plain: Any) -> Any:
    """Return the class of a queryset over several databases, of the class that it has on one."""
    return type(f"{plain.__name__}Across", (AcrossMixin, plain), {"plain_class": plain, "__doc__": AcrossMixin.__doc__})


def _rebuilt(plain: Any) -> Any:
    kind = class_across(plain)
    return kind.__new__(kind)


class AcrossMixin(_Base):
    """A queryset over several databases. See :meth:`~parallel_orm.ParallelQuerySet.across`."""

    plain_class: type[Any]
    _across: Across
    #: The queryset whose method makes clones, which tell it what is missing.
    _told: Any = None
    _tells: bool = False

    @property
    def missing(self) -> Mapping[str, BaseException]:
        """Which databases did not answer the last time that this queryset was used, and why; with ``partial=True``."""
        found: Mapping[str, BaseException] = self.__dict__.get("_missing", {})
        return dict(found)

    @property
    def aliases(self) -> tuple[str, ...]:
        """The databases that are asked, in their order."""
        return self._across.aliases

    @property
    def db(self) -> NoReturn:
        """Refused: there is no one database."""
        raise self._refusal("this method", "it is over several databases, and this needs one")

    def on(self, alias: str) -> Any:
        """Return the same queryset on one of its databases."""
        rows: Any = self._clone()
        rows.__class__ = self.plain_class
        rows._query, rows._db = _to_be_asked(rows.query), alias
        for name in ("_across", "_told", "_missing", "_tells"):
            rows.__dict__.pop(name, None)
        # Of a related manager: the instance that it is of is no other database's, which Django refuses to set.
        rows._known_related_objects = {
            relation: {key: instance for key, instance in known.items() if instance._state.db == alias}
            for relation, known in rows._known_related_objects.items()
        }
        return rows

    def using(self, alias: Any) -> Any:
        """Return the same queryset on one database, which must be named."""
        if alias is None:
            raise self._refusal("using", "it is over several databases, and None names none of them")
        return self.on(alias)

    # Python asks the class that is derived from the other one's first: so these are asked, whichever side they are on.

    def __or__(self, other: Any) -> Any:
        self._refuse_others("__or__", other)
        return super().__or__(other)

    def __and__(self, other: Any) -> Any:
        self._refuse_others("__and__", other)
        return super().__and__(other)

    def __xor__(self, other: Any) -> Any:
        self._refuse_others("__xor__", other)
        return super().__xor__(other)

    def __ror__(self, other: Any) -> NoReturn:
        raise self._not_combined("__or__", other)

    def __rand__(self, other: Any) -> NoReturn:
        raise self._not_combined("__and__", other)

    def __rxor__(self, other: Any) -> NoReturn:
        raise self._not_combined("__xor__", other)

    def _combinator_query(self, combinator: str, *others: Any, all: bool = False) -> Any:  # noqa: A002 - Django's name
        for other in others:
            self._refuse_others(combinator, other)
        return super()._combinator_query(combinator, *others, all=all)  # type: ignore[misc]

    def _refuse_others(self, verb: str, other: Any) -> None:
        # A queryset that is bound to no database is asked of each of these.
        across = getattr(other, "_across", None)
        where = getattr(other, "_db", None) if across is None else across.aliases
        if where is not None and where != self.aliases:
            raise self._not_combined(verb, other)

    def _not_combined(self, verb: str, other: Any) -> errors.UnsupportedQuerySet:
        across, alias = getattr(other, "_across", None), getattr(other, "_db", None)
        where = str(across) if across is not None else "the default database" if alias is None else repr(alias)
        return self._refusal(
            verb,
            f"it is over several databases, and the other queryset is on {where}",
            "Take across() of both, of the same databases; or list both, and add the lists.",
        )

    def _clone(self) -> Any:
        clone: Any = super()._clone()  # type: ignore[misc]
        clone._across = self._across
        if self._tells:
            clone._told = self
        elif self._told is not None and self._told._tells:  # the clone of a clone, within one method
            clone._told = self._told
        return clone

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt, (self.plain_class,), self.__getstate__()

    @contextmanager
    def _told_by_clones(self) -> Iterator[None]:
        """Within: what clones of this queryset miss, it misses."""
        self._tells = True
        try:
            yield
        finally:
            self.__dict__.pop("_tells", None)

    def _tell(self, missing: Mapping[str, BaseException]) -> None:
        self.__dict__["_missing"] = dict(missing)
        if self._told is not None:
            self._told._tell(missing)

    def _fan(self, timeout: float | None = None, tell: Any = None) -> Fan:
        query: Any = self.query
        across = self._across
        querysets = {}
        for alias in across.aliases:
            querysets[alias] = rows = self.on(alias)
            rows.query.clear_limits()
        timeout = timeout or across.timeout
        return Fan(querysets, query.low_mark, query.high_mark, timeout, across.partial, tell or self._tell)

    def _refusal(self, verb: str, problem: str, instead: str = "Take using(alias).") -> errors.UnsupportedQuerySet:
        return errors.unsupported(verb, self.model._meta.label, f"{problem} ({self._across})", instead)

    # --- Reading ------------------------------------------------------------------------

    def __getitem__(self, place: Any) -> Any:
        """As Django's, over all databases."""
        if isinstance(place, slice) and place.step is None:  # a queryset, which will have its own to tell
            return super().__getitem__(place)
        with self._told_by_clones():
            return super().__getitem__(place)

    def _question(self, verb: str, timeout: float | None = None) -> Question:
        fan = self._fan(timeout)
        if verb == "count":
            return fan.count()
        return fan.exists() if verb == "exists" else fan.rows(verb)

    def _pending(self, verb: str, work: Any, timeout: float | None = None) -> PendingAcross:
        return self._question(verb, timeout).asked()

    def _fills_plainly(self) -> bool:
        return True

    def _fetch_all(self) -> None:
        if self._result_cache is None:  # which a started fetch has filled
            self._result_cache = self._question("fetch").answered()
        self._prefetch_done = True

    def count(self) -> int:
        """Add up what each database counts. Of groups, and of distinct values, these are asked for and counted."""
        if self._result_cache is not None:
            return len(self._result_cache)
        started = self._started()
        return int(started["count"].result() if "count" in started else self._question("count").answered())

    def exists(self) -> bool:
        """Ask whether any database has a row; the first that has ends the others' queries."""
        if self._result_cache is not None:
            return bool(self._result_cache)
        started = self._started()
        for verb in ("exists", "count"):
            if verb in started:
                return bool(started[verb].result())
        return bool(self._question("exists").answered())

    def get(self, *args: Any, **kwargs: Any) -> Any:
        """Return the one row that one of the databases has; two on two of them are ``MultipleObjectsReturned``."""
        self._refuse_to_lock()
        with self._told_by_clones():
            return super().get(*args, **kwargs)

    def _refuse_to_lock(self) -> None:
        query: Any = self.query
        if query.select_for_update:
            raise self._refusal("get", "it locks rows, of which other databases may have more", "Take using(alias).")

    def first(self) -> Any:
        """As Django's, over all databases."""
        with self._told_by_clones():
            return super().first()

    def last(self) -> Any:
        """As Django's, over all databases."""
        with self._told_by_clones():
            return super().last()

    def earliest(self, *fields: Any) -> Any:
        """As Django's, over all databases."""
        with self._told_by_clones():
            return super().earliest(*fields)

    def latest(self, *fields: Any) -> Any:
        """As Django's, over all databases."""
        with self._told_by_clones():
            return super().latest(*fields)

    def contains(self, obj: Any) -> bool:
        """As Django's, over all databases."""
        with self._told_by_clones():
            return super().contains(obj)

    def in_bulk(self, id_list: Any = None, *, field_name: str = "pk") -> dict[Any, Any]:
        """As Django's, over all databases; a key that two of them have is ``MultipleObjectsReturned``."""
        return dict(self._in_bulk(id_list, field_name).answered())

    def _in_bulk(self, id_list: Any, field_name: str) -> Question:
        if self.query.is_sliced:
            raise TypeError("Cannot use 'limit' or 'offset' with in_bulk().")
        return self._fan().in_bulk(id_list, field_name)

    def aggregate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Recombine what each database computes: Sum, Min, Max, Count, Avg, StdDev and Variance."""
        return dict(self._fan().aggregate(args, kwargs).answered())

    # Django's async methods: what to ask is found out in the thread that has the connections, as that may look into
    # their catalogues; the event loop waits for the answer, beside whatever else it waits for.

    def __aiter__(self) -> AsyncIterator[Any]:
        """As Django's; the queries run in the background."""

        async def rows() -> AsyncIterator[Any]:
            if self.__dict__["_result_cache"] is None and not self._started():
                self._result_cache = await self._await(self._question, "fetch")
            await sync_to_async(self._fetch_all)()
            for row in self:
                yield row

        return rows()

    async def acount(self) -> int:
        """As :meth:`count`; runs beside what else the event loop is waiting for."""
        if self.__dict__["_result_cache"] is not None or self._started():
            return await sync_to_async(self.count)()
        return int(await self._await(self._question, "count"))

    async def aexists(self) -> bool:
        """As :meth:`exists`; runs beside what else the event loop is waiting for."""
        if self.__dict__["_result_cache"] is not None or self._started():
            return await sync_to_async(self.exists)()
        return bool(await self._await(self._question, "exists"))

    async def _await(self, ask: Callable[..., Question], *args: Any) -> Any:
        def asked() -> PendingAcross:
            return ask(*args).asked()

        return await (await sync_to_async(asked)())

    async def aget(self, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`get`; runs beside what else the event loop is waiting for."""
        if not self.plain_class._is_plain("get"):
            return await sync_to_async(self.get)(*args, **kwargs)
        return await (await sync_to_async(self.start_get)(*args, **kwargs))

    async def afirst(self) -> Any:
        """As :meth:`first`; runs beside what else the event loop is waiting for."""
        if self.__dict__["_result_cache"] is not None or self._started() or not self.plain_class._is_plain("first"):
            return await sync_to_async(self.first)()
        return await (await sync_to_async(self.start_first)())

    async def alast(self) -> Any:
        """As :meth:`last`; runs beside what else the event loop is waiting for."""
        if self.query.is_sliced or not self.plain_class._is_plain("last"):
            return await sync_to_async(self.last)()  # which refuses a slice, in Django's words
        return await (await sync_to_async(self.start_last)())

    async def aaggregate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As :meth:`aggregate`; runs beside what else the event loop is waiting for."""
        return dict(await (await sync_to_async(self.start_aggregate)(*args, **kwargs)))

    async def ain_bulk(self, id_list: Any = None, *, field_name: str = "pk") -> dict[Any, Any]:
        """As :meth:`in_bulk`; runs beside what else the event loop is waiting for."""
        return dict(await self._await(self._in_bulk, id_list, field_name))

    def explain(self, *, format: str | None = None, **options: Any) -> str:  # noqa: A002 - Django's name
        """Return what each database says, one below the other."""
        fan, told = self._fan(), list[str]()
        for alias, rows in fan.querysets.items():
            with named(alias):
                told.append(f"{alias}:\n{fan.limited(rows).explain(format=format, **options)}")
        return "\n".join(told)

    def iterator(self, chunk_size: int | None = None) -> Iterator[Any]:
        """As Django's, on each database, merged. One after the other is read; ``chunked_iterator()`` reads ahead."""
        if chunk_size is None and self._prefetch_related_lookups:  # type: ignore[attr-defined]
            raise ValueError("chunk_size must be provided when using QuerySet.iterator() after prefetch_related().")
        if chunk_size is not None and chunk_size <= 0:
            raise ValueError("Chunk size must be strictly positive.")
        size = chunk_size or PAGE
        return (
            row for rows in self._streamed("iterator", lambda rows: pages(rows.iterator(size), size)) for row in rows
        )

    async def aiterator(self, chunk_size: int = PAGE) -> AsyncIterator[Any]:
        """As :meth:`iterator`; reads in the thread that Django's async methods use."""
        rows = self.iterator(chunk_size)

        def lists() -> Generator[list[Any]]:
            yield from pages(rows, chunk_size)

        async for row in awaited_one_by_one(lists()):
            yield row

    def _streamed(self, verb: str, pages_of: Callable[[Rows], Iterator[Any]]) -> Iterator[Iterable[Any]]:
        fan = self._fan()
        if self._across.partial:
            raise self._refusal(
                verb, "partial=True cannot tell what is missing before its rows come", "Loop over the queryset itself."
            )
        if fan.is_of_groups:
            return iter([fan.rows(verb).answered()])
        return fan.streamed(verb, pages_of)

    def _walk(self, verb: str, chunk_size: int | None, consistent: bool) -> Generator[Any]:
        options = Options(chunk_size=chunk_size, consistent=consistent)

        def pages_of(rows: Rows) -> Iterator[Any]:
            return walk(plan_walk(rows, options, verb))

        def lists() -> Generator[Any]:
            yield from found

        found = self._streamed(verb, pages_of)
        return lists()

    def explain_plan(self, chunk_size: int | None = None, *, walk: bool = False, **knobs: Any) -> Any:
        """Return the plan of each database, in a dictionary by alias whose ``str()`` tells them all."""
        fan, plans = self._fan(), Plans()
        if not walk:
            fan.refuse_what_has_no_chunks("explain_plan")
        for alias, queryset in fan.querysets.items():
            rows: Any = fan.limited(queryset)
            with named(alias):
                plans[alias] = rows.explain_plan(chunk_size, walk=walk, **knobs)
        return plans

    # What is started answers when it is asked for.

    def start_get(self, *args: Any, **kwargs: Any) -> PendingAcross:
        """Start ``get()`` on all databases."""
        self._refuse_to_lock()
        rows: Any = self.filter(*args, **kwargs) if args or kwargs else self.all()
        query = rows.query
        if query.can_filter() and not query.distinct_fields:
            rows = rows.order_by()
        rows.query.set_limits(high=2)
        question: Question = rows._fan(tell=self._tell).rows("get")

        def one(answers: Mapping[str, Any]) -> Any:
            found = question.join(answers)
            if len(found) == 1:
                return found[0]
            name = self.model._meta.object_name
            if not found:
                raise self.model.DoesNotExist(f"{name} matching query does not exist.")
            raise self.model.MultipleObjectsReturned(f"get() returned more than one {name} -- it returned 2 or more!")

        return replace(question, verb="get", join=one).asked()

    def start_first(self, *, timeout: float | None = None) -> PendingAcross:
        """Start ``first()`` on all databases."""
        return self._start_outer(self if self.ordered else self.order_by("pk"), "first", timeout)

    def start_last(self, *, timeout: float | None = None) -> PendingAcross:
        """Start ``last()`` on all databases."""
        return self._start_outer(self.reverse() if self.ordered else self.order_by("-pk"), "last", timeout)

    def _start_outer(self, rows: Any, verb: str, timeout: float | None) -> PendingAcross:
        question: Question = rows.all()[:1]._fan(timeout, self._tell).rows(verb)

        def outer(answers: Mapping[str, Any]) -> Any:
            return next(iter(question.join(answers)), None)

        return replace(question, verb=verb, join=outer).asked()

    def start_aggregate(self, *args: Any, **kwargs: Any) -> PendingAcross:
        """Start ``aggregate()`` on all databases."""
        return self._fan().aggregate(args, kwargs).asked()

    def start_in_bulk(self, id_list: Any = None, *, field_name: str = "pk") -> PendingAcross:
        """Start ``in_bulk()`` on all databases."""
        return self._in_bulk(id_list, field_name).asked()

    # --- Writing ------------------------------------------------------------------------

    def update(self, **kwargs: Any) -> Any:
        """Update the rows of each database; return how many, by alias. Needs ``writable=True``.

        One database after the other, on the caller's connections, in their transactions if these are in any. They are
        not atomic together: an error has a note that says which are done.
        """
        return self._written("update", lambda rows: rows.update(**kwargs))

    def delete(self) -> Any:
        """Delete the rows of each database; return what Django returns, by alias. Else as :meth:`update`."""
        return self._written("delete", lambda rows: rows.delete())

    def _written(self, verb: str, write: Callable[[Any], Any]) -> dict[str, Any]:
        self.refuse_unwritable(verb)
        if self.query.is_sliced:
            write(self.on(self.aliases[0]))  # which refuses, in Django's words
        done: dict[str, Any] = {}
        for alias in self.aliases:
            try:
                done[alias] = write(self.on(alias))
            except BaseException as error:
                left = [each for each in self.aliases if each not in done and each != alias]
                note(error, f"on database {alias!r}; done before: {done or 'none'}; not begun: {left or 'none'}")
                raise
        self._result_cache = None
        return done

    def refuse_unwritable(self, verb: str) -> None:
        """Refuse to write where nobody said that it may be."""
        if not self._across.writable:
            raise self._refusal(
                verb,
                "it would write to several databases, which are not atomic together",
                "If that is meant: across(..., writable=True).",
            )

    def parallel_update(
        self, fn: Callable[[Any], Any], fields: Any = None, processes: int | None = None, **knobs: Any
    ) -> Report:
        """As on one database; chunks of all databases side by side, and one report. Needs ``writable=True``."""
        first, *others = self._to_be_written("parallel_update")
        return writes.update("parallel_update", first, fn, fields, processes, knobs, others)

    def parallel_delete(self, processes: int | None = None, **knobs: Any) -> Report:
        """As on one database; chunks of all databases side by side, and one report. Needs ``writable=True``."""
        first, *others = self._to_be_written("parallel_delete")
        return writes.delete("parallel_delete", first, processes, knobs, others)

    def _to_be_written(self, verb: str) -> list[Rows]:
        self.refuse_unwritable(verb)
        if not self.query.is_sliced:  # which is refused in Django's words
            self._fan().refuse_what_has_no_chunks(verb)
        return [self.on(alias) for alias in self.aliases]

    async def aupdate(self, **kwargs: Any) -> Any:
        """As :meth:`update`."""
        return await sync_to_async(self.update)(**kwargs)

    async def adelete(self) -> Any:
        """As :meth:`delete`."""
        return await sync_to_async(self.delete)()

    for _each in (update, delete, aupdate, adelete, parallel_update, parallel_delete):
        setattr(_each, "alters_data", True)  # noqa: B010 - as Django has it
    delete.queryset_only = True  # type: ignore[attr-defined]
    adelete.queryset_only = True  # type: ignore[attr-defined]
    parallel_delete.queryset_only = True  # type: ignore[attr-defined]
    del _each


def _refusing(name: str) -> Callable[..., Any]:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise self._refusal(name, "it is over several databases, and this goes to one")

    refuse.__name__, refuse.__doc__ = name, "Refused: goes to one database."
    refuse.alters_data = True  # type: ignore[attr-defined]
    return refuse


#: What makes or changes objects that are given, in one database.
FOR_ONE = ("create", "get_or_create", "update_or_create", "bulk_create", "bulk_update", "parallel_create")
for _name in (*FOR_ONE, "parallel_update_or_create", "raw"):
    setattr(AcrossMixin, _name, _refusing(_name))
    if _name != "raw":
        setattr(AcrossMixin, f"a{_name}", _refusing(f"a{_name}"))


class Plans(dict[str, Plan]):
    """The plan of each database, by alias; ``str()`` tells them all."""

    def __str__(self) -> str:
        told = []
        for alias, plan in self.items():
            with named(alias):
                told.append(str(plan))
        return "\n".join(told)
