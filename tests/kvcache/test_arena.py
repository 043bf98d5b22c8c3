"""Arenas, prefixes and tails: nothing lost, nothing shared, to the slot."""

import random

import pytest
import torch

from sparsevila_cluster.core.errors import QueueFull, TooLarge
from sparsevila_cluster.kvcache.arena import Arena, KVSpec
from sparsevila_cluster.kvcache.conversation_store import ConversationStore
from sparsevila_cluster.kvcache.prefix import MediaPrefix, PrefixMetadata
from sparsevila_cluster.kvcache.prefix_store import PrefixStore

SPEC = KVSpec(num_layers=2, num_kv_heads=2, head_dim=4, dtype=torch.float32, fingerprint="test")


def make_prefix(key, extent, owner=""):
    n = extent.length
    metadata = PrefixMetadata(
        key=key, owner=owner, spec=SPEC, is_visual=torch.arange(n) > 0, positions=torch.arange(n)[None],
        token_map=torch.zeros(n, 3, dtype=torch.int32), next_pos=n, generation_floor=0, grids=((1, n),), media=(0,), frames=(0,),
        times_s=(0.0,), kind="video", num_frames=1, duration_s=1.0, num_visual=2 * n,
    )  # fmt: skip
    return MediaPrefix(metadata, extent)


def test_arena_against_a_map_of_slots():
    rng = random.Random(0)
    arena, live, owner = Arena(SPEC, 257), [], [None] * 257
    for _ in range(3000):
        if live and rng.random() < 0.3:
            extent = rng.choice(live)
            length, before = rng.randint(1, 60), extent.length
            behind = owner[extent.stop : extent.start + length]
            able = extent.start + length <= 257 and all(o is None for o in behind)
            assert arena.resize(extent, length) == able and extent.length == (length if able else before)
            owner[extent.start : extent.start + before] = [None] * before
            owner[extent.start : extent.stop] = [extent] * extent.length
        elif live and rng.random() < 0.5:
            extent = live.pop(rng.randrange(len(live)))
            arena.free(extent)
            arena.free(extent)  # a second release does nothing
            owner[extent.start : extent.stop] = [None] * extent.length
        else:
            length = rng.randint(1, 60)
            extent = arena.alloc(length)
            if extent is None:
                runs = "".join("." if o is None else "x" for o in owner).split("x")
                assert max(map(len, runs)) < length, "refused although a run was free"
                continue
            assert all(o is None for o in owner[extent.start : extent.stop]), "handed out twice"
            owner[extent.start : extent.stop] = [extent] * length
            live.append(extent)
        assert arena.free_slots == owner.count(None)
        arena.check_integrity()
    for extent in live:
        arena.free(extent)
    assert arena.used_bytes == 0 and arena.fragmentation == 0.0


def test_layers_are_views_of_one_tensor():
    arena = Arena(SPEC, 5)
    assert arena.k_all.shape == arena.v_all.shape == (SPEC.num_layers, 5, SPEC.num_kv_heads, SPEC.head_dim)
    arena.k_all.zero_()
    arena.v_all.zero_()
    k, v = arena.alloc(3).rows(1)
    k[2], v[0] = 1.0, 2.0
    assert arena.k_all[1, 2].eq(1).all() and arena.v_all[1, 0].eq(2).all()
    assert arena.k_all.sum() == k.sum() and arena.v_all.sum() == v.sum()


def test_integrity_check_finds_damage():
    arena = Arena(SPEC, 10)
    extent = arena.alloc(3)
    arena._free.insert(0, (1, 2))
    with pytest.raises(AssertionError):
        arena.check_integrity()
    arena._free.pop(0)
    arena.check_integrity()
    del arena._used[extent.start]
    with pytest.raises(AssertionError):
        arena.check_integrity()


def test_prefixes_are_evicted_least_recently_used_first_and_never_while_held():
    store = PrefixStore(Arena(SPEC, 100))
    for key in "abc":
        store.publish(make_prefix(key, store.reserve(30)))
    store.hold("a")
    store.get("b")
    store.publish(make_prefix("d", store.reserve(30)))
    assert "c" not in store and "a" in store and "b" in store
    assert not store.remove("a")
    with pytest.raises(TooLarge, match="prefix_bytes"):
        store.reserve(101)
    with pytest.raises(QueueFull):
        store.reserve(90)
    store.release("a")
    store.cancel(store.reserve(90))
    assert store.arena.free_slots == 100 and len(store) == 0
    store.check_integrity()


def test_an_owner_over_its_share_evicts_its_own_and_nobody_else_s():
    store = PrefixStore(Arena(SPEC, 100), max_share=0.75)

    def make(key, length, owner):
        store.publish(make_prefix(key, store.reserve(length, owner), owner=owner))

    make("b1", 20, "bert")
    for i in range(5):
        make(f"a{i}", 25, "anna")
    assert [prefix.key for prefix in store] == ["b1", "a2", "a3", "a4"] and store.slots_of("anna") == 75
    with pytest.raises(TooLarge, match="76 tokens .* share of 'anna' in prefix_bytes"):
        store.reserve(76, "anna")
    for key in ("a2", "a3", "a4"):
        store.hold(key)
    with pytest.raises(QueueFull, match="'anna' are in use"):
        store.reserve(1, "anna")
    assert "b1" in store
    store.release("a3")
    make("c1", 10, "carl")
    assert [prefix.key for prefix in store] == ["b1", "a2", "a4", "c1"], "who has most makes way"
    make("c2", 15, "carl")
    make("everybody", 10, "")
    assert "b1" not in store, "for whoever has no share, who was used least lately"
    store.check_integrity()


def test_publishing_the_same_key_twice_keeps_the_first():
    store = PrefixStore(Arena(SPEC, 100))
    first, second = (make_prefix("a", store.reserve(20)) for _ in range(2))
    assert store.publish(first) is first
    assert store.publish(second) is first
    assert store.arena.free_slots == 80
    store.check_integrity()


def fill(conversation, value):
    for layer in range(SPEC.num_layers):
        for rows in conversation.extent.rows(layer):
            rows[: conversation.length] = value


def content(conversation):
    rows = conversation.parked or conversation.extent.all_rows()
    return {float(x) for tensor in rows for x in tensor[:, : conversation.length].flatten()}


def enter(store, name):
    conversation = store.open(name, "m", 5)
    store.enter(conversation)
    return conversation


def write(conversation, rows, value):
    conversation.written = conversation.length = rows
    fill(conversation, value)


def test_tails_park_and_come_back_unchanged():
    store = ConversationStore(Arena(SPEC, 128), max_conversations=10, parked_budget_bytes=2**20)
    a, b = enter(store, "a"), enter(store, "b")
    for value, c in ((1.0, a), (2.0, b)):
        assert store.take(c, 40, 0) is not None
        write(c, 37, value)
        store.give_back(c)
    room = store.take(b, 40, 60)  # needs the room of a's idle tail
    assert room is not None and a.extent is None and content(a) == {1.0} and content(b) == {2.0}
    store.check_integrity()
    assert store.take(a, 64, 0) is None, "b runs: its tail and packed KV stay"
    store.give_back(b)
    store.give_back(b)
    assert store.take(a, 64, 0).tail.length >= 64 and content(a) == {1.0}
    store.give_back(a)
    store.leave(a), store.leave(b)
    assert store.close("a") and store.close("b") and not store.close("b")
    assert store.arena.used_bytes == 0
    store.check_integrity()


def test_a_turn_that_fits_alone_is_always_placed():
    """Also when the conversation's own old tail lies in the middle of the arena."""
    rng = random.Random(3)
    for _ in range(200):
        store = ConversationStore(Arena(SPEC, 256), max_conversations=100, parked_budget_bytes=2**20)
        tails = [enter(store, str(i)) for i in range(4)]
        for c in tails:
            store.take(c, rng.randint(1, 90), 0)
            write(c, 1, 0.0)
            store.give_back(c)
        tail_rows, packed_rows = rng.randint(1, 160), rng.randint(0, 90)
        if store.fits_ever(tail_rows, packed_rows):
            assert store.take(rng.choice(tails), tail_rows, packed_rows) is not None
        store.check_integrity()


def test_the_room_of_a_running_turn_grows_in_place_elsewhere_or_through_the_outside():
    store = ConversationStore(Arena(SPEC, 256), max_conversations=10, parked_budget_bytes=2**20)
    a, b = enter(store, "a"), enter(store, "b")
    first = store.take(a, 32, 10)
    assert (first.packed.start, first.tail.start) == (0, 10)
    a.written = 30  # rows of a turn under way, none of them committed
    for rows in zip(*(first.tail.rows(layer) for layer in range(SPEC.num_layers)), strict=True):
        for part in rows:
            part[:30] = 7.0
    assert store.resize(a, 50, 10) and first.tail.start == 10 and first.tail.length == 64, "free slots lie behind it"
    second = store.take(b, 32, 0)
    assert second.tail.start == 74
    assert store.resize(a, 65, 10) and first.tail.start == 106, "b's tail lies behind it: it moves"
    assert not store.resize(a, 130, 4), "too little room: the tail stays, packed KV may shrink all the same"
    assert first.packed.length == 4 and (first.tail.start, first.tail.length) == (106, 96) and first.tail is a.extent
    store.check_integrity()
    a.length = 30
    assert content(a) == {7.0}
    assert store.resize(a, 40, 0) and first.packed is None
    store.check_integrity()


def test_a_tail_uses_the_slots_it_lies_on_to_grow():
    store = ConversationStore(Arena(SPEC, 160), max_conversations=10, parked_budget_bytes=2**20)
    a, b = enter(store, "a"), enter(store, "b")
    store.take(b, 32, 0)
    room = store.take(a, 64, 0)
    blocker = store.arena.alloc(32)
    assert (room.tail.start, room.tail.length, blocker.start) == (32, 64, 96)
    store.give_back(b)
    store.leave(b)
    store.close("b")
    a.written = a.length = 50
    fill(a, 3.0)
    assert store.resize(a, 96, 0), "32 free slots before it and 32 behind the blocker: together with its own they are enough"
    assert (room.tail.start, room.tail.length) == (0, 96) and content(a) == {3.0}
    assert not store.resize(a, 97, 0) and room.tail.length == 96 and content(a) == {3.0}
    store.arena.free(blocker)
    store.check_integrity()


def test_idle_conversations_close_when_there_are_too_many():
    store = ConversationStore(Arena(SPEC, 128), max_conversations=2, parked_budget_bytes=2**20)
    a = store.open("a", "m", 0)
    store.enter(a)
    store.open("b", "m", 0)
    store.open("c", "m", 0)
    assert store.get("b") is None and store.get("a") is a
    store.leave(a)
    assert store.close("a")


def test_parked_tails_have_a_budget_of_bytes():
    budget = 80 * SPEC.bytes_per_token
    store = ConversationStore(Arena(SPEC, 128), max_conversations=100, parked_budget_bytes=budget)

    def converse(name):
        conversation = enter(store, name)
        assert store.take(conversation, 64, 0) is not None
        write(conversation, 40, 1.0)
        store.give_back(conversation)
        store.leave(conversation)
        store.check_integrity()
        assert store.parked_bytes <= budget

    for i in range(10):
        converse(f"{i}")
    assert [*store] == ["6", "7", "8", "9"], "two lie in the arena, two of 40 rows are parked"
    assert store.num_closed_parked == 6 and store.parked_bytes == budget
    store.get("6")
    converse("10")
    assert "6" in store and "7" not in store, "what was used last is closed last"
    for name in [*store]:
        assert store.close(name)
    assert store.parked_bytes == 0 and store.arena.used_bytes == 0


def test_tails_of_turns_that_wait_are_parked_beyond_the_budget_and_none_is_closed():
    store = ConversationStore(Arena(SPEC, 64), max_conversations=100, parked_budget_bytes=0)
    waiting = [enter(store, f"{i}") for i in range(3)]
    for conversation in waiting:
        assert store.take(conversation, 64, 0) is not None
        write(conversation, 40, 2.0)
        store.give_back(conversation)
        store.check_integrity()
    assert store.parked_bytes == 80 * SPEC.bytes_per_token and not store.num_closed_parked
    assert store.take(waiting[0], 64, 0) is not None and content(waiting[0]) == {2.0}
    store.give_back(waiting[0])
    for conversation in waiting:
        store.leave(conversation)
        store.check_integrity()
    assert [*store] == ["0"] and store.parked_bytes == 0, "the one that lies in the arena"
