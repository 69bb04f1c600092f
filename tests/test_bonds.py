"""What belongs to the connection of its caller is read there; what the caller changes after a start is not read."""

from __future__ import annotations

import secrets
import threading
from typing import Any

import pytest
from django.contrib.postgres.functions import TransactionNow
from django.db import connections, transaction
from django.db.models import (
    Aggregate,
    BigIntegerField,
    BooleanField,
    Case,
    CharField,
    Count,
    DateTimeField,
    Exists,
    F,
    FilteredRelation,
    Func,
    IntegerField,
    JSONField,
    Max,
    OuterRef,
    Prefetch,
    Q,
    Subquery,
    TextField,
    Transform,
    Value,
    When,
    Window,
)
from django.db.models.expressions import RawSQL
from django.db.models.functions import Lower, Now, RowNumber
from django.db.models.lookups import Exact, GreaterThan
from django.test.utils import CaptureQueriesContext

from parallel_orm.bonds import FREE, bonds_of
from parallel_orm.statements import Bond, bond_of, bond_of_function
from tests.test_background import WAIT, articles, busy, landed
from tests.testapp.models import Article, Author, Everything, Lease, RankedArticle, Tag

__all__ = ["articles", "busy"]  # fixtures

POSTGRES = pytest.mark.parametrize("alias", [pytest.param("postgres", marks=pytest.mark.postgres)], indirect=True)


class Shout(Func):
    """A function of the project's own, which does nothing but compute."""

    function = "shout"
    output_field = TextField()


class Whisper(Func):
    function = "whisper"
    template = "app.quietly(%(function)s(%(expressions)s), 'x')"
    output_field = TextField()


class Next(Func):
    function = "nextval"
    template = "%(function)s('testapp_tag_id_seq')"
    output_field = BigIntegerField()


class Middle(Aggregate):
    function = "middle"


def own(function: str, *expressions: Any) -> Func:
    return Func(*expressions, function=function, output_field=IntegerField())


#: Ways to put an expression into a queryset.
PLACES: dict[str, Any] = {
    "annotation": lambda rows, expression: rows.annotate(x=expression),
    "alias": lambda rows, expression: rows.alias(x=expression).filter(x__isnull=False),
    "filter": lambda rows, expression: rows.filter(rank=expression),
    "exclude": lambda rows, expression: rows.exclude(Q(rank=1) | ~Q(rank=expression)),
    "in a list": lambda rows, expression: rows.filter(rank__in=[1, expression]),
    "condition": lambda rows, expression: rows.filter(GreaterThan(Value(1), expression)),
    "order": lambda rows, expression: rows.order_by("rank", expression.desc()),
    "subquery in the order": lambda rows, expression: rows.order_by(
        Subquery(Tag.objects.annotate(x=expression).values("x")[:1])
    ),
    "case": lambda rows, expression: rows.annotate(x=Case(When(rank=1, then=expression), default=Value(1))),
    "when": lambda rows, expression: rows.annotate(x=Case(When(rank=expression, then=Value(1)))),
    "aggregate": lambda rows, expression: rows.values("name").annotate(x=Max(expression)),
    "filter of an aggregate": lambda rows, expression: rows.annotate(x=Count("tags", filter=Q(rank=expression))),
    "having": lambda rows, expression: rows.annotate(n=Count("tags")).filter(n__gt=expression),
    "group": lambda rows, expression: rows.annotate(x=expression).values("x").annotate(n=Count("pk")),
    "window": lambda rows, expression: rows.annotate(x=Window(RowNumber(), order_by=expression)),
    "within a function": lambda rows, expression: rows.annotate(x=Lower(Shout(expression))),
    "subquery": lambda rows, expression: rows.filter(rank__in=Author.objects.filter(born=expression).values("born")),
    "exists": lambda rows, expression: rows.filter(Exists(Tag.objects.filter(pk=OuterRef("pk")).filter(pk=expression))),
    "union": lambda rows, expression: rows.union(rows.filter(rank=expression)),
    "values": lambda rows, expression: rows.values_list("name", expression),
    "relation": lambda rows, expression: rows.annotate(
        t=FilteredRelation("tags", condition=Q(tags__name=expression))
    ).filter(t__name="x"),
    "distinct": lambda rows, expression: rows.annotate(x=expression).distinct("x"),
    "prefetch": lambda rows, expression: rows.prefetch_related(Prefetch("tags", Tag.objects.filter(pk=expression))),
    "prefetch of a prefetch": lambda rows, expression: rows.prefetch_related(
        Prefetch("author", Author.objects.prefetch_related(Prefetch("notes", Tag.objects.annotate(x=expression))))
    ),
}


def test_a_plain_queryset_has_none() -> None:
    rows = Article.objects.filter(Q(rank=1) | Q(name__in=["a", "b"]), author__name="x").select_related("author")
    assert bonds_of(rows) is FREE
    assert bonds_of(rows.prefetch_related("tags", "author__notes").annotate(n=Count("tags"), now=Now())) is FREE
    assert bonds_of(rows.values_list("rank", "author__name").order_by(F("rank").desc(), Lower("name"))) is FREE


@pytest.mark.parametrize("place", PLACES)
def test_it_is_found_wherever_it_stands(place: str) -> None:
    put = PLACES[place]
    assert bonds_of(put(Article.objects.all(), own("nextval", Value("x")))).bond is Bond.OWN
    assert bonds_of(put(Article.objects.all(), Next())).bond is Bond.OWN
    assert bonds_of(put(Article.objects.all(), RawSQL("nextval('x')", []))).bond is Bond.OWN
    assert bonds_of(put(Article.objects.all(), RawSQL("Writer()", []))).functions >= {"writer"}
    assert bonds_of(put(Article.objects.all(), TransactionNow())).bond is Bond.CLOCK
    assert bonds_of(put(Article.objects.all(), Shout(Value("x")))).functions >= {"shout"}
    assert bonds_of(put(Article.objects.all(), Lower(Value("x")))).bond is None
    locked = Subquery(Author.objects.select_for_update().values("born")[:1])
    assert bonds_of(put(Article.objects.all(), locked)).bond is Bond.LOCK


def test_it_is_found_in_an_order_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RankedArticle._meta, "ordering", ["rank", Next()])
    assert bonds_of(RankedArticle.objects.all()).bond is Bond.OWN
    assert bonds_of(RankedArticle.objects.order_by("pk")) is FREE
    assert bonds_of(RankedArticle.objects.order_by()) is FREE


def test_it_is_found_in_a_transform_that_is_selected() -> None:
    class Shouted(Transform):
        lookup_name = "shouted"
        function = "shout"

    CharField.register_lookup(Shouted)
    try:
        assert bonds_of(Article.objects.values_list("name__shouted")).functions == {"shout"}
    finally:
        CharField._unregister_lookup(Shouted)


@pytest.mark.parametrize(
    "arguments",
    [
        (own("nextval"),),
        (Q(rank=own("nextval")),),
        (~Q(Q(rank=1) | Q(rank__in=[own("nextval")])),),
        (Max(own("nextval")),),
        (Q(author__in=Author.objects.filter(born=own("nextval"))),),
        ([own("nextval")],),
    ],
)
def test_it_is_found_in_what_a_method_is_called_with(arguments: Any) -> None:
    assert bonds_of(Article.objects.all(), *arguments).bond is Bond.OWN


def test_pieces_of_sql() -> None:
    """Each is taken for what it may be: one that only reads, by all that its text tells, may go anywhere."""
    rows = Article.objects.all()
    for queryset, bond in [
        (rows.extra(select={"x": "lower(name)"}, where=["rank > %s", "name LIKE 'a'"], params=[1]), None),
        (rows.extra(select={"x": "setval()"}), Bond.OWN),
        (rows.extra(where=["rank = 1", "lastval() + writer(rank)"]), Bond.OWN),
        (rows.extra(order_by=["-rank"]), None),
        (rows.extra(order_by=["testapp_article.writer()"]), None),
        (rows.filter(pk__in=RawSQL("SELECT id FROM testapp_tag WHERE name = %s", ["x"])), None),
        (rows.filter(pk__in=RawSQL("SELECT id FROM testapp_tag FOR UPDATE", [])), Bond.OWN),
        (rows.annotate(x=RawSQL("@x", [])), Bond.OWN),
        (rows.annotate(x=RawSQL("@@identity", [])), Bond.OWN),
        (rows.annotate(x=RawSQL("connection_id()", [])), Bond.OWN),
        (rows.annotate(x=RawSQL("current_timestamp", [])), Bond.CLOCK),
        (rows.raw("SELECT * FROM testapp_article WHERE published < now()"), Bond.CLOCK),
        (rows.raw("SELECT * FROM testapp_article WHERE published < 'today'"), Bond.CLOCK),
        (rows.raw("SELECT *, nextval('x') FROM testapp_article"), Bond.OWN),
        (rows.raw("SELECT * FROM testapp_article"), None),
    ]:
        found = bonds_of(queryset)
        assert found.bond is bond, queryset.query


FUNCTIONS = """
pg_try_advisory_lock pg_advisory_xact_lock pg_advisory_unlock_all set_config nextval currval lastval setval
LAST_INSERT_ID FOUND_ROWS ROW_COUNT last_insert_rowid changes total_changes pg_backend_pid CONNECTION_ID GET_LOCK
RELEASE_LOCK IS_FREE_LOCK IS_USED_LOCK RELEASE_ALL_LOCKS txid_current txid_current_snapshot pg_current_xact_id
pg_current_snapshot pg_export_snapshot setseed dblink dblink_exec lo_create pg_notify pg_my_temp_schema
pg_catalog.nextval load_extension query_to_xml
"""


@pytest.mark.parametrize("function", FUNCTIONS.split())
def test_functions_of_a_session_are_known_by_their_names(function: str) -> None:
    assert bonds_of(Article.objects.annotate(x=own(function))).bond is Bond.OWN
    assert bonds_of(Article.objects.annotate(x=own(function.lower()))).bond is Bond.OWN
    assert bonds_of(Article.objects.annotate(x=RawSQL(f"{function}()", []))).bond is Bond.OWN


def test_what_a_function_in_sql_does_is_told_by_the_server(articles: Any, alias: str) -> None:
    """One that says that it only reads may go anywhere; of one that says nothing, its caller needs what it writes."""
    said = {
        "postgresql": (
            "CREATE OR REPLACE FUNCTION {}(n bigint) RETURNS bigint {} LANGUAGE sql AS 'SELECT n'",
            "DROP FUNCTION {}(bigint)",
            "STABLE",
            "",
        ),
        "mysql": (
            "CREATE OR REPLACE FUNCTION {}(n bigint) RETURNS bigint {} RETURN n",
            "DROP FUNCTION {}",
            "READS SQL DATA",
            "DETERMINISTIC MODIFIES SQL DATA",
        ),
    }.get(connections[alias].vendor)
    if said is None:
        pytest.skip("the functions of SQLite are Python's")
    create, drop, *kinds = said
    names = f"reads_{secrets.token_hex(4)}", f"writes_{secrets.token_hex(4)}"  # what is known of one lasts a minute
    with connections[alias].cursor() as cursor:
        for name, kind in zip(names, kinds, strict=True):
            cursor.execute(create.format(name, kind))
    try:
        with CaptureQueriesContext(connections[alias]) as queries:
            for name, reason in zip(names, (None, "writes"), strict=True):
                for rows in (
                    articles.extra(where=[f"{name}(rank) = 1"]),
                    articles.annotate(x=RawSQL(f"{name}(1)", [])),
                    articles.annotate(x=own(name, Value(1))),
                    articles.raw(f"SELECT * FROM testapp_article WHERE {name.upper()}(rank) = 1"),
                ):
                    pending = rows.start_fetch().background["fetch"]
                    landed(pending)
                    assert pending.reason == reason, rows.query
        assert len(queries) == 4  # those that ran here: the question is nobody's query
    finally:
        with connections[alias].cursor() as cursor:
            for name in names:
                cursor.execute(drop.format(name))


def test_a_function_that_is_only_here(default: str) -> None:
    """Given by Python to this connection alone: it is asked for here."""
    Article.objects.using(default).create(name="one", rank=1)
    connections[default].ensure_connection()
    connections[default].connection.create_function("only_here", 1, lambda rank: rank + 1)
    rows = Article.objects.using(default).annotate(x=RawSQL("only_here(rank)", []))
    pending, tried = rows.start_fetch().background["fetch"], threading.Event()
    pending._read.when_tried(tried.set)
    assert tried.wait(WAIT)
    assert [row.x for row in pending.result(WAIT)] == [2]
    assert pending.reason == "writes"
    connections[default].close()


def test_functions_of_the_project_are_named() -> None:
    """By an expression, by its template: all that are not known here, for the database to tell."""
    rows = Article.objects.annotate(x=Shout("name"), y=Whisper("name"), z=Middle("rank"), u=own("app.up", F("rank")))
    found = bonds_of(rows)
    assert (found.bond, found.functions) == (None, {"shout", "whisper", "app.quietly", "middle", "app.up"})
    assert bonds_of(Article.objects.annotate(x=Lower("name"), y=own("coalesce", F("rank"), Value(1)))) is FREE
    assert bond_of_function("x_nextval( )") == (None, {"x_nextval"})
    sql = 'SELECT "a"."b", SHOUT("a"."c"), app.up(1), st_area("g") FROM "a"'
    assert bond_of(sql, frozenset({"shout", "app.up"})) is None
    assert bond_of(sql, frozenset({"app.up"})) is Bond.OWN
    assert bond_of(sql, frozenset({"shout", "pp.up", "up"})) is Bond.OWN
    assert bond_of("SELECT shout(nextval('x'))", frozenset({"shout"})) is Bond.OWN


def test_a_column_is_no_function() -> None:
    assert bond_of('SELECT "changes"."row_count", "now" FROM "changes"') is None
    assert bond_of("SELECT a @@ to_tsquery('x'), a @> b FROM c") is None


def test_views_of_a_session() -> None:
    for view in ("pg_cursors", "pg_settings", "pg_stat_xact_all_tables", "session_status", "sqlite_temp_master"):
        assert bond_of(f'SELECT "{view}"."name" FROM "{view}"') is Bond.OWN
        assert bond_of(f"SELECT name FROM {view}") is Bond.OWN
    assert bond_of('SELECT "my_pg_settings_1"."name" FROM "my_pg_settings_1"') is None


# --- Where it is read ----------------------------------------------------------------------


def reason_of(queryset: Any) -> Any:
    """Use it and return why it ran where it ran."""
    list(queryset.start_fetch())
    return queryset.background["fetch"].reason


def values(queryset: Any) -> list[Any]:
    """Its values as of a start, which ran on the caller's connection."""
    rows = queryset.values_list("x", flat=True)
    assert reason_of(rows) == "writes"
    return list(rows)


SESSIONS = {
    "default": (["last_insert_rowid", "changes"], "SELECT {}()"),
    "postgres": (["pg_backend_pid", "lastval"], "SELECT {}()"),
    "mariadb": (["connection_id", "last_insert_id"], "SELECT {}()"),
}


def test_what_a_session_tells_of_itself(articles: Any, alias: str) -> None:
    Tag.objects.using(alias).create(name="x")  # so that each has something to tell
    functions, question = SESSIONS[alias]
    for function in functions:
        with connections[alias].cursor() as cursor:
            cursor.execute(question.format(function))
            (answer,) = cursor.fetchone()
        for expression in (own(function), RawSQL(f"{function}()", [])):
            assert values(articles.annotate(x=expression)[:1]) == [answer]
        assert values(articles.extra(select={"x": f"{function}()"})[:1]) == [answer]
        assert articles.start_aggregate(x=Max(own(function))).result() == {"x": answer}


@POSTGRES
def test_a_lock_is_taken_by_the_caller(articles: Any, alias: str) -> None:
    lock = Func(Value(42), function="pg_try_advisory_lock", output_field=BooleanField())
    assert values(articles.annotate(x=lock)[:1]) == [True]
    with connections[alias].cursor() as cursor:
        cursor.execute("SELECT pg_advisory_unlock(42)")
        assert cursor.fetchone() == (True,)


def test_a_variable_of_a_mysql_session(mariadb: str) -> None:
    Article.objects.using(mariadb).create(name="x")
    with connections[mariadb].cursor() as cursor:
        cursor.execute("SELECT id INTO @x FROM testapp_article")
    assert values(Article.objects.using(mariadb).annotate(x=RawSQL("@x", []))) == [
        Article.objects.using(mariadb).get().pk
    ]


@POSTGRES
def test_the_clock_of_a_transaction(articles: Any, alias: str) -> None:
    """Within a transaction it stands; outside of one it is the clock of each query, wherever that runs."""
    ways = [TransactionNow(), RawSQL("now()", []), Func(template="CURRENT_TIMESTAMP", output_field=DateTimeField())]
    with transaction.atomic(using=alias):
        for way in ways:
            rows = articles.annotate(x=way).values_list("x", flat=True)[:1]
            (inline,) = rows
            started = rows.all().start_fetch()
            assert (list(started), started.background["fetch"].reason) == ([inline], "transaction")
        assert reason_of(articles.annotate(x=Now())) in {None, "stolen"}
    for way in ways:
        started = articles.annotate(x=way).start_fetch()
        landed(started.background["fetch"])
        assert started.background["fetch"].reason is None


@pytest.mark.parametrize("path", ["leases", "author__leases"])
def test_a_manager_that_locks_is_found_behind_a_prefetch(alias: str, path: str) -> None:
    author = Author.objects.using(alias).create()
    lease = Lease.objects.using(alias).create(author=author)
    Article.objects.using(alias).create(author=author)
    model: Any = Author if path == "leases" else Article
    with transaction.atomic(using=alias):
        started = model.objects.using(alias).prefetch_related(path).start_fetch()
        assert started.background["fetch"].reason == "select_for_update"
        (row,) = started
        assert list(getattr(row, "author", row).leases.all()) == [lease]


# --- As of the start -----------------------------------------------------------------------


CHANGES: dict[str, Any] = {
    "dictionary": lambda rows, value: rows.filter(json=value),
    "in a list": lambda rows, value: rows.filter(json__in=[value]),
    "condition": lambda rows, value: rows.filter(Exact(F("json"), Value(value, JSONField()))),
    "in a case": lambda rows, value: rows.filter(
        Case(When(json=value, then=Value(True)), default=Value(False), output_field=BooleanField())
    ),
    "excluded": lambda rows, value: rows.exclude(~Q(json=value)),
    "subquery": lambda rows, value: rows.filter(pk__in=rows.filter(json=value).values("pk")),
}


@pytest.mark.parametrize("way", CHANGES)
def test_a_value_that_the_caller_changes_is_as_of_the_start(alias: str, busy: Any, way: str) -> None:
    everything = Everything.objects.using(alias)
    row = everything.create(boolean=True, mood="", json={"a": {"b": [1]}})
    value = {"a": {"b": [1]}}
    rows = CHANGES[way](everything, value)
    assert bonds_of(rows).is_changeable
    fetched, counted = rows.all().start_fetch(), rows.all().start_count()
    got = everything.start_get(Q(json=value), json=value)
    value["a"]["b"].append(2)
    assert (list(fetched), counted.count(), got.result()) == ([row], 1, row)
    assert list(rows) == []  # whereas the queryset itself looks at it when it is asked


def test_parameters_that_the_caller_changes_are_as_of_the_start(articles: Any, alias: str, busy: Any) -> None:
    one, two, three = [1], [1], [1]
    started = [
        articles.annotate(x=RawSQL("rank + %s", one)).filter(x=2).start_fetch(),
        articles.extra(where=["rank = %s"], params=two).start_fetch(),
        articles.raw("SELECT * FROM testapp_article WHERE rank = %s", three).start_fetch(),
    ]
    again = [1]
    author = Author.objects.using(alias).create()
    articles.update(author=author)
    computed = articles.annotate(x=RawSQL("rank + %s", again))
    numbers = computed.filter(x=2).values_list("rank", flat=True).start_fetch()
    groups = computed.values("x").annotate(n=Count("pk")).order_by("x").start_fetch()
    prefetched = Author.objects.using(alias).prefetch_related(Prefetch("articles", computed.filter(x=2))).start_fetch()
    related = (
        Author.objects.using(alias)
        .annotate(t=FilteredRelation("articles", condition=Q(articles__rank=RawSQL("%s", again))))
        .filter(t__rank=1)
        .start_count()
    )
    names = ["name 1"]
    within = articles.filter(Q(name__in=names)).start_count()
    one[0] = two[0] = three[0] = again[0] = 99
    names.append("name 2")
    assert [len(each) for each in started] == [10, 10, 10]
    assert list(numbers) == [1] * 10
    assert [(group["x"], group["n"]) for group in groups] == [(1, 10), (2, 10), (3, 10)]
    assert [len(each.articles.all()) for each in prefetched] == [10]
    assert related.count() == 10
    assert within.count() == 1


def test_values_that_nobody_can_change_cost_no_copy(articles: Any) -> None:
    assert not bonds_of(articles.filter(rank__in=[1, 2], name__range=("a", "b"), author__in=[])).is_changeable
    assert bonds_of(Everything.objects.filter(json=["a"])).is_changeable
