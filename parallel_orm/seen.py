"""Seen: what ran in the background appears among the caller's own queries when it is consumed."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper

from parallel_orm.watch import Said, watch_of

_logger = logging.getLogger("django.db.backends")


def is_watched(wrapper: BaseDatabaseWrapper) -> bool:
    """Tell whether anybody captures the queries of this connection."""
    return wrapper.queries_logged or getattr(wrapper, "_djdt_logger", None) is not None


def show(statements: Iterable[Said], wrapper: BaseDatabaseWrapper) -> None:
    """Enter statements where the caller's own are entered: ``connection.queries``, the logger, the debug toolbar.

    As Django does for its own cursors: only while ``DEBUG`` is on or somebody captures queries. Of a worker's
    connection they are part of the read that it runs, and shown with that.
    """
    reading = watch_of(wrapper).reading
    if reading is not None:
        reading.said += statements
        return
    panel = getattr(wrapper, "_djdt_logger", None)
    for said in statements:
        if wrapper.queries_logged:
            _enter(said, wrapper)
        if panel is not None and _is_here(wrapper):
            with suppress(Exception):  # a panel that changed must not break the page that it is on
                _enter_in_panel(said, wrapper, panel)


def _is_here(wrapper: Any) -> bool:
    return bool(wrapper._thread_ident == threading.get_ident())


def _enter(said: Said, wrapper: BaseDatabaseWrapper) -> None:
    sql = _as_sent(said, wrapper)
    times = len(said.params) if said.many and hasattr(said.params, "__len__") else "?"
    shown = f"{times} times: {sql}" if said.many else sql
    wrapper.queries_log.append({"sql": shown, "time": f"{said.seconds:.3f}"})
    _logger.debug(
        "(%.3f) %s; args=%s; alias=%s",
        said.seconds,
        sql,
        said.params,
        wrapper.alias,
        extra={"duration": said.seconds, "sql": sql, "params": said.params, "alias": wrapper.alias},
    )


def _as_sent(said: Said, wrapper: BaseDatabaseWrapper) -> Any:
    """Return the statement with its parameters, as Django would tell it of a cursor of this connection."""
    if said.many:
        return said.sql
    query = SimpleNamespace(query=said.sent)
    cursor: Any = SimpleNamespace(query=said.sent, _query=query, _executed=said.sent)
    try:
        if said.sent is None and wrapper.vendor != "mysql" and _is_here(wrapper):
            wrapper.ensure_connection()  # which puts the parameters in
        return wrapper.ops.last_executed_query(cursor, said.sql, said.params)
    except Exception:  # the caller's connection may be closed, or belong to another thread
        return said.sql


class _Timed:
    """A panel of django-debug-toolbar, told of the time that a query took and not of that of its entry."""

    def __init__(self, panel: Any, said: Said, sql: Any) -> None:
        self._panel, self._said, self._sql = panel, said, sql

    def record(self, **entry: Any) -> None:
        self._panel.record(**entry | {"duration": self._said.seconds * 1000, "sql": self._sql})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._panel, name)


def _enter_in_panel(said: Said, wrapper: Any, panel: Any) -> None:
    # The toolbar's own cursor makes the entry, around a statement that is not executed.
    with wrapper.cursor() as cursor:
        sql = _as_sent(said, wrapper)
        cursor.logger = _Timed(panel, said, sql)
        cursor._last_executed_query = lambda *_: sql
        cursor._record(lambda *_: None, said.sql, said.params)
