"""Links over torch.distributed's gloo: a two-rank group of its own for every link, found through the dock's store.

Knows: how gloo behaves when a peer dies, stops or sends too much (measured; see below). Does not know: what is sent.

A receive stays posted for the next messages at all times, because it is the only operation that fails at once when the peer dies:
a bulk tensor that has begun to arrive stays silent until its own deadline. A wait that runs into its deadline closes the pair, so
a deadline is final; `close` uses exactly that. A tensor larger than the posted buffer would abort the whole process, so both sides
compute sizes alone, and messages are cut into frames. A prefix in the store is never used twice.
"""

from __future__ import annotations

import logging
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import msgpack
import torch
import torch.distributed as dist
from torch import Tensor

from sparsevila_cluster.cluster_config import TransportConfig
from sparsevila_cluster.errors import LaneLost
from sparsevila_cluster.transport.link import MAX_MESSAGE_BYTES, Accept, DockAddress, Handle

log = logging.getLogger(__name__)
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

    def __init__(self, group: Any, store: Any, rank: int, config: TransportConfig):
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


def build_group(store: Any, prefix: str, rank: int, host: str, within_s: float) -> Any:
    """A gloo group of two over a prefix that nobody used before. Raises LaneLost when the other rank does not come."""
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = to_timedelta(within_s)
    options._threads = 1
    # The default device resolves the name of this host, which may fail, or bind to a public address.
    options._devices = [gloo.create_device(hostname=host)]
    try:
        return gloo(dist.PrefixStore(prefix, store), rank, 2, options)
    except RuntimeError as error:
        raise LaneLost(f"no group of two: {brief(error)}") from error


class GlooListener:
    """A store of its own on a free port. A dialer leaves the name of a prefix there, and both build a group on it."""

    def __init__(self, token: str, config: TransportConfig, device: torch.device, accept: Accept):
        self.host = "127.0.0.1" if config.host == "auto" else config.host
        self._token, self._config, self._device, self._accept = token, config, device, accept
        within = to_timedelta(config.dial_timeout_s)
        self._store: Any = dist.TCPStore(self.host, 0, None, is_master=True, wait_for_workers=False, timeout=within)
        self.port = self._store.port
        self._closed = False
        self._thread = threading.Thread(target=self._listen, name="gloo-listener", daemon=True)
        self._thread.start()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        # The listener waits for this key.
        self._store.set(_join(self._token, self._store.add(_joins(self._token), 1)), b"")
        self._thread.join(self._config.dial_timeout_s)

    def _listen(self) -> None:
        store, number = self._store.clone(), 0
        while not self._closed:
            number += 1
            key = _join(self._token, number)
            while not self._closed:
                try:
                    store.wait([key], to_timedelta(60.0))
                    break
                except RuntimeError:
                    continue
            if self._closed:
                return
            raw = store.get(key)
            store.delete_key(key)
            threading.Thread(target=self._build, args=(raw,), name="gloo-accept", daemon=True).start()

    def _build(self, raw: bytes) -> None:
        try:
            joined = msgpack.unpackb(raw)
            kind, lane_id = joined["kind"], joined["lane"]
            link = link_of(kind, self._store.clone(), lane_id, 0, self.host, self._config, self._device)
        except Exception as error:  # foreign bytes under our key, or a dialer that did not come
            log.warning("no lane was built: %s", error)
            return
        self._accept(link)


def dial_gloo(kind: str, address: DockAddress, lane_id: str, config: TransportConfig, device: torch.device) -> GlooLink:
    """Raises LaneLost: nobody listens, or the dock does not come within config.dial_timeout_s."""
    within_s = config.dial_timeout_s
    try:
        # A store's client tries for its whole deadline where nobody listens; a socket is told at once.
        with socket.create_connection((address.host, address.port), within_s) as probe:
            here = probe.getsockname()[0]
        within = to_timedelta(within_s)
        store: Any = dist.TCPStore(address.host, address.port, None, is_master=False, wait_for_workers=False, timeout=within)
        number = store.add(_joins(address.token), 1)
        store.set(_join(address.token, number), msgpack.packb({"kind": kind, "lane": lane_id}))
    except (OSError, RuntimeError) as error:
        raise LaneLost(f"the dock of {address.worker} does not answer: {brief(error)}") from error
    return link_of(kind, store, lane_id, 1, here, config, device)


def link_of(
    kind: str, store: Any, lane_id: str, rank: int, host: str, config: TransportConfig, device: torch.device
) -> GlooLink:
    """One end of a link, on a prefix named by the lane. Raises LaneLost."""
    group = build_group(store, f"lane/{lane_id}", rank, host, config.dial_timeout_s)
    if kind == "nccl":
        from sparsevila_cluster.transport.nccl import build_nccl_link

        return build_nccl_link(group, store, lane_id, rank, config, device)
    return GlooLink(group, store, rank, config)


def _joins(token: str) -> str:
    return f"joins/{token}"


def _join(token: str, number: int) -> str:
    return f"join/{token}/{number}"
