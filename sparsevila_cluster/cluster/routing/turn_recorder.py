"""Finished turns on their way into the registry, in order, at once or late.

Knows: that the registry may be away, that a turn must not wait for it, and that each record needs those before it. Does not know:
what was said, or what records are for.
"""

from __future__ import annotations

import asyncio
import logging

from sparsevila_cluster.cluster.routing.conversation_table import ConversationState
from sparsevila_cluster.cluster.routing.worker_clients import WorkerClients
from sparsevila_cluster.core.deadline import Deadline, wait_within
from sparsevila_cluster.core.errors import DeadlineExceeded, SparseVilaError, Unavailable, WorkerLost
from sparsevila_cluster.core.requests import TurnRecord

log = logging.getLogger(__name__)

# Writing down a finished turn is not worth more of a client's time: the decode worker keeps it too.
WITHIN_S = 1.0
LATE_S = 120.0
MAX_UNRECORDED = 64


async def write_down(fleet: WorkerClients, head: ConversationState, number: int, record: TurnRecord, deadline: Deadline) -> None:
    """Turn `number` of a conversation is over. What the registry does not take within WITHIN_S is told later, in the background."""
    turn_id = record.turn.turn_id
    head.unrecorded.append((number, record))
    del head.unrecorded[:-MAX_UNRECORDED]
    try:
        if fleet.registry.away:
            raise WorkerLost("the registry was away just now")
        within_s = min(WITHIN_S, deadline.remaining_s("recording a turn"))
        await wait_within(_tell(fleet, head), within_s, "recording a turn")
    except SparseVilaError as error:
        log.warning("a turn is not in the registry yet: %s", error, extra={"turn_id": turn_id})
        if not head.late:
            head.late = True
            fleet.later(_tell_late(fleet, head), "recording turns", turn_id=turn_id)


async def _tell(fleet: WorkerClients, head: ConversationState) -> None:
    async with head.recording:
        while head.unrecorded:
            first = head.unrecorded[0]
            if not await fleet.registry.record(head.base, head.media_id, *first, WITHIN_S):
                raise Unavailable("the registry has not heard of the turns before it yet")
            if head.unrecorded and head.unrecorded[0] is first:
                del head.unrecorded[0]


async def _tell_late(fleet: WorkerClients, head: ConversationState) -> None:
    deadline, pause_s = Deadline(LATE_S), 0.1
    try:
        while head.unrecorded:
            await asyncio.sleep(min(pause_s, deadline.remaining_s("recording turns")))
            pause_s = min(2 * pause_s, 1.0)
            try:
                await _tell(fleet, head)
            except (Unavailable, DeadlineExceeded) as error:
                log.info("the registry is still away: %s", error)
    finally:
        head.late = False
