"""A letter: a job as it travels to the workers of an engine, which somebody else started, perhaps on other machines.

Beside a parcel, which goes to processes of ours: nothing of the caller's settings is in it, as these are secret, so a
worker has its own; what must be the same there is claimed, and proved before the first chunk; and it is sealed.
"""

from __future__ import annotations

import json
import os
import pickle
import threading
from base64 import b64decode, b64encode
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from typing import Any
from uuid import uuid4
from zlib import compress, decompress

import django
from django.apps import apps
from django.conf import settings

from parallel_orm import errors, wire
from parallel_orm.capsule import Locale
from parallel_orm.chunks import Chunk
from parallel_orm.opened import Opened
from parallel_orm.outcomes import Outcome, packing
from parallel_orm.parcels import dumps, run_parcel, that_cannot_travel
from parallel_orm.proof import claims, refuse_another_world
from parallel_orm.seals import sealed, unsealed
from parallel_orm.task import Job


@dataclass(frozen=True, slots=True)
class Letter:
    """Written once a call, sent with each of its chunks, opened once in each process."""

    text: str
    #: Whether it was pickled, as its results are to be; else they are JSON.
    by_value: bool

    @classmethod
    def of(cls, job: Job, *, by_value: bool, engine: str) -> Letter:
        """Write a job down: ``by_value`` by pickle, else as JSON, with functions by their names alone.

        :raises NotPicklable: it has something that cannot travel so; says what.
        """
        jobs = [replace(each, capsule=Locale.without_settings()) for each in (job, *job.others)]
        job = replace(jobs[0], others=tuple(jobs[1:]))
        with packing(as_json=not by_value):
            data = _written(job, engine, by_value=by_value)
        models = dict.fromkeys(each.queryset.model for each in jobs)
        aliases = dict.fromkeys(each.queryset.db for each in jobs)
        told = {
            "call": uuid4().hex,  # no two are the same, so one that was refused is looked at anew
            "claims": claims(models, job.functions, aliases, by_value=by_value),
            "job": b64encode(compress(data)).decode(),
        }
        return cls(sealed(json.dumps(told)), by_value)

    def open(self) -> Job:
        """Return the job, in a process that has proved itself.

        :raises NotSealed: it is of nobody who knows this project's ``SECRET_KEY``.
        :raises AnotherWorld: something that was claimed is not so here.
        """
        name = sha256(self.text.encode()).hexdigest()
        with _opening:
            opened = _opened.get(name)
            if opened is None:
                set_up()
                told = json.loads(unsealed(self.text))
                refuse_another_world(told["claims"])
                data = decompress(b64decode(told["job"]))
                opened = from_bytes(data, by_value=self.by_value)
                _opened.keep(name, opened, len(data))
                _opened.forget_oldest()
            return opened


#: An engine's process may work with several threads.
_opening = threading.Lock()
_opened: Opened[Job] = Opened()


def set_up() -> None:
    """Make this process a Django process, by settings of its own."""
    if not settings.configured and "DJANGO_SETTINGS_MODULE" not in os.environ:
        raise errors.worker_without_settings()
    if not apps.ready:
        django.setup()


def to_bytes(value: object, *, by_value: bool) -> bytes:
    """Write down what goes to an engine's worker: by pickle, or as JSON."""
    return dumps(value) if by_value else wire.written(value).encode()


def from_bytes(data: bytes, *, by_value: bool) -> Any:
    """Return what was written down so."""
    return pickle.loads(data) if by_value else wire.read(data.decode())


def _written(job: Job, engine: str, *, by_value: bool) -> bytes:
    write = partial(to_bytes, by_value=by_value)
    try:
        return write(job)
    except Exception as error:
        if guilty := that_cannot_travel(job, write):
            raise errors.function_cannot_travel(guilty[0], engine, error, by_value=by_value) from error
        raise errors.queryset_cannot_travel(job.label, engine, error) from error


def run_letter(letter: Letter, chunk: Chunk, *, rests: bool = False) -> Outcome:
    """Do one chunk of a job in a process of an engine; value and error come back packed."""
    with packing(as_json=not letter.by_value):
        return run_parcel(letter, chunk, rests=rests)
