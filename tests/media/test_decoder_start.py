"""Decoding processes start from anywhere, import only what they need, and do not outlive who started them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sparsevila_cluster.core.errors import Unavailable
from sparsevila_cluster.media import DecoderSandbox
from sparsevila_cluster.media.decoder_process import ROOT
from tests.media.fuzz import child_pids
from tests.media.process_helpers import PICTURE, show
from tests.processes import is_running, stop, wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

SCRIPT = f"""
import sys; sys.path.append({ROOT!r})
from sparsevila_cluster.core.config import MediaLimits
from sparsevila_cluster.media import DecoderSandbox, open_media
from sparsevila_cluster.core.requests import MediaSource
def show(sandbox):
    return open_media(MediaSource({PICTURE!r}), fps=2.0, max_frames=4, limits=MediaLimits(), sandbox=sandbox).frames.shape
sandbox = DecoderSandbox()
print(show(sandbox), *sandbox.pids(), flush=True)
"""


def python(script: str, folder: Path, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", script]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_what_lies_in_the_working_directory_is_not_imported(tmp_path):
    for name in ("numpy", "av", "socket", "signal"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the working directory')")
    (tmp_path / "script.py").write_text(SCRIPT.replace("import sys;", "import sys; del sys.path[0];"))
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("(1, 6, 8, 3)") and done.stderr == ""


def test_scripts_need_no_main_guard_and_leave_no_process(tmp_path):
    process = python(SCRIPT, tmp_path)
    output, errors = process.communicate(timeout=60)
    assert output.startswith("(1, 6, 8, 3)") and errors == "" and process.returncode == 0
    assert not is_running(int(output.split()[-1]))


@pytest.mark.parametrize("stopped", [False, True])
def test_the_worker_dies_with_its_parent(tmp_path, stopped):
    process = python(SCRIPT + "import time; time.sleep(60)", tmp_path)
    pid = int(process.stdout.readline().split()[-1])
    assert is_running(pid)
    if stopped:
        stop(pid)
    process.kill()
    process.communicate(timeout=20)
    wait_for(lambda: not is_running(pid))


def test_a_forked_copy_has_processes_of_its_own(tmp_path):
    fork = """
import os
child = os.fork()
print(show(sandbox), *sandbox.pids(), flush=True)
if child:
    os.waitpid(child, 0)
    print(show(sandbox), *sandbox.pids(), flush=True)
else:
    sandbox.close(); sys.exit()
"""
    output, errors = python(SCRIPT + fork, tmp_path).communicate(timeout=60)
    lines = output.splitlines()
    assert len(lines) == 4 and all(line.startswith("(1, 6, 8, 3)") for line in lines), errors
    pids = [line.split()[-1] for line in lines]
    assert pids[0] == pids[-1] and len(set(pids)) == 2


def test_neither_side_imports_what_it_does_not_need():
    with DecoderSandbox() as sandbox:
        show(sandbox)
        assert "torch" not in Path(f"/proc/{sandbox.pids()[0]}/maps").read_text()
    code = "import sys, sparsevila_cluster.media; sys.exit(bool({'torch', 'av', 'PIL', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_a_process_that_does_not_start_is_unavailable(monkeypatch):
    before = child_pids()
    with DecoderSandbox() as sandbox:
        monkeypatch.setattr("sparsevila_cluster.media.decoder_process.MODULE", "sparsevila_cluster.media.missing")
        with pytest.raises(Unavailable, match="does not start.*No module named sparsevila_cluster.media.missing"):
            show(sandbox)
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
        with pytest.raises(Unavailable, match="cannot start a process"):
            show(sandbox)
        monkeypatch.undo()
        assert show(sandbox).kind == "image"
    assert child_pids() == before
