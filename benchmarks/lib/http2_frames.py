"""HTTP/2 frames written by hand (RFC 9113, RFC 7541 without compression), for what no client library would send."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM = ACK = 0x1
END_HEADERS = 0x4
REFUSED_STREAM, CANCEL, ENHANCE_YOUR_CALM = 0x7, 0x8, 0xB
SERVICE = "/sparsevila.v1.VideoQA/"


@dataclass(frozen=True)
class Frame:
    kind: int
    flags: int
    stream: int
    payload: bytes

    def __bytes__(self) -> bytes:
        return frame(self.kind, self.flags, self.stream, self.payload)


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def integer(value: int, bits: int, first: int) -> bytes:
    """An integer of HPACK behind the high bits of `first`."""
    most = (1 << bits) - 1
    if value < most:
        return bytes([first | value])
    out, value = [first | most], value - most
    while value >= 128:
        out.append(value % 128 + 128)
        value //= 128
    return bytes([*out, value])


def hpack(fields: Iterable[tuple[str | bytes, str | bytes]]) -> bytes:
    """Literal fields that are not indexed, without Huffman codes."""
    out = b""
    for pair in fields:
        out += b"\x00"
        for text in pair:
            data = text.encode() if isinstance(text, str) else text
            out += integer(len(data), 7, 0) + data
    return out


def fields(method: str = "Answer", *more: tuple[str | bytes, str | bytes], service: str = SERVICE) -> list:
    """The header fields of a call."""
    return [
        (":method", "POST"), (":scheme", "http"), (":path", service + method), (":authority", "127.0.0.1"),
        ("te", "trailers"), ("content-type", "application/grpc"), *more,
    ]  # fmt: skip


def message(data: bytes) -> bytes:
    """A message of gRPC."""
    return b"\0" + struct.pack(">I", len(data)) + data


def call(stream: int, method: str = "Answer", data: bytes | None = None, *more: tuple[str, str], service: str = SERVICE) -> bytes:
    """The frames of a whole call; without `data` it stays half-open."""
    head = frame(HEADERS, END_HEADERS, stream, hpack(fields(method, *more, service=service)))
    return head if data is None else head + frame(DATA, END_STREAM, stream, message(data))


class Connection:
    """A connection over which anything may be sent. What the server sends is read whole frame by whole frame."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self._reader, self._writer = reader, writer

    async def send(self, data: bytes, within_s: float = 20) -> bool:
        """Whether the server takes it. It may close the connection instead."""
        try:
            self._writer.write(data)
            async with asyncio.timeout(within_s):
                await self._writer.drain()
        except (ConnectionError, TimeoutError):
            return False
        return True

    async def frames(self, within_s: float = 20) -> AsyncIterator[Frame]:
        """Those that come until the server closes the connection, or within the time."""
        until_s = time.monotonic() + within_s
        with suppress(TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            while True:
                yield await self._frame(until_s - time.monotonic())

    async def _frame(self, within_s: float) -> Frame:
        async with asyncio.timeout(within_s):
            head = await self._reader.readexactly(9)
            kind, flags, stream = struct.unpack(">BBI", head[3:])
            payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
        return Frame(kind, flags, stream & 0x7FFFFFFF, payload)

    async def acknowledged(self) -> None:
        """Read until the server's settings, and acknowledge them."""
        async for one in self.frames():
            if one.kind == SETTINGS and not one.flags & ACK:
                await self.send(frame(SETTINGS, ACK))
                return

    async def closed(self, within_s: float = 20) -> bool:
        """Whether the server closes the connection within the time; frames until then are dropped."""
        try:
            async with asyncio.timeout(within_s):
                while await self._reader.read(1 << 16):
                    pass
        except ConnectionError:
            return True
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        self._writer.transport.abort()


@asynccontextmanager
async def connection(address: str, start: bytes = PREFACE + frame(SETTINGS)) -> AsyncIterator[Connection]:
    host, _, port = address.rpartition(":")
    opened = Connection(*await asyncio.open_connection(host, int(port)))
    try:
        await opened.send(start)
        yield opened
    finally:
        opened.close()
