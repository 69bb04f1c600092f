"""One table of seven columns, by our manager and by Django's own."""

from __future__ import annotations

from django.db import connections, models

from parallel_orm import ParallelManager


class Article(models.Model):
    title = models.CharField(max_length=100)
    author_id = models.IntegerField()
    words = models.IntegerField()
    rating = models.FloatField()
    draft = models.BooleanField()
    published = models.DateTimeField()

    objects = ParallelManager()
    plain = models.Manager()  # noqa: DJ012 - a manager, whatever the rule takes it for


#: The numbers from 1 to %s, in a column n.
_NUMBERS = {
    "postgresql": "SELECT n FROM generate_series(1, %s) AS numbers (n)",
    "sqlite": "WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < %s) "
    "SELECT n FROM numbers",
}
_DAY = {
    "postgresql": "timestamptz '2020-01-01 00:00+00' + n %% 2000 * interval '1 day'",
    "sqlite": "datetime('2020-01-01', '+' || (n %% 2000) || ' days')",
}


def make_table(alias: str, rows: int) -> None:
    """Make the table and fill it, within the database."""
    connection = connections[alias]
    with connection.schema_editor() as editor:
        editor.create_model(Article)
    with connection.cursor() as cursor:
        cursor.execute(
            "INSERT INTO benchmarks_article (title, author_id, words, rating, draft, published) "
            "SELECT 'The story of the article number ' || n, n %% 1000, n %% 5000, n / 7.0, n %% 3 = 0, "
            f"{_DAY[connection.vendor]} FROM ({_NUMBERS[connection.vendor]}) AS source",
            [rows],
        )
        cursor.execute("VACUUM ANALYZE" if connection.vendor == "postgresql" else "ANALYZE")


def drop_table(alias: str) -> None:
    with connections[alias].schema_editor() as editor:
        editor.delete_model(Article)
