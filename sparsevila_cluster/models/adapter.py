"""The contract between checkpoints and engines: what a model family and a text decoder must offer.

Media -> family.patchify -> VisualInputs -> family.encode -> VisualTokens -> (prune) -> text.forward
                                         -> family.plan   -> PromptPlan
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from sparsevila_cluster.attention.interface import StepBatch
from sparsevila_cluster.kvcache.arena import KVSpec
from sparsevila_cluster.media import Media
from sparsevila_cluster.models.checkpoint import Checkpoint

Part = Literal["vision", "embed", "llm", "head"]
PREFILL_PARTS: tuple[Part, ...] = ("vision", "embed", "llm")
DECODE_PARTS: tuple[Part, ...] = ("embed", "llm", "head")
ALL_PARTS: tuple[Part, ...] = ("vision", "embed", "llm", "head")


class Between(Enum):
    """Text that only the chat template knows."""

    MEDIA = "what the template writes between two media of one message"


# Text, or the id of one token of the checkpoint's vocabulary, or text that the template knows.
Piece = str | int | Between


@dataclass(frozen=True)
class Slot:
    """How a chat template writes one media: its content `type` in the template's messages, and what comes out for it."""

    content: Literal["video", "image"]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class VisualInputs:
    """One media, preprocessed for the vision tower, and where its N visual tokens will stand. Families add fields.

    pixels: uint8, in the family's own order, normalized by `encode`. kind: "video" or "image". spelling: what replaces the media's
    slot in the prompt; each visual placeholder in it is a run of visual tokens, `runs` long. group i32 [N] (frame or view, from
    0) and cell i32 [N, 2] (row, col) in the group's grid, -1 for structural tokens (row ends: always kept, never scored). grids:
    (rows, cols) of each group, each spread over the whole picture; frame_of_group: index of each group's first sampled frame.
    """

    pixels: Tensor
    kind: Literal["video", "image"]
    spelling: tuple[Piece, ...]
    runs: tuple[int, ...]
    group: Tensor
    cell: Tensor
    grids: tuple[tuple[int, int], ...]
    frame_of_group: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """N."""
        return sum(self.runs)


@dataclass(frozen=True)
class VisualTokens:
    """Embeddings after the projector, in prompt order.

    embeds [N, D]; salience f32 [N], 1.0 = an average patch, NaN = structural (always kept); group i32 [N] (frame or view,
    counted over all media of the prompt); cell i32 [N, 2] (row, col in the group's grid); deepstack: extra levels [N, D] each;
    taps f32 [N, T]: what the salience is of the last of the encoder's T layers that attend over whole frames, of each of them.
    """

    embeds: Tensor
    salience: Tensor
    group: Tensor
    cell: Tensor
    deepstack: tuple[Tensor, ...] = ()
    taps: Tensor | None = None


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


# Called while a tower runs: how much is done, and of how much. It may raise, which ends the run.
Report = Callable[[int, int], None]


def no_report(done: int, total: int) -> None:
    """A `Report` that nobody reads."""


class Rules(Protocol):
    """How a checkpoint's processor turns frames into pixels."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for hashing."""
        ...


class Family(Protocol):
    """Everything that is particular to one vision-language architecture, vision side.

    A class is built as `cls(config, rules, core, device)`: `rules` from its `read_rules`, `core` the transformers model without
    its head (for its vision modules), or None on a worker without the "vision" part.
    """

    name: str

    @classmethod
    def read_rules(cls, config: Any, files: Checkpoint) -> Rules:
        """The checkpoint's preprocessing. Raises BadCheckpoint: missing or illegal, or at odds with `config`."""
        ...

    @classmethod
    def slots(cls, config: Any) -> dict[str, Slot]:
        """How the chat template writes each kind of media."""
        ...

    @classmethod
    def visual_ids(cls, config: Any) -> tuple[int, ...]:
        """Ids of the placeholders that stand for visual tokens."""
        ...

    def patchify(self, media: Media, alone: bool = True) -> VisualInputs:
        """Resize, normalize and cut frames exactly as the checkpoint's processor config says. alone: the prompt has no other media
        of this kind (some families give a lone picture more tokens). Raises BadMedia, TooLarge.
        """
        ...

    def plan(self, ids: Sequence[int], inputs: Sequence[VisualInputs], video_text_pos: Literal["max+1", "hf5"]) -> PromptPlan:
        """Expand the placeholder of each run in `ids` and compute positions on the unpruned prompt."""
        ...

    def encode(
        self, inputs: Sequence[VisualInputs], needs: Collection[str] = ("salience",), report: Report = no_report
    ) -> VisualTokens:
        """Run the vision tower and projector, a few frames at a time. Requires the "vision" part.

        needs: "salience" and "taps" are computed only if named here; "taps" give the salience, too. Without either, the salience of
        all tokens that are not structural is 1.
        """
        ...


class TextBackend(Protocol):
    """A text decoder without KV of its own. `lean` is ours; `hf` runs the checkpoint's transformers modules.

    embed_weight [number of token ids, D]; None without the "embed" part.
    """

    name: str
    spec: KVSpec
    hidden_size: int
    num_heads: int
    num_position_rows: int
    embed_weight: Tensor | None

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

    def prefix_ids(
        self, kinds: Sequence[str], system_prompt: str | None, spellings: Sequence[Sequence[Piece]] | None = None
    ) -> list[int]:
        """Everything before the question: system message, opening of the user turn, each media ("video" or "image", in order),
        up to and including the end of the media. `spellings` replace what the template writes for each media.
        """
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
    """A loaded checkpoint, or the parts of it that a worker needs. attention: the kernels that its text decoder is to run with."""

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
    attention: Literal["torch", "triton"] = "torch"
