"""Faults that a test injects: called by whoever begins a chunk, wherever that is."""

from __future__ import annotations

from collections.abc import Callable

from parallel_orm.chunks import Chunk

#: Called with each chunk that is begun; raises, or does not return. It travels with the tasks of a call.
Fault = Callable[[Chunk], None]

#: Those of calls that are made now. Empty outside of tests; see :mod:`parallel_orm.testing`.
active: list[Fault] = []
