"""How the values of a column compare: in Python where that is as databases sort them, else ranked by one of these.

A value that is compared otherwise than its database does would put rows of several databases in an order that no
database gives. So what is not known to compare alike on all of them is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from math import isnan
from typing import Any

from django.core.exceptions import FieldError
from django.db import Error, InterfaceError, OperationalError, connections
from django.db.models import BigIntegerField, FloatField, Func
from django.db.models.expressions import ExpressionWrapper
from django.db.models.functions.datetime import TruncBase

from parallel_orm.collations import TEXT, Collation, Unknown, collation_of, ranks_on, target_of
from parallel_orm.identity import source_of
from parallel_orm.ordering import LONGEST
from parallel_orm.outcomes import named

#: Internal types of Django's fields whose values Python compares as every database does.
PLAIN = frozenset(
    (
        *("AutoField", "BigAutoField", "SmallAutoField", "BooleanField", "DateField", "DurationField", "TimeField"),
        *("IntegerField", "BigIntegerField", "SmallIntegerField", "PositiveIntegerField", "PositiveBigIntegerField"),
        *("PositiveSmallIntegerField",),
    )
)
#: Those that may be NaN, which PostgreSQL puts behind all numbers.
NUMBERS = frozenset(("FloatField", "DecimalField"))


class NotComparable(Exception):
    """Values cannot be compared as their databases sort them; the message says which, and why."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """How the values of one column of several databases compare."""

    #: Makes a value that Python compares; None: it is one.
    canonical: Callable[[Any], Any] | None = None
    #: What ranks values that Python does not compare.
    rank: Callable[[list[Any]], Mapping[Any, int]] | None = None
    #: Whether what Python finds equal is what the databases find equal.
    tells_all_apart: bool = True
    #: Databases of which nobody could say how they compare: their answers must not be used, if they have any.
    failed: Mapping[str, Exception] = field(default_factory=dict)
    #: What is asked for instead of the column, to be given what the database compares.
    raw: Callable[[Any], Any] | None = None
    #: Whether that is the only way: what the column brings is less than what the database compares.
    only_raw: bool = False

    def keys(self, values: Sequence[Any]) -> Mapping[Any, Any]:
        """Return for each value that is not None what it is to be compared by."""
        present = {value for value in values if value is not None}
        if self.rank is not None:
            return self.rank(list(present))
        return {value: value if self.canonical is None else self.canonical(value) for value in present}


def refuse_unknown(comparisons: Iterable[Comparison], answers: Iterable[str]) -> None:
    """Raise what kept a database from saying how it compares, if it has answered all the same."""
    for alias in answers:
        for comparison in comparisons:
            if alias in comparison.failed:
                raise comparison.failed[alias]


def comparison_of(name: str, expressions: Mapping[str, Any]) -> Comparison:
    """Return how an expression of several databases compares, by their aliases. Raises :class:`NotComparable`."""
    aliases = list(expressions)
    first = connections[aliases[0]]
    try:
        column = _target(expressions[aliases[0]])
    except FieldError as error:  # which the order of a query may have, as nobody else asks what it is
        raise NotComparable(f"it is not known what {name} is: {error}") from error
    if column is None:
        raise NotComparable(f"it is not known what {name} is")
    kind = column.get_internal_type()
    own = not type(column).__module__.startswith("django.db.models.fields")
    if own and (kind == type(column).__name__ or hasattr(column, "from_db_value") or _has_own_type(column)):
        raise NotComparable(f"it is not known how {first.vendor} sorts the {type(column).__name__} {name}")
    if kind in PLAIN:
        return Comparison()
    if kind in NUMBERS:
        raw = _as_float if kind == "DecimalField" and first.vendor == "sqlite" else None
        return Comparison(_number, raw=raw)
    if kind == "DateTimeField":
        if first.vendor == "postgresql":
            return _of_moments(expressions)
        zones = {alias: str(connections[alias].timezone_name) for alias in aliases}
        _refuse_unequal(name, "are times of", zones)
        return Comparison(_without_zone)
    if kind == "UUIDField":
        return _of_uuids(name, aliases) if first.vendor == "mysql" else Comparison()
    if kind == "BinaryField" and first.vendor != "mysql":
        return Comparison(bytes)
    if kind == "GenericIPAddressField" and first.vendor == "postgresql":
        return Comparison(rank=_Ranks(dict.fromkeys(aliases, "{0}::inet")))
    if kind in TEXT:
        return _of_text(name, column, expressions)
    raise NotComparable(f"{name} is a {kind}, which Python does not compare as {first.vendor} does")


def comparison_of_values(name: str, expressions: Mapping[str, Any]) -> Comparison:
    """Return how the values compare that rows bring, where nothing else is asked for. Else as :func:`comparison_of`."""
    comparison = comparison_of(name, expressions)
    refuse_raw(name, comparison)
    return comparison


def refuse_raw(name: str, comparison: Comparison) -> None:
    """Refuse values of which what the column brings is not enough."""
    if comparison.only_raw:
        raise NotComparable(f"values of {name} are times of a zone where an hour comes twice a year")


def _target(expression: Any) -> Any:
    return target_of(getattr(expression, "_output_field_or_none", None))


def _has_own_type(field: Any) -> bool:
    """Tell whether a field of the user's has another type in the database than Django's of that kind, or is read so."""
    return any(
        not getattr(type(field), name).__module__.startswith("django.")
        for name in ("db_type", "db_parameters", "select_format")
    )


def _of_text(name: str, column: Any, expressions: Mapping[str, Any]) -> Comparison:
    aliases = list(expressions)
    if connections[aliases[0]].vendor == "mysql" and not 0 < (column.max_length or 0) <= LONGEST:
        raise NotComparable(f"{name} is text of any length, of which MySQL sorts the first 1,024 bytes")
    found, failed = dict[str, Collation](), dict[str, Error]()
    for alias, expression in expressions.items():
        try:
            found[alias] = collation_of(alias, expression)
        except Unknown as problem:
            raise NotComparable(f"it is not known how {name} is sorted: {problem}") from problem
        except Error as error:
            failed[alias] = error
    if not found:
        raise next(iter(failed.values()))
    _refuse_unequal(
        name, "are sorted by", {a: each.name for a, each in found.items()}, [c.identity for c in found.values()]
    )
    collation = next(iter(found.values()))
    if collation.is_python:
        return Comparison(failed=failed)
    rank = _Ranks({alias: each.sql for alias, each in found.items()})
    return Comparison(rank=rank, tells_all_apart=collation.tells_all_apart, failed=failed)


def _of_uuids(name: str, aliases: Sequence[str]) -> Comparison:
    """Return how MariaDB's compare, which has a type for them since version 10.7: so it is asked for that."""
    found, failed = dict[str, bool](), dict[str, Error]()
    for alias in aliases:
        try:
            with named(alias):
                found[alias] = bool(connections[alias].features.has_native_uuid_field)
        except Error as error:
            failed[alias] = error
    if not found:
        raise next(iter(failed.values()))
    _refuse_unequal(name, "are", {alias: "of the type UUID" if each else "text" for alias, each in found.items()})
    if not any(found.values()):
        return Comparison(failed=failed)
    return Comparison(rank=_Ranks(dict.fromkeys(found, "CAST({0} AS UUID)")), failed=failed)


def _refuse_unequal(name: str, what: str, by_alias: Mapping[str, str], identities: Sequence[Any] = ()) -> None:
    if len(set(identities or by_alias.values())) > 1:
        told = ", ".join(f"{each} on {alias!r}" for alias, each in by_alias.items())
        raise NotComparable(f"values of {name} {what} different things: {told}")


@dataclass(frozen=True, slots=True)
class _Ranks:
    """Has one of several databases that sort alike rank values: the first that answers."""

    #: By what each sorts.
    sql: Mapping[str, str]

    def __call__(self, values: list[Any]) -> Mapping[Any, int]:
        failed: Error | None = None
        for alias, sql in self.sql.items():
            try:
                ranks = ranks_on(alias, sql, [str(value) for value in values])
            except (OperationalError, InterfaceError) as error:  # it is down: its own rows, if any, are here already
                failed = failed or error
            else:
                return {value: ranks[str(value)] for value in values}
        assert failed is not None
        raise failed


def _number(value: Any) -> tuple[bool, Any]:
    # Behind all numbers, and equal to itself.
    is_nan = value.is_nan() if isinstance(value, Decimal) else isnan(value)
    return (True, 0) if is_nan else (False, value)


def _without_zone(value: Any) -> Any:
    # SQLite and MySQL have the time of a zone, without the zone.
    return value.replace(tzinfo=None)


def _of_moments(expressions: Mapping[str, Any]) -> Comparison:
    """Return how PostgreSQL's moments compare, which it gives as times of a zone.

    There an hour comes twice a year, and Python compares two times of one zone without a look at the zone.
    """
    if all(connections[alias].timezone_name == "UTC" for alias in expressions):
        return Comparison()
    are_without_zone = all(isinstance(source_of(each), TruncBase) for each in expressions.values())
    return Comparison(raw=since_epoch, only_raw=not are_without_zone)


def since_epoch(expression: Any) -> Any:
    """Make a number of a moment: of microseconds."""
    epoch = Func(expression, function="EXTRACT", template="(EXTRACT(EPOCH FROM %(expressions)s) * 1000000)::bigint")
    return ExpressionWrapper(epoch, output_field=BigIntegerField())


def _as_float(expression: Any) -> Any:
    # SQLite has floats for decimals, and sorts these; Django rounds them.
    return ExpressionWrapper(expression, output_field=FloatField())
