"""What is done with a row. Workers of others import this first, and find Django set up that way."""

from __future__ import annotations

from time import monotonic
from typing import Any

import django
from django.apps import apps

if not apps.ready:
    django.setup()


def spin(turns: int, number: int) -> int:
    """Compute for as long as ``turns`` says; something else for each number."""
    for turn in range(turns):
        number += turn
    return number


def compute(turns: int, row: Any) -> int:
    return spin(turns, row.pk)


def compute_unevenly(turns: int, row: Any) -> int:
    """One row in a hundred takes a hundred times as long; these stand together, as they would."""
    return spin(turns * 100 if row.pk % 10_000 < 100 else turns, row.pk)


def nothing(row: Any) -> None:
    pass


def now(row: Any) -> float:
    """The time on the clock that all processes of a machine share."""
    return monotonic()


def key(row: Any) -> int:
    return int(row.pk)


def compute_range(turns: int, alias: str, bounds: tuple[int, int]) -> list[int]:
    """What a hand-made split by keys does: one range of them, read by the worker."""
    from benchmarks.models import Article

    rows = Article.plain.using(alias).filter(pk__gte=bounds[0], pk__lt=bounds[1]).order_by("pk")
    return [spin(turns, row.pk) for row in rows.iterator()]
