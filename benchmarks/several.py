"""The same SQL on four connections: one after another, threads of one's own, and ``ParallelConnection``."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack, closing
from typing import Any

from django.db import connections

from benchmarks.measure import alternate, show, timed, typical
from parallel_orm import ParallelConnection

NUMBER = 4


def run(databases: dict[str, str], *, rounds: int | None, rows: int | None) -> None:
    alias, rounds = next(iter(databases)), rounds or 7
    wrapper: Any = connections[alias]
    slow = {"postgresql": "SELECT pg_sleep(0.05)", "mysql": "SELECT SLEEP(0.05)"}.get(wrapper.vendor)
    with ExitStack() as stack:
        parameters = wrapper.get_connection_params()
        if wrapper.vendor == "sqlite":
            parameters |= {"check_same_thread": False}
        opened = [stack.enter_context(closing(wrapper.Database.connect(**parameters))) for _ in range(NUMBER)]
        several = stack.enter_context(closing(ParallelConnection(opened)))

        def ask(connection: Any, query: str) -> Any:
            with closing(connection.cursor()) as cursor:
                cursor.execute(query)
                return cursor.fetchall()

        def one_by_one(query: str) -> list[Any]:
            return [row for connection in opened for row in ask(connection, query)]

        def in_threads(query: str) -> list[Any]:
            found: dict[int, Any] = {}
            threads = [
                threading.Thread(target=lambda place=place: found.update({place: ask(opened[place], query)}))
                for place in range(NUMBER)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return [row for place in range(NUMBER) for row in found[place]]

        def ways(query: str, times: int) -> dict[str, Callable[[], float]]:
            return {
                "on one of them": typical(timed(lambda: ask(opened[0], query)), times),
                "one after another": typical(timed(lambda: one_by_one(query)), times),
                "a thread each, for each call": typical(timed(lambda: in_threads(query)), times),
                "ParallelConnection": typical(timed(lambda: several.execute(query).fetchall()), times),
            }

        if slow is not None:
            taken = alternate(ways(slow, 1), rounds)
            show(f"A query of 50 ms on {NUMBER} connections, {alias}", taken, ["on one of them", "one after another"])
        taken = alternate(ways("SELECT 1", 200), rounds)
        show(f"A trivial query on {NUMBER} connections, {alias}", taken, ["one after another"])
