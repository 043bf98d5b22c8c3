"""Both engines in one process: what `VideoQA` and a server without a cluster run on.

The way of a media and of a turn:

prepare:  sources -> [PrefillEngine: decode, encode, prune, prefill] -> media prefix, resident under its content key
ask:      question -> [DecodeEngine: question prefill, retrieve, pack, step]* -> events
"""

from __future__ import annotations

import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from sparsevila_cluster.core.config import EngineConfig
from sparsevila_cluster.core.deadline import GRACE_S, wait_within
from sparsevila_cluster.core.errors import NotFound
from sparsevila_cluster.core.protocols import Progress
from sparsevila_cluster.core.requests import MediaHandle, PrepareRequest, Turn, TurnEvent
from sparsevila_cluster.core.single_flight import SingleFlight
from sparsevila_cluster.core.tenancy import may_use
from sparsevila_cluster.engine.async_engine import AsyncDecodeEngine, AsyncPrefillEngine, Submit
from sparsevila_cluster.engine.config_check import check_choices
from sparsevila_cluster.engine.decode_engine import DecodeEngine
from sparsevila_cluster.engine.prefill_engine import PrefillEngine, Preparation
from sparsevila_cluster.kvcache.arena import Extent
from sparsevila_cluster.kvcache.prefix import MediaPrefix
from sparsevila_cluster.models import load_model
from sparsevila_cluster.models.adapter import ALL_PARTS, Model

# Requests remembered so that an evicted prefix can be made again when a conversation comes back to it.
MAX_REMEMBERED = 256
# A prefix that was just made again may be evicted before its turn takes hold of it: how often to try.
MAX_REMAKES = 4


class LocalPipeline:
    """A `Pipeline` over both engines. Create and use it within one event loop."""

    def __init__(self, config: EngineConfig, model: Model | None = None, secret: bytes | None = None):
        """model: loaded if None. secret: as `PrefillEngine` takes it."""
        check_choices(config)
        self.config = config
        self.model = model or load_model(config.model_dir, ALL_PARTS, **config.loading)
        self.prefill = AsyncPrefillEngine(PrefillEngine(self.model, config, secret=secret), "the pipeline")
        self.decode = AsyncDecodeEngine(DecodeEngine(self.model, config), "the pipeline")
        self._preparing = SingleFlight[MediaHandle]()
        self._remembered: OrderedDict[str, PrepareRequest] = OrderedDict()
        self._closed = False

    # ---- media -------------------------------------------------------------------------------------------------------------

    async def prepare(self, request: PrepareRequest, progress: Progress | None = None) -> MediaHandle:
        """Find the prefix by content key or make it. Callers of the same media at the same time share one prefill.

        Cancelling it ends the work at the next report of progress.

        Raises:
            BadMedia, TooLarge: media that cannot be used. QueueFull: no room. DeadlineExceeded. Unavailable: closed.
        """
        deadline = self.prefill.deadline(request)
        preparation = self.prefill.preparation(request, deadline, progress)
        try:
            return await wait_within(self._prepare(preparation), deadline.deadline_s + GRACE_S, "preparing media")
        finally:
            deadline.cancel()

    async def _prepare(self, preparation: Preparation) -> MediaHandle:
        key = await self.prefill.key_of(preparation.request)
        handle, shared = await self._preparing.get(key, lambda: self._find_or_make(preparation, key))
        return handle.as_reused() if shared else handle

    async def _find_or_make(self, preparation: Preparation, key: str) -> MediaHandle:
        resident = await self.decode.call(lambda engine: engine.prefixes.get(key))
        if resident is not None:
            handle = resident.handle(reused=True)
        else:
            made = await self.prefill.run(lambda engine: self._make(engine, preparation, key), preparation)
            handle = made.handle(ms=preparation.stage_ms())
        self._remember(key, preparation.request)
        return handle

    def _make(self, engine: PrefillEngine, preparation: Preparation, key: str) -> MediaPrefix:
        """In the prefill thread: prefill into an extent of the decode engine, publish it."""
        timeout_s = self.config.prepare_timeout_s
        resident = self.decode.find(key, timeout_s)
        if resident is not None:
            return resident
        reserved: list[Extent] = []

        def reserve(length: int) -> Extent:
            reserved.append(self.decode.reserve(length, timeout_s, preparation.request.owner))
            return reserved[-1]

        try:
            return self.decode.publish(engine.prepare(preparation, key, reserve), timeout_s)
        except BaseException:
            for extent in reserved:
                self.decode.cancel(extent)
            raise

    async def media(self, media_id: str, tenant: str = "") -> MediaHandle:
        """The handle of a resident prefix. Raises NotFound, Unavailable."""
        return (await self.decode.call(lambda engine: engine.prefix_of(media_id, tenant))).handle(reused=True)

    async def find_media(self, request: PrepareRequest) -> MediaHandle | None:
        """What is known of the prefix that a request asks for, None if it is not resident. Raises as `prepare`."""
        deadline_s = self.prefill.deadline(request).deadline_s
        key = await wait_within(self.prefill.key_of(request), deadline_s + GRACE_S, "looking for media")
        resident = await self.decode.call(lambda engine: engine.prefixes.get(key))
        return None if resident is None else resident.handle(reused=True)

    async def exchange_owners(self, owners: frozenset[str]) -> frozenset[str]:
        """There is no other door."""
        return frozenset()

    async def delete_media(self, media_id: str, tenant: str = "") -> bool:
        """Drop a prefix. False if it is unknown, another tenant's, or a turn is using it."""
        request = self._remembered.get(media_id)
        if request is not None and may_use(request.tenant, tenant):
            del self._remembered[media_id]

        def drop(engine: DecodeEngine) -> bool:
            prefix = engine.prefixes.get(media_id)
            return prefix is not None and prefix.serves(tenant) and engine.prefixes.remove(media_id)

        return await self.decode.call(drop)

    async def ready(self) -> bool:
        """Until it is closed."""
        return not self._closed

    def _remember(self, key: str, request: PrepareRequest) -> None:
        self._remembered[key] = request
        self._remembered.move_to_end(key)
        while len(self._remembered) > MAX_REMEMBERED:
            self._remembered.popitem(last=False)

    # ---- turns -------------------------------------------------------------------------------------------------------------

    async def ask(self, turn: Turn) -> AsyncGenerator[TurnEvent, None]:
        """The events of a turn, `done` last. An evicted media prefix is made again first. Without an id a conversation begins.

        Raises:
            UserError (BadRequest, TooLarge, NotFound), QueueFull, DeadlineExceeded, Cancelled, Internal, Unavailable.
        """
        turn = turn if turn.conversation_id else replace(turn, conversation_id=uuid.uuid4().hex)
        async with aclosing(self.decode.ask(turn, lambda submit: self._submit(turn, submit))) as lists:
            async for (event,) in lists:
                yield event

    async def _submit(self, turn: Turn, submit: Submit) -> None:
        evicted = False

        def attempt(engine: DecodeEngine) -> None:
            nonlocal evicted
            evicted = turn.media_id not in engine.prefixes
            submit(engine, turn)

        for _ in range(MAX_REMAKES):
            try:
                return await self.decode.call(attempt)
            except NotFound:
                request = self._remembered.get(turn.media_id)
                if not evicted or request is None or not may_use(request.tenant, turn.tenant):
                    raise
                handle = await self.prepare(replace(request, owner=turn.owner))
                if handle.media_id != turn.media_id:
                    raise NotFound(f"media {turn.media_id!r} was evicted and its source has changed since") from None
        return await self.decode.call(attempt)

    async def abort(self, turn_id: str) -> bool:
        """End a turn; its conversation stays as it was before it. False if it is unknown or over."""
        return await self.decode.call(lambda engine: engine.abort(turn_id))

    async def close_conversation(self, conversation_id: str, tenant: str = "") -> bool:
        """Abort its turns and free its KV. False if it is unknown, or another tenant's."""
        return await self.decode.call(lambda engine: engine.close_conversation(conversation_id, tenant))

    async def set_brownout(self, level: float) -> None:
        """Turns that start from now on attend to less; 0 undoes it. Raises BadRequest for a level outside [0, 1]."""
        await self.decode.set_brownout(level)

    async def info(self) -> dict[str, Any]:
        """What is resident and running, for people and dashboards."""

        def read(engine: DecodeEngine) -> dict[str, Any]:
            return {
                "model": self.config.model,
                "fingerprint": self.model.fingerprint,
                "prefixes": len(engine.prefixes),
                "prefix_bytes": engine.prefixes.arena.used_bytes,
                "prefixes_evicted": engine.prefixes.num_evicted,
                "turn_bytes": engine.conversations.arena.used_bytes,
                "conversations": len(engine.conversations),
                "tails_parked": engine.conversations.num_parked,
                "parked_bytes": engine.conversations.parked_bytes,
                "parked_conversations_closed": engine.conversations.num_closed_parked,
                "turns_running": engine.scheduler.num_running,
                "turns_waiting": engine.scheduler.num_waiting,
                "turns_preempted": engine.scheduler.num_preempted,
                "brownout": engine.brownout,
                "steps": engine.num_steps,
                "prefills": self.prefill.engine.num_prefills,
            }

        return await self.decode.call(read)

    async def tenant_info(self, tenant: str) -> dict[str, Any]:
        """As `Pipeline` says."""

        def read(engine: DecodeEngine) -> dict[str, Any]:
            own = [prefix.kv_bytes for prefix in engine.prefixes if prefix.serves(tenant)]
            return {
                "model": self.config.model,
                "fingerprint": self.model.fingerprint,
                "media": len(own),
                "media_bytes": sum(own),
                "conversations": engine.conversations.num_of(tenant),
            }

        return await self.decode.call(read)

    async def close(self) -> None:
        """Abort what runs and end all threads, which takes at most twice `close_timeout_s`. Idempotent.

        Raises:
            DeadlineExceeded: a step did not end in time; its thread ends after it.
        """
        if self._closed:
            return
        self._closed = True
        try:
            await self.prefill.close()
        finally:
            await self.decode.close(self.config.close_timeout_s)
