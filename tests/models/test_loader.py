"""Loading: only the wanted parts, both layouts on disk, and every broken directory refused with a name."""

import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsevila_cluster.core.errors import BadCheckpoint, BadConfig
from sparsevila_cluster.models import ALL_PARTS, DECODE_PARTS, PREFILL_PARTS, load_model
from sparsevila_cluster.models.checkpoint import Checkpoint
from sparsevila_cluster.models.loading.tensor_names import part_of
from tests.checkpoints import tiny_qwen2_5_vl


def read_names(monkeypatch, *args, **kwargs):
    """(model, names on disk that were read)."""
    seen, original = [], Checkpoint.read

    def watched(self, names, device):
        for name, tensor in original(self, names, device):
            seen.append(name)
            yield name, tensor

    monkeypatch.setattr(Checkpoint, "read", watched)
    return load_model(*args, device="cpu", **kwargs), seen


@pytest.mark.parametrize("layout", ["hub", "modern"])
@pytest.mark.parametrize("parts", [PREFILL_PARTS, DECODE_PARTS, ALL_PARTS, ("llm",)])
def test_only_wanted_parts_are_read(monkeypatch, request, layout, parts):
    directory = request.getfixturevalue(layout)
    model, seen = read_names(monkeypatch, directory, parts)
    tied = layout == "modern"
    visual = [name for name in seen if "visual." in name]
    assert bool(visual) == ("vision" in parts)
    assert ("lm_head.weight" in seen) == ("head" in parts and not tied)
    assert any("embed_tokens" in name for name in seen) == ("embed" in parts or ("head" in parts and tied))
    assert len(seen) == len(set(seen))
    assert model.parts == tuple(parts)
    assert model.weight_bytes == 4 * sum(
        t.numel() for f in directory.glob("*.safetensors") for n, t in load_file(f).items() if n in seen
    )


def test_a_prefill_worker_needs_no_head_and_a_decode_worker_no_tower(hub):
    whole = load_model(hub, device="cpu")
    prefill, decode = load_model(hub, PREFILL_PARTS, device="cpu"), load_model(hub, DECODE_PARTS, device="cpu")
    media = whole.family.patchify(tiny_qwen2_5_vl.media())
    torch.testing.assert_close(prefill.family.encode([media]).embeds, whole.family.encode([media]).embeds)
    assert prefill.text.head_weight is None
    ids = decode.chat.prefix_ids(["video"], None)
    assert torch.equal(decode.family.plan(ids, [media]).ids, whole.family.plan(ids, [media]).ids)
    with pytest.raises(AssertionError, match="vision"):
        decode.family.encode([media])


def test_tied_heads_share_memory(modern):
    model = load_model(modern, device="cpu")
    assert model.text.head_weight.data_ptr() == model.text.embed_weight.data_ptr()


def test_a_tied_head_alone_takes_the_embedding(modern):
    model = load_model(modern, ("llm", "head"), device="cpu")
    assert model.text.embed_weight is None
    torch.testing.assert_close(model.text.head_weight, load_model(modern, device="cpu").text.head_weight)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("layout", ["hub", "modern"])
def test_layouts_hold_the_same_model(tmp_path, model, layout, shards):
    other = load_model(tiny_qwen2_5_vl.make_qwen2_5_vl(tmp_path, layout=layout, shards=shards), device="cpu")
    media = model.family.patchify(tiny_qwen2_5_vl.media())
    assert torch.equal(other.family.patchify(media=tiny_qwen2_5_vl.media()).pixels, media.pixels)
    torch.testing.assert_close(other.family.encode([media]).embeds, model.family.encode([media]).embeds)
    assert torch.equal(other.text.head_weight, model.text.head_weight)
    assert other.chat.eos_ids == model.chat.eos_ids and other.max_position == model.max_position == 4096
    assert other.processor_hash == model.processor_hash


def test_facts_of_a_model(model):
    spec = model.spec
    assert (spec.num_layers, spec.num_kv_heads, spec.head_dim, spec.dtype) == (3, 2, 16, torch.float32)
    assert spec.fingerprint == model.fingerprint and len(model.fingerprint) == len(model.processor_hash) == 64
    assert (model.text.hidden_size, model.text.num_heads, model.text.num_position_rows) == (64, 4, 3)
    assert model.text.name == "lean" and model.device.type == "cpu"


def test_dtype_is_converted_once_and_auto_is_float32_on_a_cpu(tmp_path):
    directory = tiny_qwen2_5_vl.make_qwen2_5_vl(tmp_path, dtype=torch.bfloat16)
    assert load_model(directory, device="cpu").spec.dtype == torch.float32
    model = load_model(directory, device="cpu", dtype="bfloat16")
    assert model.spec.dtype == torch.bfloat16
    tokens = model.family.encode([model.family.patchify(tiny_qwen2_5_vl.media())])
    assert tokens.embeds.dtype == torch.bfloat16 and tokens.salience.dtype == torch.float32


def test_fingerprint(tmp_path, hub):
    def fingerprint(name, edit=None, **kwargs):
        directory = tiny_qwen2_5_vl.make_qwen2_5_vl(tmp_path / name, **kwargs)
        if edit:
            edit(directory)
        return Checkpoint.open(directory).fingerprint()

    def rewrite(key, value):
        def edit(directory):
            config = json.loads((directory / "config.json").read_text())
            config[key] = value
            (directory / "config.json").write_text(json.dumps(config))

        return edit

    def retrain(directory):
        weights = load_file(directory / "model.safetensors")
        save_file({n: t * 1.001 for n, t in weights.items()}, directory / "model.safetensors", metadata={"format": "pt"})

    own = Checkpoint.open(hub).fingerprint()
    assert fingerprint("same") == own
    assert fingerprint("version", rewrite("transformers_version", "9.9")) == own
    assert fingerprint("name", rewrite("_name_or_path", "/elsewhere")) == own
    others = [
        fingerprint("seed", seed=7),
        fingerprint("retrained", retrain),
        fingerprint("theta", rewrite("rope_theta", 1e5)),
        fingerprint("quantized", rewrite("quantization_config", {"quant_method": "awq"})),
        fingerprint("layout", layout="modern"),
    ]
    assert len({own, *others}) == len(others) + 1


def test_processor_hash_sees_preprocessing(tmp_path, model):
    directory = tiny_qwen2_5_vl.make_qwen2_5_vl(tmp_path)
    path = directory / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_pixels": 28 * 28 * 32}))
    assert load_model(directory, device="cpu").processor_hash != model.processor_hash


def test_parts_have_names():
    assert part_of("lm_head.weight") == "head"
    assert part_of("model.visual.blocks.0.norm1.weight") == "vision"
    assert part_of("model.language_model.embed_tokens.weight") == part_of("model.embed_tokens.weight") == "embed"
    assert part_of("model.language_model.layers.0.mlp.up_proj.weight") == part_of("model.language_model.norm.weight") == "llm"


@pytest.mark.parametrize(
    "kwargs,message",
    [
        ({"parts": ("vision", "tail")}, "parts"),
        ({"parts": ("vision",)}, "hold 'llm'"),
        ({"device": "tpu"}, "device"),
        ({"device": "cuda:99"}, "does not exist"),
        ({"device": "meta"}, "device"),
        ({"dtype": "int8"}, "dtype"),
        ({"text_backend": "fast"}, "text_backend"),
        ({"quantization": "int4"}, "quantization must be auto or none"),
    ],
)
def test_bad_arguments(hub, kwargs, message):
    with pytest.raises(BadConfig, match=message):
        load_model(hub, **{"device": "cpu", **kwargs})


def edit_config(**changes):
    def edit(directory):
        path = directory / "config.json"
        config = json.loads(path.read_text())
        config.update(changes)
        path.write_text(json.dumps(config))

    return edit


def edit_weights(change):
    def edit(directory):
        weights = load_file(directory / "model.safetensors")
        change(weights)
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})

    return edit


def remove(name):
    return lambda directory: (directory / name).unlink()


def write(name, data):
    return lambda directory: (directory / name).write_bytes(data)


def cut(num_bytes):
    def edit(directory):
        path = directory / "model.safetensors"
        path.write_bytes(path.read_bytes()[:num_bytes])

    return edit


def index(weight_map):
    return lambda directory: (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


HEAD, NORM = "lm_head.weight", "model.norm.weight"
BROKEN = {
    "not a directory": (lambda d: shutil.rmtree(d), "is not a directory"),
    "no config": (remove("config.json"), "no config.json"),
    "broken JSON": (write("config.json", b"{"), "config.json: not valid JSON"),
    "config is no text": (write("config.json", b"\xff\xfe"), "config.json: not valid JSON"),
    "config is a list": (write("config.json", b"[]"), "must hold a JSON object, got list"),
    "unsupported": (edit_config(model_type="gpt2", architectures=["GPT2"]), "'gpt2'.*GPT2.*supported model types: .*qwen2_5_vl"),
    "no model_type": (edit_config(model_type=None), "model_type None"),
    "longrope": (
        edit_config(rope_scaling={"rope_type": "longrope", "factor": 2.0, "long_factor": [1.0] * 8, "short_factor": [1.0] * 8}),
        "rope_type 'longrope'",
    ),
    "sliding window": (edit_config(use_sliding_window=True, max_window_layers=1, sliding_window=64), "only full attention"),
    "quantized": (
        edit_config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantization_config: quant_method 'gptq' is not",
    ),
    "illegal value": (edit_config(hidden_size="wide"), "config.json: "),
    "heads": (edit_config(num_attention_heads=3), "config.json: "),
    "wrong shape": (edit_config(intermediate_size=96), r"'model.layers.0.mlp.\w+.weight' has shape .* calls for \[.*96"),
    "patch size": (edit_config(vision_config={"patch_size": 7}), "config.json|patch_size"),
    "full layers": (edit_config(vision_config={"fullatt_block_indexes": [9], "window_size": 56, "depth": 4}), "config.json"),
    "missing tensor": (edit_weights(lambda w: w.pop(NORM)), "'model.language_model.norm.weight' is missing from model.safetensors"),
    "missing head": (edit_weights(lambda w: w.pop(HEAD)), "'lm_head.weight' is missing"),
    "wrong tensor": (edit_weights(lambda w: w.update({NORM: torch.ones(3)})), r"'model.norm.weight' has shape \[3\].*\[64\]"),
    "twice": (edit_weights(lambda w: w.update({"model.language_model.norm.weight": torch.ones(64)})), "are both"),
    "no weights": (remove("model.safetensors"), "no model.safetensors"),
    "only bin": (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "found pytorch_model.bin.*only safetensors"),
    "empty file": (cut(0), "truncated"),
    "cut header": (cut(100), "truncated"),
    "cut tensors": (cut(50_000), "truncated: holds .* promises"),
    "not safetensors": (write("model.safetensors", struct.pack("<Q", 4) + b"oops"), "broken header"),
    "header is a list": (write("model.safetensors", struct.pack("<Q", 2) + b"[]"), "broken header"),
    "missing shard": (index({NORM: "model-00001-of-00002.safetensors"}), "missing shard 'model-00001-of-00002.safetensors'"),
    "shard elsewhere": (index({NORM: "../model.safetensors"}), "plain file name"),
    "wrong index": (index({"model.nothing": "model.safetensors"}), "'model.nothing' is not in model.safetensors"),
    "index without map": (write("model.safetensors.index.json", b"{}"), "`weight_map`"),
    "no tokenizer": (remove("tokenizer.json"), "has no tokenizer"),
    "no processor": (remove("preprocessor_config.json"), "no preprocessor_config.json"),
    "broken processor": (write("preprocessor_config.json", b"no"), "preprocessor_config.json: not valid JSON"),
}


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_broken_checkpoints_are_refused(hub, tmp_path, name):
    edit, message = BROKEN[name]
    directory = tmp_path / "broken"
    shutil.copytree(hub, directory)
    edit(directory)
    with pytest.raises(BadCheckpoint, match=message) as caught:
        load_model(directory, device="cpu")
    assert "\n" not in str(caught.value), "one clear line"


def test_missing_parts_of_other_workers_do_not_matter(hub, tmp_path):
    directory = tmp_path / "headless"
    shutil.copytree(hub, directory)
    edit_weights(lambda w: w.pop(HEAD))(directory)
    assert load_model(directory, PREFILL_PARTS, device="cpu").parts == PREFILL_PARTS


def test_lean_refuses_what_it_does_not_compute(hub, tmp_path):
    directory = tmp_path / "gelu"
    shutil.copytree(hub, directory)
    edit_config(hidden_act="gelu")(directory)
    with pytest.raises(BadCheckpoint, match="'lean' cannot run .* hidden_act 'gelu'"):
        load_model(directory, device="cpu", text_backend="lean")
    assert load_model(directory, device="cpu").text.name == "hf"
