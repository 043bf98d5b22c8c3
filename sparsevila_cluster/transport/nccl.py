"""Links between GPUs: messages over gloo, bulk over NCCL.

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

from sparsevila_cluster.cluster_config import TransportConfig
from sparsevila_cluster.errors import LaneLost
from sparsevila_cluster.transport.gloo import GlooLink, brief, to_timedelta
from sparsevila_cluster.transport.link import Handle
from sparsevila_cluster.transport.rendezvous import PairStore

# A peer's death must not end this process: no watchdog that tears it down, no dump, no monitor.
ENVIRONMENT = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0", "TORCH_NCCL_DUMP_ON_TIMEOUT": "0"}
POLL_S = 0.0005


def nccl_is_here() -> bool:
    return dist.is_available() and dist.is_nccl_available() and torch.cuda.is_available()


class NcclLink(GlooLink):
    """`data`: a group of two that sends CUDA tensors. It is aborted when the link closes, from whichever thread notices."""

    kind = "nccl"

    def __init__(self, group: Any, store: PairStore, rank: int, config: TransportConfig, data: Any):
        self._data = data
        super().__init__(group, store, rank, config)

    def device_for(self, device: torch.device) -> torch.device:
        return device

    def ship(self, parts: Sequence[Tensor]) -> Handle:
        return self._move(self._data.send, parts)

    def land(self, parts: Sequence[Tensor]) -> Handle:
        return self._move(self._data.recv, parts)

    def close(self) -> None:
        super().close()
        # Until NCCL has let go, its kernels may write to what was posted.
        if hasattr(self._data, "abort"):
            self._data.abort()

    def _move(self, op: Any, parts: Sequence[Tensor]) -> Polled:
        if self._closed:
            raise LaneLost("the link is closed")
        try:
            return Polled(self, [op([part], self._peer, 0) for part in parts], parts)
        except RuntimeError as error:
            raise LaneLost(brief(error)) from error


class Polled:
    """The handle of bulk: NCCL's own waits have no deadline that leaves the process alive, so completion is asked for."""

    def __init__(self, link: NcclLink, works: Sequence[Any], parts: Sequence[Tensor]):
        self._link, self._works, self._parts = link, works, parts

    def wait(self, within_s: float) -> None:
        until_s = time.monotonic() + within_s
        for work in self._works:
            while not work.is_completed():
                if self._link._closed or time.monotonic() > until_s:
                    self._link.close()
                    raise LaneLost(f"bulk did not arrive within {within_s:g} s")
                time.sleep(POLL_S)


def build_nccl_link(group: Any, store: PairStore, rank: int, config: TransportConfig, device: torch.device) -> NcclLink:
    """Raises LaneLost."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        from torch.distributed import ProcessGroupNCCL

        torch.cuda.set_device(device)
        options = ProcessGroupNCCL.Options()
        options._timeout = to_timedelta(config.op_timeout_s)
        data = ProcessGroupNCCL(dist.PrefixStore("bulk", store), rank, 2, options)
    except (ImportError, RuntimeError) as error:
        raise LaneLost(f"no NCCL group: {brief(error)}") from error
    return NcclLink(group, store, rank, config, data)
