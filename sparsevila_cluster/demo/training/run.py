"""From random weights to a checkpoint, and on from where a killed run was.

    scenes -> vision tower -> encoded videos -> text model: 2, 4, 8, 16, 32, 64 steps -> all lengths, tokens not retrieved

Everything that a run needs to go on is written to `state.pt` every SAVE_EVERY_S seconds; its encoded videos stay in `encoded-*.pt`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsevila_cluster.core.errors import BadConfig
from sparsevila_cluster.demo.checkpoint_builder import build_model, num_parameters, save_checkpoint
from sparsevila_cluster.demo.scenes import MAX_STEPS
from sparsevila_cluster.demo.training.feed import scene_feed
from sparsevila_cluster.demo.training.lessons import LESSONS, Lesson, Showing
from sparsevila_cluster.demo.training.text import TextStage
from sparsevila_cluster.demo.training.text_tokens import build_scene_tokenizer
from sparsevila_cluster.demo.training.tower import TowerStage
from sparsevila_cluster.demo.training.training_log import TrainingLog
from sparsevila_cluster.demo.training.vision_runner import VisionRunner
from sparsevila_cluster.demo.training.windows import EncodedVideos

VISION_BATCH, VISION_STEPS = 6, 8
SAVE_EVERY_S = 120.0
EXAMINE_EVERY = 100
FINAL_LENGTHS = (8, 16, 32, 64)


@dataclass(frozen=True)
class RunOptions:
    """out: gets everything, and is looked into for an earlier run. dense: the twin, to which every visual token is shown always."""

    out: Path
    seed: int = 0
    threads: int = 2
    device: str = "cpu"
    dense: bool = False
    salience: bool = True
    vision_updates: int = 450
    num_videos: int = 240
    num_held: int = 16
    num_windows: int = 32
    lessons: Sequence[Lesson] = LESSONS


class TrainingRun:
    """One run: `train` does what is left of it."""

    def __init__(self, options: RunOptions, log: TrainingLog) -> None:
        """Raises BadConfig: an earlier run in the same folder had other options."""
        self.options, self.log = options, log
        torch.set_num_threads(options.threads)
        torch.manual_seed(options.seed)
        self.tokenizer = build_scene_tokenizer()
        self.model = build_model(self.tokenizer).to(options.device)
        self.tower = TowerStage(VisionRunner(self.model.model.visual), salience=options.salience)
        self.path = options.out / "state.pt"
        self.saved: dict[str, Any] = torch.load(self.path, weights_only=False) if self.path.exists() else {}
        self.kept = {"seed": options.seed, "dense": options.dense, "salience": options.salience}
        if self.saved and self.saved["options"] != self.kept:
            raise BadConfig(f"{self.path} is of a run with {self.saved['options']}, not {self.kept}")
        self.begin_s, self.save_s = time.monotonic() - self.saved.get("seconds", 0.0), time.monotonic()
        log.write(event="begin", parameters=num_parameters(self.model), seed=options.seed, done=self._progress)

    @property
    def _progress(self) -> dict[str, Any]:
        return {name: self.saved.get(name) for name in ("stage", "count", "lesson", "seconds")}

    @property
    def seconds(self) -> float:
        """Of work so far, over all processes that had a part in it."""
        return time.monotonic() - self.begin_s

    def train(self) -> dict[str, dict[str, float]]:
        """Per cent right on validation videos, by what was shown and kind."""
        if self.saved.get("stage", "vision") == "vision":
            self._see()
        self.model.load_state_dict(self.saved["model"] if self.saved["stage"] == "encoding" else self.saved["state"]["model"])
        encoded = self._encoded("training", self.options.num_videos)
        held = self._encoded("validation", self.options.num_held)
        stage = TextStage(self.model, self.tokenizer, encoded, self.options.seed)
        if self.saved["stage"] == "text":
            stage.restore(self.saved["state"])
        for number, lesson in enumerate(self.options.lessons):
            if number >= self.saved.get("lesson", 0):
                self._learn(stage, number, lesson, held)
        save_checkpoint(self.model, self.tokenizer, self.options.out / "checkpoint")
        return self._report(stage, held)

    def _save(self, *, now: bool = False, **state: Any) -> None:
        if not now and time.monotonic() - self.save_s < SAVE_EVERY_S:
            return
        self.saved = state | {"options": self.kept, "seconds": self.seconds}
        partial = self.path.with_suffix(".partial")
        torch.save(self.saved, partial)
        os.replace(partial, self.path)
        self.save_s = time.monotonic()

    # ---- the tower -------------------------------------------------------------------------------------------------------------

    def _see(self) -> None:
        options, tower = self.options, self.tower
        self.log.stage("vision")
        modules = {"model": self.model, "probe": tower.probe, "optimizer": tower.optimizer}
        for name, module in modules.items() if self.saved else ():
            module.load_state_dict(self.saved[name])
        first = self.saved.get("count", 0)
        with scene_feed("validation", options.seed, VISION_STEPS) as videos:
            held = [next(videos) for _ in range(6)]
        with scene_feed("training", options.seed, VISION_STEPS, first=first * VISION_BATCH) as videos:
            for count in range(first, options.vision_updates):
                with torch.autocast(options.device, torch.bfloat16):
                    losses = tower.update([next(videos) for _ in range(VISION_BATCH)], count / options.vision_updates, count)
                self.log.advance(count / options.vision_updates, f"loss {sum(losses.values()):.3f}")
                if count % 75 == 74 or count == options.vision_updates - 1:
                    self.log.write(stage="vision", updates=count + 1, **losses, read=tower.report(held))
                state = {name: module.state_dict() for name, module in modules.items()}
                self._save(stage="vision", count=count + 1, **state)
            torch.manual_seed(options.seed)
            self.log.write(stage="vision", event="projector", **tower.start_projector([next(videos) for _ in range(24)]))
        self._save(now=True, stage="encoding", model=self.model.state_dict())

    def _encoded(self, stream: str, num: int) -> EncodedVideos:
        path = self.options.out / f"encoded-{stream}.pt"
        if path.exists():
            return EncodedVideos(**torch.load(path, weights_only=False))
        self.log.stage(f"encode {stream} videos")
        with scene_feed(stream, self.options.seed + 1, MAX_STEPS, processes=2) as videos:
            encoded = EncodedVideos.encode(videos, num, VisionRunner(self.model.model.visual))
        partial = path.with_suffix(".partial")
        torch.save(vars(encoded), partial)
        os.replace(partial, path)
        return encoded

    # ---- the text model --------------------------------------------------------------------------------------------------------

    def _learn(self, stage: TextStage, number: int, lesson: Lesson, held: EncodedVideos) -> None:
        self.log.stage(lesson.name)
        first = self.saved.get("count", 0) if self.saved.get("lesson") == number else 0
        examined, begin_s = lesson.examined, time.monotonic()
        for count in range(first, lesson.updates):
            showing = lesson.draw(stage.rng, dense=self.options.dense)
            share = count / lesson.updates
            losses = stage.update(showing, lesson.rate(count))
            name = "answer" if "answer" in losses else "facts"
            self.log.advance(share, f"{stage.accuracy.get('all', 0.0):.1f} % right, loss of {name} {losses[name]:.3f}")
            done = count == lesson.updates - 1
            if count % EXAMINE_EVERY == EXAMINE_EVERY - 1 or done:
                shown = examined._replace(num_per_step=64) if self.options.dense else examined
                accuracy = stage.examine(held, shown)
                rounded = {kind: round(percent, 1) for kind, percent in accuracy.items()}
                rate = round((time.monotonic() - begin_s) / (count + 1 - first), 3)
                self.log.write(
                    stage=lesson.name, updates=count + 1, work_s=round(self.seconds), s_per_update=rate,
                    losses={name: round(value, 3) for name, value in losses.items()}, accuracy=rounded,
                )  # fmt: skip
                done = done or accuracy["all"] >= lesson.advance_at
            following = {"lesson": number + 1, "count": 0} if done else {"lesson": number, "count": count + 1}
            self._save(now=done, stage="text", state=stage.state(), **following)
            if done:
                return

    def _report(self, stage: TextStage, held: EncodedVideos) -> dict[str, dict[str, float]]:
        self.log.stage("final evaluation")
        report = {}
        for num_steps in FINAL_LENGTHS:
            for name, per_step, retrieve_keep in (("dense", 64, 1.0), ("sparse", 16, 0.1)):
                showing = Showing(num_steps, per_step, 30, retrieve_keep=retrieve_keep)
                accuracy = stage.evaluate(held, showing, num_windows=self.options.num_windows, seed=1)
                report[f"{name} {num_steps}"] = {kind: round(percent, 1) for kind, percent in accuracy.items()}
        self.log.write(event="final", work_s=round(self.seconds), accuracy=report)
        return report
