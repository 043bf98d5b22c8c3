"""Vision towers whose blocks are stored in 8 bits: near the original in every family, exact where they run as plain weights."""

import pytest
import torch

from sparsevila_cluster.core.errors import BadCheckpoint
from sparsevila_cluster.models import DECODE_PARTS, PREFILL_PARTS, load_model
from sparsevila_cluster.models.loading.device_placement import runs_as_stored
from sparsevila_cluster.models.text.linear import Int8Linear
from tests.checkpoints import tiny_qwen2_5_vl
from tests.checkpoints.families import FAMILIES
from tests.models.quantized_files import VISION, as_awq, as_w8a8, in_tower_blocks, rewrite, weights_of
from tests.models.test_quantized_checkpoints import far, logits_of

FAST_CPU = runs_as_stored("auto", torch.device("cpu"), torch.bfloat16)
QKV = "visual.blocks.0.attn.qkv"


def embeds_of(model):
    kind = "image" if model.family.name == "llava_next" else "video"
    return model.family.encode([model.family.patchify(tiny_qwen2_5_vl.media(kind))]).embeds


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_tower_is_near_its_original(tmp_path, name, smooth):
    """One part in a hundred for each rounding to 8 bits, over three or four blocks; bfloat16 alone loses about as much."""
    source = FAMILIES[name].make(tmp_path / "fp")
    directory = as_w8a8(source, tmp_path / "w8a8", smooth=smooth)
    expected = embeds_of(load_model(source, PREFILL_PARTS, device="cpu"))
    exact = embeds_of(load_model(directory, PREFILL_PARTS, device="cpu", dtype="float32"))
    plain, model = (load_model(d, PREFILL_PARTS, device="cpu", dtype="bfloat16") for d in (source, directory))
    assert 0 < far(exact, expected) < 0.03
    assert far(embeds_of(model), expected) < 0.04 + far(embeds_of(plain), expected)
    if FAST_CPU:
        assert model.weight_bytes < plain.weight_bytes
        assert any(isinstance(module, Int8Linear) for module in every_module(model.family))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_tower_on_a_gpu(tmp_path, name):
    source = FAMILIES[name].make(tmp_path / "fp")
    expected = embeds_of(load_model(source, PREFILL_PARTS, device="cpu"))
    directory = as_w8a8(source, tmp_path / "w8a8")
    plain, model = (load_model(d, PREFILL_PARTS, device="cuda", dtype="bfloat16", attention="torch") for d in (source, directory))
    assert any(isinstance(module, Int8Linear) for module in every_module(model.family))
    assert far(embeds_of(model).cpu(), expected) < 0.04 + far(embeds_of(plain).cpu(), expected)


def every_module(family):
    """Modules of a tower, whatever a family keeps of it."""
    kept = [value for value in vars(family).values() if isinstance(value, torch.nn.Module)]
    layers = getattr(getattr(family, "_tower", None), "layers", [])
    kept += [getattr(layer, "func", layer) for layer in layers]
    return [module for one in kept for module in one.modules()]


@pytest.mark.skipif(not FAST_CPU, reason="only a CPU with AVX-512 runs 8 bits as they are stored")
def test_exactly_the_linears_of_the_blocks_are_replaced(tmp_path):
    directory = as_w8a8(tiny_qwen2_5_vl.make_qwen2_5_vl(tmp_path / "fp"), tmp_path / "w8a8")
    model = load_model(directory, PREFILL_PARTS, device="cpu")
    found = {name: module.in_features for name, module in model.family._tower.named_modules() if isinstance(module, Int8Linear)}
    assert len(found) == 4 * 5 and all(name.startswith("blocks.") for name in found)
    assert model.spec.dtype == torch.bfloat16
    plain = load_model(directory, PREFILL_PARTS, device="cpu", quantization="none")
    assert not any(isinstance(module, Int8Linear) for module in plain.family._tower.modules())
    assert 0 < far(embeds_of(model), embeds_of(plain).float()) < 0.05


def test_text_in_four_bits_beside_a_tower_in_eight(tmp_path):
    text = as_awq(tiny_qwen2_5_vl.make_qwen2_5_vl(tmp_path / "fp"), tmp_path / "awq", modules_to_not_convert=["visual"])
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
              "modules_to_not_convert": ["visual", "model.visual"]}  # fmt: skip
    both = as_w8a8(text, tmp_path / "both", config)
    models = [load_model(d, device="cpu", dtype="float32") for d in (both, text)]
    assert torch.equal(*map(logits_of, models))
    assert 0 < far(*map(embeds_of, models)) < 0.03


def test_outputs_and_inputs_of_smoothing_cancel(tmp_path):
    """`smooth` divides inputs and multiplies weights: the plain weight is values * scale / smooth, written out here."""
    directory = as_w8a8(tiny_qwen2_5_vl.make_qwen2_5_vl(tmp_path / "fp"), tmp_path / "w8a8")
    weights = weights_of(directory)
    for name in [name for name in weights if name.endswith(".smooth")]:
        base = name.removesuffix("smooth")
        values, scale = weights.pop(f"{base}weight").float(), weights.pop(f"{base}weight_scale")
        weights[f"{base}weight"] = values * scale / weights.pop(name)
    twin = rewrite(directory, tmp_path / "twin", weights, None)
    got, expected = (embeds_of(load_model(d, device="cpu", dtype="float32")) for d in (directory, twin))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def drop(name):
    return lambda w: w.pop(name)


def put(name, new):
    return lambda w: w.update({name: new(w.get(name))})


BROKEN = {
    "no scale": (drop(f"{QKV}.weight_scale"), VISION, [f"{QKV}.weight_scale", "missing beside"]),
    "no values": (drop(f"{QKV}.weight"), VISION, [QKV]),
    "other shape": (put(f"{QKV}.weight_scale", lambda t: t.t()), VISION, [f"{QKV}.weight_scale", "[1, 192]", "[192, 1]"]),
    "scale in 16 bits": (put(f"{QKV}.weight_scale", lambda t: t.half()), VISION, [f"{QKV}.weight_scale", "F16", "F32"]),
    "NaN": (put(f"{QKV}.weight_scale", lambda t: t * torch.nan), VISION, [f"{QKV}.weight_scale", "NaN"]),
    "smooth of 0": (put(f"{QKV}.smooth", lambda t: t * 0), VISION, [f"{QKV}.smooth", "no scales"]),
    "smooth of others": (put(f"{QKV}.smooth", lambda t: t[:8]), VISION, [f"{QKV}.smooth", "shape [8]"]),
    "not said": (lambda w: None, None, ["visual.blocks.0", "quantized linear", "no quantization_config"]),
    "other bits": (lambda w: None, {**VISION, "bits": 4}, ["vision", "'bits': 4", "'bits': 8"]),
    "a convolution": (put("visual.patch_embed.proj.weight_scale", lambda _: torch.ones(64, 1)), VISION, ["only linears"]),
}


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_broken_towers_are_refused(tmp_path, name):
    change, vision, words = BROKEN[name]
    directory = as_w8a8(tiny_qwen2_5_vl.make_qwen2_5_vl(tmp_path / "fp", layers=1), tmp_path / "w8a8")
    weights = weights_of(directory)
    change(weights)
    broken = rewrite(directory, tmp_path / "broken", weights, None if vision is None else {"vision": vision})
    with pytest.raises(BadCheckpoint) as caught:
        load_model(broken, PREFILL_PARTS, device="cpu")
    for word in words:
        assert word in str(caught.value), str(caught.value)
    if vision is VISION:
        assert load_model(broken, DECODE_PARTS, device="cpu").parts == DECODE_PARTS, "a decode worker does not look at the tower"


def test_a_tower_that_is_said_to_be_quantized_and_is_not(tmp_path):
    source = tiny_qwen2_5_vl.make_qwen2_5_vl(tmp_path / "fp", layers=1)
    directory = rewrite(source, tmp_path / "said", weights_of(source), {"vision": VISION})
    assert any(in_tower_blocks(name) for name in weights_of(source))
    with pytest.raises(BadCheckpoint, match="vision section.* no tensor of model.safetensors is stored in 8 bits"):
        load_model(directory, PREFILL_PARTS, device="cpu")
