"""Links between GPUs: messages over a socket, bulk over NCCL.

The environment keeps torch's watchdog from ending the process, and after a peer's death only an abort frees NCCL. torch's NCCL part
is imported when a link is built: wheels for processors alone do not have it. NCCL ignores tags: both ends post bulk in the order of
the messages that announce it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparsevila_cluster.core.addresses import ReceiverAddress
from sparsevila_cluster.core.errors import LaneLost
from sparsevila_cluster.transport.backends.gloo import build_gloo_link
from sparsevila_cluster.transport.backends.process_group import GroupLink, GroupListener, brief, dial_group, to_timedelta
from sparsevila_cluster.transport.handshake import MessageSocket, PairStore
from sparsevila_cluster.transport.link import Accept, Endpoint, Link, PendingBulk

# A peer's death must not end this process: no watchdog that tears it down, no dump, no monitor.
ENVIRONMENT = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}
POLL_S = 0.0005


class NcclLink(GroupLink):
    """Its group sends tensors of a GPU, and is aborted when the link closes, from whichever thread notices."""

    kind = "nccl"

    def device_for(self, device: torch.device) -> torch.device:
        """See `Link`."""
        return device

    def _pending(self, works: Sequence[Any], parts: Sequence[Tensor]) -> PendingBulk:
        return PolledWorks(self, works, parts)

    def _tag(self) -> int:
        return 0

    def _end_bulk(self) -> None:
        # Until NCCL has let go, its kernels may write to what was posted.
        self._group.abort()


class PolledWorks:
    """Bulk on its way: NCCL's own waits have no deadline that leaves the process alive, so completion is asked for."""

    def __init__(self, link: NcclLink, works: Sequence[Any], parts: Sequence[Tensor]):
        self._link, self._works, self._parts = link, works, parts

    def wait(self, within_s: float, num: int | None = None) -> None:
        """See `PendingBulk`."""
        until_s = time.monotonic() + within_s
        for work in self._works[:num]:
            while not work.is_completed():
                if self._link.closed or time.monotonic() > until_s:
                    self._link.close()
                    raise LaneLost(f"bulk did not arrive within {within_s:g} s")
                time.sleep(POLL_S)


def nccl_is_here() -> bool:
    """Whether torch has NCCL and a GPU."""
    return dist.is_available() and dist.is_nccl_available() and torch.cuda.is_available()


def lacks_for_nccl(endpoint: Endpoint) -> str:
    """See `Transport.lacks`."""
    if endpoint.device.type == "cuda" and nccl_is_here():
        return ""
    return f"KV on a GPU and a torch with NCCL; this worker has {endpoint.device}"


def listen_nccl(token: str, endpoint: Endpoint, accept: Accept) -> GroupListener:
    """Listens for NCCL links, and for gloo links of senders without a GPU."""
    return GroupListener({"nccl": build_nccl_link, "gloo": build_gloo_link}, token, endpoint, accept)


def dial_nccl(address: ReceiverAddress, lane_id: str, endpoint: Endpoint) -> Link:
    """Raises LaneLost."""
    return dial_group("nccl", build_nccl_link, address, endpoint)


def build_nccl_link(store: PairStore, rank: int, endpoint: Endpoint, host: str) -> NcclLink:
    """Raises LaneLost."""
    config = endpoint.config
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from torch.distributed import ProcessGroupNCCL

        torch.cuda.set_device(endpoint.device)
        options = ProcessGroupNCCL.Options()
        options._timeout = to_timedelta(config.op_timeout_s)
        group: Any = ProcessGroupNCCL(store, rank, 2, options)
        # The communicator is made by the first operation, through the store: now, while the socket is still the store's.
        first = torch.zeros(1, device=endpoint.device)
        work = group.recv([first], 1, 0) if rank == 0 else group.send([first], 0, 0)
    except (ImportError, RuntimeError, dist.DistError) as error:
        raise LaneLost(f"no NCCL group: {brief(error)}") from error
    link = NcclLink(MessageSocket(store.connection, config.op_timeout_s), group, rank)
    PolledWorks(link, [work], [first]).wait(config.dial_timeout_s)
    return link
