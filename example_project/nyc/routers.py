"""Where tables are, when `demo --shards` splits the flights."""

from __future__ import annotations

from typing import Any


class Shards:
    """A shard has the tables of the flights, and no others.

    Rows are read and saved where they came from, which Django does without a router: a shard's flight goes back to
    its shard. New flights are made on the one database, which has all; a site whose shards have rows of their own
    would choose their home in `db_for_write`.
    """

    def allow_migrate(self, db: str, app_label: str, **hints: Any) -> bool | None:
        """`None` leaves the one database as it is."""
        return app_label == "flights" if db.startswith("shard") else None
