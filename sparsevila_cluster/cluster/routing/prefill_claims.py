"""Who may make a media prefix: one router at a time, by a leased claim in the registry.

Knows: leases, and that a router that dies stops renewing. Does not know: what is made, or how.
"""

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


class PrefillClaims:
    """`name`: the router's, to be read in the registry."""

    def __init__(self, fleet: WorkerClients, name: str):
        self._fleet = fleet
        self._name = name

    @asynccontextmanager
    async def of(self, key: str, deadline: Deadline) -> AsyncGenerator[bool, None]:
        """Whether this router may make the prefix now: True for the length of the block, or False after a while of waiting.

        Raises Unavailable (the registry does not answer), DeadlineExceeded, Cancelled.
        """
        registry = self._fleet.registry
        owner, lease_s = f"{self._name}/{uuid.uuid4().hex}", self._fleet.config.transport.lease_s
        if not await registry.claim(key, owner, lease_s, deadline):
            await asyncio.sleep(min(PAUSE_S, deadline.remaining_s("waiting for another router's preparation")))
            yield False
            return
        renewing = asyncio.create_task(self._renew(key, owner, lease_s))
        try:
            yield True
        finally:
            renewing.cancel()
            self._fleet.later(registry.tell("unclaim", key, owner), "giving a claim back")

    async def _renew(self, key: str, owner: str, lease_s: float) -> None:
        while True:
            await asyncio.sleep(lease_s / 3)
            try:
                await self._fleet.registry.tell("claim", key, owner, lease_s)
            except SparseVilaError as error:
                log.info("a claim was not renewed: %s", error)
