"""What kernel tests share: where a kernel runs, exact results, and how far from them one may be.

A test takes `place` (see conftest.py): every path of a kernel that this machine can run. Errors are largest absolute differences
to the fp64 reference, relative to its largest value, and allowed as a multiple of what the same definition makes of it when
plain torch computes it in the inputs' own dtype; a few roundings of fp32 are allowed where that happens to be exact.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

LEAST_ERROR = 4 * torch.finfo(torch.float32).eps
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


class Place(NamedTuple):
    """A device and a path of the kernels on it."""

    device: str
    backend: str

    @property
    def scale(self) -> int:
        """How much larger shapes may be here: the interpreter takes milliseconds per line."""
        return 16 if self.device == "cuda" else 1


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    found, exact = found.cpu().double(), exact.cpu().double()
    assert found.shape == exact.shape
    both_infinite = torch.isinf(exact) & (found == exact)
    difference = (found - exact).masked_fill(both_infinite, 0.0)
    assert not torch.isnan(difference).any(), "NaN where the exact result is a number"
    size = exact.masked_fill(torch.isinf(exact), 0.0).abs().max() if exact.numel() else 0.0
    return float(difference.abs().max() / size) if size else float(difference.abs().sum())


def assert_as_exact_as_torch(found, exact, plain, ratios: dict[str, float], dtype: torch.dtype | None = None) -> None:
    """Compare outputs in order with the fp64 results. `ratios` names each and says how many times plain torch's error it may have;
    an output of `dtype` may be rounded once to it, which the interpreter does towards zero."""
    assert len(found) == len(exact) == len(plain) == len(ratios)
    for (name, ratio), mine, right, theirs in zip(ratios.items(), found, exact, plain, strict=True):
        rounding = 0.0 if dtype is None else ROUNDING[dtype]
        allowed = ratio * max(error(theirs, right), LEAST_ERROR) + rounding
        assert error(mine, right) <= allowed, f"{name}: error {error(mine, right):.3g}, allowed {allowed:.3g}"


def offsets(*lengths: int, device: str = "cpu") -> torch.Tensor:
    """Lengths -> i32 bounds, as cu_rows and cu_keys give them."""
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


class NoHostReads(TorchDispatchMode):
    """Fails where a tensor's value is read on the host, or where a shape depends on one."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "item", "masked_select", "unique", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.FORBIDDEN, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))
