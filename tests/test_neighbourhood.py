"""What a connection has by SQL that another has not: carried, or read where it is; and never left for the next one."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from django.db import OperationalError, close_old_connections, connections, transaction
from django.db.backends.signals import connection_created
from django.db.models import Func, TextField, Value
from django.test import override_settings
from django.utils import timezone

from parallel_orm import errors
from parallel_orm.connections import lender
from tests.test_background import WAIT, busy, hold_all_threads, landed
from tests.testapp.models import Article

__all__ = ["busy"]  # fixtures


@pytest.fixture
def kept(monkeypatch):
    """Workers' connections are kept for the next task, as outside of tests. Yields those that wait."""
    lender.close_idle()
    monkeypatch.setattr("parallel_orm.connections.under_test", lambda: False)
    yield lambda alias: [idle.wrapper for idle in lender._idle[alias]]
    gate = threading.Event()
    held = hold_all_threads(gate)
    gate.set()
    for future in held:
        future.result(WAIT)
    lender.close_idle()


def say(alias, sql, params=None):
    with connections[alias].cursor() as cursor:
        cursor.execute(sql, params)


def ask(wrapper, sql):
    """Ask on the driver's own cursor, which nobody hears."""
    with closing(wrapper.connection.cursor()) as cursor:
        cursor.execute(sql)
        return cursor.fetchone()


def names(rows):
    return sorted(row.name for row in rows)


def answers(alias):
    """The same question inline, by a fetch and by a count; the reason of both."""
    rows = Article.objects.using(alias).order_by("pk")
    inline = [row.name for row in rows.all()]
    fetched, counted = rows.all().start_fetch(), rows.all().start_count()
    landed(fetched.background["fetch"]), landed(counted.background["count"])
    assert ([row.name for row in fetched], counted.count()) == (inline, len(inline))
    (reason,) = {fetched.background["fetch"].reason, counted.background["count"].reason}
    return inline, reason


def name_of(row):
    return row.name


# --- Row-level security ---------------------------------------------------------------------


@pytest.fixture
def secured(postgres):
    """Rows of the tenants a and b, of which a role sees its own alone. Yields the role."""
    role = f"reader_{uuid.uuid4().hex[:12]}"
    say(postgres, f"CREATE ROLE {role}")
    say(postgres, f"GRANT SELECT, INSERT ON testapp_article TO {role}")
    say(postgres, f"GRANT USAGE ON SEQUENCE testapp_article_id_seq TO {role}")
    say(postgres, "ALTER TABLE testapp_article ENABLE ROW LEVEL SECURITY")
    say(
        postgres,
        "CREATE POLICY own ON testapp_article USING (name LIKE current_setting('app.tenant', true) || ':%')",
    )
    Article.objects.using(postgres).bulk_create(
        [Article(name=f"a:{n}") for n in range(3)] + [Article(name=f"b:{n}") for n in range(5)]
    )
    connections[postgres].close()
    say(postgres, f"SET ROLE {role}")
    yield role
    connections[postgres].close()
    say(postgres, "DROP POLICY own ON testapp_article")
    say(postgres, "ALTER TABLE testapp_article DISABLE ROW LEVEL SECURITY")
    say(postgres, f"DROP OWNED BY {role}")
    say(postgres, f"DROP ROLE {role}")


ROWS = {"a": ["a:0", "a:1", "a:2"], "b": ["b:0", "b:1", "b:2", "b:3", "b:4"]}


def _by_orm(alias, tenant):
    setting = Func(Value("app.tenant"), Value(tenant), Value(False), function="set_config", output_field=TextField())
    list(Article.objects.using(alias).annotate(said=setting).values_list("said")[:1])


def _composed(alias, tenant):
    try:
        from psycopg import sql
    except ImportError:
        from psycopg2 import sql
    if connections[alias].Database.__name__ == "psycopg2":
        from psycopg2 import sql
    say(alias, sql.SQL("SET {} = {}").format(sql.Identifier("app", "tenant"), sql.Literal(tenant)))


def _many(alias, tenant):
    with connections[alias].cursor() as cursor:
        cursor.executemany("SELECT set_config('app.tenant', %s, false)", [["nobody"], [tenant]])


WAYS = {
    "set": lambda alias, tenant: say(alias, f"SET app.tenant = '{tenant}'"),
    "session": lambda alias, tenant: say(alias, f"set  session App.Tenant to '{tenant}'"),
    "literal": lambda alias, tenant: say(alias, "SELECT set_config('app.tenant', %s, false)", [tenant]),
    "parameters": lambda alias, tenant: say(alias, "SELECT set_config(%s, %s, false)", ["app.tenant", tenant]),
    "mapping": lambda alias, tenant: say(
        alias, "SELECT set_config(%(name)s, %(value)s, false)", {"name": "app.tenant", "value": tenant}
    ),
    "comments": lambda alias, tenant: say(alias, f"\n -- whose\n /* * */ SET app.tenant = '{tenant}'"),
    "many": _many,
    "composed": _composed,
    "orm": _by_orm,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_tenant_reads_its_own_rows_alone(secured, postgres, kept, way):
    """Role and variable go along, by whichever SQL they were set; another tenant a moment ago changes nothing."""
    if way == "orm":
        say(postgres, "SET app.tenant = 'a'")  # else it is a query without rows, that sets nothing
    for tenant in ("a", "b", "a"):
        WAYS[way](postgres, tenant)
        if way == "orm":  # the variable was set while the rows were looked at
            WAYS[way](postgres, tenant)
        assert answers(postgres) == (ROWS[tenant], None)
    say(postgres, "RESET app.tenant")
    assert answers(postgres) == ([], None)


UNFOLLOWED = {
    "second statement": "SELECT count(*) FROM testapp_article; SET app.tenant = 'b'",
    "after a write": "INSERT INTO testapp_article (name, rank) VALUES ('b:5', 0); SET app.tenant = 'b'",
    "block": "DO $$ BEGIN PERFORM set_config('app.tenant', 'b', false); END $$",
    "computed name": "SELECT set_config('app.' || 'tenant', 'b', false)",
    "computed otherwise": "SELECT set_config(lower('APP.TENANT'), 'b', false) FROM generate_series(1, 2)",
    "many names": [["app.tenant", "a"], ["app.tenant", "b"]],
}


@pytest.mark.parametrize("way", UNFOLLOWED)
def test_what_cannot_be_followed_is_read_where_it_is(secured, postgres, way):
    """Whatever the answer costs, it is the tenant's own."""
    assert answers(postgres) == ([], None)
    if way == "after a write":
        say(postgres, "RESET ROLE")
    if way == "many names":
        with connections[postgres].cursor() as cursor:
            cursor.executemany("SELECT set_config(%s, %s, false)", UNFOLLOWED[way])
    else:
        say(postgres, UNFOLLOWED[way])
    say(postgres, f"SET ROLE {secured}")
    assert answers(postgres) == (ROWS["b"] + ["b:5"] * (way == "after a write"), "session")


def test_a_variable_of_a_transaction(secured, postgres, kept):
    """set_config(..., true) holds for its transaction, whose end is heard; a commit does not wait for what it needs."""
    for tenant in ("a", "b"):
        with transaction.atomic(using=postgres):
            say(postgres, "SELECT set_config('app.tenant', %s, true)", [tenant])
            assert answers(postgres) == (ROWS[tenant], None)
            with transaction.atomic(using=postgres):
                say(postgres, "SET LOCAL app.tenant = 'nobody'")
                assert answers(postgres) == ([], None)
                transaction.set_rollback(True, using=postgres)
            assert answers(postgres) == (ROWS[tenant], None), "as before the savepoint"
        assert answers(postgres) == ([], None)


def test_a_variable_that_a_rollback_takes_back(secured, postgres):
    say(postgres, "SET app.tenant = 'a'")
    assert answers(postgres) == (ROWS["a"], None)
    with transaction.atomic(using=postgres):
        say(postgres, "SET app.tenant = 'b'")
        assert answers(postgres) == (ROWS["b"], None)
        transaction.set_rollback(True, using=postgres)
    assert answers(postgres) == (ROWS["a"], None)


def test_roles(secured, postgres, kept):
    """SET ROLE and RESET ROLE: row-level security holds for one and not for the other."""
    say(postgres, "SET app.tenant = 'a'")
    assert answers(postgres) == (ROWS["a"], None)
    say(postgres, "RESET ROLE")
    assert len(answers(postgres)[0]) == 8
    say(postgres, f"SET SESSION AUTHORIZATION {secured}")
    assert answers(postgres) == (ROWS["a"], None)
    say(postgres, "RESET SESSION AUTHORIZATION")
    assert len(answers(postgres)[0]) == 8


@pytest.mark.parametrize("workers", ["threads", "processes"])
def test_maps_read_the_callers_rows(secured, postgres, kept, workers):
    for tenant in ("a", "b"):
        say(postgres, "SELECT set_config('app.tenant', %s, false)", [tenant])
        rows = Article.objects.using(postgres).order_by("pk")
        assert list(rows.parallel_map(name_of, **{workers: 2}, chunk_size=2)) == ROWS[tenant]
        with transaction.atomic(using=postgres):
            say(postgres, "SELECT set_config('app.tenant', %s, true)", ["b"])
            assert list(rows.parallel_map(name_of, **{workers: 2}, chunk_size=2)) == ROWS["b"]
    say(postgres, "RESET ROLE")
    say(postgres, "RESET app.tenant")
    assert len(list(rows.parallel_map(name_of, **{workers: 2}, chunk_size=2))) == 8


def test_a_function_that_sets_variables(secured, postgres):
    """Nothing lists what it set: read inline, unless a setting names the variable."""
    say(postgres, "RESET ROLE")
    say(
        postgres,
        "CREATE FUNCTION enter_tenant(text) RETURNS text LANGUAGE sql AS"
        " $$ SELECT set_config('app.tenant', $1, false) $$",
    )
    try:
        for settings, reason in ({}, "session"), ({"SESSION_VARIABLES": ["app.tenant"]}, None):
            connections[postgres].close()
            say(postgres, f"SET ROLE {secured}")
            say(postgres, "SELECT enter_tenant('a')")
            with override_settings(PARALLEL_ORM=settings):
                assert answers(postgres) == (ROWS["a"], reason)
                say(postgres, "SELECT * FROM enter_tenant(%s)", ["b"])
                assert answers(postgres) == (ROWS["b"], reason)
        connections[postgres].close()
        say(postgres, "SELECT enter_tenant('a')")
        with pytest.raises(errors.ParallelORMError, match="session"):
            list(Article.objects.using(postgres).parallel_map(name_of, threads=2))
    finally:
        connections[postgres].close()
        say(postgres, "DROP FUNCTION enter_tenant(text)")


def test_two_tenants_interleaved(secured, postgres, kept):
    """Several threads, two tenants and none, connections that served another a moment ago: each its own."""

    def serve(tenant):
        try:
            say(postgres, f"SET ROLE {secured}")
            for turn in range(40):
                mine = tenant if turn % 3 else {"a": "b", "b": "a"}[tenant]
                if turn % 4:
                    say(postgres, "SELECT set_config('app.tenant', %s, false)", [mine])
                    assert answers(postgres)[0] == ROWS[mine]
                else:
                    with transaction.atomic(using=postgres):
                        say(postgres, "SELECT set_config('app.tenant', %s, true)", [mine])
                        assert answers(postgres)[0] == ROWS[mine]
        finally:
            connections.close_all()

    def serve_nobody():
        try:
            for _ in range(40):
                assert len(answers(postgres)[0]) == 8
        finally:
            connections.close_all()

    # Ten reads at a time, beside threads that are not quite done with others, are never more than 2 x 16: none is left
    # to callers who, here, wait for a thread.
    with override_settings(PARALLEL_ORM={"THREADS": 16, "CONNECTIONS": 8}), ThreadPoolExecutor(5) as threads:
        for future in [*(threads.submit(serve, tenant) for tenant in "abab"), threads.submit(serve_nobody)]:
            future.result(WAIT)
    assert nothing_is_left(kept(postgres))


def nothing_is_left(wrappers):
    """Ask the server what the sessions have that wait for their next task; that there are any."""
    for wrapper in wrappers:
        assert ask(
            wrapper,
            "SELECT current_setting('role'), coalesce(current_setting('app.tenant', true), ''),"
            " current_setting('TimeZone'), current_setting('search_path'), session_user = current_user,"
            " pg_my_temp_schema() = 0",
        ) == ("none", "", "UTC", '"$user", public', True, True)
    return bool(wrappers)


def test_nothing_is_left_in_a_workers_session(secured, postgres, kept):
    """After reads, and after a map, whose workers have it for longer than a transaction."""
    for tenant in ("a", "b"):
        say(postgres, "SELECT set_config('app.tenant', %s, false)", [tenant])
        say(postgres, "SET TIME ZONE 'Asia/Kathmandu'")
        assert answers(postgres) == (ROWS[tenant], None)
        assert list(Article.objects.using(postgres).parallel_map(name_of, threads=2)) == ROWS[tenant]
    connections[postgres].close()
    say(postgres, "SELECT 1 FROM testapp_tag")
    assert len(answers(postgres)[0]) == 8
    assert nothing_is_left(kept(postgres))


def test_a_variable_that_nobody_set_is_unknown(postgres, kept):
    """Once set, a session knows it for ever, if empty: who never set it is lent another."""
    Article.objects.using(postgres).create(name="here")
    known = Func(Value("app.tenant"), Value(True), function="current_setting", output_field=TextField())
    rows = Article.objects.using(postgres).annotate(known=known).values_list("known", flat=True)
    for change, tenant in ("SET app.tenant = 'a'", "a"), ("SELECT 1 FROM testapp_tag", None):
        connections[postgres].close()
        say(postgres, change)
        started = rows.all().start_fetch()
        assert landed(started.background["fetch"]) == [tenant]
        assert started.background["fetch"].reason is None


def test_what_a_map_function_says_is_not_left(postgres, kept):
    """A worker's connection that was told something itself serves nobody after."""
    Article.objects.using(postgres).create(name="here")

    def speak(row):
        say(postgres, "SET app.tenant = 'mine'")
        say(postgres, "CREATE TEMP TABLE mine (id int)")

    list(Article.objects.using(postgres).parallel_map(speak, threads=2))
    assert kept(postgres) == []


def test_a_transaction_that_a_map_function_left_open(postgres, kept):
    """Is not the next one's."""
    Article.objects.using(postgres).create(name="here")
    with pytest.raises(errors.TransactionRefused, match="has left a transaction open"):
        Article.objects.using(postgres).parallel_map(lambda row: say(postgres, "BEGIN"), threads=2)
    assert kept(postgres) == []


def test_a_stolen_read_answers_for_the_tenant_of_its_start(secured, postgres, busy):
    """The statement that enters another tenant first has done what was started for this one."""
    rows = Article.objects.using(postgres).order_by("pk")
    for way, enter in WAYS.items():
        if way == "orm":
            continue
        enter(postgres, "a")
        fetched, counted = rows.all().start_fetch(), rows.all().start_count()
        assert not fetched.background["fetch"].done()
        enter(postgres, "b")
        assert fetched.background["fetch"].done()
        assert ([row.name for row in fetched], counted.count()) == (ROWS["a"], 3)
        assert fetched.background["fetch"].reason == counted.background["count"].reason == "stolen"
    for end in ("RESET app.tenant", "RESET ALL", "DISCARD ALL"):
        say(postgres, f"SET ROLE {secured}")
        say(postgres, "SET app.tenant = 'a'")
        counted = rows.all().start_count()
        say(postgres, end)
        assert counted.count() == 3


def test_a_read_of_a_transaction_is_begun_before_that_ends(secured, postgres, busy):
    rows = Article.objects.using(postgres)
    for end in (False, True):
        with transaction.atomic(using=postgres):
            say(postgres, "SELECT set_config('app.tenant', 'a', true)")
            counted = rows.all().start_count()
            transaction.set_rollback(end, using=postgres)
        assert (counted.count(), counted.background["count"].reason) == (3, "stolen")


# --- Schemas, time zones, temporary tables, locks --------------------------------------------------


@pytest.fixture
def schemas(postgres):
    """Two schemas that have the table too, with a row of their own."""
    Article.objects.using(postgres).create(name="public")
    for schema in ("hood_a", "hood_b"):
        say(postgres, f"CREATE SCHEMA {schema}")
        say(postgres, f"CREATE TABLE {schema}.testapp_article (LIKE public.testapp_article INCLUDING ALL)")
        say(postgres, f"INSERT INTO {schema}.testapp_article SELECT * FROM public.testapp_article")
        say(postgres, f"UPDATE {schema}.testapp_article SET name = '{schema}'")
    connections[postgres].close()
    yield ("hood_a", "hood_b")
    connections[postgres].close()
    for schema in ("hood_a", "hood_b"):
        say(postgres, f"DROP SCHEMA {schema} CASCADE")


def test_search_paths(schemas, postgres, kept):
    """The same table in two schemas: the one that the caller's path finds first."""
    for path, name in [
        ("hood_a", "hood_a"),
        ("hood_b, public", "hood_b"),
        ("public, hood_b", "public"),
        ('"hood_a", "hood_b"', "hood_a"),
        ("DEFAULT", "public"),
    ]:
        say(postgres, f"SET search_path TO {path}")
        assert answers(postgres) == ([name], None)
        assert list(Article.objects.using(postgres).parallel_map(name_of, threads=2)) == [name]
    with transaction.atomic(using=postgres):
        say(postgres, "SET LOCAL search_path = hood_b")
        assert answers(postgres) == (["hood_b"], None)
    assert answers(postgres) == (["public"], None)
    assert nothing_is_left(kept(postgres))


def test_a_worker_process_has_the_search_path(schemas, postgres):
    say(postgres, "SET search_path TO hood_b")
    assert list(Article.objects.using(postgres).parallel_map(name_of, processes=2)) == ["hood_b"]


def test_time_zones(postgres, kept):
    """What the server makes of a moment is told by the caller's SET TIME ZONE."""
    Article.objects.using(postgres).create(name="now", published=timezone.now())
    rows = Article.objects.using(postgres).annotate(
        zone=Func(Value("TimeZone"), function="current_setting"),
    )
    for zone in ("Asia/Kathmandu", "America/Lima"):
        say(postgres, f"SET TIME ZONE '{zone}'")
        started = rows.values_list("zone", flat=True).start_fetch()
        assert landed(started.background["fetch"]) == [zone]
        assert started.background["fetch"].reason is None
        say(postgres, "SELECT set_config('timezone', 'UTC', false)")
    assert nothing_is_left(kept(postgres))


def _hidden(alias):
    mine = "temp." if connections[alias].vendor == "sqlite" else "pg_temp."
    return {
        "temporary": "CREATE TEMPORARY TABLE testapp_article AS SELECT * FROM testapp_article WHERE name = 'one'",
        "in its schema": f"CREATE TABLE {mine}testapp_article AS SELECT * FROM testapp_article WHERE name = 'one'",
        "quoted": f"CREATE TABLE \"{mine[:-1]}\" . testapp_article AS SELECT * FROM testapp_article WHERE name = 'one'",
        "select into": "SELECT * INTO TEMP testapp_article FROM testapp_article WHERE name = 'one'",
        "view": "CREATE TEMP VIEW testapp_article AS SELECT 1 AS id, 'one' AS name, NULL AS score, 0 AS rank,"
        " NULL AS published, NULL AS author_id",
    }


@pytest.mark.parametrize("way", ["temporary", "in its schema", "quoted", "select into", "view"])
def test_a_temporary_table_hides_a_real_one(alias, kept, way):
    """It is on one connection alone: read there."""
    vendor = connections[alias].vendor
    if (vendor == "mysql" and way != "temporary") or (vendor == "sqlite" and way == "select into"):
        pytest.skip("this database has no such statement")
    for name in ("one", "two"):
        Article.objects.using(alias).create(name=name)
    assert len(answers(alias)[0]) == 2
    say(alias, _hidden(alias)[way])
    assert answers(alias) == (["one"], "session")


def test_advisory_locks(postgres):
    """A lock belongs to the connection; so does the question whether it is held."""
    Article.objects.using(postgres).create(name="here")
    free = Article.objects.using(postgres).annotate(
        free=Func(Value(42), function="pg_try_advisory_lock"),
    )
    say(postgres, "SELECT pg_advisory_lock(42)")
    started = free.values_list("free", flat=True).start_fetch()
    assert (list(started), started.background["fetch"].reason) == ([True], "writes")
    counted = Article.objects.using(postgres).start_count()
    assert (counted.count(), counted.background["count"].reason) == (1, "session")
    with pytest.raises(errors.ParallelORMError, match="session"):
        list(free.parallel_map(name_of, threads=2))


@pytest.mark.parametrize("end", ["RESET ALL", "DISCARD ALL"])
def test_resetting_everything(schemas, postgres, end):
    say(postgres, "SET search_path TO hood_a")
    assert answers(postgres) == (["hood_a"], None)
    say(postgres, end)
    assert answers(postgres)[0] == ["public"]
    say(postgres, "SET search_path TO hood_b")
    assert answers(postgres)[0] == ["hood_b"]


def test_what_a_receiver_of_connection_created_says(schemas, postgres):
    """Said on the worker's connection too; and where it says something else there, what the caller has counts."""
    caller = threading.current_thread()

    def enter(connection, **_):
        if connection.alias == postgres:
            with connection.cursor() as cursor:
                cursor.execute(f"SET search_path TO {'hood_a' if threading.current_thread() is caller else 'hood_b'}")

    connection_created.connect(enter)
    try:
        connections[postgres].close()
        assert answers(postgres) == (["hood_a"], None)
    finally:
        connection_created.disconnect(enter)
        connections[postgres].close()


def test_what_is_said_to_the_driver_is_not_heard(schemas, postgres):
    """The documented limit, and the way out: the same by a cursor of Django's."""
    connections[postgres].ensure_connection()
    with connections[postgres].connection.cursor() as cursor:
        cursor.execute("SET search_path TO hood_a")
    started = Article.objects.using(postgres).start_fetch()
    assert names(landed(started.background["fetch"])) == ["public"]
    say(postgres, "SET search_path TO hood_a")
    assert answers(postgres) == (["hood_a"], None)


@pytest.mark.parametrize("begin", ["BEGIN", "START TRANSACTION", "/* mine */ begin"])
def test_a_transaction_begun_by_sql(alias, begin):
    """Django knows nothing of it; what it wrote is on this connection alone, until it ends."""
    if connections[alias].vendor == "sqlite":
        begin = begin.replace("START TRANSACTION", "BEGIN IMMEDIATE")
    Article.objects.using(alias).create(name="one")
    for end, left in ("ROLLBACK", ["one"]), ("COMMIT", ["one", "two"]):
        say(alias, begin)
        Article.objects.using(alias).create(name="two")
        assert answers(alias) == (["one", "two"], "transaction")
        say(alias, end)
        assert answers(alias) == (left, None)


# --- SQLite and MariaDB: inline ----------------------------------------------------------------------

CHANGES = {
    "default": {
        "pragma": "PRAGMA case_sensitive_like = 1",
        "pragma call": "PRAGMA case_sensitive_like(1)",
        "attach": "ATTACH ':memory:' AS beside",
    },
    "mariadb": {
        "variable": "SET @tenant = 'a'",
        "into a variable": "SELECT name INTO @tenant FROM testapp_article LIMIT 1",
        "assigned": "SELECT @tenant := name FROM testapp_article",
        "time zone": "SET SESSION time_zone = '+05:45'",
        "mode": "SET sql_mode = 'ANSI'",
        "lock": "SELECT GET_LOCK('hood', 1)",
        "tables": "LOCK TABLES testapp_article READ",
        "temporary": "CREATE TEMPORARY TABLE hood (id int)",
    },
}


@pytest.mark.parametrize("change", CHANGES["default"])
def test_a_changed_session_of_sqlite_is_read_there(default, change):
    _changed(default, CHANGES["default"][change])


@pytest.mark.parametrize("change", CHANGES["mariadb"])
def test_a_changed_session_of_mariadb_is_read_there(mariadb, change):
    _changed(mariadb, CHANGES["mariadb"][change])


def _changed(alias, change):
    """Nothing but a new connection makes good what was said."""
    Article.objects.using(alias).create(name="Here")
    assert answers(alias) == (["Here"], None)
    say(alias, change)
    assert answers(alias) == (["Here"], "session")
    with pytest.raises(errors.ParallelORMError, match="session"):
        list(Article.objects.using(alias).parallel_map(name_of, threads=2))
    connections[alias].close()
    assert answers(alias) == (["Here"], None)


def test_looking_at_the_schema_changes_no_session(alias):
    """Introspection, as migrations and the admin do it, is nothing that a reader must know."""
    Article.objects.using(alias).create(name="Here")
    with connections[alias].cursor() as cursor:
        connections[alias].introspection.get_constraints(cursor, "testapp_article")
        connections[alias].introspection.get_table_description(cursor, "testapp_article")
        connections[alias].introspection.get_relations(cursor, "testapp_article")
    assert answers(alias) == (["Here"], None)


# --- Connections ---------------------------------------------------------------------------------------


@pytest.fixture
def sessions(postgres):
    """Asks the server, by a client of its own, how many others are connected to the test database."""
    client = connections.create_connection(postgres)

    def count():
        with client.cursor() as cursor:
            cursor.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
                " AND backend_type = 'client backend'"
            )
            return cursor.fetchone()[0]

    def count_until(number):
        """The server takes a moment to see that a client has gone."""
        deadline = time.monotonic() + WAIT
        while (found := count()) > number and time.monotonic() < deadline:
            pass
        return found

    yield count_until
    client.close()


def test_callers_of_different_sessions_share_one_budget(postgres, kept, sessions):
    """A connection that knew one tenant makes room for another; at the limit work waits its turn."""
    Article.objects.using(postgres).create(name="here")

    def serve(number):
        try:
            for turn in range(12):
                if number:
                    say(postgres, f"SET app.name_{number} = '{turn}'")
                started = [Article.objects.using(postgres).start_count() for _ in range(3)]
                assert [queryset.count() for queryset in started] == [1] * 3
        finally:
            connections.close_all()

    connections[postgres].close()
    with override_settings(PARALLEL_ORM={"CONNECTIONS": {postgres: 2}}), ThreadPoolExecutor(4) as threads:
        for future in [threads.submit(serve, number) for number in range(4)]:
            future.result(WAIT)
        gate = threading.Event()
        held = hold_all_threads(gate)  # so that all is given back
        gate.set()
        for future in held:
            future.result(WAIT)
        assert len(kept(postgres)) <= 2
        assert 1 <= sessions(2) <= 2, "the callers have closed theirs"


def test_a_full_budget_makes_room_for_another_session(postgres, kept, sessions):
    """One connection, two callers who may not share it: each is answered, by one connection at a time."""
    Article.objects.using(postgres).create(name="here")
    with override_settings(PARALLEL_ORM={"CONNECTIONS": {postgres: 1}}):
        for turn in range(3):
            for name in ("one", "two"):
                say(postgres, f"SET app.{name} = '{turn}'")
                assert answers(postgres) == (["here"], None)
                connections[postgres].close()
                assert sessions(1) == 1


@pytest.mark.parametrize("age", [0, 60, None])
@pytest.mark.parametrize("checks", [False, True])
def test_connections_that_the_server_ended(postgres, kept, sessions, monkeypatch, age, checks):
    """All of them, idle and kept: the next start answers in the background, with a session to carry and without."""
    monkeypatch.setitem(connections.settings[postgres], "CONN_MAX_AGE", age)
    monkeypatch.setitem(connections.settings[postgres], "CONN_HEALTH_CHECKS", checks)
    Article.objects.using(postgres).create(name="here")
    for change in ("SELECT 1 FROM testapp_tag", "SET app.tenant = 'a'", "SET app.tenant = 'a'"):
        connections[postgres].close()
        say(postgres, change)
        assert answers(postgres) == (["here"], None)
        say(
            postgres,
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()",
        )
        connections[postgres].close()
        say(postgres, change)
        assert answers(postgres) == (["here"], None)


def test_a_query_that_the_server_ended_fails_as_inline(postgres, kept):
    """With Django's exception, where the result is used; the thread serves the next one."""
    Article.objects.using(postgres).create(name="here")
    slow = Article.objects.using(postgres).annotate(
        slept=Func(Value(60), function="pg_sleep", output_field=TextField()),
    )
    started = slow.start_fetch()
    deadline = time.monotonic() + WAIT
    # Unheard: else the barrier would wait for the query first.
    end = (
        "SELECT count(pg_terminate_backend(pid, 10000)) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid() AND wait_event = 'PgSleep'"
    )
    while ask(connections[postgres], end) != (1,):
        assert time.monotonic() < deadline
    with pytest.raises(OperationalError) as raised:
        list(started)
    assert any("started at" in note for note in raised.value.__notes__)
    assert answers(postgres) == (["here"], None)


def test_closing_old_connections_leaves_those_on_loan_alone(postgres, met):
    """What Django closes at the end of a request is the caller's own."""
    Article.objects.using(postgres).create(name="here")
    barrier = met(2)
    started = Article.objects.using(postgres).start_fetch()
    connections[postgres].close_at = 0
    close_old_connections()
    assert connections[postgres].connection is None
    barrier.wait(WAIT)
    assert names(landed(started.background["fetch"])) == ["here"]
    assert started.background["fetch"].reason is None


@pytest.fixture
def met(monkeypatch):
    """Make every row that is read wait at a barrier, and return that."""

    def meet(number):
        barrier = threading.Barrier(number)
        from_db = Article.from_db.__func__

        def wait_and_make(cls, *args, **kwargs):
            barrier.wait(WAIT)
            return from_db(cls, *args, **kwargs)

        monkeypatch.setattr(Article, "from_db", classmethod(wait_and_make))
        return barrier

    return meet


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_a_child_of_a_process_with_threads(postgres, tmp_path, sessions):
    """As gunicorn does with preload: the child has threads and connections of its own, and the parent keeps its own."""
    Article.objects.using(postgres).create(name="here")
    settings = {name: connections.settings[postgres][name] for name in ("ENGINE", "NAME", "USER", "PASSWORD", "HOST")}
    settings["PORT"] = connections.settings[postgres]["PORT"]
    connections[postgres].close()
    done = run_program(
        tmp_path,
        f"""
        import os
        from django.conf import settings
        settings.configure(
            DATABASES={{"default": {settings!r}}},
            INSTALLED_APPS=["django.contrib.contenttypes", "parallel_orm", "tests.testapp"],
            DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        )
        import django
        django.setup()
        from django.db import connection, connections
        from tests.testapp.models import Article

        def serve():
            with connection.cursor() as cursor:
                cursor.execute("SET app.tenant = 'a'")
            pendings = [Article.objects.start_count().background["count"] for _ in range(4)]
            assert [pending._read.landed.result(30).result() for pending in pendings] == [1] * 4
            assert {{pending.reason for pending in pendings}} == {{None}}

        serve()
        connections.close_all()  # as gunicorn asks of a preloaded application
        children = []
        for _ in range(2):
            child = os.fork()
            if not child:
                try:
                    serve()
                    os._exit(0)
                finally:
                    os._exit(1)
            children.append(child)
        assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
        serve()
        print("served")
        """,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "served\n", "")
    assert sessions(0) == 0


def run_program(folder, program):
    """Run it as a user would, without the settings of these tests."""
    script = folder / "program.py"
    script.write_text("import warnings\nwarnings.simplefilter('error')\n" + textwrap.dedent(program))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(Path(__file__).parent.parent)])}
    environment.pop("DJANGO_SETTINGS_MODULE", None)
    return subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=100,
        env=environment,
        check=False,
        cwd=folder,
    )


# --- django-tenants -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limited", [False, True])
def test_django_tenants(postgres, tmp_path, limited):
    """Its schemas, interleaved, with connections that are kept: a tenant never reads another's rows."""
    if importlib.util.find_spec("django_tenants") is None:
        if os.environ.get("PARALLEL_ORM_REQUIRE"):
            pytest.fail("django-tenants is not installed, and this run is to leave nothing out", pytrace=False)
        pytest.skip("django-tenants is not installed")
    settings = {name: connections.settings[postgres][name] for name in ("USER", "PASSWORD", "HOST", "PORT")}
    name = f"parallel_orm_tenants_{uuid.uuid4().hex[:12]}"
    connections[postgres].close()
    say(postgres, f"CREATE DATABASE {name}")
    try:
        settings = {**settings, "NAME": name, "ENGINE": "django_tenants.postgresql_backend"}
        program = Path(__file__).with_name("tenants.py").read_text()
        done = run_program(tmp_path, f"DATABASE = {settings!r}\nLIMITED = {limited}\n" + program)
        assert done.returncode == 0, done.stderr
        assert (done.stdout, done.stderr) == ("never another's\n", "")
        left = f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{name}' AND backend_type = 'client backend'"
        assert ask(connections[postgres], left) == (0,)
    finally:
        say(postgres, f"DROP DATABASE {name} WITH (FORCE)")


# --- Poolers -----------------------------------------------------------------------------------------------


@pytest.fixture
def bouncer(postgres, kept, monkeypatch, tmp_path):
    """PgBouncer in transaction mode before the test database: whoever is next gets whichever session is free."""
    program = shutil.which("pgbouncer", path=os.environ.get("PATH", "") + ":/usr/sbin")
    if program is None:
        pytest.skip("pgbouncer is not installed")
    settings = connections.settings[postgres]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    target = {
        "host": settings["HOST"] or "127.0.0.1",
        "port": settings["PORT"] or 5432,
        "dbname": settings["NAME"],
        "user": settings["USER"] or "postgres",
    }
    if settings["PASSWORD"]:
        target["password"] = settings["PASSWORD"]
    (tmp_path / "pgbouncer.ini").write_text(
        "[databases]\n"
        f"{settings['NAME']} = {' '.join(f'{name}={value}' for name, value in target.items())}\n"
        "[pgbouncer]\n"
        f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
        "auth_type = any\npool_mode = transaction\ndefault_pool_size = 3\nmax_client_conn = 100\n"
        "ignore_startup_parameters = extra_float_digits,options\n"
    )
    command = [program, str(tmp_path / "pgbouncer.ini")]
    if os.geteuid() == 0:  # which it refuses to run as
        command[1:1] = ["-u", "nobody"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    connections[postgres].close()
    monkeypatch.setitem(settings, "HOST", "127.0.0.1")
    monkeypatch.setitem(settings, "PORT", port)
    try:
        deadline = time.monotonic() + WAIT
        while True:
            try:
                connections[postgres].ensure_connection()
                break
            except OperationalError:
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"pgbouncer did not start: {(tmp_path / 'log').read_text()}")
        yield postgres
    finally:
        connections[postgres].close()
        lender.close_idle()
        process.terminate()
        process.wait(WAIT)


def tenants_seen(alias):
    """Ask every session that the pooler has for the tenant that somebody left there."""
    clients = [connections.create_connection(alias) for _ in range(3)]
    try:
        for client in clients:
            client.ensure_connection()
            client.set_autocommit(False)
        return {ask(client, "SELECT coalesce(current_setting('app.tenant', true), '')")[0] for client in clients}
    finally:
        for client in clients:
            client.close()


def test_a_pooler_by_transactions(secured, bouncer):
    """Answers are right, transactions that have not written are no hindrance, and no session is left to others."""
    connections[bouncer].close()

    def serve(tenant):
        try:
            for _ in range(10):
                with transaction.atomic(using=bouncer):
                    say(bouncer, f"SET LOCAL ROLE {secured}")
                    say(bouncer, "SELECT set_config('app.tenant', %s, true)", [tenant])
                    assert answers(bouncer)[0] == ROWS[tenant]
                assert len(answers(bouncer)[0]) == 8
        finally:
            connections.close_all()

    with ThreadPoolExecutor(2) as threads:
        for future in [threads.submit(serve, tenant) for tenant in "ab"]:
            future.result(WAIT)
    with transaction.atomic(using=bouncer):
        say(bouncer, f"SET LOCAL ROLE {secured}")
        say(bouncer, "SELECT set_config('app.tenant', 'a', true)")
        assert answers(bouncer) == (ROWS["a"], None)
    connections[bouncer].close()
    assert tenants_seen(bouncer) == {""}


def test_a_map_leaves_no_session_in_a_pooler(bouncer):
    """Its workers' transactions are their own: what is set for a session would be anybody's."""
    Article.objects.using(bouncer).create(name="here")
    rows = Article.objects.using(bouncer)
    assert list(rows.parallel_map(name_of, threads=2)) == ["here"]
    with transaction.atomic(using=bouncer):
        say(bouncer, "SELECT set_config('app.tenant', 'a', true)")
        with pytest.raises(errors.SessionNotRestored, match="pooler"):
            list(rows.parallel_map(name_of, threads=2))
    connections[bouncer].close()
    assert tenants_seen(bouncer) == {""}


@pytest.fixture
def pooled(postgres, kept, monkeypatch):
    """Django's own pool, of psycopg 3."""
    pytest.importorskip("psycopg_pool", reason="psycopg_pool is not installed")
    settings = connections.settings[postgres]
    if connections[postgres].Database.__name__ != "psycopg":
        pytest.skip("Django's pool is one of psycopg 3")
    connections[postgres].close()
    monkeypatch.setitem(settings, "CONN_MAX_AGE", 0)
    monkeypatch.setitem(settings, "OPTIONS", {**settings["OPTIONS"], "pool": {"min_size": 1, "max_size": 3}})
    yield postgres
    connections[postgres].close()
    connections[postgres].close_pool()


def test_djangos_pool(secured, pooled):
    """Starts and maps take from it and give back to it, within the budget; nothing is left for whoever is next."""
    with override_settings(PARALLEL_ORM={"CONNECTIONS": 2}):
        for tenant in "abab":
            with transaction.atomic(using=pooled):
                say(pooled, f"SET LOCAL ROLE {secured}")
                say(pooled, "SELECT set_config('app.tenant', %s, true)", [tenant])
                assert answers(pooled) == (ROWS[tenant], None)
                assert list(Article.objects.using(pooled).parallel_map(name_of, threads=2)) == ROWS[tenant]
            started = [Article.objects.using(pooled).start_count() for _ in range(8)]
            assert [queryset.count() for queryset in started] == [8] * 8
            list(Article.objects.using(pooled).parallel_map(lambda row: say(pooled, "SET app.tenant = 'x'"), threads=2))
        gate = threading.Event()
        held = hold_all_threads(gate)
        gate.set()
        for future in held:
            future.result(WAIT)
    assert lender._idle[pooled] == []
    connections[pooled].close()
    deadline = time.monotonic() + WAIT
    while (stats := connections[pooled].pool.get_stats())["pool_available"] < stats["pool_size"]:
        assert time.monotonic() < deadline  # in place of a closed one it opens another, in a thread of its own
    assert stats["pool_size"] <= 3
    assert tenants_seen(pooled) == {""}
