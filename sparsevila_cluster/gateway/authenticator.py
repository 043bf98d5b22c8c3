"""Who calls: API keys, tenants, and the ids that one owner's turns have in the pipeline."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

from sparsevila_cluster.core.cluster_config import GatewayConfig
from sparsevila_cluster.core.errors import BadRequest, Unauthenticated

MAX_ID_CHARS = 200


@dataclass(frozen=True)
class Principal:
    """A caller. Without configured keys everybody is the same one.

    owner: whose uploads and turns these are. tenant: who alone may use the media that are prepared, "" = everybody. shared: whether
    others call here, too; then turn ids get the owner in front, since clients choose them and two may choose alike. Conversations
    get their ids from the pipeline, which keeps tenants apart.
    """

    owner: str = ""
    tenant: str = ""
    shared: bool = False

    def pipeline_turn_id(self, turn_id: str) -> str:
        """The turn id that the pipeline knows, from the one that the client knows."""
        return f"{quote(self.owner, safe='')}/{turn_id}" if self.shared else turn_id


class Authenticator:
    """The configured API keys."""

    def __init__(self, config: GatewayConfig):
        self._public = config.public_media
        # Looked up by digest, so that the time it takes says nothing about the keys that exist.
        self._owners = {_digest(key): owner for key, owner in config.api_keys.items()}

    def authenticate(self, authorization: Sequence[str | bytes]) -> Principal:
        """Who calls, by every `authorization` header that was sent.

        Raises:
            Unauthenticated: no `Bearer KEY`, several, or a key that is not configured.
        """
        if not self._owners:
            return Principal()
        if len(authorization) != 1 or not isinstance(authorization[0], str):
            raise Unauthenticated(f"metadata must hold one 'authorization: Bearer KEY', got {len(authorization)}")
        scheme, _, key = authorization[0].partition(" ")
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
