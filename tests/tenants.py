# ruff: noqa: E402, F821 - set up first; what it is given stands above it
# A project with django-tenants: run by test_neighbourhood.py as a program of its own, with DATABASE and LIMITED given.
import threading
from concurrent.futures import ThreadPoolExecutor

from django.conf import settings

settings.configure(
    DATABASES={"default": DATABASE},
    DATABASE_ROUTERS=["django_tenants.routers.TenantSyncRouter"],
    SHARED_APPS=["django_tenants", "django.contrib.contenttypes"],
    TENANT_APPS=["django.contrib.contenttypes", "tests.testapp"],
    INSTALLED_APPS=["django_tenants", "django.contrib.contenttypes", "parallel_orm", "tests.testapp"],
    TENANT_MODEL="testapp.Tag",
    TENANT_DOMAIN_MODEL="testapp.Tag",
    TENANT_LIMIT_SET_CALLS=LIMITED,
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
    PARALLEL_ORM={"CONNECTIONS": 3},
)
import django

django.setup()

import pytest
from django.db import ProgrammingError, connection, connections, transaction
from django_tenants.utils import schema_context

from parallel_orm.connections import lender
from parallel_orm.executors.threads import background_threads
from tests.testapp.models import Article, Author, Tag
from tests.threads import submit

WAIT = 30
ROWS = {"one": 3, "two": 5}


def name_of(row):
    return row.name


def landed(queryset, verb):
    return queryset.background[verb]._read.landed.result(WAIT).result()


for schema, number in ROWS.items():
    with connection.cursor() as cursor:
        cursor.execute(f"CREATE SCHEMA {schema}")
    with schema_context(schema):
        with connection.schema_editor() as editor:
            editor.create_model(Author)
            editor.create_model(Tag)
            editor.create_model(Article)
        Article.objects.bulk_create(Article(name=schema) for _ in range(number))


def check(schema, *, stolen=False, reason=None):
    """What was started for a tenant has its rows, whichever tenant it is used in."""
    fetched, counted = Article.objects.start_fetch(), Article.objects.start_count()
    other = {"one": "two", "two": "one"}[schema]
    with schema_context(other):
        if not stolen:
            landed(fetched, "fetch"), landed(counted, "count")
        assert {row.name for row in fetched} == {schema}
        assert (len(fetched), counted.count()) == (ROWS[schema], ROWS[schema])
        assert fetched.background["fetch"].reason == ("stolen" if stolen else reason)
        assert Article.objects.count() == ROWS[other]
    assert Article.objects.count() == ROWS[schema]


# Two tenants, alone and by turns, in the background.
for schema in ("one", "two", "one"):
    with schema_context(schema):
        check(schema)
        with transaction.atomic():
            check(schema)
        for workers in ("threads", "processes"):
            names = list(Article.objects.parallel_map(name_of, **{workers: 2}))
            assert names == [schema] * ROWS[schema], names
assert lender._idle["default"], "connections are kept"


# Many at once.
def serve(turns):
    try:
        for schema in turns:
            connection.set_schema(schema)
            check(schema)
    finally:
        connections.close_all()


with ThreadPoolExecutor(4) as threads:
    for future in [threads.submit(serve, turns) for turns in [("one", "two") * 10, ("two", "one") * 10] * 2]:
        future.result(WAIT)

# No thread is free: stolen, before and after the tenant was changed, and by a write while a change is pending.
threads, gate = background_threads(), threading.Event()
at_gate = threading.Barrier(threads.number + 1)


def hold():
    at_gate.wait(WAIT)
    gate.wait(WAIT)


for _ in range(threads.number):
    submit(hold)
at_gate.wait(WAIT)
for schema in ("one", "two"):
    connection.set_schema(schema)
    check(schema, stolen=True)
connection.set_schema("one")
fetched, counted = Article.objects.start_fetch(), Article.objects.start_count()
connection.set_schema("two")  # said to the server with the next cursor, which is that of the write
Article.objects.create(name="two")
assert fetched.background["fetch"].done(), "the barrier had it run before the write"
assert ({row.name for row in fetched}, len(fetched), counted.count()) == ({"one"}, 3, 3)
assert Article.objects.count() == 6
connection.set_schema("one")
assert Article.objects.count() == 3
Article.objects.create(name="one")
assert Article.objects.count() == 4
ROWS.update(one=4, two=6)
gate.set()

# A search path of the user's own, beside the tenant's.
connection.set_schema("one")
with connection.cursor() as cursor:
    cursor.execute("SET search_path = two")
    inline = Article.objects.count()
    counted = Article.objects.start_count()
    landed(counted, "count")
    assert counted.count() == inline, (counted.count(), inline, counted.background["count"].reason)

# Without a tenant: the tables are not there, as they are not inline.
connection.close()
connection.set_schema_to_public()
started = Article.objects.start_count()
with pytest.raises(ProgrammingError, match="testapp_article"):
    started.count()

connections.close_all()
lender.close_idle()
print("never another's")
