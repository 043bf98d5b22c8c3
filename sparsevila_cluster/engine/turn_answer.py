"""The answer of one turn: its tokens, sampled or known from a replay, their text, and where it ends.

tokens:   [ replayed: known, not sent again )[ sampled: sent one by one ... ] end
"""

from __future__ import annotations

from sparsevila_cluster.core.errors import BadRequest
from sparsevila_cluster.core.requests import FinishReason, Turn
from sparsevila_cluster.engine.detokenizer import Detokenizer
from sparsevila_cluster.engine.sampling import Sampler
from sparsevila_cluster.models.adapter import Model


class TurnAnswer:
    """Tokens and text of one turn, and why they end."""

    def __init__(self, turn: Turn, model: Model):
        """Raises BadRequest: no answer to the turn begins with its replay."""
        self.sampler = Sampler(turn.sampling)
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._eos_ids = model.chat.eos_ids
        self._max_tokens = turn.sampling.max_tokens
        self._text = Detokenizer(model.chat.decode, turn.sampling.stop)
        self._replay = [] if turn.replay is None else list(turn.replay.token_ids)
        self._replay_finish: FinishReason | None = None
        if self._replay:
            assert model.text.embed_weight is not None, 'turns need the "embed" part'
            self._load_replay(len(model.text.embed_weight))

    def _load_replay(self, num_ids: int) -> None:
        """Bring text and sampler to where they were behind the replay. Its text was sent then, and is not needed."""
        for count, token in enumerate(self._replay, 1):
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < num_ids:
                raise BadRequest(f"token {count} of the replay must be in [0, {num_ids}), got {token!r}")
            if self._replay_finish is not None:
                raise BadRequest(
                    f"the replay has {len(self._replay)} tokens, but the answer ends with token {count - 1} ({self._replay_finish})"
                )
            _, self._replay_finish = self._detokenize(token, count)
        self.sampler.skip(len(self._replay))

    @property
    def num_known(self) -> int:
        """How many tokens of the answer are known without sampling."""
        return len(self._replay)

    def known_tokens(self, start: int, stop: int) -> list[int]:
        """Tokens [start, stop) of the answer, as far as they are known without sampling."""
        return self._replay[start:stop]

    def take_known(self, count: int) -> None:
        """Take known tokens until the answer has `count`."""
        self.tokens += self._replay[len(self.tokens) : count]
        if len(self.tokens) == len(self._replay):
            self.finish_reason = self._replay_finish

    def add(self, token: int) -> str:
        """Take a sampled token; the text that can be shown now."""
        self.tokens.append(token)
        text, self.finish_reason = self._detokenize(token, len(self.tokens))
        return text

    def flush(self) -> str:
        """The text that was held back until now. No more tokens will come."""
        return self._text.finish()

    def _detokenize(self, token: int, count: int) -> tuple[str, FinishReason | None]:
        """Text that the `count`-th token completes, and why the answer ends with it, if it does."""
        ends = token in self._eos_ids
        text = "" if ends else self._text.add(token)
        if ends or self._text.stopped:
            return text, FinishReason.STOP
        return text, FinishReason.LENGTH if count >= self._max_tokens else None
