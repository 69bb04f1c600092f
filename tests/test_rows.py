"""Instances made fast are the instances that Django makes."""

from __future__ import annotations

import datetime
import decimal
import pickle
import uuid

import pytest
from django.db import connections, models
from django.db.models.query import ModelIterable
from django.db.models.signals import post_init, pre_init

from parallel_orm.rows import FastModelIterable, is_plain, made_fast
from tests.testapp.models import (
    Article,
    Author,
    ByText,
    ByUuid,
    Everything,
    OwnNew,
    PlainArticle,
    Profile,
    Restaurant,
    Seat,
    Tag,
    WithFile,
)


def parts(instance):
    """All that an instance is: its attributes in their order, and those of its state."""
    assert instance._state.fields_cache == {}  # made when it is first asked for; Django asks early for foreign keys
    columns = [(name, type(value), value) for name, value in vars(instance).items() if name != "_state"]
    return type(instance), columns, list(vars(instance)), vars(instance._state)


@pytest.fixture
def rows(alias):
    author = Author.objects.using(alias).create(name="Ada", born=1815)
    Article.objects.using(alias).create(name="a", author=author, published=datetime.datetime.now(datetime.UTC))
    Article.objects.using(alias).create(name="b", score=3)
    ByUuid.objects.using(alias).create()
    ByText.objects.using(alias).create(code="x")
    Profile.objects.using(alias).create(author=author)
    Restaurant(name="r", stars=2).save(using=alias)
    Seat.objects.using(alias).create(row="A", number=1)
    for full in (True, False):
        Everything.objects.using(alias).create(
            boolean=full,
            decimal=decimal.Decimal("1.50") if full else None,
            date=datetime.date(2013, 1, 2) if full else None,
            time=datetime.time(1, 2, 3) if full else None,
            duration=datetime.timedelta(days=1, microseconds=5) if full else None,
            floating=1.5 if full else None,
            json={"a": [1, None, "x"]} if full else None,
            binary=b"\x00\xff" if full else None,
            uuid=uuid.UUID(int=5) if full else None,
            address="10.0.0.1" if full else None,
            mood="happy" if full else "",
        )
    return alias


@pytest.mark.parametrize(
    "model",
    [Article, PlainArticle, Author, ByUuid, ByText, Profile, Restaurant, Seat, Everything],
    ids=lambda m: m.__name__,
)
def test_every_attribute_is_the_same(rows, model):
    """Types, values, order and state, over every kind of key and field."""
    queryset = model._default_manager.using(rows).order_by("pk")
    fast = made_fast(queryset.all())
    assert fast._iterable_class is FastModelIterable
    assert [parts(instance) for instance in fast] == [parts(instance) for instance in queryset]
    assert (
        [parts(instance) for instance in queryset.chunked_iterator(1)] == [parts(i) for i in queryset]
        if hasattr(queryset, "chunked_iterator")
        else True
    )
    for instance, djangos in zip(fast, queryset, strict=True):
        assert instance == djangos
        assert pickle.loads(pickle.dumps(instance)) == djangos
        assert instance.get_deferred_fields() == set()
        assert not instance._state.fields_cache


def test_they_live_as_djangos_do(rows):
    """Relations are asked for and kept, changes are saved, a refresh reads anew."""
    (article,) = made_fast(Article.objects.using(rows).filter(name="a"))
    assert article.author.name == "Ada"
    assert article._state.fields_cache
    article.author_id = None
    assert not article._state.fields_cache
    article.name = "changed"
    article.save()
    article.refresh_from_db()
    assert (article.name, article.author) == ("changed", None)
    other = made_fast(Article.objects.using(rows).filter(name="b")).get()
    assert other._state.fields_cache is not article._state.fields_cache


def test_where_anything_more_is_asked_django_makes_them(default):
    """A queryset with more or less than whole rows is left as it is."""
    author = Author(pk=1)
    for queryset in (
        Article.objects.select_related("author"),
        Article.objects.only("name"),
        Article.objects.defer("name"),
        Article.objects.annotate(n=models.Count("tags")),
        Article.objects.extra(select={"one": "1"}),
        Article.objects.values("name"),
        author.articles.all(),
        Article.objects.union(Article.objects.all()),
        WithFile.objects.all(),
    ):
        before = queryset._iterable_class
        assert made_fast(queryset)._iterable_class is before is not FastModelIterable


def test_where_a_model_would_notice_django_makes_them(monkeypatch):
    def own(self, *args, **kwargs):
        raise AssertionError

    assert is_plain(Tag)
    assert not is_plain(OwnNew)
    for name in ("__init__", "__setattr__"):
        with monkeypatch.context() as patch:
            patch.setattr(Tag, name, own, raising=False)
            assert not is_plain(Tag), name
    with monkeypatch.context() as patch:
        patch.setattr(Tag, "from_db", classmethod(own))
        assert not is_plain(Tag)
    with monkeypatch.context() as patch:
        patch.setattr(Tag, "name", property(own))
        assert not is_plain(Tag)
    for signal in (pre_init, post_init):
        signal.connect(own, sender=Tag)
        try:
            assert not is_plain(Tag)
            assert is_plain(Author)
        finally:
            signal.disconnect(own, sender=Tag)
    assert is_plain(Tag)


def test_fetch_modes_are_kept(default):
    if not hasattr(models, "FETCH_PEERS"):
        pytest.skip("since Django 6.1")
    Tag.objects.using(default).create(name="t")
    raising = Tag.objects.using(default).fetch_mode(models.FETCH_RAISE)
    assert [parts(i) for i in made_fast(raising.all())] == [parts(i) for i in raising]
    assert made_fast(Tag.objects.fetch_mode(models.FETCH_PEERS))._iterable_class is ModelIterable
    connections.close_all()
