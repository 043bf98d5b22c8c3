"""Marks on disk as they come, so that an exam that was killed goes on where it was: one line for each dialogue of each setting."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.lib.exam_marks import Mark
from benchmarks.lib.exam_questions import Dialogue
from sparsevila_cluster.core.errors import BadConfig


class ExamJournal:
    """`file` None: nothing is kept. Lines of another exam are refused; a last line that is cut off is asked again."""

    def __init__(self, file: Path | None, exam: Mapping[str, Any]):
        """exam: what must be the same for marks to be those of this exam: model, questions, protocol."""
        self._file, self._marks = file, dict[str, list[Mark]]()
        if file is None:
            return
        head = {"exam": dict(exam)}
        whole = ""
        if file.is_file() and (text := file.read_text(encoding="utf-8")):
            whole = text[: text.rfind("\n") + 1]
            lines = [json.loads(line) for line in whole.splitlines()]
            if lines and lines[0] != head:
                raise BadConfig(f"{file} is of another exam: {lines[0].get('exam')}, not {head['exam']}")
            for line in lines[1:]:
                self._marks[line["key"]] = [Mark(**mark) for mark in line["marks"]]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(whole or json.dumps(head) + "\n", encoding="utf-8")

    def marks(self, setting: Mapping[str, Any], dialogue: int) -> list[Mark] | None:
        """Those of a dialogue that was finished before, None if it was not."""
        return self._marks.get(_key(setting, dialogue))

    def keep(self, setting: Mapping[str, Any], dialogue: int, marks: Sequence[Mark]) -> None:
        """A dialogue is finished."""
        if self._file is not None:
            line = {"key": _key(setting, dialogue), "marks": [asdict(mark) for mark in marks]}
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def _key(setting: Mapping[str, Any], dialogue: int) -> str:
    return f"{json.dumps(dict(setting), sort_keys=True)} {dialogue}"


def digest_of(dialogues: Sequence[Dialogue]) -> str:
    """Of what is asked about which files; the files' contents are not looked at."""
    hashed = hashlib.blake2b(digest_size=12)
    for dialogue in dialogues:
        hashed.update(repr((dialogue.video.name, dialogue.video.stat().st_size, dialogue.questions)).encode())
    return hashed.hexdigest()
