"""What quantizing costs in answers and in distance, ours beside AutoAWQ's. `python -m benchmarks.quantization`.

the demo model    4-bit text model and 8-bit encoder: answers right, dense and sparse, against the float model, same questions
golden originals  random Qwen2 and Qwen2.5-VL, as they are and with outliers in the activations, as trained models have them:
                  KL to the original on held-out tokens of ours, of AutoAWQ on the same tokens, and of what AutoAWQ left there
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy import DENSE, SPARSE, as_data
from benchmarks.lib import machine
from benchmarks.lib.accuracy_exam import sit, write_dialogues
from benchmarks.lib.exam_marks import Score, changed
from benchmarks.lib.report import Report, progress
from sparsevila_cluster.core.config import EngineConfig
from sparsevila_cluster.demo.calibration_examples import make_examples
from sparsevila_cluster.models import load_model
from sparsevila_cluster.models.loading.originals import read_vocabulary
from sparsevila_cluster.quantization.autoawq_env import READY, default_env, run_autoawq
from sparsevila_cluster.quantization.calibration import Reading
from sparsevila_cluster.quantization.compare import compare
from sparsevila_cluster.quantization.job import Settings, quantize_checkpoint
from sparsevila_cluster.quantization.materials import Material

VIDEOS = 64
MOST_LOST_POINTS = 1.5
NUM_TEXTS, TEXT_TOKENS, NUM_HELD_OUT = 32, 64, 32
GOLDEN = {"qwen2": ("qwen2_fp", "qwen2_awq"), "qwen2_5_vl": ("qwen2_5_vl_fp", "qwen2_5_vl_awq")}
OUTLIER_SEEDS = (5, 6, 7)
Say = Callable[[str], None]


def answers(original: Path, quantized: Path | None, num_videos: int, folder: Path, report: Report, say: Say) -> None:
    """The demo model, float and quantized, on the same questions; and how far apart they are on dialogues that are held out."""
    vocabulary, reading = read_vocabulary(original), Reading(fps=2.0)
    if quantized is None:
        quantized = folder / "demo-w4-w8a8"
        say("quantizing the demo model")
        settings = Settings(vision="w8a8", reading=reading)
        quantize_checkpoint(original, quantized, make_examples(vocabulary, reading, 32), settings, device="cpu")
    say("writing videos")
    (folder / "videos").mkdir()
    dialogues = write_dialogues(folder / "videos", num_videos)
    body = []
    models = {name: load_model(path, device="cpu") for name, path in (("float", original), ("quantized", quantized))}
    for setting, fields in (("dense", DENSE), ("sparse", SPARSE)):
        marks = {}
        for name, model in models.items():
            say(f"{name}, {setting}: {num_videos} videos")
            marks[name] = sit(model, dialogues, fields)[0]
            score = Score.of(marks[name])
            report.rows.append({"model": name, "setting": setting, "dtype": str(model.spec.dtype), **as_data(score)})
            report.figures[f"{name}_{setting}_percent"] = round(score.percent, 2)
        before, after = Score.of(marks["float"]), Score.of(marks["quantized"])
        lost, won = changed(marks["float"], marks["quantized"])
        report.figures[f"points_lost_{setting}"] = round(before.percent - after.percent, 2)
        body.append([setting, str(before), str(after), f"{after.percent - before.percent:+.2f}", f"{lost}, {won}"])
    head = ("setting", "float", "4-bit text, 8-bit encoder", "points", "lost, won")
    report.show_table(f"Demo model: per cent right of {8 * num_videos} questions (95 % interval)", head, body)
    say("distances")
    held_out = make_examples(vocabulary, Reading(fps=2.0, pruned=False), 8, held_out=True)
    (found,) = compare(original, [quantized], vocabulary, held_out, Reading(fps=2.0, pruned=False), device="cpu")
    report.figures["demo_kl"] = found.kl


def distances(golden: Path, env: Path | None, folder: Path, report: Report, say: Say) -> None:
    """KL of each golden original and its variants with outliers; every engine sees the same tokens."""
    body = []
    for name, (original, theirs) in GOLDEN.items():
        variants = {name: golden / original}
        for seed in OUTLIER_SEEDS if name == "qwen2" else OUTLIER_SEEDS[:1]:
            variants[f"{name}_outliers_{seed}"] = with_outliers(golden / original, folder / f"{name}-{seed}", seed)
        for variant, source in variants.items():
            there = golden / theirs if source == golden / original else None
            kl = _distances_of(source, there, env, folder / f"{variant}-made", partial(_say, say, variant))
            report.rows.append({"original": variant, **kl})
            report.figures.update({f"{variant}_kl_{engine}": round(value, 8) for engine, value in kl.items()})
            columns = [kl.get(engine) for engine in ("own", "autoawq", "autoawq_there")]
            body.append([variant, *(None if value is None else f"{value:.3e}" for value in columns)])
    head = ("original", "own", "AutoAWQ, same tokens", "AutoAWQ, as it came")
    report.show_table(f"KL to the original, nats a token, on {NUM_HELD_OUT * TEXT_TOKENS} held-out tokens", head, body)


def _say(say: Say, variant: str, text: str) -> None:
    say(f"{variant}: {text}")


def _distances_of(source: Path, there: Path | None, env: Path | None, folder: Path, say: Say) -> dict[str, float]:
    """Engine -> KL."""
    folder.mkdir()
    vocabulary, reading = read_vocabulary(source), Reading(text_tokens=TEXT_TOKENS)
    generator = torch.Generator().manual_seed(105)
    plain = torch.tensor(vocabulary.plain_ids())

    def texts(num: int) -> list[Material]:
        drawn = plain[torch.randint(0, len(plain), (num, TEXT_TOKENS), generator=generator)].tolist()
        return [Material(f"text {i}", ids=tuple(ids)) for i, ids in enumerate(drawn)]

    materials, held_out = texts(NUM_TEXTS), texts(NUM_HELD_OUT)
    made: dict[str, Path] = {"own": folder / "own"}
    say("own")
    quantize_checkpoint(source, made["own"], materials, Settings(reading=reading), device="cpu")
    if env is not None:
        say("AutoAWQ")
        made["autoawq"] = folder / "autoawq"
        options: dict[str, Any] = {"group_size": None, "clip": True, "text_tokens": TEXT_TOKENS, "deadline_s": 1800}
        run_autoawq(env, source, made["autoawq"], vocabulary, materials, **options)
    if there is not None:
        made["autoawq_there"] = there
    say("distances")
    found = compare(source, list(made.values()), vocabulary, held_out, reading, device="cpu")
    return {engine: one.kl for engine, one in zip(made, found, strict=True)}


def with_outliers(source: Path, target: Path, seed: int) -> Path:
    """A random checkpoint whose norms enlarge four channels of each layer's inputs 25 times."""
    from safetensors.torch import load_file, save_file

    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(source / "model.safetensors")
    for name in sorted(weights):
        if ".layers." in name and name.endswith("layernorm.weight"):
            norm = torch.exp(0.8 * torch.randn(weights[name].shape, generator=generator))
            norm[torch.randperm(len(norm), generator=generator)[:4]] *= 25
            weights[name] = norm.to(weights[name].dtype)
        elif ".layers." in name and name.endswith("_proj.weight"):
            weights[name] = (0.04 * torch.randn(weights[name].shape, generator=generator)).to(weights[name].dtype)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def default_golden() -> Path:
    """Where the tests look as well."""
    return Path(os.environ.get("SPARSEVILA_TEST_CHECKPOINTS", Path(__file__).parents[2] / "shared" / "data")) / "awq_golden"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantization", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo", help="checkpoint that knows the demo world (default: the bundled model)")
    parser.add_argument("--quantized", type=Path, metavar="DIR", help="what was made of it (default: made here)")
    parser.add_argument("--videos", type=int, default=VIDEOS, metavar="N", help="of 8 questions each (%(default)s); 0: no answers")
    parser.add_argument("--golden", type=Path, default=default_golden(), metavar="DIR", help="golden originals (%(default)s)")
    parser.add_argument("--env", type=Path, metavar="DIR", help="AutoAWQ's environment, as `quantize --create-env` makes it")
    parser.add_argument("--json", action="store_true", help="print the JSON document and nothing else")
    parser.add_argument("--save", type=Path, metavar="DIR", help="also write results to DIR")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    torch.set_num_threads(1)
    report = Report("quantization", machine.card(), quiet=options.json)
    report.show_card()
    env = options.env or default_env()
    with progress() as say, tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.videos:
            answers(EngineConfig(model=options.model).model_dir, options.quantized, options.videos, folder, report, say)
        if options.golden.is_dir():
            found = env if (env / READY).is_file() else None
            if found is None:
                report.say(f"AutoAWQ is not installed in {env}: `sparsevila quantize ... --engine autoawq --create-env` does it")
            distances(options.golden, found, folder, report, say)
        else:
            report.say(f"no golden originals at {options.golden}")
    report.show_figures()
    report.finish(options.save)
    lost = [report.figures.get(f"points_lost_{setting}", 0.0) for setting in ("dense", "sparse")]
    if max(lost) > MOST_LOST_POINTS:
        raise SystemExit(f"quantizing lost {max(lost)} points; {MOST_LOST_POINTS} are allowed: {json.dumps(lost)}")


if __name__ == "__main__":
    main()
