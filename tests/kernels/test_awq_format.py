"""The AutoAWQ format: words as AutoAWQ writes them, every code there and back, its rounding written out weight by weight."""

import pytest
import torch

import sparsevila_kernels as kernels
from sparsevila_kernels import awq_format

SHAPES = [(8, 32, 32), (40, 96, 32), (72, 128, 64), (16, 256, 128), (24, 80, 80)]  # N, K, group


def random_codes(rows, columns, seed=0):
    return torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_words_are_those_of_autoawq():
    """Columns 0..7 of AutoAWQ's word, lowest nibble first: 0 2 4 6 1 3 5 7. A top nibble above 7 makes the word negative."""
    assert kernels.pack(torch.arange(8)[None]).item() == 0x75316420
    assert kernels.pack(torch.arange(15, 7, -1)[None]).item() == 0x8ACE9BDF - 2**32
    assert awq_format.pack_natural(torch.arange(8)[None]).item() == 0x76543210


@pytest.mark.parametrize("rows, words", [(1, 1), (3, 5), (17, 2), (0, 4)])
def test_every_code_comes_back(rows, words):
    codes = random_codes(rows, 8 * words)
    for there, back in ((kernels.pack, kernels.unpack), (awq_format.pack_natural, awq_format.unpack_natural)):
        assert torch.equal(back(there(codes)), codes)
        assert torch.equal(back(there(codes.to(torch.int64))), codes)
    anything = torch.randint(-(2**31), 2**31, (rows, words), dtype=torch.int64).to(torch.int32)
    assert torch.equal(kernels.pack(kernels.unpack(anything)), anything)


@pytest.mark.parametrize("num_out, num_in, group", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dequantize_from_the_definition(num_out, num_in, group, dtype):
    codes, zeros = random_codes(num_in, num_out), random_codes(num_in // group, num_out, seed=1)
    scales = (torch.rand(num_in // group, num_out) + 0.1).to(dtype)
    got = kernels.dequantize_gemm(kernels.pack(codes), kernels.pack(zeros), scales, group)
    assert got.dtype == dtype
    for k in range(0, num_in, 13):
        of = k // group
        assert torch.equal(got[k], ((codes[k].double() - zeros[of].double()) * scales[of].double()).to(dtype))


@pytest.mark.parametrize("num_out, num_in, group", SHAPES)
@pytest.mark.parametrize("kind", ["normal", "outlier", "one sign", "zero", "constant"])
def test_rounding_is_autoawqs(num_out, num_in, group, kind):
    weight = torch.randn(num_out, num_in)
    if kind == "outlier":
        weight[:, ::37] *= 60
    elif kind == "one sign":
        weight = weight.abs() + 0.5
    elif kind == "zero":
        weight[: num_out // 2] = 0
    elif kind == "constant":
        weight[:] = 0.25
    weight = weight.half()
    qweight, qzeros, scales = kernels.quantize_rtn(weight, group)
    codes, zeros = kernels.unpack(qweight), kernels.unpack(qzeros)
    assert scales.dtype == torch.float16
    for n in range(0, num_out, 5):
        for of in range(num_in // group):
            part = weight[n, of * group : (of + 1) * group]  # arithmetic in half precision, as AutoAWQ's
            scale = (part.max() - part.min()).clamp(min=1e-5) / 15
            zero = (-torch.round(part.min() / scale)).clamp(0, 15)
            assert scales[of, n] == scale and zeros[of, n] == zero
            want = (torch.round(part / scale) + zero).clamp(0, 15)
            assert torch.equal(codes[of * group : (of + 1) * group, n], want.to(torch.uint8))


@pytest.mark.parametrize("symmetric", [False, True])
def test_compressed_tensors_lose_nothing(symmetric):
    num_out, num_in, group = 24, 96, 32
    codes, zeros = random_codes(num_out, num_in), random_codes(num_out, num_in // group, seed=1)
    if symmetric:
        zeros.fill_(8)
    scales = torch.rand(num_out, num_in // group).bfloat16()
    packed = sum((codes[:, i::8].to(torch.int64) << (4 * i)) for i in range(8)).to(torch.int32)  # K, natural order
    zero_points = sum((zeros[i::8].to(torch.int64) << (4 * i)) for i in range(8)).to(torch.int32)  # N, natural order
    got = kernels.from_pack_quantized(packed, scales, None if symmetric else zero_points, (num_out, num_in))
    want = ((codes.float() - zeros.float().repeat_interleave(group, 1)) * scales.float().repeat_interleave(group, 1)).t()
    assert torch.equal(kernels.dequantize_gemm(*got, group), want.bfloat16())
    assert torch.equal(kernels.AwqWeight.from_gemm(*got).dequantize(), want)


def tensors(num_out=16, num_in=64, group=32):
    return kernels.quantize_rtn(torch.randn(num_out, num_in), group)


def test_what_does_not_fit_is_refused_by_name():
    qweight, qzeros, scales = tensors()
    dequantize = kernels.AwqWeight.from_gemm
    with pytest.raises(ValueError, match="qweight is torch.int64"):
        dequantize(qweight.long(), qzeros, scales)
    with pytest.raises(ValueError, match="scales .* no column for each of the 16"):
        dequantize(qweight, qzeros, scales[:, :8])
    with pytest.raises(ValueError, match="equal groups"):
        dequantize(qweight, qzeros, scales.repeat(3, 1)[:5])
    with pytest.raises(ValueError, match="qzeros"):
        dequantize(qweight, qzeros[:1], scales)
    with pytest.raises(ValueError, match="scales are torch.int32"):
        dequantize(qweight, qzeros, scales.int())
    with pytest.raises(ValueError, match="NaN"):
        dequantize(qweight, qzeros, scales * float("nan"))
    with pytest.raises(ValueError, match="groups of 32"):
        kernels.dequantize_gemm(qweight, qzeros, scales, 64)
    with pytest.raises(ValueError, match="12 outputs"):
        kernels.quantize_rtn(torch.randn(12, 64), 32)
    with pytest.raises(ValueError, match="does not divide the 64"):
        kernels.quantize_rtn(torch.randn(16, 64), 48)
    with pytest.raises(ValueError, match="NaN"):
        kernels.quantize_rtn(torch.full((16, 64), float("nan")), 32)
    with pytest.raises(ValueError, match="no multiple of 8"):
        kernels.pack(torch.zeros(1, 9))
    with pytest.raises(ValueError, match="words are torch.uint8"):
        kernels.unpack(torch.zeros(1, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="shape says"):
        kernels.from_pack_quantized(torch.zeros(8, 4, dtype=torch.int32), torch.ones(8, 1), shape=(8, 64))
