"""How scenes look: textured, noisy, panning frames with things, small marks on them, and words in a bitmap font.

A thing, and each letter of a word, lies in one cell of the 16 px grid, which the demo model sees as one visual token.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np

from sparsevila_cluster.demo.drawing import (
    CELL_PX,
    COLORS,
    FPS,
    FRAME_PX,
    GLYPH_SIZES_PX,
    GLYPH_TURNS_DEG,
    GRID,
    PLACES,
    RGB,
    TEXTURE_PX,
    glyph_mask,
    light,
    noise,
    texture,
)
from sparsevila_cluster.demo.scenes import STREAMS, Scene, Stay, Thing, make_scene, make_words

# Numbers of the backgrounds of each stream; no two share one.
TEXTURES = {"training": range(0, 200)} | {
    name: range(10_000 + 100 * i, 10_032 + 100 * i) for i, name in enumerate(STREAMS) if name != "training"
}
INK, PAPER = np.array((245, 245, 245), np.float32), np.array((25, 25, 35), np.float32)
LETTER_SCALE = 2

# Five by seven pixels each, from the top, five bits a row.
LETTERS = {
    "A": "0e1111 1f1111 11", "B": "1e1111 1e1111 1e", "D": "1e1111 111111 1e", "E": "1f1010 1e1010 1f", "F": "1f1010 1e1010 10",
    "G": "0f1010 131111 0f", "H": "111111 1f1111 11", "I": "0e0404 040404 0e", "K": "111214 181412 11", "L": "101010 101010 1f",
    "M": "111b15 151111 11", "N": "111915 131111 11", "O": "0e1111 111111 0e", "P": "1e1111 1e1010 10", "R": "1e1111 1e1412 11",
    "S": "0f1010 0e0101 1e", "T": "1f0404 040404 04", "U": "111111 111111 0e", "V": "111111 11110a 04", "Z": "1f0102 040810 1f",
}  # fmt: skip


class DrawnScene(NamedTuple):
    """The frames of a scene, and what lies where."""

    frames: np.ndarray  # uint8 [num_steps * FPS, FRAME_PX, FRAME_PX, 3]
    owner: np.ndarray  # int16 [num_steps, GRID, GRID]: which of the scene's stays has the cell, -1 for none


class _Patch(NamedTuple):
    """Something that is painted over the background: rgb where mask is 1."""

    row_px: int
    col_px: int
    mask: np.ndarray  # float32 [height, width, 1]
    rgb: np.ndarray  # float32 [height, width, 3] or [3]


@cache
def letter_mask(letter: str) -> np.ndarray:
    """float32 [CELL_PX, CELL_PX, 1] in 0..1: the letter's ink in the middle of its cell."""
    rows = bytes.fromhex(LETTERS[letter].replace(" ", ""))
    bits = np.array([[row >> (4 - col) & 1 for col in range(5)] for row in rows], np.float32)
    ink = np.kron(bits, np.ones((LETTER_SCALE, LETTER_SCALE), np.float32))
    cell = np.zeros((CELL_PX, CELL_PX), np.float32)
    top, left = (CELL_PX - ink.shape[0]) // 2, (CELL_PX - ink.shape[1]) // 2
    cell[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
    return cell[..., None]


@cache
def mark_mask(mark: str, size_px: int) -> np.ndarray:
    """float32 [size, size, 1]: a small mark in the middle of a thing."""
    at, drawn = np.arange(size_px) - (size_px - 1) / 2, np.zeros((size_px, size_px), np.float32)
    if mark == "dot":
        drawn[(at[:, None] ** 2 + at[None, :] ** 2) <= 2.6**2] = 1
    elif mark == "bar":
        drawn[np.ix_(np.abs(at) <= 1.1, np.abs(at) <= 4.1)] = 1
    return drawn[..., None]


def draw_scene(scene: Scene, rng: np.random.Generator, stream: str = "training") -> DrawnScene:
    """Frames, and for trainers which stay owns which cell."""
    numbers = TEXTURES[stream]
    background = texture(numbers[rng.integers(len(numbers))])
    room = TEXTURE_PX - FRAME_PX
    start, pan = rng.integers(0, room, 2), rng.integers(-2, 3, 2)
    owner = np.full((scene.num_steps, GRID, GRID), -1, np.int16)
    frames = np.empty((scene.num_steps * FPS, FRAME_PX, FRAME_PX, 3), np.uint8)
    patches = [_patches(stay, i, rng, owner) for i, stay in enumerate(scene.stays)]
    for step in range(scene.num_steps):
        there = [patch for stay, drawn in zip(scene.stays, patches, strict=True) if stay.begin <= step < stay.end
                 for patch in drawn[stay.place_at(step)]]  # fmt: skip
        specks = [
            (*rng.integers(0, FRAME_PX - 4, 2), rng.integers(2, 5), COLORS[rng.integers(len(COLORS))])
            for _ in range(rng.integers(2, 7))
        ]
        for frame in range(FPS):
            number = step * FPS + frame
            # To and fro: a long video must not leave its background behind.
            top, left = (abs((first + by * number + room) % (2 * room) - room) for first, by in zip(start, pan, strict=True))
            picture = background[top : top + FRAME_PX, left : left + FRAME_PX] + light()
            for y, x, size, color in specks:
                picture[y : y + size, x : x + size] = np.array(RGB[color], np.float32) * 0.8 + 20
            # Still for half a second, then shaking: of the two frames that a model sees, the first is the steady one.
            shake = rng.integers(-1, 2, 2) if frame >= FPS // 2 else (0, 0)
            for patch in there:
                _paint(picture, patch, shake)
            y, x = rng.integers(0, len(noise()) - FRAME_PX, 2)
            picture += noise()[y : y + FRAME_PX, x : x + FRAME_PX]
            frames[number] = np.clip(picture, 0, 255)
    return DrawnScene(frames, owner)


def _paint(picture: np.ndarray, patch: _Patch, shake: tuple[int, int] | np.ndarray) -> None:
    height, width = patch.mask.shape[:2]
    y = int(np.clip(patch.row_px + shake[0], 0, FRAME_PX - height))
    x = int(np.clip(patch.col_px + shake[1], 0, FRAME_PX - width))
    under = picture[y : y + height, x : x + width]
    picture[y : y + height, x : x + width] = under * (1 - patch.mask) + patch.mask * patch.rgb


def _patches(stay: Stay, index: int, rng: np.random.Generator, owner: np.ndarray) -> dict[str, list[_Patch]]:
    """What is painted, by place; a thing has one cell in each place where it stays."""
    found = {}
    half = GRID // 2
    for place in dict.fromkeys(stay.places):
        down, right = divmod(PLACES.index(place), 2)
        num_cells = len(stay.what) if isinstance(stay.what, str) else 1
        row, col = down * half + int(rng.integers(half)), right * half + int(rng.integers(half - num_cells + 1))
        for step in range(stay.begin, stay.end):
            if stay.place_at(step) == place:
                owner[step, row, col : col + num_cells] = index
        found[place] = _word(stay.what, row, col) if isinstance(stay.what, str) else _thing(stay.what, row, col, rng)
    return found


def _word(word: str, row: int, col: int) -> list[_Patch]:
    everywhere = np.ones((CELL_PX, CELL_PX, 1), np.float32)
    return [
        _Patch(row * CELL_PX, (col + i) * CELL_PX, everywhere, PAPER + letter_mask(letter) * (INK - PAPER))
        for i, letter in enumerate(word)
    ]


def _thing(thing: Thing, row: int, col: int, rng: np.random.Generator) -> list[_Patch]:
    size = GLYPH_SIZES_PX[rng.integers(len(GLYPH_SIZES_PX))]
    turn = GLYPH_TURNS_DEG[rng.integers(len(GLYPH_TURNS_DEG))]
    slack = (CELL_PX - size) / 2
    # One pixel of margin lets later frames shake by one pixel within the picture.
    y, x = (int(np.clip(cell * CELL_PX + slack + rng.choice((-0.5, 0.5)), 1, FRAME_PX - size - 1)) for cell in (row, col))
    rgb = np.array(RGB[thing.color], np.float32) + rng.uniform(-14, 14, 3).astype(np.float32)
    patches = [_Patch(y, x, glyph_mask(thing.shape, size, turn), rgb)]
    if thing.mark:
        patches.append(_Patch(y, x, mark_mask(thing.mark, size), PAPER))
    return patches


def make_video(seed: int, num_steps: int = 8, stream: str = "demo") -> tuple[Scene, np.ndarray]:
    """Scene and frames of one seed of a stream, the same every time."""
    rng = np.random.default_rng((STREAMS[stream], num_steps, seed))
    scene = make_scene(rng, num_steps, make_words(stream))
    return scene, draw_scene(scene, rng, stream).frames
