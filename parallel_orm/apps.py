"""The Django app. Only the system checks need it in ``INSTALLED_APPS``."""

from __future__ import annotations

from django.apps import AppConfig


class ParallelORMConfig(AppConfig):
    name = "parallel_orm"
    label = "parallel_orm"
    verbose_name = "Parallel ORM"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from parallel_orm import checks  # noqa: F401 - registers them
