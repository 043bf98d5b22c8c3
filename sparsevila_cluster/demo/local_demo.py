"""`sparsevila demo --local`: three videos that the model never saw, a conversation about each, and how many answers are right.

write MP4 -> prepare once -> ask -> compare with the truth -> summary line   (three videos, shown turn by turn)
the same engine and a dense one on more held-out videos                         (only counted)
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from sparsevila_cluster.api.heatmap import draw_conversation, save_picture
from sparsevila_cluster.api.video_qa import VideoQA
from sparsevila_cluster.core.config import EngineConfig, build_config
from sparsevila_cluster.core.errors import BadRequest
from sparsevila_cluster.core.requests import Answer, MediaHandle
from sparsevila_cluster.core.summary import media_summary, megabytes, resolved_sparsity, summary_line
from sparsevila_cluster.demo.drawing import write_mp4
from sparsevila_cluster.demo.questions import SceneQuestion, pick_questions
from sparsevila_cluster.demo.scene_drawing import make_video
from sparsevila_cluster.demo.scenes import Scene

Report = Callable[[str, int, int], None]

# (seed, steps) of the videos that are shown, and of those whose answers are only counted.
SHOWN = ((1, 8), (2, 16), (3, 64))
SCORED = tuple((seed, num_steps) for seed in range(101, 105) for num_steps in (8, 16, 32))
NUM_SHOWN, NUM_SCORED = 10, 12
MAX_TOKENS, MAX_FRAMES = 192, 128
PASS_SHARE = 0.90
FILE_WIDTH = 120  # characters in a line where no terminal says how many there are
DENSE = {"prune": "keep_all", "retrieve": "retrieve_all"}
NOTE = (
    "The demo model was trained with tokens dropped, and its encoder's salience was trained in: it shows the "
    "mechanism. What sparsity costs another checkpoint must be measured on that checkpoint. A model this small runs on "
    "overhead, so its times say little about large ones."
)


class DemoVideo(NamedTuple):
    """A video of the demo world: its file, what it shows, the seed of both."""

    path: Path
    scene: Scene
    seed: int


@dataclass(frozen=True)
class GradedTurn:
    """One turn: the question with its true answer, and the model's answer."""

    question: SceneQuestion
    answer: Answer

    @property
    def right(self) -> bool:
        """Whether the answer is the true one, word for word."""
        return self.answer.text.strip() == self.question.answer

    @property
    def several_words(self) -> bool:
        """Whether retrieval can harm the answer: a first token comes from the question's own rows, which see all that was kept."""
        return " " in self.question.answer

    @property
    def total_ms(self) -> float:
        """Milliseconds from the question's arrival to its last event."""
        return self.answer.timeline["total"]


@dataclass(frozen=True)
class VideoResult:
    """One video: its file, its media prefix, its turns."""

    path: Path
    media: MediaHandle
    turns: tuple[GradedTurn, ...]


def run_local_demo(out: Path, model: str, as_json: bool, report: Report) -> int:
    """The whole demo; 0 if at least `PASS_SHARE` of the shown answers are right, else 1.

    out: folder for videos and heat map, made if it is missing. report: called with (stage, done, total) of long work.

    Raises:
        BadRequest: `out` cannot be written. BadCheckpoint.
    """
    console = Console(quiet=as_json, highlight=False)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    sparse_config = build_config(model=model, max_frames=MAX_FRAMES)
    try:
        out.mkdir(parents=True, exist_ok=True)
        shown = [write_video(out / f"video-{number}.mp4", *video) for number, video in enumerate(SHOWN, 1)]
    except OSError as error:
        raise BadRequest(f"cannot write to {str(out)!r}: {error.strerror or error}") from error

    with tempfile.TemporaryDirectory(prefix="sparsevila-demo-") as folder, _engine(sparse_config, report) as sparse:
        results = []
        for path, scene, seed in shown:
            results.append(_ask_about(sparse, path, ask_about(scene, seed, NUM_SHOWN), report))
            _show(console, sparse, results[-1])
        heatmap = out / "heatmap.png"
        origin = results[0].media.origin
        assert origin is not None, "prepared here"
        save_picture(draw_conversation(origin, [(turn.question.text, turn.answer) for turn in results[0].turns]), heatmap)

        scored = []
        for number, video in enumerate(SCORED):
            report("write more videos", number, len(SCORED))
            scored.append(write_video(Path(folder) / f"{number}.mp4", *video))
        score = {"sparse": score_of(_ask_about_all(sparse, scored, "ask the sparse engine", report))}
        with _engine(build_config(model=model, max_frames=MAX_FRAMES, **DENSE), report) as dense:
            score["dense"] = score_of(_ask_about_all(dense, scored, "ask the dense engine", report))

    turns = [turn for result in results for turn in result.turns]
    sparsity = resolved_sparsity(sparse_config, "video")
    _show_score(console, score, sparsity)
    num_right, passed = sum(turn.right for turn in turns), has_passed(turns)
    console.print(f"{num_right} of {len(turns)} shown answers are right" + ("" if passed else f": below {PASS_SHARE:.0%}"))
    files = f"videos: {out}/video-*.mp4   where each question looked: {heatmap}"
    console.print(files, markup=False, soft_wrap=True)
    if as_json:
        print(json.dumps(_document(results, score, model, sparsity, heatmap)))
    return 0 if passed else 1


def ask_about(scene: Scene, seed: int, num: int) -> list[SceneQuestion]:
    """`num` questions of as many kinds as there are, in random order."""
    return pick_questions(scene, np.random.default_rng((seed, 17)), num)


def has_passed(turns: Sequence[GradedTurn]) -> bool:
    """Whether enough answers are right."""
    return sum(turn.right for turn in turns) >= PASS_SHARE * len(turns)


def score_of(results: Sequence[VideoResult]) -> dict[str, Any]:
    """Counts of right answers, and medians of what they cost."""
    turns = [turn for result in results for turn in result.turns]
    several = [turn for turn in turns if turn.several_words]
    steps = [turn.answer.timeline["step"] for turn in turns if "step" in turn.answer.timeline]
    return {
        "right": sum(turn.right for turn in turns),
        "asked": len(turns),
        "right_several_words": sum(turn.right for turn in several),
        "asked_several_words": len(several),
        "prepare_ms": _median([_spent_ms(result.media) for result in results]),
        "first_token_ms": _median([turn.answer.timeline["ttft"] for turn in turns]),
        "step_ms": _median(steps),
        "kv_bytes": round(_median([result.media.kv_bytes for result in results])),
        "visual_tokens": round(_median([turn.answer.usage.visual_tokens_retrieved for turn in turns])),
    }


def write_video(path: Path, seed: int, num_steps: int) -> DemoVideo:
    """Draw a scene and write its video."""
    scene, frames = make_video(seed, num_steps)
    write_mp4(frames, path)
    return DemoVideo(path, scene, seed)


def _engine(config: EngineConfig, report: Report) -> VideoQA:
    report("load model", 0, 1)
    engine = VideoQA(config=config)
    report("load model", 1, 1)
    return engine


def _ask_about(qa: VideoQA, path: Path, questions: Sequence[SceneQuestion], report: Report, evidence: bool = True) -> VideoResult:
    chat = qa.conversation(qa.prepare(path, progress=report))
    turns = tuple(GradedTurn(question, chat.ask(question.text, max_tokens=MAX_TOKENS, evidence=evidence)) for question in questions)
    chat.close()
    return VideoResult(path, chat.media, turns)


def _ask_about_all(qa: VideoQA, scored: Sequence[DemoVideo], stage: str, report: Report) -> list[VideoResult]:
    results = []
    for number, (path, scene, seed) in enumerate(scored):
        report(stage, number, len(scored))
        # The progress line counts videos: the stages of each would only flicker.
        results.append(_ask_about(qa, path, ask_about(scene, seed, NUM_SCORED), lambda *_: None, evidence=False))
    report(stage, len(scored), len(scored))
    return results


def _show(console: Console, qa: VideoQA, result: VideoResult) -> None:
    """A table of the turns, and the summary line, of one video."""
    console.print(str(result.path), style="bold", markup=False, soft_wrap=True)
    table = new_table("question", "expected", "answer", "", right=("ms",))
    for turn in result.turns:
        sign = "[green]right" if turn.right else "[bold red]wrong"
        asked, expected, answer = (plain(text) for text in (turn.question.text, turn.question.answer, turn.answer.text))
        table.add_row(asked, expected, answer, sign, f"{turn.total_ms:.0f}")
    console.print(table)
    stages = ", ".join(f"{stage} {spent:.0f}" for stage, spent in result.media.ms.items())
    started_s = time.perf_counter()
    again = qa.prepare(result.path)
    again_ms = (time.perf_counter() - started_s) * 1e3
    assert again.reused, "the same bytes must name the same media prefix"
    console.print(f"prepared once in {_spent_ms(result.media):.0f} ms ({stages}); asked for again: reused in {again_ms:.0f} ms")
    summary = media_summary(result.media, [turn.answer for turn in result.turns])
    console.print(summary_line(summary, result.turns[-1].answer.text), markup=False, soft_wrap=True)
    console.print()


def _show_score(console: Console, score: dict[str, dict[str, Any]], sparsity: dict[str, Any]) -> None:
    console.print(f"{len(SCORED)} more videos, of 8, 16 and 32 seconds", style="bold")
    table = new_table("", right=("sparse", "dense"))
    kept = f"{sparsity['prune_keep']:.0%} kept, {sparsity['retrieve_keep']:.0%} of it retrieved"
    table.add_row("visual tokens", kept, "all kept, all attended to")
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("right answers", lambda m: f"{m['right']} of {m['asked']}"),
        ("... of several words", lambda m: f"{m['right_several_words']} of {m['asked_several_words']}"),
        ("prepare a video", lambda m: f"{m['prepare_ms']:.0f} ms"),
        ("first token", lambda m: f"{m['first_token_ms']:.1f} ms"),
        ("each further token", lambda m: f"{m['step_ms']:.1f} ms"),
        ("... over visual KV of", lambda m: f"{m['visual_tokens']} tokens"),
        ("KV of a video", lambda m: megabytes(m["kv_bytes"])),
    ]
    for name, show in rows:
        table.add_row(name, *(show(measured) for measured in score.values()))
    console.print(table)
    console.print(NOTE, style="dim")
    console.print()


def new_table(*left: str, right: Sequence[str]) -> Table:
    """A plain table with left- and right-aligned columns."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table


def _document(
    results: Sequence[VideoResult], score: dict[str, Any], model: str, sparsity: dict[str, Any], heatmap: Path
) -> dict[str, Any]:
    turns = [turn for result in results for turn in result.turns]
    return {
        "right": sum(turn.right for turn in turns),
        "asked": len(turns),
        "passed": has_passed(turns),
        "videos": [_result_document(result) for result in results],
        "score": score,
        "heatmap": str(heatmap),
        "model": model,
        "sparsity": sparsity,
    }


def _result_document(result: VideoResult) -> dict[str, Any]:
    return {
        "path": str(result.path),
        "turns": [
            {
                "kind": turn.question.kind,
                "question": turn.question.text,
                "expected": turn.question.answer,
                "answer": turn.answer.text,
                "right": turn.right,
                "ms": turn.total_ms,
            }
            for turn in result.turns
        ],
        "trip": media_summary(result.media, [turn.answer for turn in result.turns]),
    }


def _spent_ms(media: MediaHandle) -> float:
    return sum(media.ms.values())


def plain(text: str) -> str:
    r"""One line for rich, which would read square brackets as colours: `[` becomes `\[`."""
    return " ".join(text.split()).replace("[", r"\[")


def _median(numbers: Sequence[float]) -> float:
    return round(statistics.median(numbers), 3) if numbers else 0.0
