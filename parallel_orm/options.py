"""Every knob, in one frozen value: validated once, filled from ``settings.PARALLEL_ORM``."""

from __future__ import annotations

import multiprocessing
import os
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from inspect import iscoroutinefunction
from math import inf
from typing import Any, Literal

from django.conf import settings
from django.core.signals import setting_changed

from parallel_orm import errors

OnError = Literal["raise", "collect", "skip"]
Progress = bool | Callable[[int, int | None], object] | None
StartMethod = Literal["forkserver", "spawn", "fork"]

#: Executors that are there without being named in the settings.
BUILT_IN = ("inline", "threads", "processes", "dask", "celery")

_VARIABLE = re.compile(r"[A-Za-z_][\w$]*(\.[A-Za-z_][\w$]*)*")

#: The longest timeout: as long as a thread may wait for anything.
MOST_SECONDS = threading.TIMEOUT_MAX
#: Rows a chunk of a map, at first: some tens of milliseconds of Python, so that every core is busy soon and errors are
#: found early, and enough that the cost of a chunk (about a millisecond) does not show much.
MAP_CHUNK_SIZE = 1_000
#: Seconds that a chunk of a map is to take at most. So no worker waits much longer for another at the end of a call,
#: and with fewer seconds there would be little left to be saved.
TARGET_SECONDS = 1.0
#: Rows a chunk of a walk, as in ``QuerySet.iterator()``.
WALK_CHUNK_SIZE = 2_000


def available_cores() -> int:
    """Return how many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows do not tell
        return os.cpu_count() or 1


def default_start_method() -> StartMethod:
    return "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


@dataclass(frozen=True, slots=True)
class Settings:
    """``settings.PARALLEL_ORM``, complete and checked."""

    #: Threads for background reads, in this process; and for a map on threads that does not say how many.
    THREADS: int
    #: Processes for a map that does not say how many.
    PROCESSES: int
    #: How worker processes start.
    START_METHOD: StartMethod
    #: Connections an alias that the threads of this process may hold at once, beside those of the callers; or one
    #: number for each alias. 0: reads run inline.
    CONNECTIONS: int | Mapping[str, int]
    #: Rows a chunk, for calls that do not say; None: the default of the verb.
    CHUNK_SIZE: int | None
    #: Seconds that a chunk of a map is to take at most; None: as long as it takes.
    TARGET_SECONDS: float | None
    #: Variables of a PostgreSQL session that the caller's queries depend on, beside those that it is seen to set. None:
    #: whatever runs SQL that cannot be followed keeps its reads on the caller's connection.
    SESSION_VARIABLES: tuple[str, ...] | None
    #: Executors by name: ``{"BACKEND": a name or a dotted path, "OPTIONS": {...}}`` each.
    EXECUTORS: Mapping[str, Mapping[str, Any]]
    #: Whether the cyclic collector pauses while the rows of a chunk are put into a list.
    PAUSE_GC: bool
    #: Names for sets of aliases, for ``across()``.
    GROUPS: Mapping[str, tuple[str, ...]]
    #: How ``executor="dask"`` finds its cluster, and ``"celery"`` its workers.
    DASK: Mapping[str, Any]
    CELERY: Mapping[str, Any]

    def connections_of(self, alias: str) -> int:
        if isinstance(self.CONNECTIONS, int):
            return self.CONNECTIONS
        return self.CONNECTIONS.get(alias, self.THREADS)


@cache
def from_settings() -> Settings:
    """Read ``settings.PARALLEL_ORM``; raise :class:`~parallel_orm.errors.InvalidOption` naming what is wrong in it."""
    given: Mapping[str, Any] = getattr(settings, "PARALLEL_ORM", {})
    if not isinstance(given, Mapping):
        raise errors.bad_settings(given)
    threads = _number(given, "THREADS", 8, least=1)
    values: dict[str, Any] = {
        "THREADS": threads,
        "PROCESSES": _number(given, "PROCESSES", available_cores(), least=1),
        "START_METHOD": given.get("START_METHOD", default_start_method()),
        "CONNECTIONS": _connections(given, threads),
        "CHUNK_SIZE": given.get("CHUNK_SIZE"),
        "TARGET_SECONDS": given.get("TARGET_SECONDS", TARGET_SECONDS),
        "SESSION_VARIABLES": _variables(given.get("SESSION_VARIABLES")),
        "EXECUTORS": _executors(given.get("EXECUTORS", {})),
        "PAUSE_GC": given.get("PAUSE_GC", True),
        "GROUPS": _groups(given.get("GROUPS", {})),
        **{name: _engine(given, name) for name in ENGINES},
    }
    if unknown := sorted(set(given) - set(values)):
        raise errors.bad_setting(unknown[0], f"is not a setting of this version; there are {', '.join(values)}.")
    if values["START_METHOD"] not in multiprocessing.get_all_start_methods():
        methods = ", ".join(multiprocessing.get_all_start_methods())
        raise errors.bad_setting("START_METHOD", f"is {values['START_METHOD']!r}; this platform has {methods}.")
    if not isinstance(values["PAUSE_GC"], bool):
        raise errors.bad_setting("PAUSE_GC", f"must be True or False, not {values['PAUSE_GC']!r}.")
    if values["CHUNK_SIZE"] is not None:
        _number(given, "CHUNK_SIZE", None, least=1)
    target = values["TARGET_SECONDS"]
    if target is not None and not (isinstance(target, int | float) and target is not True and 0 < target < inf):
        raise errors.bad_setting("TARGET_SECONDS", f"must be a number of seconds above 0, or None, not {target!r}.")
    return Settings(**values)


def _number(given: Mapping[str, Any], name: str, default: int | None, *, least: int) -> Any:
    value = given.get(name, default)
    if not _is_whole(value) or value < least:
        raise errors.bad_setting(name, f"must be a whole number of at least {least}, not {value!r}.")
    return value


def _connections(given: Mapping[str, Any], threads: int) -> int | Mapping[str, int]:
    value = given.get("CONNECTIONS", threads)
    if not isinstance(value, Mapping):
        return int(_number(given, "CONNECTIONS", threads, least=0))
    for alias, number in value.items():
        if alias not in settings.DATABASES:
            raise errors.bad_setting("CONNECTIONS", f"names {alias!r}, which is not in settings.DATABASES.")
        if not _is_whole(number) or number < 0:
            raise errors.bad_setting(
                "CONNECTIONS", f"has {number!r} for {alias!r}, which is no whole number from 0 up."
            )
    return dict(value)


def _groups(value: Any) -> Mapping[str, tuple[str, ...]]:
    if not isinstance(value, Mapping):
        raise errors.bad_setting("GROUPS", f'must be a dictionary such as {{"shards": ["one", "two"]}}, not {value!r}.')
    for name, aliases in value.items():
        if name == "all" or name in settings.DATABASES:
            raise errors.bad_setting("GROUPS", f"must not give the name {name!r} another meaning.")
        if isinstance(aliases, str) or not isinstance(aliases, Iterable) or not list(aliases):
            raise errors.bad_setting("GROUPS", f"has {aliases!r} for {name!r}, which is no list of aliases.")
        for alias in aliases:
            if alias not in settings.DATABASES:
                raise errors.bad_setting("GROUPS", f"names {alias!r}, which is not in settings.DATABASES.")
        if len(set(aliases)) != len(list(aliases)):
            raise errors.bad_setting("GROUPS", f"has a database twice in {name!r}: its rows would count twice.")
    return {name: tuple(aliases) for name, aliases in value.items()}


def _variables(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    names = [] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else [value]
    if isinstance(value, str) or not all(isinstance(name, str) and _VARIABLE.fullmatch(name) for name in names):
        raise errors.bad_setting(
            "SESSION_VARIABLES", f"must be a list of names such as 'app.tenant' or 'search_path', not {value!r}."
        )
    return tuple(name.lower() for name in names)


def _executors(value: Any) -> Mapping[str, Mapping[str, Any]]:
    if not isinstance(value, Mapping):
        raise errors.bad_setting("EXECUTORS", f"must be a dictionary, not {value!r}.")
    for name, executor in value.items():
        if not (
            isinstance(executor, Mapping)
            and isinstance(executor.get("BACKEND"), str)
            and isinstance(executor.get("OPTIONS", {}), Mapping)
            and set(executor) <= {"BACKEND", "OPTIONS"}
        ):
            raise errors.bad_setting(
                "EXECUTORS",
                f'has {executor!r} for {name!r}, which is not {{"BACKEND": "a name or a dotted path", '
                '"OPTIONS": {...}}.',
            )
        if name in BUILT_IN:
            raise errors.bad_setting("EXECUTORS", f"must not give the name {name!r} another meaning.")
        if (backend := executor["BACKEND"]) in ("inline", "threads", "processes"):
            for option, number in executor.get("OPTIONS", {}).items():
                if option != backend or backend == "inline" or not _is_whole(number) or number < 1:
                    raise errors.bad_setting(
                        "EXECUTORS",
                        f"has OPTIONS for {name!r} that {backend!r} does not know, which takes "
                        + ("none." if backend == "inline" else f'{{"{backend}": a whole number from 1}}.'),
                    )
        elif backend in ("dask", "celery"):
            known = {key.lower(): kinds for key, kinds in ENGINES[backend.upper()].items()}
            _refuse_unknown(executor.get("OPTIONS", {}), known, "EXECUTORS", f" in the OPTIONS of {name!r}")
    return dict(value)


#: The settings of each engine, and what a value of each must be.
ENGINES: Mapping[str, Mapping[str, type[Any] | tuple[type[Any], ...]]] = {
    "DASK": {"ADDRESS": str, "TIMEOUT": (int, float), "PATIENCE": (int, float)},
    "CELERY": {
        "APP": str,
        "QUEUE": str,
        "PICKLE": bool,
        "TIMEOUT": (int, float),
        "PATIENCE": (int, float),
        "MOST_BYTES": int,
    },
}


def _engine(given: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = given.get(name, {})
    if not isinstance(value, Mapping):
        raise errors.bad_setting(name, f"must be a dictionary, not {value!r}.")
    _refuse_unknown(value, ENGINES[name], name)
    return dict(value)


def _refuse_unknown(
    value: Mapping[str, Any], known: Mapping[str, type[Any] | tuple[type[Any], ...]], setting: str, where: str = ""
) -> None:
    for key, each in value.items():
        if key not in known:
            raise errors.bad_setting(setting, f"has {key!r}{where}; there are {', '.join(known)}.")
        if not isinstance(each, known[key]) or (isinstance(each, bool) and known[key] is not bool):
            raise errors.bad_setting(setting, f"has {each!r} for {key!r}{where}, which is of the wrong type.")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _forget(*, setting: str, **_: object) -> None:
    if setting == "PARALLEL_ORM":
        from_settings.cache_clear()


setting_changed.connect(_forget, dispatch_uid="parallel_orm.options")


@dataclass(frozen=True, slots=True)
class Options:
    """What one call was asked for. None means: the default."""

    chunk_size: int | None = None
    processes: int | None = None
    threads: int | None = None
    ordered: bool = True
    progress: Progress = None
    consistent: bool = False
    batched: bool = False
    skip_none: bool = False
    #: A name, a dotted path, or a :class:`concurrent.futures.Executor`.
    executor: Any = None
    on_error: OnError = "raise"
    max_failures: int | None = None
    retries: int = 0
    timeout: float | None = None
    init_hook: Callable[[Any], Any] | None = None
    end_hook: Callable[[Any], Any] | None = None
    keys: bool = False

    def __post_init__(self) -> None:
        for name in ("chunk_size", "processes", "threads"):
            value = getattr(self, name)
            if value is not None and not (_is_whole(value) and value >= 1):
                raise errors.not_an_integer(name, value)
        for name in ("consistent", "batched", "skip_none", "keys", "ordered"):
            if not isinstance(value := getattr(self, name), bool):
                raise errors.not_a_bool(name, value)
        if self.processes is not None and self.threads is not None:
            raise errors.both_kinds_of_workers()
        if not (self.progress is None or isinstance(self.progress, bool) or callable(self.progress)):
            raise errors.bad_progress(self.progress)
        if self.on_error not in ("raise", "collect", "skip"):
            raise errors.bad_on_error(self.on_error)
        for name in ("retries", "max_failures"):
            value = getattr(self, name)
            if not (_is_whole(value) and value >= 0) and (value is not None or name == "retries"):
                raise errors.bad_number_of(name, value)
        if self.max_failures is not None and self.on_error == "raise":
            raise errors.max_failures_of_none()
        seconds = self.timeout
        if seconds is not None and not (_is_number(seconds) and 0 < seconds <= MOST_SECONDS):
            raise errors.bad_chunk_timeout(seconds)
        for name in ("init_hook", "end_hook"):
            hook = getattr(self, name)
            if hook is not None and (not callable(hook) or iscoroutinefunction(hook)):
                raise errors.bad_hook(name, hook)

    @property
    def has_chunk_size(self) -> bool:
        """Whether somebody said how many rows a chunk is to have."""
        return (self.chunk_size or from_settings().CHUNK_SIZE) is not None

    def rows_per_chunk(self, default: int) -> int:
        return min(self.chunk_size or from_settings().CHUNK_SIZE or default, 2**63 - 1)  # the most a LIMIT can be
