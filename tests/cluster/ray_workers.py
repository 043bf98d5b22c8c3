"""A worker that does on demand what workers do wrong, behind a real `RpcServer` in a real replica."""

import asyncio
import os
import signal
import time
from typing import Protocol

from ray import serve

from sparsevila_cluster.cluster.on_ray.loopback import stay_on_loopback
from sparsevila_cluster.cluster.on_ray.replicas import Replica
from sparsevila_cluster.core.cluster_config import build_cluster_config
from sparsevila_cluster.core.errors import NotFound, QueueFull


class FaultyApi(Protocol):
    async def who(self) -> tuple[str, int]: ...

    async def weigh(self, blob, /): ...

    async def refuse(self): ...

    async def stumble(self): ...

    async def sleep(self, seconds, /): ...

    async def freeze(self): ...

    async def read_log(self): ...

    def count(self, num, pause_s=0.0, then=None, /): ...


class FaultyWorker:
    """One of a kind per replica; `log` tells what became of calls."""

    def __init__(self, name):
        self.name = name
        self.log = []

    def who(self):
        return self.name, os.getpid()

    async def weigh(self, blob):
        return len(blob)

    async def refuse(self):
        raise QueueFull("no room", retry_after_s=7.5)

    async def stumble(self):
        raise RuntimeError("a bug")

    async def sleep(self, seconds):
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            self.log.append("sleep cancelled")
            raise
        return "slept"

    def freeze(self):
        os.kill(os.getpid(), signal.SIGSTOP)

    def read_log(self):
        return list(self.log)

    async def count(self, num, pause_s=0.0, then=None):
        try:
            for i in range(num):
                if pause_s:
                    await asyncio.sleep(pause_s)
                yield i
            if then == "refuse":
                raise NotFound("no more")
            if then == "stumble":
                raise RuntimeError("a bug")
            if then == "block":
                time.sleep(30)
        except (asyncio.CancelledError, GeneratorExit):
            self.log.append("count left")
            raise

    def secret(self):
        return "not in the protocol"


class FaultyReplica(Replica):
    def __init__(self):
        stay_on_loopback()
        config = build_cluster_config(transport={"beat_s": 0.2}, drain_timeout_s=10.0)
        super().__init__(config, FaultyWorker(serve.get_replica_context().replica_id.unique_id), FaultyApi)

    async def __del__(self):
        await self.leave()
