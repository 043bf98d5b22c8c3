"""Conversations as one router knows them: where each one is, how far it has come, and whose turn it is.

Knows: the token that clients hold (`base.worker.epoch`), and that turns of one conversation come one after the other. Does not
know: what was said (the registry keeps that), or how workers are asked. What is forgotten here is found again by the token and in
the registry.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from dataclasses import dataclass, field

from sparsevila_cluster.cluster.recent import Recent
from sparsevila_cluster.errors import BadRequest, NotFound
from sparsevila_cluster.request import Turn, TurnRecord

_BASE = re.compile(r"[0-9a-f]{32}")
_EPOCH = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True)
class Token:
    """What a client is told: the conversation, the worker where it went on last, how often it moved."""

    base: str
    worker: str = ""
    epoch: int = 0

    def __str__(self) -> str:
        return f"{self.base}.{self.worker}.{self.epoch}"

    @classmethod
    def parse(cls, text: str) -> Token:
        """From what a client sent. What stands behind the base is a hint and may be anything.

        Raises:
            NotFound: no conversation was ever named so.
        """
        base, _, rest = text.partition(".")
        worker, _, epoch = rest.rpartition(".")
        if not _BASE.fullmatch(base):
            raise NotFound(f"conversation {text[:100]!r} is unknown")
        return cls(base, worker, int(epoch) if _EPOCH.fullmatch(epoch) else 0)


@dataclass
class Head:
    """Where a conversation stands. worker: where it is, "" if nowhere yet. known: num_turns and the rest are more than a guess.

    unrecorded: (number, record) of turns that the registry was not there to take.
    """

    base: str
    media_id: str = ""
    tenant: str = ""
    worker: str = ""
    epoch: int = 0
    num_turns: int = 0
    last_turn_id: str = ""
    known: bool = False
    unrecorded: list[tuple[int, TurnRecord]] = field(default_factory=list)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def token(self) -> str:
        return str(Token(self.base, self.worker, self.epoch))

    def moves_to(self, worker: str) -> None:
        """The next turn runs there."""
        if self.worker and self.worker != worker:
            self.epoch += 1
        self.worker = worker

    def check(self, turn: Turn) -> None:
        """Raises NotFound: it is another tenant's, which looks as if there was none. BadRequest: it is about another media."""
        if self.tenant not in ("", turn.tenant):
            raise NotFound(f"conversation {turn.conversation_id!r} is unknown")
        if turn.media_id and self.media_id != turn.media_id:
            raise BadRequest(f"conversation {turn.conversation_id!r} is about another media than {turn.media_id!r}")


class Conversations:
    """Used within one event loop. The least recently used are forgotten beyond `most`."""

    def __init__(self, most: int):
        self._heads: Recent[Head] = Recent(most)

    def __len__(self) -> int:
        return len(self._heads)

    def open(self, turn: Turn) -> Head:
        """A new conversation."""
        head = Head(uuid.uuid4().hex, turn.media_id, turn.tenant, known=True)
        self._heads.put(head.base, head)
        return head

    def head(self, token: Token) -> Head:
        """The conversation of a token; a guess by the token alone if it is not known here."""
        head = self._heads.use(token.base)
        if head is None:
            head = Head(token.base, worker=token.worker, epoch=token.epoch)
            self._heads.put(head.base, head)
        return head

    def find(self, token: Token) -> Head | None:
        """The conversation of a token if it is known here."""
        return self._heads.get(token.base)

    def forget(self, base: str) -> None:
        self._heads.pop(base, None)
