"""Frames of pickled values over a Unix socket: how a test and a worker's process speak to each other."""

from __future__ import annotations

import asyncio
import pickle
import struct
from typing import Any

HEAD = struct.Struct("<I")
LIMIT_BYTES = 1 << 26


def send(writer: asyncio.StreamWriter, value: object) -> None:
    """Does not wait: the other side may be stopped."""
    data = pickle.dumps(value)
    writer.write(HEAD.pack(len(data)) + data)


async def receive(reader: asyncio.StreamReader) -> Any:
    """Raises IncompleteReadError or ConnectionError once the other side is gone."""
    return pickle.loads(await reader.readexactly(HEAD.unpack(await reader.readexactly(HEAD.size))[0]))
