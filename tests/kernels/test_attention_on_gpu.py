"""Attention kernels at the sizes that they are for, and inside a CUDA graph: only a GPU can say."""

import pytest
import torch

from sparsevila_kernels import colreduce, decode_attention, reference
from tests.kernels.kernel_accuracy import assert_as_exact_as_torch, offsets

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

BF16 = torch.bfloat16


def make_arenas(num_slots, num_kv_heads, dim, dtype=BF16):
    return tuple(tuple(torch.randn(num_slots, num_kv_heads, dim, device="cuda", dtype=dtype) for _ in "kv") for _ in range(2))


def assert_right(found, q, pools, spans, **how):
    exact = reference.decode_attention(q, pools, spans, return_lse=True, **how)
    plain = reference.decode_attention(q, pools, spans, return_lse=True, dtype=q.dtype, **how)
    assert_as_exact_as_torch(found[:1], exact[:1], plain[:1], {"out": 1.0}, dtype=q.dtype)
    assert_as_exact_as_torch(found[1:], exact[1:], plain[1:], {"lse": 1.0})


@pytest.mark.parametrize(("heads", "dim"), [((28, 4), 128), ((32, 32), 80), ((16, 2), 96), ((40, 8), 64)])
def test_a_batch_of_unequal_prefixes(heads, dim):
    pools = make_arenas(80_000, heads[1], dim)
    long, short = [(0, 5, 65_537), (1, 100, 77)], [(0, 0, 257), (1, 400, 1)]
    both_in_one, alone = [(1, 1000, 16_384), (1, 70_000, 63)], [(0, 9, 0), (1, 9, 1)]
    spans = torch.tensor([long, short, both_in_one, alone], dtype=torch.int32, device="cuda")
    q = torch.randn(4, heads[0], dim, device="cuda", dtype=BF16)
    found = decode_attention(q, pools, spans, return_lse=True)
    assert_right(found, q, pools, spans)
    for b in range(4):
        alone = decode_attention(q[b : b + 1], pools, spans[b : b + 1], return_lse=True)
        assert all(torch.equal(x[0], y[b]) for x, y in zip(alone, found, strict=True))


@pytest.mark.parametrize("heads", [(28, 4), (16, 16)])
def test_questions_against_long_prefixes(heads):
    pools = make_arenas(40_000, heads[1], 128)
    spans = torch.tensor([[(0, 5, 32_001), (1, 100, 70)], [(0, 900, 4099), (1, 400, 31)]], dtype=torch.int32, device="cuda")
    q = torch.randn(64 + 31, heads[0], 128, device="cuda", dtype=BF16)
    how = {"cu_rows": offsets(64, 31, device="cuda"), "max_rows": 64}
    assert_right(decode_attention(q, pools, spans, return_lse=True, **how), q, pools, spans, **how)


def test_a_captured_launch_follows_its_spans():
    pools = make_arenas(9000, 4, 128)
    first = torch.tensor([[(0, 5, 3000), (1, 100, 7)], [(0, 0, 1), (1, 400, 1)]], dtype=torch.int32, device="cuda")
    second = torch.tensor([[(1, 50, 0), (1, 1100, 8)], [(0, 77, 8001), (1, 400, 300)]], dtype=torch.int32, device="cuda")
    q, spans = torch.randn(2, 28, 128, device="cuda", dtype=BF16), first.clone()
    decode_attention(q, pools, spans)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(q, pools, spans)
    for now in (second, first):
        spans.copy_(now)
        q.normal_()
        graph.replay()
        assert torch.equal(out, decode_attention(q, pools, now))


LONG_PREFIXES = [(8, 262_139, BF16), (64, 40_009, torch.float16), (33, 9_001, torch.float32)]


@pytest.mark.parametrize(("num_rows", "num_keys", "dtype"), LONG_PREFIXES)
@pytest.mark.parametrize("heads", ["each", "mean"])
def test_a_question_over_a_long_prefix(num_rows, num_keys, dtype, heads):
    q = torch.randn(num_rows, 14, 128, device="cuda", dtype=dtype)
    k = torch.randn(num_keys, 2, 128, device="cuda", dtype=dtype)
    found = colreduce(q, k, causal=True, heads=heads)
    exact, plain = (reference.colreduce(q, k, causal=True, heads=heads, dtype=kind) for kind in (torch.float64, dtype))
    assert_as_exact_as_torch([found], [exact], [plain], {"weights": 4.0 if dtype == torch.float32 else 0.25})
    assert torch.equal(found, colreduce(q, k, causal=True, heads=heads))


@pytest.mark.parametrize(("lengths", "dim"), [([1024] * 16, 80), ([4096], 64), ([64] * 100 + [777, 1, 0, 1300], 80)])
@pytest.mark.parametrize("given", [False, True])
def test_segments_of_a_vision_tower(lengths, dim, given):
    q, k = (torch.randn(sum(lengths), 16, dim, device="cuda", dtype=BF16) for _ in range(2))
    bounds = offsets(*lengths, device="cuda")
    lse = None
    if given:
        parts = zip(q.split(lengths), k.split(lengths), strict=True)
        lse = torch.cat([torch.logsumexp(reference.attention_logits(a.double(), b.double(), None, False), -1).T for a, b in parts])
        lse = lse.float()
    how = {"cu_rows": bounds, "cu_keys": bounds, "lse": lse, "heads": "mean"}
    found = colreduce(q, k, **how)
    exact, plain = (reference.colreduce(q, k, dtype=kind, **how) for kind in (torch.float64, BF16))
    assert_as_exact_as_torch([found], [exact], [plain], {"weights": 0.25})
