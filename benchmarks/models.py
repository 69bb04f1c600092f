"""One table of seven columns, by our manager and by Django's own, and one that it refers to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from django.db import connections, models, transaction

from parallel_orm import ParallelManager

AUTHORS = 1_000


class Author(models.Model):
    name = models.CharField(max_length=100)


class Columns(models.Model):
    title = models.CharField(max_length=100)
    words = models.IntegerField()
    rating = models.FloatField()
    draft = models.BooleanField()
    published = models.DateTimeField()

    objects = ParallelManager()
    plain = models.Manager()  # noqa: DJ012 - a manager, whatever the rule takes it for

    class Meta:
        abstract = True


class Article(Columns):
    author_id = models.IntegerField()


class SignedArticle(Columns):
    """The same rows, for ``select_related``."""

    author = models.ForeignKey(Author, models.DO_NOTHING)

    class Meta:
        managed = False
        db_table = "benchmarks_article"


class Parcel(models.Model):
    """What is written."""

    code = models.CharField(max_length=20)
    title = models.CharField(max_length=100)
    weight = models.FloatField()
    changed = models.DateTimeField(auto_now=True)

    objects = ParallelManager()

    class Meta:
        managed = False
        db_table = "benchmarks_parcel"


#: Numbers n from 1 on, a title and a day for each.
_SOURCES = {
    "postgresql": "SELECT n, 'The story of the article number ' || n AS title, "
    "timestamptz '2020-01-01 00:00+00' + n % 2000 * interval '1 day' AS published "
    "FROM generate_series(1, {rows}) AS numbers (n)",
    "sqlite": "WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {rows}) "
    "SELECT n, 'The story of the article number ' || n AS title, "
    "datetime('2020-01-01', '+' || (n % 2000) || ' days') AS published FROM numbers",
    "mysql": "SELECT seq AS n, concat('The story of the article number ', seq) AS title, "
    "timestampadd(DAY, seq % 2000, '2020-01-01') AS published FROM seq_1_to_{rows}",
}
_ANALYSE = {"postgresql": "VACUUM ANALYZE", "sqlite": "ANALYZE", "mysql": "ANALYZE TABLE benchmarks_article"}


@contextmanager
def table(alias: str, rows: int) -> Iterator[None]:
    """Make the tables and fill them, within the database; drop them in the end."""
    connection = connections[alias]
    source = _SOURCES[connection.vendor]
    with connection.schema_editor() as editor:
        editor.create_model(Author)
        editor.create_model(Article)
    try:
        with connection.cursor() as cursor, transaction.atomic(using=alias):
            if connection.vendor == "postgresql":  # else VACUUM comes too early to find the rows there for everybody
                cursor.execute("SET LOCAL synchronous_commit = on")
            cursor.execute(
                "INSERT INTO benchmarks_author (id, name) "
                f"SELECT n, title FROM ({source.format(rows=AUTHORS)}) AS source"
            )
            cursor.execute(
                "INSERT INTO benchmarks_article (title, author_id, words, rating, draft, published) "
                f"SELECT title, n % {AUTHORS} + 1, n % 5000, n / 7.0, n % 3 = 0, published "
                f"FROM ({source.format(rows=rows)}) AS source"
            )
        with connection.cursor() as cursor:
            cursor.execute(_ANALYSE[connection.vendor])
        yield
    finally:
        connection.close()  # the run may have been ended amid an answer
        with connection.schema_editor() as editor:
            editor.delete_model(Article)
            editor.delete_model(Author)
