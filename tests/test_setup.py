"""The tests' own set-up does what the other tests rely on."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from urllib.parse import quote

import django
import pytest
from django.db import OperationalError, connections, transaction
from django.test import TestCase

from tests.testapp.models import Article

pytestmark = pytest.mark.once


@pytest.mark.parametrize("time", ["first", "second"])
def test_database_is_empty(alias: str, time: str) -> None:
    """A test does not see the rows of the one before."""
    assert not Article.objects.using(alias).exists()
    Article.objects.using(alias).create(name=time)


def test_several_databases(default: str, other: str, memory: str) -> None:
    """Aliases that a test asks for together are databases apart."""
    for index, alias in enumerate([default, other, memory]):
        for _ in range(index):
            Article.objects.using(alias).create(name=alias)
    counts = [Article.objects.using(alias).count() for alias in (default, other, memory)]
    assert counts == [0, 1, 2]


def test_unasked_connection_is_refused(other: str) -> None:
    """A test can't use by chance what it did not ask for."""
    with pytest.raises(AssertionError, match="did not ask for"):
        connections["default"].ensure_connection()


def _connect_afresh(alias: str, name: str | None) -> object:
    """In a worker: the row count, or the error's name."""
    if name is not None:
        connections[alias].settings_dict["NAME"] = name
    try:
        return Article.objects.using(alias).count()
    except OperationalError as error:
        return type(error).__name__
    finally:
        connections[alias].close()


def test_workers_settings_reach_only_the_databases_named_there(alias: str) -> None:
    """A worker that was not told of the test database finds none, rather than another."""
    Article.objects.using(alias).create(name="here")
    connection = connections[alias]
    with multiprocessing.get_context("spawn").Pool(1, initializer=django.setup) as pool:
        untold = pool.apply(_connect_afresh, (alias, None))
        told = pool.apply(_connect_afresh, (alias, connection.settings_dict["NAME"]))
    assert (untold, told) == ("OperationalError", 1)


class TestDjangosTestCase(TestCase):
    databases = frozenset({"default", "other"})

    @classmethod
    def setUpTestData(cls) -> None:
        Article.objects.create(name="of the class")

    def test_one(self) -> None:
        assert Article.objects.count() == 1
        Article.objects.using("other").create(name="one")

    def test_other(self) -> None:
        assert Article.objects.count() == 1
        assert Article.objects.using("other").count() == 0


def _run_pytest(folder: Path, body: str, **environment: str) -> str:
    """Run pytest, with our conftest, on a module of tests that may fail."""
    module = folder / "test_scratch.py"
    module.write_text(textwrap.dedent(body))
    root = Path(__file__).parent.parent
    options = ["-q", f"--rootdir={root}", f"--config-file={root / 'pyproject.toml'}"]
    plugins = ["-p", "no:cacheprovider", "-p", "tests.conftest"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *plugins, str(module)],
        cwd=root,
        env={**os.environ, **_the_same_server(), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return f"{done.stdout}\n{done.stderr}\nexit {done.returncode}"


def _the_same_server() -> dict[str, str]:
    """PostgreSQL of this run: that one need start none."""
    found = json.loads(os.environ["PARALLEL_ORM_TEST_DATABASES"]).get("postgres")
    if found is None or "PARALLEL_ORM_POSTGRES_URL" in os.environ:
        return {}
    user, password, host = (quote(found[name], safe="") for name in ("USER", "PASSWORD", "HOST"))
    return {"PARALLEL_ORM_POSTGRES_URL": f"postgres://{user}:{password}@{host}:{found['PORT']}/postgres"}


UNREACHABLE = "postgres://nobody:nothing@127.0.0.1:1/none"


def test_unreachable_server_is_a_skip(tmp_path: Path) -> None:
    """Without the server a developer still has a green run, which says what it left out."""
    out = _run_pytest(
        tmp_path,
        "def test_it(postgres): ...",
        PARALLEL_ORM_POSTGRES_URL=UNREACHABLE,
        PARALLEL_ORM_REQUIRE="",
    )
    assert "PARALLEL_ORM_POSTGRES_URL does not answer" in out
    assert "1 skipped" in out
    assert "exit 0" in out


BROKER = "import pytest\n\n@pytest.mark.rabbitmq\ndef test_it(databases): databases.url_of('rabbitmq')"


@pytest.mark.parametrize(("required", "verdict"), [("", "1 skipped"), ("rabbitmq", "required but not reachable")])
def test_unreachable_broker(tmp_path: Path, required: str, verdict: str) -> None:
    """As a database, one of messages is left out where it is not there, or must be there."""
    out = _run_pytest(tmp_path, BROKER, PARALLEL_ORM_RABBITMQ_URL="amqp://127.0.0.1:1//", PARALLEL_ORM_REQUIRE=required)
    assert verdict in out
    assert "PARALLEL_ORM_RABBITMQ_URL does not answer" in out


def test_required_server_must_be_reachable(tmp_path: Path) -> None:
    """In CI a missing server can't hide behind a skip."""
    out = _run_pytest(
        tmp_path,
        "def test_it(postgres): ...",
        PARALLEL_ORM_POSTGRES_URL=UNREACHABLE,
        PARALLEL_ORM_REQUIRE="postgres",
    )
    assert "postgres is required but not reachable" in out
    assert "exit 1" in out


def test_required_kind_must_have_run(tmp_path: Path) -> None:
    """Nor can tests that are not there, or that all skip themselves."""
    out = _run_pytest(
        tmp_path,
        "import pytest\n\ndef test_it(): ...\n\ndef test_skipped(postgres): pytest.skip('so')",
        PARALLEL_ORM_REQUIRE="postgres",
    )
    assert "no test ran on postgres" in out
    assert "exit 1" in out


def test_open_transaction_is_an_error(tmp_path: Path) -> None:
    """What one test leaves open would hold locks against the next."""
    out = _run_pytest(
        tmp_path,
        """
        from django.db import transaction
        from tests.testapp.models import Article

        def test_it(alias):
            transaction.atomic(using=alias).__enter__()
            Article.objects.using(alias).create(name="open")
        """,
    )
    assert "left a transaction open" in out


def test_atomic_is_no_left_over(alias: str) -> None:
    """A transaction that ended is none."""
    with transaction.atomic(using=alias):
        Article.objects.using(alias).create(name="closed")
