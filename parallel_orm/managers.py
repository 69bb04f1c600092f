"""ParallelManager: the door, ``objects = ParallelManager()``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any, TypeVar, Unpack

from django.db.models import Manager, Model, QuerySet

from parallel_orm import writes
from parallel_orm.queryset import ParallelQuerySet
from parallel_orm.report import Report
from parallel_orm.walk import awaited_call
from parallel_orm.writes import WriteKnobs

M = TypeVar("M", bound=Model, covariant=True)


class ParallelManager(Manager.from_queryset(ParallelQuerySet)[M]):  # type: ignore[misc]
    """A manager whose querysets are :class:`~parallel_orm.queryset.ParallelQuerySet`; else Django's own.

    For a queryset class of your own: ``ParallelManager.from_queryset(OwnQuerySet)``, whether it is parallel or not.
    """

    def count(self, *args: Any, **kwargs: Any) -> int:
        """As Django's, with its short cut: of a many-to-many relation the through table alone is counted."""
        through = self._through_table()
        return int((self.get_queryset() if through is None else through).count(*args, **kwargs))

    def exists(self, *args: Any, **kwargs: Any) -> bool:
        """As Django's, with its short cut: of a many-to-many relation the through table alone is asked."""
        through = self._through_table()
        return bool((self.get_queryset() if through is None else through).exists(*args, **kwargs))

    def parallel_create(
        self,
        items: Iterable[Any],
        make: Callable[[Any], Any] | None = None,
        processes: int | None = None,
        **knobs: Unpack[WriteKnobs],
    ) -> Report:
        """As :meth:`ParallelQuerySet.parallel_create`; the rows of a related manager are given its instance."""
        verb = "parallel_create"
        given = writes.given_by(self, verb)
        return writes.create(verb, self.get_queryset(), items, make, processes, knobs, given)

    def parallel_update_or_create(
        self,
        items: Iterable[Any],
        unique_fields: Sequence[str],
        make: Callable[[Any], Any] | None = None,
        processes: int | None = None,
        **knobs: Unpack[WriteKnobs],
    ) -> Report:
        """As :meth:`ParallelQuerySet.parallel_update_or_create`; for rows of a related manager, with its instance."""
        verb = "parallel_update_or_create"
        given = writes.given_by(self, verb)
        return writes.update_or_create(verb, self.get_queryset(), items, unique_fields, make, processes, knobs, given)

    async def aparallel_create(self, *args: Any, **kwargs: Any) -> Report:
        """As :meth:`parallel_create`; waits for it in the thread that Django's async methods use."""
        return await awaited_call(self.parallel_create)(*args, **kwargs)

    async def aparallel_update_or_create(self, *args: Any, **kwargs: Any) -> Report:
        """As :meth:`parallel_update_or_create`; waits for it in the thread that Django's async methods use."""
        return await awaited_call(self.parallel_update_or_create)(*args, **kwargs)

    for _each in (parallel_create, parallel_update_or_create, aparallel_create, aparallel_update_or_create):
        setattr(_each, "alters_data", True)  # noqa: B010 - as Django has it
    del _each

    def _through_table(self) -> Any:
        # Django's manager of a many-to-many relation asks it where its own superclass is Manager, which filters
        # nothing. Nor does this class; one that is derived from it may.
        if type(self).__bases__[0] is not ParallelManager or not hasattr(type(self), "constrained_target"):
            return None
        return self.constrained_target if self.get_prefetch_cache() is None else None

    @classmethod
    def from_queryset(cls, queryset_class: type[QuerySet[Any]], class_name: str | None = None) -> Any:
        """Return a manager class for ``queryset_class``, as Django does; a plain queryset class gets our verbs too.

        Its querysets are instances of ``queryset_class``, and what that class overrides stays overridden.
        """
        if class_name is None:
            class_name = f"{cls.__name__}From{queryset_class.__name__}"
        return super().from_queryset(parallel(queryset_class), class_name)


@cache
def parallel(queryset_class: type[QuerySet[Any]]) -> type[ParallelQuerySet[Any, Any]]:
    """Return ``queryset_class`` with our verbs mixed in: itself if it has them, else always the same class."""
    if issubclass(queryset_class, ParallelQuerySet):
        return queryset_class
    if issubclass(ParallelQuerySet, queryset_class):
        return ParallelQuerySet

    def reduce(self: Any) -> tuple[Any, ...]:
        # The class was made here, so pickle cannot find it by its name.
        return _new, (queryset_class,), self.__getstate__()

    names = {"__reduce__": reduce, "__module__": queryset_class.__module__, "__doc__": queryset_class.__doc__}
    return type(queryset_class.__name__, (queryset_class, ParallelQuerySet), names)


def _new(queryset_class: type[QuerySet[Any]]) -> Any:
    mixed = parallel(queryset_class)
    return mixed.__new__(mixed)
