"""Random interleavings of starts, writes, transactions and uses: every answer is that of its start.

What a read must answer is told by a model of the tables in plain Python, kept in step with every write, savepoint and
rollback; in half of the interleavings Django is asked as well, by a queryset of its own at the very moment of the
start. (It is not asked in the other half, as its query would prepare the connection.) Rows of another writer are
counted apart, as some reads may see them and some may not.

``PARALLEL_ORM_INTERLEAVINGS=10000`` makes it as many for each database (give pytest ``--timeout=0`` then).
"""

from __future__ import annotations

import io
import os
import sys
import threading
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from django.db import OperationalError, connections, transaction
from django.db.models import Count, Sum
from django.test import override_settings
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from parallel_orm.connections import lender
from parallel_orm.reads import Read, running
from parallel_orm.session import NOTHING
from parallel_orm.watch import Watch, watch_of
from tests.testapp.models import Article, Author, PlainArticle, Tag
from tests.threads import submit

WAIT = 60
THREADS = 3
EXAMPLES = int(os.environ.get("PARALLEL_ORM_INTERLEAVINGS", "100"))

#: The rank of all that the other writer writes.
THEIRS = 100
ARTICLE, TAGGED = "testapp_article", "testapp_article_tags"

#: How often each way was taken in this process: a property that is never put to the test holds too.
taken: Counter[str] = Counter()


class Wrong(AssertionError):
    """An answer is not that of the moment of its start."""


# --- What is asked -----------------------------------------------------------------------
#
# Each question: how it is started, how the start is used, how it is asked at once, what the model answers.


def mine(manager: Any) -> Any:
    return manager.filter(rank__lt=THEIRS).order_by("pk")


def seen(rows: Any) -> list[Any]:
    return [(row.pk, row.name, row.rank) for row in rows]


def seen_with_tags(rows: Any) -> list[Any]:
    return [(row.pk, sorted(tag.pk for tag in row.tags.all()), row.author and row.author.name) for row in rows]


def one_or_none(ask: Any) -> Any:
    try:
        row = ask()
    except Article.DoesNotExist:
        return None
    return row and (row.pk, row.name, row.rank)


@dataclass(frozen=True)
class Question:
    #: The queryset, of a manager and a number.
    rows: Any
    #: What the model answers, of its state and the number.
    model: Any
    start: str = "start_fetch"
    #: Of the start, of the number.
    arguments: Any = None
    #: Makes an answer comparable; gets the started queryset, or what gives the result of a Pending.
    uses: Any = (seen,)
    at_once: Any = seen
    pending: bool = False


def of_rank(rank: int) -> Any:
    return lambda state: [row for row in state.rows() if row[2] == rank]


def aggregate(rows: Any) -> dict[str, Any]:
    return rows.aggregate(ranks=Sum("rank"), number=Count("pk"))


def raw(manager: Any, number: int) -> Any:
    return manager.raw(f"SELECT * FROM {ARTICLE} WHERE rank < %s ORDER BY id", [THEIRS])


FETCHED = (
    seen,
    lambda rows: seen(rows[:]),
    lambda rows: [len(rows), seen(rows)][1],
    lambda rows: [bool(rows), rows.count(), seen(rows)][2],
    lambda rows: seen(rows.background["fetch"].result(WAIT)),
)
COUNTED = (lambda rows: rows.count(), lambda rows: rows.background["count"].result(WAIT))

QUESTIONS = (
    Question(lambda m, n: mine(m), lambda s, n: s.rows(), uses=FETCHED),
    Question(lambda m, n: mine(m).filter(rank=n % 3), lambda s, n: of_rank(n % 3)(s), uses=FETCHED),
    Question(
        lambda m, n: mine(m).prefetch_related("tags", "author"),
        lambda s, n: s.rows_with_tags(),
        uses=(seen_with_tags,),
        at_once=seen_with_tags,
    ),
    Question(
        lambda m, n: mine(m).values_list("name", flat=True),
        lambda s, n: [row[1] for row in s.rows()],
        uses=(list,),
        at_once=list,
    ),
    Question(lambda m, n: mine(m)[: n % 4 + 1], lambda s, n: s.rows()[: n % 4 + 1], uses=FETCHED),
    Question(raw, lambda s, n: s.rows()),
    Question(
        lambda m, n: mine(m).filter(tags=n % 2 + 1),
        lambda s, n: sum(1 for _, tag in s.tagged if tag == n % 2 + 1),
        start="start_count",
        uses=COUNTED,
        at_once=lambda rows: rows.count(),
    ),
    Question(
        lambda m, n: mine(m).filter(rank=n % 3),
        lambda s, n: bool(of_rank(n % 3)(s)),
        start="start_exists",
        uses=(lambda rows: rows.exists(),),
        at_once=lambda rows: rows.exists(),
    ),
    Question(
        lambda m, n: mine(m),
        lambda s, n: next(iter(s.rows()), None),
        start="start_first",
        pending=True,
        uses=(one_or_none,),
        at_once=lambda rows: one_or_none(rows.first),
    ),
    Question(
        lambda m, n: mine(m),
        lambda s, n: {"ranks": sum(r[2] for r in s.rows()) if s.articles else None, "number": len(s.articles)},
        start="start_aggregate",
        arguments=lambda n: {"ranks": Sum("rank"), "number": Count("pk")},
        pending=True,
        uses=(lambda result: result(),),
        at_once=aggregate,
    ),
    Question(
        lambda m, n: mine(m).filter(pk=n % 6 + 1),
        lambda s, n: next((row for row in s.rows() if row[0] == n % 6 + 1), None),
        start="start_get",
        pending=True,
        uses=(one_or_none,),
        at_once=lambda rows: one_or_none(rows.get),
    ),
    Question(
        lambda m, n: mine(m).filter(rank__gte=1),
        lambda s, n: [row for row in s.rows() if row[2] >= 1],
        start="start_in_bulk",
        pending=True,
        uses=(lambda result: seen(row for _, row in sorted(result().items())),),
        at_once=lambda rows: seen(row for _, row in sorted(rows.in_bulk().items())),
    ),
)


@dataclass
class State:
    """The tables, in plain Python."""

    articles: dict[int, tuple[str, int, int | None]]
    tagged: set[tuple[int, int]]

    def copy(self) -> State:
        return State(dict(self.articles), set(self.tagged))

    def rows(self) -> list[tuple[int, str, int]]:
        return [(pk, name, rank) for pk, (name, rank, _) in sorted(self.articles.items())]

    def rows_with_tags(self) -> list[Any]:
        return [
            (pk, sorted(tag for article, tag in self.tagged if article == pk), author and "Ada")
            for pk, (_, _, author) in sorted(self.articles.items())
        ]


@dataclass
class Started:
    question: Question | None
    number: int
    handle: Any
    expected: Any
    #: Of the other writer's rows: how many a read may see at least and at most; the latter None while it may see more.
    theirs: tuple[int, int | None] = (0, None)
    #: The transaction that has one snapshot for all its reads.
    snapshot: Any = None


class Gates:
    """Who may go on: all background threads may be held before they take anything, or within what they read."""

    def __init__(self) -> None:
        self.held: threading.Event | None = None
        self.slow: threading.Event | None = None
        self.place = "before"
        self.parked = threading.Semaphore(0)
        self.number = 0

    def hold(self) -> None:
        if self.held is None and self.slow is None:
            gate = threading.Event()
            at_gate = threading.Barrier(THREADS + 1)

            def stay() -> None:
                at_gate.wait(WAIT)
                assert gate.wait(WAIT)

            for _ in range(THREADS):
                submit(stay)
            at_gate.wait(WAIT)
            self.held = gate

    def slow_down(self, place: str) -> None:
        if self.held is None and self.slow is None:
            self.place, self.number = place, 0
            self.parked = threading.Semaphore(0)
            self.slow = threading.Event()

    def release(self) -> None:
        """What is on its way goes on, as somebody is about to wait for it."""
        if self.slow is not None:
            self.slow.set()
            self.slow = None

    def open(self) -> None:
        self.release()
        if self.held is not None:
            self.held.set()
            self.held = None

    def park(self, place: str) -> None:
        """In a background thread."""
        gate = self.slow
        if gate is not None and place == self.place:
            self.parked.release()
            assert gate.wait(WAIT)

    def await_parked(self) -> None:
        """Have a read that was just started be on its way before the caller goes on, if a thread is free."""
        if self.slow is not None and self.place == "before" and self.number < THREADS:
            self.number += 1
            assert self.parked.acquire(timeout=WAIT), stacks()


def stacks() -> str:
    """Where all threads are, for whoever wonders why one of them does not come."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sys._current_frames().items()
    return "\n".join(f"{names.get(ident)}:\n{''.join(traceback.format_stack(frame))}" for ident, frame in frames)


class Neighbour:
    """Another writer, in a thread and on a connection of its own."""

    def __init__(self, alias: str) -> None:
        self.alias = alias
        self.thread = ThreadPoolExecutor(1)

    def execute(self, sql: str, parameters: Any = None) -> None:
        def run() -> None:
            with connections[self.alias].cursor() as cursor:
                cursor.execute(sql, parameters)

        self.thread.submit(run).result(WAIT)

    def close(self) -> None:
        self.thread.submit(connections.close_all).result(WAIT)
        self.thread.shutdown()


# --- One interleaving ----------------------------------------------------------------------


class Interleaving:
    """One run: the steps, each as the caller makes it and as the model has it."""

    def __init__(self, alias: str, gates: Gates, neighbour: Neighbour, *, asks: bool) -> None:
        self.alias, self.gates, self.neighbour, self.asks = alias, gates, neighbour, asks
        self.connection = connections[alias]
        self.vendor = self.connection.vendor
        self.state = State({}, set())
        #: Open transactions and savepoints, with the state to return to.
        self.blocks: list[tuple[str, Any, State]] = []
        self.manual: State | None = None
        self.wrote = False
        self.snapshot: Any = None
        self.at_enter = 0
        self.theirs = 0
        self.next = 1
        self.pending: list[Started] = []
        self.articles = Article.objects.using(alias)
        self.plain = PlainArticle.objects.using(alias)

    def begin(self) -> None:
        with self.connection.cursor() as cursor:
            cursor.execute(f"DELETE FROM {TAGGED}")
            cursor.execute(f"DELETE FROM {ARTICLE}")
        self.bulk_create(3)
        self.add(0)
        self.wrote = False

    def run(self, steps: list[tuple[str, int, int]]) -> None:
        try:
            self.begin()
            for name, one, two in steps:
                getattr(self, name)(one, two)
            for number in range(len(self.pending)):
                self.consume(0, number)
            while self.blocks:
                self.leave(len(self.blocks), 0)
            if self.manual is not None:
                self.autocommit(0, 0)
            for number in range(len(self.pending)):
                self.consume(0, number)
        finally:
            self.gates.open()
            self.clean_up()

    def clean_up(self) -> None:
        for each in self.pending:
            pending = each.handle if hasattr(each.handle, "result") else next(iter(each.handle.background.values()))
            pending._asked = True  # its failure is of no interest any more
            try:
                pending._read.landed.result(WAIT) if not pending._read.is_waiting else pending.result(WAIT)
            except Exception:
                taken["failed"] += 1
        if watch_of(self.connection)._unknown:  # the next interleaving is not to be inline because of this one
            self.connection.close() if not self.blocks else None
        if self.blocks or self.connection.in_atomic_block or not self.connection.get_autocommit():
            self.connection.in_atomic_block = False
            self.connection.atomic_blocks = []
            self.connection.savepoint_ids = []
            self.connection.needs_rollback = False
            self.connection.close()

    @property
    def in_transaction(self) -> bool:
        return bool(self.blocks) or self.manual is not None

    # --- Reading ---------------------------------------------------------------------------

    def start(self, one: int, two: int) -> None:
        if len(self.pending) >= 6:
            return
        if self.snapshot is not None and one % 3 == 0:
            self.start_theirs(one, two)
            return
        question = QUESTIONS[one % len(QUESTIONS)]
        expected = question.model(self.state, two)
        if self.asks:
            inline = question.at_once(question.rows(self.plain, two))
            if inline != expected:
                raise RuntimeError(f"the model is wrong: {inline} is not {expected}")
        rows = question.rows(self.articles, two)
        arguments = question.arguments(two) if question.arguments else {}
        handle = getattr(rows, question.start)(**arguments)
        self.pending.append(Started(question, two, handle, expected))
        self.note(handle if question.pending else next(iter(handle.background.values())))

    def start_theirs(self, one: int, two: int) -> None:
        """Count what the other writer wrote: as of a moment that the isolation level allows."""
        theirs = (self.at_enter, self.theirs) if self.snapshot is not None else (self.theirs, None)
        handle = self.articles.filter(rank=THEIRS).start_count()
        self.pending.append(Started(None, 0, handle, None, theirs, self.snapshot))
        self.note(handle.background["count"])

    def note(self, pending: Any) -> None:
        if pending.reason is None:
            self.gates.await_parked()

    def consume(self, one: int, two: int) -> None:
        if not self.pending:
            return
        started = self.pending.pop(one % len(self.pending))
        question, handle = started.question, started.handle
        if question is None:
            self.consume_theirs(started)
            return
        use = question.uses[two % len(question.uses)]
        found = use(partial(handle.result, WAIT) if question.pending else handle)
        pending = handle if question.pending else next(iter(handle.background.values()), None)
        reason = None if pending is None else pending.reason
        taken[f"{'in' if self.in_transaction else 'out'}: {reason and reason[:]}"] += 1
        if found != started.expected:
            raise Wrong(f"{question.start} gives {found}, at its start it was {started.expected}, {reason!r}")

    def consume_theirs(self, started: Started) -> None:
        found = started.handle.count()
        least, most = started.theirs
        taken["theirs"] += 1
        if started.snapshot is not None:
            taken[f"snapshot: {started.handle.background['count'].reason!r}"] += 1
            if started.snapshot.setdefault("theirs", found) != found:
                raise Wrong(f"{found} rows of the other's, where another read of the snapshot had {started.snapshot}")
        if not least <= found <= (self.theirs if most is None else most):
            raise Wrong(f"{found} rows of the other's, not {least} to {most or self.theirs}")

    # --- Who goes on -------------------------------------------------------------------------

    def hold(self, one: int, two: int) -> None:
        self.gates.hold()

    def slow(self, one: int, two: int) -> None:
        self.gates.slow_down("before" if one % 3 else "within")

    def free(self, one: int, two: int) -> None:
        self.gates.open()

    def other_writes(self, one: int, two: int) -> None:
        # Not where it would have to wait for the caller: who writes, or reads, locks SQLite; TRUNCATE locks a table.
        if self.wrote or (self.vendor == "sqlite" and (self.in_transaction or self.pending)):
            return
        self.neighbour.execute(
            f"INSERT INTO {ARTICLE} (id, name, rank) VALUES (%s, 'theirs', %s)", [100_000 + self.theirs, THEIRS]
        )
        self.theirs += 1

    # --- Transactions ------------------------------------------------------------------------

    def atomic(self, one: int, two: int) -> None:
        if len(self.blocks) < 4:
            block = transaction.atomic(using=self.alias)
            block.__enter__()
            self.blocks.append(("atomic", block, self.state.copy()))

    def atomic_at_level(self, one: int, two: int) -> None:
        if self.in_transaction or self.vendor != "postgresql":
            self.atomic(one, two)
            return
        self.atomic(one, two)
        level = ("REPEATABLE READ", "REPEATABLE READ", "SERIALIZABLE")[one % 3]
        with self.connection.cursor() as cursor:
            cursor.execute(f"SET TRANSACTION ISOLATION LEVEL {level}")
        self.snapshot = {}
        self.at_enter = self.theirs

    def savepoint(self, one: int, two: int) -> None:
        if 0 < len(self.blocks) < 5:
            name = self.connection.savepoint()
            self.blocks.append(("savepoint", name, self.state.copy()))

    def leave(self, one: int, two: int) -> None:
        """Commit or roll back the innermost block or savepoint."""
        if not self.blocks:
            return
        kind, block, before = self.blocks.pop()
        back = bool(one % 2)
        if kind == "savepoint":
            end = self.connection.savepoint_rollback if back else self.connection.savepoint_commit
            end(block)
        elif back:
            error = ArithmeticError()
            block.__exit__(type(error), error, None)
        else:
            block.__exit__(None, None, None)
        if back:
            self.state = before
        if not self.in_transaction:
            self.wrote, self.snapshot = False, None

    def autocommit(self, one: int, two: int) -> None:
        if self.blocks:
            return
        if self.manual is None:
            transaction.set_autocommit(False, using=self.alias)
            self.manual = self.state.copy()
            return
        transaction.commit(using=self.alias)  # psycopg2 demands it
        transaction.set_autocommit(True, using=self.alias)
        self.manual, self.wrote = None, False

    def end_by_hand(self, one: int, two: int) -> None:
        if self.blocks or self.manual is None:
            return
        if one % 2:
            transaction.rollback(using=self.alias)
            self.state = self.manual.copy()
        else:
            transaction.commit(using=self.alias)
            self.manual = self.state.copy()
        self.wrote = False

    def lock(self, one: int, two: int) -> None:
        if self.in_transaction:
            list(self.plain.filter(rank=one % 3).select_for_update())
            self.wrote = True

    def fail(self, one: int, two: int) -> None:
        """A statement that fails, and the savepoint before it."""
        if self.blocks:
            with pytest.raises(Exception, match="no_such_table"), transaction.atomic(using=self.alias):
                self.execute("SELECT * FROM no_such_table" if one % 2 else "DELETE FROM no_such_table")

    # --- Writing -----------------------------------------------------------------------------

    def write(self, one: int, two: int) -> None:
        names = WRITES[self.vendor]
        name = names[one % len(names)]
        if (
            name in ("truncate", "executescript")
            and self.in_transaction
            and (self.wrote or self.vendor != "postgresql")
        ):
            return  # it would commit, or be refused as deferred constraints are yet to be checked
        getattr(self, name)(two)
        taken[name] += 1
        self.wrote = self.in_transaction

    def execute(self, sql: str, parameters: Any = ()) -> None:
        with self.connection.cursor() as cursor:
            cursor.execute(sql, parameters)

    def new(self, number: int) -> tuple[int, tuple[str, int, int | None]]:
        key, self.next = self.next, self.next + 1
        values = (f"n{key}", number % 3, 1 if number % 2 else None)
        self.state.articles[key] = values
        return key, values

    def known(self, number: int) -> int:
        if not self.state.articles:
            self.create(number)
        keys = sorted(self.state.articles)
        return keys[number % len(keys)]

    def become(self, key: int, *, name: str | None = None, rank: int | None = None) -> None:
        before = self.state.articles[key]
        self.state.articles[key] = (name or before[0], before[1] if rank is None else rank, before[2])

    def gone(self, *keys: int) -> None:
        for key in keys:
            del self.state.articles[key]
        self.state.tagged = {pair for pair in self.state.tagged if pair[0] not in keys}

    def create(self, number: int) -> None:
        key, (name, rank, author) = self.new(number)
        self.plain.create(pk=key, name=name, rank=rank, author_id=author)

    def save(self, number: int) -> None:
        key = self.known(number)
        row = self.plain.get(pk=key)
        row.name = f"saved {number}"
        row.save()
        self.become(key, name=row.name)

    def update(self, number: int) -> None:
        self.plain.filter(rank=number % 3).update(rank=(number + 1) % 3)
        for key, (_, rank, _) in list(self.state.articles.items()):
            if rank == number % 3:
                self.become(key, rank=(number + 1) % 3)

    def delete(self, number: int) -> None:
        self.plain.filter(rank=number % 3).delete()
        self.gone(*[key for key, (_, rank, _) in self.state.articles.items() if rank == number % 3])

    def delete_one(self, number: int) -> None:
        key = self.known(number)
        Article(pk=key).delete(using=self.alias)
        self.gone(key)

    def bulk_create(self, number: int) -> None:
        made = [self.new(number + i) for i in range(3)]
        self.articles.bulk_create(Article(pk=key, name=n, rank=r, author_id=a) for key, (n, r, a) in made)

    def bulk_update(self, number: int) -> None:
        keys = {self.known(number), self.known(number + 1)}
        rows = [Article(pk=key, name=f"bulk {number}") for key in keys]
        self.articles.bulk_update(rows, ["name"])
        for key in keys:
            self.become(key, name=f"bulk {number}")

    def article(self, key: int) -> Article:
        row = Article(pk=key)
        row._state.db = self.alias
        return row

    def add(self, number: int) -> None:
        key, tag = self.known(number), number % 2 + 1
        self.article(key).tags.add(tag)
        self.state.tagged.add((key, tag))

    def remove(self, number: int) -> None:
        key, tag = self.known(number), number % 2 + 1
        self.article(key).tags.remove(tag)
        self.state.tagged.discard((key, tag))

    def clear(self, number: int) -> None:
        key = self.known(number)
        self.article(key).tags.clear()
        self.state.tagged = {pair for pair in self.state.tagged if pair[0] != key}

    def raw_insert(self, number: int) -> None:
        key, values = self.new(number)
        self.execute(f"INSERT INTO {ARTICLE} (id, name, rank, author_id) VALUES (%s, %s, %s, %s)", [key, *values])

    def raw_update(self, number: int) -> None:
        key = self.known(number)
        comment = ("", "/* SELECT */ ", "-- SELECT\n")[number % 3]
        self.execute(f"{comment}UPDATE {ARTICLE} SET rank = %s WHERE id = %s", [number % 3, key])
        self.become(key, rank=number % 3)

    def raw_delete(self, number: int) -> None:
        key = self.known(number)
        self.execute(f"DELETE FROM {TAGGED} WHERE article_id = %s", [key])
        self.execute(f"DELETE FROM {ARTICLE} WHERE id = %s", [key])
        self.gone(key)

    def executemany(self, number: int) -> None:
        keys = [self.known(number), self.known(number + 1)]
        with self.connection.cursor() as cursor:
            cursor.executemany(f"UPDATE {ARTICLE} SET rank = %s WHERE id = %s", [(number % 3, key) for key in keys])
        for key in keys:
            self.become(key, rank=number % 3)

    def truncate(self, number: int) -> None:
        self.execute(f"TRUNCATE {TAGGED}")
        self.state.tagged = set()

    def copy(self, number: int) -> None:
        key, (name, rank, author) = self.new(number)
        line = f"{key}\t{name}\t{rank}\t{author or chr(92) + 'N'}\n"
        sql = f"COPY {ARTICLE} (id, name, rank, author_id) FROM STDIN"
        with self.connection.cursor() as cursor:
            if hasattr(cursor.cursor, "copy_expert"):
                cursor.copy_expert(sql, io.StringIO(line))
            else:
                with cursor.copy(sql) as copy:
                    copy.write(line)

    def stream(self, number: int) -> None:
        key = self.known(number)
        with self.connection.cursor() as cursor:
            if not hasattr(cursor.cursor, "stream"):
                return
            sql = f"UPDATE {ARTICLE} SET rank = %s WHERE id = %s RETURNING id"
            assert list(cursor.stream(sql, [number % 3, key])) == [(key,)]
        self.become(key, rank=number % 3)

    def callproc(self, number: int) -> None:
        key = self.known(number)
        with self.connection.cursor() as cursor:
            cursor.callproc("set_rank", [key, number % 3])
        self.become(key, rank=number % 3)

    def function(self, number: int) -> None:
        key = self.known(number)
        source = ("", " FROM testapp_author WHERE id = 1")[number % 2]
        name = "set_rank" if self.vendor == "postgresql" else "set_rank_too"
        with self.connection.cursor() as cursor:
            cursor.execute(f"SELECT {name}(%s, %s){source}", [key, number % 3])
            cursor.fetchall()
        self.become(key, rank=number % 3)

    def modifying_cte(self, number: int) -> None:
        key = self.known(number)
        self.execute(
            f"WITH done AS (UPDATE {ARTICLE} SET rank = %s WHERE id = %s RETURNING id) SELECT * FROM done",
            [number % 3, key],
        )
        self.become(key, rank=number % 3)

    def returning(self, number: int) -> None:
        """A raw queryset that writes, started too: then it is its start that writes."""
        key = self.known(number)
        sql = f"UPDATE {ARTICLE} SET rank = %s WHERE id = %s RETURNING *"
        rows = self.articles.raw(sql, [number % 3, key])
        if number % 2:
            rows = rows.start_fetch()
        self.become(key, rank=number % 3)
        assert [row.rank for row in rows] == [number % 3]

    def insert_returning(self, number: int) -> None:
        key, values = self.new(number)
        sql = f"INSERT INTO {ARTICLE} (id, name, rank, author_id) VALUES (%s, %s, %s, %s) RETURNING *"
        rows = self.articles.raw(sql, [key, *values])
        assert [row.pk for row in rows] == [key]

    def executescript(self, number: int) -> None:
        key = self.known(number)
        with self.connection.cursor() as cursor:
            cursor.executescript(f"UPDATE {ARTICLE} SET rank = {number % 3} WHERE id = {key}; SELECT 1;")
        self.become(key, rank=number % 3)


EVERYWHERE = [
    "create",
    "save",
    "update",
    "delete",
    "delete_one",
    "bulk_create",
    "bulk_update",
    "add",
    "remove",
    "clear",
    "raw_insert",
    "raw_update",
    "raw_delete",
    "executemany",
]
WRITES = {
    "sqlite": (*EVERYWHERE, *EVERYWHERE, "returning", "insert_returning", "executescript"),
    "postgresql": (
        *EVERYWHERE,
        *EVERYWHERE,
        *["truncate", "copy", "stream", "callproc", "function", "modifying_cte", "returning", "insert_returning"],
    ),
    "mysql": (*EVERYWHERE, *EVERYWHERE, "truncate", "callproc", "function", "insert_returning"),
}
ROUTINES = {
    "postgresql": [
        (
            f"CREATE FUNCTION set_rank(integer, integer) RETURNS integer LANGUAGE sql AS"
            f" 'UPDATE {ARTICLE} SET rank = $2 WHERE id = $1 RETURNING 1'"
        ),
    ],
    "mysql": [
        (
            f"CREATE PROCEDURE set_rank(some_id INT, some_rank INT) UPDATE {ARTICLE} SET rank = some_rank"
            f" WHERE id = some_id"
        ),
        (
            f"CREATE FUNCTION set_rank_too(some_id INT, some_rank INT) RETURNS INT NOT DETERMINISTIC MODIFIES SQL DATA"
            f" BEGIN UPDATE {ARTICLE} SET rank = some_rank WHERE id = some_id; RETURN 1; END"
        ),
    ],
    "sqlite": [],
}
DROPPED = {
    "postgresql": ["DROP FUNCTION set_rank(integer, integer)"],
    "mysql": ["DROP PROCEDURE set_rank", "DROP FUNCTION set_rank_too"],
    "sqlite": [],
}

#: No waiting for the disk at each commit; thousands of interleavings have tens of thousands.
HASTE: dict[str, dict[str, str]] = {
    "sqlite": {"init_command": "PRAGMA synchronous=OFF; PRAGMA journal_mode=MEMORY"},
    "postgresql": {"options": "-c synchronous_commit=off"},
    "mysql": {},
}

#: A step is as likely as it is often here.
STEPS = (
    ["start"] * 6
    + ["start_theirs"] * 2
    + ["consume"] * 3
    + ["write"] * 6
    + ["hold", "slow", "slow", "free"]
    + ["other_writes"] * 2
    + ["atomic"] * 2
    + ["atomic_at_level"] * 2
    + ["savepoint", "leave", "leave", "leave", "autocommit", "end_by_hand", "lock", "fail"]
)


def lists_of(*names: str) -> Any:
    numbers = st.integers(0, 359)
    return st.lists(st.tuples(st.sampled_from(names), numbers, numbers), min_size=4, max_size=20)


@pytest.fixture
def run(alias: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What runs one interleaving on a database that has the authors, tags and routines for it."""
    gates, neighbour, connection = Gates(), Neighbour(alias), connections[alias]
    settle, run_on, from_db = Read.settle, Read._run_on, Article.from_db.__func__
    caller = threading.current_thread()

    def settle_after_release(self: Read, *, wait: bool = True, timeout: float | None = None) -> None:
        if wait and threading.current_thread() is caller:
            gates.release()
        settle(self, wait=wait, timeout=timeout)

    def run_slowly(self: Read, *args: Any) -> Any:
        gates.park("before")
        return run_on(self, *args)

    def make_slowly(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if running.get() is not None:
            gates.park("within")
        return from_db(cls, *args, **kwargs)

    monkeypatch.setattr(Read, "settle", settle_after_release)
    monkeypatch.setattr(Read, "_run_on", run_slowly)
    monkeypatch.setattr(Article, "from_db", classmethod(make_slowly))
    monkeypatch.setattr("parallel_orm.connections.under_test", lambda: False)  # keep the workers' connections
    options = connections.settings[alias].setdefault("OPTIONS", {})
    for name, value in HASTE[connection.vendor].items():
        monkeypatch.setitem(options, name, value)
    connection.close()
    Author.objects.using(alias).create(pk=1, name="Ada")
    Tag.objects.using(alias).bulk_create([Tag(pk=1, name="one"), Tag(pk=2, name="two")])
    with connection.cursor() as cursor:
        for sql in ROUTINES[connection.vendor]:
            cursor.execute(sql)
    connection.close()  # what was said so far was for the whole database

    def run_one(steps: list[tuple[str, int, int]], asks: bool) -> None:
        Interleaving(alias, gates, neighbour, asks=asks).run(steps)

    try:
        with override_settings(PARALLEL_ORM={"THREADS": THREADS, "CONNECTIONS": THREADS + 2}):
            yield run_one
    finally:
        gates.open()
        neighbour.close()
        lender.close_idle()
        connection.close()
        with connection.cursor() as cursor:
            for sql in DROPPED[connection.vendor]:
                cursor.execute(sql)


checks = partial(
    settings,
    deadline=None,
    database=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.timeout(120 if EXAMPLES <= 200 else 0)
def test_every_answer_is_that_of_its_start(run: Any, alias: str) -> None:
    """Whatever is written, rolled back or committed between, and whoever runs the query."""
    taken.clear()

    @checks(max_examples=EXAMPLES)
    @given(lists_of(*STEPS), st.booleans())
    def property_holds(steps: list[tuple[str, int, int]], asks: bool) -> None:
        run(steps, asks)

    property_holds()
    print(alias, dict(sorted(taken.items())))


def without_barrier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watch, "settle", lambda self, **_: None)


def without_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watch, "elsewhere", lambda self: NOTHING)


def without_steal_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Watch, "transaction_ends", Watch._end_transaction)


def finds_a_wrong_answer(run: Any, *steps: str) -> bool:
    """Tell whether the property that holds for all is broken: by a wrong answer, or by a lock in the way (SQLite)."""
    found: list[BaseException] = []

    @checks(max_examples=2000, phases=[Phase.generate])
    @given(lists_of(*steps), st.booleans())
    def property_holds(steps: list[tuple[str, int, int]], asks: bool) -> None:
        try:
            run(steps, asks)
        except (Wrong, OperationalError) as wrong:
            found.append(wrong)
            raise

    try:
        property_holds()
    except Exception:  # in a group, where the threads went another way when Hypothesis tried again
        if not found:
            raise
    return bool(found)


@pytest.mark.parametrize("broken", [without_barrier, without_probe])
def test_it_finds_what_is_broken(run: Any, broken: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the barrier, or the question whether another connection would do, some answer is wrong."""
    broken(monkeypatch)
    assert finds_a_wrong_answer(run, *STEPS)


@pytest.mark.parametrize("alias", [pytest.param("postgres", marks=pytest.mark.postgres)], indirect=True)
def test_it_finds_a_snapshot_that_ended(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read of a snapshot that has not begun when its transaction ends would see what others wrote since."""
    without_steal_at_the_end(monkeypatch)
    steps = ("hold", "atomic_at_level", "start_theirs", "other_writes", "leave", "consume")
    assert finds_a_wrong_answer(run, *steps)
