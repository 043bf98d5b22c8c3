"""Stage one: the vision tower learns glyphs, places and salience, before there is any text.

The probes read colour, shape and place off the merged visual tokens. The salience loss asks the last full-attention
block to spend 60 % of its attention on the glyphs: without it, glyphs are the *least* attended tokens of a tower
this small, and salience (what pruning goes by) would mean nothing. So in this checkpoint salience is trained in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from sparsevila_cluster.demo.checkpoint_builder import (
    GRID_PATCHES,
    GRID_TOKENS,
    IMAGE_MEAN,
    IMAGE_STD,
    MERGE,
    PATCH_PX,
    TEMPORAL_PATCH,
    TOKENS_PER_STEP,
)
from sparsevila_cluster.demo.video_feed import TrainingVideo
from sparsevila_cluster.demo.world import COLORS, SHAPES

GLYPH_ATTENTION = 0.6
SALIENCE_WEIGHT = 0.3
NOTHING = len(COLORS)  # the class of background tokens, for colours and shapes alike
PATCHES_PER_TOKEN = MERGE**2


def patchify(frames: np.ndarray) -> Tensor:
    """uint8 [videos, 2 * steps, px, px, 3] -> float [videos * steps, patches, values], ordered as Qwen2-VL does."""
    num_videos, num_frames = frames.shape[:2]
    steps = num_frames // TEMPORAL_PATCH
    split = (num_videos, steps, TEMPORAL_PATCH, 3, GRID_TOKENS, MERGE, PATCH_PX, GRID_TOKENS, MERGE, PATCH_PX)
    x = torch.from_numpy(frames).permute(0, 1, 4, 2, 3).reshape(split).permute(0, 1, 4, 7, 5, 8, 3, 2, 6, 9)
    x = x.reshape(num_videos * steps, GRID_PATCHES**2, 3, TEMPORAL_PATCH * PATCH_PX**2).float()
    mean, std = (torch.tensor(values)[:, None] * 255 for values in (IMAGE_MEAN, IMAGE_STD))
    return ((x - mean) / std).flatten(2)


class VisionOutput(NamedTuple):
    """What the tower makes of a batch of steps."""

    tokens: Tensor  # [steps, TOKENS_PER_STEP, hidden]
    salience: Tensor  # [steps, TOKENS_PER_STEP], 1.0 is an average token


def _norm(x: Tensor, layer: Any) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), layer.weight.to(x.dtype), layer.variance_epsilon)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class VisionRunner:
    """The stock tower's forward for many steps at once; equal to the stock one to rounding (a test holds it).

    visual: the stock vision module. Its parts are read by name, which no type says anything about.
    """

    def __init__(self, visual: Any) -> None:
        self.visual = visual
        device = visual.patch_embed.proj.weight.device
        grid = torch.tensor([[1, GRID_PATCHES, GRID_PATCHES]])
        window_index, borders = get_vision_window_index(grid, MERGE, visual.window_size, PATCH_PX)
        cos, sin = visual.rotary_pos_emb(torch.zeros(1), get_vision_position_ids(grid, MERGE).to(device))
        patches = (window_index[:, None] * PATCHES_PER_TOKEN + torch.arange(PATCHES_PER_TOKEN)).reshape(-1)
        self.patch_order, self.undo = patches.to(device), torch.argsort(window_index).to(device)
        self.cos, self.sin = (table.to(device)[self.patch_order][:, None] for table in (cos, sin))
        self.window = int(borders[1] - borders[0])
        self.full_blocks = visual.config.fullatt_block_indexes

    def __call__(self, patches: Tensor) -> VisionOutput:
        """patches: float [steps, patches, values], as `patchify` gives them."""
        visual, num_steps, num_patches = self.visual, patches.shape[0], patches.shape[1]
        heads = visual.config.num_heads
        weight = visual.patch_embed.proj.weight
        x = F.linear(patches.to(weight.device), weight.flatten(1))[:, self.patch_order]
        salience: Tensor | None = None
        for index, block in enumerate(visual.blocks):
            q, k, v = block.attn.qkv(_norm(x, block.norm1)).reshape(num_steps, num_patches, 3, heads, -1).unbind(2)
            q, k = (_rotate(part, self.cos, self.sin).to(v.dtype) for part in (q, k))
            if index == self.full_blocks[-1]:
                scores = torch.einsum("nqhd,nkhd->nhqk", q.float(), k.float()) * block.attn.scaling
                columns = scores.softmax(-1).mean((1, 2)) * num_patches
                salience = columns.reshape(num_steps, -1, PATCHES_PER_TOKEN).mean(-1)[:, self.undo]
            if index not in self.full_blocks:
                q, k, v = (part.reshape(-1, self.window, heads, part.shape[-1]) for part in (q, k, v))
            mixed = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v))).transpose(1, 2)
            x = x + block.attn.proj(mixed.reshape(num_steps, num_patches, -1))
            hidden, mlp = _norm(x, block.norm2), block.mlp
            x = x + mlp.down_proj(F.silu(mlp.gate_proj(hidden)) * mlp.up_proj(hidden))
        merger = visual.merger
        tokens = merger.mlp(_norm(x, merger.ln_q).reshape(num_steps, TOKENS_PER_STEP, -1))[:, self.undo]
        assert salience is not None, "the last full-attention block is one of the blocks"
        return VisionOutput(tokens, salience)


def say_readings(visual: Any, rows: Tensor, offsets: Tensor, norm: float) -> None:
    """Rewrite the last projector layer: it puts out what linear readings of its output were, in a random orthonormal frame.

    rows: [readings, hidden]; offsets: [readings]; norm: how long a reading of length one gets.
    """
    last = visual.merger.mlp[2]
    num_readings, hidden = rows.shape
    # Drawn on the CPU so that every device starts from the same frame.
    frame = torch.linalg.qr(torch.randn(hidden, hidden))[0][:, :num_readings].to(rows.device)
    turn = norm * frame @ rows
    last.bias.copy_(turn @ last.bias + norm * frame @ offsets)
    last.weight.copy_(turn @ last.weight)


PROBES = {"color": len(COLORS) + 1, "shape": len(SHAPES) + 1, "row": GRID_TOKENS, "col": GRID_TOKENS}


@dataclass(frozen=True)
class Labels:
    """What the probes are to read off each token."""

    color: Tensor  # [steps, tokens]
    shape: Tensor
    glyph: Tensor  # bool


def labels_of(videos: list[TrainingVideo]) -> Labels:
    """The labels of all steps of the videos."""
    owner = np.concatenate([video.owner.reshape(-1, TOKENS_PER_STEP) for video in videos])
    color, shape = np.full(owner.shape, NOTHING), np.full(owner.shape, NOTHING)
    steps = [step for video in videos for step in video.scene.steps]
    for index, step in enumerate(steps):
        for number, glyph in enumerate(step):
            mine = owner[index] == number
            color[index, mine], shape[index, mine] = COLORS.index(glyph.color), SHAPES.index(glyph.shape)
    return Labels(torch.from_numpy(color), torch.from_numpy(shape), torch.from_numpy(owner >= 0))


def salience_target(glyph: Tensor) -> Tensor:
    """Where attention should go: GLYPH_ATTENTION shared by the glyphs of a step, the rest spread evenly."""
    on, num = glyph.float(), glyph.float().sum(-1, keepdim=True)
    even = torch.full_like(on, 1 / on.shape[-1])
    return torch.where(num > 0, (1 - GLYPH_ATTENTION) * even + GLYPH_ATTENTION * on / num.clamp(min=1), even)


class VisionStage:
    """Owns the probes and their losses. One `update` is one optimiser step."""

    def __init__(self, visual: Any, lr: float = 3e-3) -> None:
        self.runner, self.lr = VisionRunner(visual), lr
        self.device = visual.patch_embed.proj.weight.device
        self.probe = nn.Linear(visual.config.out_hidden_size, sum(PROBES.values())).to(self.device)
        parameters = [*visual.parameters(), *self.probe.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
        cell = torch.arange(TOKENS_PER_STEP, device=self.device)
        self.row, self.col = cell // GRID_TOKENS, cell % GRID_TOKENS
        # nearly all tokens are background; unweighted they would drown the glyphs
        self.class_weight = torch.tensor([1.0] * NOTHING + [0.15], device=self.device)

    def update(self, videos: list[TrainingVideo], progress: float, count: int) -> dict[str, float]:
        """`progress` runs from 0 to 1 over the stage, `count` is the number of updates done."""
        scale = min(1, (count + 1) / 50) * (0.525 + 0.475 * np.cos(np.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * scale
        labels = labels_of(videos)
        seen = self.runner(patchify(np.stack([video.frames for video in videos])))
        logits = self.probe(seen.tokens).split(list(PROBES.values()), -1)
        losses = self._losses(logits, labels)
        target = salience_target(labels.glyph).to(self.device)
        share = (seen.salience / TOKENS_PER_STEP).clamp(min=1e-8)
        losses["salience"] = SALIENCE_WEIGHT * (target * (target.log() - share.log())).sum(-1).mean()
        self.optimizer.zero_grad()
        sum(losses.values(), start=torch.zeros((), device=self.device)).backward()
        nn.utils.clip_grad_norm_(self.runner.visual.parameters(), 1.0)
        self.optimizer.step()
        return {name: round(value.item(), 4) for name, value in losses.items()}

    def _losses(self, logits: tuple[Tensor, ...], labels: Labels) -> dict[str, Tensor]:
        color, shape, row, col = (part.float().flatten(0, 1) for part in logits)
        num_steps = len(labels.color)
        return {
            "color": F.cross_entropy(color, labels.color.flatten().to(self.device), weight=self.class_weight),
            "shape": F.cross_entropy(shape, labels.shape.flatten().to(self.device), weight=self.class_weight),
            "row": 0.2 * F.cross_entropy(row, self.row.repeat(num_steps)),
            "col": 0.2 * F.cross_entropy(col, self.col.repeat(num_steps)),
        }

    @torch.no_grad()
    def report(self, videos: list[TrainingVideo]) -> dict[str, float]:
        """Probe accuracies, and the share of glyph tokens among the most salient quarter of their step."""
        labels = labels_of(videos)
        seen = self.runner(patchify(np.stack([video.frames for video in videos])))
        color, shape, row, col = (part.argmax(-1).cpu() for part in self.probe(seen.tokens).split(list(PROBES.values()), -1))
        glyph = labels.glyph
        kept = torch.zeros_like(glyph).scatter(1, seen.salience.cpu().topk(TOKENS_PER_STEP // 4, 1).indices, True)
        accuracy = {
            "color": (color == labels.color)[glyph],
            "shape": (shape == labels.shape)[glyph],
            "row": row == self.row.cpu(),
            "col": col == self.col.cpu(),
            "glyphs_in_salient_quarter": kept[glyph],
        }
        return {name: round(right.float().mean().item(), 4) for name, right in accuracy.items()}

    @torch.no_grad()
    def start_projector(self, videos: Iterator[TrainingVideo], num_videos: int = 24, norm: float = 6.0) -> dict[str, float]:
        """Rewrite the last projector layer so that its output says what the probes read, at a size text can use.

        Each probe's centred logits become one block of a random orthonormal frame, all blocks of comparable norm.
        Glyph tokens end up about ten times longer than word embeddings: much longer, and the text layers could not
        write into them; much shorter, and the first layers would drown them. Either way training stalls.
        """
        batch = [next(videos) for _ in range(num_videos)]
        patches, glyph = patchify(np.stack([video.frames for video in batch])), labels_of(batch).glyph.flatten()
        tokens = self.runner(patches).tokens.flatten(0, 1)
        rows, offsets = [], []
        for weight, size in zip(self.probe.weight.split(list(PROBES.values())), (1.0, 1.0, 0.8, 0.8), strict=True):
            center = torch.eye(len(weight), device=self.device) - 1 / len(weight)
            centered = tokens @ (center @ weight).T
            mean = centered.mean(0)
            scale = size / (centered[glyph.to(self.device)] - mean).norm(dim=-1).mean()
            rows.append(scale * center @ weight)
            offsets.append(-scale * mean)
        say_readings(self.runner.visual, torch.cat(rows), torch.cat(offsets), norm)
        length = self.runner(patches).tokens.flatten(0, 1).norm(dim=-1).cpu()
        norms = {"glyph_norm": length[glyph], "other_norm": length[~glyph]}
        return {name: round(values.mean().item(), 2) for name, values in norms.items()}
