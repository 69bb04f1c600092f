"""What comes back from a worker: the chunk, a value or an error, and where the time went."""

from __future__ import annotations

import pickle
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

import cloudpickle

from parallel_orm.chunks import Chunk
from parallel_orm.errors import RemoteError, WorkerTraceback, result_not_picklable


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of one chunk went, in seconds."""

    database: float = 0.0
    function: float = 0.0
    shipping: float = 0.0


@dataclass(frozen=True, slots=True)
class Packed:
    """A value as bytes, pickled where it was made, so that what cannot travel is found beside its chunk."""

    data: bytes

    def open(self) -> Any:
        return pickle.loads(self.data)


def pack(value: Any) -> Packed:
    """Pickle a value: fast if the standard pickle can, with cloudpickle for what ``__main__`` or a closure defines."""
    try:
        return Packed(pickle.dumps(value, pickle.HIGHEST_PROTOCOL))
    except Exception:
        return Packed(cloudpickle.dumps(value, pickle.HIGHEST_PROTOCOL))


@dataclass(frozen=True, slots=True)
class Bare:
    """An exception in its parts, for one whose ``__init__`` takes other arguments than pickle gives it."""

    kind: type[BaseException]
    args: tuple[Any, ...]
    state: dict[str, Any]


def unfold(form: Any) -> Any:
    """Return the exception that was packed, whole or in its parts."""
    if not isinstance(form, Bare):
        return form
    error = form.kind.__new__(form.kind, *form.args)  # which keeps the args
    error.__dict__.update(form.state)
    return error


def alike(arrived: object, error: BaseException) -> bool:
    """Tell whether an exception came through as it was: its type, and its arguments as far as they can be compared."""
    if type(arrived) is not type(error) or not isinstance(arrived, BaseException):
        return False
    pairs = list(zip(arrived.args, error.args, strict=True))
    plain = (str, bytes, int, float, bool, type(None))
    return all(type(there) is type(here) and (not isinstance(here, plain) or there == here) for there, here in pairs)


def note(error: BaseException, text: str) -> None:
    """Add a note of ours, once, to an exception that takes one: a frozen one does not."""
    line = f"parallel_orm: {text}"
    with suppress(Exception):
        if line not in getattr(error, "__notes__", ()):
            error.add_note(line)


@dataclass(frozen=True, slots=True)
class PackedError:
    """An exception on its way home: itself if it can be rebuilt, and in words in any case."""

    error: Packed | None
    type_name: str
    message: str
    traceback: str
    notes: tuple[str, ...]

    def open(self) -> BaseException:
        """Return the exception as it was, or a :class:`RemoteError`; its ``__cause__`` is the worker's traceback."""
        error: BaseException | None = None
        if self.error is not None:
            try:
                error = unfold(self.error.open())
            except Exception:
                error = None
        if not isinstance(error, BaseException):
            error = RemoteError(self.type_name, self.message, self.traceback)
            for note in self.notes:
                error.add_note(note)
        with suppress(Exception):  # a frozen exception is left as it is
            error.__cause__ = WorkerTraceback(self.traceback)
        return error


def pack_error(error: BaseException) -> PackedError:
    """Make an exception ready to travel. Whether it can be rebuilt is tried here: many take other arguments."""
    packed: Packed | None = None
    for form in (error, Bare(type(error), error.args, error.__dict__)):
        with suppress(Exception):
            candidate = pack(form)
            if alike(unfold(candidate.open()), error):
                packed = candidate
                break
    try:
        message = str(error)
    except Exception:
        message = "<its text could not be made>"
    return PackedError(
        error=packed,
        type_name=f"{type(error).__module__}.{type(error).__qualname__}",
        message=message,
        traceback="".join(traceback.format_exception(error)),
        notes=tuple(getattr(error, "__notes__", ())),
    )


class Stopwatch:
    """Adds up seconds by name: ``with stopwatch("database"): ...``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {"database": 0.0, "function": 0.0, "shipping": 0.0}
        self._name, self._began = "", 0.0

    def __call__(self, name: str) -> Stopwatch:
        self._name = name
        return self

    def __enter__(self) -> None:
        self._began = perf_counter()

    def __exit__(self, *exc_info: object) -> None:
        self.seconds[self._name] += perf_counter() - self._began

    @property
    def timings(self) -> Timings:
        return Timings(**self.seconds)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one chunk. What went wrong is in it, not raised."""

    chunk: Chunk
    #: What was made of the chunk; :class:`Packed` while it travels.
    value: Any = None
    #: What went wrong; :class:`PackedError` while it travels.
    error: BaseException | PackedError | None = None
    #: How many rows were read, or, by a function, done.
    rows: int = 0
    #: How many results were left out, as they were None.
    skipped: int = 0
    #: What was left undone of a chunk that has a time.
    rest: Chunk | None = None
    timings: Timings = Timings()
    #: The process and thread that did it.
    worker: str = ""

    def packed(self, made_by: str) -> Outcome:
        """Return it ready for another process; a value that cannot travel becomes an error, which names its maker."""
        if isinstance(self.error, BaseException):
            return replace(self, value=None, error=pack_error(self.error))
        clock = Stopwatch()
        try:
            with clock("shipping"):
                value = pack(self.value)
        except Exception as error:
            refusal = result_not_picklable(made_by, error)
            note(refusal, f"in {self.chunk}")
            return replace(self, value=None, error=pack_error(refusal))
        return replace(self, value=value, timings=replace(self.timings, shipping=clock.seconds["shipping"]))

    def traced(self) -> Outcome:
        """Return it with the worker's traceback as the ``__cause__`` of an error that has none, as from a process."""
        if isinstance(self.error, BaseException) and self.error.__cause__ is None:
            with suppress(Exception):
                self.error.__cause__ = WorkerTraceback("".join(traceback.format_exception(self.error)))
        return self

    def result(self) -> Any:
        """Return the value, or raise the error."""
        if isinstance(self.error, PackedError):
            raise self.error.open()
        if self.error is not None:
            raise self.error
        return self.value.open() if isinstance(self.value, Packed) else self.value


class Landing:
    """Where one outcome arrives, once: what background reads need of a :class:`concurrent.futures.Future`, in a
    fraction of its time.
    """

    __slots__ = ("_callbacks", "_lock", "_outcome")

    def __init__(self) -> None:
        self._outcome: Outcome | None = None
        self._callbacks: list[Callable[[Landing], object]] = []
        self._lock = threading.Lock()

    def done(self) -> bool:
        return self._outcome is not None

    def set_result(self, outcome: Outcome) -> None:
        with self._lock:
            self._outcome = outcome
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(self)

    def add_done_callback(self, callback: Callable[[Landing], object]) -> None:
        """Have this called when the outcome is there: at once if it is, else in the thread that brings it."""
        with self._lock:
            if self._outcome is None:
                self._callbacks.append(callback)
                return
        callback(self)

    def result(self, timeout: float | None = None) -> Outcome:
        """Wait for the outcome, so many seconds at most; then raise ``TimeoutError``."""
        if self._outcome is None:
            arrived = threading.Lock()
            arrived.acquire()
            self.add_done_callback(lambda _: arrived.release())
            seconds = -1 if timeout is None else min(max(timeout, 0), threading.TIMEOUT_MAX)
            if not arrived.acquire(timeout=seconds):
                raise TimeoutError
        assert self._outcome is not None
        return self._outcome
