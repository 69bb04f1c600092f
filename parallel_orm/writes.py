"""``parallel_create``, ``parallel_update`` and ``parallel_delete``: chunks of writes, each in one transaction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from django.db.models import Model, QuerySet
from django.db.models.query import ModelIterable

from parallel_orm import cutting, errors, guards, retries
from parallel_orm.changes import Change, Create, Delete, Mode, Update, UpdateOrCreate, attname_of, refuse_unknown_fields
from parallel_orm.chunks import Chunk
from parallel_orm.dispatch import InTurn
from parallel_orm.executors.choice import choose
from parallel_orm.failures import Failure
from parallel_orm.family import SharedKnobs, chunks_of, plain_callable
from parallel_orm.items import Feed, Items, length_of
from parallel_orm.keyset import Key
from parallel_orm.mapping import Parts, Run, chunks_of_several, is_of_the_rows, named_of_several, running
from parallel_orm.options import MAP_CHUNK_SIZE, Options
from parallel_orm.outcomes import Failed, Outcome, Packed, named, note, opened
from parallel_orm.pace import Pace
from parallel_orm.plan import Plan, plan_map, plan_walk
from parallel_orm.report import Call, Report, attach
from parallel_orm.runs import Ledger, is_done
from parallel_orm.task import Job
from parallel_orm.walk import one_by_one, walk
from parallel_orm.work import name_of

Rows = QuerySet[Any, Any]


class WriteKnobs(SharedKnobs, total=False):
    """What all that write may be given by name; see :meth:`ParallelQuerySet.parallel_create`."""

    mode: Mode
    full_clean: bool
    keys: bool
    run_id: str | None


class WriteCall:
    """One call that writes: what it refuses it has refused."""

    def __init__(self, verb: str, queryset: Rows, processes: int | None, knobs: Any) -> None:
        knobs = dict(knobs)
        for name in knobs:
            if name not in WriteKnobs.__optional_keys__:
                raise TypeError(f"{verb}() got an unexpected keyword argument {name!r}")
        self.verb = verb
        self.run_id: str | None = knobs.pop("run_id", None)
        self.mode: Mode = knobs.pop("mode", "save")
        self.full_clean: bool = knobs.pop("full_clean", False)
        self.options = Options(processes=processes, ordered=False, **knobs)
        if self.mode not in ("save", "bulk"):
            raise errors.bad_mode(self.mode)
        if not isinstance(self.full_clean, bool):
            raise errors.not_a_bool("full_clean", self.full_clean)
        if self.run_id is not None and not (isinstance(self.run_id, str) and 0 < len(self.run_id) <= 200):
            raise errors.bad_run_id(self.run_id)
        queryset = queryset.all()
        queryset._for_write = True  # type: ignore[attr-defined]
        self.alias: str = queryset.db
        self.queryset: Rows = queryset.using(self.alias)
        self.model: type[Model] = queryset.model
        guards.connection_for(self.alias)
        self.choice = choose(self.options)
        self.inline, self.session = guards.where_to_write(verb, self.alias, stays=self.choice.kind == "inline")
        self.has_one_writer = guards.has_one_writer(self.alias)
        self.is_held_back = self.has_one_writer and self.choice.number > 1
        if self.has_one_writer and self.choice.is_ours:
            self.choice = replace(self.choice, number=1)
        self.report = Report(reason=self.inline)

    def change_of(self, kind: type[Change], function: Any = None, **others: Any) -> Any:
        """Return what is to be done with each chunk."""
        options = self.options
        if function is not None:
            function = plain_callable(function)
        return kind(function, self.mode, options.on_error, options.retries, options.keys, self.full_clean, **others)

    @property
    def size(self) -> int:
        """How many rows a chunk has."""
        return self.options.rows_per_chunk(MAP_CHUNK_SIZE)

    def ledger(self) -> Ledger | None:
        """Return the records of the run, where it has a name."""
        return None if self.run_id is None else Ledger(self.run_id, self.verb, self.model, self.alias)

    # --- Items ------------------------------------------------------------------------

    def items_written(self, items: Iterable[Any], work: Create) -> Report:
        """Write the items of an iterable; return the report."""
        if isinstance(items, QuerySet) and items._result_cache is None:
            items = walked(items, self.verb)
        try:
            feed = Feed(items, self.alias)
        except TypeError as error:
            raise errors.not_items(self.verb, items) from error
        ledger = self.ledger()
        chunks = feed.chunks(self.size) if ledger is None else ledger.of_items(feed, self.size)
        job = Job(self.queryset, work, session=self.session)
        again = partial(self._items_again, work=work)
        self.report.retries_by(again if ledger is None else refuse_beside_run)
        parts = Parts(job, chunks, [Pace(self.size)], no_cut, length_of(items))
        return self._written(parts, work, ledger, feed)

    def _items_again(self, failures: Sequence[Failure], work: Create) -> Report:
        failures = to_be_written(failures)
        if any(failure.index is None for failure in failures):
            raise errors.nothing_to_retry("a chunk failed as a whole, and ended the call: give its items again.")
        call = self._again()
        return call.items_written([failure.value for failure in failures], work)

    def _again(self) -> WriteCall:
        call = WriteCall.__new__(WriteCall)
        call.__dict__.update(self.__dict__)
        call.inline, call.session = guards.where_to_write(self.verb, self.alias, stays=self.choice.kind == "inline")
        call.report = Report(reason=call.inline, call=self.report.call)
        return call

    # --- Rows -------------------------------------------------------------------------

    def rows_written(self, work: Change) -> Report:
        """Write the rows of the queryset; return the report."""
        return self._rows_written(self._plan(), work, self.ledger())

    def _plan(self) -> Plan:
        options = replace(self.options, ordered=False)
        return plan_map(self.verb, self.queryset, options, writes=(self.inline, self.session))

    def _rows_written(self, plan: Plan, work: Change, ledger: Ledger | None = None) -> Report:
        if ledger is not None and plan.cut != "ranges":
            raise errors.run_needs_ranges(self.verb, plan.label, plan.why)
        pace = Pace(self.size)
        chunks = plan.chunks(pace) if ledger is None else ledger.of_rows(plan.ends, partial(cut_behind, plan, pace))
        job = replace(plan.job(work), session=self.session)
        again = partial(self._rows_again, plan=plan, work=work)
        self.report.retries_by(again if ledger is None else refuse_beside_run)
        return self._written(Parts(job, chunks, [pace], plan.in_two, plan.count, plan.keys_of), work, ledger)

    def all_rows_written(self, work: Change, others: Sequence[Rows], processes: int | None, knobs: Any) -> Report:
        """Write the rows of this queryset, and of those of other databases, side by side."""
        if not others:
            return self.rows_written(work)
        if self.run_id is not None:
            raise errors.run_of_several(self.verb)
        calls = [self, *(WriteCall(self.verb, queryset, processes, knobs) for queryset in others)]
        planned = []
        for call in calls:
            with named(call.queryset.db):
                planned.append((call._plan(), call))
        return self._all_written(planned, work)

    def _all_written(self, planned: Sequence[tuple[Plan, WriteCall]], work: Change) -> Report:
        plans, calls = [plan for plan, _ in planned], [call for _, call in planned]
        paces = [Pace(self.size) for _ in plans]
        first, *others = (replace(plan.job(work), session=call.session) for plan, call in planned)
        chunks = InTurn(chunks_of_several(plans, paces))

        def cut(chunk: Chunk, rows: int) -> tuple[Chunk, Chunk | None]:
            with named_of_several(plans, chunk.alias):
                return plans[chunk.plan].in_two(chunk, rows)

        def keys_of(chunk: Chunk) -> list[Any]:
            with named_of_several(plans, chunk.alias):
                return plans[chunk.plan].keys_of(chunk)

        def again(failures: Sequence[Failure]) -> Report:
            failures = to_be_written(failures)
            renewed = [call._again() for call in calls]
            left = [
                (plan.only(chunks), call)
                for number, (plan, call) in enumerate(zip(plans, renewed, strict=True))
                if (chunks := chunks_of([each for each in failures if each.chunk.plan == number], plan, self.options))
            ]
            return left[0][1]._all_written(left, work)

        self.report.retries_by(again)
        self.inline = next((call.inline for call in calls if call.inline is not None), None)
        self.report.reason = self.inline
        job = replace(first, others=tuple(others))
        count = lambda: sum(plan.count() for plan in plans)  # noqa: E731
        return self._written(Parts(job, chunks, paces, cut, count, keys_of), work, None)

    def _rows_again(self, failures: Sequence[Failure], plan: Plan, work: Change) -> Report:
        failures = to_be_written(failures)
        call = self._again()
        return call._rows_written(plan.only(chunks_of(failures, plan, self.options)), work)

    # --- Both ---------------------------------------------------------------------------

    def _written(self, parts: Parts, work: Change, ledger: Ledger | None, feed: Feed | None = None) -> Report:
        report = self.report
        report.call = self._asked_for(work)
        options, choice = replace(self.options, ordered=False), self.choice
        seen = Seen(self, parts, ledger is not None)
        try:
            with ExitStack() as stack:
                run = running(
                    parts,
                    options,
                    choice,
                    report,
                    stack,
                    inline=self.inline,
                    spread=seen.spread,
                    may_pass=seen.may_pass,
                    left=seen.left,
                    # Ours has one worker then. Somebody else's executor may have more, and records are written here.
                    most_out=1 if self.has_one_writer and (ledger is not None or not choice.is_ours) else None,
                    has_effects=True,
                    may_repeat=ledger is not None,
                )
                seen.through(run)
            if ledger is not None:
                report.done_before += ledger.done_before
            if feed is not None and feed.error is not None:
                note(feed.error, f"its items before that were written: {report}")
                raise feed.error
        except BaseException as error:
            if not isinstance(error, GeneratorExit):
                attach(report, error)
            raise
        return report

    def _asked_for(self, work: Change) -> Call:
        choice, options = self.choice, self.options
        return Call(
            self.verb,
            name_of(work) if work.function is not None else self.verb,
            self.model._meta.label,
            "threads" if choice.is_threads else choice.kind,
            choice.number,
            chunk_size=options.rows_per_chunk(0) or None,
            on_error=options.on_error,
            retries=options.retries,
            writes=True,
            has_one_writer=self.is_held_back,
        )


class Seen:
    """What is made of the outcomes of writes: nothing that was written is forgotten, however the call ends."""

    def __init__(self, call: WriteCall, parts: Parts, has_records: bool) -> None:
        self._call, self._parts, self._has_records = call, parts, has_records
        self._report = call.report
        #: Where the chunk stands that the report has last; what comes behind it may not be there yet, if interrupted.
        self._counted: tuple[int, ...] | None = None

    def may_pass(self, outcome: Outcome) -> bool:
        """Tell whether a chunk may be sent again: not where it may have been written, and nobody can tell."""
        return (self._has_records or not is_unknown(outcome)) and retries.may_pass(outcome)

    def spread(self, outcomes: Iterator[Outcome]) -> Iterator[Outcome]:
        """Yield the outcomes, of chunks that were lost with what is known of them."""
        for outcome in outcomes:
            yield self._known(outcome)

    def _known(self, outcome: Outcome) -> Outcome:
        error = outcome.error
        if error is None or outcome.committed is True:
            return outcome
        chunk, committed = outcome.chunk, None if is_unknown(outcome) else False
        if committed is None and chunk.record is not None:
            with suppress(Exception):  # the database may be gone: then nobody knows
                committed = is_done(chunk.record, chunk.alias)
        if committed and chunk.record is not None:
            rows, failed = chunk.record.done(chunk.alias, self._call.model, chunk.items)
            return Outcome(chunk, [], rows=rows, failed=failed)
        outcome = replace(outcome, committed=committed)
        if committed is None:
            error = opened(error)
            note(error, f"{UNKNOWN} ({chunk})")
            outcome = replace(outcome, error=error)
        if self._call.options.on_error == "raise" or not (committed is None or is_of_the_rows(outcome)):
            return outcome
        return self._row_by_row(outcome, committed)

    def _row_by_row(self, outcome: Outcome, committed: bool | None) -> Outcome:
        """Return an outcome in which each row of a chunk that was lost has failed."""
        assert outcome.error is not None
        chunk, error = outcome.chunk, outcome.error
        keys = [None] * len(chunk.items) if chunk.items is not None else self._parts.keys_of(chunk)
        failed = tuple(Failed(place, key, error, committed=committed) for place, key in enumerate(keys))
        return replace(outcome, value=[], error=None, rows=len(keys), failed=failed)

    def left(self, future: Future[Outcome], chunk: Chunk) -> None:
        """Count what came back when nobody waited for it any more; and say of the rest that nobody knows."""
        if chunk.place == self._counted:
            return
        if future.done() and not future.cancelled() and future.exception() is None:
            outcome = replace(future.result(), chunk=chunk)
        else:
            outcome = Outcome(chunk, error=errors.cancelled("as its call was interrupted"), stage="lost")
        for known in self._report.watch(self.spread(iter([outcome]))):
            self._tell(known)

    def through(self, run: Run) -> None:
        """See all chunks through. After the first error nothing more is begun, and what was is counted."""
        first: BaseException | None = None
        most = self._call.options.max_failures
        for outcome in run.outcomes:
            self._counted = outcome.chunk.place
            self._tell(outcome)
            if first is None:
                first = self._ends(outcome, most)
                if first is not None:
                    run.supply.end()
            run.window.release()  # which has the next one begun
        if first is not None:
            raise first

    def _ends(self, outcome: Outcome, most: int | None) -> BaseException | None:
        error = None if outcome.error is None else opened(outcome.error)
        if error is not None and (
            self._call.options.on_error == "raise"
            or (outcome.committed is not True and not outcome.failed)
            or not isinstance(error, Exception)  # a Ctrl-C behind the commit
        ):
            return error
        if most is not None and self._report.failed > most:
            too_many = errors.too_many_failures(self._report.failed, most)
            too_many.__cause__ = self._report.errors[-1].error
            return too_many
        return None

    def _tell(self, outcome: Outcome) -> None:
        """Give failures their items, instances their keys, and the report what was counted."""
        report, items = self._report, outcome.chunk.items
        if outcome.failures or outcome.error is not None:
            failures = outcome.failures or (report.errors[-1],)
            places = [each.place for each in outcome.failed] if outcome.failures else [outcome.failed_place]
            for failure, place in zip(failures, places, strict=True):
                if items is not None and place is not None:
                    failure.index, failure.value = items.places[place], items.values[place]
        value = outcome.value.open() if isinstance(outcome.value, Packed) else outcome.value
        if (outcome.error is None or outcome.committed) and value:
            if self._call.options.keys:
                report.keys += value
            if items is not None:
                give_keys(items, {each.place for each in outcome.failed}, value, outcome.chunk.alias)


#: What is said of a chunk of which nobody knows.
UNKNOWN = (
    "whether this chunk is in the database is not known: all of it is, or nothing. Look for its rows, or give the call "
    "a run_id=, whose records tell"
)


def is_unknown(outcome: Outcome) -> bool:
    """Tell whether a chunk may be in the database or not: it was lost with its worker, or at its commit."""
    if outcome.error is None:
        return False
    return outcome.committed is None or (outcome.stage == "lost" and not outcome.worker)


def walked(items: Rows, verb: str) -> Iterable[Any]:
    """Return the rows of a queryset, chunk by chunk where it can be cut: to loop over it would load them all."""
    try:
        return one_by_one(walk(plan_walk(items.all(), Options(), verb)))
    except errors.UnsupportedQuerySet:
        return items


def give_keys(items: Items, failed: set[int | None], keys: Sequence[Any], alias: str) -> None:
    """Tell the caller's own instances that they are saved, where copies of them were."""
    saved = [value for place, value in enumerate(items.values) if place not in failed]
    if len(saved) != len(keys):
        return
    for value, key in zip(saved, keys, strict=True):
        if isinstance(value, Model) and value._state.adding and key is not None:  # else its save() did not
            value.pk = key
            value._state.adding, value._state.db = False, alias


def to_be_written(failures: Sequence[Failure]) -> list[Failure]:
    """Return those that are not in the database; refuse to write again what may be."""
    if any(failure.committed is None for failure in failures):
        raise errors.nothing_to_retry(
            "of some rows nobody knows whether they are in the database. Look for them; a call with run_id= can be "
            "made again."
        )
    left = [failure for failure in failures if not failure.committed]
    if failures and not left:
        raise errors.nothing_to_retry("what failed is in the database: it was raised behind the commit.")
    return left


def refuse_beside_run(failures: Sequence[Failure]) -> None:
    """Refuse to write what no record would tell of."""
    raise errors.nothing_to_retry(
        "the call has a run_id: make the same call again, which does what failed, and whatever else is left."
    )


def no_cut(chunk: Chunk, rows: int) -> tuple[Chunk, Chunk | None]:
    """Leave a chunk whole, as its transaction is."""
    return chunk, None


def cut_behind(plan: Plan, pace: Pace, after: Key | None, ends: list[Key], index: int) -> Iterator[Chunk]:
    """Yield the chunks of a plan behind a key, numbered from ``index`` on."""
    for chunk in cutting.by_jumps(plan.alias, ends, lambda: pace.rows, plan.jumps(), after=after):
        yield replace(chunk, index=chunk.index + index)


# --- The verbs ---------------------------------------------------------------------------


def create(
    verb: str,
    queryset: Rows,
    items: Iterable[Any],
    make: Callable[[Any], Any] | None,
    processes: int | None,
    knobs: Any,
    given: Mapping[str, Any] | None = None,
) -> Report:
    """Create a row for each item."""
    call = WriteCall(verb, queryset, processes, knobs)
    return call.items_written(items, call.change_of(Create, make, given=dict(given or {})))


def update_or_create(
    verb: str,
    queryset: Rows,
    items: Iterable[Any],
    unique_fields: Sequence[str],
    make: Callable[[Any], Any] | None,
    processes: int | None,
    knobs: Any,
    given: Mapping[str, Any] | None = None,
) -> Report:
    """Create a row for each item, or update the one that is there."""
    call = WriteCall(verb, queryset, processes, knobs)
    if call.mode != "save" or call.full_clean:
        raise errors.saves_alone(verb)
    if isinstance(unique_fields, str) or not unique_fields:
        raise errors.bad_unique_fields(unique_fields)
    for name in unique_fields:
        try:
            attname_of(call.model, name)
        except Exception as error:
            raise errors.no_such_field(name, call.model) from error
    work = call.change_of(UpdateOrCreate, make, given=dict(given or {}), unique_fields=tuple(unique_fields))
    return call.items_written(items, work)


def update(
    verb: str,
    queryset: Rows,
    fn: Callable[[Any], Any],
    fields: Iterable[str] | None,
    processes: int | None,
    knobs: Any,
    others: Sequence[Rows] = (),
) -> Report:
    """Have a function change the rows of a queryset; and of the same one on other databases."""
    refuse_without_instances(verb, queryset)
    if queryset.query.is_sliced:
        raise TypeError("Cannot update a query once a slice has been taken.")
    call = WriteCall(verb, queryset, processes, knobs)
    if isinstance(fields, str):
        raise errors.bad_fields(fields)
    if fields is not None:
        fields = tuple(fields)
        refuse_unknown_fields(call.model, fields)
    plain_callable(fn)
    return call.all_rows_written(call.change_of(Update, fn, fields=fields), others, processes, knobs)


def delete(verb: str, queryset: Rows, processes: int | None, knobs: Any, others: Sequence[Rows] = ()) -> Report:
    """Delete the rows of a queryset; and of the same one on other databases."""
    # As Django's delete(), in its words.
    if queryset.query.combinator:
        raise errors.unsupported(verb, queryset.model._meta.label, "it is a union", "Delete from each queryset.")
    if queryset.query.is_sliced:
        raise TypeError("Cannot use 'limit' or 'offset' with delete().")
    if queryset.query.distinct_fields:
        raise TypeError("Cannot call delete() after .distinct(*fields).")
    if queryset._fields is not None:  # type: ignore[attr-defined]
        raise TypeError("Cannot call delete() after .values() or .values_list()")
    call = WriteCall(verb, queryset, processes, knobs)
    if call.mode != "save" or call.full_clean:
        raise errors.saves_alone(verb)
    return call.all_rows_written(call.change_of(Delete), others, processes, knobs)


def refuse_without_instances(verb: str, queryset: Rows) -> None:
    """Refuse rows that cannot be saved."""
    if not issubclass(queryset._iterable_class, ModelIterable):
        raise errors.unsupported(
            verb, queryset.model._meta.label, "its rows are values, and no instances", "Drop values()."
        )


def given_by(manager: Any, verb: str) -> Mapping[str, Any]:
    """Return what a related manager has each of its new rows given; refuse what Django gives no place."""
    instance = getattr(manager, "instance", None)
    if instance is None:
        return {}
    if hasattr(manager, "through"):
        raise errors.many_to_many_manager(verb)
    if hasattr(manager, "content_type_field_name"):
        return {
            manager.content_type_field_name: manager.content_type,
            manager.object_id_field_name: manager.pk_val,
        }
    return {manager.field.name: instance}
