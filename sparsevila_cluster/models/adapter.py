"""The contract between checkpoints and engines: what a model family and a text decoder must offer.

Knows: the shapes that cross this boundary. Does not know: any architecture, transformers, pruning policies, KV layout.

    Media -> family.patchify -> VisualInputs -> family.encode -> VisualTokens -> (prune) -> text.forward
                                             -> family.plan   -> PromptPlan
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from sparsevila_cluster.kv import KVSpec
from sparsevila_cluster.media import Media

Part = Literal["vision", "embed", "llm", "head"]
PREFILL_PARTS: tuple[Part, ...] = ("vision", "embed", "llm")
DECODE_PARTS: tuple[Part, ...] = ("embed", "llm", "head")
ALL_PARTS: tuple[Part, ...] = ("vision", "embed", "llm", "head")


@dataclass(frozen=True)
class VisualInputs:
    """One media, preprocessed for the vision tower.

    pixels: uint8 [num_patches, patch_dim] in the family's own patch order, normalised by `encode`; grid: (groups, rows, cols)
    of visual tokens after merging, so groups * rows * cols = num_tokens; frame_of_group: index of each group's first sampled
    frame; seconds_per_group: time between two groups (0 for an image); kind: "video" or "image".
    """

    pixels: Tensor
    grid: tuple[int, int, int]
    frame_of_group: tuple[int, ...]
    seconds_per_group: float
    kind: Literal["video", "image"]

    @property
    def num_tokens(self) -> int:
        groups, rows, cols = self.grid
        return groups * rows * cols


@dataclass(frozen=True)
class VisualTokens:
    """Embeddings after the projector, in prompt order.

    embeds [N, D]; salience f32 [N], 1.0 = an average patch, NaN = structural (always kept); group i32 [N] (frame or crop,
    counted over all media of the prompt); cell i32 [N, 2] (row, col in the group's grid); deepstack: extra levels [N, D] each.
    """

    embeds: Tensor
    salience: Tensor
    group: Tensor
    cell: Tensor
    deepstack: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class PromptPlan:
    """The unpruned media prefix as tokens.

    ids i64 [T] with every visual placeholder expanded; visual_mask bool [T]; positions i64 [R, T] (R = 3 for M-RoPE, else 1);
    question_start_pos: position of the first token after the prefix; generation_floor: no generated token stands before this
    position (0 except with video_text_pos="hf5").
    """

    ids: Tensor
    visual_mask: Tensor
    positions: Tensor
    question_start_pos: int
    generation_floor: int = 0


class Family(Protocol):
    """Everything that is particular to one vision-language architecture, vision side."""

    name: str

    def patchify(self, media: Media) -> VisualInputs:
        """Resize, normalise and cut frames exactly as the checkpoint's processor config says. Raises BadMedia, TooLarge."""
        ...

    def plan(self, ids: Sequence[int], inputs: Sequence[VisualInputs], video_text_pos: Literal["max+1", "hf5"]) -> PromptPlan:
        """Expand the single placeholder of each media in `ids` and compute positions on the unpruned prompt."""
        ...

    def encode(self, inputs: Sequence[VisualInputs], capture: bool = True) -> VisualTokens:
        """Run the vision tower and projector. Needs the "vision" part. Without `capture`, salience is all ones and free."""
        ...


class StepBatch(Protocol):
    """What a text decoder calls once per layer: write the new KV rows and attend. Implemented by the engines."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [T, Hq, D], k and v [T, Hkv, D], after RoPE -> [T, Hq, D]."""
        ...

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """k and v [T, Hkv, D] as in `attend`, which is not called for this layer: nobody reads its result."""
        ...


class TextBackend(Protocol):
    """A text decoder without KV of its own. `lean` is ours; `hf` runs the checkpoint's transformers modules."""

    name: str
    spec: KVSpec
    hidden_size: int
    num_heads: int
    num_position_rows: int

    def embed(self, ids: Tensor) -> Tensor:
        """ids i64 [T] -> [T, D]."""
        ...

    def forward(
        self,
        hidden: Tensor,
        positions: Tensor,
        batch: StepBatch,
        deepstack: Sequence[Tensor] = (),
        visual_rows: Tensor | None = None,
        kv_only: bool = False,
    ) -> Tensor:
        """hidden [T, D], positions i64 [R, T] -> hidden after the final norm [T, D].

        kv_only: the caller wants the KV rows that `batch` receives and not the result, so that the last layer may stop after
        its keys and values and give them to `batch.write`; the return value is then undefined. deepstack level i is added to
        rows `visual_rows` i64 after layer i.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, D] -> float32 [n, V]. Needs the "head" part."""
        ...


class ChatFormat(Protocol):
    """The checkpoint's chat template, cut where our cache boundaries are, and its tokenizer."""

    eos_ids: frozenset[int]
    vocab_size: int

    def prefix_ids(self, kinds: Sequence[str], system_prompt: str | None) -> list[int]:
        """Everything before the question: system message, opening of the user turn, one placeholder per media ("video" or
        "image", in order), up to and including the end of the media."""
        ...

    def question_ids(self, question: str, first: bool, pending: int | None) -> tuple[list[int], int, int]:
        """Tokens from the end of the KV to the opening of the answer, and the half-open interval of the question's own words.

        first: the question follows the media prefix directly. Otherwise the previous answer is closed first: `pending` is its
        last sampled token (which has no KV yet); it is an end-of-turn token or the template's closing follows it.
        Raises BadRequest for text that contains one of the tokenizer's control tokens.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of answer tokens, control tokens left out."""
        ...


@dataclass
class Model:
    """A loaded checkpoint, or the parts of it that a worker needs."""

    family: Family
    text: TextBackend
    chat: ChatFormat
    spec: KVSpec
    fingerprint: str
    parts: tuple[Part, ...]
    device: torch.device
    config: Any
    processor_hash: str
    max_position: int
    weight_bytes: int
