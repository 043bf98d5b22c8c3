"""Rows of KV arrive where the index says, bit for bit, and nothing else changes; int8 stays within half a step."""

import pytest
import torch

from sparsevila_kernels import kv_dequantize, kv_pack, kv_quantize, reference

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
LAYOUTS = ["dense", "in the middle", "heads apart"]


def arena(place, layers, slots, heads, dim, dtype, layout="dense"):
    """Keys and values; around them, in the same memory, NaN that nobody may touch."""
    wide = torch.full((2, 2 * layers + 1, slots + 2, heads * 2, dim * 2), float("nan"), device=place.device, dtype=dtype)
    if layout == "dense":
        pair = torch.empty(2, layers, slots, heads, dim, device=place.device, dtype=dtype)
    elif layout == "in the middle":
        pair = wide[:, 1::2, 1 : slots + 1, :heads, :dim]
    else:
        pair = wide[:, :layers, :slots, ::2, :dim]
    return pair.copy_(torch.randn(pair.shape))


def choose_rows(num, slots, layers, per_layer, device):
    rows = torch.stack([torch.randperm(slots)[:num] for _ in range(layers if per_layer else 1)])
    return (rows if per_layer else rows[0]).to(device)


# layers, slots (source, target), rows, heads, head dimension
SHAPES = [(1, (1, 1), 1, 1, 64), (3, (19, 31), 7, 4, 128), (2, (67, 41), 41, 7, 80), (2, (13, 9), 5, 1, 96), (2, (8, 8), 0, 2, 16)]


@pytest.mark.parametrize("layers, slots, num, heads, dim", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_layer", [False, True])
def test_rows_arrive_and_others_stay(place, layers, slots, num, heads, dim, layout, per_layer):
    slots, num = [n * place.scale for n in slots], num * place.scale
    src = arena(place, layers, slots[0], heads, dim, BF16, layout)
    dst = arena(place, layers, slots[1], heads, dim, BF16, layout)
    rows = [choose_rows(num, n, layers, per_layer, place.device) for n in slots]
    want = dst.clone()
    reference.kv_pack(*src, *want, *rows)
    whole = dst._base if dst._base is not None else dst
    nan_before = torch.isnan(whole)
    kv_pack(*src, *dst, *rows, backend=place.backend)
    assert torch.equal(dst, want)
    assert torch.equal(torch.isnan(whole), nan_before)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [F32, F16, torch.int8])
def test_extents_become_one_run(place, dtype):
    """The pieces of several extents, packed into consecutive slots of the same arena."""
    both = (torch.randn(2, 2, 60, 3, 24, device=place.device) * 20).to(dtype)
    pieces = torch.cat([torch.arange(5, 9), torch.arange(20, 33), torch.tensor([2, 18])]).to(place.device)
    want = both[:, :, pieces].clone()
    places = torch.arange(40, 40 + len(pieces), device=place.device)
    kv_pack(*both, *both, pieces, places, backend=place.backend)
    assert torch.equal(both[:, :, 40:59], want)
    scattered = torch.zeros_like(both)
    kv_pack(*both, *scattered, places, pieces, backend=place.backend)
    assert torch.equal(scattered[:, :, pieces], want)
    assert scattered.count_nonzero() == want.count_nonzero()


@pytest.mark.parametrize("places", [torch.arange(0, 30), torch.arange(49, 19, -1), torch.arange(5, 35)])
def test_compaction_reads_before_it_writes(place, places):
    both = arena(place, 2, 50, 2, 32, F32)
    rows, places = torch.arange(20, 50, device=place.device), places.to(place.device)
    want = both.clone()
    reference.kv_pack(*want, *want, rows, places)
    kv_pack(*both, *both, rows, places, overlapping=True, backend=place.backend)
    assert torch.equal(both, want)


@pytest.mark.parametrize("layers, slots, num, heads, dim", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_int8_there_and_back(place, layers, slots, num, heads, dim, layout, dtype):
    slots, num = [n * place.scale for n in slots], num * place.scale
    src = arena(place, layers, slots[0], heads, dim, dtype, layout)
    src[0, 0, 0] = 0  # a scale of zero
    rows, places = (choose_rows(num, n, layers, True, place.device) for n in slots)
    values, scales = kv_quantize(*src, rows, backend=place.backend)
    expected_values, expected_scales = reference.kv_quantize(*(t.cpu() for t in src), rows.cpu())
    torch.testing.assert_close(scales.cpu(), expected_scales, rtol=1e-6, atol=0)
    if place.device == "cpu":
        assert torch.equal(values, expected_values) and torch.equal(scales, expected_scales)
    dst = arena(place, layers, slots[1], heads, dim, F32, layout)
    want = dst.clone()
    reference.kv_dequantize(values, scales, *want, places)
    kv_dequantize(values, scales, *dst, places, backend=place.backend)
    assert torch.equal(dst, want)
    for layer in range(layers):
        for part in range(2):
            difference = (dst[part, layer, places[layer]] - src[part, layer, rows[layer]].float()).abs()
            assert (difference <= scales[layer, part][..., None] * 0.50001).all()


@pytest.mark.parametrize("dtype, rounding", [(F16, 2.0**-10), (BF16, 2.0**-7)])
def test_int8_comes_back_in_the_arenas_dtype(place, dtype, rounding):
    src = arena(place, 2, 11, 3, 40, F32)
    rows = torch.arange(11, device=place.device)
    values, scales = kv_quantize(*src, rows, backend=place.backend)
    narrow, wide = arena(place, 2, 11, 3, 40, dtype), arena(place, 2, 11, 3, 40, F32)
    for dst in (narrow, wide):
        kv_dequantize(values, scales, *dst, rows, backend=place.backend)
    torch.testing.assert_close(narrow.float(), wide, rtol=rounding, atol=0)


def test_int8_into_one_buffer(place):
    src = arena(place, 2, 9, 2, 16, BF16)
    rows = torch.tensor([8, 0, 3], device=place.device)
    buffer = torch.zeros(2 * 2 * 3 * 2 * (4 + 16), dtype=torch.uint8, device=place.device)
    scales, values = buffer[:96].view(torch.float32).view(2, 2, 3, 2), buffer[96:].view(torch.int8).view(2, 2, 3, 2, 16)
    got = kv_quantize(*src, rows, out=(values, scales), backend=place.backend)
    assert got[0] is values and got[1] is scales
    alone = kv_quantize(*src, rows, backend=place.backend)
    assert torch.equal(alone[0], values) and torch.equal(alone[1], scales)


def test_numbers_too_small_for_a_reciprocal(place):
    src = torch.full((2, 1, 2, 1, 8), 1e-42, device=place.device)
    src[:, :, 1] = -3e38
    values, scales = kv_quantize(*src, torch.arange(2, device=place.device), backend=place.backend)
    assert values[:, :, 0].abs().max() <= 127 and (values[:, :, 1] == -127).all() and torch.isfinite(scales).all()
    out = torch.ones_like(src)
    kv_dequantize(values, scales, *out, torch.arange(2, device=place.device), backend=place.backend)
    torch.testing.assert_close(out, src, rtol=1e-6, atol=1e-40)


def test_what_does_not_fit_is_refused_by_name():
    k, rows = torch.zeros(2, 5, 3, 8), torch.arange(4)
    with pytest.raises(ValueError, match="src_k is"):
        kv_pack(k, k[:, :4], k, k, rows, rows)
    with pytest.raises(ValueError, match="only slots may differ"):
        kv_pack(k, k, k[:, :, :2], k[:, :, :2], rows, rows)
    with pytest.raises(ValueError, match="only slots may differ"):
        kv_pack(k, k, k.half(), k.half(), rows, rows)
    with pytest.raises(ValueError, match="dst_rows are torch.int32"):
        kv_pack(k, k, k, k, rows, rows.int())
    with pytest.raises(ValueError, match="of 2 layers"):
        kv_pack(k, k, k, k, rows.expand(3, -1), rows)
    with pytest.raises(ValueError, match="must be the same"):
        kv_pack(k, k, k, k, rows, rows[:3])
    with pytest.raises(ValueError, match="along D"):
        kv_pack(k.mT, k.mT, k, k, rows, rows)
    values, scales = kv_quantize(k, k, rows)
    with pytest.raises(ValueError, match="values are"):
        kv_dequantize(values[:, :, :3], scales, k, k, rows)
    with pytest.raises(ValueError, match="scales are"):
        kv_dequantize(values, scales.double(), k, k, rows)
