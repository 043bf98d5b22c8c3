"""A quantization from beginning to end: calibrate, tower, layer by layer, write, rename.

original -> samples (and a look at the tower) -> vision -> layer 0 ... layer n -> whole checkpoint -> its final name
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from sparsevila_cluster.core.errors import BadCheckpoint, BadRequest
from sparsevila_cluster.models.loading.originals import Original, open_original
from sparsevila_cluster.quantization.calibration import Reading, Report, check_finite, make_samples, num_rows
from sparsevila_cluster.quantization.checkpoint_writer import plan_replacements, quantization_config, size_of, write_checkpoint
from sparsevila_cluster.quantization.layer_quantizer import Sample, TextSettings, choose_group_size, quantize_layer, run_layer
from sparsevila_cluster.quantization.materials import Material
from sparsevila_cluster.quantization.tower_quantizer import TowerWatch, quantize_tower
from sparsevila_cluster.quantization.work_dir import WorkDir, check_room, check_target, open_scratch

VERSION = 1
"""Of the numbers: raised when the same settings would give others, so that old unfinished work is not gone on with."""


@dataclass(frozen=True)
class Settings:
    """What a user chooses. group_size None: the largest usual one that fits."""

    group_size: int | None = None
    vision: Literal["w8a8", "none"] = "none"
    clip: bool = True
    num_steps: int = 20
    search_rows: int = 2048
    alpha: float = 0.5
    keep: tuple[str, ...] = ()
    reading: Reading = field(default_factory=Reading)

    def __post_init__(self) -> None:
        if self.group_size is not None and (self.group_size < 8 or self.group_size % 8):
            raise BadRequest(f"group_size must be a multiple of 8, got {self.group_size}")
        if not 0 <= self.alpha <= 1:
            raise BadRequest(f"alpha must be in [0, 1], got {self.alpha}")
        if self.num_steps < 1 or self.search_rows < 1:
            raise BadRequest(f"num_steps and search_rows must be at least 1, got {self.num_steps} and {self.search_rows}")


@dataclass(frozen=True)
class Outcome:
    """What was done. Sizes are of all tensors."""

    group_size: int
    num_linears: int
    num_tower_linears: int
    num_samples: int
    num_tokens: int
    source_bytes: int
    target_bytes: int
    resumed_layers: int
    seconds: float


def quantize_checkpoint(
    source: Path,
    target: Path,
    materials: Sequence[Material],
    settings: Settings,
    *,
    device: str = "auto",
    restart: bool = False,
    report: Report = lambda *_: None,
) -> Outcome:
    """Write `source`, quantized, to the new directory `target`. Interrupted, the same call goes on where it was.

    Raises:
        BadCheckpoint: the source cannot be quantized. BadRequest: the destination exists, materials or settings do not fit.
        BadMedia, TooLarge: materials, or no room on the disk.
    """
    start_s = time.monotonic()
    check_target(target)
    report("load model", 0, 1)
    with_media = any(material.media for material in materials)
    if settings.vision == "w8a8" and not with_media:
        raise BadRequest(
            "the vision tower is quantized with media to calibrate on, and there are none (--vision none leaves it as it is)"
        )
    original = open_original(source, device, with_media)
    shapes = _shapes(original, settings.keep)
    group_size = choose_group_size(shapes, settings.group_size)
    vision = settings.vision == "w8a8"
    if vision and not original.tower:
        raise BadRequest("this checkpoint has no vision tower to quantize (--vision none)")
    text = TextSettings(group_size, settings.num_steps, settings.clip, settings.search_rows, settings.keep)
    record = {
        "version": VERSION,
        "source": original.model.fingerprint,
        "calibration": [material.fingerprint() for material in materials],
        **asdict(settings),
        "group_size": group_size,
    }
    with open_scratch(target, record, restart) as scratch, torch.inference_mode():
        check_room(target, scratch, _room(original, shapes, group_size))
        done = _finished(scratch, original)
        samples = _calibrate(original, scratch, materials, settings, vision, report)
        _quantize_layers(original, scratch, samples, text, done, report)
        pieces = [scratch.open(piece) for piece in _pieces(original, vision)]
        replacements = plan_replacements(original.sources, pieces)
        config = quantization_config(original.files, group_size, settings.keep, vision)
        write_checkpoint(original.files, scratch, replacements, config, report)
        sizes = [sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in (source, scratch.whole)]
        check_target(target)
        scratch.publish(target)
    num_linears = sum(name.endswith(".qweight") for piece in pieces for name in piece.shapes)
    num_tower = sum(name.endswith(".weight_scale") for piece in pieces for name in piece.shapes)
    seconds = time.monotonic() - start_s
    return Outcome(group_size, num_linears, num_tower, len(samples), num_rows(samples), sizes[0], sizes[1], len(done), seconds)


def _layer_piece(index: int) -> str:
    return f"layer-{index:05d}"


def _pieces(original: Original, vision: bool) -> list[str]:
    return ["vision"] * vision + [_layer_piece(i) for i in range(len(original.layers))]


def _finished(scratch: WorkDir, original: Original) -> list[int]:
    return [i for i in range(len(original.layers)) if scratch.has(_layer_piece(i))]


def _calibrate(
    original: Original,
    scratch: WorkDir,
    materials: Sequence[Material],
    settings: Settings,
    vision: bool,
    report: Report,
) -> list[Sample]:
    """Samples for the text model; what the tower is given on the way quantizes it."""
    with ExitStack() as stack:
        watch = stack.enter_context(TowerWatch(original.tower)) if vision and not scratch.has("vision") else None
        samples = make_samples(original.model, original.vocabulary, materials, settings.reading, report)
    check_finite(samples)
    if watch is not None:
        scratch.save("vision", quantize_tower(original.tower, watch, settings.alpha))
    return samples


def _quantize_layers(
    original: Original, scratch: WorkDir, samples: list[Sample], text: TextSettings, done: Sequence[int], report: Report
) -> None:
    """Every layer sees what the float layers before it give, so those that are finished are only run."""
    num_layers = len(original.layers)
    for index in range(num_layers):
        report("layer", index, num_layers)
        layer = original.layers[index]
        assert layer is not None
        if index in done and len(done) == num_layers:
            continue
        layer.module.float()
        samples, seen = run_layer(layer, samples, index, 0 if index in done else text.search_rows)
        if seen is not None:
            try:
                tensors = quantize_layer(layer, seen, text, original.stored_dtype)
            except ValueError as error:
                raise BadCheckpoint(f"{layer.name}: {error}") from error
            scratch.save(_layer_piece(index), tensors)
        original.release(index)
    report("layer", num_layers, num_layers)


def _shapes(original: Original, keep: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """[N, K] of every linear that is quantized, by its name in memory. Raises BadRequest: `keep` names none."""
    layers = [layer for layer in original.layers if layer is not None]
    every = {f"{layer.name}.{path}": tuple(linear.weight.shape) for layer in layers for path, linear in layer.linears.items()}
    for end in keep:
        if not any(name.endswith(f".{end}") for name in every):
            raise BadRequest(f"keep: no linear of the text model has a name that ends in {end!r}")
    return {name: shape for name, shape in every.items() if not TextSettings(0, keep=tuple(keep)).keeps(name)}


def _room(original: Original, shapes: dict[str, tuple[int, ...]], group_size: int) -> int:
    """Bytes that the work takes on the disk at its fullest: finished layers, and the whole checkpoint beside them."""
    # Half a byte a code, and for each group half a byte of zero and two bytes of scale.
    sizes = {original.sources[f"{name}.weight"]: n * k // 2 + n * k * 5 // (2 * group_size) for name, (n, k) in shapes.items()}
    return size_of(original.files, sizes) + sum(sizes.values())


def describe(outcome: Outcome) -> dict[str, Any]:
    """Plain data."""
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in asdict(outcome).items()}
