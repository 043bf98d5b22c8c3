"""What families whose tower takes crops of one fixed size share: bounded passes, hidden states of chosen layers, salience.

crops u8 [B, 3, side, side] -> a pass: normalize -> embed -> layers up to the last wanted one -> hidden states, salience
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from sparsevila_cluster.core.errors import BadCheckpoint, BadMedia
from sparsevila_cluster.media import Media
from sparsevila_cluster.models.adapter import PromptPlan, Report, VisualInputs, VisualTokens, no_report
from sparsevila_cluster.models.preprocess import LevelRules, normalize, read_levels
from sparsevila_cluster.models.prompt_plan import join_places, linear_plan
from sparsevila_cluster.models.vision_attention import Segments, TowerPass, layers_to_score, number_layers


@dataclass(frozen=True, kw_only=True)
class CropRules(LevelRules):
    """How a picture becomes crops of `side` x `side` pixels."""

    side: int


def read_crop_rules(source: str, data: dict[str, Any], side: int, default: LevelRules) -> CropRules:
    """Rules from one processor's settings. side: what the tower takes, in pixels; a size that is left out can be no other.

    Raises:
        BadCheckpoint: an illegal value, or another size than the tower's; `source` names the file in the message.
    """
    levels = read_levels(data, default, source)
    if data.get("do_resize") is False:
        raise BadCheckpoint(f"{source}: do_resize False: the vision tower takes nothing but {side}x{side} pixels")
    for name in ("size", "crop_size"):
        value = data.get(name)
        lengths = value.values() if isinstance(value, dict) else [value]
        if value and any(length is not None and length != side for length in lengths):
            raise BadCheckpoint(f"{source}: {name} {value}: the vision tower takes {side}x{side} pixels")
    return CropRules(side=side, **levels.as_dict())


@dataclass(frozen=True)
class CropTower:
    """Modules of a vision tower, run layer by layer and no further than needed.

    embed: float [B, 3, side, side] -> [B, S, C]. layers: hidden [B, S, C] -> [B, S, C], the last one the last that is wanted.
    states: the hidden states to return, side by side: 0 is the embedding, i the output of the i-th layer. by_first_row: the
    salience is the attention of each crop's first row (a summary of the crop); otherwise the mean over all rows.
    """

    embed: Callable[[Tensor], Tensor]
    layers: Sequence[Callable[[Tensor], Tensor]]
    states: tuple[int, ...]
    by_first_row: bool

    @classmethod
    def build(
        cls,
        embed: Callable[[Tensor], Tensor],
        layers: Sequence[Callable[[Tensor], Tensor]],
        attentions: Sequence[nn.Module],
        states: tuple[int, ...],
        by_first_row: bool,
    ) -> CropTower:
        """layers and attentions: all of the tower, each layer's attention module beside it; at least one layer must be wanted."""
        number_layers(attentions)
        assert 0 < max(states) <= len(layers)
        return cls(embed, layers[: max(states)], states, by_first_row)

    def run(self, pixels: Tensor, needs: Collection[str]) -> tuple[Tensor, Tensor]:
        """float [B, 3, side, side] -> hidden [B, S, C * len(states)], and attention received f32 [B, S, T] in each of T layers: the
        last one for "salience", every one for "taps", else none and a single column of ones. It is averaged over heads (and rows),
        times S, so that 1.0 is an average row of its crop.
        """
        hidden = self.embed(pixels)
        num, length = hidden.shape[:2]
        found = {0: hidden}
        scored_layers = layers_to_score(needs, range(len(self.layers)))
        with _CropPass(num, length, scored_layers, self.by_first_row, hidden.device) as running:
            for i, layer in enumerate(self.layers, 1):
                hidden = layer(hidden)
                if i in self.states:
                    found[i] = hidden
        received = running.received()
        ones = hidden.new_ones(num * length, 1, dtype=torch.float32)
        return torch.cat([found[i] for i in self.states], -1), (ones if received is None else received).view(num, length, -1)


class _CropPass(TowerPass):
    """Every crop is a segment of its own, in every layer."""

    def __init__(self, num: int, length: int, scored_layers: Sequence[int], by_first_row: bool, device: torch.device):
        super().__init__(Segments([length] * num, device), None, frozenset(), scored_layers)
        self._shape = (num, length)
        self._by_first_row = by_first_row

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if layer not in self._scored_layers or not self._by_first_row:
            return super().attend(layer, q, k, v, scale)
        queries, keys = (t.unflatten(0, self._shape) for t in (q, k))
        scores = torch.einsum("bhd,bshd->bhs", queries[:, 0] * scale, keys)
        self._received.append(torch.softmax(scores, -1, dtype=torch.float32).mean(1).mul(self._shape[1]).flatten())
        return self._full.attend(q, k, v, scale)


class CropFamily:
    """Base of the families. `pixels` of their inputs are u8 [B, 3, side, side]. Thread-safe: a pass keeps its state in its call.

    A family sets `_tower` (None without the "vision" part) and gives `read_rules`, `slots`, `visual_ids`, `patchify`, `_run`
    and `_pack`.
    """

    name: ClassVar[str]

    def __init__(self, config: Any, rules: Any, device: torch.device, patches_per_crop: int):
        """rules[kind]: CropRules of one kind of media. patches_per_crop: rows of a crop inside the tower."""
        self._config = config
        self._rules = rules
        self._device = device
        self._tower: CropTower | None = None
        # Bounded memory, and on a CPU activations that stay in its cache.
        self.crops_per_pass = max(1, (4096 if device.type == "cpu" else 16384) // patches_per_crop)

    @classmethod
    def visual_ids(cls, config: Any) -> tuple[int, ...]:
        """Ids of the placeholders that stand for visual tokens."""
        raise NotImplementedError

    def pixel_values(self, inputs: VisualInputs) -> Tensor:
        """float32 [B, 3, side, side]: what the tower sees."""
        return self._normalize(inputs.pixels, inputs.kind)

    def plan(
        self, ids: Sequence[int], inputs: Sequence[VisualInputs], video_text_pos: Literal["max+1", "hf5"] = "max+1"
    ) -> PromptPlan:
        """Expand runs; every token is one position [1, T], so that both rules for text after a video are the same."""
        return linear_plan(ids, inputs, self.visual_ids(self._config))

    @torch.inference_mode()
    def encode(
        self, inputs: Sequence[VisualInputs], needs: Collection[str] = ("salience",), report: Report = no_report
    ) -> VisualTokens:
        """Run tower and projector, `crops_per_pass` crops at a time."""
        assert self._tower is not None, 'encode needs the "vision" part'
        total, done = sum(len(media.pixels) for media in inputs), 0
        packed = []
        for media in inputs:
            passes = []
            for pixels in media.pixels.split(self.crops_per_pass):
                report(done, total)
                values = self._normalize(pixels.to(self._device, non_blocking=True), media.kind)
                passes.append(self._run(media, values, needs))
                done += len(pixels)
            packed.append(self._pack(media, *(torch.cat(parts) for parts in zip(*passes, strict=True))))
        report(done, total)
        group, cell = join_places(inputs, self._device)
        embeds, received = (torch.cat(parts) for parts in zip(*packed, strict=True))
        salience = received[:, -1]
        if not needs:
            salience = torch.ones_like(salience).masked_fill(cell[:, 0] < 0, torch.nan)
        return VisualTokens(embeds, salience, group, cell, taps=received if "taps" in needs else None)

    def _normalize(self, crops: Tensor, kind: str) -> Tensor:
        return normalize(crops.flatten(1), self._rules[kind]).view(crops.shape)

    def _run(self, media: Any, pixels: Tensor, needs: Collection[str]) -> tuple[Tensor, Tensor]:
        """One pass: float32 [b, 3, side, side] -> visual tokens [b, n, D] and attention received f32 [b, n, T]: `CropTower.run`."""
        raise NotImplementedError

    def _pack(self, media: Any, embeds: Tensor, received: Tensor) -> tuple[Tensor, Tensor]:
        """All crops of a media (the family's own inputs), [B, n, D] and f32 [B, n, T], to its visual tokens in prompt order [N, D]
        and f32 [N, T], structural ones NaN.
        """
        raise NotImplementedError


def frames_of(media: Media) -> Tensor:
    """u8 [F, 3, H, W], a view.

    Raises:
        BadMedia: no frame, or an empty one.
    """
    frames = torch.as_tensor(media.frames)
    if frames.dim() != 4 or frames.shape[-1] != 3 or 0 in frames.shape or frames.dtype != torch.uint8:
        raise BadMedia(f"frames must be uint8 [F, H, W, 3] and not empty, got {frames.dtype} {list(frames.shape)}")
    return frames.permute(0, 3, 1, 2)
