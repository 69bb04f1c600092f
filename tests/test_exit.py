"""The interpreter ends: at once, without a word, and the server hears of it. So does a forked child, alone."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
from django.db import connections

from tests.test_stop import asker, running, until
from tests.testapp.models import Article

#: Seconds, far beyond what an end may take, and far below what the queries would.
ALARM = 30

LONG = {
    "postgresql": "(SELECT 1 FROM pg_sleep(60)) = 1",
    "mysql": "SLEEP(60) = 0",
    "sqlite": "(WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 40000000000)"
    " SELECT max(x) FROM n) = 1",
}

SETTINGS = """
try:
    import MySQLdb
except ImportError:
    import pymysql
    pymysql.install_as_MySQLdb()
DATABASES = {{"default": {database!r}}}
INSTALLED_APPS = ["django.contrib.contenttypes", "parallel_orm", "tests.testapp"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
"""

HEAD = """
import os, sys, threading
os.environ["DJANGO_SETTINGS_MODULE"] = "program_settings"
import django
django.setup()
from tests.testapp.models import Article
LONG = {long!r}

def long(where=LONG):
    return Article.objects.extra(where=[where])

def wait_until_begun(pending):
    while pending.queue_time is None:
        threading.Event().wait(0.005)
"""


@pytest.fixture
def script(alias, tmp_path):
    """Return what runs a program of a user's own on this database, to its end, an alarm before the query's."""
    Article.objects.using(alias).create(name="one")
    wrapper = connections[alias]
    names = ("ENGINE", "NAME", "HOST", "PORT", "USER", "PASSWORD", "OPTIONS")
    database = {name: wrapper.settings_dict[name] for name in names}
    wrapper.close()

    def run(program):
        (tmp_path / "program_settings.py").write_text(SETTINGS.format(database=database))
        head = HEAD.format(long=LONG[wrapper.vendor])
        (tmp_path / "program.py").write_text(head + textwrap.dedent(program))
        return subprocess.run(
            [sys.executable, "-W", "ignore:This process:DeprecationWarning", "program.py"],  # of fork(), since 3.12
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
            capture_output=True,
            text=True,
            timeout=ALARM,
            check=False,
        )

    yield run
    if wrapper.vendor != "sqlite":
        until(lambda: running(alias) == 0, "the query outlived its program")
    asker.close()


ENDS = {
    "falls off": ("", 0, ""),
    "sys.exit": ("sys.exit(3)", 3, ""),
    "exception": ("raise ValueError('mine')", 1, "ValueError: mine"),
    "SystemExit in a thread": ("threading.Thread(target=sys.exit).start()", 0, ""),
}


@pytest.mark.pairs("end")
@pytest.mark.parametrize("end", ENDS)
def test_with_a_query_of_a_minute_that_nobody_used(script, end):
    """It is cancelled; nothing is printed but what the program itself raised."""
    statement, code, said = ENDS[end]
    done = script(f"""
        started = long().start_fetch()
        wait_until_begun(started.background["fetch"])
        print("begun", flush=True)
        {statement}
    """)
    assert (done.returncode, done.stdout) == (code, "begun\n"), done.stderr
    assert done.stderr.splitlines()[-1:] == [said][: bool(said)]
    assert done.stderr.count("Traceback") == bool(said)


def test_with_more_of_them_than_threads(script):
    """Those that nobody has begun are not begun any more."""
    done = script("""
        started = [long().start_fetch() for _ in range(30)]
        wait_until_begun(started[0].background["fetch"])
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_in_a_coroutine(script):
    done = script("""
        import asyncio
        async def main():
            started = long().start_fetch()
            while started.background["fetch"].queue_time is None:
                await asyncio.sleep(0.005)
            kept.append(started)  # asyncio takes the repr() of what is returned, and with it the rows
        kept = []
        asyncio.run(main())
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_child_ends_and_its_parent_reads_on(script, alias):
    """The child's end stops nothing of the parent's: not the query that is under way, not the connections."""
    if connections[alias].vendor == "sqlite":
        slow = LONG["sqlite"].replace("40000000000", "3000000").replace("= 1", "> 1")
    else:
        slow = LONG[connections[alias].vendor].replace("60", "1")
    done = script(f"""
        Article.objects.start_count().count()
        started = long({slow!r}).start_fetch()
        wait_until_begun(started.background["fetch"])
        child = os.fork()
        if child == 0:
            sys.exit(5)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        again = Article.objects.start_count()
        while not again.background["count"].done():  # so that it is not the caller who asks, on a connection of its own
            pass
        print(code, len(started), again.count(), again.background["count"].reason)
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "5 1 1 None\n", "")


@pytest.mark.pairs("method")
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_a_child_of_a_process_that_has_workers(script, method):
    """They are its parent's: it waits for none of them, ends none of them, and they go on."""
    done = script(f"""
        from django.conf import settings
        settings.PARALLEL_ORM = {{"START_METHOD": {method!r}}}
        if __name__ == "__main__":
            before = set(Article.objects.parallel_map(lambda row: os.getpid(), 1))
            from django.db import connections
            connections.close_all()
            child = os.fork()
            if child == 0:
                sys.exit(5)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            print(set(Article.objects.parallel_map(lambda row: os.getpid(), 1)) == before)
    """)
    assert (done.returncode, done.stdout, done.stderr) == (0, "5\nTrue\n", "")


def test_a_child_that_maps_too(script):
    """With workers of its own, which end with it."""
    done = script("""
        if __name__ == "__main__":
            Article.objects.parallel_map(lambda row: os.getpid(), 1)
            from django.db import connections
            connections.close_all()
            child = os.fork()
            if child == 0:
                (theirs,) = Article.objects.parallel_map(lambda row: os.getpid(), 1)
                print(theirs, flush=True)
                sys.exit(5)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    """)
    theirs, code = done.stdout.split()
    assert (done.returncode, code, done.stderr) == (0, "5", "")
    until(lambda: not psutil.pid_exists(int(theirs)), "a worker outlived the child that had it")
