"""Questions about videos, from the demo world or from files in the formats of public benchmarks, and when an answer is right.

    videomme, mlvu, longvideobench, nextqa, vnbench    as their authors and lmms-eval (75571cf) publish them: .json, .jsonl, .csv
    dialogues       .jsonl of {"video": ..., "turns": [{"question": ..., "choices"?: [...], "answer": ..., "kind"?: ...}, ...]}

An answer to one of several choices is a letter, or the choice's text, or its number counted from 0. Prompts are those of
lmms-eval's tasks, for figures are compared under the same words. Questions about one video are one dialogue, in the file's order.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsevila_cluster.core.errors import BadConfig

LETTERS = "ABCDEFGHIJ"
VIDEO_SUFFIXES = ("", ".mp4", ".MP4", ".mkv", ".webm", ".mov", ".avi")
MAX_QUESTIONS = 1_000_000
LETTER_ONLY = "Answer with the option's letter from the given choices directly."

Row = Mapping[str, Any]


@dataclass(frozen=True)
class ExamQuestion:
    """What is asked, and the right answer: a letter where there are choices, else the whole text.

    group: questions of one group count as one, which is right if all of them are (VNBench asks everything four times).
    """

    kind: str
    text: str
    answer: str
    choices: tuple[str, ...] = ()
    group: str = ""

    def is_right(self, said: str) -> bool:
        """Whether an answer is the right one: the letter chosen, or the same words in any case, without the full stop."""
        if self.choices:
            return chosen(said, self.choices) == self.answer
        return plain(said) == plain(self.answer)


@dataclass(frozen=True)
class Dialogue:
    """One video and what is asked about it, in order. source: the range of videos that it is of, if there are several."""

    video: Path
    questions: tuple[ExamQuestion, ...]
    source: str = ""


def plain(text: str) -> str:
    """In lower case, with single spaces, without what ends a sentence."""
    return " ".join(text.split()).rstrip(".!").casefold()


def chosen(said: str, choices: Sequence[str]) -> str | None:
    """The letter of the choice that an answer names, None if that cannot be told. Nothing is guessed, unlike in some harnesses.

    In this order: a letter at the beginning, the last one in brackets, the last one behind "answer is" or the like, the text of one
    choice alone, the last letter that stands alone ("I" and "A" begin sentences, so they do not count here).
    """
    letters, said = LETTERS[: len(choices)], said.strip()
    if begins := re.match(rf"\(?([{letters}])(?:[).:,]|\s*$)", said):
        return begins[1]
    if brackets := re.findall(rf"\(([{letters}])\)", said):
        return str(brackets[-1])
    if named := re.findall(rf"(?i:answer|option|choice)(?i:\s+is)?\s*:?\s*\(?([{letters}])\b", said):
        return str(named[-1])
    words = plain(said)
    held = [letter for letter, choice in zip(letters, choices, strict=True) if choice and plain(choice) in words]
    if len(held) == 1:
        return held[0]
    alone = re.findall(rf"\b([{letters}])\b", said)
    alone = [letter for letter in alone if letter not in "AI"] or (alone if len(words) == 1 else [])
    return str(alone[-1]) if alone else None


# ---- files -----------------------------------------------------------------------------------------------------------------------


def read_dialogues(file: Path, layout: str, videos: Path | None = None, limit: int | None = None) -> list[Dialogue]:
    """The dialogues of a file, of the first `limit` videos if given. videos: the folder of the videos, the file's if None.

    Raises BadConfig: an unknown layout or ending, a row without a field that it needs or with a wrong one, a video that is gone.
    """
    if layout not in LAYOUTS:
        raise BadConfig(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    asked: dict[Path, list[ExamQuestion]] = {}
    folder = file.parent if videos is None else videos
    for number, row in enumerate(_rows(file)):
        try:
            if number >= MAX_QUESTIONS:
                raise ValueError(f"a file may hold at most {MAX_QUESTIONS} rows")
            name, questions = LAYOUTS[layout](row)
            video = _video(folder, name)
        except (KeyError, ValueError, TypeError, IndexError) as error:
            what = f"no field {error}" if isinstance(error, KeyError) else str(error)
            raise BadConfig(f"{file}, row {number + 1}, read as {layout}: {what}") from error
        if video not in asked and limit is not None and len(asked) >= limit:
            continue
        asked.setdefault(video, []).extend(questions)
    return [Dialogue(video, tuple(questions)) for video, questions in asked.items()]


def _rows(file: Path) -> Iterator[Row]:
    try:
        if file.suffix == ".jsonl":
            with file.open(encoding="utf-8") as lines:
                yield from (json.loads(line) for line in lines if line.strip())
        elif file.suffix == ".json":
            yield from json.loads(file.read_text(encoding="utf-8"))
        elif file.suffix == ".csv":
            with file.open(encoding="utf-8", newline="") as text:
                yield from csv.DictReader(text)
        else:
            raise BadConfig(f"{file} must end in .json, .jsonl or .csv; other files become such by `datasets`' to_json")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadConfig(f"{file} cannot be read: {error}") from error


def _video(folder: Path, name: str) -> Path:
    for suffix in VIDEO_SUFFIXES:
        if (path := folder / f"{name}{suffix}").is_file():
            return path
    raise ValueError(f"no video {name!r} in {folder}")


def _letter(answer: Any, choices: Sequence[str]) -> str:
    """Of an answer that is a letter, the text of a choice, or its number counted from 0."""
    if isinstance(answer, str) and not answer.isdigit():
        if answer in choices:
            return LETTERS[choices.index(answer)]
        letter = answer.strip().strip("().").upper()
        if len(letter) == 1 and letter in LETTERS[: len(choices)]:
            return letter
    elif not isinstance(answer, bool) and 0 <= int(answer) < len(choices):
        return LETTERS[int(answer)]
    raise ValueError(f"the answer must be one of {len(choices)} choices, got {answer!r}")


def _lettered(choices: Iterable[str]) -> str:
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))


def _checked(choices: Iterable[Any]) -> tuple[str, ...]:
    found = tuple(str(choice).strip() for choice in choices)
    if not 2 <= len(found) <= len(LETTERS):
        raise ValueError(f"there must be 2 to {len(LETTERS)} choices, got {len(found)}")
    return found


Asked = tuple[str, list[ExamQuestion]]


def _videomme(row: Row) -> Asked:
    """Options carry their letters: "A. ..."."""
    options = _checked(row["options"])
    choices = tuple(re.sub(r"^[A-J][.)]\s*", "", option) for option in options)
    text = (
        "Select the best answer to the following multiple-choice question based on the video and the subtitles. Respond with only "
        f"the letter (A, B, C, or D) of the correct option.\n{row['question']}\n" + "\n".join(options) + f"\n\n{LETTER_ONLY}"
    )
    return row["videoID"], [ExamQuestion(row["task_type"], text, _letter(row["answer"], choices), choices)]


def _mlvu(row: Row) -> Asked:
    """lmms-eval's copy has the options in the question; the authors' has `candidates`, and the answer's text."""
    question = str(row["question"])
    if row.get("candidates"):
        choices = _checked(row["candidates"])
        question += "\n" + "\n".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
    else:
        choices = _checked(re.findall(r"^\([A-J]\)\s*(.*)$", question, re.MULTILINE))
    video = row["video_name"] if "video_name" in row else row["video"]
    kind = row["task_type"] if "task_type" in row else row["question_type"]
    text = f"{question}\nOnly give the best option.\nBest option: ("
    return video, [ExamQuestion(kind, text, _letter(row["answer"], choices), choices)]


def _longvideobench(row: Row) -> Asked:
    candidates = row["candidates"] if "candidates" in row else [row.get(f"option{i}", "N/A") for i in range(5)]
    choices = _checked(choice for choice in candidates if choice not in (None, "N/A"))
    text = f"{row['question']}\n{_lettered(choices)}\n{LETTER_ONLY}\n"
    return row["video_path"], [ExamQuestion(row["question_category"], text, _letter(row["correct_choice"], choices), choices)]


def _nextqa(row: Row) -> Asked:
    choices = _checked(row[f"a{i}"] for i in range(5))
    text = f"{row['question'].strip()}\n{_lettered(choices)}"
    return str(row["video"]), [ExamQuestion(row["type"], text, _letter(row["answer"], choices), choices)]


def _vnbench(row: Row) -> Asked:
    """Four rows ask the same with the options in another order; `try` counts them."""
    choices = _checked(row["options"])
    text = f"{row['question']}\n{_lettered(choices)}\n{LETTER_ONLY}"
    group = f"{row['video']}/{row['type']}/{row['question']}"
    return str(row["video"]).rpartition("/")[2], [
        ExamQuestion(row["type"], text, _letter(str(row["gt"]), choices), choices, group if "try" in row else "")
    ]


def _dialogues(row: Row) -> Asked:
    questions = []
    for turn in row["turns"]:
        kind = str(turn.get("kind", "question"))
        if turn.get("choices"):
            choices = _checked(turn["choices"])
            text = f"{turn['question']}\n{_lettered(choices)}\n{LETTER_ONLY}"
            questions.append(ExamQuestion(kind, text, _letter(turn["answer"], choices), choices))
        else:
            questions.append(ExamQuestion(kind, str(turn["question"]), str(turn["answer"])))
    if not questions:
        raise ValueError("turns must hold at least one question, got none")
    return str(row["video"]), questions


LAYOUTS: dict[str, Callable[[Row], Asked]] = {
    "videomme": _videomme,
    "mlvu": _mlvu,
    "longvideobench": _longvideobench,
    "nextqa": _nextqa,
    "vnbench": _vnbench,
    "dialogues": _dialogues,
}
