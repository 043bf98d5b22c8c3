"""Few threads, no network, fixed seeds: the same run on every machine."""

import os
import random
import signal
import sys

import pytest

from benchmarks.lib import interpreted_triton

NUM_THREADS = 1  # tensors in tests are small: a second thread costs more in barriers than it brings

os.environ.setdefault("OMP_NUM_THREADS", str(NUM_THREADS))  # read by torch when a test first imports it
if not any(map(os.path.exists, ("/dev/nvidiactl", "/dev/dxg"))):  # no GPU: Triton's kernels run under its interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by triton when it is first imported
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"


# With pytest-xdist a file is run by one worker, and so are these files and folders together: what is in chaos shares a cluster, and
# two Rays at a time take longer than one after the other.
TOGETHER = {"chaos": "chaos", "test_serving_benchmark.py": "Ray", "test_ray_worker_pool.py": "Ray", "test_serve.py": "Ray"}


def group_of(nodeid):
    file = nodeid.partition("::")[0]
    return next((TOGETHER[part] for part in file.split("/") if part in TOGETHER), file)


def pytest_configure(config):
    config.option.loadscopereorder = False  # the order of pytest_collection_modifyitems, not the group with most tests first


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Not the marks of --dist loadgroup: pytest 9.2 does not show them to xdist 3.8, which then runs every test by itself."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return group_of(nodeid)

    return Scheduling(config, log)


def pytest_collection_modifyitems(config, items):
    """Among several workers, what takes long begins first."""
    if hasattr(config, "workerinput"):
        slow = {group_of(item.nodeid) for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: (group_of(item.nodeid) not in slow, group_of(item.nodeid) not in TOGETHER.values()))


@pytest.fixture
def interruptible():
    """SIGINT interrupts this test and what it starts, also in a run that was begun in the background and so ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _repeatable():
    """Seed what is loaded. torch is not imported here: tests without tensors stay fast."""
    random.seed(0)
    interpreted_triton.prepare_once()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        torch = sys.modules["torch"]
        torch.manual_seed(0)
        if torch.get_num_threads() > NUM_THREADS:
            torch.set_num_threads(NUM_THREADS)
