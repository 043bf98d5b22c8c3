"""InternVL checkpoints: both layouts on disk, parts, heads, text models, broken ones, and the command line on each layout."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sparsevila_cluster.cli import main as cli
from sparsevila_cluster.core.errors import BadCheckpoint
from sparsevila_cluster.models import DECODE_PARTS, PREFILL_PARTS, load_model
from tests.checkpoints import tiny_qwen2_5_vl
from tests.checkpoints.tiny_internvl import NAMED, TEXTS, TOKENS, changed, make_internvl
from tests.media.media_files import picture_bytes, video_bytes
from tests.models.test_loader import read_names
from tests.models.test_text_backends import CausalBatch

CONFIG, IMAGE, WHOLE, TOKENIZER = "config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return make_internvl(tmp_path_factory.mktemp("internvl"))


@pytest.fixture(scope="module")
def model(directory):
    return load_model(directory, device="cpu")


def picture(height, width):
    return tiny_qwen2_5_vl.media("image", height=height, width=width)


def clip(frames):
    return tiny_qwen2_5_vl.media(frames=frames)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", ["hub", "modern"])
def test_layouts_hold_the_same_model(tmp_path, model, layout, shards):
    other = load_model(make_internvl(tmp_path, layout=layout, shards=shards), device="cpu")
    inputs = [model.family.patchify(picture(100, 300))]
    torch.testing.assert_close(other.family.encode(inputs).embeds, model.family.encode(inputs).embeds)
    assert torch.equal(other.text.head_weight, model.text.head_weight)
    assert other.processor_hash == model.processor_hash and other.chat.eos_ids == model.chat.eos_ids
    assert other.chat.prefix_ids(["image"], "x") == model.chat.prefix_ids(["image"], "x")


@pytest.mark.parametrize("layout,tie", [("hub", False), ("modern", True)])
@pytest.mark.parametrize("parts", [PREFILL_PARTS, DECODE_PARTS])
def test_only_wanted_parts_are_read(monkeypatch, tmp_path, layout, tie, parts):
    directory = make_internvl(tmp_path, layout=layout, tie=tie)
    model, seen = read_names(monkeypatch, directory, parts)
    visual = [name for name in seen if "vision_tower" in name or "multi_modal_projector" in name]
    assert bool(visual) == ("vision" in parts)
    assert any("lm_head" in name for name in seen) == ("head" in parts and not tie)
    assert model.weight_bytes == 4 * sum(t.numel() for n, t in load_file(directory / "model.safetensors").items() if n in seen)
    inputs = model.family.patchify(clip(2))
    if "vision" not in parts:
        assert not model.family.plan(model.chat.prefix_ids(["video"], None, [inputs.spelling]), [inputs]).visual_mask[-1]
        with pytest.raises(AssertionError, match="vision"):
            model.family.encode([inputs])


def test_a_head_on_disk_is_the_head(directory, tmp_path):
    """The published config.json says nothing of tying at its top, which reads as tied: so does the head that it comes with."""
    assert "tie_word_embeddings" not in json.loads((directory / "config.json").read_text())
    weights = load_file(directory / "model.safetensors")
    head, embed = weights["language_model.lm_head.weight"], weights["language_model.model.embed_tokens.weight"]
    model = load_model(directory, DECODE_PARTS, device="cpu")
    assert model.config.tie_word_embeddings and torch.equal(model.text.head_weight, head) and not torch.equal(head, embed)
    saved_so = changed(directory, tmp_path / "saved", CONFIG, tie_word_embeddings=True)
    assert torch.equal(load_model(saved_so, DECODE_PARTS, device="cpu").text.head_weight, head)
    target = shutil.copytree(directory, tmp_path / "tied")
    del weights["language_model.lm_head.weight"]
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    tied = load_model(target, DECODE_PARTS, device="cpu")
    assert tied.text.head_weight.data_ptr() == tied.text.embed_weight.data_ptr()


@pytest.mark.parametrize("text", TEXTS)
def test_text_models_of_the_family(tmp_path, text):
    """With the published "dynamic" rotary positions, up to the last one that the model has."""
    directory = make_internvl(tmp_path, text=text, layout="modern")
    model, stock = load_model(directory, device="cpu"), tiny_qwen2_5_vl.hf_model(directory)
    ids = torch.randint(0, 300, (12,), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(12)[None] * 100 + model.max_position - 1101
    assert int(positions.max()) == model.max_position - 1 and model.text.name == "lean"
    with torch.inference_mode():
        want = stock(input_ids=ids[None], position_ids=positions).logits[0]
        got = model.text.logits(model.text.forward(model.text.embed(ids), positions, CausalBatch()))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_bfloat16_is_near_float32(tmp_path):
    directory = make_internvl(tmp_path, dtype=torch.bfloat16)
    exact, rounded = load_model(directory, dtype="float32"), load_model(directory, dtype="bfloat16")
    inputs = [exact.family.patchify(media) for media in [picture(224, 230), clip(3), picture(40, 40)]]
    one, other = exact.family.encode(inputs), rounded.family.encode(inputs)
    assert other.embeds.dtype == torch.bfloat16 and other.salience.dtype == torch.float32
    assert float((one.embeds - other.embeds.float()).norm() / one.embeds.norm()) < 0.05
    torch.testing.assert_close(one.salience, other.salience, atol=0.1, rtol=0.1)


BROKEN = {
    "remote code": (CONFIG, {"model_type": "internvl_chat"}, "'internvl_chat' is not supported.*OpenGVLab/InternVL3-8B-hf"),
    "two layers": (CONFIG, {"vision_feature_layer": [-1, -2]}, r"vision_feature_layer \[-1, -2\] must be one layer, -3 to -1 or"),
    "the embedding": (CONFIG, {"vision_feature_layer": -4}, "vision_feature_layer -4"),
    "no such layer": (CONFIG, {"vision_feature_layer": 4}, "vision_feature_layer 4"),
    "class token": (CONFIG, {"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy 'full'"),
    "odd ratio": (CONFIG, {"downsample_ratio": 0.3}, "downsample_ratio 0.3"),
    "no ratio": (CONFIG, {"downsample_ratio": 0.0}, "downsample_ratio 0.0"),
    "ratio of no tokens": (CONFIG, {"downsample_ratio": 1 / 3}, "image_size|downsample_ratio"),
    "tokens of a tile": (WHOLE, {"image_seq_length": 256}, "processor_config.json: image_seq_length 256 is not the 16"),
    "size": (IMAGE, {"size": {"height": 448, "width": 448}}, "preprocessor_config.json: size .*448.*112x112"),
    "not square": (IMAGE, {"size": {"height": 112, "width": 224}}, "preprocessor_config.json: size"),
    "video size": ("video_preprocessor_config.json", {"size": {"height": 64, "width": 64}}, "video_preprocessor_config.json: size"),
    "no resizing": (IMAGE, {"do_resize": False}, "preprocessor_config.json: do_resize"),
    "no tiles": (IMAGE, {"max_patches": 0}, "preprocessor_config.json: min_patches 1 and max_patches 0"),
    "fewer than the fewest": (IMAGE, {"min_patches": 5, "max_patches": 4}, "min_patches 5 and max_patches 4"),
    "tiles without end": (IMAGE, {"max_patches": 10**9}, "max_patches 1000000000"),
    "half a tile": (IMAGE, {"max_patches": 2.5}, "max_patches 2.5"),
    "no marks": (TOKENIZER, {"video_token": None, "extra_special_tokens": None}, "tokenizer_config.json: video_token .*, got None"),
    "other marks": (TOKENIZER, {"start_image_token": "<image>"}, "start_image_token must be '<img>', got '<image>'"),
    "another placeholder": (CONFIG, {"image_token_id": 327}, "does not place '<img>'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoints_are_refused(directory, tmp_path, name):
    file, changes, message = BROKEN[name]
    with pytest.raises(BadCheckpoint, match=message) as caught:
        load_model(changed(directory, tmp_path / "broken", file, **changes), DECODE_PARTS, device="cpu")
    assert "\n" not in str(caught.value)


def test_an_oblong_tower_is_refused(tmp_path):
    directory = make_internvl(tmp_path, vision={"image_size": [112, 140]})
    with pytest.raises(BadCheckpoint, match=r"image_size \[112, 140\] is not a square"):
        load_model(directory, device="cpu")


def test_names_of_tokens_may_stand_in_either_place(directory, tmp_path):
    flat = changed(directory, tmp_path / "flat", TOKENIZER, extra_special_tokens=None)
    nested = changed(directory, tmp_path / "nested", TOKENIZER, **dict.fromkeys(NAMED))
    ids = [load_model(path, DECODE_PARTS, device="cpu").chat.prefix_ids(["video"], None) for path in (flat, nested)]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("layout", ["hub", "modern"])
def test_the_command_line_answers(tmp_path, capsys, monkeypatch, layout):
    make_internvl(tmp_path / "model", layout=layout)
    (tmp_path / "good.mp4").write_bytes(video_bytes(20, fps=5, size=(128, 96)))
    (tmp_path / "wide.png").write_bytes(picture_bytes(Image.new("RGB", (300, 96), (200, 30, 30))))
    monkeypatch.chdir(tmp_path)
    for name, frames in (("good.mp4", 8), ("wide.png", 1)):
        argv = ("ask", name, "What is there?", "And then?", "--model", "model", "--json", "--max-tokens", "3")
        assert cli.main([*argv, "--retrieve-keep", "1", "--heatmap", f"{name}.png"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["trip"]["visual_tokens"] == TOKENS * (frames if frames > 1 else 3 + 1)
        assert [len(answer["evidence"]) for answer in document["answers"]] == [frames, frames]
        assert Image.open(f"{name}.png").width >= 600
