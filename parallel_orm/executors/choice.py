"""Which executor a call uses, and what that can do."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

from django.utils.module_loading import import_string

from parallel_orm import errors
from parallel_orm.options import Options, available_cores, from_settings

Kind = Literal["inline", "threads", "processes", "engine", "given"]
KINDS = ("inline", "threads", "processes")
#: Engines, whose workers somebody else starts: the modules that have an ``executor()`` of theirs.
ENGINES = {"dask": "parallel_orm.executors.dask", "celery": "parallel_orm.executors.celery"}

#: The last of these is what all calls use instead of what they ask for. Empty outside of tests.
overrides: list[Any] = []


@dataclass(frozen=True, slots=True)
class Choice:
    """An executor that was chosen, and is there for the length of a call."""

    kind: Kind
    #: How many tasks it works on at once.
    number: int
    #: What it is called in messages.
    name: str
    #: An executor, or what makes one.
    source: Any = None
    #: What it is made with.
    arguments: Mapping[str, Any] = field(default_factory=dict)
    #: Whether it is made for the call, and closed with it. What was given stays open.
    is_made: bool = False
    #: Whether it has threads of this process.
    is_threads: bool = False

    @property
    def is_ours(self) -> bool:
        """Whether its workers are there for this call, as many as it has: not an engine's, nor a given one's."""
        return self.kind in KINDS

    @property
    def supports_timeout(self) -> bool:
        """Whether a chunk that takes too long can be ended."""
        return self.kind == "processes"

    @property
    def supports_end_hook(self) -> bool:
        """Whether each worker can be told that a call has ended."""
        return self.is_ours or self.is_threads

    @contextmanager
    def executor(self, *, waits: bool = False) -> Iterator[Any]:
        """Have the executor; of an engine, whether what it was given is waited for, whatever happens."""
        if self.kind == "engine":
            with self.source.executor(**self.arguments, waits=waits) as executor:
                yield executor
            return
        if not self.is_made:
            yield self.source
            return
        executor, process = self.source(**self.arguments), os.getpid()
        refuse_without_submit(executor, self.name)
        try:
            yield executor
        finally:
            if hasattr(executor, "shutdown") and os.getpid() == process:  # else it is the parent's
                executor.shutdown()


def choose(options: Options) -> Choice:
    """Return the executor that a call is to use, by its options and the settings; refuse what it cannot do."""
    choice = _choose(options, overrides[-1] if overrides else options.executor)
    if options.timeout is not None and not choice.supports_timeout and choice.kind != "inline" and not overrides:
        raise errors.cannot_do(
            "timeout", choice.name, 'what it runs cannot be ended from outside. Use executor="processes".'
        )
    if options.end_hook is not None and not choice.supports_end_hook:
        raise errors.cannot_do(
            "end_hook",
            choice.name,
            "there is no way to reach each of its processes once. Return from the function what you need, or use "
            'executor="processes".',
        )
    return choice


def _choose(options: Options, executor: Any) -> Choice:
    if executor is None:
        executor = "processes" if options.threads is None else "threads"
    arguments: Mapping[str, Any] = {}
    name = repr(executor) if not isinstance(executor, str) else f"executor={executor!r}"
    if isinstance(executor, str):
        if executor not in (*KINDS, *ENGINES):
            executor, arguments = _find(executor)
        if isinstance(executor, str):
            chosen = _of_engine if executor in ENGINES else _built_in
            return chosen(executor, options, arguments, name)
    if any(each.__module__.partition(".")[0] == "distributed" for each in type(executor).__mro__):
        return _of_engine("dask", options, {"client": executor}, name)
    is_made = not hasattr(executor, "submit") or isinstance(executor, type)
    if is_made and not callable(executor):
        raise errors.bad_executor(executor, "is no concurrent.futures.Executor: it has no submit().")
    return Choice(
        "given",
        _number_of(executor, options, arguments),
        name,
        executor,
        arguments,
        is_made,
        isinstance(executor, ThreadPoolExecutor)
        or (isinstance(executor, type) and issubclass(executor, ThreadPoolExecutor)),
    )


def _built_in(kind: str, options: Options, arguments: Mapping[str, Any], name: str) -> Choice:
    known = from_settings()
    if kind == "inline":
        return Choice("inline", 1, name)
    if kind == "threads":
        number = options.threads or options.processes or arguments.get("threads") or known.THREADS
        return Choice("threads", number, name, is_threads=True)
    if options.threads is not None and not overrides:
        raise errors.bad_executor(kind, "has no threads: give processes= how many, or nothing.")
    return Choice(
        "processes", options.processes or options.threads or arguments.get("processes") or known.PROCESSES, name
    )


def _of_engine(kind: str, options: Options, arguments: Mapping[str, Any], name: str) -> Choice:
    if options.threads is not None and not overrides:
        raise errors.bad_executor(kind, "has workers of its own: give processes= how many, or nothing.")
    known = {key.lower(): value for key, value in getattr(from_settings(), kind.upper()).items()}
    engine = import_module(ENGINES[kind])
    return Choice(
        "engine",
        options.processes or available_cores(),
        name,
        engine,
        {"number": options.processes, **known, **arguments},
    )


def _find(name: str) -> tuple[Any, Mapping[str, Any]]:
    """Return what a name of the settings, or a dotted path, stands for, and what it is made with."""
    named = from_settings().EXECUTORS
    if name in named:
        backend, arguments = named[name]["BACKEND"], named[name].get("OPTIONS", {})
        if backend in KINDS or backend in ENGINES:
            return backend, arguments
        return _import(backend, f"settings.PARALLEL_ORM['EXECUTORS'][{name!r}]"), arguments
    if "." not in name:
        known = ", ".join(map(repr, (*KINDS, *ENGINES, *named)))
        raise errors.bad_executor(name, f"is no executor that is known here; there are {known}, or give a dotted path.")
    return _import(name, "executor"), {}


def _import(path: str, where: str) -> Any:
    try:
        found = import_string(path)
    except ImportError as error:
        raise errors.bad_executor(path, f"cannot be imported ({where}): {error}") from error
    if not callable(found) and not hasattr(found, "submit"):
        raise errors.bad_executor(path, f"is neither an executor nor makes one ({where}).")
    return found


def _number_of(executor: Any, options: Options, arguments: Mapping[str, Any]) -> int:
    said = options.processes or options.threads or arguments.get("max_workers")
    known = said or getattr(executor, "_max_workers", None) or getattr(executor, "num_workers", None)
    return known if isinstance(known, int) and known > 0 else available_cores()


def refuse_without_submit(executor: Any, name: str) -> None:
    if not callable(getattr(executor, "submit", None)):
        raise errors.bad_executor(name, f"made {executor!r}, which is no concurrent.futures.Executor.")
