"""The vision tower learns what lies under each token, where the token is, and to attend to what is there, before there is any text.

The salience loss asks the last full-attention block to spend most of its attention on things and words. Without it they are the
least attended tokens of a tower this small, and salience, which pruning goes by, would mean nothing: it is trained in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsevila_cluster.demo.checkpoint_builder import GRID_TOKENS, TOKENS_PER_STEP
from sparsevila_cluster.demo.training.scene_videos import CONTENTS, SampledScene, contents_of
from sparsevila_cluster.demo.training.vision_runner import VisionOutput, say_readings

SALIENCE_WEIGHT = 0.3
# Of the last full-attention block: shared by the things and letters of a step, the rest is spread evenly.
HELD_ATTENTION = 0.6
PLACE_WEIGHT = 0.2
# Nearly all tokens hold nothing; unweighted they would drown the others.
NOTHING_WEIGHT = 0.15
WARM_UP = 50
PROBES = {name: len(values) + 1 for name, values in CONTENTS.items()} | {"row": GRID_TOKENS, "col": GRID_TOKENS}
# How long each probe's reading is in what the text model gets. Letters and marks are smaller signals than colours and shapes.
BLOCK_SIZES = {"color": 1.0, "shape": 1.0, "mark": 1.0, "letter": 1.4, "row": 0.8, "col": 0.8}


def contents(videos: Sequence[SampledScene], device: torch.device | str) -> dict[str, Tensor]:
    """int64 [steps of all videos, tokens] by name of CONTENTS."""
    found = [contents_of(video) for video in videos]
    return {name: torch.from_numpy(np.concatenate([one[name] for one in found])).to(device) for name in CONTENTS}


def is_something(labels: dict[str, Tensor]) -> Tensor:
    """bool, of the same shape: tokens that hold a thing or a letter."""
    return (labels["shape"] < PROBES["shape"] - 1) | (labels["letter"] < PROBES["letter"] - 1)


def salience_target(held: Tensor) -> Tensor:
    """Where attention should go, likewise float. held: bool [steps, tokens]."""
    on, num = held.float(), held.float().sum(-1, keepdim=True)
    even = torch.full_like(on, 1 / on.shape[-1])
    return torch.where(num > 0, (1 - HELD_ATTENTION) * even + HELD_ATTENTION * on / num.clamp(min=1), even)


class Tower(Protocol):
    """A vision tower with its projector, for whole batches of steps at once.

    last: the projector's last layer. groups_per_step: how often a step of two frames is seen, each time as TOKENS_PER_STEP tokens.
    """

    last: nn.Linear
    groups_per_step: int

    def parameters(self) -> list[nn.Parameter]:
        """All that it learns."""
        ...

    def patchify(self, frames: np.ndarray) -> Tensor:
        """uint8 [videos, 2 * steps, px, px, 3] -> what `__call__` takes."""
        ...

    def __call__(self, patches: Tensor) -> VisionOutput:
        """All groups of all videos."""
        ...


class TowerStage:
    """Owns the probes, which are thrown away, and their losses. One `update` is one optimizer step."""

    def __init__(self, tower: Tower, lr: float = 3e-3, *, salience: bool = True) -> None:
        """salience: whether attention is trained as well."""
        self.tower, self.lr, self.salience = tower, lr, salience
        self.device = tower.last.weight.device
        self.probe = nn.Linear(tower.last.out_features, sum(PROBES.values())).to(self.device)
        parameters = [*tower.parameters(), *self.probe.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
        cell = torch.arange(TOKENS_PER_STEP, device=self.device)
        self.place = {"row": cell // GRID_TOKENS, "col": cell % GRID_TOKENS}

    def update(self, videos: Sequence[SampledScene], progress: float, count: int) -> dict[str, float]:
        """Losses by name. progress: from 0 to 1 over the stage; count: updates before this one."""
        scale = min(1, (count + 1) / WARM_UP) * (0.525 + 0.475 * math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * scale
        labels = self._labels(videos)
        seen = self._see(videos)
        losses = {}
        for name, logits in self._readings(seen.tokens).items():
            flat = logits.float().flatten(0, 1)
            if name in CONTENTS:
                weight = torch.ones(PROBES[name], device=self.device)
                weight[-1] = NOTHING_WEIGHT
                losses[name] = F.cross_entropy(flat, labels[name].flatten(), weight=weight)
            else:
                losses[name] = PLACE_WEIGHT * F.cross_entropy(flat, self.place[name].repeat(len(logits)))
        if self.salience:
            target = salience_target(is_something(labels))
            share = (seen.salience / TOKENS_PER_STEP).clamp(min=1e-8)
            losses["salience"] = SALIENCE_WEIGHT * (target * (target.log() - share.log())).sum(-1).mean()
        self.optimizer.zero_grad()
        sum(losses.values(), start=torch.zeros((), device=self.device)).backward()
        nn.utils.clip_grad_norm_(self.tower.parameters(), 1.0)
        self.optimizer.step()
        return {name: round(value.item(), 4) for name, value in losses.items()}

    def _labels(self, videos: Sequence[SampledScene]) -> dict[str, Tensor]:
        found = contents(videos, self.device)
        return {name: labels.repeat_interleave(self.tower.groups_per_step, 0) for name, labels in found.items()}

    def _see(self, videos: Sequence[SampledScene]) -> VisionOutput:
        return self.tower(self.tower.patchify(np.stack([video.frames for video in videos])))

    def _readings(self, tokens: Tensor) -> dict[str, Tensor]:
        return dict(zip(PROBES, self.probe(tokens).split(list(PROBES.values()), -1), strict=True))

    @torch.no_grad()
    def report(self, videos: Sequence[SampledScene]) -> dict[str, float]:
        """Of the tokens that hold something, the share that each probe reads right, and that is among the most salient 6 and 16."""
        labels = self._labels(videos)
        seen = self._see(videos)
        right = {}
        for name, logits in self._readings(seen.tokens).items():
            wanted = labels[name] if name in CONTENTS else self.place[name].expand(len(logits), -1)
            held = wanted < PROBES[name] - (name in CONTENTS)
            right[name] = (logits.argmax(-1) == wanted)[held]
        something = is_something(labels)
        for most in (6, 16):
            kept = torch.zeros_like(something).scatter(1, seen.salience.topk(most, 1).indices, True)
            right[f"in_top_{most}"] = kept[something]
        return {name: round(matches.float().mean().item(), 4) for name, matches in right.items()}

    @torch.no_grad()
    def start_projector(
        self, videos: Sequence[SampledScene], norm: float = 6.0, words: dict[str, Tensor] | None = None
    ) -> dict[str, float]:
        """Rewrite the last projector layer so that its output says what the probes read, at a size that text can use.

        Each probe's centred logits become one block, as long as BLOCK_SIZES says, of a random orthonormal frame; or, where `words`
        gives them, of the embeddings [classes, hidden] that a language model has for each reading. Tokens that hold something are
        then several times longer than word embeddings: much longer, and text layers could not write into them; much shorter, and
        the first layers would drown them. Either way training stalls.
        """
        labels = self._labels(videos)
        something = is_something(labels).flatten()
        tokens = self._see(videos).tokens.flatten(0, 1)
        rows, offsets = [], []
        for name, weight in zip(PROBES, self.probe.weight.split(list(PROBES.values())), strict=True):
            held = labels[name].flatten() < PROBES[name] - 1 if name in CONTENTS else torch.ones_like(something)
            center = torch.eye(len(weight), device=self.device) - 1 / len(weight)
            centered = tokens @ (center @ weight).T
            mean = centered.mean(0)
            scale = BLOCK_SIZES[name] / (centered[held] - mean).norm(dim=-1).mean()
            rows.append(scale * center @ weight)
            offsets.append(-scale * mean)
        hidden = self.tower.last.out_features
        if words is None:
            # Drawn on the CPU so that every device starts from the same frame.
            frame = torch.linalg.qr(torch.randn(hidden, hidden))[0][:, : sum(PROBES.values())]
        else:
            frame = torch.cat([F.normalize(words[name], dim=-1) for name in PROBES]).T
        say_readings(self.tower.last, torch.cat(rows), torch.cat(offsets), norm * frame.to(self.device))
        length = self._see(videos).tokens.flatten(0, 1).norm(dim=-1)
        norms = {"held": length[something], "other": length[~something]}
        return {name: round(values.mean().item(), 2) for name, values in norms.items()}
