"""Both engines as an event loop uses them: each with the threads that own it, and a deadline on every call.

Who may call what:

event loop --- call, ask ------> AsyncDecodeEngine    one thread: DecodeEngine.step, posted calls between steps
other threads - post, reserve -'
event loop --- key_of, run ----> AsyncPrefillEngine   one thread prefills, another reads sources for their content keys
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from sparsevila_cluster.core.deadline import Deadline, outliving, wait_within
from sparsevila_cluster.core.errors import DeadlineExceeded, Internal, SparseVilaError, Unavailable
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

    def reserve(self, length: int, timeout_s: float) -> Extent:
        """An extent for a prefix of `length` rows; idle prefixes are evicted for it. Waits; from any thread but the engine's.

        Raises:
            TooLarge: over the whole budget. QueueFull: all that is resident is in use. DeadlineExceeded. Unavailable: closed.
        """
        reserved = self.post(lambda engine: engine.prefixes.reserve(length))
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
    """A prefill engine and its threads. Use it within one event loop."""

    def __init__(self, engine: PrefillEngine, owner: str, unavailable: Callable[[str], Unavailable] = Unavailable):
        """owner: whose it is, for messages. unavailable: what calls raise once it is closed."""
        self.engine, self.owner = engine, owner
        self._unavailable = unavailable
        self._prefill_thread = ThreadPoolExecutor(1, thread_name_prefix="prefill")
        self._key_thread = ThreadPoolExecutor(1, thread_name_prefix="content-key")
        self._closed = False
        self._last_report_s: float | None = None  # of what the prefill thread does now; None while it does nothing

    @property
    def busy(self) -> bool:
        """Whether the prefill thread does something."""
        return self._last_report_s is not None

    def deadline(self, request: PrepareRequest) -> Deadline:
        """Of a preparation that begins now."""
        return Deadline(self.engine.config.prepare_timeout_s if request.deadline_s is None else request.deadline_s)

    def preparation(self, request: PrepareRequest, deadline: Deadline, progress: Progress | None = None) -> Preparation:
        """A preparation that fails at its next report of progress, one per stage and layer, once nobody waits for it any more.

        It fails with `unavailable` (closed), Cancelled or DeadlineExceeded (of the deadline), or what `progress` raises.
        """

        def report(stage: str, done: int, total: int) -> None:
            self._check_open()
            deadline.check(f"preparing media (in stage {stage!r})")
            self._last_report_s = time.perf_counter()
            if progress is not None:
                progress(stage, done, total)

        return Preparation(request, report)

    async def key_of(self, request: PrepareRequest) -> str:
        """The content key of the prefix that `request` asks for; it does not wait for a prefill that runs.

        Raises:
            BadMedia, BadRequest, TooLarge, DeadlineExceeded, `unavailable` (closed), Internal.
        """
        key = self._in(self._key_thread, lambda engine: engine.key_of(request))
        return await wait_within(key, self.deadline(request).deadline_s, "reading the sources")

    async def run(self, call: Callable[[PrefillEngine], R]) -> R:
        """What `call(engine)` returns, in the prefill thread. Raises `unavailable` (closed), Internal (unknown errors)."""

        def work(engine: PrefillEngine) -> R:
            self._last_report_s = time.perf_counter()
            try:
                return call(engine)
            finally:
                self._last_report_s = None

        return await self._in(self._prefill_thread, work)

    async def _in(self, thread: ThreadPoolExecutor, call: Callable[[PrefillEngine], R]) -> R:
        self._check_open()
        try:
            return await asyncio.wrap_future(thread.submit(call, self.engine))
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
        """Raises Internal: the prefill that runs has reported no progress for longer than any may take."""
        last_s, most_s = self._last_report_s, self.engine.config.prepare_timeout_s
        if last_s is not None and (silent_s := time.perf_counter() - last_s) > most_s:
            raise Internal(f"{self.owner}: a prefill has made no progress for {silent_s:.0f} s, over {most_s:g} s")

    async def close(self) -> None:
        """End what runs at its next report of progress, what waits at once, and the processes that decode. Idempotent."""
        self._closed = True
        self._prefill_thread.shutdown(wait=False, cancel_futures=True)
        self._key_thread.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.engine.close)
