"""Every kernel compiles for A100 and H100/H200 without a GPU, keeps its values in registers and fits into shared memory."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from tests.kernels import compiled
from tests.structure import ROOT


@pytest.fixture(scope="module")
def figures(request):
    """Rows by module, of all modules that this run asks for: one process, since it imports for seconds."""
    modules = {item.callspec.params["module"] for item in request.session.items if item.path == request.path}
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "tests.kernels.compiled", *sorted(modules)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {module: [row for row in rows if row["module"] == module] for module in modules}


MODULES = [
    pytest.param(module, marks=[pytest.mark.smoke] * (module == "decode_attention")) for module in compiled.modules_with_variants()
]


@pytest.mark.parametrize("module", MODULES)
def test_compiles_without_spilling(module, figures):
    assert len(figures[module]) == len(compiled.ARCHS) * len(compiled.variants_of(module)) > 0
    for row in figures[module]:
        assert row["stack_bytes"] == row["local_bytes"] == 0, f"spills: {row}"
        assert row["shared_bytes"] <= compiled.MAX_SHARED_BYTES[row["arch"]], row


@pytest.mark.parametrize("module", ["colreduce", "decode_attention"])
def test_attention_uses_tensor_cores_and_reads_16_bytes_at_a_time(module, figures):
    """An address that is chosen per key costs both the wide loads and, by spilling, much more; it has happened."""
    tiles = [row for row in figures[module] if "BLOCK_KEYS" in row["constexprs"]]
    narrow = [row for row in tiles if row["types"]["q"] in ("*bf16:16", "*fp16:16")]
    assert len(tiles) > len(narrow) >= 6
    for row in narrow:
        assert row["wgmma"] + row["mma"] >= 10 and row["wide_loads"] >= 20, row
    assert any(row["wgmma"] for row in narrow if row["arch"] == 90), "Hopper's own instructions serve large tiles"
