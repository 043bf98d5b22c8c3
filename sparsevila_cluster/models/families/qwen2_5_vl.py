"""The Qwen2.5-VL family: a tower that attends within windows except in a few layers, and positions that count time."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from sparsevila_cluster.core.errors import BadCheckpoint
from sparsevila_cluster.models.adapter import Piece
from sparsevila_cluster.models.checkpoint import Checkpoint
from sparsevila_cluster.models.families.qwen_vl import Grid, GridInputs, QwenVL, TowerTokens, patch_positions
from sparsevila_cluster.models.preprocess import KindRules, PixelRules
from sparsevila_cluster.models.vision_attention import Segments, TowerPass, layers_to_score


class Qwen25VL(QwenVL):
    """Family "qwen2_5_vl"."""

    name = "qwen2_5_vl"
    image_defaults = PixelRules()
    video_defaults = PixelRules(min_pixels=128 * 28 * 28, max_pixels=28 * 28 * 768)

    def __init__(self, config: Any, rules: KindRules, core: Any, device: torch.device):
        super().__init__(config, rules, core, device)
        vision = config.vision_config
        self._window = vision.window_size // vision.spatial_merge_size // vision.patch_size
        self._full_layers = frozenset(vision.fullatt_block_indexes)

    @classmethod
    def read_rules(cls, config: Any, files: Checkpoint) -> KindRules:
        """As for all Qwen-VL. Raises BadCheckpoint also if no layer attends over whole frames, or a window holds no token."""
        vision = config.vision_config
        layers = set(vision.fullatt_block_indexes)
        if not layers or not layers <= set(range(vision.depth)):
            raise BadCheckpoint(f"config.json: fullatt_block_indexes {sorted(layers)} must name layers below depth {vision.depth}")
        if vision.window_size // vision.spatial_merge_size // vision.patch_size < 1:
            raise BadCheckpoint(f"config.json: window_size {vision.window_size} holds no visual token")
        return super().read_rules(config, files)

    def _spell(self, kind: str, grid: Grid, times_s: list[float]) -> tuple[tuple[Piece, ...], tuple[int, ...]]:
        return self.slots(self._config)[kind].pieces, (grid[0] * grid[1] * grid[2],)

    def _visual_positions(self, media: GridInputs, run: int) -> Tensor:
        groups, rows, cols = media.grid
        # A Python float here: the product is rounded to float32 before it is cut to a whole number, as in the reference.
        step = self._config.vision_config.tokens_per_second * media.seconds_per_group if media.kind == "video" else 1
        time = (torch.arange(groups) * step).long()
        return torch.stack(torch.meshgrid(time, torch.arange(rows), torch.arange(cols), indexing="ij")).reshape(3, -1)

    def _run_tower(self, pixels: Tensor, grid: Grid, needs: Collection[str]) -> TowerTokens:
        groups, rows, cols = grid
        order, window_lengths = window_order(grid, self._window)
        unit = self._merge**2
        full = Segments([rows * cols * unit] * groups, self._device)
        windowed = Segments([n * unit for n in window_lengths], self._device)
        order = order.to(self._device)
        scored_layers = layers_to_score(needs, sorted(self._full_layers))
        with TowerPass(full, windowed, self._full_layers, scored_layers) as run:
            tokens = self._tower(
                pixels.to(self._tower.dtype),
                grid_thw=self._patch_grid(grid),
                cu_seqlens=full.cu_seqlens,
                max_seqlen=full.max_length,
                cu_window_seqlens=windowed.cu_seqlens,
                max_window_seqlen=windowed.max_length,
                window_index=order,
                position_ids=patch_positions(grid, self._merge).to(self._device),
            ).pooler_output
        by_window = self._of_tokens(run.received(), len(tokens))
        received = torch.empty_like(by_window)
        received[order] = by_window
        return TowerTokens(tokens, received)


def window_order(grid: Grid, window: int) -> tuple[Tensor, list[int]]:
    """Token indices i64 [N] window by window within each group, and the number of tokens in every window.

    window: side in tokens; windows at the right and bottom edge are smaller.
    """
    groups, rows, cols = grid
    per_row = -(-cols // window)
    number = (torch.arange(rows) // window)[:, None] * per_row + torch.arange(cols) // window
    order = torch.argsort(number.flatten(), stable=True)
    lengths = torch.bincount(number.flatten()).tolist() * groups
    return (order + torch.arange(groups)[:, None] * (rows * cols)).flatten(), lengths
