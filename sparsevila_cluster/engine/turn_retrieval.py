"""Which visual KV one turn attends to: chosen after its question, again every so many tokens if it wishes, and packed.

question rows -> scores -> chosen rows -> packed KV
every `refresh_every` tokens: one decode row over the whole prefix -> scores -> chosen rows -> packed KV, written anew
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sparsevila_cluster.attention.interface import Capture, Span
from sparsevila_cluster.core.config import SparsityConfig
from sparsevila_cluster.core.evidence import Evidence
from sparsevila_cluster.core.requests import Turn
from sparsevila_cluster.engine.attention_evidence import build_evidence
from sparsevila_cluster.kvcache.arena import Extent
from sparsevila_cluster.kvcache.prefix import MediaPrefix
from sparsevila_cluster.retrieval.budget import budget_of
from sparsevila_cluster.retrieval.retrieval_method import RetrievalInput
from sparsevila_kernels import kv_pack


class TurnRetrieval:
    """The retrieval of one turn: its budget, its scores and the rows of the prefix that it chose."""

    def __init__(self, turn: Turn, prefix: MediaPrefix, sparsity: SparsityConfig, attention: Literal["torch", "triton"]):
        """attention: how rows are copied, too. Raises BadRequest if the turn asks for what the configured policy cannot do."""
        self._prefix, self._sparsity, self._attention = prefix, sparsity, attention
        self._wanted = budget_of(turn, sparsity, prefix.metadata.kind)
        self._want_evidence = turn.want_evidence
        self._chosen: Tensor | None = None
        self._rows: Tensor | None = None
        self._spans: list[Span] = []
        self.num_retrieved = 0
        self.degraded = False
        self.start(0.0)

    def start(self, brownout: float) -> None:
        """Fix the budget: the turn starts under this level of pressure and keeps it to its end."""
        self.brownout = brownout
        self._budget = self._wanted.lowered(brownout, self._sparsity.brownout_floor)
        self._method = self._budget.method()

    # ---- room --------------------------------------------------------------------------------------------------------------

    @property
    def most_rows(self) -> int:
        """Rows of packed KV at most; 0 if the turn attends to the whole prefix whatever it scores."""
        kept = self._prefix.num_kept
        most = self._method.budget(kept)
        # A mass that may take everything may also take one token less, and then needs more room than everything does.
        return self._packed_rows(most if self._budget.mass is None or most < kept else max(kept - 1, 0))

    @property
    def rows(self) -> int:
        """Rows of packed KV that what was chosen needs."""
        return self._packed_rows(self.num_retrieved)

    def _packed_rows(self, count: int) -> int:
        return 0 if count == self._prefix.num_kept else count + len(self._prefix.other_index)

    def whole(self) -> list[Span]:
        """The whole prefix, per layer."""
        if not self._spans:
            self._spans = self._prefix.extent.spans()
        return self._spans

    def pack(self, extent: Extent | None) -> list[Span]:
        """Copy the chosen rows, and all rows that are not visual, into contiguous memory; what the turn attends to, per layer."""
        if extent is None:
            return self.whole()
        assert self._rows is not None
        whole = self._prefix.extent
        if self._attention == "triton":
            source, target = whole.arena, extent.arena
            slots = torch.arange(extent.start, extent.stop, device=self._rows.device)
            arenas = (source.k_all, source.v_all, target.k_all, target.v_all)
            kv_pack(*arenas, self._rows + whole.start, slots, backend="triton")
            return extent.spans()
        for layer, index in enumerate(self._rows):
            for source_rows, target_rows in zip(whole.rows(layer), extent.rows(layer), strict=True):
                torch.index_select(source_rows, 0, index, out=target_rows)
        return extent.spans()

    # ---- scores ------------------------------------------------------------------------------------------------------------

    def capture_question(self, num_rows: int, question_span: tuple[int, int]) -> Capture | None:
        """What to keep from the attention of a question of `num_rows`, whose own tokens are the rows [question_span)."""
        if not ("scores" in self._method.needs or self._want_evidence):
            return None
        rows = {"all": (0, num_rows), "question": question_span, "last": (num_rows - 1, num_rows)}[self._sparsity.retrieve_rows]
        return Capture(self._prefix.visual_index, *rows, self._sparsity.normalise)

    def capture_row(self) -> Capture:
        """What to keep from the attention of one decode row."""
        return Capture(self._prefix.visual_index, 0, 1, self._sparsity.normalise)

    def refreshes_at(self, num_tokens: int) -> bool:
        """Whether the decode row that follows on `num_tokens` tokens attends to everything and chooses anew."""
        every = self._budget.refresh_every
        return every > 0 and num_tokens % every == 0 and self.most_rows > 0

    def choose(self, capture: Capture | None, turn: int, num_tokens: int) -> Tensor:
        """Decide on the rows to attend to from now on. Returns the scores f32 [L, n], all zero where nothing was captured.

        turn: turns that the conversation had before this one; num_tokens: tokens of the answer so far.
        """
        prefix = self._prefix
        if capture is not None:
            scores = capture.scores()
        else:
            scores = torch.zeros(prefix.spec.num_layers, prefix.num_kept, device=prefix.visual_index.device)
        given = RetrievalInput(
            scores=scores,
            keys=lambda layer: prefix.extent.rows(layer)[0].index_select(0, prefix.visual_index),
            positions=prefix.metadata.positions[:, prefix.visual_index],
            groups=prefix.metadata.token_map[prefix.visual_index, 0],
            turn=turn,
            num_tokens=num_tokens,
        )
        self._chosen = self._method.select(given)
        self.num_retrieved = self._count(self._chosen)
        if self._budget != self._wanted:
            self.degraded |= self.num_retrieved < self._count(self._wanted.method().select(given))
        if self.rows:
            assert self._chosen is not None, "a method that takes everything needs no rows of its own"
            others = prefix.other_index.expand(len(self._chosen), -1)
            self._rows = torch.cat([prefix.visual_index[self._chosen], others], 1).sort(1).values
        return scores

    def _count(self, chosen: Tensor | None) -> int:
        return self._prefix.num_kept if chosen is None else chosen.shape[1]

    def evidence(self, scores: Tensor) -> Evidence:
        """Where the rows that gave `scores` looked, among what was chosen from them."""
        return build_evidence(self._prefix, scores, self._chosen)
