"""Links of two processes: messages over a socket, bulk over torch.distributed's gloo.

How gloo behaves when a peer dies, stops or sends too much was measured. The socket tells of a dead peer at once; gloo does not:
bulk that has begun to arrive stays silent until its own deadline. A wait that runs into its deadline closes the pair, so a deadline
is final; `close` uses exactly that, and nothing is written to a tensor afterwards. A tensor larger than the posted one would abort
the whole process, so both sides compute sizes alone. A group is never built twice on the same store.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparsevila_cluster.core.addresses import ReceiverAddress
from sparsevila_cluster.core.errors import LaneLost
from sparsevila_cluster.transport.backends.process_group import GroupLink, GroupListener, brief, dial_group, to_timedelta
from sparsevila_cluster.transport.handshake import MessageSocket, PairStore
from sparsevila_cluster.transport.link import Accept, Endpoint, Link, PendingBulk

CLOSING_TAG, FIRST_TAG, TAGS = 1, 2, 2**20


class GlooLink(GroupLink):
    """Bulk is in host memory, in the order of its tags."""

    kind = "gloo"

    def __init__(self, messages: MessageSocket, group: Any, rank: int):
        super().__init__(messages, group, rank)
        self._num_bulk = 0

    def device_for(self, device: torch.device) -> torch.device:
        """See `Link`."""
        return torch.device("cpu")

    def _pending(self, works: Sequence[Any], parts: Sequence[Tensor]) -> PendingBulk:
        return _PendingWorks(works, parts)

    def _tag(self) -> int:
        self._num_bulk += 1
        return FIRST_TAG + self._num_bulk % TAGS

    def _end_bulk(self) -> None:
        try:
            # Nothing ever comes with this tag: the wait runs out, and a wait that runs out closes the pair.
            self._group.recv([torch.empty(1, dtype=torch.uint8)], self._peer, CLOSING_TAG).wait(to_timedelta(0.001))
        except RuntimeError:
            pass


class _PendingWorks:
    """What torch gave for each tensor, and the tensors, which must live as long."""

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


def listen_gloo(token: str, endpoint: Endpoint, accept: Accept) -> GroupListener:
    """Listens for gloo links."""
    return GroupListener({"gloo": build_gloo_link}, token, endpoint, accept)


def dial_gloo(address: ReceiverAddress, lane_id: str, endpoint: Endpoint) -> Link:
    """Raises LaneLost."""
    return dial_group("gloo", build_gloo_link, address, endpoint)


def build_gloo_link(store: PairStore, rank: int, endpoint: Endpoint, host: str) -> GlooLink:
    """Raises LaneLost."""
    messages = MessageSocket(store.connection, endpoint.config.op_timeout_s)
    return GlooLink(messages, build_group(store, rank, host, endpoint.config.dial_timeout_s), rank)


def build_group(store: Any, rank: int, host: str, within_s: float) -> Any:
    """A gloo group of two. Raises LaneLost when the other rank does not come."""
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = to_timedelta(within_s)
    options._threads = 1
    try:
        # The default device resolves the name of this host, which may fail, or bind to a public address.
        options._devices = [gloo.create_device(hostname=host)]
        return gloo(store, rank, 2, options)
    except RuntimeError as error:
        raise LaneLost(f"no group of two: {brief(error)}") from error
