"""A call as text, and its answer: how they travel through engines whose messages are JSON.

Both are sealed, and an answer names the message that it is of: one of yesterday is no answer to today's.
"""

from __future__ import annotations

import json
import logging
from base64 import b64decode, b64encode
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from hashlib import sha256
from typing import Any
from zlib import Z_BEST_SPEED, compress, decompress

from parallel_orm import errors, wire
from parallel_orm.chunks import describe_key
from parallel_orm.letters import from_bytes, to_bytes
from parallel_orm.options import from_settings
from parallel_orm.outcomes import Outcome, note, opened, pack_error, packing
from parallel_orm.seals import sealed, unsealed

#: The largest answer, as characters of what a backend keeps. Brokers and backends have limits too, and say so badly.
MOST_BYTES = 16 * 2**20

_logger = logging.getLogger("parallel_orm")


@dataclass(frozen=True, slots=True)
class Delivery:
    """How a message has come to its worker."""

    #: Whether its broker says that it delivers it again.
    is_redelivered: bool = False
    #: Tells whether its caller has given it up since.
    is_taken_back: Callable[[], bool] = lambda: False
    #: Whether anybody will be told of the answer.
    is_heard: bool = True


_delivery: ContextVar[Delivery] = ContextVar("parallel_orm_delivery", default=Delivery())  # noqa: B039 - is frozen


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


def answer(message: str, delivery: Delivery) -> str:
    """Do what a message says, in a worker; return the answer, as sealed as the message must be.

    :raises NotSealed: it is of a stranger.
    """
    told, name = json.loads(unsealed(message)), _name_of(message)
    try:
        text = sealed(json.dumps({"to": name, **_answered(told, delivery)}))
        size, most = len(json.dumps(text)), from_settings().CELERY.get("MOST_BYTES", MOST_BYTES)
        if size > most:  # as a backend has it, which writes it down as JSON once more
            raise errors.answer_too_large(size, most)
        return text
    except Exception as error:  # which Celery would bring home without its arguments
        if not delivery.is_heard:
            _logger.error("A chunk has failed, and its caller does not hear of it", exc_info=error)
        with packing(as_json=True):
            return sealed(json.dumps({"to": name, "error": wire.written(pack_error(error))}))


def _text(value: Any, *, by_value: bool) -> str:
    # Small, and not to be read in passing: Celery's workers log the beginning of each answer.
    return b64encode(compress(to_bytes(value, by_value=by_value), Z_BEST_SPEED)).decode()


def _value(text: str, *, by_value: bool) -> Any:
    return from_bytes(decompress(b64decode(text)), by_value=by_value)


def _name_of(message: str) -> str:
    return sha256(message.encode()).hexdigest()


def _answered(told: Mapping[str, Any], delivery: Delivery) -> dict[str, Any]:
    by_value = told["by_value"]
    if by_value and not from_settings().CELERY.get("PICKLE"):
        raise errors.no_pickles_here()
    with packing(as_json=not by_value):
        fn, args, kwargs = _value(told["call"], by_value=by_value)
        token = _delivery.set(delivery)
        try:
            result = fn(*args, **kwargs)
        finally:
            _delivery.reset(token)
        if not delivery.is_heard:
            _tell_of_failures(result)
        return {"by_value": by_value, "answer": _text(result, by_value=by_value)}


def _tell_of_failures(result: Any) -> None:
    """Log what nobody else will hear of."""
    if not isinstance(result, Outcome):
        return
    if result.error is not None:
        _logger.error("%s has failed, and its caller does not hear of it", result.chunk, exc_info=opened(result.error))
    for each in result.failed:
        where = f"primary key {describe_key(each.key)} in {result.chunk}"
        _logger.error("%s has failed, and its caller does not hear of it", where, exc_info=opened(each.error))


def only_once(fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call ``fn``, unless the message of it may have been begun before, or its caller has given it up."""
    delivery = _delivery.get()
    if delivery.is_redelivered:
        error = errors.WorkerDied(None, None)
        note(error, "its message was delivered a second time; it may have been begun before, and was not begun now")
        raise error
    if delivery.is_taken_back():
        raise errors.taken_back()
    return fn(*args, **kwargs)
