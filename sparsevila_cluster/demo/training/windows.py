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
from sparsevila_cluster.demo.drawing import COLORS, GRID, PLACES
from sparsevila_cluster.demo.questions import Look, SceneQuestion, make_questions
from sparsevila_cluster.demo.scenes import Scene, Thing
from sparsevila_cluster.demo.training.scene_videos import ALL_LETTERS, ALL_SHAPES, SampledScene
from sparsevila_cluster.demo.training.vision_runner import VisionRunner, patchify

# What the token of a thing, or of a letter of a word, is to know of its surroundings, with one more class than there are answers:
#   color, shape, place       what it is, with "none of them" as questions have it, and where
#   age, begin place          since how many steps it has been there, and where it was at first
#   rank, things              the how manieth of all in its step it is, and how many things of the step there have been
#   color count, shape count  how many different things of its colour, and of its shape, there have been; itself counts
#   color before, shape ...   the thing that appeared last before it
#   letter before, second ... the letters to its left
FACT_SIZES = {
    "color": len(COLORS) + 1, "shape": len(ALL_SHAPES) + 1, "place": len(PLACES) + 1,
    "age": 5, "begin place": len(PLACES) + 1, "rank": 5, "things": 5, "color count": 12, "shape count": 12,
    "color before": len(COLORS) + 1, "shape before": len(ALL_SHAPES) + 1,
    "letter before": len(ALL_LETTERS) + 1, "second letter before": len(ALL_LETTERS) + 1,
}  # fmt: skip
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

    def facts(self, window: Window) -> Tensor:
        """int64 [steps of the window, TOKENS_PER_STEP, len(FACT_SIZES)]; -1 where a fact does not apply."""
        scene, found = window.scene, torch.full((window.scene.num_steps, TOKENS_PER_STEP, len(FACT_SIZES)), -1)
        order = [thing for _, thing in scene.things()]
        before = {thing: None if i == 0 else order[i - 1] for i, thing in enumerate(order)}
        for step in range(scene.num_steps):
            seen, num_things = [(stay, thing) for stay, thing in scene.things() if stay.begin < step], 0
            for rank, stay in enumerate(scene.at(step), 1):
                thing = stay.what if isinstance(stay.what, Thing) else None
                color, shape = (
                    (COLORS.index(thing.color), ALL_SHAPES.index(thing.shape)) if thing else (len(COLORS), len(ALL_SHAPES))
                )
                common = [
                    color,
                    shape,
                    PLACES.index(stay.place_at(step)),
                    step - stay.begin + 1,
                    PLACES.index(stay.places[0]),
                    rank,
                ]
                cells = self.cells(window, (window.first + step, stay.place_at(step)))
                if isinstance(stay.what, str):
                    letters = [len(ALL_LETTERS)] * 2 + [ALL_LETTERS.index(letter) for letter in stay.what]
                    for i, cell in enumerate(cells):
                        facts = [*common, num_things, -1, -1, -1, -1, letters[i + 1], letters[i]]
                        found[step, cell] = torch.tensor(facts)
                    continue
                num_things += 1
                assert thing is not None
                others = [other for earlier, other in seen if earlier is not stay]
                alike = [1 + sum(getattr(other, name) == getattr(thing, name) for other in others) for name in ("color", "shape")]
                last = before[thing]
                left = (len(COLORS), len(ALL_SHAPES)) if last is None else (COLORS.index(last.color), ALL_SHAPES.index(last.shape))
                found[step, cells] = torch.tensor([*common, num_things, *(min(one, 11) for one in alike), *left, -1, -1])
        return found

    def cells(self, window: Window, look: Look) -> list[int]:
        """The cells of what is at a place at a step, from the left: of a word one for each letter."""
        step, place = look
        down, right = divmod(PLACES.index(place), 2)
        held = self.held[window.video, step].reshape(GRID, GRID)
        half = GRID // 2
        quarter = held[down * half : (down + 1) * half, right * half : (right + 1) * half].nonzero().tolist()
        return [(down * half + row) * GRID + right * half + col for row, col in quarter]
