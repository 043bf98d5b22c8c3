"""A server's table and a caller's stub derive from one protocol; a long-running method travels as a stream of one item."""

import asyncio
import inspect
from contextlib import aclosing
from typing import Protocol

import pytest

from sparsevila_cluster.cluster.directory import Directory
from sparsevila_cluster.cluster.on_ray import replicas
from sparsevila_cluster.cluster.rpc.rpc_server import RpcServer
from sparsevila_cluster.cluster.worker_api import (
    DecodeWorkerApi,
    DirectoryApi,
    PrefillWorkerApi,
    RouterApi,
    long_running,
    methods_of,
)
from sparsevila_cluster.cluster.worker_pool import pool_stub
from sparsevila_cluster.cluster.workers.decode_worker import DecodeWorker
from sparsevila_cluster.cluster.workers.prefill_worker import PrefillWorker
from sparsevila_cluster.core.errors import BadCheckpoint, NotFound, WorkerLost
from sparsevila_cluster.serve.application import RouterReplica
from tests.cluster.local_pool import LocalPool


class ShippingApi(Protocol):
    async def read_ended(self): ...

    @long_running
    async def ship(self, key, /): ...

    def count(self, num, /): ...


class Worker:
    def __init__(self):
        self.ended = ""
        self.enough = asyncio.Event()

    def read_ended(self):
        return self.ended

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

    async def count(self, num):
        for i in range(num):
            yield i

    def secret(self):
        return "not in the protocol"


def test_it_beats_until_the_one_result_is_there():
    async def main():
        worker, envelopes = Worker(), []
        server = RpcServer("w", worker, ShippingApi, beat_s=0.02)
        async for envelope in server.stream("w", "ship", ("quick",)):
            envelopes.append(envelope)
            if envelopes.count(("beat", None)) == 3:
                worker.enough.set()
        assert envelopes[:3] == [("beat", None)] * 3 and envelopes[-2:] == [("value", "QUICK"), ("end", None)]
        envelopes = [envelope async for envelope in server.stream("w", "ship", ("",))]
        assert envelopes[-1] == ("failure", {"error": "NotFound", "message": "no copy"})

    asyncio.run(main())


def test_who_leaves_early_ends_the_work():
    async def main():
        worker = Worker()
        async with aclosing(RpcServer("w", worker, ShippingApi, beat_s=0.02).stream("w", "ship", ("slow",))) as envelopes:
            assert await anext(envelopes) == ("beat", None)
            assert await anext(envelopes) == ("beat", None)
        assert worker.ended == "cancelled"

    asyncio.run(main())


@pytest.mark.parametrize("method", ["secret", "__init__", "ended", "ship"])
def test_a_call_of_what_is_no_call_of_the_protocol_is_refused(method):
    async def main():
        kind, failure = await RpcServer("w", Worker(), ShippingApi).call("w", method, ())
        assert kind == "failure" and failure["error"] == "Internal" and "legal: read_ended" in failure["message"]

    asyncio.run(main())


def test_a_stub_has_the_methods_of_its_protocol_and_no_others():
    async def main():
        served = Worker()
        served.enough.set()
        worker = pool_stub(ShippingApi, LocalPool({"w": served}), "w", 5.0)
        assert await worker.ship("quick") == "QUICK" and await worker.read_ended() == "done"
        assert [i async for i in worker.count(3)] == [0, 1, 2]
        with pytest.raises(NotFound):
            await worker.ship("")
        with pytest.raises(AttributeError):
            worker.secret()

    asyncio.run(main())


def test_a_stream_that_ends_without_the_one_result_is_a_lost_worker():
    class EmptyPool:
        async def stream(self, worker, method, *args, within_s):
            for item in ():
                yield item

        async def call(self, worker, method, *args, within_s): ...

    async def main():
        with pytest.raises(WorkerLost, match="ship ended without a result"):
            await pool_stub(ShippingApi, EmptyPool(), "w", 5.0).ship("k")

    asyncio.run(main())


@pytest.mark.parametrize(
    ("api", "implementation"),
    [(PrefillWorkerApi, PrefillWorker), (DecodeWorkerApi, DecodeWorker), (DirectoryApi, Directory), (RouterApi, RouterReplica)],
)
def test_an_implementation_has_every_method_of_its_protocol_with_the_same_arguments_and_result(api, implementation):
    for method in methods_of(api):
        promised, given = (inspect.signature(getattr(cls, method)) for cls in (api, implementation))
        positional = [(one.name, one.annotation) for one in given.parameters.values()]
        assert positional == [(one.name, one.annotation) for one in promised.parameters.values()], method
        assert promised.return_annotation == given.return_annotation, method


def test_reading_and_shipping_travel_as_work():
    kinds = {**methods_of(PrefillWorkerApi), **methods_of(DecodeWorkerApi)}
    assert {method for method, kind in kinds.items() if kind == "work"} == {"key_of", "ship"}
    assert {method for method, kind in kinds.items() if kind == "stream"} == {"make", "ask"}
    assert set(methods_of(DirectoryApi).values()) == {"call"}


def test_a_replica_that_cannot_start_reports_why_before_it_ends(monkeypatch):
    directory = Directory()
    monkeypatch.setattr(replicas, "ServeCaller", lambda handle: LocalPool({"directory": directory}))

    async def main():
        with pytest.raises(BadCheckpoint, match="no weights"):
            async with replicas.start_failures_reported(replicas.DECODE, None):
                raise BadCheckpoint("no weights")

    asyncio.run(main())
    assert directory.start_failures() == {"Decode": {"error": "BadCheckpoint", "message": "no weights"}}
