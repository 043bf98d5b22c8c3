"""One decoder layer to 4 bits: what its linears are given, scales folded into what comes before them, clipping, codes.

input norm -> q, k, v | v -> o (without grouped heads) | MLP norm -> gate, up | up -> down        scale s: before / s, after * s
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sparsevila_cluster.core.errors import BadCheckpoint, BadRequest
from sparsevila_cluster.models.loading.originals import DOWN, GATE_UP, LINEARS, NORM_IN, NORM_MLP, OUT, QKV, DecoderLayer
from sparsevila_cluster.quantization.awq_search import encode, search_clip, search_scale
from sparsevila_kernels.awq_format import NIBBLES, pack

GROUP_SIZES = (128, 64, 32)
NEVER_CLIPPED = QKV[:2]
"""What clipping q and k saves in their outputs it loses in the scores, which multiply the two."""


@dataclass(frozen=True)
class Sample:
    """One calibration sequence as the next layer sees it: hidden f32 [T, D], positions i64 [R, T]; DeepStack levels [N, D] that are
    added to rows `visual_rows` i64 [N] after the first layers.
    """

    hidden: Tensor
    positions: Tensor
    visual_rows: Tensor
    deepstack: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class TextSettings:
    """How a text model is quantized. num_steps: fineness of the searches. search_rows: about how many rows of activations the
    errors are measured on; statistics are taken of all. keep: linears, by the end of their names, that stay as they are.
    """

    group_size: int
    num_steps: int = 20
    clip: bool = True
    search_rows: int = 2048
    keep: tuple[str, ...] = ()

    def keeps(self, name: str) -> bool:
        """Whether the linear called `name` stays as it is."""
        return any(f".{name}".endswith(f".{end}") for end in self.keep)


@dataclass
class Seen:
    """What a layer was given. activity: mean |x| f32 [K] of each input, under the first linear's name; rows: some of them,
    f32 [R, K]; sequences: whole ones for attention, with their positions.
    """

    activity: dict[str, Tensor]
    rows: dict[str, Tensor]
    sequences: list[tuple[Tensor, Tensor]]


def choose_group_size(shapes: Mapping[str, Sequence[int]], wanted: int | None) -> int:
    """`wanted`, or the largest usual group that divides the inputs of all linears. shapes: [N, K] of each by its name.

    Raises:
        BadCheckpoint: no usual group divides them all, or a linear has outputs that do not fill words. BadRequest: `wanted` does
            not divide them. The message names the linear and the rule.
    """
    for name, (num_out, _) in shapes.items():
        if num_out % NIBBLES:
            raise BadCheckpoint(f"{name}: {num_out} outputs are no multiple of {NIBBLES}, which the 4-bit format packs into a word")
    odd = ("", 0)
    for size in GROUP_SIZES if wanted is None else (wanted,):
        odd = next(((name, num_in) for name, (_, num_in) in shapes.items() if num_in % size), ("", 0))
        if not odd[0]:
            return size
    if wanted is not None:
        raise BadRequest(f"group_size {wanted} does not divide the {odd[1]} inputs of {odd[0]}")
    raise BadCheckpoint(f"{odd[0]}: no group size of {', '.join(map(str, GROUP_SIZES))} divides its {odd[1]} inputs")


def run_layer(layer: DecoderLayer, samples: Sequence[Sample], index: int, watch_rows: int = 0) -> tuple[list[Sample], Seen | None]:
    """All samples through a float32 layer; with `watch_rows` also what its linears are given.

    Raises:
        BadCheckpoint: something in it is not finite.
    """
    total = sum(len(sample.hidden) for sample in samples)
    step = max(1, -(-total // watch_rows)) if watch_rows else 0
    seen = _Collector(total, step)
    device = next(layer.module.parameters()).device
    after = []
    for sample in samples:
        h, positions = sample.hidden.to(device), sample.positions.to(device)
        x = layer.norms[NORM_IN](h)
        seen.sequence(QKV[0], x, positions)
        inputs: list[Tensor] = []
        with layer.watch(OUT, inputs):
            h = h + layer.attention(x, positions)
        y = layer.norms[NORM_MLP](h)
        with layer.watch(DOWN, inputs):
            h = h + layer.mlp(y)
        for path, rows in ((OUT, inputs[0]), (GATE_UP[0], y), (DOWN, inputs[1])):
            seen.add(path, rows)
        if not torch.isfinite(h).all():
            raise BadCheckpoint(
                f"{layer.name}: calibration gives values that are not finite; its weights, or what comes before, are broken"
            )
        if index < len(sample.deepstack):
            h = h.index_add(0, sample.visual_rows.to(device), sample.deepstack[index].to(h))
        after.append(replace(sample, hidden=h.to(sample.hidden.device)))
        seen.advance(len(h))
    return after, seen.result() if watch_rows else None


class _Collector:
    """Statistics of all rows, every `step`-th row as it is, and whole sequences of about as many rows."""

    def __init__(self, total: int, step: int):
        self._total, self._step, self._at = total, step, 0
        self._sums: dict[str, Tensor] = {}
        self._rows: dict[str, list[Tensor]] = {}
        self._sequences: list[tuple[Tensor, Tensor]] = []
        self._num_held = 0

    def add(self, path: str, rows: Tensor) -> None:
        if self._step:
            self._sums[path] = self._sums.get(path, torch.zeros((), device=rows.device)) + rows.abs().sum(0)
            self._rows.setdefault(path, []).append(rows[-self._at % self._step :: self._step].clone())

    def sequence(self, path: str, rows: Tensor, positions: Tensor) -> None:
        """Sequences are taken as long as they stay a step-th of all rows; the first is always taken."""
        self.add(path, rows)
        if self._step and self._num_held * self._step <= self._at:
            self._sequences.append((rows, positions))
            self._num_held += len(rows)

    def advance(self, num_rows: int) -> None:
        self._at += num_rows

    def result(self) -> Seen:
        activity = {path: total / self._total for path, total in self._sums.items()}
        return Seen(activity, {path: torch.cat(rows) for path, rows in self._rows.items()}, self._sequences)


def quantize_layer(
    layer: DecoderLayer, seen: Seen, settings: TextSettings, stored_dtype: Callable[[str], torch.dtype]
) -> dict[str, Tensor]:
    """Tensors to store for a layer, by their names in memory: qweight, qzeros and scales of each linear, and what scales were
    folded into. The layer's own weights are rescaled on the way: it is of no use afterwards.

    Raises:
        BadCheckpoint: weights that are not finite.
    """
    for path, linear in layer.linears.items():
        if not torch.isfinite(linear.weight).all():
            raise BadCheckpoint(f"tensor '{layer.name}.{path}.weight' holds values that are not finite")
    work = _Work(layer, seen, settings, stored_dtype)
    work.scale_behind_norm(NORM_IN, QKV, work.attend)
    if layer.linears[QKV[2]].weight.shape == layer.linears[OUT].weight.shape:
        work.scale_behind_linear(QKV[2], OUT)
    work.scale_behind_norm(NORM_MLP, GATE_UP, work.gate)
    work.scale_behind_linear(GATE_UP[1], DOWN)
    return work.finish()


class _Work:
    """A layer while its scales are found."""

    def __init__(self, layer: DecoderLayer, seen: Seen, settings: TextSettings, stored_dtype: Callable[[str], torch.dtype]):
        self.layer, self.seen, self.settings, self.stored_dtype = layer, seen, settings, stored_dtype
        self.changed: set[str] = set()

    def attend(self) -> Iterator[Tensor]:
        for x, positions in self.seen.sequences:
            yield self.layer.attention(x, positions)

    def gate(self) -> Iterator[Tensor]:
        yield self.layer.mlp(self.seen.rows[GATE_UP[0]])

    def scale_behind_norm(self, norm: str, paths: Sequence[str], run: Callable[[], Iterator[Tensor]]) -> None:
        module, name = self.layer.norms[norm], f"{self.layer.name}.{norm}.weight"
        scale = self._search(paths, run, lambda scale: _kept_by(module.weight, scale, self.stored_dtype(name)))
        if scale is not None:
            self._fold((module.weight,), (f"{norm}.weight",), scale)
            self._enlarge(paths, scale)

    def scale_behind_linear(self, before: str, path: str) -> None:
        """Rows of the linear before it take the scale; they are rounded later, so nothing of it is lost."""
        linear = self.layer.linears[before]
        scale = self._search((path,), lambda: iter((self.layer.linears[path](self.seen.rows[path]),)))
        if scale is not None:
            self._fold((linear.weight.T,), (f"{before}.weight",), scale)
            if linear.bias is not None:
                self._fold((linear.bias,), (f"{before}.bias",), scale)
            self._enlarge((path,), scale)

    def _search(
        self,
        paths: Sequence[str],
        run: Callable[[], Iterator[Tensor]],
        as_stored: Callable[[Tensor], Tensor] = lambda scale: scale,
    ) -> Tensor | None:
        """Linears that are kept have no errors to lessen."""
        linears = [self.layer.linears[path] for path in paths if not self._keeps(path)]
        if not linears:
            return None
        weights = [linear.weight.data for linear in linears]
        error = _error_of(linears, run)
        activity, settings = self.seen.activity[paths[0]], self.settings
        return search_scale(weights, activity, settings.group_size, error, settings.num_steps, as_stored)

    def _keeps(self, path: str) -> bool:
        return self.settings.keeps(f"{self.layer.name}.{path}")

    def _fold(self, tensors: Sequence[Tensor], names: Sequence[str], scale: Tensor) -> None:
        for tensor in tensors:
            tensor.data.div_(scale)
        self.changed.update(names)

    def _enlarge(self, paths: Sequence[str], scale: Tensor) -> None:
        for path in paths:
            self.layer.linears[path].weight.data.mul_(scale)
            self.changed.add(f"{path}.weight")
        self.seen.rows[paths[0]] = self.seen.rows[paths[0]] / scale
        if paths == QKV:
            self.seen.sequences = [(x / scale, positions) for x, positions in self.seen.sequences]

    def finish(self) -> dict[str, Tensor]:
        layer, group_size = self.layer, self.settings.group_size
        found: dict[str, Tensor] = {}
        shared = {path: group[0] for group in (QKV, (OUT,), GATE_UP, (DOWN,)) for path in group}
        for path in LINEARS:
            name, weight = f"{layer.name}.{path}", layer.linears[path].weight.data
            if self._keeps(path):
                continue
            self.changed.discard(f"{path}.weight")
            limits = None
            if self.settings.clip and path not in NEVER_CLIPPED:
                limits = search_clip(weight, self.seen.rows[shared[path]], group_size, self.settings.num_steps)
            codes = encode(weight, group_size, limits)
            found[f"{name}.qweight"] = pack(codes.codes.T.cpu())
            found[f"{name}.qzeros"] = pack(codes.zeros.T.cpu())
            found[f"{name}.scales"] = codes.scales.T.contiguous().cpu()
        own = dict(layer.module.named_parameters())
        for path in sorted(self.changed):
            name = f"{layer.name}.{path}"
            found[name] = own[path].data.to(self.stored_dtype(name)).contiguous().cpu()
        return found


def _error_of(linears: Sequence[nn.Linear], run: Callable[[], Iterator[Tensor]]) -> Callable[[list[Tensor]], float]:
    """How far off, in squares, the outputs of `run` are with other weights in the linears."""
    true = list(run())

    def error(weights: list[Tensor]) -> float:
        own = [linear.weight.data for linear in linears]
        try:
            for linear, weight in zip(linears, weights, strict=True):
                linear.weight.data = weight
            return float(sum((out - wanted).square().sum() for out, wanted in zip(run(), true, strict=True)))
        finally:
            for linear, weight in zip(linears, own, strict=True):
                linear.weight.data = weight

    return error


def _kept_by(norm: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale that dividing a norm's weight by `scale` comes to once the quotient is stored; 1 where nothing would be left."""
    quotient = (norm / scale).to(dtype).float()
    usable = (quotient != 0) & torch.isfinite(quotient)
    return torch.where(usable, norm / torch.where(usable, quotient, 1.0), 1.0)
