"""What a worker elsewhere must prove before it touches a chunk: that its world is the caller's.

A worker process of ours is made like the caller. One of an engine was started by somebody else, some time ago, on some
other machine: it may have last week's code, or another database of the same name. So a call brings claims along (this
version, these migrations, this database), each worker looks how each of them is with itself, and refuses the call,
saying what differs. No claim tells a secret: settings and code are told by digests, databases by what their servers
call themselves.
"""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from hashlib import sha256
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules
from platform import node
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import cloudpickle
import django
from django.apps import apps
from django.conf import settings
from django.db import connections
from django.db.migrations.loader import MigrationLoader
from django.db.models import Model
from django.utils.connection import ConnectionDoesNotExist

from parallel_orm import errors

#: Settings that decide what rows and functions come to. (Where databases are, each worker may say in its own words.)
SETTINGS = (
    "AUTH_USER_MODEL",
    "DATABASE_ROUTERS",
    "DEFAULT_AUTO_FIELD",
    "INSTALLED_APPS",
    "LANGUAGE_CODE",
    "TIME_ZONE",
    "USE_I18N",
    "USE_TZ",
)
#: What a worker says of something that it has not.
ABSENT = "absent"
#: How it begins what it says of a module whose file is not what was loaded; no two processes say the same.
STALE = "stale "


class Claim(NamedTuple):
    """Something that is so where a call is made."""

    kind: str
    #: Of what; "" where the kind says it.
    of: str
    value: str


def claims(
    models: Iterable[type[Model]], functions: Iterable[Any], aliases: Iterable[str], *, by_value: bool
) -> list[Claim]:
    """Return what is so here of what a call depends on. ``by_value``: functions travel as they were compiled."""
    subjects = [("parallel_orm", ""), ("Django", "")]
    subjects += [("Python", ""), ("cloudpickle", "")] if by_value else []
    subjects += [("setting", name) for name in SETTINGS]
    subjects += [("migrations", app.label) for app in apps.get_app_configs()]
    subjects += [("model", model._meta.label) for model in models]
    subjects += [("module", name) for name in sorted({*map(module_of, functions)} - {""})]
    subjects += [("database", alias) for alias in aliases]
    return [Claim(kind, of, value_of(kind, of)) for kind, of in subjects]


def refuse_another_world(claimed: Iterable[tuple[str, str, str]]) -> None:
    """Raise :class:`~parallel_orm.errors.AnotherWorld`, naming what is not here as it was claimed."""
    differing = [Claim(kind, of, value) for kind, of, value in claimed if value_of(kind, of) != value]
    if differing:
        raise errors.AnotherWorld(node(), [_told(claim, value_of(claim.kind, claim.of)) for claim in differing])


def value_of(kind: str, of: str) -> str:
    """Return how this is in this process."""
    try:
        return _ways[kind](of)
    except (LookupError, ConnectionDoesNotExist, FileNotFoundError):  # an app, a model, an alias, SQLite's file
        return ABSENT


def _told(claim: Claim, here: str) -> str:
    what = f"{claim.kind} {claim.of}".rstrip()
    if here == ABSENT:
        return f"the {what} is not there"
    if here.startswith(STALE):
        return f"the {what} was changed since this worker loaded it"
    if claim.kind == "database" and here.partition("/")[0] == claim.value.partition("/")[0]:
        return f"the search_path of the {what} is another"
    if claim.kind in _IN_WORDS:
        return f"{what} is {here}, and {claim.value} for the caller"
    return f"the {what} is another"


_IN_WORDS = frozenset(["parallel_orm", "Django", "Python", "cloudpickle"])


def _digest(*parts: object) -> str:
    return sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


def module_of(function: Any) -> str:
    """Return the module whose code a function is of, where it may be another elsewhere; "" of Python's own."""
    while isinstance(function, partial):
        function = function.func
    if isinstance(function, MethodType):
        function = function.__self__ if isinstance(function.__self__, type) else type(function.__self__)
    if not hasattr(function, "__qualname__"):  # an instance that can be called
        function = type(function)
    name = getattr(function, "__module__", None) or ""
    by_value = "<locals>" in function.__qualname__ or "<lambda>" in function.__qualname__
    is_pythons = name.partition(".")[0] in sys.stdlib_module_names  # "__main__" too, whose functions travel
    return "" if by_value or is_pythons or name == "__main__" else name


def _of_setting(name: str) -> str:
    value = getattr(settings, name, None)
    if isinstance(value, list | tuple):  # routers may be objects, and each process has its own
        value = [each if isinstance(each, str) else f"{type(each).__module__}.{type(each).__name__}" for each in value]
    return _digest(repr(value))


@cache  # what is loaded is not changed by a file that is, later
def _of_migrations(label: str) -> str:
    apps.get_app_config(label)
    name, _ = MigrationLoader.migrations_module(label)
    found = None if name is None else find_spec(name)
    if found is None:
        return "none"
    return _digest(*sorted(each.name for each in iter_modules(found.submodule_search_locations)))


@cache
def _of_model(label: str) -> str:
    fields = apps.get_model(label)._meta.concrete_fields  # some are in the tables of its parents
    columns = ((each.model._meta.db_table, each.attname, each.column, each.get_internal_type()) for each in fields)
    return _digest(*columns)


@cache
def _of_module(name: str) -> str:
    try:
        module = import_module(name)
    except ImportError:
        return ABSENT
    if is_stale(module):
        return f"{STALE}{node()} {os.getpid()}"
    return _file_of(module)


def is_stale(module: ModuleType) -> bool:
    """Tell whether a module's file was changed since it was loaded, so far as its functions tell.

    A worker that nobody started anew has the new file then, and runs the old code. What is no code, such as a default
    or an attribute of a class, tells nothing: so files are compared too, where they were remembered.
    """
    if _remembered.get(module.__name__) not in (None, _file_of(module)):
        return True
    get_code = getattr(getattr(module.__spec__, "loader", None), "get_code", None)
    if get_code is None:
        return False
    try:
        now = get_code(module.__name__)
    except Exception:
        return True
    if now is None:
        return False
    known = {_told_of(code) for code in _codes_in(now)}
    loaded = (code for code in _codes_of(module) if code.co_filename == now.co_filename)
    return any(_told_of(code) not in known for code in loaded)


def remember_modules() -> None:
    """Note what is in the files of the modules that are loaded: of the project's, not of what is installed."""
    installed = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
    for name, module in list(sys.modules.items()):
        file = vars(module).get("__file__") if type(module) is ModuleType else None
        if file and not file.startswith(installed):
            _remembered.setdefault(name, _file_of(module))


#: Of modules that were loaded when this process was set up: what was in their files.
_remembered: dict[str, str] = {}


def _file_of(module: ModuleType) -> str:
    """Return what is in the file of a module."""
    try:
        return _digest(Path(str(getattr(module, "__file__", None))).read_bytes())
    except OSError:  # it is of a namespace, or in an archive
        return "no file"


def _told_of(code: CodeType) -> tuple[object, ...]:
    """Return what tells one code from another. (Its flags do not: decorators change them.)"""
    constants = tuple(each for each in code.co_consts if not isinstance(each, CodeType))
    return code.co_qualname, code.co_code, code.co_names, constants


def _codes_in(code: CodeType) -> Iterator[CodeType]:
    yield code
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _codes_in(each)


def _codes_of(module: ModuleType) -> Iterator[CodeType]:
    """Yield the code of each function and method of a module, as it was loaded, without what decorates it.

    No object is asked for anything, not even for its class, as lazy ones would be made then.
    """
    found = [*vars(module).values()]
    kinds = [each for each in found if issubclass(type(each), type) and each.__module__ == module.__name__]
    found += [each for kind in kinds for each in vars(kind).values()]
    for each in found:
        if type(each) in (staticmethod, classmethod):
            each = each.__func__
        elif type(each) is property:
            each = each.fget
        for _ in range(MOST_DECORATORS):
            within = vars(each).get("__wrapped__") if type(each) in (FunctionType, _Cached) else None
            if type(within) not in (FunctionType, _Cached):
                break
            each = within
        if type(each) is FunctionType:
            yield each.__code__


_Cached = type(cache(len))
#: How many decorators of a function are looked behind: enough, where one leads back to itself.
MOST_DECORATORS = 10


def _of_database(alias: str) -> str:
    connection: Any = connections[alias]
    was_open = connection.connection is not None
    try:
        place = _digest(connection.vendor, *_PLACES.get(connection.vendor, _by_settings)(connection))
        return f"{place}/{_digest(*_schemas(connection))}" if connection.vendor == "postgresql" else place
    finally:
        if not was_open:
            connection.close()


def _in_sqlite(connection: Any) -> Iterable[object]:
    """A file is the same only on the same machine: one that is shared by a network has locks that do not hold."""
    file = Path(connection.settings_dict["NAME"]).stat()
    return node(), file.st_dev, file.st_ino


def _in_postgresql(connection: Any) -> Iterable[object]:
    """What initdb called the cluster, which its replicas are called too; where that is kept secret, when it began."""
    connection.ensure_connection()
    with connection.connection.cursor() as cursor:  # the driver's own: these are no queries of the user's
        cursor.execute("SELECT has_function_privilege('pg_control_system()', 'execute')")
        (may_ask,) = cursor.fetchone()
        cluster = "system_identifier FROM pg_control_system()" if may_ask else "pg_postmaster_start_time()"
        cursor.execute(f"SELECT {cluster}")
        (name,) = cursor.fetchone()
        cursor.execute("SELECT oid, datname FROM pg_database WHERE datname = current_database()")
        return name, *cursor.fetchone()


def _schemas(connection: Any) -> Iterable[str]:
    """Where PostgreSQL looks for a table, by what a connection has from its beginning, by settings or by its user.

    What a session, or a tenant, has set since then goes along with the call. As the server does it: "$user" is a schema
    of the user's name, and one that is not there, or may not be used, is passed over.
    """
    with connection.connection.cursor() as cursor:
        cursor.execute(
            "SELECT reset_val, pg_get_userbyid(usesysid) FROM pg_settings, pg_stat_get_activity(pg_backend_pid())"
            " WHERE pg_settings.name = 'search_path'"
        )
        path, user = cursor.fetchone()
        user = connection.settings_dict["OPTIONS"].get("assume_role", user)
        names = [quoted.replace('""', '"') or plain.lower() for quoted, plain in _IN_PATH.findall(path)]
        names = [user if name == "$user" else name for name in names]
        cursor.execute(
            "SELECT nspname FROM pg_namespace"
            " WHERE nspname = ANY(%s::name[]) AND has_schema_privilege(%s::name, oid, 'USAGE')",
            [names, user],
        )
        found = {name for (name,) in cursor.fetchall()}
        return [name for name in dict.fromkeys(names) if name in found]


#: A name in a search_path: as it is, or in quotation marks, of which those within are doubled.
_IN_PATH = re.compile(r'"((?:[^"]|"")*)"|([^\s,"]+)')


def _in_mysql(connection: Any) -> Iterable[object]:
    connection.ensure_connection()
    with connection.connection.cursor() as cursor:
        cursor.execute(
            "SHOW GLOBAL VARIABLES WHERE Variable_name IN"
            " ('server_uuid', 'server_uid', 'hostname', 'port', 'datadir', 'server_id')"
        )
        variables = sorted(cursor.fetchall())
        cursor.execute("SELECT DATABASE()")
        return *variables, *cursor.fetchone()


def _by_settings(connection: Any) -> Iterable[object]:
    """Of one whose server cannot be asked: what both must have in their settings."""
    return [connection.settings_dict.get(name) for name in ("NAME", "HOST", "PORT")]


_PLACES: dict[str, Callable[[Any], Iterable[object]]] = {
    "sqlite": _in_sqlite,
    "postgresql": _in_postgresql,
    "mysql": _in_mysql,
}

_ways: dict[str, Callable[[str], str]] = {
    "parallel_orm": lambda _: import_module("parallel_orm").__version__,
    "Django": lambda _: django.get_version(),
    "Python": lambda _: f"{sys.version_info.major}.{sys.version_info.minor}",
    "cloudpickle": lambda _: cloudpickle.__version__.partition(".")[0],
    "setting": _of_setting,
    "migrations": _of_migrations,
    "model": _of_model,
    "module": _of_module,
    "database": _of_database,
}
