"""Whether a fresh decoder can start at a packet that the container calls a key frame."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import av

LOOK_BYTES = 1 << 14  # parameter sets and messages that stand before the picture


@dataclass(frozen=True)
class _Syntax:
    """How to read the type of a unit from its first byte, and what types mean."""

    shift: int
    mask: int
    pictures: range  # slices of pictures
    fresh: range  # those of pictures that refer to nothing before them
    parameters: frozenset[int]  # sequence and picture parameter sets
    config_bytes: int  # where a container's own decoder configuration says how long lengths are


# H.264 also calls a recovery point a key frame; only an IDR picture forgets all others. Of HEVC every random access point does,
# for the pictures that show after it.
SYNTAX = {
    "h264": _Syntax(0, 31, range(1, 6), range(5, 6), frozenset({7, 8}), 4),
    "hevc": _Syntax(1, 63, range(32), range(16, 22), frozenset({33, 34}), 21),
}


def starts_anew(packet: av.Packet, stream: av.VideoStream) -> bool:
    """True unless the packet of an H.264 or HEVC stream is seen to need what came before it.

    Where parameter sets are not in the container, they must stand before the picture: those of the file's beginning may have been
    replaced on the way.
    """
    context = stream.codec_context
    syntax = SYNTAX.get(context.codec.canonical_name)
    if syntax is None:
        return True
    head = bytes(memoryview(packet)[:LOOK_BYTES])
    config = context.extradata or b""
    if config[:1] == b"\x01" and len(config) > syntax.config_bytes:
        firsts, missing = _by_length(head, (config[syntax.config_bytes] & 3) + 1), set()
    else:
        firsts, missing = _by_start_code(head), set(syntax.parameters)
    for first in firsts:
        kind = first >> syntax.shift & syntax.mask
        missing.discard(kind)
        if kind in syntax.fresh:
            return not missing
        if kind in syntax.pictures:
            return False
    return False


def _by_length(data: bytes, length_bytes: int) -> Iterator[int]:
    """The first byte of each unit that has its length before it."""
    at = 0
    while at + length_bytes < len(data):
        yield data[at + length_bytes]
        at += length_bytes + int.from_bytes(data[at : at + length_bytes], "big")


def _by_start_code(data: bytes) -> Iterator[int]:
    """The first byte of each unit behind a start code (Annex B)."""
    at = data.find(b"\0\0\1")
    while 0 <= at < len(data) - 3:
        yield data[at + 3]
        at = data.find(b"\0\0\1", at + 3)
