"""Arenas, prefixes and conversations against naive models, driven by hypothesis, in any order: nothing lost or shared."""

from collections import Counter

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from sparsevila_cluster.core.errors import QueueFull, TooLarge
from sparsevila_cluster.kvcache.arena import Arena
from sparsevila_cluster.kvcache.conversation_store import ConversationStore
from sparsevila_cluster.kvcache.prefix_store import PrefixStore
from tests.kvcache.test_arena import SPEC, make_prefix

CALM = settings(derandomize=True, deadline=None, max_examples=40, stateful_step_count=50, database=None)
SLOTS = 97
LENGTH = st.integers(1, 40)


class ArenaMachine(RuleBasedStateMachine):
    """One owner per slot, or none."""

    extents = Bundle("extents")

    def __init__(self):
        super().__init__()
        self.arena, self.owner = Arena(SPEC, SLOTS), [None] * SLOTS

    @rule(target=extents, length=LENGTH)
    def alloc(self, length):
        extent = self.arena.alloc(length)
        runs = "".join("." if o is None else "x" for o in self.owner).split("x")
        first = next((i for i in range(SLOTS) if self.owner[i : i + length] == [None] * length), None)
        assert (extent is None) == (max(map(len, runs)) < length)
        if extent is not None:
            assert extent.start == first, "the first run that fits"
            self.owner[extent.start : extent.stop] = [extent] * length
        return extent

    @rule(extent=extents, length=LENGTH)
    def resize(self, extent, length):
        if extent is None or extent.freed:
            return
        start, before = extent.start, extent.length
        able = start + length <= SLOTS and all(o is None for o in self.owner[start + before : start + length])
        assert self.arena.resize(extent, length) == able and (extent.start, extent.length) == (start, length if able else before)
        self.owner = [None if o is extent else o for o in self.owner]
        self.owner[extent.start : extent.stop] = [extent] * extent.length

    @rule(extent=extents)
    def free(self, extent):
        if extent is not None:
            self.arena.free(extent)  # also one that is free already
            self.owner = [None if o is extent else o for o in self.owner]

    @invariant()
    def every_slot_has_its_owner(self):
        self.arena.check_integrity()
        free = self.owner.count(None)
        assert self.arena.free_slots == free and self.arena.used_bytes == (SLOTS - free) * SPEC.bytes_per_token
        runs = max(map(len, "".join("." if o is None else "x" for o in self.owner).split("x")))
        assert self.arena.fragmentation == (1 - runs / free if free else 0.0)


class PrefixMachine(RuleBasedStateMachine):
    """Keys in the order of their last use, with lengths and holders."""

    reserved = Bundle("reserved")
    keys = st.sampled_from("abcde")

    def __init__(self):
        super().__init__()
        self.store = PrefixStore(Arena(SPEC, SLOTS))
        self.lengths, self.holders, self.num_reserved = {}, {}, 0

    def use(self, key):
        self.lengths[key] = self.lengths.pop(key)

    @rule(target=reserved, length=st.integers(1, SLOTS + 5))
    def reserve(self, length):
        free = [key for key in self.lengths if not self.holders.get(key)]
        try:
            extent = self.store.reserve(length)
        except TooLarge:
            assert length > SLOTS
            return None
        except QueueFull:
            assert self.holders or self.num_reserved, "an arena without holders has room for anything that fits"
            extent = None
        gone = [key for key in self.lengths if key not in self.store]
        assert gone == free[: len(gone)], "least recently used first, none that is held"
        assert extent is not None or gone == free, "refused although something could be evicted"
        for key in gone:
            del self.lengths[key]
        self.num_reserved += 0 if extent is None else extent.length
        return extent

    @rule(extent=consumes(reserved), key=keys)
    def publish(self, extent, key):
        if extent is None:
            return
        known, self.num_reserved = key in self.lengths, self.num_reserved - extent.length
        made = make_prefix(key, extent)
        assert (self.store.publish(made) is made) == (not known)
        self.lengths.setdefault(key, extent.length)
        self.use(key)

    @rule(extent=consumes(reserved))
    def cancel(self, extent):
        if extent is not None:
            self.num_reserved -= extent.length
            self.store.cancel(extent)
            self.store.cancel(extent)

    @rule(key=keys)
    def get(self, key):
        assert (self.store.get(key) is not None) == (key in self.lengths)
        if key in self.lengths:
            self.use(key)

    @rule(key=keys)
    def hold(self, key):
        if key in self.lengths:
            assert self.store.hold(key).key == key
            self.holders[key] = self.holders.get(key, 0) + 1
            self.use(key)

    @precondition(lambda self: self.holders)
    @rule(number=st.integers(0, 99))
    def release(self, number):
        key = sorted(self.holders)[number % len(self.holders)]
        self.store.release(key)
        self.holders[key] -= 1
        self.holders = {k: n for k, n in self.holders.items() if n}

    @rule(key=keys)
    def remove(self, key):
        able = key in self.lengths and not self.holders.get(key)
        assert self.store.remove(key) == able
        if able:
            del self.lengths[key]

    @invariant()
    def the_store_is_the_model(self):
        self.store.check_integrity()
        assert {p.key: p.length for p in self.store} == self.lengths and list(self.lengths) == [p.key for p in self.store]
        assert {key: self.store.holders(key) for key in self.holders} == self.holders
        assert self.store.arena.used_bytes == (sum(self.lengths.values()) + self.num_reserved) * SPEC.bytes_per_token


class SharedPrefixMachine(RuleBasedStateMachine):
    """Prefixes of two owners and of nobody: an owner stays within its share, and who has least loses nothing to others."""

    reserved = Bundle("reserved")
    owners = st.sampled_from(("", "anna", "bert", "carl"))

    def __init__(self):
        super().__init__()
        self.store, self.num = PrefixStore(Arena(SPEC, SLOTS), max_share=0.6), 0

    def slots(self):
        used = Counter()
        for prefix in self.store:
            used[prefix.metadata.owner] += prefix.length
        for extent, owner in self.store._reserved.items():
            used[owner] += extent.length
        return used

    @rule(target=reserved, length=st.integers(1, SLOTS), owner=owners)
    def reserve(self, length, owner):
        before, idle = self.slots(), {p.key: p.metadata.owner for p in self.store if not self.store.holders(p.key)}
        most = int(SLOTS * 0.6) if owner else SLOTS
        try:
            extent = self.store.reserve(length, owner)
        except TooLarge:
            assert length > most
            return None
        except QueueFull:
            extent = None
        lost = Counter(name for key, name in idle.items() if key not in self.store)
        left = Counter(name for key, name in idle.items() if key in self.store)
        after = self.slots()
        if owner:
            assert after[owner] <= most
            if before[owner] + length > most and before.total() + length - SLOTS <= 0:
                assert set(lost) <= {owner}, "room for all, but not in this owner's share"
            for name in lost.keys() - {owner}:
                assert all(before[name] >= after[other] for other in left if other != name), "who has more, and idle, makes way"
        return None if extent is None else (extent, owner)

    @rule(made=consumes(reserved))
    def publish(self, made):
        if made is not None:
            self.num += 1
            self.store.publish(make_prefix(str(self.num), made[0], owner=made[1]))

    @rule(made=consumes(reserved))
    def cancel(self, made):
        if made is not None:
            self.store.cancel(made[0])

    @rule(number=st.integers(0, 9))
    def hold(self, number):
        keys = [prefix.key for prefix in self.store]
        if keys:
            self.store.hold(keys[number % len(keys)])

    @rule(number=st.integers(0, 9))
    def release(self, number):
        held = [prefix.key for prefix in self.store if self.store.holders(prefix.key)]
        if held:
            self.store.release(held[number % len(held)])

    @invariant()
    def shares_are_what_they_are(self):
        self.store.check_integrity()
        used = self.slots()
        assert all(self.store.slots_of(owner) == used[owner] for owner in used)


class ConversationMachine(RuleBasedStateMachine):
    """Each row of a tail holds a number of its own; the model is the list of those numbers, committed and not."""

    names = st.sampled_from("abcd")

    def __init__(self):
        super().__init__()
        self.store = ConversationStore(Arena(SPEC, SLOTS), 3, parked_budget_bytes=60 * SPEC.bytes_per_token)
        self.rows, self.committed, self.under_way, self.rooms = {}, {}, set(), {}
        self.next_value = 0

    def conversation(self, name):
        return self.store._all[name]

    def forget_closed(self):
        """What the store closed by itself, of which no turn waits or runs."""
        for gone in [n for n in self.rows if n not in self.store._all]:
            assert gone not in self.under_way, "a conversation with a turn was closed"
            del self.rows[gone], self.committed[gone]

    @rule(name=names)
    def open_or_enter(self, name):
        if name in self.under_way:
            return
        if self.store.get(name) is None:
            self.store.open(name, "media", 0)
            self.forget_closed()
            self.rows[name], self.committed[name] = [], 0
        self.store.enter(self.conversation(name))
        self.under_way.add(name)

    @rule(name=names, more=st.integers(1, 50), packed=st.integers(0, 50))
    def take(self, name, more, packed):
        if name not in self.under_way or name in self.rooms:
            return
        tail = len(self.rows[name]) + more
        room = self.store.take(self.conversation(name), tail, packed)
        self.forget_closed()
        if room is None:
            assert self.rooms or not self.store.fits_ever(tail, packed), "alone, what fits is placed"
        else:
            assert room.tail.length >= tail and (room.packed.length if room.packed else 0) == packed
            self.rooms[name] = room

    @rule(name=names, more=st.integers(1, 50), packed=st.integers(0, 50))
    def resize(self, name, more, packed):
        if name in self.rooms:
            room, tail = self.rooms[name], len(self.rows[name]) + more
            before = room.tail.length
            is_resized = self.store.resize(self.conversation(name), tail, packed)
            self.forget_closed()
            if is_resized:
                assert room.tail.length >= tail and (room.packed.length if room.packed else 0) == packed
            else:
                assert room.tail.length >= before and room.packed is None or room.packed.length == packed

    @rule(name=names, count=st.integers(1, 40))
    def write(self, name, count):
        if name not in self.rooms:
            return
        conversation = self.conversation(name)
        for _ in range(min(count, self.rooms[name].tail.length - len(self.rows[name]))):
            self.next_value += 1
            self.rows[name].append(float(self.next_value))
            for layer in range(SPEC.num_layers):
                for rows in self.rooms[name].tail.rows(layer):
                    rows[conversation.written] = float(self.next_value)
            conversation.written += 1

    @rule(name=names)
    def preempt(self, name):
        if name in self.rooms:
            self.store.give_back(self.conversation(name))
            self.store.give_back(self.conversation(name))
            del self.rooms[name]

    @rule(name=names, ends_well=st.booleans())
    def leave(self, name, ends_well):
        if name not in self.under_way:
            return
        conversation = self.conversation(name)
        if ends_well and name in self.rooms:
            conversation.length = conversation.written
            self.committed[name] = len(self.rows[name])
        conversation.written = conversation.length
        del self.rows[name][self.committed[name] :]
        self.store.give_back(conversation)
        self.store.leave(conversation)
        self.rooms.pop(name, None)
        self.under_way.discard(name)

    @rule(name=names)
    def close(self, name):
        able = name in self.rows and name not in self.under_way
        assert self.store.close(name) == able
        if able:
            del self.rows[name], self.committed[name]

    @invariant()
    def no_row_is_lost_or_changed(self):
        self.store.check_integrity()
        assert sorted(self.store._all) == sorted(self.rows)
        for name, values in self.rows.items():
            conversation, want = self.conversation(name), torch.tensor(values)
            assert conversation.written == len(values) and conversation.length == self.committed[name]
            assert name not in self.rooms or conversation.extent is self.rooms[name].tail, "a running turn was parked"
            for layer in range(SPEC.num_layers):
                kept = conversation.extent.all_rows() if conversation.extent else conversation.parked
                source = None if kept is None else [rows[layer] for rows in kept]
                for rows in source or ():
                    assert torch.equal(rows[: len(values), 0, 0], want) and torch.equal(rows[: len(values), -1, -1], want)
                assert source is not None or not values


MACHINES = (ArenaMachine, PrefixMachine, SharedPrefixMachine, ConversationMachine)
TestArena, TestPrefixes, TestSharedPrefixes, TestConversations = (machine.TestCase for machine in MACHINES)
TestArena.settings = TestPrefixes.settings = TestSharedPrefixes.settings = TestConversations.settings = CALM
