"""prefetch_related(), sibling lookups of one level at the same time.

Django's own ``prefetch_related_objects`` does each; what is here only tells which may go side by side: those that begin
with different relations, since each of them fills other caches of the same instances. A lookup that goes through a
property may need what those before it have fetched; the lookups beside it then go in their order, one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from django.db.models import Prefetch, prefetch_related_objects
from django.db.models.constants import LOOKUP_SEP
from django.db.models.fields.related_descriptors import ReverseManyToOneDescriptor

#: Does several things at once, and returns when all are done.
AtOnce = Callable[[list[Callable[[], None]]], None]


def prefetch_side_by_side(instances: list[Any], lookups: Iterable[str | Prefetch[Any]], at_once: AtOnce) -> None:
    """Do what ``prefetch_related_objects(instances, *lookups)`` does."""
    _prefetch_level(instances, instances, list(lookups), 0, at_once)


def _prefetch_level(
    instances: list[Any], here: list[Any], lookups: list[str | Prefetch[Any]], depth: int, at_once: AtOnce
) -> None:
    """Prefetch for ``here``, the objects that lie ``depth`` steps away from the instances."""
    groups: dict[str, list[str | Prefetch[Any]]] = {}
    for lookup in lookups:
        groups.setdefault(_path(lookup)[depth], []).append(lookup)
    for each in here:  # else two threads would make these, and lose one
        if not hasattr(each, "_prefetched_objects_cache"):
            try:
                each._prefetched_objects_cache = {}
            except (AttributeError, TypeError):
                return  # a row of values_list() or the like, of which Django prefetches nothing either
    if not all(
        _begins_with_relation(model, group[0], depth)
        for model in {type(each) for each in here}
        for group in groups.values()
    ):
        prefetch_related_objects(instances, *lookups)
        return
    works = [_group(instances, here, name, group, depth, at_once) for name, group in groups.items()]
    if len(works) == 1:
        works[0]()
    else:
        at_once(works)


def _group(
    instances: list[Any], here: list[Any], name: str, group: list[str | Prefetch[Any]], depth: int, at_once: AtOnce
) -> Callable[[], None]:
    """Return what prefetches all that begins with one name."""

    def prefetch() -> None:
        deeper = [lookup for lookup in group if len(_path(lookup)) > depth + 1]
        first = group.index(deeper[0]) if deeper else 0
        if (
            len({_path(lookup)[depth + 1] for lookup in deeper}) < 2
            or any(len(_path(lookup)) == depth + 1 for lookup in group[first:])
            or any(_brings_lookups(lookup, depth) for lookup in group[:first])
        ):
            prefetch_related_objects(instances, *group)
            return
        heads = group[:first] or [LOOKUP_SEP.join(_path(deeper[0])[: depth + 1])]
        prefetch_related_objects(instances, *heads)
        _prefetch_level(instances, list(_next(here, name)), deeper, depth + 1, at_once)

    return prefetch


def _begins_with_relation(model: type[Any], lookup: str | Prefetch[Any], depth: int) -> bool:
    """Tell whether a lookup goes on, from here, by something that Django fetches, and not by something computed."""
    through: str = lookup.prefetch_through if isinstance(lookup, Prefetch) else lookup
    relation = getattr(model, through.split(LOOKUP_SEP)[depth], None)
    return isinstance(relation, ReverseManyToOneDescriptor) or hasattr(relation, "get_prefetch_querysets")


def _brings_lookups(lookup: str | Prefetch[Any], depth: int) -> bool:
    """Tell whether its queryset has lookups of its own, which Django does before the next ones and compares to them."""
    querysets: Any = lookup.get_current_querysets(depth) if isinstance(lookup, Prefetch) else None
    return any(queryset._prefetch_related_lookups for queryset in querysets or ())


def _path(lookup: str | Prefetch[Any]) -> list[str]:
    path: str = lookup.prefetch_to if isinstance(lookup, Prefetch) else lookup
    return path.split(LOOKUP_SEP)


def _next(here: list[Any], name: str) -> Iterator[Any]:
    """Yield what was prefetched under a name, from where it is kept."""
    seen: set[int] = set()
    for each in here:
        kept = each._prefetched_objects_cache.get(name)
        if kept is None:
            kept = each.__dict__.get(name, each._state.fields_cache.get(name))
        many = kept if isinstance(kept, Iterable) else [kept]
        for found in many:
            if hasattr(found, "__dict__") and id(found) not in seen:
                seen.add(id(found))
                yield found
