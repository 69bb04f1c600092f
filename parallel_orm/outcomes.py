"""What comes back from a worker: the chunk, a value or an error, and where the time went."""

from __future__ import annotations

import pickle
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from time import perf_counter, thread_time
from types import MemberDescriptorType
from typing import TYPE_CHECKING, Any

import cloudpickle

from parallel_orm import wire
from parallel_orm.chunks import Chunk, describe_key
from parallel_orm.errors import RemoteError, WorkerTraceback, result_not_picklable

if TYPE_CHECKING:
    from parallel_orm.failures import Failure


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of one chunk went, in seconds."""

    database: float = 0.0
    function: float = 0.0
    shipping: float = 0.0
    #: Of these seconds those in which the thread computed; in the others it waited.
    database_cpu: float = 0.0
    function_cpu: float = 0.0


@dataclass(frozen=True, slots=True)
class Packed:
    """A value as it travels, packed where it was made, so that what cannot travel is found beside its chunk."""

    data: bytes | str

    def open(self) -> Any:
        return wire.read(self.data) if isinstance(self.data, str) else pickle.loads(self.data)


#: Whether what is packed is written down as JSON.
_as_json: ContextVar[bool] = ContextVar("parallel_orm_as_json", default=False)


@contextmanager
def packing(*, as_json: bool) -> Iterator[None]:
    """Within: what is packed is pickled, or is JSON, which knows no functions but by their names."""
    token = _as_json.set(as_json)
    try:
        yield
    finally:
        _as_json.reset(token)


def pack(value: Any) -> Packed:
    """Pickle a value: fast if the standard pickle can, with cloudpickle for what ``__main__`` or a closure defines."""
    if _as_json.get():
        return Packed(wire.written(value))
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
    slots: dict[str, Any]

    @classmethod
    def of(cls, error: BaseException) -> Bare:
        return cls(type(error), error.args, error.__dict__, slots_of(error) | members_of(error))


def unfold(form: Any) -> Any:
    """Return the exception that was packed, whole or in its parts."""
    if not isinstance(form, Bare):
        return form
    error = form.kind.__new__(form.kind, *form.args)  # which keeps the args
    error.__dict__.update(form.state)
    for name, value in form.slots.items():
        object.__setattr__(error, name, value)
    return error


def slots_of(error: BaseException) -> dict[str, Any]:
    """Return what an exception has in ``__slots__``, which pickle leaves behind."""
    state: Any = object.__getstate__(error)
    return state[1] if isinstance(state, tuple) else {}


#: What is compared by value: anything else may see itself otherwise.
_PLAIN = (str, bytes, int, float, bool, type(None))


def members_of(error: BaseException) -> dict[str, Any]:
    """Return what Python's own exceptions have beside their arguments, such as ``StopIteration.value``, if it is plain.

    Their ``__init__`` sets it, which a reducer that a library has given to all exceptions may not call: Dask does that.
    """
    kinds = [kind for kind in type(error).__mro__ if kind.__module__ == "builtins" and kind is not BaseException]
    names = [name for kind in kinds for name, each in vars(kind).items() if isinstance(each, MemberDescriptorType)]
    found = {name: getattr(error, name, None) for name in names}
    return {name: value for name, value in found.items() if value is not None and isinstance(value, _PLAIN)}


def alike(arrived: object, error: BaseException) -> bool:
    """Tell whether an exception came through as it was: its type, and its arguments as far as they can be compared."""
    if type(arrived) is not type(error) or not isinstance(arrived, BaseException):
        return False
    slots, arrived_slots = slots_of(error), slots_of(arrived)
    if slots.keys() != arrived_slots.keys():
        return False
    pairs = [*zip(arrived.args, error.args, strict=True), *((arrived_slots[name], slots[name]) for name in slots)]
    pairs += [(getattr(arrived, name, None), value) for name, value in members_of(error).items()]
    return all(type(there) is type(here) and (not isinstance(here, _PLAIN) or there == here) for there, here in pairs)


@contextmanager
def named(alias: str) -> Iterator[None]:
    """Within: an error says which database it is of."""
    try:
        yield
    except Exception as error:
        note(error, f"on database {alias!r}")
        raise


def note(error: BaseException, text: str) -> None:
    """Add a note of ours, once, to an exception that takes one: a frozen one does not."""
    line = f"parallel_orm: {text}"
    with suppress(Exception):
        if line not in getattr(error, "__notes__", ()):
            error.add_note(line)


def text_of(error: BaseException) -> str:
    """Return the text of an exception, whatever it does to make that."""
    try:
        return str(error)
    except Exception:
        return "<its text could not be made>"


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
    for form in (error, Bare.of(error)):
        with suppress(Exception):
            candidate = pack(form)
            if alike(unfold(candidate.open()), error):
                packed = candidate
                break
    return PackedError(
        error=packed,
        type_name=f"{type(error).__module__}.{type(error).__qualname__}",
        message=text_of(error),
        traceback="".join(traceback.format_exception(error)),
        notes=tuple(getattr(error, "__notes__", ())),
    )


def opened(error: BaseException | PackedError) -> BaseException:
    """Return an exception as the caller finds it, whether it has travelled or not."""
    return error.open() if isinstance(error, PackedError) else error


class Stopwatch:
    """Adds up seconds by name: ``with stopwatch("database"): ...``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {"database": 0.0, "function": 0.0, "shipping": 0.0}
        #: In which this thread computed.
        self.cpu: dict[str, float] = {"database": 0.0, "function": 0.0, "shipping": 0.0}
        #: What it measured last.
        self.stage = ""
        #: The primary key of the row at which it ended, where it did not come to the end.
        self.key: Any = None
        #: Its place in the chunk.
        self.place: int | None = None
        #: Whether what was written up to there is in the database; None: nobody knows.
        self.committed: bool | None = False
        self._began = self._cpu = 0.0

    def __call__(self, name: str) -> Stopwatch:
        self.stage = name
        return self

    def __enter__(self) -> None:
        self._began, self._cpu = perf_counter(), thread_time()

    def __exit__(self, *exc_info: object) -> None:
        self.cpu[self.stage] += thread_time() - self._cpu  # within the seconds, so never more
        self.seconds[self.stage] += perf_counter() - self._began

    @property
    def timings(self) -> Timings:
        return Timings(**self.seconds, database_cpu=self.cpu["database"], function_cpu=self.cpu["function"])


@dataclass(frozen=True, slots=True)
class Failed:
    """A row of a chunk, or a list of rows, that failed while the others went on; on its way home."""

    #: Where its result would be among those of the chunk; None where these have no places.
    place: int | None
    #: Its primary key; of a list of rows a tuple of them; None where rows do not tell.
    key: Any
    #: What was raised; :class:`PackedError` while it travels.
    error: BaseException | PackedError
    #: How many rows these are.
    rows: int = 1
    #: Whether it is in the database all the same; None: nobody knows.
    committed: bool | None = False

    def packed(self) -> Failed:
        return replace(self, error=pack_error(self.error)) if isinstance(self.error, BaseException) else self


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
    #: When it was begun, in seconds since the epoch; 0.0: it was not.
    began: float = 0.0
    #: How far it came: "" (not begun), "database" (reading), "function" (to the end too), "shipping" (its value could
    #: not be packed), or "lost", with its worker.
    stage: str = ""
    #: The primary key of the row whose function raised the error, of a list of rows a tuple of them; None: unknown.
    key: Any = None
    #: Rows, or lists of rows, that failed while the others went on.
    failed: tuple[Failed, ...] = ()
    #: The same as the caller finds them. Made where they have arrived.
    failures: tuple[Failure, ...] = ()
    #: How often something was tried again.
    retries: int = 0
    #: Of a chunk that ended with an error: the place in it of the row that raised.
    failed_place: int | None = None
    #: Of one of writes: whether these are in the database; None: nobody knows.
    committed: bool | None = False
    #: What was counted beside the rows, by name.
    counts: Mapping[str, int] = field(default_factory=dict)
    #: Rows that an earlier run had done.
    done_before: int = 0
    #: The primary key of each result, where one of them may have to be named. Does not travel.
    keys: Sequence[Any] = ()

    def packed(self, made_by: str) -> Outcome:
        """Return it ready for another process; a value that cannot travel becomes an error, which names its maker."""
        clock, failed = Stopwatch(), tuple(each.packed() for each in self.failed)
        if isinstance(self.error, BaseException):
            # What is in the database all the same has a value.
            value = pack(self.value) if self.committed else None
            return replace(self, value=value, error=pack_error(self.error), failed=failed, keys=())
        try:
            with clock("shipping"):
                value = pack(self.value)
        except Exception as error:
            if self.keys:
                return self._without_what_cannot_travel(made_by).packed(made_by)
            refusal = result_not_picklable(made_by, error)
            note(refusal, f"in {self.chunk}")
            return replace(self, value=None, error=pack_error(refusal), stage="shipping")
        timings = replace(self.timings, shipping=clock.seconds["shipping"])
        return replace(self, value=value, failed=failed, timings=timings, keys=())

    def _without_what_cannot_travel(self, made_by: str) -> Outcome:
        """Return it with a failure in the place of each result that cannot be pickled."""
        values, failed = list(self.value), list(self.failed)
        for place, key in enumerate(self.keys):
            try:
                pack(values[place])
            except Exception as error:
                refusal = result_not_picklable(made_by, error)
                note(refusal, f"in {self.chunk}, primary key {describe_key(key)}")
                values[place] = None
                failed.append(Failed(place, key, refusal))
        return replace(self, value=values, failed=tuple(failed), keys=())

    def traced(self) -> Outcome:
        """Return it with the worker's traceback as the ``__cause__`` of an error that has none, as from a process."""
        if isinstance(self.error, BaseException) and self.error.__cause__ is None:
            with suppress(Exception):
                self.error.__cause__ = WorkerTraceback("".join(traceback.format_exception(self.error)))
        return self

    def result(self) -> Any:
        """Return the value, or raise the error."""
        if self.error is not None:
            raise opened(self.error)
        try:
            return self.value.open() if isinstance(self.value, Packed) else self.value
        except Exception as error:
            note(error, f"a result of {self.chunk} could be packed, but not opened here")
            raise


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
