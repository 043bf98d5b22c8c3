"""What of a turn is done before an engine's thread is needed: sizes checked, the question tokenised, a replay detokenised.

All of it grows with what a client sent, and belongs in a thread of its own: the engine's serves everybody.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsevila_cluster.core.config import EngineConfig
from sparsevila_cluster.core.errors import TooLarge
from sparsevila_cluster.core.requests import Turn, check_size
from sparsevila_cluster.engine.turn_answer import TurnAnswer
from sparsevila_cluster.models.adapter import Model


@dataclass(frozen=True)
class PreparedTurn:
    """The answer of a turn as far as a replay knows it, and its question's tokens as a first turn and as a later one.

    first, later: (ids, start, stop), as `ChatFormat.question_ids` returns them without a pending token.
    """

    answer: TurnAnswer
    first: tuple[list[int], int, int]
    later: tuple[list[int], int, int]

    @classmethod
    def of(cls, turn: Turn, model: Model, config: EngineConfig) -> PreparedTurn:
        """Prepare a turn. From any thread.

        Raises:
            BadRequest: a size that the configuration does not allow, a control token in the question, a replay that no answer
            begins with. TooLarge: a question of too many tokens, or a replay of an answer that the model has no positions for.
        """
        check_size(turn, config)
        if turn.replay is not None and turn.sampling.max_tokens > model.max_position:
            raise TooLarge(f"max_tokens={turn.sampling.max_tokens} is over the model's {model.max_position} positions")
        first, later = (model.chat.question_ids(turn.question, is_first, pending=None) for is_first in (True, False))
        num_tokens = first[2] - first[1]
        if num_tokens > config.max_question_tokens:
            raise TooLarge(f"the question has {num_tokens} tokens; the limit is {config.max_question_tokens}")
        return cls(TurnAnswer(turn, model), first, later)

    def question_ids(self, first: bool, pending: int | None) -> tuple[list[int], int, int]:
        """(ids, start, stop) behind the media prefix, or behind an answer whose last token `pending` has no KV yet.

        pending: None also where the template writes that token.
        """
        ids, start, stop = self.first if first else self.later
        if first or pending is None:
            return ids, start, stop
        return [pending, *ids], start + 1, stop + 1
