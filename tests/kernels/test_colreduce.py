"""Column reductions of softmax weights, on every path, against the definition in fp64."""

import importlib
import math

import pytest
import torch

from sparsevila_kernels import colreduce, reference
from tests.kernels.kernel_accuracy import assert_as_exact_as_torch, offsets

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Plain torch in the same dtype rounds its logits to it; every path here keeps them in fp32.
RATIO = {F32: 4.0, F16: 0.25, BF16: 0.25}


def make(num_rows, num_keys, heads, dim, dtype, device="cpu"):
    q = torch.randn(num_rows, heads[0], dim).to(device, dtype)
    k = torch.randn(num_keys, heads[1], dim).to(device, dtype)
    return q, k


def check(place, q, k, ratio=1.0, **how):
    found = colreduce(q, k, backend=place.backend, **how)
    assert found.dtype == F32 and found.device == q.device
    exact, plain = reference.colreduce(q, k, **how), reference.colreduce(q, k, dtype=q.dtype, **how)
    assert_as_exact_as_torch([found], [exact], [plain], {"weights": ratio * RATIO[q.dtype]})
    return found


# rows, keys, (query heads, KV heads), head dimension, dtype, causal: primes, one row, more rows than keys, wide and narrow heads.
SHAPES = [
    (1, 1, (1, 1), 64, F32, False),
    (1, 577, (8, 2), 64, BF16, True),
    (7, 257, (7, 1), 128, BF16, True),  # only the last row sees the second split
    (13, 131, (8, 1), 80, F16, True),
    (31, 17, (4, 1), 96, F32, True),
    (67, 61, (2, 2), 80, BF16, False),
    (5, 300, (14, 2), 16, F32, True),
    (131, 37, (8, 2), 72, F16, True),
    (3, 97, (4, 4), 8, F32, False),
]


@pytest.mark.parametrize(("num_rows", "num_keys", "heads", "dim", "dtype", "causal"), SHAPES)
def test_sums_of_each_head(place, num_rows, num_keys, heads, dim, dtype, causal):
    q, k = make(num_rows * place.scale, num_keys * place.scale, heads, dim, dtype, place.device)
    check(place, q, k, causal=causal)


@pytest.mark.parametrize("reduction", ["sum", "mean", "max"])
@pytest.mark.parametrize("heads", ["each", "mean"])
def test_reductions_over_rows_and_heads(place, reduction, heads):
    q, k = make(11 * place.scale, 71 * place.scale, (14, 2), 64, F32, place.device)
    check(place, q, k, reduction=reduction, heads=heads, causal=True)


def test_more_keys_than_splits_of_the_least_size(triton_place, monkeypatch):
    """Splits grow, to a multiple of a block; with 2 splits at most it shows at fewer keys than with 128."""
    monkeypatch.setattr(importlib.import_module("sparsevila_kernels.colreduce"), "MAX_SPLITS", 2)
    q, k = make(3, 701, (4, 2), 16, F32, triton_place.device)
    check(triton_place, q, k, causal=True)


def test_each_rows_weights_sum_to_one(place):
    q, k = make(5, 163, (4, 2), 64, BF16, place.device)
    sums = colreduce(q, k, causal=True, backend=place.backend)
    torch.testing.assert_close(sums.sum(1), torch.full_like(sums[:, 0], 5.0), rtol=1e-5, atol=0)


def test_rows_before_the_first_key_count_as_zero(place):
    """m > n: the first m - n rows see nothing, the next sees the first key alone."""
    q, k = make(9, 4, (4, 1), 64, F32, place.device)
    sums = check(place, q, k, causal=True)
    torch.testing.assert_close(sums.sum(1), torch.full_like(sums[:, 0], 4.0))
    assert torch.equal(colreduce(q[:1], k[:0], backend=place.backend), k.new_zeros(4, 0))
    first = colreduce(q[:6], k[:1], causal=True, reduction="max", backend=place.backend)
    torch.testing.assert_close(first, torch.ones_like(first))


ROWS, KEYS = (5, 0, 33, 2, 7), (40, 21, 30, 0, 67)


@pytest.mark.parametrize("heads", ["each", "mean"])
@pytest.mark.parametrize("causal", [False, True])
def test_sequences_know_nothing_of_each_other(place, heads, causal):
    """Also those without rows (their keys get 0) and without keys."""
    q, k = make(sum(ROWS), sum(KEYS), (8, 2), 80, BF16, place.device)
    bounds = {"cu_rows": offsets(*ROWS, device=place.device), "cu_keys": offsets(*KEYS, device=place.device)}
    for reduction in ("sum", "mean"):
        found = check(place, q, k, heads=heads, causal=causal, reduction=reduction, **bounds)
        assert not found[..., 40:61].any()


def test_a_sequences_bits_do_not_depend_on_its_neighbours(place):
    """Where all have the same number of rows, so that the tiles are the same."""
    q, k = make(12, 800, (4, 2), 64, F32, place.device)
    lengths = (300, 99, 401)
    bounds = {"cu_rows": offsets(4, 4, 4, device=place.device), "cu_keys": offsets(*lengths, device=place.device)}
    together = colreduce(q, k, causal=True, backend=place.backend, **bounds).split(lengths, 1)
    alone = [colreduce(a, b, causal=True, backend=place.backend) for a, b in zip(q.split(4), k.split(lengths), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_twice_the_same_bits(place):
    q, k = make(19 * place.scale, 411 * place.scale, (8, 2), 64, BF16, place.device)
    first, second = (colreduce(q, k, causal=True, heads="mean", backend=place.backend) for _ in range(2))
    assert torch.equal(first, second)


def test_a_given_norm_may_come_from_more_keys_than_these(place):
    """Each row normalized over everything it sees, of which k is a part; and over itself, which is as without."""
    q, k = make(6, 210, (8, 2), 64, F32, place.device)
    logits = reference.attention_logits(q.double(), k.double(), None, causal=False)
    lse = torch.logsumexp(logits, -1).T.float().contiguous()
    found = check(place, q, k[:150], lse=lse)
    whole = colreduce(q, k, backend=place.backend)
    torch.testing.assert_close(found, whole[:, :150], rtol=1e-5, atol=1e-7)
    lse[2] = -math.inf  # a row that has seen nothing
    others = [0, 1, 3, 4, 5]
    without = colreduce(q[others], k, lse=lse[others], backend=place.backend)
    torch.testing.assert_close(colreduce(q, k, lse=lse, backend=place.backend), without)


def test_large_logits_neither_overflow_nor_lose_the_largest(place):
    q, k = (30 * x for x in make(4, 90, (4, 2), 64, F32, place.device))
    found, exact = colreduce(q, k, backend=place.backend), reference.colreduce(q, k)
    # A float32 logit of this size is right to its last bits, whichever way it is summed: so are competing weights, and their sum.
    largest = torch.einsum("rhd,nhd->rhn", q, k.repeat_interleave(2, 1)).abs().max().item() / math.sqrt(64)
    known = 4 * torch.finfo(F32).eps * largest
    assert largest > 1000 and known < 0.01 and found.isfinite().all()
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=known)
    torch.testing.assert_close(found.sum(1), torch.full_like(found[:, 0], 4.0), rtol=known, atol=0)


def test_reads_keys_where_they_lie(place):
    """Rows of an arena of more layers, whose neighbours are NaN, and heads as a view of fused projections."""
    arena = torch.full((3, 90, 2, 64), math.nan, dtype=F16, device=place.device)
    arena[1, 7:80] = torch.randn(73, 2, 64).to(arena)
    fused = torch.full((9, 12 * 64), math.nan, dtype=F16, device=place.device)
    fused[:, 128 : 128 + 8 * 64] = torch.randn(9, 8 * 64).to(fused)
    q, k = fused[:, 128 : 128 + 8 * 64].view(9, 8, 64), arena[1, 7:80]
    found = check(place, q, k, causal=True)
    head_major = k.transpose(0, 1).contiguous().transpose(0, 1)
    for same in (k.contiguous(), head_major):
        assert torch.equal(found, colreduce(q.contiguous(), same, causal=True, backend=place.backend))


def test_memory_stays_bounded_in_torch(monkeypatch):
    """Rows, heads and keys are taken some at a time; the result is the same."""
    in_torch = importlib.import_module("sparsevila_kernels._colreduce_torch")
    q, k = make(23, 120, (8, 4), 64, F32)
    how = {"causal": True, "reduction": "max"}
    whole, wide = colreduce(q, k, **how), colreduce(q.bfloat16(), k.bfloat16(), **how)
    sizes, products = [], in_torch._products

    def watched(*args):
        sizes.append((out := products(*args)).numel())
        return out

    monkeypatch.setattr(in_torch, "_products", watched)
    monkeypatch.setattr(in_torch, "MAX_LOGITS", 3 * 2 * 120)
    monkeypatch.setattr(in_torch, "MAX_CAST", 1000)
    torch.testing.assert_close(colreduce(q, k, **how), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(colreduce(q.bfloat16(), k.bfloat16(), **how), wide, rtol=1e-5, atol=1e-6)
    assert max(sizes) <= 3 * 2 * 120 and len(sizes) >= 2 * 4 * 23 // 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "median"}, "'median'"),
        ({"heads": "all"}, "'all'"),
        ({"k": torch.zeros(9, 3, 16)}, r"Hkv dividing Hq"),
        ({"k": torch.zeros(9, 2, 32)}, r"\(9, 2, 32\)"),
        ({"k": torch.zeros(9, 2, 16, dtype=BF16)}, "bfloat16"),
        ({"q": torch.zeros(5, 4, 16, dtype=torch.float64), "k": torch.zeros(9, 2, 16, dtype=torch.float64)}, "float64"),
        ({"k": torch.zeros(9, 2, 32)[..., ::2]}, "stride 1"),
        ({"k": torch.zeros(2, 2, 16).as_strided((1, 2, 16), (2**23 + 16, 16, 1))}, "rows at most 8388608"),
        ({"scale": -1.0}, "scale -1.0: must be above 0"),
        ({"cu_rows": offsets(5)}, "both or neither"),
        ({"cu_rows": offsets(5), "cu_keys": offsets(4, 5)}, "both must be int32"),
        ({"cu_rows": offsets(5).long(), "cu_keys": offsets(9).long()}, "both must be int32"),
        ({"lse": torch.zeros(4, 5)}, r"\(5, 4\)"),
        ({"backend": "cuda"}, "'cuda'"),
    ],
)
def test_refuses(change, message):
    args = {"q": torch.zeros(5, 4, 16), "k": torch.zeros(9, 2, 16), **change}
    with pytest.raises(ValueError, match=message):
        colreduce(args.pop("q"), args.pop("k"), **args)
