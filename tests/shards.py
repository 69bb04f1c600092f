"""Several databases beside one that has the rows of all of them."""

import secrets
from contextlib import ExitStack, contextmanager

from django.db import connections

from parallel_orm.connections import lender
from tests.databases import tables
from tests.testapp.models import Sale, Shop


@contextmanager
def databases_like(alias, number, word="shard", models=(Shop, Sale)):
    """Yield the aliases of so many new databases of the kind of another one, with tables; gone afterwards."""
    settings, names = connections.settings[alias], []
    vendor = connections[alias].vendor
    with ExitStack() as stack:
        for place in range(number):
            name = f"{alias}_{word}{place}"
            database = f"{settings['NAME']}_{place}_{secrets.token_hex(2)}"
            if vendor != "sqlite":
                ask(alias, f"CREATE DATABASE {connections[alias].ops.quote_name(database)}")
                stack.callback(drop, alias, database)
            connections.settings[name] = {**settings, "NAME": database}
            stack.callback(forget, name)
            stack.enter_context(tables(name, *models))
            stack.callback(connections[name].close)
            names.append(name)
        yield tuple(names)


def ask(alias, sql):
    with connections[alias].cursor() as cursor:
        cursor.execute(sql)


def drop(alias, database):
    force = " WITH (FORCE)" if connections[alias].vendor == "postgresql" else ""
    ask(alias, f"DROP DATABASE {connections[alias].ops.quote_name(database)}{force}")
    connections[alias].close()


def forget(name):
    lender.close_idle()
    connections[name].close()
    del connections[name]
    del connections.settings[name]
    lender._budgets.pop(name, None)
