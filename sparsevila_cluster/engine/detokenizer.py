"""Token ids to text while they arrive: only whole characters leave, and nothing that may still become a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "�"
# A character of UTF-8 has at most 4 bytes; byte-level tokens hold one byte or more, so that after this many tokens an unfinished
# character is no longer unfinished but invalid.
MAX_UNFINISHED = 4
# Tokens without text that are kept as context; behind them they are forgotten, so that a window has a bound.
MAX_SILENT = 16


class Detokenizer:
    """Text of one answer, piece by piece.

    Decodes a short window again with every token, because some tokenizers choose spaces by the neighbours.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()):
        self._decode = decode
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._window = 0  # ids[_window:_read] were given out and give context to what follows
        self._read = 0
        self._num_unfinished = 0  # tokens since the text began to end with an unfinished character
        self._held = ""  # whole characters that may be the beginning of a stop string
        self.stopped = False

    def add(self, token: int) -> str:
        """Take one token; return the text that can be shown now (often empty). Sets `stopped` when a stop string is complete."""
        self._ids.append(token)
        before = self._decode(self._ids[self._window : self._read])
        after = self._decode(self._ids[self._window :])
        self._num_unfinished = self._num_unfinished + 1 if after.endswith(REPLACEMENT) else 0
        if 0 < self._num_unfinished < MAX_UNFINISHED:
            return ""
        if len(after) <= len(before):
            if len(self._ids) - self._read >= MAX_SILENT:
                del self._ids[self._read :]
            return ""
        self._window, self._read, self._num_unfinished = self._read, len(self._ids), 0
        return self._release(after[len(before) :])

    def finish(self) -> str:
        """The rest of the text, once no more tokens will come. Empty after a stop string."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._window : self._read])
        text = self._held + self._decode(self._ids[self._window :])[len(before) :]
        self._window = self._read = len(self._ids)
        self._held = ""
        return self._cut(text)

    def _cut(self, text: str) -> str:
        ends = [at for at in (text.find(s) for s in self._stop) if at >= 0]
        if not ends:
            return text
        self.stopped = True
        return text[: min(ends)]

    def _release(self, new: str) -> str:
        if not self._stop:
            return new
        text = self._cut(self._held + new)
        self._held = ""
        if self.stopped:
            return text
        longest = min(len(text), max(map(len, self._stop)) - 1)
        for size in range(longest, 0, -1):
            if any(s.startswith(text[-size:]) for s in self._stop):
                self._held = text[-size:]
                return text[:-size]
        return text
