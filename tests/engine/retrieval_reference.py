"""The reference for every way of retrieving: rows, normalisation, budgets by mass, refreshes.

It takes nothing about retrieval from the engine: it finds the question's words in the decoded tokens, reads eager attention
weights, ranks and cuts in float64 itself. A refresh is judged as the turn that it is: a question of one row, which is the decode
row, and from then on rows that see what that one row chose.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsevila_cluster.core.requests import kept_count
from tests.checkpoints.transformers_oracle import Oracle, Spoken


@dataclass(frozen=True)
class Way:
    """How one turn retrieves."""

    keep: float = 1.0
    mass: float | None = None
    refresh_every: int = 0
    rows: str = "all"
    normalise: str = "full_row"


class RetrievalOracle(Oracle):
    """Judges conversations whose turns retrieve in ways of their own. After `logits`, `counts` says how many visual tokens each
    choice took, per turn."""

    def __init__(self, stock, model, inputs, plan, keep, decode):
        super().__init__(stock, model, inputs, plan, keep)
        self._decode = decode

    def logits(self, turns: list[Spoken], ways: list[Way], questions: list[str]) -> list[torch.Tensor]:
        ids, real = self._layout(turns)
        spans: list[tuple[int, int]] = []
        chosen: list[torch.Tensor] = []
        self.counts: list[list[int]] = []
        for spoken, (start, stop), way, question in zip(turns, real, ways, questions, strict=True):
            spans.append((start, stop))
            rows = self._scoring_rows(spoken, start, stop, way, question)
            chosen.append(self._choose(ids, spans, chosen, rows, way))
            self.counts.append([self._count(chosen[-1])])
            # Decode row i (i = 1 ...) holds token i - 1; it is the i-th row after the question.
            for i in range(1, len(spoken.tokens)):
                if way.refresh_every and i % way.refresh_every == 0:
                    row = stop + i - 1
                    spans.append((row, row + 1))
                    chosen.append(self._choose(ids, spans, chosen, [row], way))
                    self.counts[-1].append(self._count(chosen[-1]))
        out = self._forward(ids, spans, chosen)
        return [out.logits[0, stop - 1 : stop - 1 + len(spoken.tokens)] for spoken, (_, stop) in zip(turns, real, strict=True)]

    def _scoring_rows(self, spoken: Spoken, start: int, stop: int, way: Way, question: str) -> list[int]:
        if way.rows == "all":
            return list(range(start, stop))
        if way.rows == "last":
            return [stop - 1]
        ids, found = spoken.question_ids, []
        for i in range(len(ids)):
            for j in range(i + 1, len(ids) + 1):
                if question in self._decode(ids[i:j]):
                    found.append((j - i, -i))
        length, i = min(found)  # the shortest run of tokens whose text holds the question
        return list(range(start - i, start - i + length))

    def _choose(self, ids, spans, chosen, rows: list[int], way: Way) -> torch.Tensor:
        """bool [L, T]: kept columns that the rows after the last span may see."""
        out = self._forward(ids[: spans[-1][1]], spans, chosen, attentions=True)
        layers = []
        for weights in out.attentions:
            seen = weights[0].double()[:, rows][:, :, self.kept_columns]
            if way.normalise == "visual":
                seen = seen / seen.sum(-1, keepdim=True)
            layers.append(seen.mean((0, 1)))
        most = count = kept_count(way.keep, len(self.kept_columns))
        if way.mass is not None:
            count = min(most, max(smallest_set(mass.tolist(), way.mass) for mass in layers))
        allowed = torch.zeros(len(layers), len(self.plan.ids), dtype=torch.bool)
        for layer, mass in enumerate(layers):
            best = sorted(range(len(mass)), key=lambda j: -mass[j])[:count]
            allowed[layer, self.kept_columns[best]] = True
        return allowed

    @staticmethod
    def _count(allowed: torch.Tensor) -> int:
        return int(allowed[0].sum())


def smallest_set(mass: list[float], share: float) -> int:
    """How many of the largest numbers reach this share of the sum."""
    held, total = 0.0, sum(mass)
    for count, part in enumerate(sorted(mass, reverse=True), 1):
        held += part
        if held >= share * total:
            return count
    return len(mass)
