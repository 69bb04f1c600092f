"""Run async code and leave no connection behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

from asgiref.sync import sync_to_async
from django.db import connections


def run(awaitable: Awaitable[Any]) -> Any:
    """As ``asyncio.run``; closes what Django's async methods opened in their own thread."""

    async def main() -> Any:
        try:
            return await awaitable
        finally:
            await sync_to_async(connections.close_all)()

    try:
        return asyncio.run(main())
    finally:
        connections.close_all()
