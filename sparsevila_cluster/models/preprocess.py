"""Frames to patches as Qwen-style processors do it: resize to whole tokens, cut into patches; normalize last.

Resized pixels are whole numbers in every reference implementation, so patches are kept as uint8 (a quarter of the memory of
float32 on the host and on the way to the device) and normalized where they are used.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsevila_cluster.core.errors import BadCheckpoint, BadMedia
from sparsevila_cluster.models.checkpoint import Checkpoint

MAX_ASPECT_RATIO = 200
_RESAMPLE = {2: "bilinear", 3: "bicubic"}
_WHOLE = ("patch_size", "temporal_patch_size", "merge_size", "max_video_tokens")
_SWITCHES = ("do_resize", "cap_pixels_per_frame")
_RESIZE_BYTES = 64 << 20


@dataclass(frozen=True)
class LevelRules:
    """How pixels are resampled (2 bilinear, 3 bicubic), and how their whole values become what a tower sees."""

    resample: int = 3
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for hashing."""
        return asdict(self)


@dataclass(frozen=True)
class PixelRules(LevelRules):
    """How frames of one kind become patches. Pixel limits are per frame; lengths are in pixels."""

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    do_resize: bool = True
    cap_pixels_per_frame: bool = False
    max_video_tokens: int = 128000

    @property
    def factor(self) -> int:
        """Side of one visual token, in pixels."""
        return self.patch_size * self.merge_size

    def frame_size(self, height: int, width: int, num_frames: int) -> tuple[int, int]:
        """Height and width after resizing: multiples of `factor`, within the pixel limits, aspect ratio kept.

        Raises:
            BadMedia: the sides differ by a factor of more than 200, or do_resize is off and the size is no multiple of `factor`.
        """
        factor, low, high = self.factor, self.min_pixels, self.max_pixels
        if not self.do_resize:
            if height % factor or width % factor:
                raise BadMedia(f"frames of {width}x{height} pixels: this checkpoint needs multiples of {factor}")
            return height, width
        if self.cap_pixels_per_frame:
            budget = int(self.max_video_tokens * factor * factor * 0.9)
            high = max(min(high, budget * self.temporal_patch_size // num_frames), int(low * 1.05))
        _check_aspect(height, width)
        rows, cols = round(height / factor), round(width / factor)
        if rows * cols * factor * factor > high:
            shrink = math.sqrt(height * width / high)
            rows = max(1, math.floor(height / shrink / factor))
            cols = max(1, math.floor(width / shrink / factor))
        elif rows * cols * factor * factor < low:
            grow = math.sqrt(low / (height * width))
            rows, cols = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
        return max(rows, 1) * factor, max(cols, 1) * factor


@dataclass(frozen=True)
class ClipRules(PixelRules):
    """Pixel limits count all frames of a video together (Qwen3-VL)."""

    def frame_size(self, height: int, width: int, num_frames: int) -> tuple[int, int]:
        """As for `PixelRules`; num_frames: frames that share the limits.

        Raises:
            BadMedia: as for `PixelRules`.
        """
        if not self.do_resize:
            return super().frame_size(height, width, num_frames)
        factor, low, high = self.factor, self.min_pixels, self.max_pixels
        num = max(num_frames, self.temporal_patch_size)
        if self.cap_pixels_per_frame:
            frame_cap = self.max_video_tokens * factor * factor
            high = max(min(frame_cap, high // num), int(low * 1.05)) * num
        if height < factor or width < factor:
            scale = max(factor / height, factor / width)
            height, width = int(height * scale), int(width * scale)
        _check_aspect(height, width)
        rows, cols = round(height / factor), round(width / factor)
        deep = round(num / self.temporal_patch_size) * self.temporal_patch_size
        if deep * rows * cols * factor * factor > high:
            shrink = math.sqrt(num * height * width / high)
            rows, cols = math.floor(height / shrink / factor), math.floor(width / shrink / factor)
        elif deep * rows * cols * factor * factor < low:
            grow = math.sqrt(low / (num * height * width))
            rows, cols = math.ceil(height * grow / factor), math.ceil(width * grow / factor)
        return max(rows, 1) * factor, max(cols, 1) * factor


_Rules = TypeVar("_Rules", bound=LevelRules)


@dataclass(frozen=True)
class KindRules(Generic[_Rules]):
    """The rules of both kinds of media."""

    image: _Rules
    video: _Rules

    def __getitem__(self, kind: str) -> _Rules:
        return self.video if kind == "video" else self.image

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for hashing."""
        return {kind: {"rules": type(self[kind]).__name__, **self[kind].as_dict()} for kind in ("image", "video")}


def processor_files(files: Checkpoint) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of the image and the video processor, from processor_config.json (nested), video_preprocessor_config.json or
    preprocessor_config.json.

    Raises:
        BadCheckpoint: none of these files says how to preprocess.
    """
    (_, image), (_, video) = named_processor_files(files)
    return image, video


def named_processor_files(files: Checkpoint) -> tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]]:
    """As `processor_files`, each with the name of its file, for messages."""
    nested = files.json("processor_config.json") or {}
    image_in, video_in = (("processor_config.json", nested.get(f"{kind}_processor")) for kind in ("image", "video"))
    own_video, plain = ((name, files.json(name)) for name in ("video_preprocessor_config.json", "preprocessor_config.json"))
    image_file, image = next((found for found in (image_in, plain) if found[1]), plain)
    video_file, video = next((found for found in (video_in, own_video, plain) if found[1]), (image_file, image))
    if not isinstance(image, dict) or not isinstance(video, dict):
        raise BadCheckpoint(
            f"{str(files.directory)!r} has no preprocessor_config.json and no processor_config.json with `image_processor`"
        )
    return (image_file, image), (video_file, video)


def read_rules(files: Checkpoint, image_defaults: PixelRules, video_defaults: PixelRules) -> KindRules:
    """Rules for both kinds; what a file leaves out is taken from the defaults, which also choose the class.

    Raises:
        BadCheckpoint: no file says how to preprocess, or a value is illegal.
    """
    image, video = processor_files(files)
    return KindRules(_rules(image, image_defaults), _rules(video, video_defaults))


def _rules(data: dict[str, Any], default: PixelRules) -> PixelRules:
    size = data.get("size") or {}
    if not isinstance(size, dict):
        raise BadCheckpoint(f"processor config: `size` must be an object with shortest_edge and longest_edge, got {size!r}")
    levels = read_levels(data, default, "processor config")
    try:
        numbers: dict[str, Any] = {name: int(_first(data.get(name), getattr(default, name))) for name in _WHOLE}
        switches: dict[str, Any] = {name: bool(_first(data.get(name), getattr(default, name))) for name in _SWITCHES}
        rules = type(default)(
            min_pixels=int(_first(data.get("min_pixels"), size.get("shortest_edge"), size.get("min_pixels"), default.min_pixels)),
            max_pixels=int(_first(data.get("max_pixels"), size.get("longest_edge"), size.get("max_pixels"), default.max_pixels)),
            **numbers,
            **switches,
            **asdict(levels),
        )
    except (TypeError, ValueError) as error:
        raise BadCheckpoint(f"processor config: {error}") from error
    positive = {name: getattr(rules, name) for name in ("patch_size", "temporal_patch_size", "merge_size", "min_pixels")}
    for name, value in positive.items():
        if value < 1:
            raise BadCheckpoint(f"processor config: {name} must be at least 1, got {value}")
    if rules.max_pixels < rules.min_pixels:
        raise BadCheckpoint(f"processor config: max_pixels {rules.max_pixels} is below min_pixels {rules.min_pixels}")
    return rules


def read_levels(data: dict[str, Any], default: LevelRules, source: str) -> LevelRules:
    """Resampling and normalization from a processor's settings; what is left out is taken from `default`.

    Raises:
        BadCheckpoint: an illegal value; `source` names the file in the message.
    """

    def get(name: str) -> Any:
        return _first(data.get(name), getattr(default, name))

    try:
        rules = LevelRules(
            resample=int(get("resample")),
            do_rescale=bool(get("do_rescale")),
            rescale_factor=float(get("rescale_factor")),
            do_normalize=bool(get("do_normalize")),
            mean=tuple(float(x) for x in _first(data.get("image_mean"), default.mean)),
            std=tuple(float(x) for x in _first(data.get("image_std"), default.std)),
        )
    except (TypeError, ValueError) as error:
        raise BadCheckpoint(f"{source}: {error}") from error
    if len(rules.mean) != 3 or len(rules.std) != 3 or 0.0 in rules.std:
        raise BadCheckpoint(f"{source}: image_mean and image_std must hold three values, image_std none of them 0")
    if rules.resample not in _RESAMPLE:
        raise BadCheckpoint(f"{source}: resample {rules.resample} is not 2 (bilinear) or 3 (bicubic)")
    return rules


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _check_aspect(height: int, width: int) -> None:
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise BadMedia(f"aspect ratio {ratio:.1f} of {width}x{height} pixels; at most {MAX_ASPECT_RATIO} is allowed")


def resize(frames: Tensor, height: int, width: int, resample: int) -> Tensor:
    """u8 [F, C, h, w] -> u8 [F, C, height, width], antialiased, rounded to whole pixel values.

    A few frames at a time: torch's uint8 kernel keeps intermediates of the size of its input.
    """
    if frames.shape[-2:] == (height, width):
        return frames
    step = max(1, _RESIZE_BYTES // max(1, frames[0].numel()))
    out = frames.new_empty((*frames.shape[:2], height, width))
    for a in range(0, len(frames), step):
        part = frames[a : a + step].contiguous()
        out[a : a + step] = F.interpolate(part, size=(height, width), mode=_RESAMPLE[resample], antialias=True)
    return out


def cut_patches(frames: Tensor, rules: PixelRules) -> tuple[Tensor, tuple[int, int, int]]:
    """u8 [F, C, H, W] -> patches u8 [num_patches, C * t * p * p] and the grid (groups, rows, cols) of visual tokens.

    F is filled up to a multiple of t = temporal_patch_size with the last frame. Patches of one token are neighbours:
    order (group, token row, token col, row in token, col in token), each patch as (channel, frame, row, col).
    """
    t, m, p = rules.temporal_patch_size, rules.merge_size, rules.patch_size
    missing = -len(frames) % t
    if missing:
        frames = torch.cat((frames, frames[-1:].expand(missing, -1, -1, -1)))
    num, channels, height, width = frames.shape
    groups, rows, cols = num // t, height // (m * p), width // (m * p)
    cells = frames.reshape(groups, t, channels, rows, m, p, cols, m, p)
    patches = cells.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(groups * rows * cols * m * m, channels * t * p * p)
    return patches, (groups, rows, cols)


def normalize(patches: Tensor, rules: LevelRules) -> Tensor:
    """u8 [n, C * m], channel by channel -> float32, rescaled and normalized per channel in one step as the processors do."""
    pixels = patches.to(torch.float32, copy=True)
    if not rules.do_normalize:
        return pixels * rules.rescale_factor if rules.do_rescale else pixels
    unit = 1.0 / rules.rescale_factor if rules.do_rescale else 1.0
    mean = torch.tensor(rules.mean, device=patches.device) * unit
    std = torch.tensor(rules.std, device=patches.device) * unit
    pixels = pixels.view(len(patches), 3, patches.shape[1] // 3)
    return pixels.sub_(mean[:, None]).div_(std[:, None]).view(patches.shape)
