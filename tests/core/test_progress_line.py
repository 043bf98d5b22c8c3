"""The line on stderr: when it shows, and that it goes away."""

import io
import sys

from sparsevila_cluster.core.progress_line import ProgressLine


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_line_that_was_left_stays_away(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with ProgressLine() as line:
        line.stage("ask", 1, 4)
    shown = screen.getvalue()
    assert "ask 1/4" in shown and shown.endswith("\x1b[2K")
    line.stage("ask", 2, 4)  # work that was interrupted reports once more
    assert screen.getvalue() == shown


def test_a_line_shows_off_a_terminal_only_when_told_to(monkeypatch):
    for always in (False, True):
        file = io.StringIO()
        monkeypatch.setattr(sys, "stderr", file)
        with ProgressLine(always) as line:
            line.stage("ask", 1, 4)
        assert ("ask 1/4" in file.getvalue()) == always
