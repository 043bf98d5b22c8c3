"""`sparsevila quantize` and `sparsevila compare` as a user meets them."""

import json
import shutil

import pytest

from sparsevila_cluster.cli import main as cli
from sparsevila_cluster.models import load_model
from tests.quantization.quantization_subjects import make_text_model

SMALL = ("--examples", "4", "--text-tokens", "32", "--max-frames", "4")


@pytest.fixture
def run(tmp_path, vl, text_model, monkeypatch, capsys):
    """Run a command in an empty folder with the checkpoints `vl` and `text`; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vl").symlink_to(vl, target_is_directory=True)
    (tmp_path / "text").symlink_to(text_model, target_is_directory=True)

    def call(*words):
        capsys.readouterr()
        code = cli.main([str(word) for word in words])
        return code, *capsys.readouterr()

    return call


def test_a_vision_language_model_from_start_to_comparison(run, tmp_path):
    code, out, err = run("quantize", "vl", "small", "--synthetic", *SMALL, "--vision", "w8a8")
    assert (code, err) == (0, "") and out.startswith("small: 21 linears in 4 bits (groups of 64)")
    model = load_model(tmp_path / "small", device="cpu")
    assert model.weight_bytes < load_model(tmp_path / "vl", device="cpu").weight_bytes
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    code, out, err = run("compare", "vl", "vl", "small", "--synthetic", *SMALL, "--json")
    assert (code, err) == (0, "")
    same, small = json.loads(out)["distances"]
    assert same["kl"] == 0 and same["same_top"] == 1 and same["relative_error"] == 0
    assert small["kl"] > 0 and small["stored_bytes"] < same["stored_bytes"] and small["num_tokens"] == same["num_tokens"] > 100


def test_a_language_model_prints_a_table(run):
    code, out, err = run("quantize", "text", "small", "--synthetic", *SMALL, "--json", "--group-size", "32", "--keep", "o_proj")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert (facts["num_linears"], facts["group_size"], facts["num_samples"], facts["num_tokens"]) == (12, 32, 4, 128)
    code, out, err = run("compare", "text", "small", "--synthetic", *SMALL)
    assert (code, err) == (0, "") and "KL (nats)" in out and "small" in out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("quantize", "vl", "new"), "one of the arguments --calibration --synthetic is required"),
        (("quantize", "vl", "vl", "--synthetic"), "exists"),
        (("quantize", "vl", "no/where", "--synthetic"), "is not a directory"),
        (("quantize", "missing", "new", "--synthetic"), "is not a directory"),
        (("quantize", "vl", "new", "--synthetic", "--group-size", "48"), "group_size 48 does not divide the 64 inputs of"),
        (("quantize", "vl", "new", "--synthetic", "--group-size", "12"), "group_size must be a multiple of 8, got 12"),
        (("quantize", "vl", "new", "--synthetic", "--keep", "q_prog"), "'q_prog'"),
        (("quantize", "vl", "new", "--synthetic", "--alpha", "2"), "alpha must be in [0, 1], got 2.0"),
        (("quantize", "vl", "new", "--synthetic", "--examples", "0"), "--examples must be at least 1, got 0"),
        (("quantize", "vl", "new", "--calibration", "nothing"), "'nothing' is not a directory"),
        (("quantize", "vl", "new", "--synthetic", "--no-media", "--vision", "w8a8"), "--vision none"),
        (("quantize", "text", "new", "--synthetic", "--vision", "w8a8"), "--vision none"),
        (("quantize", "vl", "new", "--synthetic", "--engine", "autoawq", "--vision", "w8a8"), "are for --engine own"),
        (("quantize", "vl", "new", "--synthetic", "--engine", "autoawq", "--env", "nothing"), "--create-env --env nothing"),
        (("compare", "vl", "text", "--synthetic"), "is a qwen2, 'vl' a qwen2_5_vl"),
        (("compare", "vl", "--synthetic"), "QUANTIZED"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(run, tmp_path, words, told):
    code, out, err = run(*words, *(SMALL if "--examples" not in words else ()))
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("error: ") and told in err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("broken.mp4", b"This is no video. " * 100, "broken.mp4: "),
        ("texts.jsonl", b'{"text": "x"}\n{"text": 1}', "texts.jsonl, line 2: "),
        ("far.jsonl", b'{"ids": [1, 99999]}', "far.jsonl, line 1: the model has no token 99999"),
        ("text.txt", b"\xff", "text.txt: not UTF-8"),
        (".hidden", b"", "holds no media"),
    ],
)
def test_a_broken_calibration_is_named(run, tmp_path, name, content, told):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / name).write_bytes(content)
    code, out, err = run("quantize", "vl", "new", "--calibration", "folder")
    assert code == 2 and out == "" and err.count("\n") == 1 and told in err
    assert not (tmp_path / "new").exists()
    code, _, err = run("compare", "vl", "vl", "--inputs", "folder")
    assert code == 2 and told in err


def test_what_is_quantized_already_is_refused(run):
    assert run("quantize", "text", "small", "--synthetic", *SMALL)[0] == 0
    code, _, err = run("quantize", "small", "smaller", "--synthetic", *SMALL)
    assert code == 2 and "is quantized already" in err


def test_sizes_that_no_group_divides_are_named(run, tmp_path):
    make_text_model(tmp_path / "odd", intermediate_size=72)
    code, _, err = run("quantize", "odd", "new", "--synthetic", *SMALL)
    assert code == 2 and "mlp.down_proj: no group size of 128, 64, 32 divides its 72 inputs" in err
    make_text_model(tmp_path / "odder", intermediate_size=68)
    code, _, err = run("quantize", "odder", "new", "--synthetic", *SMALL)
    assert code == 2 and "68 outputs are no multiple of 8" in err
    shutil.rmtree(tmp_path / "odder")
