"""Both engines as an event loop uses them: each with the threads that own it, and a deadline on every call.

Who may call what:

event loop --- call, ask ------> AsyncDecodeEngine    one thread: DecodeEngine.step, posted calls between steps
other threads - post, reserve -'
event loop --- key_of, run ----> AsyncPrefillEngine   a few threads prefill, one for each owner; others read sources
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from sparsevila_cluster.core.deadline import Deadline, outliving, wait_within
from sparsevila_cluster.core.errors import DeadlineExceeded, Internal, SparseVilaError, Unavailable
from sparsevila_cluster.core.fair_sharing import FairLock, FairSlots
from sparsevila_cluster.core.protocols import Progress
from sparsevila_cluster.core.requests import PrepareRequest, Turn, TurnEvent
from sparsevila_cluster.engine.decode_engine import DecodeEngine
from sparsevila_cluster.engine.engine_stats import EngineStats
from sparsevila_cluster.engine.engine_thread import EngineThread
from sparsevila_cluster.engine.prefill_engine import PrefillEngine, Preparation
from sparsevila_cluster.engine.prepared_turn import PreparedTurn
from sparsevila_cluster.engine.turn import EventSink
from sparsevila_cluster.engine.turn_events import turn_events
from sparsevila_cluster.kvcache.arena import Extent
from sparsevila_cluster.kvcache.prefix import MediaPrefix

log = logging.getLogger(__name__)

R = TypeVar("R")

# Threads that read sources, for content keys and costs.
READERS = 2

# Queues a turn; called in the decode engine's thread.
Submit = Callable[[DecodeEngine, Turn], None]


def queue_pressure(num_waiting: int, max_waiting: int, begins_at: float) -> float:
    """0 up to `begins_at` * max_waiting waiting turns, from there in proportion up to 1 at a full queue. begins_at >= 1: 0."""
    share = num_waiting / max_waiting
    return 0.0 if begins_at >= 1.0 or share <= begins_at else min(1.0, (share - begins_at) / (1.0 - begins_at))


class AsyncDecodeEngine:
    """A decode engine and its thread. Use it within one event loop, but for the methods that other threads may call."""

    def __init__(
        self,
        engine: DecodeEngine,
        owner: str,
        unavailable: Callable[[str], Unavailable] = Unavailable,
        brownout_at: float = 1.0,
    ):
        """owner: whose it is, for messages. unavailable: what calls raise once it is closed. brownout_at: share of `max_waiting`
        from which on waiting turns raise the level of brownout; 1 = never.
        """
        self.engine, self.owner = engine, owner
        self._unavailable = unavailable
        self._brownout_at = brownout_at
        self._brownout = 0.0  # as asked for; a long queue may ask for more
        self._stats = EngineStats.of(engine)
        self._thread = EngineThread(engine, "decode")
        self._preparing = ThreadPoolExecutor(1, thread_name_prefix="prepare-turn")  # one: turns keep their order
        self._closed = False
        self._timeout_s = engine.config.turn_timeout_s

    @property
    def stats(self) -> EngineStats:
        """The last snapshot: taken after whatever changed it, without waiting for the engine."""
        return self._stats

    def timeout_s(self, turn: Turn) -> float:
        """How long a turn may take."""
        return self._timeout_s if turn.deadline_s is None else turn.deadline_s

    # ---- calls -------------------------------------------------------------------------------------------------------------

    def post(self, call: Callable[[DecodeEngine], R]) -> Future[R]:
        """Have `call(engine)` run in the engine's thread. From any thread. The future fails with Unavailable after `close`."""

        def run(engine: DecodeEngine) -> R:
            try:
                return call(engine)
            finally:
                self.refresh(engine)

        return self._thread.post(run)

    async def call(self, call: Callable[[DecodeEngine], R], timeout_s: float | None = None) -> R:
        """What `call(engine)` returns. Raises DeadlineExceeded, `unavailable` (closed), whatever it raises."""
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        try:
            return await wait_within(asyncio.wrap_future(self.post(call)), timeout_s, f"the decode engine of {self.owner}")
        except Unavailable as error:
            raise self._unavailable(f"{self.owner} is closed") from error

    def refresh(self, engine: DecodeEngine) -> EngineStats:
        """Take a new snapshot, and set the level of brownout that the queue asks for. In the engine's thread."""
        waiting, most = engine.scheduler.num_waiting, engine.config.max_waiting
        level = max(self._brownout, queue_pressure(waiting, most, self._brownout_at))
        if level != engine.brownout:
            engine.set_brownout(level)
        self._stats = EngineStats.of(engine, self._stats)
        return self._stats

    async def set_brownout(self, level: float) -> None:
        """The least level of brownout, however short the queue is. Raises BadRequest for a level outside [0, 1]."""

        def set_level(engine: DecodeEngine) -> None:
            engine.set_brownout(level)
            self._brownout = engine.brownout

        await self.call(set_level)

    # ---- turns -------------------------------------------------------------------------------------------------------------

    def ask(
        self,
        turn: Turn,
        begin: Callable[[Submit], Awaitable[object]] | None = None,
        *,
        submit: Callable[[DecodeEngine, Turn, EventSink, PreparedTurn], None] | None = None,
        undo: Callable[[DecodeEngine], object] | None = None,
        max_events: int = 1,
    ) -> AsyncGenerator[list[TurnEvent], None]:
        """The events of a turn, `done` last: one by one for a reader who keeps up, else up to `max_events` at once.

        What grows with the size of the turn is done in a thread beside the engine's. Leaving the iteration early aborts the turn.

        begin: decides when, and in which form, the turn enters the engine, by calling what it is given in the engine's thread;
        at once if None. submit: how it enters; `engine.submit` if None. undo: called in the engine's thread if the reader leaves
        without having read `done` of a turn that is over.

        Raises:
            Whatever `begin` and `DecodeEngine.submit` raise, and what the turn fails with. DeadlineExceeded.
        """
        submitted = False

        async def start(sink: EventSink) -> None:
            prepared = await self._prepared(turn)

            def enter(engine: DecodeEngine, turn: Turn) -> None:
                nonlocal submitted

                def observed(event: TurnEvent | Exception) -> None:
                    if isinstance(event, Exception) or event.kind == "done":
                        self.refresh(engine)
                    sink(event)

                if submit is None:
                    engine.submit(turn, observed, prepared)
                else:
                    submit(engine, turn, observed, prepared)
                submitted = True

            if begin is None:
                await self.call(lambda engine: enter(engine, turn))
            else:
                await begin(enter)

        def leave(engine: DecodeEngine) -> None:
            # A turn that was refused must not be aborted: another one may have its id.
            if submitted and not engine.abort(turn.turn_id) and undo is not None:
                undo(engine)

        return turn_events(start, lambda: self.post(leave), self.timeout_s(turn), f"turn {turn.turn_id}", max_events)

    async def _prepared(self, turn: Turn) -> PreparedTurn:
        """Raises what `DecodeEngine.prepare` raises, DeadlineExceeded, `unavailable` (closed)."""
        if self._closed:
            raise self._unavailable(f"{self.owner} is closed")
        preparing = asyncio.wrap_future(self._preparing.submit(self.engine.prepare, turn))
        try:
            return await wait_within(preparing, self.timeout_s(turn), f"preparing turn {turn.turn_id}")
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise self._unavailable(f"{self.owner} is closed") from None  # `close` emptied the queue

    # ---- media prefixes ----------------------------------------------------------------------------------------------------

    async def hold(self, key: str) -> MediaPrefix | None:
        """A resident prefix, which stays until `release`; None if there is none."""
        future = self.post(lambda engine: engine.prefixes.hold(key) if key in engine.prefixes else None)
        try:
            return await wait_within(outliving(future), self._timeout_s, f"the decode engine of {self.owner}")
        except BaseException:  # whoever leaves now may hold it a moment later
            future.add_done_callback(lambda held: None if held.exception() or held.result() is None else self.release(key))
            raise

    def release(self, key: str) -> None:
        """End one hold. From any thread; does not wait."""
        self.post(lambda engine: engine.prefixes.release(key))

    def reserve(self, length: int, timeout_s: float, owner: str = "") -> Extent:
        """An extent for a prefix of `length` rows; idle prefixes are evicted for it. Waits; from any thread but the engine's.

        Raises:
            TooLarge: over the whole budget, or the owner's share. QueueFull: all that could make way is in use. DeadlineExceeded.
            Unavailable: closed.
        """
        reserved = self.post(lambda engine: engine.prefixes.reserve(length, owner))
        try:
            return self._result(reserved, timeout_s)
        except DeadlineExceeded:
            reserved.add_done_callback(self._cancel_late)  # the engine may still get there
            raise

    def _cancel_late(self, reserved: Future[Extent]) -> None:
        if not reserved.cancelled() and reserved.exception() is None:
            self.cancel(reserved.result())

    def publish(self, prefix: MediaPrefix, timeout_s: float) -> MediaPrefix:
        """Make a finished prefix visible; the one that is resident already, whose extent stays, if there is one.

        Waits; from any thread but the engine's. Raises DeadlineExceeded, Unavailable (closed).
        """
        return self._result(self.post(lambda engine: engine.prefixes.publish(prefix)), timeout_s)

    def cancel(self, extent: Extent) -> None:
        """Give back an extent that nothing was published in. Harmless when repeated. From any thread; does not wait."""
        self.post(lambda engine: engine.prefixes.cancel(extent))

    def find(self, key: str, timeout_s: float) -> MediaPrefix | None:
        """A prefix that is resident at this moment. Waits; from any thread but the engine's. Raises as `publish` does."""
        return self._result(self.post(lambda engine: engine.prefixes.get(key)), timeout_s)

    def _result(self, future: Future[R], timeout_s: float) -> R:
        try:
            return future.result(timeout_s)
        except TimeoutError as error:
            raise DeadlineExceeded(f"the decode engine of {self.owner} did not answer within {timeout_s:g} s") from error

    # ---- health and the end ------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises Internal: the thread has ended, or a step has taken longer than any turn in it may."""
        if not self._thread.alive:
            raise Internal(f"{self.owner}: the engine's thread has ended")
        if (stuck_s := self._thread.stuck_s) > self._timeout_s:
            raise Internal(f"{self.owner}: a step has taken {stuck_s:.0f} s; a turn may take {self._timeout_s:g} s")

    async def close(self, timeout_s: float) -> None:
        """Abort every turn, drop every conversation and prefix, end the thread, which takes at most twice `timeout_s`.

        Raises:
            DeadlineExceeded: a step did not end in time; the thread ends after it.
        """

        def empty(engine: DecodeEngine) -> None:
            for turn_id in list(engine.turns):
                engine.abort(turn_id, self._unavailable(f"{self.owner} is closing"))
            for conversation_id in list(engine.conversations):
                engine.close_conversation(conversation_id)
            for key in [prefix.key for prefix in engine.prefixes]:
                engine.prefixes.remove(key)

        self._closed = True
        self._preparing.shutdown(wait=False, cancel_futures=True)
        try:
            await self.call(empty, timeout_s)
        finally:
            await asyncio.to_thread(self._thread.close, timeout_s)


class AsyncPrefillEngine:
    """A prefill engine and its threads. Use it within one event loop.

    Of each owner one preparation is under way at a time, of all owners `max_preparing`. Those decode side by side and take turns
    with the engine, so that a small one needs a small multiple of its time alone, whatever others prepare.
    """

    def __init__(self, engine: PrefillEngine, owner: str, unavailable: Callable[[str], Unavailable] = Unavailable):
        """owner: whose it is, for messages. unavailable: what calls raise once it is closed."""
        self.engine, self.owner = engine, owner
        self._unavailable = unavailable
        config = engine.config
        self._lock = FairLock()
        self._slots = FairSlots(config.max_preparing, config.max_waiting, config.max_share, config.max_waiting_pixels)
        self._prefill_threads = ThreadPoolExecutor(config.max_preparing, thread_name_prefix="prefill")
        self._reading = FairSlots(READERS, config.max_waiting, config.max_share)
        self._reader_threads = ThreadPoolExecutor(READERS, thread_name_prefix="read-sources")
        self._closed = False
        self._num_running = 0
        self._last_report_s: float | None = None  # of any that is under way; None while there is none

    @property
    def num_running(self) -> int:
        """Preparations under way."""
        return self._num_running

    @property
    def num_waiting(self) -> int:
        """Preparations that wait for their owner's others, or for a place."""
        return self._slots.num_waiting

    def deadline(self, request: PrepareRequest) -> Deadline:
        """Of a preparation that begins now."""
        return Deadline(self.engine.config.prepare_timeout_s if request.deadline_s is None else request.deadline_s)

    def preparation(self, request: PrepareRequest, deadline: Deadline, progress: Progress | None = None) -> Preparation:
        """A preparation that fails at its next report of progress, one per stage and layer, once nobody waits for it any more.

        It fails with `unavailable` (closed), Cancelled or DeadlineExceeded (of the deadline), or what `progress` raises.
        """

        def check(stage: str = "wait") -> None:
            self._check_open()
            deadline.check(f"preparing media (in stage {stage!r})")

        def report(stage: str, done: int, total: int) -> None:
            check(stage)
            self._last_report_s = time.perf_counter()
            if progress is not None:
                progress(stage, done, total)

        return Preparation(request, report, check, self._lock)

    async def key_of(self, request: PrepareRequest) -> str:
        """The content key of the prefix that `request` asks for; it does not wait for a prefill that runs.

        Raises:
            BadMedia, BadRequest, TooLarge, QueueFull, DeadlineExceeded, `unavailable` (closed), Internal.
        """
        key = self._read(request, lambda engine: engine.key_of(request))
        return await wait_within(key, self.deadline(request).deadline_s, "reading the sources")

    async def run(self, call: Callable[[PrefillEngine], R], preparation: Preparation | None = None) -> R:
        """What `call(engine)` returns, in a prefill thread, once its owner's turn has come. A preparation is measured first.

        Raises:
            TooLarge, BadMedia: the sources cost too much, or cannot be read. QueueFull: too much waits, of this owner or in all.
            `unavailable` (closed), Internal (unknown errors).
        """
        owner, cost = "", 0
        if preparation is not None:
            request = preparation.request
            owner = request.owner
            self._slots.check_room(owner)
            cost = (await self._read(request, lambda engine: engine.cost_of(request))).pixels
        self._check_open()
        await self._slots.enter(owner, cost)
        if preparation is not None:
            preparation.queued = False

        def work(engine: PrefillEngine) -> R:
            self._last_report_s = time.perf_counter()
            return call(engine)

        def leave() -> None:
            self._num_running -= 1
            if not self._num_running:
                self._last_report_s = None
            self._slots.leave(owner)

        self._num_running += 1
        return await self._in(self._prefill_threads, work, leave)

    async def _read(self, request: PrepareRequest, call: Callable[[PrefillEngine], R]) -> R:
        """What `call(engine)` returns, in a thread that reads sources, of which no owner has more than one."""
        self._check_open()
        await self._reading.enter(request.owner)
        return await self._in(self._reader_threads, call, lambda: self._reading.leave(request.owner))

    async def _in(self, threads: ThreadPoolExecutor, call: Callable[[PrefillEngine], R], leave: Callable[[], None]) -> R:
        """`leave` is called in the event loop once the thread is done with it, however early the caller goes."""
        loop = asyncio.get_running_loop()
        try:
            self._check_open()
            future = threads.submit(call, self.engine)
        except BaseException:
            leave()
            raise
        future.add_done_callback(lambda _: _call_in(loop, leave))
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise self._unavailable(f"{self.owner} is closed") from None  # `close` emptied the queue
        except SparseVilaError:
            raise
        except Exception as error:
            log.exception("preparation failed")
            raise Internal(f"{type(error).__name__}: {error}") from error

    def _check_open(self) -> None:
        if self._closed:
            raise self._unavailable(f"{self.owner} is closed")

    def check(self) -> None:
        """Raises Internal: nothing that is under way has reported progress for longer than any may take."""
        last_s, most_s = self._last_report_s, self.engine.config.prepare_timeout_s
        if last_s is not None and (silent_s := time.perf_counter() - last_s) > most_s:
            raise Internal(f"{self.owner}: a prefill has made no progress for {silent_s:.0f} s, over {most_s:g} s")

    async def close(self) -> None:
        """End what runs at its next report of progress, what waits at once, and the processes that decode. Idempotent."""
        self._closed = True
        for slots in (self._slots, self._reading):
            slots.close(lambda: self._unavailable(f"{self.owner} is closed"))
        self._prefill_threads.shutdown(wait=False, cancel_futures=True)
        self._reader_threads.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.engine.close)


def _call_in(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    with suppress(RuntimeError):  # the loop is closed, and with it whoever waited
        loop.call_soon_threadsafe(call)
