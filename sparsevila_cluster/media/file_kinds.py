"""Whether bytes are a picture or a video, told by their first bytes and by walking over block headers.

Nothing is decompressed here: untrusted bytes meet no decoder before they are in a process of the sandbox.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, Literal

from sparsevila_cluster.core.errors import BadMedia

Kind = Literal["video", "image"]

# Blocks to look at before a second frame is found; a first frame of 255 MB fits, and hostile bytes cost a second at most.
MAX_BLOCKS = 1 << 20


def decide_kind(file: BinaryIO, name: str, wanted: str, declared: str | None) -> Kind:
    """The kind by the bytes themselves; what the caller or the data URL says must agree. Leaves `file` at 0.

    wanted: "video", "image" or "auto"; declared: the media type of a data URL. What moves may be shown either way: its first
    frame as an image, or its frames as a video.

    Raises:
        BadMedia: unreadable, or of another kind than asked for or declared.
    """
    try:
        file.seek(0)
        picture = picture_format(file.read(16))
        moves = picture is not None and is_animated(file, picture)
        file.seek(0)
    except OSError as error:
        raise BadMedia(f"cannot read {name}: {error.strerror or error}") from error
    found: Kind = "image" if picture and not moves else "video"
    either = moves or picture == "GIF"
    claims = {wanted} - {"auto"} | ({declared.partition("/")[0]} if declared else set()) - {"application"}
    for claim in sorted(claims):
        if claim != found and not either:
            what = f"a {picture} picture" if picture else "not a PNG, JPEG, WebP or GIF picture"
            raise BadMedia(f"{name} was sent as {claim!r} but is {what}")
    return wanted if either and wanted != "auto" else found  # type: ignore[return-value]


def picture_format(head: bytes) -> str | None:
    """PNG, JPEG, WEBP, GIF or None, by the first 16 bytes."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    return "GIF" if head[:6] in (b"GIF87a", b"GIF89a") else None


def is_animated(file: BinaryIO, picture: str) -> bool:
    """Whether a GIF or WebP holds a second frame. An animated PNG counts as its first frame."""
    frames = _gif_frames(file) if picture == "GIF" else webp_frames(file) if picture == "WEBP" else iter(())
    return next(frames, None) is not None and next(frames, None) is not None


def webp_frames(file: BinaryIO) -> Iterator[int]:
    """The duration in milliseconds of each frame of an animated WebP. Reads chunk headers only."""
    file.seek(12)
    for _ in range(MAX_BLOCKS):
        head = file.read(8)
        if len(head) < 8:
            return
        tag, size = head[:4], int.from_bytes(head[4:], "little")
        payload = file.read(min(size, 16))
        if tag == b"VP8X" and payload and not payload[0] & 2:  # its flag for animation
            return
        if tag == b"ANMF" and len(payload) == 16:
            yield int.from_bytes(payload[12:15], "little")
        file.seek(size + size % 2 - len(payload), 1)


def _gif_frames(file: BinaryIO) -> Iterator[bool]:
    """True for each image descriptor with data behind it."""
    file.seek(10)
    flags = file.read(1)
    file.seek(13 + _color_table_bytes(flags))
    blocks = 0
    while blocks < MAX_BLOCKS:
        blocks += 1
        tag = file.read(1)
        if tag == b"\x21":
            file.seek(1, 1)
        elif tag == b"\x2c":
            head = file.read(9)
            file.seek(_color_table_bytes(head[8:9]) + 1, 1)
        elif tag in (b"\x3b", b""):
            return
        else:
            continue
        while (size := file.read(1)) and size[0] and blocks < MAX_BLOCKS:
            blocks += 1
            file.seek(size[0], 1)
        if tag == b"\x2c" and size:
            yield True


def _color_table_bytes(flags: bytes) -> int:
    return 3 << ((flags[0] & 7) + 1) if flags and flags[0] & 0x80 else 0
