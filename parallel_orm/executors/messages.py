"""A call as text, and its answer: how they travel through engines whose messages are JSON.

Both are sealed, and an answer names the message that it is of: one of yesterday is no answer to today's.
"""

from __future__ import annotations

import json
import pickle
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from hashlib import sha256
from typing import Any

from parallel_orm import errors, wire
from parallel_orm.options import from_settings
from parallel_orm.outcomes import note, pack_error, packing
from parallel_orm.parcels import dumps
from parallel_orm.seals import sealed, unsealed

#: The largest answer, as characters of what a backend keeps. Brokers and backends have limits too, and say so badly.
MOST_BYTES = 16 * 2**20

_is_redelivered: ContextVar[bool] = ContextVar("parallel_orm_is_redelivered", default=False)


def message_of(fn: Callable[..., Any], args: Any, kwargs: Any, *, by_value: bool) -> str:
    """Return a call as a message: JSON; or, ``by_value``, a pickle in it."""
    with packing(as_json=not by_value):
        text = _text((fn, args, kwargs), by_value=by_value)
    return sealed(json.dumps({"by_value": by_value, "call": text}))


def answer_of(answer: str, message: str) -> Any:
    """Return what a worker answered to a message, or raise what it refused that with.

    :raises NotSealed: it is of a stranger, or to another message.
    """
    told = json.loads(unsealed(answer))
    if told["to"] != _name_of(message):
        raise errors.not_sealed()
    if "error" in told:
        raise wire.read(told["error"]).open()
    return _value(told["answer"], by_value=told["by_value"])


def answer(message: str, *, is_redelivered: bool) -> str:
    """Do what a message says, in a worker; return the answer, as sealed as the message must be.

    :raises NotSealed: it is of a stranger.
    """
    told, name = json.loads(unsealed(message)), _name_of(message)
    try:
        text = sealed(json.dumps({"to": name, **_answered(told, is_redelivered=is_redelivered)}))
        size, most = len(json.dumps(text)), from_settings().CELERY.get("MOST_BYTES", MOST_BYTES)
        if size > most:  # as a backend has it, which writes it down as JSON once more
            raise errors.answer_too_large(size, most)
        return text
    except Exception as error:  # which Celery would bring home without its arguments
        with packing(as_json=True):
            return sealed(json.dumps({"to": name, "error": wire.written(pack_error(error))}))


def _text(value: Any, *, by_value: bool) -> str:
    return b64encode(dumps(value)).decode() if by_value else wire.written(value)


def _value(text: str, *, by_value: bool) -> Any:
    return pickle.loads(b64decode(text)) if by_value else wire.read(text)


def _name_of(message: str) -> str:
    return sha256(message.encode()).hexdigest()


def _answered(told: Mapping[str, Any], *, is_redelivered: bool) -> dict[str, Any]:
    by_value = told["by_value"]
    if by_value and not from_settings().CELERY.get("PICKLE"):
        raise errors.no_pickles_here()
    with packing(as_json=not by_value):
        fn, args, kwargs = _value(told["call"], by_value=by_value)
        token = _is_redelivered.set(is_redelivered)
        try:
            result = fn(*args, **kwargs)
        finally:
            _is_redelivered.reset(token)
        return {"by_value": by_value, "answer": _text(result, by_value=by_value)}


def unless_redelivered(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call ``fn``, unless the message of it may have been begun before."""
    if _is_redelivered.get():
        error = errors.WorkerDied(None, None)
        note(error, "its message was delivered a second time; it may have been begun before, and was not begun now")
        raise error
    return fn(*args, **kwargs)
