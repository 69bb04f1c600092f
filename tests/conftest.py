"""One run covers every database that can be had.

Fixtures, each giving an alias whose database is empty:

* ``alias``: the test runs on SQLite (a file), PostgreSQL and MariaDB in turn;
* ``default``, ``other`` (SQLite files), ``memory`` (SQLite in memory), ``postgres``,
  ``mariadb``: that one alone.

A test that asks for none of them, and is not a Django ``TestCase``, can't connect.
A test of a database that is not reachable is skipped, saying why; with
``PARALLEL_ORM_REQUIRE=postgres,mariadb,redis`` it fails instead, and so does a run in
which no test of a required kind ran.

Of a test with the mark ``pairs`` not all that its parameters make together runs, but
enough for each pair of their values; and of databases with executors (``on``), or with
what else the mark names, all of these on one database, and one on each of the others; but
those with the mark ``everywhere``.
``PARALLEL_ORM_TESTS=all`` runs all; ``again`` is for a few that are named, which need not be of all kinds.

``PARALLEL_ORM_TESTS=matrix`` leaves out those with the mark ``once``, which come to the same with every
version of Python, Django and drivers: pages of the docs, what the tests themselves rely on, programs that are
killed at random.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sqlite3
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.databases import BROKERS, KINDS, REQUIRABLE, Databases
from tests.pairs import enough

_run = pytest.StashKey["Run"]()


def pytest_configure(config: pytest.Config) -> None:
    if not config.option.help:
        run = config.stash[_run] = Run(config)
        config.pluginmanager.register(run, "parallel-orm-run")
        run.begin()


class Run:
    """From the servers found at the start to the verdict at the end."""

    def __init__(self, config: pytest.Config) -> None:
        self.databases = Databases()
        self.folder = Path(tempfile.mkdtemp(prefix="parallel-orm-tests-"))
        self.kinds: dict[str, set[str]] = {}
        """Of each test: the kinds of database and of broker that it uses."""
        self.ran: set[str] = set()
        """The kinds of which a test was not skipped."""
        self._listing = config.option.collectonly

    def begin(self) -> None:
        # For this process and, inherited, for every worker that it will start.
        os.environ["PARALLEL_ORM_TEST_DATABASES"] = json.dumps(self.databases.find(self.folder))
        os.environ["DJANGO_SETTINGS_MODULE"] = "tests.settings"

        import django
        from django.test.utils import setup_test_environment

        django.setup()
        setup_test_environment()
        _refuse_unasked_connections(self.databases)
        _configure_hypothesis()

    def pytest_unconfigure(self) -> None:
        try:
            self.databases.close()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def pytest_report_header(self) -> list[str]:
        import django

        lines = [f"django: {django.__version__}", f"sqlite: {sqlite3.sqlite_version}"]
        for alias, found in self.databases.found.items():
            lines.append(f"{alias}: {found.how if found.settings else f'none ({found.how})'}")
        return lines

    @pytest.hookimpl(tryfirst=True)  # before -m chooses
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for kind in sorted({KINDS[alias] for alias in _asked_for(item)}):
                item.add_marker(kind)
            for broker in sorted(BROKERS):
                if f"over_{broker}" in getattr(item, "fixturenames", []):
                    item.add_marker(broker)
            marks = {mark.name for mark in item.iter_markers()}
            self.kinds[item.nodeid] = marks & REQUIRABLE

    @pytest.hookimpl(specname="pytest_collection_modifyitems", trylast=True)  # of what was chosen
    def pytest_leave_out(self, config: pytest.Config, items: list[pytest.Function]) -> None:
        if os.environ.get("PARALLEL_ORM_TESTS") in ("all", "again"):
            return
        left_out: set[pytest.Item] = set()
        if os.environ.get("PARALLEL_ORM_TESTS") == "matrix":
            left_out = {item for item in items if item.get_closest_marker("once")}
        products = defaultdict(list)
        for item in items:
            mark = item.get_closest_marker("pairs")
            if mark is None or not hasattr(item, "callspec") or item.get_closest_marker("everywhere"):
                continue
            if self.databases.is_reachable(item.callspec.params.get("alias", "default")):
                products[item.parent, item.originalname, ("on", *mark.args)].append(item)
        for (_, name, apart), product in products.items():
            product.sort(key=lambda item: item.callspec.id)
            kept = enough([_values(item) for item in product], name, apart)
            left_out |= {item for number, item in enumerate(product) if number not in kept}
        if left_out:
            config.hook.pytest_deselected(items=[item for item in items if item in left_out])
            items[:] = [item for item in items if item not in left_out]

    def pytest_collection_finish(self) -> None:
        # What is there before the first test stays to the end: no collection need look at it again.
        gc.collect()
        gc.freeze()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        try:
            return (yield)
        finally:
            self.databases.allowed.clear()

    @pytest.hookimpl(tryfirst=True)  # before Django's setUpClass
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        for alias in sorted(_of_test_case(item)):
            self.databases.require(alias)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and not report.skipped:
            self.ran |= self.kinds.get(report.nodeid, set())

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._missed() and session.exitstatus in {
            pytest.ExitCode.OK,
            pytest.ExitCode.NO_TESTS_COLLECTED,
        }:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if missed := self._missed():
            kinds = ", ".join(sorted(missed))
            terminalreporter.write_line(f"PARALLEL_ORM_REQUIRE: no test ran on {kinds}", red=True)

    def _missed(self) -> set[str]:
        is_part = self._listing or os.environ.get("PARALLEL_ORM_TESTS") == "again"
        return set() if is_part else self.databases.required - self.ran


def _asked_for(item: pytest.Item) -> set[str]:
    """The aliases that a test names; those of the fixture ``alias`` carry their own marks."""
    fixtures: list[str] = getattr(item, "fixturenames", [])
    return {name for name in fixtures if name in KINDS} | _of_test_case(item)


def _values(item: pytest.Function) -> dict[str, Any]:
    """Of each parameter which one it is; those that are given together are one."""
    params = item.callspec.params
    together = {name: [name] for name in params}
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
        together |= {name.strip(): [each.strip() for each in names] for name in names}
    values: dict[str, Any] = {names[0]: tuple(id(params[name]) for name in names) for names in together.values()}
    return values | {name: value for name, value in params.items() if name == "alias"}


def _of_test_case(item: pytest.Item) -> set[str]:
    from django.test import SimpleTestCase

    case = getattr(item, "cls", None)
    if not (isinstance(case, type) and issubclass(case, SimpleTestCase)):
        return set()
    return set(KINDS) if case.databases == "__all__" else set(case.databases)


def _refuse_unasked_connections(databases: Databases) -> None:
    """Without this, whether a forgotten fixture is noticed would depend on the tests' order."""
    from django.db.backends.base.base import BaseDatabaseWrapper

    connect = BaseDatabaseWrapper.connect
    this_process = os.getpid()  # a forked worker serves many tests

    def guarded(self: Any) -> None:
        unasked = self.alias in KINDS and self.alias not in databases.allowed
        if unasked and os.getpid() == this_process:
            raise AssertionError(
                f"a connection to {self.alias!r}, which the running test did not ask for:"
                f" use the fixture {self.alias!r} or 'alias'"
            )
        connect(self)

    BaseDatabaseWrapper.connect = guarded


def _configure_hypothesis() -> None:
    from hypothesis import settings

    # Two cores shared with others: how long one example takes says nothing.
    settings.register_profile("tests", deadline=None)
    settings.load_profile("tests")


# --- Fixtures -------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _threads_are_free() -> Iterator[None]:
    """What a test started and never used is done before the next one begins, and no thread seems busy to that."""
    yield
    from tests.threads import all_done, async_thread_closed

    all_done()
    async_thread_closed()


@pytest.fixture(scope="session")
def databases(pytestconfig: pytest.Config) -> Databases:
    return pytestconfig.stash[_run].databases


@pytest.fixture(
    params=[
        pytest.param("default", id="sqlite", marks=pytest.mark.sqlite),
        pytest.param("postgres", id="postgres", marks=pytest.mark.postgres),
        pytest.param("mariadb", id="mariadb", marks=pytest.mark.mariadb),
    ]
)
def alias(request: pytest.FixtureRequest, databases: Databases) -> Iterator[str]:
    """Each kind of database in turn."""
    with databases.using(request.param) as name:
        yield name


def _fixture_of(alias: str) -> Any:
    def fixture(databases: Databases) -> Iterator[str]:
        with databases.using(alias) as name:
            yield name

    fixture.__doc__ = f"The alias {alias!r}, empty."
    return pytest.fixture(name=alias)(fixture)


default = _fixture_of("default")
other = _fixture_of("other")
memory = _fixture_of("memory")
postgres = _fixture_of("postgres")
mariadb = _fixture_of("mariadb")
