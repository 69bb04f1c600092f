"""Worker processes behind the standard socket: a lasting :class:`concurrent.futures.Executor` of our own.

Why not :class:`concurrent.futures.ProcessPoolExecutor`: when one of its workers dies, every task that was out fails
alike and the pool is gone, so nobody can say which chunk was lost. Here each worker has a pipe of its own, so a death
costs exactly the task that the worker had, and the pool heals.

    submit() -> inbox -> manager thread -> pipe -> worker process: serve()
                              |                        |
                 Future  <----+<---------- pipe -------+

The manager thread alone knows the workers. It starts with the first task and ends, its workers with it, when nothing
has come for a while; the next task starts both again.
"""

from __future__ import annotations

import atexit
import io
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import connection, forkserver, spawn
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from time import monotonic
from typing import Any

import cloudpickle

from parallel_orm import workers
from parallel_orm.connections import lender, under_test
from parallel_orm.errors import ChunkTimedOut, WorkerDied, daemon_has_no_children, is_of_a_worker
from parallel_orm.forks import gate
from parallel_orm.leaving import THREADS
from parallel_orm.outcomes import PackedError, pack, pack_error
from parallel_orm.parcels import Parcel, end_of_call

#: Seconds without work after which the processes end. A page that maps now and then finds them warm; a script that
#: goes on to other things gets their memory back.
IDLE_SECONDS = 30.0
#: Seconds beyond its time after which a worker is killed: until then its database gives up what it is executing.
GRACE = 1.0
#: How the caller's ``sys.path`` reaches the fork server: Python before 3.13 does not pass it on.
PATH_VARIABLE = "PARALLEL_ORM_FORKSERVER_PATH"
#: The name that multiprocessing knows our workers by.
WORKER_NAME = "parallel_orm-worker"


@dataclass(eq=False, slots=True)
class Call:
    """One submitted call, ready to be sent."""

    message: bytes
    parcels: dict[str, Parcel]
    #: Seconds that it may take, from when its worker begins.
    seconds: float | None = None
    #: What it comes to if its worker is gone before it begins; None: an error.
    unbegun: list[Any] | None = None
    future: Future[Any] = field(default_factory=Future)


@dataclass(frozen=True, slots=True)
class Ending:
    """What a worker is told when a call has ended that it has worked for."""

    parcel: str
    #: Whether the call has an ``end_hook``.
    has_hook: bool
    #: Whether its connections are to be closed at once.
    closes: bool

    def see_to(self) -> list[Any]:
        try:
            return end_of_call(self.parcel)
        finally:
            if self.closes:
                lender.close_idle()


#: Workers' answers to an :class:`Ending`: of those that were at rest when it was sent, and of those at work for others.
Ended = tuple[list[Future[Any]], list[Future[Any]]]


@dataclass(eq=False, slots=True)
class Worker:
    """A process, the manager's end of its pipe, and what it is doing."""

    process: BaseProcess
    pipe: Connection
    slot: int
    call: Call | None = None
    #: What it is sent next, before anything of the inbox.
    next: deque[Call] = field(default_factory=deque)
    #: When its call is to be over, once that has begun; None: whenever it is.
    due: float | None = None
    #: The parcels that it has, until their calls end.
    parcels: set[str] = field(default_factory=set)


class ProcessPool(Executor):
    """At most ``size`` worker processes, started as they are needed and replaced when they die.

    A :class:`~parallel_orm.parcels.Parcel` among the arguments of a call is sent to each worker once. A call whose
    worker ends before it answers raises :class:`~parallel_orm.errors.WorkerDied`; the calls of other workers go on.
    """

    def __init__(self, size: int, start_method: str) -> None:
        self.size, self.start_method = size, start_method
        # Guards the five names below, between the manager and whoever submits. Everything else is the manager's own.
        # Reentrant, because a future that fails while it is held may call back into submit().
        self._lock = threading.RLock()
        self._inbox: deque[Call] = deque()
        self._endings: deque[tuple[Ending, Future[Ended]]] = deque()
        self._manager: threading.Thread | None = None
        self._order: str = ""  # "", "shutdown" or "kill"
        self._woken = False
        self._wake_reader, self._wake_writer = multiprocessing.Pipe(duplex=False)
        self._workers: list[Worker] = []

    # What callers do.

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return self.submit_within(None, fn, *args, **kwargs)

    def submit_within(self, seconds: float | None, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Submit a call that may take so many seconds, and :data:`GRACE`, from when its worker begins with it.

        Then the worker is killed, and the call raises :class:`~parallel_orm.errors.ChunkTimedOut`.
        """
        message, parcels = dump((fn, args, kwargs, seconds is not None))
        call = Call(message, parcels, seconds)
        with self._lock:
            if self._order:
                raise RuntimeError("cannot submit to a pool that was shut down")
            self._inbox.append(call)
            try:
                self._wake()
            except BaseException:
                self._inbox.remove(call)
                raise
        return call.future

    def end(self, parcel: Parcel, *, has_hook: bool = False, wait: bool = True) -> Ended:
        """Have every worker that has worked with a parcel forget it, and see to its connections.

        The futures have what the ``end_hook`` of each returned, in a list, which is empty for a worker that was lost
        before. Who does not ``wait`` is told of none; nor is anybody where there is nothing to wait for.
        """
        ended: Future[Ended] = Future()
        ending = Ending(parcel.name, has_hook, closes=under_test())
        with self._lock:
            if self._manager is None:
                return [], []
            self._endings.append((ending, ended))
            self._wake()
        return ended.result() if wait and (ending.has_hook or ending.closes) else ([], [])

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._end("shutdown", wait=wait, cancel_futures=cancel_futures)

    def kill(self) -> None:
        """End the workers now, whatever they are doing; what they were doing raises ``WorkerDied``."""
        self._end("kill", wait=True, cancel_futures=True)

    def pids(self) -> list[int]:
        """Return the processes that are running now."""
        return [worker.process.pid for worker in list(self._workers) if worker.process.pid is not None]

    def _end(self, order: str, *, wait: bool, cancel_futures: bool) -> None:
        with self._lock:
            self._order = order
            if cancel_futures:
                for call in self._inbox:
                    call.future.cancel()
            manager = self._manager
            if manager is not None:
                self._wake()
        if wait and manager is not None:
            manager.join()

    def _wake(self) -> None:
        """Make the manager look at its inbox, or start it. With the lock held."""
        if self._manager is None:
            # A daemon: the interpreter may end while workers idle; end_pools() below has then seen to them.
            manager = threading.Thread(target=self._manage, name=f"{THREADS}manager", daemon=True)
            manager.start()  # which may fail: no threads are left, or the interpreter is ending
            self._manager = manager
        elif not self._woken:  # once is enough, and a pipe that nobody reads just now fills up
            self._woken = True
            self._wake_writer.send_bytes(b"")

    def _hear(self) -> None:
        """Take the wake-up call out of its pipe. With the lock held."""
        if self._woken:
            self._wake_reader.recv_bytes()
            self._woken = False

    # What the manager does.

    def _manage(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:  # never leave a caller waiting for a manager that is gone
            self._abandon(error)
            raise

    def _turn(self) -> bool:
        """Send what can be sent, wait until something happens, deal with it. Return False to end."""
        self._send_waiting()
        busy = any(worker.call for worker in self._workers)
        pipes = {worker.pipe: worker for worker in self._workers}
        patience = self._patience() if busy else IDLE_SECONDS
        ends = {worker.process.sentinel: worker for worker in self._workers}
        if not busy and self._order == "shutdown":
            happened: list[Any] = []
        else:
            happened = connection.wait([self._wake_reader, *pipes, *ends], patience)
        if (not happened and not busy) or self._order == "kill":
            return not self._retire()
        if self._wake_reader in happened:
            with self._lock:
                self._hear()
        for pipe in [pipe for pipe in pipes if pipe in happened]:
            self._receive(pipes[pipe])
        for sentinel in [sentinel for sentinel in ends if sentinel in happened]:
            self._bury(ends[sentinel])
        self._end_what_is_late()
        return True

    def _patience(self) -> float | None:
        """Return the seconds until the first call is late; None: none may be."""
        dues = [worker.due for worker in self._workers if worker.due is not None]
        return max(0.0, min(dues) - monotonic()) if dues else None

    def _end_what_is_late(self) -> None:
        for worker in list(self._workers):
            if worker.due is not None and worker.due <= monotonic():
                call, worker.call, worker.due = worker.call, None, None
                assert call is not None
                assert call.seconds is not None
                worker.process.kill()
                self._bury(worker)
                call.future.set_exception(ChunkTimedOut(call.seconds))

    def _send_waiting(self) -> None:
        while True:
            with self._lock:
                endings = list(self._endings)
                self._endings.clear()
            try:
                for ending, ended in endings:
                    ended.set_result(self._send_ending(ending))
            except BaseException:
                self._endings.extend(each for each in endings if not each[1].done())
                raise
            idle = next((worker for worker in self._workers if worker.call is None), None)
            if idle is None and len(self._workers) >= self.size:
                return
            with self._lock:
                if not self._inbox:
                    return
                call = self._inbox.popleft()
            if not call.future.set_running_or_notify_cancel():
                continue
            try:
                worker = idle or self._start()
            except Exception as error:
                call.future.set_exception(error)
                continue
            self._send(worker, call)

    def _send(self, worker: Worker, call: Call) -> None:
        worker.call, worker.due = call, None
        with suppress(OSError):  # it has died: its sentinel says so in the next turn
            for name, parcel in call.parcels.items():
                if name not in worker.parcels:
                    worker.pipe.send_bytes(pickle.dumps(parcel))
                    worker.parcels.add(name)
            worker.pipe.send_bytes(call.message)

    def _send_ending(self, ending: Ending) -> Ended:
        """Send it to the workers that have the parcel: now to those at rest, next to the others."""
        at_rest, at_work = list[Future[Any]](), list[Future[Any]]()
        for worker in self._workers:
            if ending.parcel not in worker.parcels:
                continue
            worker.parcels.remove(ending.parcel)
            call = Call(pickle.dumps(ending), {}, unbegun=[])
            call.future.set_running_or_notify_cancel()
            if worker.call is None:
                self._send(worker, call)
                at_rest.append(call.future)
            else:
                worker.next.append(call)
                at_work.append(call.future)
        return at_rest, at_work

    def _receive(self, worker: Worker) -> None:
        try:
            reply = worker.pipe.recv_bytes()
        except (EOFError, OSError):
            self._bury(worker)
            return
        self._hear_of(worker, reply)
        if reply and worker.next:
            self._send(worker, worker.next.popleft())

    def _hear_of(self, worker: Worker, reply: bytes) -> None:
        """Take note of a reply; an empty one says that a worker has begun with its call."""
        call = worker.call
        assert call is not None
        if reply:
            worker.call = worker.due = None
            answer(call.future, reply)
            return
        call.unbegun = None
        if call.seconds is not None:
            worker.due = monotonic() + call.seconds + GRACE

    def _bury(self, worker: Worker) -> None:
        """See to a worker that is gone: hear what it still said, then say what it did not do."""
        if worker not in self._workers:
            return
        with suppress(EOFError, OSError):
            while worker.call is not None and worker.pipe.poll():
                self._hear_of(worker, worker.pipe.recv_bytes())
        self._workers.remove(worker)
        worker.pipe.close()
        worker.process.join()
        if worker.process.exitcode == 255 and worker.process.pid is not None:
            # What multiprocessing says when the fork server is gone, which alone could tell; the worker may live on.
            with suppress(OSError):
                os.kill(worker.process.pid, signal.SIGTERM)
        mourn(worker)

    def _start(self) -> Worker:
        ours, theirs = multiprocessing.Pipe()
        inherited: tuple[Connection, ...] = ()
        if self.start_method == "fork":
            inherited = (ours, self._wake_reader, self._wake_writer, *(worker.pipe for worker in self._workers))
        slot = min(set(range(self.size)) - {worker.slot for worker in self._workers})
        process = start_process(self.start_method, serve, (theirs, inherited, slot))
        theirs.close()  # so that the end of the worker is the end of the pipe
        worker = Worker(process, ours, slot)
        self._workers.append(worker)
        return worker

    def _retire(self) -> bool:
        """End the workers and the manager, unless something has come in meanwhile. Return whether it is done."""
        with self._lock:
            if (self._inbox or self._endings) and self._order != "kill":
                return False
            # From here on the next submit() starts another manager; it waits for the lock until we are through.
            for worker in self._workers:
                if self._order == "kill":
                    worker.process.kill()
                worker.pipe.close()
            for worker in self._workers:
                worker.process.join(timeout=5)
                if worker.process.exitcode is None:
                    worker.process.kill()
                    worker.process.join()
                mourn(worker)
            self._workers.clear()
            for _, ended in self._endings:
                ended.set_result(([], []))
            self._endings.clear()
            self._hear()
            self._manager = None
            return True

    def _abandon(self, error: BaseException) -> None:
        with self._lock:
            self._manager = None
            calls = [call for worker in self._workers for call in (worker.call, *worker.next) if call is not None]
            waiting = [call.future for call in (*calls, *self._inbox)]
            for worker in self._workers:
                worker.process.kill()
            self._workers.clear()
            self._inbox.clear()
            for future in waiting:
                if not future.done() and (future.running() or future.set_running_or_notify_cancel()):
                    future.set_exception(error)
            for _, ended in self._endings:
                ended.set_result(([], []))
            self._endings.clear()


def answer(future: Future[Any], reply: bytes) -> None:
    """Put a worker's reply into the future that waits for it."""
    try:
        result = pickle.loads(reply)
        if isinstance(result, PackedError):
            future.set_exception(result.open())
        else:
            future.set_result(result.open())
    except Exception as error:
        future.set_exception(error)


def mourn(worker: Worker) -> None:
    for call in (worker.call, *worker.next):
        if call is not None and call.unbegun is not None:
            call.future.set_result(call.unbegun)
        elif call is not None:
            call.future.set_exception(WorkerDied(worker.process.pid, worker.process.exitcode))
    worker.call = None
    worker.next.clear()


# What travels. A parcel is a persistent object in the sense of the pickle module: its name stands for it.


class ParcelPickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Writes the name of a parcel for the parcel, and collects the parcels."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.parcels: dict[str, Parcel] = {}

    def persistent_id(self, obj: Any) -> str | None:
        if type(obj) is not Parcel:
            return None
        self.parcels[obj.name] = obj
        return obj.name


class ParcelUnpickler(pickle.Unpickler):
    """Reads the name of a parcel as the parcel that was sent before."""

    def __init__(self, file: io.BytesIO, parcels: dict[str, Parcel]) -> None:
        super().__init__(file)
        self.parcels = parcels

    def persistent_load(self, pid: Any) -> Parcel:
        return self.parcels[pid]


def dump(call: object) -> tuple[bytes, dict[str, Parcel]]:
    file = io.BytesIO()
    pickler = ParcelPickler(file)
    pickler.dump(call)
    return file.getvalue(), pickler.parcels


# What a worker does.


def serve(pipe: Connection, inherited: tuple[Connection, ...], slot: int) -> None:
    """Answer calls until the caller closes its end of the pipe, or is gone."""
    workers.slot = slot
    lender.serve_calls()
    # The terminal sends Ctrl-C to all its processes; the caller alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if inherited:  # by fork: ends of other pipes, which would never end, the caller's handlers and its connections
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for other in inherited:
            other.close()
        lender.disinherit()
    parcels: dict[str, Parcel] = {}
    with suppress(EOFError, OSError):
        while True:
            message = pipe.recv_bytes()
            reply = do(message, parcels, lambda: pipe.send_bytes(b""))
            if reply is not None:
                pipe.send_bytes(reply)


def do(message: bytes, parcels: dict[str, Parcel], begin: Callable[[], object]) -> bytes | None:
    """Make the call of a message and return its reply; or keep a parcel, for the calls to come.

    Of a call whose time counts, and of a hook, the caller is told when that begins.
    """
    try:
        content = ParcelUnpickler(io.BytesIO(message), parcels).load()
        if isinstance(content, Parcel):
            parcels[content.name] = content
            with suppress(Exception):  # which is the first call's to raise
                content.open()
            return None
        if isinstance(content, Ending):
            parcels.pop(content.parcel, None)
            if content.has_hook:
                begin()
            return pickle.dumps(pack(content.see_to()))
        function, args, kwargs, is_timed = content
        workers.begins = begin if is_timed else None
        return pickle.dumps(pack(function(*args, **kwargs)))
    except BaseException as error:
        return pickle.dumps(pack_error(error))


# Starting and keeping.

# Guards the pools, and what has to be changed for a moment while a process starts.
_lock = threading.Lock()
_pools: dict[tuple[int, str], ProcessPool] = {}


@contextmanager
def process_pool(size: int, start_method: str) -> Iterator[ProcessPool]:
    """Have the pool of this size for the length of one call: warm from the last one, or new.

    When it is interrupted, its processes end.
    """
    if multiprocessing.current_process().daemon:
        raise daemon_has_no_children()
    with _lock:
        pool = _pools.get((size, start_method))
        if pool is None:
            pool = _pools[size, start_method] = ProcessPool(size, start_method)
    try:
        yield pool
    except KeyboardInterrupt as interrupt:
        if is_of_a_worker(interrupt):
            raise
        with _lock:
            _pools.pop((size, start_method), None)
        pool.kill()
        raise


def end_pools() -> None:
    """End all worker processes that are warm; the next call starts them again."""
    with _lock:
        pools = list(_pools.values())
        _pools.clear()
    for pool in pools:
        pool.kill()


def start_process(start_method: str, target: Callable[..., None], args: tuple[Any, ...]) -> BaseProcess:
    """Start a worker process that does not run the caller's main script again.

    The functions of ``__main__`` travel by value, so a worker has no use for it; and a script without the
    ``if __name__ == "__main__"`` guard would start its whole work anew in each worker.
    """
    context = multiprocessing.get_context(start_method)
    with _lock, gate:  # multiprocessing's locks and what is changed here would stay so in a forked child
        if start_method == "forkserver":
            os.environ[PATH_VARIABLE] = os.pathsep.join(sys.path)
            try:
                context.set_forkserver_preload(["parallel_orm.executors.preload"])
                forkserver.ensure_running()
            finally:
                del os.environ[PATH_VARIABLE]
        original = spawn.get_preparation_data
        spawn.get_preparation_data = without_main
        try:
            process: BaseProcess = context.Process(target=target, args=args, name=WORKER_NAME)  # type: ignore[attr-defined]
            process.start()
        finally:
            spawn.get_preparation_data = original
    return process


_preparation_data = spawn.get_preparation_data


def without_main(name: str) -> dict[str, Any]:
    """Return what multiprocessing tells a new process, less the main module; for our workers, and Dask's, only."""
    told = dict(_preparation_data(name))
    if name == WORKER_NAME or name.startswith("Dask Worker"):
        told.pop("init_main_from_name", None)
        told.pop("init_main_from_path", None)
    return told


def _forget() -> None:
    """In a forked child: the workers are the parent's. Let go of their pipes, or they would never see the end."""
    global _lock
    _lock = threading.Lock()
    for pool in _pools.values():
        for worker in pool._workers:
            worker.pipe.close()
    _pools.clear()
    # At the end of this process multiprocessing would wait for them as for its own children, and fail.
    children: set[BaseProcess] = multiprocessing.process._children  # type: ignore[attr-defined]
    children.difference_update([child for child in children if child.name == WORKER_NAME])
    # So it is with the fork server.
    server: Any = forkserver._forkserver
    if getattr(server, "_forkserver_pid", None) is not None:
        os.close(server._forkserver_alive_fd)
        server._forkserver_address = server._forkserver_alive_fd = server._forkserver_pid = None


atexit.register(end_pools)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
