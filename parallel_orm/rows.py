"""Model instances made fast, when provably the same.

Django makes an instance by ``from_db`` and ``__init__``, which ask for each column of each row whether anybody wants to
know. Where nobody does, the columns can go straight into the instance's ``__dict__``: that is all that is left of it.
:func:`made_fast` says where; everywhere else Django makes them. What is relied upon is the same in Django 5.2, 6.0 and
6.1, and ``tests/test_rows.py`` compares the instances with Django's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from django.db.models import Model, QuerySet
from django.db.models.base import ModelState
from django.db.models.fields.related_descriptors import ForeignKeyDeferredAttribute
from django.db.models.query import ModelIterable
from django.db.models.query_utils import DeferredAttribute
from django.db.models.signals import post_init, pre_init

#: Descriptors that keep a value in ``__dict__`` as it is. A derived one (of a file field, say) may do more.
PLAIN_DESCRIPTORS = (DeferredAttribute, ForeignKeyDeferredAttribute)


class FastModelIterable(ModelIterable):  # type: ignore[type-arg]
    """Yields what Django's ``ModelIterable`` yields for whole rows of a plain model."""

    def __iter__(self) -> Iterator[Any]:
        queryset: Any = self.queryset
        alias = queryset.db
        compiler = queryset.query.get_compiler(using=alias)
        results = compiler.execute_sql(chunked_fetch=self.chunked_fetch, chunk_size=self.chunk_size)
        model = queryset.model
        names = [column.target.attname for column, *_ in compiler.select]
        # The fetch mode of Django 6.1 is kept in the state; before there was none.
        kept = {"adding": False, "db": alias}
        if hasattr(queryset, "_fetch_mode"):
            kept["fetch_mode"] = queryset._fetch_mode
        make, make_state = model.__new__, ModelState
        for values in compiler.results_iter(results):
            instance = make(model)
            state = make_state()
            state.__dict__.update(kept)
            attributes = instance.__dict__
            attributes["_state"] = state
            attributes.update(zip(names, values, strict=True))
            yield instance


def made_fast(queryset: Any) -> Any:
    """Return the queryset so that its instances are made fast, if they come out the same; else as it is.

    They do where each row has all columns of the model and nothing else, and where the model has Django's own way of
    being made: no ``__init__``, ``from_db``, ``__new__`` or ``__setattr__`` of its own, no listener to ``pre_init`` or
    ``post_init``, no descriptor that would notice.
    """
    if isinstance(queryset, QuerySet) and _has_whole_rows(queryset) and is_plain(queryset.model):
        queryset._iterable_class = FastModelIterable
    return queryset


def _has_whole_rows(queryset: Any) -> bool:
    query = queryset.query
    return (
        queryset._iterable_class is ModelIterable
        and not query.select_related
        and not query.deferred_loading[0]
        and not query.annotation_select
        and not query.extra_select
        and not query.combinator
        and not queryset._known_related_objects
        and not getattr(getattr(queryset, "_fetch_mode", None), "track_peers", False)
    )


def is_plain(model: type[Model]) -> bool:
    """Tell whether nothing of this model, and nobody else, would notice how its instances are made."""
    from_db: Any = model.from_db
    djangos: Any = Model.from_db
    return (
        from_db.__func__ is djangos.__func__
        and model.__init__ is Model.__init__
        and model.__new__ is object.__new__
        and model.__setattr__ is object.__setattr__
        and type(model).__call__ is type.__call__
        and not pre_init.has_listeners(model)
        and not post_init.has_listeners(model)
        and all(type(_descriptor(model, field.attname)) in PLAIN_DESCRIPTORS for field in model._meta.concrete_fields)
    )


def is_kept_as_it_is(queryset: Any, name: str) -> bool:
    """Tell whether an instance has under this name what the database has: a plain column of a plain model."""
    model = queryset.model
    if name == "pk":
        return len(model._meta.pk_fields) == 1
    is_column = any(field.attname == name for field in model._meta.concrete_fields)
    return is_column and is_plain(model)


def _descriptor(model: type[Model], name: str) -> object:
    """Return what a class has under a name, without asking it to be anything."""
    return next((vars(each)[name] for each in model.__mro__ if name in vars(each)), None)
