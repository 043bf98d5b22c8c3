"""An animated WebP to the frames that show at its sample times. (FFmpeg reads animated GIFs; of WebP it reads no animations.)"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import ImageOps

from sparsevila_cluster.core.errors import BadMedia, TooLarge
from sparsevila_cluster.media.file_kinds import webp_frames
from sparsevila_cluster.media.frame_selection import pick, sample_times
from sparsevila_cluster.media.frames import Allocate, Decoded, Frames, check_frames_bytes
from sparsevila_cluster.media.image import open_picture, to_rgb
from sparsevila_cluster.media.media_source import DecodeDeadline

if TYPE_CHECKING:
    from sparsevila_cluster.core.config import MediaLimits

# Browsers show a frame that says it lasts no longer than this for a tenth of a second.
SHORTEST_MS, DEFAULT_MS = 10, 100


@dataclass(frozen=True)
class AnimationPlan:
    """When each frame starts, which of them are wanted (ascending), and when the last one ends."""

    starts_ms: list[int]
    wanted: list[int]
    duration_s: float


def animation_plan(file: BinaryIO, name: str, fps: float, max_frames: int, limits: MediaLimits) -> AnimationPlan:
    """From the headers of the frames. Raises BadMedia, TooLarge."""
    ends_ms = list(accumulate(ms if ms > SHORTEST_MS else DEFAULT_MS for ms in webp_frames(file)))
    starts_ms = [0, *ends_ms[:-1]]
    duration_s = ends_ms[-1] / 1000
    if duration_s > limits.max_duration_s:
        raise TooLarge(f"{name}: {duration_s:.6g} s are longer than max_duration_s = {limits.max_duration_s:g}")
    return AnimationPlan(starts_ms, pick(starts_ms, sample_times(duration_s, fps, max_frames), lambda ms: ms / 1000), duration_s)


def decode_animation(
    file: BinaryIO, name: str, *, fps: float, max_frames: int, limits: MediaLimits, deadline: DecodeDeadline, allocate: Allocate
) -> Decoded:
    """As `decode_video`, for an animated WebP. Every frame up to the last wanted one is decoded: each is drawn over the one before.

    Raises:
        BadMedia: a frame is missing or broken. TooLarge, DeadlineExceeded: as `open_media`.
    """
    plan = animation_plan(file, name, fps, max_frames, limits)
    wanted = plan.wanted
    with open_picture(file, name, limits, ("WEBP",)) as image:
        if (found := getattr(image, "n_frames", 1)) != len(plan.starts_ms):
            raise BadMedia(f"{name} is not whole: {found} of {len(plan.starts_ms)} frames can be read")
        check_frames_bytes(len(wanted), image.width, image.height, name, limits)
        frames: Frames | None = None
        place = {number: at for at, number in enumerate(wanted)}
        for number in range(wanted[-1] + 1):
            deadline.check()
            image.seek(number)
            image.load()
            if number in place:
                picture = to_rgb(ImageOps.exif_transpose(image))
                if frames is None:
                    frames = allocate((len(wanted), *picture.shape))
                frames[place[number]] = picture
    return Decoded(frames, np.array([plan.starts_ms[number] / 1000 for number in wanted]), plan.duration_s)
