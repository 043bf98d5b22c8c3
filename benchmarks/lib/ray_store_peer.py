"""The `objectstore` kind over a local Ray, against the store alone: `put` here, `get` and a copy in an actor."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from benchmarks.lib.stopwatch import Repeats, once_ms
from benchmarks.lib.transfer_peer import WAIT_S, DroppingSink, make_prefix
from sparsevila_cluster.core.cluster_config import TransportConfig
from sparsevila_cluster.kvcache.arena import KVSpec
from sparsevila_cluster.transport import KVReceiver, KVSender, ReceiverAddress, TransferTicket

MIB = 2**20
ROOT = Path(__file__).parents[2]


class ActorObjectStore:
    """The store of this cluster, and calls to the one actor that holds the receiver."""

    def __init__(self, actor: Any = None):
        self._actor = actor

    def put(self, array: np.ndarray) -> Any:
        return ray.put(array)

    def get(self, token: Any, within_s: float) -> Any:
        return ray.get(token, timeout=within_s)

    def exchange(self, address: ReceiverAddress, lane_id: str, messages: list[Any], wait_s: float) -> Any:
        return ray.get(self._actor.exchange.remote(lane_id, messages, wait_s), timeout=wait_s + WAIT_S)


class FarActor:
    """A receiver in a process of Ray's; also fetches bare objects."""

    def __init__(self, spec: KVSpec, num_slots: int):
        torch.set_num_threads(1)
        config = TransportConfig(kind="objectstore")
        self._receiver = KVReceiver("far", DroppingSink(spec, num_slots), spec, config, object_store=ActorObjectStore())
        self._target = np.zeros(num_slots * spec.bytes_per_token, np.uint8)

    def address(self) -> ReceiverAddress:
        return self._receiver.address

    def expect(self, transfer_id: str) -> None:
        self._receiver.expect(transfer_id, "k", WAIT_S)

    def exchange(self, lane_id: str, messages: list[Any], wait_s: float) -> Any:
        return self._receiver.exchange(lane_id, messages, wait_s)

    def fetch(self, tokens: list[Any]) -> None:
        array = ray.get(tokens[0])
        np.copyto(self._target[: array.nbytes], array)


def objectstore_rows(
    spec: KVSpec,
    sizes: Sequence[int],
    repeats: Repeats,
    say: Callable[[str], None],
    contest: Callable[..., dict[str, Any]],
) -> list[dict[str, Any]]:
    """One row per size in MiB."""
    if not sizes:
        return []
    say("starting Ray")
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=4 * max(sizes) * MIB + 256 * MIB,
        runtime_env={"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}},
    )
    try:
        num_slots = max(sizes) * MIB // spec.bytes_per_token + 1
        far: Any = ray.remote(FarActor).options(max_concurrency=8, num_cpus=1).remote(spec, num_slots)
        address = ray.get(far.address.remote(), timeout=WAIT_S)
        sender = KVSender("near", TransportConfig(kind="objectstore"), object_store=ActorObjectStore(far))
        number = 0

        def lane_ms() -> float:
            nonlocal number
            number += 1
            ticket = TransferTicket(str(number), address, WAIT_S)
            ray.get(far.expect.remote(ticket.transfer_id))

            def send() -> None:
                transfer = sender.begin(prefix, (0, prefix.length), ticket)
                transfer.wrote_all()
                transfer.finish(WAIT_S)

            return once_ms(send)

        rows = []
        for mib in sizes:
            say(f"objectstore, {mib} MiB")
            prefix = make_prefix(spec, mib * MIB)
            source = np.ones(prefix.kv_bytes, np.uint8)
            bare = lambda: once_ms(lambda: ray.get(far.fetch.remote([ray.put(source)])))  # noqa: B023, E731
            rows.append(contest("objectstore", mib, bare, lane_ms, repeats))
        sender.close()
        return rows
    finally:
        ray.shutdown()
