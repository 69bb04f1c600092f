"""The caller's neighbourhood: what a worker must find as the caller had it.

Captured where a call is made, carried with its tasks, restored around each of them. A thread gets a copy of the
caller's context (so every ``ContextVar``, the active language and time zone). A process gets Django's settings as they
are resolved now (a test database and ``override_settings`` among them), language and time zone; of a caller's own
``ContextVar`` it sees the default.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import Context, copy_context
from dataclasses import dataclass
from datetime import tzinfo
from typing import Any, TypeVar

from django.conf import Settings, UserSettingsHolder, global_settings, settings
from django.db import connections
from django.utils import timezone, translation

Result = TypeVar("Result")

#: What went wrong when this process, or the server that forked it, set Django up.
failed_before: BaseException | None = None


@dataclass(frozen=True, slots=True)
class World:
    """What a fresh process needs to become a Django process like the caller's."""

    #: ``DJANGO_SETTINGS_MODULE``; None where the caller used ``settings.configure()``.
    module: str | None
    #: What ``settings.configure()`` was given.
    configured: dict[str, Any]
    #: Where modules are found.
    path: tuple[str, ...]

    @classmethod
    def of_caller(cls) -> World:
        base = _holders()[-1]
        path = tuple(sys.path)
        return cls(base.SETTINGS_MODULE, {}, path) if isinstance(base, Settings) else cls(None, _values(base), path)

    def enter(self) -> None:
        """Set Django up in this process, once."""
        import django  # nothing of Django may be imported before its settings are known
        from django.apps import apps

        if failed_before is not None:
            raise failed_before
        sys.path += [entry for entry in self.path if entry not in sys.path]
        if not settings.configured:
            if self.module is None:
                settings.configure(**self.configured)
            else:
                os.environ["DJANGO_SETTINGS_MODULE"] = self.module
        if not apps.ready:
            django.setup()
            connections.close_all()  # an AppConfig.ready() may have asked its database something


def _holders() -> list[Any]:
    """Return what the settings are stacked from: overrides first, the settings module or ``configure()`` last."""
    settings.DATABASES  # noqa: B018 - makes the lazy settings be there
    lazy: Any = settings
    holders: list[Any] = [lazy._wrapped]
    while isinstance(holders[-1], UserSettingsHolder) and isinstance(
        holders[-1].default_settings, (UserSettingsHolder, Settings)
    ):
        holders.append(holders[-1].default_settings)
    return holders


def _values(holder: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(holder).items() if name.isupper()}


def _assigned(base: Any) -> dict[str, Any]:
    """Return what was assigned to the settings since they were read, as Django's test runner does."""
    if not isinstance(base, Settings):
        return {}
    module = sys.modules.get(str(base.SETTINGS_MODULE))
    read = {name: getattr(module, name, getattr(global_settings, name, None)) for name in _values(base)}
    return {name: value for name, value in _values(base).items() if value is not read[name] and value != read[name]}


@contextmanager
def _assigning(values: dict[str, Any]) -> Iterator[None]:
    """Assign to the settings as they were read, and take it back."""
    base = vars(_holders()[-1])
    before = dict(base)

    def become(state: dict[str, Any]) -> None:
        base.clear()
        base.update(state)
        for name in values:
            vars(settings).pop(name, None)  # where the lazy settings keep what they were asked for

    become(before | values)
    try:
        yield
    finally:
        become(before)


@dataclass(frozen=True, slots=True)
class Changes:
    """How the settings of this process differ from those that another one would read."""

    #: Django's databases as they are resolved: a test has others than its settings say.
    databases: dict[str, dict[str, Any]]
    #: Settings that were assigned since they were read, as Django's test runner does.
    assigned: dict[str, Any]
    #: Settings that ``override_settings`` laid over them.
    overrides: dict[str, Any]

    @classmethod
    def of_caller(cls) -> Changes:
        *holders, base = _holders()
        overrides: dict[str, Any] = {}
        for holder in reversed(holders):
            overrides |= _values(holder)
        overrides.pop("DATABASES", None)
        return cls(connections.settings, _assigned(base), overrides)

    @contextmanager
    def made(self) -> Iterator[None]:
        """Have them in this process."""
        with ExitStack() as stack:
            if self.assigned:
                stack.enter_context(_assigning(self.assigned))
            if self.overrides:
                from django.test.utils import override_settings  # only where a test overrides some

                stack.enter_context(override_settings(**self.overrides))
            for alias, theirs in self.databases.items():
                ours = connections.settings.setdefault(alias, theirs)
                if ours != theirs:
                    # In place, as Django's test runner does: a connection that was opened before is then not reused.
                    ours.clear()
                    ours.update(theirs)
            yield


def _same(one: Context, other: Context) -> bool:
    """Tell whether two contexts hold the same objects. (``==`` would compare these, however their classes see it.)"""
    return len(one) == len(other) and all(one.get(variable, other) is value for variable, value in other.items())


class Capsule:
    """The caller's context, and in it all that is the caller's: its language, its time zone, every ``ContextVar``."""

    __slots__ = ("context", "thread")

    def __init__(self) -> None:
        self.context = copy_context()
        #: The thread it was captured in.
        self.thread = threading.get_ident()

    def __reduce__(self) -> tuple[Any, ...]:
        # A context cannot be pickled. A call packs its job before it returns, so what holds now is what held then.
        return Locale, (translation.get_language(), timezone.get_current_timezone(), Changes.of_caller())

    def run(self, function: Callable[..., Result], *args: Any) -> Result:
        """Call ``function`` in the caller's neighbourhood, in any thread of its process."""
        if threading.get_ident() != self.thread:
            return self.context.copy().run(self._run_elsewhere, function, args)
        if _same(copy_context(), self.context):
            return function(*args)
        return self.context.copy().run(function, *args)

    def _run_elsewhere(self, function: Callable[..., Result], args: tuple[Any, ...]) -> Result:
        here = threading.get_ident()
        for variable, value in self.context.items():
            # The state of an asgiref.local.Local is tagged with its thread, so that no other sees it by accident.
            if type(value).__module__ == "asgiref.local" and getattr(value, "thread_id", None) == self.thread:
                variable.set(type(value)(here, dict(value.data)))
        return function(*args)


@dataclass(frozen=True, slots=True)
class Locale:
    """What becomes of a capsule in another process: the caller's language, time zone and settings."""

    language: str | None
    time_zone: tzinfo | None
    changes: Changes

    @classmethod
    def without_settings(cls) -> Locale:
        """Return that of the caller, for a process that has settings of its own, as no secret is to travel there."""
        return cls(translation.get_language(), timezone.get_current_timezone(), Changes({}, {}, {}))

    def run(self, function: Callable[..., Result], *args: Any) -> Result:
        """Call ``function`` in the caller's neighbourhood."""
        with self.changes.made(), timezone.override(self.time_zone), translation.override(self.language):
            return function(*args)
