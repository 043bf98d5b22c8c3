"""A decode engine and its thread, as one worker sees them: calls into the thread, and how the engine stands.

Knows: when to look at the engine, how hard the line in front of it presses, when its thread counts as stuck. Does not know: turns,
transfers, or who asks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from sparsevila_cluster.cluster.messages import Load
from sparsevila_cluster.cluster.workers.engine_stats import EngineStats, load_of, pressure
from sparsevila_cluster.core.deadline import outliving, wait_within
from sparsevila_cluster.core.errors import Internal, Unavailable, WorkerLost
from sparsevila_cluster.engine.decode_engine import DecodeEngine
from sparsevila_cluster.engine.engine_thread import EngineThread
from sparsevila_cluster.kvcache.prefix import MediaPrefix

R = TypeVar("R")


class AsyncDecodeEngine:
    def __init__(self, worker: str, engine: DecodeEngine, brownout_at: float):
        """worker: its name, for messages. brownout_at: `DecodeConfig.brownout_at`."""
        self.worker, self.engine = worker, engine
        self._brownout_at = brownout_at
        self._brownout = 0.0  # as asked for; the line may press harder
        self._standing = EngineStats.of(engine)
        self._thread = EngineThread(engine, "decode")
        self._call_s = engine.config.turn_timeout_s

    @property
    def standing(self) -> EngineStats:
        """The last look: taken after whatever changed it, without waiting for the engine."""
        return self._standing

    @property
    def load(self) -> Load:
        """How busy the engine is now; read from outside its thread, so that a figure may be one call old."""
        return load_of(self.engine)

    def post(self, call: Callable[[DecodeEngine], R]) -> Future[R]:
        """Have `call(engine)` run in the engine's thread. From any thread. The future fails with Unavailable after `close`."""

        def run(engine: DecodeEngine) -> R:
            try:
                return call(engine)
            finally:
                self.look(engine)

        return self._thread.post(run)

    async def call(self, call: Callable[[DecodeEngine], R], within_s: float | None = None) -> R:
        """What `call(engine)` returns. Raises DeadlineExceeded, WorkerLost (closed), whatever it raises."""
        within_s = self._call_s if within_s is None else within_s
        try:
            return await wait_within(asyncio.wrap_future(self.post(call)), within_s, f"the decode engine of {self.worker}")
        except Unavailable as error:
            raise WorkerLost(f"worker {self.worker} is closed") from error

    def look(self, engine: DecodeEngine) -> EngineStats:
        """In the engine's thread, after anything that changes how it stands."""
        level = max(self._brownout, pressure(engine.scheduler.num_waiting, engine.config.max_waiting, self._brownout_at))
        if level != engine.brownout:
            engine.set_brownout(level)
        self._standing = EngineStats.of(engine, self._standing)
        return self._standing

    async def set_brownout(self, level: float) -> None:
        """The least pressure to be under, whatever the line. Raises BadRequest."""

        def brown(engine: DecodeEngine) -> None:
            engine.set_brownout(level)
            self._brownout = engine.brownout

        await self.call(brown)

    async def hold(self, key: str) -> MediaPrefix | None:
        """A resident prefix, which stays until `let_go`; None if there is none."""
        future = self.post(lambda engine: engine.prefixes.hold(key) if key in engine.prefixes else None)
        try:
            return await wait_within(outliving(future), self._call_s, f"the decode engine of {self.worker}")
        except BaseException:  # whoever leaves now may hold it a moment later
            future.add_done_callback(lambda held: None if held.exception() or held.result() is None else self.let_go(key))
            raise

    def let_go(self, key: str) -> None:
        self.post(lambda engine: engine.prefixes.release(key))

    def check(self) -> None:
        """Raises Internal: the thread has ended, or a step has taken longer than any turn in it may."""
        if not self._thread.alive:
            raise Internal(f"worker {self.worker}: the engine's thread has ended")
        if (stuck_s := self._thread.stuck_s) > self._call_s:
            raise Internal(f"worker {self.worker}: a step has taken {stuck_s:.0f} s; a turn may take {self._call_s:g} s")

    async def close(self, within_s: float) -> None:
        """Abort every turn, forget every conversation and prefix, end the thread. Raises DeadlineExceeded."""

        def empty(engine: DecodeEngine) -> None:
            for turn_id in list(engine.turns):
                engine.abort(turn_id, WorkerLost(f"worker {self.worker} is closing"))
            for conversation_id in list(engine.conversations):
                engine.close_conversation(conversation_id)
            for key in [prefix.key for prefix in engine.prefixes]:
                engine.prefixes.remove(key)

        try:
            await self.call(empty, within_s)
        finally:
            await asyncio.to_thread(self._thread.close, within_s)
