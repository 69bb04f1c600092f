"""Aggregates of several databases recombined: each database gives parts, of which the whole follows.

Variances follow from counts, sums and variances of the parts, as Chan, Golub and LeVeque have it ("Updating formulae
and a pairwise algorithm for computing sample variances"), here in fractions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from decimal import ROUND_HALF_UP, Context, Decimal, localcontext
from fractions import Fraction
from math import fsum, isfinite, sqrt
from operator import itemgetter
from typing import Any

from django.core.exceptions import FieldError
from django.db.models import (
    Aggregate,
    Avg,
    Count,
    ExpressionWrapper,
    FloatField,
    Func,
    Max,
    Min,
    StdDev,
    Sum,
    TextField,
    Value,
    Variance,
)
from django.db.models.functions import Coalesce

from parallel_orm.comparing import Comparison, since_epoch

#: Digits that sums of decimals may have: more than any database keeps.
DIGITS = 1_000
#: Digits of a decimal that comes of SQLite's floats, as Django reads it.
SQLITE_DIGITS = 15


class CannotRecombine(Exception):
    """The whole does not follow from the parts; the message says of what, and what to do instead."""


@dataclass(frozen=True, slots=True)
class Recombined:
    """One aggregate: what each database is asked for, and what that comes to."""

    #: The aggregates that are asked for.
    parts: tuple[Any, ...]
    #: Makes the whole of what the databases said, a tuple for each.
    whole: Callable[[Sequence[tuple[Any, ...]]], Any]
    #: The same for many groups, where that is one query, and not one for each.
    wholes: Callable[[Sequence[Sequence[tuple[Any, ...]]]], list[Any]] | None = None

    def of_groups(self, groups: Sequence[Sequence[tuple[Any, ...]]]) -> list[Any]:
        """Make the whole of each group."""
        return list(map(self.whole, groups)) if self.wholes is None else self.wholes(groups)


def recombined(
    name: str, expression: Any, resolved: Any, vendor: str, comparison: Callable[[], Comparison]
) -> Recombined:
    """Return how an aggregate, as it was given, comes together.

    ``resolved`` is the same resolved, and ``comparison`` tells how its values compare.

    Raises :class:`CannotRecombine`.
    """
    field, default = resolved._output_field_or_none, None
    if type(expression) is Coalesce:  # what a resolved one with a default is
        expression, *defaults = expression.get_source_expressions()
        if len(defaults) != 1 or not isinstance(defaults[0], Value):
            raise CannotRecombine(f"{name!r} has a default that is computed: give it a plain value")
        default = defaults[0].value
    kind = type(expression)
    if kind not in KINDS:
        what = kind.__name__ if isinstance(expression, Aggregate) else "an expression of aggregates"
        raise CannotRecombine(
            f"{name!r} is {what}, which does not follow from those of each database: Sum, Min, Max, Count, Avg, StdDev "
            "and Variance do: ask for these, and compute it of them"
        )
    if kind is not Count and hasattr(field, "from_db_value") and not type(field).__module__.startswith("django."):
        raise CannotRecombine(
            f"{name!r} is made into something else by {type(field).__name__}.from_db_value(): Cast it to a plain type"
        )
    if getattr(expression, "distinct", False) and kind not in (Min, Max):
        raise CannotRecombine(
            f"{name!r} is distinct, and the same value may be on several databases: take "
            f'values("column").distinct(), and aggregate what comes of it'
        )
    if expression.default is not None:
        default = expression.default
        if hasattr(default, "resolve_expression"):
            if not isinstance(default, Value):
                raise CannotRecombine(f"{name!r} has a default that is computed: give it a plain value")
            default = default.value
    expression = _typed(expression, resolved)
    parts = KINDS[kind](expression, None if field is None else field.get_internal_type(), vendor, comparison)
    if default is None:
        return parts

    def or_default(found: Any) -> Any:
        return (default if field is None else field.to_python(default)) if found is None else found

    return Recombined(
        parts.parts,
        lambda answers: or_default(parts.whole(answers)),
        lambda groups: list(map(or_default, parts.of_groups(groups))),
    )


def _typed(expression: Any, resolved: Any) -> Any:
    """Return an aggregate whose values have the type that it was given, where its parts would not know that."""
    field = expression._constructor_args[1].get("output_field")
    if field is None or isinstance(expression, Count):
        return expression
    if not isinstance(expression, Sum | Min | Max):  # else a part is of the type of the whole
        inner: Any = resolved if isinstance(resolved, Aggregate) else resolved.source_expressions[0]
        values: Any = inner.source_expressions[0]
        try:
            _ = values._output_field_or_none
        except FieldError:  # it is made of several types
            pass
        else:
            return expression
    values, *others = expression.get_source_expressions()
    typed = expression.copy()
    typed.set_source_expressions([ExpressionWrapper(values, output_field=field), *others])
    return typed


def _same(kind: type[Aggregate], expression: Any) -> Any:
    """Return another aggregate of the same values."""
    made = kind(*expression.source_expressions[:1])
    made.filter = expression.filter
    return made


def _first(of: Callable[[list[Any]], Any]) -> Callable[[Sequence[tuple[Any, ...]]], Any]:
    """Return what is made of the first parts that are there."""

    def whole(answers: Sequence[tuple[Any, ...]]) -> Any:
        values = [answer[0] for answer in answers if answer[0] is not None]
        return of(values) if values else None

    return whole


def _count(expression: Any, kind: str | None, vendor: str, comparison: Callable[[], Comparison]) -> Recombined:
    return Recombined((_same(Count, expression),), lambda answers: sum(answer[0] or 0 for answer in answers))


def _sum(expression: Any, kind: str | None, vendor: str, comparison: Callable[[], Comparison]) -> Recombined:
    return Recombined((_same(Sum, expression),), _first(lambda values: total(values, vendor)))


def _extreme(expression: Any, kind: str | None, vendor: str, comparison: Callable[[], Comparison]) -> Recombined:
    aggregate: type[Aggregate] = type(expression)
    outer: Callable[..., Any] = min if aggregate is Min else max
    if kind == "DateTimeField" and vendor == "postgresql":  # compared by a number, as an hour may come twice

        def whole(answers: Sequence[tuple[Any, ...]]) -> Any:
            return outer((each for each in answers if each[0] is not None), key=itemgetter(1), default=(None,))[0]

        return Recombined((_same(aggregate, expression), since_epoch(_same(aggregate, expression))), whole)

    def wholes(groups: Sequence[Sequence[tuple[Any, ...]]]) -> list[Any]:
        there = [[value for value, *_ in answers if value is not None] for answers in groups]
        several = [value for values in there if len(values) > 1 for value in values]
        keys = comparison().keys(several) if several else {}  # which are refused before they are looked up: JSON's
        return [outer(values, key=keys.get, default=None) for values in there]

    return Recombined((_same(aggregate, expression),), lambda answers: wholes([answers])[0], wholes)


def _average(expression: Any, kind: str | None, vendor: str, comparison: Callable[[], Comparison]) -> Recombined:
    def whole(answers: Sequence[tuple[Any, ...]]) -> Any:
        sums, number = [answer[0] for answer in answers if answer[0] is not None], sum(each[1] or 0 for each in answers)
        return quotient(total(sums, vendor), number, vendor, kind) if sums and number else None

    return Recombined((_same(Sum, expression), _same(Count, expression)), whole)


def _spread(expression: Any, kind: str | None, vendor: str, comparison: Callable[[], Comparison]) -> Recombined:
    is_sample, is_root = expression.function.endswith("_SAMP"), isinstance(expression, StdDev)

    def whole(answers: Sequence[tuple[Any, ...]]) -> Any:
        known = [answer for answer in answers if answer[0]]
        number = sum(count for count, _, _ in known)
        if number < (2 if is_sample else 1):
            return None
        if not all(isfinite(sums) and isfinite(variance) for _, sums, variance in known):
            return float("nan")
        mean = sum(Fraction(sums) for _, sums, _ in known) / number
        squares = sum(
            Fraction(variance) * count + (Fraction(sums) / count - mean) ** 2 * count for count, sums, variance in known
        )
        variance = squares / (number - 1 if is_sample else number)
        if kind == "DecimalField":
            exact = Context(prec=SQLITE_DIGITS if vendor == "sqlite" else 40)
            found = exact.divide(Decimal(variance.numerator), Decimal(variance.denominator))
            return exact.sqrt(found) if is_root else found
        return sqrt(variance) if is_root else float(variance)

    if vendor == "sqlite":  # where it is Django's own function, of all values, and fails where there are none
        values = _same(_Values, expression)
        values.set_source_expressions([_digits(values.source_expressions[0]), *values.get_source_expressions()[1:]])
        return Recombined((values,), lambda answers: whole([_parts_of(answer[0]) for answer in answers]))
    variance = _same(Variance, expression)  # of the population
    if vendor == "mysql":  # which gives that of whole numbers four digits behind the point
        of_floats = [Func(each, template="(%(expressions)s + 0e0)") for each in variance.source_expressions]
        variance.set_source_expressions([*of_floats, *variance.get_source_expressions()[1:]])
        variance.output_field = FloatField()
    return Recombined((_same(Count, expression), _same(Sum, expression), variance), whole)


class _Values(Aggregate):
    """All values, in a text, with all of their digits. Of SQLite."""

    function = "GROUP_CONCAT"
    output_field = TextField()


def _digits(expression: Any) -> Func:
    return Func(expression, template="PRINTF('%%%%!.20g', %(expressions)s)", output_field=TextField())


def _parts_of(values: str | None) -> tuple[int, Fraction, Fraction]:
    """Return the number of values, their sum and their variance."""
    found = [float(value) for value in (values or "").split(",") if value]
    if not found:
        return 0, Fraction(0), Fraction(0)
    sums, number = fsum(found), len(found)
    mean = sums / number
    return number, Fraction(sums), Fraction(fsum((value - mean) ** 2 for value in found)) / number


KINDS: dict[type, Callable[[Any, str | None, str, Callable[[], Comparison]], Recombined]] = {
    Count: _count,
    Sum: _sum,
    Min: _extreme,
    Max: _extreme,
    Avg: _average,
    StdDev: _spread,
    Variance: _spread,
}


def total(values: list[Any], vendor: str) -> Any:
    """Add up what databases of a vendor have added up."""
    first = values[0]
    if isinstance(first, float):
        return fsum(values) if all(map(isfinite, values)) else sum(values)
    if isinstance(first, Decimal):
        with localcontext(prec=DIGITS):
            found = sum(values[1:], first)
        return Context(prec=SQLITE_DIGITS).create_decimal(found) if vendor == "sqlite" else found
    if isinstance(first, timedelta):
        return sum(values, timedelta())
    return sum(values)


def quotient(sums: Any, number: int, vendor: str, kind: str | None) -> Any:
    """Return an average as a database of this vendor has it, with as many digits."""
    if isinstance(sums, timedelta):
        return sums / number
    if isinstance(sums, float):
        return Decimal(repr(sums / number)) if kind == "DecimalField" else sums / number
    decimal = Decimal(sums)
    if vendor == "sqlite" or not decimal.is_finite():
        return Context(prec=SQLITE_DIGITS).divide(decimal, number) if kind == "DecimalField" else float(sums / number)
    # MySQL adds div_precision_increment digits; the default is four.
    digits = digits_of_quotient(decimal, Decimal(number)) if vendor == "postgresql" else _scale(decimal) + 4
    with localcontext(prec=DIGITS):
        found = (decimal / number).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP)
    return found if kind == "DecimalField" else float(found)


def _scale(number: Decimal) -> int:
    return max(0, -int(number.as_tuple().exponent))


def digits_of_quotient(one: Decimal, other: Decimal) -> int:
    """Return how many digits PostgreSQL gives a quotient of numerics behind the point.

    At least 16 significant ones, counted in its own digits, which are of base 10,000 (``select_div_scale()`` in
    ``src/backend/utils/adt/numeric.c``).
    """
    (weight, first), (other_weight, other_first) = _leading(one), _leading(other)
    weight -= other_weight
    if first <= other_first:
        weight -= 1
    return min(max(16 - 4 * weight, _scale(one), _scale(other), 0), 1_000)


def _leading(number: Decimal) -> tuple[int, int]:
    """Return the place and the value of the first digit of base 10,000 that is not 0."""
    if not number:
        return 0, 0
    weight = number.adjusted() // 4
    with localcontext(prec=DIGITS):
        return weight, int(abs(number).scaleb(-4 * weight))
