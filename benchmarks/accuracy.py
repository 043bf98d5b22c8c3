r"""How often the answers are right: dense, sparse and random, on videos nobody has trained on. `python -m benchmarks.accuracy`.

The demo model is trained with token dropping, and its salience is trained in. Its twin has the same beginning and an end on dense
videos only: it shows what an untouched model of this size makes of the same policies.

With --dataset any model is asked the questions of a file (`benchmarks.lib.exam_questions` names the formats) about videos that are
there, dense and at each of --methods and --ratios:

    python -m benchmarks.accuracy --model DIR --dataset test.jsonl --layout videomme --videos-dir VIDEOS --protocol paper \
        --ratios 0.25/0.10,0.50/0.25 --resume videomme.journal.jsonl --csv videomme.csv
"""

from __future__ import annotations

import argparse
import csv
import math
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib import machine
from benchmarks.lib.accuracy_exam import PROTOCOLS, sit, write_dialogues
from benchmarks.lib.exam_journal import ExamJournal, digest_of
from benchmarks.lib.exam_marks import (
    ANSWER_WORDS,
    TURNS,
    VIDEO_S,
    Mark,
    Score,
    by_class,
    changed,
    mcnemar,
    scores_by,
    worst_gap,
)
from benchmarks.lib.exam_questions import LAYOUTS, Dialogue, read_dialogues
from benchmarks.lib.report import Report, progress
from sparsevila_cluster.core.config import EngineConfig
from sparsevila_cluster.core.errors import BadConfig, SparseVilaError
from sparsevila_cluster.models import Model, load_model
from sparsevila_cluster.pruning import PRUNING
from sparsevila_cluster.retrieval import RETRIEVAL

QUICK_VIDEOS, FULL_VIDEOS = 32, 128
PRUNE_KEEP, RETRIEVE_KEEP = 0.25, 0.10
CURVE = (1.0, 0.5, 0.25, 0.10, 0.05, 0.02, 0.01)
RANDOM_SEEDS = 4
# Kinds whose answers have several words. A one-word answer comes from the question's own rows, which see the whole prefix: only
# these kinds can suffer from retrieval.
SEVERAL_WORDS = ("when", "where", "at", "describe")

DENSE = {"prune": "keep_all", "retrieve": "retrieve_all"}
SPARSE: dict[str, Any] = {"prune": "salience", "prune_keep": PRUNE_KEEP, "retrieve": "query_topk", "retrieve_keep": RETRIEVE_KEEP}


@dataclass(frozen=True)
class Sitting:
    """One configuration and the values of retrieve_keep to ask with, each under a name."""

    fields: dict[str, Any]
    names: dict[str, float | None]
    seeds: int = 1


SITTINGS = (
    Sitting(DENSE, {"dense": None}),
    Sitting(SPARSE, {"sparse": RETRIEVE_KEEP, **{f"keep {keep:g}": keep for keep in CURVE if keep != RETRIEVE_KEEP}}),
    Sitting({**SPARSE, "prune": "random", "retrieve": "random"}, {"random": None}, RANDOM_SEEDS),
    Sitting({**SPARSE, "prune": "random"}, {"random pruning": None}, RANDOM_SEEDS),
    Sitting({**SPARSE, "retrieve": "random"}, {"random retrieval": None}, RANDOM_SEEDS),
    Sitting({**SPARSE, "prune": "keep_all"}, {"retrieval only": None}),
)
TWIN_SITTINGS = (
    Sitting(DENSE, {"twin dense": None}),
    Sitting(SPARSE, {"twin sparse": RETRIEVE_KEEP, "twin pruning only": 1.0}),
    Sitting({**SPARSE, "prune": "keep_all"}, {"twin retrieval only": None}),
    Sitting({**SPARSE, "prune": "random", "retrieve": "random"}, {"twin random": None}, RANDOM_SEEDS),
)
# The whole pruned prefix, as a point of the curve and as a setting of its own.
PRUNING_ONLY = "keep 1"
SHOWN = ("dense", "sparse", PRUNING_ONLY, "retrieval only", "random", "random pruning", "random retrieval")
SHOWN_TWIN = ("twin dense", "twin sparse", "twin pruning only", "twin retrieval only", "twin random")


def sittings_of(methods: Sequence[str], ratios: Sequence[tuple[float, float]]) -> tuple[Sitting, ...]:
    """Dense first, then every method ("pruning" or "pruning+retrieval") at every (prune_keep, retrieve_keep)."""
    sittings = [Sitting(DENSE, {"dense": None})]
    for method in methods:
        prune, _, retrieve = method.partition("+")
        retrieve = retrieve or SPARSE["retrieve"]
        seeds = RANDOM_SEEDS if "random" in (prune, retrieve) else 1
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
    protocol: Any = "served"
    fields: Mapping[str, Any] | None = None
    max_tokens: int | None = None
    journal: ExamJournal | None = None

    def sit(self, sittings: Sequence[Sitting]) -> dict[str, list[Mark]]:
        """Marks by name; each also becomes a row of the report."""
        found: dict[str, list[Mark]] = {}
        for sitting in sittings:
            keeps, names, fields = list(sitting.names.values()), list(sitting.names), {**(self.fields or {}), **sitting.fields}
            self.say(f"{', '.join(names)}: {len(self.dialogues)} videos")
            start_s = time.perf_counter()
            options = {"protocol": self.protocol, "max_tokens": self.max_tokens, "journal": self.journal, "seeds": sitting.seeds}
            results = sit(self.model, self.dialogues, fields, keeps, **options)
            each_s = (time.perf_counter() - start_s) / len(names)
            for name, keep, marks in zip(names, keeps, results, strict=True):
                found[name] = marks
                dense = next(iter(found.values()))
                asked = fields if keep is None else {**fields, "retrieve_keep": keep}
                self.report.rows.append({"setting": name, **asked, **as_row(marks, dense), "seconds": round(each_s, 1)})
        return found


# ---- what comes of it ----------------------------------------------------------------------------------------------------------


def several_words(marks: Iterable[Mark]) -> list[Mark]:
    """Those that retrieval can harm."""
    return [mark for mark in marks if mark.kind in SEVERAL_WORDS]


def splits(marks: Sequence[Mark]) -> dict[str, dict[str, Score]]:
    """Scores by everything that an average hides."""
    return {
        "kind": dict(sorted(scores_by(marks, lambda mark: mark.kind).items())),
        "turn": by_class(marks, lambda mark: mark.turn + 1, TURNS, "turn"),
        "answer length": by_class(marks, lambda mark: mark.num_words, ANSWER_WORDS, "words"),
        "video length": by_class(marks, lambda mark: mark.video_s, VIDEO_S, "seconds"),
    }


def costs(marks: Sequence[Mark]) -> dict[str, float | None]:
    """Means. kv_mib: of a video's prefix; shares of the visual tokens that a step reads, of those kept and of all."""

    def mean(values: Iterable[float | None], digits: int = 3) -> float | None:
        known = [value for value in values if value is not None]
        return round(sum(known) / len(known), digits) if known else None

    first = [mark for mark in marks if mark.turn == 0]
    return {
        "kv_mib": mean(mark.kv_bytes / 2**20 for mark in first),
        "kept_share": mean((mark.kept / mark.visual if mark.visual else None for mark in marks), 4),
        "retrieved_of_kept": mean((mark.retrieved / mark.kept if mark.kept else None for mark in marks), 4),
        "retrieved_of_all": mean((mark.retrieved / mark.visual if mark.visual else None for mark in marks), 4),
        "prefill_ms": mean(mark.prefill_ms for mark in marks),
        "question_ms": mean(mark.question_ms for mark in marks),
        "step_ms": mean(mark.step_ms for mark in marks),
    }


def macro(marks: Sequence[Mark]) -> float:
    """Per cent right, every kind counting the same: MLVU's and VNBench's average."""
    scores = [score.percent for score in scores_by(marks, lambda mark: mark.kind).values()]
    return sum(scores) / len(scores)


def as_row(marks: list[Mark], dense: list[Mark]) -> dict[str, Any]:
    lost, won = changed(dense, marks)
    return {
        "questions": len(marks),
        **as_data(Score.of(marks)),
        "mean_of_kinds": round(macro(marks), 2),
        **{
            f"by_{what.replace(' ', '_')}": {name: as_data(one) for name, one in scores.items()}
            for what, scores in splits(marks).items()
        },
        **costs(marks),
        "wrong_where_dense_right": lost,
        "right_where_dense_wrong": won,
        "mcnemar_p": round(mcnemar(lost, won), 6),
    }


def as_data(score: Score) -> dict[str, Any]:
    if not score.total:
        return {"total": 0}
    low, high = score.interval
    return {"percent": round(score.percent, 2), "low": round(low, 2), "high": round(high, 2), "total": score.total}


def show(report: Report, title: str, names: Sequence[str], found: dict[str, list[Mark]]) -> None:
    """How many answers are right and at what cost, and then by kind, turn and length."""
    names = [name for name in names if name in found]
    called = ["pruning only" if name == PRUNING_ONLY else name for name in names]
    dense, body, spent = found[names[0]], [], []
    for name, said in zip(names, called, strict=True):
        marks = found[name]
        lost, won = changed(dense, marks)
        worst = worst_gap(dense, marks)
        gap = "" if worst is None or name == names[0] else f"{worst[1]:.1f} ({worst[0]})"
        p = "" if name == names[0] else f"{mcnemar(lost, won):.2g}"
        body.append([said, str(Score.of(marks)), f"{macro(marks):.1f}", f"{lost}, {won}", p, gap])
        spent.append([said, *costs(marks).values()])
    head: tuple[str, ...] = ("setting", "all", "mean of kinds", "lost, won against dense", "McNemar's p", "worst kind, points lost")
    report.show_table(f"{title}: per cent right (95 % interval) of {len(dense)}", head, body)
    parts = ("KV, MiB", "kept", "read of kept", "read of all", "prefill ms", "question ms", "step ms")
    report.show_table(f"{title}: means", ("setting", *parts), spent)
    for what, scores in splits(dense).items():
        if len(scores) < 2:
            continue
        rows = [[said, *map(_percent, splits(found[name])[what].values())] for said, name in zip(called, names, strict=True)]
        head = ("setting", *(f"{name} ({score.total})" for name, score in scores.items()))
        report.show_table(f"{title}: per cent right by {what} (number of questions)", head, rows)


def show_curve(report: Report, found: dict[str, list[Mark]]) -> None:
    """What several-word answers lose as retrieval keeps less."""
    dense = Score.of(several_words(found["dense"]))
    body = []
    for keep in CURVE:
        marks = several_words(found["sparse" if keep == RETRIEVE_KEEP else f"keep {keep:g}"])
        scores = scores_by(marks, lambda mark: mark.kind)
        words = [_percent(scores[kind]) for kind in SEVERAL_WORDS if kind in scores]
        body.append([f"{keep:g}", str(Score.of(marks)), f"{Score.of(marks).percent - dense.percent:+.1f}", *words])
    kinds = [kind for kind in SEVERAL_WORDS if any(mark.kind == kind for mark in found["dense"])]
    title = f"Answers of several words at prune_keep {PRUNE_KEEP:g}, by retrieve_keep (dense: {dense})"
    report.show_table(title, ("retrieve_keep", "per cent right", "minus dense", *kinds), body)


def _percent(score: Score) -> str:
    return f"{score.percent:.1f}" if score.total else ""


def figures(found: dict[str, list[Mark]], twin: dict[str, list[Mark]]) -> dict[str, float]:
    """The figures that others read, by name, in per cent."""
    marks = {**found, **twin}

    def turns(of: range) -> Score:
        return Score.of(mark for mark in found["sparse"] if mark.turn in of)

    scores = {
        **{name: Score.of(marks[name]) for name in ("dense", "sparse", "random")},
        "dense_multiword": Score.of(several_words(found["dense"])),
        "sparse_multiword": Score.of(several_words(found["sparse"])),
        "sparse_turn1": turns(range(0, 1)),
        "sparse_turn4plus": turns(range(3, 1_000)),
        **{name.replace(" ", "_"): Score.of(marks[name]) for name in ("twin dense", "twin sparse") if name in marks},
    }
    return {
        "questions": len(found["dense"]),
        **{name: round(score.percent, 2) for name, score in scores.items() if score.total},
        **_gap(found["dense"], found["sparse"]),
    }


def figures_of_file(found: dict[str, list[Mark]]) -> dict[str, float]:
    """Per cent right by setting, and the gap of the worst kind of the first one behind dense."""
    names = list(found)
    scores = {name.replace(" ", "_"): round(Score.of(marks).percent, 2) for name, marks in found.items()}
    return {"questions": len(found["dense"]), **scores, **(_gap(found["dense"], found[names[1]]) if len(names) > 1 else {})}


def _gap(dense: Sequence[Mark], marks: Sequence[Mark]) -> dict[str, float]:
    worst = worst_gap(dense, marks)
    return {} if worst is None else {"worst_kind_gap": round(worst[1], 2)}


def write_csv(file: Path, found: dict[str, list[Mark]]) -> None:
    """One line for each answer."""
    rows = [{"setting": name, **asdict(mark)} for name, marks in found.items() for mark in marks]
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as text:
        writer = csv.DictWriter(text, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


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
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_VIDEOS} videos of 8 questions instead of {FULL_VIDEOS}")
    parser.add_argument("--videos", type=int, metavar="N", help="another number of videos; with --dataset of the first N")
    parser.add_argument("--model", default="demo", help="checkpoint; without --dataset one that knows the demo world")
    parser.add_argument("--twin", type=Path, metavar="DIR", help="its dense-only twin (default: the bundled one)")
    parser.add_argument("--dataset", type=Path, metavar="FILE", help="ask these questions instead")
    parser.add_argument("--layout", choices=tuple(LAYOUTS), default="dialogues", help="how FILE is written")
    parser.add_argument("--videos-dir", type=Path, metavar="DIR", help="where its videos are (default: beside it)")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="served", help="how turns of a dialogue follow each other")
    parser.add_argument("--methods", type=_methods, help="with --dataset: PRUNING[+RETRIEVAL], comma-separated (default: salience)")
    parser.add_argument("--ratios", type=_ratios, help=f"with --dataset: default {PRUNE_KEEP:g}/{RETRIEVE_KEEP:g}")
    parser.add_argument("--fps", type=float, help="frames sampled per second (default: the engine's)")
    parser.add_argument("--max-frames", type=int, help="of one video (default: the engine's)")
    parser.add_argument("--max-tokens", type=int, help="of one answer (default: 32)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="of torch; more than one only hurt a model as small as the demo's")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep marks in FILE as they come, and go on from it")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write one line for each answer")
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
    report.show_figures()
    report.finish(options.save)


def _exam(
    options: argparse.Namespace, model: Path, dialogues: Sequence[Dialogue], report: Report, say: Any, suffix: str = ""
) -> Exam:
    fields = {name: value for name in ("fps", "max_frames") if (value := getattr(options, name)) is not None}
    same = {
        "model": str(model.resolve()),
        "questions": digest_of(dialogues),
        "protocol": options.protocol,
        "max_tokens": options.max_tokens,
    }
    journal = ExamJournal(options.resume and options.resume.with_name(options.resume.name + suffix), {**same, **fields})
    loaded = load_model(model, device=options.device)
    return Exam(loaded, dialogues, report, say, options.protocol, {**fields, "device": options.device}, options.max_tokens, journal)


def _on_file(options: argparse.Namespace, report: Report, say: Any) -> dict[str, list[Mark]]:
    dialogues = read_dialogues(options.dataset, options.layout, options.videos_dir, options.videos)
    if not dialogues:
        raise BadConfig(f"{options.dataset} holds no question")
    exam = _exam(options, EngineConfig(model=options.model).model_dir, dialogues, report, say)
    found = exam.sit(sittings_of(options.methods or ("salience",), options.ratios or ((PRUNE_KEEP, RETRIEVE_KEEP),)))
    show(report, f"{options.dataset.stem}, {options.protocol}", list(found), found)
    report.figures = figures_of_file(found)
    return found


def _on_world(options: argparse.Namespace, report: Report, say: Any, folder: Path) -> dict[str, list[Mark]]:
    directory = EngineConfig(model=options.model).model_dir
    twin_directory = options.twin or directory.parent / "checkpoint_dense_only"
    say("writing videos")
    dialogues = write_dialogues(folder, options.videos or (QUICK_VIDEOS if options.quick else FULL_VIDEOS))
    found = _exam(options, directory, dialogues, report, say).sit(SITTINGS)
    show(report, "Demo model", SHOWN, found)
    show_curve(report, found)
    twin: dict[str, list[Mark]] = {}
    if twin_directory.is_dir():
        twin = _exam(options, twin_directory, dialogues, report, say, ".twin").sit(TWIN_SITTINGS)
        show(report, "Dense-only twin", SHOWN_TWIN, twin)
    else:
        report.say(f"no twin at {twin_directory}")
    report.figures = figures(found, twin)
    return {**found, **twin}


if __name__ == "__main__":
    main()
