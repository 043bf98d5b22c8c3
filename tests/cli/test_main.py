"""The command line as a user meets it: what is printed where, exit codes, and one line for every mistake."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image

import sparsevila_cluster.demo as demo
from sparsevila_cluster.cli import config_command
from sparsevila_cluster.cli import main as cli
from sparsevila_cluster.core.config import EngineConfig, load_config
from sparsevila_cluster.core.errors import Internal, QueueFull
from tests.checkpoints.tiny_qwen2_5_vl import make_qwen2_5_vl
from tests.core.test_progress_line import Terminal
from tests.media.media_files import audio_bytes, picture_bytes, video_bytes

ROOT = Path(__file__).parents[2]

BUNDLED = Path(list(demo.__path__)[0]) / "checkpoint"
SUMMARY_MS = {"decode", "encode", "prune", "prefill", "transfer", "question", "retrieve", "step"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return BUNDLED if (BUNDLED / "config.json").exists() else make_qwen2_5_vl(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def files(tmp_path_factory, checkpoint):
    """A folder of good and bad media, configurations and directories; `model` is a checkpoint."""
    folder = tmp_path_factory.mktemp("files")
    good = video_bytes(20, fps=5, size=(128, 96))
    contents = {
        "good.mp4": good,
        "picture.png": picture_bytes(Image.new("RGB", (128, 96), (200, 30, 30))),
        "cut.mp4": good[: len(good) // 2],
        "empty.mp4": b"",
        "audio.mp4": audio_bytes(),
        "text.mp4": b"This is no video. " * 100,
        "codec.mp4": good.replace(b"avc1", b"zzzz"),
        "key.yaml": b"prune_kep: 0.5\n",
        "ratio.yaml": b"sparsity: {retrieve_keep: 1.5}\n",
        "list.yaml": b"- 1\n",
        "broken.yaml": b"model: [",
        "good.yaml": b"prune_keep: 0.5\nretrieve_keep: 0.3\nmax_frames: 8\n",
        "few.yaml": b"limits: {max_frames: 4}\nmax_question_tokens: 20\n",
    }
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    (folder / "nothing").mkdir()
    (folder / "model").symlink_to(checkpoint, target_is_directory=True)
    return folder


@pytest.fixture
def run(files, monkeypatch, capsys):
    """Run a command in the folder of files; {model} becomes an option. Returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(files)

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        argv = [w for word in words for w in (("--model", "model") if word == "{model}" else (word,))]
        code = cli.main(argv)
        return code, *capsys.readouterr()

    return call


# ---- results ---------------------------------------------------------------------------------------------------------


def test_json_is_one_document_with_every_field(run):
    code, out, err = run("ask", "good.mp4", "What is there?", "And then?", "{model}", "--json", "--max-tokens", "4")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert set(document) == {"answers", "trip", "model", "sparsity"} and out.count("\n") == 1
    assert [answer["question"] for answer in document["answers"]] == ["What is there?", "And then?"]
    for answer in document["answers"]:
        assert set(answer) == {"question", "answer", "num_tokens", "finish_reason", "evidence", "ms"}
        assert 1 <= answer["num_tokens"] <= 4 and answer["finish_reason"] in ("stop", "length")
        shares = [seen["share"] for seen in answer["evidence"]]
        assert shares == sorted(shares, reverse=True) and min(shares) > 0 and sum(shares) == pytest.approx(1, abs=1e-4)
        assert all(set(seen) == {"frame", "time_s", "share"} for seen in answer["evidence"])
        assert {"ttft", "total"} <= set(answer["ms"])
    summary = document["trip"]
    assert set(summary["ms"]) == SUMMARY_MS and summary["ms"]["transfer"] == 0 and summary["ms"]["decode"] > 0
    assert summary["num_frames"] == 8
    assert 0 < summary["visual_tokens_retrieved"] < summary["visual_tokens_kept"] < summary["visual_tokens"]
    assert 0 < summary["kv_bytes"] < summary["dense_kv_bytes"]
    assert document["sparsity"]["prune_keep"] == 0.25 and document["sparsity"]["retrieve_keep"] == 0.10
    assert document["sparsity"]["prune_scope"] == "per_group" and document["model"] == "model"


def test_text_ends_with_the_summary_line(run):
    code, out, err = run("ask", "good.mp4", "What is there?", "And then?", "{model}", "--max-tokens", "4")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line for line in lines if line.startswith("Q: ")] == ["Q: What is there?", "Q: And then?"]
    assert sum(line.startswith("A:") for line in lines) == 2 and out.count("looked at") == 2
    assert lines[-1].startswith("8 frames -> ") and " packed -> " in lines[-1] and "wire" not in lines[-1]


def test_options_change_the_summary(run):
    base = ("ask", "good.mp4", "What?", "{model}", "--json", "--max-tokens", "2")
    dense = json.loads(run(*base, "--prune", "keep_all", "--retrieve", "retrieve_all")[1])
    assert dense["trip"]["visual_tokens"] == dense["trip"]["visual_tokens_kept"] == dense["trip"]["visual_tokens_retrieved"]
    assert dense["sparsity"]["prune_keep"] == dense["sparsity"]["retrieve_keep"] == 1
    fewer = json.loads(run(*base, "--max-frames", "4", "--prune-keep", "0.5", "--retrieve-keep", "0.5")[1])
    assert fewer["trip"]["num_frames"] == 4
    assert fewer["trip"]["visual_tokens_kept"] == pytest.approx(fewer["trip"]["visual_tokens"] / 2, rel=0.1)


def test_options_override_the_file(run):
    base = ("ask", "good.mp4", "What?", "{model}", "--json", "--max-tokens", "2", "--config", "good.yaml")
    assert json.loads(run(*base)[1])["sparsity"]["prune_keep"] == 0.5
    sparsity = json.loads(run(*base, "--prune-keep", "1")[1])["sparsity"]
    assert (sparsity["prune_keep"], sparsity["retrieve_keep"]) == (1, 0.3)


def test_budget_options_reach_the_engine(run):
    base = ("ask", "good.mp4", "What is there?", "{model}", "--json", "--max-tokens", "8", "--retrieve-keep", "0.9")
    plain, mass, fresh = (json.loads(run(*base, *extra)[1]) for extra in ((), ("--retrieve-mass", "0.2"), ("--refresh-every", "2")))
    assert mass["trip"]["visual_tokens_retrieved"] < plain["trip"]["visual_tokens_retrieved"]
    assert mass["sparsity"]["retrieve_mass"] == 0.2 and fresh["sparsity"]["refresh_every"] == 2


def test_sampling_options_reach_the_engine(run):
    base = ("ask", "good.mp4", "What is there?", "{model}", "--json", "--max-tokens", "8", "--temperature", "5")
    first, same, other = (json.loads(run(*base, "--seed", seed)[1])["answers"][0] for seed in ("1", "1", "2"))
    assert first["answer"] == same["answer"] != other["answer"]
    stopped = json.loads(run(*base, "--seed", "1", "--stop", first["answer"][1])[1])["answers"][0]
    assert stopped["answer"] == first["answer"].split(first["answer"][1])[0] and stopped["finish_reason"] == "stop"


def test_an_image_and_its_heat_map(run, files, tmp_path):
    target = tmp_path / "looked_at.png"
    code, out, err = run("ask", "picture.png", "What is it?", "{model}", "--json", "--heatmap", str(target))
    assert code == 0 and err == f"heat map: {target}\n"
    document = json.loads(out)
    assert document["trip"]["num_frames"] == 1 and document["sparsity"]["prune_scope"] == "global"
    assert Image.open(target).width >= 600


def test_several_media_are_one_conversation(run, tmp_path):
    target = tmp_path / "looked_at.png"
    base = ("ask", "good.mp4", "--also", "picture.png", "--also", "good.mp4", "What?", "{model}", "--max-tokens", "2")
    code, out, _ = run(*base, "--json", "--heatmap", str(target))
    document = json.loads(out)
    assert code == 0 and document["trip"]["num_frames"] == 8 + 1 + 8 and Image.open(target).width > 600
    seen = document["answers"][0]["evidence"]
    assert {one["media"] for one in seen} == {0, 1, 2} and sum(one["share"] for one in seen) == pytest.approx(1, abs=1e-4)
    code, out, _ = run(*base)
    looked = next(line for line in out.splitlines() if "looked at" in line)
    assert code == 0 and ("good.mp4 at " in looked or "picture.png (" in looked) and out.splitlines()[-1].startswith("17 frames")


def test_config_check_prints_what_counts(run):
    code, out, err = run("config", "check", "good.yaml")
    assert (code, err) == (0, "")
    assert EngineConfig(**yaml.safe_load(out)) == load_config("good.yaml")
    code, out, err = run("config", "check", "good.yaml", "--json")
    assert code == 0 and EngineConfig(**json.loads(out)["config"]) == load_config("good.yaml")


# ---- mistakes --------------------------------------------------------------------------------------------------------

LONG = " ".join(["word"] * 3000)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        # the call itself
        ((), "COMMAND"),
        (("guess",), "'guess'"),
        (("config",), "ACTION"),
        (("ask", "good.mp4"), "QUESTION"),
        (("ask", "good.mp4", "q", "--colour", "red"), "--colour"),
        (("ask", "good.mp4", "q", "--max-tokens", "many"), "'many'"),
        # media
        (("ask", "missing.mp4", "q"), "'missing.mp4'"),
        (("ask", "good.mp4", "q", "--also", "missing.mp4"), "'missing.mp4'"),
        (("ask", "nothing", "q"), "directory"),
        (("ask", "empty.mp4", "q"), "empty"),
        (("ask", "https://example.org/a.mp4", "q"), "URL"),
        (("ask", "cut.mp4", "q", "{model}"), "'cut.mp4'"),
        (("ask", "audio.mp4", "q", "{model}"), "audio"),
        (("ask", "text.mp4", "q", "{model}"), "'text.mp4'"),
        (("ask", "codec.mp4", "q", "{model}"), "'codec.mp4'"),
        # the model
        (("ask", "good.mp4", "q", "--model", "nothing"), "'nothing' is no checkpoint"),
        (("ask", "good.mp4", "q", "--model", "missing"), "'missing'"),
        (("ask", "good.mp4", "q", "{model}", "--device", "abacus"), "'abacus'"),
        (("ask", "good.mp4", "q", "{model}", "--attention", "flash"), "'auto', 'torch', 'triton'"),
        (("ask", "good.mp4", "q", "{model}", "--decode-graphs", "all"), "'auto', 'none'"),
        (("demo", "--model", "nothing", "--out", "demo"), "'nothing' is no checkpoint"),
        (("demo", "--out", "good.mp4"), "'good.mp4'"),
        # numbers
        *[
            (("ask", "good.mp4", "q", f"--{side}-keep", ratio), f"--{side}-keep: must be in (0, 1], got '{ratio}'")
            for side in ("prune", "retrieve")
            for ratio in ("0", "-0.1", "1.5", "nan", "half")
        ],
        (("ask", "good.mp4", "q", "--retrieve-mass", "2"), "--retrieve-mass: must be in (0, 1], got '2'"),
        (("ask", "good.mp4", "q", "--refresh-every", "-1"), "refresh_every: input should be greater than or equal to 0, got -1"),
        (("ask", "good.mp4", "q", "--refresh-every", "3", "--retrieve", "random"), "needs retrieve='query_topk'"),
        (("ask", "good.mp4", "q", "--prune", "some"), "'keep_all', 'random', 'uniform', 'salience'"),
        (("ask", "good.mp4", "q", "--fps", "0"), "fps"),
        (("ask", "good.mp4", "q", "--max-frames", "0"), "max_frames"),
        (("ask", "good.mp4", "q", "--max-tokens", "0"), "max_tokens must be an integer >= 1, got 0"),
        (("ask", "good.mp4", "q", "--temperature", "-1"), "temperature must be in [0, 10], got -1.0"),
        (("ask", "good.mp4", "q", "--top-p", "0"), "top_p must be in (0, 1], got 0.0"),
        (("ask", "good.mp4", "q", "--top-k", "-1"), "top_k"),
        (("ask", "good.mp4", "q", "{model}", "--config", "few.yaml"), "max_frames=64 is over the limit of 4"),
        # text
        (("ask", "good.mp4", ""), "question must be non-empty text, got ''"),
        (("ask", "good.mp4", "q", "  "), "question must be non-empty text"),
        (("ask", "good.mp4", "\udcff"), "UTF-8"),
        (("ask", "good.mp4", LONG, "{model}"), "2048"),
        (("ask", "good.mp4", "q", "--stop", ""), "stop strings must be non-empty text, got ''"),
        # configuration and targets
        (("ask", "good.mp4", "q", "--config", "key.yaml"), "unknown config key 'prune_kep'; legal keys: "),
        (("config", "check", "key.yaml"), "unknown config key 'prune_kep'"),
        (("config", "check", "ratio.yaml"), "retrieve_keep: input should be less than or equal to 1, got 1.5"),
        (("config", "check", "list.yaml"), "mapping"),
        (("config", "check", "broken.yaml"), "not YAML"),
        (("config", "check", "missing.yaml"), "'missing.yaml'"),
        (("ask", "good.mp4", "q", "--heatmap", "picture.bmp"), "'picture.bmp'"),
        (("ask", "good.mp4", "q", "--heatmap", "missing/picture.png"), "'missing'"),
    ],
    ids=lambda value: " ".join(word[:30] for word in value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_told_in_one_line(run, words, told):
    for extra in ((), ("--json",)) if words and words[0] == "ask" else ((),):
        code, out, err = run(*words, *extra)
        assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
        assert told in err and "Traceback" not in err


def its_own_cause(error: Exception) -> Exception:
    error.__cause__ = error
    return error


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (QueueFull("256 turns are waiting"), 1, "error: 256 turns are waiting\n"),
        (Internal("KeyError: 'x'"), 1, "internal error: KeyError: 'x' (-v shows where)\n"),
        (its_own_cause(QueueFull("full")), 1, "error: full\n"),
        (RuntimeError("two\nlines"), 1, "internal error: RuntimeError: two lines (-v shows where)\n"),
    ],
    ids=repr,
)
def test_what_is_not_the_users_mistake(run, monkeypatch, error, code, told):
    def fail(path):
        raise error

    monkeypatch.setattr(config_command, "load_config", fail)
    assert run("config", "check", "good.yaml") == (code, "", told)
    shown = run("config", "check", "good.yaml", "-v")[2]
    assert shown.endswith(told) and ("Traceback" in shown) == isinstance(error, RuntimeError)


# ---- the process -----------------------------------------------------------------------------------------------------


def spawn(*words: str, **options) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen([sys.executable, "-m", "sparsevila_cluster", *words], cwd=ROOT, text=True, **pipes)


def test_help_and_config_check_load_no_heavy_library(files):
    code = (
        "import sys; from sparsevila_cluster.cli.main import main\n"
        "for argv in ('--help', 'ask --help', '--version', f'config check {sys.argv[1]}', 'ask x --json'):\n"
        "    main(argv.split())\n"
        "assert not {'torch', 'transformers', 'numpy', 'av'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, str(files / "good.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "config" in done.stdout and "--heatmap" in done.stdout


def test_a_closed_pipe_is_no_traceback(files):
    reader, writer = os.pipe()
    os.close(reader)
    child = spawn("config", "check", str(files / "good.yaml"), stdout=writer)
    os.close(writer)
    assert child.wait(timeout=120) == 141 and child.stderr.read() == ""
    child.stderr.close()


def test_control_c_ends_in_one_line(files, checkpoint, interruptible):
    child = spawn("ask", str(files / "good.mp4"), "q", "--model", str(checkpoint), "-v")
    assert "loading the model" in child.stderr.readline()
    time.sleep(0.5)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=120)
    # 0: somebody's destructor swallowed the interrupt, which Python allows. -SIGINT: it hit code that C was running, and then
    # Python ends itself by the signal however well the interrupt was handled; a shell shows 130 for that, too.
    assert child.returncode in (0, 130, -signal.SIGINT) and "Traceback" not in err, err
    assert child.returncode == 0 or err.splitlines()[-1] == "interrupted"


def test_progress_shows_on_a_terminal_and_leaves(run, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    code, out, _ = run("ask", "good.mp4", "q", "{model}", "--json", "--max-tokens", "2")
    assert code == 0 and json.loads(out)
    shown = screen.getvalue()
    assert "load model" in shown and "prefill" in shown and shown.rstrip().endswith("\x1b[2K")  # the line is wiped
