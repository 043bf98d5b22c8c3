"""Smoothing for 8-bit products: what it must leave alone, and that it helps where it should."""

import torch

from sparsevila_cluster.quantization.smoothquant import choose_smooth, quantize_rows, round_rows, smooth_factors
from sparsevila_kernels import Int8Weight, int8_matmul


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_factors_follow_the_formula():
    w, reach = some(5, 4), torch.tensor([1.0, 4.0, 100.0, 0.25])
    for alpha in (0.0, 0.5, 1.0):
        expected = [float(r) ** alpha / float(w[:, j].abs().max()) ** (1 - alpha) for j, r in enumerate(reach)]
        torch.testing.assert_close(smooth_factors(w, reach, alpha), torch.tensor(expected))


def test_silent_channels_are_left_alone():
    w = some(5, 4)
    w[:, 1] = 0
    factors = smooth_factors(w, torch.tensor([0.0, 1.0, 2.0, 3.0]))
    assert factors[0] == 1 and factors[1] == 1 and torch.isfinite(factors).all()


def test_outliers_are_smoothed_and_even_channels_are_not():
    w, rows = some(64, 48), some(200, 48, seed=1)
    rows[:, 7] *= 80
    true = rows @ w.T
    factors = choose_smooth(w, rows.abs().amax(0), rows)
    smoothed = round_rows(rows / factors) @ round_rows(w * factors).T
    plain = round_rows(rows) @ round_rows(w).T
    assert (smoothed - true).norm() < 0.5 * (plain - true).norm()
    even = torch.where(rows > 0, 1.0, -1.0)  # every channel reaches equally far: nothing to move
    assert choose_smooth(torch.where(w > 0, 1.0, -1.0), even.abs().amax(0), even) is None


def test_rows_are_rounded_as_the_product_that_serves_them_does():
    w, rows, reach = some(16, 48), some(9, 48, seed=1), some(48, seed=2).abs() + 0.1
    factors = smooth_factors(w, reach)
    values, scales = quantize_rows(w * factors)
    served = Int8Weight.of(w, factors)
    assert torch.equal(values, served.values)
    torch.testing.assert_close(scales[:, 0], served.scales)
    torch.testing.assert_close(int8_matmul(rows, served), round_rows(rows / factors) @ (values * scales).T, atol=1e-4, rtol=1e-4)


def test_a_row_of_zeros_stays_zero():
    values, scales = quantize_rows(torch.zeros(2, 4))
    assert not values.any() and torch.isfinite(scales).all()
