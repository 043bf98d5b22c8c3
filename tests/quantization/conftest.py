"""Tiny checkpoints, made once per run, and one thread: tensors here are so small that a second one only waits."""

import pytest
import torch

from tests.checkpoints import tiny_qwen2_5_vl
from tests.quantization.quantization_subjects import make_text_model


@pytest.fixture(scope="session")
def vl(tmp_path_factory):
    """A vision-language checkpoint in the published layout."""
    return tiny_qwen2_5_vl.make_qwen2_5_vl(tmp_path_factory.mktemp("vl"))


@pytest.fixture(scope="session")
def text_model(tmp_path_factory):
    """A language model without vision."""
    return make_text_model(tmp_path_factory.mktemp("text") / "qwen2")


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
