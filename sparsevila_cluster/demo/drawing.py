"""Scenes of the demo world and how they look: glyphs, backgrounds, light, noise, and MP4 files.

Glyphs are 14 to 16 px wide and sit in the cells of a 16 px grid, the cells that the demo checkpoint sees as one
visual token each. This is a deliberate simplification: a vision tower of 0.2 M parameters learns shapes that lie
within one token in minutes, and the world is there to test what happens to tokens, not to test vision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

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

# Backgrounds are made from their number. Training never sees the held-out ones.
TRAINING_TEXTURES = range(0, 200)
HELD_OUT_TEXTURES = range(10_000, 10_032)
TEXTURE_PX = 320
NOISE_PX, NOISE_SIGMA = 400, 9.0


@dataclass(frozen=True)
class Glyph:
    """One coloured shape in one quadrant of the frame."""

    color: str
    shape: str
    place: str  # quadrant of the frame, one of PLACES

    @property
    def phrase(self) -> str:
        """As answers name it."""
        return f"a {self.color} {self.shape}"


@dataclass(frozen=True)
class WorldScene:
    """What a video shows: the glyphs of each step of one second."""

    steps: tuple[tuple[Glyph, ...], ...]

    @property
    def duration_s(self) -> float:
        """Length of the video."""
        return float(len(self.steps))


class Rendered(NamedTuple):
    """The frames of a scene, and where its glyphs are."""

    frames: np.ndarray  # uint8 [num_steps * FPS, FRAME_PX, FRAME_PX, 3]
    owner: np.ndarray  # int8 [num_steps, GRID, GRID]: which glyph of the step lies in the cell, -1 for none


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


class _Sprite(NamedTuple):
    mask: np.ndarray
    rgb: np.ndarray
    row_px: int
    col_px: int


def _place_glyphs(step: tuple, rng: np.random.Generator, owner: np.ndarray) -> list[_Sprite]:
    sprites = []
    half = GRID // 2
    for index, glyph in enumerate(step):
        down, right = divmod(PLACES.index(glyph.place), 2)
        row, col = down * half + int(rng.integers(half)), right * half + int(rng.integers(half))
        owner[row, col] = index
        size = GLYPH_SIZES_PX[rng.integers(len(GLYPH_SIZES_PX))]
        turn = GLYPH_TURNS_DEG[rng.integers(len(GLYPH_TURNS_DEG))]
        slack = (CELL_PX - size) / 2
        # one pixel of margin lets later frames shake by one pixel within the picture
        y, x = (int(np.clip(cell * CELL_PX + slack + rng.choice((-0.5, 0.5)), 1, FRAME_PX - size - 1)) for cell in (row, col))
        rgb = np.array(RGB[glyph.color], np.float32) + rng.uniform(-14, 14, 3).astype(np.float32)
        sprites.append(_Sprite(glyph_mask(glyph.shape, size, turn), rgb, y, x))
    return sprites


def render_labelled(scene: WorldScene, rng: np.random.Generator, *, held_out: bool = False) -> Rendered:
    """Frames, and for the trainer which glyph owns which cell."""
    num_steps = len(scene.steps)
    numbers = HELD_OUT_TEXTURES if held_out else TRAINING_TEXTURES
    background = texture(numbers[rng.integers(len(numbers))])
    room = TEXTURE_PX - FRAME_PX
    start, pan = rng.integers(0, room, 2), rng.integers(-2, 3, 2)
    owner = np.full((num_steps, GRID, GRID), -1, np.int8)
    frames = np.empty((num_steps * FPS, FRAME_PX, FRAME_PX, 3), np.uint8)
    for index, step in enumerate(scene.steps):
        sprites = _place_glyphs(step, rng, owner[index])
        specks = [
            (*rng.integers(0, FRAME_PX - 4, 2), rng.integers(2, 5), COLORS[rng.integers(len(COLORS))])
            for _ in range(rng.integers(2, 7))
        ]
        for frame in range(FPS):
            number = index * FPS + frame
            top, left = np.clip(start + pan * number, 0, room)
            picture = background[top : top + FRAME_PX, left : left + FRAME_PX] + light()
            for y, x, size, color in specks:
                picture[y : y + size, x : x + size] = np.array(RGB[color], np.float32) * 0.8 + 20
            for sprite in sprites:
                # Still for half a second, then shaking: of the two frames that a model sees, the first is the steady one.
                shake = rng.integers(-1, 2, 2) if frame >= FPS // 2 else (0, 0)
                y, x, size = sprite.row_px + shake[0], sprite.col_px + shake[1], len(sprite.mask)
                under = picture[y : y + size, x : x + size]
                picture[y : y + size, x : x + size] = under * (1 - sprite.mask) + sprite.mask * sprite.rgb
            y, x = rng.integers(0, NOISE_PX - FRAME_PX, 2)
            picture += noise()[y : y + FRAME_PX, x : x + FRAME_PX]
            frames[number] = np.clip(picture, 0, 255)
    return Rendered(frames, owner)


def render(scene: WorldScene, rng: np.random.Generator, *, held_out: bool = False) -> np.ndarray:
    """uint8 [num_steps * FPS, 128, 128, 3]."""
    return render_labelled(scene, rng, held_out=held_out).frames


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
