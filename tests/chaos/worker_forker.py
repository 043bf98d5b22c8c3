"""`python -m tests.chaos.worker_forker CHECKPOINT`: imports everything once, then forks a worker for every line of its stdin.

A process with one thread may fork, so a worker that is killed is replaced at once.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import signal
import socket
import sys
import traceback
from typing import Any

PR_SET_PDEATHSIG = 1


def main() -> None:
    import torch
    import transformers  # noqa: F401  imports more on first use, which should happen here

    from sparsevila_cluster.models import load_model
    from sparsevila_cluster.models.adapter import DECODE_PARTS, PREFILL_PARTS
    from tests.chaos import worker_main

    torch.set_num_threads(1)
    models = {"prefill": load_model(sys.argv[1], PREFILL_PARTS), "decode": load_model(sys.argv[1], DECODE_PARTS)}
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    print(json.dumps({"ready": os.getpid()}), flush=True)
    for line in sys.stdin:
        threads = os.listdir("/proc/self/task")
        assert len(threads) == 1, f"a process with {len(threads)} threads must not fork"
        job = json.loads(line)
        pid = os.fork()
        if not pid:
            os._exit(_become(worker_main.serve, models[job["kind"]], job))
        print(json.dumps({"pid": pid}), flush=True)


def _become(serve: Any, model: Any, job: dict[str, Any]) -> int:
    from sparsevila_cluster.core.cluster_config import build_cluster_config

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    out = os.open(job["log"], os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (out, 1), (out, 2)):
        os.dup2(source, target)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s.%(msecs)03d %(name)s %(message)s", datefmt="%H:%M:%S")
    try:
        config = build_cluster_config(**job["config"])
        if job["port"]:
            _listen_at(job["port"])
        asyncio.run(serve(job["kind"], job["name"], job["endpoints"], config, model, job["prefills"]))
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _listen_at(port: int) -> None:
    """Have the first receiver of this process listen on `port`, as a worker that is restarted on its old address."""
    stock = socket.create_server

    def server(address: tuple[str, int], **options: Any) -> socket.socket:
        host, number = address[:2]
        return stock((host, port if number == 0 else number), **options)

    socket.create_server = server  # type: ignore[assignment]


if __name__ == "__main__":
    main()
