"""One table of faults, each on every database: it ends as an error that is named, with its chunk, or it is tried again.

Never a hang, never a short result; and afterwards no process, no connection and no file is left.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any

import psutil
import pytest
from django.db import Error, InterfaceError, OperationalError, connections

from parallel_orm import Failure, errors, faults, report_of
from parallel_orm.executors import processes
from parallel_orm.executors.processes import end_pools
from tests import functions
from tests.test_connections_restart import ALIAS, bring_back, put_down, server, sockets_to
from tests.testapp.models import Article

__all__ = ["server"]  # a fixture

pytestmark = pytest.mark.pairs("row")
WAIT = 60


@pytest.fixture(scope="module", autouse=True)
def _pools_end():
    yield
    end_pools()


@pytest.fixture
def articles(alias):
    Article.objects.using(alias).bulk_create(Article(name=f"name {n}", rank=n) for n in range(30))
    return Article.objects.using(alias).order_by("rank")


@pytest.fixture(autouse=True)
def _nothing_is_left():
    """Files and processes are those of before; but for workers, of which each pool has no more than it may."""
    files, before = psutil.Process().num_fds(), len(processes._pools)
    yield
    until, left = monotonic() + WAIT, ["?"]
    while left and monotonic() < until:
        zombies = [each for each in psutil.Process().children(recursive=True) if is_zombie(each)]
        pools = list(processes._pools.values())
        left = [f"zombie {each}" for each in zombies]
        left += [f"{len(pool.pids())} workers of {pool.size}" for pool in pools if len(pool.pids()) > pool.size]
        if len(pools) == before and psutil.Process().num_fds() > files + 12:  # a new worker has two, and its sentinel
            left.append(f"{psutil.Process().num_fds()} files, of {files} before")
    assert not left


def is_zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:  # it has just ended, and was waited for
        return False


@dataclass(frozen=True)
class Row:
    """One fault."""

    name: str
    #: Called with each row.
    function: Callable[[Any], Any]
    #: What it is called with besides: in the worker, before a chunk is read.
    fault: Callable[[Any], None] | None = None
    error: type[BaseException] = errors.WorkerDied
    #: What its message says.
    says: str | None = None
    #: Whether all rows of the chunk are lost, or the row alone.
    loses_chunk: bool = True
    #: Whether it comes through when it is sent again.
    passes: bool = False


def segfault_on_three(row: Any) -> None:
    if row.rank == 3:
        ctypes.string_at(0)


def out_of_memory_on_three(row: Any) -> int:
    if row.rank == 3:
        raise MemoryError
    return int(row.rank)


def unpicklable_three(row: Any) -> Any:
    return threading.Lock() if row.rank == 3 else row.rank


class CannotBeOpened(Exception):
    """Is packed, but its opening fails; so it travels in its parts."""

    def __reduce__(self) -> Any:
        return explode, ("an exception",)


class NeverOpened:
    def __reduce__(self) -> Any:
        return explode, ("a value",)


def explode(what: str) -> None:
    raise RuntimeError(f"{what} cannot be opened")


def raise_what_cannot_be_opened(row: Any) -> int:
    if row.rank == 3:
        raise CannotBeOpened("strange")
    return int(row.rank)


def raise_what_cannot_be_packed(row: Any) -> int:
    if row.rank == 3:
        raise functions.Strange("this", "that")
    return int(row.rank)


def end_of_backend(chunk: Any) -> None:
    """The server ends the session that is about to read a chunk; once."""
    if chunk.index != 1 or chunk.attempt:
        return
    connection = connections[chunk.alias]
    ends = {"postgresql": "SELECT pg_terminate_backend(pg_backend_pid())", "mysql": "KILL CONNECTION_ID()"}
    with connection.cursor() as cursor:
        try:
            cursor.execute(ends[connection.vendor])
        except (OperationalError, InterfaceError):
            pass


def once_killed(chunk: Any) -> None:
    """The kernel's out-of-memory killer, say."""
    if chunk.index == 1 and not chunk.attempt:
        os.kill(os.getpid(), signal.SIGKILL)


TABLE = [
    Row("kill -9", functions.die_on_three, says="killed by SIGKILL"),
    Row("os._exit", functions.leave_on_three, says="exit code 7"),
    Row("segfault", segfault_on_three, says="killed by SIGSEGV"),
    Row("kill -9 before reading", functions.rank, once_killed, says="killed by SIGKILL", passes=True),
    Row("no memory", out_of_memory_on_three, error=MemoryError, loses_chunk=False),
    Row("a result that cannot be packed", unpicklable_three, error=errors.NotPicklable),
    Row("an exception that cannot be packed", raise_what_cannot_be_packed, error=errors.RemoteError, loses_chunk=False),
    Row("an exception that cannot be opened", raise_what_cannot_be_opened, error=CannotBeOpened, loses_chunk=False),
    Row("too slow", functions.hang_on_three, error=errors.ChunkTimedOut, says="took longer"),
    Row("the database's session ends", functions.rank, end_of_backend, error=Error, passes=True),
]


EVERYWHERE = {"kill -9", "the database's session ends"}


@pytest.fixture(
    params=[pytest.param(row, id=row.name, marks=[pytest.mark.everywhere] * (row.name in EVERYWHERE)) for row in TABLE]
)
def row(request, alias, monkeypatch):
    if request.param.fault is end_of_backend and connections[alias].vendor == "sqlite":
        pytest.skip("SQLite has no server")
    if request.param.fault:
        monkeypatch.setattr(faults, "active", [request.param.fault])
    return request.param


def knobs(row: Row) -> dict[str, Any]:
    return {"processes": 2, "chunk_size": 10} | ({"timeout": 0.5} if row.error is errors.ChunkTimedOut else {})


def test_it_ends_as_an_error_that_is_named(articles, row):
    with pytest.raises(row.error, match=row.says) as caught:
        articles.parallel_map(row.function, **knobs(row))
    report = report_of(caught.value)
    assert report is not None
    (failure,) = report.errors
    index = 1 if row.fault else 0
    assert failure.chunk.index == index
    if not isinstance(caught.value, errors.WorkerDied | errors.ChunkTimedOut):
        assert any(f"chunk {index} " in line for line in caught.value.__notes__)
    else:
        assert caught.value.chunk == failure.chunk
    assert failure.key == (None if row.loses_chunk else articles.get(rank=3).pk)
    assert articles.parallel_map(functions.rank, 2) == list(range(30)) if row.fault is None else True


def test_the_others_go_on(articles, row):
    results = articles.parallel_map(row.function, on_error="collect", **knobs(row))
    assert len(results) == 30
    lost = {
        "a result that cannot be packed": [3],
        "kill -9 before reading": range(10, 20),
        "the database's session ends": range(10, 20),
    }.get(row.name, range(10) if row.loses_chunk else [3])
    failures = [each for each in results if isinstance(each, Failure)]
    assert [each.index for each in failures] == list(lost)
    assert [each.key for each in failures] == [articles.get(rank=n).pk for n in lost]
    assert all(isinstance(each.error, row.error) for each in failures)
    if row.function is not segfault_on_three:
        assert [each for each in results if not isinstance(each, Failure)] == [n for n in range(30) if n not in lost]
    assert results.report.failed == len(failures)


def test_it_is_sent_again(articles, row):
    """What passes has passed then; all else ends as it would have."""
    if row.passes:
        results = articles.parallel_map(row.function, retries=1, **knobs(row))
        assert results == list(range(30))
        assert results.report.retries == 1
        assert results.report.failed == 0
        assert list(articles.parallel_imap(row.function, retries=1, **knobs(row))) == list(range(30))
        assert articles.parallel_each(row.function, retries=1, **knobs(row)).succeeded == 30
        return
    with pytest.raises(row.error, match=row.says):
        articles.parallel_map(row.function, retries=1, **knobs(row))


def test_a_result_that_cannot_be_opened(articles):
    """It is packed and sent, and only here it turns out."""
    with pytest.raises(RuntimeError, match="a value cannot be opened") as caught:
        articles.parallel_map(lambda row: NeverOpened(), 2, chunk_size=10)
    assert any("a result of chunk " in line for line in caught.value.__notes__)


def test_a_function_that_cannot_be_opened(articles):
    def function(row: Any, never: Any = NeverOpened()) -> None:  # noqa: B008
        pass

    for knobs in ({}, {"on_error": "collect"}, {"retries": 1}):
        with pytest.raises(RuntimeError, match="a value cannot be opened") as caught:
            articles.parallel_map(function, 2, **knobs)
        assert any("was not begun" in line for line in caught.value.__notes__)


# --- The server ------------------------------------------------------------------------


@pytest.fixture
def served(server):
    """Three articles on a server of this module's own, which the test may stop."""
    articles = Article.objects.using(ALIAS)
    articles.bulk_create(Article(name=f"more {n}", rank=n) for n in range(30))
    yield articles.exclude(name="one").order_by("rank")
    bring_back(server)
    connections[ALIAS].close()
    articles.exclude(name="one")._raw_delete(ALIAS)
    connections[ALIAS].close()
    end_pools()


@pytest.mark.parametrize("on", [{"processes": 2}, {"threads": 2}], ids=["processes", "threads"])
def test_the_server_goes_away(server, served, on):
    """In the middle of a call: an error, by name, at once; and nobody holds on to it."""
    with served.parallel_imap(functions.rank, chunk_size=1, **on) as stream:
        assert next(stream) == 0
        put_down(server)
        with pytest.raises((OperationalError, InterfaceError)):
            list(stream)
    connections[ALIAS].close()
    until = monotonic() + WAIT
    while sockets_to(server) and monotonic() < until:
        connections[ALIAS].close()
    assert not sockets_to(server)
    bring_back(server)
    assert served.parallel_map(functions.rank, chunk_size=10, **on) == list(range(30))


@pytest.mark.parametrize("on", [{"processes": 2}, {"threads": 2}], ids=["processes", "threads"])
def test_the_server_comes_back(server, served, on, monkeypatch):
    """Chunks that could not be read are sent again until they can."""
    monkeypatch.setattr("parallel_orm.retries.BACKOFF", 0.25)
    keys = list(served.values_list("pk", flat=True))
    # A slice has all of its keys listed before: the caller itself asks nothing while the server is away.
    sliced = served[:30]
    with sliced.parallel_imap(functions.rank, chunk_size=1, retries=10, **on) as stream:
        assert next(stream) == 0
        put_down(server)
        back = threading.Thread(target=bring_back, args=[server])
        back.start()
        assert list(stream) == list(range(1, 30))
        back.join(WAIT)
    assert len(keys) == 30
