"""Checkpoints that AutoAWQ 0.2.9 itself wrote, against their plain float32 twins in stock transformers.

The originals are random models of two layers. One of them is kept here, cut down to its first layer and 64 tokens, with the logits
of the original, cut down likewise, before it was quantized.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsevila_cluster.models import load_model
from sparsevila_cluster.models.loading.text_only import load_text
from tests.checkpoints import tiny_qwen2_5_vl
from tests.models.quantized_files import GOLDEN, plain_twin
from tests.models.test_text_backends import CausalBatch, a_prompt

needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no checkpoints in {GOLDEN}")
DATA = Path(__file__).parents[1] / "data" / "awq"
IDS = torch.arange(60) * 37 % 250


def text_logits(model, ids):
    positions = torch.arange(len(ids), device=ids.device)[None]
    with torch.inference_mode():
        return model.text.logits(model.text.forward(model.text.embed(ids), positions, CausalBatch()))


def stock_logits(directory, ids):
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        return stock(ids[None]).logits[0]


@pytest.fixture(scope="module")
def qwen2_logits(tmp_path_factory):
    return stock_logits(plain_twin(GOLDEN / "qwen2_awq", tmp_path_factory.mktemp("qwen2") / "twin"), IDS)


@pytest.fixture(scope="module")
def qwen2_5_vl(tmp_path_factory):
    """The golden checkpoint with a template that has a place for media."""
    target = shutil.copytree(GOLDEN / "qwen2_5_vl_awq", tmp_path_factory.mktemp("vl") / "awq")
    path = target / "tokenizer_config.json"
    path.chmod(0o644)
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "chat_template": tiny_qwen2_5_vl.TEMPLATE, "eos_token": "<|im_end|>"})
    )
    return target


@pytest.fixture(scope="module")
def stock_vl(qwen2_5_vl, tmp_path_factory):
    return tiny_qwen2_5_vl.hf_model(plain_twin(qwen2_5_vl, tmp_path_factory.mktemp("vl") / "twin"))


def far(got, expected):
    """The relative distance of two tensors."""
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize("backend", ["lean", "hf"])
@pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-5), ("auto", 0.02)])
def test_one_layer_means_what_the_original_meant(tmp_path, backend, dtype, tolerance):
    """AutoAWQ's loss here is 0.08; columns in another order than its own give 0.67."""
    expected = load_file(DATA / "expected.safetensors")
    ids = expected["ids"]
    model = load_text(DATA / "qwen2_one_layer", device="cpu", dtype=dtype, text_backend=backend)
    got = text_logits(model, ids)
    assert far(got, expected["original_logits"]) < 0.1
    assert far(got, stock_logits(plain_twin(DATA / "qwen2_one_layer", tmp_path / "twin"), ids)) < tolerance


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("backend", ["lean", "hf"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_one_layer_on_a_gpu(tmp_path, backend, dtype):
    ids = load_file(DATA / "expected.safetensors")["ids"]
    model = load_text(DATA / "qwen2_one_layer", device="cuda", dtype=dtype, text_backend=backend)
    plain = load_text(DATA / "qwen2_one_layer", device="cuda", dtype=dtype, text_backend=backend, quantization="none")
    assert model.weight_bytes < plain.weight_bytes
    expected = stock_logits(plain_twin(DATA / "qwen2_one_layer", tmp_path / "twin"), ids)
    for one in (model, plain):
        assert far(text_logits(one, ids.cuda()).cpu(), expected) < 0.02


@needs_golden
@pytest.mark.parametrize("backend", ["lean", "hf"])
def test_qwen2_in_float32_equals_its_twin(qwen2_logits, backend):
    model = load_text(GOLDEN / "qwen2_awq", device="cpu", dtype="float32", text_backend=backend)
    torch.testing.assert_close(text_logits(model, IDS), qwen2_logits, atol=1e-3, rtol=0)
    assert qwen2_logits.std() > 0.1


@needs_golden
@pytest.mark.parametrize("backend", ["lean", "hf"])
def test_qwen2_in_4_bits_is_near_its_twin(qwen2_logits, backend):
    """bfloat16 keeps 8 bits of every number on the way: an error of about one part in a hundred."""
    model = load_text(GOLDEN / "qwen2_awq", device="cpu", text_backend=backend)
    assert model.spec.dtype == torch.bfloat16
    got = text_logits(model, IDS)
    assert far(got, qwen2_logits) < 0.02


@needs_golden
@pytest.mark.parametrize("backend", ["lean", "hf"])
@pytest.mark.parametrize(
    "quantization,dtype,tolerance", [("auto", "float32", 1e-5), ("auto", "auto", 0.03), ("none", "bfloat16", 0.03)]
)
def test_qwen2_5_vl_sees_pictures_as_its_twin(qwen2_5_vl, stock_vl, backend, quantization, dtype, tolerance):
    """The vision tower stays as it is, although the list in config.json says "visual" and the module is "model.visual"."""
    model = load_model(qwen2_5_vl, device="cpu", dtype=dtype, text_backend=backend, quantization=quantization)
    with torch.inference_mode():
        embeds, positions, stock = a_prompt(model)
        expected = stock_vl(**stock).logits[0]
        got = model.text.logits(model.text.forward(embeds, positions, CausalBatch()))
    assert torch.isfinite(got).all()
    assert far(got, expected) < tolerance
    if dtype == "float32":
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)
