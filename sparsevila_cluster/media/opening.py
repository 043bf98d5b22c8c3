"""Open a source as `Media`: the order of reading, hashing and decoding, and the legal range of the sampling.

source -> open file + kind -> hash -> [process of the sandbox: picture, animation or video] -> frames
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from sparsevila_cluster.core.errors import BadRequest
from sparsevila_cluster.media.cost import MediaCost
from sparsevila_cluster.media.media_source import Blob, DecodeDeadline, hash_blob, open_source
from sparsevila_cluster.media.sandbox import DecoderSandbox

if TYPE_CHECKING:
    from sparsevila_cluster.core.config import MediaLimits
    from sparsevila_cluster.core.requests import MediaSource


@dataclass(frozen=True, eq=False)
class Media:
    """Sampled frames of one video or image.

    frames: u8 [F, H, W, 3], RGB, upright, square pixels, F >= 1.
    times_s: f64 [F], ascending: each frame's start, in seconds after the file's first frame (0 for an image).
    media_hash: BLAKE2b-256 (64 hex digits) of the source bytes and the sampling.
    duration_s: from the first frame's start to the last frame's end (0 for an image).
    """

    frames: np.ndarray
    times_s: np.ndarray
    kind: Literal["video", "image"]
    media_hash: str
    duration_s: float


def open_media(
    source: MediaSource, *, fps: float, max_frames: int, limits: MediaLimits, sandbox: DecoderSandbox | None = None
) -> Media:
    """Decode at most `max_frames` frames of a source, `fps` per second of video, in a process of `sandbox`.

    Without one there is one for this call only, which takes the start of a process: a quarter of a second.

    Raises:
        BadMedia: nothing readable, no picture and no video, more than a small part of it is broken, or its decoder crashes.
        TooLarge: over one of `limits` (bytes, duration, pixels, memory), or frames that would not fit into memory.
        DeadlineExceeded: not done within `limits.decode_timeout_s`.
        BadRequest: `fps` or `max_frames` outside its legal range.
        Unavailable: `sandbox` is closed, or no process can be started.
    """
    cap = _check_sampling(fps, max_frames, limits)
    with open_source(source, limits) as blob:
        if sandbox is None:
            with DecoderSandbox() as sandbox:
                return _load(blob, fps, cap, limits, sandbox)
        return _load(blob, fps, cap, limits, sandbox)


def _load(blob: Blob, fps: float, max_frames: int, limits: MediaLimits, sandbox: DecoderSandbox) -> Media:
    sandbox.warm()  # a process that is not there yet starts while the bytes are hashed
    deadline = DecodeDeadline(blob.name, limits.decode_timeout_s)
    media_hash = hash_blob(blob, fps=fps, max_frames=max_frames, limits=limits, deadline=deadline)
    done = sandbox.decode(blob, fps=fps, max_frames=max_frames, limits=limits, deadline=deadline)
    blob.check_unchanged()
    return Media(done.frames, done.times_s, blob.kind, media_hash, done.duration_s)


def identify(source: MediaSource, *, fps: float, max_frames: int, limits: MediaLimits) -> tuple[str, Literal["video", "image"]]:
    """The `media_hash` and the kind that `open_media` would give, without decoding: one pass over the bytes.

    A hash says nothing about whether the bytes decode.

    Raises:
        BadMedia, TooLarge (bytes), DeadlineExceeded, BadRequest: as `open_media`, for what shows without decoding.
    """
    cap = _check_sampling(fps, max_frames, limits)
    with open_source(source, limits) as blob:
        deadline = DecodeDeadline(blob.name, limits.decode_timeout_s)
        return hash_blob(blob, fps=fps, max_frames=cap, limits=limits, deadline=deadline), blob.kind


def measure_media(source: MediaSource, *, fps: float, max_frames: int, limits: MediaLimits, sandbox: DecoderSandbox) -> MediaCost:
    """What `open_media` would cost, from headers and packets alone. Raises as `open_media`, for what shows without decoding."""
    cap = _check_sampling(fps, max_frames, limits)
    with open_source(source, limits) as blob:
        deadline = DecodeDeadline(blob.name, limits.decode_timeout_s)
        return sandbox.measure(blob, fps=fps, max_frames=cap, limits=limits, deadline=deadline)


def _check_sampling(fps: float, max_frames: int, limits: MediaLimits) -> int:
    """The cap on frames that counts: the caller's or the limit's, whichever is smaller."""
    if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not (math.isfinite(fps) and 0 < fps <= 240):
        raise BadRequest(f"fps must be in (0, 240], got {fps!r}")
    if isinstance(max_frames, bool) or not isinstance(max_frames, int) or max_frames < 1:
        raise BadRequest(f"max_frames must be an integer >= 1, got {max_frames!r}")
    return min(max_frames, limits.max_frames)
