"""What is said of joins at a glance is what a look at them says."""

from __future__ import annotations

import pytest
from django.db.models import Count, F, FilteredRelation, Q, Value
from django.db.models.functions import Upper

from parallel_orm import guards
from tests.testapp.models import Article, Note, Restaurant

QUERYSETS = {
    "all": (True, Article.objects.all),
    "by its key": (True, lambda: Article.objects.order_by("-pk")),
    "by columns": (True, lambda: Article.objects.filter(rank__gt=3).order_by("name", "-rank", "id").only("name")),
    "by Meta.ordering": (True, Note.objects.all),
    "filtered by many": (False, lambda: Article.objects.filter(tags__name="a").order_by("pk")),
    "ordered by many": (False, lambda: Article.objects.order_by("tags__name")),
    "ordered by one": (False, lambda: Article.objects.order_by("-author")),
    "by a function": (False, lambda: Article.objects.order_by(Upper("name"))),
    "by many in an expression": (False, lambda: Article.objects.order_by(F("tags__name").desc())),
    "selected with": (False, lambda: Article.objects.select_related("author")),
    "groups": (False, lambda: Article.objects.values("rank").annotate(n=Count("tags"))),
    "values of many": (False, lambda: Article.objects.values("tags")),
    "distinct": (False, lambda: Article.objects.filter(tags__name="a").distinct()),
    "a join of its own": (
        False,
        lambda: Article.objects.annotate(t=FilteredRelation("tags", condition=Q(tags__name="a"))).filter(t__name="a"),
    ),
    "SQL": (False, lambda: Article.objects.extra(tables=["testapp_tag"])),
    "a value": (False, lambda: Article.objects.annotate(one=Value(1))),
    "with a parent": (False, lambda: Restaurant.objects.order_by("name")),
}


@pytest.mark.parametrize("name", QUERYSETS)
def test_joins_are_seen_at_a_glance(default, monkeypatch, name):
    at_a_glance, make = QUERYSETS[name]
    rows = make()
    assert guards.is_of_one_table(rows) is at_a_glance
    seen = guards.joins_of(rows)
    monkeypatch.setattr(guards, "is_of_one_table", lambda rows: False)
    assert guards.joins_of(rows) == seen
