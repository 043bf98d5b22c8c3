"""Every way to break a quantized checkpoint that we know: refused before serving, file, tensor and rule named."""

import pytest
import torch

from sparsevila_cluster.core.errors import BadCheckpoint
from sparsevila_cluster.models import DECODE_PARTS, PREFILL_PARTS, load_model
from tests.checkpoints import tiny_qwen2_5_vl
from tests.models.quantized_files import AWQ, as_awq, as_pack_quantized, pack_config, rewrite, weights_of

LINEAR = "model.layers.1.mlp.down_proj"  # 128 inputs, 64 outputs, groups of 32
TOWER = "visual.blocks.0.attn.qkv"
LEAVES = ("qweight", "qzeros", "scales")
CONFIG = {**AWQ, "modules_to_not_convert": ["visual"]}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_qwen2_5_vl.make_qwen2_5_vl(tmp_path_factory.mktemp("fp"))


@pytest.fixture(scope="module")
def awq(source, tmp_path_factory):
    return as_awq(source, tmp_path_factory.mktemp("awq") / "awq", modules_to_not_convert=["visual"])


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    return as_pack_quantized(source, tmp_path_factory.mktemp("packed") / "packed", symmetric=False)[0]


def refused(directory, *words, parts=DECODE_PARTS):
    with pytest.raises(BadCheckpoint) as caught:
        load_model(directory, parts, device="cpu")
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def drop(leaf, name=LINEAR):
    return lambda w: w.pop(f"{name}.{leaf}")


def put(leaf, new, name=LINEAR):
    """Another tensor in a leaf's place; new: of the old one."""
    return lambda w: w.update({f"{name}.{leaf}": new(w.get(f"{name}.{leaf}"))})


def poison(value):
    def change(weights):
        weights[f"{LINEAR}.scales"][2, 5] = value

    return change


def plain(name):
    def change(weights):
        rows = weights[f"{name}.qweight"].shape
        for leaf in LEAVES:
            del weights[f"{name}.{leaf}"]
        weights[f"{name}.weight"] = torch.ones(rows[1] * 8, rows[0])

    return change


def quantize(name, num_in, num_out):
    def change(weights):
        weights.pop(f"{name}.weight")
        weights[f"{name}.qweight"] = torch.zeros(num_in, num_out // 8, dtype=torch.int32)
        weights[f"{name}.qzeros"] = torch.zeros(num_in // 32, num_out // 8, dtype=torch.int32)
        weights[f"{name}.scales"] = torch.ones(num_in // 32, num_out, dtype=torch.float16)

    return change


def eight(name):
    def change(weights):
        for leaf in LEAVES:
            del weights[f"{name}.{leaf}"]
        weights[f"{name}.weight"] = torch.ones(64, 128, dtype=torch.int8)
        weights[f"{name}.weight_scale"] = torch.ones(64, 1)

    return change


def all_plain(weights):
    for name in [name.removesuffix(".qweight") for name in weights if name.endswith(".qweight")]:
        plain(name)(weights)


FILE = "model.safetensors"
# What is done to the tensors, what config.json says (None: nothing), words of the refusal.
BROKEN = {
    "no zeros": (drop("qzeros"), CONFIG, [f"{LINEAR}.qzeros", "missing beside", f"{LINEAR}.qweight", FILE]),
    "no scales": (drop("scales"), CONFIG, [f"{LINEAR}.scales", "missing beside", FILE]),
    "no codes": (drop("qweight"), CONFIG, [f"{LINEAR}.qweight", "missing beside", FILE]),
    "nothing": (lambda w: [drop(leaf)(w) for leaf in LEAVES], CONFIG, ["down_proj.weight", "is missing"]),
    "both": (put("weight", lambda _: torch.ones(64, 128)), CONFIG, [FILE, f"{LINEAR}.weight", "same linear"]),
    "plain": (plain(LINEAR), CONFIG, [FILE, f"{LINEAR}.weight", "is not quantized", "quantization_config says that"]),
    "spared": (lambda w: None, {**CONFIG, "modules_to_not_convert": ["visual", "mlp.down_proj"]},
               [FILE, "down_proj", "quantization_config says that this linear is not"]),
    "config says nothing": (lambda w: None, None, [FILE, "quantized linear", "no quantization_config"]),
    "nothing is quantized": (all_plain, CONFIG, ["quantization_config", "no tensor", FILE, "qweight"]),
    "other groups": (lambda w: None, {**CONFIG, "group_size": 64}, [FILE, "shape [4, 8]", "[2, 8]", "groups of 64"]),
    "groups do not divide": (lambda w: None, {**CONFIG, "group_size": 48}, [FILE, "groups of 48", "multiple"]),
    "wrong shape": (put("qweight", lambda t: t[:-8]), CONFIG, [FILE, f"{LINEAR}.qweight", "shape [120, 8]", "[128, 8]"]),
    "wrong zeros": (put("qzeros", lambda t: t.t()), CONFIG, [FILE, f"{LINEAR}.qzeros", "shape [8, 4]"]),
    "codes in 64 bits": (put("qweight", lambda t: t.long()), CONFIG, [FILE, f"{LINEAR}.qweight", "stored as I64", "I32"]),
    "scales in 8 bits": (put("scales", lambda t: t.to(torch.float8_e4m3fn)), CONFIG, [FILE, f"{LINEAR}.scales", "F8_E4M3", "F16"]),
    "NaN": (poison(torch.nan), CONFIG, [FILE, f"{LINEAR}.scales", "NaN"]),
    "infinite": (poison(torch.inf), CONFIG, [FILE, f"{LINEAR}.scales", "infinite"]),
    "negative": (poison(-0.5), CONFIG, [FILE, f"{LINEAR}.scales", "negative"]),
    "another layer": (put("qweight", lambda _: torch.zeros(128, 8, dtype=torch.int32), "model.layers.7.mlp.down_proj"), CONFIG,
                      [FILE, "model.layers.7.mlp.down_proj.qweight", "no layer that config.json describes"]),
    "head": (quantize("lm_head", 64, 320), CONFIG, [FILE, "lm_head", "not the head or the embedding"]),
    "embedding": (quantize("model.embed_tokens", 64, 320), CONFIG, [FILE, "embed_tokens", "not the head or the embedding"]),
    "norm": (put("scales", lambda _: torch.ones(2, 64), "model.norm"), CONFIG, [FILE, "model.norm.scales", "only linears"]),
    "gptq": (put("g_idx", lambda _: torch.arange(128)), CONFIG, [FILE, f"{LINEAR}.g_idx", "belongs to no layer"]),
    "other form": (lambda w: None, pack_config(True), [FILE, "'gemm'", "'pack-quantized'"]),
    "text in 8 bits": (eight(LINEAR), CONFIG, [FILE, LINEAR, "stored in 8 bits", "vision tower only"]),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_broken_awq_is_refused(awq, tmp_path, name):
    change, config, words = BROKEN[name]
    weights = weights_of(awq)
    change(weights)
    refused(rewrite(awq, tmp_path / "broken", weights, config), *words)


BROKEN_PACKS = {
    "no zero points": (drop("weight_zero_point"), {}, ["weight_zero_point", "missing beside"]),
    "zero points of symmetric ones": (lambda w: None, {"symmetric": True}, ["weight_zero_point", "symmetric"]),
    "no shape": (drop("weight_shape"), {}, ["weight_shape", "missing beside"]),
    "other shape": (put("weight_shape", lambda t: t + 8), {}, [FILE, f"{LINEAR}.weight_shape", "[72, 136]", "[64, 128]"]),
    "no codes": (drop("weight_packed"), {}, ["weight_packed", "missing beside"]),
    "codes": (put("weight_packed", lambda t: t.t()), {}, [FILE, f"{LINEAR}.weight_packed", "shape [16, 64]", "[64, 16]"]),
    "NaN": (put("weight_scale", lambda t: t * torch.nan), {}, [FILE, f"{LINEAR}.weight_scale", "NaN"]),
    "reordered": (put("weight_g_idx", lambda _: torch.arange(128).flip(0) // 32), {}, [FILE, "weight_g_idx", "another order"]),
}


@pytest.mark.parametrize("name", sorted(BROKEN_PACKS))
def test_broken_packs_are_refused(packed, tmp_path, name):
    change, keys, words = BROKEN_PACKS[name]
    weights = weights_of(packed)
    change(weights)
    refused(rewrite(packed, tmp_path / "broken", weights, pack_config(**{"symmetric": False, **keys})), *words)


def test_outputs_that_fill_no_word(tmp_path):
    """N must be a multiple of 8: said of the linear, before any shape is looked at."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from sparsevila_cluster.models.loading.text_only import load_text

    sizes = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 36, "num_hidden_layers": 1, "num_attention_heads": 2}
    Qwen2ForCausalLM(Qwen2Config(**sizes, num_key_value_heads=2)).save_pretrained(tmp_path / "fp")
    directory = as_awq(tmp_path / "fp", tmp_path / "awq", wanted=lambda name: "self_attn" in name and name.endswith("proj.weight"))
    weights = weights_of(directory)
    quantize("model.layers.0.mlp.up_proj", 32, 36)(weights)
    with pytest.raises(BadCheckpoint, match="up_proj.* 36 outputs.* multiple of 8"):
        load_text(rewrite(directory, tmp_path / "odd", weights, AWQ), device="cpu")


@pytest.mark.parametrize("spared,words", [(["visual"], ["says that this linear is not"]), ([], [])])
def test_a_quantized_tower_must_not_be_denied(awq, tmp_path, spared, words):
    """Linears of the tower in 4 bits are read, where the files hold them; a config that denies them is refused."""
    weights = weights_of(awq)
    quantize(TOWER, 64, 192)(weights)
    directory = rewrite(awq, tmp_path / "tower", weights, {**AWQ, "modules_to_not_convert": spared})
    if words:
        refused(directory, FILE, TOWER, *words, parts=PREFILL_PARTS)
    else:
        inputs = load_model(directory, PREFILL_PARTS, device="cpu", dtype="float32").family
        assert torch.isfinite(inputs.encode([inputs.patchify(tiny_qwen2_5_vl.media())]).embeds).all()
    assert load_model(directory, DECODE_PARTS, device="cpu").parts == DECODE_PARTS, "other workers do not look at the tower"
