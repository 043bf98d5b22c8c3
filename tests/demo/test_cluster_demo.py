"""How the demo of the cluster tells what happened; the outcome itself runs over a real cluster in tests/cluster/test_serve.py."""

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from sparsevila_cluster.core.cluster_config import ClusterConfig
from sparsevila_cluster.core.errors import BadRequest
from sparsevila_cluster.core.evidence import Evidence
from sparsevila_cluster.core.requests import Answer, FinishReason, MediaHandle, Usage
from sparsevila_cluster.demo import cluster_demo
from sparsevila_cluster.demo.cluster_demo import ClientResult, DemoOutcome, _finish, run_cluster_demo
from sparsevila_cluster.demo.local_demo import DemoVideo, GradedTurn
from sparsevila_cluster.demo.questions import make_questions
from sparsevila_cluster.demo.scene_drawing import make_video
from sparsevila_cluster.demo.worker_kill import ClientStream, KillResult, show_kill

SCENE = make_video(1)[0]
QUESTION = make_questions(SCENE, np.random.default_rng(0), 1)[0]
MEDIA = MediaHandle("k", "video", 16, 8.0, 512, 128, 140, 270_000, 1_000_000, ms={"prefill": 20.0, "transfer": 3.0})


def answer(text):
    return Answer(text, (1, 2), FinishReason.STOP, Evidence(), Usage(512, 128, 13, 150, 2, 0.1, ms={"ttft": 9.0, "total": 20.0}))


class Chat:
    conversation_id = "base.w1.0"

    def __init__(self, text):
        self.turns = [(QUESTION.text, answer(text))]


def stream(text, piece_times_s, before):
    return ClientStream(QUESTION, Chat(text), list(piece_times_s), before)


def outcome(num_wrong):
    said = ["no"] * num_wrong + [QUESTION.answer] * (10 - num_wrong)
    result = ClientResult(0, DemoVideo(Path("a.mp4"), SCENE, 1), MEDIA, [GradedTurn(QUESTION, answer(text)) for text in said])
    pieces = [((1.0, 1.1, 1.5), 2), ((1.0, 1.9), 0), ((1.0, 1.2), 2)]
    streams = [stream(QUESTION.answer, piece_times_s, before) for piece_times_s, before in pieces]
    return DemoOutcome([MEDIA], [result], (3, 3), KillResult("w1", streams, (3, 3), 6.5))


def test_only_a_stream_with_pieces_on_both_sides_was_cut():
    assert [one.cut for one in outcome(0).kill.streams] == [True, False, False]
    assert stream("", (), 0).pause_s == 0.0 and stream("", (1.0, 1.1, 1.5), 2).pause_s == pytest.approx(0.4)
    assert stream("", (1.0,), 1).worker == "w1"


@pytest.mark.parametrize(("num_wrong", "code"), [(0, 0), (1, 0), (2, 1)])
def test_the_document_says_how_it_went(capsys, num_wrong, code):
    happened = outcome(num_wrong)
    videos = [DemoVideo(Path("out/video-1.mp4"), SCENE, 1)]
    assert _finish(Console(quiet=True), happened, videos, ClusterConfig(), 12.5, True) == code
    told = json.loads(capsys.readouterr().out)
    assert (told["right"], told["asked"], told["passed"]) == (13 - num_wrong, 13, code == 0)
    assert told["prefixes_made"] == {"before_turns": 3, "after_turns": 3, "after_kill": 3}
    assert told["kill"] == {"answers_cut": 1, "recovery_s": [0.4], "pool_whole_again_s": 6.5}
    assert told["trip"]["ms"]["transfer"] == 3.0


def test_people_read_whom_the_kill_cut(capsys):
    show_kill(Console(width=120), outcome(0).kill)
    told = " ".join(capsys.readouterr().out.split())
    assert "1 of 3 answers were cut and went on elsewhere, recovered within 0.40 s" in told and "whole again after 6.5 s" in told


def test_a_folder_that_cannot_be_written_is_told_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_demo, "serving", lambda *_: pytest.fail("started"))
    (tmp_path / "file").write_text("")
    with pytest.raises(BadRequest, match="cannot write"):
        run_cluster_demo(tmp_path / "file" / "out", "demo", False, lambda *_: None)
