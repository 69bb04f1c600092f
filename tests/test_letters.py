"""What travels to a worker of an engine: sealed, without secrets, and opened only in the same world."""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import threading
import weakref
from base64 import b64decode, b64encode
from dataclasses import replace
from functools import partial
from pathlib import Path
from uuid import uuid4
from zlib import compress, decompress

import cloudpickle
import django
import pytest
from django.conf import settings
from django.db import connections
from django.test import override_settings
from django.utils import timezone, translation

import parallel_orm
from parallel_orm import errors, letters, parcels, proof, workers
from parallel_orm.chunks import Chunk
from parallel_orm.letters import Letter, run_letter
from parallel_orm.opened import KEPT_JOBS
from parallel_orm.parcels import Parcel, dumps, end_of_call
from parallel_orm.proof import ABSENT, claims, module_of, refuse_another_world, value_of
from parallel_orm.seals import sealed, unsealed
from parallel_orm.task import Job
from parallel_orm.work import Apply
from parallel_orm.workers import Crew
from tests import functions
from tests.testapp.models import Article, Pizzeria, Place, RankedArticle, Restaurant

SECRET = "nobody-knows-this-key"
PASSWORD = "nobody-knows-this-password"
both = pytest.mark.parametrize("by_value", [True, False], ids=["pickle", "json"])


def job(alias, function=functions.rank, **others):
    return Job(Article.objects.using(alias).order_by("rank"), Apply(function), **others)


def letter_of(job, *, by_value=True, engine="dask"):
    return Letter.of(job, by_value=by_value, engine=engine)


def content_of(letter):
    """Return what is told, and the job as it was written."""
    told = json.loads(unsealed(letter.text))
    return told, decompress(b64decode(told["job"]))


@pytest.fixture(autouse=True)
def _none_is_open():
    for opened in (letters._opened, parcels._opened):
        opened.clear()
    yield
    for opened in (letters._opened, parcels._opened):
        opened.clear()


# --- Seals ------------------------------------------------------------------------------


def test_what_was_sealed_is_unsealed():
    assert unsealed(sealed('{"a": "ß:"}')) == '{"a": "ß:"}'


@pytest.mark.parametrize("spoil", [lambda text: text[:-1], lambda text: "x" + text, lambda text: "", lambda text: 3])
def test_what_was_changed_is_not(spoil):
    with pytest.raises(errors.NotSealed, match="SECRET_KEY"):
        unsealed(spoil(sealed("text")))


def test_the_seal_of_another_key():
    with override_settings(SECRET_KEY="theirs"):
        text = sealed("text")
    with pytest.raises(errors.NotSealed):
        unsealed(text)
    with override_settings(SECRET_KEY_FALLBACKS=["theirs"]):
        assert unsealed(text) == "text", "a key may be changed while work goes on"


def test_no_signature_of_django_is_a_seal():
    """Else whoever is given a signed cookie has a message."""
    from django.core.signing import Signer

    with pytest.raises(errors.NotSealed):
        unsealed(Signer().sign("text"))


# --- Letters ----------------------------------------------------------------------------


@both
def test_a_letter_is_opened_once(default, by_value):
    Article.objects.using(default).bulk_create(Article(rank=n) for n in range(3))
    written = job(default, crew=Crew(functions.make_ready))
    letter = letter_of(written, by_value=by_value)
    opened = letter.open()
    assert opened is letter.open()
    assert str(opened.queryset.query) == str(written.queryset.query)
    outcome = run_letter(letter, Chunk(0, default), rests=True)
    assert outcome.error is None
    assert outcome.result() == [0, 1, 2]
    for _ in range(KEPT_JOBS + 3):
        letter_of(written, by_value=by_value).open()
    assert len(letters._opened) == KEPT_JOBS


class Large:
    """What a function closes over."""

    def __init__(self, size):
        self.content = bytes(size)

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.there.append(weakref.ref(self))

    there: list[weakref.ref] = []


def opened_large(write, alias, *sizes):
    """Open a job for each of these sizes; return the sizes of those that are kept."""
    Large.there.clear()
    for large in map(Large, sizes):
        write(job(alias, lambda row, large=large: row)).open()
    gc.collect()
    return [len(each().content) for each in Large.there if each() is not None]


MB = 2**20


@pytest.mark.parametrize("write", [letter_of, Parcel.of], ids=["letter", "parcel"])
def test_of_large_jobs_few_are_kept(default, write):
    """Nobody tells a process when their calls end, so it would hold them for ever. How they compress is no matter."""
    assert opened_large(write, default, *[20 * MB] * 5) == [20 * MB] * 3
    assert opened_large(write, default, 20 * MB, MB, 90 * MB) == [90 * MB], "the newest is kept, as it is at work"
    assert opened_large(write, default, MB, 2 * MB) == [MB, 2 * MB]


def test_a_job_that_is_at_work_outlasts_those_that_are_not(default):
    working = letter_of(job(default))
    opened = working.open()
    for _ in range(40):
        letter_of(job(default)).open()
        assert working.open() is opened


def test_processes_of_ours_keep_what_they_were_not_told_to_forget(default, monkeypatch):
    monkeypatch.setattr(workers, "slot", 0)
    parcel = Parcel.of(job(default))
    opened = parcel.open()
    assert opened_large(Parcel.of, default, *[20 * MB] * 5) == [20 * MB] * 5
    assert parcel.open() is opened
    end_of_call(parcel.name)
    assert parcel.open() is not opened


def test_the_text_of_a_letter_is_not_kept(default):
    """Beside what was made of it."""
    letter = letter_of(job(default))
    before = sys.getrefcount(letter.text)
    letter.open()
    after = sys.getrefcount(letter.text)
    assert after == before


@both
def test_language_and_time_zone_are_in_it_and_no_settings(default, by_value):
    with translation.override("de"), timezone.override("Europe/Berlin"), override_settings(DATE_FORMAT="theirs"):
        letter = letter_of(job(default, functions.date_format), by_value=by_value)
    opened = letter.open()
    assert opened.capsule.run(functions.neighbourhood, None) == ("de", "Europe/Berlin")
    assert opened.capsule.run(functions.date_format, None) == settings.DATE_FORMAT != "theirs"


class Opened:
    """Leaves a mark when it is unpickled, or read."""

    marks: list[int] = []

    def __reduce__(self):
        return Opened.leave_a_mark, ()

    @staticmethod
    def leave_a_mark():
        Opened.marks.append(1)
        return functions.rank


@both
def test_a_forged_letter_is_not_opened(default, by_value):
    """Not even unpacked: its content is what a stranger would have a worker call."""
    letter = letter_of(job(default), by_value=by_value)
    told, _ = content_of(letter)
    data = dumps(Opened()) if by_value else b'{"make":[{"name":"tests.test_letters:Opened.leave_a_mark"},[]]}'
    told["job"] = b64encode(compress(data)).decode()
    seal = letter.text.rpartition(":")[2]
    Opened.marks.clear()
    for text in (json.dumps(told), f"{json.dumps(told)}:{seal}", f"{json.dumps(told)}:"):
        forged = replace(letter, text=text)
        outcome = run_letter(forged, Chunk(0, default))
        with pytest.raises(errors.NotSealed):
            outcome.result()
    assert not Opened.marks
    replace(letter, text=sealed(json.dumps(told))).open()
    assert Opened.marks, "what is forged here would be opened, were it sealed"


@both
def test_secrets_are_not_in_it(default, by_value, monkeypatch):
    """In what goes to processes of ours, which are made like the caller, they are."""
    monkeypatch.setitem(connections.settings[default], "PASSWORD", PASSWORD)
    with override_settings(SECRET_KEY=SECRET):
        written = job(default, functions.date_format)
        letter = letter_of(written, by_value=by_value)
        told, data = content_of(letter)
        parcel = Parcel.of(written)
    for secret in (SECRET, PASSWORD):
        assert secret not in letter.text
        assert secret not in json.dumps(told)
        assert secret.encode() not in data
        assert secret.encode() in parcel.job


def test_settings_that_a_function_refers_to_are_sent_by_name(default):
    with override_settings(SECRET_KEY=SECRET):
        letter = letter_of(job(default, lambda row: settings.SECRET_KEY))
        _, data = content_of(letter)
        assert SECRET.encode() not in data
        assert letter.open().work.function(None) == SECRET


def test_what_cannot_travel_is_named(default):
    lock = threading.Lock()
    with pytest.raises(errors.NotPicklable, match=r"<lambda> cannot be sent to dask.*What it closes over"):
        letter_of(job(default, lambda row: lock))
    with pytest.raises(errors.NotPicklable, match=r"<lambda> cannot be sent to celery.*top of a module"):
        letter_of(job(default, lambda row: row), by_value=False, engine="celery")
    with pytest.raises(errors.NotPicklable, match=r"<lambda> cannot be sent to celery"):
        letter_of(job(default, crew=Crew(lambda worker: None)), by_value=False, engine="celery")
    odd = Article.objects.using(default)
    odd._hints = {"lock": lock}
    with pytest.raises(errors.NotPicklable, match=r"queryset of testapp\.Article cannot be sent to dask"):
        letter_of(Job(odd, Apply(functions.rank)))


# --- What a worker proves ---------------------------------------------------------------


def claimed(alias, *of, by_value=True):
    return claims([Article], of or [functions.rank], [alias], by_value=by_value)


@both
def test_the_same_world_proves_itself(default, by_value):
    refuse_another_world(claimed(default, by_value=by_value))


class Router:
    """Says nothing."""


@pytest.mark.parametrize(
    ("difference", "says"),
    [
        (partial(override_settings, TIME_ZONE="Asia/Tokyo"), "the setting TIME_ZONE is another"),
        (partial(override_settings, USE_TZ=False), "the setting USE_TZ is another"),
        (
            partial(override_settings, DATABASE_ROUTERS=["tests.test_letters.Router"]),
            "the setting DATABASE_ROUTERS is another",
        ),
    ],
    ids=["TIME_ZONE", "USE_TZ", "DATABASE_ROUTERS"],
)
def test_settings(default, difference, says):
    told = claimed(default)
    with difference(), pytest.raises(errors.AnotherWorld) as caught:
        refuse_another_world(told)
    assert caught.value.differences == [says]


def test_routers_that_are_objects_are_told_by_their_class(default):
    """Each process has its own."""
    one, same = Router(), Router()
    with override_settings(DATABASE_ROUTERS=[one]):
        told = claimed(default)
    with override_settings(DATABASE_ROUTERS=[same]):
        refuse_another_world(told)
    with override_settings(DATABASE_ROUTERS=[Opened()]), pytest.raises(errors.AnotherWorld):
        refuse_another_world(told)


@pytest.mark.parametrize(
    ("where", "name", "says"),
    [
        (parallel_orm, "parallel_orm", "parallel_orm is 0.0, and {} for the caller"),
        (cloudpickle, "cloudpickle", "cloudpickle is 0, and {} for the caller"),
    ],
)
def test_versions(default, monkeypatch, where, name, says):
    told = claimed(default)
    version = value_of(name, "")
    monkeypatch.setattr(where, "__version__", "0.0")
    with pytest.raises(errors.AnotherWorld) as caught:
        refuse_another_world(told)
    assert caught.value.differences == [says.format(version)]
    assert "start the workers anew" in str(caught.value)


def test_the_version_of_django(default, monkeypatch):
    told = claimed(default)
    monkeypatch.setattr(django, "VERSION", (1, 0, 0, "final", 0))
    monkeypatch.setattr(django, "get_version", lambda: "1.0")
    with pytest.raises(errors.AnotherWorld, match=r"Django is 1\.0"):
        refuse_another_world(told)


def test_pythons_version_matters_where_code_travels(default, monkeypatch):
    by_name, by_value = claimed(default, by_value=False), claimed(default)
    monkeypatch.setattr(proof, "sys", NewPython)
    refuse_another_world(by_name)
    with pytest.raises(errors.AnotherWorld, match=r"Python is 3\.99"):
        refuse_another_world(by_value)


class NewPython:
    class version_info:
        major, minor = 3, 99


def forgotten(alias):
    """Have the connection made anew, by what the settings say now."""
    connections[alias].close()
    del connections[alias]


def test_another_database(default, other, monkeypatch):
    """Not what it is called there, but which it is."""
    told = claimed(default)
    monkeypatch.setitem(connections.settings[default], "NAME", connections.settings[other]["NAME"])
    forgotten(default)
    with pytest.raises(errors.AnotherWorld) as caught:
        refuse_another_world(told)
    monkeypatch.undo()
    forgotten(default)
    assert caught.value.differences == ["the database default is another"]


def test_a_database_that_is_not_there(default, tmp_path, monkeypatch):
    told = claimed(default)
    monkeypatch.setitem(connections.settings[default], "NAME", str(tmp_path / "none"))
    forgotten(default)
    with pytest.raises(errors.AnotherWorld, match="the database default is not there"):
        refuse_another_world(told)
    monkeypatch.undo()
    forgotten(default)
    with pytest.raises(errors.AnotherWorld, match="the database nowhere is not there"):
        refuse_another_world([("database", "nowhere", "x")])
    assert not (tmp_path / "none").exists()


def test_each_database_is_told_apart_by_its_server(alias, default, other):
    values = {name: value_of("database", name) for name in {alias, default, other}}
    assert len(set(values.values())) == len(values)
    assert value_of("database", alias) == values[alias]
    connections[alias].close()
    assert value_of("database", alias) == values[alias]
    assert connections[alias].connection is None, "it is left as it was"
    assert PASSWORD not in values[alias]


def test_a_database_is_known_by_the_way_it_is_named_elsewhere(postgres, monkeypatch):
    """A worker may reach it by another host name, as another user."""
    value = value_of("database", postgres)
    if connections.settings[postgres]["HOST"] == "127.0.0.1":
        monkeypatch.setitem(connections.settings[postgres], "HOST", "localhost")
        forgotten(postgres)
        assert value_of("database", postgres) == value
        connections[postgres].close()
        monkeypatch.undo()
        forgotten(postgres)


def test_two_databases_of_one_server_are_two(postgres, monkeypatch):
    value = value_of("database", postgres)
    monkeypatch.setitem(connections.settings[postgres], "NAME", "postgres")
    forgotten(postgres)
    assert value_of("database", postgres) != value
    monkeypatch.undo()
    forgotten(postgres)


def say(alias, *statements):
    with connections[alias].cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)


@pytest.fixture
def user(postgres):
    """Yield the name of another user of the server, whose password it is too; a schema may be called so."""
    name = f"user_{uuid4().hex[:12]}"
    say(postgres, f"CREATE ROLE {name} LOGIN PASSWORD '{name}'")
    yield name
    forgotten(postgres)
    say(postgres, f"DROP SCHEMA IF EXISTS {name} CASCADE", f"DROP ROLE {name}")


@pytest.fixture
def value_elsewhere(postgres, user, monkeypatch):
    """What another process says of the database, whose settings are others."""

    def value(*, by=None, **options):
        with monkeypatch.context() as patch:
            ours = connections.settings[postgres]
            patch.setitem(ours, "OPTIONS", {**ours.get("OPTIONS", {}), **options})
            if by is not None:
                patch.setitem(ours, "USER", by)
                patch.setitem(ours, "PASSWORD", by)
            forgotten(postgres)
            found = value_of("database", postgres)
        forgotten(postgres)
        return found

    return value


OWN_SCHEMA = "CREATE SCHEMA {0}; GRANT USAGE ON SCHEMA {0} TO {0}"


@pytest.mark.parametrize(
    ("statement", "how"),
    [
        (OWN_SCHEMA, {"options": "-c search_path={0},public"}),
        (OWN_SCHEMA, {"options": "-c search_path={0}"}),
        (OWN_SCHEMA, {"options": '-c search_path=public,"{0}"'}),
        (OWN_SCHEMA, {"by": "{0}"}),
        (OWN_SCHEMA, {"assume_role": "{0}"}),
        (OWN_SCHEMA + "; ALTER ROLE {0} SET search_path = Public, {0}", {"by": "{0}"}),
        ("ALTER ROLE {0} SET search_path = ''", {"by": "{0}"}),
    ],
)
def test_other_schemas_of_the_same_database(value_elsewhere, postgres, user, statement, how):
    """Their tables have the same names, and other rows."""
    claim = "database", postgres, value_of("database", postgres)
    say(postgres, statement.format(user))
    refuse_another_world([claim])
    value = value_elsewhere(**{key: each.format(user) for key, each in how.items()})
    with pytest.raises(errors.AnotherWorld) as caught:
        refuse_another_world([(*claim[:2], value)])
    assert caught.value.differences == [f"the search_path of the database {postgres} is another"]


@pytest.mark.parametrize(
    ("statement", "how"),
    [
        ("SELECT 1", {"by": "{0}"}),
        ("CREATE SCHEMA {0}", {"by": "{0}"}),  # and may not use it
        (OWN_SCHEMA, {"options": '-c search_path=nowhere,PUBLIC,"of,\\ ""it""",public'}),
    ],
)
def test_the_same_schemas_in_other_words(value_elsewhere, postgres, user, statement, how):
    """One that is not there, or not to be used, hides no table."""
    say(postgres, statement.format(user))
    value = value_elsewhere(**{key: each.format(user) for key, each in how.items()})
    assert value == value_of("database", postgres)


def test_a_schema_of_an_odd_name(value_elsewhere, postgres):
    say(postgres, 'CREATE SCHEMA "Of, ""it"""')
    try:
        assert value_elsewhere(options='-c search_path="Of,\\ ""it""",public') != value_of("database", postgres)
    finally:
        say(postgres, 'DROP SCHEMA "Of, ""it"""')


@pytest.mark.parametrize("statement", ["SET search_path = {0}", "SET ROLE {0}", "SET SESSION AUTHORIZATION {0}"])
def test_what_a_session_was_given_is_no_difference(postgres, user, statement):
    """It goes along with the call."""
    say(postgres, OWN_SCHEMA.format(user))
    value = value_of("database", postgres)
    say(postgres, statement.format(user))
    assert value_of("database", postgres) == value


def test_a_vendor_that_is_not_known_is_told_by_its_settings(default, monkeypatch):
    monkeypatch.setattr(connections[default], "vendor", "oracle")
    value = value_of("database", default)
    assert value != ABSENT
    monkeypatch.setitem(connections[default].settings_dict, "NAME", "another")
    assert value_of("database", default) != value


MODULE = """
from dataclasses import dataclass
from functools import lru_cache, wraps

def decorated(function):
    @wraps(function)
    def wrapper(row):
        return function(row)
    return wrapper

@decorated
def function(row):
    return [n for n in (row.rank, {number})]

@lru_cache
def cached(row):
    return lambda: row

@dataclass
class Of:
    row: object

    @classmethod
    def make(cls):
        return cls(1)

    @property
    def rank(self):
        return self.row
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write a module, and import it; its file may be written again."""
    file = tmp_path / "of_the_project.py"
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(number):
        file.write_text(MODULE.format(number=number))
        proof._of_module.cache_clear()

    def imported():
        sys.modules.pop("of_the_project", None)
        import of_the_project

        proof._of_module.cache_clear()
        return of_the_project

    write(1)
    imported.write = write
    yield imported
    sys.modules.pop("of_the_project", None)
    proof._of_module.cache_clear()


def test_the_module_of_a_function(default, module):
    told = claimed(default, partial(module().function, 1))
    refuse_another_world(told)
    module.write(2)
    module()
    with pytest.raises(errors.AnotherWorld, match="the module of_the_project is another"):
        refuse_another_world(told)
    sys.modules.pop("of_the_project", None)
    (Path(sys.path[0]) / "of_the_project.py").unlink()
    proof._of_module.cache_clear()
    with pytest.raises(errors.AnotherWorld, match="the module of_the_project is not there"):
        refuse_another_world(told)


def test_a_module_that_was_deployed_and_not_loaded_anew(default, module):
    """The worker that was there before has the new file, and runs the old code."""
    module()
    module.write(2)
    told = [("module", "of_the_project", value_of_a_fresh_process())]
    with pytest.raises(errors.AnotherWorld, match="of_the_project was changed since this worker loaded it"):
        refuse_another_world(told)
    module()
    assert value_of("module", "of_the_project") == value_of_a_fresh_process()


def test_a_default_that_was_changed_since_the_worker_was_set_up(default, module, monkeypatch):
    """No code tells of it: so a worker remembers what was in the files of its modules."""
    signals = pytest.importorskip("celery.signals")
    importlib.import_module("parallel_orm.tasks")
    monkeypatch.setattr(proof, "_remembered", {})
    file = Path(sys.path[0]) / "of_the_project.py"
    file.write_text("def function(row, factor=2): return row.rank * factor\n")
    sys.modules.pop("of_the_project", None)
    importlib.import_module("of_the_project")
    for signal in (signals.worker_process_init, signals.worker_ready):
        proof._remembered.clear()
        signal.send(sender=None)
        assert {"of_the_project", "parallel_orm.proof"} <= {*proof._remembered}
        assert "django.db" not in proof._remembered
    told = [("module", "of_the_project", value_of_a_fresh_process())]
    refuse_another_world(told)
    proof._of_module.cache_clear()
    file.write_text("def function(row, factor=3): return row.rank * factor\n")
    told = [("module", "of_the_project", value_of_a_fresh_process())]
    with pytest.raises(errors.AnotherWorld, match="of_the_project was changed since this worker loaded it"):
        refuse_another_world(told)


def value_of_a_fresh_process():
    code = "from parallel_orm.proof import value_of; print(value_of('module', 'of_the_project'))"
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, check=True
    )
    return done.stdout.decode().strip()


class Callable:
    def __call__(self, row):
        return row.rank

    @classmethod
    def of_class(cls, row):
        return row.rank


@pytest.mark.parametrize(
    ("function", "module"),
    [
        (functions.rank, "tests.functions"),
        (partial(partial(functions.tick, folder="x")), "tests.functions"),
        (functions.Methods(3), "tests.functions"),
        (functions.Methods(3).method, "tests.functions"),
        (Callable(), "tests.test_letters"),
        (Callable.of_class, "tests.test_letters"),
        (lambda row: row, ""),
        (len, ""),
        (str.upper, ""),
        (None, ""),
    ],
    ids=str,
)
def test_whose_code_a_function_is(function, module):
    assert module_of(function) == module


def test_migrations():
    assert value_of("migrations", "auth") not in ("none", ABSENT)
    assert value_of("migrations", "testapp") == "none"
    assert value_of("migrations", "no_such_app") == ABSENT
    with pytest.raises(errors.AnotherWorld, match="the migrations no_such_app is not there"):
        refuse_another_world([("migrations", "no_such_app", "x")])


def test_models(monkeypatch):
    value = value_of("model", "testapp.Article")
    proof._of_model.cache_clear()
    monkeypatch.setattr(Article._meta.get_field("rank"), "column", "rank_2")
    assert value_of("model", "testapp.Article") != value
    proof._of_model.cache_clear()
    assert value_of("model", "testapp.NoSuch") == ABSENT


@pytest.mark.parametrize(
    ("model", "of"),
    [(Article, Article), (RankedArticle, Article), (Pizzeria, Pizzeria), (Pizzeria, Restaurant), (Pizzeria, Place)],
    ids=["its own", "a proxy's", "a child's own", "its parent's", "a grandparent's"],
)
def test_the_tables_of_a_model(monkeypatch, model, of):
    """A worker whose model has the same columns in another table has other rows."""
    label = model._meta.label
    proof._of_model.cache_clear()
    value = value_of("model", label)
    proof._of_model.cache_clear()
    monkeypatch.setattr(of._meta, "db_table", "elsewhere")
    assert value_of("model", label) != value
    proof._of_model.cache_clear()


# --- A process without Django -----------------------------------------------------------


def run_bare(code, **env):
    path = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [sys.executable, "-c", code],
        env={
            **{key: value for key, value in os.environ.items() if key != "DJANGO_SETTINGS_MODULE"},
            "PYTHONPATH": path,
            **env,
        },
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_a_worker_without_settings():
    done = run_bare("from parallel_orm.letters import set_up; set_up()")
    assert "EngineUnavailable: This worker has no Django settings" in done.stderr


def test_a_worker_sets_itself_up():
    code = "from parallel_orm.letters import set_up; set_up(); from django.apps import apps; print(apps.ready)"
    assert run_bare(code, DJANGO_SETTINGS_MODULE="tests.settings").stdout == "True\n"
