"""One command leaves a checkpoint that loads, and goes on after a kill; what draws for it ends with it."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from itertools import islice

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from sparsevila_cluster.core.errors import BadConfig, Unavailable
from sparsevila_cluster.demo.checkpoint_builder import num_parameters
from sparsevila_cluster.demo.training import run
from sparsevila_cluster.demo.training.feed import numbered_scene, scene_feed
from sparsevila_cluster.demo.training.lessons import Lesson
from sparsevila_cluster.demo.training.run import RunOptions, TrainingRun
from sparsevila_cluster.demo.training.training_log import TrainingLog
from tests.structure import ROOT

LESSONS = (
    Lesson("silent", (4,), 2, 101, (6,), (0,)),
    Lesson("short", (2,), 3, 101, (6,), (4,), apart_odds=1.0),
    Lesson("long", (2, 4), 3, 101, (6, 64), (4,), retrieve_odds=0.5, rates=(1.0, 0.1)),
)


def options_for(out, **changed):
    small = {"threads": 1, "vision_updates": 2, "num_videos": 2, "num_held": 1, "num_windows": 1, "lessons": LESSONS}
    return RunOptions(out, **(small | changed))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(run, "VISION_BATCH", 2)
    monkeypatch.setattr(run, "MAX_STEPS", 8)
    monkeypatch.setattr(run, "FINAL_LENGTHS", (8,))


def train(options):
    with TrainingLog(options.out / "training_log.jsonl") as log:
        return TrainingRun(options, log).train()


def test_a_run_leaves_a_checkpoint_that_loads(tmp_path):
    report = train(options_for(tmp_path))
    assert set(report) == {"dense 8", "sparse 8"} and all(0 <= one["all"] <= 100 for one in report.values())
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint")
    assert type(loaded).__name__ == "Qwen2_5_VLForConditionalGeneration" and 2.2e6 < num_parameters(loaded) < 2.6e6
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "checkpoint")
    assert tokenizer.decode(tokenizer.encode("Describe step 63. Größe?")) == "Describe step 63. Größe?"
    assert tokenizer.tokenize("at step 63")[-1].endswith("63")
    stages = [json.loads(line).get("stage") for line in (tmp_path / "training_log.jsonl").read_text().splitlines()]
    assert [stage for stage in dict.fromkeys(stages) if stage] == [
        "vision", "encode training videos", "encode validation videos", "silent", "short", "long", "final evaluation",
    ]  # fmt: skip


@pytest.mark.parametrize("ends_after", ["vision", "text"])
def test_a_run_that_ended_anywhere_gives_the_same_checkpoint(tmp_path, monkeypatch, ends_after):
    monkeypatch.setattr(run, "SAVE_EVERY_S", 0.0)
    train(options_for(tmp_path / "whole"))
    saved, limit = [], {"vision": 1, "text": 4}[ends_after]

    def save_and_end(self, *, now=False, original=TrainingRun._save, **state):
        original(self, now=now, **state)
        saved.append(state["stage"])
        if saved.count(ends_after) == limit:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingRun, "_save", save_and_end)
        train(options_for(tmp_path / "cut"))
    train(options_for(tmp_path / "cut"))
    whole, cut = (torch.load(tmp_path / name / "state.pt", weights_only=False)["state"]["model"] for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_run_does_not_go_on_with_another_ones_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "SAVE_EVERY_S", 0.0)
    train(options_for(tmp_path, lessons=()))
    with pytest.raises(BadConfig, match="'dense': False.*not.*'dense': True"):
        train(options_for(tmp_path, dense=True))


def test_the_twin_is_always_shown_everything():
    rng = np.random.default_rng(0)
    assert {LESSONS[2].draw(rng, dense=True)[1:] for _ in range(20)} == {(64, 4, False, 1.0)}


def test_a_feed_draws_ahead_in_order_and_ends_with_its_block():
    with scene_feed("training", 3, 2, first=5) as ahead:
        for number, video in enumerate(islice(ahead, 4), 5):
            plain = numbered_scene("training", 3, number, 2)
            assert video.scene == plain.scene and np.array_equal(video.frames, plain.frames)
        (process,) = multiprocessing.active_children()
    process.join(10)
    assert not process.is_alive()


def test_the_reader_is_told_that_a_process_died():
    with scene_feed("training", 3, 8) as videos:
        next(videos)
        (process,) = multiprocessing.active_children()
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(Unavailable, match="draws training videos ended"):
            list(islice(videos, 1000))


def test_processes_that_draw_end_with_a_killed_parent(tmp_path):
    code = (
        "import multiprocessing, time\n"
        "from sparsevila_cluster.demo.training.feed import scene_feed\n"
        "if __name__ == '__main__':\n"
        "    with scene_feed('training', 3, 2) as videos:\n"
        "        next(videos)\n"
        "        print(multiprocessing.active_children()[0].pid, flush=True)\n"
        "        time.sleep(60)\n"
    )
    (tmp_path / "parent.py").write_text(code)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py")], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    until_s = time.monotonic() + 20
    while os.path.exists(f"/proc/{child}") and open(f"/proc/{child}/stat").read().split()[2] != "Z":
        assert time.monotonic() < until_s, "it still draws"
        time.sleep(0.1)
