"""What happened: rows, chunks, times, workers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, Generic, Self, TypeVar

from parallel_orm.outcomes import Outcome

Result = TypeVar("Result")


@dataclass
class Report:
    """What one call did. Seconds of the workers are added up, so that they may be more than ``seconds``."""

    #: Rows read.
    rows: int = 0
    #: Chunks that came back; one that came apart counts as its parts.
    chunks: int = 0
    #: Rows whose function returned.
    succeeded: int = 0
    #: Results that were None, and left out.
    skipped: int = 0
    #: From the call to its end, as the caller waited.
    seconds: float = 0.0
    #: In the workers: reading rows, running the function, packing results.
    database_seconds: float = 0.0
    function_seconds: float = 0.0
    shipping_seconds: float = 0.0
    #: Rows by database.
    by_alias: dict[str, int] = field(default_factory=dict)
    #: Rows by worker, as "process id/thread".
    workers: dict[str, int] = field(default_factory=dict)
    #: Why the call ran in the caller's process ("testcase", "memory", "nested"), or None.
    reason: str | None = None

    @property
    def rows_per_second(self) -> float:
        """Rows by the seconds that the caller waited."""
        return self.rows / self.seconds if self.seconds else 0.0

    def watch(self, outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
        """Yield the outcomes as they are, and write down what they tell."""
        began = perf_counter()
        for outcome in outcomes:
            self.chunks += 1
            if outcome.error is None:
                self.rows += outcome.rows
                self.succeeded += outcome.rows
                self.skipped += outcome.skipped
                alias = outcome.chunk.alias
                self.by_alias[alias] = self.by_alias.get(alias, 0) + outcome.rows
                self.workers[outcome.worker] = self.workers.get(outcome.worker, 0) + outcome.rows
            self.database_seconds += outcome.timings.database
            self.function_seconds += outcome.timings.function
            self.shipping_seconds += outcome.timings.shipping
            self.seconds = perf_counter() - began
            yield outcome

    def __str__(self) -> str:
        where = "" if self.reason is None else f", in the caller's process ({self.reason})"
        return (
            f"{self.rows:,} rows in {self.chunks:,} chunks, {self.seconds:.2f} s ({self.rows_per_second:,.0f} rows/s), "
            f"{len(self.workers)} workers{where}; in the workers {self.database_seconds:.2f} s database, "
            f"{self.function_seconds:.2f} s function, {self.shipping_seconds:.2f} s packing results"
        )


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
