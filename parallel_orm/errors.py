"""Every exception that the library raises of its own.

    ParallelORMError
    ├── InvalidOption          ValueError, TypeError   a knob or a setting has a value that cannot be used
    ├── UnsupportedQuerySet    NotSupportedError       this queryset cannot be cut truthfully
    ├── TransactionRefused     TransactionManagementError   a worker could not see this transaction
    ├── SessionNotRestored     OperationalError        a worker's connection cannot be given the caller's session
    ├── NotARead               NotSupportedError       a background read would do more than read, and cannot be left
    ├── Cancelled              CancelledError          the query was cancelled before its answer came
    ├── DeadlineExceeded       TimeoutError            the time that a start was given is over
    ├── UnknownAlias           ConnectionDoesNotExist  no such database in ``settings.DATABASES``
    ├── BadItem                TypeError, ValueError   an item, or what a function made of it, cannot be written
    ├── RunRefused             RuntimeError            a run cannot be begun again as it was
    ├── ConnectionMisused      InterfaceError          a ParallelConnection or its cursor cannot do this now
    ├── UnequalResults         ProgrammingError        several connections answered with different columns
    ├── MissingExtra           ImportError             an optional package is not installed
    ├── NotPicklable           PicklingError           a function or a result cannot travel
    ├── WorkerDied             RuntimeError            a worker process ended in the middle of a chunk
    ├── ChunkTimedOut          TimeoutError            a chunk took longer than the ``timeout=`` of its call
    ├── EngineUnavailable      ConnectionError         an engine does not answer, or nobody does its work
    ├── AnotherWorld           RuntimeError            a worker of an engine has another code, settings or database
    ├── NotSealed              BadSignature            a message was not written by this project
    ├── TooManyFailures        RuntimeError            more rows failed than ``max_failures=`` allows
    ├── NoWorker               RuntimeError            ``current_worker()`` outside of what a worker runs
    └── RemoteError            RuntimeError            an exception of a worker that cannot be rebuilt here

Each has a familiar second parent, so that ``except`` clauses written for Django or for the standard library go on
working. What a user's own function raises keeps its own type and is none of these.
"""

from __future__ import annotations

import pickle
import signal
from collections.abc import Mapping
from concurrent.futures import CancelledError
from typing import Any

from django.core.signing import BadSignature
from django.db import InterfaceError, NotSupportedError, OperationalError, ProgrammingError
from django.db.transaction import TransactionManagementError
from django.utils.connection import ConnectionDoesNotExist


class ParallelORMError(Exception):
    """The base of all that the library raises of its own."""


class InvalidOption(ParallelORMError, ValueError, TypeError):
    """A knob or a setting has a value that cannot be used; the message names it, and what can."""


class UnsupportedQuerySet(ParallelORMError, NotSupportedError):
    """The queryset cannot be cut into chunks whose union is the queryset; the message says what to do instead."""


class TransactionRefused(ParallelORMError, TransactionManagementError):
    """The call stands in a transaction whose writes a worker could not see."""


class SessionNotRestored(ParallelORMError, OperationalError):
    """What was set by SQL on the caller's connection cannot be had on a worker's; so the work stays, or is refused."""


class NotARead(ParallelORMError, NotSupportedError):
    """A background read was about to execute what may do more than read, and nobody is there to do it in its place."""


class Cancelled(ParallelORMError, CancelledError):
    """A query that was started in the background was cancelled before its answer came."""


class DeadlineExceeded(ParallelORMError, TimeoutError):
    """A query that was started in the background had no answer within the ``timeout=`` of its start."""


class UnknownAlias(ParallelORMError, ConnectionDoesNotExist):
    """The queryset names a database that ``settings.DATABASES`` does not have."""


class MissingExtra(ParallelORMError, ImportError):
    """An optional package is needed; the message says which extra brings it."""


class BadItem(ParallelORMError, TypeError, ValueError):
    """An item, or what a function of the user's made of it or of a row, cannot be written; says what can."""


class RunRefused(ParallelORMError, RuntimeError):
    """A call with a ``run_id`` cannot be made, or not be made again, as it was; says why."""


class ConnectionMisused(ParallelORMError, InterfaceError):
    """A ``ParallelConnection``, or a cursor of it, was asked for something that it cannot do now."""


class UnequalResults(ParallelORMError, ProgrammingError):
    """The connections of a ``ParallelConnection`` answered with different columns."""


class NotPicklable(ParallelORMError, pickle.PicklingError):
    """A function cannot be sent to a worker process, or a result cannot be sent back."""


class WorkerDied(ParallelORMError, RuntimeError):
    """A worker process ended before it could answer.

    ``pid`` is the process, ``exitcode`` what it left as :class:`multiprocessing.Process` counts it (negative for a
    signal, None if unknown), ``chunk`` the chunk that it was working on.
    """

    def __init__(self, pid: int | None, exitcode: int | None, chunk: Any = None, of: str = "") -> None:
        self.pid, self.exitcode, self.chunk, self.of = pid, exitcode, chunk, of
        super().__init__(self._message())

    def _message(self) -> str:
        what = f"{self.chunk} of {self.of}" if self.chunk is not None else "a task"
        process = "A worker process" if self.pid is None else f"The worker process {self.pid}"
        return (
            f"{process} ended ({describe_exit(self.exitcode)}) while it worked on {what}. "
            "What the function had done for that chunk until then is done; its results are lost. A process that is "
            "killed from outside was most often out of memory: use a smaller chunk_size= or fewer processes=."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.pid, self.exitcode, self.chunk, self.of)


class ChunkTimedOut(ParallelORMError, TimeoutError):
    """A chunk took longer than the ``timeout=`` of its call; its query was cancelled, or its worker process killed.

    ``seconds`` is the time that it had, ``chunk`` the chunk.
    """

    def __init__(self, seconds: float, chunk: Any = None, of: str = "") -> None:
        self.seconds, self.chunk, self.of = seconds, chunk, of
        what = f"{chunk} of {of}" if chunk is not None else "A task"
        super().__init__(
            f"{what[0].upper()}{what[1:]} took longer than its timeout of {seconds} seconds, so its query was "
            "cancelled, or its worker process killed. What the function had done for that chunk until then is done; "
            "its results are lost. Use a smaller chunk_size=, or a longer timeout=."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.seconds, self.chunk, self.of), self.__dict__


class EngineUnavailable(ParallelORMError, ConnectionError):
    """Dask or Celery cannot be reached, or takes tasks and does none of them; the message says what to look at."""


class AnotherWorld(ParallelORMError, RuntimeError):
    """A worker of an engine is not what the caller is, so it has not touched the chunk.

    ``host`` is its machine, ``differences`` what is not alike, a line each.
    """

    def __init__(self, host: str, differences: list[str]) -> None:
        self.host, self.differences = host, differences
        super().__init__(
            f"A worker on {host} would not do the same as this process, so it was given nothing to do: "
            f"{'; '.join(differences)}. Deploy the same code and settings to both, let them reach the same database, "
            "and start the workers anew."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.host, self.differences), self.__dict__


class NotSealed(ParallelORMError, BadSignature):
    """A message for a worker, or an answer of one, has no seal of this project's ``SECRET_KEY``: it was not opened."""


class TooManyFailures(ParallelORMError, RuntimeError):
    """More rows failed than ``max_failures=`` allows. Its ``__cause__`` is what the last one raised."""


class NoWorker(ParallelORMError, RuntimeError):
    """``current_worker()`` was called outside of a function that a parallel call runs."""


class RemoteError(ParallelORMError, RuntimeError):
    """An exception of a worker that could not be rebuilt in this process.

    ``type_name`` is the dotted name of its class, ``message`` its text, ``traceback`` the worker's traceback.
    """

    def __init__(self, type_name: str, message: str, traceback: str = "") -> None:
        self.type_name, self.message, self.traceback = type_name, message, traceback
        super().__init__(f"{type_name}: {message}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.type_name, self.message, self.traceback), self.__dict__


class WorkerTraceback(Exception):
    """The traceback of a worker as text: the ``__cause__`` of an exception that came from another process."""

    def __init__(self, text: str) -> None:
        self.text = text
        super().__init__(text)

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'


def is_of_a_worker(error: BaseException) -> bool:
    """Tell whether it was raised by a function in a worker; a ``KeyboardInterrupt`` then is not the user's Ctrl-C."""
    return isinstance(error.__cause__, WorkerTraceback)


def describe_exit(exitcode: int | None) -> str:
    """Put an exit code in words: ``killed by SIGKILL``, ``exit code 3``."""
    if exitcode is None:
        return "exit code unknown"
    if exitcode < 0:
        try:
            return f"killed by {signal.Signals(-exitcode).name}"
        except ValueError:
            return f"killed by signal {-exitcode}"
    return f"exit code {exitcode}"


# The refusals. Each message holds what happened, with the values, and the next step.


def not_an_integer(name: str, value: object) -> InvalidOption:
    return InvalidOption(f"{name} must be a whole number of at least 1, or None for the default, not {value!r}.")


def not_a_bool(name: str, value: object) -> InvalidOption:
    return InvalidOption(f"{name} must be True or False, not {value!r}.")


def not_callable(value: object) -> InvalidOption:
    return InvalidOption(f"The function must be a plain callable of one row, not {value!r}.")


def cannot_start(value: object) -> InvalidOption:
    what = f"a {type(value).__name__}"
    if hasattr(value, "model"):
        what += f" of {value.model._meta.label}, whose manager is no ParallelManager"
    return InvalidOption(f"start() takes querysets that can start_fetch(), not {what}.")


def not_a_queryset(caller: str, value: object) -> InvalidOption:
    return InvalidOption(f"{caller}() takes a queryset or a manager, not a {type(value).__name__}.")


def both_kinds_of_workers() -> InvalidOption:
    return InvalidOption("Give processes= or threads=, not both: a map runs on one kind of worker.")


def bad_on_error(value: object) -> InvalidOption:
    return InvalidOption(f'on_error must be "raise", "collect" or "skip", not {value!r}.')


def bad_number_of(name: str, value: object) -> InvalidOption:
    return InvalidOption(f"{name} must be a whole number of at least 0, not {value!r}.")


def max_failures_of_none() -> InvalidOption:
    return InvalidOption(
        'max_failures= goes with on_error="collect" or "skip"; with "raise" the first one ends the call.'
    )


def failures_have_no_place(verb: str) -> InvalidOption:
    return InvalidOption(f'{verb}() has no place for a Failure: on_error must be "raise" or "skip".')


def too_many_failures(failed: int, most: int) -> TooManyFailures:
    return TooManyFailures(
        f"{failed} rows have failed, and max_failures={most} allows no more; report_of() this exception has them all."
    )


def bad_chunk_timeout(value: object) -> InvalidOption:
    return InvalidOption(f"timeout must be a number of seconds above 0 for each chunk, or None, not {value!r}.")


def bad_hook(name: str, value: object) -> InvalidOption:
    return InvalidOption(f"{name} must be a plain callable of one Worker, not {value!r}.")


def no_worker() -> NoWorker:
    return NoWorker(
        "current_worker() is for functions while a parallel call runs them, and nothing of the kind is running here. "
        "To test such a function by itself, give it what it needs as an argument."
    )


def cannot_do(knob: str, executor: str, instead: str) -> InvalidOption:
    return InvalidOption(f"{knob}= cannot be had with {executor}: {instead}")


def bad_executor(value: object, problem: str) -> InvalidOption:
    return InvalidOption(f"executor={value!r} {problem}")


def no_querysets(verb: str, value: object) -> InvalidOption:
    return InvalidOption(
        f"{verb}() takes an iterable of querysets, whose rows it takes as one; not {type(value).__name__} in it, or "
        f"instead of it. For a single queryset call its own {verb}()."
    )


def nothing_to_retry(why: str) -> ParallelORMError:
    return ParallelORMError(f"report.retry() cannot run what failed: {why}")


def bad_progress(value: object) -> InvalidOption:
    return InvalidOption(f"progress must be True, False, None or a callable (done_rows, total_rows), not {value!r}.")


def bad_settings(value: object) -> InvalidOption:
    return InvalidOption(f"settings.PARALLEL_ORM must be a dictionary, not {value!r}.")


def bad_setting(name: str, problem: str) -> InvalidOption:
    return InvalidOption(f"settings.PARALLEL_ORM[{name!r}] {problem}")


def unknown_alias(alias: str, known: list[str]) -> UnknownAlias:
    return UnknownAlias(f"There is no database {alias!r} in settings.DATABASES; there are {', '.join(sorted(known))}.")


def no_alias(value: object) -> InvalidOption:
    return InvalidOption(f"across() takes the names of databases, or of groups of them, not {value!r}.")


def no_aliases(names: object, model: str) -> InvalidOption:
    if not names:
        return InvalidOption('across() was given no database. Name them, or a group of GROUPS, or "all".')
    return InvalidOption(f"across{names!r} is no database: by the routers, none has {model}.")


def alias_twice(aliases: list[str]) -> InvalidOption:
    return InvalidOption(f"across() was given {', '.join(map(repr, aliases))} twice: its rows would count twice.")


def several_vendors(vendors: dict[str, str]) -> InvalidOption:
    told = ", ".join(f"{alias!r} is {vendor}" for alias, vendor in vendors.items())
    return InvalidOption(
        f"across() needs databases of one kind, as others sort and compute otherwise: {told}. Ask each by using(alias)."
    )


def order_of_several(verb: str) -> InvalidOption:
    return InvalidOption(
        f"{verb}() of several querysets keeps the order of each, and one of these is over several databases, whose "
        "results would have to be merged by it. Call it for that one alone, or give ordered=False."
    )


def run_of_several(verb: str) -> InvalidOption:
    return InvalidOption(
        f"{verb}() over several databases takes no run_id=: a run is recorded in one database, with its rows. Make one "
        "call for each, by using(alias)."
    )


def missing_tqdm() -> MissingExtra:
    return MissingExtra(
        "progress=True draws its bar with tqdm, which is not installed: "
        "pip install 'django-parallel-orm[progress]', or give progress= a callable (done_rows, total_rows)."
    )


def unsupported(verb: str, model: str, problem: str, instead: str) -> UnsupportedQuerySet:
    return UnsupportedQuerySet(f"{verb}() cannot serve this queryset of {model}: {problem}. {instead}")


def no_snapshot(verb: str, alias: str, vendor: str) -> UnsupportedQuerySet:
    return UnsupportedQuerySet(
        f"{verb}(consistent=True) needs a snapshot that several connections can read. PostgreSQL has them; "
        f"{alias!r} is {vendor}. Leave consistent=True out, or loop over iterator()."
    )


def refused_in_transaction(verb: str, alias: str, why: str) -> TransactionRefused:
    return TransactionRefused(
        f"{verb}() was called in a transaction on {alias!r} {why}. Its workers have connections of their own and "
        "would not see what this transaction sees. Call it before the transaction or after its commit, or loop over "
        "chunked_iterator(), which stays on this connection."
    )


def left_a_transaction(function: str) -> TransactionRefused:
    return TransactionRefused(
        f"{function} has left a transaction open on its worker's connection, which is rolled back: what it has written "
        "there is lost. Write within `with atomic():`, or commit."
    )


def refused_in_session(verb: str, alias: str) -> SessionNotRestored:
    return SessionNotRestored(
        f"{verb}() was called on {alias!r} after SQL that changed the session of this connection in a way that its "
        "workers cannot be given (a temporary table, a lock, a variable that nobody can list). Name what they need in "
        "settings.PARALLEL_ORM['SESSION_VARIABLES'] (PostgreSQL), or loop over chunked_iterator()."
    )


def bad_timeout(value: object) -> InvalidOption:
    return InvalidOption(f"timeout must be a number of seconds above 0, or None for no deadline, not {value!r}.")


def deadline_exceeded(seconds: float) -> DeadlineExceeded:
    return DeadlineExceeded(f"No answer within {seconds} seconds of its start; the query was cancelled.")


def not_a_read(alias: str, statement: str | None) -> NotARead:
    return NotARead(
        f"A background read on {alias!r} was about to execute what may do more than read: {statement or 'unknown'}. It "
        "is left to the connection of its start, which is in another transaction, has another tenant or belongs to "
        "another thread by now. Use the result where it was started, or query without a start."
    )


def cancelled(why: str) -> Cancelled:
    return Cancelled(f"The query was cancelled {why}.")


def taken_back() -> Cancelled:
    return Cancelled("The caller has given this chunk up before it was begun, so it is not begun any more.")


def function_not_picklable(function: object, error: BaseException) -> NotPicklable:
    return NotPicklable(
        f"{function!r} cannot be sent to a worker process: {type(error).__name__}: {error}. Whatever it closes over "
        "travels with it; locks, connections, sockets and generators cannot. Make them inside the function, or "
        "use threads= instead of processes=."
    )


def queryset_not_picklable(model: str, error: BaseException) -> NotPicklable:
    return NotPicklable(
        f"This queryset of {model} cannot be sent to a worker process: {type(error).__name__}: {error}. Filter by "
        "plain values, or use threads= instead of processes=."
    )


def result_not_picklable(function: str, error: BaseException) -> NotPicklable:
    return NotPicklable(
        f"A result of {function} cannot be sent back from its worker process: {type(error).__name__}: {error}. "
        "Return plain data (numbers, strings, lists, dictionaries), or use threads= instead of processes=."
    )


def function_cannot_travel(function: object, engine: str, error: BaseException, *, by_value: bool) -> NotPicklable:
    return NotPicklable(
        f"{_name(function)} cannot be sent to {engine}: {error}. " + (_BY_VALUE if by_value else _BY_NAME)
    )


#: What to do where functions travel by their names, and where by value.
_BY_NAME = (
    "Its messages are JSON: define the function at the top of a module that the workers can import, or set "
    'PARALLEL_ORM["CELERY"]["PICKLE"] = True for functions that travel as pickles, sealed by SECRET_KEY.'
)
_BY_VALUE = "What it closes over travels with it; locks, connections and sockets cannot. Make them inside the function."


def queryset_cannot_travel(model: str, engine: str, error: BaseException) -> NotPicklable:
    return NotPicklable(
        f"This queryset of {model} cannot be sent to {engine}: {type(error).__name__}: {error}. Filter by plain values."
    )


def not_sealed() -> NotSealed:
    return NotSealed(
        "A message of parallel_orm has no seal of this project, so it is not opened: caller and workers must have the "
        "same SECRET_KEY, or have each other's among SECRET_KEY_FALLBACKS. If so, somebody else writes to your broker "
        "or scheduler."
    )


def worker_without_settings() -> EngineUnavailable:
    return EngineUnavailable(
        "This worker has no Django settings: start it with DJANGO_SETTINGS_MODULE in its environment."
    )


def missing_engine(name: str, error: ImportError) -> MissingExtra:
    return MissingExtra(f'executor="{name}" needs: pip install "django-parallel-orm[{name}]" ({error}).')


def engine_unreachable(engine: str, where: str, error: BaseException) -> EngineUnavailable:
    return EngineUnavailable(f"{engine} does not answer at {where}: {type(error).__name__}: {error}. Is it running?")


def no_result_backend(error: Exception) -> EngineUnavailable:
    return EngineUnavailable(
        f"Celery's result backend cannot be used: {type(error).__name__}: {error}. Look at result_backend of the app."
    )


def no_celery_app() -> InvalidOption:
    return InvalidOption(
        'executor="celery" finds no Celery app of this project: import it in the __init__.py beside your settings, as '
        'Celery\'s documentation says, or name it: PARALLEL_ORM["CELERY"] = {"APP": "project.celery.app"}.'
    )


def nobody_consumes(queue: str, seconds: float, *, stays: bool) -> EngineUnavailable:
    left = (
        " The messages that were sent stay there, and whoever takes them does what they say: purge the queue before "
        "you call again."
    )
    return EngineUnavailable(
        f"Nobody has taken anything from Celery's queue {queue!r} for {seconds:g} seconds, and no worker says that it "
        f"does: start one by `celery -A project worker -Q {queue}`, or name another queue in "
        f"PARALLEL_ORM['CELERY']['QUEUE'].{left if stays else ''}"
    )


def no_dask_workers(where: str, seconds: float, asked: Mapping[str, object]) -> EngineUnavailable:
    given = ", ".join(f"{key}={value!r}" for key, value in asked.items())
    such = f" that get_executor({given}) allows" if asked else ""
    return EngineUnavailable(
        f"Dask's scheduler at {where} has had no worker for {seconds:g} seconds{such}: start some by "
        f"`dask worker {where}`{', or ask for others' if asked else ''}. "
        'Of a cluster that needs longer to begin some, say so: PARALLEL_ORM["DASK"]["PATIENCE"].'
    )


def message_lost(queue: str, seconds: float) -> WorkerDied:
    error = WorkerDied(None, None)
    error.add_note(
        f"parallel_orm: for {seconds:g} seconds nothing was heard of it: it is not in Celery's queue {queue!r}, and "
        "no worker says that it has it. Its message was lost, or its worker, or that does not answer while it works (a "
        "solo pool): raise PARALLEL_ORM['CELERY']['PATIENCE'] then."
    )
    return error


def no_pickles_here() -> InvalidOption:
    return InvalidOption(
        'A message is a pickle, and this worker takes none: set PARALLEL_ORM["CELERY"]["PICKLE"] = True in its '
        "settings, too."
    )


def answer_too_large(size: int, most: int) -> NotPicklable:
    return NotPicklable(
        f"The results of a chunk are {size:,} characters, and no more than {most:,} are sent through Celery: use a "
        "smaller chunk_size=, have the function store what is large, or raise "
        'PARALLEL_ORM["CELERY"]["MOST_BYTES"].'
    )


def no_answers() -> InvalidOption:
    return InvalidOption(
        "This needs what the workers answer, and this Celery app has no result backend: set one (result_backend), or "
        "use parallel_each(), which then sends its chunks and hears no more of them."
    )


def engine_lost(what: str) -> EngineUnavailable:
    return EngineUnavailable(f"{what} went away, or has cancelled what it had. Is it running still?")


def engine_not_ready(engine: str, error: BaseException) -> EngineUnavailable:
    return EngineUnavailable(
        f"The workers of {engine} could not be made ready: {type(error).__name__}: {error}. They need parallel_orm, "
        "Django and your project's code, and DJANGO_SETTINGS_MODULE in their environment."
    )


def _name(function: object) -> str:
    return getattr(function, "__qualname__", None) or repr(function)


def made_something_else(make: object, value: object, model: Any) -> BadItem:
    returned = "None" if value is None else f"an object of type {type(value).__qualname__}"
    return BadItem(
        f"{_name(make)}() returned {returned}. make= must return an instance of {model._meta.label}: it is saved, "
        "unless make= has saved it itself."
    )


def already_saved(instance: Any) -> BadItem:
    return BadItem(
        f"The item is {instance._meta.label} with the primary key {instance.pk!r}, which was saved before. "
        "parallel_create() makes new rows: take parallel_update() for rows that are there."
    )


def not_an_item(item: object, model: Any) -> BadItem:
    return BadItem(
        f"The item is an object of type {type(item).__qualname__}, neither an instance of {model._meta.label} nor a "
        "dictionary of its values. Give make= a function that makes an instance of it."
    )


def not_items(verb: str, value: object) -> InvalidOption:
    return InvalidOption(f"{verb}() takes an iterable of items, not {type(value).__qualname__}.")


def lacks_unique_fields(names: list[str]) -> BadItem:
    return BadItem(f"The item has no value for {', '.join(map(repr, names))}, which unique_fields= names.")


def no_such_field(name: object, model: Any) -> InvalidOption:
    return InvalidOption(f"{model._meta.label} has no field {name!r}.")


def not_a_column(name: str, model: Any) -> InvalidOption:
    return InvalidOption(
        f"The field {name!r} of {model._meta.label} cannot be updated: it is its primary key, generated, or no column."
    )


def changed_nothing(function: object, result: object) -> BadItem:
    return BadItem(
        f"{_name(function)}() returned an object of type {type(result).__qualname__}. It must change the row and "
        "return nothing, or return a dictionary of what is to be changed."
    )


def key_changed(before: object, after: object) -> BadItem:
    return BadItem(
        f"The primary key of the row was changed from {before!r} to {after!r}: saving it would write another row. "
        "Create that one, and delete this one."
    )


def bad_mode(value: object) -> InvalidOption:
    return InvalidOption(f'mode must be "save" or "bulk", not {value!r}.')


def bad_fields(value: object) -> InvalidOption:
    return InvalidOption(f"fields must be a list of names, such as [{value!r}], not one name.")


def bad_unique_fields(value: object) -> InvalidOption:
    return InvalidOption(f"unique_fields must be a list of the names of fields, not {value!r}.")


def saves_alone(verb: str) -> InvalidOption:
    return InvalidOption(f"{verb}() knows neither mode= nor full_clean=: Django does each row in its one way.")


def bad_run_id(value: object) -> InvalidOption:
    return InvalidOption(f"run_id must be a text of 1 to 200 characters, not {value!r}.")


def many_to_many_manager(verb: str) -> InvalidOption:
    return InvalidOption(
        f"{verb}() cannot be called on the manager of a many-to-many relation. Create the rows by the model's own "
        "manager, with the relation in each dictionary or set in make=."
    )


def writes_in_transaction(verb: str, alias: str) -> TransactionRefused:
    return TransactionRefused(
        f"{verb}() was called in a transaction on {alias!r}. Its workers write on connections of their own: they would "
        "wait for what this transaction has locked while it waits for them, which no database can see, and what they "
        'commit stays when it is rolled back. Call it outside of atomic(), or give executor="inline" to have all of it '
        "written here, in this transaction."
    )


def spoiled_transaction() -> TransactionRefused:
    return TransactionRefused(
        "A database error was caught in what saving this row called, a receiver or save() itself, and has spoiled the "
        "transaction of its chunk. Wrap what may fail there in transaction.atomic()."
    )


def undone_within() -> TransactionRefused:
    return TransactionRefused(
        "The database has ended the transaction of this chunk in the middle, and what saving a row called, a receiver "
        "or save() itself, went on: it caught the error of a deadlock, or ran a statement that commits. Let such "
        "errors pass, or wrap what may fail in transaction.atomic()."
    )


def no_tables_for_runs(alias: str) -> RunRefused:
    return RunRefused(
        f"run_id= needs its tables on {alias!r}. Add 'parallel_orm' to INSTALLED_APPS and run "
        f"manage.py migrate parallel_orm --database={alias}."
    )


def another_run(run_id: str, what: str) -> RunRefused:
    return RunRefused(f"The run_id {run_id!r} is that of {what}. Give this call one of its own.")


def run_is_under_way(run_id: str) -> RunRefused:
    return RunRefused(
        f"The run {run_id!r} is under way in another process. Wait for it, or give this call another run_id."
    )


def failed_in_lost_worker() -> RunRefused:
    return RunRefused(
        "The row failed in a worker that was lost before it could say why. Make the call again with the same run_id: "
        "it does such rows again."
    )


def other_items(run_id: str, number: int, stop: int) -> RunRefused:
    return RunRefused(
        f"The run {run_id!r} had {stop} items or more, and there are only {number} now. Give it the same items in the "
        "same order."
    )


def run_needs_ranges(verb: str, label: str, why: str) -> RunRefused:
    return RunRefused(
        f"{verb}() of {label} cannot have a run_id: its rows are not cut by primary key ({why}). Drop the slice or the "
        "union."
    )


def key_cannot_be_written(value: object) -> RunRefused:
    return RunRefused(f"run_id= cannot write down a primary key of type {type(value).__qualname__}.")


def item_not_picklable(place: int, item: object, error: BaseException) -> NotPicklable:
    return NotPicklable(
        f"Item {place}, {type(item).__qualname__}, cannot travel to a worker process "
        f"({type(error).__name__}: {error}). Give plain values, and let make= "
        "build what cannot be pickled; or take threads=."
    )


def file_does_not_travel(place: int, field: str) -> NotPicklable:
    return NotPicklable(
        f"The file {field!r} of item {place} is not saved yet, and its content would not travel with the instance. Let "
        "make= open it in the worker, or take threads=."
    )


def left_in_parent(label: str) -> ParallelORMError:
    return ParallelORMError(
        f"This process was forked while results of {label} were under way, whose workers are the parent's. Take the "
        "results in the parent, or begin in the child."
    )


def daemon_has_no_children() -> ParallelORMError:
    return ParallelORMError(
        "This process is a daemonic multiprocessing worker, which may have no child processes. Use threads=, or start "
        "it with daemon=False."
    )


# --- Several connections as one -----------------------------------------------------------


def no_connections() -> InvalidOption:
    return InvalidOption("ParallelConnection() was given no connections.")


def no_connection(value: object) -> InvalidOption:
    return InvalidOption(
        f"{type(value).__qualname__} is no connection: give an alias of settings.DATABASES, a PEP 249 connection, or a "
        "pool with getconn() and putconn()."
    )


def connection_twice(value: object) -> InvalidOption:
    name = repr(value) if isinstance(value, str) else type(value).__qualname__
    return InvalidOption(f"The connection {name} was given twice: its rows would come twice.")


def bound_to_its_thread() -> InvalidOption:
    return InvalidOption(
        "This SQLite connection can be used by the thread alone that made it. Make it with check_same_thread=False, or "
        "give an alias."
    )


def no_connection_left(alias: str) -> ConnectionMisused:
    return ConnectionMisused(
        f"settings.PARALLEL_ORM['CONNECTIONS'] allows no more connections to {alias!r} now. Close what is not needed, "
        "or allow more."
    )


def no_such_connection(index: object, number: int) -> InvalidOption:
    return InvalidOption(f"execute_on= names the connection {index!r}; there are 0 to {number - 1}.")


def args_twice() -> InvalidOption:
    return InvalidOption("Give args, for all connections, or execute_on=, for each of some.")


def connection_closed() -> ConnectionMisused:
    return ConnectionMisused("The ParallelConnection is closed.")


def cursor_closed() -> ConnectionMisused:
    return ConnectionMisused("The cursor is closed.")


def rows_to_come() -> ConnectionMisused:
    return ConnectionMisused(
        "A cursor with itersize= has rows to come, and its driver would give them up for this: fetch them, or close it."
    )


def connection_in_use() -> ConnectionMisused:
    return ConnectionMisused("Another thread is using this ParallelConnection: give each thread one of its own.")


def nothing_to_fetch() -> ConnectionMisused:
    return ConnectionMisused("There are no rows to fetch: nothing was executed, or what was returns none.")


def unequal_results(first: str, names: object, other: str, others: object) -> UnequalResults:
    return UnequalResults(f"The connection {first} answered with the columns {names}, and {other} with {others}.")


def rollback_of_a_test(alias: str) -> TransactionRefused:
    return TransactionRefused(
        f"The connection to {alias!r} is that of a TestCase, whose transaction this would end. Use a "
        "TransactionTestCase."
    )
