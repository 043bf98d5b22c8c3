"""Hot media prefixes earn more decode workers.

Knows: how many turns this router runs on each prefix at each worker. Does not know: what the turns are, or how a prefix travels.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from sparsevila_cluster.cluster.routing.placement import choose_replica
from sparsevila_cluster.cluster.routing.prefix_provisioner import PrefixProvisioner
from sparsevila_cluster.cluster.routing.worker_clients import WorkerClients
from sparsevila_cluster.core.deadline import Deadline
from sparsevila_cluster.core.lru_dict import LRUDict

log = logging.getLogger(__name__)

MAX_AT_ONCE = 2
# A prefix that stays hot because nobody has room is looked at again only after this.
REST_S = 5.0
MAX_RESTING = 1_024


class PrefixReplicator:
    """Sends copies in the background. Used within one event loop."""

    def __init__(self, fleet: WorkerClients, shipping: PrefixProvisioner):
        self._fleet = fleet
        self._shipping = shipping
        self._running: Counter[tuple[str, str]] = Counter()
        self._going: set[str] = set()
        self._resting: LRUDict[float] = LRUDict(MAX_RESTING)
        self.num_replicas = 0

    @contextmanager
    def turn(self, worker: str, key: str) -> Iterator[None]:
        """A turn runs on prefix `key` at `worker` for the length of the block."""
        self._running[worker, key] += 1
        try:
            self._consider(worker, key)
            yield
        finally:
            self._running[worker, key] -= 1
            if not self._running[worker, key]:
                del self._running[worker, key]

    def _consider(self, worker: str, key: str) -> None:
        after = self._fleet.config.decode.replicate_after
        if not after or self._running[worker, key] < after or key in self._going or len(self._going) >= MAX_AT_ONCE:
            return
        if time.monotonic() >= self._resting.get(key, 0.0):
            self._going.add(key)
            self._fleet.later(self._replicate(key, after), "replicating a hot prefix")

    async def _replicate(self, key: str, after: int) -> None:
        fleet = self._fleet
        deadline = Deadline(fleet.config.engine.prepare_timeout_s)
        try:
            found = await fleet.registry.find(None, key, deadline)
            decodes = await fleet.workers("decode", deadline)
            holders = {one.worker for one in found.holders}
            if found.handle is None or not holders:
                return
            running = min(self._running[holder, key] for holder in holders)
            target = choose_replica(decodes, holders, found.handle.kv_bytes, running, after, fleet.scene())
            if target is not None:
                report = next(one for one in decodes if one.worker == target)
                await self._shipping.replicate(key, found.handle, report, deadline)
                self.num_replicas += 1
                log.info("media %s is hot: it is at %s too now", key[:12], target, extra={"at": target})
        finally:
            self._going.discard(key)
            self._resting.put(key, time.monotonic() + REST_S)
