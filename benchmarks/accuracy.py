r"""How often the answers are right: dense, sparse and random, on videos nobody has trained on. `python -m benchmarks.accuracy`.

The demo model is trained with token dropping, and its salience is trained in. Its dense-only twin, to which every token was always
shown, says what an untouched model of this size makes of the same policies; a third one, whose tower nobody told where to look,
what an encoder's own attention is worth.

With --dataset any model is asked the questions of a file (`benchmarks.lib.exam_questions` names the formats) about videos that are
there, dense and at each of --methods and --ratios:

    python -m benchmarks.accuracy --model DIR --dataset test.jsonl --layout videomme --videos-dir VIDEOS --protocol paper \
        --ratios 0.25/0.10,0.50/0.25 --resume videomme.journal.jsonl --csv videomme.csv --plots PICTURES
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib import machine, scene_exam
from benchmarks.lib.accuracy_exam import PROTOCOLS, Protocol, Sitting, sit
from benchmarks.lib.exam_journal import ExamJournal, digest_of
from benchmarks.lib.exam_marks import Mark, Score, worst_gap
from benchmarks.lib.exam_questions import LAYOUTS, Dialogue, read_dialogues
from benchmarks.lib.exam_tables import as_row, show, write_csv
from benchmarks.lib.report import Report, progress
from sparsevila_cluster.core.config import EngineConfig
from sparsevila_cluster.core.errors import BadConfig, SparseVilaError
from sparsevila_cluster.models import Model, load_model
from sparsevila_cluster.pruning import PRUNING
from sparsevila_cluster.retrieval import RETRIEVAL

PRUNE_KEEP, RETRIEVE_KEEP = 0.25, 0.10
RETRIEVE = "query_topk"


def sittings_of(methods: Sequence[str], ratios: Sequence[tuple[float, float]]) -> tuple[Sitting, ...]:
    """Dense first, then every method ("pruning" or "pruning+retrieval") at every (prune_keep, retrieve_keep)."""
    sittings = [Sitting(scene_exam.DENSE, {"dense": None})]
    for method in methods:
        prune, _, retrieve = method.partition("+")
        retrieve = retrieve or RETRIEVE
        seeds = scene_exam.RANDOM_SEEDS if "random" in (prune, retrieve) else 1
        for prune_keep in dict.fromkeys(ratio[0] for ratio in ratios):
            keeps = [keep for kept, keep in ratios if kept == prune_keep]
            fields = {"prune": prune, "prune_keep": prune_keep, "retrieve": retrieve, "retrieve_keep": keeps[0]}
            sittings.append(Sitting(fields, {f"{method} {prune_keep:g}/{keep:g}": keep for keep in keeps}, seeds))
    return tuple(sittings)


@dataclass(frozen=True)
class Exam:
    """One model, what it is asked, and how. fields: of every configuration."""

    model: Model
    dialogues: Sequence[Dialogue]
    report: Report
    say: Any
    protocol: Protocol
    fields: Mapping[str, Any]
    max_tokens: int | None
    journal: ExamJournal

    def sit(self, sittings: Sequence[Sitting]) -> dict[str, list[Mark]]:
        """Marks by name, the dense ones first; each also becomes a row of the report."""
        found: dict[str, list[Mark]] = {}
        for sitting in sittings:
            keeps, names, fields = list(sitting.names.values()), list(sitting.names), {**self.fields, **sitting.fields}
            self.say(f"{', '.join(names)}: {len(self.dialogues)} videos")
            start_s = time.perf_counter()
            results = sit(
                self.model, self.dialogues, fields, keeps, seeds=sitting.seeds, protocol=self.protocol,
                max_tokens=self.max_tokens, journal=self.journal,
            )  # fmt: skip
            each_s = (time.perf_counter() - start_s) / len(names)
            for name, keep, marks in zip(names, keeps, results, strict=True):
                found[name] = marks
                dense = next(iter(found.values()))
                asked = fields if keep is None else {**fields, "retrieve_keep": keep}
                self.report.rows.append({"setting": name, **asked, **as_row(marks, dense), "seconds": round(each_s, 1)})
        return found


def figures_of_file(found: dict[str, list[Mark]]) -> dict[str, float]:
    """Per cent right by setting, and the gap of the worst kind of the first one behind dense."""
    names = list(found)
    scores = {name.replace(" ", "_"): round(Score.of(marks).percent, 2) for name, marks in found.items()}
    worst = worst_gap(found["dense"], found[names[1]]) if len(names) > 1 else None
    gap = {} if worst is None else {"worst_kind_gap": round(worst[1], 2)}
    return {"questions": len(found["dense"])} | scores | gap


# ---- command -------------------------------------------------------------------------------------------------------------------


def _methods(text: str) -> tuple[str, ...]:
    methods = tuple(text.split(","))
    for method in methods:
        prune, _, retrieve = method.partition("+")
        if prune not in PRUNING or retrieve not in ("", *RETRIEVAL):
            raise argparse.ArgumentTypeError(
                f"{method!r}: pruning is one of {', '.join(PRUNING)}; retrieval of {', '.join(RETRIEVAL)}"
            )
    return methods


def _ratios(text: str) -> tuple[tuple[float, float], ...]:
    ratios = []
    for each in text.split(","):
        kept, _, read = each.partition("/")
        try:
            ratio = float(kept), float(read or 1)
        except ValueError:
            ratio = math.nan, math.nan
        if not all(0 < share <= 1 for share in ratio):
            raise argparse.ArgumentTypeError(f"{each!r} must be PRUNE_KEEP/RETRIEVE_KEEP, both in (0, 1]")
        ratios.append(ratio)
    return tuple(ratios)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    summary, _, more = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accuracy", description=summary, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    world = parser.add_argument_group("the demo world")
    world.add_argument("--quick", action="store_true", help="two videos of each length and range instead of eight")
    world.add_argument("--videos", type=int, metavar="N", help="N videos of each length and range; with --dataset N in all")
    world.add_argument(
        "--range", dest="range_", choices=tuple(scene_exam.RANGES), default="held-out", help="validation is for choices"
    )
    world.add_argument("--curve", action="store_true", help="also at fixed shares")
    world.add_argument("--twin", type=Path, metavar="DIR", help="the dense-only twin (default: the bundled one)")
    world.add_argument(
        "--unsupervised", type=Path, metavar="DIR", help="a model whose tower's attention was not trained (likewise)"
    )
    file = parser.add_argument_group("questions of a file")
    file.add_argument("--dataset", type=Path, metavar="FILE", help="ask these questions instead")
    file.add_argument("--layout", choices=tuple(LAYOUTS), default="dialogues", help="how FILE is written")
    file.add_argument("--videos-dir", type=Path, metavar="DIR", help="where its videos are (default: beside it)")
    file.add_argument("--methods", type=_methods, help="PRUNING[+RETRIEVAL], comma-separated (default: salience)")
    file.add_argument(
        "--ratios", type=_ratios, help=f"PRUNE_KEEP/RETRIEVE_KEEP, comma-separated (default: {PRUNE_KEEP:g}/{RETRIEVE_KEEP:g})"
    )
    parser.add_argument("--model", default="demo", help="checkpoint; without --dataset one that knows the demo world")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="served", help="how turns of a dialogue follow each other")
    parser.add_argument("--fps", type=float, help="frames sampled per second (default: the engine's)")
    parser.add_argument("--max-frames", type=int, help="of one video (default: the engine's; of the demo world all)")
    parser.add_argument("--max-tokens", type=int, help="of one answer (default: 32; of the demo world as many as any needs)")
    parser.add_argument("--dtype", help="of the engine (default: the engine's)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="of torch; more than one only hurt a model as small as the demo's")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep marks in FILE as they come, and go on from it")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write one line for each answer")
    parser.add_argument(
        "--plots", type=Path, metavar="DIR", help="draw accuracy against bytes, step time and turn (needs matplotlib)"
    )
    parser.add_argument("--json", action="store_true", help="print the JSON document and nothing else")
    parser.add_argument("--save", type=Path, metavar="DIR", help="also write results to DIR")
    options = parser.parse_args(argv)
    if options.dataset is None and (options.methods or options.ratios or options.videos_dir):
        parser.error("--methods, --ratios and --videos-dir belong to --dataset")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    report = Report("accuracy", machine.card(), quiet=options.json)
    report.show_card()
    try:
        with progress() as say, tempfile.TemporaryDirectory() as folder:
            found = _on_file(options, report, say) if options.dataset else _on_world(options, report, say, Path(folder))
    except SparseVilaError as error:
        raise SystemExit(f"python -m benchmarks.accuracy: {error}") from error
    if options.csv:
        write_csv(options.csv, found)
    if options.plots:
        from benchmarks.lib.exam_plots import draw_plots

        for path in draw_plots(options.plots, found):
            report.say(f"drawn: {path}")
    report.show_figures()
    report.finish(options.save)


def _exam(
    options: argparse.Namespace, model: Path, dialogues: Sequence[Dialogue], report: Report, say: Any, suffix: str = ""
) -> Exam:
    fields = {name: value for name in ("fps", "max_frames", "dtype") if (value := getattr(options, name)) is not None}
    same = {
        "model": str(model.resolve()),
        "questions": digest_of(dialogues),
        "protocol": options.protocol,
        "max_tokens": options.max_tokens,
    }
    journal = ExamJournal(options.resume and options.resume.with_name(options.resume.name + suffix), {**same, **fields})
    loaded = load_model(model, device=options.device, dtype=options.dtype or "auto")
    return Exam(loaded, dialogues, report, say, options.protocol, {**fields, "device": options.device}, options.max_tokens, journal)


def _on_file(options: argparse.Namespace, report: Report, say: Any) -> dict[str, list[Mark]]:
    dialogues = read_dialogues(options.dataset, options.layout, options.videos_dir, options.videos)
    if not dialogues:
        raise BadConfig(f"{options.dataset} holds no question")
    exam = _exam(options, EngineConfig(model=options.model).model_dir, dialogues, report, say)
    found = exam.sit(sittings_of(options.methods or ("salience",), options.ratios or ((PRUNE_KEEP, RETRIEVE_KEEP),)))
    show(report, f"{options.dataset.stem}, {options.protocol}", found)
    report.figures = figures_of_file(found)
    return found


def _on_world(options: argparse.Namespace, report: Report, say: Any, folder: Path) -> dict[str, list[Mark]]:
    directory = EngineConfig(model=options.model).model_dir
    options.max_frames = options.max_frames or scene_exam.MAX_FRAMES
    options.max_tokens = options.max_tokens or scene_exam.MAX_TOKENS
    per_length = options.videos or (scene_exam.QUICK_PER_LENGTH if options.quick else scene_exam.VIDEOS_PER_LENGTH)
    say("writing videos")
    dialogues = scene_exam.write_dialogues(folder, scene_exam.RANGES[options.range_], per_length)
    found = _exam(options, directory, dialogues, report, say).sit(scene_exam.SITTINGS)
    show(report, "Demo model", found)
    if options.curve:
        curve = _exam(options, directory, dialogues, report, say).sit((scene_exam.SITTINGS[0], *scene_exam.curve_sittings()))
        show(report, "Demo model at fixed shares", curve)
        found |= curve
    others = (
        ("Dense-only twin", options.twin or directory.parent / "checkpoint_dense_only", scene_exam.TWIN_SITTINGS, ".twin"),
        (
            "Attention not trained",
            options.unsupervised or directory.parent / "checkpoint_unsupervised",
            scene_exam.UNSUPERVISED_SITTINGS,
            ".unsupervised",
        ),
    )
    for title, other, sittings, suffix in others:
        if not other.is_dir():
            report.say(f"{title}: no checkpoint at {other}")
            continue
        marks = _exam(options, other, dialogues, report, say, suffix).sit(sittings)
        show(report, title, marks)
        found |= marks
    report.figures = scene_exam.figures(found)
    return found


if __name__ == "__main__":
    main()
