"""Few threads, no network, fixed seeds: the same run on every machine."""

import os
import random
import sys

import pytest

NUM_THREADS = 1  # tensors in tests are small: a second thread costs more in barriers than it brings

os.environ.setdefault("OMP_NUM_THREADS", str(NUM_THREADS))  # read by torch when a test first imports it
if not any(map(os.path.exists, ("/dev/nvidiactl", "/dev/dxg"))):  # no GPU: Triton's kernels run under its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by triton when it is first imported
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"


@pytest.fixture(autouse=True)
def _repeatable():
    """Seed what is loaded. torch is not imported here: tests without tensors stay fast."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.manual_seed(0)
        if torch.get_num_threads() > NUM_THREADS:
            torch.set_num_threads(NUM_THREADS)
