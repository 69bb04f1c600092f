"""Rows made of what the driver gives, fast, when provably the same.

Django makes an instance by ``from_db`` and ``__init__``, which ask for each column of each row whether anybody wants to
know. Where nobody does, what is left are a few assignments, the same ones for all rows of a query. So they are written
down once, as a Python function for this query, as ``collections.namedtuple`` and ``dataclasses`` write theirs.
:func:`maker_of` does so where the rows come out as Django's; everywhere else Django makes them. What is relied upon is
the same in Django 5.2, 6.0 and 6.1, and ``tests/test_rows.py`` compares the rows with Django's.
"""

from __future__ import annotations

import keyword
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

from django.conf import settings
from django.db.models import Model
from django.db.models.base import ModelState
from django.db.models.expressions import ColPairs
from django.db.models.fields.related_descriptors import ForeignKeyDeferredAttribute
from django.db.models.query import FlatValuesListIterable, ModelIterable, ValuesIterable, ValuesListIterable
from django.db.models.query_utils import DeferredAttribute
from django.db.models.signals import post_init, pre_init

from parallel_orm.moments import Reader

#: Makes rows of a driver's tuples, one when it is asked for the next one.
Maker = Callable[[Iterable[Sequence[Any]]], Iterator[Any]]


def maker_of(queryset: Any, compiler: Any, readers: Mapping[int, Reader]) -> Maker | None:
    """Return what makes the rows of a queryset, whose ``compiler`` has made its SQL; None where Django must.

    ``readers`` tell how to read what the driver has left as text.
    """
    kind, width = queryset._iterable_class, compiler.col_count
    columns = [column for column, *_ in compiler.select[:width]]
    if any(isinstance(column, ColPairs) for column in columns):
        return None
    code = _Code(width)
    code.read(readers)
    for place, (converters, expression) in compiler.get_converters(columns).items():
        for converter in (_quick(each, compiler.connection) for each in converters):
            # As SQLCompiler.apply_converters() calls them.
            call = f"{code.given(converter)}(v{place}, {code.given(expression)}, {code.given(compiler.connection)})"
            code.line(f"v{place} = {call}")
    if kind is ModelIterable:
        return _instances(queryset, compiler, code)
    if kind is ValuesIterable:
        names = [*queryset.query.extra_select, *queryset.query.values_select, *queryset.query.annotation_select]
        names = list(getattr(queryset.query, "selected", None) or names)
        code.line(f"yield {{{', '.join(f'{code.text(name)}: v{place}' for place, name in enumerate(names))}}}")
        return code.function()
    if kind is ValuesListIterable:
        code.line(f"yield ({''.join(f'v{place}, ' for place in range(width))})")
        return code.function() if code.converts else _as_they_are
    if kind is FlatValuesListIterable:
        code.line("yield v0")
        return code.function()
    return None


#: Converters of Django's that give naive moments the time zone of the connection.
MOMENTS = {
    f"django.db.backends.{vendor}.operations.DatabaseOperations.convert_datetimefield_value"
    for vendor in ("sqlite3", "mysql")
}


def _quick(converter: Any, connection: Any) -> Any:
    """Return what converts as this converter does, and asks less of each value; the converter, if there is nothing."""
    function = getattr(converter, "__func__", None)
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}"
    if name not in MOMENTS or not settings.USE_TZ:
        return converter
    zone = connection.timezone

    def moment(value: Any, expression: Any, connection: Any) -> Any:
        if type(value) is datetime and value.tzinfo is None:
            return value.replace(tzinfo=zone)
        return converter(value, expression, connection)

    return moment


def _as_they_are(rows: Iterable[Sequence[Any]]) -> Iterator[Any]:
    return map(tuple, rows)  # a tuple stays the one that it is


def is_written_in(function: Any, *modules: str) -> bool:
    """Tell whether a function is of these modules, and not one in its place that is named alike."""
    return type(function) is FunctionType and function.__globals__["__name__"] in modules


def is_djangos_own(compiler: type) -> bool:
    """Tell whether a compiler makes its rows as Django's do."""
    names = ("results_iter", "apply_converters", "get_converters")
    return all(is_written_in(getattr(compiler, name), "django.db.models.sql.compiler") for name in names)


class _Code:
    """A function on its way: a loop over tuples, whose values are ``v0``, ``v1``... in its body."""

    def __init__(self, width: int) -> None:
        self._given: dict[int, tuple[str, Any]] = {}
        self._head = f"for {''.join(f'v{place}, ' for place in range(width))}in rows:"
        self._body: list[str] = []

    @property
    def converts(self) -> bool:
        return bool(self._given)

    def line(self, text: str, depth: int = 0) -> None:
        self._body.append("    " * depth + text)

    def given(self, value: Any) -> str:
        """Return the name by which the function knows an object."""
        name, _ = self._given.setdefault(id(value), (f"g{len(self._given)}", value))
        return name

    def text(self, name: str) -> str:
        """Return how the function says a name, which may be a member of an enum, whose ``repr()`` is no Python."""
        return repr(name) if type(name) is str else self.given(name)

    def read(self, readers: Mapping[int, Reader]) -> None:
        """Read what is text."""
        for place, reader in readers.items():
            value, known = f"v{place}", self.given(reader.known)
            self.line(f"if {value} is not None:")
            self.line("try:", 1)
            self.line(f"{value} = {self.given(reader.parse)}({value})", 2)
            self.line("except ValueError:", 1)
            self.line(f"{value} = {known}({value})", 2)
            if reader.has_zone:
                zone = self.given(reader.zone)
                self.line("else:", 1)
                self.line(f"if {value}.tzinfo is not {zone}:", 2)
                self.line(f"{value} = {value}.replace(tzinfo={zone})", 3)

    def assign(self, target: str, name: str, value: str, depth: int) -> None:
        """Do what ``setattr()`` does, whatever name it is given."""
        is_plain = type(name) is str and name.isascii() and name.isidentifier()
        if is_plain and not keyword.iskeyword(name) and name != "__debug__":
            self.line(f"{target}.{name} = {value}", depth)
        else:
            self.line(f"setattr({target}, {self.text(name)}, {value})", depth)

    def function(self) -> Maker:
        names = [name for name, _ in self._given.values()]
        lines = [f"def bind({', '.join(names)}):", "    def make(rows):", f"        {self._head}"]
        lines += [f"            {line}" for line in self._body]
        namespace: dict[str, Any] = {}
        exec(_compiled("\n".join([*lines, "    return make"])), namespace)  # noqa: S102 - of names checked above
        # Taken out, as it knows the namespace: both would stay until the cyclic collector comes.
        maker: Maker = namespace.pop("bind")(*(value for _, value in self._given.values()))
        return maker


@lru_cache(maxsize=256)
def _compiled(source: str) -> CodeType:
    return compile(source, "<rows of parallel_orm>", "exec")


# --- Instances ------------------------------------------------------------------


def _instances(queryset: Any, compiler: Any, code: _Code) -> Maker | None:
    fetch_mode = getattr(queryset, "_fetch_mode", None)  # of Django 6.1
    known = queryset._known_related_objects
    if getattr(fetch_mode, "track_peers", False) or (known and queryset.query.deferred_loading[0]):
        return None
    state = {"adding": False, "db": queryset.db} | ({} if fetch_mode is None else {"fetch_mode": fetch_mode})
    tree = _Tree(code, compiler.select, state)
    if not tree.is_plain(compiler.klass_info):
        return None
    tree.write(compiler.klass_info, "row")
    for name, place in compiler.annotation_col_map.items():
        code.assign("row", name, f"v{place}", 0)
    for field, objects in known.items():
        code.line(f"{code.given(_Known(queryset.model, field, objects))}.hang_on(row)")
    code.line("yield row")
    return code.function()


class _Known:
    """Objects that rows are related to and that are there already, as the author in ``author.articles.all()``."""

    def __init__(self, model: Any, field: Any, objects: Mapping[Any, Any]) -> None:
        names = [field.attname if name == "self" else model._meta.get_field(name).attname for name in field.from_fields]
        self.field, self.objects, self.key = field, objects, operator.attrgetter(*names)

    def hang_on(self, row: Any) -> None:
        if self.field.is_cached(row):  # as select_related() brought it
            return
        key = self.key(row)
        if key in self.objects:  # not where querysets were combined
            setattr(row, self.field.name, self.objects[key])


class _Tree:
    """The instances of one row: one of the model, and those that ``select_related()`` brings along."""

    def __init__(self, code: _Code, select: Sequence[Any], state: Mapping[str, Any]) -> None:
        self.code, self.select, self.state = code, select, state

    def is_plain(self, info: Mapping[str, Any]) -> bool:
        return is_plain(info["model"]) and all(map(self.is_plain, info.get("related_klass_infos", ())))

    def write(self, info: Mapping[str, Any], row: str, depth: int = 0) -> None:
        """Write down what makes an instance, and behind it those that hang on it."""
        self._instance(info["model"], self._columns(info), row, depth)
        for number, related in enumerate(info.get("related_klass_infos", ())):
            other = f"{row}_{number}"
            places = dict(self._columns(related))
            key = places[related["model"]._meta.pk_fields[0].attname]
            self.code.line(f"if v{key} is None:", depth)
            self.code.line(f"{other} = None", depth + 1)
            self.code.line("else:", depth)
            self.write(related, other, depth + 1)
            self.code.line(f"{self.code.given(related['local_setter'])}({row}, {other})", depth)
            self.code.line(f"if {other} is not None:", depth)
            self.code.line(f"{self.code.given(related['remote_setter'])}({other}, {row})", depth + 1)

    def _columns(self, info: Mapping[str, Any]) -> list[tuple[str, int]]:
        """Return the columns of an instance and their places in the tuple, in the order in which Django sets them."""
        places = {self.select[place][0].target.attname: place for place in info["select_fields"]}
        columns = [column.attname for column in info["model"]._meta.concrete_fields]
        return [(name, places[name]) for name in columns if name in places]

    def _instance(self, model: type[Model], columns: list[tuple[str, int]], row: str, depth: int) -> None:
        """Write down what ``from_db()`` and ``__init__()`` come to."""
        code = self.code
        kinds = {name: type(_descriptor(model, name)) for name, _ in columns}
        keys = [place for name, place in columns if kinds[name] is ForeignKeyDeferredAttribute]
        code.line(f"{row} = {code.given(object.__new__)}({code.given(model)})", depth)
        code.line(f"{row}._state = state = {code.given(ModelState)}()", depth)
        if keys:  # whose descriptor looks for a cached object, and writes to __dict__
            code.line(f"if {' or '.join(f'v{place} is not None' for place in keys)}:", depth)
            code.line("state.fields_cache = {}", depth + 1)
            code.line(f"columns = {row}.__dict__", depth)
        for name, place in columns:
            if keys and kinds[name] in PLAIN_DESCRIPTORS:
                code.line(f"columns[{code.text(name)}] = v{place}", depth)
            else:
                code.assign(row, name, f"v{place}", depth)
        for name, value in self.state.items():
            code.line(f"state.{name} = {code.given(value)}", depth)


#: Descriptors that keep a value in ``__dict__`` as it is. A derived one (of a file field, say) may do more.
PLAIN_DESCRIPTORS = (DeferredAttribute, ForeignKeyDeferredAttribute)


def is_plain(model: type[Model]) -> bool:
    """Tell whether a model has Django's own way of being made, and nobody listens.

    No ``__init__``, ``from_db``, ``__new__`` or ``__setattr__`` of its own, also not of a class beside ``Model``, nor
    somebody's own in place of ``Model``'s.
    """
    from_db: Any = model.from_db
    return (
        is_written_in(getattr(from_db, "__func__", None), "django.db.models.base")
        and is_written_in(model.__init__, "django.db.models.base")
        and not hasattr(model, "_state")
        and model.__getattribute__ is object.__getattribute__
        and _next_init(model) is object.__init__
        and model.__new__ is object.__new__
        and model.__setattr__ is object.__setattr__
        and type(model).__call__ is type.__call__
        and not pre_init.has_listeners(model)
        and not post_init.has_listeners(model)
    )


def _next_init(model: type[Model]) -> object:
    """Return the ``__init__`` that Django's calls at its end."""
    behind = model.__mro__[model.__mro__.index(Model) + 1 :]
    return next(vars(each)["__init__"] for each in behind if "__init__" in vars(each))


def keeps_as_it_is(model: type[Model], name: str) -> bool:
    """Tell whether an instance has under this name what the database has: a plain column of a plain model."""
    if name == "pk":
        return len(model._meta.pk_fields) == 1
    is_column = any(column.attname == name for column in model._meta.concrete_fields)
    return is_column and is_plain(model) and type(_descriptor(model, name)) in PLAIN_DESCRIPTORS


def _descriptor(model: type[Model], name: str) -> object:
    """Return what a class has under a name, without asking it to be anything."""
    return next((vars(each)[name] for each in model.__mro__ if name in vars(each)), None)
