"""What is done with a row that is written: set-up code, and a receiver of its signals."""

from __future__ import annotations

import hashlib
from typing import Any

from django.apps import apps
from django.db.models.signals import post_save

import benchmarks.work  # noqa: F401 - sets Django up, in workers of others
from benchmarks.models import Parcel

assert apps.ready

#: What the receiver has heard, in this process.
heard = 0


def hear(sender: Any, instance: Any, created: bool, **kwargs: Any) -> None:
    global heard
    heard += created


post_save.connect(hear, sender=Parcel)


def make(number: int) -> Parcel:
    """Make a row with some set-up code."""
    code = hashlib.sha256(str(number).encode()).hexdigest()
    return Parcel(code=code[:12], title=f"Parcel {number} {code[12:20].upper()}", weight=number % 1000 / 10)


def save_one(alias: str, number: int) -> int:
    parcel = make(number)
    parcel.save(using=alias)
    return int(parcel.pk)


def weigh(row: Any) -> None:
    row.weight += 1
