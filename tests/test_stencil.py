"""The SQL of a page or a jump that was made for another one is the SQL that Django would have made."""

from __future__ import annotations

import threading
import uuid
from datetime import UTC, datetime, timedelta
from functools import partialmethod

import pytest
from django.db import connections
from django.db.models import CharField, Count, Exists, F, Func, OuterRef, Value
from django.db.models.functions import Upper
from django.test.utils import CaptureQueriesContext

from parallel_orm import cutting
from parallel_orm.rows import read
from parallel_orm.stencil import Behind, Stencil
from tests.testapp.models import Article, Author, ByMoment, ByText, ByUuid

WAIT = 60


@pytest.fixture
def made(monkeypatch):
    """What became of each attempt to make one."""
    attempts = []
    of = Stencil.of

    def made_of(rows):
        attempts.append(of(rows))
        return attempts[-1]

    monkeypatch.setattr(Stencil, "of", made_of)
    return attempts


@pytest.fixture
def articles(alias):
    author = Author.objects.using(alias).create(name="a")
    Article.objects.using(alias).bulk_create(
        Article(name=f"name {n % 7}", rank=n % 11, author=author if n % 2 else None) for n in range(60)
    )
    return Article.objects.using(alias)


def fill(model, alias):
    now = datetime(2020, 1, 1, tzinfo=UTC)
    rows = {
        ByUuid: lambda n: ByUuid(pk=uuid.UUID(int=n * 7919)),
        ByText: lambda n: ByText(pk=f"code {n:03} 'x' %s"),
        ByMoment: lambda n: ByMoment(pk=now + timedelta(minutes=n)),
    }
    model.objects.using(alias).bulk_create(map(rows[model], range(60)))
    return model.objects.using(alias).order_by("pk")


def without(monkeypatch, function):
    """Call it with all SQL made anew."""
    with monkeypatch.context() as patch:
        patch.setattr(Stencil, "of", classmethod(lambda cls, rows: None))
        return function()


def same_queries(alias, monkeypatch, function):
    """Return what it returns, and how many queries it makes: the same ones with SQL that is made anew."""
    with CaptureQueriesContext(connections[alias]) as anew:
        expected = without(monkeypatch, function)
    with CaptureQueriesContext(connections[alias]) as queries:
        assert function() == expected
    assert [query["sql"] for query in queries] == [query["sql"] for query in anew]
    return expected, len(queries)


WALKS = {
    "plain": lambda rows: rows.order_by("pk"),
    "backwards": lambda rows: rows.order_by("-pk"),
    "filtered by as many": lambda rows: rows.filter(pk__gt=1, rank__lt=10).exclude(pk=1).order_by("pk"),
    "annotated": lambda rows: rows.annotate(loud=Upper("name"), three=Value(3)).order_by("pk"),
    "of another table": lambda rows: rows.filter(author__name="a").select_related("author").order_by("pk"),
    "values": lambda rows: rows.values("pk", "name").order_by("pk"),
    "a column": lambda rows: rows.values_list("pk", flat=True).order_by("pk"),
    "with prefetches": lambda rows: rows.prefetch_related("author").order_by("pk"),
    "distinct": lambda rows: rows.distinct().order_by("pk"),
}


@pytest.mark.parametrize("name", WALKS)
def test_pages_are_asked_for_as_ever(articles, alias, monkeypatch, made, name):
    rows = WALKS[name](articles)
    seen, _ = same_queries(alias, monkeypatch, lambda: list(rows.chunked_iterator(8)))
    assert seen == list(rows)
    assert len(made) == 1, "the third page is the first one whose SQL is kept"
    assert made[0] is not None


@pytest.mark.parametrize("model", [ByUuid, ByText, ByMoment])
def test_so_are_jumps_by_any_kind_of_key(alias, monkeypatch, made, model):
    monkeypatch.setattr(cutting, "FEW_ROWS", 8)
    rows = fill(model, alias)
    chunks, number = same_queries(alias, monkeypatch, lambda: list(rows.explain_plan(8).chunks()))
    assert (len(chunks), number) == (8, 9)
    assert [stencil for stencil in made if stencil is not None]
    assert list(rows.chunked_iterator(8)) == list(rows)


def test_sql_of_the_users_own_is_made_anew(articles, made):
    """It may be another one each time. So may a subquery, which a compiler of its own makes."""

    class Own(Func):
        function, arity = "UPPER", 1
        number = 0

        def as_sql(self, compiler, connection, **context):
            Own.number += 1
            return super().as_sql(compiler, connection, **context)

    same = Article.objects.filter(author=OuterRef("author"))
    for rows in (
        articles.alias(own=Own(F("name"), output_field=CharField())).filter(own__gt=""),
        articles.filter(Exists(same.using(articles.db))),
    ):
        assert len(list(rows.order_by("pk").chunked_iterator(8))) == rows.count()
    assert made == [None, None], "and nobody tries twice"
    assert Own.number > 8


def test_groups_and_orders_of_several_columns_are_none_of_it(articles, made):
    groups = articles.values("rank").annotate(number=Count("pk")).order_by("rank")
    assert list(groups.chunked_iterator(2)) == list(groups)
    assert list(articles.order_by("name", "pk").chunked_iterator(8)) == list(articles.order_by("name", "pk"))
    assert made == []


def of_pages(rows):
    """Return an open interval of which pages are taken."""
    return Behind(rows.order_by("pk"), rows.explain_plan(8).keyset.terms[0])


def test_each_length_is_another_sql(articles, made):
    pages, keys = of_pages(articles), list(articles.order_by("pk").values_list("pk", flat=True))
    for start, stop in ((0, 5), (0, 5), (0, 5), (0, 7), (0, 7), (4, 5), (4, 5), (4, 5), (0, 5)):
        found = [article.pk for article in read(pages.slice(keys[9], start, stop))]
        assert found == keys[10 + start : 10 + stop]
    assert len(made) == 3


def test_a_value_of_another_kind_is_made_anew(articles):
    stencil = Stencil.of(articles.filter(pk__gt=5).order_by("pk"))
    assert stencil.part(6) is not None
    assert stencil.part("6") is None
    assert stencil.part(True) is None


def test_a_wrapper_sees_what_it_would_see(articles, alias, monkeypatch):
    """The same SQL with the same parameters, in the same kind of sequence."""

    def seen():
        said = []

        def hear(execute, sql, params, many, context):
            said.append((sql, params))
            return execute(sql, params, many, context)

        with connections[alias].execute_wrapper(hear):
            assert len(list(articles.filter(rank__gte=0).order_by("pk").chunked_iterator(8))) == 60
        return said

    assert seen() == without(monkeypatch, seen)


def test_a_compiler_of_somebodys_own_makes_its_sql(articles, alias, monkeypatch):
    compiler = type(articles.query.get_compiler(alias))
    rows = articles.filter(pk__gt=5).order_by("pk")
    assert Stencil.of(rows) is not None
    monkeypatch.setattr(compiler, "as_sql", partialmethod(compiler.as_sql))
    assert Stencil.of(rows) is None


def test_it_is_run_on_the_connection_of_whoever_runs_it(articles, alias):
    part = Stencil.of(articles.filter(pk__gt=5).order_by("pk")).part(6)
    found = []

    def ask():
        try:
            found.append((connections[alias], part.query.get_compiler(using=alias).connection))
        finally:
            connections[alias].close()

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(WAIT)
    ((theirs, asked),) = found
    assert asked is theirs
    assert part.query.get_compiler(using=alias).connection is connections[alias] is not theirs


def test_the_place_of_the_key_is_found_among_values_like_it(articles, alias):
    """However many parameters are equal to it."""
    key = articles.order_by("pk").values_list("pk", flat=True)[20]
    rows = articles.filter(pk__gte=key - 1, pk__lte=key + 1, rank__gte=0).exclude(rank=key).order_by("pk")
    part = Stencil.of(rows.filter(pk__gt=key)[:4]).part(key - 1)
    anew = rows.filter(pk__gt=key - 1)[:4]
    sql, params = part.query.get_compiler(using=alias).as_sql()
    expected, others = anew.query.get_compiler(using=alias).as_sql()
    assert (sql, list(params)) == (expected, list(others))
    assert list(part) == list(anew)


def test_it_keeps_no_rows(articles):
    """Those that are held in a list are those of the page that was asked for, and of no other one."""
    pages = of_pages(articles)
    for _ in range(3):
        read(pages.slice(1, 0, 5))
    assert pages._stencil._rows._result_cache is None
