"""Opened: jobs that a process keeps unpacked, as it opens what it is sent with each chunk once a call."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

Content = TypeVar("Content")

#: How many jobs a process keeps that nobody tells when their calls end: as many as are likely to share it at once.
KEPT_JOBS = 16
#: How many bytes of them, as they were written: a function may close over much. The newest is kept, whatever its size.
#: One that is sent again when it was forgotten is opened anew, and its worker made ready anew: so this is large enough
#: for calls that share a process to bring some of it along each.
KEPT_BYTES = 64 * 2**20


class Opened(Generic[Content]):
    """What was opened, by a name; what was used last is last."""

    def __init__(self) -> None:
        self._found: OrderedDict[str, tuple[Content, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._found)

    def get(self, name: str) -> Content | None:
        if name not in self._found:
            return None
        self._found.move_to_end(name)
        return self._found[name][0]

    def keep(self, name: str, content: Content, size: int) -> None:
        self._found[name] = content, size

    def forget_oldest(self) -> None:
        """Forget what was not used for longest, until what is left is no more than is kept."""
        while len(self) > 1 and (len(self) > KEPT_JOBS or self._size() > KEPT_BYTES):
            self._found.popitem(last=False)

    def pop(self, name: str) -> Content | None:
        found, _ = self._found.pop(name, (None, 0))
        return found

    def clear(self) -> None:
        self._found.clear()

    def _size(self) -> int:
        return sum(size for _, size in self._found.values())
