"""The InternVL family as transformers reads it (checkpoints named -hf): square tiles through InternViT, shuffled into tokens.

image   <img> tile 0, tile 1, ..., thumbnail </img>           the tiles are one grid over the picture, the thumbnail another
video   Frame1: <img> frame 0 </img>, Frame2: <img> ...       one tile for each frame
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsevila_cluster.core.errors import BadCheckpoint
from sparsevila_cluster.media import Media
from sparsevila_cluster.models.adapter import Piece, Slot, VisualInputs
from sparsevila_cluster.models.checkpoint import Checkpoint
from sparsevila_cluster.models.families.crop_family import CropFamily, CropRules, CropTower, frames_of, read_crop_rules
from sparsevila_cluster.models.preprocess import KindRules, LevelRules, named_processor_files, resize
from sparsevila_cluster.models.prompt_plan import grid_places

OPEN, CLOSE, VIDEO = "<img>", "</img>", "<video>"
# What the reference processor asks the tokenizer for by name.
_NAMED_TOKENS = {"start_image_token": OPEN, "end_image_token": CLOSE, "video_token": VIDEO}
_MAX_TILES = 1024


@dataclass(frozen=True, kw_only=True)
class TileRules(CropRules):
    """How a picture becomes tiles: `min_tiles` to `max_tiles`, the thumbnail not counted."""

    min_tiles: int
    max_tiles: int

    def canvas(self, height: int, width: int) -> tuple[int, int]:
        """(rows, cols) of tiles for a picture: the nearest aspect ratio; of equally near ones the largest of which the picture has
        more than half the pixels, else the smallest.
        """
        counts = range(1, self.max_tiles + 1)
        shapes = [(cols, rows) for cols in counts for rows in counts if self.min_tiles <= cols * rows <= self.max_tiles]
        best, nearest = (1, 1), math.inf
        for cols, rows in sorted(shapes, key=math.prod):
            gap = abs(width / height - cols / rows)
            if gap < nearest or (gap == nearest and height * width > 0.5 * self.side**2 * cols * rows):
                best, nearest = (rows, cols), gap
        return best


class InternVL(CropFamily):
    """Family "internvl"."""

    name = "internvl"

    def __init__(self, config: Any, rules: KindRules[TileRules], core: Any, device: torch.device):
        """config: the checkpoint's transformers config; core: its model without head, or None for a decode worker."""
        self._merge = _merge_of(config)
        self._patches = rules.image.side // config.vision_config.patch_size[0]
        super().__init__(config, rules, device, self._patches**2)
        if core is not None:
            tower = core.vision_tower
            attentions = [layer.attention for layer in tower.encoder.layer]
            self._tower = CropTower.build(tower.embeddings, tower.encoder.layer, attentions, (_last_layer(config),), False)
            # By the number -1 the reference takes what the tower gives, by any other what the layer gives.
            self._final_norm = tower.layernorm if config.vision_feature_layer == -1 else nn.Identity()
            self._projector = core.multi_modal_projector

    @classmethod
    def read_rules(cls, config: Any, files: Checkpoint) -> KindRules[TileRules]:
        """The processor config. Images are cut into tiles whatever it says of `crop_to_patches`, as by the reference processor,
        which overrules that.

        Raises:
            BadCheckpoint: missing or illegal, at odds with config.json, or a config.json whose tower cannot be run.
        """
        merge = _merge_of(config)
        _last_layer(config)
        if config.vision_feature_select_strategy != "default":
            raise BadCheckpoint(
                f"config.json: vision_feature_select_strategy {config.vision_feature_select_strategy!r} is not 'default'"
            )
        side, patch = config.vision_config.image_size, config.vision_config.patch_size
        if side[0] != side[1] or patch[0] != patch[1] or side[0] % (patch[0] * merge):
            raise BadCheckpoint(
                f"config.json: image_size {list(side)} is not a square of visual tokens: {merge}x{merge} patches of {list(patch)}"
            )
        num, said = (side[0] // patch[0] // merge) ** 2, (files.json("processor_config.json") or {}).get("image_seq_length")
        if said not in (None, num):
            raise BadCheckpoint(f"processor_config.json: image_seq_length {said} is not the {num} visual tokens of a tile")
        _check_tokens(files)
        found = named_processor_files(files)
        image, video = (read_crop_rules(*settings, side[0], LevelRules()).as_dict() for settings in found)
        low, high = _tile_counts(*found[0])
        return KindRules(TileRules(**image, min_tiles=low, max_tiles=high), TileRules(**video, min_tiles=1, max_tiles=1))

    @classmethod
    def slots(cls, config: Any) -> dict[str, Slot]:
        """A template writes no marks around pictures; the processor does."""
        return {"video": Slot("video", (VIDEO,)), "image": Slot("image", (config.image_token_id,))}

    @classmethod
    def visual_ids(cls, config: Any) -> tuple[int, ...]:
        """The one placeholder of pictures and frames."""
        return (config.image_token_id,)

    def patchify(self, media: Media, alone: bool = True) -> VisualInputs:
        """Cut a picture into tiles and a thumbnail (if there are more tiles than one), or make each frame of a video one tile:
        as many for one of several pictures as for a lone one.

        Raises:
            BadMedia: no frame, or an empty one.
        """
        frames, rules = frames_of(media), self._rules[media.kind]
        num, side, tokens = len(frames), rules.side, self._patches // self._merge
        rows, cols = rules.canvas(*frames.shape[2:])
        canvas = resize(frames, rows * side, cols * side, rules.resample)
        tiles = canvas.reshape(num, 3, rows, side, cols, side).permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, side, side)
        grids = [(rows * tokens, cols * tokens)] * num
        if rows * cols > 1:
            tiles = torch.cat((tiles, resize(frames, side, side, rules.resample)))
            grids.append((tokens, tokens))
        group, cell = grid_places(grids)
        first = rows * cols * tokens**2  # tokens of the first grid: from row by row to tile by tile
        cell[:first] = cell[:first].view(rows, tokens, cols, tokens, 2).transpose(1, 2).reshape(-1, 2)
        spelling, runs = self._spell(media.kind, len(tiles), tokens**2)
        frame_of_group = tuple(range(num)) if media.kind == "video" else (0,) * len(grids)
        return VisualInputs(tiles, media.kind, spelling, runs, group, cell, tuple(grids), frame_of_group)

    def _spell(self, kind: str, num_tiles: int, per_tile: int) -> tuple[tuple[Piece, ...], tuple[int, ...]]:
        """What stands for a media in the prompt, and its runs."""
        block: tuple[Piece, ...] = (OPEN, self._config.image_token_id, CLOSE)
        if kind == "image":
            return block, (num_tiles * per_tile,)
        named = ((f"Frame{i}: ", *block) for i in range(1, num_tiles + 1))
        first, *others = named
        return first + tuple(piece for frame in others for piece in ("\n", *frame)), (per_tile,) * num_tiles

    def _run(self, media: VisualInputs, pixels: Tensor, needs: Collection[str]) -> tuple[Tensor, Tensor]:
        """Attention comes from all rows of a tile, the class token's with them, and is averaged where patches are joined."""
        assert self._tower is not None
        hidden, received = self._tower.run(pixels, needs)
        patches = self._final_norm(hidden)[:, 1:].unflatten(1, (self._patches, -1))
        tokens = self._projector(shuffle(patches, self._merge).flatten(2))
        return tokens, shuffle(received[:, 1:].unflatten(1, (self._patches, -1)), self._merge).mean(2)

    def _pack(self, media: VisualInputs, embeds: Tensor, received: Tensor) -> tuple[Tensor, Tensor]:
        return embeds.flatten(0, 1), received.flatten(0, 1)


def shuffle(patches: Tensor, merge: int) -> Tensor:
    """[B, rows, cols, C] -> [B, tokens, merge^2, C]: squares of neighbouring patches become tokens, row by row in both."""
    blocks = patches.unflatten(2, (-1, merge)).unflatten(1, (-1, merge))
    return blocks.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _merge_of(config: Any) -> int:
    """Patches on one side of a visual token. Raises BadCheckpoint: a downsample_ratio that joins no whole patches."""
    ratio = config.downsample_ratio
    merge = round(1 / ratio) if 0 < ratio <= 1 else 0
    if merge * ratio != 1:
        raise BadCheckpoint(f"config.json: downsample_ratio {ratio} is not 1 over a whole number")
    return merge


def _last_layer(config: Any) -> int:
    """The last layer that the visual tokens need, counted from 1. Raises BadCheckpoint: vision_feature_layer names no layer."""
    layer, num = config.vision_feature_layer, config.vision_config.num_hidden_layers
    last = (layer + num + 1 if layer < 0 else layer) if isinstance(layer, int) else 0
    if not 1 <= last <= num:
        raise BadCheckpoint(f"config.json: vision_feature_layer {layer} must be one layer, -{num} to -1 or 1 to {num}")
    return last


def _check_tokens(files: Checkpoint) -> None:
    """The tokens with names must be the ones that we write. Raises BadCheckpoint."""
    config = files.json("tokenizer_config.json") or {}
    extra = config.get("extra_special_tokens")
    named = {**(extra if isinstance(extra, dict) else {}), **config}
    for key, token in _NAMED_TOKENS.items():
        if named.get(key) != token:
            raise BadCheckpoint(f"tokenizer_config.json: {key} must be {token!r}, got {named.get(key)!r}")


def _tile_counts(source: str, data: dict[str, Any]) -> tuple[int, int]:
    """(min_patches, max_patches) of the image processor. Raises BadCheckpoint."""
    low, high = (default if data.get(name) is None else data[name] for name, default in (("min_patches", 1), ("max_patches", 12)))
    if not all(isinstance(count, int) for count in (low, high)) or not 1 <= low <= high <= _MAX_TILES:
        raise BadCheckpoint(
            f"{source}: min_patches {low} and max_patches {high} must be whole numbers, 1 <= min <= max <= {_MAX_TILES}"
        )
    return low, high
