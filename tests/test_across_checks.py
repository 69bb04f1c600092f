"""``manage.py check`` looks at groups of databases."""

from __future__ import annotations

import pytest
from django.db import connections
from django.test import override_settings

from parallel_orm.checks import check_groups, check_tables


@pytest.fixture
def group():
    def named(*aliases):
        return override_settings(PARALLEL_ORM={"GROUPS": {"shards": list(aliases)}})

    return named


def told(messages):
    return [(message.id, message.msg) for message in messages]


def test_nothing_to_say(default, other, group):
    with group("default", "other"):
        assert check_groups() == []
        assert check_tables(databases=["default", "other"]) == []


def test_two_names_of_one_database(default, other, group, monkeypatch):
    with group("default", "other"):
        monkeypatch.setitem(connections.settings["other"], "NAME", connections.settings["default"]["NAME"])
        ((identity, text),) = told(check_groups())
    assert identity == "parallel_orm.W001"
    assert "'default' and 'other' of the group 'shards' are one database" in text


def test_databases_of_several_kinds(default, postgres, group):
    with group("default", "postgres"):
        ((identity, text),) = told(check_groups())
    assert identity == "parallel_orm.W003"
    assert "'default' is sqlite, 'postgres' is postgresql" in text


def test_a_database_that_lacks_something(alias, group):
    """A table, or a column, of a model that may be there; asked only of databases that the check is for."""
    connection = connections[alias]
    with group(alias):
        with connection.cursor() as cursor:
            cursor.execute("ALTER TABLE testapp_sale RENAME COLUMN weight TO heft")
            cursor.execute("ALTER TABLE testapp_indexed RENAME TO elsewhere")
        try:
            found = told(check_tables(databases=[alias]))
            assert check_tables(databases=[]) == check_tables(databases=None) == []
        finally:
            with connection.cursor() as cursor:
                cursor.execute("ALTER TABLE testapp_sale RENAME COLUMN heft TO weight")
                cursor.execute("ALTER TABLE elsewhere RENAME TO testapp_indexed")
    texts = [text for identity, text in found if identity == "parallel_orm.W002"]
    assert len(texts) == len(found)
    assert any("lacks the column 'weight' of testapp.Sale" in text for text in texts)
    assert any("lacks the table 'testapp_indexed' of testapp.Indexed" in text for text in texts)
    assert len(found) == 2


def test_a_router_may_say_that_it_is_not_there(default, group, monkeypatch):
    class Router:
        def allow_migrate(self, db, app_label, model_name=None, **hints):
            return model_name != "indexed"

    monkeypatch.setattr("django.db.router.routers", [Router()])
    connection = connections[default]
    with group(default):
        with connection.cursor() as cursor:
            cursor.execute("ALTER TABLE testapp_indexed RENAME TO elsewhere")
        try:
            assert check_tables(databases=[default]) == []
        finally:
            with connection.cursor() as cursor:
                cursor.execute("ALTER TABLE elsewhere RENAME TO testapp_indexed")
