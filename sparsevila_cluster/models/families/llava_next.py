"""The LLaVA-NeXT family: pictures in tiles with a newline after each row; videos as so many pictures of one crop.

    a picture   base view, then the tiled view row by row, a newline after each row
    a video     each frame squashed to a square as the base view is: its cells, one newline

The checkpoints and their processor know no video. A video is written as its frames, one picture each, in the way that the chat
template writes several pictures. Of each frame there is the base view only, laid out as the reference lays out a picture of one
crop.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsevila_cluster.media import Media
from sparsevila_cluster.models.adapter import Slot
from sparsevila_cluster.models.families.anyres import cells_of, newline_of, pack
from sparsevila_cluster.models.families.crop_family import frames_of
from sparsevila_cluster.models.families.llava import CropInputs, Llava
from sparsevila_cluster.models.preprocess import resize


class LlavaNext(Llava):
    """Family "llava_next"."""

    name = "llava_next"

    @classmethod
    def slots(cls, config: Any) -> dict[str, Slot]:
        """One placeholder for a picture, and one for each frame of a video."""
        slot = Slot("image", (config.image_token_id,))
        return {"video": slot, "image": slot}

    @classmethod
    def visual_ids(cls, config: Any) -> tuple[int, ...]:
        """The one placeholder of pictures and frames."""
        return (config.image_token_id,)

    def patchify(self, media: Media, alone: bool = True) -> CropInputs:
        """Crops as the checkpoint's processor cuts them, whether `alone` or not; of a video's frames the base views.

        Raises:
            BadMedia: no frame, or an empty frame.
        """
        frames = frames_of(media)
        if media.kind == "image":
            return self._tile(frames, "image")
        rules, num, square = self._rules["video"], len(frames), (self._side, self._side)
        pixels = resize(frames, rules.side, rules.side, rules.resample)
        places = [pack(cells_of(square, group).flatten(0, 1), None, newline_of(group)) for group in range(num)]
        size = (frames.shape[2], frames.shape[3])
        return self._inputs(pixels, "video", torch.cat(places), (square,) * num, tuple(range(num)), size, num_runs=num)

    def _lay_out_video(self, frames: Tensor, newline: Tensor) -> Tensor:
        return torch.cat([pack(frame, None, newline) for frame in frames])
