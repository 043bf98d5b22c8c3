"""Calls over connections of their own: tokens, ends, errors, silence, and a server that leaves."""

import asyncio
import json
import subprocess
import sys
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Protocol

import grpc
import pytest

from sparsevila_cluster.cluster.rpc.endpoint import CALL, SERVICE, WorkerEndpoint
from sparsevila_cluster.cluster.rpc.rpc_server import RpcServer
from sparsevila_cluster.cluster.rpc.rpc_worker_pool import RpcWorkerPool
from sparsevila_cluster.cluster.rpc.wire_types import pack, unpack
from sparsevila_cluster.core.errors import DeadlineExceeded, Incompatible, Internal, QueueFull, WorkerClosed, WorkerLost
from tests.processes import stop

SILENCE_S = 1.0


class EchoApi(Protocol):
    async def echo(self, text: str, /) -> str: ...

    async def refuse(self) -> None: ...

    async def odd(self) -> int: ...

    async def unsendable(self) -> int: ...

    async def sleep(self, seconds: float, /) -> str: ...

    def count(self, num: int, pause_s: float, /) -> list[int]: ...


class Echo:
    def __init__(self):
        self.ends = []

    async def echo(self, text):
        return text

    async def refuse(self):
        raise QueueFull("no room", retry_after_s=7.5)

    async def odd(self):
        return "no number"

    async def unsendable(self):
        return object()

    async def sleep(self, seconds):
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            self.ends.append("sleep")
            raise
        return "slept"

    async def count(self, num, pause_s):
        try:
            for i in range(num):
                await asyncio.sleep(pause_s)
                yield [i]
        finally:
            self.ends.append("count")


@asynccontextmanager
async def served(**given):
    """(pool, server, worker)"""
    worker = Echo()
    server = RpcServer("w", worker, EchoApi, beat_s=0.05, **given)

    async def find(name, within_s):
        return await server.listen()

    pool = RpcWorkerPool("Echo", EchoApi, find, SILENCE_S)
    try:
        yield pool, server, worker
    finally:
        await pool.close()
        await server.leave(0.0)


async def ended(worker, what):
    async with asyncio.timeout(5):
        while what not in worker.ends:
            await asyncio.sleep(0.01)


async def items(pool, *args, within_s=5.0):
    return [item async for item in pool.stream("w", "count", *args, within_s=within_s)]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_calls_and_streams(host):
    async def main():
        async with served(host=host) as (pool, server, worker):
            texts = [f"é{i}" for i in range(50)]
            assert await asyncio.gather(*(pool.call("w", "echo", text, within_s=5) for text in texts)) == texts
            assert await items(pool, 300, 0.0) == [[i] for i in range(300)]
            assert await items(pool, 2, SILENCE_S * 1.3) == [[0], [1]]  # beats bridge a pause
            assert await items(pool, 0, 0.0) == []
            assert (await server.listen()) == (await server.listen())

    asyncio.run(main())


def test_errors_are_what_they_were():
    async def main():
        async with served() as (pool, _, _):
            with pytest.raises(QueueFull, match="no room") as full:
                await pool.call("w", "refuse", within_s=5)
            assert full.value.retry_after_s == 7.5
            with pytest.raises(Internal, match="Echo has no method 'ends' to call; legal: echo"):
                await pool.call("w", "ends", within_s=5)
            with pytest.raises(Internal, match="no method 'echo' to call; legal: count"):
                await anext(pool.stream("w", "echo", "x", within_s=5))
            with pytest.raises(Incompatible, match="expected str, got int"):
                await pool.call("w", "echo", 5, within_s=5)
            with pytest.raises(Internal, match="an argument of echo cannot be sent: a object"):
                await pool.call("w", "echo", object(), within_s=5)
            with pytest.raises(Internal, match="the answer of unsendable cannot be sent: a object"):
                await pool.call("w", "unsendable", within_s=5)
            with pytest.raises(
                Incompatible, match="what odd of worker w of Echo gave is not in the protocol: expected int, got str"
            ):
                await pool.call("w", "odd", within_s=5)
            assert await pool.call("w", "echo", "x", within_s=5) == "x"

    asyncio.run(main())


def test_who_leaves_ends_the_work():
    async def main():
        async with served() as (pool, server, worker):
            with pytest.raises(DeadlineExceeded, match="sleep of worker w of Echo took longer than 0.2 s"):
                await pool.call("w", "sleep", 30.0, within_s=0.2)
            await ended(worker, "sleep")
            async with aclosing(pool.stream("w", "count", 1000, 0.01, within_s=5)) as stream:
                assert await anext(stream) == [0]
            await ended(worker, "count")
            worker.ends.clear()
            with pytest.raises(DeadlineExceeded, match="count of worker w of Echo took longer than 0.3 s"):
                await items(pool, 1000, 0.01, within_s=0.3)
            await ended(worker, "count")
            async with asyncio.timeout(5):
                while server._num_open:
                    await asyncio.sleep(0.01)

    asyncio.run(main())


def test_without_its_token_nobody_is_answered():
    async def main():
        async with served() as (_, server, worker):
            endpoint = await server.listen()
            assert endpoint.token not in repr(endpoint) and len(endpoint.token) == 64
            request = pack(("echo", ("x",)))
            async with grpc.aio.insecure_channel(endpoint.target) as channel:
                call = channel.unary_unary(f"/{SERVICE}/{CALL}")
                for metadata in ((), (("sparsevila-token", "no"),), (("authorization", endpoint.token),)):
                    with pytest.raises(grpc.aio.AioRpcError) as refused:
                        await call(request, metadata=metadata)
                    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
                assert unpack(await call(request, metadata=endpoint.metadata)) == ["value", "x"]
                for junk in (b"", b"\xc1", b"\x92", pack(5), pack(("echo",)), pack(([], {})), pack({"a": 1})):
                    kind, failure = unpack(await call(junk, metadata=endpoint.metadata))
                    assert kind == "failure" and failure["error"] == "Incompatible", junk

    asyncio.run(main())


def test_a_worker_whose_port_somebody_else_has_now_is_lost_and_looked_for_again():
    async def main():
        async with served() as (_, server, _):
            endpoint = await server.listen()
            former = replace(endpoint, token="0" * 64)
            found = [former, endpoint]

            async def find(name, within_s):
                return found.pop(0)

            pool = RpcWorkerPool("Echo", EchoApi, find, SILENCE_S)
            with pytest.raises(WorkerLost, match=r"worker w of Echo is gone \(UNAUTHENTICATED\)"):
                await pool.call("w", "echo", "x", within_s=5)
            assert await pool.call("w", "echo", "x", within_s=5) == "x" and not found
            await pool.close()

    asyncio.run(main())


def test_callers_at_the_same_time_look_for_a_worker_once():
    async def main():
        async with served() as (_, server, _):
            num_asked = 0

            async def find(name, within_s):
                nonlocal num_asked
                num_asked += 1
                await asyncio.sleep(0.05)
                return await server.listen()

            pool = RpcWorkerPool("Echo", EchoApi, find, SILENCE_S)
            assert await asyncio.gather(*(pool.call("w", "echo", "x", within_s=5) for _ in range(20))) == ["x"] * 20
            assert num_asked == 1
            await pool.close()

            async def never(name, within_s):
                await asyncio.sleep(60)

            pool = RpcWorkerPool("Echo", EchoApi, never, SILENCE_S)
            for call in (pool.call("w", "echo", "x", within_s=0.2), anext(pool.stream("w", "count", 1, 0.0, within_s=0.2))):
                with pytest.raises(DeadlineExceeded, match="finding worker w of Echo"):
                    await call

    asyncio.run(main())


def test_a_worker_that_is_looked_for_in_vain_is_lost_after_a_silence():
    async def main():
        async def never(name, within_s):
            await asyncio.sleep(60)

        pool = RpcWorkerPool("Echo", EchoApi, never, silence_s=0.3)
        with pytest.raises(WorkerLost, match="worker w of Echo has not been heard of for 0.3 s"):
            await asyncio.wait_for(anext(pool.stream("w", "count", 1, 0.0, within_s=30)), 5)

    asyncio.run(main())


def test_of_several_that_may_answer_another_one_is_looked_for_when_one_does_not():
    """As where a machine is gone without a word: its connections do not break."""

    async def main():
        silent = await asyncio.start_server(lambda reader, writer: asyncio.sleep(60), "127.0.0.1", 0)
        async with served() as (_, server, _):
            there = await server.listen()
            found = [replace(there, port=silent.sockets[0].getsockname()[1]), there]

            async def find(name, within_s):
                return found.pop(0)

            pool = RpcWorkerPool("Echo", EchoApi, find, SILENCE_S)
            with pytest.raises(DeadlineExceeded, match="echo of a worker of Echo took longer than 0.5 s"):
                await pool.call(None, "echo", "x", within_s=0.5)
            assert await pool.call(None, "echo", "x", within_s=5) == "x" and not found
            await pool.close()
        silent.close()

    asyncio.run(main())


def test_who_leaves_finishes_what_it_has_and_takes_nothing_new():
    async def main():
        async with served() as (pool, server, worker):
            stream = pool.stream("w", "count", 20, 0.02, within_s=5)
            got = [await anext(stream)]
            leaving = asyncio.ensure_future(server.leave(5.0))
            await asyncio.sleep(0)
            with pytest.raises(WorkerClosed, match="worker w is closed") as closed:
                await pool.call("w", "echo", "x", within_s=5)
            assert closed.value.worker == "w"
            with pytest.raises(WorkerClosed):
                await items(pool, 1, 0.0)
            got += [item async for item in stream]
            assert got == [[i] for i in range(20)]
            await asyncio.wait_for(leaving, 5)
            with pytest.raises(WorkerLost, match="is gone"):
                await pool.call("w", "echo", "x", within_s=5)

    asyncio.run(main())


def test_what_does_not_end_in_time_is_cut_off():
    async def main():
        async with served() as (pool, server, worker):
            stream = pool.stream("w", "count", 10_000, 0.02, within_s=30)
            await anext(stream)
            await asyncio.wait_for(server.leave(0.2), 5)
            with pytest.raises(WorkerLost):
                async for _ in stream:
                    pass
            await ended(worker, "count")

    asyncio.run(main())


def test_nobody_there_is_a_lost_worker_at_once():
    async def main():
        async with served() as (_, server, _):
            gone = replace(await server.listen())
        nobody = RpcWorkerPool("Echo", EchoApi, lambda name, within_s: asyncio.sleep(0, gone), SILENCE_S)
        begun_s = asyncio.get_running_loop().time()
        with pytest.raises(WorkerLost, match=r"gone \(UNAVAILABLE\)"):
            await nobody.call("w", "echo", "x", within_s=20)
        with pytest.raises(WorkerLost, match=r"gone \(UNAVAILABLE\)"):
            await anext(nobody.stream("w", "count", 1, 0.0, within_s=20))
        assert asyncio.get_running_loop().time() - begun_s < 10
        await nobody.close()

    asyncio.run(main())


def test_who_closes_the_pool_fails_the_calls_under_way():
    async def main():
        async with served() as (pool, _, worker):
            stream = pool.stream("w", "count", 1000, 0.01, within_s=5)
            await anext(stream)
            call = asyncio.ensure_future(pool.call("w", "sleep", 30.0, within_s=30))
            await asyncio.sleep(0.1)
            await pool.close()
            with pytest.raises(WorkerLost, match="the connection to worker w of Echo was closed"):
                await call
            with pytest.raises(WorkerLost):
                async for _ in stream:
                    pass
            await ended(worker, "sleep")
            assert await pool.call("w", "echo", "x", within_s=5) == "x"  # a new connection
            cancelled = asyncio.ensure_future(pool.call("w", "sleep", 30.0, within_s=30))
            await asyncio.sleep(0.1)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled

    asyncio.run(main())


SERVER = """
import asyncio, json
from dataclasses import asdict
from sparsevila_cluster.cluster.rpc.rpc_server import RpcServer
from tests.cluster.test_rpc_worker_pool import Echo, EchoApi

async def main():
    print(json.dumps(asdict(await RpcServer("w", Echo(), EchoApi, beat_s=0.1).listen())), flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("end", ["killed", "stopped"])
def test_a_process_that_ends_in_the_middle(end):
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    endpoint = WorkerEndpoint(**json.loads(process.stdout.readline()))

    async def main():
        pool = RpcWorkerPool("Echo", EchoApi, lambda name, within_s: asyncio.sleep(0, endpoint), SILENCE_S)
        stream = pool.stream("w", "count", 10_000, 0.02, within_s=30)
        call = asyncio.ensure_future(pool.call("w", "sleep", 30.0, within_s=30))
        await anext(stream)
        if end == "killed":
            process.kill()
        else:
            await asyncio.to_thread(stop, process.pid)
        with pytest.raises(WorkerLost, match="is gone" if end == "killed" else "has not been heard of for 1 s"):
            async for _ in stream:
                pass
        if end == "killed":
            with pytest.raises(WorkerLost):
                await asyncio.wait_for(call, 5)
        else:
            with pytest.raises(DeadlineExceeded):
                await pool.call("w", "echo", "x", within_s=0.3)
            call.cancel()
        await pool.close()

    try:
        asyncio.run(main())
    finally:
        process.kill()
        process.wait(10)
