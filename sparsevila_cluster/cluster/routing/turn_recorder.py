"""Finished turns on their way into the directory, in order, at once or late: no turn waits long for a directory that is away."""

from __future__ import annotations

import asyncio
import logging

from sparsevila_cluster.cluster.routing.conversation_table import ConversationState
from sparsevila_cluster.cluster.routing.worker_clients import WorkerClients
from sparsevila_cluster.core.deadline import Deadline, wait_within
from sparsevila_cluster.core.errors import DeadlineExceeded, SparseVilaError, Unavailable, WorkerLost
from sparsevila_cluster.core.requests import TurnRecord

log = logging.getLogger(__name__)

# Recording a finished turn is not worth more of a client's time: the decode worker keeps it too.
WITHIN_S = 1.0
LATE_S = 120.0
MAX_UNRECORDED = 64


async def record_turn(
    clients: WorkerClients, conversation: ConversationState, number: int, record: TurnRecord, deadline: Deadline
) -> None:
    """Turn `number` of a conversation is over. A directory that does not take it within WITHIN_S gets it later."""
    turn_id = record.turn.turn_id
    conversation.unrecorded.append((number, record))
    del conversation.unrecorded[:-MAX_UNRECORDED]
    try:
        if clients.directory.away:
            raise WorkerLost("the directory did not answer just now")
        within_s = min(WITHIN_S, deadline.remaining_s("recording a turn"))
        await wait_within(_record(clients, conversation), within_s, "recording a turn")
    except SparseVilaError as error:
        log.warning("turn %s is not in the directory yet: %s", turn_id, error, extra={"turn_id": turn_id})
        if not conversation.late:
            conversation.late = True
            clients.in_background(_record_late(clients, conversation), "recording turns", turn_id=turn_id)


async def _record(clients: WorkerClients, conversation: ConversationState) -> None:
    async with conversation.recording:
        while conversation.unrecorded:
            first = conversation.unrecorded[0]
            if not await clients.directory.record(conversation.base, conversation.media_id, *first, WITHIN_S):
                raise Unavailable("the directory has not got the turns before it yet")
            if conversation.unrecorded and conversation.unrecorded[0] is first:
                del conversation.unrecorded[0]


async def _record_late(clients: WorkerClients, conversation: ConversationState) -> None:
    deadline, pause_s = Deadline(LATE_S), 0.1
    try:
        while conversation.unrecorded:
            await asyncio.sleep(min(pause_s, deadline.remaining_s("recording turns")))
            pause_s = min(2 * pause_s, 1.0)
            try:
                await _record(clients, conversation)
            except (Unavailable, DeadlineExceeded) as error:
                log.info("conversation %s is not recorded yet: %s", conversation.base, error)
    finally:
        conversation.late = False
