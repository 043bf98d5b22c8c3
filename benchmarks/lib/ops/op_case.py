"""What a case of a kernel benchmark is, and the sizes that cases take their shapes from."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

import sparsevila_kernels as kernels
from benchmarks.lib.flop_counts import Work
from sparsevila_kernels import reference

# op: ours as the engine calls it. torch: ours, its torch path, on a device where that is not the same. reference: the definition.
# peer: what others offer for the same task. context: another task that the reader will compare with (unquantised weights).
Role = Literal["op", "torch", "reference", "peer", "context"]


@dataclass(frozen=True)
class Entry:
    """One way to compute a case. `judged`: its result is comparable with the reference's."""

    name: str
    role: Role
    run: Callable[[], Any]
    judged: bool = True


@dataclass
class Subject:
    """A case with its tensors made. `work` is what no way of computing it can avoid."""

    work: Work
    entries: list[Entry]
    _peers: list[tuple[str, Role, Callable[[], Callable[[], Any]], bool]] = field(default_factory=list)

    def add_peer(self, name: str, make: Callable[[], Callable[[], Any]], judged: bool = True, role: Role = "peer") -> None:
        """`make` imports and prepares what the peer needs, once `meet_peers` asks for it."""
        self._peers.append((name, role, make, judged))

    def meet_peers(self) -> dict[str, str]:
        """Let every peer run once; those that can join `entries`. Returns the others, each with the reason."""
        missing = {}
        for name, role, make, judged in self._peers:
            try:
                run = make()
                run()
            except Exception as error:  # whatever somebody else's package raises on a machine that it does not know
                missing[name] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            else:
                self.entries.append(Entry(name, role, run, judged))
        self._peers.clear()
        return missing


Make = Callable[[Callable[..., Any]], Callable[[], Any]]


def ways(op: str, backends: Sequence[str], make: Make, judge: bool = True) -> list[Entry]:
    """Our operation on each of `backends`, the first of them being the one that counts, and its reference unless not `judge`.

    `make` turns the function into a call of it, with tensors of its own where it writes into them.
    """
    entries = []
    for i, backend in enumerate(backends):
        run = make(partial(getattr(kernels, op), backend=backend))
        entries.append(Entry(backend, "torch", run) if i else Entry("op", "op", run))
    if judge:
        entries.append(Entry("reference", "reference", make(getattr(reference, op))))
    return entries


@dataclass(frozen=True)
class Case:
    """`build(device, backends)` makes the tensors. headline: its times are the figures of its operation."""

    op: str
    shape: str
    dtype: str
    build: Callable[[torch.device, Sequence[str]], Subject]
    headline: bool = False
    sizes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Sizes:
    """Qwen2.5-VL-7B, and which of its shapes are measured. tokens: visual tokens of 16, 64 and 256 frames of 364 x 364 pixels;
    rows, keys: of a question's retrieval; matmul_rows: rows of a step or a prefill; scores: the most softmax weights that the
    reference may hold at once; dtype: of attention and small operations; all_matrices, all_batches: else only some.
    """

    num_heads: int = 28
    num_kv_heads: int = 4
    head_dim: int = 128
    hidden: int = 3584
    intermediate: int = 18944
    num_layers: int = 28
    vision_heads: int = 16
    vision_head_dim: int = 80
    vision_hidden: int = 1280
    vision_intermediate: int = 3420
    group_size: int = 128
    tokens: tuple[int, ...] = (1352, 5408, 21632)
    batches: tuple[int, ...] = (1, 4, 16)
    rows: tuple[int, ...] = (8, 32, 64)
    keys: tuple[int, ...] = (16384, 65536, 262144)
    frame_groups: int = 24
    patches: int = 676
    matmul_rows: tuple[int, ...] = (1, 4, 16, 64, 256, 2048)
    scores: int = 1 << 29
    dtype: str = "bfloat16"
    all_matrices: bool = True
    all_batches: bool = True

    @property
    def small_batch(self) -> int:
        return self.batches[min(1, len(self.batches) - 1)]

    @property
    def qkv(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


GPU = Sizes()
CPU = Sizes(
    keys=(16384, 65536), frame_groups=4, matmul_rows=(1, 4, 16, 64, 256), scores=1 << 25, dtype="float32", all_batches=False,
)  # fmt: skip
QUICK = Sizes(
    tokens=(1352, 5408), batches=(1, 4), rows=(8, 32), keys=(16384,), frame_groups=2, matmul_rows=(1, 16), scores=1 << 24,
    dtype="float32", all_matrices=False,
)  # fmt: skip
TOY = Sizes(
    num_heads=4, num_kv_heads=2, head_dim=16, hidden=128, intermediate=256, num_layers=2, vision_heads=2, vision_head_dim=16,
    vision_hidden=64, vision_intermediate=96, group_size=32, tokens=(40, 90), batches=(1, 3), rows=(3,), keys=(100,),
    frame_groups=2, patches=20, matmul_rows=(1, 5), dtype="float32", all_matrices=False,
)  # fmt: skip

KEEPS = (1.0, 0.25)
"""Shares of a video's visual tokens that a media prefix holds: dense, and pruned."""
PACK = 0.10
"""Share of the media prefix that a question retrieves."""


def random(shape: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Normal numbers, the same on every call."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, device=device, dtype=torch.float32).to(dtype)


def error_of(out: Any, wanted: Any) -> float:
    """The largest |out - wanted| / |wanted| over the parts of a result (2-norms)."""
    worst = 0.0
    for a, b in zip(tensors(out), tensors(wanted), strict=True):
        assert a.shape == b.shape, (a.shape, b.shape)
        b = b.double()
        size = float(b.norm())
        difference = float((a.double().to(b.device) - b).norm())
        worst = max(worst, difference / size if size else difference)
        if difference != difference:
            return float("nan")
    return worst


def tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, tuple | list):
        for part in result:
            yield from tensors(part)


def module_file(package: str, path: str) -> Any:
    """One file of an installed package as a module, without running the package's own import (which may want other versions of its
    dependencies than are here).
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ImportError(f"{package} is not installed")
    spec = importlib.util.spec_from_file_location(f"_{package}_file", f"{found.submodule_search_locations[0]}/{path}")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
