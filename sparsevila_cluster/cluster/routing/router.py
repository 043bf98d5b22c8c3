"""The cluster behind the `Pipeline` protocol: what the gateway calls in a router replica.

Any number of routers serve the same workers: what one of them remembers saves calls, and another one finds it again.

    prepare:  MediaPreparer (name it, look for it) -> PrefixProvisioner (reserve, then ship a copy or make it)
    ask:      RoutedTurn (its conversation's worker, or another one)
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sparsevila_cluster.cluster.messages import PoolName, WorkerReport
from sparsevila_cluster.cluster.routing.claims import Claims
from sparsevila_cluster.cluster.routing.conversation_table import ConversationTable, ConversationToken
from sparsevila_cluster.cluster.routing.media_preparer import MediaPreparer
from sparsevila_cluster.cluster.routing.prefix_provisioner import PrefixProvisioner
from sparsevila_cluster.cluster.routing.replication import PrefixReplicator
from sparsevila_cluster.cluster.routing.routed_turn import RoutedTurn, RouterParts
from sparsevila_cluster.cluster.routing.visits import Visits
from sparsevila_cluster.cluster.routing.worker_clients import WorkerClients
from sparsevila_cluster.cluster.worker_pool import WorkerPool
from sparsevila_cluster.core.cluster_config import ClusterConfig
from sparsevila_cluster.core.deadline import Deadline, wait_within
from sparsevila_cluster.core.errors import NotFound, SparseVilaError, Unavailable, WorkerLost
from sparsevila_cluster.core.fair_sharing import OwnerPlaces
from sparsevila_cluster.core.metrics import MetricsSink
from sparsevila_cluster.core.requests import MediaHandle, PrepareRequest, Turn, TurnEvent, check_brownout
from sparsevila_cluster.core.tenancy import may_use

if TYPE_CHECKING:
    from sparsevila_cluster.core.protocols import Progress

log = logging.getLogger(__name__)

POOLS: tuple[PoolName, ...] = ("prefill", "decode")


class ClusterPipeline:
    """One router. `name`: the owner of its claims. Create and use it within one event loop."""

    def __init__(
        self,
        config: ClusterConfig,
        prefill: WorkerPool,
        decode: WorkerPool,
        directory: WorkerPool,
        sink: MetricsSink,
        name: str = "router",
    ):
        self.config = config
        self.name = name
        self._clients = WorkerClients(config, prefill, decode, directory)
        claims = Claims(self._clients, name)
        visits = Visits(self._clients, claims)
        provisioner = PrefixProvisioner(self._clients, claims, visits)
        self._preparer = MediaPreparer(self._clients, provisioner, visits, sink)
        self._replicator = PrefixReplicator(self._clients, provisioner)
        self._conversations = ConversationTable(config.router.max_conversations, config.door.max_share)
        self._places = OwnerPlaces(*_turns_per_owner(config))
        self._parts = RouterParts(
            self._clients, visits, self._conversations, provisioner, self._preparer, self._replicator, self._places, sink
        )
        self._turns: dict[str, RoutedTurn] = {}
        self._closed = False

    # ---- media -------------------------------------------------------------------------------------------------------------

    async def prepare(self, request: PrepareRequest, progress: Progress | None = None) -> MediaHandle:
        """Find the prefix by content key, ship a copy of it, or have it made. Cancelling it frees what was reserved for it.

        Raises:
            BadMedia, BadRequest, TooLarge: media that cannot be used. QueueFull: no room. Unavailable, LaneLost, DataLoss,
            Incompatible: no worker could, in `max_attempts`. DeadlineExceeded. PoisonRequest: two workers died of it.
        """
        self._check_open()
        deadline_s = self.config.engine.prepare_timeout_s if request.deadline_s is None else request.deadline_s
        deadline = Deadline(deadline_s)
        try:
            return await wait_within(self._preparer.prepare(request, progress, deadline), deadline_s, "preparing media")
        finally:
            deadline.cancel()

    async def media(self, media_id: str, tenant: str = "") -> MediaHandle:
        """What is known of a prefix that is resident, or of which a copy is kept. Raises NotFound, also for another tenant's."""
        self._check_open()
        found = await self._clients.directory.locate(media_id, self._short_call())
        if found.handle is None or not may_use(found.handle.tenant, tenant):
            raise NotFound(f"media {media_id!r} is not resident; prepare it first")
        return found.handle.as_reused()

    async def find_media(self, request: PrepareRequest) -> MediaHandle | None:
        """What is known of the prefix that a request asks for, None if it is at no decode worker. Raises as `prepare`."""
        self._check_open()
        deadline_s = self.config.engine.prepare_timeout_s if request.deadline_s is None else request.deadline_s
        return await wait_within(self._preparer.find(request, Deadline(deadline_s)), deadline_s, "looking for media")

    async def delete_media(self, media_id: str, tenant: str = "") -> bool:
        """Drop a prefix and its copies everywhere. False if it is unknown, another tenant's, or a turn is using it.

        Raises:
            Unavailable: the directory or a worker that has it does not answer.
        """
        self._check_open()
        deadline, directory = self._short_call(), self._clients.directory
        found = await directory.find(None, media_id, deadline)
        if found.handle is None or not may_use(found.handle.tenant, tenant):
            return False
        if any(turn.uses(media_id) for turn in self._turns.values()):
            return False
        self._preparer.forget(media_id)
        # Copies go last: while a decode worker keeps the prefix for a turn, that turn may still need one.
        for workers in (found.holders, found.copies):
            if not all(await asyncio.gather(*(self._drop(one, media_id, deadline) for one in workers))):
                return False
        directory.forget_media(media_id)
        await directory.once().drop_media(media_id)
        return True

    async def _drop(self, one: WorkerReport, media_id: str, deadline: Deadline) -> bool:
        """Whether a worker has not got the prefix any more."""
        worker = self._clients.at(one, deadline)
        try:
            if await worker.drop(media_id):
                return True
            # In use, or evicted since it was reported.
            info = await worker.info()
        except WorkerLost:
            return True
        return media_id not in info["residents" if one.pool == "decode" else "copies"]

    # ---- turns -------------------------------------------------------------------------------------------------------------

    async def ask(self, turn: Turn) -> AsyncGenerator[TurnEvent, None]:
        """The events of a turn, `done` last. An empty `conversation_id` begins a conversation; a `replay`, or the id of a turn that
        the conversation had last, takes up a turn whose stream was lost.

        Raises:
            UserError (BadRequest, TooLarge, NotFound), QueueFull, DeadlineExceeded, Cancelled, Internal, Unavailable.
            PoisonRequest: two workers died with this question about this media in hand.
        """
        self._check_open()
        routed = RoutedTurn(self._parts, turn, self._turns.get(turn.turn_id))
        self._turns[turn.turn_id] = routed
        try:
            async with aclosing(routed.events()) as events:
                async for event in events:
                    yield event
        finally:
            if self._turns.get(turn.turn_id) is routed:
                del self._turns[turn.turn_id]

    async def abort(self, turn_id: str) -> bool:
        """End a turn; its conversation stays as it was before it. False if it is unknown or over."""
        self._check_open()
        deadline = self._short_call()
        if turn_id in self._turns:
            return await self._turns[turn_id].abort(deadline)
        decodes = await self._clients.workers("decode", deadline)
        return await self._clients.abort_turn(turn_id, [one.worker for one in decodes], deadline)

    async def close_conversation(self, conversation_id: str, tenant: str = "") -> bool:
        """Abort its turns and free its KV and its text. False if it is unknown, or another tenant's."""
        self._check_open()
        try:
            token = ConversationToken.parse(conversation_id)
        except NotFound:
            return False
        deadline, clients = self._short_call(), self._clients
        known, journal = self._conversations.find(token, tenant), await clients.directory.journal(token.base, deadline)
        if journal is not None and not may_use(journal.tenant, tenant):
            return False
        self._conversations.forget(token.base, tenant)
        present = {one.worker for one in await clients.workers("decode", deadline)}
        # Of one that nobody here knows, a worker that is out of reach is not told: it may be another tenant's.
        is_known = journal is not None or known is not None and known.known
        named = {token.worker, known.worker if known is not None else ""} - {""}
        workers = named if is_known else named & present
        calls = (clients.close_conversation(token.base, worker, tenant, worker in present, deadline) for worker in workers)
        forgetting = [clients.directory.once().forget_conversation(token.base)] if is_known else []
        closed = await asyncio.gather(*calls, *forgetting, return_exceptions=True)
        return any(answer is True for answer in closed)

    # ---- the cluster -------------------------------------------------------------------------------------------------------

    async def set_brownout(self, level: float) -> None:
        """Turns that start from now on, at any decode worker, attend to less; 0 undoes it.

        Raises:
            BadRequest: a level outside [0, 1]. Unavailable: a worker was not told.
        """
        self._check_open()
        check_brownout(level)
        deadline = self._short_call()
        decodes = await self._clients.workers("decode", deadline)
        await asyncio.gather(*(self._clients.decode(one.worker, deadline).set_brownout(level) for one in decodes))

    async def ready(self) -> bool:
        """Whether both pools have a worker that reports and did not fail just now. Never raises."""
        if self._closed:
            return False
        try:
            snapshot = await self._clients.directory.snapshot(self._short_call())
        except SparseVilaError:
            return False
        cooling_down = self._clients.breaker.cooling_down(time.monotonic())
        return all(any(one.worker not in cooling_down for one in snapshot.of(pool)) for pool in POOLS)

    async def exchange_owners(self, owners: frozenset[str]) -> frozenset[str]:
        """See `Pipeline`. Turns make room for them too. Raises WorkerLost, DeadlineExceeded: the directory does not answer."""
        self._check_open()
        elsewhere = await self._clients.directory.once().exchange_owners(self.name, owners)
        self._places.recent.note(elsewhere)
        return elsewhere

    async def info(self) -> dict[str, Any]:
        """Pools, media, lanes and load, as plain JSON data. Raises Unavailable: the directory does not answer."""
        self._check_open()
        deadline = self._short_call()
        directory = self._clients.directory
        snapshot, located = await asyncio.gather(directory.snapshot(deadline), directory.list_media(deadline))
        workers = await asyncio.gather(*(self._info_of(one, deadline) for one in snapshot.workers))
        lanes = [{"worker": one["worker"], **lane} for one in workers for lane in one["info"].pop("lanes", ())]
        media = []
        for one in located:
            facts = {name: getattr(one.handle, name) for name in ("media_id", "kind", "visual_tokens_kept", "kv_bytes")}
            media.append({**facts, "holders": list(one.holders), "copies": list(one.copies)})
        return {
            "name": self.config.name,
            "model": self.config.engine.model,
            "pools": {pool: [one for one in workers if one["pool"] == pool] for pool in POOLS},
            "media": media,
            "conversations": snapshot.num_conversations,
            "lanes": lanes,
            "router": {
                "name": self.name,
                "turns": len(self._turns),
                "turns_waiting": self._places.num_waiting,
                "conversations": len(self._conversations),
                "replicas_made": self._replicator.num_replicas,
                "background_tasks": len(self._clients.background),
                "cooling_down": sorted(self._clients.breaker.cooling_down(time.monotonic())),
                "suspected_requests": self._clients.suspects.num_suspects,
                "refused_requests": self._clients.suspects.num_refused,
            },
        }

    async def tenant_info(self, tenant: str) -> dict[str, Any]:
        """As `Pipeline` says. Raises Unavailable: the directory does not answer."""
        self._check_open()
        own = await self._clients.directory.tenant_counts(tenant, self._short_call())
        counts = {"media": own.num_media, "media_bytes": own.media_bytes, "conversations": own.num_conversations}
        return {"model": self.config.engine.model, **counts}

    async def _info_of(self, one: WorkerReport, deadline: Deadline) -> dict[str, Any]:
        facts = {"worker": one.worker, "pool": one.pool, "node": one.node, "load": asdict(one.load)}
        try:
            return {**facts, "info": dict(await self._clients.at(one, deadline).info())}
        except SparseVilaError as error:
            return {**facts, "info": {"error": str(error)}}

    def _short_call(self) -> Deadline:
        """For a call that should take milliseconds, or as long as the directory takes to come back."""
        return Deadline(2 * self.config.router.call_timeout_s)

    def _check_open(self) -> None:
        if self._closed:
            raise Unavailable("the router is closed")

    async def close(self) -> None:
        """End what it does in the background. Workers live on. Idempotent."""
        self._closed = True
        for turn in list(self._turns.values()):
            turn.end(Unavailable("the router is closing"))
        await self._clients.background.settle(self.config.router.call_timeout_s)


def _turns_per_owner(config: ClusterConfig) -> tuple[int, int]:
    """Of one owner at a time: alone, and while others have turns. See `router.max_turns_per_owner`."""
    num_waiting = config.engine.max_waiting if config.decode.brownout_at < 1 else 0
    alone = config.router.max_turns_per_owner or config.decode.replicas * (config.engine.max_batch + num_waiting)
    return alone, max(1, int(alone * config.engine.max_share) // max(1, config.router.replicas))
