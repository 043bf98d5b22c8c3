"""Hot media prefixes are copied to more decode workers: how many turns this router runs on each decides."""

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

MAX_REPLICATIONS = 2
# A prefix that stays hot because nobody has room is considered again only after this.
RETRY_AFTER_S = 5.0
MAX_RETRY_TIMES = 1_024


class PrefixReplicator:
    """Sends copies in the background. Used within one event loop."""

    def __init__(self, clients: WorkerClients, provisioner: PrefixProvisioner):
        self._clients = clients
        self._provisioner = provisioner
        self._running: Counter[tuple[str, str]] = Counter()
        self._replicating: set[str] = set()
        self._retry_at_s: LRUDict[float] = LRUDict(MAX_RETRY_TIMES)
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
        after = self._clients.config.decode.replicate_after
        if (
            not after
            or self._running[worker, key] < after
            or key in self._replicating
            or len(self._replicating) >= MAX_REPLICATIONS
        ):
            return
        if time.monotonic() >= self._retry_at_s.get(key, 0.0):
            self._replicating.add(key)
            self._clients.in_background(self._replicate(key, after), f"replicating media {key[:12]}")

    async def _replicate(self, key: str, after: int) -> None:
        clients = self._clients
        deadline = Deadline(clients.config.engine.prepare_timeout_s)
        try:
            found = await clients.directory.find(None, key, deadline)
            decodes = await clients.workers("decode", deadline)
            holders = {one.worker for one in found.holders}
            if found.handle is None or not holders:
                return
            running = min(self._running[holder, key] for holder in holders)
            target = choose_replica(decodes, holders, found.handle.kv_bytes, running, after, clients.placement())
            if target is not None:
                report = next(one for one in decodes if one.worker == target)
                await self._provisioner.replicate(key, found.handle, report, deadline)
                self.num_replicas += 1
                log.info("media %s was replicated to worker %s", key[:12], target, extra={"at": target})
        finally:
            self._replicating.discard(key)
            self._retry_at_s.put(key, time.monotonic() + RETRY_AFTER_S)
