"""Whether two answers are equal, and where they begin to differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def difference(expected: Any, answer: Any) -> str | None:
    """None if the answers are equal, else the first place where they are not, in words."""
    if expected == answer:
        return None
    if isinstance(expected, Mapping) and isinstance(answer, Mapping):
        for key in expected.keys() | answer.keys():
            found = difference(expected.get(key), answer.get(key))
            if found:
                return f"{key}: {found}"
    if _is_list(expected) and _is_list(answer):
        if len(expected) != len(answer):
            return f"{len(expected):,} rows expected, {len(answer):,} came"
        for index, (one, other) in enumerate(zip(expected, answer, strict=True)):
            found = difference(one, other)
            if found:
                return f"row {index:,}: {found}"
    return f"{expected!r} expected, {answer!r} came"


def _is_list(value: Any) -> bool:
    """Whether to look inside."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
