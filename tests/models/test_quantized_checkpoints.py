"""Quantized checkpoints of every family, way of naming, form and way to run: the same logits as their plain twins."""

import gc

import pytest
import torch

from sparsevila_cluster.models import DECODE_PARTS, PREFILL_PARTS, load_model
from sparsevila_cluster.models.checkpoint import Checkpoint
from sparsevila_cluster.models.loading.device_placement import runs_as_stored
from sparsevila_cluster.models.loading.text_only import load_text
from sparsevila_cluster.models.text.linear import AwqLinear, AwqMatrix, DenseMatrix
from sparsevila_kernels import AwqWeight
from tests.checkpoints import tiny_qwen2_5_vl
from tests.checkpoints.families import FAMILIES
from tests.models.quantized_files import (
    as_awq,
    as_pack_quantized,
    config_of,
    in_layers,
    pack_config,
    plain_twin,
    rewrite,
    weights_of,
)
from tests.models.test_loader import read_names
from tests.models.test_text_backends import CausalBatch

IDS = torch.arange(40) * 11 % 200
FAST_CPU = runs_as_stored("auto", torch.device("cpu"), torch.bfloat16)


def logits_of(model, kv_only=False):
    """Teacher-forced logits of 40 tokens of text; with kv_only their KV."""
    batch, positions = CausalBatch(), torch.arange(len(IDS)).expand(model.text.num_position_rows, -1)
    with torch.inference_mode():
        hidden = model.text.forward(model.text.embed(IDS), positions, batch, kv_only=kv_only)
        return batch if kv_only else model.text.logits(hidden)


def far(got, expected):
    return float((got.float() - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def awq(tmp_path_factory):
    """A quantized checkpoint in the published layout, and its plain twin."""
    root = tmp_path_factory.mktemp("awq")
    directory = as_awq(tiny_qwen2_5_vl.make_qwen2_5_vl(root / "fp"), root / "awq", modules_to_not_convert=["visual"])
    return directory, plain_twin(directory, root / "twin")


@pytest.fixture(scope="module")
def expected(awq):
    return logits_of(load_model(awq[1], device="cpu"))


@pytest.mark.parametrize("layout", ["hub", "modern"])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_and_naming_equals_its_twin(tmp_path, name, layout):
    directory = as_awq(FAMILIES[name].make(tmp_path / "fp", layout=layout), tmp_path / "awq", shards=3)
    model = load_model(directory, device="cpu", dtype="float32")
    twin = load_model(plain_twin(directory, tmp_path / "twin"), device="cpu")
    torch.testing.assert_close(logits_of(model), logits_of(twin), atol=1e-4, rtol=0)
    kind = "image" if name == "llava_next" else "video"
    inputs = [[m.family.patchify(tiny_qwen2_5_vl.media(kind))] for m in (model, twin)]
    assert torch.equal(model.family.encode(inputs[0]).embeds, twin.family.encode(inputs[1]).embeds)


@pytest.mark.parametrize("backend", ["lean", "hf"])
def test_float32_is_exact(awq, expected, backend):
    model = load_model(awq[0], device="cpu", dtype="float32", text_backend=backend)
    torch.testing.assert_close(logits_of(model), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", ["lean", "hf"])
def test_bfloat16_is_as_near_as_a_plain_model_in_bfloat16(awq, expected, backend):
    """Four bits as they are stored add less to the error than bfloat16 makes anyway."""
    plain = logits_of(load_model(awq[1], device="cpu", dtype="bfloat16", text_backend=backend))
    stored = load_model(awq[0], device="cpu", text_backend=backend)
    dequantized = load_model(awq[0], device="cpu", text_backend=backend, quantization="none")
    assert stored.spec.dtype == dequantized.spec.dtype == torch.bfloat16
    assert torch.equal(logits_of(dequantized), plain)
    assert 0 < far(logits_of(stored), expected) < 1.5 * far(plain, expected) < 0.15


@pytest.mark.skipif(not FAST_CPU, reason="only a CPU with AVX-512 runs 4 bits as they are stored")
def test_auto_keeps_four_bits_and_none_does_not(awq):
    stored, plain = (load_model(awq[0], device="cpu", quantization=form) for form in ("auto", "none"))
    assert {type(layer.qkv) for layer in stored.text._layers} == {AwqMatrix}
    assert {type(matrix) for layer in plain.text._layers for matrix in (layer.qkv, layer.gate_up, layer.down)} == {DenseMatrix}
    num_weights = sum(t.numel() for name, t in weights_of(awq[1]).items() if in_layers(name))
    others = plain.weight_bytes - 2 * num_weights
    assert 0.5 * num_weights < stored.weight_bytes - others < 1.2 * num_weights
    assert stored.fingerprint == plain.fingerprint == Checkpoint.open(awq[0]).fingerprint()
    assert stored.spec == plain.spec, "one model: their KV may meet"


@pytest.mark.skipif(not FAST_CPU, reason="only a CPU with AVX-512 runs 4 bits as they are stored")
def test_modules_of_transformers_are_replaced_where_the_files_are_quantized(awq):
    model = load_model(awq[0], device="cpu", text_backend="hf")
    found = [name for name, module in model.text.modules.named_modules() if isinstance(module, AwqLinear)]
    assert len(found) == 3 * 7 and all("_proj" in name for name in found)
    assert not any(isinstance(module, AwqLinear) for module in model.family._tower.modules())


@pytest.mark.parametrize("backend", ["lean", "hf"])
def test_kv_alone_is_the_kv(awq, backend):
    model = load_model(awq[0], device="cpu", text_backend=backend)
    short, full = logits_of(model, kv_only=True), CausalBatch()
    with torch.inference_mode():
        model.text.forward(model.text.embed(IDS), torch.arange(len(IDS)).expand(3, -1), full)
    for layer in range(3):
        assert far(short.k[layer], full.k[layer].float()) < 0.01 and far(short.v[layer], full.v[layer].float()) < 0.01


@pytest.mark.parametrize("parts", [PREFILL_PARTS, DECODE_PARTS])
def test_only_wanted_parts_are_read(monkeypatch, awq, parts):
    model, seen = read_names(monkeypatch, awq[0], parts)
    assert any("visual." in name for name in seen) == ("vision" in parts)
    assert sum(name.endswith(".qweight") for name in seen) == sum(name.endswith(".qzeros") for name in seen) == 21
    assert len(seen) == len(set(seen)) and model.parts == parts


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("layout", ["hub", "modern"])
def test_pack_quantized_equals_its_twin(tmp_path, layout, symmetric):
    source = tiny_qwen2_5_vl.make_qwen2_5_vl(tmp_path / "fp", layout=layout)
    directory, plain = as_pack_quantized(source, tmp_path / "packed", symmetric)
    twin = load_model(rewrite(source, tmp_path / "twin", plain, None), device="cpu")
    expected = logits_of(twin)
    torch.testing.assert_close(logits_of(load_model(directory, device="cpu", dtype="float32")), expected, atol=1e-4, rtol=0)
    assert far(logits_of(load_model(directory, device="cpu")), expected) < 0.03


@pytest.mark.parametrize("order", [None, "weight"])
def test_pack_quantized_with_inputs_in_their_own_order(tmp_path, order):
    source = tiny_qwen2_5_vl.make_qwen2_5_vl(tmp_path / "fp", layers=1)
    directory, plain = as_pack_quantized(source, tmp_path / "packed", True)
    weights = weights_of(directory)
    for name in [name for name in weights if name.endswith("weight_packed")]:
        weights[name.replace("packed", "g_idx")] = torch.arange(weights[name].shape[1] * 8, dtype=torch.int32) // 32
    indexed = rewrite(directory, tmp_path / "indexed", weights, pack_config(True, actorder=order))
    got, expected = (logits_of(load_model(d, device="cpu", dtype="float32")) for d in (indexed, directory))
    assert torch.equal(got, expected)


def test_what_gptqmodel_writes(tmp_path):
    """bfloat16 scales and more keys; its scales are cast, so they mean other weights than float16 ones."""
    keys = {"format": "gemm", "checkpoint_format": "gemm", "desc_act": False, "lm_head": False, "meta": {"quantizer": "gptqmodel"}}
    directory = as_awq(tiny_qwen2_5_vl.make_qwen2_5_vl(tmp_path / "fp"), tmp_path / "awq", dtype=torch.bfloat16, **keys)
    twin = load_model(plain_twin(directory, tmp_path / "twin"), device="cpu")
    torch.testing.assert_close(logits_of(load_model(directory, device="cpu", dtype="float32")), logits_of(twin), atol=1e-4, rtol=0)


@pytest.mark.parametrize("spared", ["self_attn.k_proj", "mlp", "layers.1", "down_proj"])
@pytest.mark.parametrize("backend", ["lean", "hf"])
def test_some_linears_may_be_spared(tmp_path, spared, backend):
    """Where one of q, k and v is plain, the fused product is."""

    def wanted(name):
        return in_layers(name) and spared not in name

    source = tiny_qwen2_5_vl.make_qwen2_5_vl(tmp_path / "fp")
    directory = as_awq(source, tmp_path / "awq", wanted=wanted, modules_to_not_convert=["visual", spared])
    expected = logits_of(load_model(plain_twin(directory, tmp_path / "twin"), device="cpu"))
    got = logits_of(load_model(directory, device="cpu", dtype="float32", text_backend=backend))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert far(logits_of(load_model(directory, device="cpu", text_backend=backend)), expected) < 0.15


def test_one_group_for_all_inputs(tmp_path):
    def one_width(name):
        return in_layers(name) and "down_proj" not in name

    keys = {"wanted": one_width, "modules_to_not_convert": ["down_proj"]}
    source = tiny_qwen2_5_vl.make_qwen2_5_vl(tmp_path / "fp")
    directory = as_awq(source, tmp_path / "awq", group=64, **keys)
    whole = rewrite(directory, tmp_path / "whole", weights_of(directory), {**config_of(directory), "group_size": -1})
    got, expected = (logits_of(load_model(d, device="cpu", dtype="float32")) for d in (whole, directory))
    assert torch.equal(got, expected)


def test_groups_that_no_fast_product_of_a_cpu_takes_become_plain(tmp_path):
    directory = as_awq(tiny_qwen2_5_vl.make_qwen2_5_vl(tmp_path / "fp"), tmp_path / "awq", group=16)
    model, plain = (load_model(directory, device="cpu", dtype="bfloat16", quantization=form) for form in ("auto", "none"))
    assert {type(layer.down) for layer in model.text._layers} == {DenseMatrix} and model.weight_bytes == plain.weight_bytes
    assert torch.equal(logits_of(model), logits_of(plain))


@pytest.mark.skipif(not FAST_CPU, reason="only a CPU with AVX-512 runs 4 bits as they are stored")
def test_weights_are_held_once(awq):
    """What was read for q, k and v is gone when the fused matrix stands."""

    def held():
        gc.collect()
        return sum(type(one) is AwqWeight for one in gc.get_objects())

    before = held()
    model = load_model(awq[0], device="cpu")
    assert held() - before == 4 * len(model.text._layers)


TEXT = {
    "vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.15,
}  # fmt: skip


@pytest.mark.parametrize("backend", ["lean", "hf"])
@pytest.mark.parametrize(
    "model_type,extra", [("llama", {}), ("mistral", {"sliding_window": None}), ("qwen2", {}), ("qwen3", {"head_dim": 32})]
)
def test_language_models_alone(tmp_path, model_type, extra, backend):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**TEXT, **extra)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "fp")
    directory = as_awq(tmp_path / "fp", tmp_path / "awq")
    stock = AutoModelForCausalLM.from_pretrained(str(plain_twin(directory, tmp_path / "twin")), dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = stock(IDS[None]).logits[0]
    model = load_text(directory, device="cpu", dtype="float32", text_backend=backend)
    assert model.text.name == backend and model.tokenizer is None and model.max_position == 256
    torch.testing.assert_close(logits_of(model), expected, atol=1e-4, rtol=0)
