"""A function in the transaction of a ``TestCase``, where a worker would have none."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from django.db import Error, connections, transaction


def kept_apart(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a function that does the same, and whose database error does not end the test's transaction.

    A savepoint is put before each call, which takes back what it wrote if that is how it ends; any other exception
    leaves what was written, as in a worker.
    """

    def call(item: Any) -> Any:
        with ExitStack() as savepoints:
            for connection in connections.all(initialized_only=True):
                if connection.in_atomic_block:
                    savepoint = transaction.atomic(using=connection.alias)
                    savepoint._from_testcase = True  # type: ignore[attr-defined]  # so that it allows a durable one
                    savepoints.enter_context(savepoint)
            try:
                return function(item)
            except Error:
                raise
            except Exception as error:
                raised = error
        raise raised

    return call
