"""``executor="celery"``: the contract over real workers, and what happens when one of all that is in between breaks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from operator import add
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from django.test import override_settings

from tests import functions
from tests.celeryapp import make_app
from tests.test_executors import (
    articles,
    test_errors_name_the_row,
    test_hooks_that_fail,
    test_several_querysets,
    test_state_is_for_one_call,
)

__all__ = [
    "articles",
    "test_errors_name_the_row",
    "test_hooks_that_fail",
    "test_several_querysets",
    "test_state_is_for_one_call",
]

pytestmark = pytest.mark.pairs
WAIT = 60
ROOT = Path(__file__).parent.parent
#: The app that calls use, by its dotted path.
APP: Any = None


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

    def kill(self) -> None:
        """End the worker as a power cut would, all of its processes."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(WAIT)
            self.process = None

    def end(self) -> None:
        self.kill()
        with suppress(Exception), self.app.connection_for_write() as connection, connection.channel() as channel:
            channel.queue_delete(self.queue)
        self.app.close()


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
    url = databases.url_of("redis")
    with calling(fleets.get("redis") or fleets.setdefault("redis", Fleet(url, url))) as fleet:
        yield fleet


@pytest.fixture
def over_rabbitmq(fleets, databases):
    """RabbitMQ for messages and for answers; functions may be pickled."""
    url = databases.url_of("rabbitmq")
    with calling(fleets.get("rabbitmq") or fleets.setdefault("rabbitmq", Fleet(url, "rpc://", {"PICKLE": True}))) as it:
        yield it


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
