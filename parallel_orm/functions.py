"""What functions do that are not known here: told by the server that has them.

A function may write, and the caller's transaction would not have what it wrote on another connection. PostgreSQL,
MariaDB and MySQL know what their functions were declared to do. Those of SQLite that are not its own are Python's, and
as good in one connection as in another, where that has them.
"""

from __future__ import annotations

from time import monotonic
from typing import Any

from django.db.backends.base.base import BaseDatabaseWrapper

#: Seconds for which an answer is taken to hold: functions are seldom made, and more seldom made anew.
LASTS = 60.0

#: Of an alias and a function: whether it only reads, and until when that holds.
_known: dict[tuple[str, str], tuple[bool, float]] = {}

_QUESTIONS = {
    # Of all that have the name, as nothing tells which is meant. Who is volatile may write; the others cannot.
    "postgresql": "SELECT proname, bool_and(provolatile <> 'v') FROM pg_proc WHERE proname IN ({}) GROUP BY proname",
    # What is no stored function is a built-in one.
    "mysql": "SELECT lower(routine_name), min(sql_data_access IN ('NO SQL', 'READS SQL DATA'))"
    " FROM information_schema.routines"
    " WHERE routine_type = 'FUNCTION' AND routine_name IN ({}) GROUP BY 1",
}


def only_read(wrapper: BaseDatabaseWrapper, names: frozenset[str]) -> bool:
    """Tell whether functions, lower case, do nothing but read; asks the server about once a minute for each.

    A name stands for all that have it, in whatever schema. On the driver's own cursor, as it is no query of the user's.
    False also where the server does not say.
    """
    if wrapper.vendor == "sqlite":
        return True
    now = monotonic()
    asked = [name for name in names if _known.get((wrapper.alias, name), (False, 0.0))[1] < now]
    if asked:
        try:
            found = _ask(wrapper, asked)
        except Exception:  # a transaction that failed, a connection that died: the query itself will tell
            return False
        for name in asked:
            verdict = found.get(_bare(name), wrapper.vendor == "mysql")
            _known[wrapper.alias, name] = verdict, now + LASTS
    return all(_known[wrapper.alias, name][0] for name in names)


def _ask(wrapper: Any, names: list[str]) -> dict[str, bool]:
    question = _QUESTIONS[wrapper.vendor]
    wrapper.ensure_connection()
    with wrapper.connection.cursor() as cursor:
        cursor.execute(question.format(", ".join(["%s"] * len(names))), [*map(_bare, names)])
        return {name: bool(only_reads) for name, only_reads in cursor.fetchall()}


def _bare(name: str) -> str:
    """Return a name without the schema that it may be given with."""
    return name.rpartition(".")[2]
