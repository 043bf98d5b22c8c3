"""Norms, rotary positions with the KV write, and SwiGLU on every path, against the definition in fp64."""

import pytest
import torch

from sparsevila_kernels import reference, rms_norm, rope_write, silu_mul
from tests.kernels.kernel_accuracy import assert_as_exact_as_torch

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [F32, F16, BF16]
# Plain torch rounds between operations, the kernels only at the end; the torch paths are made of such operations.
RATIO = {F32: 4.0, F16: 1.5, BF16: 1.5}


def random(place, *shape, dtype=F32):
    return torch.randn(*shape).to(place.device, dtype)


def assert_accurate(found, exact, plain, dtype, *names):
    assert all(f.dtype == dtype for f in found)
    assert_as_exact_as_torch(found, exact, plain, dict.fromkeys(names, RATIO[dtype]), dtype=dtype)


# x, and whether each head has a weight of its own: one row, primes, wide, heads of all sizes.
NORMS = [((1, 8), False), ((7, 131), False), ((3, 3584), False), ((5, 3, 64), False), ((13, 6, 80), True), ((2, 36, 128), True)]


@pytest.mark.parametrize("shape, own", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(place, shape, own, dtype):
    x, weight = random(place, *shape, dtype=dtype), random(place, *shape[1 if own else -1 :], dtype=dtype)
    exact, plain = (reference.rms_norm(x, weight, 1e-6, dtype=d) for d in (torch.float64, dtype))
    assert_accurate([rms_norm(x, weight, 1e-6, backend=place.backend)], [exact], [plain], dtype, "normed")


@pytest.mark.parametrize("shape, own", NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_a_sum(place, shape, own, dtype):
    x, weight = random(place, *shape, dtype=dtype), random(place, *shape[1 if own else -1 :], dtype=dtype)
    residual = random(place, *shape, dtype=dtype) * 8
    normed, total = rms_norm(x, weight, 1e-5, residual, backend=place.backend)
    truncates = dtype == BF16 and place == ("cpu", "triton")  # Triton's interpreter does
    torch.testing.assert_close(total, x + residual, rtol=2.0**-7 if truncates else 0, atol=0)
    exact, plain = (reference.rms_norm(total, weight, 1e-5, dtype=d) for d in (torch.float64, dtype))
    assert_accurate([normed], [exact], [plain], dtype, "normed")


def test_norm_of_strided_rows_and_of_nothing(place):
    wide, weight = random(place, 6, 10, 48), random(place, 16)
    x = wide[:, 2:7, 16:32]
    found = rms_norm(x, weight, 1e-6, x.clone(), backend=place.backend)
    same = rms_norm(x.contiguous(), weight, 1e-6, x.contiguous(), backend=place.backend)
    assert all(torch.equal(a, b) for a, b in zip(found, same, strict=True))
    assert rms_norm(x[:0], weight, 1e-6, backend=place.backend).shape == (0, 5, 16)


@pytest.mark.parametrize("size", [1e-20, 0.0])
def test_eps_keeps_small_rows_finite(place, size):
    x = torch.full((2, 32), size, device=place.device)
    found = rms_norm(x, torch.ones(32, device=place.device), 1e-6, backend=place.backend)
    torch.testing.assert_close(found, x * 1e3, rtol=1e-4, atol=0)


# rows, query heads, KV heads, head dimension
HEADS = [(1, 1, 1, 16), (3, 28, 4, 128), (5, 4, 4, 80), (7, 7, 1, 64), (2, 14, 2, 96), (0, 4, 2, 32)]


@pytest.mark.parametrize("num_rows, heads, kv_heads, dim", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normed", [False, True])
def test_rope_writes_keys_and_values(place, num_rows, heads, kv_heads, dim, dtype, normed):
    qkv = random(place, num_rows, (heads + 2 * kv_heads) * dim, dtype=dtype)
    angle = torch.rand(num_rows, 1, dim // 2) * 6.28
    cos = torch.cat((angle.cos(), angle.cos()), -1).to(place.device, dtype)
    sin = torch.cat((-angle.sin(), angle.sin()), -1).to(place.device, dtype)
    qk_norm = random(place, heads + kv_heads, dim, dtype=dtype) if normed else None
    slots = torch.randperm(2 * num_rows + 1)[:num_rows].to(place.device)
    arenas = torch.full((2, 2 * num_rows + 1, 2, kv_heads, dim), float("nan"), device=place.device, dtype=dtype)
    arenas[:, :, 1] = 7  # what lies between the rows of this layer
    k_arena, v_arena = arenas[:, :, 0]
    q = rope_write(qkv, cos, sin, qk_norm, 1e-6, k_arena, v_arena, slots, backend=place.backend)
    results = []
    for d in (torch.float64, dtype):
        k, v = torch.zeros(2, *k_arena.shape, dtype=d, device=place.device)
        results.append((reference.rope_write(qkv, cos, sin, qk_norm, 1e-6, k, v, slots, dtype=d), k[slots]))
        assert torch.equal(v_arena[slots], v[slots].to(dtype))
    assert_accurate((q, k_arena[slots]), *results, dtype, "queries", "keys")
    others = torch.ones(len(k_arena), dtype=torch.bool, device=place.device)
    others[slots] = False
    assert torch.isnan(arenas[:, others, 0]).all() and (arenas[:, :, 1] == 7).all()


def test_rope_turns_by_the_angle(place):
    """A right angle takes (a, b) to (-b, a); no angle changes nothing; lengths stay."""
    qkv = random(place, 2, 4 * 8)  # two queries, a key, a value
    cos = torch.tensor([0.0, 1.0], device=place.device)[:, None, None].expand(2, 1, 8)
    sin = torch.tensor([[-1.0] * 4 + [1.0] * 4, [0.0] * 8], device=place.device)[:, None]
    k, v = torch.zeros(2, 3, 1, 8, device=place.device)
    q = rope_write(qkv, cos, sin, None, 1e-6, k, v, torch.tensor([2, 0], device=place.device), backend=place.backend)
    x = qkv.view(2, 4, 8)
    assert torch.equal(q[0], torch.cat((-x[0, :2, 4:], x[0, :2, :4]), -1)) and torch.equal(q[1], x[1, :2])
    assert torch.equal(k[0], x[1, 2:3]) and torch.equal(v[2], x[0, 3:])


@pytest.mark.parametrize("shape", [(1, 2), (3, 262), (5, 2 * 2816), (0, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(place, shape, dtype):
    gate_up = random(place, *shape, dtype=dtype) * 4
    exact, plain = (reference.silu_mul(gate_up, dtype=d) for d in (torch.float64, dtype))
    assert_accurate([silu_mul(gate_up, backend=place.backend)], [exact], [plain], dtype, "product")


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_silu_of_large_numbers_and_strides(place):
    gate_up = torch.tensor([[-1e4, 1e4, 0.0, 2.0, 3.0, 4.0]], device=place.device)
    assert torch.equal(silu_mul(gate_up, backend=place.backend).abs(), torch.tensor([[0.0, 3e4, 0.0]], device=place.device))
    wide = random(place, 4, 40)
    found = silu_mul(wide[:, 8:24], backend=place.backend)
    assert torch.equal(found, silu_mul(wide[:, 8:24].contiguous(), backend=place.backend))


def test_what_does_not_fit_is_refused_by_name():
    x = torch.zeros(2, 3, 8)
    with pytest.raises(ValueError, match="weight"):
        rms_norm(x, torch.ones(2, 8), 1e-6)
    with pytest.raises(ValueError, match="residual is"):
        rms_norm(x, torch.ones(8), 1e-6, x[:1])
    with pytest.raises(ValueError, match="gate_up is"):
        silu_mul(torch.zeros(2, 7))
    arena, slots, cos = torch.zeros(4, 1, 8), torch.arange(2), torch.zeros(2, 1, 8)
    qkv = torch.zeros(2, 4 * 8)
    with pytest.raises(ValueError, match="qkv is"):
        rope_write(torch.zeros(2, 2 * 8), cos, cos, None, 1e-6, arena, arena, slots)
    with pytest.raises(ValueError, match="arenas torch.float16"):
        rope_write(qkv, cos, cos, None, 1e-6, arena.half(), arena.half(), slots)
    with pytest.raises(ValueError, match="cos is"):
        rope_write(qkv, cos[:1], cos, None, 1e-6, arena, arena, slots)
    with pytest.raises(ValueError, match="qk_norm is"):
        rope_write(qkv, cos, cos, torch.ones(4, 8), 1e-6, arena, arena, slots)
    with pytest.raises(ValueError, match="slots are"):
        rope_write(qkv, cos, cos, None, 1e-6, arena, arena, slots.int())
