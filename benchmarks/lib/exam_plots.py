"""Pictures of an exam: accuracy against bytes, against step time, by turn and by kind. Needs matplotlib (the extra `plots`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.lib.exam_marks import Mark, Score
from benchmarks.lib.exam_tables import costs, splits
from sparsevila_cluster.core.errors import BadConfig

Found = Mapping[str, Sequence[Mark]]
SIZE_INCHES = (7.5, 4.5)
# More lines or bars than this in one picture tell nothing.
MOST_LINES = 6


def draw_plots(folder: Path, found: Found) -> list[Path]:
    """PNG files in `folder`, which is made if it is missing; the first setting is the dense one.

    Raises:
        BadConfig: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise BadConfig("--plots needs matplotlib: pip install sparsevila-cluster[plots]") from error
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [
        _against(folder / "accuracy_by_bytes.png", found, "KV that a step reads, MiB", _read_mib),
        _against(folder / "accuracy_by_step_time.png", found, "decode step, ms", lambda marks: costs(marks)["step_ms"]),
        _lines(folder / "accuracy_by_turn.png", found, "turn"),
        _lines(folder / "accuracy_by_video_length.png", found, "video length"),
        _bars(folder / "accuracy_by_kind.png", found),
    ]
    return [path for path in drawn if path is not None]


def _read_mib(marks: Sequence[Mark]) -> float | None:
    """Mean of what a decode step reads of the visual KV: the prefix's bytes, times the share of it that was retrieved."""
    read = [mark.kv_bytes * mark.retrieved / mark.kept / 2**20 for mark in marks if mark.kept]
    return sum(read) / len(read) if read else None


def _figure() -> tuple[Any, Any]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=SIZE_INCHES, layout="constrained")
    axes.grid(alpha=0.3)
    axes.set_ylabel("answers right, % (95 % interval)")
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _reach(score: Score) -> tuple[float, float]:
    low, high = score.interval
    return score.percent - low, high - score.percent


def _against(path: Path, found: Found, what: str, cost: Any) -> Path | None:
    """Every setting a point; those that nothing beats in both are joined."""
    points = [(cost(marks), Score.of(marks), name) for name, marks in found.items()]
    known = sorted(((x, score, name) for x, score, name in points if x is not None), key=lambda point: point[0])
    if not known:
        return None
    figure, axes = _figure()
    best, front = -1.0, []
    for x, score, name in known:
        below, above = _reach(score)
        axes.errorbar([x], [score.percent], yerr=[[below], [above]], fmt="o", capsize=3, color="tab:blue")
        axes.annotate(name, (x, score.percent), textcoords="offset points", xytext=(6, 4), fontsize=8)
        if score.percent > best:
            best = score.percent
            front.append((x, score.percent))
    axes.step(*zip(*front, strict=True), where="post", color="tab:orange", alpha=0.7)
    axes.set_xscale("log")
    axes.set_xlabel(what)
    return _save(figure, path)


def _lines(path: Path, found: Found, what: str) -> Path | None:
    names = list(found)[:MOST_LINES]
    classes = list(splits(found[names[0]])[what])
    if len(classes) < 2:
        return None
    figure, axes = _figure()
    for name in names:
        scores = list(splits(found[name])[what].values())
        reaches = tuple(zip(*map(_reach, scores), strict=True))
        axes.errorbar(classes, [score.percent for score in scores], yerr=reaches, marker="o", capsize=3, label=name)
    axes.legend(fontsize=8)
    axes.set_ylim(0, 101)
    return _save(figure, path)


def _bars(path: Path, found: Found) -> Path:
    names = list(found)[:2]
    kinds = list(splits(found[names[0]])["kind"])
    figure, axes = _figure()
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        scores = list(splits(found[name])["kind"].values())
        reaches = tuple(zip(*map(_reach, scores), strict=True))
        places = [number + i * width for number in range(len(kinds))]
        axes.bar(places, [score.percent for score in scores], width, yerr=reaches, capsize=2, label=name)
    axes.set_xticks([number + (len(names) - 1) * width / 2 for number in range(len(kinds))], kinds, rotation=60, ha="right")
    axes.legend(fontsize=8)
    axes.set_ylim(0, 101)
    return _save(figure, path)
