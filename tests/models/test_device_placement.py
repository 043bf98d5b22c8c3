"""`auto` resolved: which dtype a checkpoint gets, and where quantized weights stay quantized."""

from types import SimpleNamespace

import pytest
import torch

from sparsevila_cluster.core.errors import BadConfig
from sparsevila_cluster.models.loading.device_placement import find_dtype, runs_as_stored
from sparsevila_cluster.models.loading.quantization_scheme import Scheme, TextScheme

CPU, GPU = torch.device("cpu"), torch.device("cuda")
QUANTISED = Scheme(TextScheme("gemm", 128), vision=False)


def config(dtype, text_dtype=None):
    return SimpleNamespace(dtype=dtype, get_text_config=lambda: SimpleNamespace(dtype=text_dtype))


@pytest.mark.parametrize(
    "dtype,device,found,scheme,expected",
    [
        ("auto", CPU, config(torch.bfloat16), None, torch.float32),
        ("auto", GPU, config(torch.bfloat16), None, torch.bfloat16),
        ("auto", GPU, config("float16"), None, torch.float16),
        ("auto", GPU, config(None, torch.float16), None, torch.float16),
        ("auto", GPU, config(torch.float64), None, torch.float32),
        ("auto", CPU, config(torch.float16), QUANTISED, torch.bfloat16),
        ("auto", GPU, config(torch.float16), QUANTISED, torch.bfloat16),
        ("float32", CPU, config(torch.float16), QUANTISED, torch.float32),
        ("float16", GPU, config(torch.bfloat16), QUANTISED, torch.float16),
    ],
)
def test_dtypes(dtype, device, found, scheme, expected):
    assert find_dtype(dtype, device, found, scheme) == expected


@pytest.mark.parametrize("capability", ["AVX512", "AVX2", "DEFAULT"])
def test_where_quantized_weights_stay_so(monkeypatch, capability):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    kept = {(device.type, dtype) for device in (CPU, GPU) for dtype in DTYPES if runs_as_stored("auto", device, dtype)}
    fast = {("cuda", torch.bfloat16), ("cuda", torch.float16)}
    assert kept == (fast | {("cpu", torch.bfloat16)} if capability == "AVX512" else fast)
    assert not any(runs_as_stored("none", device, dtype) for device in (CPU, GPU) for dtype in DTYPES)


def test_other_words_are_refused():
    with pytest.raises(BadConfig, match="quantization must be auto or none, got 'int4'"):
        runs_as_stored("int4", CPU, torch.float32)


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
