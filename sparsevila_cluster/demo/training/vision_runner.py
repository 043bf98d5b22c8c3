"""The stock vision tower's forward for many steps at once, and what its projector is started from."""

from __future__ import annotations

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
        self.last, self.groups_per_step = visual.merger.mlp[2], 1
        self.window = int(borders[1] - borders[0])
        self.full_blocks = visual.config.fullatt_block_indexes

    def parameters(self) -> list[nn.Parameter]:
        """All of the stock module's."""
        return list(self.visual.parameters())

    def patchify(self, frames: np.ndarray) -> Tensor:
        """As `__call__` takes them."""
        return patchify(frames)

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


def say_readings(last: nn.Linear, rows: Tensor, offsets: Tensor, frame: Tensor) -> None:
    """Rewrite a projector's last layer: it puts out what linear readings of its output were, each along its own direction.

    rows: [readings, hidden]; offsets: [readings]; frame: [hidden, readings], the directions.
    """
    turn = frame @ rows
    last.bias.copy_(turn @ last.bias + frame @ offsets)
    last.weight.copy_(turn @ last.weight)
