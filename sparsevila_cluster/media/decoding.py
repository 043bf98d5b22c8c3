"""Bytes of a known kind to frames, in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO

from sparsevila_cluster.media.animation import decode_animation
from sparsevila_cluster.media.file_kinds import Kind, picture_format
from sparsevila_cluster.media.frames import Allocate, Decoded, on_heap
from sparsevila_cluster.media.image import decode_image
from sparsevila_cluster.media.media_source import DecodeDeadline
from sparsevila_cluster.media.video import decode_video

if TYPE_CHECKING:
    from sparsevila_cluster.core.config import MediaLimits


def decode(
    file: BinaryIO, name: str, kind: Kind, *, fps: float, max_frames: int, limits: MediaLimits, deadline: DecodeDeadline,
    allocate: Allocate = on_heap,
) -> Decoded:  # fmt: skip
    """At most `max_frames` frames. A decoder that crashes takes this process with it, one that hangs does not return.

    Raises:
        BadMedia, TooLarge, DeadlineExceeded: as `open_media`.
    """
    if kind == "image":
        return decode_image(file, name, limits, allocate)
    file.seek(0)
    by = decode_animation if picture_format(file.read(16)) == "WEBP" else decode_video
    return by(file, name, fps=fps, max_frames=max_frames, limits=limits, deadline=deadline, allocate=allocate)
