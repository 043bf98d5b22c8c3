"""The measures of distance against their definitions, on stock transformers' logits."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsevila_cluster.core.errors import BadCheckpoint, BadRequest
from sparsevila_cluster.models.loading.originals import open_copy, read_vocabulary
from sparsevila_cluster.quantization.calibration import make_samples
from sparsevila_cluster.quantization.compare import compare
from tests.quantization.quantization_subjects import READING, dialogue, texts


def changed(source, target, name, by=0.2):
    """A copy whose tensors with `name` in theirs are noisy."""
    shutil.copytree(source, target)
    weights = load_file(target / "model.safetensors")
    for key in weights:
        if name in key:
            weights[key] = weights[key] + by * torch.randn(weights[key].shape, generator=torch.Generator().manual_seed(1))
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_the_measures_are_what_they_say(text_model, tmp_path):
    from transformers import AutoModelForCausalLM

    other, materials = changed(text_model, tmp_path / "other", "up_proj"), texts(3, 40)
    (found,) = compare(text_model, [other], read_vocabulary(text_model), materials, READING, device="cpu")
    p, q = [], []
    for directory, into in ((text_model, p), (other, q)):
        stock = AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32).eval()
        with torch.inference_mode():
            into += [stock(torch.tensor([material.ids])).logits[0] for material in materials]
    wanted, got = torch.cat(p), torch.cat(q)
    kl = torch.nn.functional.kl_div(got.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert found.num_tokens == 120 and found.kl == pytest.approx(float(kl.mean()), rel=1e-3) and found.kl > 1e-3
    assert found.relative_error == pytest.approx(float((got - wanted).norm() / wanted.norm()), rel=1e-3)
    assert found.same_top == pytest.approx(float((got.argmax(-1) == wanted.argmax(-1)).float().mean()))


def test_a_changed_tower_shows_through_media_and_only_there(vl, tmp_path):
    other = changed(vl, tmp_path / "other", "visual.blocks")
    vocabulary = read_vocabulary(vl)
    blind, seeing = (compare(vl, [vl, other], vocabulary, one, READING, device="cpu") for one in (texts(), [dialogue()]))
    assert [one.kl for one in blind] == [0, 0]
    assert seeing[0].kl == 0 and seeing[1].kl > 1e-4
    model = open_copy(vl, "cpu")
    samples = make_samples(model, vocabulary, [dialogue()], READING)
    assert seeing[1].num_tokens == sum(len(one.hidden) - len(one.visual_rows) for one in samples)


def test_what_is_no_copy_is_refused(vl, text_model, tmp_path):
    vocabulary = read_vocabulary(text_model)
    with pytest.raises(BadRequest, match="is a qwen2_5_vl, .* a qwen2: it is no copy"):
        compare(text_model, [vl], vocabulary, texts(), READING, device="cpu")
    with pytest.raises(BadCheckpoint, match="not a directory"):
        compare(text_model, [tmp_path / "missing"], vocabulary, texts(), READING, device="cpu")
    with pytest.raises(BadRequest, match="nothing to calibrate on"):
        compare(text_model, [text_model], vocabulary, [], READING, device="cpu")
