"""How well a model answers, dense and sparse: a batched monitor for training."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from sparsevila_cluster.demo.dialogue_batches import Batch, BatchBuilder, keep_glyphs, keep_random, keep_salient
from sparsevila_cluster.demo.step_dataset import ComposedVideo, StepDataset
from sparsevila_cluster.demo.training_forward import retrieval_mask, retrieved, run_text, turns_apart_mask
from sparsevila_cluster.demo.world import Question, make_questions

SEVERAL_WORDS = ("when", "where", "at", "describe")


@dataclass(frozen=True)
class View:
    """What the text model gets to see. Ratios are the fraction kept."""

    prune: Literal["none", "salient", "random", "glyphs"] = "none"
    prune_keep: float = 1.0
    retrieve: Literal["all", "attention", "random"] = "all"
    retrieve_keep: float = 1.0


DENSE = View()
SPARSE = View("salient", 0.25, "attention", 0.10)
VIEWS = {
    "dense": DENSE,
    "salient 0.25": View("salient", 0.25),
    "retrieve 0.10": View(retrieve="attention", retrieve_keep=0.10),
    "salient 0.25, retrieve 0.10": SPARSE,
    "salient 0.10": View("salient", 0.10),
    "random 0.25": View("random", 0.25),
    "salient 0.25, random retrieve 0.10": View("salient", 0.25, "random", 0.10),
    "random 0.25, random retrieve 0.10": View("random", 0.25, "random", 0.10),
}


class Evaluator:
    """Asks a model fixed questions about a fixed dataset of videos."""

    def __init__(self, dataset: StepDataset, builder: BatchBuilder, seed: int = 4242, num_turns: int = 8) -> None:
        self.dataset, self.builder, self.seed, self.num_turns = dataset, builder, seed, num_turns

    def _dialogues(self, num_steps: int, num_videos: int) -> list[tuple[ComposedVideo, list[Question]]]:
        rng = np.random.default_rng(self.seed)
        dialogues = []
        for video in range(num_videos):
            whole = num_steps == self.dataset.steps_per_video
            shown = self.dataset.whole(video) if whole else self.dataset.compose(rng, num_steps, self.dataset.steps_per_video)
            dialogues.append((shown, make_questions(shown.scene, rng, self.num_turns, steps=shown.slots)))
        return dialogues

    def _kept(self, shown: list[ComposedVideo], view: View, rng: np.random.Generator) -> Tensor | None:
        if view.prune == "salient":
            return keep_salient(self.dataset, shown, view.prune_keep)
        if view.prune == "random":
            return keep_random(shown, view.prune_keep, rng)
        if view.prune == "glyphs":
            return keep_glyphs(self.dataset, shown, view.prune_keep, rng)
        return None

    @torch.no_grad()
    def evaluate(
        self,
        model: Qwen2_5_VLForConditionalGeneration,
        view: View = DENSE,
        num_steps: int = 8,
        num_videos: int | None = None,
        turns_apart: bool = False,
        batch_size: int = 8,
    ) -> dict[str, float]:
        """Percent of answers that match word for word: by kind, of the kinds of several words, and of all.

        `turns_apart`: turns do not see each other, as in the first stage of the curriculum.
        """
        right: dict[str, list[bool]] = defaultdict(list)
        rng = np.random.default_rng(self.seed + 1)
        items = self._dialogues(num_steps, min(num_videos or self.dataset.num_videos, self.dataset.num_videos))
        for first in range(0, len(items), batch_size):
            shown, dialogues = map(list, zip(*items[first : first + batch_size], strict=True))
            batch = self.builder.batch(self.dataset, shown, dialogues, self._kept(shown, view, rng))
            masks = turns_apart_mask(batch) if turns_apart else self._masks(model, batch, view, rng)
            for kind, match in self._answers(model, batch, masks):
                right[kind].append(match)
        accuracy = {kind: 100 * float(np.mean(matches)) for kind, matches in sorted(right.items())}
        several = [match for kind in SEVERAL_WORDS for match in right.get(kind, [])]
        total = [match for matches in right.values() for match in matches]
        accuracy |= {"several_words": 100 * float(np.mean(several or [False])), "all": 100 * float(np.mean(total))}
        return {name: round(percent, 1) for name, percent in accuracy.items()} | {"num_questions": len(total)}

    @staticmethod
    def _masks(
        model: Qwen2_5_VLForConditionalGeneration, batch: Batch, view: View, rng: np.random.Generator
    ) -> list[Tensor | None] | None:
        if view.retrieve == "attention":
            return [retrieval_mask(batch, chosen) for chosen in retrieved(model, batch, view.retrieve_keep)]
        if view.retrieve == "all":
            return None
        masks: list[Tensor | None] = []
        for _ in model.model.language_model.layers:
            scores = torch.from_numpy(rng.random(tuple(batch.turns.targets.shape), np.float32))
            best = scores.topk(max(1, round(view.retrieve_keep * scores.shape[1])), 1).indices
            retrieved_tokens = torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True)
            masks.append(retrieval_mask(batch, retrieved_tokens.to(batch.labels.device)))
        return masks

    @staticmethod
    def _answers(
        model: Qwen2_5_VLForConditionalGeneration, batch: Batch, masks: Tensor | list[Tensor | None] | None
    ) -> list[tuple[str, bool]]:
        predicted = model.lm_head(run_text(model, batch, masks).hidden).argmax(-1)
        turns, matches = batch.turns, []
        for number, question in enumerate(turns.questions):
            item, start, end = (int(rows[number]) for rows in (turns.item, turns.prompt_row, turns.end_row))
            match = bool((predicted[item, start:end] == batch.labels[item, start + 1 : end + 1]).all())
            matches.append((question.kind, match))
        return matches
