"""``executor="celery"``: the contract over real workers, and what happens when one of all that is in between breaks."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from operator import add
from pathlib import Path
from time import monotonic
from types import ModuleType
from typing import Any
from uuid import uuid4
from zlib import decompress

import kombu
import psutil
import pytest
from amqp.exceptions import NotFound
from celery import _state
from celery.exceptions import NotRegistered, TimeLimitExceeded
from celery.signals import after_task_publish
from django.db import connections
from django.test import TestCase, override_settings
from kombu.exceptions import ChannelError, ContentDisallowed

import parallel_orm
from parallel_orm import Failure, errors, proof
from parallel_orm.executors import celery as engine
from parallel_orm.executors.celery import CeleryExecutor, error_of
from parallel_orm.executors.messages import answer_of, message_of
from tests import celeryapp, functions
from tests.celeryapp import make_app
from tests.servers import OwnServer
from tests.test_executors import (
    articles,
    test_errors_name_the_row,
    test_hooks_that_fail,
    test_several_querysets,
    test_state_is_for_one_call,
)
from tests.testapp.models import Article
from tests.testapp.written import Ship

__all__ = [
    "articles",
    "test_errors_name_the_row",
    "test_hooks_that_fail",
    "test_several_querysets",
    "test_state_is_for_one_call",
]

pytestmark = [pytest.mark.pairs, pytest.mark.once]
WAIT = 60
ROOT = Path(__file__).parent.parent
#: The app that calls use, by its dotted path.
APP: Any = None


@pytest.fixture(autouse=True)
def _no_app_is_current():
    """Apps that are made or used here become those of this process, of whoever names none, for all tests behind it."""
    before = _state.default_app
    yield
    _state._tls.current_app, _state.default_app = None, before


@dataclass
class Fleet:
    """A worker of two processes, and the app by which it is called."""

    broker: str
    backend: str
    options: dict[str, Any] = field(default_factory=dict)
    queue: str = field(default_factory=lambda: f"parallel_orm_{uuid4().hex}")
    process: subprocess.Popen[str] | None = None
    #: What the worker has said.
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.app = make_app(self.broker, self.backend, self.queue)

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self, *arguments: str) -> None:
        """Have the worker run, if it does not."""
        if self.is_running:
            return
        command = [sys.executable, "-m", "celery", "-A", "tests.celeryapp", "worker", "--concurrency=2"]
        command += ["--loglevel=INFO", f"--hostname={self.queue}@%h", "--without-gossip", "--without-mingle"]
        self.process = subprocess.Popen(
            [*command, *arguments],
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        is_ready = threading.Event()
        threading.Thread(target=self._listen, args=[self.process, is_ready], daemon=True).start()
        assert is_ready.wait(WAIT), "".join(self.log)
        assert self.is_running, "".join(self.log)

    def _listen(self, process: subprocess.Popen[str], is_ready: threading.Event) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                self.log.append(line)
                if line.rstrip().endswith("ready."):
                    is_ready.set()
        is_ready.set()

    @property
    def environment(self) -> dict[str, str]:
        """That of a worker: it knows the test databases as its own."""
        databases = json.loads(os.environ["PARALLEL_ORM_TEST_DATABASES"])
        for each in databases.values():
            each["NAME"] = each["TEST"].get("NAME", each["NAME"])
        return os.environ | {
            "PARALLEL_ORM_TEST_DATABASES": json.dumps(databases),
            "PARALLEL_ORM_TEST_BROKER": self.broker,
            "PARALLEL_ORM_TEST_BACKEND": self.backend,
            "PARALLEL_ORM_TEST_QUEUE": self.queue,
            "PARALLEL_ORM_TEST_OPTIONS": json.dumps({"CELERY": self.options}),
        }

    def sent(self, message: str, **options: Any) -> Any:
        """Return what the worker answers a message."""
        return self.app.send_task("parallel_orm.call", [message], ignore_result=False, **options).get(timeout=WAIT)

    def hosts(self) -> list[str]:
        return [f"{self.queue}@{socket.gethostname()}"]

    def asked(self) -> Any:
        return self.app.control.inspect(self.hosts(), timeout=WAIT)

    def at_work(self) -> list[Any]:
        """What the worker has of messages."""
        asked = self.asked()
        return [
            each for told in (asked.active(), asked.reserved()) for tasks in (told or {}).values() for each in tasks
        ]

    def has_revoked(self) -> bool:
        return any((self.asked().revoked() or {}).values())

    def kill(self) -> None:
        """End the worker as a power cut would, all of its processes."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(WAIT)
            self.process = None

    def end(self) -> None:
        self.kill()
        with self.app.connection_for_write() as connection:
            for name in (self.queue, f"{self.queue}_aside"):
                delete(connection, "queue", name)
                delete(connection, "exchange", name)
            for name in ("_control.pidbox", "_events"):
                delete(connection, "exchange", f"{self.queue}{name}")
            delete(connection, "exchange", f"reply.{self.queue}_control.pidbox")
        self.app.close()


def delete(connection: Any, kind: str, name: str) -> None:
    """Delete a queue or an exchange of a broker's, if there is one."""
    with suppress(Exception), connection.channel() as channel:  # which an error closes
        getattr(channel, f"{kind}_delete")(name)


@dataclass
class Elsewhere:
    """An app whose workers, if it has any, are no matter of the test."""

    app: Any
    options: dict[str, Any] = field(default_factory=dict)

    def start(self) -> None:
        pass


@pytest.fixture(scope="module")
def fleets():
    """The fleets of this module, by broker; each is made when a test first asks for it."""
    made: dict[str, Fleet] = {}
    yield made
    for fleet in made.values():
        fleet.end()


@pytest.fixture
def over_redis(fleets, databases):
    """Everything over Redis, and JSON alone."""
    if "redis" not in fleets:
        url = databases.url_of("redis")
        fleets["redis"] = Fleet(url, url)
    with calling(fleets["redis"]) as fleet:
        yield fleet


@pytest.fixture
def over_rabbitmq(fleets, databases):
    """RabbitMQ for messages and for answers; functions may be pickled."""
    if "rabbitmq" not in fleets:
        fleets["rabbitmq"] = Fleet(databases.url_of("rabbitmq"), "rpc://", {"PICKLE": True, "MOST_BYTES": 60_000})
    with calling(fleets["rabbitmq"]) as fleet:
        yield fleet


class calling(override_settings):
    """Within: ``executor="celery"`` is this fleet, whose worker runs."""

    def __init__(self, fleet: Fleet, **options: Any) -> None:
        self.fleet = fleet
        fleet.start()
        options = {"APP": "tests.test_celery.APP", "PATIENCE": 20, **fleet.options, **options}
        super().__init__(PARALLEL_ORM={"CELERY": options})

    def __enter__(self) -> Fleet:
        global APP
        super().__enter__()
        self.before, APP = APP, self.fleet.app
        return self.fleet

    def __exit__(self, *exc_info: object) -> None:
        global APP
        APP = self.before
        super().__exit__(*exc_info)


@pytest.fixture(
    params=[
        pytest.param("default", id="sqlite", marks=pytest.mark.sqlite),
        pytest.param("postgres", id="postgres", marks=pytest.mark.postgres),
    ]
)
def alias(request, databases):
    """One that is a file, and one that is a server; another is no other matter for what is in between."""
    with databases.using(request.param) as name:
        yield name


@pytest.fixture(
    params=[
        pytest.param("over_redis", marks=pytest.mark.redis),
        pytest.param("over_rabbitmq", marks=pytest.mark.rabbitmq),
    ]
)
def on(request):
    request.getfixturevalue(request.param)
    return {"executor": "celery"}


# --- The contract ------------------------------------------------------------------------


def test_the_family(articles, on):
    ordered = articles.order_by("-rank")
    ranks = list(range(49, -1, -1))
    results = ordered.parallel_map(functions.rank, chunk_size=7, **on)
    assert results == ranks
    assert len(results.report.workers) >= 1
    assert str(os.getpid()) not in {worker.partition("/")[0] for worker in results.report.workers}
    assert sorted(ordered.parallel_map(functions.rank, ordered=False, chunk_size=7, **on)) == sorted(ranks)
    assert list(ordered.parallel_imap(functions.rank, chunk_size=7, **on)) == ranks
    assert ordered.parallel_map(functions.ranks, batched=True, chunk_size=20, **on) == [
        ranks[:20],
        ranks[20:40],
        ranks[40:],
    ]
    joined = ordered.parallel_reduce(functions.rank_and_comma, add, chunk_size=7, **on)
    assert joined == "".join(f"{n}," for n in ranks)
    report = articles.parallel_each(functions.raise_score, chunk_size=7, **on)
    assert (report.rows, report.succeeded, report.failed) == (50, 50, 0)
    assert sorted(articles.values_list("score", flat=True)) == list(range(1000, 1050))
    assert ordered.values("rank").parallel_map(functions.itself, **on) == [{"rank": n} for n in ranks]
    assert ordered.values_list("rank", flat=True).parallel_map(functions.itself, 2, **on) == ranks


def test_failures(articles, on):
    ordered = articles.order_by("rank")
    sevens = [n for n in range(50) if n % 7 == 3]
    results = ordered.parallel_map(functions.fail_on_sevens, on_error="collect", chunk_size=9, **on)
    failures = [each for each in results if isinstance(each, Failure)]
    assert [each.index for each in failures] == sevens
    assert [each.key for each in failures] == list(ordered.filter(rank__in=sevens).values_list("pk", flat=True))
    assert all(type(each.error) is ValueError for each in failures)
    skipped = ordered.parallel_map(functions.fail_on_sevens, on_error="skip", chunk_size=9, **on)
    assert skipped == [n for n in range(50) if n not in sevens]


def test_writes(alias, on):
    """Of a run with a name each chunk is done once, whoever asks for it again."""
    ships = Ship.objects.using(alias)
    for rows, before in ((30, 0), (0, 30)):
        report = ships.parallel_create(range(30), functions.plain_ship, chunk_size=7, run_id="create", **on)
        assert (report.rows, report.done_before) == (rows, before)
        report = ships.parallel_update(celeryapp.faster, chunk_size=7, run_id="update", keys=True, **on)
        assert (report.rows, report.done_before, len(report.keys)) == (rows, before, rows)
    assert sorted(ships.values_list("name", "speed")) == sorted((f"ship {n}", 2) for n in range(30))
    assert ships.filter(name="ship 3").parallel_delete(run_id="delete", **on).counts["testapp.Ship"] == 1
    assert ships.parallel_create([{"name": "one more"}], **on).succeeded == 1
    assert ships.count() == 30


def test_on_mariadb(mariadb, over_redis):
    ships = Ship.objects.using(mariadb)
    assert ships.parallel_create(range(4), functions.plain_ship, run_id="create", executor="celery").rows == 4
    assert ships.order_by("name").parallel_map(functions.name, executor="celery") == [f"ship {n}" for n in range(4)]


# --- What is sent -------------------------------------------------------------------------


def beside(function, *args, **kwargs):
    """Have a call made by another thread, which leaves no connection."""

    def call():
        try:
            return function(*args, **kwargs)
        finally:
            connections.close_all()

    threads = ThreadPoolExecutor(1)
    future = threads.submit(call)
    threads.shutdown(wait=False)
    return future


def until(condition, what):
    end = monotonic() + WAIT
    while not condition():
        assert monotonic() < end, what
        threading.Event().wait(0.01)


@pytest.fixture
def rows(default):
    Article.objects.using(default).bulk_create(Article(name=f"name {n}", rank=n) for n in range(10))
    return Article.objects.using(default).order_by("rank")


@pytest.fixture
def aside(on, request):
    """A queue of which nobody takes anything, where calls are sent."""
    fleet = request.getfixturevalue(request.node.callspec.params["on"])
    queue = f"{fleet.queue}_aside"
    with calling(fleet, QUEUE=queue, PATIENCE=1):
        yield Queue(fleet, queue)
    with fleet.app.connection_for_write() as connection:
        delete(connection, "queue", queue)


@dataclass
class Queue:
    fleet: Fleet
    name: str

    @contextmanager
    def channel(self):
        with self.fleet.app.connection_for_write() as connection, connection.channel() as channel:
            yield channel

    def __len__(self):
        try:
            with self.channel() as channel:
                return channel.queue_declare(self.name, passive=True).message_count
        except (ChannelError, NotFound):
            return 0

    def consume(self):
        """Have the fleet's worker take from it too."""
        control = self.fleet.app.control
        assert control.add_consumer(self.name, reply=True, destination=self.fleet.hosts(), timeout=WAIT, limit=1)

    def take_and_lose(self):
        """Be somebody who takes a message and goes: its broker delivers it again, and says so."""
        with self.fleet.app.connection_for_write() as connection, connection.channel() as channel:
            message = channel.basic_get(self.name, no_ack=False)
            channel.basic_reject(message.delivery_tag, requeue=True)

    def forget(self):
        control = self.fleet.app.control
        assert control.cancel_consumer(self.name, reply=True, destination=self.fleet.hosts(), timeout=WAIT, limit=1)


def test_messages_are_json_and_tell_no_secrets(default, rows, aside, monkeypatch):
    """And nobody takes them: an error that says so, after a time."""
    monkeypatch.setitem(connections[default].settings_dict, "PASSWORD", "hush-hush")
    with (
        override_settings(SECRET_KEY="not to be told"),
        calling(aside.fleet, QUEUE=aside.name, PATIENCE=1, PICKLE=False),
        pytest.raises(errors.EngineUnavailable, match=f"Nobody has taken anything.*{aside.name}"),
    ):
        rows.parallel_map(functions.rank, 2, executor="celery")
    with aside.channel() as channel:
        message = kombu.Queue(aside.name, channel=channel).get(no_ack=True)
    assert (message.content_type, message.content_encoding) == ("application/json", "utf-8")
    (sealed,), kwargs, _ = json.loads(message.body)
    assert kwargs == {}
    told = json.loads(unsealed_by_nobody(sealed))
    assert told["by_value"] is False
    letter = unsealed_by_nobody(letter_in(json.loads(decompress(b64decode(told["call"])))))
    job = decompress(b64decode(json.loads(letter)["job"])).decode()
    assert json.loads(job)
    assert "tests.functions:rank" in job
    for text in (str(message.headers), sealed, letter, job):
        assert "not to be told" not in text
        assert "hush-hush" not in text


def unsealed_by_nobody(text):
    """What is below a seal can be read by everybody."""
    return text.rpartition(":")[0]


def letter_in(node):
    """The text of the letter in a call that was written down."""
    if isinstance(node, str):
        return node if node.startswith('{"call"') else None
    values = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return next(filter(None, map(letter_in, values)), None)


def test_functions_without_a_name(rows, over_redis):
    factor = 2
    with pytest.raises(errors.NotPicklable, match="top of a module that the workers can import, or set PARALLEL_ORM"):
        rows.parallel_map(lambda row: row.rank * factor, executor="celery")
    with calling(over_redis, PICKLE=True), pytest.raises(errors.InvalidOption, match="this worker takes none"):
        rows.parallel_map(lambda row: row.rank * factor, executor="celery")


def test_functions_without_a_name_as_pickles(rows, over_rabbitmq):
    factor = 2
    assert rows.parallel_map(lambda row: row.rank * factor, executor="celery") == [2 * n for n in range(10)]


def test_a_message_of_a_stranger_is_not_run(on, request, tmp_path):
    fleet = request.getfixturevalue(request.node.callspec.params["on"])
    call = (celeryapp.touch, (str(tmp_path / "done"),), {})
    ours = message_of(*call, by_value=False)
    with override_settings(SECRET_KEY="of a stranger"):
        theirs = message_of(*call, by_value=False)
    middle = ours[40:80]
    for message in (ours[:-1] + chr(ord(ours[-1]) ^ 1), ours.replace(middle, middle.swapcase()), theirs, "nothing", ""):
        with pytest.raises(errors.NotSealed, match="has no seal of this project"):
            fleet.sent(message)
    assert not list(tmp_path.iterdir())
    answered = fleet.sent(ours)
    assert answer_of(answered, ours) == "done"
    assert (tmp_path / "done").exists()
    for answer, message in ((json.dumps({"by_value": False, "answer": "1"}), ours), (answered, theirs)):
        with pytest.raises(errors.NotSealed):
            answer_of(answer, message)


OTHERS = {
    "key": ("SECRET_KEY", errors.NotSealed, "must have the same SECRET_KEY"),
    "settings": ("LANGUAGE_CODE", errors.AnotherWorld, "the setting LANGUAGE_CODE is another"),
    "database": ("_in_sqlite", errors.AnotherWorld, "the database default is another"),
    "code": ("_of_module", errors.AnotherWorld, "the module tests.celeryapp is another"),
    "version": ("__version__", errors.AnotherWorld, r"parallel_orm is \d.*, and 99 for the caller"),
    "migrations": ("_of_migrations", errors.AnotherWorld, "the migrations parallel_orm is another"),
}


@pytest.mark.redis
@pytest.mark.parametrize("other", OTHERS)
def test_a_worker_of_another_world_does_nothing(rows, over_redis, other, tmp_path, monkeypatch):
    """It says by name what differs."""
    what, error, says = OTHERS[other]
    if what.isupper():
        changed = override_settings(**{what: "fr"})
    else:
        changed = nullcontext()
        if what == "__version__":
            monkeypatch.setattr(parallel_orm, what, "99")
        elif what == "_in_sqlite":
            monkeypatch.setitem(proof._PLACES, "sqlite", lambda connection: ["elsewhere"])
        else:
            monkeypatch.setitem(proof._ways, what.removeprefix("_of_"), lambda of: "as it was")
    with changed, pytest.raises(error, match=says) as caught:
        rows.parallel_map(partial(celeryapp.mark, folder=str(tmp_path)), executor="celery")
    assert "elsewhere" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("verb", ["parallel_map", "parallel_each"])
def test_a_mistake_of_the_thread_that_sends_and_hears(rows, over_redis, monkeypatch, verb):
    """Nobody waits for ever for what it would have brought."""
    monkeypatch.setattr(CeleryExecutor, "_revoke", lambda self, calls, connection: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        getattr(rows, verb)(functions.rank, executor="celery", chunk_size=1)


def test_a_function_that_is_not_there(rows, over_redis, monkeypatch):
    module = ModuleType("only_here")
    monkeypatch.setitem(sys.modules, "only_here", module)
    exec("def rank(row): return row.rank", module.__dict__)
    with pytest.raises(errors.AnotherWorld, match="the module only_here is not there"):
        rows.parallel_map(module.rank, executor="celery")


# --- Twice --------------------------------------------------------------------------------


def test_the_same_message_twice(default, over_redis, tmp_path):
    """Of a run each chunk is written once, however often it is delivered."""
    messages = []

    def keep(body, **_):
        messages.append(body[0][0])

    make = partial(celeryapp.ship_with_mark, folder=str(tmp_path))
    ships = Ship.objects.using(default)
    after_task_publish.connect(keep)
    try:
        ships.parallel_create(range(9), make, chunk_size=3, run_id="twice", executor="celery")
    finally:
        after_task_publish.disconnect(keep)
    assert len(messages) == 3
    for each in tmp_path.iterdir():
        each.unlink()
    for message in messages:
        outcome = answer_of(over_redis.sent(message), message)
        assert (outcome.error, outcome.rows, outcome.done_before) == (None, 0, 3)
    assert ships.count() == 9
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("run_id", [None, "a run"])
def test_a_message_that_is_delivered_again(default, aside, run_id):
    """Its first worker may have begun it: nobody can tell but the records of a run."""
    ships = Ship.objects.using(default)
    with calling(aside.fleet, QUEUE=aside.name):
        called = beside(
            ships.parallel_create, range(4), functions.plain_ship, 2, run_id=run_id, executor="celery", chunk_size=4
        )
        until(lambda: len(aside), "nothing was sent")
        aside.take_and_lose()
        aside.consume()
        try:
            if run_id is None:
                with pytest.raises(errors.WorkerDied, match=r"chunk 0 \(.*\) of testapp.Ship") as caught:
                    called.result(WAIT)
                assert any("not known" in line for line in caught.value.__notes__)
            else:
                assert called.result(WAIT).rows == 4
        finally:
            aside.forget()
    assert ships.count() == (0 if run_id is None else 4)


# --- What breaks --------------------------------------------------------------------------


def test_a_killed_process(rows, on, tmp_path):
    """Its chunk is sent again."""
    function = partial(celeryapp.die_at_first, folder=str(tmp_path))
    results = rows.parallel_map(function, chunk_size=5, retries=1, **on)
    assert results == list(range(10))
    assert results.report.retries == 1


def test_a_killed_process_is_named(rows, over_redis):
    """With its chunk, whose rows failed, and no others."""
    results = rows.parallel_map(functions.die_on_three, chunk_size=5, on_error="collect", executor="celery")
    assert [isinstance(each, Failure) for each in results] == [True] * 5 + [False] * 5
    assert isinstance(results[0].error, errors.WorkerDied)
    assert results[0].error.chunk.index == 0


def test_a_killed_worker(rows, on, request, tmp_path):
    """Nobody is there to tell: it is missed after a time."""
    fleet = request.getfixturevalue(request.node.callspec.params["on"])
    with calling(fleet, PATIENCE=1):
        called = beside(rows.parallel_map, partial(celeryapp.wait_at_gate, folder=str(tmp_path)), 2, **on)
        until(lambda: list(tmp_path.iterdir()), "nothing was begun")
        fleet.kill()
        with pytest.raises(errors.WorkerDied, match="chunk 0 ") as caught:
            called.result(WAIT)
    assert any("no worker says that it has it" in line for line in caught.value.__notes__)


@pytest.mark.parametrize("ends", ["patience", "Ctrl-C"])
def test_what_was_given_up_is_not_written_later(default, aside, ends):
    """By a worker that was not there to be told. What answers by messages cannot be looked at, and says so."""

    def interrupt():
        until(lambda: len(aside), "nothing was sent")
        os.kill(os.getpid(), signal.SIGINT)

    ships = Ship.objects.using(default)
    is_kept = aside.fleet.backend != "rpc://"
    with calling(aside.fleet, QUEUE=aside.name, PATIENCE=0.2 if ends == "patience" else WAIT):
        interrupting = None if ends == "patience" else beside(interrupt)
        with pytest.raises((KeyboardInterrupt, errors.EngineUnavailable)) as caught:
            ships.parallel_create(range(4), functions.plain_ship, 2, executor="celery", chunk_size=1)
        if interrupting:
            interrupting.result(WAIT)
        else:
            assert ("purge the queue" in str(caught.value)) is not is_kept
    assert len(aside)
    aside.consume()
    try:
        until(lambda: not len(aside) and not aside.fleet.at_work(), "something waits still")
    finally:
        aside.forget()
    assert not is_kept or not ships.exists()


def test_a_lost_message(rows, aside):
    called = beside(rows.parallel_map, functions.rank, 2, executor="celery")
    until(lambda: len(aside), "nothing was sent")
    with aside.channel() as channel:
        channel.queue_purge(aside.name)
    with pytest.raises(errors.WorkerDied, match="chunk 0 ") as caught:
        called.result(WAIT)
    assert any("Its message was lost" in line for line in caught.value.__notes__)


def test_what_takes_long_is_not_lost(rows, on, request, tmp_path):
    """Nor what waits behind it."""
    fleet = request.getfixturevalue(request.node.callspec.params["on"])
    with calling(fleet, PATIENCE=0.1):
        called = beside(rows.parallel_map, partial(celeryapp.wait_at_gate, folder=str(tmp_path)), 2, chunk_size=1, **on)
        until(lambda: len(list(tmp_path.iterdir())) == 2, "two were not begun")
        with pytest.raises(TimeoutError):
            called.result(2.5)  # in which it is looked for
        (tmp_path / "open").touch()
        assert called.result(WAIT) == list(range(10))


def test_a_worker_that_does_not_answer_is_asked_again(rows, over_redis, tmp_path, monkeypatch):
    """It may be too busy: a function of C, in a thread of its, lets nothing else run."""
    silent, heard = [], []

    def ask(app, command, *args, **kwargs):
        if command == "active_queues" and len(silent) < engine.MISSES - 1:
            silent.append(command)
            return {}
        answers = answered(app, command, *args, **kwargs)
        if command == "reserved":
            heard.append(answers)
        return answers

    answered = engine._ask
    monkeypatch.setattr(engine, "_ask", ask)
    with calling(over_redis, PATIENCE=0.1):
        called = beside(
            rows.parallel_map, partial(celeryapp.wait_at_gate, folder=str(tmp_path)), 2, executor="celery", chunk_size=5
        )
        until(lambda: len(heard) > 1 or called.done(), "nobody was asked again")
        (tmp_path / "open").touch()
        assert called.result(WAIT) == list(range(10))
    assert len(silent) == engine.MISSES - 1


def test_a_worker_that_cannot_be_understood(rows, over_redis, tmp_path, monkeypatch):
    """Of another project on the same broker, by another serializer: nothing is known then, and no more."""
    asked = []

    def ask(app, command, *args, **kwargs):
        asked.append(command)
        raise ContentDisallowed("Refusing to deserialize")

    monkeypatch.setattr(engine, "_ask", ask)
    monkeypatch.setattr(engine, "_numbers", {})
    with calling(over_redis, PATIENCE=0.1, TIMEOUT=0.1):
        called = beside(
            rows.parallel_map, partial(celeryapp.wait_at_gate, folder=str(tmp_path)), executor="celery", chunk_size=5
        )
        until(lambda: asked.count("active_queues") > 2 + engine.MISSES or called.done(), "nobody was asked")
        (tmp_path / "open").touch()
        assert called.result(WAIT) == list(range(10))
    app = make_app("memory://", None, "nobody", task_serializer="pickle", accept_content=["json", "pickle"])
    assert "pickle" in engine._control_of(app).mailbox.accept


@pytest.mark.parametrize(
    ("broker", "backend"),
    [
        ("redis://:hush@127.0.0.1:1/0", "redis://:hush@127.0.0.1:1/0"),
        ("amqp://guest:hush@127.0.0.1:1//", "rpc://"),
        ("memory://", "redis://:hush@127.0.0.1:1/0"),
    ],
)
def test_servers_that_are_not_there(rows, broker, backend):
    with calling(Elsewhere(make_app(broker, backend, "nobody"))):
        with pytest.raises(errors.EngineUnavailable, match="does not answer at") as caught:
            rows.parallel_map(functions.rank, executor="celery")
    texts = [str(caught.value), str(caught.value.__cause__), *getattr(caught.value, "__notes__", ())]
    assert not any("hush" in text for text in texts)


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_a_server_that_says_nothing(rows, scheme):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        app = make_app(f"{scheme}://u:hush@127.0.0.1:{silent.getsockname()[1]}/", "disabled://", "nobody")
        with calling(Elsewhere(app), TIMEOUT=0.5):
            with pytest.raises(errors.EngineUnavailable, match="does not answer at") as caught:
                rows.parallel_each(functions.rank, executor="celery")
        assert "hush" not in str(caught.value)
    until(lambda: not couriers(), "the courier waits still")


def couriers():
    return [each for each in threading.enumerate() if each.name == "parallel_orm-courier"]


@pytest.mark.redis
def test_a_result_backend_that_goes(rows, over_redis, tmp_path):
    own = OwnServer("redis")
    at = own.start()
    try:
        policy = {"retry_policy": {"max_retries": 1, "interval_start": 0.1}}
        url = f"redis://127.0.0.1:{at['PORT']}/0"
        app = make_app(over_redis.broker, url, over_redis.queue, result_backend_transport_options=policy)
        with calling(Elsewhere(app)):
            called = beside(
                rows.parallel_map, partial(celeryapp.wait_at_gate, folder=str(tmp_path)), 2, executor="celery"
            )
            until(lambda: list(tmp_path.iterdir()), "nothing was begun")
            own.pause()
            with pytest.raises(errors.EngineUnavailable, match=f"result backend does not answer at {url}"):
                called.result(WAIT)
    finally:
        (tmp_path / "open").touch()
        own.stop()


@pytest.mark.redis
def test_servers_that_are_restarted(rows, tmp_path):
    """Broker and result backend go and come back while a call waits: it has its answers."""
    own = OwnServer("redis")
    at = own.start()
    url = f"redis://127.0.0.1:{at['PORT']}/0"
    fleet = Fleet(url, url)
    try:
        with calling(fleet):
            called = beside(
                rows.parallel_map, partial(celeryapp.wait_at_gate, folder=str(tmp_path)), 2, executor="celery"
            )
            until(lambda: list(tmp_path.iterdir()), "nothing was begun")
            own.restart()
            (tmp_path / "open").touch()
            assert called.result(WAIT) == list(range(10))
            assert rows.parallel_map(functions.rank, executor="celery") == list(range(10))
    finally:
        fleet.end()
        own.stop()


def test_no_result_backend(rows, over_redis, tmp_path):
    """What needs an answer is refused; what does not is sent."""
    app = make_app(over_redis.broker, None, over_redis.queue)
    with calling(Elsewhere(app)):
        for verb in ("parallel_map", "parallel_delete"):
            arguments = [functions.rank] if verb == "parallel_map" else []
            with pytest.raises(errors.InvalidOption, match="no result backend"):
                getattr(rows, verb)(*arguments, executor="celery")
        report = rows.parallel_each(partial(celeryapp.mark, folder=str(tmp_path)), 2, executor="celery", chunk_size=3)
    assert report.counts == {"sent": 4}
    assert report.rows == 0
    assert "4 chunks sent of which nothing is heard" in str(report)
    until(lambda: len(list(tmp_path.iterdir())) == 10, "not all was done")


@pytest.mark.parametrize("on_error", ["raise", "collect"])
def test_failures_of_which_nobody_hears(rows, over_redis, on_error):
    """Are in the log of the worker."""
    already = len(over_redis.log)
    with calling(Elsewhere(make_app(over_redis.broker, None, over_redis.queue))):
        rows.parallel_each(functions.fail_on_three, 2, executor="celery", on_error=on_error)

    def log():
        return "".join(over_redis.log[already:])

    until(lambda: "rank three" in log(), "nothing was logged")
    what = "chunk 0" if on_error == "raise" else "primary key"
    assert re.search(f"ERROR.*{what}.* has failed, and its caller does not hear of it", log())


def test_results_are_in_no_log(rows, over_redis):
    """Celery's workers write the beginning of each answer into theirs."""
    already = len(over_redis.log)
    assert "name 3" in rows.parallel_map(celeryapp.name_of, 2, executor="celery")
    until(lambda: any("succeeded in" in line for line in over_redis.log[already:]), "nothing was logged")
    assert not any("name 3" in line for line in over_redis.log[already:])


@pytest.mark.parametrize("route", ["priority", "routing_key", "queue"])
def test_a_route(rows, over_redis, route):
    """May say where messages go, or only how."""
    name = over_redis.queue
    routes = {
        "priority": {"priority": 5},
        "routing_key": {"exchange": name, "routing_key": name},
        "queue": {"queue": name},
    }
    more = {"task_default_queue": "nobody", "task_queues": [kombu.Queue(name, kombu.Exchange(name), name)]}
    app = make_app(
        over_redis.broker,
        over_redis.backend,
        name,
        task_routes={"parallel_orm.call": routes[route]},
        **({} if route == "priority" else more),
    )
    assert engine._queue_of(app) == name
    with calling(Elsewhere(app)):
        assert rows.parallel_map(functions.rank, executor="celery") == list(range(10))


def test_settings_that_name_nothing(rows, over_redis):
    with calling(over_redis, APP="tests.functions.rank"), pytest.raises(errors.InvalidOption, match="is no Celery app"):
        rows.parallel_map(functions.rank, executor="celery")
    app = make_app(over_redis.broker, over_redis.backend, over_redis.queue, task_create_missing_queues=False)
    with (
        calling(Elsewhere(app), QUEUE="unheard_of"),
        pytest.raises(errors.InvalidOption, match="a QUEUE that the app does not have.*unheard_of"),
    ):
        rows.parallel_map(functions.rank, 2, executor="celery")


def test_too_much(rows, over_rabbitmq):
    with pytest.raises(errors.NotPicklable, match=r"are 1\d\d,\d\d\d characters, and no more than 60,000"):
        rows.parallel_map(celeryapp.much, executor="celery")
    assert len(rows.parallel_map(celeryapp.much, executor="celery", chunk_size=2)) == 10


CALLER = """
import sys
from functools import partial
import django
django.setup()
from tests import celeryapp
from tests.testapp.models import Article
rows = Article.objects.using("default").order_by("rank")
rows.parallel_map(partial(celeryapp.wait_at_gate, folder=sys.argv[1]), 2, chunk_size=1, executor="celery")
"""


def test_the_caller_is_killed(rows, on, request, tmp_path):
    """What it had sent comes to an end, and the worker goes on."""
    fleet = request.getfixturevalue(request.node.callspec.params["on"])
    options = {"CELERY": {**fleet.options, "APP": "tests.celeryapp.app"}}
    caller = subprocess.Popen(
        [sys.executable, "-c", CALLER, str(tmp_path)],
        cwd=ROOT,
        env={**fleet.environment, "PARALLEL_ORM_TEST_OPTIONS": json.dumps(options)},
    )
    try:
        until(lambda: len(list(tmp_path.iterdir())) == 2, "two were not begun")
    finally:
        caller.kill()
        caller.wait(WAIT)
    (tmp_path / "open").touch()
    assert rows.parallel_map(functions.rank, **on) == list(range(10))
    queue = Queue(fleet, fleet.queue)
    until(lambda: not len(queue) and not fleet.at_work(), "something runs still")


def test_a_stream_that_is_left(rows, on, request, tmp_path):
    """What no worker has taken is not begun any more; of what they have, each process has one at hand."""
    fleet = request.getfixturevalue(request.node.callspec.params["on"])
    stream = rows.parallel_imap(partial(celeryapp.first_passes, folder=str(tmp_path)), 2, chunk_size=1, **on)
    with stream:
        assert next(stream) == 0
        until(lambda: len(list(tmp_path.iterdir())) == 3, "two more were not begun")
    until(fleet.has_revoked, "no worker has heard of it")
    (tmp_path / "open").touch()
    queue = Queue(fleet, fleet.queue)
    until(lambda: not len(queue) and not fleet.at_work(), "something runs still")
    names = {each.name for each in tmp_path.iterdir()}
    assert {"begun 0", "begun 1", "begun 2", "open"} <= names <= {*(f"begun {n}" for n in range(5)), "open"}


def test_ctrl_c(rows, over_redis, tmp_path):
    """The caller is free at once; writes that may have been made are said to be unknown."""

    def interrupt():
        until(lambda: list(tmp_path.iterdir()), "nothing was begun")
        os.kill(os.getpid(), signal.SIGINT)

    interrupting = beside(interrupt)
    with pytest.raises(KeyboardInterrupt):
        rows.parallel_each(partial(celeryapp.wait_at_gate, folder=str(tmp_path)), 2, chunk_size=1, executor="celery")
    interrupting.result(WAIT)
    assert not couriers()
    (tmp_path / "open").touch()
    until(lambda: not over_redis.at_work(), "something runs still")
    assert len(list(tmp_path.iterdir())) < 11


# --- And besides --------------------------------------------------------------------------


def test_what_it_cannot_do(rows, over_redis):
    with pytest.raises(errors.InvalidOption, match="cannot be ended from outside"):
        rows.parallel_map(functions.rank, executor="celery", timeout=3)
    with pytest.raises(errors.InvalidOption, match="no way to reach each of its processes"):
        rows.parallel_map(functions.rank, executor="celery", end_hook=functions.what_was_seen)
    with pytest.raises(errors.InvalidOption, match="has workers of its own"):
        rows.parallel_map(functions.rank, executor="celery", threads=3)


def test_a_queue_of_its_own(rows, aside):
    aside.consume()
    try:
        assert rows.parallel_map(functions.rank, executor="celery", chunk_size=2) == list(range(10))
        named = {"aside": {"BACKEND": "celery", "OPTIONS": {"queue": aside.name, "app": "tests.test_celery.APP"}}}
        with override_settings(PARALLEL_ORM={"EXECUTORS": named}):
            assert rows.parallel_map(functions.rank, executor="aside") == list(range(10))
    finally:
        aside.forget()


def test_within_a_task(rows, on, request):
    """Celery listens less there."""
    fleet = request.getfixturevalue(request.node.callspec.params["on"])
    message = message_of(celeryapp.map_within, ("default",), {}, by_value=False)
    assert answer_of(fleet.sent(message), message) == list(range(10))


@pytest.mark.redis
def test_a_backend_that_must_be_asked(rows, databases, tmp_path):
    """Most of them: this one has its answers in files."""
    folder = tmp_path / "answers"
    folder.mkdir()
    fleet = Fleet(databases.url_of("redis"), f"file://{folder}")
    try:
        with calling(fleet):
            assert rows.parallel_map(functions.rank, chunk_size=2, executor="celery") == list(range(10))
            with pytest.raises(ValueError, match="rank three"):
                rows.parallel_map(functions.fail_on_three, executor="celery")
        assert not list(folder.iterdir())
    finally:
        fleet.end()


def test_a_time_limit_of_the_project(over_redis):
    """Its chunk took too long, and may be sent again as one of ours."""
    message = message_of(celeryapp.hang, (), {}, by_value=False)
    with pytest.raises(TimeLimitExceeded) as caught:
        over_redis.sent(message, time_limit=1)
    assert isinstance(error_of(caught.value), errors.ChunkTimedOut)


def test_a_worker_without_our_app(over_redis):
    """It knows no task of ours, which Celery tells the caller."""
    with pytest.raises(NotRegistered) as caught:
        over_redis.app.send_task("parallel_orm.unknown", [], ignore_result=False).get(timeout=WAIT)
    assert "They need parallel_orm" in str(error_of(caught.value))
    assert isinstance(error_of(caught.value), errors.EngineUnavailable)


def test_eager(rows):
    """Here and now, as a project's tests have it."""
    for propagates in (False, True):
        app = make_app("memory://", None, "nobody", task_always_eager=True, task_eager_propagates=propagates)
        with calling(Elsewhere(app)):
            assert set(rows.parallel_map(celeryapp.pid_of, executor="celery", chunk_size=3)) == {os.getpid()}
            with pytest.raises(ValueError, match="rank three"):
                rows.parallel_map(functions.fail_on_three, executor="celery")
            with override_settings(SECRET_KEY="x"), pytest.raises(errors.NotSealed):
                app.tasks["parallel_orm.call"].apply(["nothing"], throw=True).get()


def test_several_callers(rows, on):
    """Each thread has a courier of its own."""
    together = threading.Barrier(3)

    def call(factor):
        together.wait(WAIT)
        return [rows.parallel_map(functions.rank, chunk_size=3, **on) for _ in range(2)]

    assert [each.result(WAIT) for each in [beside(call, n) for n in range(3)]] == [[list(range(10))] * 2] * 3


def test_nothing_is_left_open(rows, on):
    def sockets():
        return len(psutil.Process().net_connections("tcp"))

    rows.parallel_map(functions.rank, **on)
    before = sockets()
    for _ in range(3):
        rows.parallel_map(functions.rank, chunk_size=2, **on)
    assert not couriers()
    until(lambda: sockets() <= before, f"{sockets()} sockets, {before} before")


class InATestCase(TestCase):
    def test_it_stays_here(self):
        """On the test's own connection; what could not travel is refused all the same."""
        Article.objects.bulk_create(Article(name=f"name {n}", rank=n) for n in range(5))
        with calling(Elsewhere(make_app("redis://127.0.0.1:1/0", None, "nobody"))):
            results = Article.objects.order_by("rank").parallel_map(functions.rank, executor="celery")
            assert (results, results.report.reason) == (list(range(5)), "testcase")
            with pytest.raises(errors.NotPicklable, match="top of a module"):
                Article.objects.parallel_map(lambda row: row.rank, executor="celery")
