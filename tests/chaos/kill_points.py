"""Where a worker is killed or stopped: places in the life of a transfer and of a turn, and a trap that springs exactly there.

A trap is set in every worker of a pool; the first one that comes by takes the token and sends itself the signal, from the very
thread, so that nothing of the process runs on.
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

RECEIVE_LANE = "sparsevila_cluster.transport.receive_lane:ReceiveLane."
SEND_LANE = "sparsevila_cluster.transport.send_lane:SendLane."
SENDER = "sparsevila_cluster.transport.kv_sender:KVSender."
PREFIX_SINK = "sparsevila_cluster.cluster.workers.engine_prefix_sink:EnginePrefixSink."
TURN_SERVICE = "sparsevila_cluster.cluster.workers.turn_service:TurnService."
RUNNING = "sparsevila_cluster.engine.turn:RunningTurn."

Test = Callable[..., bool]  # (mark, *the method's arguments)


@dataclass(frozen=True)
class Place:
    """A call of a method. `only`: which of its calls count; `nth` of those, from 0."""

    method: str
    side: Literal["before", "after"]
    only: Test
    nth: int = 0


def _receiving(which: Callable[[int], int]) -> Test:
    def only(mark: str, lane: Any, incoming: Any, index: int, *_: Any) -> bool:
        return incoming.manifest.metadata.key == mark and index == which(len(incoming.manifest.chunks))

    return only


def _sending(which: Callable[[int], int], sent: int) -> Test:
    """The call that sends chunk `which`, when it has sent `sent` of it."""

    def only(mark: str, lane: Any, connection: Any, attempt: Any) -> bool:
        return attempt.manifest.metadata.key == mark and attempt.sent == which(len(attempt.manifest.chunks)) + sent

    return only


def _event(kind: str, index: int | None = None) -> Test:
    def only(mark: str, service: Any, engine: Any, pending: Any, sink: Any, event: Any) -> bool:
        here = pending.turn.turn_id == mark and getattr(event, "kind", "") == kind
        return here and index in (None, event.index)

    return only


def first(num: int) -> int:
    return 0


def middle(num: int) -> int:
    return num // 2


def last(num: int) -> int:
    return num - 1


def _outgoing(mark: str, sender: Any, transfer: Any, *_: Any) -> bool:
    return transfer.prefix.key == mark


def _incoming(mark: str, lane: Any, incoming: Any) -> bool:
    return incoming.manifest.metadata.key == mark


def _manifest(mark: str, prefix_sink: Any, manifest: Any, extent: Any) -> bool:
    return manifest.metadata.key == mark


# mark: the content key.
DECODE_TRANSFER = {
    "reserved": Place(
        "sparsevila_cluster.transport.kv_receiver:KVReceiver.expect", "after", lambda mark, receiver, _, key, __: key == mark
    ),
    "granted": Place(RECEIVE_LANE + "_allocate", "after", _incoming),
    "first chunk": Place(RECEIVE_LANE + "_take_chunk", "before", _receiving(first)),
    "middle chunk": Place(RECEIVE_LANE + "_take_chunk", "before", _receiving(middle)),
    "last chunk": Place(RECEIVE_LANE + "_take_chunk", "before", _receiving(last)),
    "received": Place(PREFIX_SINK + "publish", "before", _manifest),
    "verified": Place(PREFIX_SINK + "publish", "after", _manifest),
    "acked": Place(RECEIVE_LANE + "_commit", "after", _incoming),
}
PREFILL_TRANSFER = {
    "reserved": Place(
        "sparsevila_cluster.cluster.workers.prefill_job:PrefillJob.run", "before", lambda mark, job, _: job.key == mark
    ),
    "granted": Place(SEND_LANE + "_send", "before", _sending(first, 0)),
    "first chunk": Place(SEND_LANE + "_send", "after", _sending(first, 0)),
    "middle chunk": Place(SEND_LANE + "_send", "after", _sending(middle, 0)),
    "last chunk": Place(SEND_LANE + "_send", "after", _sending(last, 0)),
    "received": Place(
        "sparsevila_cluster.transport.channel:Channel.send", "after", lambda mark, channel, name, **_: name == "commit"
    ),
    "verified": Place(SENDER + "acked", "before", _outgoing),
    "acked": Place(SENDER + "acked", "after", _outgoing),
}
# mark: the turn's id.
LATER = 6
DECODE_TURN = {
    "in line": Place(
        "sparsevila_cluster.engine.decode_engine:DecodeEngine.submit", "after", lambda mark, engine, turn, *_: turn.turn_id == mark
    ),
    "question": Place(
        RUNNING + "segment", "after", lambda mark, running, *_: running.turn.turn_id == mark and running.phase == "question"
    ),
    "retrieve": Place(RUNNING + "retrieve", "before", lambda mark, running: running.turn.turn_id == mark),
    "first token": Place(TURN_SERVICE + "_on_event", "before", _event("token", 0)),
    "second token": Place(TURN_SERVICE + "_on_event", "before", _event("token", 1)),
    "later token": Place(TURN_SERVICE + "_on_event", "before", _event("token", LATER)),
    "committed": Place(TURN_SERVICE + "_on_event", "before", _event("done")),
    "recorded": Place(
        "sparsevila_cluster.cluster.workers.conversation_journals:ConversationJournals.add",
        "after",
        lambda mark, journals, number, record: record.turn.turn_id == mark,
    ),
}
PLACES: dict[tuple[str, str], Place] = {
    **{("prefill", f"transfer: {name}"): place for name, place in PREFILL_TRANSFER.items()},
    **{("decode", f"transfer: {name}"): place for name, place in DECODE_TRANSFER.items()},
    **{("decode", f"turn: {name}"): place for name, place in DECODE_TURN.items()},
}


def set_trap(worker: str, place: Place, number: int, mark: str, token: str) -> Callable[[], None]:
    """Have this process get signal `number` at a place, unless `token` (a file) is taken already. Returns how to take it away."""
    module_name, path = place.method.split(":")
    class_name, method = path.split(".")
    owner: Any = getattr(importlib.import_module(module_name), class_name)
    original = getattr(owner, method)
    lock, seen = threading.Lock(), 0

    def springs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        nonlocal seen
        if not place.only(mark, *args, **kwargs):
            return False
        with lock:
            seen += 1
            return seen == place.nth + 1

    @functools.wraps(original)
    def trapped(*args: Any, **kwargs: Any) -> Any:
        hit = springs(args, kwargs)
        if hit and place.side == "before":
            spring(worker, token, number)
        result = original(*args, **kwargs)
        if hit and place.side == "after":
            spring(worker, token, number)
        return result

    setattr(owner, method, trapped)
    return lambda: setattr(owner, method, original)


def spring(worker: str, token: str, number: int) -> None:
    try:
        file = os.open(token, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return
    os.write(file, worker.encode())
    os.close(file)
    # To this thread: a signal to the process may let it go on for a moment.
    signal.pthread_kill(threading.get_ident(), number)
