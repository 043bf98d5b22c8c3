"""One step of all kinds of rows at once: kernels and torch write the same KV, attend alike and give the same scores."""

import pytest
import torch

from sparsevila_cluster.attention.interface import Capture, Segment
from sparsevila_cluster.attention.torch_backend import TurnBatch
from sparsevila_cluster.attention.triton_backend import TritonBatch
from sparsevila_cluster.kvcache.arena import Arena, KVSpec

SPEC = KVSpec(num_layers=2, num_kv_heads=2, head_dim=16, dtype=torch.float32, fingerprint="test")
NUM_HEADS = 4
VISUAL = torch.arange(3, 70, 2)
# (phase, pool of the body, its rows, rows before this step, rows, captured rows of how many, of which are done)
DECODE = [("decode", 1, 33, 4, 1, None), ("decode", 0, 80, 0, 1, None), ("decode", 1, 1, 50, 1, None)]
OTHERS = [
    ("refresh", 0, 80, 7, 1, (0, 1, 0)),
    ("replay", 1, 33, 2, 2, None),
    ("question", 0, 80, 3, 4, (1, 3, 0)),
    ("question", 0, 80, 0, 2, (5, 12, 4)),
    ("question", 0, 80, 0, 1, (8, 9, 0)),  # its captured row is yet to come
]


def make(rows, normalize):
    """(arena of prefixes, arena of turns), segments: the same each time."""
    noise = torch.Generator().manual_seed(3)
    arenas = Arena(SPEC, 200), Arena(SPEC, 600)
    for arena in arenas:
        for tensor in (arena.k_all, arena.v_all):
            tensor.copy_(torch.randn(tensor.shape, generator=noise))
    arenas[0].alloc(11)
    prefix, segments, first = arenas[0].alloc(80), [], 0
    for phase, pool, length, past, num, captured in rows:
        home = arenas[1].alloc(length) if pool else prefix
        tail = arenas[1].alloc(past + num + 2)
        capture = None
        if captured is not None:
            capture = Capture(VISUAL, captured[0], captured[1], normalize, captured[2])
        segments.append(Segment(first, num, home.spans(), home, tail.spans(), tail.start, past, capture, phase))
        first += num
    return arenas, segments


CASES = {
    "decode": (DECODE, "full_row"),
    "others": (OTHERS, "visual"),
    "all": (DECODE + OTHERS, "full_row"),
}


@pytest.mark.parametrize("rows, normalize", CASES.values(), ids=CASES)
def test_kernels_do_what_torch_does(rows, normalize):
    (arenas, segments), (other_arenas, other_segments) = make(rows, normalize), make(rows, normalize)
    num = sum(s.num for s in segments)
    plain, kernels = TurnBatch(segments, arenas[1]), TritonBatch(other_segments, other_arenas)
    for layer in range(2):
        q = torch.randn(num, NUM_HEADS, 16)
        k, v = torch.randn(2, num, 2, 16).unbind(0)
        want = plain.attend(layer, q, k, v, 0.3)
        if layer:
            got = kernels.attend(layer, q, k, v, 0.3)
        else:  # as a decoder that writes its rows itself
            keys, values, slots = kernels.target(layer)
            keys[slots], values[slots] = k, v
            got = kernels.attend_written(layer, q, 0.3)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    for one, other in zip(arenas, other_arenas, strict=True):
        assert torch.equal(one.k_all, other.k_all) and torch.equal(one.v_all, other.v_all)
    for one, other in zip(segments, other_segments, strict=True):
        if one.capture is not None:
            torch.testing.assert_close(other.capture.scores(), one.capture.scores(), atol=1e-6, rtol=1e-4)
    scored = [s.capture.scores() for s in other_segments if s.capture is not None]
    assert [bool(scores.any()) for scores in scored] == ([True, True, True, False] if len(rows) > 3 else [])


def test_extents_of_another_engine_are_refused():
    arenas, segments = make(DECODE, "full_row")
    with pytest.raises(AssertionError, match="another engine"):
        TritonBatch(segments, (Arena(SPEC, 200), arenas[1]))
