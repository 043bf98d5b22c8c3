"""Encoded videos of 64 steps, and shorter windows of them for the text model to learn from.

The vision tower is frozen by now and looks at one step at a time, so a step's visual tokens do not depend on its neighbours. A
window keeps the numbers that its steps have in the whole video: all of them are learned from the shortest windows on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from sparsevila_cluster.demo.checkpoint_builder import TOKENS_PER_STEP
from sparsevila_cluster.demo.drawing import GRID, PLACES
from sparsevila_cluster.demo.questions import Look, SceneQuestion, make_questions
from sparsevila_cluster.demo.scenes import Scene
from sparsevila_cluster.demo.training.scene_videos import SampledScene
from sparsevila_cluster.demo.training.vision_runner import VisionRunner, patchify

# What the token of a thing is to know, and one more than it can be: for how many steps the thing has been there, the how manieth of
# its step it is, and how many different things of its colour and of its shape there have been; itself counts.
COUNT_SIZES = {"age": 5, "rank": 5, "color": 12, "shape": 12}
STEP_NUMBER = re.compile(r"\bstep (\d+)")


@dataclass(frozen=True)
class Window:
    """`scene`: what the window shows, its own steps from 0 on; they are steps `first` and later of an encoded video."""

    video: int
    first: int
    scene: Scene

    @property
    def steps(self) -> range:
        """Their numbers in the video."""
        return range(self.first, self.first + self.scene.num_steps)

    def questions(self, rng: np.random.Generator, num: int, kinds: tuple[str, ...]) -> list[SceneQuestion]:
        """About what the window shows; steps are named, and looked at, by their numbers in the video."""
        return [self._in_video(question) for question in make_questions(self.scene, rng, num, kinds)]

    def _in_video(self, question: SceneQuestion) -> SceneQuestion:
        text, answer = (
            STEP_NUMBER.sub(lambda found: f"step {int(found[1]) + self.first}", words) for words in (question.text, question.answer)
        )
        *looks, via = (tuple((step + self.first, place) for step, place in group) for group in (*question.looks, question.via))
        return SceneQuestion(question.kind, text, answer, tuple(looks), via)


def crop(scene: Scene, first: int, num_steps: int) -> Scene:
    """`num_steps` of the scene's steps, from `first` on, as a scene of its own."""
    end, stays = first + num_steps, []
    for stay in scene.stays:
        begin, until = max(first, stay.begin), min(end, stay.end)
        if begin < until:
            places = stay.places[begin - stay.begin : until - stay.begin]
            stays.append(replace(stay, begin=begin - first, places=places))
    return Scene(num_steps, tuple(stays))


@dataclass(frozen=True)
class EncodedVideos:
    """Videos of equal length. tokens: [videos, steps, TOKENS_PER_STEP, hidden], half precision; the rest is on the CPU."""

    scenes: tuple[Scene, ...]
    tokens: Tensor
    salience: Tensor  # [videos, steps, TOKENS_PER_STEP]
    held: Tensor  # bool, likewise: whether a thing or a word has the cell

    @staticmethod
    @torch.no_grad()
    def encode(videos: Iterable[SampledScene], num_videos: int, runner: VisionRunner) -> EncodedVideos:
        """The first `num_videos` of them."""
        scenes, tokens, salience, held = [], [], [], []
        for video in islice(videos, num_videos):
            encoded = runner(patchify(video.frames[None]))
            scenes.append(video.scene)
            tokens.append(encoded.tokens.half())
            salience.append(encoded.salience.float().cpu())
            held.append(torch.from_numpy(video.owner >= 0).reshape(-1, TOKENS_PER_STEP))
        return EncodedVideos(tuple(scenes), torch.stack(tokens), torch.stack(salience), torch.stack(held))

    def window(self, rng: np.random.Generator, num_steps: int) -> Window:
        """A random one that shows something."""
        while True:
            video = int(rng.integers(len(self.scenes)))
            first = int(rng.integers(self.scenes[video].num_steps - num_steps + 1))
            scene = crop(self.scenes[video], first, num_steps)
            if next(scene.things(), None):
                return Window(video, first, scene)

    def counts(self, window: Window) -> Tensor:
        """int64 [steps of the window, TOKENS_PER_STEP, len(COUNT_SIZES)]; -1 where there is no thing."""
        found = torch.full((window.scene.num_steps, TOKENS_PER_STEP, len(COUNT_SIZES)), -1)
        things, caps = list(window.scene.things()), torch.tensor([*COUNT_SIZES.values()]) - 1
        for step in range(window.scene.num_steps):
            for rank, (stay, thing) in enumerate(window.scene.things_at(step), 1):
                others = [other for before, other in things if before.begin < step and before is not stay]
                alike = [1 + sum(getattr(other, name) == getattr(thing, name) for other in others) for name in ("color", "shape")]
                cells = self.cells(window, (window.first + step, stay.place_at(step)))
                found[step, cells] = torch.minimum(torch.tensor([step - stay.begin + 1, rank, *alike]), caps)
        return found

    def cells(self, window: Window, look: Look) -> list[int]:
        """The cells of what is at a place at a step, from the left: of a word one for each letter."""
        step, place = look
        down, right = divmod(PLACES.index(place), 2)
        held = self.held[window.video, step].reshape(GRID, GRID)
        half = GRID // 2
        quarter = held[down * half : (down + 1) * half, right * half : (right + 1) * half].nonzero().tolist()
        return [(down * half + row) * GRID + right * half + col for row, col in quarter]
