"""Attention of a few rows to keys in arenas, on every path, against the definition in fp64."""

import importlib
import math

import pytest
import torch

from sparsevila_kernels import decode_attention, reference
from tests.kernels.kernel_accuracy import NoHostReads, Place, assert_as_exact_as_torch, offsets

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SLOTS = (900, 350)
# Plain torch in the same dtype rounds logits and weights to it. Here fp32 logits, and weights rounded for the product with values.
RATIOS = {F32: {"out": 4.0, "lse": 4.0}, F16: {"out": 1.0, "lse": 0.1}, BF16: {"out": 1.0, "lse": 0.1}}


def make(spans, heads, dim, dtype, rows=None, device="cpu"):
    """(q, pools, spans, how): arenas are NaN wherever no span lies."""
    pools = tuple(tuple(torch.full((slots, heads[1], dim), math.nan, dtype=dtype) for _ in "kv") for slots in SLOTS)
    for pool, start, num in (span for both in spans for span in both):
        for arena in pools[pool]:
            arena[start : start + num] = torch.randn(num, heads[1], dim).to(dtype)
    how = {"max_keys": max(sum(num for _, _, num in both) for both in spans)}
    if rows is not None:
        how |= {"cu_rows": offsets(*rows, device=device), "max_rows": max(rows)}
    q = torch.randn(len(spans) if rows is None else sum(rows), heads[0], dim).to(device, dtype)
    pools = tuple(tuple(arena.to(device) for arena in pool) for pool in pools)
    return q, pools, torch.tensor(spans, dtype=torch.int32, device=device), how


def check(place, q, pools, spans, how):
    found = decode_attention(q, pools, spans, return_lse=True, backend=place.backend, **how)
    assert found[0].dtype == q.dtype and found[1].dtype == F32
    exact = reference.decode_attention(q, pools, spans, return_lse=True, **how)
    plain = reference.decode_attention(q, pools, spans, return_lse=True, dtype=q.dtype, **how)
    assert_as_exact_as_torch(found[:1], exact[:1], plain[:1], {"out": RATIOS[q.dtype]["out"]}, dtype=q.dtype)
    assert_as_exact_as_torch(found[1:], exact[1:], plain[1:], {"lse": max(0.1, RATIOS[q.dtype]["lse"])})
    return found


LONG = [(0, 5, 601), (1, 3, 40)]
# Sequences: spans in one pool, in two, the other way round, empty; a second span of more than a split; one key.
MIXED = [
    [(0, 0, 257), (1, 0, 1)],
    [(0, 300, 19), (0, 400, 63)],
    [(1, 20, 0), (0, 500, 64)],
    [(1, 50, 97), (1, 9, 331)],
    [(1, 50, 97), (1, 150, 0)],
    [(1, 1, 0), (1, 2, 1)],
]
SHAPES = [((1, 1), 64, F32), ((2, 2), 80, BF16), ((4, 1), 96, F16), ((7, 1), 128, BF16), ((8, 1), 64, F16), ((14, 2), 16, F32)]


@pytest.mark.parametrize(("heads", "dim", "dtype"), SHAPES)
def test_one_row_each(place, heads, dim, dtype):
    check(place, *make(MIXED, heads, dim, dtype, device=place.device))


@pytest.mark.parametrize(("heads", "dim", "dtype"), [((7, 1), 64, BF16), ((2, 2), 80, F32), ((8, 1), 128, F16)])
def test_several_rows_see_up_to_themselves(place, heads, dim, dtype):
    split = [(0, 0, 245), (1, 0, 17)]  # the first rows see nothing of the second split
    spans = [split, [(0, 400, 0), (1, 100, 7)], [(1, 200, 70), (0, 500, 6)], [(0, 600, 30), (0, 700, 5)]]
    check(place, *make(spans, heads, dim, dtype, rows=(11, 4, 1, 0), device=place.device))


def test_twice_the_same_bits_with_and_without_the_log_sum_exp(place):
    q, pools, spans, how = make([LONG, MIXED[1]], (4, 2), 64, BF16, device=place.device)
    first, _ = decode_attention(q, pools, spans, return_lse=True, backend=place.backend, **how)
    assert torch.equal(decode_attention(q, pools, spans, backend=place.backend, **how), first)


def test_a_late_key_changes_no_earlier_row(place):
    q, pools, spans, how = make([[(0, 0, 50), (1, 0, 9)]], (4, 2), 64, F32, rows=(5,), device=place.device)
    before = decode_attention(q, pools, spans, backend=place.backend, **how)
    pools[1][0][6], pools[1][1][6] = 3.0, -3.0
    after = decode_attention(q, pools, spans, backend=place.backend, **how)
    assert torch.equal(before[:2], after[:2]) and not (before[2:] == after[2:]).all(-1).any()


def test_a_sequences_bits_do_not_depend_on_the_batch(place):
    spans = [LONG, *MIXED]
    q, pools, bounds, how = make(spans, (7, 1), 64, BF16, device=place.device)
    together = decode_attention(q, pools, bounds, backend=place.backend, return_lse=True, **how)
    for b, both in enumerate(spans):
        own = sum(num for _, _, num in both)
        alone = decode_attention(q[b : b + 1], pools, bounds[b : b + 1], backend=place.backend, return_lse=True, max_keys=own)
        assert all(torch.equal(x[b], y[0]) for x, y in zip(together, alone, strict=True))


def test_where_keys_lie_does_not_matter(place):
    """The same keys in one span, in two, and in other slots of the other pool."""
    q, pools, _, _ = make([[(0, 0, 200), (1, 0, 0)]], (8, 2), 64, F32, device=place.device)
    for near, far in zip(*pools, strict=True):
        far[100:300] = near[:200]
    places = ([(0, 0, 200), (1, 0, 0)], [(0, 0, 64), (1, 164, 136)], [(1, 9, 0), (1, 100, 200)], [(1, 100, 130), (0, 130, 70)])
    spans = [torch.tensor([both], dtype=torch.int32, device=place.device) for both in places]
    first, *others = (decode_attention(q, pools, both, max_keys=200, backend=place.backend) for both in spans)
    for out in others:
        torch.testing.assert_close(out, first, rtol=1e-5, atol=1e-6)


def test_the_longest_length_may_be_unknown(place):
    q, pools, spans, how = make([[(0, 0, 270), (1, 0, 3)]], (2, 1), 16, F32, device=place.device)
    bounded = decode_attention(q, pools, spans, backend=place.backend, **how)
    assert torch.equal(decode_attention(q, pools, spans, backend=place.backend), bounded)


def test_more_keys_than_splits_of_the_least_size(triton_place, monkeypatch):
    """Splits grow, to a multiple of a block; with 2 splits at most it shows at fewer keys than with 64."""
    module = importlib.import_module("sparsevila_kernels.decode_attention")
    monkeypatch.setattr(module, "MAX_SPLITS", 2)
    monkeypatch.setattr(module, "CUT", {**module.CUT, "MOST": 2})
    check(triton_place, *make([[(0, 3, 690), (1, 0, 9)], [(0, 0, 300), (1, 100, 1)]], (4, 2), 16, F32, device=triton_place.device))


@pytest.mark.smoke
def test_no_key_gives_zero(place):
    q, pools, spans, how = make([[(0, 0, 0), (1, 0, 0)], [(0, 0, 9), (1, 0, 1)]], (4, 2), 64, BF16, device=place.device)
    out, lse = check(place, q, pools, spans, how)
    assert not out[0].any() and (lse[0] == -math.inf).all() and torch.isfinite(lse[1]).all()


def test_arenas_of_layers_and_heads_of_fused_projections(place):
    """Views with strides of their own, and a pool that is another layer of the same memory."""
    q, pools, spans, how = make([LONG, MIXED[0]], (8, 2), 64, F16, device=place.device)
    dense = decode_attention(q, pools, spans, backend=place.backend, **how)
    layers = [[torch.stack([a, a + 1, a], 1)[:, 0] for a in pool] for pool in pools]
    head_major = [[a.transpose(0, 1).contiguous().transpose(0, 1) for a in pool] for pool in pools]
    fused = torch.randn(2, 12 * 64).to(q)
    fused[:, 64 : 64 + 8 * 64] = q.reshape(2, -1)
    for some in (layers, head_major):
        out = decode_attention(fused[:, 64 : 64 + 8 * 64].view(2, 8, 64), some, spans, backend=place.backend, **how)
        assert torch.equal(out, dense)


def test_rows_beyond_the_workspace_come_in_several_launches(triton_place, monkeypatch):
    module = importlib.import_module("sparsevila_kernels.decode_attention")
    q, pools, spans, how = make([[(0, 0, 30), (1, 0, 9)], [(0, 100, 5), (1, 100, 8)]], (4, 2), 16, F32, (9, 4), triton_place.device)
    whole = decode_attention(q, pools, spans, return_lse=True, backend="triton", **how)
    monkeypatch.setattr(module, "MAX_WORKSPACE_BYTES", 3 * 4 * 17 * 4)
    windows, launch = [], module._launch_window
    monkeypatch.setattr(module, "_launch_window", lambda *args: (windows.append(args[8:10]), launch(*args)))
    parts = decode_attention(q, pools, spans, return_lse=True, backend="triton", **how)
    assert windows == [(0, 3), (3, 3), (6, 3), (9, 3), (12, 1)]
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_triton_reads_nothing_on_the_host(triton_place):
    q, pools, spans, how = make(MIXED[:2], (4, 2), 16, F32, rows=(2, 1), device=triton_place.device)
    with NoHostReads():
        decode_attention(q, pools, spans, return_lse=True, backend="triton", **how)
    with pytest.raises(AssertionError, match="waits"), NoHostReads():
        q[0, 0, 0].item()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_way_of_other_devices_gives_the_same(monkeypatch, dtype):
    """Plain products in fp32, for devices that have neither Triton nor the CPU's fused kernel."""
    in_torch = importlib.import_module("sparsevila_kernels._decode_torch")
    monkeypatch.setattr(in_torch, "_attend_fused", in_torch._attend_plainly)
    monkeypatch.delattr(in_torch, "_decode_step")
    spans = [[(0, 0, 29), (1, 0, 17)], [(0, 400, 0), (1, 100, 7)], [(1, 200, 70), (0, 500, 6)], [(0, 600, 30), (0, 700, 5)]]
    check(Place("cpu", "torch"), *make(spans, (8, 2), 64, dtype, rows=(11, 7, 1, 0)))


def test_more_rows_than_their_span_is_refused_in_torch():
    q, pools, spans, how = make([[(0, 0, 30), (1, 0, 2)]], (4, 2), 16, F32, rows=(3,))
    with pytest.raises(ValueError, match="sequence 0: 3 rows .* 2 keys"):
        decode_attention(q, pools, spans, **how)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spans": torch.zeros(2, 2, 3)}, "int32"),
        ({"spans": torch.zeros(2, 6, dtype=torch.int32)}, r"\[B, 2, 3\]"),
        ({"spans": torch.zeros(3, 2, 3, dtype=torch.int32)}, "each has one row"),
        ({"max_rows": 2}, "each has one row"),
        ({"max_rows": 0}, "at least 1"),
        ({"cu_rows": offsets(2)}, r"int32 \[3\]"),
        ({"q": torch.zeros(2, 3, 16)}, "Hkv dividing Hq"),
        ({"q": torch.zeros(2, 4, 16, dtype=F16)}, "one dtype"),
        ({"pools": ((torch.zeros(9, 2, 16),) * 2, (torch.zeros(9, 1, 16),) * 2)}, "pool 1"),
        ({"pools": ((torch.zeros(9, 2, 16), torch.zeros(8, 2, 16)),) * 2}, "pool 0"),
        ({"pools": ((torch.zeros(9, 2, 16), torch.zeros(9, 2, 16, dtype=F16)),) * 2}, "v of pool 0"),
    ],
)
def test_refuses(change, message):
    arena = torch.zeros(9, 2, 16)
    args = {"q": torch.zeros(2, 4, 16), "pools": ((arena, arena),) * 2, "spans": torch.zeros(2, 2, 3, dtype=torch.int32), **change}
    with pytest.raises(ValueError, match=message):
        decode_attention(args.pop("q"), args.pop("pools"), args.pop("spans"), **args)
