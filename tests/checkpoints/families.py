"""Every supported family as tests see it: its tiny checkpoint, and how stock transformers is given the same media.

A row says how our inputs become a stock model's arguments, and what its vision side returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.checkpoints import tiny_llava_next, tiny_llava_onevision
from tests.checkpoints.tiny_internvl import internvl_features, internvl_inputs, make_internvl
from tests.checkpoints.tiny_llava_next import make_llava_next
from tests.checkpoints.tiny_llava_onevision import make_llava_onevision
from tests.checkpoints.tiny_qwen2_5_vl import make_qwen2_5_vl
from tests.checkpoints.tiny_qwen3_vl import make_qwen3_vl


@dataclass(frozen=True)
class TinyFamily:
    """make: writes a checkpoint. stock_inputs(model, inputs): what the stock model takes besides ids. stock_features(stock, those):
    (visual embeddings [N, D] in prompt order, DeepStack levels [N, D] each). generates: kinds of media that the stock model's own
    `generate` takes."""

    make: Callable[..., Path]
    stock_inputs: Callable[[Any, Sequence[Any]], dict[str, Any]]
    stock_features: Callable[[Any, dict[str, Any]], tuple[Tensor, Sequence[Tensor]]]
    generates: tuple[str, ...] = ("video", "image")


def qwen_inputs(model: Any, inputs: Sequence[Any]) -> dict[str, Any]:
    """Pixels and grids (in patches) by kind; for Qwen2.5-VL also the seconds between groups."""
    merge = model.config.vision_config.spatial_merge_size
    found: dict[str, Any] = {}
    for kind, pixels, grids in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        some = [media for media in inputs if media.kind == kind]
        if some:
            found[pixels] = torch.cat([model.family.pixel_values(media) for media in some])
            found[grids] = torch.tensor([(m.grid[0], m.grid[1] * merge, m.grid[2] * merge) for m in some])
    if "video_grid_thw" in found and model.family.name == "qwen2_5_vl":
        found["second_per_grid_ts"] = [media.seconds_per_group for media in inputs if media.kind == "video"]
    return found


def qwen_features(stock: Any, given: dict[str, Any]) -> tuple[Tensor, Sequence[Tensor]]:
    """For prompts whose images come before their videos."""
    embeds, levels = [], []
    if "pixel_values" in given:
        out = stock.model.get_image_features(given["pixel_values"], given["image_grid_thw"])
        embeds += out.pooler_output
        levels.append([torch.cat(list(level)) for level in getattr(out, "deepstack_features", None) or []])
    if "pixel_values_videos" in given:
        out = stock.model.get_video_features(given["pixel_values_videos"], given["video_grid_thw"])
        embeds += out.pooler_output
        levels.append([torch.cat(list(level)) for level in getattr(out, "deepstack_features", None) or []])
    return torch.cat(list(embeds)), [torch.cat(level) for level in zip(*levels, strict=True)]


FAMILIES = {
    "internvl": TinyFamily(make_internvl, internvl_inputs, internvl_features),
    "llava_next": TinyFamily(make_llava_next, tiny_llava_next.stock_inputs, tiny_llava_next.stock_features, ("image",)),
    "llava_onevision": TinyFamily(make_llava_onevision, tiny_llava_onevision.stock_inputs, tiny_llava_onevision.stock_features),
    "qwen2_5_vl": TinyFamily(make_qwen2_5_vl, qwen_inputs, qwen_features),
    "qwen3_vl": TinyFamily(make_qwen3_vl, qwen_inputs, qwen_features),
}


def type_ids(model: Any, plan: Any, inputs: Sequence[Any], num_after: int) -> dict[str, Tensor]:
    """Extra arguments that Qwen models want beside ids: 0 for text, 1 for image, 2 for video tokens."""
    if not model.family.name.startswith("qwen"):
        return {}
    kinds = torch.cat([torch.full((media.num_tokens,), 1 if media.kind == "image" else 2) for media in inputs])
    types = torch.zeros(len(plan.ids) + num_after, dtype=torch.int64)
    types[: len(plan.ids)][plan.visual_mask] = kinds
    return {"mm_token_type_ids": types[None]}
