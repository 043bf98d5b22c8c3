"""The text model in training: one update, and a stage of the curriculum."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from sparsevila_cluster.demo.curriculum import SHORTER_ODDS, Portion, Stage, shorter
from sparsevila_cluster.demo.dialogue_batches import Batch, BatchBuilder, keep_glyphs, keep_salient
from sparsevila_cluster.demo.step_dataset import StepDataset
from sparsevila_cluster.demo.training_forward import (
    AUXILIARY_WEIGHTS,
    AuxiliaryHeads,
    answer_logits,
    retrieval_mask,
    retrieved,
    run_text,
    turns_apart_mask,
)
from sparsevila_cluster.demo.training_log import TrainingLog
from sparsevila_cluster.demo.training_monitor import DENSE, SPARSE, Evaluator
from sparsevila_cluster.demo.world import TRAINING_STREAM, make_questions

NUM_TURNS = 8
WARM_UP = 100  # updates


@dataclass(frozen=True)
class TrainingOptions:
    """Options of `demo.train`; `minutes` and `*_s` are work of one core, or wall time on a GPU."""

    out: Path
    minutes: float = 58.0
    seed: int = 0
    threads: int = 1
    device: str = "cpu"
    dense_only: bool = False
    resume_stage: Path | None = None
    vision_updates: int = 450
    dataset_videos: int = 2000
    monitor_videos: int = 40
    final_videos: int = 64
    monitor_every_s: float = 45.0
    lr: float = 1e-3


class WorkClock:
    """Seconds of work: of one core on a CPU, of the wall on a GPU. May start at what an earlier run had spent."""

    def __init__(self, options: TrainingOptions) -> None:
        self.threads, self.on_cpu = options.threads, options.device == "cpu"
        self.offset_s = 0.0
        self.offset_s = -self.now_s()

    def now_s(self) -> float:
        """Seconds of work so far."""
        spent = time.process_time() / self.threads if self.on_cpu else time.monotonic()
        return spent + self.offset_s

    def set(self, now_s: float) -> None:
        """Go on from `now_s`."""
        self.offset_s += now_s - self.now_s()


@dataclass
class TextTrainer:
    """The text model in training: everything an update needs."""

    options: TrainingOptions
    log: TrainingLog
    clock: WorkClock
    model: Qwen2_5_VLForConditionalGeneration
    builder: BatchBuilder
    dataset: StepDataset
    monitor: Evaluator
    updates: int = 0
    heads: AuxiliaryHeads = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        options, model = self.options, self.model
        model.model.visual.requires_grad_(False)
        self.heads = AuxiliaryHeads(model.config.text_config.hidden_size).to(options.device)
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in learned if p.ndim > 1], "weight_decay": 0.05, "base": options.lr},
            {"params": [p for p in learned if p.ndim <= 1], "weight_decay": 0.0, "base": options.lr},
            {"params": list(self.heads.parameters()), "weight_decay": 0.01, "base": 0.4 * options.lr},
        ]
        self.learned = learned
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98), fused=True)
        self.rng = np.random.default_rng((TRAINING_STREAM, options.seed, 9))

    def learn(self, stage: Stage, start_s: float, end_s: float) -> None:
        """Updates until the stage is mastered or its time is over."""
        began_s = monitored_s = self.clock.now_s()
        until_s = start_s + stage.until * (end_s - start_s)
        self.log.stage(stage.name)
        recent: dict[str, list[float]] = defaultdict(list)
        while True:
            now_s = self.clock.now_s()
            share = min(1.0, (now_s - began_s) / max(until_s - began_s, 1e-9))
            for name, value in self.update(stage, share).items():
                recent[name].append(value)
            self.log.advance(share, f"loss {np.mean(recent['answer'][-20:]):.3f}")
            now_s = self.clock.now_s()
            done = now_s >= until_s
            if done or now_s - monitored_s > self.options.monitor_every_s:
                accuracy = self.report(stage, recent)
                recent.clear()
                monitored_s = self.clock.now_s()
                done = done or accuracy >= stage.advance_at
            if done:
                return

    def update(self, stage: Stage, share: float) -> dict[str, float]:
        """One optimizer step; `share` of the stage is over. Returns the losses by name."""
        decay = 0.51 + 0.49 * np.cos(np.pi * share) if stage.decay else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * min(1.0, (self.updates + 1) / WARM_UP) * decay
        odds = np.array([portion.odds for portion in stage.portions])
        portion = stage.portions[self.rng.choice(len(odds), p=odds / odds.sum())]
        num_steps = stage.num_steps
        if (less := shorter(num_steps)) and self.rng.random() < SHORTER_ODDS:
            num_steps = less[self.rng.integers(len(less))]
        batch = self.make_batch(portion, num_steps)
        with torch.autocast(self.options.device, torch.bfloat16):
            output = run_text(self.model, batch, self.masks(stage, portion, batch))
            logits, wanted = answer_logits(self.model, batch, output.hidden)
            losses = {"answer": F.cross_entropy(logits.float(), wanted)}
            losses |= self.heads.losses(self.model, batch, output.inner)
        total = losses["answer"] + sum(weight * losses[name] for name, weight in AUXILIARY_WEIGHTS.items())
        self.optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.learned, 1.0)
        self.optimizer.step()
        self.updates += 1
        record = {name: value.item() for name, value in losses.items()}
        if portion.sparse:
            record["answer_sparse"] = record["answer"]
        return record

    def make_batch(self, portion: Portion, num_steps: int) -> Batch:
        """A batch of dialogues about composed videos, pruned as `portion` says."""
        rng, dataset = self.rng, self.dataset
        shown = [dataset.compose(rng, num_steps) for _ in range(portion.batch)]
        dialogues = [make_questions(video.scene, rng, NUM_TURNS, steps=video.slots) for video in shown]
        ratio = portion.prune_keeps[rng.integers(len(portion.prune_keeps))]
        keep = None
        if portion.prune == "salient":
            keep = keep_salient(dataset, shown, ratio)
        elif portion.prune == "glyphs":
            keep = keep_glyphs(dataset, shown, ratio, rng)
        return self.builder.batch(dataset, shown, dialogues, keep)

    def masks(self, stage: Stage, portion: Portion, batch: Batch) -> Tensor | list[Tensor | None] | None:
        """Attention masks for `run_text`: none, one for all layers, or one per layer."""
        if stage.turns_apart:
            return turns_apart_mask(batch)
        if not portion.retrieve_keeps:
            return None
        ratio = portion.retrieve_keeps[self.rng.integers(len(portion.retrieve_keeps))]
        return [retrieval_mask(batch, chosen) for chosen in retrieved(self.model, batch, ratio)]

    def report(self, stage: Stage, recent: dict[str, list[float]]) -> float:
        """Evaluate, write a line of the log, and return the accuracy in percent."""
        videos = self.options.monitor_videos
        accuracy = self.monitor.evaluate(self.model, DENSE, stage.num_steps, videos, turns_apart=stage.turns_apart)
        record: dict[str, float | dict[str, float]] = {name: round(float(np.mean(values)), 4) for name, values in recent.items()}
        if any(portion.sparse for portion in stage.portions):
            sparse = self.monitor.evaluate(self.model, SPARSE, num_videos=videos)
            record["sparse_accuracy"] = sparse
        self.log.write(
            stage=stage.name,
            work_s=round(self.clock.now_s(), 1),
            updates=self.updates,
            lr=round(self.optimizer.param_groups[0]["lr"], 6),
            **record,
            accuracy=accuracy,
        )
        return accuracy["all"]

    def state(self) -> dict:
        """All that `restore` needs to go on from here."""
        return {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "updates": self.updates,
        }

    def restore(self, state: dict) -> None:
        """Go on from what `state` returned; the model is loaded elsewhere."""
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.updates = state["updates"]
