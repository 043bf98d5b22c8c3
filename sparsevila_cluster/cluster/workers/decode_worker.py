"""A worker that holds media prefixes and answers questions about them.

Knows: one engine and its thread, its KV receiver, conversations and their text. Does not know: Ray, others beyond the tickets
that it is given, media or encoders. Create and use it within one event loop.

    reserve -> (a lane: manifest, chunks, verified) -> resident -> ask: [question, retrieve, pack, step]* -> lists of events
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import asdict
from typing import Any

from sparsevila_cluster.cluster.messages import WorkerReport
from sparsevila_cluster.cluster.workers.async_decode_engine import AsyncDecodeEngine
from sparsevila_cluster.cluster.workers.conversation_journals import ConversationJournals
from sparsevila_cluster.cluster.workers.engine_prefix_sink import EnginePrefixSink
from sparsevila_cluster.cluster.workers.stage_metrics import count, tell_memory
from sparsevila_cluster.cluster.workers.transfer_tasks import TransferTasks
from sparsevila_cluster.cluster.workers.turn_service import TurnService
from sparsevila_cluster.core.cluster_config import ClusterConfig
from sparsevila_cluster.core.errors import BadRequest, DeadlineExceeded, NotFound, QueueFull, TooLarge, WorkerLost
from sparsevila_cluster.core.metrics import MetricsSink, Tally
from sparsevila_cluster.core.requests import MediaHandle, Turn, TurnEvent, TurnRecord
from sparsevila_cluster.engine.decode_engine import DecodeEngine
from sparsevila_cluster.engine.prompt_rows import chunk_bounds
from sparsevila_cluster.models import load_model
from sparsevila_cluster.models.adapter import DECODE_PARTS, Model
from sparsevila_cluster.transport import KVReceiver, KVSender, ObjectStore, ReceiverAddress, TransferTicket

log = logging.getLogger(__name__)

# Messages of senders without a lane of their own that are waited for at once.
MAX_EXCHANGES = 64


class DecodeWorker:
    def __init__(
        self,
        name: str,
        config: ClusterConfig,
        *,
        model: Model | None = None,
        object_store: ObjectStore | None = None,
        sink: MetricsSink | None = None,
        node: str = "",
    ):
        """name: of this worker, as others know it. model: loaded with the parts that a decode needs if None."""
        engine, transport = config.engine, config.transport
        self.name, self.config, self.node = name, config, node
        self.sink: MetricsSink = Tally() if sink is None else sink
        self.model = model or load_model(engine.model_dir, DECODE_PARTS, **engine.loading)
        spec = self.model.spec
        self.engine = DecodeEngine(self.model, engine)
        self._desk = AsyncDecodeEngine(name, self.engine, config.decode.brownout_at)
        self._journals = ConversationJournals(engine.max_conversations)
        self._answering = TurnService(self._desk, self._journals, self.sink)
        prefix_sink = EnginePrefixSink(spec, self._desk.post, transport.lease_s)
        self.receiver = KVReceiver(
            name, prefix_sink, spec, transport, device=self.model.device, object_store=object_store, sink=self.sink
        )
        self._sending = TransferTasks(
            KVSender(name, spec, transport, object_store=object_store, sink=self.sink), transport.dial_timeout_s
        )
        self._exchanges = ThreadPoolExecutor(MAX_EXCHANGES, thread_name_prefix="exchange")
        self._told: tuple[MediaHandle, ...] | None = None
        self._preempted = 0
        self._closed = False

    # ---- media prefixes ----------------------------------------------------------------------------------------------------

    async def reserve(self, transfer_id: str, key: str, num_bytes: int | None, lease_s: float) -> ReceiverAddress:
        """Book a transfer: from now on, for `lease_s`, a sender may offer the prefix of `key` here. Where to send it to.

        The bytes themselves are taken when the sender says how many they are.

        Raises:
            BadRequest: a transfer_id that was used before. TooLarge: more than all prefixes may take. QueueFull: running turns
            hold so much that it could not fit now. WorkerLost (closed).
        """
        self._check_open()
        rows = 1 if num_bytes is None else -(-num_bytes // self.model.spec.bytes_per_token)

        def look(engine: DecodeEngine) -> None:
            most, size = engine.prefixes.arena.num_slots, self.model.spec.bytes_per_token
            if rows > most:
                raise TooLarge(f"a media prefix of {num_bytes} bytes of KV; prefix_bytes allows {most * size}")
            if rows > (room := engine.prefixes.most_room()):
                raise QueueFull(f"no room for a media prefix of {rows} tokens or more: prefixes in use leave {room}")

        await self._desk.call(look)
        try:
            state = self.receiver.state(transfer_id)
        except NotFound:
            self.receiver.expect(transfer_id, key, lease_s)
        else:
            raise BadRequest(f"transfer {transfer_id!r} was reserved before; it is {state.value}")
        return self.receiver.address

    async def release(self, transfer_id: str) -> None:
        """Give a transfer up, in any state; one that has arrived stays. Harmless when repeated."""
        self.receiver.forget(transfer_id)

    async def ship(self, key: str, ticket: TransferTicket) -> dict[str, Any]:
        """Send a resident prefix to another worker, holding it meanwhile. As `PrefillWorker.ship`."""
        self._check_open()
        prefix = await self._desk.hold(key)
        if prefix is None:
            raise NotFound(f"media {key!r} is not resident on worker {self.name}")
        bounds = chunk_bounds(prefix.length, self.config.engine.prefill_chunk)
        return await self._sending.ship(prefix, bounds, ticket, lambda: self._desk.let_go(key))

    async def media(self, key: str) -> MediaHandle | None:
        """What is known of a prefix that is resident at this moment, None if it is not."""
        standing = await self._desk.call(self._desk.look)
        return next((handle for handle in standing.residents if handle.media_id == key), None)

    async def drop(self, key: str) -> bool:
        """Forget a prefix. False if it is not resident, or in use."""
        return await self._desk.call(lambda engine: engine.prefixes.remove(key))

    async def exchange(self, lane_id: str, messages: list[tuple[str, Any]], wait_s: float) -> list[tuple[str, Any]]:
        """Messages of a lane that has no connection of its own; the replies that come within `wait_s`."""
        self._check_open()
        return await asyncio.wrap_future(self._exchanges.submit(self.receiver.exchange, lane_id, messages, wait_s))

    # ---- turns -------------------------------------------------------------------------------------------------------------

    async def ask(self, turn: Turn, history: Sequence[TurnRecord] | None = None) -> AsyncGenerator[list[TurnEvent], None]:
        """The events of a turn, `done` last: one by one for a reader who keeps up, else up to 8 at once.

        history: the turns that the conversation has behind it, wherever they were. If it is not here like that, it is made again
        first. Leaving the iteration early aborts the turn. Turns of one conversation run in the order in which they were asked.

        Raises:
            NotFound: the media is not resident, or `after` is at odds with the conversation. BadRequest, TooLarge, QueueFull,
            DeadlineExceeded, Cancelled (aborted), WorkerLost (closed), Internal.
        """
        self._check_open()
        async with aclosing(self._answering.ask(turn, history)) as lists:
            async for events in lists:
                yield events

    async def abort(self, turn_id: str) -> bool:
        """End a turn; its conversation stays as it was before it. False if it is unknown or over."""
        return await self._desk.call(lambda engine: engine.abort(turn_id))

    async def close_conversation(self, conversation_id: str) -> bool:
        """Abort its turns, free its KV, forget its text. False if it is unknown."""
        return await self._answering.close_conversation(conversation_id)

    async def set_brownout(self, level: float) -> None:
        """Turns that start from now on attend to less, or to even less where the line presses harder. Raises BadRequest."""
        await self._desk.set_brownout(level)

    # ---- what others see ---------------------------------------------------------------------------------------------------

    def report(self, full: bool) -> WorkerReport:
        """How this worker stands; the residents only if they have changed since the last report, everything if `full`."""
        standing = self._desk.standing
        load, changed = self._desk.load, full or self._told is not standing.residents
        self._told = standing.residents
        tell_memory(
            self.sink,
            "decode",
            len(standing.residents),
            {"prefixes": (load.prefix_bytes, load.prefix_budget_bytes), "turns": (load.turn_bytes, load.turn_budget_bytes)},
        )
        self.sink.set("conversations", standing.num_conversations)
        self.sink.set("turns_running", load.num_running)
        self.sink.set("turns_waiting", load.num_waiting)
        count(self.sink, "preemptions_total", standing.num_preempted - self._preempted)
        self._preempted = standing.num_preempted
        return WorkerReport(
            worker=self.name,
            pool="decode",
            node=self.node,
            address=self.receiver.address,
            load=load,
            residents=standing.residents if changed else None,
            records=self._journals.all() if full else None,
        )

    async def info(self) -> dict[str, Any]:
        """Plain data, for people."""
        standing = await self._desk.call(self._desk.look)
        receiver = self.receiver.info()
        lanes = [{"direction": "in", "peer": lane.pop("worker"), **lane} for lane in receiver.pop("lanes")]
        return {
            "worker": self.name,
            "pool": "decode",
            "node": self.node,
            "pid": os.getpid(),
            "model": self.config.engine.model,
            "fingerprint": self.model.fingerprint,
            "device": str(self.model.device),
            "load": asdict(self._desk.load),
            "residents": [handle.media_id for handle in standing.residents],
            "conversations": standing.num_conversations,
            "prefixes_evicted": standing.num_evicted,
            "turns_preempted": standing.num_preempted,
            "brownout": standing.brownout,
            "steps": standing.num_steps,
            "receiver": receiver,
            "lanes": [*lanes, *self._sending.lanes()],
        }

    async def check(self) -> None:
        """Raises Unavailable (it or its receiver is closed) or Internal (the engine is stuck or gone)."""
        self._check_open()
        self._desk.check()
        self.receiver.check()

    async def warm(self, docks: Iterable[ReceiverAddress] = ()) -> None:
        """Answer a tiny question about noise, so that the first real one finds everything loaded; build lanes to `docks`."""
        await self._answering.warm()
        await self._sending.warm(docks)

    def _check_open(self) -> None:
        if self._closed:
            raise WorkerLost(f"worker {self.name} is closed")

    async def close(self) -> None:
        """Abort every turn and transfer and free everything, which takes at most a few times `close_timeout_s`. Idempotent.

        Raises:
            DeadlineExceeded: something did not end in time.
        """
        if self._closed:
            return
        self._closed = True
        within_s = self.config.engine.close_timeout_s
        over = await asyncio.to_thread(self._sending.close, within_s)
        try:
            await asyncio.to_thread(self.receiver.close)
        finally:
            self._exchanges.shutdown(wait=False, cancel_futures=True)
            await self._desk.close(within_s)
        if not over:
            raise DeadlineExceeded(f"worker {self.name} did not end what it sent within {within_s:g} s")
