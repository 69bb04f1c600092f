"""Shows how far a load has come: with tqdm where it is installed, else in plain lines."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

T = TypeVar("T")


def progress(title: str, total: int, items: Iterable[T]) -> Iterable[T]:
    """Pass the items on, and tell on the standard error stream how many of `total` there were."""
    try:
        from tqdm import tqdm
    except ImportError:
        return _lines(title, total, items)
    return tqdm(items, desc=f"{title:>9}", total=total, unit=" rows", mininterval=0.5)


def _lines(title: str, total: int, items: Iterable[T]) -> Iterator[T]:
    """Write a line at the start, at each fifth, and at the end."""
    step = max(total // 5, 1)
    for done, item in enumerate(items):
        if done % step == 0:
            sys.stderr.write(f"{title:>9}: {done:>9,} of {total:,}\n")
        yield item
    sys.stderr.write(f"{title:>9}: {total:>9,} of {total:,}\n")
