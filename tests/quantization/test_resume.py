"""Killed at any moment, a quantization leaves no destination, and the same call ends as if nothing had happened."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sparsevila_cluster.core.errors import BadRequest, TooLarge
from sparsevila_cluster.models import load_model
from sparsevila_cluster.quantization import job, work_dir
from sparsevila_cluster.quantization.job import quantize_checkpoint
from tests.checkpoints import tiny_qwen2_5_vl
from tests.quantization.quantization_subjects import dialogue, settings, texts
from tests.structure import ROOT

# Every finished file is synced once before it gets its name; a process ends itself there, with SIGKILL, at the wanted one. The
# processes are forked from one that has done all slow imports.
KILLED = """
import json, os, signal, sys
from tests.quantization.test_resume import quantize
source, warm, *moments = json.loads(sys.argv[1])
quantize(source, warm)
for at, target in moments:
    child = os.fork()
    if child == 0:
        seen, real = [0], os.fsync
        def fsync(handle):
            seen[0] += 1
            if seen[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)
            real(handle)
        os.fsync = fsync
        quantize(source, target)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
# record, vision, three layers, three shards, index, config.json, the directory itself
MOMENTS = {
    "first layer": 3,
    "between layers": 4,
    "first shard": 6,
    "last shard": 8,
    "config.json": 10,
    "before the rename": 11,
    "after the rename": 12,
}


def quantize(source, target, **fields):
    materials = [*texts(2), dialogue()]
    return quantize_checkpoint(Path(source), Path(target), materials, settings(vision="w8a8", **fields))


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(Path(directory).iterdir())}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny_qwen2_5_vl.make_qwen2_5_vl(tmp_path_factory.mktemp("source"), shards=3)


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """What a run gives that nobody disturbs."""
    target = tmp_path_factory.mktemp("whole") / "target"
    quantize(source, target)
    return contents(target)


@pytest.fixture(scope="module")
def killed(source, tmp_path_factory):
    """Folder of each moment, in which a process was killed there."""
    folders = {name: tmp_path_factory.mktemp("killed") for name in MOMENTS}
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "kernels")),
    }
    moments = [(at, str(folders[name] / "target")) for name, at in MOMENTS.items()]
    work = json.dumps([str(source), str(tmp_path_factory.mktemp("warm") / "target"), *moments])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, work], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(MOMENTS), done.stderr
    return folders


@pytest.mark.parametrize("moment", MOMENTS)
def test_after_a_kill_the_same_call_goes_on(killed, source, whole, moment):
    folder = killed[moment]
    if moment == "after the rename":  # only the cleaning up is left to do
        with pytest.raises(BadRequest, match="exists"):
            quantize(source, folder / "target")
        assert contents(folder / "target") == whole and [path.name for path in folder.iterdir()] == ["target"]
        return
    assert not (folder / "target").exists()
    with pytest.raises(Exception, match="not a directory"):
        load_model(folder / "target")
    finished = len(list((folder / ".target.quantizing").glob("layer-*.safetensors")))
    assert finished == min(3, max(0, MOMENTS[moment] - 3))
    outcome = quantize(source, folder / "target")
    assert outcome.resumed_layers == finished
    assert contents(folder / "target") == whole
    assert [path.name for path in folder.iterdir()] == ["target"]


def test_finished_layers_are_not_worked_on_again(source, whole, tmp_path, monkeypatch):
    done, real = [], job.quantize_layer

    def interrupted(layer, *args):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(layer.name)
        return real(layer, *args)

    monkeypatch.setattr(job, "quantize_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "target")
    again = []
    monkeypatch.setattr(job, "quantize_layer", lambda layer, *args: again.append(layer.name) or real(layer, *args))
    assert quantize(source, tmp_path / "target").resumed_layers == 2
    assert len(again) == 1 and again[0] not in done and contents(tmp_path / "target") == whole


def interrupt(source, target, monkeypatch, **fields):
    """Leave unfinished work behind."""
    with monkeypatch.context() as patch:
        patch.setattr(job, "write_checkpoint", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quantize(source, target, **fields)


@pytest.mark.parametrize("other", [{"group_size": 32}, {"clip": False}, {"alpha": 0.7}, {"keep": ("o_proj",)}, {"num_steps": 3}])
def test_other_settings_do_not_go_on_with_it(source, tmp_path, monkeypatch, other):
    interrupt(source, tmp_path / "target", monkeypatch)
    name = next(iter(other))
    with pytest.raises(BadRequest, match=f"holds unfinished work with {name} = .*--restart"):
        quantize(source, tmp_path / "target", **other)
    assert len(list((tmp_path / ".target.quantizing").glob("layer-*"))) == 3


def test_other_sources_and_calibrations_do_not_go_on_with_it(source, vl, tmp_path, monkeypatch):
    interrupt(source, tmp_path / "target", monkeypatch)
    materials = [*texts(2, seed=9), dialogue()]
    with pytest.raises(BadRequest, match="unfinished work with calibration"):
        quantize_checkpoint(source, tmp_path / "target", materials, settings(vision="w8a8"))
    with pytest.raises(BadRequest, match="unfinished work with source"):
        quantize(tiny_qwen2_5_vl.make_qwen2_5_vl(tmp_path / "other", seed=5), tmp_path / "target")


def test_restart_throws_it_away(source, tmp_path, monkeypatch):
    interrupt(source, tmp_path / "target", monkeypatch)
    materials = [*texts(2), dialogue()]
    outcome = quantize_checkpoint(source, tmp_path / "target", materials, settings(vision="w8a8", clip=False), restart=True)
    assert outcome.resumed_layers == 0 and json.loads((tmp_path / "target" / "config.json").read_text())["quantization_config"]


def test_an_unreadable_record_is_not_trusted(source, tmp_path, monkeypatch):
    interrupt(source, tmp_path / "target", monkeypatch)
    (tmp_path / ".target.quantizing" / "record.json").write_text("{")
    with pytest.raises(BadRequest, match="--restart"):
        quantize(source, tmp_path / "target")


def test_two_at_once_do_not_share_a_destination(source, tmp_path):
    with work_dir.open_scratch(tmp_path / "target", {}, False):
        with pytest.raises(BadRequest, match="another process quantizes"):
            quantize(source, tmp_path / "target")


def test_a_destination_that_appeared_meanwhile_is_left_alone(source, tmp_path, monkeypatch):
    real = job.write_checkpoint

    def late(*args):
        real(*args)
        (tmp_path / "target").mkdir()
        (tmp_path / "target" / "mine").write_text("precious")

    monkeypatch.setattr(job, "write_checkpoint", late)
    with pytest.raises(BadRequest, match="exists"):
        quantize(source, tmp_path / "target")
    assert (tmp_path / "target" / "mine").read_text() == "precious"


def test_too_little_room_is_told_before_the_work(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100_000, 90_000, 10_000))
    with pytest.raises(TooLarge, match=r"needs \d+ bytes; 10000 are free"):
        quantize(source, tmp_path / "target")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_disk_that_fills_up_is_told_and_keeps_what_is_finished(source, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("sparsevila_cluster.quantization.checkpoint_writer.write_file", full)
        with pytest.raises(TooLarge, match="no room is left on the disk"):
            quantize(source, tmp_path / "target")
    assert quantize(source, tmp_path / "target").resumed_layers == 3
    assert contents(tmp_path / "target") == whole


def full(path, entries):
    path.with_name(f"{path.name}.part").write_bytes(b"half")
    raise OSError(28, os.strerror(28))
