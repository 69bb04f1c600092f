"""What a map gives back: a list, or a stream, with the report of how it was made."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterable, Iterator
from typing import Any, Generic, Self, TypeVar

from parallel_orm.report import Report

Result = TypeVar("Result")


class Stream(Iterator[Result]):
    """The results of a map as they come, with the ``report`` of how they were made so far.

    To be used by one thread, to its end or ``with``: left half-way it sees to the end what is under way, by
    :meth:`close`, at the end of a ``with`` block, or when nobody holds it any more.
    """

    def __init__(self, results: Generator[Result], report: Report) -> None:
        self._results, self.report = results, report

    def __next__(self) -> Result:
        return next(self._results)

    def close(self) -> None:
        """Begin nothing else, and wait for what is under way."""
        self._results.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class AsyncStream(AsyncIterator[Result]):
    """The same for ``async for`` and ``async with``."""

    def __init__(self, results: AsyncGenerator[Result], report: Report) -> None:
        self._results, self.report = results, report

    async def __anext__(self) -> Result:
        return await anext(self._results)

    async def aclose(self) -> None:
        """Begin nothing else, and wait for what is under way."""
        await self._results.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()


class Results(list[Result], Generic[Result]):
    """The results of a map: a list, with the ``report`` of how they were made."""

    report: Report

    def __init__(self, results: Iterable[Any], report: Report) -> None:
        super().__init__(results)
        self.report = report

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (list(self), self.report)
