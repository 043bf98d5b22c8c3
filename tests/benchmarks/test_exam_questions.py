"""Small files in the formats of public benchmarks, and when an answer counts as right."""

import csv
import json

import pytest

from benchmarks.lib.exam_questions import LAYOUTS, LETTER_ONLY, ExamQuestion, chosen, read_dialogues
from sparsevila_cluster.core.errors import BadConfig

CHOICES = ("a red star", "a blue ring", "the star", "nothing")

# As published: one row of each, the file's ending, and what is made of it: video, kind, right letter, a part of the prompt.
PUBLISHED = {
    "videomme": (
        {
            "video_id": "001", "duration": "short", "domain": "Knowledge", "sub_category": "Humanity & History", "url": "https://...",
            "videoID": "clip", "question_id": "001-1", "task_type": "Counting Problem", "question": "How many stars are there?",
            "options": ["A. One.", "B. Two.", "C. Three.", "D. Four."], "answer": "C",
        },
        "json", "Counting Problem", "C", "How many stars are there?\nA. One.\nB. Two.\nC. Three.\nD. Four.\n",
    ),
    "mlvu": (
        {
            "video_name": "clip.mp4", "duration": 480.0, "task_type": "needle", "answer": "B",
            "question": "What does the hand do?\n(A) Wave\n(B) Point\n(C) Rest\n(D) Fall",
        },
        "jsonl", "needle", "B", "(D) Fall\nOnly give the best option.\nBest option: (",
    ),
    "longvideobench": (
        {
            "video_id": "clip", "question": "In a white room, who sits?", "option0": "a cat", "option1": "a dog",
            "option2": "a man", "option3": "N/A", "option4": "N/A",
            "correct_choice": 2, "question_category": "S2E", "duration_group": 60,
            "id": "clip_0",
            "video_path": "clip.mp4", "subtitle_path": "clip.json", "duration": 44.0, "starting_timestamp_for_subtitles": 0,
        },
        "jsonl", "S2E", "C", "who sits?\nA. a cat\nB. a dog\nC. a man\nAnswer with",
    ),
    "nextqa": (
        {
            "video": "clip", "frame_count": "100", "width": "640", "height": "480", "question": "why did the boy jump ",
            "answer": "4", "qid": "6", "type": "CW", "a0": "fun", "a1": "fear", "a2": "fall", "a3": "play", "a4": "water",
        },
        "csv", "CW", "E", "why did the boy jump\nA. fun\n",
    ),
    "vnbench": (
        {
            "video": "VNBench_new/clip.mp4", "question": "What is the secret word?", "options": ["Alice", "Bob", "Carol", "Dave"],
            "gt": "Bob", "gt_option": 1, "type": "ret_edit1", "try": 0, "needle_time": [[2, 3]],
        },
        "json", "ret_edit1", "B", "A. Alice\nB. Bob\nC. Carol\nD. Dave\n" + LETTER_ONLY,
    ),
    "dialogues": (
        {"video": "clip.mp4", "turns": [{"question": "What is it?", "choices": ["a cat", "a dog"], "answer": "a dog"}]},
        "jsonl", "question", "B", "What is it?\nA. a cat\nB. a dog\n",
    ),
}  # fmt: skip


def write(folder, rows, ending):
    (folder / "clip.mp4").write_bytes(b"a video")
    file = folder / f"test.{ending}"
    with file.open("w", newline="") as text:
        if ending == "json":
            json.dump(rows, text)
        elif ending == "jsonl":
            text.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(text, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return file


@pytest.mark.parametrize("layout", PUBLISHED)
def test_questions_are_read_as_they_are_published(layout, tmp_path):
    row, ending, kind, letter, part = PUBLISHED[layout]
    (dialogue,) = read_dialogues(write(tmp_path, [row, row], ending), layout)
    assert dialogue.video == tmp_path / "clip.mp4" and len(dialogue.questions) == 2
    question = dialogue.questions[0]
    assert (question.kind, question.answer) == (kind, letter) and part in question.text
    right = question.choices["ABCDE".index(letter)]
    assert question.is_right(f"{letter}.") and question.is_right(right) and not question.is_right("J")


def test_every_layout_is_tried_and_more_ways_to_write_them(tmp_path):
    assert set(PUBLISHED) == set(LAYOUTS)
    authors = {
        "video": "clip.mp4",
        "question": "What?",
        "candidates": ["Wave", "Point"],
        "answer": "Point",
        "question_type": "needle",
    }
    (mlvu,) = read_dialogues(write(tmp_path, [authors], "json"), "mlvu")
    assert mlvu.questions[0].answer == "B" and "(B) Point" in mlvu.questions[0].text
    row = PUBLISHED["longvideobench"][0]
    authors = {k: v for k, v in row.items() if not k.startswith("option")} | {"candidates": ["a cat", "a dog", "a man"]}
    (video,) = read_dialogues(write(tmp_path, [authors], "json"), "longvideobench")
    assert video.questions[0].answer == "C"


def test_dialogues_are_of_one_video_in_the_files_order_and_as_many_as_wanted(tmp_path):
    rows = [{"video": name, "turns": [{"question": f"{i}?", "answer": str(i)}]} for i, name in enumerate(["clip", "other", "clip"])]
    file = write(tmp_path, rows, "jsonl")
    (tmp_path / "other.mkv").write_bytes(b"another one")
    two = read_dialogues(file, "dialogues")
    assert [[question.text for question in dialogue.questions] for dialogue in two] == [["0?", "2?"], ["1?"]]
    assert read_dialogues(file, "dialogues", limit=1) == two[:1]


def test_four_tries_of_vnbench_are_one_question(tmp_path):
    row = PUBLISHED["vnbench"][0]
    rows = [{**row, "try": i, "options": row["options"][i:] + row["options"][:i]} for i in range(4)]
    (dialogue,) = read_dialogues(write(tmp_path, rows, "json"), "vnbench")
    assert [question.answer for question in dialogue.questions] == ["B", "A", "D", "C"]
    assert len({question.group for question in dialogue.questions}) == 1 and dialogue.questions[0].group


@pytest.mark.parametrize(
    ("layout", "change", "told"),
    [
        ("videomme", {"answer": "E"}, "one of 4 choices, got 'E'"),
        ("videomme", {"options": ["A. One."]}, "2 to 10 choices, got 1"),
        ("longvideobench", {"correct_choice": 3}, "one of 3 choices, got 3"),
        ("longvideobench", {"correct_choice": -1}, "one of 3 choices, got -1"),
        ("nextqa", {"video": "gone"}, "no video 'gone'"),
        ("vnbench", {"gt": "Eve"}, "got 'Eve'"),
        ("dialogues", {"turns": []}, "at least one question"),
        ("dialogues", {"turns": None}, "row 1"),
    ],
)
def test_rows_that_are_wrong_are_told_with_their_number(layout, change, told, tmp_path):
    row, ending, *_ = PUBLISHED[layout]
    with pytest.raises(BadConfig, match="row 1") as error:
        read_dialogues(write(tmp_path, [{**row, **change}], ending), layout)
    assert told in str(error.value)


def test_files_that_cannot_be_read_are_told(tmp_path):
    file = write(tmp_path, [{"video": "clip"}], "jsonl")
    with pytest.raises(BadConfig, match="no field 'turns'"):
        read_dialogues(file, "dialogues")
    with pytest.raises(BadConfig, match="layout must be one of"):
        read_dialogues(file, "imagenet")
    file.write_text("{")
    with pytest.raises(BadConfig, match="cannot be read"):
        read_dialogues(file, "dialogues")
    with pytest.raises(BadConfig, match="must end in"):
        read_dialogues(tmp_path / "clip.mp4", "dialogues")
    with pytest.raises(BadConfig, match="cannot be read"):
        read_dialogues(tmp_path / "gone.json", "dialogues")


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("B", "B"), ("B.", "B"), ("(B) a blue ring", "B"), ("b", None), ("B: because", "B"), ("The answer is C.", "C"),
        ("The correct option is (D)", "D"), ("It could be (A), but it is (D).", "D"), ("A blue ring.", "B"), ("a Blue  ring", "B"),
        ("It shows the star", "C"), ("I think D", "D"), ("I do not know", None), ("", None), ("A", "A"), ("E", None),
        ("A red star and a blue ring", None), ("Best option: (C", "C"),
    ],
)  # fmt: skip
def test_which_choice_an_answer_names(said, letter):
    assert chosen(said, CHOICES) == letter


def test_free_answers_are_compared_word_for_word():
    question = ExamQuestion("describe", "What?", "a red star and a ring")
    assert question.is_right("A red star  and a ring.") and not question.is_right("a red star and a ring and a cross")
