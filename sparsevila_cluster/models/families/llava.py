"""What the LLaVA families share: a CLIP or SigLIP tower, chosen hidden states, a projector, tiles and newlines."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from sparsevila_cluster.core.errors import BadCheckpoint, BadMedia
from sparsevila_cluster.models.adapter import Between, Slot, VisualInputs
from sparsevila_cluster.models.checkpoint import Checkpoint
from sparsevila_cluster.models.families.anyres import (
    Size,
    TiledView,
    assemble,
    best_resolution,
    cells_of,
    cut_tiles,
    newline_of,
    pack,
    tiled_view,
)
from sparsevila_cluster.models.families.crop_family import CropFamily, CropRules, CropTower, read_crop_rules
from sparsevila_cluster.models.preprocess import LevelRules, named_processor_files, resize

TOWERS = {"clip_vision_model": True, "siglip_vision_model": False}
"""model_type of a vision tower -> whether the first row of a crop is a summary (CLS) and not a patch."""


@dataclass(frozen=True)
class LlavaRules:
    """How media become crops. canvases: (height, width) that a picture may be fitted to; max_tiles: see `tiled_view`."""

    image: CropRules
    video: CropRules
    canvases: tuple[Size, ...]
    max_tiles: int | None

    def __getitem__(self, kind: str) -> CropRules:
        return self.video if kind == "video" else self.image

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for hashing."""
        own = {"canvases": [list(size) for size in self.canvases], "max_tiles": self.max_tiles}
        return {"image": self.image.as_dict(), "video": self.video.as_dict(), **own}


@dataclass(frozen=True)
class CropInputs(VisualInputs):
    """size: (height, width) of the frames before resizing; view: how crops 1, 2, ... make the tiled view of crop 0, if they do."""

    size: Size
    view: TiledView | None


class Llava(CropFamily):
    """Base of the two families."""

    def __init__(self, config: Any, rules: LlavaRules, core: Any, device: torch.device):
        """config: the checkpoint's transformers config; core: its model without head, or None for a decode worker."""
        vision = config.vision_config
        super().__init__(config, rules, device, (vision.image_size // vision.patch_size) ** 2)
        self._side = vision.image_size // vision.patch_size
        self._skip = rows_before_patches(config)
        if core is not None:
            self._tower = build_tower(config, core.vision_tower)
            self._projector, self._newline = core.multi_modal_projector, core.image_newline.data

    @classmethod
    def read_rules(cls, config: Any, files: Checkpoint) -> LlavaRules:
        """The processor config. Raises BadCheckpoint: missing, illegal, or at odds with config.json; or a tower or feature layer
        that this family cannot take.
        """
        feature_states(config)
        rows_before_patches(config)
        side, canvases = config.vision_config.image_size, read_canvases("config.json", config.image_grid_pinpoints)
        if not canvases or any(length < side or length % side for size in canvases for length in size):
            raise BadCheckpoint(f"config.json: image_grid_pinpoints {config.image_grid_pinpoints} must be multiples of {side}")
        image, video = named_processor_files(files)
        own = image[1].get("image_grid_pinpoints")
        if own is not None and read_canvases(image[0], own) != canvases:
            raise BadCheckpoint(f"{image[0]}: image_grid_pinpoints {own} is not config.json's {config.image_grid_pinpoints}")
        rules = [read_crop_rules(source, data, side, LevelRules()) for source, data in (image, video)]
        return LlavaRules(rules[0], rules[1], canvases, cls._max_tiles(config))

    @classmethod
    def _max_tiles(cls, config: Any) -> int | None:
        return None

    @classmethod
    def slots(cls, config: Any) -> dict[str, Slot]:
        """How the chat template writes each kind of media."""
        raise NotImplementedError

    def _run(self, media: CropInputs, pixels: Tensor, needs: Collection[str]) -> tuple[Tensor, Tensor]:
        assert self._tower is not None
        hidden, received = self._tower.run(pixels, needs)
        return self._projector(hidden[:, self._skip :]), received[:, self._skip :]

    def _pack(self, media: CropInputs, embeds: Tensor, received: Tensor) -> tuple[Tensor, Tensor]:
        nan = received.new_full(received.shape[2:], torch.nan)
        return self._lay_out(media, embeds, self._newline), self._lay_out(media, received, nan)

    def _lay_out(self, media: CropInputs, crops: Tensor, newline: Tensor) -> Tensor:
        """Crops [B, n, C] of a media to [N, C] in prompt order."""
        if media.kind == "video":
            return self._lay_out_video(crops, newline)
        return pack(crops[0], None if media.view is None else assemble(crops[1:], media.view), newline)

    def _lay_out_video(self, frames: Tensor, newline: Tensor) -> Tensor:
        raise NotImplementedError

    def _tile(self, picture: Tensor, kind: str) -> CropInputs:
        """A picture u8 [1, 3, H, W] as its base view and its tiled view."""
        rules, size = self._rules[kind], (picture.shape[2], picture.shape[3])
        canvas = best_resolution(size, self._rules.canvases)
        view = tiled_view(size, canvas, rules.side, self._side, self._rules.max_tiles)
        if 0 in view.grid and 0 not in view.window:
            raise BadMedia(f"a picture of {size[1]}x{size[0]} pixels is too narrow for this model's tiles")
        base = resize(picture, rules.side, rules.side, rules.resample)
        tiles = cut_tiles(picture[0], canvas, rules.side, rules.resample)
        square = (self._side, self._side)
        # The tiles of a picture as narrow as a hair may show no cell of it: then their view is no group.
        group = int(0 not in view.grid)
        places = pack(cells_of(square, 0).flatten(0, 1), cells_of(view.grid, group), newline_of(group))
        grids = (square, view.grid)[: group + 1]
        return self._inputs(torch.cat((base, tiles)), "image", places, grids, (0, 0)[: group + 1], size, view)

    def _inputs(
        self,
        pixels: Tensor,
        kind: Literal["video", "image"],
        places: Tensor,
        grids: tuple[Size, ...],
        frame_of_group: tuple[int, ...],
        size: Size,
        view: TiledView | None = None,
        num_runs: int = 1,
    ) -> CropInputs:
        """places i32 [N, 3] = (group, row, col) of every visual token; each of `num_runs` placeholders stands for as many."""
        placeholder = self.slots(self._config)[kind].pieces
        spelling = placeholder + (Between.MEDIA, *placeholder) * (num_runs - 1)
        runs = (len(places) // num_runs,) * num_runs
        return CropInputs(
            pixels=pixels, kind=kind, spelling=spelling, runs=runs, group=places[:, 0], cell=places[:, 1:], grids=grids,
            frame_of_group=frame_of_group, size=size, view=view,
        )  # fmt: skip


def feature_states(config: Any) -> tuple[int, ...]:
    """Hidden states that the projector takes, side by side: 0 is the embedding, i the output of the i-th layer.

    Raises:
        BadCheckpoint: an unknown tower, or a layer that it does not have.
    """
    vision, chosen = config.vision_config, config.vision_feature_layer
    if vision.model_type not in TOWERS:
        raise BadCheckpoint(
            f"config.json: vision tower {vision.model_type!r} is not supported; supported: {', '.join(sorted(TOWERS))}"
        )
    num = vision.num_hidden_layers + 1
    chosen = [chosen] if isinstance(chosen, int) else list(chosen)
    if not chosen or not all(-num <= i < num for i in chosen) or not any(i % num for i in chosen):
        raise BadCheckpoint(
            f"config.json: vision_feature_layer {config.vision_feature_layer} must name hidden states of {num - 1} layers"
        )
    return tuple(i % num for i in chosen)


def read_canvases(source: str, pinpoints: Any) -> tuple[Size, ...]:
    """(height, width) of every canvas. Raises BadCheckpoint: not a list of pairs of whole numbers; `source` names the file."""
    try:
        canvases = tuple((height, width) for height, width in pinpoints)
    except (TypeError, ValueError):
        canvases = ((None, None),)
    if not all(isinstance(length, int) for size in canvases for length in size):
        raise BadCheckpoint(f"{source}: image_grid_pinpoints must be a list of [height, width], got {pinpoints!r}")
    return canvases


def rows_before_patches(config: Any) -> int:
    """Rows of a crop that are no visual tokens: 1 where the strategy "default" drops the first.

    Raises:
        BadCheckpoint: what the strategy leaves is no square grid of patches.
    """
    vision, strategy = config.vision_config, config.vision_feature_select_strategy
    skip = int(strategy == "default")
    if skip != int(TOWERS[vision.model_type]):
        raise BadCheckpoint(
            f"config.json: vision_feature_select_strategy {strategy!r} with {vision.model_type!r} does not leave the "
            f"{vision.image_size // vision.patch_size}x{vision.image_size // vision.patch_size} patches of a crop"
        )
    return skip


def build_tower(config: Any, tower: Any) -> CropTower:
    """The tower up to the last layer that is wanted; the weights of the others are let go."""
    states = feature_states(config)
    has_summary = TOWERS[config.vision_config.model_type]

    def embed(pixels: Tensor) -> Tensor:
        hidden = tower.embeddings(pixels)
        return tower.pre_layrnorm(hidden) if has_summary else hidden

    layers = tower.encoder.layers
    del layers[max(states) :]
    tower.post_layernorm = tower.head = None
    steps = [partial(layer, attention_mask=None) for layer in layers]
    return CropTower.build(embed, steps, [layer.self_attn for layer in layers], states, by_first_row=has_summary)


def max_tiles(vision_aspect_ratio: str) -> int:
    """The number in "anyres_max_9". Raises BadCheckpoint: there is none."""
    number = vision_aspect_ratio.removeprefix("anyres_max_")
    if number == vision_aspect_ratio or not number.isdecimal() or int(number) < 1:
        raise BadCheckpoint(f"config.json: vision_aspect_ratio {vision_aspect_ratio!r} is not anyres_max_N")
    return int(number)
