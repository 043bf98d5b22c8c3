"""The exam of the demo world: three ranges of videos that nothing was chosen on, one for choices, and what is compared.

A range is a stream of `demo.scenes`: its scenes, backgrounds and words are its own. Held-out ranges are looked at by the final
command only; whatever is tried goes on the validation range.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lib.accuracy_exam import Sitting
from benchmarks.lib.exam_marks import Mark, Score, worst_gap
from benchmarks.lib.exam_questions import Dialogue, ExamQuestion
from sparsevila_cluster.demo.drawing import write_mp4
from sparsevila_cluster.demo.questions import pick_questions
from sparsevila_cluster.demo.scene_drawing import make_video
from sparsevila_cluster.demo.scenes import STREAMS, Scene

RANGES = {"validation": ("validation",), "held-out": ("held out a", "held out b", "held out c")}
LENGTHS = (8, 16, 32, 64)
NUM_TURNS = 30
VIDEOS_PER_LENGTH, QUICK_PER_LENGTH = 8, 2
# A listing of six full steps, its words spelled letter by letter.
MAX_TOKENS = 256
MAX_FRAMES = 2 * max(LENGTHS)
# Answers from this many words on come from many steps of decoding: they live on what was retrieved.
LONG_WORDS = 12
RANDOM_SEEDS = 4

DENSE: dict[str, Any] = {"prune": "keep_all", "retrieve": "retrieve_all"}
PRUNED_ONLY = {"retrieve": "retrieve_all"}
CURVE = ((0.25, 0.5), (0.25, 0.25), (0.25, 0.10), (0.25, 0.05), (0.25, 0.02), (0.10, 0.10), (0.10, 0.05))

# `sparse` is what an engine does when nothing is configured.
SITTINGS = (
    Sitting(DENSE, {"dense": None}),
    Sitting({}, {"sparse": None}),
    Sitting({"prune": "random", "retrieve": "random"}, {"random": None}, RANDOM_SEEDS),
    Sitting({"prune": "uniform"}, {"uniform": None}),
    Sitting({"prune": "random"}, {"random pruning": None}, RANDOM_SEEDS),
    Sitting({"retrieve": "random"}, {"random retrieval": None}, RANDOM_SEEDS),
    Sitting(PRUNED_ONLY, {"pruning only": None}),
    Sitting({"prune": "keep_all"}, {"retrieval only": None}),
)
TWIN_SITTINGS = (
    Sitting(DENSE, {"twin dense": None}),
    Sitting({}, {"twin sparse": None}),
    Sitting(PRUNED_ONLY, {"twin pruning only": None}),
    Sitting({"prune": "keep_all"}, {"twin retrieval only": None}),
)
# Pruning alone: what a tower's own attention is worth, when nobody trained it to lie on things.
UNSUPERVISED_SITTINGS = (
    Sitting(DENSE, {"unsupervised dense": None}),
    Sitting(PRUNED_ONLY, {"unsupervised salience": None}),
    Sitting({**PRUNED_ONLY, "prune": "random"}, {"unsupervised random": None}, RANDOM_SEEDS),
    Sitting({**PRUNED_ONLY, "prune": "uniform"}, {"unsupervised uniform": None}),
)


def curve_sittings(points: Sequence[tuple[float, float]] = CURVE) -> tuple[Sitting, ...]:
    """Fixed shares: prune_keep / retrieve_keep."""
    sittings = []
    for prune_keep in dict.fromkeys(point[0] for point in points):
        keeps = [keep for kept, keep in points if kept == prune_keep]
        fields = {"prune_keep": prune_keep, "retrieve_keep": keeps[0], "retrieve_mass": None, "refresh_every": 0}
        sittings.append(Sitting(fields, {f"{prune_keep:g}/{keep:g}": keep for keep in keeps}))
    return tuple(sittings)


def write_dialogues(
    folder: Path, streams: Iterable[str], per_length: int, lengths: Sequence[int] = LENGTHS, num_turns: int = NUM_TURNS
) -> list[Dialogue]:
    """One MP4 file and `num_turns` questions for each of `per_length` videos of each length of each stream."""
    wanted = [(stream, num_steps, seed) for stream in streams for num_steps in lengths for seed in range(per_length)]
    paths = [folder / f"{stream.replace(' ', '-')}-{num_steps}-{seed}.mp4" for stream, num_steps, seed in wanted]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        scenes = list(pool.map(_write, wanted, paths))
    dialogues = []
    for (stream, num_steps, seed), path, scene in zip(wanted, paths, scenes, strict=True):
        rng = np.random.default_rng((STREAMS[stream], num_steps, seed, 1))
        questions = tuple(ExamQuestion(one.kind, one.text, one.answer) for one in pick_questions(scene, rng, num_turns))
        dialogues.append(Dialogue(path, questions, stream))
    return dialogues


def _write(wanted: tuple[str, int, int], path: Path) -> Scene:
    stream, num_steps, seed = wanted
    scene, frames = make_video(seed, num_steps, stream)
    write_mp4(frames, path)
    return scene


def figures(found: Mapping[str, Sequence[Mark]]) -> dict[str, float]:
    """The figures that others read, by name, in per cent."""
    dense, sparse = found["dense"], found["sparse"]
    last = max(mark.turn for mark in sparse)
    shares = {
        "dense": dense,
        "sparse": sparse,
        "random": found["random"],
        "uniform": found["uniform"],
        "twin_dense": found.get("twin dense", ()),
        "twin_sparse": found.get("twin sparse", ()),
        "long_answers_dense": [mark for mark in dense if mark.num_words >= LONG_WORDS],
        "long_answers_sparse": [mark for mark in sparse if mark.num_words >= LONG_WORDS],
        "sparse_turn1": [mark for mark in sparse if mark.turn == 0],
        f"sparse_turn{last + 1}": [mark for mark in sparse if mark.turn == last],
        "unsupervised_salience": found.get("unsupervised salience", ()),
        "unsupervised_random": found.get("unsupervised random", ()),
    }
    worst = worst_gap(dense, sparse)
    gap = {} if worst is None else {"worst_kind_gap": round(worst[1], 2)}
    return {"questions": len(dense)} | {name: round(Score.of(marks).percent, 2) for name, marks in shares.items() if marks} | gap
