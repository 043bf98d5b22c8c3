"""How what crosses a lane is broken: field by field, knowing its structure, and byte by byte, not knowing it."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable
from typing import Any

import msgpack

# What a field may be replaced with: every type, and the edges of every width.
EDGES = (0, 1, -1, 2, 127, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**53, 2**60, 2**63 - 1, 2**64 - 1, -(2**31), -(2**63))
FLOATS = (math.nan, math.inf, -math.inf, 0.5, -0.0, 1e308, 1.0)
TEXTS = ("", "a", "x" * 300, "y" * 70_000, "\0", "none", "transfer-1")


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def odd_value(dice: random.Random) -> Any:
    """A value of any type."""
    kind = dice.randrange(9)
    if kind < 3:
        return dice.choice(EDGES)
    if kind == 3:
        return dice.choice(FLOATS)
    if kind == 4:
        return dice.choice(TEXTS)
    if kind == 5:
        return dice.randbytes(dice.choice((0, 1, 7, 24, 4096)))
    if kind == 6:
        return dice.choice((None, True, False))
    if kind == 7:
        return dice.choice(([], {}, [[]] * 50, ["a"], {"a": 1}, [None] * 3, [0] * 5000, nested(400)))
    return dice.choice((msgpack.ExtType(5, b"ext"), msgpack.Timestamp(1, 2)))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything inside of a value of maps and lists."""
    found = []
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        found.append((*path, key))
        found += places(value[key], (*path, key))
    return found


def copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: copied(one) for key, one in value.items()}
    return [copied(one) for one in value] if isinstance(value, list) else value


def mutated(dice: random.Random, value: Any) -> tuple[Any, str]:
    """A copy of maps and lists with one field changed, and what was done."""
    value = copied(value)
    spots = places(value)
    if not spots:
        return odd_value(dice), "replace all"
    path = dice.choice(spots)
    # Every field as often as any other, however many items a list has.
    if dice.random() < 0.6:
        path = path[:1]
    inside = value
    for key in path[:-1]:
        inside = inside[key]
    key, old = path[-1], inside[path[-1]]
    way = dice.choice(("replace", "replace", "nudge", "nudge", "remove", "add", "repeat", "shuffle"))
    if way == "remove":
        del inside[key]
    elif way == "add" and isinstance(inside, dict):
        inside[dice.choice(("extra", "transfer", "x" * 40))] = odd_value(dice)
    elif way == "repeat" and isinstance(inside, list):
        inside.insert(key, copied(old))
    elif way == "shuffle" and isinstance(old, list):
        dice.shuffle(old)
    elif way == "nudge":
        inside[key] = _nudged(dice, old)
    else:
        inside[key] = odd_value(dice)
    return value, f"{way} {'.'.join(map(str, path))}"


def _nudged(dice: random.Random, old: Any) -> Any:
    """Nearly what it was."""
    if isinstance(old, bool) or old is None:
        return not old
    if isinstance(old, int):
        return min(old + dice.choice((-1, 1, 2, -old - 1, 7, 2**31, 2**40)), 2**64 - 1)
    if isinstance(old, float):
        return dice.choice((*FLOATS, -old, old + 1, repr(old), int(old) if math.isfinite(old) else 0))
    if isinstance(old, str):
        return dice.choice((old + "x", old[:-1], old.upper(), old.encode()))
    if isinstance(old, bytes) and old:
        broken = bytearray(old)
        at = dice.randrange(len(broken))
        what = dice.randrange(5)
        if what == 0:
            broken[at] ^= 1 << dice.randrange(8)
        elif what == 1:
            del broken[at:]
        elif what == 2:
            broken += dice.randbytes(8)
        elif what == 3:
            broken[at - at % 8 : at - at % 8 + 8] = struct.pack("<q", dice.choice((-1, 2**62, -(2**63), 2**31, 5000)))
        else:
            broken[at - at % 4 : at - at % 4 + 4] = struct.pack("<i", dice.choice((-1, -2, 2**31 - 1, 7, 100)))
        return bytes(broken)
    if isinstance(old, list) and old:
        return dice.choice((old[:-1], old + old[-1:], old * 3, old[::-1]))
    return odd_value(dice)


# ---- bytes ------------------------------------------------------------------------------------------------------------------


def flip(dice: random.Random, raw: bytearray) -> None:
    for _ in range(dice.choice((1, 1, 3))):
        raw[dice.randrange(len(raw))] ^= 1 << dice.randrange(8)


def truncate(dice: random.Random, raw: bytearray) -> None:
    del raw[dice.randrange(len(raw)) :]


def insert(dice: random.Random, raw: bytearray) -> None:
    at = dice.randrange(len(raw) + 1)
    raw[at:at] = dice.randbytes(dice.choice((1, 3, 20)))


def append(dice: random.Random, raw: bytearray) -> None:
    raw += dice.choice((b"\xc0", b"\xc1", bytes(raw[:50]), dice.randbytes(9)))


def claim(dice: random.Random, raw: bytearray) -> None:
    """A header of something much longer than what follows, also one within the other."""
    head = dice.choice((b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9"))
    size = struct.pack(">I", dice.choice((2**32 - 1, 2**31, 2**24, len(raw), 10_000)))
    at = dice.choice((0, dice.randrange(len(raw) + 1)))
    raw[at:at] = (head + size) * dice.choice((1, 1, 2, 300, 1000))


def bad_text(dice: random.Random, raw: bytearray) -> None:
    """A short text that is no UTF-8."""
    at = dice.randrange(len(raw))
    raw[at : at + 2] = b"\xa3" + dice.choice((b"\xff\xfe\xfd", b"\xed\xa0\x80", b"\xc0\x80\x80"))


BYTE_WAYS: tuple[Callable[[random.Random, bytearray], None], ...] = (flip, truncate, insert, append, claim, bad_text)


def broken_bytes(dice: random.Random, raw: bytes) -> tuple[bytes, str]:
    """Bytes that were changed without regard to what they mean, and how."""
    way, data = dice.choice(BYTE_WAYS), bytearray(raw)
    if data:
        way(dice, data)
    return bytes(data), way.__name__


def packed_with_duplicates(dice: random.Random, fields: dict[str, Any]) -> bytes:
    """A map in which one key comes twice, with two values."""
    items = list(fields.items())
    key, _ = dice.choice(items)
    items.insert(dice.randrange(len(items) + 1), (key, odd_value(dice)))
    packer = msgpack.Packer()
    return packer.pack_map_header(len(items)) + b"".join(msgpack.packb(key) + msgpack.packb(value) for key, value in items)


def broken_map(dice: random.Random, fields: dict[str, Any]) -> tuple[bytes, str]:
    """A map, broken in one way or two, as msgpack."""
    what = dice.random()
    if what < 0.06:
        return packed_with_duplicates(dice, fields), "a key twice"
    if what < 0.25:
        return broken_bytes(dice, msgpack.packb(fields))
    value, how = mutated(dice, fields)
    if dice.random() < 0.15 and isinstance(value, dict):
        value, more = mutated(dice, value)
        how += f", {more}"
    return msgpack.packb(value), how
