"""The map of the system: `Pipeline` is what every door speaks; `LocalPipeline` is both engines in one process.

Knows: the life of a media and of a turn across the two engines. Does not know: sockets, Ray, or what happens inside an engine.

    prepare:  sources -> [PrefillEngine: decode, encode, prune, prefill] -> media prefix, resident under its content key
    ask:      question -> [DecodeEngine: question prefill, retrieve, pack, step]* -> events
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from sparsevila_cluster.config import EngineConfig
from sparsevila_cluster.decode_engine import DecodeEngine
from sparsevila_cluster.engine_thread import EngineThread
from sparsevila_cluster.errors import (
    Cancelled,
    DeadlineExceeded,
    Internal,
    NotFound,
    SparseVilaError,
    Unavailable,
)
from sparsevila_cluster.kv import Extent, MediaPrefix
from sparsevila_cluster.models import load_model
from sparsevila_cluster.models.adapter import Model
from sparsevila_cluster.prefill_engine import PrefillEngine, Preparation, Progress
from sparsevila_cluster.request import MediaHandle, PrepareRequest, Turn, TurnEvent

log = logging.getLogger(__name__)

# Requests remembered so that an evicted prefix can be made again when a conversation comes back to it.
MAX_REMEMBERED = 256
# The engine's own deadline fires first; this is what a caller waits on top of it before giving up on the engine itself.
GRACE_S = 5.0


class Pipeline(Protocol):
    """What doors speak to."""

    async def prepare(self, request: PrepareRequest, progress: Progress | None = None) -> MediaHandle:
        """Make a media prefix resident, or find it; its `media_id` is its content key."""
        ...

    def ask(self, turn: Turn) -> AsyncIterator[TurnEvent]:
        """The events of a turn. Leaving the iteration early aborts the turn."""
        ...

    async def abort(self, turn_id: str) -> bool: ...

    async def close_conversation(self, conversation_id: str) -> bool: ...

    async def delete_media(self, media_id: str) -> bool: ...

    async def set_brownout(self, level: float) -> None: ...

    async def info(self) -> dict[str, Any]: ...

    async def close(self) -> None: ...


class LocalPipeline:
    """Both engines in this process: one thread prefills, one decodes. Create and use it within one event loop."""

    def __init__(self, config: EngineConfig, model: Model | None = None):
        self.config = config
        self.model = model or load_model(
            config.model_dir, device=config.device, dtype=config.dtype, text_backend=config.text_backend
        )
        self.prefill = PrefillEngine(self.model, config)
        self.decode = DecodeEngine(self.model, config)
        self._decode_thread = EngineThread(self.decode, "decode")
        self._prefill_thread = ThreadPoolExecutor(1, thread_name_prefix="prefill")
        self._making: dict[str, asyncio.Future[MediaHandle]] = {}
        self._remembered: OrderedDict[str, PrepareRequest] = OrderedDict()
        self._closed = False

    # ---- media -------------------------------------------------------------------------------------------------------------

    async def prepare(self, request: PrepareRequest, progress: Progress | None = None) -> MediaHandle:
        """Find the prefix by content key or make it. Callers of the same media at the same time share one prefill.

        Raises:
            BadMedia, TooLarge: media that cannot be used. QueueFull: no room. DeadlineExceeded. Unavailable: closed.
        """
        if self._closed:
            raise Unavailable("the pipeline is closed")
        preparation = Preparation(request, progress or _ignore)
        deadline_s = self.config.prepare_timeout_s if request.deadline_s is None else request.deadline_s
        give_up_at_s = time.perf_counter() + deadline_s
        preparation.progress = _guarded(preparation.progress, give_up_at_s, deadline_s)
        try:
            return await asyncio.wait_for(self._prepare(preparation), deadline_s + GRACE_S)
        except TimeoutError as error:
            raise DeadlineExceeded(f"preparing media took longer than {deadline_s:g} s") from error

    async def _prepare(self, preparation: Preparation) -> MediaHandle:
        request = preparation.request
        key = await self._in_prefill(self.prefill.key_of, request)
        while key in self._making:
            try:
                # Shielded: one impatient caller must not cancel the work that the others wait for.
                handle = await asyncio.shield(self._making[key])
                return _as_reused(handle)
            except (Cancelled, DeadlineExceeded):
                continue  # its maker gave up or ran out of its own time; make it ourselves
        # No await stands between the look above and this entry: two callers can not both become the maker.
        making = self._making[key] = asyncio.get_running_loop().create_future()
        try:
            handle = await self._find_or_make(preparation, key)
            making.set_result(handle)
            return handle
        except BaseException as error:
            known = error if isinstance(error, SparseVilaError) else Cancelled("the preparation was cancelled")
            making.set_exception(known)
            making.exception()  # nobody may be waiting: that is not worth a warning
            raise
        finally:
            del self._making[key]

    async def _find_or_make(self, preparation: Preparation, key: str) -> MediaHandle:
        prefix = await self._on_decode(lambda engine: engine.prefixes.get(key))
        reused = prefix is not None
        if not reused:
            prefix = await self._in_prefill(self._make, preparation, key)
        self._remember(key, preparation.request)
        return _handle(prefix, reused, {} if reused else preparation.stage_ms())

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
            prefix = self.prefill.prefill(preparation, medias, key, reserve)
            return self._decode_thread.post(lambda engine: engine.prefixes.publish(prefix)).result(self.config.prepare_timeout_s)
        except BaseException:
            for future in reserved:
                future.add_done_callback(self._unreserve)
            raise

    def _unreserve(self, reserved: Future[Extent]) -> None:
        """Give back a reservation that nothing was published in, even one that is granted after its prefill gave up."""
        if not reserved.cancelled() and reserved.exception() is None:
            self._decode_thread.post(lambda engine: engine.prefixes.cancel(reserved.result()))

    async def delete_media(self, media_id: str) -> bool:
        """Drop a prefix. False if it is unknown or a turn is using it."""
        self._remembered.pop(media_id, None)
        return await self._on_decode(lambda engine: engine.prefixes.remove(media_id))

    def _remember(self, key: str, request: PrepareRequest) -> None:
        self._remembered[key] = request
        self._remembered.move_to_end(key)
        while len(self._remembered) > MAX_REMEMBERED:
            self._remembered.popitem(last=False)

    # ---- turns -------------------------------------------------------------------------------------------------------------

    async def ask(self, turn: Turn) -> AsyncIterator[TurnEvent]:
        """The events of a turn, `done` last. An evicted media prefix is made again first.

        Raises:
            UserError (BadRequest, TooLarge, NotFound), QueueFull, DeadlineExceeded, Cancelled, Internal, Unavailable.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[TurnEvent | Exception] = asyncio.Queue()
        deadline_s = self.config.turn_timeout_s if turn.deadline_s is None else turn.deadline_s
        late = DeadlineExceeded(f"turn {turn.turn_id} took longer than {deadline_s:g} s")
        accepted = finished = False

        def sink(event: TurnEvent | Exception) -> None:
            nonlocal accepted
            accepted = True
            loop.call_soon_threadsafe(events.put_nowait, event)

        def abort(engine: DecodeEngine) -> None:
            if accepted:  # else the id may be another turn's
                engine.abort(turn.turn_id)

        timer = None
        try:
            await self._submit(turn, sink)
            timer = loop.call_later(deadline_s + GRACE_S, events.put_nowait, late)
            while not finished:
                event = await events.get()
                finished = event is not late and (isinstance(event, Exception) or event.kind == "done")
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            if timer is not None:
                timer.cancel()
            if not finished:  # also when the caller leaves while the engine takes the turn
                self._decode_thread.post(abort)

    async def _submit(self, turn: Turn, sink: Callable[[TurnEvent | Exception], None]) -> None:
        for attempt in (1, 2):
            try:
                return await self._on_decode(lambda engine: engine.submit(turn, sink))
            except NotFound:
                request = self._remembered.get(turn.media_id)
                if attempt == 2 or request is None:
                    raise
                handle = await self.prepare(request)
                if handle.media_id != turn.media_id:
                    raise NotFound(f"media {turn.media_id!r} was evicted and its source has changed since") from None
        raise AssertionError("unreachable")

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

    async def _on_decode(self, call: Callable[[DecodeEngine], Any]) -> Any:
        future = asyncio.wrap_future(self._decode_thread.post(call))
        try:
            return await asyncio.wait_for(future, self.config.turn_timeout_s)
        except TimeoutError as error:
            raise DeadlineExceeded(f"the decode engine did not answer within {self.config.turn_timeout_s:g} s") from error

    async def _in_prefill(self, call: Callable[..., Any], *args: Any) -> Any:
        try:
            future = self._prefill_thread.submit(call, *args)
        except RuntimeError as error:
            raise Unavailable("the pipeline is closed") from error
        try:
            return await asyncio.wrap_future(future)
        except (SparseVilaError, asyncio.CancelledError):
            raise
        except TimeoutError as error:
            raise DeadlineExceeded("the decode engine did not answer the preparation in time") from error
        except Exception as error:
            log.exception("preparation failed")
            raise Internal(f"{type(error).__name__}: {error}") from error

    async def close(self) -> None:
        """Abort what runs and end both threads. Idempotent."""
        if self._closed:
            return
        self._closed = True

        def abort_all(engine: DecodeEngine) -> None:
            for turn_id in list(engine.turns):
                engine.abort(turn_id, Unavailable("the pipeline is closing"))

        await self._on_decode(abort_all)
        self._prefill_thread.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._decode_thread.close)


def _ignore(stage: str, done: int, total: int) -> None:
    pass


def _guarded(progress: Progress, give_up_at_s: float, deadline_s: float) -> Progress:
    """`progress` that also ends the preparation at its deadline: the prefill calls it once per stage and layer."""

    def report(stage: str, done: int, total: int) -> None:
        if time.perf_counter() > give_up_at_s:
            raise DeadlineExceeded(f"preparing media took longer than {deadline_s:g} s (in stage {stage!r})")
        progress(stage, done, total)

    return report


def _handle(prefix: MediaPrefix, reused: bool, ms: dict[str, float]) -> MediaHandle:
    return MediaHandle(
        media_id=prefix.key,
        kind=prefix.kind,
        num_frames=prefix.num_frames,
        duration_s=prefix.duration_s,
        visual_tokens=prefix.num_visual,
        visual_tokens_kept=prefix.num_kept,
        prefix_tokens=prefix.length,
        kv_bytes=prefix.kv_bytes,
        dense_kv_bytes=prefix.dense_kv_bytes,
        reused=reused,
        ms=ms,
    )


def _as_reused(handle: MediaHandle) -> MediaHandle:
    return MediaHandle(**{**vars(handle), "reused": True, "ms": {}})
