"""What one calibrates on or compares with: a directory of media and texts, read into a list.

clip.mp4 (questions in clip.txt beside it, a line each) | notes.txt (plain text) | samples.jsonl (one object a line)
{"text": "..."} | {"ids": [1, 2, 3]} | {"media": "clip.mp4" or [...], "turns": [["question", "answer"], ...]}
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsevila_cluster.core.errors import BadRequest
from sparsevila_cluster.media import Media

Turn = tuple[str, str]
"""A question and its answer, which may be empty."""

DEFAULT_TURNS: tuple[Turn, ...] = (("Describe what you see.", ""),)


@dataclass(frozen=True, eq=False)
class Material:
    """One of: plain `text`; token `ids`; `turns` of a dialogue about `media` (files, or decoded). name: for messages."""

    name: str
    text: str = ""
    ids: tuple[int, ...] = ()
    media: tuple[Path | Media, ...] = ()
    turns: tuple[Turn, ...] = ()

    def fingerprint(self) -> str:
        """Of everything but the name; files count by their bytes."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(json.dumps([self.text, self.ids, self.turns]).encode())
        for media in self.media:
            if isinstance(media, Media):
                digest.update(media.media_hash.encode())
            else:
                with _opened(media) as file:
                    while block := file.read(1 << 20):
                        digest.update(block)
        return digest.hexdigest()


def read_materials(directory: str | Path) -> list[Material]:
    """All files of `directory` in order of their names; hidden files and directories below it are left alone.

    Raises:
        BadRequest: no directory, nothing in it, or a file that cannot be read; the message names the file and its line.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise BadRequest(f"{str(directory)!r} is not a directory of media and texts")
    files = sorted(path for path in directory.iterdir() if path.is_file() and not path.name.startswith("."))
    stems = {path.stem for path in files if path.suffix not in (".txt", ".jsonl")}
    told = {path for path in files if path.suffix == ".jsonl"}
    found: list[Material] = []
    named: set[Path] = set()
    for path in sorted(told):
        for material in _read_lines(path):
            found.append(material)
            named.update(one for one in material.media if isinstance(one, Path))
    for path in files:
        if path in told or path in named:
            continue
        if path.suffix != ".txt":
            found.append(Material(path.name, media=(path,), turns=_questions_beside(path)))
        elif path.stem not in stems:
            found.append(Material(path.name, text=_read_text(path)))
    if not found:
        raise BadRequest(f"{str(directory)!r} holds no media, .txt or .jsonl files")
    return found


def _questions_beside(path: Path) -> tuple[Turn, ...]:
    beside = path.with_suffix(".txt")
    if not beside.is_file():
        return DEFAULT_TURNS
    return tuple((line.strip(), "") for line in _read_text(beside).splitlines() if line.strip())


def _read_text(path: Path) -> str:
    with _opened(path) as file:
        data = file.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRequest(f"{path.name}: not UTF-8 text: byte {error.start} is {data[error.start]:#04x}") from None
    if not text.strip():
        raise BadRequest(f"{path.name}: holds no text")
    return text


def _read_lines(path: Path) -> list[Material]:
    found = []
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        if line.strip():
            where = f"{path.name}, line {number}"
            try:
                data = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BadRequest(f"{where}: not JSON: {error}") from None
            found.append(_material(where, data, path.parent))
    return found


def _material(where: str, data: Any, folder: Path) -> Material:
    if not isinstance(data, dict) or set(data) not in ({"text"}, {"ids"}, {"media"}, {"media", "turns"}):
        keys = sorted(data) if isinstance(data, dict) else type(data).__name__
        raise BadRequest(f"{where}: must be an object with 'text', 'ids', or 'media' and 'turns', got {keys}")
    if "text" in data:
        if not isinstance(data["text"], str) or not data["text"].strip():
            raise BadRequest(f"{where}: 'text' must be a text that is not empty, got {data['text']!r}")
        return Material(where, text=data["text"])
    if "ids" in data:
        ids = data["ids"]
        if not isinstance(ids, list) or not ids or not all(type(one) is int and one >= 0 for one in ids):
            raise BadRequest(f"{where}: 'ids' must be a list of token ids that is not empty")
        return Material(where, ids=tuple(ids))
    media = [data["media"]] if isinstance(data["media"], str) else data["media"]
    if not isinstance(media, list) or not media or not all(isinstance(one, str) for one in media):
        raise BadRequest(f"{where}: 'media' must be a file name or a list of them, got {data['media']!r}")
    paths = tuple(folder / one for one in media)
    for one in paths:
        if not one.is_file():
            raise BadRequest(f"{where}: there is no file {str(one)!r}")
    turns = data.get("turns")
    if turns is None:
        return Material(where, media=paths, turns=DEFAULT_TURNS)
    legal = isinstance(turns, list) and turns and all(isinstance(turn, list) and len(turn) == 2 for turn in turns)
    if not legal or not all(isinstance(part, str) for turn in turns for part in turn):
        raise BadRequest(f"{where}: 'turns' must be a list of [question, answer], got {turns!r}")
    return Material(where, media=paths, turns=tuple((question, answer) for question, answer in turns))


def _opened(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise BadRequest(f"{path.name}: cannot be read: {error.strerror or error}") from error
