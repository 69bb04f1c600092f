"""What a statement does, told by its text: no write is ever taken for a read, and Django's own reads are reads."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from django.db import connections
from django.db.models import (
    Avg,
    Case,
    Count,
    Exists,
    F,
    Max,
    Min,
    OuterRef,
    Prefetch,
    Q,
    StdDev,
    Subquery,
    Sum,
    Value,
    Variance,
    When,
    Window,
    functions,
)

from parallel_orm.statements import only_reads, trace_of
from tests.testapp.models import Article, Author, Everything, Label, Restaurant, Seat, Tag, Visit

#: Each runs or may run more than a read, on one of the databases at least.
MORE_THAN_READS = """
INSERT INTO t VALUES (1)
insert into t select * from u
UPDATE t SET a = 1
DELETE FROM t
TRUNCATE t
TRUNCATE TABLE t
MERGE INTO t USING u ON true WHEN MATCHED THEN DELETE
REPLACE INTO t VALUES (1)
CREATE TABLE t AS SELECT 1
DROP TABLE t
ALTER TABLE t ADD a int
GRANT ALL ON t TO u
REFRESH MATERIALIZED VIEW v
VACUUM
ANALYZE
CALL p()
DO $$ BEGIN PERFORM writer(); END $$
DO writer()
EXECUTE prepared
PREPARE p AS DELETE FROM t
COPY t FROM STDIN
COPY t TO STDOUT
LOAD DATA INFILE 'x' INTO TABLE t
LOCK TABLE t
LOCK TABLES t WRITE
HANDLER t OPEN
BEGIN
START TRANSACTION
COMMIT
ROLLBACK
ROLLBACK TO SAVEPOINT s
SAVEPOINT s
RELEASE SAVEPOINT s
SET x = 1
SET TRANSACTION ISOLATION LEVEL SERIALIZABLE
RESET ALL
DISCARD ALL
LISTEN c
NOTIFY c
DECLARE c CURSOR FOR SELECT 1
FETCH 1 FROM c
PRAGMA user_version = 1
ATTACH 'x' AS y
SELECT * FROM t FOR UPDATE
SELECT * FROM t FOR NO KEY UPDATE
SELECT * FROM t FOR SHARE
SELECT * FROM t FOR KEY SHARE
SELECT * FROM t FOR UPDATE OF t NOWAIT
SELECT * FROM t for update skip locked
SELECT * FROM t LOCK IN SHARE MODE
(SELECT * FROM t FOR UPDATE)
TABLE t FOR UPDATE
SELECT * INTO u FROM t
SELECT 1 INTO @a
SELECT @a := 1
SELECT * FROM t INTO OUTFILE '/x'
SELECT 1 INTO DUMPFILE '/x'
SELECT * FROM t PROCEDURE ANALYSE()
WITH d AS (DELETE FROM t RETURNING *) SELECT * FROM d
WITH d AS (UPDATE t SET a = 1 RETURNING *) TABLE d
WITH d AS (INSERT INTO t VALUES (1) RETURNING *) SELECT 1
WITH d AS (SELECT 1) INSERT INTO t SELECT * FROM d
WITH d AS (SELECT 1) DELETE FROM t
WITH d AS (SELECT 1) REPLACE INTO t SELECT * FROM d
EXPLAIN ANALYZE DELETE FROM t
EXPLAIN (ANALYZE) UPDATE t SET a = 1
EXPLAIN ANALYSE INSERT INTO t VALUES (1)
EXPLAIN ANALYSE EXECUTE prepared
EXPLAIN ANALYSE SELECT writer()
EXPLAIN ANALYSE CREATE TABLE u AS SELECT 1
SELECT 1; DELETE FROM t
SELECT 1; SELECT writer()
SELECT 1;; DELETE FROM t
SELECT 'a'; DELETE FROM t
SELECT writer()
SELECT writer ()
SELECT writer/* */()
SELECT "writer"()
SELECT "writer" ()
SELECT `writer`()
SELECT public.writer()
SELECT public.lower('a')
SELECT public . lower('a')
SELECT "public".lower('a')
SELECT "public"."writer"()
SELECT U&"writer"()
SELECT 1, "writer"()
SELECT 1 AS "a", "writer"() AS "b"
SELECT * FROM writer()
SELECT * FROM t, writer() AS (a int)
SELECT * FROM t, "writer"() AS (a int)
SELECT * FROM t, writer(a) AS w(a)
SELECT lower(writer())
SELECT * FROM t WHERE a = ANY(ARRAY[writer()])
SELECT ARRAY[writer()]
SELECT ARRAY["writer"()]
SELECT (ARRAY[1, 2])[writer()]
SELECT CASE WHEN true THEN writer() END
SELECT CAST(writer() AS int)
VALUES (writer())
VALUES (1), (writer())
SELECT * FROM LATERAL writer() w
SELECT * FROM ROWS FROM (writer())
SELECT django_writer()
SELECT my$abs()
SELECT abs$my()
SELECT _abs()
WITH writer AS (SELECT 1) SELECT writer()
WITH w AS (SELECT 1 AS writer) SELECT writer()
WITH w(writer) AS (SELECT 1) SELECT writer(2)
SELECT NEXT VALUE FOR s
SELECT nextval('s')
SELECT setval('s', 1)
SELECT set_config('a.b', 'c', false)
SELECT pg_advisory_lock(1)
SELECT pg_notify('a', 'b')
SELECT pg_terminate_backend(1)
SELECT lo_create(1)
SELECT lo_import('/x')
SELECT dblink_exec('x', 'y')
SELECT query_to_xml('DELETE FROM t', true, true, '')
SELECT GET_LOCK('a', 1)
SELECT load_extension('x')
SELECT pg_export_snapshot()
SELECT 1 /*! INTO @a */
SELECT 1 /*!50000 , writer() */
SELECT 1 /*M! , writer() */
SELECT 1 /*M!100100 , writer() */
/*! DELETE FROM t */
/*M! DELETE FROM t */
SELECT 1--writer()
SELECT 1 --writer()
SELECT 'it\\'s', writer(), 'x'
SELECT 'a\\', writer(), '
SELECT E'\\'', writer(), '
SELECT E'a\\'' , writer() , E'\\''
SELECT "a\\", writer(), "
SELECT $$'$$, writer(), $$'$$
SELECT $a$'$a$, writer(), $a$'$a$
SELECT $é$'$é$, writer(), $é$'$é$
SELECT /* /* */ ' */ writer() /* ' */
SELECT /* /* */ 1 */ writer()
SELECT 1 */ writer() /*
SELECT [a'], writer(), [b']
SELECT [a"], writer(), [b"]
SELECT éabs(1)
SELECT absé(1)
SELECT 日本()
SELECT 'unterminated, writer()
SELECT "unterminated, writer()
""".strip().splitlines()

#: The same, of several lines.
IN_SEVERAL_LINES = [
    "",
    "   ",
    ";",
    "-- a comment",
    "SELECT 1 -- \r, writer()",
    "SELECT 1 -- \r ' \n, writer() -- '",
    "SELECT 1 # ' \n, writer() # '",
    "SELECT 1 #> ' \n, writer() #> '",
    'SELECT 1 # " \n, writer() # "',
    "-- SELECT\nDELETE FROM t",
    "/* SELECT */ DELETE FROM t",
    "/* a */ -- b\n /* c */ DELETE FROM t",
    "SELECT 1 -- a\n; DELETE FROM t",
    "SELECT\n*\nFROM\nt\nFOR\nUPDATE",
    "SELECT\nwriter\n(\n)",
    "SELECT 1\nINTO u",
    "SELECT 1 --\t'\n, writer() --\t'",
    "SELECT 1 --\u00a0, writer()",
    "\ufeffDELETE FROM t",
]

READS = """
SELECT 1
select * from t
SELECT * FROM t;
(SELECT 1) UNION (SELECT 2)
TABLE t
VALUES (1, 2), (3, 4)
SHOW search_path
EXPLAIN SELECT * FROM t
SELECT * FROM t -- for update
SELECT * FROM t /* for update */
SELECT 'DELETE FROM t; it''s'
SELECT "delete", "update()" FROM "insert"
SELECT `delete` FROM `update`
SELECT a FROM t WHERE b IN (1, 2) AND c = ANY(%s)
SELECT REPLACE(a, 'b', 'c'), TRUNCATE(1.5, 1) FROM t
SELECT ARRAY[1, 2], (ARRAY[a, b])[1] FROM t
SELECT a #>> '{b}', a @> '{}', a <@ b, a @@ b FROM t
WITH w AS (SELECT 1) SELECT * FROM w
WITH RECURSIVE w(a, b) AS (SELECT 1, 2 UNION ALL SELECT a, b FROM w), v (c) AS MATERIALIZED (SELECT 1) SELECT * FROM w
SELECT a LIKE 'b' ESCAPE '\\' FROM t
""".strip().splitlines()


@pytest.mark.parametrize("sql", MORE_THAN_READS + IN_SEVERAL_LINES)
def test_what_may_do_more_than_read_is_no_read(sql: str) -> None:
    """Neither as it is written, nor in other cases and with other blanks, nor behind a comment."""
    assert not only_reads(sql)
    assert not only_reads(f" \n\t{sql}\n")
    assert not only_reads(sql.lower())
    assert not only_reads(f"/* which SELECT says */ {sql}")
    assert not only_reads(f"-- which SELECT says\n{sql}")


@pytest.mark.parametrize("sql", READS)
def test_a_read_is_known_for_one(sql: str) -> None:
    assert only_reads(sql)
    assert only_reads(f"/* which DELETE says */\n{sql}")


def test_what_follows_a_savepoint_in_its_statement_is_no_savepoint() -> None:
    """Several statements in one: the barrier must not take them for the first."""
    assert trace_of("ROLLBACK TO SAVEPOINT s").savepoint
    assert trace_of("RELEASE SAVEPOINT s;").savepoint
    for sql in ("ROLLBACK TO SAVEPOINT s; DELETE FROM t", "SAVEPOINT s; DELETE FROM t"):
        assert not trace_of(sql).savepoint
        assert trace_of(sql).writes
    assert trace_of("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE").level
    assert not trace_of("SET TRANSACTION READ ONLY; DELETE FROM t").level


def test_a_comment_before_it_hides_no_trace() -> None:
    """A comment at its beginning, as some put there to find a query's origin, makes no statement unknown."""
    for comment in ("/* view='x' */ ", "-- view\n", "/* a */ -- b\n"):
        assert not trace_of(f"{comment}SELECT * FROM t").unknown
        assert trace_of(f"{comment}UPDATE t SET a = 1").writes
        assert not trace_of(f"{comment}UPDATE t SET a = 1").unknown
        assert trace_of(f"{comment}SET role x").names == {"role"}
    assert trace_of("/*! SET role x */").unknown


def ask(alias: str) -> None:
    """All that a queryset can say, more or less."""
    articles, authors = Article.objects.using(alias), Author.objects.using(alias)
    moment = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)
    author = authors.first()
    assert author is not None
    connection = connections[alias]
    querysets: list[Any] = [
        articles.all(),
        articles.order_by("?"),
        articles.order_by("-rank", F("score").desc(nulls_last=True)),
        articles.filter(name__in=["a", "b"], rank__range=(1, 2)),
        articles.exclude(author__name="x").exclude(tags__name="y"),
        articles.select_related("author").prefetch_related("tags", "labels", "author__articles"),
        authors.prefetch_related(Prefetch("articles", articles.order_by("rank")[:2], to_attr="some")),
        articles.defer("name"),
        articles.only("rank"),
        articles.distinct(),
        articles.values("rank").annotate(Count("pk"), Sum("score"), Avg("score"), Min("score"), Max("score")),
        articles.values("rank")
        .annotate(n=Count("tags", distinct=True), m=Count("pk", filter=Q(rank=1)))
        .filter(n__gt=0),
        articles.values_list("name", flat=True).union(authors.values_list("name", flat=True)),
        articles.filter(rank=1) | articles.filter(rank=2),
        articles.filter(Exists(authors.filter(pk=OuterRef("author")))),
        articles.annotate(who=Subquery(authors.filter(pk=OuterRef("author")).values("name")[:1])),
        articles.filter(author__in=authors.filter(born__gt=1)),
        articles.annotate(w=Window(functions.RowNumber(), partition_by="rank", order_by="pk")).filter(w__lt=2),
        articles.annotate(w=Window(functions.Lag("rank"), order_by="pk")),
        articles.annotate(c=Case(When(rank=1, then=Value("a")), default=Value("b"))),
        articles.annotate(a=functions.Coalesce("score", Value(1)), b=functions.Concat("name", Value("!"))),
        articles.annotate(a=functions.Cast("rank", output_field=Everything._meta.get_field("floating"))),
        articles.annotate(a=functions.Lower("name"), b=functions.Length("name"), c=functions.Substr("name", 2)),
        articles.annotate(a=functions.Replace("name", Value("a"), Value("b")), b=functions.MD5("name")),
        articles.annotate(a=functions.StrIndex("name", Value("a")), b=functions.Left("name", 1)),
        articles.annotate(a=functions.Greatest("rank", "score"), b=functions.NullIf("rank", Value(1))),
        articles.annotate(a=functions.Round("rank"), b=functions.Mod("rank", 2), c=functions.Sqrt("rank")),
        articles.annotate(a=functions.Now(), b=functions.TruncMonth("published"), c=functions.ExtractWeek("published")),
        articles.annotate(a=functions.TruncDate("published"), b=functions.TruncTime("published")),
        articles.annotate(a=F("published") + datetime.timedelta(days=1), b=F("published") - F("published")),
        articles.dates("published", "month"),
        articles.datetimes("published", "hour"),
        articles.filter(published__year=2024, published__month__gte=1, published__date__lt=moment.date()),
        articles.filter(published__week_day=1, published__hour=2, published__time__lt=moment.time()),
        articles.annotate(r=F("rank").bitand(1), s=F("rank").bitor(1), t=F("rank").bitxor(1)),
        articles.filter(tags__in=Tag.objects.using(alias).all()[:1])
        if connection.features.allow_sliced_subqueries_with_in
        else articles,
        articles[2:5],
        articles.raw("SELECT * FROM testapp_article WHERE rank < %s", [3]),
        articles.extra(select={"x": "rank + 1"}, where=["rank > 0"]),
        author.articles.all(),
        Restaurant.objects.using(alias).all(),
        Visit.objects.using(alias).order_by("place"),
        Label.objects.using(alias).prefetch_related("content"),
        Seat.objects.using(alias).filter(pk=("a", 1)),
    ]
    lookups = ("contains", "icontains", "startswith", "istartswith", "endswith", "iexact", "regex", "iregex")
    querysets += [articles.filter(**{f"name__{lookup}": "a%_"}) for lookup in lookups]
    everything = Everything.objects.using(alias)
    filters: list[dict[str, Any]] = [
        {"json__a": 1},
        {"json__a__b__0": "x"},
        {"json__has_key": "a"},
        {"json__has_keys": ["a"]},
        {"json__a__icontains": "a"},
        {"json__a__isnull": True},
        {"duration__gt": datetime.timedelta(1)},
        {"decimal__gt": 1},
        {"uuid__isnull": False},
        {"date__quarter": 1},
        {"date__iso_year": 1},
        {"address": "1.2.3.4"},
        {"boolean": True},
    ]
    querysets += [everything.filter(**each) for each in filters]
    if connection.features.supports_json_field_contains:
        querysets.append(everything.filter(json__contains={"a": 1}))
    querysets.append(everything.values_list("json__a", "json__b__c"))
    if connection.features.can_distinct_on_fields:
        querysets.append(articles.order_by("rank").distinct("rank"))
    if connection.features.supports_select_intersection:
        querysets.append(articles.values("name").intersection(authors.values("name")))
        querysets.append(articles.values("name").difference(authors.values("name")))
    for queryset in querysets:
        list(queryset)
        if hasattr(queryset, "count"):
            queryset.all().count()
            queryset.all().exists()
    articles.aggregate(Sum("rank"), Avg("score"), StdDev("score"), Variance("score", sample=True), Count("author"))
    articles.filter(rank=1)[:3].aggregate(Max("rank"))
    articles.in_bulk()
    articles.last(), articles.latest("rank"), articles.contains(Article(pk=1))
    list(articles.iterator(chunk_size=2))
    list(articles.chunked_iterator(chunk_size=2))
    article = articles.earliest("pk")
    article.refresh_from_db()
    list(article.tags.all()), article.tags.count(), article.author
    articles.explain()


def test_djangos_own_reads_are_known(alias: str) -> None:
    """No statement of a queryset that only reads is taken for a write: none makes others wait."""
    author = Author.objects.using(alias).create(name="Ada", born=1815)
    moment = datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC)
    Article.objects.using(alias).bulk_create(
        Article(name=f"n{i}", rank=i % 3, score=i, author=author, published=moment) for i in range(9)
    )
    Article.objects.using(alias).earliest("pk").tags.add(Tag.objects.using(alias).create(name="y"))
    said: list[str] = []

    def listen(execute: Any, sql: str, *rest: Any) -> Any:
        said.append(sql)
        return execute(sql, *rest)

    with connections[alias].execute_wrapper(listen):
        ask(alias)
    assert [sql for sql in said if not only_reads(sql)] == []
    assert len(said) > 120
