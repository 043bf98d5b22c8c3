"""Plain grpc.aio, to hold the cluster's door against: a server in a process of its own that streams messages of a given size.

`python -m benchmarks.lib.grpc_echo` is the server; it says its port and ends when its stdin does.
"""

from __future__ import annotations

import asyncio
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio

METHOD = "/benchmarks.Echo/Stream"
REQUEST = struct.Struct("<II")
START_S, STREAM_S, STOP_S = 60.0, 60.0, 10.0


class Echo:
    """A client of it, connected."""

    def __init__(self, channel: grpc.aio.Channel):
        self._stream = channel.unary_stream(METHOD)

    async def listen(self, num_messages: int, num_bytes: int, request_bytes: int) -> tuple[float, float]:
        """(ms to the first message, ms from one message to the next on average) of a stream that is read as it comes."""
        arrived_s = []
        request = REQUEST.pack(num_messages, num_bytes).ljust(request_bytes, b".")
        start_s = time.perf_counter()
        replies = self._stream(request, timeout=STREAM_S)
        while await replies.read() is not grpc.aio.EOF:
            arrived_s.append(time.perf_counter())
        return (arrived_s[0] - start_s) * 1e3, (arrived_s[-1] - arrived_s[0]) / max(1, len(arrived_s) - 1) * 1e3


@asynccontextmanager
async def echoing() -> AsyncIterator[Echo]:
    """The server while the context lasts. Raises TimeoutError: it does not start within START_S."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.lib.grpc_echo", stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        async with asyncio.timeout(START_S):
            port = int(await process.stdout.readline())
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            echo = Echo(channel)
            await echo.listen(1, 1, REQUEST.size)
            yield echo
    finally:
        process.stdin.close()
        try:
            async with asyncio.timeout(STOP_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


async def _stream(request: bytes, context: Any) -> None:
    num_messages, num_bytes = REQUEST.unpack_from(request)
    for _ in range(num_messages):
        await context.write(b"." * num_bytes)


async def serve() -> None:
    server = grpc.aio.server()
    service, method = METHOD[1:].split("/")
    handlers = {method: grpc.unary_stream_rpc_method_handler(_stream)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await asyncio.to_thread(sys.stdin.buffer.read)
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(serve())
