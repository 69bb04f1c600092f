"""A failure: what the caller finds of a row that failed."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from parallel_orm.chunks import Chunk
from parallel_orm.outcomes import Failed, PackedError, pack_error, text_of


@dataclass(slots=True)
class Failure:
    """A row that failed, or a list of rows where ``batched``; in its place in the results, and in ``report.errors``."""

    #: Its place in the ordered results, those that were skipped counted; None where there is no order, or the call
    #: ended before it was known.
    index: int | None
    #: The primary key of the row, of a list a tuple of them; None where rows do not tell, or the chunk was lost.
    key: Any
    #: The item of a create; else None: rows do not travel.
    value: Any
    #: What was raised, of its own type, with a note that names the row; from a process as it could be rebuilt here.
    error: BaseException
    #: The traceback of the worker.
    traceback: str
    #: The chunk that it is of.
    chunk: Chunk
    #: Whether it is all of the chunk, which was lost, or not read, and ended the call.
    is_chunk: bool = False
    #: Of a write: whether it is in the database; None: nobody knows, as the worker or the connection was lost.
    committed: bool | None = False

    @classmethod
    def of(cls, failed: Failed, chunk: Chunk, *, is_chunk: bool = False) -> Failure:
        error = failed.error
        if isinstance(error, PackedError):
            raised, told = error.open(), error.traceback
        else:
            raised, told = error, "".join(traceback.format_exception(error))
        return cls(None, failed.key, None, raised, told, chunk.light, is_chunk, failed.committed)

    def __reduce__(self) -> tuple[Callable[..., Failure], tuple[Any, ...]]:
        # Not every exception can be pickled, so it travels as those of workers do.
        error = pack_error(self.error)
        return _rebuild, (self.index, self.key, self.value, error, self.traceback, self.chunk, self.is_chunk)

    def __str__(self) -> str:
        row = f"{self.chunk}" if self.key is None else f"primary key {self.key!r}"
        return f"{row}: {message_of(self.error)}"


def message_of(error: BaseException) -> str:
    """Return type and text of an exception; whatever becomes of making its text."""
    return f"{type(error).__name__}: {text_of(error)}"


def _rebuild(index: int | None, key: Any, value: Any, error: PackedError, *others: Any) -> Failure:
    return Failure(index, key, value, error.open(), *others)
