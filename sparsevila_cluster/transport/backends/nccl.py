"""Links between GPUs: messages over a socket, bulk over NCCL in a group of two.

Knows: which environment keeps torch's watchdog from ending the process, and that a peer's death frees NCCL only through an abort.
Does not know: what is sent. torch's NCCL part is imported when a link is built: wheels for processors alone do not have it.

NCCL ignores tags: both ends post bulk in the order of the messages that announce it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparsevila_cluster.core.cluster_config import TransportConfig
from sparsevila_cluster.core.errors import LaneLost
from sparsevila_cluster.transport.backends.gloo import GlooLink, brief, to_timedelta
from sparsevila_cluster.transport.handshake import Line, PairStore
from sparsevila_cluster.transport.link import Handle

# A peer's death must not end this process: no watchdog that tears it down, no dump, no monitor.
ENVIRONMENT = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}
POLL_S = 0.0005


def nccl_is_here() -> bool:
    return dist.is_available() and dist.is_nccl_available() and torch.cuda.is_available()


class NcclLink(GlooLink):
    """Its group sends tensors of a GPU, and is aborted when the link closes, from whichever thread notices."""

    kind = "nccl"

    def device_for(self, device: torch.device) -> torch.device:
        return device

    @property
    def closed(self) -> bool:
        return self._closed

    def _handle(self, works: Sequence[Any], parts: Sequence[Tensor]) -> Handle:
        return Polled(self, works, parts)

    def _tag(self) -> int:
        return 0

    def _end_bulk(self) -> None:
        # Until NCCL has let go, its kernels may write to what was posted.
        self._group.abort()


class Polled:
    """The handle of bulk: NCCL's own waits have no deadline that leaves the process alive, so completion is asked for."""

    def __init__(self, link: NcclLink, works: Sequence[Any], parts: Sequence[Tensor]):
        self._link, self._works, self._parts = link, works, parts

    def wait(self, within_s: float, num: int | None = None) -> None:
        until_s = time.monotonic() + within_s
        for work in self._works[:num]:
            while not work.is_completed():
                if self._link.closed or time.monotonic() > until_s:
                    self._link.close()
                    raise LaneLost(f"bulk did not arrive within {within_s:g} s")
                time.sleep(POLL_S)


def build_nccl_link(store: PairStore, rank: int, config: TransportConfig, device: torch.device) -> NcclLink:
    """Raises LaneLost."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from torch.distributed import ProcessGroupNCCL

        torch.cuda.set_device(device)
        options = ProcessGroupNCCL.Options()
        options._timeout = to_timedelta(config.op_timeout_s)
        group: Any = ProcessGroupNCCL(store, rank, 2, options)
        # The communicator is made by the first operation, through the store: now, while the socket is still the store's.
        first = torch.zeros(1, device=device)
        work = group.recv([first], 1, 0) if rank == 0 else group.send([first], 0, 0)
    except (ImportError, RuntimeError, dist.DistError) as error:
        raise LaneLost(f"no NCCL group: {brief(error)}") from error
    link = NcclLink(Line(store.connection, config.op_timeout_s), group, rank)
    Polled(link, [work], [first]).wait(config.dial_timeout_s)
    return link
