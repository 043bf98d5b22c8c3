"""A preparation as the router does it: name the media, look for it, have it made where it is nowhere."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from typing import TYPE_CHECKING

import msgpack

from sparsevila_cluster.cluster.messages import PrefixLocation
from sparsevila_cluster.cluster.routing.placement import choose_prefill
from sparsevila_cluster.cluster.routing.prefix_provisioner import PrefixProvisioner, PrefixRequest
from sparsevila_cluster.cluster.routing.visits import Visits
from sparsevila_cluster.cluster.routing.worker_clients import WorkerClients
from sparsevila_cluster.core.config import EngineConfig
from sparsevila_cluster.core.deadline import Deadline
from sparsevila_cluster.core.errors import QueueFull, SparseVilaError, Unavailable
from sparsevila_cluster.core.lru_dict import LRUDict
from sparsevila_cluster.core.metrics import MetricsSink
from sparsevila_cluster.core.requests import MediaHandle, PrepareRequest
from sparsevila_cluster.core.single_flight import SingleFlight
from sparsevila_cluster.core.tenancy import may_use
from sparsevila_cluster.media import identify

if TYPE_CHECKING:
    from sparsevila_cluster.core.protocols import Progress

log = logging.getLogger(__name__)

# Requests remembered so that a prefix that is lost with all its copies can be made again.
MAX_REMEMBERED = 256


def digest_of(request: PrepareRequest, config: EngineConfig) -> str:
    """BLAKE2b-256 (64 hex digits) over all of a request and the configuration that completes it: equal digests ask for the
    same content key. Reads the sources once.

    Raises:
        BadMedia, BadRequest, TooLarge, DeadlineExceeded: as `media.identify`.
    """
    fps = config.fps if request.fps is None else request.fps
    cap = config.max_frames if request.max_frames is None else request.max_frames
    identities = [identify(source, fps=fps, max_frames=cap, limits=config.limits) for source in request.sources]
    # The cap also as it was given: one above the limit is refused, though it would sample the same frames.
    payload = [identities, cap, request.prune_keep, request.tenant, config.model_dump_json()]
    return hashlib.blake2b(msgpack.packb(payload), digest_size=32).hexdigest()


class MediaPreparer:
    """Makes or finds media prefixes for the callers of one router. Used within one event loop."""

    def __init__(self, clients: WorkerClients, provisioner: PrefixProvisioner, visits: Visits, sink: MetricsSink):
        self._clients, self._provisioner, self._visits, self._sink = clients, provisioner, visits, sink
        self._flights = SingleFlight[MediaHandle]()
        self._remembered: LRUDict[PrepareRequest] = LRUDict(MAX_REMEMBERED)

    def remembered(self, key: str, tenant: str) -> PrepareRequest | None:
        """The request by which a media prefix was prepared, if `tenant` may share it."""
        request = self._remembered.use(key)
        return request if request is not None and may_use(request.tenant, tenant) else None

    def forget(self, key: str) -> None:
        """A media prefix was deleted: do not make it again by itself."""
        self._remembered.pop(key, None)

    async def prepare(self, request: PrepareRequest, progress: Progress | None, deadline: Deadline) -> MediaHandle:
        """Find or make it; callers of the same at the same time share. Raises as `PrefixProvisioner.provide`, without NotFound."""
        digest = await asyncio.to_thread(digest_of, request, self._clients.config.engine)
        handle, shared = await self._flights.get(digest, lambda: self._find_or_make(digest, request, progress, deadline))
        self._remembered.put(handle.media_id, request)
        return handle.as_reused() if shared else handle

    async def find(self, request: PrepareRequest, deadline: Deadline) -> MediaHandle | None:
        """What is resident at a decode worker, None if it would have to be made. Raises as `prepare`."""
        digest = await asyncio.to_thread(digest_of, request, self._clients.config.engine)
        found = await self._find(digest, request, deadline)
        return found.handle.as_reused() if found.holders and found.handle is not None else None

    async def _find_or_make(
        self, digest: str, request: PrepareRequest, progress: Progress | None, deadline: Deadline
    ) -> MediaHandle:
        found = await self._find(digest, request, deadline)
        assert found.key is not None
        if found.holders and found.handle is not None:
            self._sink.count("media_kv_hits_total")
            noting = self._clients.directory.note_held(found.handle, (), digest, deadline.remaining_s("preparing media"))
            self._clients.in_background(noting, f"noting which request asks for media {found.key[:12]}")
            return found.handle.as_reused()
        _, handle = await self._provisioner.provide(PrefixRequest(found.key, deadline, request, progress, digest))
        return handle

    async def _find(self, digest: str, request: PrepareRequest, deadline: Deadline) -> PrefixLocation:
        """Where it is, by whatever names it. Raises PoisonRequest: it is refused."""
        directory, suspects = self._clients.directory, self._clients.suspects
        suspects.check(digest, time.monotonic())
        found = await directory.find(digest, None, deadline)
        suspects.check(digest, time.monotonic(), found.refused)
        if found.key is None:
            found = await directory.find(None, await self._key_of(digest, request, deadline), deadline)
        assert found.key is not None
        suspects.check(found.key, time.monotonic(), found.refused)
        return found

    async def _key_of(self, digest: str, request: PrepareRequest, deadline: Deadline) -> str:
        """From whichever prefill worker answers. Raises Unavailable: none does, in `max_attempts`."""
        tried: set[str] = set()
        error: SparseVilaError | None = None
        for _ in range(self._clients.config.router.max_attempts):
            worker = choose_prefill(await self._clients.workers("prefill", deadline), self._clients.placement(tried, digest))
            if worker is None:
                break
            try:
                visit = await self._visits.enter("prefill", worker, (digest,), 0, deadline)
                async with visit:
                    key = await self._clients.key_of(worker, request, deadline)
                    await visit.finish()
                return key
            except (Unavailable, QueueFull) as failure:
                tried.add(worker)
                error = failure
        raise error or Unavailable("there is no prefill worker to make media")
