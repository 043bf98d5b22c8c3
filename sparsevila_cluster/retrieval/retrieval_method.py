"""What a retrieval method is given, and what it must be: a frozen dataclass with one function on tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor


@dataclass(frozen=True)
class RetrievalInput:
    """The n visual tokens of a media prefix, of which a turn attends to k in each of L layers.

    scores f32 [L, n]: the mean attention that each token received from the turn's rows; zeros unless the method needs "scores" or
        the turn wants evidence.
    keys: layer -> keys k [n, Hkv, D], after RoPE, in the order of the tokens; copied from the prefix on every call.
    positions i64 [R, n]: where the tokens stand (R = 3 for M-RoPE, else 1), as the keys are rotated.
    groups i32 [n]: the frame or view of each token, counted over all media of the prefix.
    turn: how many turns the conversation had before this one.
    num_tokens: tokens of the answer so far: 0 where the question has just been read, more at a refresh.
    """

    scores: Tensor
    keys: Callable[[int], Tensor]
    positions: Tensor
    groups: Tensor
    turn: int = 0
    num_tokens: int = 0


class RetrievalMethod(Protocol):
    """A frozen dataclass. Its fields `fraction`, `mass` and `seed`, if it has them, come from the turn or the configuration.

    needs: {"scores"} if it reads them; they are computed while the question is prefilled, and cost nothing where nobody needs them.
    """

    needs: ClassVar[frozenset[str]]

    def budget(self, total: int) -> int:
        """Most tokens per layer that `select` may take of `total`: room is reserved for as many before anything is scored."""
        ...

    def select(self, tokens: RetrievalInput) -> Tensor | None:
        """Indices i64 [L, k] of the tokens to attend to, ascending in each layer, k the same in all; None for all tokens."""
        ...
