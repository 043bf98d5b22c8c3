"""The stock tower of LLaVA-OneVision with its projector and its pooling for videos, for many frames at once, gradients and all."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsevila_cluster.demo.training.vision_runner import VisionOutput

FRAMES_PER_STEP = 2


class SiglipRunner:
    """Equal to the stock modules to rounding (a test holds it). core: a LlavaOnevisionModel; patches are an even square."""

    groups_per_step = FRAMES_PER_STEP

    def __init__(self, core: Any) -> None:
        self.tower, self.projector = core.vision_tower, core.multi_modal_projector
        self.last: nn.Linear = self.projector.linear_2
        config = self.tower.config
        self.side = config.image_size // config.patch_size

    def parameters(self) -> list[nn.Parameter]:
        """Of the tower's layers and the projector; not what stands behind the last hidden state."""
        parts = (self.tower.embeddings, self.tower.encoder, self.projector)
        return [parameter for part in parts for parameter in part.parameters()]

    def patchify(self, frames: np.ndarray) -> Tensor:
        """uint8 [videos, frames, px, px, 3] -> float [videos * frames, 3, px, px], in -1..1 as the processor leaves it."""
        pixels = torch.from_numpy(frames).flatten(0, 1).permute(0, 3, 1, 2).float()
        return pixels / 127.5 - 1

    def patches(self, pixels: Tensor) -> VisionOutput:
        """Hidden states [frames, side * side, hidden] of single patches before the projector, and their salience."""
        x = self.tower.embeddings(pixels.to(self.last.weight.device))
        layers, salience = self.tower.encoder.layers, None
        for index, layer in enumerate(layers):
            attention = layer.self_attn
            normed = layer.layer_norm1(x)
            q, k, v = (
                project(normed).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            if index == len(layers) - 1:
                scores = (q.float() @ k.float().transpose(2, 3)) * attention.scale
                salience = scores.softmax(-1).mean((1, 2)) * x.shape[1]
            mixed = F.scaled_dot_product_attention(q, k, v, scale=attention.scale).transpose(1, 2).flatten(2)
            x = x + attention.out_proj(mixed)
            x = x + layer.mlp(layer.layer_norm2(x))
        assert salience is not None, "a tower has layers"
        return VisionOutput(x, salience)

    def pool(self, values: Tensor) -> Tensor:
        """[frames, side * side, C] -> [frames, (side / 2) ** 2, C]: of an even side, bilinear pooling is the mean of four."""
        square = values.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        return F.avg_pool2d(square, 2).flatten(2).transpose(1, 2)

    def __call__(self, patches: Tensor) -> VisionOutput:
        """patches: as `patchify` gives them."""
        seen = self.patches(patches)
        tokens = self.pool(self.projector(seen.tokens))
        return VisionOutput(tokens, self.pool(seen.salience[..., None])[..., 0])
