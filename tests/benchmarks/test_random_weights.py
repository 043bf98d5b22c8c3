"""Checkpoints that are made where they are wanted: the same numbers dense and in 4 bits, loaded like any other."""

import math

import pytest
import torch

from benchmarks.lib.engine_pair import EnginePair, endless
from benchmarks.lib.flop_counts import TextShape, four_bit_width
from benchmarks.lib.gpu_engine import TOY
from benchmarks.lib.midsize_checkpoint import make_media
from benchmarks.lib.random_weights import FILE, SEVEN_B, RandomCheckpoint
from sparsevila_cluster.models import load_model
from sparsevila_kernels import awq_format

RECIPE, GROUP = TOY.recipe, TOY.group_size
CPU = torch.device("cpu")
DOWN = "model.language_model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random")
    return {group: RandomCheckpoint.make(RECIPE, folder / str(group), "F32", group) for group in (0, GROUP)}


def test_both_hold_the_same_numbers(checkpoints):
    _, dense = next(checkpoints[0].read([f"{DOWN}.weight"], CPU))
    words = dict(checkpoints[GROUP].read([f"{DOWN}.{leaf}" for leaf in ("scales", "qzeros", "qweight")], CPU))
    qweight, qzeros, scales = (words[f"{DOWN}.{leaf}"] for leaf in ("qweight", "qzeros", "scales"))
    again = awq_format.dequantize_gemm(qweight, qzeros, scales, GROUP, torch.float32).t()
    step = scales.float().t().repeat_interleave(GROUP, 1)
    assert dense.std() > 0 and ((again - dense).abs() <= 1.02 * step / 2 + 1e-4).float().mean() > 0.99
    for name, tensor in words.items():
        assert tuple(tensor.shape) == checkpoints[GROUP].shards[FILE].shapes[name]


def test_every_tensor_is_repeatable_and_its_own(checkpoints):
    names = [f"model.language_model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]
    first, second = (dict(checkpoints[0].read(names, CPU)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in names) and not torch.equal(*first.values())
    assert checkpoints[0].fingerprint() != checkpoints[GROUP].fingerprint()


def test_they_load_and_answer(checkpoints):
    for group, checkpoint in checkpoints.items():
        model = load_model(checkpoint, device="cpu", dtype="float32")
        with endless(model):
            session = EnginePair(model, "sparse", 80, 1).run_session(make_media(4, RECIPE.frame_px), 5)
        assert len(session.tokens) == 5, group


def test_the_large_one_has_the_published_sizes(tmp_path):
    checkpoint = RandomCheckpoint.make(SEVEN_B, tmp_path, group_size=128)
    dense = RandomCheckpoint.make(SEVEN_B, tmp_path).shards[FILE].shapes
    assert round(sum(map(math.prod, dense.values())) / 1e9, 2) == 8.29  # as on its card: 7.6 B of text, 0.68 B of vision
    shapes = checkpoint.shards[FILE].shapes
    assert shapes["model.language_model.layers.27.mlp.gate_proj.qweight"] == (3584, 18944 // 8)
    assert "lm_head.weight" in shapes and "model.visual.blocks.31.mlp.down_proj.weight" in shapes
    assert not list(tmp_path.glob("*.safetensors"))


def test_bounds_count_the_bytes_of_4_bits(checkpoints):
    width = four_bit_width(GROUP)
    leaves = {"qweight": 4, "qzeros": 4, "scales": 2}
    mine = {name: shape for name, shape in checkpoints[GROUP].shards[FILE].shapes.items() if ".layers.0." in name}
    stored = sum(math.prod(shape) * leaves.get(name.rpartition(".")[2], 0) for name, shape in mine.items())
    model = load_model(checkpoints[0], device="cpu", dtype="float32")
    plain, quantised = TextShape.of(model.config), TextShape.of(model.config, 4, width)
    assert stored == plain.layer_weights * width
    saved = plain.step(1, 10).bytes - quantised.step(1, 10).bytes
    assert saved == plain.num_layers * plain.layer_weights * (4 - width) and plain.step(1, 10).flop == quantised.step(1, 10).flop
