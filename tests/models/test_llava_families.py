"""Both LLaVA families against their stock models: embeddings, salience, passes, loading, and answers about files."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sparsevila_cluster.cli import main as cli
from sparsevila_cluster.models import DECODE_PARTS, PREFILL_PARTS, load_model
from tests.checkpoints import tiny_qwen2_5_vl
from tests.checkpoints.families import FAMILIES
from tests.media.media_files import video_bytes

NAMES = ["llava_next", "llava_onevision"]
PROMPTS = {
    "image": [("image", 100, 150)],
    "tall image": [("image", 300, 31)],
    "wide image": [("image", 9, 400)],
    "two images": [("image", 50, 130), ("image", 112, 84)],
    "video": [("video", 60, 90)],
    "image and video": [("image", 84, 84), ("video", 56, 84)],
}


@pytest.fixture(scope="module", params=NAMES)
def directory(request, tmp_path_factory):
    return FAMILIES[request.param].make(tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def model(directory):
    return load_model(directory)


@pytest.fixture(scope="module")
def stock(directory):
    return tiny_qwen2_5_vl.hf_model(directory)


def patchify(model, shapes):
    kinds = [kind for kind, _, _ in shapes]
    medias = [tiny_qwen2_5_vl.media(kind, frames=4 + i, height=h, width=w, seed=i) for i, (kind, h, w) in enumerate(shapes)]
    return [model.family.patchify(media, alone=kinds.count(media.kind) == 1) for media in medias], medias


@pytest.mark.parametrize("name", PROMPTS)
def test_tokens_equal_the_stock_model(model, stock, name):
    inputs, _ = patchify(model, PROMPTS[name])
    family = FAMILIES[model.family.name]
    with torch.inference_mode():
        want, _ = family.stock_features(stock, family.stock_inputs(model, inputs))
    for needs in (("salience",), ("taps",), ()):
        got = model.family.encode(inputs, needs)
        torch.testing.assert_close(got.embeds, want, atol=1e-5, rtol=1e-5)
        structural = got.cell[:, 0] < 0
        assert torch.equal(got.salience.isnan(), structural) and torch.equal(got.cell[:, 1] < 0, structural)
        newline = stock.model.image_newline.data.expand(int(structural.sum()), -1)
        torch.testing.assert_close(got.embeds[structural], newline)
    assert torch.equal(got.salience[~structural], torch.ones(int((~structural).sum())))
    assert len(want) == sum(one.num_tokens for one in inputs)


def last_layer(stock):
    """Index of the last layer of the tower that gives features."""
    return range(stock.config.vision_config.num_hidden_layers + 1)[stock.config.vision_feature_layer] - 1


def attention_received(model, stock, media, layer):
    """From the stock tower's own attention weights, packed by the stock model's own functions with NaN for a newline."""
    core, config = stock.model, stock.config
    weights = core.vision_tower(model.family.pixel_values(media), output_attentions=True).attentions[layer]
    length, nan = weights.shape[-1], torch.tensor([torch.nan])
    if model.family.name == "llava_next":
        crops = (weights[:, :, 0].mean(1) * length)[:, 1:, None]
        if media.kind == "video":
            return torch.cat(core.pack_image_features([c[None] for c in crops], [media.size] * len(crops), "default", nan)[0])[:, 0]
        return core.pack_image_features([crops], [media.size], "default", nan)[0][0][:, 0]
    crops = (weights.mean((1, 2)) * length)[..., None]
    if media.kind == "video":
        return torch.cat((core.apply_pooling(crops).flatten(), nan))
    return core.pack_image_features([crops], [media.size], nan, config.vision_aspect_ratio)[0][0][:, 0]


@pytest.mark.parametrize("name", PROMPTS)
def test_salience_equals_weights_written_out(model, stock, name):
    inputs, _ = patchify(model, PROMPTS[name])
    stock.set_attn_implementation("eager")
    with torch.inference_mode():
        layers = range(last_layer(stock) + 1)
        want = torch.stack([torch.cat([attention_received(model, stock, media, i) for media in inputs]) for i in layers], 1)
    got = model.family.encode(inputs).salience
    torch.testing.assert_close(got, want[:, -1], atol=2e-5, rtol=1e-5, equal_nan=True)
    torch.testing.assert_close(model.family.encode(inputs, ("taps",)).taps, want, atol=2e-5, rtol=1e-5, equal_nan=True)
    assert got.dtype == torch.float32 and got.nan_to_num(1.0).std() > 0.05


@pytest.mark.parametrize("crops", [1, 3, 1000])
def test_passes_of_any_size_agree(directory, model, crops):
    inputs, _ = patchify(model, PROMPTS["image and video"])
    expected = model.family.encode(inputs)
    other, calls = load_model(directory), []
    other.family.crops_per_pass = crops
    got = other.family.encode(inputs, report=lambda done, total: calls.append((done, total)))
    torch.testing.assert_close(got.embeds, expected.embeds, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.salience, expected.salience, atol=1e-5, rtol=0, equal_nan=True)
    total = sum(len(one.pixels) for one in inputs)
    assert calls[0] == (0, total) and calls[-1] == (total, total) and calls == sorted(calls)
    assert len(calls) == 1 + sum(-(-len(one.pixels) // crops) for one in inputs)


def test_places_of_several_media(model):
    inputs, _ = patchify(model, PROMPTS["image and video"])
    tokens = model.family.encode(inputs, needs=())
    groups = sum(len(one.grids) for one in inputs)
    assert tokens.group.unique().tolist() == list(range(groups))
    scored = tokens.cell[:, 0] >= 0
    per_group = torch.bincount(tokens.group[scored].long())
    assert per_group.tolist() == [rows * cols for one in inputs for rows, cols in one.grids]
    assert inputs[0].frame_of_group == (0, 0) and inputs[1].frame_of_group == tuple(range(5))


@pytest.mark.parametrize("size", [(1, 400), (400, 1), (1, 1), (2, 90)])
def test_hair_thin_pictures(model, stock, size):
    """The tiles may show nothing of them but row ends."""
    inputs, _ = patchify(model, [("image", *size)])
    family = FAMILIES[model.family.name]
    with torch.inference_mode():
        want, _ = family.stock_features(stock, family.stock_inputs(model, inputs))
    torch.testing.assert_close(model.family.encode(inputs).embeds, want, atol=1e-5, rtol=1e-5)
    assert all(rows * cols for rows, cols in inputs[0].grids)
    assert len(inputs[0].grids) == int(inputs[0].group.max()) + 1 == len(inputs[0].frame_of_group)


@pytest.mark.parametrize("name", NAMES)
def test_layouts_hold_the_same_model(tmp_path, name):
    make = FAMILIES[name].make
    one, other = load_model(make(tmp_path / "a")), load_model(make(tmp_path / "b", layout="modern", shards=3))
    inputs, medias = patchify(one, PROMPTS["image and video"])
    tokens, again = one.family.encode(inputs), other.family.encode(patchify(other, PROMPTS["image and video"])[0])
    assert torch.equal(tokens.embeds, again.embeds) and torch.equal(tokens.salience.nan_to_num(), again.salience.nan_to_num())
    assert one.processor_hash == other.processor_hash and one.weight_bytes == other.weight_bytes


@pytest.mark.parametrize("tie", [False, True])
def test_workers_read_their_own_parts(directory, model, tmp_path, tie):
    if tie:
        directory = FAMILIES[model.family.name].make(tmp_path, tie=True, layout="modern")
    prefill, decode = load_model(directory, PREFILL_PARTS), load_model(directory, DECODE_PARTS)
    inputs, _ = patchify(model, PROMPTS["image"])
    assert prefill.text.head_weight is None
    assert (decode.text.head_weight.data_ptr() == decode.text.embed_weight.data_ptr()) == tie
    assert prefill.family.encode(inputs).embeds.shape == (inputs[0].num_tokens, 64)
    assert decode.family.patchify(tiny_qwen2_5_vl.media("image", height=100, width=150)).num_tokens == inputs[0].num_tokens
    with pytest.raises(AssertionError, match="vision"):
        decode.family.encode(inputs)
    names = {n: t for f in directory.glob("*.safetensors") for n, t in load_file(f).items()}
    visual = sum(t.nbytes for n, t in names.items() if any(v in n for v in ("vision_tower", "projector", "newline")))
    assert decode.weight_bytes == sum(t.nbytes for t in names.values()) - visual


def test_layers_after_the_features_are_let_go(directory, model, stock):
    """The tower holds no weights that `encode` never uses."""
    used = model.config.vision_config.num_hidden_layers + 1 + model.config.vision_feature_layer
    assert len(model.family._tower.layers) == used
    names = {n: t for f in directory.glob("*.safetensors") for n, t in load_file(f).items()}
    idle = [n for n in names if "post_layernorm" in n or f"encoder.layers.{used}." in n]
    assert model.weight_bytes == sum(t.nbytes for n, t in names.items() if n not in idle)
    assert (len(idle) > 2) == (model.family.name == "llava_next")


@pytest.mark.parametrize("name", NAMES)
def test_several_feature_layers(tmp_path, name):
    directory = FAMILIES[name].make(tmp_path, vision_feature_layer=[-3, 2, 0])
    model, stock, family = load_model(directory), tiny_qwen2_5_vl.hf_model(directory), FAMILIES[name]
    inputs, _ = patchify(model, PROMPTS["image"])
    with torch.inference_mode():
        want, _ = family.stock_features(stock, family.stock_inputs(model, inputs))
    torch.testing.assert_close(model.family.encode(inputs).embeds, want, atol=1e-5, rtol=1e-5)
    assert len(model.family._tower.layers) == 2


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_near_float32(tmp_path, name):
    directory = FAMILIES[name].make(tmp_path, dtype=torch.bfloat16, layout="modern")
    exact, rounded = load_model(directory, dtype="float32"), load_model(directory, dtype="bfloat16")
    inputs, _ = patchify(exact, PROMPTS["image and video"])
    one, other = exact.family.encode(inputs), rounded.family.encode(inputs)
    assert other.embeds.dtype == torch.bfloat16 and other.salience.dtype == torch.float32
    assert float((one.embeds - other.embeds.float()).norm() / one.embeds.norm()) < 0.05
    gap = (one.salience - other.salience).abs().nan_to_num()
    assert gap.mean() < 0.05 and torch.equal(one.salience.isnan(), other.salience.isnan())


def test_ask_answers_about_files(directory, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip.mp4").write_bytes(video_bytes(8, fps=4, size=(96, 64)))
    Image.fromarray(tiny_qwen2_5_vl.media("image", height=90, width=140).frames[0]).save(tmp_path / "picture.png")
    for name in ("clip.mp4", "picture.png"):
        command = ["ask", name, "what is it?", "where?", "--model", str(directory), "--max-tokens", "4", "--json"]
        assert cli.main([*command, "--heatmap", f"{name}.heat.png"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert len(report["answers"]) == 2 and report["trip"]["visual_tokens_kept"] < report["trip"]["visual_tokens"]
        assert Image.open(f"{name}.heat.png").width > 100
