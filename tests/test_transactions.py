"""In a transaction: what may be read in the background, at what price, and what must wait for what."""

from __future__ import annotations

import io
import threading
from typing import Any

import pytest
from django.db import DatabaseError, connections, transaction
from django.db.models import Exists, OuterRef, Prefetch
from django.db.transaction import TransactionManagementError
from django.http import HttpRequest, HttpResponse
from django.test import Client, TestCase, override_settings
from django.test.utils import CaptureQueriesContext
from django.urls import path

from parallel_orm.connections import lender
from tests.test_background import WAIT, articles, busy, landed
from tests.testapp.models import Article, Author

__all__ = ["articles", "busy"]  # fixtures

PROBE, EXPORT = "pg_current_xact_id_if_assigned", "pg_export_snapshot"
POSTGRES = pytest.mark.parametrize("alias", [pytest.param("postgres", marks=pytest.mark.postgres)], indirect=True)
WITHOUT_PROBE = pytest.mark.parametrize(
    "alias",
    [pytest.param("default", marks=pytest.mark.sqlite), pytest.param("mariadb", marks=pytest.mark.mariadb)],
    indirect=True,
)


@pytest.fixture
def sent(alias: str) -> list[str]:
    """All that the driver's cursors of the caller's connection execute: ours too, which Django does not see."""
    connection = connections[alias]
    connection.ensure_connection()
    driver: Any = connection.connection
    factory = driver.cursor_factory
    if factory is None:
        from psycopg2.extensions import cursor as factory
    said: list[str] = []

    class Counting(factory):
        def execute(self, query: Any, *args: Any, **kwargs: Any) -> Any:
            said.append(str(query))
            return super().execute(query, *args, **kwargs)

    driver.cursor_factory = Counting
    return said


def probes(sent: list[str]) -> int:
    return sum(PROBE in statement for statement in sent)


def others_commit(alias: str, number: int = 1) -> None:
    """Another thread, on its own connection."""

    def write() -> None:
        try:
            Article.objects.using(alias).bulk_create(Article(name="theirs") for _ in range(number))
        finally:
            connections.close_all()

    thread = threading.Thread(target=write)
    thread.start()
    thread.join(WAIT)
    assert not thread.is_alive()


def execute(alias: str, sql: str, parameters: Any = None) -> None:
    with connections[alias].cursor() as cursor:
        cursor.execute(sql, parameters)


def reason_of(queryset: Any) -> Any:
    started = queryset.all().start_count()
    pending = started.background["count"]
    assert started.count() >= 0
    return pending.reason


# --- A view ------------------------------------------------------------------------------


def page(request: HttpRequest) -> HttpResponse:
    alias = request.GET["alias"]
    rows, number = (Article.objects.using(alias).order_by("pk") for _ in range(2))
    rows.start_fetch(), number.start_count()
    if "write" in request.GET:
        Article.objects.using(alias).create(name="written")
    more = Article.objects.using(alias).start_count()
    if "late" not in request.GET:  # else who is faster decides
        [landed(started) for queryset in (rows, number, more) for started in queryset.background.values()]
    reasons = [str(p.reason and p.reason[:]) for q in (rows, number, more) for p in q.background.values()]
    return HttpResponse(" ".join([*reasons, str(len(rows)), str(number.count()), str(more.count())]))


urlpatterns = [path("", page)]


@pytest.fixture
def get(alias: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(connections.settings[alias], "ATOMIC_REQUESTS", True)
    with override_settings(ROOT_URLCONF=__name__):
        yield lambda **query: Client().get("/", {"alias": alias, **query}).content.decode()


@POSTGRES
def test_a_view_that_only_reads_gains(articles: Any, alias: str, get: Any, sent: list[str]) -> None:
    """Under ATOMIC_REQUESTS all runs in the background, for one probe that nobody sees among the view's queries."""
    with CaptureQueriesContext(connections[alias]) as captured:
        assert get() == "None None None 30 30 30"
    assert probes(sent) == 1
    assert [query["sql"].split()[0] for query in captured] == ["BEGIN", "SELECT", "SELECT", "SELECT", "COMMIT"]
    assert not any(PROBE in query["sql"] for query in captured)


@POSTGRES
def test_a_view_that_writes_reads_its_writes(articles: Any, alias: str, get: Any, sent: list[str], busy: Any) -> None:
    """What was started before its write has the rows before it, what is started after it those after it."""
    assert get(write=1, late=1) == "stolen stolen transaction 30 30 31"
    assert probes(sent) == 1


@WITHOUT_PROBE
def test_a_view_elsewhere_reads_on_its_own_connection(articles: Any, alias: str, get: Any) -> None:
    assert get(write=1) == "transaction transaction transaction 30 30 31"


# --- The probe ---------------------------------------------------------------------------


@POSTGRES
def test_one_probe_for_each_transaction_and_none_outside(articles: Any, alias: str, sent: list[str]) -> None:
    assert [reason_of(articles) in {None, "stolen"} for _ in range(3)] == [True] * 3
    assert probes(sent) == 0
    for number in (1, 2):
        with transaction.atomic(using=alias):
            for _ in range(3):
                assert landed(articles.all().start_fetch().background["fetch"])
                list(articles.filter(rank=1))  # a read of one's own asks no new question
                with transaction.atomic(using=alias):
                    assert landed(articles.all().start_count().background["count"]) == 30
        assert probes(sent) == number


@POSTGRES
def test_after_a_write_nothing_is_asked(articles: Any, alias: str, sent: list[str]) -> None:
    """The read then runs within its start, which knows without a probe that it must."""
    with transaction.atomic(using=alias):
        Article.objects.using(alias).create(name="mine")
        started = articles.all().start_fetch()
        assert started.background["fetch"].done()
        assert (len(started), started.background["fetch"].reason) == (31, "transaction")
    assert probes(sent) == 0


@POSTGRES
@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO testapp_tag (name) VALUES ('x')",
        "WITH t AS (INSERT INTO testapp_tag (name) VALUES ('x') RETURNING 1) SELECT * FROM t",
        "SELECT * FROM testapp_article FOR UPDATE",
        "SELECT * FROM testapp_article FOR KEY SHARE",
        "LOCK TABLE testapp_tag IN ACCESS EXCLUSIVE MODE",
        "LOCK TABLE testapp_tag IN ACCESS SHARE MODE",
        "SELECT nextval('testapp_tag_id_seq'), pg_current_xact_id()",
        "CREATE TEMPORARY TABLE scratch (a int) ON COMMIT DROP",
        "SAVEPOINT s; INSERT INTO testapp_tag (name) VALUES ('x')",
        "TRUNCATE testapp_label",
        "DO $$ BEGIN DELETE FROM testapp_article; END $$",
    ],
)
def test_what_writes_or_locks_keeps_reads_here(articles: Any, alias: str, sql: str) -> None:
    """A read that was started before it has no part in it, one that is started after it runs where it ran."""
    with transaction.atomic(using=alias):
        before = articles.all().start_count()
        execute(alias, sql)
        assert before.background["count"].done()
        assert before.count() == 30
        assert reason_of(articles) in {"transaction", "session"}
        transaction.set_rollback(True, using=alias)


def test_select_for_update_locks_here(articles: Any, alias: str) -> None:
    if not connections[alias].features.has_select_for_update:
        pytest.skip("the database has none")
    with transaction.atomic(using=alias):
        started = articles.select_for_update().start_fetch()
        assert (len(started), started.background["fetch"].reason) == (30, "select_for_update")
        assert reason_of(articles) == "transaction"


@WITHOUT_PROBE
def test_any_other_database_reads_here(articles: Any, alias: str) -> None:
    with transaction.atomic(using=alias):
        assert reason_of(articles) == "transaction"
    assert reason_of(articles) in {None, "stolen"}


@POSTGRES
def test_in_nested_blocks(articles: Any, alias: str) -> None:
    """A savepoint that nothing was written behind is no reason to stay; a write in it is, even when rolled back."""
    with transaction.atomic(using=alias):
        with transaction.atomic(using=alias):
            assert landed(articles.all().start_count().background["count"]) == 30
            assert articles.all().start_count().background["count"].reason is None
        with pytest.raises(ArithmeticError), transaction.atomic(using=alias):
            Article.objects.using(alias).create(name="mine")
            inside = articles.all().start_count()
            raise ArithmeticError
        assert (inside.count(), inside.background["count"].reason) == (31, "transaction")
        after = articles.all().start_count()
        assert (after.count(), after.background["count"].reason) == (30, "transaction")


@POSTGRES
def test_with_autocommit_off(articles: Any, alias: str) -> None:
    """Every commit begins anew: a transaction that has not written may be read elsewhere."""
    transaction.set_autocommit(False, using=alias)
    try:
        assert landed(articles.all().start_count().background["count"]) == 30
        Article.objects.using(alias).create(name="mine")
        assert reason_of(articles) == "transaction"
        transaction.commit(using=alias)
        started = articles.all().start_count()
        assert landed(started.background["count"]) == 31
        assert started.background["count"].reason is None
        transaction.rollback(using=alias)
    finally:
        transaction.set_autocommit(True, using=alias)


def test_a_transaction_that_was_begun_by_hand(articles: Any, alias: str) -> None:
    """By BEGIN, of which Django does not know."""
    execute(alias, "BEGIN")
    try:
        execute(alias, "INSERT INTO testapp_tag (name) VALUES ('x')")
        execute(alias, "DELETE FROM testapp_article")
        started = articles.all().start_count()
        assert (started.count(), started.background["count"].reason in {"transaction", "session"}) == (0, True)
    finally:
        execute(alias, "ROLLBACK")
    assert articles.all().start_count().count() == 30


class InATestCase(TestCase):
    databases = {"default"}

    def test_a_testcase_and_what_is_within(self) -> None:
        """The transaction of a TestCase is no transaction of the code under test, and one within it is."""
        assert reason_of(Article.objects.all()) == "testcase"
        with transaction.atomic():
            assert reason_of(Article.objects.all()) == "transaction"


# --- Isolation levels ----------------------------------------------------------------------


def begin(alias: str, level: str) -> None:
    execute(alias, f"SET TRANSACTION ISOLATION LEVEL {level}")


@POSTGRES
def test_repeatable_read_in_the_background(articles: Any, alias: str, sent: list[str]) -> None:
    """Another connection reads the caller's snapshot, whatever was committed since; for one probe and one export."""
    with transaction.atomic(using=alias):
        begin(alias, "REPEATABLE READ")
        assert articles.count() == 30
        others_commit(alias)
        started = [articles.all().start_count(), articles.prefetch_related("tags", "labels").start_fetch()]
        assert landed(started[0].background["count"]) == 30
        assert len(landed(started[1].background["fetch"])) == 30
        assert [p.reason for q in started for p in q.background.values()] == [None, None]
        assert (probes(sent), sum(EXPORT in statement for statement in sent)) == (1, 1)
    assert articles.count() == 31


@POSTGRES
@pytest.mark.parametrize("end", ["commit", "roll back", "close"])
def test_a_snapshot_that_ends_before_its_read_has_begun(articles: Any, alias: str, busy: Any, end: str) -> None:
    """The read is run while there is a snapshot to read."""
    with transaction.atomic(using=alias):
        begin(alias, "REPEATABLE READ")
        started = articles.all().start_count()
        others_commit(alias)
        assert not started.background["count"].done()
        if end == "roll back":
            transaction.set_rollback(True, using=alias)
        elif end == "close":
            connections[alias].close()
    assert started.background["count"].done()
    assert started.count() == 30
    assert articles.count() == 31


@POSTGRES
def test_a_snapshot_and_a_savepoint(articles: Any, alias: str) -> None:
    """A snapshot cannot be exported behind a savepoint; one that was before it is as good as ever."""
    with transaction.atomic(using=alias):
        begin(alias, "REPEATABLE READ")
        with transaction.atomic(using=alias):
            assert reason_of(articles) == "transaction"
        assert reason_of(articles) == "transaction"
    with transaction.atomic(using=alias):
        begin(alias, "REPEATABLE READ")
        assert landed(articles.all().start_count().background["count"]) == 30
        others_commit(alias)
        with transaction.atomic(using=alias):
            assert landed(articles.all().start_count().background["count"]) == 30


@POSTGRES
def test_serializable_reads_here(articles: Any, alias: str) -> None:
    with transaction.atomic(using=alias):
        begin(alias, "SERIALIZABLE")
        assert reason_of(articles) == "transaction"


@POSTGRES
def test_a_level_is_set_while_reads_are_pending(articles: Any, alias: str, busy: Any) -> None:
    """No read of before is run within the transaction ahead of the statement that must be its first."""
    started = articles.all().start_count()
    with transaction.atomic(using=alias):
        begin(alias, "REPEATABLE READ")
        assert not started.background["count"].done()
        Article.objects.using(alias).create(name="mine")
        assert started.background["count"].done()
    assert started.count() == 30


# --- What has failed -------------------------------------------------------------------------


@POSTGRES
def test_in_a_transaction_that_has_failed(articles: Any, alias: str) -> None:
    """The start raises nothing; its use raises what Django would."""
    with pytest.raises(DatabaseError), transaction.atomic(using=alias):
        execute(alias, "SELECT 1 / 0")
    with transaction.atomic(using=alias):
        with pytest.raises(DatabaseError):
            execute(alias, "SELECT 1 / 0")
        started = articles.all().start_count()
        with pytest.raises(DatabaseError, match="transaction is aborted"):
            started.count()
        transaction.set_rollback(True, using=alias)
    assert articles.count() == 30


def test_in_a_block_that_must_be_rolled_back(articles: Any, alias: str) -> None:
    with transaction.atomic(using=alias):
        transaction.set_rollback(True, using=alias)
        started = articles.all().start_count()
        assert started.background["count"].reason == "transaction"
        with pytest.raises(TransactionManagementError):
            started.count()


@POSTGRES
def test_what_was_started_before_the_block_had_to_be_rolled_back(articles: Any, alias: str, busy: Any) -> None:
    """Inline it would have had its answer by then, and so it has."""
    with transaction.atomic(using=alias):
        started = articles.all().start_count()
        transaction.set_rollback(True, using=alias)
        assert started.count() == 30


def test_in_a_block_whose_connection_was_closed(articles: Any, alias: str) -> None:
    """Django opens no connection there, and so neither do we: the error is that of the query without a start."""

    def raised(use: Any) -> type[BaseException]:
        with pytest.raises(Exception) as error, transaction.atomic(using=alias):  # of the driver, on mysqlclient
            connections[alias].close()
            use()
        return error.type

    def started() -> None:
        queryset = articles.all().start_count()
        assert queryset.background["count"].reason == "transaction"
        queryset.count()

    assert raised(started) is raised(articles.all().count)


# --- The drivers' other ways to write ---------------------------------------------------------


def by_copy(alias: str) -> None:
    with connections[alias].cursor() as cursor:
        if hasattr(cursor.cursor, "copy_expert"):
            cursor.copy_expert("COPY testapp_article (name, rank) FROM STDIN", io.StringIO("x\t1\n"))
        else:
            with cursor.copy("COPY testapp_article (name, rank) FROM STDIN") as copy:
                copy.write("x\t1\n")


def by_stream(alias: str) -> None:
    with connections[alias].cursor() as cursor:
        if not hasattr(cursor.cursor, "stream"):
            pytest.skip("psycopg 3 has it")
        list(cursor.stream("DELETE FROM testapp_article WHERE rank = 1 RETURNING id"))


def by_script(alias: str) -> None:
    with connections[alias].cursor() as cursor:
        cursor.executescript("DELETE FROM testapp_article WHERE rank = 1;")


def by_several(alias: str) -> None:
    with transaction.atomic(using=alias):
        execute(alias, "SAVEPOINT s")
        execute(alias, "ROLLBACK TO SAVEPOINT s; DELETE FROM testapp_article WHERE rank = 1")


@pytest.mark.parametrize(
    ("alias", "write"),
    [
        pytest.param("postgres", by_copy, marks=pytest.mark.postgres),
        pytest.param("postgres", by_stream, marks=pytest.mark.postgres),
        pytest.param("postgres", by_several, marks=pytest.mark.postgres),
        pytest.param("default", by_script, marks=pytest.mark.sqlite),
    ],
    indirect=["alias"],
)
def test_it_waits_for_reads(articles: Any, alias: str, busy: Any, write: Any) -> None:
    """What is started is done before anything is written, whichever way."""
    started = articles.all().start_count()
    write(alias)
    assert started.background["count"].done()
    assert started.count() == 30
    assert articles.count() != 30


@POSTGRES
def test_copy_leaves_the_session_as_it_was(articles: Any, alias: str) -> None:
    """It changes rows and nothing else: the reads after it go elsewhere as ever."""
    by_copy(alias)
    started = articles.all().start_count()
    assert landed(started.background["count"]) == 31
    assert started.background["count"].reason is None
    lender.close_idle()


@POSTGRES
def test_a_stolen_read_that_fails_leaves_a_transaction_that_began_after_it_alone(articles, alias, busy):
    failing = articles.all().extra(where=["1 / (rank - rank) = 1"]).start_fetch()
    fine = articles.all().start_count()
    with transaction.atomic(using=alias):
        Article.objects.using(alias).create(name="new")  # has both run here
    with pytest.raises(DatabaseError, match="division by zero"):
        list(failing)
    assert (fine.count(), articles.all().count()) == (30, 31)
    assert failing.background["fetch"].reason == fine.background["count"].reason == "stolen"


@pytest.mark.parametrize("place", ["prefetch", "subquery", "exists"])
@POSTGRES
def test_locks_of_other_querysets_within_one_are_taken_by_the_caller(articles, alias, place):
    author = Author.objects.using(alias).create(name="author")
    articles.update(author=author)
    locked = Article.objects.using(alias).select_for_update()
    querysets = {
        "prefetch": Author.objects.using(alias).prefetch_related(Prefetch("articles", locked)),
        "subquery": Author.objects.using(alias).filter(articles__in=locked[:1]),
        "exists": Author.objects.using(alias).filter(~~Exists(locked.filter(author=OuterRef("pk")))),
    }
    with transaction.atomic(using=alias):
        started = querysets[place].start_fetch()
        assert list(started) == [author]
        assert started.background["fetch"].reason == "select_for_update"
