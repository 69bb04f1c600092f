"""The law of walks: every row once, in order, whatever the rows, the order, the chunk size, and what others write.

A row that was there throughout, its ordering columns unchanged, comes exactly once, in its place; no row comes twice.
The writer has a connection of its own and does what Hypothesis makes it do between two rows of the walk. The mutants at
the end prove that the law would notice: each is a bug that such code is known for.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from django.db import connections
from django.db.models import F, Q
from django.db.models.functions import Collate, Lower
from django.db.models.lookups import GreaterThan, GreaterThanOrEqual, LessThan, LessThanOrEqual
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from parallel_orm.errors import UnsupportedQuerySet
from parallel_orm.keyset import NOTHING, Keyset, Term
from tests.testapp.models import Article, Seat

NAMES = ["a", "A", "b", "B", "ä", "", "a b"]
BINARY = {"sqlite": "BINARY", "postgresql": "C", "mysql": "utf8mb4_bin"}

rows_of_articles = st.lists(
    st.tuples(st.none() | st.integers(-1, 2), st.integers(0, 2), st.sampled_from(NAMES)), max_size=16
)
terms = st.sampled_from(["score", "-score", "rank", "-rank", "name", "-name", "score nulls first", "-score nulls last"])
computed = st.sampled_from(["lower", "binary", "sum"])
orders = st.tuples(
    st.lists(terms | st.sampled_from(["lower", "binary", "sum"]), max_size=3), st.sampled_from(["pk", "-pk"])
)
#: At which row of the walk, what, and to which row of the table.
writes = st.lists(
    st.tuples(st.integers(0, 15), st.sampled_from(["insert", "delete", "touch"]), st.integers(0, 15)), max_size=5
)


def order_by(queryset, order):
    """The order that a list of words stands for; rows whose columns are equal by primary key."""
    items = []
    for word in order[0]:
        name, _, nulls = word.partition(" ")
        if word == "lower":
            items.append(Lower("name"))
        elif word == "binary":
            items.append(Collate("name", BINARY[connections[queryset.db].vendor]).desc())
        elif word == "sum":
            items.append(F("score") + F("rank"))
        elif nulls:
            column, where = F(name.lstrip("-")), {nulls.replace(" ", "_"): True}
            items.append(column.desc(**where) if name[0] == "-" else column.asc(**where))
        else:
            items.append(name)
    return queryset.order_by(*items, order[1])


class Writer:
    """Writes on a connection of its own, committed before it returns."""

    def __init__(self, alias):
        self.alias, self.thread = alias, ThreadPoolExecutor(1)

    def write(self, what, place, keys):
        self.thread.submit(self._write, what, keys[place % len(keys)] if keys else None).result(60)

    def _write(self, what, key):
        articles = Article.objects.using(self.alias)
        if what == "insert":
            articles.create(name=NAMES[(key or 0) % len(NAMES)], score=None if not key else key % 3, rank=1)
        elif what == "delete":
            articles.filter(pk=key).delete()
        else:
            articles.filter(pk=key).update(published="2013-01-01T00:00Z")

    def close(self):
        self.thread.submit(connections.close_all).result(60)
        self.thread.shutdown()


@pytest.fixture
def writer(alias):
    writer = Writer(alias)
    yield writer
    writer.close()


def hold(writer, rows, order, chunk_size, backwards, writes, of=lambda queryset: queryset):
    """Walk, with the writer at work, and hold what came against what was there throughout."""
    articles = Article.objects.using(writer.alias)
    articles.all().delete()
    articles.bulk_create(Article(score=score, rank=rank, name=name) for score, rank, name in rows)
    queryset = of(order_by(articles, order))
    if backwards:
        queryset = queryset.reverse()
    before = [row.pk for row in queryset]
    by_place: dict[int, list] = {}
    for at, what, place in writes:
        by_place.setdefault(at, []).append((what, place))
    seen = []
    for number, row in enumerate(queryset.chunked_iterator(chunk_size)):
        assert number < 100, "it ends"
        seen.append(row.pk)
        for what, place in by_place.pop(number, ()):
            writer.write(what, place, before)
    throughout = set(queryset.values_list("pk", flat=True)) & set(before)
    assert [pk for pk in seen if pk in throughout] == [pk for pk in before if pk in throughout]
    assert len(seen) == len(set(seen))
    if not writes:
        assert seen == before


LAW = {
    "rows": rows_of_articles,
    "order": orders,
    "chunk_size": st.integers(1, 7),
    "backwards": st.booleans(),
    "writes": writes,
}


def holds(writer, examples, **settings_):
    @settings(max_examples=examples, deadline=None, **settings_)
    @given(**LAW)
    def law(rows, order, chunk_size, backwards, writes):
        hold(writer, rows, order, chunk_size, backwards, writes)

    law()


def test_every_row_once_in_order_under_writers(writer):
    holds(writer, 60)


def test_the_same_where_bounds_are_looked_up(writer):
    """Rows that do not bring their key are cut by jumps."""

    @settings(max_examples=30, deadline=None)
    @given(**LAW)
    def law(rows, order, chunk_size, backwards, writes):
        hold(writer, rows, order, chunk_size, backwards, writes, of=lambda q: q.defer("published"))

    law()


@settings(max_examples=25, deadline=None)
@given(
    keys=st.lists(st.tuples(st.sampled_from("abA"), st.integers(0, 9)), unique=True, max_size=15),
    size=st.integers(1, 5),
)
def _composite(alias, keys, size):
    seats = Seat.objects.using(alias)
    seats.all().delete()
    if connections[alias].vendor == "mysql":
        keys = [(row.lower(), number) for row, number in keys]  # which holds "a" and "A" for one
    seats.bulk_create(Seat(row=row, number=number, taken=number % 2) for row, number in dict.fromkeys(keys))
    for order in (("pk",), ("-pk",), ("taken", "pk"), ("-taken", "-row", "pk")):
        assert list(seats.order_by(*order).chunked_iterator(size)) == list(seats.order_by(*order))
    assert {s.pk for s in seats.chunked_iterator(size)} == set(dict.fromkeys(keys))


def test_keys_of_two_columns(alias):
    _composite(alias)


# --- What the law would notice -------------------------------------------------------------


def at_least(self, value, *, or_same=False):
    """``>=`` where ``>`` is meant: the row of a bound comes twice."""
    return behind(self, value, or_same=True)


def no_tie_break(self, key, *, or_same):
    """The first column alone: of equal rows all but the first chunk's are lost."""
    term, value = self.terms[0], key[0]
    return term.behind(value, or_same=or_same)


def nulls_forgotten(self, value, *, or_same=False):
    """``k > a`` without ``OR k IS NULL``: the rows with NULL are lost."""
    return behind(replace(self, nullable=False), value, or_same=or_same)


def nulls_at_the_wrong_end(self, value, *, or_same=False):
    """NULLs taken for smaller where they are larger."""
    return behind(replace(self, nulls_last=not self.nulls_last), value, or_same=or_same)


def nothing_behind_null(self, value, *, or_same=False):
    """A bound that is NULL taken for the end."""
    return NOTHING if value is None and not or_same else behind(self, value, or_same=or_same)


def other_collation(vendor):
    """Bounds compared as another collation would, which has case where the column's has none, and none where it has."""

    def mutant(self, value, *, or_same=False):
        if self.path != "name" or value is None:
            return behind(self, value, or_same=or_same)
        column = Collate("name", BINARY["mysql"]) if vendor == "mysql" else Lower("name")
        lookups = {(True, True): LessThanOrEqual, (True, False): LessThan, (False, True): GreaterThanOrEqual}
        compare = lookups.get((self.descending, or_same), GreaterThan)
        return Q(compare(column, value if vendor == "mysql" else value.lower()))

    return mutant


behind = Term.behind
MUTANTS = {
    ">= for >": (Term, "behind", at_least),
    "a lost tie-break": (Keyset, "_behind", no_tie_break),
    "NULLs forgotten": (Term, "behind", nulls_forgotten),
    "NULLs at the wrong end": (Term, "behind", nulls_at_the_wrong_end),
    "nothing behind NULL": (Term, "behind", nothing_behind_null),
    "a collation mismatch": (Term, "behind", None),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_law_notices(writer, monkeypatch, mutant):
    """A law that no bug breaks says nothing."""
    owner, name, function = MUTANTS[mutant]
    monkeypatch.setattr(owner, name, function or other_collation(connections[writer.alias].vendor))
    with pytest.raises((AssertionError, UnsupportedQuerySet)):
        holds(writer, 400, derandomize=True, database=None, phases=[Phase.generate], report_multiple_bugs=False)
