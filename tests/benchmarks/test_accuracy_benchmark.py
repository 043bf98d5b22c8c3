"""The benchmark of accuracy marks what it asks, kind by kind and turn by turn; on few videos."""

import json

import pytest

from benchmarks import accuracy
from benchmarks.lib import accuracy_exam

ACCURACY_FIGURES = set(
    "questions dense sparse random dense_multiword sparse_multiword sparse_turn1 sparse_turn4plus twin_dense twin_sparse".split()
)


def test_kinds_of_several_words_are_the_trainers():
    from sparsevila_cluster.demo.training_monitor import SEVERAL_WORDS

    assert accuracy_exam.SEVERAL_WORDS == SEVERAL_WORDS


def test_scores():
    score = accuracy_exam.Score(95, 100)
    low, high = score.interval
    assert score.percent == 95.0 and (round(low, 1), round(high, 1)) == (88.8, 97.8)
    assert accuracy_exam.Score(0, 0).interval == (0.0, 100.0) and accuracy_exam.Score(4, 4).interval[1] == pytest.approx(100)


def mark(turn, kind, right, paper=0):
    return accuracy_exam.Mark(paper, turn, kind, right, "", "")


def test_marks_are_sorted_into_kinds_and_turns():
    marks = [mark(0, "color", True), mark(2, "where", False), mark(3, "describe", True), mark(7, "describe", False)]
    assert accuracy_exam.Score.of(accuracy_exam.several_words(marks)) == accuracy_exam.Score(1, 3)
    assert accuracy_exam.by_kind(marks)["describe"] == accuracy_exam.Score(1, 2)
    assert list(accuracy_exam.by_turn(marks).values()) == [
        accuracy_exam.Score(1, 1),
        accuracy_exam.Score(0, 1),
        accuracy_exam.Score(1, 2),
    ]
    worse = [mark(0, "color", False), mark(2, "where", True), *marks[2:]]
    assert accuracy_exam.changed(marks, worse) == (1, 1) and accuracy_exam.changed(marks, marks) == (0, 0)


def test_papers_are_held_out_and_repeatable(tmp_path):
    from sparsevila_cluster.demo.train import FINAL_SEED, MONITOR_SEED

    assert accuracy_exam.FIRST_SEED > FINAL_SEED > MONITOR_SEED
    (a,), (b,) = accuracy_exam.write_papers(tmp_path, 1), accuracy_exam.write_papers(tmp_path, 1)
    assert a == b and len(a.questions) == accuracy_exam.NUM_TURNS and a.path.stat().st_size > 1000
    longest = max(len(q.answer.split()) for q in a.questions)
    assert longest < accuracy_exam.MAX_TOKENS


def test_accuracy_of_a_model_that_knows_nothing(tmp_path, capsys, monkeypatch):
    from sparsevila_cluster.demo.checkpoint_builder import build_model, build_tokenizer, save_checkpoint

    tokenizer = build_tokenizer(num_scenes=50)
    directory = save_checkpoint(build_model(tokenizer), tokenizer, tmp_path / "checkpoint")
    (tmp_path / "checkpoint_dense_only").symlink_to(directory, target_is_directory=True)
    monkeypatch.setattr(accuracy_exam, "MAX_TOKENS", 2)
    accuracy.main(["--videos", "2", "--model", str(directory), "--threads", "1"])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(document["figures"]) == ACCURACY_FIGURES and document["figures"]["questions"] == 16
    rows = {row["setting"]: row for row in document["rows"]}
    assert all(row["percent"] < 50 for row in rows.values())
    assert rows["keep 1"]["retrieve_keep"] == 1.0 and rows["sparse"]["prune_keep"] == 0.25
    # with nothing but the names changed, the twin gives the same answers
    assert rows["twin sparse"]["by_kind"] == rows["sparse"]["by_kind"]
