"""Linear maps in every form give the products of the weight that they stand for, fused or not."""

import pytest
import torch
from torch import nn

from sparsevila_cluster.models.text.linear import AwqLinear, AwqMatrix, DenseMatrix, Int8Linear, take_matrix, weight_bytes
from sparsevila_kernels import AwqWeight, Int8Weight
from tests.models.quantized_files import awq_weight, awq_words, quantize_rows

NUM_IN = 64


def drawn(num_out, group=32, seed=0):
    """(a 4-bit weight, what it means as nn.Linear's weight)."""
    weight = torch.randn(num_out, NUM_IN, generator=torch.Generator().manual_seed(seed + num_out))
    codes, zeros, scales = quantize_rows(weight, group)
    stored = awq_words(codes), awq_words(zeros), scales
    return AwqWeight.from_gemm(*stored), awq_weight(*stored)


def parallel(*forms):
    """Linears of one input, each quantized in groups of so many, or plain for 0; and their weights one below the other."""
    modules, weights = [], []
    for i, group in enumerate(forms):
        packed, weight = drawn(8 * (i + 2), group or 32)
        linear = nn.Linear(NUM_IN, len(weight), bias=False)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        modules.append(AwqLinear(packed, None) if group else linear)
        weights.append(weight)
    return modules, torch.cat(weights)


@pytest.mark.parametrize("forms", [(0,), (32,), (0, 0, 0), (32, 32, 32), (32, 0, 32), (32, 64)], ids=str)
@pytest.mark.parametrize("num_rows", [1, 3, 40])
def test_a_matrix_is_the_weights_side_by_side(forms, num_rows):
    modules, weight = parallel(*forms)
    matrix = take_matrix(modules, lambda plain: plain.t(), torch.float32)
    assert isinstance(matrix, AwqMatrix if set(forms) == {32} else DenseMatrix)
    x, bias = torch.randn(num_rows, NUM_IN), torch.randn(len(weight))
    base = torch.randn(num_rows, len(weight))
    kept = [bias.clone(), base.clone()]
    expected = x.double() @ weight.double().t()
    for got, wanted in (
        (matrix.mm(x), expected),
        (matrix.addmm(bias, x), expected + bias),
        (matrix.addmm(base, x), expected + base),
        (matrix.tail_mm(x, 5), expected[:, 5:]),
    ):
        torch.testing.assert_close(got.double(), wanted, atol=1e-4, rtol=0)
    assert torch.equal(bias, kept[0]) and torch.equal(base, kept[1]), "what is added to is left alone"


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("shape", [(NUM_IN,), (5, NUM_IN), (2, 3, NUM_IN)])
def test_modules_take_what_nn_linear_takes(shape, dtype, tolerance):
    packed, weight = drawn(24)
    bias = nn.Parameter(torch.randn(24).to(dtype), requires_grad=False)
    x = torch.randn(*shape).to(dtype)
    eight = Int8Weight.of(weight)
    for module, means, loss in ((AwqLinear(packed, bias), weight, 0.0), (Int8Linear(eight, bias), eight.dequantize(), 0.02)):
        got, expected = module(x).float(), nn.functional.linear(x.float(), means, bias.float())
        assert got.shape == expected.shape and module(x).dtype == dtype and module.in_features == NUM_IN
        assert (got - expected).norm() < (tolerance + loss) * expected.norm()


def test_rows_that_are_no_block_of_memory():
    packed, weight = drawn(24)
    x = torch.randn(2, NUM_IN, 3).transpose(1, 2)
    torch.testing.assert_close(AwqLinear(packed, None)(x), x @ weight.t(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("num_rows", [1, 3, 40])
def test_columns_of_a_wider_tensor_are_multiplied_too(num_rows):
    """As attention may return them; bfloat16 takes another way than float32."""
    packed, weight = drawn(24)
    matrix = AwqMatrix(packed)
    x = torch.randn(num_rows, 3 * NUM_IN).bfloat16()[:, NUM_IN : 2 * NUM_IN]
    expected = x.float() @ weight.t()
    assert (matrix.mm(x).float() - expected).norm() < 0.01 * expected.norm()


def test_weight_bytes_count_every_form_and_shared_tensors_once():
    packed, weight = drawn(24)
    eight = Int8Weight.of(weight)
    plain = nn.Linear(NUM_IN, 24)
    tied = nn.Linear(NUM_IN, 24, bias=False)
    tied.weight = plain.weight
    model = nn.ModuleList([AwqLinear(packed, None), Int8Linear(eight, plain.bias), plain, tied])
    assert weight_bytes(model) == packed.nbytes + 24 * NUM_IN + 4 * 24 + 4 * (24 * NUM_IN + 24)
