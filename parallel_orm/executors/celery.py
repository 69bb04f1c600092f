"""Celery: calls as messages to the workers that a project has.

    submit() -> inbox -> courier thread -> broker -> worker: parallel_orm.tasks.call
                              |                          |
                 Future  <----+<---- result backend -----+

The courier alone speaks with Celery, whose result backends may want the thread that sent a message to ask for its
answer. It is there for the length of a call.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, count
from queue import Empty, SimpleQueue
from time import monotonic, sleep
from typing import Any
from uuid import uuid4

from django.db import connections

from parallel_orm import errors
from parallel_orm.chunks import Chunk
from parallel_orm.executors.messages import MOST_BYTES, answer_of, message_of, only_once
from parallel_orm.options import available_cores
from parallel_orm.outcomes import Outcome

try:
    from celery import Celery, current_app, states
    from celery.app.control import Control
    from celery.backends.base import DisabledBackend
    from celery.exceptions import ImproperlyConfigured, QueueNotFound
    from django.utils.module_loading import import_string
    from kombu.exceptions import ContentDisallowed

    from parallel_orm.tasks import NAME, keeps_answers
except ImportError as error:
    raise errors.missing_engine("celery", error) from error

#: Seconds for a broker to answer.
TIMEOUT = 10.0
#: Seconds without a sign of life after which it is looked whether anybody is there to do the work.
PATIENCE = 60.0
#: Seconds between two looks for answers: at first, and at most.
LOOKS, LOOKS_AT_MOST = 0.002, 0.05
#: Seconds for workers to answer when they are asked who is there.
ASKS = 1.0
#: And at first, where it is likely that all are idle. (Over Redis it takes a second to end this.)
ASKS_SHORTLY = 0.25
#: Seconds for which it is known how many there are.
KNOWN = 60.0
#: As often a chunk must be looked for in vain before it counts as lost: a worker may be too busy to answer.
MISSES = 3


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
    #: Of the workers, who read the setting themselves.
    most_bytes: int = MOST_BYTES
    number: int | None = None
    #: Whether what was sent is waited for, whatever happens.
    waits: bool = False

    def find(self) -> Celery:
        """Return the app, or refuse."""
        if self.app is not None:
            try:
                named = import_string(self.app)
            except ImportError as error:
                raise errors.bad_setting("CELERY", f"has an APP that cannot be imported: {error}") from error
            if not isinstance(named, Celery):
                raise errors.bad_setting("CELERY", f"has an APP that is no Celery app: {self.app} is {named!r}")
            return named
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
    #: Whether it must not be sent a second time.
    once: bool = False
    name: str = field(default_factory=lambda: uuid4().hex)
    #: As which of all it was sent.
    number: int = 0
    #: When it was sent, or last seen to be somewhere.
    since: float = 0.0
    #: How often it was looked for in vain since.
    misses: int = 0
    #: What Celery gives for it.
    sent: Any = None


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
        self._app, self._setup, self._task = app, setup, app.tasks[NAME]
        self._queue = setup.queue or _queue_of(app)
        #: Whether functions may be lambdas, closures, and those of a script.
        self.supports_by_value = setup.pickle
        #: Whether anybody tells what became of a call.
        self.supports_answers = not isinstance(app.backend, DisabledBackend) or bool(app.conf.task_always_eager)
        self._inbox: SimpleQueue[Call | None] = SimpleQueue()
        self._flying: dict[str, Call] = {}
        self._count, self._latest = count(1), 0
        self._ready: Future[None] = Future()
        self._courier = threading.Thread(target=self._run, name="parallel_orm-courier", daemon=True)
        #: What ended the courier before its time.
        self._failed: BaseException | None = None

    def connect(self) -> None:
        """Have the courier begin.

        :raises EngineUnavailable: broker or result backend do not answer in time.
        """
        self._courier.start()
        try:
            self._ready.result(self._setup.timeout)
        except errors.ParallelORMError:
            raise
        except TimeoutError as error:  # also where no driver has a time-out
            raise errors.engine_unreachable(BROKER, _where(self._app), error) from error

    @property
    def number(self) -> int:
        """How many calls are worked on at once: as was said, or as many as the workers that answer have processes."""
        if self._setup.number or self._app.conf.task_always_eager:
            return self._setup.number or 1
        try:
            return _number_of(self._app, self._queue)
        except ContentDisallowed:  # an answer by a serializer that this app does not accept
            return available_cores()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Send a call on its way.

        The future raises :class:`~parallel_orm.errors.WorkerDied` where the worker that had the call ended, or the
        message was lost; :class:`~parallel_orm.errors.EngineUnavailable` where broker or backend went, or nobody takes
        anything from the queue.
        """
        once = isinstance(fn, partial) and fn.func is only_once
        call = Call(message_of(fn, args, kwargs, by_value=self._setup.pickle), Future(), once)
        if self._setup.waits or not self.supports_answers:
            call.future.set_running_or_notify_cancel()
        self._inbox.put(call)
        if self._failed is not None:
            self._fail(self._failed)
        return call.future

    def once(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does what ``fn`` does, and refuses a message that its broker delivers again, or that
        its caller has given up.
        """
        return partial(only_once, fn)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Leave the workers as they are; the courier ends, what nobody has begun is revoked."""
        self._inbox.put(None)
        if wait and self._ready.done() and self._courier.is_alive():  # else it still waits for a server
            self._courier.join()

    # What the courier does.

    def _run(self) -> None:
        try:
            with self._app.connection_for_write(connect_timeout=self._setup.timeout) as connection:
                if not self._app.conf.task_always_eager:
                    self._greet(connection)
                self._ready.set_result(None)
                self._work(self._app.amqp.Producer(connection, auto_declare=False))
        except BaseException as error:
            if not self._ready.done():
                self._ready.set_exception(errors.engine_unreachable(BROKER, _where(self._app), error))
                return
            # A mistake, here or in Celery: nobody else would send, or hear.
            self._failed = error
            self._fail(error)
            raise
        finally:
            self._close()

    def _fail(self, error: BaseException) -> None:
        """Have this become of all calls that are not answered."""
        calls = list(self._flying.values())
        for call in calls:
            _land(call.future, error=error)
        self._forget(calls)
        self._take_back(calls)
        with suppress(Empty):
            while True:
                if (call_or_end := self._inbox.get(block=False)) is not None:
                    _land(call_or_end.future, error=error)

    def _greet(self, connection: Any) -> None:
        connection.ensure_connection(max_retries=1, interval_start=0.1, timeout=self._setup.timeout)
        if (ping := getattr(getattr(self._app.backend, "client", None), "ping", None)) is not None:
            ping()

    def _work(self, producer: Any) -> None:
        """Send what is in the inbox, and hear what comes back, until the end is told."""
        pause, looked, heard = LOOKS, monotonic(), monotonic()
        while True:
            try:
                call = self._inbox.get(block=not self._flying)
            except Empty:
                pass
            else:
                if call is None:
                    break
                if not self._flying:
                    heard = monotonic()
                self._send(call, producer)
                continue  # to what else there is, before answers are asked for
            self._revoke([call for call in self._flying.values() if call.future.cancelled()], producer.connection)
            flying = len(self._flying)
            try:
                self._listen(pause)
            except Exception as error:  # it may be over the next time, but where Celery has tried again itself
                if self._is_told or monotonic() - heard > self._setup.timeout:
                    self._abandon(list(self._flying.values()), BACKEND, error)
                sleep(pause)
            else:
                heard = monotonic()
            if monotonic() - looked > min(self._setup.patience, 5.0):
                looked = monotonic()
                self._look_for_lost(producer.connection)
            pause = LOOKS if len(self._flying) < flying else min(pause * 1.5, LOOKS_AT_MOST)
        self._revoke(list(self._flying.values()), producer.connection)

    def _send(self, call: Call, producer: Any) -> None:
        if call.future.cancelled():
            return
        if self._app.conf.task_always_eager:
            try:
                self._hear(call, self._task.apply((call.message,), task_id=call.name, throw=False))
            except BaseException as error:  # or whoever waits for it would wait for ever
                _land(call.future, error=error)
            return
        options: dict[str, Any] = {} if self._setup.queue is None else {"queue": self._setup.queue}
        if call.once:
            options["retry"] = False  # a message may have arrived whose sending has failed
        try:
            if self._is_told:  # before anybody could answer: Celery itself does so, but within tasks
                self._app.backend.result_consumer.consume_from(call.name)
            call.sent = self._task.apply_async(
                (call.message,),
                task_id=call.name,
                producer=producer,
                serializer="json",
                ignore_result=not self.supports_answers,
                argsrepr="(...)",  # events tell of it, and logs
                **options,
            )
            if not self.supports_answers:
                _land(call.future, SENT)
                return
            call.number, call.since = next(self._count), monotonic()
            self._flying[call.name] = call
            if self._is_told:
                call.sent.then(partial(self._hear, call))
        except QueueNotFound as error:
            _land(call.future, error=errors.bad_setting("CELERY", f"has a QUEUE that the app does not have: {error}"))
        except Exception as error:
            self._flying.pop(call.name, None)
            _land(call.future, error=errors.engine_unreachable(BROKER, _where(self._app), error))

    @property
    def _is_told(self) -> bool:
        """Whether the backend tells when there is an answer, and need not be asked."""
        return bool(getattr(self._app.backend, "is_async", False))

    def _listen(self, seconds: float) -> None:
        """Hear what has come, or comes within so many seconds."""
        if not self._flying:
            return
        if self._is_told:
            with suppress(TimeoutError):
                self._app.backend.result_consumer.drain_events(timeout=seconds)
        elif not self._look():
            sleep(seconds)

    def _look(self) -> bool:
        """Ask for all answers; tell whether any is there."""
        backend, names = self._app.backend, list(self._flying)
        if not keeps_answers(backend):  # it forgets what it has told
            return False
        if hasattr(backend, "get_many"):
            ready = [name for name, _ in backend.get_many(set(names), interval=0, max_iterations=1)]
        else:
            ready = [name for name in names if backend.get_task_meta(name)["status"] in states.READY_STATES]
        for name in ready:
            if (call := self._flying.get(name)) is not None:
                self._hear(call, call.sent)
        return bool(ready)

    def _hear(self, call: Call, result: Any) -> None:
        """Learn what became of a call, from what Celery has of it."""
        try:
            if result.state == states.SUCCESS:
                _land(call.future, answer_of(result.result, call.message))
            else:
                _land(call.future, error=error_of(result.result))
        except Exception as error:
            _land(call.future, error=error)
        self._latest = max(self._latest, call.number)
        self._forget([call])

    def _forget(self, calls: Iterable[Call]) -> None:
        for call in calls:
            if self._flying.pop(call.name, None) is not None:
                with suppress(Exception):  # not every backend can
                    self._app.backend.remove_pending_result(call.sent)
                with suppress(Exception):
                    call.sent.forget()

    def _take_back(self, calls: Iterable[Call]) -> bool:
        """Have those of these calls that must not be done a second time not be begun any more. Workers find it where
        answers are, so that those that come later do too. Tell whether it could be said.
        """
        try:
            for call in calls:
                if call.once:
                    if not keeps_answers(self._app.backend):
                        return False
                    self._app.backend.mark_as_revoked(call.name)
        except Exception:  # it may be gone, and the next one would be tried as long
            return False
        return True

    def _revoke(self, calls: list[Call], connection: Any) -> None:
        if calls:
            self._forget(calls)
            self._take_back(calls)
            with suppress(Exception):
                _control_of(self._app).revoke([call.name for call in calls], connection=connection)

    def _look_for_lost(self, connection: Any) -> None:
        """See to calls of which nothing was heard for long: whether they are anywhere.

        First in the queue, then with the workers, then among the answers: that is the way they go.
        """
        now = monotonic()
        late = [call for call in self._flying.values() if now - call.since > self._setup.patience]
        try:
            if late:
                self._look_for(late, now, connection)
        except ContentDisallowed:  # somebody is there, and cannot be understood
            for call in late:
                call.since = now
        except Exception as error:  # the broker's, which may be there again the next time
            most = self._setup.patience + self._setup.timeout
            self._abandon([call for call in late if now - call.since > most], BROKER, error)

    def _look_for(self, late: list[Call], now: float, connection: Any) -> None:
        waiting, consumers = self._in_queue(connection)
        ask = partial(_ask, self._app)
        queues = ask("active_queues")
        consumers += sum(any(each["name"] == self._queue for each in known) for known in queues.values())
        held: set[str] = set()
        if queues:
            told = chain(ask("active", list(queues)).values(), ask("reserved", list(queues)).values())
            held = {each["id"] for each in chain.from_iterable(told)}
        self._listen_to_all()
        for call in late:
            # In the queue nothing is left of what was sent before something that came back.
            has_its_turn = waiting and consumers and call.number > self._latest
            if call.name in held or has_its_turn:
                call.since, call.misses = now, 0
            elif call.name in self._flying:
                call.misses += 1
                if call.misses < MISSES:
                    continue
                self._forget([call])
                is_taken_back = self._take_back([call])
                if waiting and not consumers:
                    error: Exception = errors.nobody_consumes(
                        self._queue, self._setup.patience, stays=not is_taken_back
                    )
                else:
                    error = errors.message_lost(self._queue, self._setup.patience)
                _land(call.future, error=error)

    def _in_queue(self, connection: Any) -> tuple[int, int]:
        """Return how many messages are in the queue, and how many consumers its broker knows of."""
        with connection.channel() as channel:
            try:
                found = channel.queue_declare(self._queue, passive=True)
            except connection.channel_errors:  # there is none: Redis has no empty ones
                return 0, 0
            return found.message_count, found.consumer_count

    def _listen_to_all(self) -> None:
        before = None
        while self._flying and len(self._flying) != before:
            before = len(self._flying)
            self._listen(LOOKS)
        if self._flying:
            self._look()

    def _abandon(self, calls: list[Call], what: str, error: Exception) -> None:
        where = _where(self._app) if what == BROKER else _where_answers_are(self._app)
        left = [call for call in calls if self._flying.pop(call.name, None) is not None]
        for call in left:
            _land(call.future, error=errors.engine_unreachable(what, where, error))
        if what == BROKER:  # the other one may hear yet
            self._take_back(left)

    def _close(self) -> None:
        """Leave nothing open that this thread has opened."""
        backend = self._app.backend
        if not backend.thread_safe:  # else it is all threads'
            with suppress(Exception):
                backend.result_consumer.stop()
            with suppress(Exception):
                backend.client.connection_pool.disconnect()
        connections.close_all()  # a backend may keep its results in Django's database


def _land(future: Future[Any], result: Any = None, *, error: BaseException | None = None) -> None:
    if future.done() or not (future.running() or future.set_running_or_notify_cancel()):
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


BROKER = "Celery's broker, or its result backend,"
BACKEND = "Celery's result backend"
#: What a call comes to of which nobody tells.
SENT = Outcome(Chunk(0, ""), value=[], counts={"sent": 1})


@contextmanager
def executor(**arguments: Any) -> Iterator[CeleryExecutor]:
    """Have an executor over the project's app, for the length of a call.

    :raises EngineUnavailable: broker or result backend do not answer within ``timeout`` seconds.
    """
    setup = Setup(**arguments)
    app = setup.find()
    try:
        made = CeleryExecutor(app, setup)
    except (ImproperlyConfigured, ImportError) as error:
        raise errors.no_result_backend(error) from error
    try:
        made.connect()
        yield made
    finally:
        made.shutdown()


def _where(app: Celery) -> str:
    """Return where the broker is, without its password."""
    try:
        return str(app.connection_for_write().as_uri())
    except Exception:  # of a URL that nobody understands
        return "its broker_url"


def _where_answers_are(app: Celery) -> str:
    try:
        return str(app.backend.as_uri())  # without its password, too
    except Exception:
        return "its result_backend"


def _queue_of(app: Celery) -> str:
    """Return the queue that messages go to where nobody names one: a route may do so, or tell how they come there."""
    route = app.amqp.router.route({}, NAME)
    if (queue := route.get("queue")) is not None:
        return str(getattr(queue, "name", queue))
    key = route.get("routing_key")
    for name, each in app.amqp.queues.items():
        if key is not None and each.routing_key == key:
            return str(name)
    return str(app.amqp.default_queue.name)


#: By broker and queue: how many processes its workers have, and until when that holds.
_numbers: dict[tuple[str, str], tuple[int, float]] = {}


def _number_of(app: Celery, queue: str) -> int:
    where = _where(app), queue
    number, until = _numbers.get(where, (0, 0.0))
    if until < monotonic():
        number = _ask_for_number(app, queue, ASKS_SHORTLY) or _ask_for_number(app, queue, ASKS)
        _numbers[where] = number, monotonic() + (KNOWN if number else 0)
    return number or available_cores()


def _ask_for_number(app: Celery, queue: str, seconds: float) -> int:
    queues = _ask(app, "active_queues", seconds=seconds)
    ours = [worker for worker, known in queues.items() if any(each["name"] == queue for each in known)]
    if not ours:
        return 0
    return sum(int((each.get("pool") or {}).get("max-concurrency", 1)) for each in _ask(app, "stats", ours).values())


def _ask(app: Celery, command: str, workers: list[str] | None = None, *, seconds: float = ASKS) -> dict[str, Any]:
    """Return what workers answer, by their names: those that are named; or all, each of which may take so long."""
    control = _control_of(app)
    # One for each question: over Redis one that has listened goes on for a second before it can do so elsewhere.
    with app.connection_for_write() as connection:
        told = control.broadcast(command, destination=workers, reply=True, timeout=seconds, connection=connection)
    return {worker: answer for each in told or () for worker, answer in each.items()}


def _control_of(app: Celery) -> Control:
    """Return what speaks with workers by the connection that it is given, by JSON, in which not all of them answer.

    The app's own takes one of its pool too, which a forked child shares with its parent.
    """
    control = Control(app)
    control.mailbox.producer_pool = None
    control.mailbox.serializer, control.mailbox.accept = "json", ["json", *app.conf.accept_content]
    return control


def error_of(result: Any) -> BaseException:
    """Return what Celery tells of a task that did not come to an answer."""
    name = type(result).__name__
    if name in ("WorkerLostError", "Terminated", "TaskRevokedError"):
        return errors.WorkerDied(None, None)
    if name == "TimeLimitExceeded":  # the project's task_time_limit
        return errors.ChunkTimedOut(float(result.args[0]))
    if name == "NotRegistered":
        return errors.engine_not_ready("Celery", result)
    return result if isinstance(result, BaseException) else errors.RemoteError(name, str(result))
