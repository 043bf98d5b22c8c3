"""A clerk answers a coroutine as a stream of one item: it beats while the work goes on, and leaving early cancels the work."""

import asyncio
from contextlib import aclosing

from sparsevila_cluster.cluster.on_ray.rpc_server import RpcServer
from sparsevila_cluster.core.errors import NotFound


class Worker:
    def __init__(self):
        self.ended = ""
        self.enough = asyncio.Event()

    async def ship(self, key):
        if not key:
            raise NotFound("no copy")
        try:
            await self.enough.wait()
            self.ended = "done"
        except asyncio.CancelledError:
            self.ended = "cancelled"
            raise
        return key.upper()


def test_it_beats_until_the_one_result_is_there():
    async def main():
        worker, told = Worker(), []
        clerk = RpcServer("w", worker, (), ("ship",), beat_s=0.02)
        async for envelope in clerk.stream("w", "ship", ("quick",)):
            told.append(envelope)
            if told.count(("beat", None)) == 3:
                worker.enough.set()
        assert told[:3] == [("beat", None)] * 3 and told[-2:] == [("value", "QUICK"), ("end", None)]
        told = [envelope async for envelope in clerk.stream("w", "ship", ("",))]
        assert told[-1] == ("failure", {"error": "NotFound", "message": "no copy"})

    asyncio.run(main())


def test_who_leaves_early_ends_the_work():
    async def main():
        worker = Worker()
        async with aclosing(RpcServer("w", worker, (), ("ship",), beat_s=0.02).stream("w", "ship", ("slow",))) as envelopes:
            assert await anext(envelopes) == ("beat", None)
            assert await anext(envelopes) == ("beat", None)
        assert worker.ended == "cancelled"

    asyncio.run(main())
