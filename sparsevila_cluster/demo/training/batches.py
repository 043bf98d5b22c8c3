"""Turns questions about windows into padded batches for the text model, with where each answer token must look."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sparsevila_cluster.demo.checkpoint_builder import GRID_TOKENS, TOKENS_PER_STEP
from sparsevila_cluster.demo.drawing import COLORS, PLACES
from sparsevila_cluster.demo.questions import KINDS, SceneQuestion
from sparsevila_cluster.demo.scenes import MAX_STEPS
from sparsevila_cluster.demo.training.dialogues import Batch, DialogueTokens, GroundingRows, Turns
from sparsevila_cluster.demo.training.scene_videos import ALL_SHAPES
from sparsevila_cluster.demo.training.windows import FACT_SIZES, EncodedVideos, Window

ASKED_SIZES = (len(COLORS) + 1, len(ALL_SHAPES) + 1, MAX_STEPS + 1, len(PLACES) + 1, len(KINDS))
# Kinds whose answer is a number, which the last of the things that are counted knows.
COUNTED = ("count", "how_long", "total")
# A thing knows the one before it: "before" is read off the thing that is named, "after" off the one that has this before it.
RANK = list(FACT_SIZES).index("rank")
PARTS = re.compile(r" and |; | to ")


@cache
def asked_for(kind: str, text: str) -> tuple[int, ...]:
    """Classes of what a question names; the last class (0 for the step) means: not named."""
    words = re.findall(r"[a-z]+", text.lower())
    color = next((COLORS.index(word) for word in words if word in COLORS), len(COLORS))
    shape = next((ALL_SHAPES.index(word) for word in words if word in ALL_SHAPES), len(ALL_SHAPES))
    step = re.search(r"\bstep (\d+)", text)
    place = next((index for index, name in enumerate(PLACES) if name in text), len(PLACES))
    return color, shape, int(step[1]) if step else 0, place, KINDS.index(kind)


def group_at(question: SceneQuestion) -> list[int]:
    """For each character of the answer, the group of `looks` that it is about; -1: none.

    Where an answer has as many parts that name something as there are groups, each part has its own; else all have the first.
    """
    answer, groups = question.answer, question.looks
    ends = [*(found.end() for found in PARTS.finditer(answer)), len(answer)]
    named, part_of, begin = 0, [], 0
    for end in ends:
        says_nothing = "nothing" in answer[begin:end]
        part_of += [-1 if says_nothing else named] * (end - begin)
        named += not says_nothing
        begin = end
    if not groups:
        return [-1] * len(answer)
    return part_of if named == len(groups) else [0] * len(answer)


class BatchMaker(DialogueTokens):
    """Makes batches with the tokens of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, encoded: EncodedVideos, part: int = 1) -> None:
        """part: looks of every answer's first token, and of each `part`-th of the others; they cost as much as a layer."""
        super().__init__(tokenizer)
        self.encoded, self.part = encoded, part

    def batch(self, windows: Sequence[Window], dialogues: Sequence[list[SceneQuestion]], keep: Tensor) -> Batch:
        """keep: ascending indices [items, num_kept] into the visual tokens of the windows, which are equally long."""
        encoded, num_items = self.encoded, len(windows)
        device = encoded.tokens.device
        slots = torch.tensor([window.first for window in windows])[:, None] + keep // TOKENS_PER_STEP
        cells = keep % TOKENS_PER_STEP
        visual = torch.stack(
            [encoded.tokens[window.video][slot.to(device), cell.to(device)]
             for window, slot, cell in zip(windows, slots, cells, strict=True)]
        ).float()  # fmt: skip

        laid_out = self.lay_out(dialogues, keep.shape[1])
        spans, asked = laid_out.spans, [question for questions in dialogues for question in questions]
        columns = torch.tensor(spans, dtype=torch.long, device=device).reshape(-1, 4).unbind(1)
        facts = self._facts(windows, slots, cells)
        looks, all_targets = self._looks(windows, spans, asked, slots, cells, facts, device)
        return Batch(
            prefix_ids=torch.tensor(self.prefix).expand(num_items, -1).to(device),
            visual=visual,
            suffix_ids=laid_out.suffix_ids.to(device),
            positions=self._positions(windows, slots, cells, laid_out.suffix_ids.shape[1]).to(device),
            labels=laid_out.labels.to(device),
            slots=slots.to(device),
            cells=cells.to(device),
            facts=facts.to(device),
            turns=Turns(
                item=columns[0],
                first_row=columns[1],
                prompt_row=columns[2],
                end_row=columns[3],
                targets=all_targets,
                asked=torch.tensor([asked_for(question.kind, question.text) for question in asked], dtype=torch.long)
                .reshape(-1, len(ASKED_SIZES))
                .to(device),
                questions=tuple(asked),
            ),
            looks=looks,
        )

    def _positions(self, windows: Sequence[Window], slots: Tensor, cells: Tensor, suffix: int) -> Tensor:
        """m-RoPE as the stock model computes it; text after the media goes on behind the largest position in it."""
        prefix, num_items = len(self.prefix), len(slots)
        before = torch.arange(prefix).expand(3, num_items, -1)
        media = torch.stack([slots, cells // GRID_TOKENS, cells % GRID_TOKENS]) + prefix
        behind = torch.tensor([max(window.steps.stop, GRID_TOKENS) for window in windows])[:, None]
        after = (torch.arange(suffix) + prefix + behind).expand(3, num_items, -1)
        return torch.cat([before, media, after], 2)

    def _looks(
        self,
        windows: Sequence[Window],
        spans: Sequence[tuple[int, int, int, int]],
        asked: Sequence[SceneQuestion],
        slots: Tensor,
        cells: Tensor,
        facts: Tensor,
        device: torch.device,
    ) -> tuple[GroundingRows, Tensor]:
        """One look per answer token that is about something, and for each turn all that it is about, bool [turns, num_kept]."""
        kept = slots * TOKENS_PER_STEP + cells
        found, rows, all_targets = [], [], torch.zeros(len(asked), kept.shape[1], dtype=torch.bool)
        for turn, (question, (item, _, prompt_row, _)) in enumerate(zip(asked, spans, strict=True)):
            groups = [[self._tokens(windows[item], step, place) for step, place in group] for group in question.looks]
            via = [cell for step, place in question.via for cell in self._tokens(windows[item], step, place)]
            if question.kind == "before":
                groups, via = [[via]], []
            elif question.kind == "after":
                via = []
            if question.kind in COUNTED:
                groups = [[group[-1]] for group in groups]
            everything = [token for group in groups for seen in group for token in seen]
            all_targets[turn] = _among(kept[item], [*everything, *via])
            on_the_way = _among(kept[item], via)
            for number, wanted in enumerate(self._wanted(question, groups, everything)):
                if number and (number + turn) % self.part:
                    continue
                for hop, target in enumerate((on_the_way, _among(kept[item], wanted)) if via else (_among(kept[item], wanted),)):
                    if target.any():
                        found.append(target)
                        addressed = "step " in question.text and (number > 0 or len(groups) == 1)
                        rows.append((item, prompt_row + number, turn, number == 0, hop, addressed))
        columns = torch.tensor(rows, dtype=torch.long).reshape(-1, 6)
        targets = torch.stack(found) if found else torch.zeros(0, kept.shape[1], dtype=torch.bool)
        items, one = columns[:, 0], targets.int().argmax(1)
        address = torch.stack([slots[items, one], facts[items, one, RANK]], 1).masked_fill(columns[:, 5:] == 0, -1)
        looks = GroundingRows(
            item=items.to(device),
            row=columns[:, 1].to(device),
            turn=columns[:, 2].to(device),
            targets=targets.to(device),
            first=columns[:, 3].bool().to(device),
            address=address.to(device),
            hop=columns[:, 4].to(device),
        )
        return looks, all_targets.to(device)

    def _facts(self, windows: Sequence[Window], slots: Tensor, cells: Tensor) -> Tensor:
        first = torch.tensor([window.first for window in windows])[:, None]
        facts = torch.stack([self.encoded.facts(window) for window in windows])
        return facts[torch.arange(len(windows))[:, None], slots - first, cells]

    def _tokens(self, window: Window, step: int, place: str) -> list[int]:
        return [step * TOKENS_PER_STEP + cell for cell in self.encoded.cells(window, (step, place))]

    def _wanted(self, question: SceneQuestion, groups: list[list[list[int]]], everything: list[int]) -> Iterator[list[int]]:
        """For each token of the answer, the visual tokens that it is about. groups: theirs, by phrase, then by look.

        The first is about all of them, unless it is a letter: before an answer begins, everything has to be found.
        """
        group_of, letters = group_at(question), 0
        said = self.tokenizer(question.answer, add_special_tokens=False, return_offsets_mapping=True)
        for number, (begin, end) in enumerate(said["offset_mapping"]):
            group, text = group_of[end - 1], question.answer[begin:end].strip()
            is_letter = len(text) == 1 and text.isupper()
            if group < 0:
                yield []
            elif is_letter:
                yield groups[group][0][letters : letters + 1]
            else:
                yield [token for seen in groups[group] for token in seen] if number else everything
            letters = letters + 1 if is_letter else 0


def _among(kept: Tensor, wanted: Sequence[int]) -> Tensor:
    """bool, one per kept token: whether it is one of those wanted."""
    return torch.isin(kept, torch.tensor(wanted, dtype=kept.dtype))


def keep_salient(encoded: EncodedVideos, windows: Sequence[Window], num_per_step: int) -> Tensor:
    """The most salient tokens of every step: ascending indices [items, steps * num_per_step]."""
    scores = torch.stack([encoded.salience[window.video, window.first : window.steps.stop] for window in windows])
    best = scores.topk(num_per_step, -1).indices.sort(-1).values
    return (best + torch.arange(scores.shape[1])[:, None] * TOKENS_PER_STEP).flatten(1)


def keep_all(windows: Sequence[Window]) -> Tensor:
    """Every token."""
    return torch.arange(windows[0].scene.num_steps * TOKENS_PER_STEP).expand(len(windows), -1)
