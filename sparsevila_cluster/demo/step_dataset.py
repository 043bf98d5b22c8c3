"""Steps that were rendered and encoded once, and are composed into training videos for the text model many times.

After stage one the vision tower is frozen and looks at one step at a time, so a step's visual tokens do not depend
on its neighbours. Composing steps anew gives an endless supply of videos for the price of reading memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from sparsevila_cluster.demo.checkpoint_builder import TOKENS_PER_STEP
from sparsevila_cluster.demo.video_feed import TrainingVideo
from sparsevila_cluster.demo.vision_trainer import VisionRunner, patchify
from sparsevila_cluster.demo.world import NUM_STEPS, Glyph, WorldScene


@dataclass(frozen=True)
class ComposedVideo:
    """A composed video. Steps of `scene` that are not in `slots` are not shown, and must not be asked about."""

    scene: WorldScene
    slots: tuple[int, ...]  # ascending; which steps of the scene are shown
    rows: tuple[int, ...]  # the dataset's row for each slot


@dataclass(frozen=True)
class StepDataset:
    """Visual tokens (on the encoder's device), salience and glyphs (on the CPU) of every encoded step."""

    steps: list[tuple[Glyph, ...]]
    tokens: Tensor  # [rows, TOKENS_PER_STEP, hidden], half precision
    salience: Tensor  # [rows, TOKENS_PER_STEP]
    owner: Tensor  # [rows, TOKENS_PER_STEP], index of the glyph or -1
    steps_per_video: int

    @staticmethod
    @torch.no_grad()
    def encode(videos: Iterable[TrainingVideo], num_videos: int, runner: VisionRunner, batch: int = 4) -> StepDataset:
        """Encode `num_videos` videos, `batch` of them at a time."""
        steps, tokens, salience, owner = [], [], [], []
        source = islice(videos, num_videos)
        while group := list(islice(source, batch)):
            encoded = runner(patchify(np.stack([video.frames for video in group])))
            tokens.append(encoded.tokens.half())
            salience.append(encoded.salience.float().cpu())
            owner += [torch.from_numpy(video.owner).reshape(-1, TOKENS_PER_STEP) for video in group]
            steps += [step for video in group for step in video.scene.steps]
        per_video = len(steps) // num_videos
        return StepDataset(steps, torch.cat(tokens), torch.cat(salience), torch.cat(owner), per_video)

    @property
    def num_videos(self) -> int:
        """How many videos were encoded."""
        return len(self.steps) // self.steps_per_video

    def whole(self, video: int) -> ComposedVideo:
        """A video as it was encoded."""
        first = video * self.steps_per_video
        rows = tuple(range(first, first + self.steps_per_video))
        return ComposedVideo(WorldScene(tuple(self.steps[row] for row in rows)), tuple(range(len(rows))), rows)

    def compose(self, rng: np.random.Generator, num_shown: int, num_steps: int = NUM_STEPS) -> ComposedVideo:
        """`num_shown` steps in random slots of a video of `num_steps`.

        Half of the videos take their steps from one encoded video (one background, as in real ones), half from anywhere.
        """
        while True:
            if rng.random() < 0.5 and self.steps_per_video >= num_shown:
                first = int(rng.integers(self.num_videos)) * self.steps_per_video
                rows = tuple(int(first + row) for row in rng.permutation(self.steps_per_video)[:num_shown])
            else:
                rows = self._distinct(rng, num_shown)
            if any(self.steps[row] for row in rows):
                break
        slots = tuple(sorted(int(slot) for slot in rng.permutation(num_steps)[:num_shown]))
        steps: list[tuple[Glyph, ...]] = [()] * num_steps
        for slot, row in zip(slots, rows, strict=True):
            steps[slot] = self.steps[row]
        return ComposedVideo(WorldScene(tuple(steps)), slots, rows)

    def _distinct(self, rng: np.random.Generator, num_shown: int) -> tuple[int, ...]:
        """Rows whose glyphs can live in one scene: no (colour, shape) twice."""
        taken: set[tuple[str, str]] = set()
        rows: list[int] = []
        while len(rows) < num_shown:
            row = int(rng.integers(len(self.steps)))
            pairs = {(glyph.color, glyph.shape) for glyph in self.steps[row]}
            if row not in rows and not pairs & taken:
                taken |= pairs
                rows.append(row)
        return tuple(rows)
