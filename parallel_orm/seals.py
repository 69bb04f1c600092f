"""Seals: who wrote a text is known by ``settings.SECRET_KEY``, so nothing of a stranger is ever opened.

Whoever can put a message on a broker could otherwise have a worker call whatever it names.
"""

from __future__ import annotations

from django.core.signing import BadSignature, Signer

from parallel_orm import errors

_SALT = "parallel_orm.seals"


def sealed(text: str) -> str:
    """Return a text with the seal of this project."""
    return Signer(salt=_SALT).sign(text)


def unsealed(text: object) -> str:
    """Return what was sealed; raise :class:`~parallel_orm.errors.NotSealed` if nobody of this project did, or if it was
    changed since. ``SECRET_KEY_FALLBACKS`` count as ``SECRET_KEY``.
    """
    try:
        return Signer(salt=_SALT).unsign(text)  # type: ignore[arg-type]
    except (BadSignature, TypeError):
        raise errors.not_sealed() from None
