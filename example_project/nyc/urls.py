"""One page."""

from __future__ import annotations

from django.urls import path
from flights import views

urlpatterns = [path("", views.dashboard, name="dashboard")]
