"""How a database sorts text: asked of its catalogue, so that two databases are known to sort alike.

What sorts by code points Python sorts too. All else is left to the database itself: it is asked for the ranks of the
values at hand, by its own ``ORDER BY``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import monotonic
from typing import Any

from django.db import connections
from django.db.models import Case, ExpressionWrapper, Max, Min, Subquery, Value
from django.db.models.expressions import Col, RawSQL, Ref
from django.db.models.functions import Cast, Collate

from parallel_orm.background import loop_is_running
from parallel_orm.connections import lender
from parallel_orm.guards import is_in_memory
from parallel_orm.outcomes import named

#: Seconds for which what a catalogue said is believed.
LASTS = 60.0
_known: dict[tuple[Any, ...], tuple[float, Collation]] = {}


@dataclass(frozen=True, slots=True)
class Collation:
    """One way to sort text, on one database."""

    #: What a message calls it.
    name: str
    #: Equal where two databases sort alike.
    identity: tuple[Any, ...]
    #: Names it in SQL, behind the text: with what must be done to the text before.
    sql: str
    #: Whether it sorts by code points, and finds equal what Python finds equal.
    is_python: bool = False
    #: Whether it finds equal what Python finds equal.
    tells_all_apart: bool = False


class Unknown(Exception):
    """Nobody knows how this is sorted; the message says what it is."""


def collation_of(alias: str, expression: Any) -> Collation:
    """Return by what a database sorts an expression that is text. Raises :class:`Unknown`."""
    vendor = connections[alias].vendor
    if vendor not in CATALOGUES:
        raise Unknown(f"no catalogue of {vendor} is known")
    found = {each.identity: each for each in _collations(alias, expression, vendor)}
    if len(found) > 1:
        raise Unknown("it is made of text of several collations")
    return next(iter(found.values()), None) or _asked(alias, None, None)


def _collations(alias: str, expression: Any, vendor: str) -> Iterator[Collation]:
    if isinstance(expression, Ref):
        yield from _collations(alias, expression.get_source_expressions()[0], vendor)
    elif isinstance(expression, Collate):
        named: Any = expression
        yield _asked(alias, None, named.collation)
    elif isinstance(expression, Col):
        column: Any = expression.target
        if target_of(column).get_internal_type() in TEXT:
            yield _asked(alias, column.model._meta.db_table, column.column)
    elif isinstance(expression, Subquery | RawSQL):
        raise Unknown("it is computed in a way of its own")
    elif isinstance(expression, Value):
        return
    elif isinstance(expression, ExpressionWrapper):  # which is nothing in SQL
        yield from _collations(alias, expression.expression, vendor)
    elif vendor == "mysql" and isinstance(expression, Cast):
        yield _asked(alias, None, None)  # of the connection, whatever it is made of
    elif vendor != "sqlite" and isinstance(expression, Case):  # of its results, not of its conditions
        for result in (*(each.result for each in expression.cases), expression.default):
            yield from _collations(alias, result, vendor)
    elif vendor == "sqlite" and not isinstance(expression, Cast | Max | Min):
        yield _asked(alias, None, None)  # only a column brings its collation
    else:
        for source in expression.get_source_expressions():
            if source is not None:
                yield from _collations(alias, source, vendor)


#: Internal types of Django's fields that are text; addresses are, but on PostgreSQL.
TEXT = frozenset(("CharField", "TextField", "SlugField", "FileField", "FilePathField", "GenericIPAddressField"))


def target_of(field: Any) -> Any:
    """Return the field whose values a column has: of a foreign key, that which it refers to."""
    while getattr(field, "remote_field", None) is not None and hasattr(field, "target_field"):
        field = field.target_field
    return field


def _asked(alias: str, table: str | None, name: str | None) -> Collation:
    """Return the collation of a column; without a table that of this name, and without a name the default."""
    connection = connections[alias]
    place = alias, repr(sorted(connection.settings_dict.items(), key=str)), table, name
    until, found = _known.get(place, (0.0, None))
    if found is None or until < monotonic():
        found = CATALOGUES[connection.vendor](alias, table, name)
        _known[place] = monotonic() + LASTS, found
    return found


def ask(alias: str, question: str, values: list[Any]) -> list[Any]:
    """Ask a database something on the driver's own cursor of the caller's connection: it is no query of the user's.

    In a coroutine, which may not use that, on another one; the event loop waits for it.
    """
    connection: Any = connections[alias]
    if loop_is_running() and not is_in_memory(connection):
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(_ask_on_lent, alias, question, values).result()
    if connection.vendor == "sqlite":
        question = question.replace("%s", "?")
    with named(alias), connection.wrap_database_errors:
        connection.ensure_connection()
        cursor = connection.connection.cursor()
        try:
            cursor.execute(question, values)
            return list(cursor.fetchall())
        finally:
            cursor.close()


def _ask_on_lent(alias: str, question: str, values: list[Any]) -> list[Any]:
    with lender.lent(alias):
        return ask(alias, question, values)


# --- What the catalogues say -------------------------------------------------------------

#: What of a row of ``pg_database``, or of ``pg_collation``, decides how text is sorted. Names differ by version.
DECIDES = ("provider", "collate", "ctype", "locale", "rules", "version")
#: Locales that sort by code points.
PLAIN = ("C", "POSIX")
UTF8 = 6


def _of_postgres(alias: str, table: str | None, name: str | None) -> Collation:
    (database,) = ask(alias, "SELECT to_jsonb(d) FROM pg_database d WHERE datname = current_database()", [])[0]
    question = "SELECT to_jsonb(c), n.nspname FROM pg_collation c JOIN pg_namespace n ON n.oid = collnamespace "
    if table is not None:
        quote = connections[alias].ops.quote_name
        rows = ask(
            alias,
            question + "JOIN pg_attribute a ON a.attcollation = c.oid WHERE a.attrelid = %s::regclass AND attname = %s",
            [quote(table), name],
        )
    elif name is not None:
        rows = ask(alias, question + "WHERE c.oid = %s::regcollation", [connections[alias].ops.quote_name(name)])
    else:
        rows = ask(alias, question + "WHERE collname = 'default'", [])
    if not rows:
        raise Unknown("its collation is not in the catalogue")
    collation, schema = rows[0]
    collation, database = _as_dict(collation), _as_dict(database)
    is_default = collation["collname"] == "default"
    facts = database if is_default else collation
    identity = tuple(sorted((key, str(value)) for key, value in facts.items() if key.endswith(DECIDES) and value))
    is_deterministic = bool(collation.get("collisdeterministic", True))
    provider = facts.get("datlocprovider" if is_default else "collprovider", "c")
    locale = facts.get("datcollate" if is_default else "collcollate")
    plain = (provider == "c" and locale in PLAIN) or provider == "b"
    return Collation(
        str(facts.get("datlocale") or facts.get("daticulocale") or locale) if is_default else collation["collname"],
        ("code points",) if plain and is_deterministic else (*identity, is_deterministic),
        f'{{0}}::text COLLATE "{schema}"."{collation["collname"]}"',
        is_python=plain and is_deterministic and database["encoding"] == UTF8,
        tells_all_apart=is_deterministic,
    )


def _as_dict(value: Any) -> dict[str, Any]:
    return dict(json.loads(value)) if isinstance(value, str) else dict(value)


SHOW = "SHOW FULL COLUMNS FROM {} WHERE Field = %s"


def _of_mysql(alias: str, table: str | None, name: str | None) -> Collation:
    if table is not None:
        described = ask(alias, SHOW.format(connections[alias].ops.quote_name(table)), [name])
        rows = [(column[2],) for column in described]
    elif name is not None:
        rows = [(name,)]
    else:
        rows = ask(alias, "SELECT @@collation_connection", [])
    found = next((str(row[0]) for row in rows if row[0]), "")
    if not re.fullmatch(r"\w+", found):
        raise Unknown("its collation is not in the catalogue")
    is_python = found.endswith(("_nopad_bin", "_0900_bin")) and found.startswith("utf8")
    character_set = found.partition("_")[0]
    return Collation(found, (found,), f"CONVERT({{0}} USING {character_set}) COLLATE {found}", is_python, is_python)


EXPLAIN = "EXPLAIN SELECT 1 FROM {0} ORDER BY +{0}.{1}"


def _of_sqlite(alias: str, table: str | None, name: str | None) -> Collation:
    if table is not None and name is not None:
        quote = connections[alias].ops.quote_name
        # Of what it would sort by, its program tells the collation: k(1,NOCASE), and B for BINARY.
        steps = ask(alias, EXPLAIN.format(quote(table), quote(name)), [])
        keys = [re.fullmatch(r"k\(\d+,-?(\w+)(,.*)?\)", str(step[5])) for step in steps if step[1] == "SorterOpen"]
        if len(keys) != 1 or keys[0] is None:
            raise Unknown("its collation is not known")
        found = keys[0][1]
    else:
        found = "BINARY" if name is None else name
    found = "BINARY" if found.upper() in ("B", "BINARY") else found.upper()
    if not re.fullmatch(r"\w+", found):
        raise Unknown("its collation has no plain name")
    encoding = str(ask(alias, "PRAGMA encoding", [])[0][0])
    is_python = found == "BINARY" and encoding == "UTF-8"
    return Collation(found, (found, encoding), f"{{0}} COLLATE {found}", is_python, found == "BINARY")


CATALOGUES: dict[str, Callable[[str, str | None, str | None], Collation]] = {
    "postgresql": _of_postgres,
    "mysql": _of_mysql,
    "sqlite": _of_sqlite,
}

# --- Ranks --------------------------------------------------------------------------------

#: Numbers the values of a list as a database sorts them: equal ones alike.
RANKS = {
    "postgresql": "SELECT dense_rank() OVER (ORDER BY {0})"
    " FROM unnest(%s::text[]) WITH ORDINALITY AS t(v, n) ORDER BY n",
    "mysql": "SELECT dense_rank() OVER (ORDER BY {0}) FROM"
    " JSON_TABLE(%s, '$[*]' COLUMNS (n FOR ORDINALITY, v VARCHAR(4000) CHARACTER SET utf8mb4 PATH '$')) t ORDER BY n",
    "sqlite": "SELECT dense_rank() OVER (ORDER BY {0}) FROM json_each(%s) ORDER BY key",
}


def ranks_on(alias: str, sql: str, values: list[str]) -> dict[str, int]:
    """Return the ranks of text on a database, where ``sql`` is what it sorts by, of ``{0}``. One query."""
    if not values:
        return {}
    vendor = connections[alias].vendor
    given: Any = values if vendor == "postgresql" else json.dumps(values, ensure_ascii=False)
    question = RANKS[vendor].format(sql.format("value" if vendor == "sqlite" else "v"))
    return dict(zip(values, (int(rank) for (rank,) in ask(alias, question, [given])), strict=True))
