"""Settings, exceptions, connections and forwarded state: the small modules."""

from __future__ import annotations

import copyreg
import pickle
import threading

import pytest
from django.core.checks.registry import registry
from django.db import connections
from django.test import override_settings

from parallel_orm import errors
from parallel_orm.checks import check_settings
from parallel_orm.chunks import Chunk
from parallel_orm.connections import Lender
from parallel_orm.options import available_cores, from_settings
from parallel_orm.outcomes import pack_error
from tests.testapp.models import Article

WAIT = 30

EXCEPTIONS = [
    errors.WorkerDied(4, -9, Chunk(3, "default", after=(1,), until=(2,)), "shop.Order"),
    errors.WorkerDied(4, None),
    errors.RemoteError("shop.Strange", "this", "Traceback..."),
    errors.InvalidOption("so"),
    errors.UnsupportedQuerySet("so"),
    errors.TransactionRefused("so"),
    errors.UnknownAlias("so"),
    errors.MissingExtra("so"),
    errors.NotPicklable("so"),
]


@pytest.mark.parametrize("error", EXCEPTIONS, ids=lambda error: type(error).__name__)
def test_exceptions_cross_processes(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert {k: v for k, v in vars(again).items() if k != "__notes__"} == vars(error)
    assert isinstance(again, errors.ParallelORMError)


def test_every_exception_is_in_the_tree_of_its_module():
    tree = errors.__doc__ or ""
    for name, thing in vars(errors).items():
        if isinstance(thing, type) and issubclass(thing, errors.ParallelORMError):
            assert name in tree


def test_an_exception_whose_text_fails_still_arrives():
    class Mute(Exception):
        def __init__(self, *parts):
            super().__init__(*parts)
            self.lock = threading.Lock()

        def __str__(self):
            raise RuntimeError

    arrived = pack_error(Mute(1)).open()
    assert isinstance(arrived, errors.RemoteError)
    assert "could not be made" in str(arrived)


def without_init(kind, args):
    error = kind.__new__(kind)
    error.args = args
    return error


@pytest.mark.parametrize(
    ("error", "name"),
    [(StopIteration("rank"), "value"), (OSError(2, "gone", "file"), "filename"), (SystemExit(3), "code")],
    ids=repr,
)
def test_exceptions_whose_reducer_a_library_has_replaced(monkeypatch, error, name):
    """As Dask does for all of them: what only ``__init__`` sets comes through."""
    monkeypatch.setitem(copyreg.dispatch_table, type(error), lambda error: (without_init, (type(error), error.args)))
    arrived = pack_error(error).open()
    assert (type(arrived), arrived.args) == (type(error), error.args)
    assert getattr(arrived, name) == getattr(error, name)
    assert str(arrived) == str(error)


BAD_SETTINGS = [
    ({"THREADS": 0}, "THREADS"),
    ({"PROCESSES": "2"}, "PROCESSES"),
    ({"PROCESSES": True}, "PROCESSES"),
    ({"START_METHOD": "teleport"}, "START_METHOD"),
    ({"CONNECTIONS": -1}, "CONNECTIONS"),
    ({"CONNECTIONS": {"default": "many"}}, "CONNECTIONS"),
    ({"CHUNK_SIZE": 0}, "CHUNK_SIZE"),
    ({"TARGET_SECONDS": 0}, "TARGET_SECONDS"),
    ({"TARGET_SECONDS": "1"}, "TARGET_SECONDS"),
    ({"TARGET_SECONDS": True}, "TARGET_SECONDS"),
    ({"TARGET_SECONDS": float("inf")}, "TARGET_SECONDS"),
    ({"TARGET_SECONDS": float("nan")}, "TARGET_SECONDS"),
    ({"CONNECTIONS": {"nowhere": 1}}, "CONNECTIONS"),
    ({"THREAD": 3}, "THREAD"),
]


@pytest.mark.parametrize(("given", "name"), BAD_SETTINGS, ids=str)
def test_bad_settings_are_found_by_the_checks_and_by_the_call(given, name):
    with override_settings(PARALLEL_ORM=given):
        (message,) = check_settings()
        assert message.id == "parallel_orm.E001"
        assert repr(name) in message.msg
        assert message.hint
        with pytest.raises(errors.InvalidOption, match=name):
            from_settings()
    assert check_settings() == []
    assert check_settings in registry.get_checks()


@pytest.mark.parametrize("given", [None, [], "x"])
def test_settings_that_are_no_dictionary(given):
    with override_settings(PARALLEL_ORM=given):
        assert [message.id for message in check_settings()] == ["parallel_orm.E001"]


def test_settings_have_defaults_and_are_read_anew():
    assert from_settings().PROCESSES == available_cores() >= 1
    with override_settings(PARALLEL_ORM={"PROCESSES": 5, "CONNECTIONS": {"default": 2}}):
        assert from_settings().PROCESSES == 5
        assert from_settings().connections_of("default") == 2
        assert from_settings().connections_of("other") == from_settings().THREADS


def test_a_chunk_size_of_the_settings(default):
    Article.objects.using(default).bulk_create(Article() for _ in range(10))
    with override_settings(PARALLEL_ORM={"CHUNK_SIZE": 3}):
        assert Article.objects.using(default).parallel_map(lambda row: 1, threads=1).report.chunks == 4


@pytest.fixture
def lender(monkeypatch):
    monkeypatch.setattr("parallel_orm.connections.under_test", lambda: False)
    lender = Lender()
    yield lender
    lender.close_idle()


def in_thread(function):
    """Run it in a thread that has no connections, and return what it returns."""
    results = []

    def run():
        try:
            results.append(function())
        finally:
            connections.close_all()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(WAIT)
    assert results
    return results[0]


def use(lender, alias):
    with lender.lent(alias):
        Article.objects.using(alias).count()
        return connections[alias]


def test_a_connection_serves_one_thread_after_the_other(lender, alias):
    first = in_thread(lambda: use(lender, alias))
    assert first.connection is not None
    assert in_thread(lambda: use(lender, alias)) is first


def test_the_threads_own_connections_stay_its_own(lender, default, other):
    Article.objects.using(default).count()
    own = connections[default], connections[default].connection
    with lender.lent(other):
        assert connections[default] is not own[0]
        Article.objects.using(default).count()
    assert (connections[default], connections[default].connection) == own


def test_a_connection_in_a_transaction_is_not_lent_again(lender, alias):
    def leave_open():
        with lender.lent(alias):
            connections[alias].set_autocommit(False)
            Article.objects.using(alias).count()
            return connections[alias]

    assert in_thread(leave_open).connection is None
    assert in_thread(lambda: use(lender, alias)).get_autocommit()


def test_a_connection_that_is_too_old_is_renewed(lender, alias, monkeypatch):
    monkeypatch.setitem(connections[alias].settings_dict, "CONN_MAX_AGE", 60)
    first = in_thread(lambda: use(lender, alias))
    first.close_at = 0
    assert in_thread(lambda: use(lender, alias)) is not first
    assert first.connection is None


def test_a_connection_of_other_settings_is_not_lent(lender, alias, monkeypatch):
    """A test run renames its databases in place: what was opened before leads elsewhere."""
    first = in_thread(lambda: use(lender, alias))
    monkeypatch.setitem(connections[alias].settings_dict, "OF_ANOTHER", True)
    assert in_thread(lambda: use(lender, alias)) is not first
    assert first.connection is None


def test_idle_ones_are_closed_after_a_while(lender, alias, monkeypatch):
    monkeypatch.setattr("parallel_orm.connections.IDLE_SECONDS", 0.05)
    first = in_thread(lambda: use(lender, alias))
    while lender._sweeper is not None:
        lender._sweeper.join(WAIT)
    assert first.connection is None
    assert lender._sweeper is None


def test_the_budget_bounds_what_is_lent_at_once(lender, default):
    with override_settings(PARALLEL_ORM={"CONNECTIONS": 2}):
        gate, entered = threading.Event(), threading.Semaphore(0)

        def hold():
            with lender.lent(default):
                entered.release()
                assert gate.wait(WAIT)

        threads = [threading.Thread(target=hold) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert entered.acquire(timeout=WAIT)
        assert entered.acquire(timeout=WAIT)
        assert lender._budgets[default][1].acquire(blocking=False) is False
        gate.set()
        for thread in threads:
            thread.join(WAIT)
        assert entered.acquire(blocking=False), "the third had its turn"
