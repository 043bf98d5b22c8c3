"""The repeatable decode step: what a step made anew does, to the bit, from static tensors, and nothing of it is read meanwhile."""

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sparsevila_cluster.attention import triton_backend
from sparsevila_cluster.attention.interface import Segment
from sparsevila_cluster.attention.triton_backend import TritonBatch
from sparsevila_cluster.core.config import build_config
from sparsevila_cluster.engine import cuda_graph
from sparsevila_cluster.engine.cuda_graph import DecodeGraphs, bucket_sizes
from sparsevila_cluster.engine.model_runner import ModelRunner, can_capture
from sparsevila_cluster.kvcache.arena import Arena
from sparsevila_cluster.models import load_model
from sparsevila_cluster.models.text import lean_kernels
from tests.checkpoints.tiny_qwen2_5_vl import make_qwen2_5_vl

# (pool of the body, its rows, rows of the tail before this one)
TURNS = [(0, 40, 3), (1, 9, 0), (1, 1, 17), (0, 40, 1), (1, 12, 6)]
MOST = 4


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_qwen2_5_vl(tmp_path_factory.mktemp("tiny"), seed=0, layers=2, hidden=64)


@pytest.fixture(scope="module")
def model(directory):
    return load_model(directory, device="cpu", attention="triton")


def arenas_of(spec, device="cpu", seed=0):
    """Arenas full of noise: a step that reads a wrong slot shows."""
    arenas = Arena(spec, 64, device), Arena(spec, 200, device)
    noise = torch.Generator().manual_seed(seed)
    for arena in arenas:
        for tensor in (arena.k_all, arena.v_all):
            tensor.copy_(torch.randn(tensor.shape, generator=noise))
    return arenas


def segments_in(arenas, turns):
    """Decode rows of turns: ids, positions, segments. Turns over the prefix arena share one prefix."""
    prefix, segments = arenas[0].alloc(40), []
    for i, (pool, length, past) in enumerate(turns):
        home = arenas[1].alloc(length) if pool else prefix
        tail = arenas[1].alloc(past + 3)
        segments.append(Segment(i, 1, home.spans(), home, tail.spans(), tail.start, past))
    ids = [(7 * i + 3) % 50 for i in range(len(turns))]
    return ids, [60 + 5 * i for i in range(len(turns))], segments


def made_anew(model, arenas, ids, positions, segments):
    text = model.text
    rows = torch.tensor(positions, device=model.device).expand(text.num_position_rows, -1)
    with torch.inference_mode():
        hidden = text.forward(text.embed(torch.tensor(ids, device=model.device)), rows, TritonBatch(segments, arenas))
        return text.logits(hidden)


def kv_of(arenas):
    return [t.clone() for arena in arenas for t in (arena.k_all, arena.v_all)]


def test_buckets_cover_every_batch():
    for most in range(1, 40):
        sizes = bucket_sizes(most)
        assert sizes == sorted(set(sizes)) and sizes[-1] == most and sizes[0] == 1
        assert all(b <= 2 * a for a, b in zip(sizes, sizes[1:], strict=False))


@pytest.mark.parametrize("num", [1, 2, 3])
def test_it_does_what_a_step_made_anew_does(num, model):
    """To the bit where the bucket is not larger than the step: a product of more rows may be summed in another order."""
    repeated, anew = arenas_of(model.spec), arenas_of(model.spec)
    graphs = DecodeGraphs(model, repeated, MOST, capture=False)
    rows, other_rows = segments_in(repeated, TURNS[:num]), segments_in(anew, TURNS[:num])
    for _ in range(2):
        assert graphs.can_run(rows[2])
        logits, argmax_ids = graphs.run(*rows)
        want = made_anew(model, anew, *other_rows)
        atol = 0.0 if num in bucket_sizes(MOST) else 1e-4
        torch.testing.assert_close(logits, want, atol=atol, rtol=0)
        assert argmax_ids.tolist() == logits.argmax(-1).tolist() == want.argmax(-1).tolist()
        for one, other in zip(kv_of(repeated), kv_of(anew), strict=True):
            torch.testing.assert_close(one, other, atol=atol, rtol=0)
        ids = argmax_ids.tolist()
        rows, other_rows = go_on(ids, rows), go_on(ids, other_rows)


def go_on(ids, rows):
    _, positions, segments = rows
    for s in segments:
        s.past += 1
    return ids, [p + 1 for p in positions], segments


def test_only_rows_of_its_own_turns_are_written(model):
    arenas = arenas_of(model.spec)
    graphs = DecodeGraphs(model, arenas, 8, capture=False)
    ids, positions, segments = segments_in(arenas, TURNS[:3])
    before = kv_of(arenas)
    graphs.run(ids, positions, segments)
    slots = sorted(s.tail_start + s.past for s in segments)
    for now, then, arena in zip(kv_of(arenas), before, (0, 0, 1, 1), strict=True):
        changed = (now != then).any(-1).any(-1).any(0).nonzero()[:, 0].tolist()
        assert changed == (slots if arena else [])


def test_what_it_takes(model):
    arenas = arenas_of(model.spec)
    graphs = DecodeGraphs(model, arenas, 4, capture=False)
    _, _, segments = segments_in(arenas, TURNS)
    assert graphs.can_run(segments[:4]) and not graphs.can_run(segments)
    segments[1].phase = "refresh"
    assert not graphs.can_run(segments[:4])


class Watching(TorchDispatchMode):
    """Notes every operation with the shapes that come out of it, and refuses those whose shape or value the host would read."""

    REFUSED = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.REFUSED, f"{name} reads a value"
        out = func(*args, **(kwargs or {}))
        self.seen.append((str(func), [tuple(t.shape) for t in (out if isinstance(out, tuple | list) else [out])]))
        return out


@pytest.fixture
def shapes(monkeypatch):
    """Kernels know addresses only: what they give has the shapes of their results, and torch sees nothing of how."""

    def normed(x, weight, eps, residual=None, backend="auto"):
        return torch.zeros_like(x) if residual is None else (torch.zeros_like(x), torch.zeros_like(x))

    def turned(qkv, cos, sin, qk_norm, eps, k_arena, *args, **kwargs):
        num_rows, (_, num_kv_heads, head_dim) = len(qkv), k_arena.shape
        return qkv.new_zeros(num_rows, qkv.shape[1] // head_dim - 2 * num_kv_heads, head_dim)

    monkeypatch.setattr(triton_backend, "decode_attention", lambda q, *args, **kwargs: torch.zeros_like(q))
    monkeypatch.setattr(lean_kernels, "rms_norm", normed)
    monkeypatch.setattr(lean_kernels, "rope_write", turned)
    monkeypatch.setattr(lean_kernels, "silu_mul", lambda x, **kwargs: x.new_zeros(len(x), x.shape[1] // 2))


def test_every_step_is_the_same_operations(model, shapes):
    """Whatever the turns: nothing has a shape that depends on data, and one copy brings all that a step needs."""
    arenas = arenas_of(model.spec)
    graphs = DecodeGraphs(model, arenas, 4, capture=False)
    seen = []
    for turns in (TURNS[:3], TURNS[1:4], TURNS[2:]):
        rows = segments_in(emptied(arenas), turns)
        with Watching() as watching:
            graphs.run(*rows)
        seen.append(watching.seen)
    assert seen[0] == seen[1] == seen[2]
    assert [name for name, _ in seen[0]].count("aten.copy_.default") == 1


def emptied(arenas):
    for arena in arenas:
        arena._free, arena._used = [(0, arena.num_slots)], {}
    return arenas


def test_the_host_reads_nothing(model, shapes):
    """Over tensors without values, reading one fails."""
    arenas = arenas_of(model.spec)
    graphs = DecodeGraphs(model, arenas, 4, capture=False)
    rows = segments_in(arenas, TURNS[:3])
    with FakeTensorMode(allow_non_fake_inputs=True):
        logits, argmax_ids = graphs.run(*rows)
        assert logits.shape == (3, model.text.head_weight.shape[0]) and argmax_ids.shape == (3,)
        with pytest.raises(DataDependentOutputException):
            argmax_ids[0].item()  # the trap bites


def test_where_a_capture_fails_steps_go_on_without(model, monkeypatch, caplog):
    tried, current = [], ["the caller's"]

    def capture(bucket, pool, stream):
        tried.append(bucket.size)
        bucket._graph = "a graph that nobody may replay"
        if bucket.size == 2:
            current[0] = stream  # as torch.cuda.graph leaves it when ending the capture raises
            raise RuntimeError("out of memory")

    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: current.__setitem__(0, stream))
    monkeypatch.setattr(cuda_graph._Bucket, "capture", capture)
    arenas = arenas_of(model.spec)
    graphs = DecodeGraphs(model, arenas, MOST, capture=True)
    assert tried == [4, 2], "the largest first"
    assert not graphs.captured and "out of memory" in caplog.text
    assert current == ["the caller's"]
    logits, _ = graphs.run(*segments_in(arenas, TURNS[:1]))
    assert logits.isfinite().all()


def test_when_steps_are_repeated(model, directory):
    plain = load_model(directory, device="cpu", attention="torch")
    stock = load_model(directory, device="cpu", text_backend="hf", attention="triton")
    assert can_capture(model) and not can_capture(plain) and not can_capture(stock)
    config = build_config(model="unused")
    assert all(ModelRunner(m, arenas_of(m.spec), config).graphs is None for m in (model, plain, stock)), "a CPU captures nothing"


@pytest.mark.gpu
@pytest.mark.parametrize("num", [1, 2, 3, 5])
def test_a_graph_does_what_its_step_does(num, directory):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = load_model(directory, device="cuda", attention="triton")
    held, anew = arenas_of(model.spec, "cuda"), arenas_of(model.spec, "cuda")
    graphs = DecodeGraphs(model, held, 5, capture=True)
    plain = DecodeGraphs(model, anew, 5, capture=False)
    assert graphs.captured and not plain.captured
    for one, other in zip(held, anew, strict=True):
        other.k_all.copy_(one.k_all)  # warming up wrote to slot 0
        other.v_all.copy_(one.v_all)
    rows, other_rows = segments_in(held, TURNS[:num]), segments_in(anew, TURNS[:num])
    for _ in range(4):
        logits, argmax_ids = graphs.run(*rows)
        want, _ = plain.run(*other_rows)
        ids = argmax_ids.tolist()
        assert torch.equal(logits, want) and all(torch.equal(a, b) for a, b in zip(kv_of(held), kv_of(anew), strict=True))
        rows, other_rows = go_on(ids, rows), go_on(ids, other_rows)
