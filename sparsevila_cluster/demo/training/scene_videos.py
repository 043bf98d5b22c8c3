"""Scenes as a model samples them, with what lies under each of its visual tokens."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sparsevila_cluster.demo.drawing import COLORS, FPS, GRID, SHAPES, through_codec
from sparsevila_cluster.demo.scene_drawing import LETTERS, draw_scene
from sparsevila_cluster.demo.scenes import KEY, MARKS, STREAMS, Scene, Thing, make_scene, make_words

ALL_SHAPES = (*SHAPES, KEY)
ALL_LETTERS = tuple(LETTERS)
# What an engine samples: 2 frames per second, each from the middle of its interval.
SAMPLED = slice(FPS // 4, None, FPS // 2)
CODEC_SHARE = 0.6
# What a token may hold, by name; the class behind the last one is "none of them".
NUM_CELLS = GRID * GRID
CONTENTS = {"color": COLORS, "shape": ALL_SHAPES, "mark": MARKS, "letter": ALL_LETTERS}


class SampledScene(NamedTuple):
    """A scene and the two frames of each step that a model sees."""

    scene: Scene
    frames: np.ndarray  # uint8 [2 * steps, px, px, 3]
    owner: np.ndarray  # int16 [steps, grid, grid]: index of the stay that has the cell, -1 for none


def sample_scene(rng: np.random.Generator, num_steps: int, stream: str, *, codec: bool | None = None) -> SampledScene:
    """A random scene of a stream; most go through H.264 at one quality or another, all of them or none if `codec` says so."""
    scene = make_scene(rng, num_steps, make_words(stream))
    drawn = draw_scene(scene, rng, stream)
    frames = drawn.frames
    if codec if codec is not None else rng.random() < CODEC_SHARE:
        preset = "ultrafast" if rng.random() < 0.5 else "veryfast"
        frames = through_codec(frames, crf=int(rng.integers(16, 29)), preset=preset)
    return SampledScene(scene, np.ascontiguousarray(frames[SAMPLED]), drawn.owner)


def seed_of(stream: str, seed: int) -> np.random.Generator:
    """Where all that is random about one use of a stream comes from."""
    return np.random.default_rng((STREAMS[stream], seed))


def contents_of(video: SampledScene) -> dict[str, np.ndarray]:
    """int64 [steps, grid * grid] by name of CONTENTS: which of them lies under each token."""
    owner = video.owner.reshape(len(video.owner), -1)
    found = {name: np.full(owner.shape, len(values)) for name, values in CONTENTS.items()}
    for index, stay in enumerate(video.scene.stays):
        mine = owner == index
        if isinstance(stay.what, Thing):
            found["color"][mine] = COLORS.index(stay.what.color)
            found["shape"][mine] = ALL_SHAPES.index(stay.what.shape)
            if stay.what.mark:
                found["mark"][mine] = MARKS.index(stay.what.mark)
            continue
        for step in range(stay.begin, stay.end):
            for letter, cell in zip(stay.what, np.flatnonzero(mine[step]), strict=True):
                found["letter"][step, cell] = ALL_LETTERS.index(letter)
    return found
