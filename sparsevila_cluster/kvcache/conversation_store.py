"""Conversations on media prefixes: the KV of their text (their tails), and who may keep it in the arena.

The tail is stored once: packed KV never contains it. When running turns need room, the tails of conversations that do not run
are parked outside the arena, in host memory, least recently used first, and come back unchanged with their next turn. Parked tails
have a budget of their own: beyond it the least recently used idle conversation is closed, to be made again from its text.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from sparsevila_cluster.kvcache.arena import Arena, Extent

# Tails grow in steps of this many slots, so that a turn that needs a few more rows rarely has to move.
ROUND_SLOTS = 32


@dataclass(eq=False)
class Conversation:
    """Text of one user on one media prefix.

    length: rows of the tail that belong to finished turns; written: rows that hold KV, those of a turn that is under way
    included; next_pos: position of the next row; pending: the last sampled token, which has no KV yet and is prefilled with the
    next question; tenant: who alone may go on with it, "" = everybody; parked: keys and values [L, written, Hkv, D] of a tail that
    lies outside the arena. A turn changes all but `written` only when it ends well, so
    that a turn that is aborted or fails leaves the conversation as it was.
    """

    conversation_id: str
    media_id: str
    next_pos: int
    length: int = 0
    written: int = 0
    pending: int | None = None
    num_turns: int = 0
    tenant: str = ""
    extent: Extent | None = None
    parked: tuple[Tensor, Tensor] | None = field(default=None, repr=False)


@dataclass(eq=False)
class Room:
    """What a running turn may write to: its conversation's tail, and packed KV (None when it attends to the whole prefix)."""

    tail: Extent
    packed: Extent | None


def _rounded(rows: int) -> int:
    return -(-rows // ROUND_SLOTS) * ROUND_SLOTS


class ConversationStore:
    """All conversations of one engine and the arena of running turns (tails and packed KV). Not thread-safe."""

    def __init__(self, arena: Arena, max_conversations: int, parked_budget_bytes: int):
        """parked_budget_bytes: of tails outside the arena; only those of turns that wait may exceed it."""
        self.arena = arena
        self.max_conversations = max_conversations
        self.parked_budget_bytes = parked_budget_bytes
        self.parked_bytes = 0
        self._all: OrderedDict[str, Conversation] = OrderedDict()
        self._busy: dict[str, int] = {}
        self._rooms: dict[str, Room] = {}
        self._refused: tuple[str, int, int, int] | None = None
        self._num_left = 0
        self.num_parked = 0
        self.num_closed_parked = 0

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __len__(self) -> int:
        return len(self._all)

    def num_of(self, tenant: str) -> int:
        """Conversations of one tenant."""
        return sum(conversation.tenant == tenant for conversation in self._all.values())

    def get(self, conversation_id: str) -> Conversation | None:
        """The conversation, marked as just used; None if it is unknown."""
        conversation = self._all.get(conversation_id)
        if conversation is not None:
            self._all.move_to_end(conversation_id)
        return conversation

    def open(self, conversation_id: str, media_id: str, next_pos: int, tenant: str = "") -> Conversation:
        """A new conversation; the least recently used idle one is closed if there are too many."""
        assert conversation_id not in self._all, conversation_id
        idle = (c for c in list(self._all) if not self._busy.get(c))
        while len(self._all) >= self.max_conversations and (victim := next(idle, None)) is not None:
            self.close(victim)
        conversation = Conversation(conversation_id, media_id, next_pos, tenant=tenant)
        self._all[conversation_id] = conversation
        return conversation

    def close(self, conversation_id: str) -> bool:
        """Forget a conversation and free its tail. False if it is unknown or a turn of it is still there."""
        if self._busy.get(conversation_id) or conversation_id not in self._all:
            return False
        conversation = self._all.pop(conversation_id)
        if conversation.extent is not None:
            self.arena.free(conversation.extent)
        self._unpark(conversation)
        return True

    def busy(self, conversation_id: str) -> bool:
        """Whether a turn of it waits or runs."""
        return conversation_id in self._busy

    def enter(self, conversation: Conversation) -> None:
        """A turn waits or runs: the conversation may not be closed until it leaves."""
        self._busy[conversation.conversation_id] = self._busy.get(conversation.conversation_id, 0) + 1

    def leave(self, conversation: Conversation) -> None:
        """A turn that entered is over."""
        count = self._busy[conversation.conversation_id] - 1
        if count:
            self._busy[conversation.conversation_id] = count
        else:
            del self._busy[conversation.conversation_id]
            self._close_parked()

    # ---- room of running turns ---------------------------------------------------------------------------------------------

    def fits_ever(self, tail_rows: int, packed_rows: int) -> bool:
        """Whether a turn of this size could run if it were alone."""
        return _rounded(tail_rows) + packed_rows <= self.arena.num_slots

    def take(self, conversation: Conversation, tail_rows: int, packed_rows: int) -> Room | None:
        """Room for a turn that starts or goes on: a tail of at least `tail_rows` and packed KV of `packed_rows` (0 = none).

        Parks idle tails as needed. None when there is no room now. At most one turn of a conversation has room at a time.
        """
        assert conversation.conversation_id not in self._rooms, conversation
        # The first in line asks before every step: as long as nobody has left and no slot has come free, the answer is the same.
        wish = (conversation.conversation_id, tail_rows, packed_rows, self._num_left + self.arena.num_freed)
        if wish == self._refused:
            return None
        room = self._try_take(conversation, tail_rows, packed_rows)
        if room is None:
            # Idle tails, the conversation's own among them, may lie where they leave no run that is long enough.
            for idle in list(self._all.values()):
                self._park(idle)
            room = self._try_take(conversation, tail_rows, packed_rows)
        if room is None:
            self._refused = (*wish[:3], self._num_left + self.arena.num_freed)
        else:
            self._rooms[conversation.conversation_id] = room
        return room

    def resize(self, conversation: Conversation, tail_rows: int, packed_rows: int) -> bool:
        """Give a running turn a tail of at least `tail_rows` and packed KV of `packed_rows`. False if there is no room now.

        Rows of the tail that hold KV are kept, wherever it moves. What packed KV held is lost if it has to grow, and it is gone
        when this returns False.
        """
        room = self._rooms[conversation.conversation_id]
        return self._resize_packed(room, conversation, packed_rows) and self._resize_tail(room, conversation, tail_rows)

    def give_back(self, conversation: Conversation) -> None:
        """The conversation's turn stops running: its packed KV is freed, its tail may be parked. Harmless when repeated."""
        room = self._rooms.pop(conversation.conversation_id, None)
        self._num_left += room is not None
        if room is not None and room.packed is not None:
            self.arena.free(room.packed)

    def _try_take(self, conversation: Conversation, tail_rows: int, packed_rows: int) -> Room | None:
        packed = self._alloc(packed_rows, conversation) if packed_rows else None
        if packed_rows and packed is None:
            return None
        if conversation.extent is None or conversation.extent.length < tail_rows:
            extent = self._alloc(_rounded(tail_rows), conversation)
            if extent is None:
                if packed is not None:
                    self.arena.free(packed)
                return None
            self._move(conversation, extent)
        assert conversation.extent is not None
        return Room(conversation.extent, packed)

    def _resize_packed(self, room: Room, conversation: Conversation, rows: int) -> bool:
        if rows and room.packed is not None and self.arena.resize(room.packed, rows):
            return True
        if room.packed is not None:
            self.arena.free(room.packed)
        room.packed = self._alloc(rows, conversation) if rows else None
        return room.packed is not None or not rows

    def _resize_tail(self, room: Room, conversation: Conversation, rows: int) -> bool:
        tail = room.tail
        if tail.length >= rows or self.arena.resize(tail, _rounded(rows)):
            return True
        extent = self._alloc(_rounded(rows), conversation)
        if extent is None:
            # Out and in again: the slots that the tail lies on may be what the longer one lacks.
            length = tail.length
            self._park(conversation, running=True)
            grown = self.arena.alloc(_rounded(rows))
            extent = grown or self.arena.alloc(length)
            assert extent is not None, "the slots that were just freed"
            room.tail = extent
            self._move(conversation, extent)
            return grown is not None
        self._move(conversation, extent)
        room.tail = extent
        return True

    def _alloc(self, rows: int, conversation: Conversation) -> Extent | None:
        """An extent, for which idle tails of other conversations are parked one by one."""
        extent = self.arena.alloc(rows)
        for idle in list(self._all.values()):
            if extent is not None:
                break
            if idle is not conversation and self._park(idle):
                extent = self.arena.alloc(rows)
        return extent

    def _park(self, conversation: Conversation, running: bool = False) -> bool:
        """Move a tail out of the arena; rows that hold no KV are dropped. False if it is not there, or is a running turn's."""
        extent, rows = conversation.extent, conversation.written
        if extent is None or (conversation.conversation_id in self._rooms and not running):
            return False
        k, v = (tail[:, :rows].to("cpu", copy=True) for tail in extent.all_rows())
        conversation.parked = k, v
        conversation.extent = None
        self.arena.free(extent)
        self.num_parked += not running
        self.parked_bytes += k.nbytes + v.nbytes
        if not running:  # one of a running turn comes back at once
            self._close_parked()
        return True

    def _close_parked(self) -> None:
        """Close idle conversations, least recently used first, until the parked tails are within their budget."""
        for name, conversation in list(self._all.items()):
            if self.parked_bytes <= self.parked_budget_bytes:
                return
            if conversation.parked is not None and self.close(name):
                self.num_closed_parked += 1

    def _unpark(self, conversation: Conversation) -> None:
        if conversation.parked is not None:
            self.parked_bytes -= sum(rows.nbytes for rows in conversation.parked)
            conversation.parked = None

    def _move(self, conversation: Conversation, extent: Extent) -> None:
        """Copy the tail, from its old extent or from where it is parked, into another extent."""
        old, num = conversation.extent, conversation.written
        source = old.all_rows() if old is not None else conversation.parked
        if source is not None:
            for target, rows in zip(extent.all_rows(), source, strict=True):
                target[:, :num].copy_(rows[:, :num])
        if old is not None:
            self.arena.free(old)
        conversation.extent = extent
        self._unpark(conversation)

    def check_integrity(self) -> None:
        """Assert that every used slot of the arena is a tail or packed KV."""
        self.arena.check_integrity()
        extents = [c.extent for c in self._all.values() if c.extent is not None]
        extents += [room.packed for room in self._rooms.values() if room.packed is not None]
        assert len({id(e) for e in extents}) == len(extents)
        assert sum(e.length for e in extents) == self.arena.num_slots - self.arena.free_slots, "arena slots without an owner"
        assert set(self._rooms) <= set(self._busy) <= set(self._all), "a turn without its conversation"
        assert all(room.tail is self._all[name].extent for name, room in self._rooms.items()), "a turn without its tail"
        assert all(c.length <= c.written for c in self._all.values())
        parked = {name: sum(rows.nbytes for rows in c.parked) for name, c in self._all.items() if c.parked is not None}
        assert self.parked_bytes == sum(parked.values()), "parked bytes without an owner"
        over = self.parked_bytes > self.parked_budget_bytes
        assert not over or set(parked) <= set(self._busy), "parked tails above their budget that no turn waits for"
        idle = [c for name, c in self._all.items() if name not in self._busy]
        assert all(c.length == c.written for c in idle), "rows of a turn that is gone"
