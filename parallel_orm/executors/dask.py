"""Dask: calls as tasks of a cluster, through its own client.

A :class:`DaskExecutor` is a :class:`concurrent.futures.Executor` over a ``distributed.Client``: one that the caller
has, or one of ours, which stays connected from call to call and ends with the process.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError, Executor, Future
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import spawn
from typing import Any
from uuid import uuid4
from weakref import WeakSet

from django.conf import settings

from parallel_orm import errors
from parallel_orm.executors.processes import without_main
from parallel_orm.letters import set_up

try:
    from distributed import Client, Event, KilledWorker, LocalCluster, WorkerPlugin, get_worker
    from distributed.cfexecutor import ClientExecutor
except ImportError as error:
    raise errors.missing_engine("dask", error) from error

#: Seconds for a scheduler to answer.
TIMEOUT = 10.0


class DjangoWorker(WorkerPlugin):  # type: ignore[misc]
    """Has each worker of a cluster, those that join later too, set Django up before its first task."""

    name = "parallel_orm"

    def __init__(self, module: str | None) -> None:
        self.module = module

    async def setup(self, worker: Any) -> None:
        if self.module is not None:
            os.environ.setdefault("DJANGO_SETTINGS_MODULE", self.module)
        await asyncio.to_thread(set_up)  # an AppConfig.ready() may ask its database, which no event loop may


class DaskExecutor(Executor):
    """Sends calls to the workers of a cluster; functions and results are pickled, as Dask does.

    A call that was cancelled is not begun; one that was begun goes on to its end, and nobody hears of it.
    """

    #: Whether a call that takes too long can be ended. Dask's workers are not ours to kill.
    supports_timeout = False
    #: Whether each worker can be told that a call of ours has ended.
    supports_end_hook = False
    #: Whether functions may be lambdas, closures, and those of a script.
    supports_by_value = True

    #: Whether anybody tells what became of a call.
    supports_answers = True

    def __init__(self, client: Client, *, waits: bool = False) -> None:
        self.client, self._waits = client, waits

    @property
    def number(self) -> int:
        """How many calls the cluster works on at once, as it is now."""
        return sum(self.client.nthreads().values()) or 1

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Send a call on its way.

        The future raises :class:`~parallel_orm.errors.WorkerDied` where the workers that had the call ended, each of as
        many as the scheduler allows; :class:`~parallel_orm.errors.EngineUnavailable` where the scheduler went.
        """
        key = f"parallel_orm-{uuid4().hex}"
        there = self.client.submit(partial(fn, **kwargs), *args, key=key, pure=False)
        here: Future[Any] = Future()
        if self._waits:
            here.set_running_or_notify_cancel()
        here.add_done_callback(lambda here: here.cancelled() and there.cancel())
        there.add_done_callback(partial(self._land, here))
        return here

    def _land(self, here: Future[Any], there: Any) -> None:
        """Have what became of a task be what becomes of the call."""
        if self._waits:
            with suppress(Exception):
                Event(there.key, client=self.client).clear()
        if not (here.running() or here.set_running_or_notify_cancel()):
            return
        try:
            here.set_result(there.result())
        except KilledWorker:
            here.set_exception(errors.WorkerDied(None, None))
        except CancelledError:
            here.set_exception(errors.engine_lost("Dask's scheduler"))
        except Exception as error:
            here.set_exception(error)

    def once(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does what ``fn`` does, once: Dask has what a lost worker was at, or had done, done
        again by another one.
        """
        return partial(_once, fn)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leave the cluster as it is: it is not of this call."""


def _once(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    begun = Event(get_worker().get_current_task())
    if begun.is_set():
        raise errors.WorkerDied(None, None)
    begun.set()
    return fn(*args, **kwargs)


def travels_by_value(arguments: Mapping[str, Any]) -> bool:
    """Tell whether messages are pickles."""
    return True


@contextmanager
def executor(
    number: int | None = None,
    *,
    client: Any = None,
    address: str | None = None,
    timeout: float = TIMEOUT,
    waits: bool = False,
) -> Iterator[DaskExecutor]:
    """Have an executor: over a client that was given, the cluster at an address, or one of so many processes here.

    ``waits``: what was sent is waited for, whatever happens.

    :raises EngineUnavailable: no scheduler answers within ``timeout`` seconds, or its workers cannot be made ready.
    """
    if isinstance(client, ClientExecutor):
        client = client._client
    if client is None:
        client = _kept(address, number, timeout)
    if client.asynchronous:
        raise errors.bad_executor(client, "is asynchronous: give one that is not, or the address of its scheduler.")
    if client not in _made_ready:
        module = getattr(settings, "SETTINGS_MODULE", None)
        try:
            client.register_plugin(DjangoWorker(module))
        except Exception as error:
            raise errors.engine_not_ready("Dask", error) from error
        _made_ready.add(client)
    yield DaskExecutor(client, waits=waits)


def is_of_dask(value: object) -> bool:
    """Tell whether this is a client, or an executor of a client's."""
    return isinstance(value, Client | ClientExecutor)


# Clients of ours, by address, or by the number of processes of a cluster here; and those whose workers have Django.
_lock = threading.Lock()
_clients: dict[object, Client] = {}
_made_ready: WeakSet[Client] = WeakSet()


def _kept(address: str | None, number: int | None, timeout: float) -> Client:
    with _lock:
        client = _clients.get(address or number)
        if client is None or client.status != "running":
            client = _clients[address or number] = _connected(address, number, timeout)
        return client


def _connected(address: str | None, number: int | None, timeout: float) -> Client:
    if address is not None:
        try:
            return Client(address, timeout=timeout, set_as_default=False)
        except (OSError, TimeoutError, ValueError) as error:
            raise errors.engine_unreachable("Dask's scheduler", address, error) from error
    # Functions of a script travel by value, so its workers have no use for it; and one without the guard
    # `if __name__ == "__main__"` would start its whole work anew in each of them, also in those that are started later.
    spawn.get_preparation_data = without_main
    try:
        cluster = LocalCluster(n_workers=number, threads_per_worker=1, dashboard_address=None, host="127.0.0.1")
        return Client(cluster, timeout=timeout, set_as_default=False)
    except (OSError, TimeoutError, RuntimeError) as error:
        raise errors.engine_unreachable("Dask", "a cluster of this process's own", error) from error


def end_clients() -> None:
    """Disconnect, and end the clusters of ours."""
    with _lock:
        clients = list(_clients.values())
        _clients.clear()
    for client in clients:
        with suppress(Exception):
            cluster = client.cluster
            client.close()
            if cluster is not None:
                cluster.close()


def _forget() -> None:
    """In a forked child: the connections are the parent's."""
    global _lock
    _lock = threading.Lock()
    _clients.clear()
    _made_ready.clear()


atexit.register(end_clients)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
