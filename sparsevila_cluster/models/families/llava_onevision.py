"""The LLaVA-OneVision family: a lone picture in tiles, several pictures as one crop each, videos as pooled frames.

a lone picture     base view, then the tiled view row by row, a newline after each row
several pictures   each padded to a square: its cells, one newline
a video            each frame squashed to a square and pooled to half its side; one newline after the last frame
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from sparsevila_cluster.media import Media
from sparsevila_cluster.models.adapter import Slot
from sparsevila_cluster.models.families.anyres import cells_of, cells_of_square, halve, halved, newline_of, pack, pad_square
from sparsevila_cluster.models.families.crop_family import frames_of
from sparsevila_cluster.models.families.llava import CropInputs, Llava, max_tiles
from sparsevila_cluster.models.preprocess import resize


class LlavaOnevision(Llava):
    """Family "llava_onevision"."""

    name = "llava_onevision"

    @classmethod
    def slots(cls, config: Any) -> dict[str, Slot]:
        """One placeholder for each media."""
        return {"video": Slot("video", (config.video_token_id,)), "image": Slot("image", (config.image_token_id,))}

    @classmethod
    def visual_ids(cls, config: Any) -> tuple[int, ...]:
        """The placeholders of pictures and of videos."""
        return config.image_token_id, config.video_token_id

    @classmethod
    def _max_tiles(cls, config: Any) -> int | None:
        return max_tiles(config.vision_aspect_ratio)

    def patchify(self, media: Media, alone: bool = True) -> CropInputs:
        """Crops as the checkpoint's processor cuts them: a picture is tiled only if it is the prompt's only one.

        Raises:
            BadMedia: no frame, an empty frame, or a picture too narrow for the tiles.
        """
        frames = frames_of(media)
        if media.kind == "video":
            return self._frames(frames)
        return self._tile(frames, "image") if alone else self._one_of_several(frames)

    def _frames(self, frames: Tensor) -> CropInputs:
        rules, num, half = self._rules["video"], len(frames), halved(self._side)
        pixels = resize(frames, rules.side, rules.side, rules.resample)
        cells = torch.cat([cells_of((half, half), group).flatten(0, 1) for group in range(num)])
        places = pack(cells, None, newline_of(num - 1))
        size = (frames.shape[2], frames.shape[3])
        return self._inputs(pixels, "video", places, ((half, half),) * num, tuple(range(num)), size)

    def _one_of_several(self, picture: Tensor) -> CropInputs:
        rules, size = self._rules["image"], (picture.shape[2], picture.shape[3])
        square = pad_square(picture[0], [int(value * 255) for value in rules.mean])
        pixels = resize(square[None], rules.side, rules.side, rules.resample)
        cells, grid = cells_of_square(size, self._side)
        return self._inputs(pixels, "image", pack(cells.flatten(0, 1), None, newline_of(0)), (grid,), (0,), size)

    def _run(self, media: CropInputs, pixels: Tensor, needs: Collection[str]) -> tuple[Tensor, Tensor]:
        embeds, received = super()._run(media, pixels, needs)
        if media.kind == "video":
            embeds, received = halve(embeds, self._side), halve(received, self._side)
        return embeds, received

    def _lay_out_video(self, frames: Tensor, newline: Tensor) -> Tensor:
        return pack(frames.flatten(0, 1), None, newline)
