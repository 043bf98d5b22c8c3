"""The text model learns to answer questions about windows of encoded videos, as its lessons show them.

Matrices of its layers are learned by Muon (Jordan et al., 2024), everything else by AdamW: with AdamW alone the same answers were
right after twice as many updates.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration

from sparsevila_cluster.demo.questions import KINDS, SceneQuestion
from sparsevila_cluster.demo.scenes import MAX_STEPS, STREAMS
from sparsevila_cluster.demo.training.batches import ASKED_SIZES, BatchMaker, keep_salient
from sparsevila_cluster.demo.training.dialogues import IGNORE, Batch
from sparsevila_cluster.demo.training.forward import (
    AUXILIARY_WEIGHTS,
    AuxiliaryHeads,
    answer_logits,
    retrieval_mask,
    retrieved,
    run_text,
    run_to_auxiliary_layer,
    turns_apart_mask,
)
from sparsevila_cluster.demo.training.lessons import Showing
from sparsevila_cluster.demo.training.windows import EncodedVideos

WARM_UP = 100
MASTERED = 98.0
LOOKS_PART = 2
# Which step a token is of is the slowest to be learned, and most questions need it.
WEIGHTS = AUXILIARY_WEIGHTS | {"slot": 0.4, "answer": 1.0}


class TextStage:
    """A text model in training. One `update` is one optimizer step; `state` and `restore` go on from where an earlier run was."""

    def __init__(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        tokenizer: PreTrainedTokenizerFast,
        encoded: EncodedVideos,
        seed: int = 0,
        adam_lr: float = 1e-3,
        muon_lr: float = 3e-3,
    ) -> None:
        self.model, self.encoded, self.tokenizer = model, encoded, tokenizer
        self.maker, self.rng = BatchMaker(tokenizer, encoded, LOOKS_PART), np.random.default_rng((STREAMS["training"], seed, 9))
        self.num_updates, self.accuracy = 0, dict[str, float]()
        model.model.visual.requires_grad_(False)
        self.device = model.lm_head.weight.device
        self.heads = AuxiliaryHeads(model.config.text_config.hidden_size, MAX_STEPS, ASKED_SIZES).to(self.device)
        layers = [parameter for parameter in model.model.language_model.layers.parameters() if parameter.ndim == 2]
        mine = set(map(id, layers))
        others = [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in mine]
        groups = [
            {"params": [one for one in others if one.ndim > 1], "weight_decay": 0.05, "base": adam_lr},
            {"params": [one for one in others if one.ndim == 1], "weight_decay": 0.0, "base": adam_lr},
            {"params": list(self.heads.parameters()), "weight_decay": 0.01, "base": 0.4 * adam_lr},
        ]
        self.learned = layers + others
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=adam_lr, betas=(0.9, 0.98)),
            torch.optim.Muon(
                [{"params": layers, "base": muon_lr}], lr=muon_lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
            ),
        ]  # fmt: skip

    def update(self, showing: Showing, decay: float = 1.0) -> dict[str, float]:
        """Losses by name. decay: of the learning rate, 1 to 0."""
        scale = min(1.0, (self.num_updates + 1) / WARM_UP) * decay
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base"] * scale
        batch = self._batch(showing)
        with torch.autocast(self.device.type, torch.bfloat16):
            losses = self._losses(batch, showing) if showing.num_turns else self._media_losses(batch)
        total = sum((WEIGHTS[name] * loss for name, loss in losses.items()), start=torch.zeros((), device=self.device))
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.learned, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.num_updates += 1
        return {name: value.item() for name, value in losses.items()}

    def _losses(self, batch: Batch, showing: Showing) -> dict[str, Tensor]:
        output = run_text(self.model, batch, self._masks(batch, showing))
        logits, wanted = answer_logits(self.model, batch, output.hidden)
        answer = mean_of_answers(F.cross_entropy(logits.float(), wanted, reduction="none"), batch)
        return {"answer": answer} | self.heads.losses(self.model, batch, output)

    def _media_losses(self, batch: Batch) -> dict[str, Tensor]:
        return self.heads.media_losses(batch, run_to_auxiliary_layer(self.model, batch))

    def _masks(self, batch: Batch, showing: Showing) -> Tensor | list[Tensor | None] | None:
        if showing.apart:
            return turns_apart_mask(batch)
        if showing.retrieve_keep < 1.0:
            return [retrieval_mask(batch, chosen) for chosen in retrieved(self.model, batch, showing.retrieve_keep)]
        return None

    def _batch(self, showing: Showing) -> Batch:
        rng = self.rng
        windows = [self.encoded.window(rng, showing.num_steps) for _ in range(showing.num_items)]
        # The less is right, the more often it is asked about.
        hard = tuple(kind for kind in KINDS for _ in range(round((MASTERED - self.accuracy.get(kind, 0.0)) / 10)))
        num_hard = showing.num_turns // 2 if hard else 0
        dialogues: list[list[SceneQuestion]] = []
        for window in windows:
            asked = window.questions(rng, showing.num_turns - num_hard, KINDS)
            asked += window.questions(rng, num_hard, hard) if hard else []
            dialogues.append([asked[i] for i in rng.permutation(len(asked))])
        return self.maker.batch(windows, dialogues, keep_salient(self.encoded, windows, showing.num_per_step))

    @torch.no_grad()
    def evaluate(self, held: EncodedVideos, showing: Showing, num_windows: int = 16, seed: int = 0) -> dict[str, float]:
        """Per cent of the answers that are right word for word, by kind and of all, about other videos."""
        rng, maker, right = np.random.default_rng(seed), BatchMaker(self.tokenizer, held), defaultdict[str, list[bool]](list)
        for first in range(0, num_windows, showing.num_items):
            windows = [held.window(rng, showing.num_steps) for _ in range(min(showing.num_items, num_windows - first))]
            dialogues = [window.questions(rng, showing.num_turns, KINDS) for window in windows]
            batch = maker.batch(windows, dialogues, keep_salient(held, windows, showing.num_per_step))
            with torch.autocast(self.device.type, torch.bfloat16):
                hidden = run_text(self.model, batch, self._masks(batch, showing)).hidden
                predicted = self.model.lm_head(hidden).argmax(-1)
            turns = batch.turns
            for number, question in enumerate(turns.questions):
                item, start, end = (int(rows[number]) for rows in (turns.item, turns.prompt_row, turns.end_row))
                said, wanted = predicted[item, start:end], batch.labels[item, start + 1 : end + 1]
                right[question.kind].append(torch.equal(said, wanted))
        every = [match for matches in right.values() for match in matches]
        accuracy = {kind: 100 * float(np.mean(matches)) for kind, matches in sorted(right.items())}
        return accuracy | {"all": 100 * float(np.mean(every))}

    @torch.no_grad()
    def recall(self, held: EncodedVideos, showing: Showing, num_windows: int = 16, seed: int = 0) -> dict[str, float]:
        """Per cent of the facts that visual tokens of other videos know, by fact and of all."""
        rng, maker, right = np.random.default_rng(seed), BatchMaker(self.tokenizer, held), defaultdict[str, list[Tensor]](list)
        for _ in range(num_windows):
            windows = [held.window(rng, showing.num_steps)]
            batch = maker.batch(windows, [[]], keep_salient(held, windows, showing.num_per_step))
            with torch.autocast(self.device.type, torch.bfloat16):
                read = self.heads.facts_read(batch, run_to_auxiliary_layer(self.model, batch))
            for name, matches in read.items():
                right[name].append(matches)
        known = {name: 100 * torch.cat(matches).float().mean().item() for name, matches in right.items()}
        return known | {"all": float(np.mean([*known.values()]))}

    def examine(self, held: EncodedVideos, showing: Showing) -> dict[str, float]:
        """`evaluate`, and ask more from now on about kinds of which too little was right; or `recall`, where nothing is asked."""
        if not showing.num_turns:
            return self.recall(held, showing)
        self.accuracy = self.evaluate(held, showing)
        return self.accuracy

    def state(self) -> dict[str, Any]:
        """All that `restore` needs to go on as if nothing had happened."""
        return {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "rng": self.rng.bit_generator.state,
            "num_updates": self.num_updates,
            "accuracy": self.accuracy,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.rng.bit_generator.state = state["rng"]
        self.num_updates, self.accuracy = state["num_updates"], dict(state["accuracy"])


def mean_of_answers(losses: Tensor, batch: Batch) -> Tensor:
    """A mean in which an answer counts by the root of its length: a listing is not worth forty colours.

    losses: one per token that is to be predicted, in the order of `answer_logits`.
    """
    turns = batch.turns
    first = torch.zeros_like(batch.labels)
    first[turns.item, turns.prompt_row] = 1
    # In row order, turns stand as they do in `turns`.
    turn = first.flatten().cumsum(0).reshape(first.shape)[:, :-1][batch.labels[:, 1:] != IGNORE] - 1
    weight = (turns.end_row - turns.prompt_row)[turn].float().rsqrt()
    return (losses * weight).sum() / weight.sum()
