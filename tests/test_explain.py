"""explain_plan() tells the truth; and the database starts inside an index where there is one."""

from __future__ import annotations

import pytest
from django.db import connections
from django.db.models import Count, Q
from django.db.models.functions import Lower
from django.test.utils import CaptureQueriesContext

from parallel_orm.explain import access_of, has_index_for
from parallel_orm.ordering import keyset_of
from tests.testapp.models import Article, Indexed, Seat

ROWS = 3000


@pytest.fixture
def indexed(alias):
    """Enough rows that an index is worth its while, and what the database knows of them up to date."""
    Indexed.objects.using(alias).bulk_create(
        Indexed(pk=7 * n, name=f"name {n % 50}", score=None if n % 10 == 0 else n % 1000, rank=n % 300)
        for n in range(1, ROWS + 1)
    )
    with connections[alias].cursor() as cursor:
        cursor.execute("ANALYZE TABLE testapp_indexed" if alias == "mariadb" else "ANALYZE testapp_indexed")
    return Indexed.objects.using(alias)


ORDERS = [
    ("pk",),
    ("-pk",),
    ("rank", "pk"),
    ("-rank", "-pk"),
    ("score", "pk"),
    ("-score", "-pk"),
    ("name", "rank", "pk"),
]


def is_range(queryset, connection):
    """Whether the database starts inside an index, and sorts nothing but ties; and what it says of that."""
    sql, params = queryset.query.get_compiler(queryset.db).as_sql()
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute("SET enable_seqscan = off")  # as a large table would have it
            cursor.execute("SET enable_bitmapscan = off")
            cursor.execute(f"EXPLAIN {sql}", params)
            told = "\n".join(row[0] for row in cursor.fetchall())
            cursor.execute("RESET enable_seqscan")
            cursor.execute("RESET enable_bitmapscan")
            return "Index Cond" in told and ("Sort" not in told or "Incremental Sort" in told), told
        if connection.vendor == "mysql":
            cursor.execute(f"EXPLAIN {sql}", params)
            names = [column[0] for column in cursor.description]
            (row,) = [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
            return row["type"] in ("range", "ref") and "filesort" not in (row["Extra"] or ""), row
        cursor.execute(f"EXPLAIN QUERY PLAN {sql}", params)
        told = "\n".join(row[3] for row in cursor.fetchall())
        return "SEARCH" in told and "TEMP B-TREE FOR ORDER BY" not in told, told


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_a_chunk_in_the_middle_is_one_range_of_an_index(indexed, alias, order):
    """Not a scan from the beginning with a filter: that would be quadratic. On all three; with NULLs, on both sides."""
    queryset = indexed.order_by(*order)
    plan = queryset.explain_plan(500, walk=True)
    keyset, ends = plan.keyset, plan.ends()
    assert plan.cut == "pages"
    assert len(ends) == (2 if "score" in order[0] else 1)
    keys = list(keyset.keys_of(keyset.order(indexed.all())))
    begin = 0
    for until in ends:
        end = keys.index(until)
        after = keys[(begin + end) // 2]
        page, jump = keyset.part(indexed.all(), after, until)[:500], keyset.part(indexed.all(), after, until)
        looked_at = [keyset.keys_of(jump)[20:21]]
        if alias != "mariadb" or len(order) < 3:  # there it takes two indexes where it has two for three columns
            looked_at.append(page)
        for each in looked_at:
            found, told = is_range(each, connections[alias])
            assert found, told
        begin = end + 1


def test_without_the_redundant_half_it_would_be_none(indexed, alias):
    """The test above can fail: the textbook predicate is a filter on PostgreSQL."""
    textbook = indexed.order_by("rank", "pk").filter(Q(rank__gt=150) | Q(rank=150, pk__gt=9000))[:500]
    found, told = is_range(textbook, connections[alias])
    if connections[alias].vendor == "postgresql":
        assert not found, told


def test_it_tells_all_of_it(indexed, alias):
    with CaptureQueriesContext(connections[alias]) as queries:
        plan = indexed.order_by("rank", "pk").explain_plan(500, walk=True)
    assert len(queries) == 0
    told = str(plan)
    for part in ("testapp.Indexed", "pages of 500 rows", "why:", "rank, pk", "rows in", "index:", "fallback:"):
        assert part in told, told
    assert "warning" not in told, told
    assert abs(plan.estimated_rows - ROWS) < ROWS / 10
    assert plan.estimated_chunks in (5, 6, 7)
    assert plan.access.indexes or alias == "mariadb", "which would rather sort so few rows"
    assert "queryset" not in repr(plan), "which would run it"


def test_it_warns(indexed, alias):
    """Of an order without an index, of joins that repeat rows, of keys with gaps; not of what is fine."""
    assert indexed.order_by("name", "rank").explain_plan(walk=True).warnings == []
    for order in (("other",), (Lower("other"),)):
        (warning,) = indexed.order_by(*order).explain_plan(walk=True).warnings
        assert "no index for this order" in warning
        (warning,) = indexed.order_by(*order).explain_plan().warnings
        assert "no index for this order: the list of keys is sorted" in warning
    assert "fill 14.3% of their range" in str(indexed.explain_plan())
    articles = Article.objects.using(alias)
    assert "a join may repeat rows" in str(articles.filter(tags__name="t").explain_plan())
    assert "groups" in str(articles.values("rank").annotate(n=Count("pk")).explain_plan(walk=True))
    for queryset in (articles.all(), articles.none(), articles.filter(pk__in=[])):
        for walk in (True, False):
            plan = queryset.explain_plan(walk=walk)
            assert "0 chunks" in str(plan) or alias != "default", str(plan)
            assert plan.warnings == []


def test_of_nulls_alone(alias):
    """One group, whose key is NULL."""
    Article.objects.using(alias).bulk_create(Article() for _ in range(3))
    groups = Article.objects.using(alias).values("score").annotate(n=Count("pk"))
    for walk in (True, False):
        assert "1 chunks" in str(groups.explain_plan(walk=walk))
    assert list(groups.chunked_iterator(1)) == list(groups) == [{"score": None, "n": 3}]


def test_why_keys(indexed):
    told = str(indexed.annotate(n=Count("pk")).order_by("n").explain_plan(walk=True))
    assert "keys of 2000 rows" in told
    assert "its order cannot be compared column by column: 'n' is computed" in told
    told = str(indexed.order_by("pk")[10:110].explain_plan(20))
    assert "a slice has a fixed set of rows" in told
    assert "100 rows in 5 chunks" in told


def test_indexes_are_known_by_their_columns(alias):
    queryset = Indexed.objects.using(alias)
    for order, is_there in (
        (("rank",), True),
        (("-rank", "-pk"), True),
        (("name", "rank"), True),
        (("-name", "-rank"), True),
        (("name", "-rank"), False),
        (("rank", "name"), False),
        (("other",), False),
        (("pk",), True),
    ):
        assert has_index_for(queryset, keyset_of(queryset.order_by(*order))) is is_there, order
    seats = Seat.objects.using(alias)
    assert has_index_for(seats, keyset_of(seats))
    assert access_of(seats.all()).rows >= 0
