"""Who calls: API keys, tenants, and the names that one tenant's things have inside.

Knows: the configured keys and what a tenant may share. Does not know: methods, media or turns. Without keys everybody is one guest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote

from sparsevila_cluster.core.cluster_config import DoorConfig
from sparsevila_cluster.core.errors import BadRequest, Unauthenticated

MAX_ID_CHARS = 200


@dataclass(frozen=True)
class Principal:
    """A caller.

    owner: whose uploads and turns these are; tenant: who alone may use the media that are prepared, "" = everybody; apart: whether
    others call here, too, so that turn ids get the owner in front: clients choose them, and two may choose alike. Conversations
    get their ids from the pipeline, which keeps tenants apart.
    """

    owner: str = ""
    tenant: str = ""
    apart: bool = False

    def inside(self, name: str) -> str:
        """The turn id that the pipeline knows, from the one that the client knows."""
        return f"{quote(self.owner, safe='')}/{name}" if self.apart else name

    def outside(self, name: str) -> str:
        """The turn id that the client knows, from the one that the pipeline knows."""
        return name.removeprefix(f"{quote(self.owner, safe='')}/") if self.apart else name


class Authenticator:
    """The configured API keys."""

    def __init__(self, config: DoorConfig):
        self._public = config.public_media
        # Looked up by digest, so that the time it takes says nothing about the keys that exist.
        self._owners = {_digest(key): owner for key, owner in config.api_keys.items()}

    def admit(self, metadata: Iterable[tuple[str, str | bytes]]) -> Principal:
        """Who calls, by `authorization: Bearer KEY`. Raises Unauthenticated: no key, several, or one that nobody has."""
        if not self._owners:
            return Principal()
        given = [value for name, value in metadata if name == "authorization"]
        if len(given) != 1 or not isinstance(given[0], str):
            raise Unauthenticated(f"metadata must hold one 'authorization: Bearer KEY', got {len(given)}")
        scheme, _, key = given[0].partition(" ")
        owner = self._owners.get(_digest(key.strip()))
        if scheme.lower() != "bearer" or owner is None:
            raise Unauthenticated("the API key in 'authorization: Bearer KEY' is not known here")
        return Principal(owner, "" if self._public else owner, True)


def check_id(name: str, value: str, *, required: bool = False) -> str:
    """`value` if it can be an id: printable, without spaces, at most MAX_ID_CHARS characters. Raises BadRequest."""
    if not value and not required:
        return value
    if not value or len(value) > MAX_ID_CHARS or not value.isprintable() or any(c.isspace() for c in value):
        raise BadRequest(f"{name} must be 1 to {MAX_ID_CHARS} printable characters without spaces, got {value[:40]!r}")
    return value


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=32).digest()
