r"""Dialogues about videos as padded tokens, and what a batch of them holds.

One sequence is a whole dialogue:

    <|im_start|>user\n <|vision_start|>  visual tokens  <|vision_end|> question 1 <|im_end|>\n<|im_start|>assistant\n
    └──────────── prefix ─────────────┘  └─ num_kept ─┘                          answer 1 <|im_end|>\n  question 2 ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from sparsevila_cluster.demo.questions import SceneQuestion

IGNORE = -100


@dataclass(frozen=True)
class Turns:
    """All questions of a batch, flat. Rows count from the start of the sequence, pruned visual tokens included."""

    item: Tensor  # [turns] which dialogue
    first_row: Tensor  # first row of the turn's prefill (the last answer's pending token, from the second turn on)
    prompt_row: Tensor  # last prompt row: the one that produces the first answer token
    end_row: Tensor  # row of the answer's <|im_end|>
    targets: Tensor  # bool [turns, num_kept]: visual tokens of the glyphs asked for
    asked: Tensor  # [turns, things that a question may name]: what the question names, as classes
    questions: tuple[SceneQuestion, ...]


@dataclass(frozen=True)
class GroundingRows:
    """Rows that must look at glyphs to predict the next answer token, and where they should look."""

    item: Tensor  # [looks]
    row: Tensor
    turn: Tensor  # index into Turns
    targets: Tensor  # bool [looks, num_kept]
    first: Tensor  # bool: the last prompt row, which must find all glyphs asked for; others, those of their phrase
    address: Tensor  # [looks, 2]: step and rank in it of what the row looks at, where the words say them; else -1
    hop: Tensor  # 0: found at once; 1: by way of something that had to be found before, for which the row has another look


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
    facts: Tensor  # [items, num_kept, len(windows.FACT_SIZES)]: what each visual token is to know; -1 where one does not apply
    turns: Turns
    looks: GroundingRows

    @property
    def visual_rows(self) -> slice:
        """Where the visual tokens stand in every row of the batch."""
        first = self.prefix_ids.shape[1]
        return slice(first, first + self.visual.shape[1])


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

    def lay_out(self, dialogues: Sequence[Sequence[SceneQuestion]], num_visual: int) -> Layout:
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
