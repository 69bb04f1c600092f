"""Values as JSON text, for engines whose messages are JSON: nothing is sent by value that has a name.

What pickle asks an object (``__reduce_ex__``) is asked here too, so what can be pickled by the names of its parts comes
through: querysets, model instances, moments, exceptions. Functions and classes are their dotted paths, and must be
found under these where they are read; a lambda, or what a script defines, is refused. Objects that are one, before, are
one behind it; of tuples and frozen sets that is not kept.

Reading such a text calls what it names, as unpickling does: so it is read only where it is known who wrote it
(:mod:`parallel_orm.seals`).
"""

from __future__ import annotations

import copyreg
import json
import sys
import types
from base64 import b64decode, b64encode
from collections.abc import Callable
from functools import partial
from importlib import import_module
from math import isfinite
from operator import attrgetter
from typing import Any


class NotByName(TypeError):
    """A value that cannot be written down: it is, or has in it, something that is not found under a name."""


def written(value: object) -> str:
    """Return a value as text; raise :class:`NotByName`, or what the object raises that is asked for its parts."""
    return json.dumps(_Writer().write(value), separators=(",", ":"))


def read(text: str) -> Any:
    """Return what was written down; raise what stands in the way of it, as an ``ImportError`` of a name."""
    return _Reader().read(json.loads(text))


def path_of(value: Any) -> str:
    """Return the name under which a function or a class is found, as ``module:name``; raise :class:`NotByName`."""
    if isinstance(value, type) and value in _NAMELESS:
        return _NAMELESS[value]
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if module in (None, "__main__") or name is None:
        raise NotByName(f"{value!r} is not found under a name in a module")
    try:
        found = attrgetter(name)(sys.modules[module])
    except (KeyError, AttributeError):
        found = None
    if found is not value:
        raise NotByName(f"{value!r} is not what is found under {module}.{name}")
    return f"{module}:{name}"


def find(path: str) -> Any:
    """Return what is found under a name."""
    module, name = path.split(":")
    return attrgetter(name)(import_module(module))


#: Types of Python's own that say they are builtins, and are not found there.
_NAMELESS: dict[Any, str] = {
    kind: f"types:{name}"
    for name, kind in vars(types).items()
    if isinstance(kind, type) and kind.__module__ == "builtins"
}
_NAMED = (type, types.FunctionType, types.BuiltinFunctionType)


class _Writer:
    """Writes one value. What may be met again is numbered as it is begun, so that it can be written once."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        #: What was numbered stays alive, and so its id its own.
        self._kept: list[object] = []
        #: What cannot be named yet: it is made of what is being written.
        self._unmade: set[int] = set()

    def write(self, value: Any) -> Any:
        kind = type(value)
        if kind is int and value.bit_length() > 64:  # Python reads no number of very many decimals
            return {"int": hex(value)}
        if value is None or kind in (str, int, bool):
            return value
        if kind is float:
            return value if isfinite(value) else {"float": repr(value)}
        if kind is bytes:
            return {"bytes": b64encode(value).decode()}
        if kind is tuple:
            return {"tuple": self._all(value)}
        if kind is frozenset:
            return {"frozenset": self._all(value)}
        if isinstance(value, _NAMED) and not _is_bound(value):
            return {"name": path_of(value)}
        if id(value) in self._numbers:
            if id(value) in self._unmade:
                raise NotByName(f"{value!r} is made of itself")
            return {"same": self._numbers[id(value)]}
        self._numbers[id(value)] = len(self._numbers)
        self._kept.append(value)
        if kind is list:
            return self._all(value)
        if kind is dict:
            if all(type(key) is str for key in value):
                return {"map": {key: self.write(each) for key, each in value.items()}}
            return {"dict": [[self.write(key), self.write(each)] for key, each in value.items()]}
        self._unmade.add(id(value))
        if kind is set:
            found = {"set": self._all(value)}
            self._unmade.remove(id(value))
            return found
        return self._object(value)

    def _all(self, values: Any) -> list[Any]:
        return [self.write(value) for value in values]

    def _object(self, value: Any) -> Any:
        reduce = copyreg.dispatch_table.get(type(value))
        reduced = value.__reduce_ex__(4) if reduce is None else reduce(value)
        if isinstance(reduced, str):
            path = f"{getattr(value, '__module__', None) or 'builtins'}:{reduced}"
            if find(path) is not value:
                raise NotByName(f"{value!r} is not what is found under {path}")
            self._unmade.remove(id(value))
            return {"global": path}
        function, args, state, items, pairs, setter = (*reduced, None, None, None, None)[:6]
        items, pairs = list(items or ()), list(pairs or ())  # which are iterators
        made = [self.write(function), self._all(args)]
        self._unmade.remove(id(value))
        made += [self._all(items), [self._all(pair) for pair in pairs], self.write(state), self.write(setter)]
        nothing: list[Any] = [[], [], None, None]  # a state that is [] is one, and was numbered
        while nothing and made[-1] == nothing.pop():
            made.pop()
        return {"make": made}


def _is_bound(value: Any) -> bool:
    """Tell whether it is a builtin function, and the method of an object or a class."""
    owner = getattr(value, "__self__", None) if isinstance(value, types.BuiltinFunctionType) else None
    return owner is not None and not isinstance(owner, types.ModuleType)


class _Reader:
    """Reads one value, in the order in which it was written."""

    def __init__(self) -> None:
        self._numbered: list[Any] = []
        self._ways: dict[str, Callable[[Any], Any]] = {
            "int": partial(int, base=16),
            "float": float,
            "bytes": b64decode,
            "name": find,
            "same": self._numbered.__getitem__,
            "tuple": lambda values: tuple(map(self.read, values)),
            "frozenset": lambda values: frozenset(map(self.read, values)),
            "set": self._set,
            "map": self._map,
            "dict": self._dict,
            "global": self._global,
            "make": self._make,
        }

    def read(self, node: Any) -> Any:
        if isinstance(node, list):
            found: list[Any] = []
            self._numbered.append(found)
            found.extend(map(self.read, node))
            return found
        if isinstance(node, dict):
            ((way, value),) = node.items()
            return self._ways[way](value)
        return node

    def _map(self, values: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        self._numbered.append(found)
        for key, value in values.items():
            found[key] = self.read(value)
        return found

    def _dict(self, pairs: list[Any]) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        self._numbered.append(found)
        self._fill(found, pairs)
        return found

    def _fill(self, found: Any, pairs: Any) -> None:
        for key, value in pairs:
            name = self.read(key)  # before its value, as it was written
            found[name] = self.read(value)

    def _number(self) -> int:
        """Number what is yet to be made."""
        self._numbered.append(None)
        return len(self._numbered) - 1

    def _set(self, values: list[Any]) -> set[Any]:
        number = self._number()
        found = self._numbered[number] = set(map(self.read, values))
        return found

    def _global(self, path: str) -> Any:
        number = self._number()
        found = self._numbered[number] = find(path)
        return found

    def _make(self, parts: list[Any]) -> Any:
        number = self._number()
        function, args, items, pairs, state, setter = parts + [None, [], [], [], None, None][len(parts) :]
        found = self._numbered[number] = self.read(function)(*map(self.read, args))
        for item in items:
            found.append(self.read(item))
        self._fill(found, pairs)
        state, setter = self.read(state), self.read(setter)
        if state is not None:
            (_set_state if setter is None else setter)(found, state)
        return found


def _set_state(found: Any, state: Any) -> None:
    """Give an object its state, as unpickling does."""
    if hasattr(found, "__setstate__"):
        found.__setstate__(state)
        return
    attributes, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
    if attributes:
        found.__dict__.update(attributes)
    for name, value in (slots or {}).items():
        object.__setattr__(found, name, value)
