"""What scenes of the demo world are drawn with: glyphs, backgrounds, light, noise, and MP4 files.

Glyphs are 14 to 16 px wide and sit in the cells of a 16 px grid, the cells that the demo checkpoint sees as one
visual token each. This is a deliberate simplification: a vision tower of 0.2 M parameters learns shapes that lie
within one token in minutes, and the world is there to test what happens to tokens, not to test vision.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

FPS = 4
FRAME_PX = 128
CELL_PX = 16
GRID = FRAME_PX // CELL_PX

RGB = {
    "red": (215, 35, 40),
    "green": (40, 170, 60),
    "blue": (45, 75, 225),
    "yellow": (235, 220, 50),
    "purple": (150, 45, 190),
    "cyan": (50, 210, 220),
    "orange": (240, 135, 25),
    "white": (240, 240, 240),
}
COLORS = tuple(RGB)
PLACES = ("top left", "top right", "bottom left", "bottom right")

GLYPH_SIZES_PX = (14, 15, 16)
GLYPH_TURNS_DEG = (-6, 0, 6)

TEXTURE_PX = 320
NOISE_PX, NOISE_SIGMA = 400, 9.0


Points = list[tuple[float, float]]


class _Pen:
    """Draws in units of the glyph's radius around its centre."""

    def __init__(self, size_px: int) -> None:
        self.image = Image.new("L", (size_px, size_px), 0)
        self.draw = ImageDraw.Draw(self.image)
        self.center, self.radius = size_px / 2, size_px * 0.47

    def polygon(self, points: Points) -> None:
        self.draw.polygon([(self.center + self.radius * x, self.center + self.radius * y) for x, y in points], fill=255)

    def disc(self, x0: float, y0: float, x1: float, y1: float, fill: int = 255) -> None:
        corners = [self.center + self.radius * v for v in (x0, y0, x1, y1)]
        self.draw.ellipse(corners, fill=fill)


def _circle(pen: _Pen) -> None:
    pen.disc(-1, -1, 1, 1)


def _square(pen: _Pen) -> None:
    pen.polygon([(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)])


def _triangle(pen: _Pen) -> None:
    pen.polygon([(0, -1), (0.98, 0.85), (-0.98, 0.85)])


def _star(pen: _Pen) -> None:
    angles = np.arange(10) * np.pi / 5
    reach = np.where(np.arange(10) % 2 == 0, 1.08, 0.42)
    pen.polygon(list(zip(reach * np.sin(angles), -reach * np.cos(angles), strict=True)))


def _cross(pen: _Pen) -> None:
    pen.polygon([(-0.33, -1), (0.33, -1), (0.33, 1), (-0.33, 1)])
    pen.polygon([(-1, -0.33), (1, -0.33), (1, 0.33), (-1, 0.33)])


def _diamond(pen: _Pen) -> None:
    pen.polygon([(0, -1.05), (0.72, 0), (0, 1.05), (-0.72, 0)])


def _ring(pen: _Pen) -> None:
    pen.disc(-1, -1, 1, 1)
    pen.disc(-0.52, -0.52, 0.52, 0.52, fill=0)


def _heart(pen: _Pen) -> None:
    pen.disc(-1, -0.9, 0.06, 0.16)
    pen.disc(-0.06, -0.9, 1, 0.16)
    pen.polygon([(-0.93, -0.1), (0.93, -0.1), (0, 1)])


OUTLINES: dict[str, Callable[[_Pen], None]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "diamond": _diamond,
    "ring": _ring,
    "heart": _heart,
}
SHAPES = tuple(OUTLINES)


def _key(pen: _Pen) -> None:
    pen.disc(-1, -0.55, 0.1, 0.55)
    pen.disc(-0.72, -0.27, -0.18, 0.27, fill=0)
    pen.polygon(
        [(0, -0.16), (1, -0.16), (1, 0.6), (0.74, 0.6), (0.74, 0.16), (0.5, 0.16), (0.5, 0.5), (0.26, 0.5), (0.26, 0.16), (0, 0.16)]
    )


# What is no ordinary shape.
RARE_OUTLINES: dict[str, Callable[[_Pen], None]] = {"key": _key}


@cache
def glyph_mask(shape: str, size_px: int, turn_deg: int) -> np.ndarray:
    """float32 [size, size, 1] in 0..1, drawn six times larger and averaged for smooth edges."""
    pen = _Pen(size_px * 6)
    (OUTLINES | RARE_OUTLINES)[shape](pen)
    small = pen.image.rotate(turn_deg, resample=Image.Resampling.BICUBIC).resize((size_px, size_px), Image.Resampling.BOX)
    return np.asarray(small, np.float32)[..., None] / 255


@cache
def texture(number: int) -> np.ndarray:
    """uint8 [TEXTURE_PX, TEXTURE_PX, 3]: four octaves of coloured noise."""
    rng = np.random.default_rng((77, number))
    total = np.zeros((TEXTURE_PX, TEXTURE_PX, 3), np.float32)
    for cells, amplitude in ((4, 26), (10, 18), (32, 12), (80, 10)):
        noise = rng.standard_normal((cells, cells, 3)) * 0.6 + rng.standard_normal((cells, cells, 1))
        for channel in range(3):
            image = Image.fromarray(noise[..., channel].astype(np.float32))
            large = image.resize((TEXTURE_PX, TEXTURE_PX), Image.Resampling.BICUBIC)
            total[..., channel] += amplitude * np.asarray(large)
    tinted = total * 0.8 + rng.uniform(75, 125) + rng.uniform(-12, 12, 3)
    return np.clip(tinted, 0, 255).astype(np.uint8)


@lru_cache(maxsize=1)
def noise() -> np.ndarray:
    """float32 [NOISE_PX, NOISE_PX, 3], of which every frame adds another piece."""
    rng = np.random.default_rng(1234)
    return rng.standard_normal((NOISE_PX, NOISE_PX, 3), dtype=np.float32) * NOISE_SIGMA


@lru_cache(maxsize=1)
def light() -> np.ndarray:
    """Bright at the top, warm on the left. Without it a patch could not tell where in the frame it lies."""
    ramp = np.linspace(1, -1, FRAME_PX, dtype=np.float32)
    return ramp[:, None, None] * np.full(3, 14, np.float32) + ramp[None, :, None] * np.array([22, 0, -22], np.float32)


def write_mp4(frames: np.ndarray, path: str | Path, fps: int = FPS, crf: int = 18) -> None:
    """H.264 in MP4, as an ordinary camera or web page would send it."""
    import av

    with av.open(str(path), "w", format="mp4") as container:
        encode(container, frames, fps, crf)


def encode(container, frames: np.ndarray, fps: int, crf: int, preset: str = "medium") -> None:
    """Encode into an open container of av; threads=1 keeps the bytes the same on every machine."""
    import av

    stream = container.add_stream("libx264", rate=fps, options={"crf": str(crf), "preset": preset})
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = "yuv420p"
    stream.codec_context.thread_count = 1
    for frame in frames:
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
    container.mux(stream.encode())


def through_codec(frames: np.ndarray, fps: int = FPS, crf: int = 18, preset: str = "veryfast") -> np.ndarray:
    """What is left of the frames after encoding and decoding."""
    import io

    import av

    memory = io.BytesIO()
    with av.open(memory, "w", format="mp4") as container:
        encode(container, frames, fps, crf, preset)
    memory.seek(0)
    with av.open(memory, "r") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
