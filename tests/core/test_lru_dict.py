"""Whose entry makes room when a mapping is full."""

import random

from sparsevila_cluster.core.lru_dict import SharedLRUDict


def test_alone_an_owner_has_all_of_it_and_the_oldest_go():
    held = SharedLRUDict(4, 0.5)
    for i in range(6):
        held.put(f"a{i}", i, "ann")
    assert [held.get(f"a{i}") for i in range(6)] == [None, None, 2, 3, 4, 5] and len(held) == held.num_of("ann") == 4


def test_who_has_more_than_a_share_makes_room_first():
    held = SharedLRUDict(8, 0.75)
    held.put("b0", 0, "bob")
    for i in range(50):
        held.put(f"a{i}", i, "ann")
    assert held.get("b0") == 0 and held.num_of("ann") == 7
    held.put("b1", 1, "bob")
    assert (held.num_of("ann"), held.num_of("bob"), held.get("a42"), held.get("a44")) == (6, 2, None, 44)
    for i in range(50):
        held.put(f"c{i}", i, "ann")
    assert held.num_of("bob") == 2 and len(held) == 8
    # Nobody is over: the least recently used goes, whosever it is.
    held.use("b0")
    held.put("b2", 2, "bob")
    assert held.get("b1") is None or held.num_of("ann") == 5
    held.put("b1", 1, "bob")
    assert held.get("b0") == 0


def test_it_is_what_a_slow_one_is():
    rng, owners, share = random.Random(3), ("ann", "bob", "cid"), 6
    held, slow = SharedLRUDict(10, 0.6), []  # (key, owner), the least recently used first

    for step in range(3000):
        key, owner, act = f"k{rng.randrange(25)}", rng.choice(owners), rng.random()
        known = next((one for one in slow if one[0] == key), None)
        if act < 0.2:
            assert (held.pop(key) is None) == (known is None)
            slow = [one for one in slow if one[0] != key]
        elif act < 0.5:
            assert (held.use(key) is None) == (known is None)
            if known:
                slow.remove(known)
                slow.append(known)
        else:
            held.put(key, step + 1, owner)
            slow = [one for one in slow if one[0] != key] + [(key, owner)]
            if len(slow) > 10:
                counts = {name: sum(one[1] == name for one in slow) for name in owners}
                over = [name for name in owners if counts[name] > share]
                slow.remove(next(one for one in slow if not over or one[1] == (owner if owner in over else over[0])))
        assert len(held) == len(slow) and all(key in held for key, _ in slow)
        assert all(held.num_of(name) == sum(one[1] == name for one in slow) for name in owners)
