"""A worker that holds media prefixes and answers questions about them.

The way of a prefix and of its turns:

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
from functools import partial
from typing import Any

from sparsevila_cluster.cluster.messages import Load, WorkerReport
from sparsevila_cluster.cluster.workers.conversation_journals import ConversationJournals
from sparsevila_cluster.cluster.workers.engine_prefix_sink import EnginePrefixSink
from sparsevila_cluster.cluster.workers.stage_metrics import count, record_memory
from sparsevila_cluster.cluster.workers.transfer_tasks import TransferTasks
from sparsevila_cluster.cluster.workers.turn_service import TurnService
from sparsevila_cluster.core.cluster_config import ClusterConfig
from sparsevila_cluster.core.errors import BadRequest, DeadlineExceeded, NotFound, QueueFull, TooLarge, WorkerClosed
from sparsevila_cluster.core.fair_sharing import RecentOwners
from sparsevila_cluster.core.metrics import MetricsSink, Tally
from sparsevila_cluster.core.requests import MediaHandle, Turn, TurnEvent, TurnRecord
from sparsevila_cluster.engine.async_engine import AsyncDecodeEngine
from sparsevila_cluster.engine.decode_engine import DecodeEngine
from sparsevila_cluster.engine.prompt_rows import chunk_bounds
from sparsevila_cluster.models import load_model
from sparsevila_cluster.models.adapter import DECODE_PARTS, Model
from sparsevila_cluster.transport import KVReceiver, KVSender, ObjectStore, ReceiverAddress, TransferTicket

log = logging.getLogger(__name__)

# Messages of senders without a lane of their own that are waited for at once.
MAX_EXCHANGES = 64


class DecodeWorker:
    """One decode engine, the receiver of its media prefixes, and its conversations and their text.

    Create and use it within one event loop.
    """

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
        """name: of this worker, as others know it. model: loaded with the parts that a decode needs if None.

        object_store: of the transport "objectstore". sink: where metrics go. node: where it runs, for placement.
        """
        engine, transport = config.engine, config.transport
        self.name, self.config, self.node = name, config, node
        self.sink: MetricsSink = Tally() if sink is None else sink
        self.model = model or load_model(engine.model_dir, DECODE_PARTS, **engine.loading)
        spec = self.model.spec
        self.engine = DecodeEngine(self.model, engine)
        lost = partial(WorkerClosed, worker=name)
        self.async_engine = AsyncDecodeEngine(self.engine, f"worker {name}", lost, config.decode.brownout_at)
        self._journals = ConversationJournals(engine.max_conversations)
        self._turns = TurnService(name, self.async_engine, self._journals, self.sink)
        prefixes = EnginePrefixSink(spec, self.async_engine, transport.lease_s)
        self.receiver = KVReceiver(
            name, prefixes, spec, transport, device=self.model.device, object_store=object_store, sink=self.sink
        )
        sender = KVSender(name, transport, object_store=object_store, sink=self.sink)
        self._transfers = TransferTasks(name, sender, transport.dial_timeout_s)
        self._exchanges = ThreadPoolExecutor(MAX_EXCHANGES, thread_name_prefix="exchange")
        self._owners = RecentOwners()
        self._reported: tuple[MediaHandle, ...] | None = None
        self._num_preempted = 0
        self._closed = False

    # ---- media prefixes ----------------------------------------------------------------------------------------------------

    async def reserve(self, transfer_id: str, key: str, num_bytes: int | None, lease_s: float) -> ReceiverAddress:
        """Book a transfer: from now on, for `lease_s`, a sender may offer the prefix of `key` here. Where to send it to.

        The bytes themselves are taken when the sender says how many they are.

        Raises:
            BadRequest: a transfer_id that was used before. TooLarge: more than all prefixes may take. QueueFull: running turns
            hold so much that it could not fit now. WorkerClosed.
        """
        self._check_open()
        rows = 1 if num_bytes is None else -(-num_bytes // self.model.spec.bytes_per_token)

        def check_room(engine: DecodeEngine) -> None:
            most, size = engine.prefixes.arena.num_slots, self.model.spec.bytes_per_token
            if rows > most:
                raise TooLarge(f"a media prefix of {num_bytes} bytes of KV; prefix_bytes allows {most * size}")
            if rows > (room := engine.prefixes.most_room()):
                raise QueueFull(f"no room for a media prefix of {rows} tokens or more: prefixes in use leave {room}")

        await self.async_engine.call(check_room)
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
        prefix = await self.async_engine.hold(key)
        if prefix is None:
            raise NotFound(f"media {key!r} is not resident on worker {self.name}")
        bounds = chunk_bounds(prefix.length, self.config.engine.prefill_chunk)
        return await self._transfers.send(prefix, bounds, ticket, lambda: self.async_engine.release(key))

    async def media(self, key: str) -> MediaHandle | None:
        """What is known of a prefix that is resident at this moment, None if it is not."""
        stats = await self.async_engine.call(self.async_engine.refresh)
        return next((handle for handle in stats.residents if handle.media_id == key), None)

    async def drop(self, key: str) -> bool:
        """Forget a prefix. False if it is not resident, or in use."""
        return await self.async_engine.call(lambda engine: engine.prefixes.remove(key))

    async def exchange(self, lane_id: str, messages: list[tuple[str, Any]], wait_s: float) -> list[tuple[str, Any]]:
        """Messages of a lane that has no connection of its own; the replies that come within `wait_s`."""
        self._check_open()
        return await asyncio.wrap_future(self._exchanges.submit(self.receiver.exchange, lane_id, messages, wait_s))

    # ---- turns -------------------------------------------------------------------------------------------------------------

    async def ask(self, turn: Turn, history: Sequence[TurnRecord] | None = None) -> AsyncGenerator[list[TurnEvent], None]:
        """The events of a turn, `done` last: one by one for a reader who keeps up, else up to 8 at once.

        history: the turns that the conversation has behind it, wherever they were. If it is not here like that, it is replayed
        first. Leaving the iteration early aborts the turn. Turns of one conversation run in the order in which they were asked.

        Raises:
            NotFound: the media is not resident, or `after` is at odds with the conversation. BadRequest, TooLarge, QueueFull,
            DeadlineExceeded, Cancelled (aborted), WorkerClosed, Internal.
        """
        self._check_open()
        with self._owners.active(turn.owner):
            async with aclosing(self._turns.ask(turn, history)) as lists:
                async for events in lists:
                    yield events

    async def abort(self, turn_id: str) -> bool:
        """End a turn; its conversation stays as it was before it. False if it is unknown or over."""
        return await self.async_engine.call(lambda engine: engine.abort(turn_id))

    async def close_conversation(self, conversation_id: str, tenant: str | None = None) -> bool:
        """Abort its turns, free its KV, forget its text. False if it is unknown, or another tenant's than `tenant` (None: any)."""
        return await self._turns.close_conversation(conversation_id, tenant)

    async def set_brownout(self, level: float) -> None:
        """Turns that start from now on attend to less, or to even less while a long queue asks for it. Raises BadRequest."""
        await self.async_engine.set_brownout(level)

    # ---- what others see ---------------------------------------------------------------------------------------------------

    def report(self, full: bool) -> WorkerReport:
        """The state of this worker; the residents only if they have changed since the last report, everything if `full`."""
        stats, load = self.async_engine.stats, load_of(self.engine)
        changed = full or self._reported is not stats.residents
        self._reported = stats.residents
        record_memory(
            self.sink,
            "decode",
            len(stats.residents),
            {
                "prefixes": (load.prefix_bytes, load.prefix_budget_bytes),
                "turns": (load.turn_bytes, load.turn_budget_bytes),
                "parked": (self.engine.conversations.parked_bytes, self.engine.conversations.parked_budget_bytes),
            },
        )
        self.sink.set("conversations", stats.num_conversations)
        self.sink.set("turns_running", load.num_running)
        self.sink.set("turns_waiting", load.num_waiting)
        count(self.sink, "preemptions_total", stats.num_preempted - self._num_preempted)
        self._num_preempted = stats.num_preempted
        return WorkerReport(
            worker=self.name,
            pool="decode",
            node=self.node,
            address=self.receiver.address,
            load=load,
            residents=stats.residents if changed else None,
            records=self._journals.all() if full else None,
            owners=self._owners.names(),
        )

    async def info(self) -> dict[str, Any]:
        """Plain data, for people."""
        stats = await self.async_engine.call(self.async_engine.refresh)
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
            "load": asdict(load_of(self.engine)),
            "residents": [handle.media_id for handle in stats.residents],
            "conversations": stats.num_conversations,
            "parked_bytes": self.engine.conversations.parked_bytes,
            "parked_budget_bytes": self.engine.conversations.parked_budget_bytes,
            "parked_conversations_closed": self.engine.conversations.num_closed_parked,
            "prefixes_evicted": stats.num_evicted,
            "turns_preempted": stats.num_preempted,
            "brownout": stats.brownout,
            "steps": stats.num_steps,
            "receiver": receiver,
            "lanes": [*lanes, *self._transfers.lanes()],
        }

    async def check(self) -> None:
        """Raises Unavailable (it or its receiver is closed) or Internal (the engine is stuck or gone)."""
        self._check_open()
        self.async_engine.check()
        self.receiver.check()

    async def warm(self, receivers: Iterable[ReceiverAddress] = ()) -> None:
        """Answer a tiny question about noise, so that the first real one finds everything loaded; build lanes to `receivers`."""
        await self._turns.warm()
        await self._transfers.warm(receivers)

    def _check_open(self) -> None:
        if self._closed:
            raise WorkerClosed(f"worker {self.name} is closed", self.name)

    async def close(self) -> None:
        """Abort every turn and transfer and free everything, which takes at most a few times `close_timeout_s`. Idempotent.

        Raises:
            DeadlineExceeded: something did not end in time.
        """
        if self._closed:
            return
        self._closed = True
        timeout_s = self.config.engine.close_timeout_s
        ended = await asyncio.to_thread(self._transfers.close, timeout_s)
        try:
            await asyncio.to_thread(self.receiver.close)
        finally:
            self._exchanges.shutdown(wait=False, cancel_futures=True)
            await self.async_engine.close(timeout_s)
        if not ended:
            raise DeadlineExceeded(f"worker {self.name} did not end its transfers within {timeout_s:g} s")


def load_of(engine: DecodeEngine) -> Load:
    """How busy an engine is now; read from any thread, so that a figure may be one step old."""
    prefixes, turns, size = engine.prefixes.arena, engine.conversations.arena, engine.model.spec.bytes_per_token
    return Load(
        num_running=engine.scheduler.num_running,
        num_waiting=engine.scheduler.num_waiting,
        prefix_bytes=prefixes.used_bytes,
        prefix_budget_bytes=prefixes.num_slots * size,
        turn_bytes=turns.used_bytes,
        turn_budget_bytes=turns.num_slots * size,
    )
