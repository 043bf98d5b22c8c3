"""Who calls: API keys, tenants, and the ids that one owner's turns have in the pipeline."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from sparsevila_cluster.core.api_keys import ApiKeyEntry, Role, hash_api_key
from sparsevila_cluster.core.cluster_config import GatewayConfig
from sparsevila_cluster.core.errors import BadConfig, BadRequest, Unauthenticated
from sparsevila_cluster.gateway.audit_log import AuditLog
from sparsevila_cluster.gateway.key_file import KeyFile

log = logging.getLogger(__name__)

MAX_ID_CHARS = 200
# Seconds between two looks at the keys file.
LOOK_S = 1.0


@dataclass(frozen=True)
class Principal:
    """A caller. Without configured keys everybody is the same one.

    owner: whose uploads and turns these are. tenant: who alone may use the media that are prepared, "" = everybody. shared: whether
    others call here, too; then turn ids get the owner in front, since clients choose them and two may choose alike. Conversations
    get their ids from the pipeline, which keeps tenants apart. key: the name of the key, for logs. role: an admin sees what the
    server tells of everybody.
    """

    owner: str = ""
    tenant: str = ""
    shared: bool = False
    key: str = ""
    role: Role = "user"

    def pipeline_turn_id(self, turn_id: str) -> str:
        """The turn id that the pipeline knows, from the one that the client knows."""
        return f"{quote(self.owner, safe='')}/{turn_id}" if self.shared else turn_id


class Authenticator:
    """The API keys of the configuration, and those of its keys file, which `watch` follows. Used within one event loop."""

    def __init__(self, config: GatewayConfig, audit: AuditLog, clock: Callable[[], float] = time.time):
        """clock: seconds since 1970. Raises BadConfig: a keys file that cannot be used."""
        self._public, self._audit, self._clock = config.public_media, audit, clock
        self._file = None if config.keys_file is None else KeyFile(config.keys_file)
        # Without either there are no keys; a file without entries lets nobody in.
        self._is_open = not config.api_keys and self._file is None
        self._configured = tuple(
            ApiKeyEntry.model_construct(name=f"api_keys[{i}]", hash=hash_api_key(key), tenant=tenant)
            for i, (key, tenant) in enumerate(config.api_keys.items())
        )
        self._take_entries()

    @property
    def has_several_owners(self) -> bool:
        """Whether keys of more than one owner are known."""
        return self._num_owners > 1

    def authenticate(self, authorization: Sequence[str | bytes]) -> Principal:
        """Who calls, by every `authorization` header that was sent.

        Raises:
            Unauthenticated: no `Bearer KEY`, several, or a key that is not known or has expired.
        """
        if self._is_open:
            return Principal(role="admin")
        if len(authorization) != 1 or not isinstance(authorization[0], str):
            raise Unauthenticated(f"metadata must hold one 'authorization: Bearer KEY', got {len(authorization)}")
        scheme, _, key = authorization[0].partition(" ")
        entry = self._entries.get(hash_api_key(key.strip()))
        if scheme.lower() != "bearer" or entry is None:
            raise Unauthenticated("the API key in 'authorization: Bearer KEY' is not known here")
        if entry.is_over(self._clock()):
            raise Unauthenticated(f"the API key {entry.name!r} has expired on {entry.expires:%Y-%m-%d at %H:%M:%S %Z}")
        return Principal(entry.tenant, "" if self._public else entry.tenant, True, entry.name, entry.role)

    async def watch(self) -> None:
        """Follow the keys file. Never returns; to be cancelled."""
        while self._file is not None:
            await asyncio.sleep(LOOK_S)
            try:
                await self.refresh()
            except Exception:
                log.exception("looking at the keys file failed")

    async def refresh(self) -> None:
        """Take over the keys file if it has changed; one that is broken is logged, and the keys stay as they were."""
        if self._file is None:
            return
        before = {entry.name for entry in self._file.entries}
        try:
            if not await asyncio.to_thread(self._file.refresh):
                return
        except BadConfig as error:
            log.error("the API keys stay as they were: %s", error)
            self._audit.note("keys_refused", str(error))
            return
        self._take_entries()
        after = {entry.name for entry in self._file.entries}
        added, gone = sorted(after - before), sorted(before - after)
        self._audit.note("keys_reloaded", f"{len(after)} keys; new: {', '.join(added) or '-'}; gone: {', '.join(gone) or '-'}")

    def _take_entries(self) -> None:
        # Looked up by hash, so that the time it takes says nothing about the keys that exist.
        entries = (*(self._file.entries if self._file is not None else ()), *self._configured)
        self._entries = {entry.hash: entry for entry in entries}
        self._num_owners = len({entry.tenant for entry in entries})


def check_id(name: str, value: str, *, required: bool = False) -> str:
    """`value` if it can be an id: printable, without spaces, at most MAX_ID_CHARS characters. Raises BadRequest."""
    if not value and not required:
        return value
    if not value or len(value) > MAX_ID_CHARS or not value.isprintable() or any(c.isspace() for c in value):
        raise BadRequest(f"{name} must be 1 to {MAX_ID_CHARS} printable characters without spaces, got {value[:40]!r}")
    return value
