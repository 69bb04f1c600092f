"""ParallelConnection: the same SQL on several connections, answered as one."""

from __future__ import annotations

import os
import sqlite3
import threading
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from django.db import DatabaseError, InterfaceError, OperationalError, connections
from django.test import TestCase, override_settings
from django.test.utils import CaptureQueriesContext
from django.utils.connection import ConnectionDoesNotExist

from parallel_orm import ParallelConnection, errors
from parallel_orm.connections import lender
from tests.testapp.models import Tag

WAIT = 60


@pytest.fixture
def made(tmp_path):
    """Connections of SQLite's own, each to a file with other rows."""
    found = []
    for number in range(3):
        connection = sqlite3.connect(tmp_path / f"{number}.sqlite3", check_same_thread=False)
        connection.execute("CREATE TABLE numbers (place INTEGER, n INTEGER)")
        connection.executemany("INSERT INTO numbers VALUES (?, ?)", [(number, n) for n in range(5)])
        connection.commit()
        found.append(connection)
    yield found
    for connection in found:
        connection.close()


@pytest.fixture
def connection(made):
    with closing(ParallelConnection(made)) as connection:
        yield connection


def driver_of(alias):
    """Return what opens a connection of the driver to the database of an alias, beside Django's."""
    wrapper = connections[alias]
    return partial(wrapper.Database.connect, **wrapper.get_connection_params())


ALL = [(place, n) for place in range(3) for n in range(5)]
ROWS = "SELECT place, n FROM numbers ORDER BY n"


# --- A cursor ---------------------------------------------------------------------------


@pytest.mark.parametrize("itersize", [None, 1, 2, 5, 100])
def test_rows_come_in_the_order_of_the_connections(connection, itersize):
    for fetch in (
        lambda cursor: cursor.fetchall(),
        list,
        lambda cursor: list(iter(cursor.fetchone, None)),
        lambda cursor: [row for rows in iter(lambda: cursor.fetchmany(4), []) for row in rows],
        lambda cursor: [cursor.fetchone(), *cursor.fetchmany(6), next(cursor), *cursor.fetchall()],
    ):
        cursor = connection.cursor(itersize)
        assert cursor.execute(ROWS) is cursor
        assert fetch(cursor) == ALL
        assert cursor.fetchone() is None, "a second time, and a third"
        assert (cursor.fetchone(), cursor.fetchmany(3), cursor.fetchall(), list(cursor)) == (None, [], [], [])


def test_what_pep_249_has(connection):
    cursor = connection.cursor()
    assert (cursor.description, cursor.rowcount, cursor.arraysize) == (None, -1, 1)
    cursor.execute(ROWS)
    assert [column[0] for column in cursor.description] == ["place", "n"]
    assert cursor.fetchmany() == ALL[:1]
    cursor.arraysize = 3
    assert cursor.fetchmany() == ALL[1:4]
    cursor.execute("UPDATE numbers SET n = n + 1")
    assert (cursor.description, cursor.rowcount) == (None, 15)
    cursor.setinputsizes([1])
    cursor.setoutputsize(1)
    with connection.cursor() as another:
        another.execute("SELECT sum(n) FROM numbers")
        assert another.fetchall() == [(15,)] * 3
    with pytest.raises(InterfaceError, match="cursor is closed"):
        another.fetchall()
    assert len(connection) == 3


def test_parameters_of_all_and_of_some(connection):
    query = "SELECT place, n FROM numbers WHERE n = ?"
    assert connection.execute(query, (3,)).fetchall() == [(0, 3), (1, 3), (2, 3)]
    assert connection.execute(query, execute_on={2: (0,), 0: (4,)}).fetchall() == [(0, 4), (2, 0)]
    assert connection.execute("SELECT '100%'").fetchall() == [("100%",)] * 3
    assert connection.executemany("INSERT INTO numbers VALUES (9, ?)", iter([(7,), (8,)])).rowcount == 6
    assert connection.execute("SELECT count(*) FROM numbers WHERE place = 9").fetchall() == [(2,)] * 3
    for given, said in (({3: ()}, "names the connection 3; there are 0 to 2"), ({-1: ()}, "-1"), ({"a": ()}, "'a'")):
        with pytest.raises(errors.InvalidOption, match=said):
            connection.execute(query, execute_on=given)
    with pytest.raises(errors.InvalidOption, match="Give args"):
        connection.execute(query, (1,), execute_on={0: (1,)})


def test_columns_that_differ(connection, made):
    made[1].execute("ALTER TABLE numbers ADD COLUMN more INTEGER")
    with pytest.raises(errors.UnequalResults, match=r"\['place', 'n'\].*\['place', 'n', 'more'\]"):
        connection.execute("SELECT * FROM numbers")
    assert connection.execute(ROWS).fetchall() == ALL


# --- Errors -----------------------------------------------------------------------------


def test_an_error_tells_its_connection(connection, made):
    made[1].execute("DROP TABLE numbers")
    with pytest.raises(sqlite3.OperationalError, match="no such table") as caught:
        connection.execute(ROWS)
    assert caught.value.connection_index == 1
    assert any("on connection 1 (sqlite3)" in line for line in caught.value.__notes__)
    assert connection.execute(ROWS, execute_on={0: (), 2: ()}).fetchall() == [row for row in ALL if row[0] != 1]


def test_errors_of_several_are_all_told(connection):
    with pytest.raises(sqlite3.OperationalError) as caught:
        connection.execute("SELECT * FROM nothing")
    told = "\n".join(caught.value.__notes__)
    assert all(f"connection {index}" in told for index in range(3))


def test_an_error_while_rows_come(made):
    """In its place: the rows before it are there."""

    def broken(n):
        if n == 3:
            raise ValueError
        return n

    made[1].create_function("broken", 1, broken)
    for each in (made[0], made[2]):
        each.create_function("broken", 1, lambda n: n)
    with closing(ParallelConnection(made)) as connection:
        cursor = connection.cursor(itersize=1).execute("SELECT place, broken(n) FROM numbers")
        found = []
        with pytest.raises(sqlite3.OperationalError) as caught:
            found += cursor
            found.extend(row for row in cursor)
        assert caught.value.connection_index == 1
        assert cursor.connection.execute(ROWS, execute_on={0: ()}).fetchall() == ALL[:5]


@pytest.mark.parametrize("alias_", ["postgres", "mariadb"])
def test_the_first_error_cancels_the_others(request, alias_):
    """A query of a minute ends when another one fails."""
    alias = request.getfixturevalue(alias_)
    default = request.getfixturevalue("default")
    slow = {"postgres": "SELECT pg_sleep(60)", "mariadb": "SELECT SLEEP(60)"}[alias_]
    with closing(ParallelConnection([default, alias])) as connection:
        with pytest.raises(DatabaseError) as caught:
            connection.execute(slow)  # which SQLite does not know
        assert caught.value.connection_index == 0
        connection.rollback()
        assert connection.execute("SELECT 1 AS one").fetchall() == [(1,), (1,)]


# --- What connections there may be ---------------------------------------------------------


def test_aliases(alias):
    """Connections of their own, in Django's words, and given back."""
    Tag.objects.using(alias).bulk_create(Tag(name=f"tag {n}") for n in range(6))
    with CaptureQueriesContext(connections[alias]) as queries, ParallelConnection([alias]) as connection:
        cursor = connection.cursor(itersize=2).execute(
            "SELECT name FROM testapp_tag WHERE name <> %s ORDER BY name", ["x"]
        )
        assert [name for (name,) in cursor] == [f"tag {n}" for n in range(6)]
        with pytest.raises(DatabaseError) as caught:
            connection.execute("SELECT * FROM nothing")
        assert caught.value.connection_index == 0
        assert any(f"({alias})" in line for line in caught.value.__notes__)
    assert len(queries) == 0
    assert lender._out[alias] == 0
    assert connection.closed
    connection.close()
    with pytest.raises(InterfaceError, match="is closed"):
        connection.execute("SELECT 1")


def test_databases_of_several_kinds(default, postgres, mariadb):
    with ParallelConnection([mariadb, default, postgres]) as connection:
        assert connection.execute("SELECT 1 + %s AS three", [2]).fetchall() == [(3,)] * 3


@pytest.mark.parametrize("itersize", [None, 2])
def test_connections_of_the_drivers(request, itersize, alias):
    """They stay open, and in the transaction that they are in, until it is ended."""
    Tag.objects.using(alias).bulk_create(Tag(name=f"tag {n}") for n in range(6))
    if connections[alias].vendor == "sqlite":
        pytest.skip("has tests of its own")
    opened = [driver_of(alias)() for _ in range(2)]
    try:
        with ParallelConnection(opened) as connection:
            cursor = connection.cursor(itersize).execute("SELECT name FROM testapp_tag ORDER BY name")
            assert [name for (name,) in cursor] == [f"tag {n}" for n in range(6)] * 2
            cursor.close()
            connection.rollback()
            connection.execute("INSERT INTO testapp_tag (name) VALUES ('new')")
        assert Tag.objects.using(alias).filter(name="new").count() == 2, "committed at the end"
        with pytest.raises(LookupError), ParallelConnection(opened) as connection:
            connection.execute("INSERT INTO testapp_tag (name) VALUES ('lost')")
            raise LookupError
        assert not Tag.objects.using(alias).filter(name="lost").exists()
        for each in opened:
            with closing(each.cursor()) as cursor:
                cursor.execute("SELECT 1")
                assert cursor.fetchone() == (1,)
    finally:
        for each in opened:
            each.close()


@pytest.mark.parametrize("is_given", [False, True])
def test_two_cursors_that_stream(is_given, alias):
    """Each has all of its rows; or, where the driver has one result at a time, the second is refused meanwhile."""
    Tag.objects.using(alias).bulk_create(Tag(name=f"t{number}") for number in range(9))
    if connections[alias].vendor == "sqlite" and is_given:
        pytest.skip("a connection of SQLite's is bound to its thread")
    sql, given = "SELECT name FROM testapp_tag ORDER BY id", driver_of(alias)() if is_given else None
    with ParallelConnection([given or alias]) as connection:
        cursor = connection.cursor(itersize=2).execute(sql)
        found = [cursor.fetchone()]
        if connections[alias].vendor == "mysql":
            for other in (lambda: connection.execute(sql), connection.commit, connection.rollback):
                with pytest.raises(errors.ConnectionMisused, match="has rows to come"):
                    other()
        else:
            assert len(connection.execute(sql).fetchall()) == 9
        assert found + cursor.fetchall() == [(f"t{number}",) for number in range(9)]
        assert len(connection.execute(sql).fetchall()) == 9
        left = connection.cursor(itersize=2).execute(sql)
        assert left.fetchone() == ("t0",)  # the others are let go of
    if given is not None:
        given.close()


def test_pools(postgres):
    """A pool may be given several times, for several connections; they come back."""
    wrapper = connections[postgres]
    if wrapper.Database.__name__ == "psycopg2":
        from psycopg2.pool import ThreadedConnectionPool

        pool = ThreadedConnectionPool(0, 2, **wrapper.get_connection_params())
        free = lambda: len(pool._used) == 0  # noqa: E731
        close = pool.closeall
    else:
        psycopg_pool = pytest.importorskip("psycopg_pool", reason="psycopg_pool is not installed")
        pool = psycopg_pool.ConnectionPool(
            kwargs=wrapper.get_connection_params() | {"cursor_factory": None}, min_size=2, max_size=2, open=True
        )
        free = lambda: pool.get_stats()["pool_available"] == 2  # noqa: E731
        close = pool.close
    try:
        with ParallelConnection([pool, pool]) as connection:
            (one,), (other,) = connection.execute("SELECT pg_backend_pid()").fetchall()
            assert one != other
            assert not free()
        assert free()
    finally:
        close()


def test_what_is_no_connection(default, made, tmp_path):
    for given, said in (
        ([], "no connections"),
        ([5], "int is no connection"),
        ([made[0], made[0]], "given twice"),
        (["default", "default"], "'default' was given twice"),
    ):
        with pytest.raises(errors.InvalidOption, match=said):
            ParallelConnection(given)
    with pytest.raises(ConnectionDoesNotExist, match="'nowhere'"):
        ParallelConnection(["default", "nowhere"])
    with closing(sqlite3.connect(tmp_path / "x")) as bound:
        with pytest.raises(errors.InvalidOption, match="check_same_thread=False"):
            ParallelConnection([made[0], bound])
    with pytest.raises(errors.InvalidOption, match="itersize"), ParallelConnection(made) as connection:
        connection.cursor(0)


def test_one_that_cannot_be_opened(default, made):
    """The others are given back."""
    with override_settings(PARALLEL_ORM={"CONNECTIONS": 1}):
        with closing(ParallelConnection(["default"])):
            with pytest.raises(errors.ConnectionMisused, match="allows no more connections to 'default'"):
                ParallelConnection([made[0], "default"])
        with closing(ParallelConnection(["default"])) as connection:
            assert connection.execute("SELECT 1").fetchall() == [(1,)]


def test_commits_are_not_atomic_together(made, tmp_path):
    """And it is said which were."""

    class Broken:
        def __init__(self, connection):
            self._connection = connection

        def __getattr__(self, name):
            return getattr(self._connection, name)

        def commit(self):
            raise OperationalError("gone")

    with closing(ParallelConnection([made[0], Broken(made[1]), made[2]])) as connection:
        connection.execute("UPDATE numbers SET n = 100")
        with pytest.raises(OperationalError, match="gone") as caught:
            connection.commit()
        assert caught.value.connection_index == 1
        assert any("committed on the connections [0, 2]" in line for line in caught.value.__notes__)
        made[1].rollback()
    for number, expected in ((0, 100), (1, 4), (2, 100)):
        with closing(sqlite3.connect(tmp_path / f"{number}.sqlite3")) as connection:
            assert connection.execute("SELECT max(n) FROM numbers").fetchone() == (expected,)


def test_another_thread_is_refused_meanwhile(made):
    """While it is used; afterwards it may."""
    begun, go = threading.Event(), threading.Event()

    def wait():
        begun.set()
        assert go.wait(WAIT)
        return 1

    for each in made:
        each.create_function("wait", 0, wait)
    with closing(ParallelConnection(made)) as connection:
        thread = threading.Thread(target=lambda: connection.execute("SELECT wait()"))
        thread.start()
        assert begun.wait(WAIT)
        with pytest.raises(InterfaceError, match="Another thread is using"):
            connection.execute("SELECT 1")
        go.set()
        thread.join(WAIT)
        assert connection.execute("SELECT 1").fetchall() == [(1,)] * 3


def test_nothing_to_fetch(connection):
    cursor = connection.cursor()
    for fetch in (cursor.fetchone, cursor.fetchall, cursor.fetchmany, lambda: next(cursor)):
        with pytest.raises(InterfaceError, match="no rows to fetch"):
            fetch()
    cursor.execute("UPDATE numbers SET n = 1")
    with pytest.raises(InterfaceError, match="no rows to fetch"):
        cursor.fetchone()


def test_threads_end_with_it(made):
    def of_it():
        return [thread for thread in threading.enumerate() if "raw_" in thread.name]

    with ParallelConnection(made) as connection:
        connection.execute("SELECT 1")
        threads = of_it()
        assert len(threads) == 3
        assert connection.execute("SELECT 1").fetchall()
        assert of_it() == threads, "the same ones for each call"
    for thread in threads:
        thread.join(WAIT)
    assert not of_it()
    connection = ParallelConnection(made)
    threads = of_it()
    del connection
    for thread in threads:
        thread.join(WAIT)
    assert not of_it(), "also when nobody has closed it"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_in_a_forked_child(made, tmp_path):
    """Its threads are the parent's."""
    with closing(ParallelConnection(made)) as connection:
        child = os.fork()
        if child == 0:
            try:
                connection.execute("SELECT 1")
            except errors.ParallelORMError as error:
                (tmp_path / "said").write_text(str(error))
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert "ParallelConnection" in Path(tmp_path / "said").read_text()
        assert connection.execute("SELECT 1").fetchall() == [(1,)] * 3


class TestInATestCase(TestCase):
    databases = {"default"}

    def test_it_is_the_connection_of_the_test(self):
        Tag.objects.create(name="here alone")
        with ParallelConnection(["default"]) as connection:
            assert connection.execute("SELECT name FROM testapp_tag").fetchall() == [("here alone",)]
            with self.assertRaises(errors.TransactionRefused):
                connection.rollback()
