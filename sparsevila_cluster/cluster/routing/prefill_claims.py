"""Which router may have a media prefix made: one at a time, by a leased claim in the directory that it renews while it lives."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from sparsevila_cluster.cluster.routing.worker_clients import PAUSE_S, WorkerClients
from sparsevila_cluster.core.deadline import Deadline
from sparsevila_cluster.core.errors import SparseVilaError

log = logging.getLogger(__name__)

# A router that has not renewed a claim for so many times the silence of a lost lane is gone: another one may have the prefix made.
LEASE_SILENCES = 2


class PrefillClaims:
    """The claims of one router, which are readable in the directory by its `name`."""

    def __init__(self, clients: WorkerClients, name: str):
        self._clients = clients
        self._name = name

    @asynccontextmanager
    async def of(self, key: str, deadline: Deadline) -> AsyncGenerator[bool, None]:
        """Whether this router may make the prefix now: True for the length of the block, or False after a while of waiting.

        Raises Unavailable (the directory does not answer), DeadlineExceeded, Cancelled.
        """
        directory = self._clients.directory
        owner, lease_s = f"{self._name}/{uuid.uuid4().hex}", LEASE_SILENCES * self._clients.config.transport.silence_s
        if not await directory.claim(key, owner, lease_s, deadline):
            await asyncio.sleep(min(PAUSE_S, deadline.remaining_s("waiting for another router's preparation")))
            yield False
            return
        renewing = asyncio.create_task(self._renew(key, owner, lease_s))
        try:
            yield True
        finally:
            renewing.cancel()
            self._clients.in_background(directory.once().unclaim(key, owner), f"releasing the claim of media {key[:12]}")

    async def _renew(self, key: str, owner: str, lease_s: float) -> None:
        while True:
            await asyncio.sleep(lease_s / 3)
            try:
                await self._clients.directory.once().claim(key, owner, lease_s)
            except SparseVilaError as error:
                log.info("the claim of media %s was not renewed: %s", key[:12], error)
