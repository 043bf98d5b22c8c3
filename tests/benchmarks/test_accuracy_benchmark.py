"""The benchmark of accuracy asks the demo world or a file, in three protocols, and goes on where it was killed."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import accuracy
from benchmarks.lib import accuracy_exam
from benchmarks.lib.exam_journal import ExamJournal
from benchmarks.lib.exam_marks import Mark
from sparsevila_cluster.core.errors import BadConfig
from tests.checkpoints.tiny_qwen2_5_vl import make_qwen2_5_vl
from tests.media.clips import write_clip
from tests.structure import ROOT

ACCURACY_FIGURES = set(
    "questions dense sparse random dense_multiword sparse_multiword sparse_turn1 sparse_turn4plus twin_dense twin_sparse".split()
)


def test_dialogues_are_held_out_and_repeatable(tmp_path):
    (a,), (b,) = accuracy_exam.write_dialogues(tmp_path, 1), accuracy_exam.write_dialogues(tmp_path, 1)
    assert a == b and len(a.questions) == accuracy_exam.NUM_TURNS and a.video.stat().st_size > 1000
    longest = max(len(q.answer.split()) for q in a.questions)
    assert longest < accuracy_exam.MAX_TOKENS


def test_accuracy_of_a_model_that_knows_nothing(tmp_path, capsys, monkeypatch):
    from sparsevila_cluster.demo.checkpoint_builder import build_model, save_checkpoint
    from sparsevila_cluster.demo.training.text_tokens import build_scene_tokenizer

    tokenizer = build_scene_tokenizer()
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
    dense, sparse = rows["dense"], rows["sparse"]
    assert dense["kept_share"] == dense["retrieved_of_all"] == 1.0 and dense["mcnemar_p"] == 1.0
    assert sparse["kv_mib"] < dense["kv_mib"] / 2 and 0 < sparse["retrieved_of_all"] < sparse["retrieved_of_kept"] <= 0.5
    assert set(dense["by_turn"]) == {"turn 1", "turn 2-3", "turn 4+"}


# ---- questions of a file -------------------------------------------------------------------------------------------------------

NUM_VIDEOS = 3
TURNS = [
    {"question": "What is there?", "answer": "nothing", "kind": "open"},
    {"question": "Which?", "choices": ["a cat", "a dog"], "answer": "A", "kind": "choice"},
    {"question": "And what is there?", "answer": "nothing", "kind": "open"},
]


@pytest.fixture(scope="module")
def exam(tmp_path_factory):
    """The arguments that a small exam takes."""
    folder = tmp_path_factory.mktemp("exam")
    for i in range(NUM_VIDEOS):
        write_clip(folder / f"{i}.mp4", seed=i)
    rows = [{"video": str(i), "turns": TURNS} for i in range(NUM_VIDEOS)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = make_qwen2_5_vl(folder / "tiny", seed=0)
    return ["--model", str(model), "--dataset", str(folder / "test.jsonl"), "--max-tokens", "6", "--ratios", "0.5/0.3,0.5/0.1"]


def answers(file):
    """{(setting, dialogue, turn): what was said} of a CSV file."""
    with file.open(newline="") as text:
        return {(row["setting"], row["dialogue"], row["turn"]): row["said"] for row in csv.DictReader(text)}


def test_a_file_is_asked_in_three_protocols(exam, tmp_path, capsys):
    said = {}
    for protocol in accuracy_exam.PROTOCOLS:
        accuracy.main([*exam, "--protocol", protocol, "--csv", str(tmp_path / f"{protocol}.csv")])
        document = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert document["figures"]["questions"] == NUM_VIDEOS * len(TURNS)
        assert [row["setting"] for row in document["rows"]] == ["dense", "salience 0.5/0.3", "salience 0.5/0.1"]
        said[protocol] = answers(tmp_path / f"{protocol}.csv")
    # A prefix that does not know the questions is the same however often it was asked; a conversation is another text.
    assert said["paper"] == said["single"] and said["served"] != said["paper"]
    first = [{key: text for key, text in each.items() if key[2] == "0"} for each in said.values()]
    assert first[0] == first[1] == first[2]


def test_what_was_killed_goes_on_where_it_was(exam, tmp_path, capsys):
    journal, killed, whole = tmp_path / "journal.jsonl", tmp_path / "killed.csv", tmp_path / "whole.csv"
    command = [sys.executable, "-m", "benchmarks.accuracy", *exam, "--resume", str(journal)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    until_s = time.monotonic() + 60
    while not (journal.exists() and journal.read_text().count("\n") > 2):
        assert time.monotonic() < until_s and process.poll() is None, "no mark was kept"
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = journal.read_text()
    journal.write_text(before + '{"key": "cut off')
    accuracy.main([*exam, "--resume", str(journal), "--csv", str(killed)])
    assert journal.read_text().startswith(before) and journal.read_text().count("\n") == 1 + 3 * NUM_VIDEOS
    accuracy.main([*exam, "--csv", str(whole)])
    assert answers(killed) == answers(whole)
    with pytest.raises(SystemExit, match="of another exam"):
        accuracy.main([*exam, "--resume", str(journal), "--protocol", "paper"])
    capsys.readouterr()


def test_a_journal_gives_back_what_it_was_given(tmp_path):
    marks = [Mark(0, turn, "open", True, "said", "expected", step_ms=1.5) for turn in range(2)]
    for _ in range(2):
        journal = ExamJournal(tmp_path / "a" / "journal", {"model": "m"})
        if journal.marks({"seed": 0}, 0) is None:
            journal.keep({"seed": 0}, 0, marks)
    assert journal.marks({"seed": 0}, 0) == marks and journal.marks({"seed": 1}, 0) is None is journal.marks({"seed": 0}, 1)
    with pytest.raises(BadConfig, match="of another exam"):
        ExamJournal(tmp_path / "a" / "journal", {"model": "n"})


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--methods", "fastest"], "pruning is one of"),
        (["--methods", "salience+best"], "retrieval of"),
        (["--ratios", "0.5/2"], "PRUNE_KEEP/RETRIEVE_KEEP"),
        (["--ratios", "half"], "PRUNE_KEEP/RETRIEVE_KEEP"),
    ],
)
def test_arguments_that_make_no_sense_are_told(exam, wrong, told, capsys):
    with pytest.raises(SystemExit):
        accuracy.main([*exam, *wrong])
    assert told in capsys.readouterr().err
    with pytest.raises(SystemExit):
        accuracy.main(["--methods", "random"])
    assert "belong to --dataset" in capsys.readouterr().err
