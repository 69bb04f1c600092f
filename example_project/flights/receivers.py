"""What is set on a row as it is saved, whoever saves it. `bulk_create()` calls none of this."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from django.db.models.signals import pre_save
from django.utils.text import slugify

if TYPE_CHECKING:
    from flights.models import Airline, Flight, Notice


def connect() -> None:
    """Connect all receivers. `ready()` of the app does so, in the caller and in each worker process."""
    pre_save.connect(name_airline, sender="flights.Airline")
    pre_save.connect(name_flight, sender="flights.Flight")
    pre_save.connect(refer_to_notice, sender="flights.Notice")


def name_airline(instance: Airline, **kwargs: Any) -> None:
    """`JetBlue Airways` has the address `jetblue-airways`."""
    instance.slug = slugify(instance.name)


def name_flight(instance: Flight, **kwargs: Any) -> None:
    """Flight 725 of `B6` is `B6725` to passengers."""
    instance.ident = f"{instance.airline_id}{instance.number}"


def refer_to_notice(instance: Notice, **kwargs: Any) -> None:
    """A reference that cannot be guessed from the one before."""
    instance.reference = hashlib.sha256(f"{instance.flight_id} {instance.minutes}".encode()).hexdigest()[:12]
