"""Dask: calls as tasks of a cluster, through its own client.

A :class:`DaskExecutor` is a :class:`concurrent.futures.Executor` over a ``distributed.Client``: one that the caller
has, or one of ours, which stays connected from call to call and ends with the process.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Executor, Future, InvalidStateError
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import spawn
from time import monotonic
from typing import Any
from uuid import uuid4
from weakref import WeakKeyDictionary

from django.apps import apps
from django.conf import ENVIRONMENT_VARIABLE as SETTINGS
from django.conf import settings
from django.utils.functional import empty

from parallel_orm import errors
from parallel_orm.capsule import World
from parallel_orm.executors.processes import without_main
from parallel_orm.letters import set_up
from parallel_orm.proof import remember_modules

try:
    from dask.system import CPU_COUNT
    from distributed import Client, Event, KilledWorker, LocalCluster, WorkerPlugin, get_worker, rejoin, secede
    from distributed.cfexecutor import ClientExecutor
    from distributed.comm import resolve_address
    from distributed.worker import thread_state
except ImportError as error:
    raise errors.missing_engine("dask", error) from error

#: Seconds for a scheduler to answer.
TIMEOUT = 10.0
#: Seconds for which a cluster may have no worker at all, while there is work.
PATIENCE = 60.0
#: Seconds between two looks whether it has.
LOOKS = 5.0


class DjangoWorker(WorkerPlugin):  # type: ignore[misc]
    """Has each worker of a cluster, those that join later too, set Django up before its first task."""

    name = "parallel_orm"

    def __init__(self, module: str | None) -> None:
        self.module = module

    async def setup(self, worker: Any) -> None:
        await make_ready(self.module)


async def make_ready(module: str | None) -> None:
    """In a worker: set Django up, by settings of its own, or those that are in a module of this name there."""
    await asyncio.to_thread(_set_up, module)  # an AppConfig.ready() may ask its database, which no event loop may
    await asyncio.to_thread(remember_modules)


#: Held while a worker is made ready, as several callers may do that.
_setting_up = threading.Lock()


def _set_up(module: str | None) -> None:
    with _setting_up:
        tried = None if settings.configured or SETTINGS in os.environ else module
        if tried is not None:
            os.environ[SETTINGS] = tried
        try:
            set_up()
        except BaseException:
            if tried is not None and not apps.apps_ready:  # no models are loaded yet: the next caller's may be right
                os.environ.pop(SETTINGS, None)
                settings._wrapped = empty
                apps.app_configs.clear()
                apps.loading = False
            raise


class DaskExecutor(Executor):
    """Sends calls to the workers of a cluster; functions and results are pickled, as Dask does.

    A call that was cancelled is not begun, unless a worker was about to. One that was begun goes on to its end, and
    nobody hears of it.
    """

    #: Whether a call that takes too long can be ended. Dask's workers are not ours to kill.
    supports_timeout = False
    #: Whether each worker can be told that a call of ours has ended.
    supports_end_hook = False
    #: Whether functions may be lambdas, closures, and those of a script.
    supports_by_value = True
    #: Whether anybody tells what became of a call.
    supports_answers = True

    def __init__(
        self,
        client: Client,
        *,
        most: int | None = None,
        waits: bool = False,
        patience: float = PATIENCE,
        how: Mapping[str, Any] | None = None,
    ) -> None:
        """Over a client; with ``most``, no more calls than that are at the cluster at once. ``how``: what Dask is told
        of each call beside.
        """
        self.client = client
        self._most, self._waits, self._patience, self._how = most, waits, patience, {**(how or {}), "pure": False}
        #: Guards the next two, which the thread that submits has, and that of the client.
        self._lock = threading.Lock()
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._flying: dict[Future[Any], Any] = {}
        self._watcher: asyncio.Task[None] | None = None

    @property
    def number(self) -> int:
        """How many calls are worked on at once, as the cluster is now; where nobody is yet, as many as was said."""
        there = sum(self.client.nthreads().values()) or self._most or 1
        return there if self._most is None else min(self._most, there)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Send a call on its way.

        The future raises :class:`~parallel_orm.errors.WorkerDied` where the workers that had the call ended, each of as
        many as the scheduler allows; :class:`~parallel_orm.errors.EngineUnavailable` where the scheduler went, or all
        workers, and none came.
        """
        here: Future[Any] = Future()
        with self._lock:
            self._waiting.append((here, partial(fn, *args, **kwargs)))
        self._send()
        return here

    def _send(self) -> None:
        """Send what may be sent."""
        while True:
            with self._lock:
                if not self._waiting or (self._most is not None and len(self._flying) >= self._most):
                    return
                here, call = self._waiting.popleft()
                if (self._waits or here.cancelled()) and not here.set_running_or_notify_cancel():
                    continue
                self._flying[here] = None  # its place is taken
            try:
                there = self.client.submit(call, key=f"parallel_orm-{uuid4().hex}", **self._how)
                self._flying[here] = there
                self.client.loop.add_callback(self._land, here, there)
            except Exception as error:
                self._flying.pop(here, None)
                _set(here, error=errors.engine_unreachable("Dask's scheduler", _where(self.client), error))
                continue
            here.add_done_callback(partial(_let_go, there))

    async def _land(self, here: Future[Any], there: Any) -> None:
        """Have what became of a task be what becomes of the call."""
        result: Any = None
        error: BaseException | None = None
        try:
            result = await there.result()
        except KilledWorker:
            error = errors.WorkerDied(None, None)
        except CancelledError:
            error = errors.engine_lost("Dask's scheduler")
        except Exception as raised:
            # A result that is there, and cannot be fetched.
            is_lost = isinstance(raised, OSError) and there.status != "error"
            error = errors.engine_lost("Dask's scheduler") if is_lost else raised
        with self._lock:
            self._flying.pop(here, None)
        if isinstance(error, errors.EngineUnavailable) and not here.cancelled():  # nobody would answer what is sent now
            self._lose(error, ())
        self._send()
        _set(here, result, error)
        if self._waits:
            with suppress(Exception):
                await Event(there.key, client=self.client).clear()

    def once(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does what ``fn`` does, once: Dask has what a lost worker was at, or had done, done
        again by another one.
        """
        return partial(_once, fn)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leave the cluster as it is: it is not of this call. What nobody waits for any more is not begun."""
        with self._lock:
            self._waiting.clear()
            left = [there for there in self._flying.values() if there is not None]
        for there in left:
            there.release()
        with suppress(RuntimeError):  # the client is closed
            self.client.loop.add_callback(self._end_watch)

    # Whether anybody is there.

    def watch(self) -> None:
        """From now on, see whether there are workers, while there are calls."""
        self.client.loop.add_callback(self._begin_watch)

    def _begin_watch(self) -> None:
        self._watcher = asyncio.ensure_future(self._watch())

    def _end_watch(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()

    async def _watch(self) -> None:
        since = monotonic()
        while True:
            await asyncio.sleep(min(self._patience / 4, LOOKS))
            if self.client.status == "closed":  # it has given up to connect again
                self._lose(errors.engine_lost("Dask's scheduler"), list(self._flying))
                continue
            try:
                workers = await self._who_may() if self.client.status == "running" else None
            except Exception:  # whoever waits hears of it by its future
                workers = True
            if workers or not self._flying:
                since = monotonic()
            elif monotonic() - since >= self._patience:
                error = errors.no_dask_workers(_where(self.client), self._patience, self._asked)
                self._lose(error, list(self._flying))

    @property
    def _asked(self) -> dict[str, Any]:
        """What a worker has to be, or to have, that may do a call of ours."""
        if self._how.get("allow_other_workers"):
            return {}
        asked = {key: self._how.get(key) for key in ("workers", "resources")}
        return {key: value for key, value in asked.items() if value or value == 0}  # which may be a worker's name

    async def _who_may(self) -> Any:
        """Return the workers that are there, if any, and may do a call of ours."""
        asked = self._asked
        if not asked:  # of a large cluster this is less to tell
            return await self.client.scheduler.ncores()
        known = (await self.client.scheduler.identity())["workers"]
        chosen = _chosen(known, asked["workers"]) if "workers" in asked else list(known)
        needed = asked.get("resources", {}).items()
        return [each for each in chosen if all(known[each]["resources"].get(key, 0) >= value for key, value in needed)]

    def _lose(self, error: errors.EngineUnavailable, flying: Iterable[Future[Any]]) -> None:
        """Have this become of what waits here to be sent, and of these."""
        with self._lock:
            waiting = [here for here, _ in self._waiting if here.set_running_or_notify_cancel()]
            self._waiting.clear()
        for here in (*flying, *waiting):
            _set(here, error=error)


def _set(future: Future[Any], result: Any = None, error: BaseException | None = None) -> None:
    """Have a future done, unless it is: somebody cancelled it, or all were lost."""
    with suppress(InvalidStateError):
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)


def _let_go(there: Any, here: Future[Any]) -> None:
    """Have the scheduler forget a task of which nobody wants to hear."""
    if here.cancelled():
        here.set_running_or_notify_cancel()  # those who wait() for several hear of it
    there.release()


def _where(client: Client) -> str:
    return str(getattr(client.scheduler, "address", None) or "its address")


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
    patience: float = PATIENCE,
    waits: bool = False,
) -> Iterator[DaskExecutor]:
    """Have an executor: over a client that was given, the cluster at an address, or one of so many processes here.

    ``waits``: what was sent is waited for, whatever happens.

    :raises EngineUnavailable: no scheduler answers within ``timeout`` seconds, or its workers cannot be made ready.
    """
    how: Mapping[str, Any] = {}
    if isinstance(client, ClientExecutor):
        client, how = client._client, client._kwargs
    if client is None:
        client = _kept(address, number, timeout)
    elif not isinstance(client, Client):
        raise errors.bad_executor(client, "is no client of a cluster: give cluster.get_client().")
    if client.asynchronous:
        raise errors.bad_executor(
            client, "would have to wait for itself here, in its own event loop: use another thread."
        )
    _make_ready(client, timeout, how.get("workers"))
    made = DaskExecutor(client, most=number, waits=waits, patience=patience, how=how)
    with making_room():
        made.watch()
        try:
            yield made
        finally:
            made.shutdown()


#: Of a thread that is at a task of Dask's: how many calls it has made that are not over.
_within = threading.local()


@contextmanager
def making_room() -> Iterator[None]:
    """Within a task of Dask's, have its thread leave those that do tasks, as ``worker_client()`` does: it waits for
    other tasks now, which may have no other place. It comes back with the last of its calls, unless another thread ends
    that. (An actor has one thread of its own, as its methods run one at a time.)
    """
    thread, calls = threading.current_thread(), getattr(_within, "calls", 0)
    is_task = hasattr(thread_state, "key") and not getattr(thread_state, "actor", False)
    if not is_task or (calls == 0 and not _seceded()):
        yield
        return
    _within.calls = calls + 1
    try:
        yield
    finally:
        if threading.current_thread() is thread:
            _within.calls -= 1
            if _within.calls == 0:
                rejoin()


def _seceded() -> bool:
    """Have this thread leave; tell whether it could: it had not done so before, and is one of Dask's own pool."""
    try:
        secede()
    except (KeyError, AttributeError):
        return False
    return True


def _make_ready(client: Client, timeout: float, workers: Any = None) -> None:
    """Have the workers set Django up, those of a scheduler that was started anew too; or only some, as others are not
    of this project. (One of these that comes later does so at its first chunk.)
    """
    try:
        told = client.sync(client.scheduler.identity, callback_timeout=timeout)
    except Exception as error:
        raise errors.engine_unreachable("Dask's scheduler", _where(client), error) from error
    ready, these = _made_ready.setdefault(client, set()), (told["id"], repr(workers))
    if these not in ready:
        module = World.of_caller().module
        try:
            if workers is None:
                client.register_plugin(DjangoWorker(module))
            elif chosen := _chosen(told["workers"], workers):
                client.run(make_ready, module, workers=chosen)
        except Exception as error:
            raise errors.engine_not_ready("Dask", error) from error
        ready.add(these)


def _chosen(known: Mapping[str, Any], workers: Any) -> list[str]:
    """Return the addresses of the workers that are meant by an address, a name, or a host; or by several of these."""
    wanted = set()
    for each in [workers] if isinstance(workers, (str, int)) else workers:
        wanted.add(each)
        with suppress(TypeError, ValueError, OSError):  # it is no address
            wanted.add(resolve_address(each))
    return [address for address, each in known.items() if not wanted.isdisjoint((address, each["name"], each["host"]))]


# Clients of ours, by address, None for a cluster here; and of clients the schedulers and the workers that have Django.
_lock = threading.Lock()
_clients: dict[str | None, Client] = {}
_made_ready: WeakKeyDictionary[Client, set[tuple[str, str]]] = WeakKeyDictionary()


def _kept(address: str | None, number: int | None, timeout: float) -> Client:
    with _lock:
        client = _clients.get(address)
        if client is not None and client.status != "running":
            _end(client)
            client = None
        if client is None:
            client = _clients[address] = _connected(address, number, timeout)
        elif address is None:
            _grow(client, number or CPU_COUNT)
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
        # A scheduler serves HTTP in any case: at a port that is free, as it warns where the usual one is not.
        here = "127.0.0.1"
        cluster = LocalCluster(
            n_workers=number or CPU_COUNT, threads_per_worker=1, dashboard_address=f"{here}:0", host=here
        )
        return Client(cluster, timeout=timeout, set_as_default=False)
    except (OSError, TimeoutError, RuntimeError) as error:
        raise errors.engine_unreachable("Dask", "a cluster of this process's own", error) from error


def _grow(client: Client, number: int) -> None:
    """Have a cluster of ours have so many workers; not fewer than it has, as other calls may be using them."""
    if len(client.cluster.plan) < number:
        client.cluster.scale(number)
        with suppress(TimeoutError):  # it is done by those that are there
            client.wait_for_workers(number, PATIENCE)


def end_clients() -> None:
    """Disconnect, and end the clusters of ours."""
    with _lock:
        clients = list(_clients.values())
        _clients.clear()
    for client in clients:
        _end(client)


def _end(client: Client) -> None:
    cluster = client.cluster
    with suppress(Exception):
        client.close()
    with suppress(Exception):
        if cluster is not None:
            cluster.close()


def _forget() -> None:
    """In a forked child: the connections are the parent's."""
    global _lock
    _lock = threading.Lock()
    _clients.clear()


atexit.register(end_clients)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
