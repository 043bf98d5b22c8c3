"""8-bit weights and activations (SmoothQuant, arXiv 2211.10438): moving outliers of activations into weights before rounding.

y = (x / smooth) (W * smooth)^T     int8 by row of x (token) and by row of W (output channel), int32 sums
"""

from __future__ import annotations

import torch
from torch import Tensor

TOP = 127
_SMALLEST = 1e-5


def smooth_factors(weight: Tensor, reach: Tensor, alpha: float = 0.5) -> Tensor:
    """f32 [K]: reach^alpha / |W|max^(1 - alpha) by input channel; 1 where the channel is silent or without weight.

    weight f32 [N, K]; reach f32 [K]: the largest |x| seen in each channel. alpha: how much of the difficulty goes to the weights.
    """
    most = weight.abs().amax(0)
    factors = reach.pow(alpha) / most.pow(1 - alpha)
    usable = (reach > 0) & (most > 0) & torch.isfinite(factors)
    return torch.where(usable, factors.clamp(min=_SMALLEST), 1.0)


def choose_smooth(weight: Tensor, reach: Tensor, rows: Tensor, alpha: float = 0.5) -> Tensor | None:
    """`smooth_factors` if they bring rounded products of `rows` f32 [T, K] closer to the truth than none, else None."""
    factors = smooth_factors(weight, reach, alpha)
    true = rows @ weight.T
    plain = (round_rows(rows) @ round_rows(weight).T - true).square().sum()
    smoothed = (round_rows(rows / factors) @ round_rows(weight * factors).T - true).square().sum()
    return factors if bool(smoothed < plain) else None


def quantize_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """f32 [R, K] -> (i8 [R, K], scales f32 [R, 1]): symmetric, the largest of each row becomes 127."""
    scales = matrix.abs().amax(-1, keepdim=True).div(TOP)
    scales = torch.where(scales > 0, scales, 1.0)
    return torch.round(matrix / scales).clamp(-TOP, TOP).to(torch.int8), scales


def round_rows(matrix: Tensor) -> Tensor:
    """What `quantize_rows` keeps, f32 [R, K]."""
    values, scales = quantize_rows(matrix)
    return values.float() * scales
