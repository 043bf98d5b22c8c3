"""quantization_config as tools write it, and every value that cannot be served refused by name."""

import pytest

from sparsevila_cluster.core.errors import BadCheckpoint
from sparsevila_cluster.models.loading.quantization_scheme import VISION_SECTION, Scheme, TextScheme, read_scheme

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm", "modules_to_not_convert": None}
WEIGHTS = {
    "num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True, "dynamic": False, "actorder": None,
    "block_structure": None, "observer": "minmax", "observer_kwargs": {},
}  # fmt: skip
GROUP = {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": None, "output_activations": None}
PACKED = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
    "config_groups": {"group_0": GROUP}, "ignore": ["lm_head", "re:visual.*"], "kv_cache_scheme": None, "sparsity_config": {},
    "transform_config": {}, "global_compression_ratio": None,
}  # fmt: skip


def read(**config):
    return read_scheme({"model_type": "qwen2", "quantization_config": config})


def packed(**weights):
    return {**PACKED, "config_groups": {"group_0": {**GROUP, "weights": {**WEIGHTS, **weights}}}}


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"text_config": {"hidden_size": 8}}])
def test_nothing_said(config):
    assert read_scheme(config) is None


@pytest.mark.parametrize(
    "config,expected",
    [
        (AWQ, TextScheme("gemm", 128)),
        ({**AWQ, "version": "GEMM", "modules_to_not_convert": ["visual"]}, TextScheme("gemm", 128, spared=("visual",))),
        ({**AWQ, "group_size": -1}, TextScheme("gemm", -1)),
        ({**AWQ, "format": "gemm", "checkpoint_format": "gemm", "desc_act": False, "meta": {}}, TextScheme("gemm", 128)),
        (PACKED, TextScheme("pack-quantized", 128, True, ("lm_head", "re:visual.*"))),
        (packed(symmetric=False, group_size=32), TextScheme("pack-quantized", 32, False, ("lm_head", "re:visual.*"))),
        (packed(actorder="weight"), TextScheme("pack-quantized", 128, True, ("lm_head", "re:visual.*"))),
    ],
)
def test_what_tools_write(config, expected):
    assert read(**config) == Scheme(expected, vision=False)
    inside = {"model_type": "llava", "text_config": {"quantization_config": config}}
    assert read_scheme(inside) == read_scheme({**inside, "quantization_config": config}) == Scheme(expected, vision=False)


def test_the_vision_section():
    assert read(**AWQ, vision=VISION_SECTION) == Scheme(TextScheme("gemm", 128), vision=True)
    assert read(vision=VISION_SECTION) == Scheme(None, vision=True)


@pytest.mark.parametrize(
    "config,words",
    [
        ("awq", ["'awq'", "object"]),
        ({}, ["quant_method None", "AutoAWQ", "compressed-tensors"]),
        ({"quant_method": "gptq", "bits": 4}, ["'gptq'", "supported: AutoAWQ"]),
        ({"quant_method": "fp8"}, ["'fp8'"]),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ["'bitsandbytes'"]),
        ({**AWQ, "version": "gemv"}, ["version 'gemv'", "'gemm'"]),
        ({**AWQ, "version": "gemv_fast"}, ["version 'gemv_fast'"]),
        ({**AWQ, "version": "marlin"}, ["version 'marlin'"]),
        ({**AWQ, "checkpoint_format": "gptq_v2"}, ["checkpoint_format 'gptq_v2'"]),
        ({**AWQ, "bits": 8}, ["bits 8", "supported: 4"]),
        ({**AWQ, "zero_point": False}, ["zero_point False"]),
        ({**AWQ, "desc_act": True}, ["desc_act True"]),
        ({**AWQ, "group_size": 100}, ["group_size 100", "multiples of 16"]),
        ({**AWQ, "group_size": True}, ["group_size True"]),
        ({**AWQ, "group_size": None}, ["group_size None"]),
        ({**AWQ, "modules_to_not_convert": "visual"}, ["modules_to_not_convert", "list"]),
        ({**AWQ, "vision": {**VISION_SECTION, "activations": "per_tensor"}}, ["vision", "per_tensor", "per_token"]),
        ({**PACKED, "format": "int-quantized"}, ["format 'int-quantized'", "'pack-quantized'"]),
        ({**PACKED, "format": "float-quantized"}, ["format 'float-quantized'"]),
        ({**PACKED, "config_groups": {}}, ["config_groups", "got 0"]),
        ({**PACKED, "config_groups": {"a": GROUP, "b": GROUP}}, ["config_groups", "got 2"]),
        ({**PACKED, "config_groups": {"a": {**GROUP, "input_activations": {"num_bits": 8}}}}, ["a: input_activations"]),
        ({**PACKED, "config_groups": {"a": {**GROUP, "targets": ["re:.*mlp.*"]}}}, ["a: targets"]),
        ({**PACKED, "kv_cache_scheme": {"num_bits": 8}}, ["kv_cache_scheme"]),
        ({**PACKED, "transform_config": {"config_groups": {}}}, ["transform_config"]),
        ({**PACKED, "ignore": ["re:("]}, ["ignore", "re:(", "regular expression"]),
        (packed(num_bits=8), ["num_bits 8"]),
        (packed(type="float"), ["type 'float'"]),
        (packed(strategy="channel"), ["strategy 'channel'", "'group'"]),
        (packed(actorder="group"), ["actorder 'group'"]),
        (packed(dynamic=True), ["dynamic"]),
    ],
)
def test_everything_else_is_refused_by_name(config, words):
    with pytest.raises(BadCheckpoint) as caught:
        read_scheme({"quantization_config": config})
    for word in ("config.json: quantization_config", *words):
        assert word in str(caught.value), str(caught.value)


def test_two_places_that_differ():
    with pytest.raises(BadCheckpoint, match="differ"):
        read_scheme({"quantization_config": AWQ, "text_config": {"quantization_config": {**AWQ, "group_size": 64}}})


@pytest.mark.parametrize(
    "entry,surely,perhaps",
    [
        ("visual", [], []),
        ("mlp", ["mlp.up_proj", "mlp.gate_proj"], ["mlp.up_proj", "mlp.gate_proj"]),
        ("mlp.gate", [], ["mlp.gate_proj"]),
        ("layers.1.mlp.up_proj", ["mlp.up_proj"], ["mlp.up_proj"]),
        ("model.layers.1.self_attn.q_proj", ["self_attn.q_proj"], ["self_attn.q_proj"]),
        ("model.language_model.layers.1.self_attn.q_proj", ["self_attn.q_proj"], ["self_attn.q_proj"]),
        ("layers.11", [], []),
        ("re:.*gate_proj", ["mlp.gate_proj"], ["mlp.gate_proj"]),
    ],
)
def test_who_is_spared(entry, surely, perhaps):
    """Readers differ: AutoAWQ looks for text anywhere, transformers for whole parts of a name. `spares` is what all agree on."""
    scheme = TextScheme("gemm", 128, spared=(entry,))
    leaves = ["self_attn.q_proj", "mlp.up_proj", "mlp.gate_proj"]
    names = {leaf: (f"model.language_model.layers.1.{leaf}", f"model.layers.1.{leaf}") for leaf in leaves}
    assert {leaf for leaf in leaves if scheme.spares(names[leaf])} == set(surely)
    assert {leaf for leaf in leaves if scheme.may_spare(names[leaf])} == set(perhaps)


def test_groups():
    assert (TextScheme("gemm", 128).group_of(512), TextScheme("gemm", -1).group_of(512)) == (128, 512)
