"""Trains the demo checkpoint from scratch: `python -m sparsevila_cluster.demo.train --out DIR`.

Knows: the order of events, from random weights to a checkpoint directory.
Does not know: how an update works inside (vision.py, text.py), what the world holds (world.py).

    world -> vision tower, with salience -> bank of seen steps -> text: 2, 4, 8 steps -> 8 steps, tokens dropped
                                                                                 └───-> 8 steps, dense (the twin)

Minutes are minutes of work of one core, so that a busy machine does not cut training short. On a GPU
(`--device cuda`) they are minutes of the clock. The shared, dense part is left in `DIR/shared.pt`;
`--dense-only --resume-stage DIR/shared.pt` trains the twin from there for the price of its own tail.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from sparsevila_cluster.demo.checkpoint_builder import build_model, build_tokenizer, num_parameters, save_checkpoint
from sparsevila_cluster.demo.curriculum import DENSE_TAIL, SHARED, SPARSE_TAIL
from sparsevila_cluster.demo.dialogue_batches import Packer
from sparsevila_cluster.demo.step_bank import StepBank
from sparsevila_cluster.demo.text_trainer import Clock, Options, TextTrainer
from sparsevila_cluster.demo.training_log import TrainingLog
from sparsevila_cluster.demo.training_monitor import VIEWS, Examiner
from sparsevila_cluster.demo.video_feed import make_held_out_video, video_feed
from sparsevila_cluster.demo.vision_trainer import VisionRunner, VisionStage
from sparsevila_cluster.demo.world import NUM_STEPS

VISION_BATCH, VISION_STEPS = 12, 4
MONITOR_SEED, FINAL_SEED = 0, 100_000  # first video of the held-out set for monitoring, and of the one for the end


def train_vision(options: Options, journal: TrainingLog, clock: Clock, model: Qwen2_5_VLForConditionalGeneration) -> None:
    journal.stage("vision")
    stage = VisionStage(model.model.visual)
    held_out = [make_held_out_video(MONITOR_SEED + number) for number in range(max(1, options.monitor_videos // 2))]
    with video_feed(options.seed, VISION_STEPS, ahead=options.device == "cpu") as videos:
        for count in range(options.vision_updates):
            batch = [next(videos) for _ in range(VISION_BATCH)]
            with torch.autocast(options.device, torch.bfloat16):
                losses = stage.update(batch, count / options.vision_updates, count)
            journal.advance(count / options.vision_updates, f"loss {sum(losses.values()):.3f}")
            if count % 75 == 74 or count == options.vision_updates - 1:
                journal.write(
                    stage="vision",
                    work_s=round(clock.now_s(), 1),
                    updates=count + 1,
                    **losses,
                    accuracy=stage.report(held_out),
                )
        journal.write(stage="vision", event="projector", **stage.start_projector(videos))


def see_videos(
    options: Options, journal: TrainingLog, model: Qwen2_5_VLForConditionalGeneration
) -> tuple[StepBank, Callable[[int, int], StepBank]]:
    """The bank of training steps, and a function that makes banks of held-out videos."""
    journal.stage("bank of seen steps")
    runner = VisionRunner(model.model.visual)
    with video_feed(options.seed + 1, NUM_STEPS, ahead=options.device == "cpu") as videos:
        bank = StepBank.see(videos, options.bank_videos, runner)

    def held_out(first: int, num: int) -> StepBank:
        return StepBank.see((make_held_out_video(first + number) for number in range(num)), num, runner)

    return bank, held_out


def train(options: Options) -> dict[str, dict[str, float]]:
    """From random weights to a checkpoint in `options.out`; returns the accuracy by view."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    clock, out = Clock(options), options.out
    tokenizer = build_tokenizer()
    model = build_model(tokenizer).to(options.device)
    with TrainingLog(out / "training_log.jsonl") as journal:
        journal.write(event="model", parameters=num_parameters(model), minutes=options.minutes, seed=options.seed)
        resumed = None
        if options.resume_stage is None:
            train_vision(options, journal, clock, model)
        else:
            resumed = torch.load(options.resume_stage, map_location=options.device)
            model.load_state_dict(resumed["model"])
        bank, held_out = see_videos(options, journal, model)
        packer = Packer(tokenizer)
        monitor = Examiner(held_out(MONITOR_SEED, options.monitor_videos), packer)
        learner = TextTrainer(options, journal, clock, model, packer, bank, monitor)
        start_s, end_s = clock.now_s(), options.minutes * 60
        if resumed is None:
            for stage in SHARED:
                learner.learn(stage, start_s, end_s)
            torch.save(learner.state() | {"start_s": start_s, "now_s": clock.now_s()}, out / "shared.pt")
        else:
            learner.restore(resumed)
            start_s = resumed["start_s"]
            clock.set(resumed["now_s"])
        learner.learn(DENSE_TAIL if options.dense_only else SPARSE_TAIL, start_s, end_s)
        save_checkpoint(model, tokenizer, out / "checkpoint")
        journal.stage("final examination")
        examiner = Examiner(held_out(FINAL_SEED, options.final_videos), packer, seed=FINAL_SEED)
        marks = {name: examiner.examine(model, view) for name, view in VIEWS.items()}
        journal.write(event="final", work_s=round(clock.now_s(), 1), updates=learner.updates, accuracy=marks)
    return marks


def main() -> None:
    defaults = Options(Path("."))
    parser = argparse.ArgumentParser(description="Train the demo checkpoint from scratch.")
    parser.add_argument("--out", type=Path, required=True, help="gets checkpoint/, training_log.jsonl and shared.pt")
    parser.add_argument("--minutes", type=float, default=defaults.minutes, help="of one core's work, or of a GPU")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--threads", type=int, default=defaults.threads, help="one is best on a busy machine")
    parser.add_argument("--device", default=defaults.device, help="cpu or cuda")
    parser.add_argument("--dense-only", action="store_true", help="the twin: never drop a visual token")
    parser.add_argument("--resume-stage", type=Path, help="shared.pt of an earlier run: skip to the last stage")
    marks = train(Options(**vars(parser.parse_args())))
    print(json.dumps(marks, indent=2))


if __name__ == "__main__":
    main()
