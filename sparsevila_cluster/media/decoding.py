"""Bytes of a known kind to frames, or to what those would cost, in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO

from sparsevila_cluster.media.animation import animation_plan, decode_animation
from sparsevila_cluster.media.cost import MediaCost
from sparsevila_cluster.media.file_kinds import Kind, picture_format
from sparsevila_cluster.media.frames import Allocate, Decoded, on_heap
from sparsevila_cluster.media.image import FORMATS, decode_image, open_picture
from sparsevila_cluster.media.media_source import DecodeDeadline
from sparsevila_cluster.media.video import decode_video, video_plan

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


def measure(
    file: BinaryIO, name: str, kind: Kind, *, fps: float, max_frames: int, limits: MediaLimits, deadline: DecodeDeadline
) -> MediaCost:
    """What `decode` would cost, as the headers say: what they hide is found, and bounded, while it is decoded.

    Raises:
        BadMedia, TooLarge, DeadlineExceeded: as `open_media`, for what shows without decoding.
    """
    if kind == "image":
        with open_picture(file, name, limits, FORMATS) as image:
            return MediaCost(image.width * image.height, image.width * image.height)
    file.seek(0)
    if picture_format(file.read(16)) == "WEBP":
        wanted = animation_plan(file, name, fps, max_frames, limits).wanted
        with open_picture(file, name, limits, ("WEBP",)) as image:
            return MediaCost((wanted[-1] + 1) * image.width * image.height, len(wanted) * image.width * image.height)
    plan = video_plan(file, name, fps=fps, max_frames=max_frames, limits=limits, deadline=deadline)
    num_sampled = min(len(plan.times_s), plan.survey.num_shown)
    return MediaCost(
        plan.num_decoded * plan.width * plan.height, num_sampled * max(1, round(plan.width * plan.aspect)) * plan.height
    )
