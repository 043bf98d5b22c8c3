"""What the two ends of a lane tell each other, in order, each message numbered and checked."""

from __future__ import annotations

import threading
import zlib
from dataclasses import dataclass
from typing import Any

import msgpack

from sparsevila_cluster.core.errors import LaneLost
from sparsevila_cluster.transport.link import Link

# Name -> its fields: what it means.
MESSAGES = {
    # sender -> receiver
    "hello": "lane, worker, epoch, token, version: the first message",
    "offer": "transfer, key, attempt, manifest: may this prefix come?",
    "chunk": "transfer, index: the next bulk tensors are this chunk",
    "sum": "transfer, index, checksum: of that chunk, computed while it was on its way",
    "commit": "transfer: all chunks were sent",
    "abort": "transfer, reason: no more chunks of it come; always answered with `ended`",
    # receiver -> sender
    "welcome": "the lane is up",
    "grant": "transfer, upto, landed: chunks [0, upto) may be sent, [0, landed) have been received and verified",
    "refused": "transfer, failure: it will not be published; answered with `abort`",
    "ended": "transfer: everything that was on its way has arrived, and its extent is free",
    "acked": "transfer: published",
    # both
    "beat": "transfers: a heartbeat, with what this side still works on",
    "bye": "failure or None: this side closes the lane",
}


@dataclass(frozen=True)
class Message:
    """A name of MESSAGES and its fields."""

    name: str
    body: dict[str, Any]


class Channel:
    """Messages over a link. `send` from any thread, `receive` from one."""

    def __init__(self, link: Link):
        self.link = link
        self._lock = threading.Lock()
        self._num_sent = 0
        self._num_received = 0

    def send(self, name: str, **body: Any) -> None:
        """Raises LaneLost."""
        assert name in MESSAGES, name
        with self._lock:
            packed = msgpack.packb([self._num_sent, name, body])
            self._num_sent += 1
            self.link.send(zlib.crc32(packed).to_bytes(4, "little") + packed)

    def receive(self, within_s: float) -> Message:
        """Raises LaneLost: nothing came, the link broke, or a message is damaged or not the next one."""
        raw = self.link.receive(within_s)
        if len(raw) < 4 or zlib.crc32(raw[4:]) != int.from_bytes(raw[:4], "little"):
            raise LaneLost(f"received a damaged message of {len(raw)} bytes")
        number, name, body = msgpack.unpackb(raw[4:])
        if number != self._num_received:
            raise LaneLost(f"received message {number} ({name}), expected {self._num_received}")
        if name not in MESSAGES:
            raise LaneLost(f"received an unknown message {name!r}")
        self._num_received += 1
        return Message(name, body)
