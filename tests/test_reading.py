"""In the background nothing is executed that may do more than read: whoever needs the answer does that."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from django.db import OperationalError, connections, transaction
from django.db.models import BigIntegerField, Func, Lookup, Prefetch
from django.db.models.fields import IntegerField
from django.test.utils import CaptureQueriesContext

from parallel_orm import errors, events
from parallel_orm.connections import lender
from parallel_orm.statements import bond_of
from parallel_orm.watch import Reading
from tests.asynchronous import run as run_async
from tests.test_background import WAIT, articles, busy, landed
from tests.test_transactions import POSTGRES, execute, others_commit
from tests.testapp.models import Article, Author, Tag

__all__ = ["articles", "busy"]  # fixtures


def tried(queryset: Any) -> Any:
    """Wait until the threads have done what they can; return the Pending of its fetch."""
    pending = queryset.background["fetch"]
    left = threading.Event()
    pending._read.when_tried(left.set)
    assert left.wait(WAIT)
    return pending


@pytest.fixture
def on_each_row(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have something done for each instance that is made of a row."""

    def teach(do: Callable[[Any], Any], model: Any = Article) -> None:
        from_db = model.from_db.__func__

        def do_and_make(cls: Any, *args: Any, **kwargs: Any) -> Any:
            instance = from_db(cls, *args, **kwargs)
            do(instance)
            return instance

        monkeypatch.setattr(model, "from_db", classmethod(do_and_make))

    return teach


def note(instance: Any) -> None:
    """What an audit would do."""
    Tag.objects.using(instance._state.db).create(name="read")


def notes(alias: str) -> int:
    return Tag.objects.using(alias).filter(name="read").count()


def test_what_writes_while_rows_are_made_is_done_by_the_caller(articles: Any, alias: str, on_each_row: Any) -> None:
    on_each_row(note)
    before = events.counts()["inline"]
    started = articles[:3].start_fetch()
    pending = tried(started)
    assert (pending.done(), notes(alias)) == (False, 0)
    assert len(started) == 3
    assert (pending.reason, pending.connect_time, notes(alias)) == ("writes", None, 3)
    assert events.counts()["inline"] == before + 1


@POSTGRES
def test_its_writes_are_part_of_the_transaction_of_the_caller(articles: Any, alias: str, on_each_row: Any) -> None:
    on_each_row(note)
    with transaction.atomic(using=alias):
        started = articles[:3].start_fetch()
        tried(started)
        assert len(started) == 3
        assert notes(alias) == 3
        transaction.set_rollback(True, using=alias)
    assert notes(alias) == 0


def test_who_hides_the_refusal_gains_nothing(articles: Any, alias: str, on_each_row: Any) -> None:
    """An exception that is caught on its way is one all the same, and nothing is executed after it."""

    def note_if_possible(instance: Any) -> None:
        try:
            with transaction.atomic(using=instance._state.db):
                note(instance)
        except Exception:
            instance.unnoted = True

    on_each_row(note_if_possible)
    started = articles[:3].start_fetch()
    tried(started)
    assert [hasattr(row, "unnoted") for row in started] == [False] * 3
    assert (started.background["fetch"].reason, notes(alias)) == ("writes", 3)


def test_what_reads_while_rows_are_made_is_read_there(articles: Any, alias: str, on_each_row: Any) -> None:
    def look(instance: Any) -> None:
        with transaction.atomic(using=alias), transaction.atomic(using=alias):
            instance.seen = Tag.objects.using(alias).count()

    on_each_row(look)
    started = articles[:3].start_fetch()
    assert [row.seen for row in landed(started.background["fetch"])] == [0, 0, 0]
    assert started.background["fetch"].reason is None


@contextmanager
def held(on_each_row: Any) -> Any:
    """Threads that make a row wait until somebody waits for them, and then write. Yields what opens it then."""
    reached, gate = threading.Event(), threading.Event()
    caller = threading.get_ident()

    def wait_and_note(instance: Any) -> None:
        if threading.get_ident() != caller and not gate.is_set():
            reached.set()
            assert gate.wait(WAIT)
        note(instance)

    on_each_row(wait_and_note)

    def open_when_waited_for(read: Any) -> None:
        assert reached.wait(WAIT)
        when_tried = read.when_tried

        def wait(wake: Any) -> None:
            when_tried(wake)
            gate.set()

        read.when_tried = wait

    try:
        yield open_when_waited_for
    finally:
        gate.set()


@pytest.mark.parametrize("use", [list, len, bool, lambda rows: rows.background["fetch"].result(WAIT)])
def test_who_waits_for_it_does_it(articles: Any, alias: str, on_each_row: Any, use: Any) -> None:
    with held(on_each_row) as open_when_waited_for:
        started = articles[:2].start_fetch()
        open_when_waited_for(started.background["fetch"]._read)
        use(started)
    assert (started.background["fetch"].reason, notes(alias)) == ("writes", 2)


def test_who_awaits_it_does_it(articles: Any, alias: str, on_each_row: Any) -> None:
    async def wait_for_it() -> Any:
        with held(on_each_row) as open_when_waited_for:
            started = articles[:2].start_fetch()
            read = started.background["fetch"]._read
            await asyncio.to_thread(read.begun.result, WAIT)
            await asyncio.to_thread(open_when_waited_for, read)
            await asyncio.wait_for(started.background["fetch"]._awaited(), WAIT)
        return started.background["fetch"].reason

    assert run_async(wait_for_it()) == "writes"
    assert notes(alias) == 2


def test_a_write_has_it_done_before(articles: Any, alias: str, on_each_row: Any) -> None:
    """The barrier waits for a thread that leaves it over, and does it then."""
    with held(on_each_row) as open_when_waited_for:
        started = articles[:2].start_fetch()
        open_when_waited_for(started.background["fetch"]._read)
        articles.update(rank=7)
    assert started.background["fetch"].done()
    assert ([row.rank for row in started], notes(alias), articles.filter(rank=7).count()) == ([0, 1], 2, 30)


def test_a_prefetch_beside_others(articles: Any, alias: str, on_each_row: Any) -> None:
    """What one of several threads may not do is left over with all of the read."""
    author = Author.objects.using(alias).create(name="Ada")
    articles.update(author=author)
    on_each_row(note, Author)
    for lookups in (["author", "tags", "labels"], ["tags", "labels", "author"]):
        Tag.objects.using(alias).all().delete()
        started = articles.prefetch_related(*lookups).start_fetch()
        assert not tried(started).done()
        assert notes(alias) == 0
        assert {row.author for row in started} == {author}
        assert (started.background["fetch"].reason, notes(alias)) == ("writes", 1)


def test_its_queries_are_seen_once(articles: Any, alias: str, on_each_row: Any) -> None:
    on_each_row(note)
    with CaptureQueriesContext(connections[alias]) as inline:
        list(articles[:2].all())
    with CaptureQueriesContext(connections[alias]) as captured:
        started = articles[:2].all().start_fetch()
        tried(started)
        list(started)
    assert [query["sql"] for query in captured] == [query["sql"] for query in inline]


def test_nobody_uses_it(articles: Any, alias: str, on_each_row: Any) -> None:
    on_each_row(note)
    started = articles[:2].start_fetch()
    assert tried(started).cancel()
    with pytest.raises(errors.Cancelled):
        list(started)
    del started
    assert notes(alias) == 0


def test_in_another_thread_it_is_refused(articles: Any, alias: str, on_each_row: Any) -> None:
    """There is no connection there whose transaction its writes would be part of."""
    on_each_row(note)
    started = articles[:2].start_fetch()
    tried(started)

    def use() -> Any:
        try:
            return list(started)
        finally:
            connections.close_all()

    with ThreadPoolExecutor(1) as pool, pytest.raises(errors.NotARead, match="INSERT INTO"):
        pool.submit(use).result(WAIT)
    assert notes(alias) == 0


class Following(Func):
    """Names its function only when the SQL is made."""

    output_field = BigIntegerField()

    def as_sql(self, compiler: Any, connection: Any, **kwargs: Any) -> Any:
        return "nextval('testapp_tag_id_seq')", []


@POSTGRES
def test_sql_that_comes_out_at_last(articles: Any, alias: str) -> None:
    started = articles.annotate(x=Following())[:1].start_fetch()
    pending = tried(started)
    assert not pending.done()
    (row,) = started
    with connections[alias].cursor() as cursor:
        cursor.execute("SELECT currval('testapp_tag_id_seq')")  # of this session
        assert cursor.fetchone() == (row.x,)
    assert pending.reason == "writes"


class Same(Lookup):
    """A look-up with SQL of its own."""

    lookup_name = "same"

    def as_sql(self, compiler: Any, connection: Any) -> Any:
        lhs, lhs_params = self.process_lhs(compiler, connection)
        rhs, rhs_params = self.process_rhs(compiler, connection)
        return f"{lhs} = abs({rhs})", (*lhs_params, *rhs_params)


def test_look_ups_of_the_project_that_compute(articles: Any, alias: str) -> None:
    IntegerField.register_lookup(Same)
    try:
        started = articles.filter(rank__same=1).start_count()
        assert landed(started.background["count"]) == 10
    finally:
        IntegerField._unregister_lookup(Same)


def test_functions_of_the_project_that_compute(postgres: str) -> None:
    """A function that says that it only reads is asked for in the background."""
    execute(
        postgres, "CREATE OR REPLACE FUNCTION pg_temp_free(a int) RETURNS int STABLE LANGUAGE sql AS 'SELECT 2 * a'"
    )
    connections[postgres].close()
    try:
        Article.objects.using(postgres).create(rank=4)
        twice = Func("rank", function="pg_temp_free", output_field=IntegerField())
        rows = Article.objects.using(postgres).annotate(x=twice)
        author = Author.objects.using(postgres).create()
        Article.objects.using(postgres).update(author=author)
        for started, value in [
            (rows.values_list("x", flat=True).start_fetch(), [8]),
            (Author.objects.using(postgres).prefetch_related(Prefetch("articles", rows)).start_fetch(), [author]),
        ]:
            assert landed(started.background["fetch"]) == value
            assert started.background["fetch"].reason is None
    finally:
        execute(postgres, "DROP FUNCTION pg_temp_free(int)")


def test_the_clock_is_refused_in_transactions_alone() -> None:
    said: list[Any] = []
    wrapper: Any = SimpleNamespace(alias="default", vendor="sqlite")
    assert bond_of("SELECT now()") is not None
    Reading(said, frozenset(), in_transaction=False).hear(wrapper, "SELECT now()")
    reading = Reading(said, frozenset(), in_transaction=True)
    reading.hear(wrapper, "SELECT 1")
    with pytest.raises(errors.NotARead):
        reading.hear(wrapper, "SELECT now()")
    with pytest.raises(errors.NotARead):
        reading.hear(wrapper, "SELECT 1")
    with pytest.raises(errors.NotARead):
        Reading(said, frozenset(), in_transaction=False).hear(wrapper, None)


@POSTGRES
@pytest.mark.parametrize("end", ["commit", "savepoint"])
def test_what_was_set_for_a_transaction_is_over(articles: Any, alias: str, on_each_row: Any, end: str) -> None:
    """What it would read without it may be another tenant's: there is an error, and no answer."""
    gate, reached = threading.Event(), threading.Event()

    def wait_and_note(instance: Any) -> None:
        reached.set()
        assert gate.wait(WAIT)
        note(instance)

    on_each_row(wait_and_note)
    with transaction.atomic(using=alias):
        execute(alias, "SAVEPOINT s")
        execute(alias, "SET LOCAL app.tenant = 'a'")
        started = articles[:1].start_fetch()
        assert reached.wait(WAIT)
        if end == "savepoint":
            execute(alias, "ROLLBACK TO SAVEPOINT s")
            gate.set()
            with pytest.raises(errors.NotARead):
                list(started)
    gate.set()
    with pytest.raises(errors.NotARead):
        list(started)
    assert notes(alias) == 0


# --- What is stolen in a transaction that began after it ------------------------------------


WITH_SNAPSHOTS = pytest.mark.parametrize(
    "alias",
    [pytest.param("postgres", marks=pytest.mark.postgres), pytest.param("mariadb", marks=pytest.mark.mariadb)],
    indirect=True,
)


@WITH_SNAPSHOTS
@pytest.mark.parametrize("first", ["none", "transaction"])
def test_a_level_can_be_set_after_it(articles: Any, alias: str, busy: Any, first: str) -> None:
    """It is no query of the transaction in which it happens to be used: the level may be set, and the snapshot is
    that of the transaction's own first query.
    """
    if first == "transaction" and alias == "postgres":
        with transaction.atomic(using=alias):
            started = articles.all().start_count()
    else:
        started = articles.all().start_count()
    with transaction.atomic(using=alias):
        assert started.count() == 30
        if alias == "postgres":
            execute(alias, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        others_commit(alias)
        assert articles.count() == 31
    assert started.background["count"].reason == "stolen"


@WITH_SNAPSHOTS
def test_a_level_that_was_set_before_it(articles: Any, alias: str, busy: Any) -> None:
    started = articles.all().start_count()
    with transaction.atomic(using=alias):
        if alias == "postgres":
            execute(alias, "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
        assert started.count() == 30
        others_commit(alias)
        assert articles.count() == 31


@WITH_SNAPSHOTS
def test_where_no_connection_is_to_be_had(articles: Any, alias: str, busy: Any, monkeypatch: Any) -> None:
    """Then it is better run in the transaction than not at all."""
    started = articles.all().start_count()

    @contextmanager
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OperationalError("too many connections")
        yield

    monkeypatch.setattr(lender, "lent", refuse)
    with transaction.atomic(using=alias):
        assert started.count() == 30
