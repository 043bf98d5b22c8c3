"""How often the answers are right: dense, sparse and random, on videos nobody has trained on. `python -m benchmarks.accuracy`.

The demo model is trained with token dropping, and its salience is trained in. Its twin has the same beginning and an end on dense
videos only: it shows what an untouched model of this size makes of the same policies.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib import machine
from benchmarks.lib.accuracy_exam import Mark, Paper, Score, by_kind, by_turn, changed, several_words, sit, write_papers
from benchmarks.lib.report import Report, progress
from sparsevila_cluster.core.config import EngineConfig
from sparsevila_cluster.demo.world import KINDS
from sparsevila_cluster.models import Model, load_model

QUICK_VIDEOS, FULL_VIDEOS = 32, 128
PRUNE_KEEP, RETRIEVE_KEEP = 0.25, 0.10
CURVE = (1.0, 0.5, 0.25, 0.10, 0.05, 0.02, 0.01)
RANDOM_SEEDS = 4

DENSE = {"prune": "keep_all", "retrieve": "retrieve_all"}
SPARSE = {"prune": "salience", "prune_keep": PRUNE_KEEP, "retrieve": "query_topk", "retrieve_keep": RETRIEVE_KEEP}


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


def examine(model: Model, papers: list[Paper], sittings: Sequence[Sitting], report: Report, say) -> dict[str, list[Mark]]:
    """Marks by name; each also becomes a row of the report."""
    found: dict[str, list[Mark]] = {}
    for sitting in sittings:
        keeps, names = list(sitting.names.values()), list(sitting.names)
        say(f"{', '.join(names)}: {len(papers)} videos")
        start_s = time.perf_counter()
        results = sit(model, papers, sitting.fields, keeps, seeds=sitting.seeds)
        each_s = (time.perf_counter() - start_s) / len(names)
        for name, keep, marks in zip(names, keeps, results, strict=True):
            found[name] = marks
            dense = next(iter(found.values()))
            fields = sitting.fields if keep is None else {**sitting.fields, "retrieve_keep": keep}
            report.rows.append({"setting": name, **fields, **as_row(marks, dense), "seconds": round(each_s, 1)})
    return found


def as_row(marks: list[Mark], dense: list[Mark]) -> dict[str, Any]:
    lost, won = changed(dense, marks)
    return {
        "questions": len(marks),
        **as_data(Score.of(marks)),
        "several_words": as_data(Score.of(several_words(marks))),
        "by_kind": {name: as_data(score) for name, score in by_kind(marks).items()},
        "by_turn": {name: as_data(score) for name, score in by_turn(marks).items()},
        "wrong_where_dense_right": lost,
        "right_where_dense_wrong": won,
    }


def as_data(score: Score) -> dict[str, Any]:
    if not score.total:
        return {"total": 0}
    low, high = score.interval
    return {"percent": round(score.percent, 2), "low": round(low, 2), "high": round(high, 2), "total": score.total}


def show(report: Report, title: str, names: Sequence[str], found: dict[str, list[Mark]]) -> None:
    """Two tables: all answers by turn, and by kind."""
    names = [name for name in names if name in found]
    dense = found[names[0]]
    body = []
    for name in names:
        marks = found[name]
        lost, won = changed(dense, marks)
        turns = [str(score) for score in by_turn(marks).values()]
        called = "pruning only" if name == PRUNING_ONLY else name
        body.append([called, str(Score.of(marks)), str(Score.of(several_words(marks))), *turns, f"{lost}, {won}"])
    head: tuple[str, ...] = ("setting", "all", "several words", "turn 1", "turns 2-3", "turns 4+", "lost, won against dense")
    report.show_table(f"{title}: per cent right (95 % interval)", head, body)
    kinds = by_kind(dense)
    head = ("setting", *(f"{kind} ({kinds[kind].total})" for kind in KINDS))
    body = [[row[0], *(_percent(score) for score in by_kind(found[name]).values())] for name, row in zip(names, body, strict=True)]
    report.show_table(f"{title}: per cent right by kind (number of questions)", head, body)


def show_curve(report: Report, found: dict[str, list[Mark]]) -> None:
    """What several-word answers lose as retrieval keeps less."""
    dense = Score.of(several_words(found["dense"]))
    body = []
    for keep in CURVE:
        marks = several_words(found["sparse" if keep == RETRIEVE_KEEP else f"keep {keep:g}"])
        scores = by_kind(marks)
        words = [_percent(scores[kind]) for kind in KINDS if scores[kind].total]
        body.append([f"{keep:g}", str(Score.of(marks)), f"{Score.of(marks).percent - dense.percent:+.1f}", *words])
    kinds = [kind for kind, score in by_kind(several_words(found["dense"])).items() if score.total]
    title = f"Answers of several words at prune_keep {PRUNE_KEEP:g}, by retrieve_keep (dense: {dense})"
    report.show_table(title, ("retrieve_keep", "per cent right", "minus dense", *kinds), body)


def _percent(score: Score) -> str:
    return f"{score.percent:.1f}" if score.total else ""


def figures(found: dict[str, list[Mark]], twin: dict[str, list[Mark]]) -> dict[str, float]:
    """The figures that others read, by name, in per cent."""
    marks = {**found, **twin}
    sparse_turns = by_turn(found["sparse"])
    scores = {
        **{name: Score.of(marks[name]) for name in ("dense", "sparse", "random")},
        "dense_multiword": Score.of(several_words(found["dense"])),
        "sparse_multiword": Score.of(several_words(found["sparse"])),
        "sparse_turn1": sparse_turns["turn 1"],
        "sparse_turn4plus": sparse_turns["turns 4+"],
        **{name.replace(" ", "_"): Score.of(marks[name]) for name in ("twin dense", "twin sparse") if name in marks},
    }
    return {"questions": len(found["dense"]), **{name: round(score.percent, 2) for name, score in scores.items() if score.total}}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_VIDEOS} videos of 8 questions instead of {FULL_VIDEOS}")
    parser.add_argument("--videos", type=int, metavar="N", help="another number of videos")
    parser.add_argument("--model", default="demo", help="checkpoint that knows the demo world (default: the bundled model)")
    parser.add_argument("--twin", type=Path, metavar="DIR", help="its dense-only twin (default: the bundled one)")
    parser.add_argument("--threads", type=int, default=1, help="of torch; more than one only hurt a model this small")
    parser.add_argument("--json", action="store_true", help="print the JSON document and nothing else")
    parser.add_argument("--save", type=Path, metavar="DIR", help="also write results to DIR")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    directory = EngineConfig(model=options.model).model_dir
    twin_directory = options.twin or directory.parent / "checkpoint_dense_only"
    report = Report("accuracy", machine.card(), quiet=options.json)
    report.show_card()
    with progress() as say, tempfile.TemporaryDirectory() as folder:
        say("writing videos")
        papers = write_papers(Path(folder), options.videos or (QUICK_VIDEOS if options.quick else FULL_VIDEOS))
        found = examine(load_model(directory, device="cpu"), papers, SITTINGS, report, say)
        show(report, "Demo model", SHOWN, found)
        show_curve(report, found)
        twin: dict[str, list[Mark]] = {}
        if twin_directory.is_dir():
            twin = examine(load_model(twin_directory, device="cpu"), papers, TWIN_SITTINGS, report, say)
            show(report, "Dense-only twin", SHOWN_TWIN, twin)
        else:
            report.say(f"no twin at {twin_directory}")
    report.figures = figures(found, twin)
    report.show_figures()
    report.finish(options.save)


if __name__ == "__main__":
    main()
