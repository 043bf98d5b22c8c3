"""What decoding gives, and how large it may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sparsevila_cluster.core.errors import TooLarge

if TYPE_CHECKING:
    from sparsevila_cluster.core.config import MediaLimits

# All kept frames live in memory at once: 512 frames of 1920 x 1080 are 3 GiB.
MAX_FRAMES_BYTES = 8 << 30


class Frames(Protocol):
    """Room for frames of one size, u8 [F, H, W, 3]; an array is one. [:n] are the first n of them."""

    shape: tuple[int, ...]

    def __setitem__(self, number: int, picture: np.ndarray) -> None: ...

    def __getitem__(self, first: slice) -> Frames: ...


# Makes room of a given shape; where its memory is, is the caller's choice.
Allocate = Callable[[tuple[int, ...]], Frames]


@dataclass(frozen=True, eq=False)
class Decoded:
    """frames u8 [F, H, W, 3] RGB upright, as an array or in whatever room was given for them; times_s f64 [F], each frame's own
    start; the duration in seconds.
    """

    frames: Any
    times_s: np.ndarray
    duration_s: float


def on_heap(shape: tuple[int, ...]) -> np.ndarray:
    """An array of this process. Pages that stay unused cost nothing."""
    return np.empty(shape, np.uint8)


def check_pixels(width: int, height: int, name: str, limits: MediaLimits) -> None:
    """Raises TooLarge: one frame has too many pixels."""
    if width * height > limits.max_pixels:
        raise TooLarge(f"{name}: {width} x {height} pixels are more than max_pixels = {limits.max_pixels}")


class PixelMeter:
    """Counts what is decoded of one source: its headers may have promised less."""

    def __init__(self, name: str, limits: MediaLimits):
        self._name, self._limits, self._decoded = name, limits, 0

    def add(self, width: int, height: int) -> None:
        """One more frame. Raises TooLarge: it has too many pixels, or all so far have."""
        check_pixels(width, height, self._name, self._limits)
        self._decoded += width * height
        if self._decoded > self._limits.max_decoded_pixels:
            raise TooLarge(f"{self._name}: more pixels are decoded than max_decoded_pixels = {self._limits.max_decoded_pixels}")


def check_frames_bytes(num: int, width: int, height: int, name: str, limits: MediaLimits) -> None:
    """Raises TooLarge: one frame has too many pixels, or all have too many pixels or bytes."""
    check_pixels(width, height, name, limits)
    if num * width * height > limits.max_sampled_pixels:
        sampled = f"{num} frames of {width} x {height} pixels"
        raise TooLarge(f"{name}: {sampled} are more than max_sampled_pixels = {limits.max_sampled_pixels}; ask for fewer frames")
    if num * width * height * 3 > MAX_FRAMES_BYTES:
        asked = f"{num} frames of {width} x {height} pixels"
        raise TooLarge(f"{name}: {asked} are more than {MAX_FRAMES_BYTES} bytes; ask for fewer frames")


def out_of_memory(name: str, limits: MediaLimits) -> TooLarge:
    """What to raise where a decoder gets no more memory."""
    return TooLarge(f"{name} does not decode within decode_memory_bytes = {limits.decode_memory_bytes}")
