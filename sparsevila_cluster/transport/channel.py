"""What the two ends of a lane tell each other, in order, each message numbered and checked."""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgpack

from sparsevila_cluster.core.errors import LaneLost, to_failure
from sparsevila_cluster.transport.link import MAX_MESSAGE_BYTES, Link

MAX_TEXT = 4096  # characters of an id, a reason, a failure
MAX_ITEMS = 4096  # of a list or a map

Check = Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_bytes(value: Any) -> bool:
    return isinstance(value, bytes)


def _is_failure(value: Any) -> bool:
    """What `core.errors.to_failure` makes."""
    if not isinstance(value, dict) or not _is_text(value.get("error")) or not _is_text(value.get("message")):
        return False
    after_s = value.get("retry_after_s", 1.0)
    return type(after_s) in (int, float) and math.isfinite(after_s) and _is_text(value.get("worker", ""))


def _is_failure_or_none(value: Any) -> bool:
    return value is None or _is_failure(value)


# Name -> its fields. A message that lacks one of them, or has one of another type, breaks the lane; other fields are ignored.
MESSAGES: dict[str, dict[str, Check]] = {
    # sender -> receiver
    "hello": {"lane": _is_text, "worker": _is_text, "epoch": _is_count, "token": _is_text, "version": _is_count},  # comes first
    "offer": {"transfer": _is_text, "key": _is_text, "attempt": _is_count, "manifest": _is_bytes},  # may this prefix come?
    "chunk": {"transfer": _is_text, "index": _is_count},  # the next bulk tensors are this chunk
    "sum": {"transfer": _is_text, "index": _is_count, "checksum": _is_count},  # of that chunk, computed while it was on its way
    "commit": {"transfer": _is_text},  # all chunks were sent
    "abort": {"transfer": _is_text, "reason": _is_text},  # no more chunks of it come; always answered with `ended`
    # receiver -> sender
    "welcome": {},  # the lane is up
    # Chunks [0, upto) may be sent, [0, landed) have been received and verified.
    "grant": {"transfer": _is_text, "upto": _is_count, "landed": _is_count},
    "refused": {"transfer": _is_text, "failure": _is_failure},  # it will not be published; answered with `abort`
    "ended": {"transfer": _is_text},  # everything that was on its way has arrived, and its extent is free
    "acked": {"transfer": _is_text},  # published
    # both
    "beat": {"transfers": _is_texts},  # a heartbeat, with what this side still works on
    "bye": {"failure": _is_failure_or_none},  # this side closes the lane
}


@dataclass(frozen=True)
class Message:
    """A name of MESSAGES and its fields."""

    name: str
    body: dict[str, Any]


def failure_of(error: Exception) -> dict[str, Any]:
    """An error as a field of a message."""
    failure = to_failure(error)
    return {**failure, "message": failure["message"][:MAX_TEXT]}


class Channel:
    """Messages over a link. `send` from any thread, `receive` from one."""

    def __init__(self, link: Link):
        self.link = link
        self._lock = threading.Lock()
        self._num_sent = 0
        self._num_received = 0

    def send(self, name: str, **body: Any) -> None:
        """Raises LaneLost."""
        with self._lock:
            self._send(name, body)

    def send_now(self, name: str, **body: Any) -> bool:
        """Send it, unless that would wait for the peer or for another thread that sends; whether it left. Raises LaneLost."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            ready = self.link.can_send
            if ready:
                self._send(name, body)
            return ready
        finally:
            self._lock.release()

    def _send(self, name: str, body: dict[str, Any]) -> None:
        assert name in MESSAGES, name
        packed = msgpack.packb([self._num_sent, name, body])
        self._num_sent += 1
        self.link.send(zlib.crc32(packed).to_bytes(4, "little") + packed)

    def receive(self, within_s: float) -> Message:
        """Raises LaneLost: nothing came, the link broke, or a message is damaged, malformed, or not the next one."""
        raw = self.link.receive(within_s)
        if len(raw) < 4 or zlib.crc32(raw[4:]) != int.from_bytes(raw[:4], "little"):
            raise LaneLost(f"received a damaged message of {len(raw)} bytes")
        number, name, body = _unpack(raw[4:])
        if number != self._num_received:
            raise LaneLost(f"received message {number} ({name}), expected {self._num_received}")
        self._num_received += 1
        return Message(name, {field: body[field] for field in MESSAGES[name]})


def _unpack(packed: bytes) -> tuple[int, str, dict[str, Any]]:
    """Number, name and fields. Raises LaneLost."""
    try:
        message = msgpack.unpackb(packed, max_array_len=MAX_ITEMS, max_map_len=MAX_ITEMS, max_bin_len=MAX_MESSAGE_BYTES)
        number, name, body = message
    except (ValueError, TypeError, MemoryError) as error:
        raise LaneLost(f"received {len(packed)} bytes that are no message: {str(error)[:100]}") from error
    if not _is_count(number) or not isinstance(name, str) or name not in MESSAGES or not isinstance(body, dict):
        raise LaneLost(
            f"received an unknown message {name[:40]!r}" if isinstance(name, str) else "received a message without a name"
        )
    for field, is_right in MESSAGES[name].items():
        if field not in body or not is_right(body[field]):
            raise LaneLost(f"malformed {name!r}: {field} is missing, of another type or out of range")
    return number, name, body
