"""Celery: calls as messages to the workers that a project has.

    submit() -> inbox -> courier thread -> broker -> worker: parallel_orm.tasks.call
                              |                          |
                 Future  <----+<---- result backend -----+

The courier alone speaks with Celery, whose result backends may want the thread that sent a message to ask for its
answer. It is there for the length of a call.
"""

from __future__ import annotations

import json
import pickle
import threading
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any
from uuid import uuid4

from parallel_orm import errors, wire
from parallel_orm.chunks import Chunk
from parallel_orm.options import available_cores, from_settings
from parallel_orm.outcomes import Outcome, packing
from parallel_orm.parcels import dumps
from parallel_orm.seals import sealed, unsealed

try:
    from celery import Celery, current_app, states
    from celery.backends.base import DisabledBackend
    from django.utils.module_loading import import_string
except ImportError as error:
    raise errors.missing_engine("celery", error) from error

#: Seconds for a broker to answer.
TIMEOUT = 10.0
#: Seconds without a sign of life after which it is looked whether anybody is there to do the work.
PATIENCE = 60.0
#: The largest answer, as characters: brokers and backends have limits of their own, and say so badly.
MOST_BYTES = 16 * 2**20
#: Seconds between two looks for answers: at first, and at most.
LOOKS, LOOKS_AT_MOST = 0.002, 0.05
#: Seconds for workers to answer when they are asked who is there.
ASKS = 1.0
#: Seconds for which it is known how many there are.
KNOWN = 60.0


@dataclass(frozen=True)
class Setup:
    """How the workers are reached; from the setting ``CELERY``."""

    #: The dotted path of the app; None: the one that the project has made Celery's current one.
    app: str | None = None
    #: The queue; None: the app's default.
    queue: str | None = None
    #: Whether functions may travel by value.
    pickle: bool = False
    timeout: float = TIMEOUT
    patience: float = PATIENCE
    most_bytes: int = MOST_BYTES
    number: int | None = None
    #: Whether what was sent is waited for, whatever happens.
    waits: bool = False

    def find(self) -> Celery:
        """Return the app, or refuse."""
        if self.app is not None:
            try:
                return import_string(self.app)
            except ImportError as error:
                raise errors.bad_setting("CELERY", f"has an APP that cannot be imported: {error}") from error
        found = current_app._get_current_object()
        if found.main == "default":  # the one that Celery makes where there is none
            raise errors.no_celery_app()
        return found


def travels_by_value(arguments: Mapping[str, Any]) -> bool:
    """Tell whether messages are pickles."""
    return bool(arguments.get("pickle"))


# --- Where the call is made ---------------------------------------------------------------


@dataclass(eq=False, slots=True)
class Call:
    """A call that is on its way."""

    message: str
    future: Future[Any]
    name: str = field(default_factory=lambda: uuid4().hex)
    #: When it was sent, or last seen to be somewhere.
    since: float = 0.0


class CeleryExecutor(Executor):
    """Sends calls to Celery's workers.

    Messages are JSON, and sealed by ``SECRET_KEY``; so are their answers. A call that was cancelled is not begun, if
    its worker hears of it in time; one that was begun goes on to its end, and nobody hears of it.
    """

    #: Whether a call that takes too long can be ended. Give the project's workers a ``task_time_limit``.
    supports_timeout = False
    #: Whether each worker can be told that a call of ours has ended.
    supports_end_hook = False

    def __init__(self, app: Celery, setup: Setup) -> None:
        from parallel_orm.tasks import call  # which is of the app that is current by now

        self._app, self._setup, self._task = app, setup, app.tasks[call.name]
        #: Whether functions may be lambdas, closures, and those of a script.
        self.supports_by_value = setup.pickle
        #: Whether anybody tells what became of a call.
        self.supports_answers = not isinstance(app.backend, DisabledBackend) or bool(app.conf.task_always_eager)
        self._inbox: SimpleQueue[Call | None] = SimpleQueue()
        self._flying: dict[str, Call] = {}
        self._courier = threading.Thread(target=self._run, name="parallel_orm-courier", daemon=True)

    @property
    def number(self) -> int:
        """How many calls are worked on at once: as was said, or as many as the workers that answer have processes."""
        return self._setup.number or (1 if self._app.conf.task_always_eager else _number_of(self._app))

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Send a call on its way.

        The future raises :class:`~parallel_orm.errors.WorkerDied` where the worker that had the call ended, or the
        message was lost; :class:`~parallel_orm.errors.EngineUnavailable` where broker or backend went, or nobody takes
        anything from the queue.
        """
        call = Call(message_of(fn, args, kwargs, by_value=self._setup.pickle), Future())
        if self._setup.waits or not self.supports_answers:
            call.future.set_running_or_notify_cancel()
        if not self._courier.is_alive():
            self._courier.start()
        self._inbox.put(call)
        return call.future

    def once(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does what ``fn`` does, and refuses a message that its broker delivers again."""
        return partial(unless_redelivered, fn)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leave the workers as they are; the courier ends."""
        if self._courier.is_alive():
            self._inbox.put(None)
            if wait:
                self._courier.join()

    # What the courier does.

    def _run(self) -> None:
        pause, looked, ends = LOOKS, monotonic(), False
        while not ends or any(call.future.running() for call in self._flying.values()):
            with suppress(Empty):
                call = self._inbox.get(timeout=pause if self._flying else None)
                if call is None:
                    ends = True
                else:
                    self._send(call)
                    continue  # to what else there is, before answers are asked for
            try:
                came = self._look()
                if monotonic() - looked > min(self._setup.patience, 5.0):
                    looked = monotonic()
                    self._look_for_lost()
            except Exception as error:
                self._abandon(errors.engine_unreachable("Celery's result backend", "its address", error))
                continue
            pause = LOOKS if came else min(pause * 1.5, LOOKS_AT_MOST)

    def _send(self, call: Call) -> None:
        if call.future.cancelled():
            return
        options: dict[str, Any] = {} if self._setup.queue is None else {"queue": self._setup.queue}
        if not self.supports_answers:
            options["ignore_result"] = True
        try:
            sent = self._task.apply_async((call.message,), task_id=call.name, serializer="json", **options)
        except Exception as error:
            _land(call.future, error=errors.engine_unreachable("Celery's broker", _where(self._app), error))
            return
        if self._app.conf.task_always_eager:
            self._hear(call, {"status": sent.state, "result": sent.result})
        elif not self.supports_answers:
            _land(call.future, SENT)
        else:
            call.since = monotonic()
            self._flying[call.name] = call

    def _look(self) -> bool:
        """Hear what has come; tell whether anything has."""
        for name, call in list(self._flying.items()):
            if call.future.cancelled():
                del self._flying[name]
                with suppress(Exception):
                    self._app.control.revoke(name)
        if not self._flying:
            return False
        backend = self._app.backend
        if hasattr(backend, "get_many"):
            came = list(backend.get_many(set(self._flying), interval=0, max_iterations=1))
        else:
            metas = [(name, backend.get_task_meta(name)) for name in self._flying]
            came = [(name, meta) for name, meta in metas if meta["status"] in states.READY_STATES]
        for name, meta in came:
            call = self._flying.pop(name)
            with suppress(Exception):  # not every backend can
                backend.forget(name)
            self._hear(call, meta)
        return bool(came)

    def _hear(self, call: Call, meta: Mapping[str, Any]) -> None:
        try:
            if meta["status"] == states.SUCCESS:
                _land(call.future, answer_of(meta["result"]))
            else:
                _land(call.future, error=error_of(meta["result"]))
        except Exception as error:
            _land(call.future, error=error)

    def _look_for_lost(self) -> None:
        """See to calls of which nothing was heard for long: whether they are anywhere."""
        now = monotonic()
        late = {name: call for name, call in self._flying.items() if now - call.since > self._setup.patience}
        if not late:
            return
        asked = self._app.control.inspect(timeout=ASKS)
        queues = asked.active_queues() or {}
        queue = self._setup.queue or self._app.conf.task_default_queue
        consumed = any(each["name"] == queue for each in chain.from_iterable(queues.values()))
        told = chain((asked.active() or {}).values(), (asked.reserved() or {}).values())
        held = {each["id"] for each in chain.from_iterable(told)}
        waiting = self._waiting(queue)
        for name, call in late.items():
            if name in held or (consumed and waiting):
                call.since = now  # it has its turn yet, or is at work
            elif waiting and not consumed:
                del self._flying[name]
                _land(call.future, error=errors.nobody_consumes(queue, self._setup.patience))
            elif name in self._flying and self._app.backend.get_task_meta(name)["status"] not in states.READY_STATES:
                del self._flying[name]
                _land(call.future, error=errors.WorkerDied(None, None))

    def _waiting(self, queue: str) -> int:
        """Return how many messages are in the queue."""
        with self._app.connection_for_read() as connection, connection.channel() as channel:
            found: int = channel.queue_declare(queue, passive=True).message_count
            return found

    def _abandon(self, error: Exception) -> None:
        for call in self._flying.values():
            _land(call.future, error=error)
        self._flying.clear()


def _land(future: Future[Any], result: Any = None, *, error: BaseException | None = None) -> None:
    if future.done() or not (future.running() or future.set_running_or_notify_cancel()):
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


#: What a call comes to of which nobody tells.
SENT = Outcome(Chunk(0, ""), value=[], counts={"sent": 1})


@contextmanager
def executor(**arguments: Any) -> Iterator[CeleryExecutor]:
    """Have an executor over the project's app, for the length of a call.

    :raises EngineUnavailable: there is no app, or no broker answers within ``timeout`` seconds.
    """
    setup = Setup(**arguments)
    app = setup.find()
    if not app.conf.task_always_eager:
        try:
            with app.connection_for_write(connect_timeout=setup.timeout) as connection:
                connection.ensure_connection(max_retries=1, interval_start=0.1, timeout=setup.timeout)
        except Exception as error:
            raise errors.engine_unreachable("Celery's broker", _where(app), error) from error
    made = CeleryExecutor(app, setup)
    try:
        yield made
    finally:
        made.shutdown()


def _where(app: Celery) -> str:
    """Return where the broker is, without its password."""
    return str(app.connection_for_write().as_uri())


#: By broker: how many processes its workers have, and until when that holds.
_numbers: dict[str, tuple[int, float]] = {}


def _number_of(app: Celery) -> int:
    where = _where(app)
    number, until = _numbers.get(where, (0, 0.0))
    if until < monotonic():
        told = app.control.inspect(timeout=ASKS).stats() or {}
        number = sum(int((each.get("pool") or {}).get("max-concurrency", 1)) for each in told.values())
        _numbers[where] = number, monotonic() + (KNOWN if number else 0)
    return number or available_cores()


# --- What travels -------------------------------------------------------------------------


def message_of(fn: Callable[..., Any], args: Any, kwargs: Any, *, by_value: bool) -> str:
    """Return a call as a message: JSON; or, ``by_value``, a pickle in it."""
    call = (fn, args, kwargs)
    with packing(as_json=not by_value):
        text = b64encode(dumps(call)).decode() if by_value else wire.written(call)
    return sealed(json.dumps({"by_value": by_value, "call": text}))


def answer_of(answer: str) -> Any:
    """Return what a worker answered."""
    told = json.loads(unsealed(answer))
    return pickle.loads(b64decode(told["answer"])) if told["by_value"] else wire.read(told["answer"])


def error_of(result: Any) -> BaseException:
    """Return what Celery tells of a task that did not come to an answer."""
    name = type(result).__name__
    if name in ("WorkerLostError", "Terminated", "TaskRevokedError"):
        return errors.WorkerDied(None, None)
    if name == "NotRegistered":
        return errors.engine_not_ready("Celery", result)
    return result if isinstance(result, BaseException) else errors.RemoteError(name, str(result))


# --- Where it is answered -----------------------------------------------------------------

_is_redelivered: ContextVar[bool] = ContextVar("parallel_orm_is_redelivered", default=False)


def answer(message: str, *, is_redelivered: bool) -> str:
    """Do what a message says, in a worker; return the answer, as sealed as the message must be.

    :raises NotSealed: it is of a stranger.
    :raises InvalidOption: it is a pickle, which the settings of this worker do not allow.
    """
    told = json.loads(unsealed(message))
    by_value, known = told["by_value"], from_settings().CELERY
    if by_value and not known.get("PICKLE"):
        raise errors.no_pickles_here()
    with packing(as_json=not by_value):
        fn, args, kwargs = pickle.loads(b64decode(told["call"])) if by_value else wire.read(told["call"])
        token = _is_redelivered.set(is_redelivered)
        try:
            result = fn(*args, **kwargs)
        finally:
            _is_redelivered.reset(token)
        text = b64encode(dumps(result)).decode() if by_value else wire.written(result)
    most = known.get("MOST_BYTES", MOST_BYTES)
    if len(text) > most:
        raise errors.answer_too_large(len(text), most)
    return sealed(json.dumps({"by_value": by_value, "answer": text}))


def unless_redelivered(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call ``fn``, unless the message of it may have been begun before."""
    if _is_redelivered.get():
        raise errors.WorkerDied(None, None)
    return fn(*args, **kwargs)
