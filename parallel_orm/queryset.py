"""ParallelQuerySet: the verbs, each telling the flow in a few lines."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar, TypeVarTuple, Unpack, cast

from django.core.exceptions import SynchronousOnlyOperation
from django.db.models import Model, QuerySet
from django.db.models.query import RawQuerySet
from django.db.models.sql import Query

from parallel_orm import errors, writes
from parallel_orm.background import NOTHING_STARTED, Background, Pending, start_read
from parallel_orm.family import NO_INITIAL, EachKnobs, MapCall, MapKnobs, ReduceKnobs, options_of
from parallel_orm.fanout import across
from parallel_orm.keeping import Nothing
from parallel_orm.options import OnError, Options, Progress
from parallel_orm.outcomes import Stopwatch
from parallel_orm.plan import Plan, plan_map, plan_walk, plan_whole
from parallel_orm.reading import Call, fill_cache
from parallel_orm.report import Report
from parallel_orm.results import AsyncStream, Results, Stream
from parallel_orm.walk import (
    ChunkRows,
    as_lists,
    awaited,
    awaited_call,
    awaited_one_by_one,
    one_by_one,
    postponed,
    walk,
)
from parallel_orm.work import Work
from parallel_orm.workers import Hook
from parallel_orm.writes import WriteKnobs

M = TypeVar("M", bound=Model, covariant=True)
Row = TypeVar("Row", covariant=True)
Result = TypeVar("Result")

if TYPE_CHECKING:
    _RawQuerySet = RawQuerySet[Any]
else:  # generic in the stubs alone
    _RawQuerySet = RawQuerySet


class _ResultCache:
    """Django's ``_result_cache``, which is what a background fetch fills.

    Reading it where a fetch is pending waits for the fetch, so that every way in which Django looks at a fetched
    queryset (iteration, ``len``, ``bool``, index, slice, ``count``, ``exists``, ``contains``, pickle, ``repr``, a
    template) answers from it. Setting it, as ``update()``, ``delete()`` and their like do, drops all that was started.
    """

    def __get__(self, queryset: Any, owner: type[Any] | None = None) -> Any:
        if queryset is None:
            return self
        state = queryset.__dict__
        cache = state.get("_result_cache")
        background = state.get("_background")
        if cache is None and background is not None and "fetch" in background:
            pending = background["fetch"]
            if pending.was_left or state.get("_filling") == threading.get_ident():
                return None
            if not queryset._fills_plainly():
                # It looks whether there are rows, and makes something of them when there were none.
                state["_filling"] = threading.get_ident()
                try:
                    queryset._fetch_all()
                finally:
                    state.pop("_filling", None)
                return state.get("_result_cache")
            cache = self.take(queryset, pending)
        return cache

    def take(self, queryset: Any, pending: Pending) -> Any:
        """Fill the cache with the answer."""
        cache = pending.result()
        state = queryset.__dict__
        state["_prefetch_done"] = True  # first, for another thread that finds the cache
        state["_result_cache"] = cache
        return cache

    def __set__(self, queryset: Any, cache: Any) -> None:
        queryset.__dict__["_result_cache"] = cache
        queryset.__dict__.pop("_background", None)

    def __delete__(self, queryset: Any) -> None:
        del queryset.__dict__["_result_cache"]
        queryset.__dict__.pop("_background", None)


# What is done in the background, below whatever a derived class makes of it: its own count() or _fetch_all() is called
# where the result is used, and once.


def count_rows(rows: Any, clock: Stopwatch) -> tuple[int, int]:
    """How many rows."""
    with clock("database"):
        return super(ParallelQuerySet, rows).count(), 0


def find_any(rows: Any, clock: Stopwatch) -> tuple[bool, int]:
    """Whether there is any row."""
    with clock("database"):
        return super(ParallelQuerySet, rows).exists(), 0


#: What each answers too, so that one of those that nobody has begun need not run.
ANSWERS = {"fetch": ("count", "exists"), "count": ("exists",), "exists": ()}


class _Startable:
    """What a queryset and a raw one have in common: a fetch that can be started."""

    _result_cache = _ResultCache()
    _background: Background | None = None

    @property
    def background(self) -> Mapping[str, Pending]:
        """What was started on this very queryset: a read-only mapping of ``"fetch"``, ``"count"`` and ``"exists"``."""
        return NOTHING_STARTED if self._background is None else self._background

    def start_fetch(self, *, timeout: float | None = None) -> Self:
        """Run this queryset's query in the background, prefetches with it, and return this queryset at once.

        Use the queryset afterwards as ever: iterate over it, index it, give it to a template; its ``count()``,
        ``exists()``, ``bool`` and slices are answered by the fetched rows without another query. The answer is as of
        this call: a later write of the caller's on this database waits for it. An exception of the query is raised
        where the result is used, with a note where it was started. ``prefetch_related`` lookups of one level run at
        the same time. In ``connection.queries`` and the debug toolbar the queries appear when the result is used.

        Starting twice starts once; on an evaluated queryset it does nothing. Where another connection could not give
        the answer of this one (in a transaction that has written, in a ``TestCase``, on SQLite in memory, with
        ``select_for_update()``...), the query runs within this call, and ``background["fetch"].reason`` says why.
        In a coroutine too; await the result by Django's async methods, or ``await queryset.background["fetch"]``.

        What is dropped without having been used is cancelled, and so is what is pending when its request ends; a
        queryset that is used after that asks anew.

        :param timeout: a deadline in seconds from this call: the query is then cancelled on the server, and its use
            raises :class:`~parallel_orm.errors.DeadlineExceeded`. Not applied to what runs on the caller's connection.
        :raises parallel_orm.errors.UnknownAlias: the queryset names a database that there is not.
        :raises parallel_orm.errors.InvalidOption: the timeout is no number above 0.
        """
        return self._start("fetch", fill_cache, timeout)

    def _fills_plainly(self) -> bool:
        """Tell whether no derived class does more, when the rows come, than to fetch them."""
        return True

    def _start(self, verb: str, work: Work, timeout: float | None, *answered_by: str) -> Self:
        if self.__dict__["_result_cache"] is not None:
            return self
        started = self._started()
        if started and any(name in started for name in (verb, *answered_by)):
            return self
        if self._background is None:
            self._background = Background()
        with self._background.holding(ANSWERS[verb]) as leader:
            leader.append(self._pending(verb, work, timeout))
        self._background.add(verb, leader[0])
        return self

    def _pending(self, verb: str, work: Work, timeout: float | None = None) -> Pending:
        queryset = cast("QuerySet[Any, Any]", self)
        query: Any = self.query  # type: ignore[attr-defined]
        stay = "empty" if isinstance(query, Query) and query.is_empty() else None
        return start_read(verb, plan_whole(queryset, work), timeout, stay)

    def _started(self) -> Mapping[str, Pending]:
        """What was started and answers: not where rows are there already, nor what a request left behind."""
        background = self._background
        if background is None or self.__dict__["_result_cache"] is not None:
            return NOTHING_STARTED
        background.forget_left()
        return background


class ParallelQuerySet(_Startable, QuerySet[M, Row]):
    """A queryset that can also be read in the background, walked in chunks, and mapped on all cores.

    Without one of its own verbs it is Django's queryset, with the same results by the same queries.
    """

    def start_count(self, *, timeout: float | None = None) -> Self:
        """Start ``SELECT COUNT(*)`` in the background and return this queryset at once; then use ``count()`` as ever.

        ``exists()`` is answered by it too. All else is as with :meth:`start_fetch`, which would answer it as well: a
        queryset whose fetch was started starts no count.
        """
        return self._start("count", count_rows, timeout, "fetch")

    def start_exists(self, *, timeout: float | None = None) -> Self:
        """Start the query of ``exists()`` in the background and return this queryset at once.

        All else is as with :meth:`start_fetch`; a queryset whose fetch or count was started starts nothing more.
        """
        return self._start("exists", find_any, timeout, "count", "fetch")

    def start_get(self, *args: Any, **kwargs: Any) -> Pending:
        """Start ``get(*args, **kwargs)`` in the background; its :class:`Pending` has the row, or raises what it raises.

        One query, as of this call. Where it runs, what it waits for and what waits for it are as with
        :meth:`start_fetch`. Of an evaluated queryset too, as Django asks then; only an ordered one has its first row.
        """
        return self._start_call("get", Call("get", *args, **kwargs))

    def start_first(self, *, timeout: float | None = None) -> Pending:
        """Start ``first()`` in the background; all else is as with :meth:`start_get`. ``timeout`` is a deadline."""
        return self._start_call("first", Call("first"), timeout)

    def start_last(self, *, timeout: float | None = None) -> Pending:
        """Start ``last()`` in the background; all else is as with :meth:`start_get`. ``timeout`` is a deadline."""
        return self._start_call("last", Call("last"), timeout)

    def start_aggregate(self, *args: Any, **kwargs: Any) -> Pending:
        """Start ``aggregate(*args, **kwargs)`` in the background; all else is as with :meth:`start_get`."""
        return self._start_call("aggregate", Call("aggregate", *args, **kwargs))

    def start_in_bulk(self, id_list: Any = None, *, field_name: str = "pk") -> Pending:
        """Start ``in_bulk()`` in the background; all else is as with :meth:`start_get`."""
        return self._start_call("in_bulk", Call("in_bulk", id_list, field_name=field_name))

    def _start_call(self, verb: str, work: Call, timeout: float | None = None) -> Pending:
        # Of a queryset that has its rows Django answers first() by these, where they have an order; all else it asks.
        if self.__dict__["_result_cache"] is None or verb != "first" or not self._rows_have_the_first():
            return self._pending(verb, work, timeout)
        rows = self

        def look(_: Any, clock: Stopwatch) -> tuple[Any, int]:
            return work(rows, clock)

        return start_read(verb, plan_whole(self, look), timeout, "evaluated")

    def count(self) -> int:
        """As Django's; answered without a query by a count or a fetch that was started."""
        started = self._started()
        return int(started["count"].result()) if "count" in started else super().count()

    def exists(self) -> bool:
        """As Django's; answered without a query by anything that was started."""
        started = self._started()
        if "exists" in started:
            return bool(started["exists"].result())
        if "count" in started and "fetch" not in started:
            return bool(started["count"].result())
        return super().exists()

    def _fills_plainly(self) -> bool:
        return type(self)._fetch_all is ParallelQuerySet._fetch_all

    def _fetch_all(self) -> None:
        if self._background is not None and "fetch" in (started := self._started()):
            _Startable._result_cache.take(self, started["fetch"])
        super()._fetch_all()

    # Django's async methods, which it runs one after the other in one thread: side by side in ours.

    def __aiter__(self) -> AsyncIterator[Row]:
        """As Django's; the query runs in the background."""
        if not self._is_plain("_fetch_all", "__iter__"):
            return super().__aiter__()

        async def rows() -> AsyncIterator[Row]:
            if self.__dict__["_result_cache"] is None:
                await self._filled()
            for row in self:
                yield row

        return rows()

    async def _filled(self) -> None:
        """Fill the cache; as with Django's, nothing else is left of it."""
        was_started = "fetch" in self._started()
        background: Any = self.start_fetch().background
        pending = background["fetch"]
        try:
            await pending
            self._result_cache  # noqa: B018 - takes the answer
        finally:
            if not was_started:
                background.forget("fetch", pending)

    async def acount(self) -> int:
        """As Django's; runs beside what else the event loop is waiting for."""
        started = self._started()
        if not self._is_plain("count") or self.__dict__["_result_cache"] is not None:
            return await super().acount()
        if "count" in started:
            return int(await started["count"])
        if "fetch" in started:
            return len(await started["fetch"])
        return int(await self._pending("count", count_rows))

    async def aexists(self) -> bool:
        """As Django's; runs beside what else the event loop is waiting for."""
        started = self._started()
        if not self._is_plain("exists") or self.__dict__["_result_cache"] is not None:
            return await super().aexists()
        for verb in ("exists", "fetch", "count"):
            if verb in started:
                return bool(await started[verb])
        return bool(await self._pending("exists", find_any))

    async def aget(self, *args: Any, **kwargs: Any) -> Row:
        """As Django's; runs beside what else the event loop is waiting for."""
        if not self._is_plain("get"):
            return await super().aget(*args, **kwargs)
        return cast("Row", await self.start_get(*args, **kwargs))

    async def afirst(self) -> Row | None:
        """As Django's; runs beside what else the event loop is waiting for."""
        if not self._is_plain("first"):
            return await super().afirst()
        if "fetch" in self._started() and self._rows_have_the_first():
            await self._filled()
        return cast("Row | None", await self.start_first())

    async def alast(self) -> Row | None:
        """As Django's; runs beside what else the event loop is waiting for."""
        if not self._is_plain("last"):
            return await super().alast()
        return cast("Row | None", await self.start_last())

    async def aaggregate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As Django's; runs beside what else the event loop is waiting for."""
        if not self._is_plain("aggregate"):
            return await super().aaggregate(*args, **kwargs)
        return cast("dict[str, Any]", await self.start_aggregate(*args, **kwargs))

    async def ain_bulk(self, id_list: Any = None, *, field_name: str = "pk") -> Any:
        """As Django's; runs beside what else the event loop is waiting for."""
        if not self._is_plain("in_bulk"):
            return await super().ain_bulk(id_list, field_name=field_name)
        return await self.start_in_bulk(id_list, field_name=field_name)

    @classmethod
    def _is_plain(cls, *methods: str) -> bool:
        """Tell whether no derived class made something of its own of these; that may do more than read."""
        ours = (QuerySet, ParallelQuerySet)
        return all(any(getattr(cls, name) is getattr(each, name) for each in ours) for name in methods)

    def _rows_have_the_first(self) -> bool:
        """Tell whether Django, once there are rows, takes first() from these; get() and last() always ask."""
        return self._is_plain("first") and bool(self.ordered)

    def across(
        self, *aliases: str, partial: bool = False, timeout: float | None = None, writable: bool = False
    ) -> Self:
        """Return this queryset over several databases, which are asked at once and answer as one.

        Lazy, and a queryset: ``filter``, ``order_by``, ``annotate``, ``values``, slices and methods of your own go on
        to each database. Rows come in the common order, of equal ones those of the alias named first first; without an
        order, alias by alias. ``count`` adds up, ``exists`` ends with the first yes, ``get`` of two rows on two
        databases is ``MultipleObjectsReturned``, aggregates and groups are recombined, a slice asks each database for
        as many rows as it may have of it. ``start_*``, walks and maps are over all. What would need one database, or
        rows of another one, is refused. Joins, subqueries and prefetches are each database's own.

        Rows know their database (``_state.db``), and ``save()`` goes there. Two rows of one primary key on two
        databases are equal to Django.

        :param aliases: databases of one kind, names of the setting ``GROUPS``, or ``"all"``: each that its routers let
            the model be on.
        :param partial: True: what fails on a database (an error of the database, a timeout) leaves its rows out, and
            ``missing`` of the queryset has the exception by its alias; where none answers, it is raised all the same.
        :param timeout: seconds for each database; a query that takes longer is cancelled, and raises
            :class:`~parallel_orm.errors.DeadlineExceeded`. Not applied to what runs on the caller's connection.
        :param writable: True: ``update()`` and ``delete()`` write to all, one after the other, and return
            ``{alias: what Django returns}``.
        :raises parallel_orm.errors.UnknownAlias: there is no such database or group.
        :raises parallel_orm.errors.InvalidOption: none was named, or one twice, or they are of several kinds.
        :raises parallel_orm.errors.UnsupportedQuerySet: when it is used: the answer cannot be had truthfully of several
            databases, such as an order that they, or Python, would compare otherwise.

        The error of a database names its alias; the queries of the others are cancelled.
        """
        return cast("Self", across(self, aliases, partial=partial, timeout=timeout, writable=writable))

    def raw(self, *args: Any, **kwargs: Any) -> ParallelRawQuerySet:
        """As Django's ``raw()``; what it returns can ``start_fetch()``, and refuses the other verbs."""
        return ParallelRawQuerySet.of(super().raw(*args, **kwargs))

    def chunked_iterator(self, chunk_size: int | None = None, *, consistent: bool = False) -> Iterator[Row]:
        """Walk the rows of ``list(self)``, in its order, in memory for two chunks, however many there are.

        Reads chunk by chunk, on the caller's connection in its transaction if it is in one, each chunk by a query of
        its own that starts where the last one ended: no server-side cursor, no ``OFFSET``. So it works in autocommit,
        behind a pooler in transaction mode, and on databases whose driver would load the whole result.
        ``select_related``, ``prefetch_related`` (a set of prefetches a chunk), ``only``, ``annotate``, ``values`` and
        ``values_list`` are as in the queryset. A slice lists its primary keys first, by Django's ``iterator()``.

        Where the loop takes its time over a chunk, the next one is read meanwhile in the background; not in a
        transaction, and not once the loop has written: the rows are those that would be read when they are asked for.

        Without an order the rows come by primary key (groups by what groups them). Otherwise in the queryset's own
        order, ties broken by primary key. Where that order cannot be compared column by column (an aggregate, a number
        that was rounded, JSON), and for a slice or a union, all primary keys are listed first. It does not fill the
        queryset's cache, and does not use it.

        While others write: a row that is there throughout, its ordering columns unchanged, comes exactly once. Rows
        that are added or deleted meanwhile may come or not; none that is added behind the last row of the beginning
        comes. A row whose ordering columns are changed meanwhile may come twice or not at all.

        :param chunk_size: rows a chunk. By default 2,000 at first, then as many as come to about 2 MB, between 100 and
            10,000. A chunk may be larger where a join repeats rows.
        :param consistent: True: all rows as of the first ``next()``, whatever others write. PostgreSQL only; a
            transaction on a connection of its own stays open for the length of the walk.
        :returns: an iterator; nothing is asked before its first ``next()``, then one query for each chunk, and one for
            the last key if there are several (at the beginning where the first column of the order may be NULL, and
            two). Two for each chunk where rows do not bring their key. For what is cut by a list of keys, one query for
            the list and one for each chunk.
        :raises parallel_orm.errors.UnsupportedQuerySet: the queryset cannot be walked truthfully: windows, an order at
            random, a union of other things than instances, groups in an order that cannot be held.
        :raises parallel_orm.errors.TransactionRefused: ``consistent=True`` in a transaction that has written.
        :raises parallel_orm.errors.InvalidOption: ``chunk_size`` is no whole number of at least 1.
        """
        return one_by_one(self._walk("chunked_iterator", chunk_size, consistent))

    def chunks(self, chunk_size: int | None = None, *, consistent: bool = False) -> Iterator[list[Row]]:
        """Walk as :meth:`chunked_iterator` does, and return the rows of each chunk as a list. No list is empty.

        :param chunk_size: rows a chunk, 2,000 by default.
        """
        return as_lists(self._walk("chunks", chunk_size, consistent))

    def achunked_iterator(self, chunk_size: int | None = None, *, consistent: bool = False) -> AsyncIterator[Row]:
        """Walk as :meth:`chunked_iterator` does, for ``async for``; chunks are read in the thread of async code.

        On MySQL and MariaDB a refusal may come with the first row: Django must ask such a server for its version first.
        """
        return awaited_one_by_one(as_lists(self._walk("achunked_iterator", chunk_size, consistent)))

    def achunks(self, chunk_size: int | None = None, *, consistent: bool = False) -> AsyncIterator[list[Row]]:
        """Walk as :meth:`chunks` does, for ``async for``."""
        return awaited(as_lists(self._walk("achunks", chunk_size, consistent)))

    def _walk(self, verb: str, chunk_size: int | None, consistent: bool) -> Generator[ChunkRows]:
        options, rows = Options(chunk_size=chunk_size, consistent=consistent), self.all()
        try:
            return walk(plan_walk(rows, options, verb))
        except SynchronousOnlyOperation:
            # In a coroutine, of MySQL or MariaDB, whose version Django has not asked for yet: in the thread that may.
            return postponed(lambda: walk(plan_walk(rows, options, verb)))

    def parallel_map(
        self,
        fn: Callable[[Any], Result],
        processes: int | None = None,
        *,
        threads: int | None = None,
        executor: Any = None,
        chunk_size: int | None = None,
        ordered: bool = True,
        batched: bool = False,
        skip_none: bool = False,
        progress: Progress = None,
        init_hook: Hook | None = None,
        end_hook: Hook | None = None,
        on_error: OnError = "raise",
        max_failures: int | None = None,
        retries: int = 0,
        timeout: float | None = None,
        consistent: bool = False,
    ) -> Results[Result]:
        """Call ``fn`` with every row, on all cores, and return the results.

        Chunks of keys go to worker processes, which read their rows themselves, on connections of their own; rows do
        not travel. The processes are reused by the next call and end when they have been idle for half a minute.

        ``fn`` may be any callable: module functions travel by name, lambdas, closures and whatever ``__main__`` defines
        by value, with what they close over. It is called once for each row, rows of one chunk one after the other.

        A chunk that takes too long comes apart between two rows, and idle workers share what is left of it; not where
        rows do not bring their key, or a join repeats them. The setting ``TARGET_SECONDS`` says how long chunks are to
        take at most, 1 second by default; those of a short call take less.

        Within a ``TestCase``, on SQLite in memory, and in a function that a worker runs, everything happens in this
        process (``report.reason`` says so), and what would have travelled is packed and opened all the same. In a
        transaction that has not written, on PostgreSQL with READ COMMITTED, the map goes on as outside of one.

        :param processes: how many at once; the setting ``PROCESSES``, else as many as there are cores.
        :param threads: instead of processes, so many threads of this one, for functions that wait more than compute. No
            more of them work at once than the setting ``CONNECTIONS`` allows.
        :param executor: who does the work: ``"processes"``, ``"threads"``, ``"inline"`` (the caller, on its own
            connection, in its transaction), ``"dask"`` or ``"celery"`` (workers that somebody else has started), a name
            of the setting ``EXECUTORS``, a dotted path, or any :class:`concurrent.futures.Executor`, whose processes
            need nothing but to import this package. What is given is not shut down, what is made for the call is.
            ``processes`` or ``threads`` then tell how many workers it has, where it does not tell itself; they give it
            no others.
        :param chunk_size: rows a chunk, always as many. By default 1,000 at first, and then as many as follows from the
            time that the last ones took: at most twice as many each time, at least half, and no more than 10,000.
        :param batched: True: ``fn`` is called once for each chunk, with a list of at most ``chunk_size`` rows, 1,000 by
            default, and gives one result for them. A chunk does not come apart then.
        :param skip_none: True: results that are None are left out; ``report.skipped`` counts them.
        :param ordered: True: the results of ``[fn(row) for row in self]``, in that order. False: as chunks come in.
        :param progress: True for a bar with rate and time left (the ``progress`` extra), or a callable that is told
            ``(done_rows, total_rows)``. Costs one count.
        :param init_hook: called with the :class:`~parallel_orm.Worker` by each worker before its first row, to put into
            ``worker.state`` what is made once; ``fn`` finds it by :func:`~parallel_orm.current_worker`. What it raises
            ends the call.
        :param end_hook: called so behind its last row, also where the call fails, but not of a worker that was lost or
            of an interrupted call; what it returns is in ``report.end_results``. Refused where workers are processes of
            somebody else's executor.
        :param on_error: what becomes of a row whose ``fn`` raises an ``Exception``. ``"raise"``: it ends the call.
            ``"collect"``: a :class:`~parallel_orm.Failure` stands in its place. ``"skip"``: it is left out. The other
            rows go on; ``report.errors`` has all failures. So it is with each row of a chunk that was lost, or could
            not be read, and with results that cannot travel.
        :param max_failures: more of them than this end the call.
        :param retries: how often ``fn`` is called again for a row that it raised for (read anew, unless a join repeats
            it, when the rest of its chunk is done), and how often a chunk is sent again whose worker died, ran out of
            time or lost its connection, with all of its rows. Before each a pause: 0.1 seconds, twice as long each
            time, 10 at most.
        :param timeout: seconds for a chunk, from when its worker begins with it. Then its query is cancelled, and a
            second later its worker process killed. For processes of ours; refused with threads and with executors of
            others, not applied where the work stays in this process.
        :param consistent: True: all rows as of this call, whatever others write meanwhile; what ``fn`` itself asks is
            as of then. PostgreSQL only: the workers share an exported snapshot, held on one connection more.
        :returns: a list with a ``report``. Two queries a chunk, or part of one: for its end and for its rows; one for
            its rows alone where the queryset is sliced or ordered otherwise than by primary key, with one for all keys.
        :raises Exception: whatever ``fn`` raises first, with its type, notes that name the chunk and the primary key,
            and the worker's traceback as its ``__cause__``. What was not begun is cancelled, what was is waited for.
            :func:`~parallel_orm.report_of` it is the report so far.
        :raises parallel_orm.errors.WorkerDied: a worker process was killed; names the chunk. Nothing is run again,
            unless ``retries`` say so.
        :raises parallel_orm.errors.ChunkTimedOut: a chunk took longer than its ``timeout``.
        :raises parallel_orm.errors.TooManyFailures: more rows failed than ``max_failures``.
        :raises parallel_orm.errors.NotPicklable: ``fn``, the queryset or a result cannot travel.
        :raises parallel_orm.errors.UnsupportedQuerySet: no chunks can be cut truthfully; says what to do instead.
        :raises parallel_orm.errors.TransactionRefused: in a transaction whose writes the workers could not see.
        :raises parallel_orm.errors.InvalidOption: an argument has a value that cannot be used, or that this executor
            cannot do.
        :raises parallel_orm.errors.EngineUnavailable: Dask or Celery do not answer, or have no workers.
        :raises parallel_orm.errors.AnotherWorld: a worker of theirs has another code, settings or database.

        Not promised: a snapshot. Chunks are read one after the other; a row that is changed meanwhile comes as it is
        when its chunk is read. Context variables of the caller's own reach threads, but not processes.
        """
        options = Options(
            chunk_size=chunk_size,
            processes=processes,
            threads=threads,
            ordered=ordered,
            progress=progress,
            consistent=consistent,
            batched=batched,
            skip_none=skip_none,
            executor=executor,
            on_error=on_error,
            max_failures=max_failures,
            retries=retries,
            timeout=timeout,
            init_hook=init_hook,
            end_hook=end_hook,
        )
        return MapCall("parallel_map", [self], fn, options).mapped()

    def parallel_imap(
        self, fn: Callable[[Any], Result], processes: int | None = None, **knobs: Unpack[MapKnobs]
    ) -> Stream[Result]:
        """Map as :meth:`parallel_map` does, and return an iterator over the results, in memory for a few chunks.

        Nothing is asked before its first ``next()``. From then on chunks are worked on until there are four for each
        worker whose results wait: the workers wait for a slow caller. ``ordered=True``: in the order of the queryset,
        so a slow chunk keeps those behind it waiting, which are as few. ``ordered=False``: as chunks come in.

        What it may ask and refuses is decided by this call; the first ``next()`` refuses a transaction that has written
        meanwhile. What a transaction writes in the loop the workers do not see, and may wait for without end. Arguments
        are as those of ``parallel_map``, and so are exceptions, which come in the place of their chunk where
        ``ordered``. To leave it half-way sees to the end what is under way: take it ``with``, or ``close()`` it, to
        have that done at a known time.

        :returns: an iterator with a ``report`` of what was done so far, to be used by one thread.
        """
        call = MapCall("parallel_imap", [self], fn, options_of("parallel_imap", MapKnobs, processes, knobs))
        return Stream(one_by_one(call.streamed()), call.report)

    def parallel_each(
        self, fn: Callable[[Any], object], processes: int | None = None, **knobs: Unpack[EachKnobs]
    ) -> Report:
        """Call ``fn`` with every row, on all cores, for what it does; what it returns is dropped where it runs.

        As :meth:`parallel_map`, with its exceptions, and its arguments but ``ordered`` and ``skip_none``; no result
        travels, and the caller needs no memory. Rows are done in no order. ``on_error="collect"`` and ``"skip"`` mean
        the same.

        :param keys: True: the report has the primary keys of all rows that succeeded, as the chunks came in.
        :returns: the report.
        """
        options = options_of("parallel_each", EachKnobs, processes, knobs, ordered=False)
        return MapCall("parallel_each", [self], fn, options, Nothing).seen_through()

    def parallel_reduce(
        self,
        fn: Callable[[Any], Result],
        combine: Callable[[Result, Result], Result],
        initial: Result = NO_INITIAL,
        processes: int | None = None,
        **knobs: Unpack[ReduceKnobs],
    ) -> Result:
        """Return ``functools.reduce(combine, map(fn, rows), initial)``, on all cores.

        The results of a chunk are combined where they are made, so one value a chunk travels; those of the chunks then
        here, in the order of the queryset. ``combine`` must be associative, as ``operator.add`` is: which neighbours
        are combined first is not said. It need not be commutative. Other arguments and exceptions are those of
        :meth:`parallel_map`, but for ``ordered``. ``on_error="collect"`` is refused; rows that ``"skip"`` leaves out
        are logged, as there is no report.

        :param initial: combined once, in front of all others; what comes back where there are no results.
        :raises TypeError: there are no results, and no ``initial``.
        """
        options = options_of("parallel_reduce", ReduceKnobs, processes, knobs)
        reduced: Result = MapCall.of_a_reduction("parallel_reduce", [self], fn, combine, options).reduced(initial)
        return reduced

    def parallel_create(
        self,
        items: Iterable[Any],
        make: Callable[[Any], Any] | None = None,
        processes: int | None = None,
        **knobs: Unpack[WriteKnobs],
    ) -> Report:
        """Create a row for each item, on all cores, by ``save()``: with its signals, relations and parents.

        Items are taken as they are needed: a generator of millions costs no memory. Chunks of them go to workers, and
        each is one transaction on a connection of theirs, so a chunk costs one commit. ``on_commit()`` fires then.

        :param items: instances that are not saved, dictionaries (many-to-many relations too, as lists), or whatever
            ``make`` takes.
        :param make: makes an instance of an item, in the worker, within the transaction. The instance is saved, unless
            ``make`` has saved it. It may be called again for an item whose chunk is done again.
        :param processes: as for :meth:`parallel_map`, and so are ``threads``, ``executor``, ``progress``, the hooks,
            ``timeout``. SQLite has one writer at a time, so there is one worker.
        :param chunk_size: rows a transaction, 1,000 by default.
        :param mode: ``"save"``: ``save(force_insert=True)`` of each, as ``create()`` does it. ``"bulk"``: ``pre_save``
            of each, then bulk SQL, then ``post_save`` of each: the order is the one difference, but that ``save()`` of
            your own is not called. What bulk SQL cannot do truthfully is saved one by one.
        :param full_clean: True: each instance is validated before, by ``full_clean()``.
        :param on_error: ``"raise"``: the first error undoes its chunk and ends the call; chunks before stay, and those
            at work are seen to their end. ``"collect"`` and ``"skip"``: the chunk is undone and done in parts until the
            guilty rows stand alone; all others are written, and ``report.errors`` has index, item and error of each
            guilty one. Signals of what was undone have been sent, and are sent again.
        :param max_failures: more of them than this end the call.
        :param retries: how often a row that fails alone is tried again, and a chunk that was lost, where it is known
            not to be in the database. Chunks that collide with others (deadlocks, serialization) are begun anew in any
            case, up to eight times.
        :param keys: True: ``report.keys`` has the primary keys, chunk by chunk as they came in.
        :param run_id: a name for this run. Each chunk is then recorded in its own transaction, so a second call with
            the same name, items and order does exactly what is left, whatever ended the first, ``kill -9`` too. Needs
            ``"parallel_orm"`` in ``INSTALLED_APPS``, and its tables.
        :returns: the report. Instances that were given have their primary keys then, and no other value that the
            database made.
        :raises Exception: what a row raised, with its type and a note that names the item. ``report_of()`` it tells
            exactly what is in the database: ``succeeded`` rows are. What ``items`` raises comes when all before it is
            written.
        :raises parallel_orm.errors.TransactionRefused: in a transaction, unless ``executor="inline"``, which writes in
            it, on its connection.
        :raises parallel_orm.errors.BadItem: an item is neither instance nor dictionary, ``make`` returned None or
            another model, or an instance was saved before.
        :raises parallel_orm.errors.WorkerDied: a worker was killed. Its chunk is in the database as a whole, or not at
            all; ``report_of(error).unknown`` names it, unless a ``run_id`` tells.
        :raises parallel_orm.errors.RunRefused: the ``run_id`` is that of another call, its tables are missing, or it is
            under way.
        """
        return writes.create("parallel_create", self, items, make, processes, knobs)

    def parallel_update_or_create(
        self,
        items: Iterable[Any],
        unique_fields: Sequence[str],
        make: Callable[[Any], Any] | None = None,
        processes: int | None = None,
        **knobs: Unpack[WriteKnobs],
    ) -> Report:
        """Call ``update_or_create()`` for each item, on all cores; ``unique_fields`` find the row that may be there.

        Items are dictionaries, or instances that are not saved, as they are or as ``make`` makes them: all of their
        columns count then. Two items for one row are one after the other only where they are in one chunk. Else as
        :meth:`parallel_create`, without ``mode`` and ``full_clean``. ``report.counts`` has how many were "created" and
        "updated".
        """
        return writes.update_or_create("parallel_update_or_create", self, items, unique_fields, make, processes, knobs)

    def parallel_update(
        self,
        fn: Callable[[Any], Any],
        fields: Iterable[str] | None = None,
        processes: int | None = None,
        **knobs: Unpack[WriteKnobs],
    ) -> Report:
        """Have ``fn`` change every row, on all cores, and save what it changed, by ``save(update_fields=)``.

        ``fn(row)`` changes the row, or returns a dictionary of what is to be changed (many-to-many relations too, as
        lists). The fields that have other values then are saved, with those that each save sets (``auto_now``); rows
        that did not change are not written, and count as ``skipped``. Rows go by primary key, a chunk is one
        transaction, in which they are read too.

        While others write: the last one to write a field wins. ``select_for_update()`` on the queryset has each chunk
        lock its rows until they are saved.

        :param fields: the only fields that may be saved; None: whatever changed.
        :param mode: ``"bulk"``: ``pre_save`` of each row, then ``bulk_update()``, then ``post_save`` of each.

        Other arguments, and what is raised, are those of :meth:`parallel_create`.

        :returns: the report.
        :raises django.db.DatabaseError: a row was deleted meanwhile, as ``save(update_fields=)`` says it.
        :raises parallel_orm.errors.BadItem: ``fn`` returned something else, or changed the primary key.
        :raises parallel_orm.errors.UnsupportedQuerySet: rows are values, or cannot be cut.
        """
        return writes.update("parallel_update", self, fn, fields, processes, knobs)

    def parallel_delete(self, processes: int | None = None, **knobs: Unpack[WriteKnobs]) -> Report:
        """Delete every row, on all cores, by Django's ``delete()`` for each chunk: with cascades and signals.

        Each chunk is one transaction. What protects a row is judged chunk by chunk: a row that another one of the
        queryset protects cannot be deleted before that. Arguments, and what is raised, are those of
        :meth:`parallel_create`, without ``mode`` and ``full_clean``.

        :returns: the report; ``report.counts`` has the rows deleted by model, as ``delete()`` tells.
        """
        return writes.delete("parallel_delete", self, processes, knobs)

    async def aparallel_create(self, items: Iterable[Any], *args: Any, **kwargs: Any) -> Report:
        """Create as :meth:`parallel_create` does; waits for it in the thread that Django's async methods use."""
        return await awaited_call(self.parallel_create)(items, *args, **kwargs)

    async def aparallel_update_or_create(self, items: Iterable[Any], *args: Any, **kwargs: Any) -> Report:
        """Write as :meth:`parallel_update_or_create` does; waits in the thread that Django's async methods use."""
        return await awaited_call(self.parallel_update_or_create)(items, *args, **kwargs)

    async def aparallel_update(self, fn: Callable[[Any], Any], *args: Any, **kwargs: Any) -> Report:
        """Update as :meth:`parallel_update` does; waits for it in the thread that Django's async methods use."""
        return await awaited_call(self.parallel_update)(fn, *args, **kwargs)

    async def aparallel_delete(self, *args: Any, **kwargs: Any) -> Report:
        """Delete as :meth:`parallel_delete` does; waits for it in the thread that Django's async methods use."""
        return await awaited_call(self.parallel_delete)(*args, **kwargs)

    for _each in (
        parallel_create,
        parallel_update_or_create,
        parallel_update,
        parallel_delete,
        aparallel_create,
        aparallel_update_or_create,
        aparallel_update,
        aparallel_delete,
    ):
        setattr(_each, "alters_data", True)  # noqa: B010 - as Django has it
    parallel_delete.queryset_only = True  # type: ignore[attr-defined]
    aparallel_delete.queryset_only = True  # type: ignore[attr-defined]
    del _each

    async def aparallel_map(self, fn: Callable[[Any], Result], *args: Any, **kwargs: Any) -> Results[Result]:
        """Map as :meth:`parallel_map` does; waits for it in the thread that Django's async methods use."""
        return await awaited_call(self.parallel_map)(fn, *args, **kwargs)

    def aparallel_imap(
        self, fn: Callable[[Any], Result], processes: int | None = None, **knobs: Unpack[MapKnobs]
    ) -> AsyncStream[Result]:
        """Map as :meth:`parallel_imap` does, for ``async for``; what it refuses it refuses at the first row.

        It waits for chunks in the thread that Django's async methods use.
        """
        options = options_of("aparallel_imap", MapKnobs, processes, knobs)
        report = Report()
        lists = postponed(lambda: MapCall("aparallel_imap", [self], fn, options, report=report).streamed())
        return AsyncStream(awaited_one_by_one(lists), report)

    async def aparallel_each(self, fn: Callable[[Any], object], *args: Any, **kwargs: Any) -> Report:
        """Do as :meth:`parallel_each` does; waits for it in the thread that Django's async methods use."""
        return await awaited_call(self.parallel_each)(fn, *args, **kwargs)

    async def aparallel_reduce(self, fn: Callable[[Any], Result], *args: Any, **kwargs: Any) -> Result:
        """Reduce as :meth:`parallel_reduce` does; waits for it in the thread that Django's async methods use."""
        reduced: Result = await awaited_call(self.parallel_reduce)(fn, *args, **kwargs)
        return reduced

    def explain_plan(
        self, chunk_size: int | None = None, *, ordered: bool = True, consistent: bool = False, walk: bool = False
    ) -> Plan:
        """Return the plan that :meth:`parallel_map` would follow; ``str()`` of it tells how it is cut, and why.

        ``print(queryset.explain_plan())`` tells the cut and the reason for it, how many chunks and rows the database
        expects, the index that it would use, what is done where this cut cannot be had, and warns where an order has no
        index, or where chunks may come out uneven. This call makes no query; ``str()`` of the plan makes a few quick
        ones (on SQLite a count). Raises what ``parallel_map`` would.

        :param consistent: as for ``parallel_map``; with ``ordered=False``, ``str()`` asks whether blocks of the table
            are faster than ranges.
        :param walk: return that of :meth:`chunked_iterator` instead.
        """
        options = Options(chunk_size=chunk_size, ordered=ordered, consistent=consistent)
        return plan_walk(self, options, "explain_plan") if walk else plan_map("explain_plan", self, options)


class ParallelRawQuerySet(_Startable, _RawQuerySet):
    """What ``raw()`` returns: can be started in the background; has no keys to be cut by."""

    @classmethod
    def of(cls, raw: RawQuerySet[Any]) -> ParallelRawQuerySet:
        """Return Django's raw queryset as one of ours."""
        raw.__class__ = cls  # the same state, and Django has no hook for the class
        assert isinstance(raw, cls)
        return raw

    def using(self, alias: str | None) -> ParallelRawQuerySet:
        """As Django's."""
        return self.of(super().using(alias))

    def chunked_iterator(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: SQL of the user's own has no key to walk by."""
        raise self._refusal("chunked_iterator")

    def chunks(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, as :meth:`chunked_iterator` is."""
        raise self._refusal("chunks")

    def achunked_iterator(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, as :meth:`chunked_iterator` is."""
        raise self._refusal("achunked_iterator")

    def achunks(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, as :meth:`chunked_iterator` is."""
        raise self._refusal("achunks")

    def explain_plan(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: there is no plan for what cannot be cut."""
        raise self._refusal("explain_plan")

    def parallel_map(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: SQL of the user's own cannot be cut."""
        raise self._refusal("parallel_map")

    def parallel_imap(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, as :meth:`parallel_map` is."""
        raise self._refusal("parallel_imap")

    def parallel_update(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, as :meth:`parallel_map` is."""
        raise self._refusal("parallel_update")

    def parallel_delete(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, as :meth:`parallel_map` is."""
        raise self._refusal("parallel_delete")

    def parallel_each(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, as :meth:`parallel_map` is."""
        raise self._refusal("parallel_each")

    def parallel_reduce(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, as :meth:`parallel_map` is."""
        raise self._refusal("parallel_reduce")

    def across(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: rows of SQL of the user's own cannot be merged."""
        raise self._refusal("across", "it is raw SQL, whose rows nobody can merge")

    aparallel_map, aparallel_imap = parallel_map, parallel_imap
    aparallel_each, aparallel_reduce = parallel_each, parallel_reduce

    def start_count(self) -> Any:
        """Refused, as Django's raw querysets have no ``count()``."""
        raise self._refusal("start_count", "Django's raw querysets have no count()")

    def start_exists(self) -> Any:
        """Refused, as Django's raw querysets have no ``exists()``."""
        raise self._refusal("start_exists", "Django's raw querysets have no exists()")

    def _refusal(
        self, verb: str, problem: str = "it is raw SQL, which cannot be narrowed to a chunk"
    ) -> errors.UnsupportedQuerySet:
        return errors.unsupported(
            verb,
            str(self.model and self.model._meta.label),
            problem,
            "Use start_fetch(), or filter the model by a subquery: filter(pk__in=RawSQL(...)).",
        )


Querysets = TypeVarTuple("Querysets")


def start(*querysets: *Querysets) -> tuple[*Querysets]:
    """Start the fetch of each of these querysets in the background, and return them, as a tuple.

    As :meth:`ParallelQuerySet.start_fetch` does, one after the other; if one cannot be started, none is.

    :raises parallel_orm.errors.InvalidOption: one is no queryset, or has no ``start_fetch()``.
    """
    for each in querysets:
        if not isinstance(each, _Startable):
            raise errors.cannot_start(each)
    for each in querysets:
        cast("_Startable", each).start_fetch()
    return querysets
