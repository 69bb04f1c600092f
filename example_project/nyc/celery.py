"""The project's Celery app: `celery -A nyc worker` starts workers for it."""

from __future__ import annotations

import os

from celery import Celery

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "nyc.settings")

app = Celery("nyc")
app.config_from_object("django.conf:settings", namespace="CELERY")
# Finds the task of `parallel_orm`, which is in INSTALLED_APPS.
app.autodiscover_tasks()
