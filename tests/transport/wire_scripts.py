"""Peers of a lane that follow a script, message by message, so that any step of it can be broken."""

from __future__ import annotations

import queue
import random
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import msgpack
import torch
from torch import Tensor

from sparsevila_cluster.core.errors import LaneLost
from sparsevila_cluster.kvcache.prefix import MediaPrefix
from sparsevila_cluster.transport.channel import MESSAGES
from sparsevila_cluster.transport.chunks import ChunkBuffers, checksum
from sparsevila_cluster.transport.manifest import VERSION, Manifest
from tests.transport.wire_mutants import broken_bytes, broken_map, mutated, odd_value

PATIENCE_S, IMPATIENCE_S = 0.15, 0.002  # for a reply that may never come, because the script is broken; for those after it
CPU = torch.device("cpu")


@dataclass
class Step:
    """One thing that a peer does. name: of a message, "bulk", or "wait for" one; raw: bytes instead of the message."""

    name: str
    body: dict[str, Any] = field(default_factory=dict)
    parts: list[Tensor] = field(default_factory=list)
    raw: bytes | None = None
    until: Callable[[str, dict[str, Any]], bool] | None = None

    def __str__(self) -> str:
        index = self.body.get("index") if isinstance(self.body, dict) else None
        return f"{self.name} {index}" if isinstance(index, int) else str(self.name)


def packed_message(number: Any, name: Any, body: Any) -> bytes:
    return sealed(msgpack.packb([number, name, body]))


def sealed(packed: bytes) -> bytes:
    return zlib.crc32(packed).to_bytes(4, "little") + packed


def sender_script(prefix: MediaPrefix, manifest: Manifest, token: str, worker: str) -> list[Step]:
    """All that a sender does for one transfer."""
    transfer = manifest.transfer_id
    buffers = ChunkBuffers(manifest, prefix.extent, CPU)
    steps = [
        Step("hello", {"lane": "fuzz", "worker": worker, "epoch": 1, "token": token, "version": VERSION}),
        Step("offer", {"transfer": transfer, "key": prefix.key, "attempt": 1, "manifest": manifest.pack()}),
    ]
    for index, chunk in enumerate(manifest.chunks):
        parts = [part.clone() for part in buffers.gather(chunk)]
        steps.append(Step("wait for a grant", until=_granted(index)))
        steps.append(Step("chunk", {"transfer": transfer, "index": index}))
        steps.append(Step("bulk", parts=parts))
        if manifest.checksum:
            steps.append(Step("sum", {"transfer": transfer, "index": index, "checksum": checksum(parts)}))
    steps.append(Step("commit", {"transfer": transfer}))
    steps.append(Step("wait for the end", until=lambda name, body: name == "acked"))
    return steps


def receiver_script(manifest: Manifest, num_credits: int) -> list[Step]:
    """All that a receiver does for one transfer."""
    transfer, chunks = manifest.transfer_id, manifest.chunks
    steps = [
        Step("wait for a hello", until=lambda name, body: name == "hello"),
        Step("welcome"),
        Step("wait for an offer", until=lambda name, body: name == "offer"),
        Step("grant", {"transfer": transfer, "upto": min(num_credits, len(chunks)), "landed": 0}),
    ]
    for index in range(len(chunks)):
        steps.append(Step("wait for a chunk", until=_announced(index)))
        landed = index + 1
        steps.append(Step("grant", {"transfer": transfer, "upto": min(landed + num_credits, len(chunks)), "landed": landed}))
    steps.append(Step("wait for the commit", until=lambda name, body: name == "commit"))
    steps.append(Step("acked", {"transfer": transfer}))
    return steps


def _granted(index: int) -> Callable[[str, dict[str, Any]], bool]:
    return lambda name, body: name == "grant" and body["upto"] > index


def _announced(index: int) -> Callable[[str, dict[str, Any]], bool]:
    return lambda name, body: name == "chunk" and body["index"] == index


def stray_messages(transfer: str, others: tuple[str, ...]) -> list[tuple[str, dict[str, Any]]]:
    """Messages of every name, of this transfer and of others."""
    failure = {"error": "QueueFull", "message": "no room", "retry_after_s": 1.0}
    made: list[tuple[str, dict[str, Any]]] = [("welcome", {}), ("bye", {"failure": None}), ("bye", {"failure": failure})]
    for one in (transfer, *others, "unknown"):
        made += [
            ("commit", {"transfer": one}),
            ("abort", {"transfer": one, "reason": "fuzz"}),
            ("beat", {"transfers": [one]}),
            ("chunk", {"transfer": one, "index": 0}),
            ("chunk", {"transfer": one, "index": 1}),
            ("sum", {"transfer": one, "index": 0, "checksum": 7}),
            ("grant", {"transfer": one, "upto": 2**40, "landed": 0}),
            ("grant", {"transfer": one, "upto": 0, "landed": 3}),
            ("acked", {"transfer": one}),
            ("ended", {"transfer": one}),
            ("refused", {"transfer": one, "failure": failure}),
            ("refused", {"transfer": one, "failure": {"error": "DataLoss", "message": "x"}}),
            ("refused", {"transfer": one, "failure": {"error": "DoesNotExist", "retry_after_s": "soon"}}),
        ]
    return made


def broken_script(
    dice: random.Random, steps: list[Step], others: tuple[str, ...], any_bulk: bool = True
) -> tuple[list[Step], str, bool]:
    """The steps with one or two of them broken, how, and whether KV was touched.

    any_bulk: whether bulk may have other sizes, or be missing; gloo ends the process, or waits.
    """
    steps, how, touched = list(steps), [], False
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        label, kv = _break_one(dice, steps, others, any_bulk)
        how.append(label)
        touched |= kv
    return steps, ", ".join(how), touched


def _break_one(dice: random.Random, steps: list[Step], others: tuple[str, ...], any_bulk: bool) -> tuple[str, bool]:
    messages = [i for i, step in enumerate(steps) if isinstance(step.name, str) and step.name in MESSAGES]
    bulk = [i for i, step in enumerate(steps) if step.name == "bulk"]
    movable = [i for i in range(1, len(steps)) if any_bulk or steps[i].name not in ("bulk", "chunk")]
    if not messages or not movable:
        return "nothing is left", False
    at = dice.choice(messages)
    ways = ["field"] * 6 + ["bytes", "bytes", "drop", "repeat", "swap", "move", "hurry", "stray", "stray", "end early"]
    way = dice.choice(ways + ["bulk"] * (3 if bulk else 0))
    step = steps[at]
    if way == "field":
        body, what = mutated(dice, step.body)
        if (
            step.name == "offer"
            and isinstance(step.body, dict)
            and isinstance(step.body.get("manifest"), bytes)
            and dice.random() < 0.6
        ):
            manifest, what = _broken_manifest(dice, step.body["manifest"])
            body = {**step.body, "manifest": manifest}
        steps[at] = replace(step, body=body)
        return f"{step}: {what}", False
    if way == "bytes":
        raw, what = broken_bytes(dice, msgpack.packb([at, step.name, step.body]))
        steps[at] = replace(step, raw=sealed(raw) if dice.random() < 0.7 else raw)
        return f"{step}: {what}", False
    if way in ("drop", "repeat", "swap", "move"):
        at = dice.choice(movable)
        label = f"{way} {steps[at]}"
        if way == "drop":
            del steps[at]
        elif way == "repeat":
            steps.insert(at, steps[at])
        elif way == "swap" and at + 1 < len(steps) and at + 1 in movable:
            steps[at], steps[at + 1] = steps[at + 1], steps[at]
        elif way == "move":
            steps.insert(dice.choice(movable), steps.pop(at))
        return label, False
    if way == "hurry":
        steps[:] = [one for one in steps if one.until is None]
        return "wait for no reply", False
    transfer = next((one.body["transfer"] for one in steps if isinstance(one.body, dict) and "transfer" in one.body), "")
    if way == "stray":
        name, body = dice.choice(stray_messages(transfer, others))
        if dice.random() < 0.2:
            name, body = dice.choice((name, odd_value(dice), "nonsense")), odd_value(dice)
        where = dice.randrange(len(steps) + 1)
        steps.insert(where, Step(name, body))
        return f"{name!r:.40} at {where}", False
    if way == "end early":
        where = dice.randrange(1, len(steps) + 1)
        steps.insert(where, Step("abort", {"transfer": transfer, "reason": "fuzz"}))
        if dice.random() < 0.3:
            del steps[where:]
        return f"abort at {where}", False
    at = dice.choice(bulk)
    parts = [part.clone() for part in steps[at].parts]
    if not parts or not all(part.numel() for part in parts):
        return "nothing is left of bulk", True
    part = dice.randrange(len(parts))
    what = dice.choice(
        ("flip", "flip", "garbage", "scales", "shorter", "longer", "fewer") if any_bulk else ("flip", "garbage", "scales")
    )
    if what == "flip":
        parts[part][dice.randrange(parts[part].numel())] ^= 1 << dice.randrange(8)
    elif what == "garbage":
        parts[part] = torch.frombuffer(bytearray(dice.randbytes(parts[part].numel())), dtype=torch.uint8)
    elif what == "scales":  # of int8 they come first; the checksum is right
        words = parts[part][: parts[part].numel() // 4 * 4].view(torch.float32)
        words[dice.randrange(min(8, len(words)))] = dice.choice((float("nan"), float("inf"), -1.0))
        after = [i for i in range(at, min(at + 2, len(steps))) if steps[i].name == "sum" and isinstance(steps[i].body, dict)]
        for i in after:
            steps[i] = replace(steps[i], body={**steps[i].body, "checksum": checksum(parts)})
    elif what == "shorter":
        parts[part] = parts[part][: dice.randrange(parts[part].numel())].clone()
    elif what == "longer":
        parts[part] = torch.cat([parts[part], parts[part][:8]])
    else:
        parts = parts[:part]
    steps[at] = replace(steps[at], parts=parts)
    return f"{what} {at}", True


def _broken_manifest(dice: random.Random, packed: bytes) -> tuple[bytes, str]:
    try:
        fields = msgpack.unpackb(packed)
    except ValueError:  # it is broken already
        fields = None
    return broken_map(dice, fields) if isinstance(fields, dict) and fields else broken_bytes(dice, packed)


class ScriptedPeer:
    """Plays a script over a link, and remembers what it was told."""

    def __init__(self, link: Any, chunks: ChunkBuffers | None = None, patience_s: float = PATIENCE_S):
        """chunks: where a scripted receiver takes bulk; patience_s: how long it waits for a reply."""
        self.link = link
        self.heard: list[tuple[str, dict[str, Any]]] = []
        self._chunks = chunks
        self._num_sent = 0
        self._bulk: list[Any] = []
        self._inbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._over = False
        self._patience_s = patience_s
        self._reader = threading.Thread(target=self._read, name="scripted-peer", daemon=True)
        self._reader.start()

    def play(self, steps: list[Step]) -> None:
        """Until the end of the script or of the link, which is closed."""
        try:
            for step in steps:
                self._do(step)
            if self.link.kind == "objectstore":  # whose other end learns of a close by silence only
                self.link.send(b"damaged")
                self._inbox_ends()
        except LaneLost:
            pass
        self.link.close()
        self._reader.join(10)
        assert not self._reader.is_alive(), "closing a link wakes its reader"

    def _inbox_ends(self) -> None:
        with suppress(queue.Empty):
            while self._inbox.get(timeout=1.0) is not None:
                pass

    def _read(self) -> None:
        try:
            while True:
                self._inbox.put(self.link.receive(30))
        except LaneLost:
            self._inbox.put(None)

    def _do(self, step: Step) -> None:
        if step.until is not None:
            return self._await(step.until)
        if step.name == "bulk":
            self._bulk.append(self.link.send_bulk(step.parts))  # gloo sends it for as long as somebody holds this
            return
        self.link.send(packed_message(self._num_sent, step.name, step.body) if step.raw is None else step.raw)
        self._num_sent += 1

    def _await(self, until: Callable[[str, dict[str, Any]], bool]) -> None:
        """For as long as the other side may answer; a broken script may wait in vain."""
        if self._over or any(until(*one) for one in self.heard):
            return
        until_s = time.monotonic() + self._patience_s
        while True:
            try:
                raw = self._inbox.get(timeout=max(0.0, until_s - time.monotonic()))
            except queue.Empty:
                self._patience_s = IMPATIENCE_S
                return
            if raw is None:
                self._over = True
                return
            _, name, body = msgpack.unpackb(raw[4:])
            self.heard.append((name, body))
            if name == "chunk" and self._chunks is not None:
                chunk = self._chunks.manifest.chunks[body["index"]]
                self.link.receive_bulk(self._chunks.targets(chunk)).wait(1.0)
            self._over |= name in ("bye", "refused")
            if self._over or until(name, body):
                return
