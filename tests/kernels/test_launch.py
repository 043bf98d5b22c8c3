"""Which path serves a tensor, and what a kernel is told when it is launched."""

import subprocess
import sys

import pytest
import torch

from sparsevila_kernels import _launch
from tests.structure import ROOT

NO_TRITON = """
import sys
sys.modules["triton"] = None
import torch
import sparsevila_kernels as kernels
from sparsevila_kernels import _launch
assert not _launch.HAS_TRITON and not _launch.INTERPRETED
assert _launch.choose("auto", torch.ones(1)) == "torch"
q, k = torch.randn(3, 4, 16), torch.randn(9, 2, 16)
sums = kernels.colreduce(q, k)
assert abs(float(sums.sum()) - 12) < 1e-4
try:
    kernels.colreduce(q, k, backend="triton")
except ValueError as error:
    print(error)
"""

NOT_INTERPRETED = """
import os
os.environ["TRITON_INTERPRET"] = "0"
import torch
from sparsevila_kernels import _launch
assert _launch.HAS_TRITON and not _launch.INTERPRETED
try:
    _launch.choose("triton", torch.ones(1))
except ValueError as error:
    print(error)
"""


def run(code):
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_triton_torch_serves_everything():
    assert "where Triton is installed" in run(NO_TRITON)


@pytest.mark.skipif(bool(torch.version.cuda or torch.version.hip), reason="this torch may find a GPU")
def test_without_a_gpu_to_serve_triton_is_not_loaded():
    assert run("import sys, sparsevila_kernels; print(sorted(m for m in sys.modules if m.startswith('triton')))") == "[]\n"


def test_triton_refuses_tensors_that_it_cannot_reach():
    pytest.importorskip("triton")
    assert "on cpu" in run(NOT_INTERPRETED)


def test_auto_is_torch_on_a_cpu():
    assert _launch.choose("auto", torch.ones(1)) == "torch"
    assert _launch.choose("torch", torch.ones(1)) == "torch"
    with pytest.raises(ValueError, match="'cuda'.*legal are"):
        _launch.choose("cuda", torch.ones(1))


@pytest.mark.parametrize(("num", "power"), [(1, 1), (2, 2), (3, 4), (64, 64), (80, 128), (2**20 + 1, 2**21)])
def test_powers_of_two_and_parts(num, power):
    assert _launch.next_power_of_2(num) == power
    assert _launch.cdiv(num, 7) == (num + 6) // 7 and _launch.cdiv(0, 7) == 0


def test_an_empty_grid_starts_nothing():
    class Trap:
        def __getitem__(self, grid):
            raise AssertionError(f"started over {grid}")

    _launch.launch(Trap(), (3, 0, 2), device=torch.device("cpu"))
    with pytest.raises(AssertionError, match="started"):
        _launch.launch(Trap(), (3, 1, 2), device=torch.device("cpu"))
