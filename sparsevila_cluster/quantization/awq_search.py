"""Activation-aware 4-bit rounding (arXiv 2306.00978): which input channels to enlarge, where to clip, and the codes.

Everything is float32. Two rules differ from AutoAWQ 0.2.9: a group's range always holds 0, so that a group of one sign does not
saturate, and codes are made with the scale as it will be stored (float16).

    W x = (W s)(x / s)      s large where activations are large: the weights that matter are rounded on a finer grid
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TOP_CODE = 15
SMALLEST_SCALE = 1e-5  # of a group of zeros; float16 holds it within 0.6 %
_CLIP_ROWS = 128  # rows of a weight whose clip search is in memory at once


class Codes(NamedTuple):
    """codes and zeros 0..15, u8 [N, K] and [N, K/g]; scales f16 [N, K/g]. The weight is (codes - zeros) * scales."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def dequantize(self) -> Tensor:
        """f32 [N, K]."""
        groups = self.codes.view(*self.scales.shape, -1).float() - self.zeros.unsqueeze(-1).float()
        return (groups * self.scales.unsqueeze(-1).float()).view(self.codes.shape)


def encode(weight: Tensor, group_size: int, limits: Tensor | None = None) -> Codes:
    """Round f32 [N, K] to 4 bits; limits f32 [N, K/g] clip each group to [-limit, limit] first.

    Raises:
        ValueError: group_size does not divide K, or a value that float16 cannot scale (not finite, or above a million).
    """
    grid, scales, zeros = _grid(_groups(weight, group_size), limits)
    if not torch.isfinite(scales).all():
        raise ValueError("weights are not finite, or too large for scales in float16")
    return Codes(grid.to(torch.uint8).view(weight.shape), scales.half().squeeze(-1), zeros.to(torch.uint8).squeeze(-1))


def rounded(weight: Tensor, group_size: int, limits: Tensor | None = None) -> Tensor:
    """What `encode` keeps of a weight, f32 [N, K]."""
    grid, scales, zeros = _grid(_groups(weight, group_size), limits)
    return grid.sub_(zeros).mul_(scales).view(weight.shape)


def scale_candidates(weights: Sequence[Tensor], activity: Tensor, group_size: int, num_steps: int) -> Iterator[Tensor]:
    """s = activity^r / importance^(1-r) for r = 0, 1/num_steps, ..., 1, each f32 [K], its extremes' geometric mean 1.

    activity f32 [K]: mean |x| of each input channel; importance: mean |w| relative to the largest in its group, over all weights.
    """
    stacked = torch.cat([_groups(weight, group_size).abs() for weight in weights])
    importance = (stacked / stacked.amax(-1, keepdim=True).add_(1e-6)).flatten(1).mean(0)
    for i in range(num_steps + 1):
        r = i / num_steps
        scale = activity.pow(r).div(importance.pow(1 - r).add(1e-4)).clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        yield torch.where(torch.isfinite(scale), scale, 1.0)


def search_scale(
    weights: Sequence[Tensor],
    activity: Tensor,
    group_size: int,
    error: Callable[[list[Tensor]], float],
    num_steps: int = 20,
    as_stored: Callable[[Tensor], Tensor] = lambda scale: scale,
) -> Tensor | None:
    """The scale of input channels f32 [K] whose rounded weights do best, or None if none beats rounding as it is.

    weights: f32 [N, K] of the linears that share an input. error(weights) measures what they give against the true ones, in any
    unit. as_stored: what of a scale survives being folded into whatever comes before, whose numbers have few bits.
    """
    best_error, best = error([rounded(weight, group_size) for weight in weights]), None
    for candidate in scale_candidates(weights, activity, group_size, num_steps):
        scale = as_stored(candidate)
        found = error([rounded(weight * scale, group_size).div_(scale) for weight in weights])
        if found < best_error:
            best_error, best = found, scale
    return best


def search_clip(weight: Tensor, rows: Tensor, group_size: int, num_steps: int = 20, least: float = 0.5) -> Tensor:
    """Limits f32 [N, K/g] that bring each group's part of `rows` @ weight.T closest to the truth in the mean square.

    weight f32 [N, K], rows f32 [T, K]. Tried are shares of the group's largest weight: 1, 1 - 1/num_steps, ..., above `least`.
    """
    # Squared errors of all rows at once: |x (Q(w) - w)|^2 summed over rows is d^T (x^T x) d with d = Q(w) - w.
    inputs = _groups(rows, group_size).transpose(0, 1)
    moments = inputs.transpose(1, 2) @ inputs  # [K/g, g, g]
    found = []
    for part in weight.split(_CLIP_ROWS):
        groups = _groups(part, group_size)
        top = groups.abs().amax(-1)
        best_error, best = torch.full_like(top, torch.inf), top
        for i in range(int((1 - least) * num_steps)):
            limits = top * (1 - i / num_steps)
            lost = (_groups(rounded(part, group_size, limits), group_size) - groups).transpose(0, 1)  # [K/g, n, g]
            errors = torch.einsum("gnk,gnk->ng", lost @ moments, lost)
            better = errors < best_error
            best_error, best = torch.where(better, errors, best_error), torch.where(better, limits, best)
        found.append(best)
    return torch.cat(found)


def _groups(matrix: Tensor, group_size: int) -> Tensor:
    """[R, K] -> [R, K/g, g], a view."""
    num_in = matrix.shape[-1]
    if group_size < 1 or num_in % group_size:
        raise ValueError(f"group_size {group_size} does not divide {num_in} inputs")
    return matrix.unflatten(-1, (num_in // group_size, group_size))


def _grid(groups: Tensor, limits: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [N, K/g, g], scales and zeros [N, K/g, 1], all f32."""
    if limits is not None:
        groups = torch.minimum(torch.maximum(groups, -limits.unsqueeze(-1)), limits.unsqueeze(-1))
    top, bottom = groups.amax(-1, keepdim=True).clamp(min=0), groups.amin(-1, keepdim=True).clamp(max=0)
    scales = ((top - bottom) / TOP_CODE).clamp(min=SMALLEST_SCALE).half().float()
    zeros = (-torch.round(bottom / scales)).clamp(0, TOP_CODE)
    return (torch.round(groups / scales) + zeros).clamp_(0, TOP_CODE), scales, zeros
