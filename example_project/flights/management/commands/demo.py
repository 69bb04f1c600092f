"""`manage.py demo`: what the library is worth on this machine, with every answer checked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from django.core.management import call_command
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import connections
from nyc.databases import KINDS, MOST_SHARDS

from flights import fleet, measure, report
from flights import shards as split
from flights.models import Flight
from parallel_orm.errors import ParallelORMError

if TYPE_CHECKING:
    from collections.abc import Iterable


class Command(BaseCommand):
    """Load if need be, measure, compare the answers, and tell."""

    help = "Measure the library against Django's own ways on 336,776 flights."

    def add_arguments(self, parser: CommandParser) -> None:
        """What to run on, and how much."""
        parser.add_argument(
            "--database",
            choices=KINDS,
            help="an SQLite file (default), or an embedded PostgreSQL; not with DATABASE_URL",
        )
        parser.add_argument("--data", type=Path, metavar="PATH", help="as of `manage.py load`")
        parser.add_argument("--processes", type=int, default=measure.cores(), help="default: the cores here")
        parser.add_argument("--rounds", type=int, default=5, help="of the dashboard (default 5)")
        parser.add_argument(
            "--shards",
            type=int,
            metavar="N",
            help="instead: split the flights by month over N databases, and ask all of them as one",
        )
        parser.add_argument(
            "--executor",
            choices=list(fleet.ENGINES),
            help="instead: the work on every flight, by workers that are started for it",
        )
        parser.add_argument(
            "--at",
            metavar="URL",
            help="with --executor: the address of a scheduler of Dask, or of a broker, whose workers run already",
        )
        parser.add_argument("--rows", type=int, help="walk and work on the first so many flights")

    def handle(
        self,
        *,
        data: Path | None,
        processes: int,
        rounds: int,
        rows: int | None,
        shards: int | None = None,
        executor: str | None = None,
        at: str | None = None,
        **options: Any,
    ) -> None:
        """Run the trials; an answer that differs is an error."""
        for name, number in (("processes", processes), ("rounds", rounds), ("rows", rows)):
            if number is not None and number < 1:
                raise CommandError(f"--{name} must be 1 or more.")
        if shards is not None and not 2 <= shards <= MOST_SHARDS:
            raise CommandError(f"--shards must be 2 to {MOST_SHARDS}.")
        if at is not None and executor is None:
            raise CommandError("--at says where the workers of an --executor are.")
        if shards is not None and executor is not None:
            raise CommandError("--shards and --executor are two demos: one of them at a time.")
        load = report.load_of_machine()
        call_command("migrate", verbosity=0, interactive=False)
        call_command("load", data=data, stdout=self.stdout, stderr=self.stderr)
        last = last_key(rows)
        if shards is not None:
            self.ask_shards(shards, last, rounds, load)
            return
        if executor is not None:
            self.work_elsewhere(executor, at, last, processes, load)
            return

        self.stdout.write(f"Dashboard, {rounds} rounds ...")
        dashboard = measure.dashboard(rounds)
        self.stdout.write("Walks, each in a fresh process ...")
        walks = measure.walks(last)
        self.stdout.write("Work on every flight, in a loop and on all cores ...")
        work = measure.work(last, processes)
        self.stdout.write(f"Writes, {measure.WRITES:,} rows each way ...\n\n")
        writes = (measure.creating(last, processes), measure.updating(last, processes))

        trials = (dashboard, walks, work, *writes)
        self.stdout.write(f"{report.table(trials)}\n\n")
        self.stdout.write(
            "Ratios are against the first way of each task. The dashboard's times are medians of "
            f"{rounds} alternating\nrounds; all else ran once, and the time of the work and of the recipe of a task "
            "a row includes starting\ntheir processes.\n\n"
        )
        if told := work.ours.facts.get("report"):
            self.stdout.write(f"The report of the work: {told}.\n\n")
        self.stdout.write("Where the library lost:\n")
        for sentence in report.losses(dashboard, walks, work, writes, load):
            self.stdout.write(f"- {sentence}")
        self.stdout.write(f"\n{report.environment(load)}")
        self.stdout.write(f"Rows:     {Flight.objects.count():,} flights\n\n")
        self.judge(trials)

    def ask_shards(self, number: int, last: int, rounds: int, load: float | None) -> None:
        """Split the flights, and ask the one database and all shards the same."""
        aliases = [f"shard{place}" for place in range(number)]
        if not set(aliases) <= set(connections.settings):
            raise CommandError(f"There are no databases for --shards. In the environment: NYC_SHARDS={number}")
        self.stdout.write(f"Splitting the flights by month over {number} databases ...")
        split.split(aliases, last)
        self.stdout.write(f"Questions, {rounds} rounds ...\n\n")
        trials = tuple(split.trials(aliases, last, rounds))
        self.stdout.write(f"{report.table(trials)}\n\n")
        self.stdout.write(f"Times are medians of {rounds} alternating rounds.\n\n")
        self.stdout.write("Where the library lost:\n")
        for sentence in report.losses_of_shards(trials, load):
            self.stdout.write(f"- {sentence}")
        self.stdout.write(f"\n{report.environment(load)}")
        counts = (f"{Flight.objects.using(alias).count():,}" for alias in aliases)
        self.stdout.write(f"Rows:     {', '.join(counts)} flights\n\n")
        self.judge(trials)

    def work_elsewhere(self, name: str, at: str | None, last: int, processes: int, load: float | None) -> None:
        """Map all flights on the workers of an engine."""
        told = f"at {at}" if at else f"{processes} processes, started for this"
        self.stdout.write(f"Work on every flight, in a loop and by {name} ({told}) ...")
        try:
            with fleet.running(name, processes, at) as executor:
                trial = fleet.trial(name, executor, last, None if at else processes)
        except (fleet.EngineError, ParallelORMError) as exc:
            raise CommandError(str(exc)) from exc
        self.stdout.write(f"\n{report.table([trial])}\n\n")
        self.stdout.write(f"The report of {name}: {trial.ours.facts['report']}.\n\n")
        self.stdout.write("Where the library lost:\n")
        for sentence in report.losses_of_work(trial, load):
            self.stdout.write(f"- {sentence}")
        self.stdout.write(f"\n{report.environment(load)}\n")
        self.judge([trial])

    def judge(self, trials: Iterable[measure.Trial]) -> None:
        """Tell that all answers are equal, or fail."""
        differences = [found for trial in trials for found in trial.differences]
        if differences:
            raise CommandError("Answers differ:\n" + "\n".join(differences))
        self.stdout.write(self.style.SUCCESS("All answers are equal."))


def last_key(rows: int | None) -> int:
    """The key of the last flight to be walked over: of the first `rows`, or of all."""
    keys = Flight.objects.order_by("pk").values_list("pk", flat=True)
    if rows is not None and rows < keys.count():
        return int(keys[rows - 1])
    return int(keys.reverse()[0])
