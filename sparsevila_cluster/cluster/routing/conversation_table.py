"""Conversations as one router knows them: where each one is, how far it has come, and whose turn it is.

Clients hold a token, `base.worker.epoch`. The epoch is `moves-turns`: how often the conversation went on at another worker, and how
many turns it had behind it when the token was given. By it a router that never heard of the conversation can tell whether a worker,
or the directory, is behind what the client has seen. What is forgotten here is found again by the token and in the directory.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from sparsevila_cluster.cluster.messages import turn_identities
from sparsevila_cluster.core.errors import BadRequest, NotFound
from sparsevila_cluster.core.lru_dict import SharedLRUDict
from sparsevila_cluster.core.requests import Turn, TurnRecord
from sparsevila_cluster.core.tenancy import may_use

_BASE = re.compile(r"[0-9a-f]{32}")
_EPOCH = re.compile(r"([0-9]{1,9})-([0-9]{1,9})")


@dataclass(frozen=True)
class ConversationToken:
    """What a client is told: the conversation, the worker where it went on last, how often it moved, how many turns it had."""

    base: str
    worker: str = ""
    moves: int = 0
    num_turns: int = 0

    def __str__(self) -> str:
        return f"{self.base}.{self.worker}.{self.moves}-{self.num_turns}"

    @classmethod
    def parse(cls, text: str) -> ConversationToken:
        """From what a client sent. What follows the base is a hint and may be anything.

        Raises:
            NotFound: no conversation ever had such an id.
        """
        base, _, rest = text.partition(".")
        worker, _, epoch = rest.rpartition(".")
        known = _EPOCH.fullmatch(epoch)
        if not _BASE.fullmatch(base):
            raise NotFound(f"conversation {text[:100]!r} is unknown")
        return cls(base, worker, int(known[1]), int(known[2])) if known is not None else cls(base, worker)


@dataclass
class ConversationState:
    """Where a conversation stands. worker: where it is, "" if nowhere yet. known: it is more than what a token says. last_turn_id:
    of its last finished turn, "" if that is not known.

    unrecorded: (number, record) of turns that the directory has not taken yet; recording: held while it is told. late: a background
    task goes on telling it. lock: held by the turn that runs.
    """

    base: str
    media_id: str = ""
    tenant: str = ""
    worker: str = ""
    moves: int = 0
    num_turns: int = 0
    last_turn_id: str = ""
    known: bool = False
    unrecorded: list[tuple[int, TurnRecord]] = field(default_factory=list)
    recording: asyncio.Lock = field(default_factory=asyncio.Lock)
    late: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def token(self) -> str:
        """What its client is told to go on with."""
        return str(ConversationToken(self.base, self.worker, self.moves, self.num_turns))

    def move_to(self, worker: str) -> None:
        """The next turn runs there."""
        if self.worker and self.worker != worker:
            self.moves += 1
        self.worker = worker

    def catch_up(self, token: ConversationToken) -> None:
        """A client has seen it further than it is known here: another router took turns of it."""
        if token.num_turns > self.num_turns:
            self.worker, self.moves, self.num_turns, self.last_turn_id = token.worker, token.moves, token.num_turns, ""

    def with_unrecorded(self, records: Sequence[TurnRecord]) -> list[TurnRecord]:
        """`records` of the directory, and the turns that it has not taken yet."""
        merged = list(records)
        for number, record in self.unrecorded:
            if number <= len(merged) and turn_identities(merged[number : number + 1]) != turn_identities([record]):
                merged[number:] = [record]
        return merged

    def is_covered_by(self, records: Sequence[TurnRecord]) -> bool:
        """Whether these are the turns that ended here, or more: as many may be others, of a worker that was out of reach."""
        if len(records) < self.num_turns:
            return False
        return not self.num_turns or self.last_turn_id in ("", records[self.num_turns - 1].turn.turn_id)

    def check(self, turn: Turn) -> None:
        """Raises NotFound: it is another tenant's, which looks as if there was none. BadRequest: it is about another media."""
        if not may_use(self.tenant, turn.tenant):
            raise NotFound(f"conversation {turn.conversation_id!r} is unknown")
        if turn.media_id and self.media_id != turn.media_id:
            raise BadRequest(f"conversation {turn.conversation_id!r} is about another media than {turn.media_id!r}")


class ConversationTable:
    """The conversations of one router; beyond `most` the least recently used are forgotten, first of a tenant that has more than
    `max_share` of them. Used within one event loop.

    Each tenant has its own view: what one claims of a conversation that is not known here yet, no other sees.
    """

    def __init__(self, most: int, max_share: float):
        self._states: SharedLRUDict[ConversationState] = SharedLRUDict(most, max_share)

    def __len__(self) -> int:
        return len(self._states)

    def open(self, turn: Turn) -> ConversationState:
        """A new conversation."""
        state = ConversationState(uuid.uuid4().hex, turn.media_id, turn.tenant, known=True)
        self._states.put(_name(state.base, turn.tenant), state, turn.tenant)
        return state

    def state_of(self, token: ConversationToken, tenant: str) -> ConversationState:
        """The conversation of a token; a guess by the token alone if it is not known here."""
        state = self.find(token, tenant)
        if state is None:
            state = ConversationState(token.base, worker=token.worker, moves=token.moves, num_turns=token.num_turns)
            self._states.put(_name(token.base, tenant), state, tenant)
        return state

    def find(self, token: ConversationToken, tenant: str) -> ConversationState | None:
        """The conversation of a token if it is known here."""
        return self._states.use(_name(token.base, tenant))

    def forget(self, base: str, tenant: str) -> None:
        """A conversation was closed, or never began."""
        self._states.pop(_name(base, tenant))


def _name(base: str, tenant: str) -> str:
    return f"{base}/{tenant}"
