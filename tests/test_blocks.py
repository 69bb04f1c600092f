"""Maps as of one moment, in no order, read a table by its blocks: where that is faster, and nowhere else."""

from __future__ import annotations

import uuid

import pytest
from django.db import NotSupportedError, OperationalError, connections, transaction
from django.db.models import Count, F
from django.db.models.functions import Lower
from django.test import TestCase, override_settings
from django.test.utils import CaptureQueriesContext

from parallel_orm.blocks import heap_of
from tests import functions
from tests.test_snapshots import elsewhere
from tests.testapp.models import Article, ByUuid, Pizzeria, Place, RankedArticle, Seat, Shelf, Visit

#: Of which some 150 are in a block.
ROWS = 3000


def run(alias, *statements):
    with connections[alias].cursor() as cursor:
        for statement in statements:
            cursor.execute(statement)


@pytest.fixture(autouse=True)
def size(monkeypatch):
    """Set how many rows a chunk has, and has throughout. Whoever gives a ``chunk_size`` gets no blocks."""

    def to(rows):
        monkeypatch.setattr("parallel_orm.plan.MAP_CHUNK_SIZE", rows)

    to(50)
    with override_settings(PARALLEL_ORM={"TARGET_SECONDS": None}):
        yield to


@pytest.fixture
def rows(postgres):
    """In the order in which they came, with keys by chance; and the server knows it."""
    ByUuid.objects.using(postgres).bulk_create(ByUuid(number=n) for n in range(ROWS))
    run(postgres, "VACUUM FULL testapp_byuuid", "ANALYZE testapp_byuuid")
    return ByUuid.objects.using(postgres)


@pytest.fixture
def shelf(postgres):
    """Make the table of the model, by these statements, with so many rows; and let the server look at it."""

    def make(*statements, number=40, analyze="away.shelf"):
        run(postgres, "DROP SCHEMA IF EXISTS away CASCADE", "CREATE SCHEMA away", *statements)
        Shelf.objects.using(postgres).bulk_create(Shelf(id=uuid.uuid4()) for _ in range(number))
        analyze and run(postgres, f"ANALYZE {analyze}")
        return Shelf.objects.using(postgres)

    yield make
    run(postgres, "DROP SCHEMA IF EXISTS away CASCADE")


@pytest.fixture
def in_any_case(monkeypatch):
    """Blocks are taken for any table that has them, however its rows lie."""
    monkeypatch.setattr("parallel_orm.plan.IN_ORDER", 2)


PLAIN = "CREATE TABLE away.shelf (id uuid PRIMARY KEY, text text)"


def settled(queryset):
    """Return the plan that a map would follow."""
    return queryset.explain_plan(ordered=False, consistent=True).settled()


def mapped(queryset, function=functions.key, **knobs):
    return queryset.parallel_map(function, threads=2, **knobs, ordered=False, consistent=True)


def keys(queryset):
    return sorted(queryset.values_list("pk", flat=True))


def number(row):
    return row.number


def numbers(rows):
    return [row.number for row in rows]


# --- What is read -------------------------------------------------------------------


def rewrite(alias):
    """All that writers and the server can do: change every row, delete, add, clean up, use the room again."""
    rows = ByUuid.objects.using(alias)
    rows.filter(number__gte=ROWS - 500).delete()
    rows.update(number=F("number") + ROWS)
    run(alias, "VACUUM testapp_byuuid")
    rows.bulk_create(ByUuid(number=-n) for n in range(1, 500))
    rows.update(number=F("number") - 2 * ROWS)


@pytest.mark.parametrize("on", [{"threads": 2}, {"processes": 2}], ids=str)
def test_every_row_once_under_writers(rows, postgres, on):
    """They come between the first chunk and the others, and move all rows to other blocks."""
    written = []

    def told(done, total):
        if done and not written:
            written.append(done)
            elsewhere(lambda: rewrite(postgres))

    assert settled(rows).cut == "blocks"
    results = rows.parallel_map(number, progress=told, ordered=False, consistent=True, **on)
    assert written[0] < ROWS / 2
    assert sorted(results) == list(range(ROWS))
    assert max(rows.values_list("number", flat=True)) < 0, "what comes after it sees now"


def test_without_a_snapshot_rows_are_lost(rows):
    """The test above could fail."""
    first, *others = settled(rows).chunks()
    found = [row.number for row in first.narrow(rows, None)]
    rows.update(number=F("number"))
    found += [row.number for chunk in others for row in chunk.narrow(rows, None)]
    assert len(set(found)) < ROWS


def test_chunks_are_runs_of_blocks_with_about_as_many_rows(rows, size):
    size(300)
    plan = settled(rows)
    chunks = list(plan.chunks())
    assert [chunk.blocks[0] for chunk in chunks] == [0, *(chunk.blocks[1] for chunk in chunks[:-1])]
    assert chunks[-1].blocks[1] == plan.blocks > 10
    parts = [chunk.narrow(rows, None) for chunk in chunks]
    assert sorted(row.number for part in parts for row in part) == list(range(ROWS))
    assert all(100 < len(part) <= 300 for part in parts[:-1])
    assert all("Tid Range Scan" in part.explain() for part in parts)


def test_a_chunk_has_a_block_at_least_and_as_many_blocks_as_rows_at_most(rows, size):
    """However many rows lie in one block, and however few in many."""
    size(1)
    plan = settled(rows)
    assert [chunk.blocks for chunk in plan.chunks()] == [(n, n + 1) for n in range(plan.blocks)]
    rows.exclude(number=ROWS - 1).delete()
    size(3)
    chunks = list(settled(rows).chunks())
    assert {end - first for first, end in (chunk.blocks for chunk in chunks[:-1])} == {3}
    assert mapped(rows, number) == [ROWS - 1]


def test_what_is_added_meanwhile_is_not_even_read(rows):
    plan = settled(rows)
    chunks = plan.chunks()
    found = [next(chunks)]
    rows.bulk_create(ByUuid(number=n) for n in range(ROWS))
    assert [*found, *chunks][-1].blocks[1] == plan.blocks < settled(rows).blocks


def test_rows_of_every_form(rows):
    expected = list(range(ROWS))
    for queryset in (rows.all(), rows.only("number"), rows.order_by("-number"), rows.defer("number")):
        assert settled(queryset).cut == "blocks"
        assert sorted(mapped(queryset, number)) == expected
    assert sorted(n for batch in mapped(rows, numbers, batched=True) for n in batch) == expected
    assert sorted(rows.parallel_imap(number, threads=2, ordered=False, consistent=True)) == expected
    seen = []
    report = rows.parallel_each(lambda row: seen.append(row.number), threads=2, consistent=True)
    assert (sorted(seen), report.rows) == (expected, ROWS)
    assert sorted(mapped(rows.values_list("number"), functions.itself)) == [(n,) for n in expected]
    assert sorted(mapped(rows.values("number"), lambda row: row["number"])) == expected


def test_prefetches(postgres, in_any_case):
    articles = Article.objects.using(postgres)
    articles.bulk_create(Article(rank=n) for n in range(200))
    run(postgres, "ANALYZE testapp_article")
    assert settled(articles.prefetch_related("tags")).cut == "blocks"
    assert mapped(articles.prefetch_related("tags"), lambda row: len(row.tags.all())) == [0] * 200


@pytest.mark.parametrize("number", [0, 1, 40])
@pytest.mark.parametrize("kind", ["", "UNLOGGED"])
def test_small_tables(shelf, in_any_case, number, kind):
    rows = shelf(PLAIN.replace("TABLE", f"{kind} TABLE"), number=40)
    rows.exclude(pk__in=keys(rows)[:number]).delete()
    plan = settled(rows)
    assert (plan.cut, plan.blocks) == ("blocks", 1)
    assert sorted(mapped(rows)) == keys(rows)
    assert len(keys(rows)) == number


def test_a_table_without_blocks(shelf, postgres, in_any_case):
    rows = shelf(PLAIN)
    run(postgres, "TRUNCATE away.shelf")
    assert (settled(rows).cut, settled(rows).blocks) == ("blocks", 0)
    assert mapped(rows) == []
    assert "blocks of 50 rows" in str(settled(rows))


def test_rows_larger_than_a_block(shelf, postgres, in_any_case):
    """The block has where they lie."""
    rows = shelf(PLAIN)
    run(postgres, "UPDATE away.shelf SET text = (SELECT string_agg(md5(n::text), '') FROM generate_series(1, 3000) n)")
    sizes = mapped(rows, lambda row: len(row.text))
    assert sizes == [96_000] * 40


# --- When -----------------------------------------------------------------------------


def test_where_rows_lie_in_the_order_of_their_keys_ranges_are_as_fast(postgres):
    articles = Article.objects.using(postgres)
    articles.bulk_create(Article(rank=n) for n in range(500))
    # Deleted rows of earlier tests may have left holes, which these rows fill in any order.
    run(postgres, "CLUSTER testapp_article USING testapp_article_pkey", "ANALYZE testapp_article")
    assert heap_of(postgres, Article).correlation == 1
    assert settled(articles).cut == "ranges"
    assert sorted(mapped(articles)) == keys(articles)


def test_only_when_it_is_asked_for(rows):
    assert rows.explain_plan(ordered=False).settled().cut == "ranges"
    assert rows.explain_plan(1000, ordered=False, consistent=True).settled().cut == "ranges"
    assert rows.explain_plan(consistent=True).settled().cut == "ranges"
    assert rows.explain_plan(consistent=True, walk=True).settled().cut == "pages"


def test_only_all_rows_of_one_table(postgres):
    articles = Article.objects.using(postgres)
    grouped = articles.all()
    grouped.query.group_by = True
    for queryset, may_be in (
        (grouped, False),
        (articles, True),
        (articles.order_by("-rank"), True),
        (articles.order_by("?"), True),
        (RankedArticle.objects.using(postgres), True),
        (Place.objects.using(postgres), True),
        (articles.prefetch_related("tags"), True),
        (articles.values("rank"), True),
        (articles.filter(rank__gt=0), False),
        (articles.exclude(tags=None), False),
        (articles.none(), False),
        (articles.annotate(low=Lower("name")), False),
        (articles.alias(n=Count("tags")), False),
        (articles.extra(select={"one": "1"}), False),
        (articles.extra(where=["rank > 0"]), False),
        (articles.extra(tables=["testapp_tag"]), False),
        (articles.select_related("author"), False),
        (articles.values("author__name"), False),
        (articles.values("rank").annotate(n=Count("pk")), False),
        (articles.distinct(), False),
        (articles.distinct("name"), False),
        (articles.order_by("pk")[:10], False),
        (articles.filter(rank=1).union(articles.filter(rank=2)), False),
        (Visit.objects.using(postgres).order_by("place__name"), False),
        (Pizzeria.objects.using(postgres), False),
        (Seat.objects.using(postgres), False),
    ):
        plan = queryset.explain_plan(ordered=False, consistent=True)
        assert plan.may_be_blocks is may_be, queryset.query


OTHERS = {
    "a view": (PLAIN.replace("shelf", "board"), "CREATE VIEW away.shelf AS SELECT * FROM away.board"),
    "partitions": (
        f"{PLAIN} PARTITION BY HASH (id)",
        *(
            f"CREATE TABLE away.part{n} PARTITION OF away.shelf FOR VALUES WITH (MODULUS 2, REMAINDER {n})"
            for n in range(2)
        ),
    ),
    "heirs": (
        PLAIN,
        "CREATE TABLE away.heir () INHERITS (away.shelf)",
        "INSERT INTO away.heir SELECT gen_random_uuid(), 'h' FROM generate_series(1, 40)",
    ),
}


@pytest.mark.parametrize("statements", OTHERS.values(), ids=OTHERS)
def test_other_kinds_of_tables_have_no_blocks_of_their_own(shelf, postgres, in_any_case, statements):
    rows = shelf(*statements, analyze="")
    run(postgres, "ANALYZE")
    assert heap_of(postgres, Shelf) is None
    assert settled(rows).cut == "ranges"
    assert sorted(mapped(rows)) == keys(rows)


def test_a_materialized_view_has_none(shelf, postgres):
    rows = shelf(PLAIN)
    run(
        postgres,
        "ALTER TABLE away.shelf RENAME TO board",
        "CREATE MATERIALIZED VIEW away.shelf AS SELECT * FROM away.board",
        "ANALYZE away.shelf",
    )
    assert heap_of(postgres, Shelf) is None
    assert sorted(mapped(rows)) == keys(rows)


def test_a_foreign_table_has_none(shelf, postgres):
    with connections[postgres].cursor() as cursor:
        cursor.execute("SELECT FROM pg_available_extensions WHERE name = 'postgres_fdw'")
        if cursor.fetchone() is None:
            pytest.skip("this server has no postgres_fdw")
    shelf(
        "CREATE EXTENSION postgres_fdw SCHEMA away",
        "CREATE SERVER far FOREIGN DATA WRAPPER postgres_fdw",
        "CREATE FOREIGN TABLE away.shelf (id uuid, text text) SERVER far",
        number=0,
        analyze="",
    )
    assert heap_of(postgres, Shelf) is None


def test_without_statistics_nothing_is_known(shelf, postgres):
    rows = shelf(PLAIN, analyze="")
    assert heap_of(postgres, Shelf) is None
    assert settled(rows).cut == "ranges"
    assert sorted(mapped(rows)) == keys(rows)


def test_whoever_may_read_some_columns_may_not_ask_where_a_row_lies(shelf, postgres):
    shelf(PLAIN)
    role = f"reader_{uuid.uuid4().hex}"
    with transaction.atomic(using=postgres):
        run(
            postgres,
            f"CREATE ROLE {role}",
            f"GRANT USAGE ON SCHEMA away TO {role}",
            f"GRANT SELECT (id, text) ON away.shelf TO {role}",
            f"SET LOCAL ROLE {role}",
        )
        assert len(Shelf.objects.using(postgres).all()) == 40
        assert heap_of(postgres, Shelf) is None
        transaction.set_rollback(True, using=postgres)


class InATestCase(TestCase):
    databases = {"postgres"}

    def test_there_is_no_snapshot_and_so_there_are_no_blocks(self):
        rows = ByUuid.objects.using("postgres")
        rows.bulk_create(ByUuid(number=n) for n in range(500))
        run("postgres", "ANALYZE testapp_byuuid")
        self.assertEqual(settled(rows).cut, "ranges")
        self.assertEqual(sorted(mapped(rows, number)), list(range(500)))


# --- How ------------------------------------------------------------------------------


def test_nothing_moves_the_rows_meanwhile(rows, postgres):
    """Neither VACUUM FULL nor CLUSTER: the look-up locks the table as its readers do."""
    with transaction.atomic(using=postgres):
        heap_of(postgres, ByUuid)

        def move():
            with pytest.raises(OperationalError, match="could not obtain lock"), transaction.atomic(using=postgres):
                run(postgres, "LOCK TABLE testapp_byuuid IN ACCESS EXCLUSIVE MODE NOWAIT")

        elsewhere(move)


def test_the_look_up_is_no_query_of_the_users(rows, postgres):
    with CaptureQueriesContext(connections[postgres]) as queries:
        results = mapped(rows)
    assert len(queries) == results.report.chunks
    assert all("ctid" in query["sql"] for query in queries)


def test_the_plan_tells_it(rows, postgres, size):
    size(300)
    with CaptureQueriesContext(connections[postgres]) as queries:
        plan = rows.explain_plan(ordered=False, consistent=True)
    assert len(queries) == 0
    told = str(plan)
    for part in (
        "blocks of 300 rows",
        "do not lie in the order of the primary key",
        "order:    none",
        "3000 rows in 10 chunks",
        "index:    none",
        "fallback: ranges",
        "as of:    one moment",
    ):
        assert part in told, told
    assert "warning" not in told, told


def test_consistent_plans_are_refused_elsewhere(default):
    with pytest.raises(NotSupportedError, match="needs a snapshot"):
        ByUuid.objects.using(default).explain_plan(consistent=True)


def test_an_error_names_the_blocks(rows):
    with pytest.raises(ZeroDivisionError) as raised:
        mapped(rows, lambda row: 1 / row.number)
    notes = "\n".join(raised.value.__notes__)
    assert "in chunk 0 (blocks 0 to " in notes
