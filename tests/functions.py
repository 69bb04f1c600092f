"""Functions that worker processes find by name."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

from django.conf import settings
from django.core.files.base import ContentFile
from django.db import InterfaceError, OperationalError, connections, transaction
from django.utils import timezone, translation

from parallel_orm import ParallelQuerySet, current_worker
from parallel_orm.connections import lender
from tests.testapp.models import Article
from tests.testapp.written import Ship, Tug


def name_and_key(row: Any) -> tuple[str, int]:
    return row.name, row.pk


def pid(row: Any) -> int:
    return os.getpid()


def key(row: Any) -> Any:
    return row.pk


def rank(row: Any) -> int:
    return int(row.rank)


def fail_on_three(row: Any) -> int:
    if row.rank == 3:
        raise ValueError(f"rank three: {row.name}")
    return row.rank


def die_on_three(row: Any) -> int:
    if row.rank == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return row.rank


def leave_on_three(row: Any) -> int:
    if row.rank == 3:
        os._exit(7)
    return row.rank


def neighbourhood(row: Any) -> tuple[str | None, str]:
    return translation.get_language(), str(timezone.get_current_timezone())


def inherited_connections(row: Any) -> list[str]:
    """The connections of this process that were opened for somebody else: all but the one it reads with."""
    return [w.alias for w in connections.all(initialized_only=True) if w.alias != row._state.db]


def backend(row: Any) -> int:
    """The server's process that reads for this worker."""
    return int(connections[row._state.db].connection.info.backend_pid)  # asked of the driver, not in SQL


def kept_connections() -> int:
    """The connections that this worker keeps open between calls."""
    return sum(map(len, lender._idle.values()))


def count_nested(row: Any) -> int:
    """A map within a map."""
    return len(Article.objects.using(row._state.db).parallel_map(pid, 2))


class Strange(Exception):
    """Cannot be pickled at all."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")
        self.lock = threading.Lock()


def raise_strange(row: Any) -> None:
    raise Strange("this", "that")


class Doubled(Exception):
    """Makes its text of its argument, which is then no longer its argument."""

    def __init__(self, code: int) -> None:
        super().__init__(f"code {code}")
        self.code = code


class Demanding(Exception):
    """Cannot be made of its args alone."""

    def __init__(self, *, needed: str) -> None:
        super().__init__("demanding")
        self.needed = needed


def raise_doubled(row: Any) -> None:
    raise Doubled(3)


def raise_demanding(row: Any) -> None:
    raise Demanding(needed="x")


def insert_again_at_three(row: Any) -> int:
    if row.rank == 3:
        row.save(force_insert=True)
    with transaction.atomic(using=row._state.db, durable=True):
        return Article.objects.using(row._state.db).get(pk=row.pk).rank


def rename_and_fail(row: Any) -> None:
    rename(row)
    raise ValueError


class Slotted(Exception):
    """Has something that pickle leaves behind."""

    __slots__ = ("code", "more")

    def __init__(self, text: str, code: int = 0) -> None:
        super().__init__(text)
        self.code = code


def raise_slotted(row: Any) -> None:
    raise Slotted("slotted", 404)


class Textless(Exception):
    def __str__(self) -> str:
        raise TypeError("no text")


def raise_textless(row: Any) -> None:
    raise Textless


def stop(row: Any) -> None:
    raise StopIteration("rank")


def interrupt(row: Any) -> None:
    raise KeyboardInterrupt


def queryset(row: Any) -> Any:
    return Article.objects.using(row._state.db).filter(pk=row.pk)


def email_backend(row: Any) -> str:
    return str(settings.EMAIL_BACKEND)


def date_format(row: Any) -> str:
    return str(settings.DATE_FORMAT)


def raise_missing(row: Any) -> None:
    Article.objects.using(row._state.db).get(pk=-1)


def held_lock(row: Any) -> Any:
    return threading.Lock()


class Methods:
    """A callable and a bound method."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __call__(self, row: Any) -> int:
        return row.rank * self.factor

    def method(self, row: Any) -> int:
        return self(row)


class LoudQuerySet(ParallelQuerySet[Any, Any]):
    """Has an attribute of its own, which travels."""

    volume = 0


def itself(row: Any) -> Any:
    return row


def raise_score(row: Any) -> None:
    row.score = 1000 + row.rank
    row.save(update_fields=["score"])


def raise_scores(rows: list[Any]) -> None:
    for row in rows:
        raise_score(row)


def lock(row: Any) -> Any:
    return threading.Lock()


def rank_and_comma(row: Any) -> str:
    return f"{row.rank},"


def ranks(rows: list[Any]) -> list[int]:
    assert isinstance(rows, list)
    return [row.rank for row in rows]


def score(row: Any) -> int | None:
    score: int | None = row.score
    return score


def nothing(row: Any) -> None:
    pass


def zero(row: Any) -> int:
    return 0


def first(one: Any, other: Any) -> Any:
    return one


def name(row: Any) -> str:
    return str(row.name)


def rename(row: Any) -> None:
    row.name = "x"
    row.save()


def fail_on_sevens(row: Any) -> int:
    if row.rank % 7 == 3:
        raise ValueError(f"rank {row.rank}")
    return int(row.rank)


def fail_on_a_seven(rows: list[Any]) -> int:
    return sum(map(fail_on_sevens, rows))


def none_or_fail(row: Any) -> int | None:
    if row.rank % 7 == 3:
        raise ValueError(f"rank {row.rank}")
    return row.rank if row.rank % 2 else None


def tick(row: Any, folder: str) -> int:
    """How often it was called for this row, counted in a file."""
    with (Path(folder) / str(row.rank)).open("a+") as file:
        file.write("x")
        return file.tell()


class FailsAtFirst:
    """Fails the first times that it has each row, which it spoils; whoever calls it once more has the row as it was."""

    def __init__(self, folder: str, times: int, kill: bool = False) -> None:
        self.folder, self.times, self.kill = folder, times, kill

    def __call__(self, row: Any) -> str:
        assert row.name.startswith("name"), "read anew"
        name = row.name
        if row.rank % 7 == 3 and tick(row, self.folder) <= self.times:
            row.name = "spoilt"
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("not yet")
        return name


def tag_that_fails_at_first(row: Any, folder: str) -> str:
    file = Path(folder) / f"{row.pk} {row.tag}"
    if not file.exists():
        file.touch()
        raise ValueError("not yet")
    return str(row.tag)


def fails_at_first_and_cannot_travel(row: Any, folder: str) -> Any:
    if row.rank == 3 and tick(row, folder) == 1:
        raise ValueError("not yet")
    return threading.Lock() if row.rank == 0 else row.rank


def tenant_and_two_losses(row: Any) -> str:
    """The tenant of the session, which ends at two rows: by the server, and by the function."""
    connection = connections[row._state.db]
    if row.rank == 5:
        connection.close()
        return "closed"
    with connection.cursor() as cursor:
        if row.rank == 3:
            cursor.execute("SELECT pg_terminate_backend(pg_backend_pid())")
        cursor.execute("SELECT current_setting('app.tenant', true)")
        (tenant,) = cursor.fetchone()
    return str(tenant)


def unpicklable_sevens(row: Any) -> Any:
    return threading.Lock() if row.rank % 7 == 3 else row.rank


def die_on_sevens(row: Any) -> int:
    if row.rank % 7 == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return row.rank


def make_ready(worker: Any) -> None:
    assert current_worker() is worker
    worker.state.seen = []


def see(row: Any) -> int:
    current_worker().state.seen.append(row.rank)
    return row.rank


def what_was_seen(worker: Any) -> tuple[int | None, int, list[int]]:
    assert current_worker() is worker
    return worker.index, worker.pid, worker.state.seen


def index_of(worker: Any) -> int | None:
    return worker.index


def end_abruptly(worker: Any) -> None:
    os._exit(3)


def wait_and_end(row: Any, folder: str) -> None:
    """End the worker when somebody says so by a file."""
    (Path(folder) / "begun").touch()
    while not (Path(folder) / "go").exists():
        pass
    os._exit(3)


def jobs_kept(row: Any) -> int:
    from parallel_orm.parcels import _opened

    return len(_opened)


def has_state(row: Any) -> bool:
    worker = current_worker()
    had = hasattr(worker.state, "been_here")
    worker.state.been_here = True
    return had


def refuse(worker: Any) -> None:
    raise LookupError("no")


def hang_on_three(row: Any) -> int:
    if row.rank == 3:
        threading.Event().wait(600)
    return row.rank


def busy_on_three(row: Any) -> int:
    while row.rank == 3:
        pass
    return row.rank


def slow_query_on_three(row: Any) -> int:
    if row.rank == 3:
        slow = {"postgresql": "SELECT pg_sleep(600)", "mysql": "SELECT SLEEP(600)"}
        connection = connections[row._state.db]
        with connection.cursor() as cursor:
            cursor.execute(
                slow.get(
                    connection.vendor,
                    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n",
                )
            )
    return row.rank


def submit_here(function: Any, *args: Any, **kwargs: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(function(*args, **kwargs))
    return future


def name_of_anything(row: Any) -> str:
    return str(row["name"] if isinstance(row, dict) else getattr(row, "name", None) or row.number)


def large(row: Any) -> bytes:
    return bytes(1_100_000)


def compute(row: Any) -> int:
    return sum(range(200_000))


def say_and_hang(row: Any) -> None:
    """Say so in a file, and wait for ever."""
    (Path(os.environ["PARALLEL_ORM_TEST_GATE"]) / "begun").touch()
    threading.Event().wait(600)


def die_on_three_articles(row: Any) -> None:
    if isinstance(row, Article):
        die_on_three(row)


def take_long(worker: Any) -> None:
    """Longer than a chunk may take, and than it is waited for."""
    until = monotonic() + 3.5
    while monotonic() < until:
        pass


def ship_with_log(number: int) -> Any:
    return Ship(name=f"ship {number}", log=ContentFile(f"log {number}".encode(), f"{number}.txt"))


def ship_with_tugs(number: int) -> Any:
    """Saved here, with two that belong to it."""
    alias = writing_alias()
    ship = Ship.objects.using(alias).create(name=f"tugged {number}")
    Tug.objects.using(alias).bulk_create(Tug(ship=ship, _order=place) for place in range(2))
    return ship


def fast_ship(number: int) -> Any:
    return Ship(name=f"ship {number}", speed=50, papers={})


def writing_alias() -> str:
    """The database of the transaction that this is called in."""
    return next(each.alias for each in connections.all(initialized_only=True) if each.in_atomic_block)


def plain_ship(number: int) -> Any:
    return Ship(name=f"ship {number}")


def faster(row: Any) -> None:
    row.speed += 1


def die(marker: str) -> None:
    """Once, whoever calls it."""
    with suppress(FileExistsError):
        Path(marker).touch(exist_ok=False)
        os.kill(os.getpid(), signal.SIGKILL)


def ship_that_kills(item: Any) -> Any:
    """Ends its worker when its rows are written, or when they are committed; of one chunk, once."""
    marker = item["papers"]["killed"]
    if item["name"] == "behind the commit 15":
        transaction.on_commit(partial(die, marker), using=writing_alias())
    if item["name"] == "before the commit 19":
        die(marker)
    return Ship(**item)


def ship_that_ends_the_connection(item: Any) -> Any:
    """Has the server end the connection in the middle of a chunk, once."""
    connection = connections[writing_alias()]
    if item["name"] == "ship 15":
        end = {"postgresql": "SELECT pg_terminate_backend(pg_backend_pid())", "mysql": "KILL CONNECTION_ID()"}
        with suppress(FileExistsError, OperationalError, InterfaceError), connection.cursor() as cursor:
            Path(item["papers"]["ended"]).touch(exist_ok=False)
            cursor.execute(end[connection.vendor])
    return Ship(**item)
