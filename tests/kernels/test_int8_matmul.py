"""W8A8 products: every integer sum exact on every path, rounding and scales from the definition."""

import pytest
import torch

from sparsevila_kernels import Int8Weight, int8_matmul, reference
from sparsevila_kernels import int8_matmul as public
from sparsevila_kernels._int8_triton import NARROW_ROWS
from tests.kernels.kernel_accuracy import error

module = __import__("sys").modules[public.__module__]
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SHAPES = [(1, 1, 8), (1, 64, 32), (5, 37, 72), (17, 131, 40), (67, 96, 24), (3, 1300, 16)]  # M, K, N


def whole_numbers(num_rows, num_in, num_out, device):
    """Rows and channels whose scale is exactly 1, so that the product shows the integer sum."""
    x, weight = torch.randint(-127, 128, (num_rows, num_in)).float(), torch.randint(-127, 128, (num_out, num_in)).float()
    x[:, 0], weight[:, 0] = 127, -127
    return x.to(device), weight.to(device)


@pytest.mark.parametrize("num_rows, num_in, num_out", SHAPES)
@pytest.mark.parametrize("way", ["best", "without int8"])
def test_sums_are_exact(place, num_rows, num_in, num_out, way, monkeypatch):
    if way == "without int8":
        monkeypatch.setattr(module, "_int_mm_is_exact", lambda: False)
    x, weight = whole_numbers(num_rows * place.scale, num_in, num_out, place.device)
    quantized = Int8Weight.of(weight)
    assert torch.equal(quantized.scales, torch.ones_like(quantized.scales))
    assert torch.equal(int8_matmul(x, quantized, backend=place.backend).long(), x.long() @ weight.long().t())


@pytest.mark.parametrize("value", [127, -127])
def test_the_largest_sums_do_not_saturate(place, value):
    x, weight = torch.full((33, 1024), 127.0, device=place.device), torch.full((8, 1024), float(value), device=place.device)
    assert (int8_matmul(x, Int8Weight.of(weight), backend=place.backend) == 127 * value * 1024).all()


@pytest.mark.parametrize("num_rows, num_in, num_out", SHAPES[1:])
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("smooths", [False, True])
def test_product(place, num_rows, num_in, num_out, dtype, smooths):
    x = (torch.randn(num_rows * place.scale, num_in) * torch.rand(num_in).exp2()).to(place.device, dtype)
    smooth = (torch.rand(num_in) + 0.3).to(place.device) if smooths else None
    weight = Int8Weight.of(torch.randn(num_out, num_in, device=place.device), smooth)
    bias = torch.randn(num_out).to(place.device, dtype)
    found = int8_matmul(x, weight, bias, backend=place.backend)
    assert found.dtype == dtype
    # fp32 scales, one rounding to the dtype, which the interpreter does towards zero
    exact = reference.int8_matmul(x.cpu(), weight.to("cpu"), bias.cpu())
    assert error(found, exact) <= {F32: 1e-6, F16: 1e-3, BF16: 2.0**-7}[dtype]


def test_eight_bits_are_near(place):
    """1 / 127 of the largest value in steps of half: under one percent of a random product."""
    x, weight = torch.randn(20, 512, device=place.device), torch.randn(64, 512, device=place.device)
    found, exact = int8_matmul(x, Int8Weight.of(weight), backend=place.backend), x.double() @ weight.double().t()
    assert 0 < (found - exact).norm() / exact.norm() < 0.015


def test_smoothing_moves_outliers_to_the_weight(place):
    x, weight = torch.randn(16, 256, device=place.device), torch.randn(32, 256, device=place.device)
    x[:, 7] *= 100
    smooth = x.abs().amax(0).sqrt()
    exact = x.double() @ weight.double().t()
    errors = [(int8_matmul(x, Int8Weight.of(weight, s), backend=place.backend) - exact).norm().item() for s in (None, smooth)]
    assert errors[1] < 0.4 * errors[0]


def test_rounding_is_to_even_and_rows_of_zeros_stay(place):
    rows = torch.tensor([[127.0, 0.5, 1.5, -2.5, 126.5], [0.0] * 5, [1e-42] * 5, [3e38] * 5], device=place.device)
    values, scales = module.quantize_rows(rows, backend=place.backend)
    assert values[0].tolist() == [127, 0, 2, -2, 126] and scales[0] == 1
    assert values[1].tolist() == [0] * 5 and scales[1] == 0
    assert values[3].tolist() == [127] * 5
    smoothed, _ = module.quantize_rows(rows[:1] * 2, torch.full((5,), 2.0, device=place.device), backend=place.backend)
    assert torch.equal(smoothed[0], values[0])


def test_narrow_and_wide_tiles_agree(triton_place):
    weight = Int8Weight.of(torch.randn(136, 200, device=triton_place.device))
    x = torch.randn(NARROW_ROWS + 37, 200, device=triton_place.device)
    wide = int8_matmul(x, weight, backend="triton")
    assert torch.equal(int8_matmul(x[:5], weight, backend="triton"), wide[:5])


def test_no_rows_and_strides(place):
    weight = Int8Weight.of(torch.randn(16, 32, device=place.device))
    assert int8_matmul(torch.empty(0, 32, device=place.device), weight, backend=place.backend).shape == (0, 16)
    x = torch.randn(32, 6, device=place.device).t()
    assert torch.equal(int8_matmul(x, weight, backend=place.backend), int8_matmul(x.contiguous(), weight, backend=place.backend))


def test_dequantized_weight_is_within_half_a_step():
    weight, smooth = torch.randn(24, 40), torch.rand(40) + 0.5
    quantized = Int8Weight.of(weight, smooth)
    step = quantized.scales[:, None] / smooth
    assert ((quantized.dequantize() - weight).abs() <= step * 0.501).all()
    assert quantized.nbytes == 24 * 40 + 24 * 4 + 40 * 4
    assert torch.equal(quantized.to("cpu").values, quantized.values)


def test_what_does_not_fit_is_refused_by_name():
    weight = Int8Weight.of(torch.randn(16, 32))
    with pytest.raises(ValueError, match=r"\[M, 32\]"):
        int8_matmul(torch.randn(2, 31), weight)
    with pytest.raises(ValueError, match=r"bias is \(8,\)"):
        int8_matmul(torch.randn(2, 32), weight, torch.zeros(8))
    with pytest.raises(ValueError, match="NaN"):
        Int8Weight.of(torch.full((8, 8), float("inf")))
    with pytest.raises(ValueError, match="above 0"):
        Int8Weight.of(torch.randn(8, 8), torch.zeros(8))
    with pytest.raises(ValueError, match="values are torch.float32"):
        Int8Weight(torch.randn(8, 8), torch.ones(8))
    with pytest.raises(ValueError, match="scales are"):
        Int8Weight(torch.zeros(8, 8, dtype=torch.int8), torch.ones(7))
