"""The app: flights that left New York in 2013."""

from __future__ import annotations

from django.apps import AppConfig


class FlightsConfig(AppConfig):
    """Flights, and what belongs to them: weather, planes, airports, airlines."""

    name = "flights"

    def ready(self) -> None:
        """Connect the receivers of signals."""
        from flights import receivers

        receivers.connect()
