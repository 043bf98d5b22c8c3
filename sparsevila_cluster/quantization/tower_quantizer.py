"""The vision tower's linears to 8 bits: what they are given while calibration runs through the tower, and their stored form."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import TracebackType

import torch
from torch import Tensor, nn

from sparsevila_cluster.core.errors import BadCheckpoint, BadRequest
from sparsevila_cluster.quantization.smoothquant import choose_smooth, quantize_rows

ROWS_PER_CALL, MAX_ROWS = 64, 2048
"""Rows of a linear's input that are kept to judge by: of each pass through the tower, and in all."""


class TowerWatch(AbstractContextManager["TowerWatch"]):
    """While it is entered, the inputs of the linears are looked at. reach: the largest |x| f32 [K] of each; rows: some inputs."""

    def __init__(self, linears: Mapping[str, nn.Linear]):
        self._linears = dict(linears)
        self.reach: dict[str, Tensor] = {}
        self.rows: dict[str, list[Tensor]] = {name: [] for name in linears}

    def __enter__(self) -> TowerWatch:
        self._hooks = [
            linear.register_forward_pre_hook(lambda _, args, name=name: self._see(name, args[0]))
            for name, linear in self._linears.items()
        ]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

    def _see(self, name: str, given: Tensor) -> None:
        rows = given.flatten(0, -2).float()
        most = rows.abs().amax(0)
        self.reach[name] = torch.maximum(self.reach.get(name, most), most)
        held = self.rows[name]
        if sum(map(len, held)) < MAX_ROWS:
            held.append(rows[:: max(1, len(rows) // ROWS_PER_CALL)].cpu())


def quantize_tower(linears: Mapping[str, nn.Linear], watch: TowerWatch, alpha: float) -> dict[str, Tensor]:
    """Tensors to store, by their names in memory: weight i8 [N, K], weight_scale f32 [N, 1], and smooth f32 [K] where it helps.

    Raises:
        BadRequest: calibration brought no media to the tower. BadCheckpoint: weights or inputs that are not finite.
    """
    found: dict[str, Tensor] = {}
    for name, linear in linears.items():
        if name not in watch.reach:
            raise BadRequest(
                "the vision tower can only be quantized with media to calibrate on, and there are none (--vision none leaves it)"
            )
        weight, reach = linear.weight.data.float(), watch.reach[name]
        if not torch.isfinite(weight).all():
            raise BadCheckpoint(f"tensor '{name}.weight' holds values that are not finite")
        if not torch.isfinite(reach).all():
            raise BadCheckpoint(f"{name}: calibration gives values that are not finite; the vision tower is broken")
        smooth = choose_smooth(weight, reach, torch.cat(watch.rows[name]).to(weight), alpha)
        values, scales = quantize_rows(weight if smooth is None else weight * smooth)
        found[f"{name}.weight"], found[f"{name}.weight_scale"] = values.cpu(), scales.cpu()
        if smooth is not None:
            found[f"{name}.smooth"] = smooth.cpu()
    return found
