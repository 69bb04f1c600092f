"""Where people call from: a script, its standard input, a module, a prompt, and the workers of a web server."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
from http.client import HTTPConnection
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

WAIT = 60

PROJECT = """
from django.conf import settings
settings.configure(
    DATABASES={{"default": {{"ENGINE": "django.db.backends.sqlite3", "NAME": {name!r}}}}},
    INSTALLED_APPS=["django.contrib.contenttypes", "parallel_orm", "tests.testapp"],
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    ROOT_URLCONF="project",
    SECRET_KEY="tests",
    ALLOWED_HOSTS=["*"],
)
import django
django.setup()
from django.core.management import call_command
from django.core.wsgi import get_wsgi_application
from django.http import HttpResponse
from django.urls import path
from tests.testapp.models import Article

def answer(request):
    results = Article.objects.parallel_map(lambda row: row.rank * 2, 2, chunk_size=5)
    return HttpResponse(f"{{sum(results)}} {{results.report.reason}}")

urlpatterns = [path("", answer)]
application = get_wsgi_application()
"""
FILL = """
from project import *
call_command("migrate", run_syncdb=True, verbosity=0)
Article.objects.bulk_create(Article(name=str(n), rank=n) for n in range(30))
"""
MAP = """
from project import Article
def double(row):
    return row.rank * 2

print(sum(Article.objects.parallel_map(double, 2, chunk_size=5)))
print(sum(Article.objects.parallel_map(lambda row: row.rank, 2)))
"""


def environment(folder: Path) -> dict[str, str]:
    given = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), str(folder)])}
    given.pop("DJANGO_SETTINGS_MODULE", None)
    return given


def run(folder: Path, *arguments: str, said: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        input=said,
        capture_output=True,
        text=True,
        timeout=WAIT,
        env=environment(folder),
        cwd=folder,
        check=True,
    )


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with a project of a few rows."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "project.py").write_text(PROJECT.format(name=str(folder / "db.sqlite3")))
    (folder / "mapped.py").write_text(MAP)
    run(folder, "-c", FILL)
    return folder


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["mapped.py"], ""), (["-m", "mapped"], ""), (["-c", MAP], ""), (["-"], MAP), (["-i", "-q"], MAP)],
    ids=["script", "module", "-c", "standard input", "prompt"],
)
def test_a_program(project, arguments, said):
    assert run(project, *arguments, said=said).stdout.split() == ["870", "435"]


def test_a_command(project):
    """The shell of Django, whose functions are of no module."""
    shell = "from django.core.management import call_command; import project; call_command('shell', command={!r})"
    assert run(project, "-c", shell.format(textwrap.dedent(MAP))).stdout.split()[-2:] == ["870", "435"]


@pytest.mark.parametrize("preload", [[], ["--preload"]], ids=["each loads", "preload"])
def test_the_workers_of_a_server(project, preload):
    """Each of them has a pool of its own; none is left when they end."""
    pytest.importorskip("gunicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "gunicorn", "project:application", "-w", "2", "-b", f"127.0.0.1:{port}", *preload]
    with subprocess.Popen(
        command, env=environment(project), cwd=project, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as server:
        try:
            answers = {ask(port, server) for _ in range(6)}
        finally:
            server.send_signal(signal.SIGTERM)
            _, said = server.communicate(timeout=WAIT)
    assert answers == {"870 None"}
    assert server.returncode == 0
    assert "Traceback" not in said


def ask(port: int, server: subprocess.Popen[Any]) -> str:
    """Ask for the page, as soon as there is somebody to answer."""
    until = monotonic() + WAIT
    while True:
        connection = HTTPConnection("127.0.0.1", port, timeout=WAIT)
        try:
            connection.request("GET", "/")
            return connection.getresponse().read().decode()
        except ConnectionRefusedError:
            assert server.poll() is None
            assert monotonic() < until
        finally:
            connection.close()
