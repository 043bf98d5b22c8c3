r"""Turns dialogues about composed videos into padded batches for the text model.

One sequence is a whole dialogue:

    <|im_start|>user\n <|vision_start|>  visual tokens  <|vision_end|> question 1 <|im_end|>\n<|im_start|>assistant\n
    └──────────── prefix ─────────────┘  └─ num_kept ─┘                          answer 1 <|im_end|>\n  question 2 ...
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sparsevila_cluster.demo.checkpoint_builder import GRID_TOKENS, TOKENS_PER_STEP
from sparsevila_cluster.demo.questions import SceneQuestion
from sparsevila_cluster.demo.step_dataset import ComposedVideo, StepDataset
from sparsevila_cluster.demo.world import COLORS, KINDS, NUM_STEPS, PLACES, SHAPES, Question

AnyQuestion = Question | SceneQuestion

IGNORE = -100
ASKED_SIZES = (len(COLORS) + 1, len(SHAPES) + 1, NUM_STEPS + 1, len(PLACES) + 1, len(KINDS))


@dataclass(frozen=True)
class Turns:
    """All questions of a batch, flat. Rows count from the start of the sequence, pruned visual tokens included."""

    item: Tensor  # [turns] which dialogue
    first_row: Tensor  # first row of the turn's prefill (the last answer's pending token, from the second turn on)
    prompt_row: Tensor  # last prompt row: the one that produces the first answer token
    end_row: Tensor  # row of the answer's <|im_end|>
    targets: Tensor  # bool [turns, num_kept]: visual tokens of the glyphs asked for
    asked: Tensor  # [turns, len(ASKED_SIZES)]: what the question names, as classes
    questions: tuple[AnyQuestion, ...]


@dataclass(frozen=True)
class GroundingRows:
    """Rows that must look at glyphs to predict the next answer token, and where they should look."""

    item: Tensor  # [looks]
    row: Tensor
    turn: Tensor  # index into Turns
    targets: Tensor  # bool [looks, num_kept]
    first: Tensor  # bool: the last prompt row, which must find all glyphs asked for; others, those of their phrase


@dataclass(frozen=True)
class Batch:
    """Padded dialogues about videos, with all that the losses need."""

    prefix_ids: Tensor  # [items, prefix]
    visual: Tensor  # [items, num_kept, hidden]
    suffix_ids: Tensor  # [items, suffix], right-padded
    positions: Tensor  # [3, items, rows]
    labels: Tensor  # [items, rows]: the token that stands here, if it is to be predicted, else IGNORE
    slots: Tensor  # [items, num_kept]: step of each visual token
    cells: Tensor  # [items, num_kept]: its cell in the grid
    turns: Turns
    looks: GroundingRows

    @property
    def visual_rows(self) -> slice:
        """Where the visual tokens stand in every row of the batch."""
        first = self.prefix_ids.shape[1]
        return slice(first, first + self.visual.shape[1])


@cache
def asked_for(kind: str, text: str) -> tuple[int, ...]:
    """Classes of what a question names; the last class (or 0 for the step) means: not named."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    color = next((COLORS.index(word) for word in words if word in COLORS), len(COLORS))
    shape = next((SHAPES.index(word) for word in words if word in SHAPES), len(SHAPES))
    step = int(words[-1]) if words[-1].isdigit() else 0
    place = next((index for index, name in enumerate(PLACES) if name in text), len(PLACES))
    return color, shape, step, place, KINDS.index(kind)


@dataclass(frozen=True)
class Layout:
    """Dialogues as tokens behind their media, padded to the same length."""

    suffix_ids: Tensor  # [items, suffix]
    labels: Tensor  # [items, rows]
    spans: list[tuple[int, int, int, int]]  # of each turn: item, first row, prompt row, end row; see Turns


class DialogueTokens:
    """What dialogues consist of in the tokens of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.encode = cache(self._encode)
        self.prefix = self.encode("<|im_start|>user\n<|vision_start|>")
        self.media_end = self.encode("<|vision_end|>")
        self.user = self.encode("<|im_start|>user\n")
        self.assistant = self.encode("<|im_end|>\n<|im_start|>assistant\n")
        self.end, self.newline = self.encode("<|im_end|>"), self.encode("\n")
        self.pad = tokenizer.convert_tokens_to_ids("<|endoftext|>")

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def lay_out(self, dialogues: Sequence[Sequence[AnyQuestion]], num_visual: int) -> Layout:
        """num_visual: rows of media between the prefix and what is laid out."""
        suffixes, labels, spans = [], [], []
        start = len(self.prefix) + num_visual
        for item, questions in enumerate(dialogues):
            ids, wanted = list(self.media_end), [IGNORE] * len(self.media_end)
            first_row = start
            for number, question in enumerate(questions):
                prompt = (*(self.user if number else ()), *self.encode(question.text), *self.assistant)
                answer = (*self.encode(question.answer), *self.end)
                ids += prompt
                wanted += [IGNORE] * len(prompt)
                prompt_row = start + len(ids) - 1
                ids += (*answer, *self.newline)
                wanted += (*answer, *[IGNORE] * len(self.newline))
                end_row = prompt_row + len(answer)
                spans.append((item, first_row, prompt_row, end_row))
                first_row = end_row
            suffixes.append(ids)
            labels.append([IGNORE] * start + wanted)
        length = max(map(len, suffixes))
        return Layout(
            torch.tensor([ids + [self.pad] * (length - len(ids)) for ids in suffixes]),
            torch.tensor([wanted + [IGNORE] * (start + length - len(wanted)) for wanted in labels]),
            spans,
        )


class BatchBuilder(DialogueTokens):
    """Makes batches of dialogues with the tokens of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(tokenizer)
        (self.conjunction,) = self.encode(" and")

    def batch(
        self,
        dataset: StepDataset,
        shown: Sequence[ComposedVideo],
        dialogues: Sequence[list[Question]],
        keep: Tensor | None = None,
    ) -> Batch:
        """`keep`: ascending indices [items, num_kept] into the shown visual tokens; None keeps all."""
        device = dataset.tokens.device
        rows = torch.tensor([video.rows for video in shown])
        num_items, num_visual = len(shown), rows.shape[1] * TOKENS_PER_STEP
        if keep is None:
            keep = torch.arange(num_visual).expand(num_items, -1)
        slots = torch.tensor([video.slots for video in shown]).gather(1, keep // TOKENS_PER_STEP)
        cells = keep % TOKENS_PER_STEP
        everything = dataset.tokens[rows.to(device)].reshape(num_items, num_visual, -1)
        visual = everything.gather(1, keep.to(device)[..., None].expand(-1, -1, everything.shape[-1])).float()
        owner = dataset.owner[rows].reshape(num_items, -1).gather(1, keep)

        laid_out = self.lay_out(dialogues, keep.shape[1])
        spans = laid_out.spans
        asked = [question for questions in dialogues for question in questions]
        length = laid_out.suffix_ids.shape[1]
        columns = [torch.tensor([span[i] for span in spans]) for i in range(4)]
        items = [span[0] for span in spans]
        glyphs = [self._glyphs(shown[i], question, owner[i], slots[i]) for i, question in zip(items, asked, strict=True)]
        found = Turns(
            item=columns[0].to(device),
            first_row=columns[1].to(device),
            prompt_row=columns[2].to(device),
            end_row=columns[3].to(device),
            targets=torch.stack([found.any(0) for found in glyphs]).to(device),
            asked=torch.tensor([asked_for(question.kind, question.text) for question in asked]).to(device),
            questions=tuple(asked),
        )
        return Batch(
            prefix_ids=torch.tensor(self.prefix).expand(num_items, -1).to(device),
            visual=visual,
            suffix_ids=laid_out.suffix_ids.to(device),
            positions=self._positions(slots, cells, length).to(device),
            labels=laid_out.labels.to(device),
            slots=slots.to(device),
            cells=cells.to(device),
            turns=found,
            looks=self._looks(items, columns[2].tolist(), asked, glyphs, device),
        )

    def _positions(self, slots: Tensor, cells: Tensor, suffix: int) -> Tensor:
        """m-RoPE as the stock model computes it; text after the media goes on where the grid's longer side ends."""
        prefix, num_items = len(self.prefix), len(slots)
        before = torch.arange(prefix).expand(3, num_items, -1)
        media = torch.stack([slots, cells // GRID_TOKENS, cells % GRID_TOKENS]) + prefix
        after = (torch.arange(suffix) + prefix + GRID_TOKENS).expand(3, num_items, -1)
        return torch.cat([before, media, after], 2)

    @staticmethod
    def _glyphs(video: ComposedVideo, question: Question, owner: Tensor, slots: Tensor) -> Tensor:
        """bool [targets of the question (at least one row), num_kept]: the visual tokens of each."""
        glyphs = video.scene.steps[question.step]
        found = torch.zeros(max(1, len(question.targets)), len(owner), dtype=torch.bool)
        for number, glyph in enumerate(question.targets):
            found[number] = (owner == glyphs.index(glyph)) & (slots == question.step)
        return found

    def _looks(
        self,
        items: list[int],
        prompt_rows: list[int],
        questions: Sequence[Question],
        glyphs: Sequence[Tensor],
        device: torch.device,
    ) -> GroundingRows:
        """One look per answer token. In "a red star ... and a blue ring ..." each half looks at its own glyph."""
        looks, targets = [], []
        for turn, (question, found) in enumerate(zip(questions, glyphs, strict=True)):
            looks.append((items[turn], prompt_rows[turn], turn, True))
            targets.append(found.any(0))
            if question.kind == "count":
                continue
            phrase = 0
            for number, token in enumerate(self.encode(question.answer), 1):
                phrase += token == self.conjunction
                looks.append((items[turn], prompt_rows[turn] + number, turn, False))
                targets.append(found[phrase])
        stacked, known = torch.stack(targets), torch.stack(targets).any(1)
        item, row, index, first = (torch.tensor(column)[known].to(device) for column in zip(*looks, strict=True))
        return GroundingRows(item, row, index, stacked[known].to(device), first)


def keep_salient(dataset: StepDataset, shown: Sequence[ComposedVideo], ratio: float) -> Tensor:
    """The most salient tokens of every step."""
    return _keep_per_step(torch.stack([dataset.salience[list(video.rows)] for video in shown]), ratio)


def keep_random(shown: Sequence[ComposedVideo], ratio: float, rng: np.random.Generator) -> Tensor:
    """Random tokens, equally many in every step."""
    scores = rng.random((len(shown), len(shown[0].rows), TOKENS_PER_STEP), np.float32)
    return _keep_per_step(torch.from_numpy(scores), ratio)


def keep_glyphs(dataset: StepDataset, shown: Sequence[ComposedVideo], ratio: float, rng: np.random.Generator) -> Tensor:
    """Every glyph's token, then random background anywhere in the video."""
    glyph = torch.stack([dataset.owner[list(video.rows)] >= 0 for video in shown]).flatten(1)
    num_kept = max(int(glyph.sum(1).max()), round(ratio * glyph.shape[1]))
    scores = glyph * 2 + torch.from_numpy(rng.random(tuple(glyph.shape), np.float32))
    return scores.topk(num_kept, 1).indices.sort(1).values


def _keep_per_step(scores: Tensor, ratio: float) -> Tensor:
    num_items, num_steps, _ = scores.shape
    best = scores.topk(max(1, round(ratio * TOKENS_PER_STEP)), -1).indices.sort(-1).values
    return (best + torch.arange(num_steps)[:, None] * TOKENS_PER_STEP).reshape(num_items, -1)
