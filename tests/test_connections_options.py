"""Whatever a project says of its connections in DATABASES holds for those of the workers too."""

from __future__ import annotations

import secrets
from contextlib import contextmanager
from functools import partial

import pytest
from django.db import connections, transaction
from django.db.models import Count

from parallel_orm import errors
from tests.test_stop import (
    WAIT,
    all_threads_free,
    an_alias_like,
    asker,
    long,
    others_connected,
    until,
    wait_until_gone,
    wait_until_running,
)
from tests.testapp.models import Article


@contextmanager
def options(alias, **more):
    yield {"OPTIONS": {**connections.settings[alias].get("OPTIONS", {}), **more}}


@contextmanager
def isolation_level(alias, name):
    from django.db.backends.postgresql.psycopg_any import IsolationLevel

    with options(alias, isolation_level=getattr(IsolationLevel, name)) as changes:
        yield changes


@contextmanager
def assume_role(alias):
    role = f"reader_{secrets.token_hex(4)}"
    with connections[alias].cursor() as cursor:
        cursor.execute(f"CREATE ROLE {role}")
        cursor.execute(f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}")
        cursor.execute(f"GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {role}")
    try:
        with options(alias, assume_role=role) as changes:
            yield changes
    finally:
        with connections[alias].cursor() as cursor:
            cursor.execute(f"DROP OWNED BY {role}")
            cursor.execute(f"DROP ROLE {role}")


@contextmanager
def no_server_side_cursors(alias):
    yield {"DISABLE_SERVER_SIDE_CURSORS": True}


@contextmanager
def of_psycopg_3(alias, **more):
    pytest.importorskip("psycopg_pool", reason="psycopg_pool is not installed")
    if connections[alias].Database.__name__ != "psycopg":
        pytest.skip("an option of psycopg 3")
    with options(alias, **more) as changes:
        yield {**changes, "CONN_MAX_AGE": 0}


@contextmanager
def unbuffered(alias):
    from MySQLdb.cursors import SSCursor

    with options(alias, cursorclass=SSCursor) as changes:
        yield changes


POSTGRES = {
    "repeatable read": partial(isolation_level, name="REPEATABLE_READ"),
    "serializable": partial(isolation_level, name="SERIALIZABLE"),
    "assume_role": assume_role,
    "no server-side cursors": no_server_side_cursors,
    "pool": partial(of_psycopg_3, pool=True),
    "server_side_binding": partial(of_psycopg_3, server_side_binding=True),
}
MARIADB = {
    "init_command": partial(options, init_command="SET lc_time_names = 'de_DE'"),
    "repeatable read": partial(options, isolation_level="repeatable read"),
    "serializable": partial(options, isolation_level="serializable"),
    "no isolation_level": partial(options, isolation_level=None),
    "unbuffered cursors": unbuffered,
}
#: What tells one connection from another, in a word.
STATE = {
    "postgres": "current_user || ' ' || current_setting('transaction_isolation')",
    "mariadb": "date_format('2024-01-01', '%%W')",
}


class Site:
    """An alias with something in its settings, beside the plain one of the same database."""

    def __init__(self, plain, alias, option):
        self.plain, self.alias, self.option = plain, alias, option
        self.rows = Article.objects.using(alias).order_by("pk")

    def states(self):
        state = STATE[self.plain]
        return self.rows.extra(select={"state": state}).values_list("state", "name")

    @property
    def is_postgres(self):
        return self.plain == "postgres"


@pytest.fixture(
    params=[pytest.param(("postgres", name), marks=pytest.mark.postgres, id=f"postgres-{name}") for name in POSTGRES]
    + [pytest.param(("mariadb", name), marks=pytest.mark.mariadb, id=f"mariadb-{name}") for name in MARIADB]
)
def site(request, databases):
    plain, option = request.param
    with databases.using(plain):
        for number in range(3):
            Article.objects.using(plain).create(name=f"name {number}")
        change = (POSTGRES if plain == "postgres" else MARIADB)[option]
        with change(plain) as changes, an_alias_like(plain, **changes) as alias:
            yield Site(plain, alias, option)
            all_threads_free()
            connections[alias].close()
            if option == "pool":
                connections[alias].close_pool()
        until(lambda: others_connected(plain) == 0, "a connection was left open")
        asker.close()


def answer(pending):
    """Return what a thread answered; nobody stole it."""
    until(pending.done, "no thread has answered")
    assert pending.reason is None
    return pending.result()


def test_every_verb(site):
    """The same answer as inline, from a connection that is as the caller's."""
    rows = site.rows
    states = answer(site.states().start_fetch().background["fetch"])
    assert states == list(site.states())
    if site.option == "init_command":
        assert states[0] == ("Montag", "name 0")
    assert answer(rows.all().start_fetch().background["fetch"]) == list(rows.all())
    assert answer(rows.all().start_count().background["count"]) == 3
    assert answer(rows.all().start_exists().background["exists"]) is True
    assert answer(rows.start_get(name="name 1")) == rows.get(name="name 1")
    assert answer(rows.start_first()) == rows.first()
    assert answer(rows.start_last()) == rows.last()
    assert answer(rows.start_aggregate(number=Count("pk"))) == {"number": 3}
    assert answer(rows.start_in_bulk()) == rows.in_bulk()
    assert answer(rows.raw("SELECT * FROM testapp_article ORDER BY id").start_fetch().background["fetch"]) == list(
        rows.all()
    )
    assert [row.name for row in rows.chunked_iterator(2)] == [row.name for row in rows.all()]
    assert list(rows.parallel_map(name_of, threads=2, chunk_size=1)) == [row.name for row in rows.all()]


def name_of(row):
    return row.name


def test_half_read(site):
    """An exists() and a slice leave rows behind on a cursor that fetches as it goes; the next one is not disturbed."""
    started = [site.rows.all().start_exists() for _ in range(3)] + [site.rows[:1].start_fetch() for _ in range(3)]
    assert [len(each) if "fetch" in each.background else each.exists() for each in started] == [True] * 3 + [1] * 3
    assert answer(site.rows.all().start_count().background["count"]) == 3


def test_in_a_transaction(site):
    """In the background where that is the same: in PostgreSQL's unwritten transactions that are not serializable."""
    in_background = site.is_postgres and site.option != "serializable"
    with transaction.atomic(using=site.alias):
        assert site.rows.count() == 3
        started = site.rows.all().start_count()
        until(started.background["count"].done, "no thread has answered")
        assert started.background["count"].reason == (None if in_background else "transaction")
        if site.option != "serializable":  # which would have it wait
            Article.objects.using(site.plain).create(name="by another")
        fetched = site.rows.all().start_fetch()
        assert len(fetched) == (inline := site.rows.count())
        assert started.count() == 3
        Article.objects.using(site.alias).create(name="own")
        after = site.rows.all().start_count()
        assert after.background["count"].reason == "transaction"
        assert after.count() == inline + 1
        transaction.set_rollback(True, using=site.alias)
    assert answer(site.rows.all().start_count().background["count"]) == site.rows.count()


def test_cancel_and_timeout(site):
    """Both reach the server."""
    pending = long(site.rows).start_fetch().background["fetch"]
    wait_until_running(site.plain)
    assert pending.cancel() is True
    with pytest.raises(errors.Cancelled):
        pending.result()
    wait_until_gone(site.plain)
    pending = long(site.rows).start_fetch(timeout=0.5).background["fetch"]
    wait_until_running(site.plain)
    with pytest.raises(errors.DeadlineExceeded):
        pending.result(WAIT)
    wait_until_gone(site.plain)
    assert answer(site.rows.all().start_count().background["count"]) == 3
