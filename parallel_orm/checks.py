"""System checks: ``settings.PARALLEL_ORM`` says what it may say."""

from __future__ import annotations

from typing import Any

from django.core.checks import CheckMessage, Error, register

from parallel_orm.errors import InvalidOption
from parallel_orm.options import from_settings


@register()
def check_settings(**_: Any) -> list[CheckMessage]:
    """``parallel_orm.E001``: a setting has a value that cannot be used."""
    from_settings.cache_clear()
    try:
        from_settings()
    except InvalidOption as error:
        hint = "The settings reference lists each with its default: docs/reference/settings.md."
        return [Error(str(error), hint=hint, id="parallel_orm.E001")]
    return []
