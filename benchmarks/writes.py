"""Rows created, updated and deleted, with a receiver and set-up code for each: a loop, what people use, and ours."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from typing import Any

import django
from django.db import connections, transaction

from benchmarks import writing
from benchmarks.measure import Measure, alternate, show, timed
from benchmarks.models import Parcel
from parallel_orm.options import default_start_method

PROCESSES = 2
#: As in the article that the recipe is from.
RECIPE_PROCESSES = 4


def run(databases: dict[str, str], *, rounds: int | None, rows: int | None) -> None:
    alias, rounds, rows = next(iter(databases)), rounds or 3, rows or 20_000
    with connections[alias].schema_editor() as editor:
        editor.create_model(Parcel)
    try:
        creating(alias, rounds, rows)
        changing(alias, rounds, rows)
    finally:
        with connections[alias].schema_editor() as editor:
            editor.delete_model(Parcel)


def creating(alias: str, rounds: int, rows: int) -> None:
    parcels = Parcel.objects.using(alias)

    def emptied(way: Callable[[], object]) -> Measure:
        def measure() -> float:
            parcels.all()._raw_delete(alias)
            taken = timed(way)()
            assert parcels.count() == rows
            return taken

        return measure

    parcels.parallel_create(range(PROCESSES), writing.make, PROCESSES, chunk_size=1)  # the workers are warm
    ways = {
        "a loop": partial(loop, alias, rows),
        "a loop in one transaction": partial(loop_at_once, alias, rows),
        f"a task a row, {RECIPE_PROCESSES} processes": partial(recipe, alias, rows),
        "bulk_create(), without signals": partial(bulk_create, alias, rows),
        "parallel_create()": lambda: parcels.parallel_create(range(rows), writing.make, PROCESSES),
        'parallel_create(mode="bulk")': lambda: parcels.parallel_create(
            range(rows), writing.make, PROCESSES, mode="bulk"
        ),
    }
    if connections[alias].vendor == "sqlite":
        del ways[f"a task a row, {RECIPE_PROCESSES} processes"]  # which fails: the database is locked
    title = f"{rows:,} rows created with a receiver and set-up code, {PROCESSES} processes, {alias}"
    show(title, alternate({name: emptied(way) for name, way in ways.items()}, rounds), ["a loop", "parallel_create()"])


def changing(alias: str, rounds: int, rows: int) -> None:
    parcels = Parcel.objects.using(alias)

    def filled(way: Callable[[], object]) -> Measure:
        def measure() -> float:
            parcels.all()._raw_delete(alias)
            Parcel._base_manager.using(alias).bulk_create(map(writing.make, range(rows)))
            return timed(way)()

        return measure

    def update_loop() -> None:
        for row in parcels.order_by("pk"):
            writing.weigh(row)
            row.save(update_fields=["weight", "changed"])

    def delete_loop() -> None:
        for row in parcels.order_by("pk"):
            row.delete()

    updates = {
        "a loop": update_loop,
        "parallel_update()": lambda: parcels.parallel_update(writing.weigh, None, PROCESSES),
        'parallel_update(mode="bulk")': lambda: parcels.parallel_update(writing.weigh, None, PROCESSES, mode="bulk"),
    }
    deletes = {"a loop": delete_loop, "parallel_delete()": lambda: parcels.parallel_delete(PROCESSES)}
    title = f"with a receiver, {PROCESSES} processes, {alias}"
    for what, ways in (("updated", updates), ("deleted", deletes)):
        taken = alternate({name: filled(way) for name, way in ways.items()}, rounds)
        show(f"{rows:,} rows {what} {title}", taken, ["a loop"])


def loop(alias: str, rows: int) -> None:
    for number in range(rows):
        writing.make(number).save(using=alias)


def loop_at_once(alias: str, rows: int) -> None:
    with transaction.atomic(using=alias):
        loop(alias, rows)


def recipe(alias: str, rows: int) -> None:
    """A process pool with a task for each row, whose results are collected as they come in."""
    context = multiprocessing.get_context(default_start_method())
    with ProcessPoolExecutor(RECIPE_PROCESSES, mp_context=context, initializer=django.setup) as pool:
        for done in as_completed([pool.submit(writing.save_one, alias, number) for number in range(rows)]):
            done.result()


def bulk_create(alias: str, rows: int) -> None:
    Parcel._base_manager.using(alias).bulk_create([writing.make(number) for number in range(rows)], batch_size=1_000)


def memory(databases: dict[str, str], *, rounds: int | None, rows: int | None) -> None:
    """How much memory the caller takes while it creates millions of rows."""
    import psutil

    alias, rows = next(iter(databases)), rows or 5_000_000
    with connections[alias].schema_editor() as editor:
        editor.create_model(Parcel)
    try:
        parcels: Any = Parcel.objects.using(alias)
        parcels.parallel_create(range(10_000), writing.make, PROCESSES, mode="bulk")
        process = psutil.Process()
        before = most = process.memory_info().rss

        def watch(done: int, total: int | None) -> None:
            nonlocal most
            most = max(most, process.memory_info().rss)

        report = parcels.parallel_create(iter(range(rows)), writing.make, PROCESSES, mode="bulk", progress=watch)
        print(f"{report}\nThe caller's memory grew by {(most - before) / 1e6:.1f} MB at most.\n")
    finally:
        with connections[alias].schema_editor() as editor:
            editor.delete_model(Parcel)
