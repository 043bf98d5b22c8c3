"""Attention over spans equals one softmax over all keys, written out."""

import warnings

import pytest
import torch

from sparsevila_cluster.attention import torch_ops
from sparsevila_cluster.attention.interface import Capture
from sparsevila_cluster.attention.torch_ops import attend_causal, attend_gathered, attend_question, attend_spans


def random_case(num_rows, body, past, heads, kv_heads, dim, seed):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(num_rows, heads, dim, generator=g)
    k = torch.randn(body + past + num_rows, kv_heads, dim, generator=g)
    v = torch.randn(body + past + num_rows, kv_heads, dim, generator=g)
    return q, k, v


def reference(q, k, v, scale):
    """Row i of n sees all keys but the last n - 1 - i. Returns outputs [n, H, D] and weights [H, n, S], in float64."""
    n, heads, _ = q.shape
    repeat = heads // k.shape[1]
    k, v = k.double().repeat_interleave(repeat, 1), v.double().repeat_interleave(repeat, 1)
    logits = torch.einsum("nhd,shd->hns", q.double(), k) * scale
    future = torch.arange(len(k))[None] > (len(k) - n + torch.arange(n))[:, None]
    weights = logits.masked_fill(future, float("-inf")).softmax(-1)
    return torch.einsum("hns,shd->nhd", weights, v), weights


def spans(k, v, body):
    heads = lambda x: x.transpose(0, 1)[None]  # noqa: E731
    return (heads(k[:body]), heads(v[:body])), (heads(k[body:]), heads(v[body:]))


CASES = [(1, 13, 0, 4, 2, 32), (1, 700, 5, 7, 1, 64), (1, 1, 0, 3, 3, 16), (1, 31, 97, 8, 2, 80)]


@pytest.mark.parametrize("num_rows, body, past, heads, kv_heads, dim", CASES)
def test_one_row_over_two_spans(num_rows, body, past, heads, kv_heads, dim):
    q, k, v = random_case(num_rows, body, past, heads, kv_heads, dim, seed=body)
    want, _ = reference(q, k, v, dim**-0.5)
    got = attend_spans(q, [spans(k, v, body)], dim**-0.5)
    torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=1e-5)


def test_several_sequences_over_their_own_spans():
    cases = [(random_case(1, body, past, 6, 2, 24, seed=body), body) for body, past in ((5, 0), (300, 7), (1, 90))]
    got = attend_spans(torch.cat([q for (q, _, _), _ in cases]), [spans(k, v, body) for (_, k, v), body in cases], 0.2)
    for row, ((q, k, v), _) in zip(got, cases, strict=True):
        torch.testing.assert_close(row.double(), reference(q, k, v, 0.2)[0][0], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("num_rows, body, past", [(1, 5, 0), (9, 40, 0), (17, 129, 23)])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (7, 1)])
@pytest.mark.parametrize("normalize", ["full_row", "visual"])
@pytest.mark.parametrize("max_weights", [10, 10**9])
def test_question_rows_and_their_scores(monkeypatch, num_rows, body, past, heads, kv_heads, normalize, max_weights):
    monkeypatch.setattr(torch_ops, "MAX_WEIGHTS", max_weights)  # 10: one row at a time
    q, k, v = random_case(num_rows, body, past, heads, kv_heads, 24, seed=num_rows + heads)
    want, weights = reference(q, k, v, 0.3)
    visual = torch.arange(1, body, 2)
    for rows in {(0, num_rows), (num_rows - 1, num_rows), (num_rows // 3, num_rows // 2 + 1)}:
        capture = Capture(visual, *rows, normalize)
        got = attend_question(q, *spans(k, v, body), 0.3, capture)
        torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=1e-5)
        share = weights[..., visual]
        if normalize == "visual":
            share = share / share.sum(-1, keepdim=True)
        expected = share[:, rows[0] : rows[1]].mean((0, 1))
        torch.testing.assert_close(capture.scores()[0].double(), expected, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("normalize", ["full_row", "visual"])
@pytest.mark.parametrize("cuts", [(4,), (1, 2, 3), (9, 16)])
def test_rows_in_several_steps_are_as_in_one(cuts, normalize):
    num_rows, body, past = 17, 61, 5
    q, k, v = random_case(num_rows, body, past, 6, 2, 24, seed=7)
    visual = torch.arange(2, body, 3)
    for rows in {(0, num_rows), (num_rows - 1, num_rows), (3, 10)}:
        whole, parts = Capture(visual, *rows, normalize), Capture(visual, *rows, normalize)
        want = [attend_question(q, *spans(k, v, body), 0.3, whole, layer) for layer in range(2)]
        got = []
        for start, stop in zip((0, *cuts), (*cuts, num_rows), strict=True):
            seen = body + past + stop
            for layer in range(2):
                got.append(attend_question(q[start:stop], *spans(k[:seen], v[:seen], body), 0.3, parts, layer))
            parts.num_done += stop - start
        torch.testing.assert_close(torch.cat(got[::2]), want[0], atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(parts.scores(), whole.scores(), atol=1e-7, rtol=1e-5)
        assert parts.scores().shape == (2, len(visual))


@pytest.mark.parametrize("num_rows, past", [(1, 0), (37, 0), (1, 50), (5, 3), (64, 700), (700, 1)])
@pytest.mark.parametrize("heads, kv_heads, dim", [(4, 4, 16), (6, 3, 24), (8, 2, 64), (7, 1, 80)])
def test_causal_rows_after_earlier_ones(num_rows, past, heads, kv_heads, dim):
    """The way of a CPU, and that of other devices, which torch runs anywhere."""
    q, k, v = random_case(num_rows, 0, past, heads, kv_heads, dim, seed=num_rows)
    want, _ = reference(q, k, v, 0.25)
    span = spans(k, v, 0)[1]
    torch.testing.assert_close(attend_causal(q, span, 0.25).double(), want, atol=2e-6, rtol=1e-5)
    grouped = q.view(num_rows, kv_heads, -1, dim).permute(1, 2, 0, 3)
    k, v = (x[0, :, None].expand(-1, heads // kv_heads, -1, -1) for x in span)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that a CPU has none of the fused kernels
        got = torch_ops._causal_at_once(grouped, k, v, 0.25)
    torch.testing.assert_close(got.permute(2, 0, 1, 3).flatten(1, 2).double(), want, atol=2e-6, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("num_rows, past", [(37, 0), (1, 50), (64, 700), (700, 1)])
@pytest.mark.parametrize("heads, kv_heads, dim", [(8, 2, 64), (7, 1, 80), (28, 4, 128)])
def test_causal_rows_on_a_gpu(num_rows, past, heads, kv_heads, dim, dtype, atol):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    case = [x.to(dtype) for x in random_case(num_rows, 0, past, heads, kv_heads, dim, seed=num_rows)]
    want, _ = reference(*case, dim**-0.5)
    q, k, v = (x.cuda() for x in case)
    got = attend_causal(q, spans(k, v, 0)[1], dim**-0.5)
    torch.testing.assert_close(got.double().cpu(), want, atol=atol, rtol=1e-2)


def test_causal_rows_read_keys_and_values_where_they_lie():
    """Of a long past, only the rows' own share is ever held: the peak of a call stays far below a copy of the span."""
    num_keys, heads, kv_heads, dim = 20_000, 16, 2, 64
    q, k, v = random_case(8, 0, num_keys - 8, heads, kv_heads, dim, seed=0)
    span = spans(k, v, 0)[1]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        attend_causal(q, span, 0.125)
    biggest = max(event.self_cpu_memory_usage for event in seen.events())
    assert 0 < biggest < k.nbytes / 4


@pytest.mark.parametrize("heads, kv_heads, dim", [(4, 4, 16), (7, 1, 80), (6, 2, 24)])
def test_rows_of_unequal_length_in_one_call(heads, kv_heads, dim):
    lengths = [1, 13, 7, 40]
    cases = [random_case(1, n - 1, 0, heads, kv_heads, dim, seed=n) for n in lengths]
    k, v = (torch.full((4, 40, kv_heads, dim), 1e4) for _ in range(2))  # padding that would show
    for i, (_, keys, values) in enumerate(cases):
        k[i, : lengths[i]], v[i, : lengths[i]] = keys, values
    visible = (torch.arange(40) < torch.tensor(lengths)[:, None])[:, None, None]
    got = attend_gathered(torch.cat([q for q, _, _ in cases]), k, v, visible, 0.3)
    for row, (q, keys, values) in zip(got, cases, strict=True):
        torch.testing.assert_close(row.double(), reference(q, keys, values, 0.3)[0][0], atol=2e-6, rtol=1e-5)
