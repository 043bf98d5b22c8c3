"""Links of two processes: messages over a socket, bulk over torch.distributed's gloo, in a group of two of its own.

Knows: how gloo behaves when a peer dies, stops or sends too much (measured; see below). Does not know: what is sent.

The socket tells of a dead peer at once. Gloo does not: bulk that has begun to arrive stays silent until its own deadline. A wait
that runs into its deadline closes the pair, so a deadline is final; `close` uses exactly that, and nothing is written to a tensor
afterwards. A tensor larger than the posted one would abort the whole process, so both sides compute sizes alone. A group is
never built twice on the same store.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparsevila_cluster.core.cluster_config import TransportConfig
from sparsevila_cluster.core.errors import LaneLost
from sparsevila_cluster.transport.handshake import Handshake, Line, PairStore, knock
from sparsevila_cluster.transport.link import Accept, Handle, ReceiverAddress

CLOSING_TAG, FIRST_TAG, TAGS = 1, 2, 2**20


class GlooLink:
    """One end. rank 0 is the dock."""

    kind = "gloo"
    straight = True

    def __init__(self, line: Line, group: Any, rank: int):
        self._line, self._group, self._peer = line, group, 1 - rank
        self._lock = threading.Lock()
        self._closed = False
        self._num_bulk = 0
        self.send, self.receive = line.send, line.receive

    def device_for(self, device: torch.device) -> torch.device:
        return torch.device("cpu")

    def ship(self, parts: Sequence[Tensor]) -> Handle:
        return self._post(self._group.send, parts)

    def land(self, parts: Sequence[Tensor]) -> Handle:
        return self._post(self._group.recv, parts)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._line.close()
        self._end_bulk()

    def _post(self, op: Any, parts: Sequence[Tensor]) -> Handle:
        if self._closed:
            raise LaneLost("the link is closed")
        works = []
        try:
            for part in parts:
                works.append(op([part], self._peer, self._tag()))
        except RuntimeError as error:
            raise LaneLost(brief(error)) from error
        return self._handle(works, parts)

    def _handle(self, works: Sequence[Any], parts: Sequence[Tensor]) -> Handle:
        return Works(works, parts)

    def _tag(self) -> int:
        self._num_bulk += 1
        return FIRST_TAG + self._num_bulk % TAGS

    def _end_bulk(self) -> None:
        try:
            # Nothing ever comes with this tag: the wait runs out, and a wait that runs out closes the pair.
            self._group.recv([torch.empty(1, dtype=torch.uint8)], self._peer, CLOSING_TAG).wait(to_timedelta(0.001))
        except RuntimeError:
            pass


class Works:
    """The handle of bulk: what torch gave for each tensor, and the tensors, which must live as long."""

    def __init__(self, works: Sequence[Any], parts: Sequence[Tensor]):
        self._works, self._parts = works, parts
        self._num_done = 0

    def wait(self, within_s: float, num: int | None = None) -> None:
        try:
            for work in self._works[self._num_done : num]:
                work.wait(to_timedelta(within_s))
                self._num_done += 1
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
        self._door = Handshake(host, token, config.dial_timeout_s, self._build)
        self.host, self.port = self._door.host, self._door.port

    def close(self) -> None:
        self._door.close()

    def _build(self, hello: dict[str, Any], store: PairStore) -> None:
        self._accept(_link_of(hello["kind"], store, 0, self.host, self._config, self._device))


def dial_gloo(kind: str, address: ReceiverAddress, config: TransportConfig, device: torch.device) -> GlooLink:
    """Raises LaneLost: nobody listens, or the dock does not come within config.dial_timeout_s."""
    store, here = knock(address, config.dial_timeout_s, kind=kind)
    try:
        return _link_of(kind, store, 1, here, config, device)
    except LaneLost:
        store.connection.close()
        raise


def _link_of(kind: str, store: PairStore, rank: int, host: str, config: TransportConfig, device: torch.device) -> GlooLink:
    if kind == "nccl":
        from sparsevila_cluster.transport.backends.nccl import build_nccl_link

        return build_nccl_link(store, rank, config, device)
    return GlooLink(Line(store.connection, config.op_timeout_s), build_group(store, rank, host, config.dial_timeout_s), rank)


def build_group(store: Any, rank: int, host: str, within_s: float) -> Any:
    """A gloo group of two. Raises LaneLost when the other rank does not come."""
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = to_timedelta(within_s)
    options._threads = 1
    # The default device resolves the name of this host, which may fail, or bind to a public address.
    options._devices = [gloo.create_device(hostname=host)]
    try:
        return gloo(store, rank, 2, options)
    except RuntimeError as error:
        raise LaneLost(f"no group of two: {brief(error)}") from error
