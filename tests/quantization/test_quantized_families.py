"""Every family quantized and loaded again: what is in 4 bits, what is left alone, and that the numbers are those on the disk."""

import json

import pytest
import torch

from sparsevila_cluster.models import load_model
from sparsevila_cluster.models.loading.text_only import load_text
from sparsevila_cluster.quantization.job import quantize_checkpoint
from tests.checkpoints.families import FAMILIES
from tests.models.quantized_files import as_awq, in_layers, plain_twin, weights_of
from tests.models.test_text_backends import CausalBatch
from tests.quantization.quantization_subjects import dialogue, make_text_model, settings, texts

IDS = torch.arange(40) * 37 % 250


def logits(model):
    positions = torch.arange(len(IDS)).expand(model.text.num_position_rows, -1)
    with torch.inference_mode():
        return model.text.logits(model.text.forward(model.text.embed(IDS), positions, CausalBatch()))


def check_near(load, source, target, tmp_path, group=64):
    """No worse than rounding to nearest, give or take: a scale that is folded in at one place only would be off by far more.

    Random weights are chaotic: 4 bits move their logits by half."""
    nearest = as_awq(source, tmp_path / "nearest", group)
    true, got, plain = (logits(load(one, device="cpu", dtype="float32")) for one in (source, target, nearest))
    assert 0 < (got - true).norm() < 1.2 * (plain - true).norm()


def check_stored(source, target):
    """All linears of decoder layers are in 4 bits under the names they had; nothing else but norms (and biases) has changed."""
    before, after = weights_of(source), weights_of(target)
    quantized = {name.removesuffix("qweight") for name in after if name.endswith(".qweight")}
    assert quantized == {name.removesuffix("weight") for name in before if in_layers(name)} and quantized
    new = {f"{base}{leaf}" for base in quantized for leaf in ("qweight", "qzeros", "scales")}
    assert set(after) == {name for name in before if not in_layers(name)} | new
    changed = [name for name in before if name in after and not torch.equal(before[name], after[name])]
    assert all("layernorm" in name or name.endswith("proj.bias") for name in changed)
    assert all(after[name].dtype == before[name].dtype for name in before if name in after)
    return changed


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_survives_the_round_trip(name, tmp_path):
    family = FAMILIES[name]
    source, target = family.make(tmp_path / "source"), tmp_path / "target"
    kinds = load_model(source, device="cpu").family.slots(load_model(source, device="cpu").config)
    materials = [*texts(2), *(dialogue(kind) for kind in kinds)]
    outcome = quantize_checkpoint(source, target, materials, settings())
    assert outcome.num_linears == 7 * load_model(source, device="cpu").spec.num_layers and outcome.group_size == 64
    check_stored(source, target)
    got = logits(load_model(target, device="cpu", dtype="float32"))
    twin = logits(load_model(plain_twin(target, tmp_path / "twin"), device="cpu", dtype="float32"))
    torch.testing.assert_close(got, twin, atol=1e-4, rtol=0)
    check_near(load_model, source, target, tmp_path)
    # The vision side is the original's, to the bit.
    inputs = [load_model(source, device="cpu").family.patchify(dialogue(next(iter(kinds))).media[0])]
    a, b = (load_model(one, device="cpu", dtype="float32").family.encode(inputs).embeds for one in (source, target))
    assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["qwen2", "llama", "mistral", "qwen3"])
def test_a_language_model_survives_the_round_trip(kind, dtype, tmp_path):
    source, target = make_text_model(tmp_path / "source", kind, dtype=dtype), tmp_path / "target"
    quantize_checkpoint(source, target, texts(), settings(group_size=32))
    changed = check_stored(source, target)
    assert changed, "norms that no scale was folded into would prove nothing"
    got = logits(load_text(target, device="cpu", dtype="float32"))
    twin = logits(load_text(plain_twin(target, tmp_path / "twin"), device="cpu", dtype="float32"))
    torch.testing.assert_close(got, twin, atol=1e-4, rtol=0)
    check_near(load_text, source, target, tmp_path, 32)


def test_heads_that_are_not_grouped_scale_the_output_projection_too(tmp_path):
    """With as many KV heads as heads, v takes the scale of o: its bias is stored anew."""
    source, target = make_text_model(tmp_path / "source", num_key_value_heads=4), tmp_path / "target"
    quantize_checkpoint(source, target, texts(), settings())
    assert any(name.endswith("v_proj.bias") for name in check_stored(source, target))
    check_near(load_text, source, target, tmp_path)


@pytest.mark.parametrize("layout,prefix", [("hub", ""), ("modern", "model.")])
def test_names_shards_and_other_files_are_the_sources_own(layout, prefix, tmp_path):
    source = FAMILIES["qwen2_5_vl"].make(tmp_path / "source", layout=layout, shards=3, tie=True)
    (source / "pytorch_model.bin").write_bytes(b"other weights")
    (source / "README.md").write_text("a card")
    target = tmp_path / "target"
    quantize_checkpoint(source, target, texts(), settings())
    check_stored(source, target)
    assert any(name.startswith(f"{prefix}visual.") for name in weights_of(target))
    names = {path.name for path in source.iterdir()}
    assert {path.name for path in target.iterdir()} == names - {"pytorch_model.bin"}
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(weights_of(target))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights_of(target).values())
    config = json.loads((target / "config.json").read_text())
    said = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text())
    assert said == {
        "quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": ["visual", "model.visual"],
    }  # fmt: skip
    assert torch.isfinite(logits(load_model(target, device="cpu"))).all()


def test_linears_that_are_kept_stay_plain(text_model, tmp_path):
    target = tmp_path / "target"
    quantize_checkpoint(text_model, target, texts(), settings(keep=("down_proj", "layers.0.self_attn.q_proj")))
    after = weights_of(target)
    plain = {name.removesuffix(".weight") for name in after if in_layers(name)}
    assert plain == {"model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj"}
    check_near(load_text, text_model, target, tmp_path)
