"""What the two ends of a lane say to each other, in order, each message numbered and checked.

Knows: the form of a message and the table of all of them. Does not know: what follows from one.
"""

from __future__ import annotations

import threading
import zlib
from dataclasses import dataclass
from typing import Any

import msgpack

from sparsevila_cluster.core.errors import LaneLost
from sparsevila_cluster.transport.link import Link

# Name -> what it says.
MESSAGES = {
    # dialer -> dock
    "hello": "lane, worker, epoch, token, version: the first message",
    "offer": "transfer, key, attempt, manifest: may this prefix come?",
    "chunk": "transfer, index: the next bulk tensors are this chunk",
    "sum": "transfer, index, checksum: of that chunk, reckoned while it was on its way",
    "commit": "transfer: all chunks were sent",
    "abort": "transfer, reason: no more chunks of it come; always answered with `ended`",
    # dock -> dialer
    "welcome": "the lane stands",
    "grant": "transfer, upto, landed: chunks [0, upto) may be sent, [0, landed) have been verified",
    "refused": "transfer, failure: it will not be published; answered with `abort`",
    "ended": "transfer: everything that was on its way has landed, and its extent is free",
    "acked": "transfer: published",
    # both
    "beat": "transfers: what this side still works on",
    "bye": "failure or None: this side closes the lane",
}


@dataclass(frozen=True)
class Message:
    name: str
    body: dict[str, Any]


class Channel:
    """Messages over a link. `say` from any thread, `hear` from one."""

    def __init__(self, link: Link):
        self.link = link
        self._lock = threading.Lock()
        self._num_said = 0
        self._num_heard = 0

    def say(self, name: str, **body: Any) -> None:
        """Raises LaneLost."""
        assert name in MESSAGES, name
        with self._lock:
            packed = msgpack.packb([self._num_said, name, body])
            self._num_said += 1
            self.link.send(zlib.crc32(packed).to_bytes(4, "little") + packed)

    def hear(self, within_s: float) -> Message:
        """Raises LaneLost: silence, a broken link, or a message that is damaged or not the next one."""
        raw = self.link.receive(within_s)
        if len(raw) < 4 or zlib.crc32(raw[4:]) != int.from_bytes(raw[:4], "little"):
            raise LaneLost(f"a damaged message of {len(raw)} bytes")
        number, name, body = msgpack.unpackb(raw[4:])
        if number != self._num_heard:
            raise LaneLost(f"message {number} ({name}) came where {self._num_heard} was due")
        if name not in MESSAGES:
            raise LaneLost(f"an unknown message {name!r}")
        self._num_heard += 1
        return Message(name, body)
