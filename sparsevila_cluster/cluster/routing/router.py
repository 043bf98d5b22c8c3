"""The cluster behind the `Pipeline` protocol: what a door speaks to in a router replica.

Knows: the calls that clients make, and who of this folder does what of them. Does not know: gRPC, Ray, or engines. Any number of
routers serve the same workers: what one of them remembers is a shortcut, and another finds it again.

    prepare:  `preparing` (name it, look for it) -> `shipping` (reserve, then ship a copy or make it)
    ask:      `conversations` (where it is) -> `asking` (its worker, or another one)
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from sparsevila_cluster.cluster.messages import WorkerReport
from sparsevila_cluster.cluster.routing.conversation_table import ConversationState, ConversationTable, ConversationToken
from sparsevila_cluster.cluster.routing.media_preparer import MediaPreparer
from sparsevila_cluster.cluster.routing.prefix_provisioner import PrefixProvisioner
from sparsevila_cluster.cluster.routing.replication import PrefixReplicator
from sparsevila_cluster.cluster.routing.routed_turn import RoutedTurn, RouterParts
from sparsevila_cluster.cluster.routing.worker_clients import Kind, WorkerClients
from sparsevila_cluster.cluster.worker_pool import WorkerPool
from sparsevila_cluster.core.cluster_config import ClusterConfig
from sparsevila_cluster.core.deadline import Deadline, wait_within
from sparsevila_cluster.core.errors import BadRequest, Cancelled, NotFound, SparseVilaError, Unavailable, WorkerLost
from sparsevila_cluster.core.metrics import MetricsSink
from sparsevila_cluster.core.requests import MediaHandle, PrepareRequest, Turn, TurnEvent, check_brownout
from sparsevila_cluster.core.tenancy import may_use

if TYPE_CHECKING:
    from sparsevila_cluster.core.protocols import Progress

log = logging.getLogger(__name__)

# A turn that is taken up again waits this long for its former self to be aborted.
TAKEOVER_S = 2.0


class ClusterPipeline:
    """One router. `name`: who claims a preparation. Create and use it within one event loop."""

    def __init__(
        self,
        config: ClusterConfig,
        prefill: WorkerPool,
        decode: WorkerPool,
        registry: WorkerPool,
        sink: MetricsSink,
        name: str = "router",
    ):
        self.config = config
        self.name = name
        self._fleet = WorkerClients(config, prefill, decode, registry)
        shipping = PrefixProvisioner(self._fleet, name)
        preparing, replication = MediaPreparer(self._fleet, shipping, sink), PrefixReplicator(self._fleet, shipping)
        self._means = RouterParts(self._fleet, shipping, preparing, replication, sink)
        self._conversations = ConversationTable(config.router.max_conversations)
        self._turns: dict[str, RoutedTurn] = {}
        self._closed = False

    # ---- media -------------------------------------------------------------------------------------------------------------

    async def prepare(self, request: PrepareRequest, progress: Progress | None = None) -> MediaHandle:
        """Find the prefix by content key, ship a copy of it, or have it made. Cancelling it frees what was reserved for it.

        Raises:
            BadMedia, BadRequest, TooLarge: media that cannot be used. QueueFull: no room. Unavailable, LaneLost, DataLoss,
            Incompatible: no worker could, in `max_attempts`. DeadlineExceeded.
        """
        self._check_open()
        deadline_s = self.config.engine.prepare_timeout_s if request.deadline_s is None else request.deadline_s
        deadline = Deadline(deadline_s)
        try:
            return await wait_within(self._means.preparing.prepare(request, progress, deadline), deadline_s, "preparing media")
        finally:
            deadline.cancel()

    async def media(self, media_id: str, tenant: str = "") -> MediaHandle:
        """What is known of a prefix that is resident, or of which a copy is kept. Raises NotFound, also for another tenant's."""
        self._check_open()
        found = await self._fleet.registry.where(media_id, self._short_call())
        if found.handle is None or not may_use(found.handle.tenant, tenant):
            raise NotFound(f"media {media_id!r} is not resident; prepare it first")
        return found.handle.as_reused()

    async def delete_media(self, media_id: str, tenant: str = "") -> bool:
        """Drop a prefix and its copies everywhere. False if it is unknown, another tenant's, or a turn is using it.

        Raises:
            Unavailable: the registry or a worker that has it does not answer.
        """
        self._check_open()
        deadline, fleet = self._short_call(), self._fleet
        found = await fleet.registry.find(None, media_id, deadline)
        if found.handle is None or not may_use(found.handle.tenant, tenant):
            return False
        if any(turn.head.media_id == media_id and turn.worker for turn in self._turns.values()):
            return False
        self._means.preparing.forget(media_id)
        # Copies go last: while a decode worker keeps the prefix for a turn, that turn may still need one.
        for workers in (found.holders, found.copies):
            if not all(await asyncio.gather(*(self._drop(one, media_id, deadline) for one in workers))):
                return False
        fleet.registry.forget_media(media_id)
        await fleet.registry.tell("drop_media", media_id)
        return True

    async def _drop(self, one: WorkerReport, media_id: str, deadline: Deadline) -> bool:
        """Whether a worker has got the prefix no more."""
        try:
            if await self._fleet.call(one.pool, one.worker, "drop", media_id, deadline=deadline):
                return True
            # In use, or evicted since it was reported.
            told = await self._fleet.call(one.pool, one.worker, "info", deadline=deadline)
        except WorkerLost:
            return True
        return media_id not in told["residents" if one.pool == "decode" else "copies"]

    # ---- turns -------------------------------------------------------------------------------------------------------------

    async def ask(self, turn: Turn) -> AsyncGenerator[TurnEvent, None]:
        """The events of a turn, `done` last. An empty `conversation_id` begins a conversation; a `replay`, or the id of a turn that
        the conversation had last, takes up a turn whose stream was lost.

        Raises:
            UserError (BadRequest, TooLarge, NotFound), QueueFull, DeadlineExceeded, Cancelled, Internal, Unavailable.
        """
        self._check_open()
        turn = _repeatable(turn)
        deadline = Deadline(self.config.engine.turn_timeout_s if turn.deadline_s is None else turn.deadline_s)
        token = ConversationToken.parse(turn.conversation_id) if turn.conversation_id else None
        head = self._conversations.head(token) if token is not None else self._conversations.open(turn)
        asking = RoutedTurn(self._means, turn, head, deadline)
        await self._take_over(turn, head, deadline)
        self._turns[turn.turn_id] = asking
        is_named = bool(turn.conversation_id)  # whether the client can name the conversation
        try:
            await asking.lock()
            if token is None:
                asking.begin()
            else:
                head.catch_up(token)
                enough = head.known or head.num_turns and head.worker and turn.media_id
                if not enough or turn.replay is not None or head.last_turn_id == turn.turn_id:
                    await asking.resolve()
                elif not head.known:
                    asking.suppose()
            head.check(turn)
            async with aclosing(asking.events()) as events:
                async for event in events:
                    is_named = True
                    yield event
        finally:
            asking.let_go()
            deadline.cancel()
            if not is_named and head.worker:
                self._fleet.later(self._close_unnamed(head), "closing a conversation", turn_id=turn.turn_id)
            if self._turns.get(turn.turn_id) is asking:
                del self._turns[turn.turn_id]
            if not head.known or not head.num_turns and not head.worker:
                self._conversations.forget(head.base)

    async def _take_over(self, turn: Turn, head: ConversationState, deadline: Deadline) -> None:
        """End a turn with this id that may still run for a client that is gone. Raises BadRequest: its client is not."""
        former = self._turns.get(turn.turn_id)
        if former is not None:
            if not turn.conversation_id or former.head is not head:
                raise BadRequest(f"turn_id {turn.turn_id!r} is already in use")
            former.end(Cancelled(f"turn {turn.turn_id} was taken up again"))
            await self._abort_at([former.worker] if former.worker else [], turn.turn_id, deadline)
            former.let_go()
        elif turn.replay is not None:
            decodes = await self._fleet.workers("decode", deadline)
            await self._abort_at([one.worker for one in decodes], turn.turn_id, deadline)
        elif not head.known and head.worker:  # another router's conversation: the turn may be taken up before a word was heard
            await self._abort_at([head.worker], turn.turn_id, deadline)

    async def _abort_at(self, workers: list[str], turn_id: str, deadline: Deadline) -> bool:
        """Whether any of these workers ran the turn. Those that do not answer soon have lost it."""
        within_s = min(TAKEOVER_S, self.config.router.call_timeout_s, deadline.remaining_s(f"turn {turn_id}"))
        calls = (self._fleet.pools["decode"].call(worker, "abort", turn_id, within_s=within_s) for worker in workers)
        return any(answer is True for answer in await asyncio.gather(*calls, return_exceptions=True))

    async def abort(self, turn_id: str) -> bool:
        """End a turn; its conversation stays as it was before it. False if it is unknown or over."""
        self._check_open()
        deadline = self._short_call()
        asking = self._turns.get(turn_id)
        if asking is None:
            decodes = await self._fleet.workers("decode", deadline)
            return await self._abort_at([one.worker for one in decodes], turn_id, deadline)
        worker = asking.worker
        if worker is None:  # waiting, or between two workers
            asking.end(Cancelled(f"turn {turn_id} was aborted"))
            return True
        return await self._abort_at([worker], turn_id, deadline)

    async def close_conversation(self, conversation_id: str) -> bool:
        """Abort its turns and free its KV and its text. False if it is unknown."""
        self._check_open()
        try:
            token = ConversationToken.parse(conversation_id)
        except NotFound:
            return False
        head = self._conversations.find(token)
        self._conversations.forget(token.base)
        deadline, fleet = self._short_call(), self._fleet
        present = {one.worker for one in await fleet.workers("decode", deadline)}
        workers = {token.worker, head.worker if head is not None else ""} - {""}
        calls = (self._close_at(worker, token.base, worker in present, deadline) for worker in workers)
        closed = await asyncio.gather(*calls, fleet.registry.tell("forget_conversation", token.base), return_exceptions=True)
        return any(answer is True for answer in closed)

    async def _close_unnamed(self, head: ConversationState) -> None:
        """Nobody was told of a conversation that a worker has begun: it is over before it was asked for."""
        self._conversations.forget(head.base)
        await self._close_at(head.worker, head.base, True, self._short_call())
        await self._fleet.registry.tell("forget_conversation", head.base)

    async def _close_at(self, worker: str, base: str, present: bool, deadline: Deadline) -> bool:
        """Whether a worker had the conversation. One that is out of reach is told when it reports again."""
        try:
            if present:
                return bool(await self._fleet.call("decode", worker, "close_conversation", base, deadline=deadline))
        except Unavailable as error:
            log.info("a conversation was not closed at %s: %s", worker, error)
        await self._fleet.registry.tell("leave", base, worker)
        return False

    # ---- the cluster -------------------------------------------------------------------------------------------------------

    async def set_brownout(self, level: float) -> None:
        """Turns that start from now on, at any decode worker, attend to less; 0 undoes it.

        Raises:
            BadRequest: a level outside [0, 1]. Unavailable: a worker did not hear it.
        """
        self._check_open()
        check_brownout(level)
        deadline = self._short_call()
        decodes = await self._fleet.workers("decode", deadline)
        await asyncio.gather(*(self._fleet.call("decode", one.worker, "set_brownout", level, deadline=deadline) for one in decodes))

    async def ready(self) -> bool:
        """Whether both pools have a worker that reports and did not fail just now. Never raises."""
        if self._closed:
            return False
        try:
            snapshot = await self._fleet.registry.snapshot(self._short_call())
        except SparseVilaError:
            return False
        cooling = self._fleet.scene().cooling
        kinds: tuple[Kind, ...] = ("prefill", "decode")
        return all(any(one.worker not in cooling for one in snapshot.of(kind)) for kind in kinds)

    async def info(self) -> dict[str, Any]:
        """Pools, media, lanes and load, as plain JSON data. Raises Unavailable: the registry does not answer."""
        self._check_open()
        deadline = self._short_call()
        registry = self._fleet.registry
        snapshot, census = await asyncio.gather(registry.snapshot(deadline), registry.census(deadline))
        told = await asyncio.gather(*(self._info_of(one, deadline) for one in snapshot.workers))
        lanes = [{"worker": one["worker"], **lane} for one in told for lane in one["info"].pop("lanes", ())]
        media = []
        for one in census:
            facts = {name: getattr(one.handle, name) for name in ("media_id", "kind", "visual_tokens_kept", "kv_bytes")}
            media.append({**facts, "holders": list(one.holders), "copies": list(one.copies)})
        return {
            "name": self.config.name,
            "model": self.config.engine.model,
            "pools": {kind: [one for one in told if one["pool"] == kind] for kind in ("prefill", "decode")},
            "media": media,
            "conversations": snapshot.num_conversations,
            "lanes": lanes,
            "router": {
                "name": self.name,
                "turns": len(self._turns),
                "conversations": len(self._conversations),
                "replicas_made": self._means.replication.num_replicas,
                "errands": len(self._fleet.errands),
                "cooling": sorted(self._fleet.scene().cooling),
            },
        }

    async def _info_of(self, one: WorkerReport, deadline: Deadline) -> dict[str, Any]:
        facts = {"worker": one.worker, "pool": one.pool, "node": one.node, "load": asdict(one.load)}
        try:
            return {**facts, "info": dict(await self._fleet.call(one.pool, one.worker, "info", deadline=deadline))}
        except SparseVilaError as error:
            return {**facts, "info": {"error": str(error)}}

    def _short_call(self) -> Deadline:
        """Somebody who waits for a call that should take milliseconds, or as long as the registry takes to come back."""
        return Deadline(2 * self.config.router.call_timeout_s)

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("the router is closed")

    async def close(self) -> None:
        """End what it does in the background. Workers live on. Idempotent."""
        self._closed = True
        for asking in list(self._turns.values()):
            asking.end(Unavailable("the router is closing"))
        await self._fleet.errands.settle(self.config.router.call_timeout_s)


def _repeatable(turn: Turn) -> Turn:
    """The turn with a seed if it samples without one: whoever takes it up elsewhere, by its id, goes on with the same draws."""
    if turn.sampling.temperature == 0.0 or turn.sampling.seed is not None:
        return turn
    digest = hashlib.blake2b(turn.turn_id.encode(), digest_size=8).digest()
    return replace(turn, sampling=replace(turn.sampling, seed=int.from_bytes(digest) >> 1))
