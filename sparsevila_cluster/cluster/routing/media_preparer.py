"""A preparation as the router sees it: name the media, look for it, have it made where it is nowhere.

Knows: what makes two requests ask for the same, and that a media which is resident costs the prefill pool nothing. Does not know:
how a prefix comes to a decode worker (`shipping`), or who asks.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from typing import TYPE_CHECKING

import msgpack

from sparsevila_cluster.cluster.routing.placement import choose_prefill
from sparsevila_cluster.cluster.routing.prefix_provisioner import PrefixProvisioner, PrefixWanted
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
    """BLAKE2b-256 (64 hex digits) over all that a request says and the configuration that completes it: equal digests ask for the
    same content key. Reads the sources once.

    Raises:
        BadMedia, BadRequest, TooLarge, DeadlineExceeded: as `media.identify`.
    """
    fps = config.fps if request.fps is None else request.fps
    cap = config.max_frames if request.max_frames is None else request.max_frames
    known = [identify(source, fps=fps, max_frames=cap, limits=config.limits) for source in request.sources]
    # The cap also as it was named: one above the limit is refused, though it would sample the same frames.
    payload = [known, cap, request.prune_keep, request.tenant, config.model_dump_json()]
    return hashlib.blake2b(msgpack.packb(payload), digest_size=32).hexdigest()


class MediaPreparer:
    """Used within one event loop."""

    def __init__(self, fleet: WorkerClients, shipping: PrefixProvisioner, sink: MetricsSink):
        self._fleet = fleet
        self._shipping = shipping
        self._sink = sink
        self._sharing = SingleFlight[MediaHandle]()
        self._remembered: LRUDict[PrepareRequest] = LRUDict(MAX_REMEMBERED)

    def remembered(self, key: str, tenant: str) -> PrepareRequest | None:
        """How a media was asked for, by someone whom `tenant` may share it with."""
        request = self._remembered.use(key)
        return request if request is not None and may_use(request.tenant, tenant) else None

    def forget(self, key: str) -> None:
        self._remembered.pop(key, None)

    async def prepare(self, request: PrepareRequest, progress: Progress | None, deadline: Deadline) -> MediaHandle:
        """Find or make it; callers of the same at the same time share. Raises as `PrefixProvisioner.bring`, without NotFound."""
        digest = await asyncio.to_thread(digest_of, request, self._fleet.config.engine)
        handle, shared = await self._sharing.get(digest, lambda: self._find_or_make(digest, request, progress, deadline))
        self._remembered.put(handle.media_id, request)
        return handle.as_reused() if shared else handle

    async def _find_or_make(
        self, digest: str, request: PrepareRequest, progress: Progress | None, deadline: Deadline
    ) -> MediaHandle:
        registry = self._fleet.registry
        found = await registry.find(digest, None, deadline)
        if found.key is None:
            found = await registry.find(None, await self._key_of(digest, request, deadline), deadline)
        assert found.key is not None
        if found.holders and found.handle is not None:
            self._sink.count("media_kv_hits_total")
            noting = registry.note_held(found.handle, (), digest, deadline.remaining_s("preparing media"))
            self._fleet.later(noting, "telling which media a request means")
            return found.handle.as_reused()
        wanted = PrefixWanted(found.key, deadline, request, progress, digest)
        _, handle = await self._shipping.bring(wanted)
        return handle

    async def _key_of(self, digest: str, request: PrepareRequest, deadline: Deadline) -> str:
        """From whichever prefill worker answers. Raises Unavailable: none does, in `max_attempts`."""
        tried: set[str] = set()
        error: SparseVilaError | None = None
        for _ in range(self._fleet.config.router.max_attempts):
            worker = choose_prefill(await self._fleet.workers("prefill", deadline), self._fleet.scene(tried, digest))
            if worker is None:
                break
            try:
                return await self._fleet.key_of(worker, request, deadline)
            except (Unavailable, QueueFull) as failure:
                tried.add(worker)
                error = failure
        raise error or Unavailable("no prefill worker is there to make media")
