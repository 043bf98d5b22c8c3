"""Links over torch.distributed's gloo: a two-rank group of its own for every link.

Knows: how gloo behaves when a peer dies, stops or sends too much (measured; see below). Does not know: what is sent.

A receive stays posted for the next messages at all times, because it is the only operation that fails at once when the peer dies:
a bulk tensor that has begun to arrive stays silent until its own deadline. A wait that runs into its deadline closes the pair, so
a deadline is final; `close` uses exactly that. A tensor larger than the posted buffer would abort the whole process, so both sides
compute sizes alone, and messages are cut into frames. A group is never built twice on the same store.
"""

from __future__ import annotations

import struct
import threading
import time
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparsevila_cluster.cluster_config import TransportConfig
from sparsevila_cluster.errors import LaneLost
from sparsevila_cluster.transport.link import MAX_MESSAGE_BYTES, Accept, DockAddress, Handle
from sparsevila_cluster.transport.rendezvous import Door, PairStore, knock

FRAME_BYTES = 32 * 1024
NUM_POSTED = 4  # receives posted for messages
MAX_UNDER_WAY = 64  # frames sent that nobody has waited for
BULK_TAG, CLOSING_TAG, TAGS = 1000, 999, 2**20
HEAD = struct.Struct("<I?")  # bytes of a message in this frame, and whether more follow
FLUSH_S = 0.25  # what `close` grants to messages that are still leaving


class Works:
    """The handle of bulk: what torch gave for each tensor, and the tensors, which must live as long."""

    def __init__(self, works: Sequence[Any], parts: Sequence[Tensor]):
        self._works, self._parts = works, parts

    def wait(self, within_s: float) -> None:
        for work in self._works:
            _wait(work, within_s)


class GlooLink:
    """One end of a pair. rank 0 is the dock."""

    kind = "gloo"
    straight = True

    def __init__(self, group: Any, store: PairStore, rank: int, config: TransportConfig):
        self._group, self._store, self._peer = group, store, 1 - rank
        self._op_s = config.op_timeout_s
        self._lock = threading.Lock()
        self._closed = False
        self._sent: deque[tuple[Any, Tensor]] = deque()
        self._num_sent = self._num_posted = self._num_bulk = 0
        self._posted: deque[tuple[Any, Tensor]] = deque()
        for _ in range(NUM_POSTED):
            self._post()

    def device_for(self, device: torch.device) -> torch.device:
        return torch.device("cpu")

    def send(self, message: bytes) -> None:
        assert len(message) <= MAX_MESSAGE_BYTES, len(message)
        with self._lock:
            for start in range(0, len(message) or 1, FRAME_BYTES - HEAD.size):
                piece = message[start : start + FRAME_BYTES - HEAD.size]
                head = HEAD.pack(len(piece), start + len(piece) < len(message))
                frame = torch.frombuffer(bytearray(head + piece), dtype=torch.uint8)
                work = self._call("send", frame, self._num_sent % NUM_POSTED)
                self._num_sent += 1
                self._sent.append((work, frame))
                if len(self._sent) > MAX_UNDER_WAY:
                    _wait(self._sent.popleft()[0], self._op_s)

    def receive(self, within_s: float) -> bytes:
        message = b""
        while True:
            work, frame = self._posted.popleft()
            _wait(work, within_s)
            num, more = HEAD.unpack(bytes(frame[: HEAD.size].tolist()))
            if num > FRAME_BYTES - HEAD.size or len(message) + num > MAX_MESSAGE_BYTES:
                self.close()
                raise LaneLost(f"a frame of {num} bytes behind {len(message)}; a message may have {MAX_MESSAGE_BYTES}")
            message += frame.numpy()[HEAD.size : HEAD.size + num].tobytes()
            self._post()
            if not more:
                return message

    def ship(self, parts: Sequence[Tensor]) -> Handle:
        return Works([self._call("send", part, self._tag()) for part in parts], parts)

    def land(self, parts: Sequence[Tensor]) -> Handle:
        return Works([self._call("recv", part, self._tag()) for part in parts], parts)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            sent, self._sent = list(self._sent), deque()
        until_s = time.monotonic() + FLUSH_S
        try:
            for work, _ in sent:
                _wait(work, max(0.001, until_s - time.monotonic()))
            # Nothing ever comes with this tag: the wait runs out, and a wait that runs out closes the pair.
            _wait(self._group.recv([torch.empty(1, dtype=torch.uint8)], self._peer, CLOSING_TAG), 0.001)
        except (LaneLost, RuntimeError):
            pass
        self._store.close()

    def _post(self) -> None:
        frame = torch.empty(FRAME_BYTES, dtype=torch.uint8)
        self._posted.append((self._call("recv", frame, self._num_posted % NUM_POSTED), frame))
        self._num_posted += 1

    def _tag(self) -> int:
        self._num_bulk += 1
        return BULK_TAG + self._num_bulk % TAGS

    def _call(self, op: str, tensor: Tensor, tag: int) -> Any:
        if self._closed:
            raise LaneLost("the link is closed")
        try:
            return getattr(self._group, op)([tensor], self._peer, tag)
        except RuntimeError as error:
            raise LaneLost(brief(error)) from error


def _wait(work: Any, within_s: float) -> None:
    try:
        work.wait(to_timedelta(within_s))
    except RuntimeError as error:
        raise LaneLost(brief(error)) from error


def to_timedelta(seconds: float) -> timedelta:
    return timedelta(milliseconds=max(1, round(seconds * 1000)))


def brief(error: Exception) -> str:
    """What gloo says, without where in its sources it says it."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return text.rsplit("] ", 1)[-1].split(". This is typically")[0][:200]


class GlooListener:
    """Builds a group with everybody who comes through its door, and a link on it."""

    def __init__(self, token: str, config: TransportConfig, device: torch.device, accept: Accept):
        self._config, self._device, self._accept = config, device, accept
        host = "127.0.0.1" if config.host == "auto" else config.host
        self._door = Door(host, token, config.dial_timeout_s, self._build)
        self.host, self.port = self._door.host, self._door.port

    def close(self) -> None:
        self._door.close()

    def _build(self, hello: dict[str, Any], store: PairStore) -> None:
        self._accept(_link_of(hello["kind"], store, 0, self.host, self._config, self._device))


def dial_gloo(kind: str, address: DockAddress, config: TransportConfig, device: torch.device) -> GlooLink:
    """Raises LaneLost: nobody listens, or the dock does not come within config.dial_timeout_s."""
    store, here = knock(address, config.dial_timeout_s, kind=kind)
    return _link_of(kind, store, 1, here, config, device)


def _link_of(kind: str, store: PairStore, rank: int, host: str, config: TransportConfig, device: torch.device) -> GlooLink:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = to_timedelta(config.dial_timeout_s)
    options._threads = 1
    # The default device resolves the name of this host, which may fail, or bind to a public address.
    options._devices = [gloo.create_device(hostname=host)]
    try:
        group = gloo(dist.PrefixStore("messages", store), rank, 2, options)
        if kind == "nccl":
            from sparsevila_cluster.transport.nccl import build_nccl_link

            return build_nccl_link(group, store, rank, config, device)
        return GlooLink(group, store, rank, config)
    except RuntimeError as error:
        store.close()
        raise LaneLost(f"no group of two: {brief(error)}") from error
    except LaneLost:
        store.close()
        raise
