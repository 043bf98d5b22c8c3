"""What only one router may do at a time, by a leased claim in the directory that it renews while it lives."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager

from sparsevila_cluster.cluster.routing.worker_clients import PAUSE_S, WorkerClients
from sparsevila_cluster.core.deadline import Deadline
from sparsevila_cluster.core.errors import SparseVilaError, Unavailable

log = logging.getLogger(__name__)

# A router that has not renewed a claim for so many times the silence of a lost lane is gone: another one may have what it claimed.
LEASE_SILENCES = 2


class Claims:
    """The claims of one router, which are readable in the directory by its `name`."""

    def __init__(self, clients: WorkerClients, name: str):
        self._clients = clients
        self._name = name
        self._releasing: dict[str, asyncio.Task[None]] = {}

    @asynccontextmanager
    async def of(self, key: str, deadline: Deadline) -> AsyncGenerator[bool, None]:
        """Whether this router has `key` to itself: True for the length of the block, or False after a while of waiting.

        Raises Unavailable (the directory does not answer), DeadlineExceeded, Cancelled.
        """
        directory = self._clients.directory
        if key in self._releasing:
            await asyncio.wait((self._releasing[key],), timeout=deadline.left_s)
        owner, lease_s = f"{self._name}/{uuid.uuid4().hex}", LEASE_SILENCES * self._clients.config.transport.silence_s
        if not await directory.claim(key, owner, lease_s, deadline):
            await asyncio.sleep(min(PAUSE_S, deadline.remaining_s(f"waiting for another router to release {key[:40]}")))
            yield False
            return
        renewing = asyncio.create_task(self._renew(key, owner, lease_s))
        try:
            yield True
        finally:
            renewing.cancel()
            release = self._clients.in_background(directory.once().unclaim(key, owner), f"releasing the claim of {key[:40]}")
            self._releasing[key] = release
            release.add_done_callback(lambda done: self._released(key, done))

    @asynccontextmanager
    async def wait_for(self, key: str, deadline: Deadline) -> AsyncGenerator[None, None]:
        """Have `key` to itself for the length of the block, or have it unclaimed where the directory does not answer.

        Raises DeadlineExceeded, Cancelled.
        """
        async with AsyncExitStack() as stack:
            try:
                while not await stack.enter_async_context(self.of(key, deadline)):
                    pass
            except Unavailable as error:
                log.warning("%s was not claimed: %s", key, error)
            yield

    def _released(self, key: str, release: asyncio.Task[None]) -> None:
        if self._releasing.get(key) is release:
            del self._releasing[key]

    async def _renew(self, key: str, owner: str, lease_s: float) -> None:
        while True:
            await asyncio.sleep(lease_s / 3)
            try:
                await self._clients.directory.once().claim(key, owner, lease_s)
            except SparseVilaError as error:
                log.info("the claim of %s was not renewed: %s", key[:40], error)
