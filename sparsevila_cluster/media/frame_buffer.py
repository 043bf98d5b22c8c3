"""The chosen frames, upright and RGB, in one array."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from sparsevila_cluster.core.errors import BadMedia
from sparsevila_cluster.media.frames import Allocate, Decoded, Frames, check_frames_bytes

if TYPE_CHECKING:
    from fractions import Fraction

    from sparsevila_cluster.core.config import MediaLimits


class FrameBuffer:
    """Takes at most `capacity` video frames, in order. The first one sets the size; later ones are scaled to it."""

    def __init__(self, capacity: int, aspect: Fraction, name: str, limits: MediaLimits, allocate: Allocate):
        """aspect: width of a stored pixel over its height."""
        self.capacity, self.aspect, self.name, self.limits, self.allocate = capacity, aspect, name, limits, allocate
        # One for all frames, without threads: setting it up costs more than a small frame.
        self._reformatter = VideoReformatter()
        self.frames: Frames | None = None
        self.starts_s: list[float] = []

    def put(self, frame: av.VideoFrame, start_s: float) -> None:
        """Raises TooLarge: too many pixels, or more bytes than frames may take. BadMedia: a picture that turns in mid-stream."""
        if not self.starts_s:
            # Pixels may be wider than high.
            self._width, self._height = max(1, round(frame.width * self.aspect)), frame.height
            check_frames_bytes(self.capacity, self._width, self._height, self.name, self.limits)
        picture = self._reformatter.reformat(frame, self._width, self._height, "rgb24", threads=1).to_ndarray()
        picture = _upright(picture, _orientation(frame))
        frames = self.frames
        if not self.starts_s and (frames is None or frames.shape[1:] != picture.shape):
            self.frames = frames = self.allocate((self.capacity, *picture.shape))
        assert frames is not None
        if picture.shape != frames.shape[1:]:
            raise BadMedia(f"{self.name} turns its picture in mid-stream")
        frames[len(self.starts_s)] = picture
        self.starts_s.append(start_s)

    def clear(self) -> None:
        """Take frames from the beginning again."""
        self.starts_s = []

    def decoded(self, duration_s: float) -> Decoded:
        """Raises BadMedia: nothing was put."""
        if self.frames is None or not self.starts_s:
            raise BadMedia(f"{self.name} decodes to 0 frames; at least 1 is needed")
        return Decoded(self.frames[: len(self.starts_s)], np.array(self.starts_s), duration_s)


def _orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """(transpose, flip vertically, flip horizontally), in this order, that the display matrix asks for.

    The matrix maps a stored pixel (x, y) to (a x + c y, b x + d y); turns are rounded to multiples of 90 degrees.
    """
    side: Any = frame.side_data.get("DISPLAYMATRIX")
    if side is None:
        return False, False, False
    a, b, _, c, d = (int(v) for v in np.frombuffer(bytes(side), np.int32)[:5])
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, d < 0, a < 0
    return True, b < 0, c < 0


def _upright(picture: np.ndarray, orientation: tuple[bool, bool, bool]) -> np.ndarray:
    transpose, flip_rows, flip_columns = orientation
    if transpose:
        picture = picture.swapaxes(0, 1)
    return picture[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
