"""The map of the system: `Pipeline` is what every door speaks; `LocalPipeline` is both engines in one process.

Knows: the life of a media and of a turn across the two engines. Does not know: sockets, Ray, or what happens inside an engine.

    prepare:  sources -> [PrefillEngine: decode, encode, prune, prefill] -> media prefix, resident under its content key
    ask:      question -> [DecodeEngine: question prefill, retrieve, pack, step]* -> events
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar

from sparsevila_cluster.core.config import EngineConfig
from sparsevila_cluster.core.deadline import GRACE_S, Deadline, wait_within
from sparsevila_cluster.core.errors import DeadlineExceeded, Internal, NotFound, SparseVilaError, Unavailable
from sparsevila_cluster.core.protocols import Progress
from sparsevila_cluster.core.requests import MediaHandle, PrepareRequest, Turn, TurnEvent
from sparsevila_cluster.core.single_flight import SingleFlight
from sparsevila_cluster.core.tenancy import may_use
from sparsevila_cluster.engine.config_check import check_choices
from sparsevila_cluster.engine.decode_engine import DecodeEngine
from sparsevila_cluster.engine.engine_thread import EngineThread
from sparsevila_cluster.engine.prefill_engine import PrefillEngine, Preparation
from sparsevila_cluster.engine.running_turn import EventSink
from sparsevila_cluster.engine.turn_events import turn_events
from sparsevila_cluster.kvcache.arena import Extent
from sparsevila_cluster.kvcache.media_handle import as_reused, handle_of
from sparsevila_cluster.kvcache.prefix import MediaPrefix
from sparsevila_cluster.models import load_model
from sparsevila_cluster.models.adapter import ALL_PARTS, Model

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

# Requests remembered so that an evicted prefix can be made again when a conversation comes back to it.
MAX_REMEMBERED = 256
# A prefix that was just made again may be evicted before its turn takes hold of it: how often to try.
MAX_REMAKES = 4


class LocalPipeline:
    """Both engines in this process: one thread prefills, one decodes. Create and use it within one event loop."""

    def __init__(self, config: EngineConfig, model: Model | None = None):
        check_choices(config)
        self.config = config
        self.model = model or load_model(config.model_dir, ALL_PARTS, **config.loading)
        self.prefill = PrefillEngine(self.model, config)
        self.decode = DecodeEngine(self.model, config)
        self._decode_thread = EngineThread(self.decode, "decode")
        self._prefill_thread = ThreadPoolExecutor(1, thread_name_prefix="prefill")
        self._sharing = SingleFlight[MediaHandle]()
        self._remembered: OrderedDict[str, PrepareRequest] = OrderedDict()
        self._closed = False

    # ---- media -------------------------------------------------------------------------------------------------------------

    async def prepare(self, request: PrepareRequest, progress: Progress | None = None) -> MediaHandle:
        """Find the prefix by content key or make it. Callers of the same media at the same time share one prefill.

        Cancelling it ends the work at the next report of progress.

        Raises:
            BadMedia, TooLarge: media that cannot be used. QueueFull: no room. DeadlineExceeded. Unavailable: closed.
        """
        if self._closed:
            raise Unavailable("the pipeline is closed")
        deadline = Deadline(self.config.prepare_timeout_s if request.deadline_s is None else request.deadline_s)
        preparation = Preparation(request, self._guarded(progress, deadline))
        try:
            return await wait_within(self._prepare(preparation), deadline.deadline_s + GRACE_S, "preparing media")
        finally:
            deadline.cancel()

    def _guarded(self, progress: Progress | None, deadline: Deadline) -> Progress:
        """`progress` that also ends a preparation that nobody waits for: it is called once per stage and layer."""

        def report(stage: str, done: int, total: int) -> None:
            if self._closed:
                raise Unavailable("the pipeline is closed")
            deadline.check(f"preparing media (in stage {stage!r})")
            if progress is not None:
                progress(stage, done, total)

        return report

    async def _prepare(self, preparation: Preparation) -> MediaHandle:
        key = await self._in_prefill(self.prefill.key_of, preparation.request)
        handle, shared = await self._sharing.get(key, lambda: self._find_or_make(preparation, key))
        return as_reused(handle) if shared else handle

    async def _find_or_make(self, preparation: Preparation, key: str) -> MediaHandle:
        resident = await self._on_decode(lambda engine: engine.prefixes.get(key))
        if resident is not None:
            handle = handle_of(resident, reused=True)
        else:
            made = await self._in_prefill(self._make, preparation, key)
            handle = handle_of(made, ms=preparation.stage_ms())
        self._remember(key, preparation.request)
        return handle

    def _make(self, preparation: Preparation, key: str) -> MediaPrefix:
        """Runs in the prefill thread: decode the sources, prefill into an extent of the decode engine, publish it."""
        resident = self._decode_thread.post(lambda engine: engine.prefixes.get(key)).result(self.config.prepare_timeout_s)
        if resident is not None:
            return resident
        preparation.stage("decode")
        medias = self.prefill.load(preparation.request)
        reserved: list[Future[Extent]] = []

        def reserve(length: int) -> Extent:
            reserved.append(self._decode_thread.post(lambda engine: engine.prefixes.reserve(length)))
            return reserved[-1].result(self.config.prepare_timeout_s)

        try:
            handed_over = (medias.pop(0) for _ in range(len(medias)))  # frames are large: nobody but the prefill holds them
            prefix = self.prefill.prefill(preparation, handed_over, key, reserve)
            return self._decode_thread.post(lambda engine: engine.prefixes.publish(prefix)).result(self.config.prepare_timeout_s)
        except BaseException:
            for future in reserved:
                future.add_done_callback(self._unreserve)
            raise

    def _unreserve(self, reserved: Future[Extent]) -> None:
        """Give back a reservation that nothing was published in, even one that is granted after its prefill gave up."""
        if not reserved.cancelled() and reserved.exception() is None:
            self._decode_thread.post(lambda engine: engine.prefixes.cancel(reserved.result()))

    async def media(self, media_id: str, tenant: str = "") -> MediaHandle:
        """The handle of a resident prefix. Raises NotFound, Unavailable."""
        return handle_of(await self._on_decode(lambda engine: engine.prefix_of(media_id, tenant)), reused=True)

    async def delete_media(self, media_id: str, tenant: str = "") -> bool:
        """Drop a prefix. False if it is unknown, another tenant's, or a turn is using it."""
        request = self._remembered.get(media_id)
        if request is not None and may_use(request.tenant, tenant):
            del self._remembered[media_id]

        def drop(engine: DecodeEngine) -> bool:
            prefix = engine.prefixes.get(media_id)
            return prefix is not None and prefix.serves(tenant) and engine.prefixes.remove(media_id)

        return await self._on_decode(drop)

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
        submitted = False

        def submit(engine: DecodeEngine, sink: EventSink) -> None:
            nonlocal submitted
            engine.submit(turn, sink)
            submitted = True

        def abort(engine: DecodeEngine) -> None:
            if submitted:  # a turn that was refused is not ours to end: another one may have its id
                engine.abort(turn.turn_id)

        deadline_s = self.config.turn_timeout_s if turn.deadline_s is None else turn.deadline_s
        events = turn_events(
            lambda sink: self._submit(turn, lambda engine: submit(engine, sink)),
            lambda: self._decode_thread.post(abort),
            deadline_s,
            f"turn {turn.turn_id}",
        )
        async with aclosing(events):
            async for event in events:
                yield event

    async def _submit(self, turn: Turn, submit: Callable[[DecodeEngine], None]) -> None:
        evicted = False

        def attempt(engine: DecodeEngine) -> None:
            nonlocal evicted
            evicted = turn.media_id not in engine.prefixes
            submit(engine)

        for _ in range(MAX_REMAKES):
            try:
                return await self._on_decode(attempt)
            except NotFound:
                request = self._remembered.get(turn.media_id)
                if not evicted or request is None or not may_use(request.tenant, turn.tenant):
                    raise
                handle = await self.prepare(request)
                if handle.media_id != turn.media_id:
                    raise NotFound(f"media {turn.media_id!r} was evicted and its source has changed since") from None
        return await self._on_decode(submit)

    async def abort(self, turn_id: str) -> bool:
        """End a turn; its conversation stays as it was before it. False if it is unknown or over."""
        return await self._on_decode(lambda engine: engine.abort(turn_id))

    async def close_conversation(self, conversation_id: str) -> bool:
        """Abort its turns and free its KV. False if it is unknown."""
        return await self._on_decode(lambda engine: engine.close_conversation(conversation_id))

    async def set_brownout(self, level: float) -> None:
        """Turns that start from now on attend to less; 0 undoes it. Raises BadRequest for a level outside [0, 1]."""
        await self._on_decode(lambda engine: engine.set_brownout(level))

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
                "turns_running": engine.scheduler.num_running,
                "turns_waiting": engine.scheduler.num_waiting,
                "turns_preempted": engine.scheduler.num_preempted,
                "brownout": engine.brownout,
                "steps": engine.num_steps,
                "prefills": self.prefill.num_prefills,
            }

        return await self._on_decode(read)

    # ---- threads -----------------------------------------------------------------------------------------------------------

    async def _on_decode(self, call: Callable[[DecodeEngine], R], within_s: float | None = None) -> R:
        within_s = self.config.turn_timeout_s if within_s is None else within_s
        future = asyncio.wrap_future(self._decode_thread.post(call))
        return await wait_within(future, within_s, "the answer of the decode engine")

    async def _in_prefill(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            future = self._prefill_thread.submit(call, *args, **kwargs)
        except RuntimeError as error:
            raise Unavailable("the pipeline is closed") from error
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise Unavailable("the pipeline is closed") from None  # `close` emptied the queue
        except SparseVilaError:
            raise
        except TimeoutError as error:
            raise DeadlineExceeded("the decode engine did not answer the preparation in time") from error
        except Exception as error:
            log.exception("preparation failed")
            raise Internal(f"{type(error).__name__}: {error}") from error

    async def close(self) -> None:
        """Abort what runs and end both threads, which takes at most twice `close_timeout_s`. Idempotent.

        Raises:
            DeadlineExceeded: a step did not end in time; its thread ends after it.
        """
        if self._closed:
            return
        self._closed = True

        def abort_all(engine: DecodeEngine) -> None:
            for turn_id in list(engine.turns):
                engine.abort(turn_id, Unavailable("the pipeline is closing"))

        try:
            await self._on_decode(abort_all, self.config.close_timeout_s)
        finally:
            self._prefill_thread.shutdown(wait=False, cancel_futures=True)
            await asyncio.to_thread(self.prefill.close)
            await asyncio.to_thread(self._decode_thread.close, self.config.close_timeout_s)
