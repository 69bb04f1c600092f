"""Celery over a folder, as Celery has it, but for one thing: a file is there when it is whole.

Celery opens a file under its name and then writes it, so whoever looks in between finds half a message.
"""

from __future__ import annotations

import os
from pathlib import Path
from time import time_ns
from typing import Any
from uuid import uuid4

from celery.backends.filesystem import FilesystemBackend
from kombu.transport import filesystem
from kombu.utils.json import dumps


def write(path: Path, content: bytes) -> None:
    """Write a file that nobody sees before it is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unseen = path.with_name(f"{path.name}.{uuid4().hex}")
    unseen.write_bytes(content)
    unseen.replace(path)


class Channel(filesystem.Channel):
    """Puts whole messages into the folder."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        Path(self.data_folder_in).mkdir(parents=True, exist_ok=True)
        self.control_folder.mkdir(parents=True, exist_ok=True)

    def _put(self, queue: str, payload: Any, **kwargs: Any) -> None:
        # They are taken in the order of their names.
        write(Path(self.data_folder_out, f"{time_ns()}_{uuid4()}.{queue}.msg"), dumps(payload).encode())


class Transport(filesystem.Transport):
    """The broker."""

    Channel = Channel


class Results(FilesystemBackend):
    """The result backend."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        Path(self._find_path(kwargs["url"])).mkdir(parents=True, exist_ok=True)
        super().__init__(*args, **kwargs)

    def set(self, key: Any, value: Any) -> None:
        """Have a whole result in the folder."""
        write(Path(os.fsdecode(self._filename(key))), value if isinstance(value, bytes) else value.encode())
