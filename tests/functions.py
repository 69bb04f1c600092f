"""Functions that worker processes find by name."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

from django.conf import settings
from django.db import connections
from django.utils import timezone, translation

from parallel_orm import ParallelQuerySet
from parallel_orm.connections import lender
from tests.testapp.models import Article


def name_and_key(row: Any) -> tuple[str, int]:
    return row.name, row.pk


def pid(row: Any) -> int:
    return os.getpid()


def key(row: Any) -> Any:
    return row.pk


def rank(row: Any) -> int:
    return int(row.rank)


def fail_on_three(row: Any) -> int:
    if row.rank == 3:
        raise ValueError(f"rank three: {row.name}")
    return row.rank


def die_on_three(row: Any) -> int:
    if row.rank == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return row.rank


def leave_on_three(row: Any) -> int:
    if row.rank == 3:
        os._exit(7)
    return row.rank


def neighbourhood(row: Any) -> tuple[str | None, str]:
    return translation.get_language(), str(timezone.get_current_timezone())


def inherited_connections(row: Any) -> list[str]:
    """The connections of this process that were opened for somebody else: all but the one it reads with."""
    return [w.alias for w in connections.all(initialized_only=True) if w.alias != row._state.db]


def kept_connections() -> int:
    """The connections that this worker keeps open between calls."""
    return sum(map(len, lender._idle.values()))


def count_nested(row: Any) -> int:
    """A map within a map."""
    return len(Article.objects.using(row._state.db).parallel_map(pid, 2))


class Strange(Exception):
    """Cannot be pickled at all."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")
        self.lock = threading.Lock()


def raise_strange(row: Any) -> None:
    raise Strange("this", "that")


class Doubled(Exception):
    """Makes its text of its argument, which is then no longer its argument."""

    def __init__(self, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


class Demanding(Exception):
    """Cannot be made of its args alone."""

    def __init__(self, *, needed: str) -> None:
        super().__init__("demanding")
        self.needed = needed


def raise_doubled(row: Any) -> None:
    raise Doubled(3)


def raise_demanding(row: Any) -> None:
    raise Demanding(needed="x")


def interrupt(row: Any) -> None:
    raise KeyboardInterrupt


def queryset(row: Any) -> Any:
    return Article.objects.using(row._state.db).filter(pk=row.pk)


def email_backend(row: Any) -> str:
    return str(settings.EMAIL_BACKEND)


def raise_missing(row: Any) -> None:
    Article.objects.using(row._state.db).get(pk=-1)


def held_lock(row: Any) -> Any:
    return threading.Lock()


class Methods:
    """A callable and a bound method."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __call__(self, row: Any) -> int:
        return row.rank * self.factor

    def method(self, row: Any) -> int:
        return self(row)


class LoudQuerySet(ParallelQuerySet[Any, Any]):
    """Has an attribute of its own, which travels."""

    volume = 0


def itself(row: Any) -> Any:
    return row


def raise_score(row: Any) -> None:
    row.score = 1000 + row.rank
    row.save(update_fields=["score"])


def raise_scores(rows: list[Any]) -> None:
    for row in rows:
        raise_score(row)


def lock(row: Any) -> Any:
    return threading.Lock()


def rank_and_comma(row: Any) -> str:
    return f"{row.rank},"


def ranks(rows: list[Any]) -> list[int]:
    assert isinstance(rows, list)
    return [row.rank for row in rows]


def score(row: Any) -> int | None:
    score: int | None = row.score
    return score


def nothing(row: Any) -> None:
    pass


def zero(row: Any) -> int:
    return 0


def first(one: Any, other: Any) -> Any:
    return one


def name(row: Any) -> str:
    return str(row.name)


def rename(row: Any) -> None:
    row.name = "x"
    row.save()
