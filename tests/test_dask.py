"""Dask: what of the contract is particular to it. (The rest is in ``test_executors.py``.)"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import wait
from functools import partial
from pathlib import Path
from time import monotonic
from types import SimpleNamespace

import pytest
from django.db import connections
from django.test import TestCase, override_settings
from django.utils import timezone, translation

from parallel_orm import current_worker, errors, report_of
from parallel_orm.options import from_settings
from tests import functions
from tests.clusters import dask_by_hand, dask_cluster, databases_of_workers, threads_of_dask
from tests.testapp.models import Article
from tests.testapp.written import Ship

distributed = pytest.importorskip("distributed")
from parallel_orm.executors import dask  # noqa: E402

pytestmark = pytest.mark.once

WAIT = 60
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def _clients_end():
    yield
    dask.end_clients()


@pytest.fixture(scope="module")
def cluster():
    """A client of a cluster of two processes."""
    with dask_cluster() as client:
        yield client


@pytest.fixture(scope="module")
def threads():
    """A client of a cluster of two threads of this process."""
    with threads_of_dask(2) as client:
        yield client


def filled(alias, number=30):
    Article.objects.using(alias).bulk_create(Article(name=f"name {n}", rank=n) for n in range(number))
    return Article.objects.using(alias).order_by("rank")


@pytest.fixture
def articles(default):
    return filled(default)


def until(true, *, message):
    """Wait until something is so; as somebody else does it, there is nothing else to wait for."""
    end = monotonic() + WAIT
    while not true():
        assert monotonic() < end, message


# --- Which cluster ----------------------------------------------------------------------


def by_name(**dask_settings):
    return override_settings(PARALLEL_ORM={"DASK": dask_settings})


def test_by_name_it_is_the_cluster_at_the_address(articles, cluster, monkeypatch):
    made, connected = [], dask._connected
    monkeypatch.setattr(dask, "_connected", lambda *args: made.append(args) or connected(*args))
    dask.end_clients()
    with by_name(ADDRESS=cluster.scheduler.address):
        results = articles.parallel_map(functions.rank, executor="dask", chunk_size=10)
        assert articles.parallel_map(lambda row: os.getpid(), executor="dask")[0] != os.getpid()
    assert results == list(range(30))
    assert len(made) == 1, "connected to once"
    named = {"EXECUTORS": {"grid": {"BACKEND": "dask", "OPTIONS": {"address": cluster.scheduler.address}}}}
    with override_settings(PARALLEL_ORM=named):
        assert articles.parallel_map(functions.rank, executor="grid") == list(range(30))


SCRIPT = """
import os, threading
with open(os.environ["FOLDER"] + "/began", "a") as file:
    file.write("x")
import django
django.setup()
from django.db import connections
from tests.testapp.models import Article

factor = 3
def times(row):
    return row.rank * factor, os.getpid()

def mapped(number):
    found.append(Article.objects.order_by("rank").parallel_map(times, number, executor="dask", chunk_size=5))
    connections.close_all()

found = []
mapped(1)
thread = threading.Thread(target=mapped, args=(2,))  # as a view is run by one
thread.start()
thread.join()
for results in found:
    assert [value for value, _ in results] == [3 * n for n in range(30)], results
    assert os.getpid() not in {pid for _, pid in results}
print("all")
"""


def test_a_script_without_a_guard_has_a_cluster_of_its_own(articles, tmp_path):
    """And so has a thread of it, the same, which grows; they end with the process, silently."""
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-W", "error", "script.py"],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
            "PARALLEL_ORM_TEST_DATABASES": databases_of_workers(),
            "FOLDER": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("all\n", "", 0)
    assert (tmp_path / "began").read_text() == "x", "no worker runs the script"


def test_one_cluster_here_for_calls_of_any_number(articles, monkeypatch):
    """It grows, also while another call uses it; a call for fewer sends to fewer."""
    monkeypatch.setattr(dask.spawn, "get_preparation_data", dask.spawn.get_preparation_data)
    monkeypatch.setattr(dask, "LocalCluster", partial(distributed.LocalCluster, processes=False, protocol="tcp"))
    monkeypatch.setattr(dask, "CPU_COUNT", 4)
    dask.end_clients()
    with by_name(), articles.parallel_imap(functions.rank, 1, executor="dask", chunk_size=1) as stream:
        assert next(stream) == 0
        for number, there in ((1, 1), (3, 3), (2, 3), (None, 4)):
            assert articles.parallel_map(functions.rank, number, executor="dask", chunk_size=5) == list(range(30))
            (client,) = dask._clients.values()
            assert sum(client.nthreads().values()) == there
            with dask.executor(number) as executor:
                assert executor.number == (number or there)
        assert list(stream) == list(range(1, 30))
    dask.end_clients()


def test_a_client_that_is_given_stays_open(articles, threads):
    for given in (threads, threads.get_executor()):
        assert articles.parallel_map(functions.rank, executor=given) == list(range(30))
    assert threads.status == "running"
    assert threads.submit(abs, -1).result(WAIT) == 1


def test_what_an_executor_of_dask_was_given_counts(articles, threads):
    """Its calls go to the workers that it names, say."""
    nobody = threads.get_executor(workers=["127.0.0.1:9"], allow_other_workers=False)
    mapped = []

    def call():
        try:
            articles.parallel_map(functions.rank, executor=nobody)
        except errors.EngineUnavailable:
            mapped.append("went")
        finally:
            connections.close_all()

    thread = threading.Thread(target=call)
    thread.start()
    try:
        # An earlier test's may be forgotten only now.
        until(lambda: set(tasks_of(threads).values()) == {"no-worker"}, message="it is sent, and nobody may do it")
    finally:
        threads.cancel([distributed.Future(key, threads) for key in tasks_of(threads)])
        thread.join(WAIT)
    assert mapped == ["went"], "what somebody cancels is not waited for"


def tasks_of(client):
    """Return the tasks of ours that the scheduler knows of, and how each is."""

    def find(dask_scheduler):
        return {key: task.state for key, task in dask_scheduler.tasks.items() if str(key).startswith("parallel_orm-")}

    return client.run_on_scheduler(find)


def held_by(client):
    """Return how many tasks the workers have: at work, or queued there already."""
    return sum(client.run(lambda dask_worker: len(dask_worker.state.tasks)).values())


def test_what_is_no_client(articles):
    with threads_of_dask(1) as client, pytest.raises(errors.InvalidOption, match=r"give cluster\.get_client"):
        articles.parallel_map(functions.rank, executor=client.cluster)


def test_an_asynchronous_client(articles, threads):
    """Is used from another thread; its own must not be kept waiting."""

    def mapped(client):
        try:
            return list(articles.parallel_map(functions.rank, executor=client))
        finally:
            connections.close_all()

    async def main():
        async with distributed.Client(threads.scheduler.address, asynchronous=True, set_as_default=False) as client:
            assert await asyncio.to_thread(mapped, client) == list(range(30))
            with pytest.raises(errors.InvalidOption, match="in its own event loop"):
                with dask.executor(client=client):
                    pass

    asyncio.run(main())


@pytest.mark.parametrize(
    "named",
    [
        {"DASK": {"ADRESS": "tcp://here:1"}},
        {"DASK": {"ADDRESS": 3}},
        {"DASK": {"TIMEOUT": True}},
        {"DASK": 3},
        {"EXECUTORS": {"grid": {"BACKEND": "dask", "OPTIONS": {"adress": "tcp://here:1"}}}},
        {"EXECUTORS": {"grid": {"BACKEND": "dask", "OPTIONS": {"patience": "long"}}}},
    ],
    ids=str,
)
def test_bad_settings(named):
    with override_settings(PARALLEL_ORM=named), pytest.raises(errors.InvalidOption):
        from_settings()


# --- When nobody is there ---------------------------------------------------------------


def test_no_scheduler(articles):
    """In bounded time, with the address, and again when it is asked again."""
    with by_name(ADDRESS="tcp://127.0.0.1:9", TIMEOUT=0.5):
        for _ in range(2):
            began = monotonic()
            with pytest.raises(errors.EngineUnavailable, match="does not answer at tcp://127.0.0.1:9"):
                articles.parallel_map(functions.rank, executor="dask")
            assert monotonic() - began < 30
    with by_name(ADDRESS="nonsense"), pytest.raises(errors.EngineUnavailable):
        articles.parallel_map(functions.rank, executor="dask")


def test_no_worker(articles, monkeypatch):
    """It is said after a time; those that come within it are waited for."""
    monkeypatch.setattr(dask, "LOOKS", 0.05)
    with distributed.LocalCluster(n_workers=0, processes=False, dashboard_address="127.0.0.1:0") as cluster:
        with distributed.Client(cluster, set_as_default=False) as client, by_name(PATIENCE=0.2):
            with pytest.raises(errors.EngineUnavailable, match=r"has had no worker for 0\.2 seconds"):
                articles.parallel_map(functions.rank, executor=client)
        with distributed.Client(cluster, set_as_default=False) as client, by_name(PATIENCE=WAIT):
            with articles.parallel_imap(functions.rank, executor=client) as stream:
                found = []
                thread = threading.Thread(target=lambda: found.extend(stream))
                thread.start()
                until(lambda: tasks_of(client), message="it is sent")
                cluster.scale(1)
                thread.join(WAIT)
            assert found == list(range(30))


@pytest.mark.parametrize(
    "asked",
    [{"workers": ["nobody"]}, {"workers": "127.0.0.1:9", "resources": {"disks": 1}}, {"resources": {"disks": 3}}],
    ids=str,
)
def test_no_worker_of_those_that_are_asked_for(articles, monkeypatch, asked):
    """Others may be there: they will not do it."""
    monkeypatch.setattr(dask, "LOOKS", 0.05)
    with threads_of_dask(1, resources={"disks": 2}) as client, by_name(PATIENCE=0.2):
        named = ", ".join(f"{key}={value!r}" for key, value in asked.items())
        with pytest.raises(errors.EngineUnavailable, match=re.escape(f"0.2 seconds that get_executor({named}) allows")):
            articles.parallel_map(functions.rank, executor=client.get_executor(**asked))


def test_a_worker_that_is_asked_for(articles):
    """It counts as there, however it is called, and for as long as it takes."""
    with dask_cluster(1, resources={"disks": 2}) as client:
        ((address, known),) = client.scheduler_info()["workers"].items()
        for asked in (
            {"workers": [address]},
            {"workers": address.removeprefix("tcp://")},
            {"workers": known["name"]},
            {"workers": {known["host"]}},
            {"resources": {"disks": 2}},
            {"workers": ["nobody"], "allow_other_workers": True},
        ):
            executor = dask.DaskExecutor(client, how=asked)
            assert executor._asked == ({} if "allow_other_workers" in asked else asked)
            assert len(client.sync(executor._who_may)) == 1, asked
            assert articles.parallel_map(functions.rank, executor=client.get_executor(**asked)) == list(range(30))


def test_what_was_given_up_is_over(threads, gate, caplog):
    """Its task may be heard of later: nobody minds, and nothing of it is left at the scheduler."""
    executor = dask.DaskExecutor(threads, waits=True)
    given_up, alive = (executor.submit(executor.once(gate), Article(rank=n)) for n in (1, 2))
    gate.wait_for(2)
    dask._set(given_up, error=errors.engine_lost("Dask's scheduler"))
    gate.opened.set()
    assert alive.result(WAIT) == 2
    with pytest.raises(errors.EngineUnavailable):
        given_up.result()
    until(lambda: events_of(threads) == 0, message="what marked them is taken away")
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def test_what_is_cancelled_counts_as_done_for_those_that_wait(threads, gate):
    """Whether it was sent already, or is to be, or never will."""
    executor = dask.DaskExecutor(threads, most=2)
    futures = [executor.submit(gate, Article(rank=n)) for n in (1, 2, 3, 4)]
    gate.wait_for(2)
    for future in futures[1:]:
        assert future.cancel()
    gate.opened.set()
    assert wait(futures, WAIT).not_done == set()


def test_the_scheduler_goes_in_the_middle_and_comes_back(articles, tmp_path):
    """It ends as an error that is named; and the next call finds the new one, whose workers are made ready."""
    with dask_by_hand(tmp_path) as by_hand, by_name(ADDRESS=by_hand.address, TIMEOUT=WAIT):
        scheduler = by_hand.scheduler()
        by_hand.worker()
        with distributed.Client(by_hand.address, timeout=WAIT, set_as_default=False) as client:
            with articles.parallel_imap(functions.rank, executor=client, chunk_size=1) as stream:
                assert next(stream) == 0
                scheduler.kill()
                scheduler.wait()
                with pytest.raises(errors.EngineUnavailable, match="went away"):
                    list(stream)
            until(lambda: client.status == "connecting", message="the client sees it")
            with by_name(TIMEOUT=0.5):
                with pytest.raises(errors.EngineUnavailable, match=f"does not answer at {by_hand.address}"):
                    articles.parallel_map(functions.rank, executor=client)
            by_hand.scheduler()
            by_hand.worker()
            until(lambda: client.status == "running", message="the client is back")
            assert articles.parallel_map(functions.rank, executor=client, chunk_size=10) == list(range(30))
        assert articles.parallel_map(functions.rank, executor="dask", chunk_size=10) == list(range(30))


def test_the_scheduler_goes_while_writes_wait_to_be_sent(articles, tmp_path):
    """Nobody waits for what a client without a scheduler was given."""
    with dask_by_hand(tmp_path) as by_hand:
        scheduler = by_hand.scheduler()
        by_hand.worker()
        with distributed.Client(by_hand.address, timeout=WAIT, set_as_default=False) as client:

            def kill():
                until(lambda: tasks_of(client), message="something is sent")
                scheduler.kill()
                scheduler.wait()

            killer = threading.Thread(target=kill)
            killer.start()
            with pytest.raises(errors.EngineUnavailable, match="went away"):
                articles.parallel_each(lambda row: threading.Event().wait(WAIT), 1, executor=client, chunk_size=1)
            killer.join(WAIT)


# --- What is sent -----------------------------------------------------------------------


class Gate:
    """Where a worker, a thread of this process, waits; and what it has begun."""

    def __init__(self):
        self.opened, self.begun, self._arrived = threading.Event(), [], threading.Semaphore(0)

    def __call__(self, row):
        self.begun.append(row.rank)
        self._arrived.release()
        if row.rank:
            assert self.opened.wait(WAIT)
        return row.rank

    def wait_for(self, number):
        for _ in range(number):
            assert self._arrived.acquire(timeout=WAIT)

    def __reduce__(self):
        return _the_gate, ()


def _the_gate():
    return GATES[-1]


GATES: list[Gate] = []


@pytest.fixture
def gate():
    GATES.append(Gate())
    yield GATES[-1]
    GATES.pop().opened.set()


@pytest.fixture
def sent(threads, monkeypatch):
    """The calls that were sent to the cluster of threads."""
    calls, submit = [], threads.submit
    monkeypatch.setattr(threads, "submit", lambda *args, **kwargs: calls.append(1) or submit(*args, **kwargs))
    return calls


def test_the_window_is_bounded(articles, threads, gate, sent):
    with articles.parallel_imap(gate, executor=threads, chunk_size=1) as stream:
        assert next(stream) == 0
        gate.wait_for(3)
        assert 4 * 2 <= len(sent) <= 4 * 2 + 1
        gate.opened.set()
        assert list(stream) == list(range(1, 30))


def test_processes_bounds_how_many_are_at_work(articles, threads, gate, sent):
    with articles.parallel_imap(gate, 1, executor=threads, chunk_size=1) as stream:
        assert next(stream) == 0
        gate.wait_for(2)
        assert len(sent) == 2
        gate.opened.set()
        assert list(stream) == list(range(1, 30))
    assert articles.parallel_map(gate, 50, executor=threads, chunk_size=1) == list(range(30))


def test_processes_of_a_cluster_whose_workers_come_when_there_is_work(articles):
    """There is as much work as was said, so they have a reason to come."""
    with (
        distributed.LocalCluster(n_workers=0, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
        articles.parallel_imap(functions.rank, 8, executor=client, chunk_size=1) as stream,
    ):
        found = []
        thread = threading.Thread(target=lambda: found.extend(stream))
        thread.start()
        try:
            until(lambda: len(tasks_of(client)) == 8, message="it is sent")
        finally:
            cluster.scale(1)
            thread.join(WAIT)
        assert found == list(range(30))
    with threads_of_dask(2) as client:
        assert [dask.DaskExecutor(client, most=most).number for most in (None, 1, 8)] == [2, 1, 2]


def test_what_was_not_begun_is_not_begun_when_the_loop_is_left(articles, threads, gate):
    with articles.parallel_imap(gate, executor=threads, chunk_size=1) as stream:
        assert next(stream) == 0
        gate.wait_for(3)  # two wait, and some are queued
    until(lambda: not tasks_of(threads), message="the scheduler forgets them")
    until(lambda: held_by(threads) <= 2, message="so do the workers")
    gate.opened.set()
    until(lambda: held_by(threads) == 0, message="what was begun ends")
    assert len(gate.begun) == 3


def test_a_call_that_is_cancelled_is_not_begun(threads, gate):
    executor = dask.DaskExecutor(threads)
    futures = [executor.submit(gate, Article(rank=n)) for n in (1, 2, 3)]
    gate.wait_for(2)
    assert futures[2].cancel()
    until(lambda: len(tasks_of(threads)) == 2, message="the scheduler forgets it")
    until(lambda: held_by(threads) == 2, message="so does the worker, which may have had it queued")
    gate.opened.set()
    assert [future.result(WAIT) for future in futures[:2]] == [1, 2]
    assert sorted(gate.begun) == [1, 2]


def test_one_that_is_cancelled_leaves_the_others_alone(threads, gate):
    executor = dask.DaskExecutor(threads, most=1)
    futures = [executor.submit(gate, Article(rank=n)) for n in (1, 2, 3)]
    gate.wait_for(1)
    assert futures[0].cancel()
    gate.opened.set()
    assert [future.result(WAIT) for future in futures[1:]] == [2, 3]


def test_what_has_an_effect_and_was_not_sent_is_not_sent_after_an_error(articles, threads, gate):
    """What was sent is waited for, as nobody can tell what of it was begun."""

    def fail(row):
        gate.opened.set()
        gate(row)
        raise ValueError(row.rank)

    with pytest.raises(ValueError, match="0"):
        articles.parallel_each(fail, 2, executor=threads, chunk_size=1)
    assert len(gate.begun) <= 4


def test_in_order_however_they_come(articles, threads, gate):
    """The first is the last to come back."""
    with articles.reverse().parallel_imap(gate, executor=threads, chunk_size=25) as stream:
        gate_opener = threading.Thread(target=lambda: (gate.wait_for(1), gate.opened.set()))
        gate_opener.start()
        assert list(stream) == list(range(29, -1, -1))
        gate_opener.join(WAIT)
    results = articles.parallel_map(functions.rank, executor=threads, ordered=False, chunk_size=3)
    assert sorted(results) == list(range(30))


def see_variable(row):
    with connections[row._state.db].cursor() as cursor:
        cursor.execute("SELECT current_setting('app.tenant', true)")
        return cursor.fetchone()[0]


def test_the_session_of_the_caller(postgres, cluster):
    articles = filled(postgres, 3)
    with override_settings(PARALLEL_ORM={"SESSION_VARIABLES": ["app.tenant"]}):
        for tenant in ("one", "two"):
            with connections[postgres].cursor() as cursor:
                cursor.execute("SELECT set_config('app.tenant', %s, false)", [tenant])
            assert articles.parallel_map(see_variable, executor=cluster) == [tenant] * 3
    connections[postgres].close()
    assert articles.parallel_map(see_variable, executor=cluster)[0] in (None, ""), "nothing is left of it"


def test_language_and_time_zone_of_the_caller(articles, cluster):
    with translation.override("de"), timezone.override("Europe/Berlin"):
        assert articles.parallel_map(functions.neighbourhood, executor=cluster)[0] == ("de", "Europe/Berlin")
    assert articles.parallel_map(functions.neighbourhood, executor=cluster)[0] == ("en-us", "UTC")


def test_what_cannot_travel_is_named(articles, threads):
    lock = threading.Lock()
    with pytest.raises(errors.NotPicklable, match=r"<lambda> cannot be sent to .*locks"):
        articles.parallel_map(lambda row: lock, executor=threads)


def test_sqlite_has_one_writer(default, threads, monkeypatch):
    """However many workers the cluster has, so nobody waits for a lock."""
    out = []

    class Counting(dask.DaskExecutor):
        def submit(self, fn, /, *args, **kwargs):
            future = super().submit(fn, *args, **kwargs)
            out.append(future)
            assert sum(not each.done() for each in out) <= 1
            return future

    monkeypatch.setattr(dask, "DaskExecutor", Counting)
    report = Ship.objects.using(default).parallel_create(
        ({"name": f"ship {n}"} for n in range(20)), executor=threads, chunk_size=2
    )
    assert (report.succeeded, len(out)) == (20, 10)


def test_what_was_begun_to_be_written_is_waited_for(postgres, threads):
    """Also where another chunk has failed: nothing is written behind the caller's back."""
    ships = Ship.objects.using(postgres)
    MEETINGS.append(threading.Barrier(2))
    try:
        with pytest.raises(ValueError, match="poison") as caught:
            ships.parallel_create([{"name": "poison"}, {"name": "slow"}], meet, executor=threads, chunk_size=1)
    finally:
        MEETINGS.pop()
    assert report_of(caught.value).succeeded == ships.count() == 1


MEETINGS: list[threading.Barrier] = []


def meet(item):
    """Two chunks are begun; the one fails, and when that is known the other goes on."""
    MEETINGS[-1].wait(WAIT)
    if item["name"] == "poison":
        raise ValueError("poison")
    until(lambda: len(tasks_here()) <= 1, message="the other has failed")
    return Ship(**item)


def tasks_here():
    """The tasks that the worker of this process has still to do."""
    return [task for task in distributed.get_worker().state.tasks.copy().values() if task.state == "executing"]


# --- When workers are lost --------------------------------------------------------------


def die_once_on_three(row, marker):
    if row.rank == 3:
        functions.die(marker)
    return row.rank


def test_what_a_lost_worker_read_is_read_again(articles, cluster, tmp_path):
    function = partial(die_once_on_three, marker=str(tmp_path / "killed"))
    assert articles.parallel_map(function, executor=cluster, chunk_size=5) == list(range(30))
    assert (tmp_path / "killed").exists()


def test_a_chunk_that_kills_all_its_workers(articles):
    """Is given up, by name, after as many as the scheduler allows."""
    with dask_cluster(1) as client:
        client.run_on_scheduler(lambda dask_scheduler: setattr(dask_scheduler, "allowed_failures", 0))
        with pytest.raises(errors.WorkerDied, match="chunk 0 ") as caught:
            articles.parallel_map(functions.die_on_three, executor=client)
        assert caught.value.chunk.index == 0


def tick_and_die_once(row, folder):
    functions.tick(row, folder)
    if row.rank == 13:
        functions.die(f"{folder}/killed")


def ticks(folder):
    return {int(file.name): len(file.read_text()) for file in folder.iterdir() if file.name.isdigit()}


def test_effects_are_not_repeated_behind_the_callers_back(articles, cluster, tmp_path):
    """A lost chunk of parallel_each is done again where ``retries`` allow it, and only there."""
    (tmp_path / "once").mkdir()
    function = partial(tick_and_die_once, folder=str(tmp_path / "once"))
    with pytest.raises(errors.WorkerDied) as caught:
        articles.parallel_each(function, executor=cluster, chunk_size=10)
    assert caught.value.chunk.index == 1
    assert set(ticks(tmp_path / "once").values()) == {1}
    (tmp_path / "again").mkdir()
    function = partial(tick_and_die_once, folder=str(tmp_path / "again"))
    report = articles.parallel_each(function, executor=cluster, chunk_size=10, retries=1)
    assert (report.succeeded, report.failed) == (30, 0)
    counted = ticks(tmp_path / "again")
    assert set(counted) == set(range(30))
    assert {rank for rank, number in counted.items() if number > 1} >= set(range(10, 14))
    assert events_of(cluster) == 0, "nothing is left at the scheduler"


def events_of(client):
    return client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.extensions["events"]._events))


def that_kill(moment, marker, number=30):
    return [{"name": f"{moment} {n}", "papers": {"killed": str(marker)}} for n in range(number)]


@pytest.mark.parametrize("alias", ["default", "postgres"], indirect=True)
def test_a_worker_that_is_killed_as_it_writes(alias, cluster, tmp_path):
    """Nobody knows of its chunk, and nothing of it is done again, whatever Dask does and ``retries`` say."""
    ships, known = Ship.objects.using(alias), {"executor": cluster, "chunk_size": 10, "retries": 3}
    with pytest.raises(errors.WorkerDied) as caught:
        ships.parallel_create(that_kill("before the commit", tmp_path / "a"), functions.ship_that_kills, **known)
    (failure,) = report_of(caught.value).unknown
    assert "items 10 to 19" in str(failure)
    assert report_of(caught.value).succeeded == ships.count()
    ships.all().delete()
    report = ships.parallel_create(
        that_kill("behind the commit", tmp_path / "b"), functions.ship_that_kills, on_error="collect", **known
    )
    assert {failure.index for failure in report.unknown} >= set(range(10, 20))
    assert ships.count() == 30, "as it happens, it is there"
    assert report.succeeded + len(report.unknown) == 30


@pytest.mark.parametrize("alias", ["postgres"], indirect=True)
@pytest.mark.parametrize("moment", ["before the commit", "behind the commit"])
def test_a_worker_that_is_killed_around_its_commit(alias, cluster, tmp_path, moment):
    """Dask has its chunk done again, whose record says whether there is anything to do."""
    ships = Ship.objects.using(alias)
    report = ships.parallel_create(
        that_kill(moment, tmp_path / "killed"),
        functions.ship_that_kills,
        executor=cluster,
        chunk_size=10,
        run_id="import",
    )
    assert (tmp_path / "killed").exists()
    assert (report.succeeded + report.done_before, report.failed, report.unknown) == (30, 0, [])
    assert ships.count() == 30


# --- Other worlds -----------------------------------------------------------------------

OTHER_SETTINGS = """
import os, sys
from tests.settings import *
sys.path.insert(0, {there!r})
import parallel_orm
if {is_old}:
    parallel_orm.__version__ = "0.1"
    TIME_ZONE = "Asia/Tokyo"
    DATABASES = {{**DATABASES, "default": DATABASES["other"]}}
else:
    SECRET_KEY = "of another project"
"""


def write_module(folder, text):
    folder.mkdir()
    (folder / "skewed.py").write_text(f"from pathlib import Path\n\ndef touch(row, folder):\n    {text}\n")


@pytest.mark.parametrize("is_old", [True, False], ids=["old", "strange"])
def test_a_worker_of_another_world_is_refused(articles, other, tmp_path, monkeypatch, is_old):
    """It says what differs, and has done nothing."""
    write_module(tmp_path / "here", "(Path(folder) / str(row.rank)).touch()")
    write_module(tmp_path / "there", "(Path(folder) / str(row.rank)).touch()  # as it was last week")
    (tmp_path / "other_settings.py").write_text(OTHER_SETTINGS.format(there=str(tmp_path / "there"), is_old=is_old))
    Article.objects.using(other).create(rank=1)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path / "here"))
    import skewed

    monkeypatch.delitem(sys.modules, "skewed")
    monkeypatch.setitem(sys.modules, "skewed", skewed)
    (tmp_path / "done").mkdir()
    with dask_cluster(1, {"DJANGO_SETTINGS_MODULE": "other_settings"}) as client:
        with pytest.raises(errors.AnotherWorld if is_old else errors.NotSealed) as caught:
            articles.parallel_each(partial(skewed.touch, folder=str(tmp_path / "done")), executor=client)
    assert not list((tmp_path / "done").iterdir())
    told = f"{caught.value} {caught.value.__notes__} {report_of(caught.value)}"
    assert "of another project" not in told
    assert "SECRET_KEY" in told or is_old
    if is_old:
        assert [line.partition(" is 0.1")[0] for line in caught.value.differences] == [
            "parallel_orm",
            "the setting TIME_ZONE is another",
            "the module skewed is another",
            "the database default is another",
        ]
        assert any("was not begun" in line for line in caught.value.__notes__)


def test_a_worker_without_settings(articles, monkeypatch):
    """Those of the caller's name are tried; where there are none, it says what to do."""
    with dask_cluster(1) as client:
        client.run(lambda: os.environ.update(DJANGO_SETTINGS_MODULE="no.such.settings"))
        with pytest.raises(errors.EngineUnavailable, match="could not be made ready: ModuleNotFoundError: No module"):
            articles.parallel_map(functions.rank, executor=client)


def test_settings_that_a_worker_has_not_spoil_nothing(articles, tmp_path, monkeypatch):
    """Of a caller whose settings are not there, or name apps that are not, nothing stays for the next caller."""
    text = "from tests.settings import *\nINSTALLED_APPS = [*INSTALLED_APPS, 'no_such_app']\n"
    (tmp_path / "of_another.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    with dask_by_hand(tmp_path) as by_hand, by_name(ADDRESS=by_hand.address, TIMEOUT=WAIT):
        by_hand.scheduler()
        by_hand.worker()
        with distributed.Client(by_hand.address, timeout=WAIT, set_as_default=False) as client:
            client.wait_for_workers(1, WAIT)
            for module in ("no.such.settings", "of_another"):
                with monkeypatch.context() as patch, pytest.raises(errors.EngineUnavailable, match="No module named"):
                    patch.setattr(dask.World, "of_caller", lambda module=module: SimpleNamespace(module=module))
                    articles.parallel_map(functions.rank, executor=client)
            assert articles.parallel_map(functions.rank, executor=client) == list(range(30))


def test_workers_that_are_not_named_need_not_know_the_project(articles):
    """One of somebody else's, which could not even be made ready, is left alone."""
    with dask_cluster(2) as client:
        mine, theirs = client.scheduler_info()["workers"]
        client.run(lambda: os.environ.update(DJANGO_SETTINGS_MODULE="no.such.settings"), workers=[theirs])
        named = client.get_executor(workers=[mine], allow_other_workers=False)
        assert articles.parallel_map(functions.rank, executor=named, chunk_size=5) == list(range(30))
        with pytest.raises(errors.EngineUnavailable, match="could not be made ready"):
            articles.parallel_map(functions.rank, executor=client)


# --- Where it stays here ----------------------------------------------------------------


def test_a_database_in_memory_stays_here(memory):
    Article.objects.using(memory).create(rank=7)
    with by_name(ADDRESS="tcp://127.0.0.1:9"):
        results = Article.objects.using(memory).parallel_map(lambda row: os.getpid(), executor="dask")
    assert (results, results.report.reason) == ([os.getpid()], "memory")


class InATestCase(TestCase):
    def test_it_stays_here(self):
        """No cluster is asked for; what would have travelled is packed all the same."""
        Article.objects.create(rank=7)
        with by_name(ADDRESS="tcp://127.0.0.1:9"):
            results = Article.objects.parallel_map(lambda row: os.getpid(), executor="dask")
            self.assertEqual((results, results.report.reason), ([os.getpid()], "testcase"))
            lock = threading.Lock()
            with self.assertRaises(errors.NotPicklable):
                Article.objects.parallel_map(lambda row: lock, executor="dask")


def test_a_map_within_a_map(articles, cluster):
    """Runs inline: its worker may be the only one."""
    assert articles.parallel_map(count_within, executor=cluster) == [30] * 30


def count_within(row):
    return len(Article.objects.using(row._state.db).parallel_map(functions.rank, executor="dask"))


# --- From within a task -----------------------------------------------------------------


def by_a_map(articles):
    return articles.parallel_map(functions.rank, executor=distributed.get_client(), chunk_size=5)


def by_name_of_the_engine(articles):
    return articles.parallel_map(functions.rank, executor="dask", chunk_size=5)


def by_two_streams(articles):
    """One ends before the other, which has chunks to come."""
    client = distributed.get_client()
    with articles.parallel_imap(functions.rank, executor=client, chunk_size=1) as long:
        assert next(long) == 0
        assert list(articles[:5].parallel_imap(functions.rank, executor=client)) == list(range(5))
        return [0, *long]


def by_a_worker_client(articles):
    with distributed.worker_client() as client:
        return articles.parallel_map(functions.rank, executor=client, chunk_size=5)


def by_one_that_has_left(articles):
    distributed.secede()
    results = by_a_map(articles)
    with pytest.raises(KeyError):
        distributed.secede()  # it has still
    distributed.rejoin()
    return results


def ended_elsewhere(articles):
    stream = articles.parallel_imap(functions.rank, executor=distributed.get_client(), chunk_size=1)
    assert next(stream) == 0
    closer = threading.Thread(target=stream.close)
    closer.start()
    closer.join(WAIT)
    assert not closer.is_alive()


def task(call, alias):
    """What a task does: a call, after which it has its place."""
    try:
        results = call(Article.objects.using(alias).order_by("rank"))
        if results is not None:
            distributed.secede()  # refused where it has none
        return results and list(results)
    finally:
        connections.close_all()


@pytest.mark.parametrize(
    "call", [by_a_map, by_name_of_the_engine, by_two_streams, by_a_worker_client, by_one_that_has_left]
)
def test_a_call_of_a_task(articles, call):
    """It makes room for its chunks, where there is one thread for all; and has its place again afterwards."""
    with threads_of_dask(1) as client, by_name(ADDRESS=client.scheduler.address):
        for _ in range(2):
            assert client.submit(task, call, articles.db, pure=False).result(WAIT) == list(range(30))


def test_a_stream_of_a_task_that_ends_in_another_thread(articles):
    """That one has no place to go back to, and that of the task is filled."""
    with threads_of_dask(1) as client:
        assert client.submit(task, ended_elsewhere, articles.db).result(WAIT) is None
        assert client.submit(abs, -1).result(WAIT) == 1


class Counter:
    """An actor."""

    def count(self, alias):
        articles = Article.objects.using(alias)
        try:
            with articles.parallel_imap(functions.rank, executor=distributed.get_client()) as stream:
                first = next(stream)
                distributed.secede()  # refused where it has no place
                return len([first, *stream])
        finally:
            connections.close_all()


def test_a_call_of_an_actor(articles):
    """It keeps its place: methods of an actor have one thread, and run one at a time."""
    with threads_of_dask(1) as client:
        kept = client.submit(Counter, actor=True)
        assert kept.result(WAIT).count(articles.db).result(WAIT) == 30


def test_a_forked_child_leaves_the_clients_to_its_parent(articles, cluster, monkeypatch):
    parent, close = os.getpid(), distributed.Client.close

    def closed(self, *args, **kwargs):
        return close(self, *args, **kwargs) if os.getpid() == parent else os._exit(2)

    monkeypatch.setattr(distributed.Client, "close", closed)
    with by_name(ADDRESS=cluster.scheduler.address):
        assert articles.parallel_map(functions.rank, executor="dask") == list(range(30))
        connections[articles.db].close()
        pid = os.fork()
        if pid == 0:
            dask.end_clients()  # as it does when it ends
            os._exit(0 if not dask._clients else 1)
        assert os.waitpid(pid, 0)[1] == 0
        assert articles.parallel_map(functions.rank, executor="dask") == list(range(30))


def test_init_hooks_and_state(articles, threads):
    def begin(worker):
        worker.state.factor = 2

    assert articles.parallel_map(
        lambda row: row.rank * current_worker().state.factor, init_hook=begin, executor=threads
    ) == [2 * n for n in range(30)]
