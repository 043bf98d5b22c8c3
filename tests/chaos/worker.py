"""`python -m tests.chaos.worker KIND NAME SOCKET CONFIG PAUSE MARKER`: one prefill or decode worker, or a registry, in this process.

Knows: how to build each of them, and how to stand still at a given place, so that a test can kill it exactly there. PAUSE is
`module:Class.method:n:before|after`; at its n-th call (from 0) MARKER is written and the calling thread sleeps.
"""

from __future__ import annotations

import asyncio
import faulthandler
import functools
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from sparsevila_cluster.cluster_config import build_cluster_config
from tests.chaos.processes import serve


def stand_still(pause: str, marker: Path) -> None:
    """Patch the method that PAUSE names."""
    module_name, path, number, side = pause.split(":")
    owner: Any = importlib.import_module(module_name)
    *classes, method = path.split(".")
    for name in classes:
        owner = getattr(owner, name)
    original, calls = getattr(owner, method), iter(range(1 << 30))

    def here() -> None:
        marker.write_text(pause)
        time.sleep(3600)

    @functools.wraps(original)
    def paused(*args: Any, **kwargs: Any) -> Any:
        hit = next(calls) == int(number)
        if hit and side == "before":
            here()
        result = original(*args, **kwargs)
        if hit and side == "after":
            here()
        return result

    setattr(owner, method, paused)


async def main() -> None:
    kind, name, socket, config_json, pause, marker = sys.argv[1:]
    faulthandler.enable()
    torch.set_num_threads(1)
    config = build_cluster_config(**json.loads(config_json))
    if pause:
        stand_still(pause, Path(marker))
    if kind == "prefill":
        from sparsevila_cluster.cluster.prefill_worker import PrefillWorker

        worker: Any = PrefillWorker(name, config)
    else:
        from sparsevila_cluster.cluster.decode_worker import DecodeWorker

        worker = DecodeWorker(name, config)
    await serve(worker, socket)


if __name__ == "__main__":
    asyncio.run(main())
