"""A clerk answers a coroutine as a stream of one item: it beats while the work goes on, and leaving early cancels the work."""

import asyncio
from contextlib import aclosing

from sparsevila_cluster.cluster.on_ray.rpc_server import RpcServer
from sparsevila_cluster.core.errors import NotFound


class Worker:
    def __init__(self):
        self.ended = ""

    async def ship(self, key):
        if not key:
            raise NotFound("no copy")
        try:
            await asyncio.sleep(0.1 if key == "quick" else 30)
            self.ended = "done"
        except asyncio.CancelledError:
            self.ended = "cancelled"
            raise
        return key.upper()


def test_it_beats_until_the_one_result_is_there():
    async def main():
        clerk = RpcServer("w", Worker(), (), ("ship",), beat_s=0.02)
        told = [envelope async for envelope in clerk.stream("w", "ship", ("quick",))]
        assert told.count(("beat", None)) >= 3 and told[-2:] == [("value", "QUICK"), ("end", None)]
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
