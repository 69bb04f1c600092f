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
    ├── MissingExtra           ImportError             an optional package is not installed
    ├── NotPicklable           PicklingError           a function or a result cannot travel
    ├── WorkerDied             RuntimeError            a worker process ended in the middle of a chunk
    └── RemoteError            RuntimeError            an exception of a worker that cannot be rebuilt here

Each has a familiar second parent, so that ``except`` clauses written for Django or for the standard library go on
working. What a user's own function raises keeps its own type and is none of these.
"""

from __future__ import annotations

import pickle
import signal
from concurrent.futures import CancelledError
from typing import Any

from django.db import NotSupportedError, OperationalError
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
        return (
            f"The worker process {self.pid} ended ({describe_exit(self.exitcode)}) while it worked on {what}. "
            "What the function had done for that chunk until then is done; its results are lost. A process that is "
            "killed from outside was most often out of memory: use a smaller chunk_size= or fewer processes=."
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.pid, self.exitcode, self.chunk, self.of)


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


def both_kinds_of_workers() -> InvalidOption:
    return InvalidOption("Give processes= or threads=, not both: a map runs on one kind of worker.")


def bad_progress(value: object) -> InvalidOption:
    return InvalidOption(f"progress must be True, False, None or a callable (done_rows, total_rows), not {value!r}.")


def bad_settings(value: object) -> InvalidOption:
    return InvalidOption(f"settings.PARALLEL_ORM must be a dictionary, not {value!r}.")


def bad_setting(name: str, problem: str) -> InvalidOption:
    return InvalidOption(f"settings.PARALLEL_ORM[{name!r}] {problem}")


def unknown_alias(alias: str, known: list[str]) -> UnknownAlias:
    return UnknownAlias(f"There is no database {alias!r} in settings.DATABASES; there are {', '.join(sorted(known))}.")


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
