"""What an exam shows: how many answers are right, what they cost, and both by everything that an average hides."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.lib.exam_marks import ANSWER_WORDS, TURNS, VIDEO_S, Mark, Score, by_class, changed, mcnemar, scores_by, worst_gap
from benchmarks.lib.report import Report

Found = Mapping[str, Sequence[Mark]]


def splits(marks: Sequence[Mark]) -> dict[str, dict[str, Score]]:
    """Scores by kind, turn, lengths, and by range where there are several."""
    return {
        "kind": dict(sorted(scores_by(marks, lambda mark: mark.kind).items())),
        "turn": by_class(marks, lambda mark: mark.turn + 1, TURNS, "turn"),
        "answer length": by_class(marks, lambda mark: mark.num_words, ANSWER_WORDS, "words"),
        "video length": by_class(marks, lambda mark: mark.video_s, VIDEO_S, "seconds"),
        "range": scores_by(marks, lambda mark: mark.source),
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


def as_row(marks: Sequence[Mark], dense: Sequence[Mark]) -> dict[str, Any]:
    """One setting as part of the document."""
    lost, won = changed(dense, marks)
    return {
        "questions": len(marks),
        **as_data(Score.of(marks)),
        "mean_of_kinds": round(macro(marks), 2),
        **{
            f"by_{what.replace(' ', '_')}": {name: as_data(one) for name, one in scores.items()}
            for what, scores in splits(marks).items()
            if what != "range" or len(scores) > 1
        },
        **costs(marks),
        "wrong_where_dense_right": lost,
        "right_where_dense_wrong": won,
        "mcnemar_p": round(mcnemar(lost, won), 6),
    }


def as_data(score: Score) -> dict[str, Any]:
    """With its 95 % interval."""
    if not score.total:
        return {"total": 0}
    low, high = score.interval
    return {"percent": round(score.percent, 2), "low": round(low, 2), "high": round(high, 2), "total": score.total}


def show(report: Report, title: str, found: Found) -> None:
    """How many answers are right and at what cost, and then by kind, turn and length. The first setting is the dense one."""
    names = list(found)
    dense, body, spent = found[names[0]], [], []
    for name in names:
        marks = found[name]
        lost, won = changed(dense, marks)
        worst = worst_gap(dense, marks)
        gap = "" if worst is None or name == names[0] else f"{worst[1]:.1f} ({worst[0]})"
        p = "" if name == names[0] else f"{mcnemar(lost, won):.2g}"
        body.append([name, str(Score.of(marks)), f"{macro(marks):.1f}", f"{lost}, {won}", p, gap])
        spent.append([name, *costs(marks).values()])
    head: tuple[str, ...] = ("setting", "all", "mean of kinds", "lost, won against dense", "McNemar's p", "worst kind, points lost")
    report.show_table(f"{title}: per cent right (95 % interval) of {len(dense)}", head, body)
    parts = ("KV, MiB", "kept", "read of kept", "read of all", "prefill ms", "question ms", "step ms")
    report.show_table(f"{title}: means", ("setting", *parts), spent)
    for what, scores in splits(dense).items():
        if len(scores) < 2:
            continue
        if len(scores) > len(names):  # the longer way down
            columns = [splits(found[name])[what] for name in names]
            rows = [[each, score.total, *(_percent(column[each]) for column in columns)] for each, score in scores.items()]
            head = (what, "questions", *names)
        else:
            rows = [[name, *map(_percent, splits(found[name])[what].values())] for name in names]
            head = ("setting", *(f"{each} ({score.total})" for each, score in scores.items()))
        report.show_table(f"{title}: per cent right by {what} (number of questions)", head, rows)


def _percent(score: Score) -> str:
    return f"{score.percent:.1f}" if score.total else ""


def write_csv(file: Path, found: Found) -> None:
    """One line for each answer."""
    rows = [{"setting": name, **asdict(mark)} for name, marks in found.items() for mark in marks]
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as text:
        writer = csv.DictWriter(text, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
