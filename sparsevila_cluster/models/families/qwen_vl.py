"""What the Qwen-VL families share: grids of merged patches, M-RoPE positions, and a tower that takes many frames in one pass.

grid (groups, rows, cols) counts visual tokens; each token is merge x merge patches, each patch t frames deep
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsevila_cluster.core.errors import BadCheckpoint, BadMedia
from sparsevila_cluster.media import Media
from sparsevila_cluster.models.adapter import Piece, PromptPlan, Report, Slot, VisualInputs, VisualTokens, no_report
from sparsevila_cluster.models.checkpoint import Checkpoint
from sparsevila_cluster.models.preprocess import KindRules, PixelRules, cut_patches, normalize, read_rules, resize
from sparsevila_cluster.models.prompt_plan import expand, grid_places, join_places, split_runs
from sparsevila_cluster.models.vision_attention import number_layers

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class GridInputs(VisualInputs):
    """grid: (groups, rows, cols) of visual tokens after merging; seconds_per_group: time between two groups (0 for an image)."""

    grid: Grid
    seconds_per_group: float


@dataclass(frozen=True)
class TowerTokens:
    """One pass: embeds [n, D]; received f32 [n, T], the attention in each scored layer, or a column of ones without any; deepstack
    levels [n, D] each.
    """

    embeds: Tensor
    received: Tensor
    deepstack: tuple[Tensor, ...] = ()


class QwenVL:
    """Base of the Qwen-VL families. Thread-safe: a pass through the tower keeps its state in its own call."""

    name: ClassVar[str]
    image_defaults: ClassVar[PixelRules]
    video_defaults: ClassVar[PixelRules]

    def __init__(self, config: Any, rules: KindRules, core: Any, device: torch.device):
        """config: the checkpoint's transformers config; core: its model without head, or None for a decode worker."""
        self._config = config
        self._rules = rules
        self._merge = config.vision_config.spatial_merge_size
        self._device = device
        self._tower: Any = None if core is None else core.visual
        # Frames attend only to themselves, so the tower takes them in passes of about so many patches: bounded memory, and on a
        # CPU activations that stay in its cache.
        self.patches_per_pass = 4096 if device.type == "cpu" else 16384
        if self._tower is not None:
            number_layers([block.attn for block in self._tower.blocks])
            self._tower.patch_embed = _PatchEmbed(self._tower.patch_embed.proj)

    @classmethod
    def read_rules(cls, config: Any, files: Checkpoint) -> KindRules:
        """The processor config. Raises BadCheckpoint: missing, illegal, or other patches than config.json's."""
        rules = read_rules(files, cls.image_defaults, cls.video_defaults)
        vision = config.vision_config
        wanted = {
            "patch_size": vision.patch_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "merge_size": vision.spatial_merge_size,
        }
        for kind in ("image", "video"):
            for name, value in wanted.items():
                if getattr(rules[kind], name) != value:
                    raise BadCheckpoint(
                        f"{kind} processor config: {name} {getattr(rules[kind], name)} is not config.json's {value}"
                    )
        return rules

    @classmethod
    def slots(cls, config: Any) -> dict[str, Slot]:
        """One placeholder for each media."""
        return {"video": Slot("video", (config.video_token_id,)), "image": Slot("image", (config.image_token_id,))}

    @classmethod
    def visual_ids(cls, config: Any) -> tuple[int, ...]:
        """The placeholders of pictures and of videos."""
        return config.image_token_id, config.video_token_id

    def patchify(self, media: Media, alone: bool = True) -> GridInputs:
        """Resize and cut frames as the checkpoint's processor config says, whether `alone` or not; `pixels` stay uint8 until
        `encode`.

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
        return self.place(pixels, media.kind, grid, seconds_per_group(media, t), media.times_s.tolist())

    def place(
        self, pixels: Tensor, kind: Literal["video", "image"], grid: Grid, seconds: float, times_s: Sequence[float]
    ) -> GridInputs:
        """Inputs of a media whose patches are cut: times_s f64 [F] are the times of its frames."""
        groups, rows, cols = grid
        t = self._rules[kind].temporal_patch_size
        group, cell = grid_places([(rows, cols)] * groups)
        spelling, runs = self._spell(kind, grid, list(times_s))
        return GridInputs(
            pixels=pixels, kind=kind, spelling=spelling, runs=runs, group=group, cell=cell, grids=((rows, cols),) * groups,
            frame_of_group=tuple(range(0, groups * t, t)), grid=grid, seconds_per_group=seconds,
        )  # fmt: skip

    def pixel_values(self, inputs: VisualInputs) -> Tensor:
        """float32 [num_patches, patch_dim]: what the tower sees."""
        return normalize(inputs.pixels, self._rules[inputs.kind])

    def plan(
        self, ids: Sequence[int], inputs: Sequence[GridInputs], video_text_pos: Literal["max+1", "hf5"] = "max+1"
    ) -> PromptPlan:
        """Expand runs and compute M-RoPE positions [3, T] (time, height, width).

        After a run, text goes on after the largest position so far ("max+1"), or after the larger side of one frame, while
        generated tokens stand after the largest position ("hf5"). The two differ for Qwen2.5-VL videos only.
        """
        positions, at = [], 0
        visual_ids = self.visual_ids(self._config)
        for text, place in split_runs(ids, inputs, visual_ids):
            positions.append(torch.arange(at, at + len(text)).expand(3, -1))
            at += len(text)
            if place is not None:
                media = inputs[place[0]]
                assert place[2] == visual_ids[media.kind == "video"], f"placeholder {place[2]} is not for a {media.kind}"
                positions.append(self._visual_positions(media, place[1]) + at)
                at = at + max(media.grid[1:]) if video_text_pos == "hf5" else int(positions[-1].max()) + 1
        tokens, visual = expand(ids, inputs, visual_ids)
        placed = torch.cat(positions, dim=1)
        floor = int(placed.max()) + 1 if video_text_pos == "hf5" else 0
        return PromptPlan(tokens, visual, placed, at, floor)

    @torch.inference_mode()
    def encode(
        self, inputs: Sequence[GridInputs], needs: Collection[str] = ("salience",), report: Report = no_report
    ) -> VisualTokens:
        """Run the vision tower, some frames at a time."""
        assert self._tower is not None, 'encode needs the "vision" part'
        parts: list[TowerTokens] = []
        total, done = sum(media.num_tokens for media in inputs), 0
        for media in inputs:
            for pixels, grid in self._passes(media):
                report(done, total)
                pixels = normalize(pixels.to(self._device, non_blocking=True), self._rules[media.kind])
                parts.append(self._run_tower(pixels, grid, needs))
                done += len(parts[-1].embeds)
        report(done, total)
        group, cell = join_places(inputs, self._device)
        received = torch.cat([part.received for part in parts])
        return VisualTokens(
            torch.cat([part.embeds for part in parts]),
            received[:, -1],
            group,
            cell,
            tuple(torch.cat(level) for level in zip(*(part.deepstack for part in parts), strict=True)),
            received if "taps" in needs else None,
        )

    def _passes(self, media: GridInputs) -> Iterator[tuple[Tensor, Grid]]:
        groups, rows, cols = media.grid
        per_group = rows * cols * self._merge**2
        step = max(1, self.patches_per_pass // per_group)
        for a in range(0, groups, step):
            b = min(groups, a + step)
            yield media.pixels[a * per_group : b * per_group], (b - a, rows, cols)

    def _patch_grid(self, grid: Grid) -> Tensor:
        """i64 [1, 3]: the grid in patches, as the tower wants it."""
        groups, rows, cols = grid
        return torch.tensor([[groups, rows * self._merge, cols * self._merge]])

    def _spell(self, kind: str, grid: Grid, times_s: list[float]) -> tuple[tuple[Piece, ...], tuple[int, ...]]:
        """What stands for a media in the prompt, and its runs."""
        raise NotImplementedError

    def _visual_positions(self, media: GridInputs, run: int) -> Tensor:
        """Positions i64 [3, n] of one run, counted from its start."""
        raise NotImplementedError

    def _run_tower(self, pixels: Tensor, grid: Grid, needs: Collection[str]) -> TowerTokens:
        """One pass over float32 [num_patches, patch_dim]."""
        raise NotImplementedError

    def _of_tokens(self, received: Tensor | None, num: int) -> Tensor:
        """Attention received by patches f32 [num * merge^2, T] to that of visual tokens f32 [num, T]; None to a column of ones."""
        if received is None:
            return torch.ones(num, 1, dtype=torch.float32, device=self._device)
        return received.unflatten(0, (num, -1)).mean(1)


class _PatchEmbed(nn.Module):
    """The patch embedding as a matrix product: a convolution whose kernel is its stride, with nothing to slide."""

    def __init__(self, convolution: nn.Conv3d):
        super().__init__()
        self.weight = nn.Parameter(convolution.weight.data.flatten(1), requires_grad=False)
        self.bias = convolution.bias

    def forward(self, pixels: Tensor) -> Tensor:
        """[num_patches, patch_dim] -> [num_patches, hidden]."""
        return F.linear(pixels, self.weight, self.bias)


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


def patch_positions(grid: Grid, merge: int) -> Tensor:
    """(row, col) of every patch in its frame, i64 [N * merge^2, 2], in patch order."""
    groups, rows, cols = grid
    row = torch.arange(rows * merge).view(rows, 1, merge, 1).expand(rows, cols, merge, merge)
    col = torch.arange(cols * merge).view(1, cols, 1, merge).expand(rows, cols, merge, merge)
    return torch.stack((row.flatten(), col.flatten()), -1).repeat(groups, 1)
