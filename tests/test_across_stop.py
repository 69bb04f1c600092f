"""One of several databases is slow, is down, or dies: the call says which, and nothing goes on elsewhere."""

from __future__ import annotations

import _thread
import socket
import threading
from contextlib import ExitStack

import pytest
from django.db import DatabaseError, OperationalError, connections, transaction
from django.db.models import Count, Max, Min
from django.db.models.functions import Collate

from parallel_orm import asking, comparing, errors
from parallel_orm.reads import Read
from parallel_orm.task import Task
from tests.conftest import _run
from tests.shards import databases_like
from tests.test_across import linguistic
from tests.test_stop import an_alias_like, until
from tests.testapp.models import Sale, Shop
from tests.threads import all_done

WAIT = 60
#: A minute, for rows of number 99.
SLOW = {
    "postgresql": "(CASE WHEN number = 99 THEN (SELECT 1 FROM pg_sleep(60)) ELSE 1 END) = 1",
    "mysql": "(CASE WHEN number = 99 THEN SLEEP(60) ELSE 0 END) = 0",
    "sqlite": "(CASE WHEN number = 99 THEN (WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n"
    " WHERE x < 4000000000) SELECT max(x) FROM n) ELSE 1 END) >= 1",
}


@pytest.fixture(scope="module")
def made(pytestconfig):
    found, stack = {}, ExitStack()
    yield found, stack
    with pytestconfig.stash[_run].databases.allowing(*found):
        stack.close()


@pytest.fixture
def shards(alias, made):
    """Three databases with three rows each; the second has one that takes a minute."""
    found, stack = made
    if alias not in found:
        found[alias] = stack.enter_context(databases_like(alias, 3))
    for place, name in enumerate(found[alias]):
        Sale.objects.using(name).all().delete()
        Shop.objects.using(name).all().delete()
        Sale.objects.using(name).bulk_create(
            [Sale(pk=3 * place + n + 1, number=99 if place == 1 and n == 0 else n) for n in range(3)]
        )
    yield found[alias]
    for name in found[alias]:
        connections[name].close()
        until(lambda name=name: others(alias, name) == 0, "a connection was left open, or a query is under way")


def others(alias, name):
    """Return how many are connected to a database."""
    vendor, database = connections[alias].vendor, connections[name].settings_dict["NAME"]
    if vendor == "sqlite":
        return 0
    table = {
        "postgresql": "pg_stat_activity WHERE backend_type = 'client backend' AND datname",
        "mysql": "information_schema.processlist WHERE db",
    }[vendor]
    with connections[alias].cursor() as cursor:
        cursor.execute(f"SELECT count(*) FROM {table} = %s", [database])
        return cursor.fetchone()[0]


def slow(shards, **knobs):
    return Sale.objects.across(*shards, **knobs).extra(where=[SLOW[connections[shards[0]].vendor]])


ASKED = {
    "list": list,
    "count": lambda rows: rows.count(),
    "aggregate": lambda rows: rows.aggregate(n=Count("pk")),
    "in_bulk": lambda rows: rows.in_bulk(),
    "first": lambda rows: rows.first(),
    "started": lambda rows: list(rows.start_fetch()),
    "get": lambda rows: rows.get(pk=4),
}


@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
def test_a_timeout_names_its_database(shards, ask):
    with pytest.raises(errors.DeadlineExceeded) as raised:
        ask(slow(shards, timeout=1))
    assert any(f"on database '{shards[1]}'" in each for each in raised.value.__notes__)


@pytest.mark.parametrize("ask", [ASKED[name] for name in ("list", "first", "get")])
def test_a_partial_answer(shards, ask):
    """What there is, and what is not."""
    rows = slow(shards, timeout=2, partial=True)
    if ask is ASKED["get"]:
        with pytest.raises(Sale.DoesNotExist):
            ask(rows)
    else:
        whole = ask(Sale.objects.across(shards[0], shards[2]))
        assert ask(rows) == whole
    assert list(rows.missing) == [shards[1]]
    assert isinstance(rows.missing[shards[1]], errors.DeadlineExceeded)
    assert len(Sale.objects.across(*shards, partial=True)) == 9
    assert rows.all().missing == {}, "a queryset made of it has its own"


TOLD = {
    "start_get": lambda rows: rows.start_get(pk=7).result(),
    "start_first": lambda rows: rows.start_first().result(),
    "start_last": lambda rows: rows.start_last().result(),
    "index": lambda rows: rows[3],
    "step": lambda rows: rows[0:6:2],
}


@pytest.mark.parametrize("ask", TOLD.values(), ids=TOLD)
def test_whoever_was_asked_tells_what_is_missing(shards, ask):
    """Also where it is a clone that asks, which nobody else has."""
    with connections[shards[1]].cursor() as cursor:
        cursor.execute("ALTER TABLE testapp_sale RENAME TO elsewhere")
    try:
        rows = Sale.objects.across(*shards, partial=True).order_by("pk")
        assert ask(rows) == ask(Sale.objects.across(shards[0], shards[2]).order_by("pk"))
        assert list(rows.missing) == [shards[1]]
        part = rows[:3]
        assert len(part) == 3
        assert list(part.missing) == [shards[1]]
    finally:
        connections[shards[1]].close()
        with connections[shards[1]].cursor() as cursor:
            cursor.execute("ALTER TABLE elsewhere RENAME TO testapp_sale")


def test_a_partial_answer_in_the_order_of_text(shards):
    """How a database sorts is looked up there: where it cannot be, the others' rows are there all the same."""
    with connections[shards[1]].cursor() as cursor:
        cursor.execute("ALTER TABLE testapp_sale RENAME TO elsewhere")
    try:
        rows = Sale.objects.across(*shards, partial=True).order_by("name", "pk")
        assert [row.pk for row in rows] == [1, 2, 3, 7, 8, 9]
        assert list(rows.missing) == [shards[1]]
        with pytest.raises(DatabaseError) as raised:
            list(Sale.objects.across(*shards).order_by("name", "pk"))
        assert any(f"on database '{shards[1]}'" in each for each in raised.value.__notes__)
    finally:
        connections[shards[1]].close()
        with connections[shards[1]].cursor() as cursor:
            cursor.execute("ALTER TABLE elsewhere RENAME TO testapp_sale")


def test_the_first_yes_ends_the_others(shards):
    """Else this would take a minute."""
    rows = slow(shards).filter(number__in=[99, 2])
    assert rows.exists() is True


def test_a_database_that_fails_ends_the_others(shards):
    with connections[shards[2]].cursor() as cursor:
        cursor.execute("ALTER TABLE testapp_sale RENAME TO elsewhere")
    try:
        with pytest.raises(DatabaseError) as raised:
            slow(shards).count()
    finally:
        with connections[shards[2]].cursor() as cursor:
            cursor.execute("ALTER TABLE elsewhere RENAME TO testapp_sale")
    assert any(f"on database '{shards[2]}'" in each for each in raised.value.__notes__)


def begun(alias, name):
    """Return a function that waits until the server is at a slow query on a database, and has it end it if asked."""
    vendor, database = connections[alias].vendor, connections[name].settings_dict["NAME"]
    wrapper = connections.create_connection(alias)
    wrapper.inc_thread_sharing()
    question = {
        "postgresql": "SELECT pid FROM pg_stat_activity WHERE datname = %s AND query LIKE '%%pg_sleep(60)%%'"
        " AND state = 'active'",
        "mysql": "SELECT id FROM information_schema.processlist WHERE db = %s AND info LIKE '%%SLEEP(60)%%'",
    }[vendor]

    def found(*, kills):
        with wrapper.cursor() as cursor:
            cursor.execute(question, [database])
            pids = [pid for (pid,) in cursor.fetchall()]
            for pid in pids if kills else ():
                cursor.execute(f"SELECT pg_terminate_backend({pid})" if vendor == "postgresql" else f"KILL {pid}")
            return pids

    def wait(*, kills=False):
        try:
            until(lambda: found(kills=kills), "the query never began")
        finally:
            wrapper.close()

    return wait


def kill(alias, name):
    """Have the server end whoever is at a slow query on a database, as soon as anybody is."""
    begun(alias, name)(kills=True)


def test_ctrl_c(alias, shards):
    """It is heard at once, and no query goes on: the fixture looks."""
    if connections[alias].vendor == "sqlite":
        pytest.skip("has no server")
    wait = begun(alias, shards[1])

    def press():
        wait()
        _thread.interrupt_main()

    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        slow(shards).count()
    thread.join(WAIT)


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("verb", ["list", "count", "aggregate", "started"])
def test_a_backend_that_is_killed(alias, shards, verb, partial):
    if connections[alias].vendor == "sqlite":
        pytest.skip("has no server")
    rows, caught = slow(shards, partial=partial), []

    def use():
        try:
            caught.append(ASKED[verb](rows))
        except DatabaseError as error:
            caught.append(error)
        finally:
            connections.close_all()

    thread = threading.Thread(target=use)
    thread.start()
    kill(alias, shards[1])
    thread.join(WAIT)
    (answer,) = caught
    if partial:
        assert list(rows.missing) == [shards[1]]
        assert answer == ASKED[verb](Sale.objects.across(shards[0], shards[2]))
    else:
        assert any(f"on database '{shards[1]}'" in each for each in answer.__notes__)


def test_a_server_that_is_down(alias, shards):
    if connections[alias].vendor == "sqlite":
        pytest.skip("has no server")
    with socket.socket() as taken:  # bound, and not listening
        taken.bind(("127.0.0.1", 0))
        with an_alias_like(alias, HOST="127.0.0.1", PORT=str(taken.getsockname()[1])) as dead:
            with pytest.raises(DatabaseError) as raised:
                list(Sale.objects.across(shards[0], dead))
            assert any(f"on database '{dead}'" in each for each in raised.value.__notes__)
            rows = Sale.objects.across(shards[0], dead, partial=True)
            assert len(rows) == 3
            assert list(rows.missing) == [dead]
            with pytest.raises(DatabaseError):
                Sale.objects.across(dead, partial=True).count()


ASKED_OF_A_SERVER_THAT_IS_DOWN = {
    "text": lambda rows: [row.pk for row in rows.order_by("name", "pk")],
    "uuid": lambda rows: [row.pk for row in rows.order_by("code", "pk")],
    "groups": lambda rows: list(rows.values("name").annotate(n=Count("pk"), m=Max("name")).order_by("name")),
    "groups of uuid": lambda rows: list(rows.values("code").annotate(n=Count("pk")).order_by("code")),
    "distinct": lambda rows: list(rows.values("name", "code").distinct().order_by("name")),
    "aggregate": lambda rows: rows.aggregate(m=Max("name"), n=Min("name")),
}


def test_how_a_server_that_is_down_sorts(alias, shards):
    """It need not be known, whatever is asked: what it would have sorted is not there."""
    if connections[alias].vendor == "sqlite":
        pytest.skip("has no server")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with an_alias_like(alias, HOST="127.0.0.1", PORT=str(taken.getsockname()[1])) as dead:
            for verb, ask in ASKED_OF_A_SERVER_THAT_IS_DOWN.items():
                rows = Sale.objects.across(dead, *shards, partial=True)
                assert ask(rows) == ask(Sale.objects.across(*shards)), verb
                with pytest.raises(DatabaseError) as raised:
                    ask(Sale.objects.across(dead, *shards))
                assert any(repr(dead) in each for each in raised.value.__notes__), verb


def test_a_server_that_goes_down_before_it_ranks(alias, shards, monkeypatch):
    """Another one that sorts alike is asked instead."""
    ranks_on, asked = comparing.ranks_on, []

    def fails(name, *args):
        asked.append(name)
        if name == shards[0]:
            raise OperationalError("it is down")
        return ranks_on(name, *args)

    collation = linguistic(alias)
    if "." in collation:
        pytest.skip(f"Django refuses the name {collation!r}")
    for place, name in enumerate(shards):
        Sale.objects.using(name).update(name="bac"[place])
    monkeypatch.setattr(comparing, "ranks_on", fails)
    rows = Sale.objects.across(*shards).order_by(Collate("name", collation), "pk")
    assert [row.name for row in rows] == [*"aaabbbccc"]
    assert asked == list(shards[:2])


def test_in_a_transaction_of_one_of_them(shards):
    """The caller's own writes are seen, and those of the others as ever."""
    rows = Sale.objects.across(*shards)
    with transaction.atomic(using=shards[1]):
        Sale.objects.using(shards[1]).create(pk=50, number=5)
        assert rows.count() == 10
        assert sorted(row.pk for row in rows.all()) == [*range(1, 10), 50]
        assert next(rows.order_by("-pk").chunked_iterator(2)).pk == 50
        transaction.set_rollback(True, using=shards[1])
    assert rows.all().count() == 9


def test_no_more_rows_than_needed_leave_a_database(shards, django_assert_queries):
    """Of a slice each gives as many as it may have of it, and no more."""
    with django_assert_queries(shards) as said:
        assert len(Sale.objects.across(*shards).order_by("-pk")[1:3]) == 2
    assert [sql.rstrip().endswith("LIMIT 3") for sql in said()] == [True] * 3


@pytest.fixture
def django_assert_queries():
    from contextlib import contextmanager

    from django.test.utils import CaptureQueriesContext

    @contextmanager
    def capture(names):
        with ExitStack() as stack:
            seen = [stack.enter_context(CaptureQueriesContext(connections[name])) for name in names]
            yield lambda: [each["sql"] for one in seen for each in one.captured_queries]

    return capture


def test_whoever_waits_is_woken_once(shards, monkeypatch):
    """When the last has answered; the others come before, one after the other."""
    woken, told = [], {name: threading.Event() for name in shards}
    wake, run = Read._wake, Task.run

    class Told(asking.SimpleQueue):
        def put(self, pending):
            woken.append(pending.alias)
            super().put(pending)

    def wake_and_tell(read):
        wake(read)
        told[read.alias].set()

    def run_in_turn(task):
        place = shards.index(task.chunk.alias)
        assert place == 0 or told[shards[place - 1]].wait(WAIT)
        return run(task)

    monkeypatch.setattr(asking, "SimpleQueue", Told)
    monkeypatch.setattr(Read, "_wake", wake_and_tell)
    monkeypatch.setattr(Task, "run", run_in_turn)
    assert Sale.objects.across(*shards).count() == 9
    all_done()
    assert woken == [shards[2]]
