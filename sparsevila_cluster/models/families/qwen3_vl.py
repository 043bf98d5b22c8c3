"""The Qwen3-VL family: a tower with DeepStack levels, and videos written as one timestamped block per group of frames.

<0.3 seconds> <|vision_start|> group 0 <|vision_end|> <1.2 seconds> <|vision_start|> group 1 <|vision_end|> ...
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from sparsevila_cluster.models.adapter import Piece, Slot
from sparsevila_cluster.models.families.qwen_vl import Grid, GridInputs, QwenVL, TowerTokens, patch_positions
from sparsevila_cluster.models.preprocess import ClipRules, PixelRules
from sparsevila_cluster.models.vision_attention import Segments, TowerPass, layers_to_score

_HALF = (0.5, 0.5, 0.5)


class Qwen3VL(QwenVL):
    """Family "qwen3_vl"."""

    name = "qwen3_vl"
    image_defaults = PixelRules(patch_size=16, min_pixels=56 * 56, max_pixels=28 * 28 * 1280, mean=_HALF, std=_HALF)
    video_defaults = ClipRules(
        patch_size=16, min_pixels=128 * 32 * 32, max_pixels=32 * 32 * 768, mean=_HALF, std=_HALF, max_video_tokens=768
    )

    @classmethod
    def slots(cls, config: Any) -> dict[str, Slot]:
        """A template puts a video between one pair of vision marks; each of its groups brings its own, so they go as well."""
        video = (config.vision_start_token_id, config.video_token_id, config.vision_end_token_id)
        return {"video": Slot("video", video), "image": Slot("image", (config.image_token_id,))}

    def _spell(self, kind: str, grid: Grid, times_s: list[float]) -> tuple[tuple[Piece, ...], tuple[int, ...]]:
        groups, rows, cols = grid
        if kind == "image":
            return (self._config.image_token_id,), (groups * rows * cols,)
        t = self._rules[kind].temporal_patch_size
        times_s = times_s + times_s[-1:] * (groups * t - len(times_s))
        pieces: list[Piece] = []
        for i in range(0, groups * t, t):
            # The middle between a group's first and last frame, as the reference processor writes it.
            pieces += [f"<{(times_s[i] + times_s[i + t - 1]) / 2:.1f} seconds>", *self.slots(self._config)["video"].pieces]
        return tuple(pieces), (rows * cols,) * groups

    def _visual_positions(self, media: GridInputs, run: int) -> Tensor:
        """Time stands still within a block: the timestamps tell it."""
        _, rows, cols = media.grid
        axes = torch.meshgrid(torch.arange(1), torch.arange(rows), torch.arange(cols), indexing="ij")
        return torch.stack(axes).reshape(3, -1)

    def _run_tower(self, pixels: Tensor, grid: Grid, needs: Collection[str]) -> TowerTokens:
        groups, rows, cols = grid
        unit = self._merge**2
        full = Segments([rows * cols * unit] * groups, self._device)
        with TowerPass(full, None, frozenset(), layers_to_score(needs, range(len(self._tower.blocks)))) as run:
            out = self._tower(
                pixels.to(self._tower.dtype),
                grid_thw=self._patch_grid(grid).to(self._device),
                cu_seqlens=full.cu_seqlens,
                max_seqlen=full.max_length,
                position_ids=patch_positions(grid, self._merge).to(self._device),
            )
        tokens = out.pooler_output
        return TowerTokens(tokens, self._of_tokens(run.received(), len(tokens)), tuple(out.deepstack_features))
