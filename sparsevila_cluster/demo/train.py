"""Trains the demo checkpoint from scratch: `python -m sparsevila_cluster.demo.train --out DIR`.

    world -> vision tower, with salience -> encoded steps -> text: 2, 4, 8 steps -> 8 steps, tokens dropped
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
from sparsevila_cluster.demo.dialogue_batches import BatchBuilder
from sparsevila_cluster.demo.step_dataset import StepDataset
from sparsevila_cluster.demo.text_trainer import TextTrainer, TrainingOptions, WorkClock
from sparsevila_cluster.demo.training_log import TrainingLog
from sparsevila_cluster.demo.training_monitor import VIEWS, Evaluator
from sparsevila_cluster.demo.video_feed import make_held_out_video, video_feed
from sparsevila_cluster.demo.vision_trainer import VisionRunner, VisionStage
from sparsevila_cluster.demo.world import NUM_STEPS

VISION_BATCH, VISION_STEPS = 12, 4
MONITOR_SEED, FINAL_SEED = 0, 100_000  # first video of the held-out set for monitoring, and of the one for the end


def train_vision(options: TrainingOptions, log: TrainingLog, clock: WorkClock, model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Stage one: train the vision tower, then start the projector from what it learned."""
    log.stage("vision")
    stage = VisionStage(model.model.visual)
    held_out = [make_held_out_video(MONITOR_SEED + number) for number in range(max(1, options.monitor_videos // 2))]
    with video_feed(options.seed, VISION_STEPS, ahead=options.device == "cpu") as videos:
        for count in range(options.vision_updates):
            batch = [next(videos) for _ in range(VISION_BATCH)]
            with torch.autocast(options.device, torch.bfloat16):
                losses = stage.update(batch, count / options.vision_updates, count)
            log.advance(count / options.vision_updates, f"loss {sum(losses.values()):.3f}")
            if count % 75 == 74 or count == options.vision_updates - 1:
                log.write(
                    stage="vision",
                    work_s=round(clock.now_s(), 1),
                    updates=count + 1,
                    **losses,
                    accuracy=stage.report(held_out),
                )
        log.write(stage="vision", event="projector", **stage.start_projector(videos))


def encode_videos(
    options: TrainingOptions, log: TrainingLog, model: Qwen2_5_VLForConditionalGeneration
) -> tuple[StepDataset, Callable[[int, int], StepDataset]]:
    """The dataset of training steps, and a function that encodes held-out videos."""
    log.stage("encode steps")
    runner = VisionRunner(model.model.visual)
    with video_feed(options.seed + 1, NUM_STEPS, ahead=options.device == "cpu") as videos:
        dataset = StepDataset.encode(videos, options.dataset_videos, runner)

    def held_out(first: int, num: int) -> StepDataset:
        return StepDataset.encode((make_held_out_video(first + number) for number in range(num)), num, runner)

    return dataset, held_out


def train(options: TrainingOptions) -> dict[str, dict[str, float]]:
    """From random weights to a checkpoint in `options.out`; returns the accuracy by view."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    clock, out = WorkClock(options), options.out
    tokenizer = build_tokenizer()
    model = build_model(tokenizer).to(options.device)
    with TrainingLog(out / "training_log.jsonl") as log:
        log.write(event="model", parameters=num_parameters(model), minutes=options.minutes, seed=options.seed)
        resumed = None
        if options.resume_stage is None:
            train_vision(options, log, clock, model)
        else:
            resumed = torch.load(options.resume_stage, map_location=options.device)
            model.load_state_dict(resumed["model"])
        dataset, held_out = encode_videos(options, log, model)
        builder = BatchBuilder(tokenizer)
        monitor = Evaluator(held_out(MONITOR_SEED, options.monitor_videos), builder)
        trainer = TextTrainer(options, log, clock, model, builder, dataset, monitor)
        start_s, end_s = clock.now_s(), options.minutes * 60
        if resumed is None:
            for stage in SHARED:
                trainer.learn(stage, start_s, end_s)
            torch.save(trainer.state() | {"start_s": start_s, "now_s": clock.now_s()}, out / "shared.pt")
        else:
            trainer.restore(resumed)
            start_s = resumed["start_s"]
            clock.set(resumed["now_s"])
        trainer.learn(DENSE_TAIL if options.dense_only else SPARSE_TAIL, start_s, end_s)
        save_checkpoint(model, tokenizer, out / "checkpoint")
        log.stage("final evaluation")
        evaluator = Evaluator(held_out(FINAL_SEED, options.final_videos), builder, seed=FINAL_SEED)
        accuracy = {name: evaluator.evaluate(model, view) for name, view in VIEWS.items()}
        log.write(event="final", work_s=round(clock.now_s(), 1), updates=trainer.updates, accuracy=accuracy)
    return accuracy


def main() -> None:
    """Read the command line, train, print the accuracy by view."""
    defaults = TrainingOptions(Path("."))
    parser = argparse.ArgumentParser(description="Train the demo checkpoint from scratch.")
    parser.add_argument("--out", type=Path, required=True, help="gets checkpoint/, training_log.jsonl and shared.pt")
    parser.add_argument("--minutes", type=float, default=defaults.minutes, help="of one core's work, or of a GPU")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--threads", type=int, default=defaults.threads, help="one is best on a busy machine")
    parser.add_argument("--device", default=defaults.device, help="cpu or cuda")
    parser.add_argument("--dense-only", action="store_true", help="the twin: never drop a visual token")
    parser.add_argument("--resume-stage", type=Path, help="shared.pt of an earlier run: skip to the last stage")
    accuracy = train(TrainingOptions(**vars(parser.parse_args())))
    print(json.dumps(accuracy, indent=2))


if __name__ == "__main__":
    main()
