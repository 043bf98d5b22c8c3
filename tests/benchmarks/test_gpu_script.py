"""benchmarks/gpu.sh keeps what a section found, ends one that hangs, and runs from end to end without a GPU."""

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from benchmarks.lib import gpu_sections, limit_check
from tests import structure


def run(how, tmp_path, end_s=60.0):
    section = gpu_sections.Section("section", "tests.benchmarks.gpu_section", stop_s=1, end_s=end_s)
    return gpu_sections.run(section, [how], dict(os.environ), tmp_path)


def test_a_section_that_ends_well(tmp_path):
    outcome = run("good", tmp_path)
    assert outcome.told["state"] == "done" and outcome.told["status"] == 0 and outcome.document["figures"] == {"bright": 2.0}
    assert outcome.rows == [{"section": "section", "number": 3}] and outcome.text == "this is good\n"
    assert not list(tmp_path.iterdir())


def test_a_section_that_dies_keeps_its_rows(tmp_path):
    outcome = run("dies", tmp_path)
    assert outcome.told["state"] == "failed" and outcome.told["status"] == 1 and outcome.document == {}
    assert [row["number"] for row in outcome.rows] == [1, 2]
    assert "no more" in outcome.text and "no more" in (tmp_path / "gpu_section.txt").read_text()


def test_a_section_that_hangs_is_ended_with_its_children(tmp_path):
    begun_s = time.monotonic()
    outcome = run("hangs", tmp_path, end_s=4.0)
    assert outcome.told["state"] == "out of time" and time.monotonic() - begun_s < 30
    assert [row["number"] for row in outcome.rows] == [1, 2]
    child = Path("/proc", outcome.text.split()[-1], "status")
    for _ in range(100):
        if not child.exists() or "Z (zombie)" in child.read_text():
            break
        time.sleep(0.05)
    else:
        pytest.fail("its child still runs")


def test_the_sections_fit_into_nine_minutes():
    assert sum(section.end_s for section in gpu_sections.SECTIONS) <= 525
    assert all(section.stop_s < section.end_s for section in gpu_sections.SECTIONS)


def test_wheels_are_unpacked(tmp_path):
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "lamp-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("lamp/__init__.py", "LIGHT = 1")
    assert gpu_sections.unpack(tmp_path / "wheels", tmp_path / "site") == ["lamp-1.0-py3-none-any.whl"]
    done = subprocess.run([sys.executable, "-c", "import lamp; print(lamp.LIGHT)"], env={"PYTHONPATH": str(tmp_path / "site")},
                          capture_output=True, text=True)  # fmt: skip
    assert done.stdout.strip() == "1"


@pytest.mark.parametrize("argv", [["--sections", "kernel"], ["--wheels", "/no/such/folder"]])
def test_mistakes_are_told(argv, capsys):
    with pytest.raises(SystemExit):
        gpu_sections.parse(argv)
    assert argv[1] in capsys.readouterr().err


def test_checks_are_judged():
    def skip():
        raise limit_check.Skipped("needs a GPU")

    def crash():
        raise ValueError("wrong shape")

    measured = [limit_check.Check("a measured one", lambda value=value: value, 0.2) for value in (0.1, 0.3, float("nan"))]
    others = [limit_check.Check("another", each) for each in (skip, crash)]
    passed, failed, nan, skipped, crashed = map(limit_check.judge, measured + others)
    assert [row["state"] for row in (passed, failed, nan, skipped, crashed)] == ["passed", "failed", "failed", "skipped", "failed"]
    assert nan["value"] == "NaN" and "wrong shape" in crashed["why"] and crashed["where"].startswith("test_gpu_script.py:")


def test_making_checks_may_fail():
    def source():
        yield limit_check.Check("first", lambda: 0.0)
        raise MemoryError("too small")

    rows = [limit_check.judge(check) for check in limit_check.unbroken("these", source())]
    assert [row["state"] for row in rows] == ["passed", "failed"] and "too small" in rows[1]["why"]


def test_an_interpreter_without_torch_is_named(tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    script = str(structure.ROOT / "benchmarks" / "gpu.sh")
    done = subprocess.run([script, "--toy"], env=os.environ | {"PYTHON": str(bare)}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"benchmarks/gpu.sh: {bare} has no torch")


@pytest.mark.slow
def test_it_runs_from_end_to_end_without_a_gpu(tmp_path):
    """Everything at once, as one types it: right kernels under the interpreter, every operation, the engine."""
    environment = os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = [str(structure.ROOT / "benchmarks" / "gpu.sh"), "--toy", "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["what"] == "gpu_toy" and {path.suffix for path in tmp_path.iterdir()} == {".json", ".md"}
    sections = {row["section"]: row for row in document["rows"] if row.get("stage") == "section"}
    assert {name: row["state"] for name, row in sections.items()} == {"checks": "done", "kernels": "done", "engine": "done"}
    failed = [row for row in document["rows"] if row.get("state") == "failed" or "failed" in row]
    assert not failed and document["figures"]["checks_failed"] == 0 and document["figures"]["checks_passed"] > 30
    assert {"colreduce_vs_reference", "awq_dense_step_speedup_4f_b1", "bf16_decode_speedup_4f_b3"} <= set(document["figures"])
    saved = json.loads(next(tmp_path.glob("gpu_toy_*.json")).read_text())
    assert saved == document and "decode_attention" in next(tmp_path.glob("gpu_toy_*.md")).read_text()
