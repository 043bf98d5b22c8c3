"""Places where kernels run, and memory that is NaN until somebody writes it."""

import pytest
import torch

from sparsevila_kernels._launch import HAS_TRITON, INTERPRETED
from tests.kernels.kernel_accuracy import Place

cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
no_triton = pytest.mark.skipif(not HAS_TRITON, reason="no Triton")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="Triton compiles for the GPU here; TRITON_INTERPRET=1 tests on the CPU")

PATHS = [
    pytest.param(Place("cpu", "torch"), id="cpu-torch"),
    pytest.param(Place("cpu", "triton"), id="cpu-triton", marks=[interpreted]),
    pytest.param(Place("cuda", "torch"), id="cuda-torch", marks=cuda),
    pytest.param(Place("cuda", "triton"), id="cuda-triton", marks=[*cuda, no_triton]),
]


@pytest.fixture(params=PATHS)
def place(request):
    """Every path that a kernel has on this machine."""
    return request.param


@pytest.fixture(params=PATHS[1::2])
def triton_place(request):
    """Every device that Triton reaches on this machine."""
    return request.param


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty gives NaN: what a kernel leaves unwritten, or reads unwritten, shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
