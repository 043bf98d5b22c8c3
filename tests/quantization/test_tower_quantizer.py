"""The vision tower in 8 bits: what is stored, how near its tokens stay, and when it is refused."""

import json

import pytest
import torch

from sparsevila_cluster.core.errors import BadCheckpoint, BadRequest
from sparsevila_cluster.models import load_model
from sparsevila_cluster.models.loading.originals import open_original
from sparsevila_cluster.models.text.linear import Int8Linear
from sparsevila_cluster.quantization.job import quantize_checkpoint
from sparsevila_cluster.quantization.tower_quantizer import MAX_ROWS, TowerWatch, quantize_tower
from tests.checkpoints.families import FAMILIES
from tests.models.quantized_files import weights_of
from tests.quantization.quantization_subjects import dialogue, settings, texts

OUTSIDE_BLOCKS = ("patch_embed", "merger", "projector", "embeddings", "head", "newline", "pos_embed")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_linear_of_the_blocks_and_nothing_else_is_in_8_bits(name, tmp_path):
    source, target = FAMILIES[name].make(tmp_path / "source"), tmp_path / "target"
    original = load_model(source, device="cpu")
    kinds = list(original.family.slots(original.config))
    outcome = quantize_checkpoint(source, target, [*texts(1), *map(dialogue, kinds)], settings(vision="w8a8"))
    before, after = weights_of(source), weights_of(target)
    bases = {key.removesuffix(".weight_scale") for key in after if key.endswith(".weight_scale")}
    assert len(bases) == outcome.num_tower_linears > 0
    assert not any(part in base for base in bases for part in OUTSIDE_BLOCKS)
    for base in bases:
        weight, values, scales = before[f"{base}.weight"], after[f"{base}.weight"], after[f"{base}.weight_scale"]
        assert values.dtype == torch.int8 and values.shape == weight.shape and scales.shape == (len(weight), 1)
        smooth = after.get(f"{base}.smooth", torch.ones(weight.shape[1]))
        assert ((values * scales / smooth - weight).abs() <= 0.501 * scales / smooth).all()
    assert json.loads((target / "config.json").read_text())["quantization_config"]["vision"]["scheme"] == "w8a8"
    # Unseen media through the integer path.
    inputs = [original.family.patchify(dialogue(kinds[0], seed=7).media[0])]
    model = load_model(target, device="cpu")
    got, true = (one.family.encode(inputs).embeds.float() for one in (model, original))
    assert (got - true).norm() < 0.05 * true.norm()


def test_the_integer_path_really_runs(vl, tmp_path, monkeypatch):
    quantize_checkpoint(vl, tmp_path / "target", [dialogue()], settings(vision="w8a8"))
    calls, real = [], Int8Linear.forward
    monkeypatch.setattr(Int8Linear, "forward", lambda self, x: calls.append(x.shape) or real(self, x))
    model = load_model(tmp_path / "target", device="cpu")
    model.family.encode([model.family.patchify(dialogue().media[0])])
    if not calls:
        pytest.skip("this CPU runs plain weights")
    assert len(calls) % 20 == 0  # qkv, proj, gate, up and down of four blocks


def test_outliers_in_one_channel_are_smoothed_away():
    torch.manual_seed(0)
    linear, rows = torch.nn.Linear(48, 32), torch.randn(300, 48)
    rows[:, 5] *= 100
    with TowerWatch({"a": linear}) as watch, torch.inference_mode():
        for part in rows.split(50):
            linear(part.view(5, 10, 48))
    assert torch.equal(watch.reach["a"], rows.abs().amax(0))
    found = quantize_tower({"a": linear}, watch, 0.5)
    assert found["a.smooth"][5] > 3 * found["a.smooth"].median()
    linear(rows)
    assert sum(map(len, watch.rows["a"])) == 300, "outside of the block nothing is looked at"


def test_memory_for_rows_is_bounded():
    linear = torch.nn.Linear(8, 8)
    with TowerWatch({"a": linear}) as watch, torch.inference_mode():
        for _ in range(100):
            linear(torch.randn(500, 8))
    assert sum(map(len, watch.rows["a"])) <= MAX_ROWS + 100


def test_without_media_there_is_nothing_to_judge_by(vl, tmp_path):
    with pytest.raises(BadRequest, match="--vision none"):
        quantize_checkpoint(vl, tmp_path / "target", texts(), settings(vision="w8a8"))
    with pytest.raises(BadRequest, match="--vision none"):
        quantize_tower({"a": torch.nn.Linear(8, 8)}, TowerWatch({}), 0.5)


def test_a_broken_tower_is_named(vl):
    original = open_original(vl, device="cpu")
    name, linear = next(iter(original.tower.items()))
    with TowerWatch({name: linear}) as watch, torch.inference_mode():
        linear(torch.randn(4, linear.in_features))
        linear.weight.data[0, 0] = torch.inf
        with pytest.raises(BadCheckpoint, match=rf"{name}\.weight' holds values"):
            quantize_tower({name: linear}, watch, 0.5)
        linear.weight.data[0, 0] = 0
        linear(torch.full((4, linear.in_features), torch.nan))
    with pytest.raises(BadCheckpoint, match="calibration gives values"):
        quantize_tower({name: linear}, watch, 0.5)
