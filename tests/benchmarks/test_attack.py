"""What the benchmark of attacks makes of what it saw, and how it sees when the system wakes somebody."""

import json
import subprocess
import sys

import pytest

from benchmarks import attack
from benchmarks.attack import Phase
from benchmarks.lib import wake_up
from tests.structure import ROOT


def test_a_row_compares_with_what_was_quiet_next_to_it():
    quiet = [Phase(latency_s=[0.01] * 99 + [0.02]), Phase(latency_s=[0.01] * 99 + [0.02])]
    far = Phase(latency_s=[1.0] * 100)
    hit = Phase(
        ("streams",), latency_s=[0.01] * 98 + [0.06] * 2, num_wrong=1, late_ms={"p99": 1.5, "max": 9.0}, cores={"server": 1.234}
    )
    rows = attack.judge([quiet[0], hit, Phase(("a", "b")), quiet[1], Phase(("c",), latency_s=[0.5] * 10), far])
    assert [row["attack"] for row in rows] == ["quiet", "streams", "all at once", "quiet", "c", "quiet"]
    assert rows[1]["p50_ms"] == 10.0 and rows[1]["ratio"] > 3 and rows[1]["wrong"] == 1
    assert (rows[1]["late_p99_ms"], rows[1]["late_max_ms"], rows[1]["server_cores"]) == (1.5, 9.0, 1.23)
    assert [row["ratio"] for row in rows[3:]] == [1.0, 0.5, 1.0]
    assert rows[2]["answers"] == 0 and rows[2]["ratio"] == float("inf")  # nobody was answered: no limit holds
    assert set(attack.HEAD) <= set(rows[0])


def test_a_sleeper_tells_how_late_it_was_woken():
    command = [sys.executable, "-m", "benchmarks.lib.wake_up", "0.3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    late = json.loads(done.stdout)
    assert 0 <= late["p99"] <= late["max"]


def test_autogroup_is_off_only_meanwhile(monkeypatch, tmp_path):
    switch = tmp_path / "sched_autogroup_enabled"
    monkeypatch.setattr(wake_up, "AUTOGROUP", switch)
    with wake_up.without_autogroup():  # a system that has none
        assert not switch.exists() and not wake_up.has_autogroup()
    switch.write_text("1\n")
    with pytest.raises(ZeroDivisionError), wake_up.without_autogroup():
        assert not wake_up.has_autogroup()
        1 / 0  # noqa: B018
    assert wake_up.has_autogroup()
    switch.write_text("0\n")
    with wake_up.without_autogroup():
        pass
    assert switch.read_text() == "0\n"
