"""The demo command: what is asked, how it is graded, what it writes, and when it fails."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sparsevila_cluster.demo as demo
from sparsevila_cluster.cli import main as cli
from sparsevila_cluster.core.evidence import Evidence
from sparsevila_cluster.core.requests import Answer, FinishReason, MediaHandle, Usage
from sparsevila_cluster.demo import local_demo
from sparsevila_cluster.demo.local_demo import NUM_SHOWN, SHOWN, GradedTurn, VideoResult, ask_about, has_passed, score_of
from sparsevila_cluster.demo.questions import KINDS, SceneQuestion
from sparsevila_cluster.demo.scene_drawing import make_video
from tests.checkpoints.tiny_qwen2_5_vl import make_qwen2_5_vl

BUNDLED = Path(list(demo.__path__)[0]) / "checkpoint"


def turn(said, expected="red", kind="color", **ms):
    ms = {"ttft": 2.0, "total": 3.0, **ms}
    answer = Answer(said, (1, 2), FinishReason.STOP, Evidence(), Usage(512, 128, 13, 100, 2, 0.1, ms=ms))
    return GradedTurn(SceneQuestion(kind, "What colour?", expected), answer)


def test_an_answer_is_right_when_it_says_exactly_that():
    assert turn("red").right and turn(" red\n").right
    assert not turn("Red").right and not turn("red star").right and not turn("").right


@pytest.mark.parametrize(("num_right", "passed"), [(24, True), (22, True), (21, False), (0, False)])
def test_nine_of_ten_must_be_right(num_right, passed):
    assert has_passed([turn("red" if i < num_right else "blue") for i in range(24)]) == passed


def test_an_exam_is_counted_by_kind_and_costs_are_medians():
    media = MediaHandle("key", "video", 16, 8.0, 512, 128, 140, 1000, 4000, ms={"decode": 5.0, "encode": 7.0})
    turns = (
        turn("red"),
        turn("x"),
        turn("at step 1", "at step 1", "when", step=1.0),
        turn("x", "a red star at the top left", kind="describe", step=3.0),
    )
    score = score_of([VideoResult(Path("a.mp4"), media, turns)])
    assert (score["right"], score["asked"]) == (2, 4)
    assert (score["right_several_words"], score["asked_several_words"]) == (1, 2)
    assert (score["prepare_ms"], score["first_token_ms"], score["step_ms"]) == (12.0, 2.0, 2.0)
    assert (score["kv_bytes"], score["visual_tokens"]) == (1000, 13)


def test_conversations_are_mixed_and_repeatable():
    asked = []
    for seed, num_steps in SHOWN:
        scene, _ = make_video(seed, num_steps)
        questions = ask_about(scene, seed, NUM_SHOWN)
        assert questions == ask_about(scene, seed, NUM_SHOWN) and len(questions) == NUM_SHOWN
        assert len({question.text for question in questions}) == len({question.kind for question in questions}) == NUM_SHOWN
        asked += questions
    assert len({question.kind for question in asked}) >= len(KINDS) - 2
    assert any(len(question.answer.split()) >= 20 for question in asked)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return BUNDLED if (BUNDLED / "config.json").exists() else make_qwen2_5_vl(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(local_demo, "SCORED", ((101, 8),))
    monkeypatch.setattr(local_demo, "FILE_WIDTH", 400)  # an untrained model says much


def test_the_tour_tells_everything_and_leaves_its_files(checkpoint, short, tmp_path, capsys):
    out = tmp_path / "deep" / "outcome"
    code = cli.main(["demo", "--local", "--model", str(checkpoint), "--out", str(out)])
    shown, err = capsys.readouterr()
    assert err == "" and code == (0 if checkpoint == BUNDLED else 1)
    assert sorted(path.name for path in out.iterdir()) == ["heatmap.png", "video-1.mp4", "video-2.mp4", "video-3.mp4"]
    assert np.asarray(Image.open(out / "heatmap.png")).std() > 20
    for seed, num_steps in SHOWN:
        for question in ask_about(make_video(seed, num_steps)[0], seed, NUM_SHOWN):
            assert question.text in shown
    assert shown.count("expected") == 3 and shown.count("prepared once in") == shown.count(": reused in") == 3
    assert shown.count(" packed -> ") == 3 and "dense" in shown and f"{3 * NUM_SHOWN} shown answers are right" in shown
    assert (": below 90%" in shown) == (code == 1)


def test_the_tour_speaks_json(checkpoint, short, tmp_path, capsys):
    code = cli.main(["demo", "--local", "--model", str(checkpoint), "--out", str(tmp_path), "--json"])
    shown, err = capsys.readouterr()
    document = json.loads(shown)
    assert err == "" and document["passed"] == (code == 0) == (document["right"] >= 0.9 * document["asked"])
    assert len(document["videos"]) == 3 and all(len(video["turns"]) == NUM_SHOWN for video in document["videos"])
    first = document["videos"][0]["turns"][0]
    assert set(first) == {"kind", "question", "expected", "answer", "right", "ms"}
    assert set(document["score"]) == {"sparse", "dense"}
    assert document["score"]["dense"]["visual_tokens"] > 10 * document["score"]["sparse"]["visual_tokens"]
    assert Path(document["heatmap"]).exists() and Path(document["videos"][2]["path"]).exists()


def test_markup_in_an_answer_is_shown_as_it_is():
    from rich.console import Console

    sink = io.StringIO()
    table = local_demo.new_table("answer", right=())
    table.add_row(local_demo.plain("[red] a [bold]star[/bold]\n[1/2]"))
    Console(file=sink, width=80).print(table)
    assert "[red] a [bold]star[/bold] [1/2]" in sink.getvalue()
