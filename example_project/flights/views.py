"""The dashboard as a page."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

from django.shortcuts import render
from django.views.decorators.http import require_safe

from flights.dashboard import Dashboard

if TYPE_CHECKING:
    from django.http import HttpRequest, HttpResponse


@require_safe
def dashboard(request: HttpRequest) -> HttpResponse:
    """Start six queries; the template reads each where it shows it, and waits for no other.

    With `?inline=1` nothing is started, and the same template runs them one after another.
    """
    stopwatch = Stopwatch()
    page = Dashboard()
    inline = "inline" in request.GET
    if not inline:
        page.start()
    return render(
        request,
        "flights/dashboard.html",
        {"page": page, "inline": inline, "stopwatch": stopwatch},
    )


class Stopwatch:
    """Milliseconds since it was made, read where the template stands at that moment."""

    def __init__(self) -> None:
        self._started = perf_counter()

    @property
    def milliseconds(self) -> float:
        """The time so far."""
        return 1000 * (perf_counter() - self._started)
