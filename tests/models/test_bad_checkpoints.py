"""What goes wrong with checkpoint directories in the wild, for every family: refused before serving, file and tensor named."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsevila_cluster.core.errors import BadCheckpoint
from sparsevila_cluster.models import load_model
from tests.checkpoints.families import FAMILIES

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4976698672\n"


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def sound(request, tmp_path_factory):
    """A sharded checkpoint with an own head."""
    return FAMILIES[request.param].make(tmp_path_factory.mktemp(request.param), layers=3, shards=2)


@pytest.fixture
def directory(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "checkpoint")


def shard_of(directory, ending):
    """(file, name on disk) of the tensor with this ending."""
    weight_map = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    return next((file, name) for name, file in sorted(weight_map.items()) if name.endswith(ending))


def change(directory, ending, new):
    """Replace a tensor; new(name, old) gives the tensors that take its place."""
    file, name = shard_of(directory, ending)
    weights = load_file(directory / file)
    replaced = new(name, weights.pop(name))
    save_file({**weights, **replaced}, directory / file, metadata={"format": "pt"})
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][name]
    index["weight_map"].update(dict.fromkeys(replaced, file))
    path.write_text(json.dumps(index))
    return file, name


def set_config(directory, **values):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refused(directory, *words):
    with pytest.raises(BadCheckpoint) as caught:
        load_model(directory)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


MLP = "layers.1.mlp.down_proj.weight"


def test_missing_shard(directory):
    (directory / "model-00002-of-00002.safetensors").unlink()
    refused(directory, "missing shard", "model-00002-of-00002.safetensors", "model.safetensors.index.json")


def test_truncated_shard(directory):
    path = directory / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    refused(directory, "model-00001-of-00002.safetensors", "truncated")


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "config.json", "model.safetensors.index.json"])
def test_git_lfs_pointers(directory, name):
    (directory / name).write_bytes(LFS)
    refused(directory, name, "Git LFS pointer")


def test_wrong_shape(directory):
    file, name = change(directory, MLP, lambda name, old: {name: old[:, :-8].contiguous()})
    refused(directory, file, name, "shape")


def test_missing_tensor(directory):
    change(directory, MLP, lambda name, old: {})
    refused(directory, MLP, "missing from model-00001-of-00002.safetensors, model-00002-of-00002.safetensors")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_quantized_tensors_without_a_word_about_it(directory, dtype):
    file, name = change(directory, MLP, lambda name, old: {name: old.to(dtype)})
    refused(directory, file, name, "stored as", "F32")


def test_more_layers_than_the_config_describes(directory):
    file, name = change(directory, MLP, lambda name, old: {name: old, name.replace(".1.", ".7."): old.clone()})
    refused(directory, file, name.replace(".1.", ".7."), "no layer that config.json describes")


def test_no_tokenizer(directory):
    (directory / "tokenizer.json").unlink()
    refused(directory, "no tokenizer", "tokenizer.json")


def test_no_processor(directory):
    for name in ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"):
        (directory / name).unlink(missing_ok=True)
    refused(directory, "preprocessor_config.json")


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "fp8", "something_new", None])
def test_quantization_of_an_unknown_kind(directory, method):
    set_config(directory, quantization_config={} if method is None else {"quant_method": method})
    refused(directory, "config.json", "quantization_config", repr(method))


def test_no_head_and_nothing_tied(directory):
    change(directory, "lm_head.weight", lambda name, old: {})
    set_config(directory, tie_word_embeddings=False)  # said nothing, some configs read as tied
    refused(directory, "lm_head.weight", "missing")


def test_tied_head_that_differs_from_the_embedding(directory):
    text = json.loads((directory / "config.json").read_text()).get("text_config")
    set_config(directory, tie_word_embeddings=True, **({"text_config": {**text, "tie_word_embeddings": True}} if text else {}))
    _, name = shard_of(directory, "lm_head.weight")
    refused(directory, name, "embed_tokens.weight", "tie_word_embeddings")


def test_tied_head_stored_a_second_time(directory):
    file, embed = shard_of(directory, "embed_tokens.weight")
    table = load_file(directory / file)[embed]
    change(directory, "lm_head.weight", lambda name, old: {name: table.clone()})
    set_config(directory, tie_word_embeddings=True)
    model = load_model(directory)
    assert model.text.head_weight.data_ptr() == model.text.embed_weight.data_ptr()


def test_tied_by_the_text_config_only(sound, directory):
    config = json.loads((directory / "config.json").read_text())
    if "text_config" not in config:
        pytest.skip("this layout has no text config of its own")
    set_config(directory, tie_word_embeddings=False, text_config={**config["text_config"], "tie_word_embeddings": True})
    change(directory, "lm_head.weight", lambda name, old: {})
    model = load_model(directory)
    assert model.text.head_weight.data_ptr() == model.text.embed_weight.data_ptr()


def test_a_tensor_under_two_names(directory):
    def twice(name, old):
        for one, other in (("model.language_model.", "language_model.model."), ("model.layers", "model.language_model.layers")):
            if one in name:
                return {name: old, name.replace(one, other): old.clone()}
        return {name: old, f"model.{name.replace('language_model.model.', 'language_model.')}": old.clone()}

    file, _ = change(directory, MLP, twice)
    refused(directory, file, MLP)  # both names, or the one that no layer has


def test_tokens_without_an_embedding(directory):
    path = directory / "tokenizer.json"
    data = json.loads(path.read_text())
    last = max(token["id"] for token in data["added_tokens"])
    plain = {**data["added_tokens"][-1], "special": False}
    data["added_tokens"] += [{**plain, "id": last + 500, "content": "<far>"}, {**plain, "id": last + 501, "content": "<farther>"}]
    path.write_text(json.dumps(data))
    refused(directory, "vocab_size", "tokenizer")


def test_no_chat_template(directory):
    for name in ("chat_template.jinja", "chat_template.json"):
        (directory / name).unlink(missing_ok=True)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}))
    refused(directory, "chat template", "chat_template.jinja")
