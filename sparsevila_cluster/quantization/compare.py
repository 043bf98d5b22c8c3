"""How far a quantized checkpoint is from its original: the divergence of their next-token distributions on the same inputs.

KL(original || other) of each text token, averaged, in nats | |difference| / |logits| | share of tokens with the same likeliest
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsevila_cluster.core.errors import BadRequest
from sparsevila_cluster.models.adapter import Model
from sparsevila_cluster.models.checkpoint import Checkpoint
from sparsevila_cluster.models.loading.originals import Vocabulary, WholeSequence, open_copy
from sparsevila_cluster.models.loading.text_only import TextModel
from sparsevila_cluster.quantization.calibration import Reading, Report, make_samples
from sparsevila_cluster.quantization.materials import Material

_ROWS = 256  # rows whose logits are in memory at once


@dataclass(frozen=True)
class Distance:
    """Of one checkpoint from the original. num_tokens: on how many it was measured; stored_bytes: of its files."""

    checkpoint: str
    kl: float
    relative_error: float
    same_top: float
    num_tokens: int
    stored_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)


@torch.inference_mode()
def compare(
    original: Path,
    others: Sequence[Path],
    vocabulary: Vocabulary,
    materials: Sequence[Material],
    reading: Reading,
    *,
    device: str = "auto",
    report: Report = lambda *_: None,
) -> list[Distance]:
    """Distances of `others`, each run in float32 with its own vision side; visual tokens predict nothing and do not count.

    Raises:
        BadCheckpoint: one of them cannot be loaded. BadRequest: one of them has other tokens, or there are no inputs.
    """
    kind = Checkpoint.open(original).config.get("model_type")
    for path in others:  # before anything large is loaded
        if (other := Checkpoint.open(path).config.get("model_type")) != kind:
            raise BadRequest(f"{str(path)!r} is a {other}, {str(original)!r} a {kind}: it is no copy of it")
    true = _load(original, materials, device, report)
    wanted = _states(true, vocabulary, materials, reading, report)
    true_head = true.text.head_weight  # type: ignore[attr-defined]
    del true
    found = []
    for path in others:
        model = _load(path, materials, device, report)
        states = _states(model, vocabulary, materials, reading, report)
        if [len(state) for state in states] != [len(state) for state in wanted]:
            raise BadRequest(f"{str(path)!r} makes other sequences of the same inputs than {str(original)!r}: it is no copy of it")
        head = model.text.head_weight  # type: ignore[attr-defined]
        if head.shape != true_head.shape:
            raise BadRequest(f"{str(path)!r} has {len(head)} tokens, {str(original)!r} has {len(true_head)}")
        pairs = ((_logits(a, true_head), _logits(b, head)) for x, y in zip(wanted, states, strict=True) for a, b in _chunks(x, y))
        found.append(_distance(str(path), pairs, sum(file.stat().st_size for file in path.glob("*.safetensors"))))
    return found


def _load(path: Path, materials: Sequence[Material], device: str, report: Report) -> Model | TextModel:
    report(f"load {path.name}", 0, 1)
    return open_copy(path, device, any(material.media for material in materials))


def _states(
    model: Model | TextModel, vocabulary: Vocabulary, materials: Sequence[Material], reading: Reading, report: Report
) -> list[Tensor]:
    """Hidden states f32 [T, D] of every sequence after the final norm, text rows only."""
    states = []
    for sample in make_samples(model, vocabulary, materials, reading, report):
        hidden, positions, rows = (t.to(model.device) for t in (sample.hidden, sample.positions, sample.visual_rows))
        deepstack = [level.to(model.device) for level in sample.deepstack]
        out = model.text.forward(hidden, positions, cast(Any, WholeSequence()), deepstack, rows)
        is_text = torch.ones(len(out), dtype=torch.bool, device=out.device).index_fill_(0, rows, False)
        states.append(out[is_text])
    return states


def _chunks(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(_ROWS), y.split(_ROWS), strict=True))


def _logits(hidden: Tensor, head: Tensor) -> Tensor:
    return F.linear(hidden, head).float()


def _distance(name: str, pairs: Iterable[tuple[Tensor, Tensor]], stored_bytes: int) -> Distance:
    kl = off = size = same = 0.0
    num_tokens = 0
    for wanted, got in pairs:
        p, q = wanted.log_softmax(-1), got.log_softmax(-1)
        kl += float((p.exp() * (p - q)).sum())
        off += float((got - wanted).square().sum())
        size += float(wanted.square().sum())
        same += float((wanted.argmax(-1) == got.argmax(-1)).sum())
        num_tokens += len(wanted)
    return Distance(name, kl / num_tokens, (off / size) ** 0.5, same / num_tokens, num_tokens, stored_bytes)
