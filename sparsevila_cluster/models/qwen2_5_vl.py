"""The Qwen2.5-VL family, vision side: frames to patches, prompt positions, the vision tower and its salience.

Knows: Qwen2.5-VL's grids, windows, M-RoPE positions and merger. Does not know: pruning policies, the text decoder, KV.

    grid (groups, rows, cols) counts visual tokens; each token is merge x merge patches, each patch t frames deep
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsevila_cluster.errors import BadCheckpoint, BadMedia
from sparsevila_cluster.media import Media
from sparsevila_cluster.models.adapter import PromptPlan, VisualInputs, VisualTokens
from sparsevila_cluster.models.preprocess import PixelRules, cut_patches, normalise, resize
from sparsevila_cluster.models.vision_attention import Segments, TowerPass, number_layers

Grid = tuple[int, int, int]


class Qwen25VL:
    """Family "qwen2_5_vl". Thread-safe: a pass through the tower keeps its state in its own call."""

    name = "qwen2_5_vl"

    def __init__(
        self,
        config: Any,
        image_rules: PixelRules,
        video_rules: PixelRules,
        tower: nn.Module | None,
        device: torch.device,
    ):
        """config: the checkpoint's transformers config; tower: its vision tower with weights, or None for a decode worker.

        Raises:
            BadCheckpoint: processor and model config disagree about patches, or no layer attends over whole frames.
        """
        vision = config.vision_config
        self._rules = {"image": image_rules, "video": video_rules}
        self._visual_ids = {"image": config.image_token_id, "video": config.video_token_id}
        self._merge = vision.spatial_merge_size
        self._window = vision.window_size // vision.spatial_merge_size // vision.patch_size
        self._tokens_per_second = vision.tokens_per_second
        self._full_layers = frozenset(vision.fullatt_block_indexes)
        self._device = device
        self._tower = tower
        # Frames attend only to themselves, so the tower takes them in passes of about so many patches: bounded memory, and on a
        # CPU activations that stay in its cache.
        self.patches_per_pass = 4096 if device.type == "cpu" else 16384
        wanted = {
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "merge_size": vision.spatial_merge_size,
        }
        for kind, rules in self._rules.items():
            for name, value in wanted.items():
                if getattr(rules, name) != value:
                    raise BadCheckpoint(f"{kind} processor config: {name} {getattr(rules, name)} is not config.json's {value}")
        if not self._full_layers or not self._full_layers <= set(range(vision.depth)):
            raise BadCheckpoint(
                f"config.json: fullatt_block_indexes {sorted(self._full_layers)} must name layers below depth {vision.depth}"
            )
        if self._window < 1:
            raise BadCheckpoint(f"config.json: window_size {vision.window_size} holds no visual token")
        if tower is not None:
            number_layers([block.attn for block in tower.blocks])
            tower.patch_embed = _PatchEmbed(tower.patch_embed.proj.weight)

    def patchify(self, media: Media) -> VisualInputs:
        """Resize and cut frames as the checkpoint's processor config says; `pixels` stay uint8 until `encode`.

        Raises:
            BadMedia: no frame, an empty frame, or an aspect ratio above 200.
        """
        frames = torch.as_tensor(media.frames)
        if frames.dim() != 4 or frames.shape[-1] != 3 or 0 in frames.shape or frames.dtype != torch.uint8:
            raise BadMedia(f"frames must be uint8 [F, H, W, 3] and not empty, got {frames.dtype} {list(frames.shape)}")
        rules = self._rules[media.kind]
        height, width = rules.frame_size(frames.shape[1], frames.shape[2], len(frames))
        frames = resize(frames.permute(0, 3, 1, 2), height, width, rules.resample)
        pixels, grid = cut_patches(frames, rules)
        t = rules.temporal_patch_size
        return VisualInputs(pixels, grid, tuple(range(0, grid[0] * t, t)), seconds_per_group(media, t), media.kind)

    def pixel_values(self, inputs: VisualInputs) -> Tensor:
        """float32 [num_patches, patch_dim]: what the tower sees."""
        return normalise(inputs.pixels, self._rules[inputs.kind])

    def plan(
        self, ids: Sequence[int], inputs: Sequence[VisualInputs], video_text_pos: Literal["max+1", "hf5"] = "max+1"
    ) -> PromptPlan:
        """Expand the single placeholder of each media and compute M-RoPE positions [3, T] (time, height, width).

        After a video, text goes on after the largest position so far ("max+1"), or after the larger side of one frame, while
        generated tokens stand after the largest position ("hf5").
        """
        placeholders = set(self._visual_ids.values())
        pending = iter(inputs)
        tokens, visual, positions = [], [], []
        at, run = 0, []
        for token in ids:
            if token not in placeholders:
                run.append(token)
                continue
            media = next(pending, None)
            assert media is not None and token == self._visual_ids[media.kind], f"placeholder {token} has no media of its kind"
            positions += [_text_positions(at, len(run)), self._visual_positions(media, at + len(run))]
            tokens += [torch.tensor(run, dtype=torch.int64), torch.full((media.num_tokens,), token)]
            visual += [torch.zeros(len(run), dtype=torch.bool), torch.ones(media.num_tokens, dtype=torch.bool)]
            start = at + len(run)
            at = start + max(media.grid[1:]) if video_text_pos == "hf5" else int(positions[-1].max()) + 1
            run = []
        assert next(pending, None) is None, "fewer placeholders than media"
        tokens.append(torch.tensor(run, dtype=torch.int64))
        visual.append(torch.zeros(len(run), dtype=torch.bool))
        positions.append(_text_positions(at, len(run)))
        placed = torch.cat(positions, dim=1)
        floor = int(placed.max()) + 1 if video_text_pos == "hf5" else 0
        return PromptPlan(torch.cat(tokens), torch.cat(visual), placed, at + len(run), floor)

    @torch.inference_mode()
    def encode(self, inputs: Sequence[VisualInputs], capture: bool = True) -> VisualTokens:
        """Run the vision tower. With capture=False the salience is all ones and costs nothing."""
        assert self._tower is not None, 'encode needs the "vision" part'
        embeds, salience = [], []
        for media in inputs:
            for pixels, grid in self._passes(media):
                pixels = normalise(pixels.to(self._device, non_blocking=True), self._rules[media.kind])
                tokens, scores = self._run_tower(pixels, grid, capture)
                embeds.append(tokens)
                salience.append(scores)
        group, cell = _places([media.grid for media in inputs], self._device)
        return VisualTokens(torch.cat(embeds), torch.cat(salience), group, cell)

    def _passes(self, media: VisualInputs) -> Iterator[tuple[Tensor, Grid]]:
        groups, rows, cols = media.grid
        per_group = rows * cols * self._merge**2
        step = max(1, self.patches_per_pass // per_group)
        for a in range(0, groups, step):
            b = min(groups, a + step)
            yield media.pixels[a * per_group : b * per_group], (b - a, rows, cols)

    def _run_tower(self, pixels: Tensor, grid: Grid, capture: bool) -> tuple[Tensor, Tensor]:
        groups, rows, cols = grid
        order, window_lengths = window_order(grid, self._window)
        unit = self._merge**2
        full = Segments([rows * cols * unit] * groups, self._device)
        windowed = Segments([n * unit for n in window_lengths], self._device)
        order = order.to(self._device)
        run = TowerPass(full, windowed, self._full_layers, max(self._full_layers) if capture else None)
        tokens = self._tower(
            pixels.to(self._tower.dtype),
            grid_thw=torch.tensor([[groups, rows * self._merge, cols * self._merge]]),
            cu_seqlens=full.cu_seqlens,
            max_seqlen=full.max_length,
            cu_window_seqlens=windowed.cu_seqlens,
            max_window_seqlen=windowed.max_length,
            window_index=order,
            position_ids=_patch_positions(grid, self._merge).to(self._device),
            tower_pass=run,
        ).pooler_output
        if run.salience is None:
            return tokens, torch.ones(len(tokens), dtype=torch.float32, device=self._device)
        salience = torch.empty(len(tokens), dtype=torch.float32, device=self._device)
        salience[order] = run.salience.view(-1, unit).mean(-1)
        return tokens, salience

    def _visual_positions(self, media: VisualInputs, start: int) -> Tensor:
        groups, rows, cols = media.grid
        # A Python float here: the product is rounded to float32 before it is cut to a whole number, as in the reference.
        step = self._tokens_per_second * media.seconds_per_group if media.kind == "video" else 1
        time = (torch.arange(groups) * step).long()
        axes = torch.meshgrid(time, torch.arange(rows), torch.arange(cols), indexing="ij")
        return torch.stack(axes).reshape(3, -1) + start


class _PatchEmbed(nn.Module):
    """The patch embedding as a matrix product: a convolution whose kernel is its stride, with nothing to slide."""

    def __init__(self, kernel: Tensor):
        super().__init__()
        self.weight = nn.Parameter(kernel.data.flatten(1), requires_grad=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """[num_patches, patch_dim] -> [num_patches, hidden]."""
        return F.linear(pixels, self.weight)


def seconds_per_group(media: Media, frames_per_group: int) -> float:
    """Time between two groups of frames, in seconds; 0 for an image.

    As the reference processor has it: frames per group / (number of frames / duration). Rounded to microseconds, because
    positions are cut to whole numbers and 0.9999999 s would shift every one of them.
    """
    if media.kind == "image":
        return 0.0
    num = len(media.frames)
    duration_s = media.duration_s
    if duration_s <= 0:
        duration_s = float(media.times_s[-1] - media.times_s[0]) * num / (num - 1) if num > 1 else 1.0
    return round(frames_per_group * duration_s / num, 6)


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


def _patch_positions(grid: Grid, merge: int) -> Tensor:
    """(row, col) of every patch in its frame, i64 [N * merge^2, 2], in patch order."""
    groups, rows, cols = grid
    row = torch.arange(rows * merge).view(rows, 1, merge, 1).expand(rows, cols, merge, merge)
    col = torch.arange(cols * merge).view(1, cols, 1, merge).expand(rows, cols, merge, merge)
    return torch.stack((row.flatten(), col.flatten()), -1).repeat(groups, 1)


def _places(grids: Sequence[Grid], device: torch.device) -> tuple[Tensor, Tensor]:
    """group i32 [N], counted over all media, and cell i32 [N, 2] of every token."""
    groups, cells, first = [], [], 0
    for num, rows, cols in grids:
        groups.append(torch.arange(first, first + num, dtype=torch.int32).repeat_interleave(rows * cols))
        cells.append(torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).int().repeat(num, 1))
        first += num
    return torch.cat(groups).to(device), torch.cat(cells).to(device)


def _text_positions(start: int, num: int) -> Tensor:
    return torch.arange(start, start + num).expand(3, num)
