"""The work on one layer: taken apart it computes what transformers computes, and folding scales changes nothing."""

import copy

import pytest
import torch

from sparsevila_cluster.core.errors import BadCheckpoint, BadRequest
from sparsevila_cluster.models.loading.originals import LINEARS, DecoderLayer, open_original
from sparsevila_cluster.quantization.calibration import make_samples
from sparsevila_cluster.quantization.layer_quantizer import Sample, TextSettings, choose_group_size, quantize_layer, run_layer
from tests.checkpoints.families import FAMILIES
from tests.models.test_text_backends import CausalBatch
from tests.quantization.quantization_subjects import READING, dialogue, make_text_model, texts


def run_all(original, samples, watch_rows=0):
    """Hidden states after every layer, and what each layer was given."""
    found = []
    for index, layer in enumerate(original.layers):
        samples, seen = run_layer(layer, samples, index, watch_rows)
        found.append((samples, seen))
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_layer_by_layer_is_the_whole_model(name, tmp_path):
    """Dense and pruned samples, with DeepStack levels where there are some."""
    original = open_original(FAMILIES[name].make(tmp_path), device="cpu")
    materials = [*texts(1), *(dialogue(kind) for kind in original.vocabulary.kinds)]
    with torch.inference_mode():
        samples = make_samples(original.model, original.vocabulary, materials, READING)
        assert len(samples) == 1 + 2 * len(original.vocabulary.kinds)
        ends, _ = run_all(original, samples)[-1]
        for sample, end in zip(samples, ends, strict=True):
            text = original.model.text
            expected = text.forward(sample.hidden, sample.positions, CausalBatch(), sample.deepstack, sample.visual_rows)
            torch.testing.assert_close(text.modules.norm(end.hidden), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_scales_leave_the_outputs_as_they_were(kv_heads, dtype, tmp_path):
    """Also when norms are stored in few bits: what rounding takes from a norm, the weights behind it get."""
    original = open_original(make_text_model(tmp_path / "m", num_key_value_heads=kv_heads, dtype=dtype), device="cpu")
    with torch.inference_mode():
        samples = make_samples(original.model, original.vocabulary, texts(), READING)
        after, seen = run_layer(original.layers[0], samples, 0, 64)
        layer = original.layers[0]
        before = copy.deepcopy(layer.module.state_dict())
        tensors = quantize_layer(layer, seen, TextSettings(64, 4), original.stored_dtype)
        assert any(not torch.equal(before[name], now) for name, now in layer.module.state_dict().items())
        norms = {name: one for name, one in tensors.items() if "norm" in name}
        assert norms and all(one.dtype == dtype for one in norms.values())
        for name, one in norms.items():  # as a loader will see them
            layer.norms[name.split(".")[-2]].weight.data = one.float()
        again, _ = run_layer(layer, samples, 0)
    for a, b in zip(after, again, strict=True):
        torch.testing.assert_close(a.hidden, b.hidden, atol=2e-4, rtol=2e-4)


def test_what_a_layer_was_given_is_counted_over_all_rows(text_model):
    original = open_original(text_model, device="cpu")
    with torch.inference_mode():
        samples = make_samples(original.model, original.vocabulary, [*texts(5, 13), *texts(2, 64)], READING)
        layer = original.layers[0]
        x = torch.cat([layer.norms["input_layernorm"](sample.hidden) for sample in samples])
        _, seen = run_layer(layer, samples, 0, watch_rows=50)
    torch.testing.assert_close(seen.activity["self_attn.q_proj"], x.abs().mean(0), atol=1e-6, rtol=1e-5)
    step = -(-len(x) // 50)
    torch.testing.assert_close(seen.rows["self_attn.q_proj"], x[::step])
    assert {len(rows) for rows in seen.rows.values()} == {len(x[::step])}
    assert 0 < sum(len(rows) for rows, _ in seen.sequences) <= 50 + 64
    assert set(seen.rows) == {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"}


def test_few_rows_are_all_looked_at(text_model):
    original = open_original(text_model, device="cpu")
    with torch.inference_mode():
        samples = make_samples(original.model, original.vocabulary, texts(3, 20), READING)
        _, seen = run_layer(original.layers[0], samples, 0, watch_rows=1000)
    assert len(seen.sequences) == 3 and len(seen.rows["mlp.down_proj"]) == 60


@pytest.mark.parametrize("path", LINEARS)
def test_weights_that_are_not_finite_are_named(path, text_model):
    original = open_original(text_model, device="cpu")
    layer = original.layers[1]
    layer.linears[path].weight.data[3, 1] = torch.nan
    with (
        torch.inference_mode(),
        pytest.raises(BadCheckpoint, match=rf"model\.layers\.1\.{path}\.weight' holds values that are not"),
    ):
        quantize_layer(layer, None, TextSettings(64), original.stored_dtype)


def test_activations_that_are_not_finite_are_told(text_model):
    original = open_original(text_model, device="cpu")
    sample = Sample(torch.full((4, 64), torch.inf), torch.arange(4)[None], torch.empty(0, dtype=torch.int64))
    with torch.inference_mode(), pytest.raises(BadCheckpoint, match=r"model\.layers\.0: calibration gives values"):
        run_layer(original.layers[0], [sample], 0)


@pytest.mark.parametrize(
    ("inputs", "wanted", "size"),
    [((128, 256), None, 128), ((128, 320), None, 64), ((128, 96), None, 32), ((128, 96), 16, 16), ((48, 48), 48, 48)],
)
def test_the_largest_usual_group_that_fits_is_taken(inputs, wanted, size):
    assert choose_group_size({f"l{k}": (8, k) for k in inputs}, wanted) == size


@pytest.mark.parametrize(
    ("shapes", "wanted", "error", "told"),
    [
        ({"a": (8, 128), "b": (8, 40)}, None, BadCheckpoint, "b: no group size of 128, 64, 32 divides its 40 inputs"),
        ({"a": (8, 128), "b": (8, 40)}, 32, BadRequest, "group_size 32 does not divide the 40 inputs of b"),
        ({"a": (12, 128)}, None, BadCheckpoint, "a: 12 outputs are no multiple of 8"),
    ],
)
def test_sizes_that_the_format_does_not_have_are_refused(shapes, wanted, error, told):
    with pytest.raises(error, match=told):
        choose_group_size(shapes, wanted)


def test_layers_of_another_make_are_refused(text_model):
    module = open_original(text_model, device="cpu").layers[0].module
    fused = copy.deepcopy(module)
    fused.self_attn.qkv_proj, fused.self_attn.q_proj = torch.nn.Linear(64, 128), None
    with pytest.raises(BadCheckpoint, match=r"layers\.0: .*'self_attn.q_proj'"):
        DecoderLayer(fused, "layers.0", None)
    experts = copy.deepcopy(module)
    experts.mlp.expert = torch.nn.Linear(64, 64)
    with pytest.raises(BadCheckpoint, match="'mlp.expert'"):
        DecoderLayer(experts, "layers.0", None)
    sandwich = copy.deepcopy(module)
    sandwich.post_feedforward_layernorm = torch.nn.Identity()
    with pytest.raises(BadCheckpoint, match="post_feedforward_layernorm"):
        DecoderLayer(sandwich, "layers.0", None)
