"""The text model's forward in training, and the throw-away heads that make it learn in minutes.

The auxiliary heads and losses, none of which is stored in the checkpoint, read the input of layer `AUXILIARY_LAYER`:
- slot: each visual token predicts its step and cell (0.1); so steps get written into visual tokens early;
- facts: the tokens of things and letters predict those of `FACT_SIZES` (1.0): what was counted, or stood before or beside, is then
  looked up by questions instead of being found out anew by each;
- address: rows of answers predict the step, and the how manieth of it, that they are about, where a question names a step (0.25);
- query: the last prompt row predicts what the question names (0.5), and so do the answer's rows (0.25);
- grounding: in layer `AUXILIARY_LAYER`, the last prompt row attends to the glyphs that are asked for (0.5), and each of
  the answer's rows to the glyph that it names (0.5); where these can only be found by way of another ("before the red star"),
  to that one, and to them in the layer behind (0.5).
Without query and grounding, training stalled at half of all answers right: it named a colour of *some* glyph in the
video. Without those of the answer's rows, the same loss took half as many updates again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb, repeat_kv

from sparsevila_cluster.demo.checkpoint_builder import GRID_TOKENS
from sparsevila_cluster.demo.training.dialogues import IGNORE, Batch
from sparsevila_cluster.demo.training.windows import FACT_SIZES

AUXILIARY_LAYER = 3
# What a question may name, in the order of `Turns.asked`.
ASKED = ("color", "shape", "step", "place", "kind")
AUXILIARY_WEIGHTS = {
    "slot": 0.1, "facts": 1.0, "query": 0.5, "answer_query": 0.25, "address": 0.25,
    "grounding": 0.5, "answer_grounding": 0.5, "second_grounding": 0.5,
}  # fmt: skip


class TextOutput(NamedTuple):
    """Hidden states of the text model."""

    hidden: Tensor  # [items, rows, hidden], after the final norm
    inner: Tensor  # what enters layer AUXILIARY_LAYER
    later: Tensor  # what enters the layer behind it


def embed(model: Qwen2_5_VLForConditionalGeneration, batch: Batch) -> Tensor:
    """float [items, rows, hidden]: embeddings of prefix, visual tokens and suffix."""
    table = model.model.language_model.embed_tokens
    return torch.cat([table(batch.prefix_ids), batch.visual, table(batch.suffix_ids)], 1)


def run_text(
    model: Qwen2_5_VLForConditionalGeneration, batch: Batch, masks: Tensor | list[Tensor | None] | None = None
) -> TextOutput:
    """`masks`: bool [items, 1, rows, rows] for all layers or one per layer, True where a row may look; None: causal."""
    text = model.model.language_model
    x = embed(model, batch)
    rotary = text.rotary_emb(x, batch.positions)
    entering = []
    for index, layer in enumerate(text.layers):
        entering.append(x)
        mask = masks[index] if isinstance(masks, list) else masks
        x = layer(x, attention_mask=mask, position_embeddings=rotary, use_cache=False)
    return TextOutput(text.norm(x), entering[AUXILIARY_LAYER], entering[AUXILIARY_LAYER + 1])


def run_to_auxiliary_layer(model: Qwen2_5_VLForConditionalGeneration, batch: Batch) -> Tensor:
    """[items, rows, hidden]: what enters layer AUXILIARY_LAYER, by the layers before it alone; causal."""
    text = model.model.language_model
    x = embed(model, batch)
    rotary = text.rotary_emb(x, batch.positions)
    for layer in text.layers[:AUXILIARY_LAYER]:
        x = layer(x, attention_mask=None, position_embeddings=rotary, use_cache=False)
    return x


def answer_logits(model: Qwen2_5_VLForConditionalGeneration, batch: Batch, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of every row that predicts an answer token, and those tokens."""
    wanted = batch.labels[:, 1:]
    rows = wanted != IGNORE
    return model.lm_head(hidden[:, :-1][rows]), wanted[rows]


def causal_mask(batch: Batch) -> Tensor:
    """bool [items, 1, rows, rows]: True where a row may look."""
    rows = batch.labels.shape[1]
    square = torch.ones(rows, rows, dtype=torch.bool, device=batch.labels.device).tril()
    return square.expand(batch.labels.shape[0], 1, -1, -1).clone()


def turns_apart_mask(batch: Batch) -> Tensor:
    """Each turn sees the media and itself: eight independent questions for the price of one video."""
    items, rows = batch.labels.shape
    turn = torch.zeros(items, rows, dtype=torch.long, device=batch.labels.device)
    # a turn starts at <|im_start|>user, two rows after the previous answer's end (and its newline)
    starts = batch.turns.first_row + 2 * (batch.turns.first_row > batch.visual_rows.stop)
    turn[batch.turns.item, starts] = 1
    turn = turn.cumsum(1)
    turn[:, : batch.visual_rows.stop + 1] = 0  # the prefix, and <|vision_end|>
    same = (turn[:, :, None] == turn[:, None, :]) | (turn[:, None, :] == 0)
    return causal_mask(batch) & same[:, None]


def retrieval_mask(batch: Batch, retrieved_tokens: Tensor) -> Tensor:
    """Answer rows see only the visual tokens in `retrieved_tokens`, bool [turns, num_kept]; all other rows see everything.

    The row of <|im_end|> is no answer row: as the pending token it is computed with the next turn's question.
    """
    turns, visual = batch.turns, batch.visual_rows
    row = torch.arange(batch.labels.shape[1], device=batch.labels.device)
    answer = (row > turns.prompt_row[:, None]) & (row < turns.end_row[:, None])
    turn, rows = answer.nonzero(as_tuple=True)
    mask = causal_mask(batch)
    mask[turns.item[turn], 0, rows, visual] = retrieved_tokens[turn]
    return mask


@torch.no_grad()
def retrieved(model: Qwen2_5_VLForConditionalGeneration, batch: Batch, retrieve_keep: float) -> list[Tensor]:
    """Per layer, the visual tokens each turn retrieves: bool [turns, num_kept].

    Scored as the engine does: softmax over the full causal row, mean over heads and all rows of the turn's prefill.
    Layers are walked in order because each layer's choice changes what the next one sees in later turns.
    """
    text, turns, visual = model.model.language_model, batch.turns, batch.visual_rows
    num_kept = visual.stop - visual.start
    k_best = max(1, round(retrieve_keep * num_kept))
    x = embed(model, batch)
    cos, sin = text.rotary_emb(x, batch.positions)
    row = torch.arange(x.shape[1], device=x.device)
    prefill = (row >= turns.first_row[:, None]) & (row <= turns.prompt_row[:, None])
    weight = prefill.float() / prefill.sum(1, keepdim=True)
    causal = causal_mask(batch)
    chosen = []
    for layer in text.layers:
        attention, normed = layer.self_attn, layer.input_layernorm(x)
        q, k = (
            project(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        scores = q @ repeat_kv(k, attention.num_key_value_groups).transpose(2, 3) * attention.scaling
        share = scores.float().masked_fill(~causal, -torch.inf).softmax(-1)[..., visual].mean(1)
        votes = torch.einsum("tr,trv->tv", weight, share[turns.item])
        chosen.append(torch.zeros_like(votes, dtype=torch.bool).scatter(1, votes.topk(k_best, 1).indices, True))
        x = layer(x, attention_mask=retrieval_mask(batch, chosen[-1]), position_embeddings=(cos, sin), use_cache=False)
    return chosen


class AuxiliaryHeads(nn.Module):
    """Linear heads on the inner states, thrown away after training."""

    def __init__(self, hidden: int, num_steps: int, asked_sizes: tuple[int, ...]) -> None:
        """asked_sizes: number of classes of each thing that a question may name, as in `ASKED`, and of its kind."""
        super().__init__()
        self.num_steps = num_steps
        sizes = dict(zip(ASKED, asked_sizes, strict=True))
        self.kind = nn.Linear(hidden, sizes.pop("kind"))
        # What a question names and what a visual token is are said in one code: a head that compares them has one thing to learn.
        self.codes = nn.ModuleDict({name: nn.Linear(hidden, size) for name, size in (sizes | {"rank": FACT_SIZES["rank"]}).items()})
        self.cell = nn.Linear(hidden, 2 * GRID_TOKENS)
        self.facts = nn.Linear(hidden, sum(size for name, size in FACT_SIZES.items() if name not in self.codes))

    def media_losses(self, batch: Batch, inner: Tensor) -> dict[str, Tensor]:
        """Those of the visual tokens alone."""
        return {"slot": self._slot(batch, inner), "facts": self._facts(batch, inner)}

    def facts_read(self, batch: Batch, inner: Tensor) -> dict[str, Tensor]:
        """By name of FACT_SIZES, and "step": for each visual token that a fact applies to, whether it is read right; bool."""
        known = batch.facts[..., 0] >= 0
        rows, wanted = inner[:, batch.visual_rows][known], batch.facts[known]
        right = {
            name: (part.argmax(-1) == wanted[:, i])[wanted[:, i] >= 0]
            for i, (name, part) in enumerate(self._read_facts(rows).items())
        }
        return right | {"step": self.codes["step"](rows).argmax(-1) - 1 == batch.slots[known]}

    def _read_facts(self, rows: Tensor) -> dict[str, Tensor]:
        own = [name for name in FACT_SIZES if name not in self.codes]
        parts = dict(zip(own, self.facts(rows).split([FACT_SIZES[name] for name in own], -1), strict=True))
        return {name: parts[name] if name in parts else self.codes[name](rows) for name in FACT_SIZES}

    def losses(self, model: Qwen2_5_VLForConditionalGeneration, batch: Batch, output: TextOutput) -> dict[str, Tensor]:
        """The auxiliary losses by name; `AUXILIARY_WEIGHTS` weighs them."""
        turns, looks, inner = batch.turns, batch.looks, output.inner
        at_once, later = looks.hop == 0, looks.hop == 1
        first, others = looks.first[at_once], ~looks.first[at_once]
        mass = attention_mass(model, batch, inner, AUXILIARY_LAYER, at_once)
        mass_later = attention_mass(model, batch, output.later, AUXILIARY_LAYER + 1, later)
        return self.media_losses(batch, inner) | {
            "query": self._query(inner[turns.item, turns.prompt_row], turns.asked),
            "answer_query": self._query(inner[looks.item, looks.row], turns.asked[looks.turn]),
            "address": self._address(inner[looks.item, looks.row], looks.address),
            "grounding": -mass[first].log().sum() / max(1, int(first.sum())),
            "answer_grounding": -mass[others].log().sum() / max(1, int(others.sum())),
            "second_grounding": -mass_later.log().sum() / max(1, len(mass_later)),
        }

    def _slot(self, batch: Batch, inner: Tensor) -> Tensor:
        rows, cells = inner[:, batch.visual_rows].flatten(0, 1), batch.cells.flatten()
        row, col = self.cell(rows).float().split(GRID_TOKENS, -1)
        place = F.cross_entropy(row, cells // GRID_TOKENS) + F.cross_entropy(col, cells % GRID_TOKENS)
        return F.cross_entropy(self.codes["step"](rows).float(), batch.slots.flatten() + 1) + 0.3 * place

    def _facts(self, batch: Batch, inner: Tensor) -> Tensor:
        known = batch.facts[..., 0] >= 0
        parts, wanted = self._read_facts(inner[:, batch.visual_rows][known]).values(), batch.facts[known]
        losses = [F.cross_entropy(part.float(), wanted[:, i], ignore_index=-1, reduction="sum") for i, part in enumerate(parts)]
        return torch.stack(losses).mean() / max(1, len(wanted))

    def _address(self, rows: Tensor, address: Tensor) -> Tensor:
        said = address[:, 0] >= 0
        step = F.cross_entropy(self.codes["step"](rows[said]).float(), address[said, 0] + 1, reduction="sum")
        rank = F.cross_entropy(self.codes["rank"](rows[said]).float(), address[said, 1], reduction="sum")
        return (step + rank) / max(1, int(said.sum()))

    def _query(self, rows: Tensor, asked: Tensor) -> Tensor:
        parts = [self.kind(rows) if name == "kind" else self.codes[name](rows) for name in ASKED]
        losses = [F.cross_entropy(part.float(), asked[:, i], reduction="sum") / max(1, len(asked)) for i, part in enumerate(parts)]
        return sum(losses, start=torch.zeros_like(losses[0])) / len(parts)


def attention_mass(model: Qwen2_5_VLForConditionalGeneration, batch: Batch, entering: Tensor, index: int, chosen: Tensor) -> Tensor:
    """[looks chosen]: the share of attention in a layer, mean over heads, that falls on the look's targets.

    entering: what enters layer `index`; chosen: bool [looks].
    """
    text = model.model.language_model
    item, row, targets = batch.looks.item[chosen], batch.looks.row[chosen], batch.looks.targets[chosen]
    layer = text.layers[index]
    attention, x = layer.self_attn, layer.input_layernorm(entering)
    # looks of one item side by side, padded: [items, places]
    per_item = torch.bincount(item, minlength=len(entering))
    place = torch.arange(len(item), device=x.device) - (per_item.cumsum(0) - per_item)[item]
    rows = torch.zeros(len(entering), int(per_item.max()), dtype=torch.long, device=x.device)
    rows[item, place] = row
    items = torch.arange(len(entering), device=x.device)[:, None]
    q, k = (
        project(states).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for project, states in ((attention.q_proj, x[items, rows]), (attention.k_proj, x))
    )
    cos, sin = text.rotary_emb(x, batch.positions)
    _, k = apply_rotary_pos_emb(k, k, cos, sin)
    q, _ = apply_rotary_pos_emb(q, q, cos[items, rows], sin[items, rows])
    scores = (q @ repeat_kv(k, attention.num_key_value_groups).transpose(2, 3)).float() * attention.scaling
    later = torch.arange(scores.shape[-1], device=x.device) > rows[..., None]
    share = scores.masked_fill(later[:, None], -torch.inf).softmax(-1)[..., batch.visual_rows].mean(1)
    return (share[item, place] * targets).sum(-1).clamp(min=1e-6)
