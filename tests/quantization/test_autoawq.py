"""AutoAWQ as an engine: how its environment is found and its process watched. AutoAWQ itself runs only where it is installed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparsevila_cluster.core.errors import BadRequest, DeadlineExceeded, Unavailable
from sparsevila_cluster.models.loading.originals import read_vocabulary
from sparsevila_cluster.models.loading.text_only import load_text
from sparsevila_cluster.quantization import autoawq_env
from sparsevila_cluster.quantization.autoawq_env import READY, default_env, find_env, python_of, run_autoawq, run_process
from sparsevila_cluster.quantization.compare import compare
from sparsevila_cluster.quantization.job import quantize_checkpoint
from tests.quantization.quantization_subjects import READING, make_text_model, settings, texts

SCRIPT = Path(autoawq_env.__file__).with_name("autoawq_script.py")
INSTALLED = Path(os.environ.get("SPARSEVILA_AUTOAWQ_ENV") or default_env())


def python(code):
    return [sys.executable, "-c", code]


def test_progress_is_read_from_the_bar_of_the_process():
    code = r"""
import sys
for i in range(3):
    sys.stderr.write(f"\rAWQ:  50%|#####     | {i}/3 [00:03<00:03,  3.2s/it]")
print("\nother words")
"""
    seen = []
    run_process(python(code), 60, "it", lambda *progress: seen.append(progress))
    assert seen == [("layer", 0, 3), ("layer", 1, 3), ("layer", 2, 3)]


def test_a_process_that_fails_says_its_last_lines():
    with pytest.raises(Unavailable, match=r"it failed \(exit code 3\): first \| second"):
        run_process(python("import sys; print('first'); print('second'); sys.exit(3)"), 60, "it")
    with pytest.raises(Unavailable, match=r"exit code -9\): it said nothing"):
        run_process(python("import os; os.kill(os.getpid(), 9)"), 60, "it")


def test_a_process_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path):
    child = tmp_path / "child"
    command = ["sh", "-c", f"sleep 600 & echo $! > '{child}'; sleep 600"]
    with pytest.raises(DeadlineExceeded, match="it took longer than 1 s"):
        run_process(command, 1, "it")
    assert gone(int(child.read_text()))


def gone(pid, within_s=20):
    """Dead, or a zombie that nobody has asked about."""
    end_s = time.monotonic() + within_s
    while time.monotonic() < end_s:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_the_script_ends_when_whoever_started_it_is_killed(tmp_path):
    """By a signal that leaves nobody time to clean up."""
    code = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", '''
import sys, time
sys.path.insert(0, {str(SCRIPT.parent)!r})
import autoawq_script
autoawq_script.end_with_parent()
time.sleep(600)
'''], stdin=subprocess.PIPE)
print(child.pid, flush=True)
child.wait()
"""
    starter = subprocess.Popen(python(code), stdout=subprocess.PIPE, text=True)
    pid = int(starter.stdout.readline())
    starter.send_signal(signal.SIGKILL)
    starter.wait()
    assert gone(pid)


def test_an_environment_that_is_not_there_says_how_to_make_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(BadRequest, match=r"autoawq-0\.2\.9'; --create-env installs"):
        find_env(None, False)
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(BadRequest, match="no environment of Python"):
        find_env(str(tmp_path), True)
    assert (tmp_path / "mine").read_text() == "precious"


def test_an_environment_is_ready_only_once_everything_is_installed(tmp_path, monkeypatch):
    """Without the packages: what they are is a matter of the table, whose order counts."""
    assert [pin.partition("=")[0] for pins in autoawq_env.PINS for pin in pins][0] == "torch"
    done = []

    def run(command, within_s, what):
        done.append(command)
        if "venv" in command:
            (tmp_path / "env").mkdir()
            (tmp_path / "env" / "pyvenv.cfg").touch()
        if len(done) == 2:
            raise Unavailable("no network")

    monkeypatch.setattr(autoawq_env, "run_process", run)
    with pytest.raises(Unavailable):
        find_env(str(tmp_path / "env"), True)
    with pytest.raises(BadRequest, match="--create-env --env"):
        find_env(str(tmp_path / "env"), False)
    assert find_env(str(tmp_path / "env"), True) == tmp_path / "env"
    assert (tmp_path / "env" / READY).is_file() and find_env(str(tmp_path / "env"), False) == tmp_path / "env"
    assert [command[-1] for command in done[-2:]] == [pins[-1] for pins in autoawq_env.PINS]


@pytest.fixture
def fake_env(tmp_path, monkeypatch):
    """An environment whose interpreter is this one, and a script that only copies its request."""
    env = tmp_path / "env"
    (env / "bin").mkdir(parents=True)
    python_of(env).symlink_to(sys.executable)
    (env / READY).touch()
    monkeypatch.setattr(autoawq_env, "__file__", str(tmp_path / "autoawq_env.py"))

    def script(body):
        (tmp_path / "autoawq_script.py").write_text("import json, os, sys\nrequest = json.load(open(sys.argv[1]))\n" + body)
        return env

    return script


def ask(env, source, target, materials, **fields):
    given = {"group_size": None, "clip": True, "text_tokens": 16, "deadline_s": 60, **fields}
    return run_autoawq(env, source, target, read_vocabulary(source), materials, **given)


def test_a_run_is_given_ids_and_leaves_nothing_half_done(fake_env, text_model, tmp_path):
    env = fake_env(f"print(json.dumps(request)); open({str(tmp_path / 'request')!r}, 'w').write(json.dumps(request)); sys.exit(1)")
    with pytest.raises(Unavailable, match="AutoAWQ failed"):
        ask(env, text_model, tmp_path / "target", texts(2, 20))
    request = json.loads((tmp_path / "request").read_text())
    assert [len(ids) for ids in request["ids"]] == [16, 4, 16, 4] and request["length"] == 16
    assert request["group_size"] == 64 and request["clip"] is True and request["source"] == str(text_model)
    assert [ids for material in texts(2, 20) for ids in material.ids] == [one for ids in request["ids"] for one in ids]
    assert not (tmp_path / "target").exists()


def test_a_run_that_ends_well_is_completed_with_the_sources_other_files(fake_env, text_model, tmp_path):
    """A stand-in that copies the checkpoint: what comes of a run is checked and moved in one step."""
    env = fake_env(
        "import shutil; shutil.copytree(request['source'], request['target']); os.remove(request['target'] + '/tokenizer.json')"
    )
    outcome = ask(env, text_model, tmp_path / "target", texts(2, 20))
    assert outcome.num_linears == 0 and (tmp_path / "target" / "tokenizer.json").is_file()
    assert not (tmp_path / ".target.quantizing").exists()
    with pytest.raises(BadRequest, match="exists"):
        ask(env, text_model, tmp_path / "target", texts(2, 20))


def test_text_is_what_it_needs(fake_env, vl, text_model, tmp_path):
    with pytest.raises(BadRequest, match="AutoAWQ sees only text"):
        ask(fake_env(""), text_model, tmp_path / "target", [])
    with pytest.raises(BadRequest, match="group_size 48"):
        ask(fake_env(""), vl, tmp_path / "target", texts(1), group_size=48)


@pytest.mark.slow
@pytest.mark.skipif(not (INSTALLED / READY).is_file(), reason=f"AutoAWQ is not installed in {INSTALLED}")
def test_our_engine_is_as_near_as_autoawq(tmp_path):
    """On the same tokens, with outliers in the activations, as trained models have them."""
    import torch
    from safetensors.torch import load_file, save_file

    source = make_text_model(tmp_path / "source", hidden_size=128, intermediate_size=256, head_dim=32, initializer_range=0.04)
    weights = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name in sorted(weights):
        if "layernorm" in name:
            weights[name] = torch.exp(torch.randn(128, generator=generator) * 0.8)
            weights[name][torch.randperm(128, generator=generator)[:4]] *= 25
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    materials, held_out = texts(32, 64, seed=1), texts(16, 64, seed=2)
    ask(INSTALLED, source, tmp_path / "autoawq", materials, text_tokens=64, deadline_s=600)
    quantize_checkpoint(source, tmp_path / "own", materials, settings(num_steps=20, search_rows=8192))
    others = [tmp_path / "autoawq", tmp_path / "own"]
    assert all(load_text(other, device="cpu").spec.num_layers == 2 for other in others)
    theirs, ours = compare(source, others, read_vocabulary(source), held_out, READING, device="cpu")
    assert ours.kl <= theirs.kl
