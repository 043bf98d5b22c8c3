"""Every kernel compiles for A100 and H100/H200 without a GPU, keeps its values in registers and fits into shared memory."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from tests.house import ROOT
from tests.kernels import compiled


def compile_in_its_own_process(module):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "tests.kernels.compiled", module]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("module", compiled.modules_with_variants())
def test_compiles_without_spilling(module):
    figures = compile_in_its_own_process(module)
    assert len(figures) == len(compiled.ARCHS) * len(compiled.variants_of(module)) > 0
    for row in figures:
        assert row["stack_bytes"] == row["local_bytes"] == 0, f"spills: {row}"
        assert row["shared_bytes"] <= compiled.MAX_SHARED_BYTES[row["arch"]], row
