"""The engine with the kernels says what it says with torch: tokens, logits, text KV and choices, through Triton's interpreter.

The interpreter is slow: few layers, short answers, everything in one batch where it can be.
"""

import asyncio
import inspect
from dataclasses import dataclass, field

import pytest
import torch

from sparsevila_cluster.core.config import EngineConfig, build_config
from sparsevila_cluster.core.errors import BadConfig
from sparsevila_cluster.core.requests import SamplingParams, Turn
from sparsevila_cluster.engine.cuda_graph import DecodeGraphs
from sparsevila_cluster.engine.local_pipeline import LocalPipeline
from sparsevila_cluster.models import load_model
from sparsevila_cluster.models.loading.device_placement import resolve_attention
from tests.checkpoints.tiny_qwen2_5_vl import make_qwen2_5_vl
from tests.checkpoints.transformers_oracle import Bench, random_media
from tests.engine.single_turn_reference import recorded_logits

ATOL = 1e-4
ASKED = [
    # step at which it is asked, media, conversation, question, tokens, sampling
    (0, "m0", "a", "where?", 3, {}),
    (1, "m1", "b", "why?", 4, {"temperature": 0.9, "seed": 4}),
    (5, "m0", "a", "and?", 2, {}),
]
CASES = {
    "dense": {"retrieve": "retrieve_all"},
    "visual, question in parts, preempted": {
        "retrieve_keep": 0.3, "normalise": "visual", "max_step_tokens": 12, "max_batch": 1, "slice_steps": 2,
    },
    "mass and refresh": {"retrieve_mass": 0.5, "refresh_every": 2, "retrieve_rows": "question"},
}  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_qwen2_5_vl(tmp_path_factory.mktemp("tiny"), seed=0, layers=2, hidden=32)


@pytest.fixture(scope="module")
def models(directory):
    models = {name: load_model(directory, device="cpu", attention=name) for name in ("torch", "triton")}
    for model in models.values():
        model.chat.eos_ids = frozenset()
    return models


@dataclass
class Told:
    """What an engine said and kept: per turn its tokens and logits, per conversation the KV of its text."""

    tokens: dict[str, list[int]] = field(default_factory=dict)
    logits: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    tails: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    retrieved: dict[str, int] = field(default_factory=dict)
    num_preempted: int = 0
    num_repeated: int = 0
    captured: bool = False


def play(model, asked=ASKED, repeats=False, **fields):
    """ASKED, in an engine of its own; repeats: decode steps by the step that a graph would hold, not captured."""
    size = model.spec.bytes_per_token
    b = Bench(model, build_config(model="unused", prune_keep=0.6, prefix_bytes=100 * size, turn_bytes=400 * size, **fields))
    for i in range(2):
        b.prefix(random_media("video", 2 + 2 * i, 56, 84, seed=i), key=f"m{i}")
    told, events, samplers, decode = Told(), {}, {}, b.decode
    if repeats:
        decode.runner.graphs = DecodeGraphs(model, (decode.prefixes.arena, decode.conversations.arena), 4, capture=False)
        plain = decode.runner.graphs.run

        def step(*args):
            told.num_repeated += 1
            return plain(*args)

        decode.runner.graphs.run = step
    waiting, num = list(asked), 0
    with recorded_logits() as heard:
        while waiting or not decode.idle:
            while waiting and (waiting[0][0] <= num or decode.idle):
                _, media, name, question, count, options = waiting.pop(0)
                sampling = SamplingParams(max_tokens=count, **options)
                turn = Turn(f"{name}/{question}", name, media, question, sampling)
                events[turn.turn_id] = heard_of = []
                decode.submit(turn, heard_of.append)
                samplers[turn.turn_id] = decode.turns[turn.turn_id].sampler
            decode.step()
            decode.check_integrity()
            num += 1
    for name, said in events.items():
        assert not isinstance(said[-1], Exception), said[-1]
        told.tokens[name] = [t for e in said for t in e.token_ids]
        told.logits[name] = heard[samplers[name]]
        told.retrieved[name] = said[-1].usage.visual_tokens_retrieved
    for name in {turn[2] for turn in asked}:
        state = decode.conversations.get(name)
        if state.extent is not None:
            told.tails[name] = [rows[: state.length].clone() for i in range(model.spec.num_layers) for rows in state.extent.rows(i)]
    told.num_preempted = decode.scheduler.num_preempted
    told.captured = decode.runner.graphs is not None and decode.runner.graphs.captured
    return told


def assert_same(one, other, atol=ATOL):
    assert one.tokens == other.tokens and one.retrieved == other.retrieved
    for name, logits in one.logits.items():
        torch.testing.assert_close(torch.stack(other.logits[name]).cpu(), torch.stack(logits), atol=atol, rtol=0)
    for name in one.tails.keys() & other.tails.keys():
        for rows, others in zip(one.tails[name], other.tails[name], strict=True):
            torch.testing.assert_close(others.cpu(), rows, atol=atol, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_kernels_say_what_torch_says(case, models):
    want, got = play(models["torch"], **CASES[case]), play(models["triton"], **CASES[case])
    assert_same(want, got)
    assert [len(tokens) for tokens in got.tokens.values()] == [asked[4] for asked in ASKED]
    assert (got.num_preempted > 0) == (want.num_preempted > 0) == ("preempted" in case)
    assert len(want.tails) == len(got.tails) == 2


def test_a_repeated_step_says_what_torch_says(models):
    """Beside a neighbour that samples."""
    fields = {"retrieve_keep": 0.3, "asked": ASKED[:2]}
    want, got = play(models["torch"], **fields), play(models["triton"], repeats=True, **fields)
    assert_same(want, got)
    assert got.num_repeated > 2


@pytest.mark.gpu
@pytest.mark.parametrize("decode_graphs", ["auto", "none"])
@pytest.mark.parametrize("case", CASES)
def test_a_gpu_says_what_a_cpu_says(case, decode_graphs, directory, models):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    model = load_model(directory, device="cuda", dtype="float32")
    model.chat.eos_ids = frozenset()
    assert model.attention == "triton"
    want, got = play(models["torch"], **CASES[case]), play(model, decode_graphs=decode_graphs, **CASES[case])
    assert_same(want, got, atol=1e-3)
    assert got.captured == (decode_graphs == "auto")


def test_kernels_under_the_modules_of_transformers(directory, models):
    model = load_model(directory, device="cpu", text_backend="hf", attention="triton")
    model.chat.eos_ids = frozenset()
    fields = {"retrieve_keep": 0.3, "asked": ASKED[:1]}
    assert_same(play(models["torch"], **fields), play(model, **fields))


def test_the_configuration_says_all_that_loading_needs(directory):
    takes = set(inspect.signature(load_model).parameters) - {"directory", "parts"}
    assert set(EngineConfig().loading) == takes
    config = build_config(model=str(directory), device="cpu", attention="triton", prefix_bytes=10**6, turn_bytes=10**6)
    pipeline = LocalPipeline(config)
    try:
        assert pipeline.model.attention == "triton" and pipeline.decode.engine.runner.graphs is None
    finally:
        asyncio.run(pipeline.close())


def test_what_computes_is_resolved_once(monkeypatch, directory):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert resolve_attention("auto", cpu) == "torch" and resolve_attention("auto", gpu) == "triton"
    assert resolve_attention("torch", gpu) == "torch" and resolve_attention("triton", cpu) == "triton"
    monkeypatch.setattr("sparsevila_cluster.models.loading.device_placement.INTERPRETED", False)
    with pytest.raises(BadConfig, match="TRITON_INTERPRET"):
        load_model(directory, device="cpu", attention="triton")
    assert resolve_attention("triton", gpu) == "triton"
    monkeypatch.setattr("sparsevila_cluster.models.loading.device_placement.HAS_TRITON", False)
    assert resolve_attention("auto", gpu) == "torch"
    with pytest.raises(BadConfig, match="not installed"):
        resolve_attention("triton", gpu)
    with pytest.raises(BadConfig, match="'flash'"):
        load_model(directory, device="cpu", attention="flash")
