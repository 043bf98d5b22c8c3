"""One run of a storm: random operations on a decode engine with tiny random budgets, and what must hold after each of them.

Checked are the integrity of both arenas, bounded waiting, errors only where they were asked for, every finished answer against
the same turn alone (see single_turn_reference), and at the end that everything is given back, to the byte.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from sparsevila_cluster.core.config import build_config
from sparsevila_cluster.core.errors import BadRequest, Cancelled, DeadlineExceeded, Internal, NotFound, QueueFull, TooLarge
from sparsevila_cluster.core.requests import Turn, TurnRecord
from sparsevila_cluster.engine.decode_engine import DecodeEngine
from sparsevila_cluster.engine.turn import RunningTurn
from sparsevila_cluster.kvcache.conversation_store import ROUND_SLOTS, Conversation
from tests.engine.random_turns import draw_replay, draw_turn
from tests.engine.single_turn_reference import ReferenceEngine, TurnOutput, check_usage, differences

# key -> kind, frames, height, width: 12 to 80 visual tokens.
MEDIA = {
    "short": ("video", 2, 56, 84), "long": ("video", 8, 112, 140), "wide": ("video", 4, 56, 140), "tall": ("video", 6, 140, 56),
    "still": ("image", 1, 112, 112),
}  # fmt: skip
SPARSITY = {"prune_keep": 0.6, "retrieve_keep": 0.5, "brownout_floor": 0.05}
NUM_OWNERS = 3


def owner_of(conversation_id: str) -> str:
    """Whose conversation it is, the one of nobody among them."""
    return ("", "anna", "bert")[int(conversation_id[1:]) % NUM_OWNERS]


@dataclass
class Asked:
    """One turn that was submitted, and what may become of it."""

    turn: Turn
    running: RunningTurn
    events: list = field(default_factory=list)
    may_fail: set[type] = field(default_factory=set)
    start_by_step: int | None = None
    brownout: float | None = None


class StormRun:
    """Operations drawn from `rng` on one engine. Raises AssertionError at the first thing that is not as it must be."""

    def __init__(self, model, rng: random.Random, heard: dict):
        limits = {
            "max_batch": rng.choice((1, 3, 5, 5, 8)), "max_step_tokens": rng.choice((3, 9, 24, 24, 100)), "max_waiting": 8,
            "slice_steps": rng.choice((2, 12, 12, 40)), "max_conversations": 9,
        }  # fmt: skip
        size, slots, prefix_slots = model.spec.bytes_per_token, rng.choice((192, 256, 320)), rng.choice((120, 200, 300))
        sparsity = {
            **SPARSITY, "retrieve_rows": rng.choice(("all", "all", "question", "last")),
            "normalise": rng.choice(("full_row", "full_row", "visual")), "refresh_every": rng.choice((0, 0, 4)),
        }  # fmt: skip
        config = build_config(model="unused", prefix_bytes=prefix_slots * size, turn_bytes=slots * size, **sparsity, **limits)
        self.rng, self.model, self.heard = rng, model, heard
        self.engine = DecodeEngine(model, config)
        self.mirror = ReferenceEngine(model, heard, **sparsity)
        for key, shape in MEDIA.items():
            assert self.mirror.prepare(key, *shape).length <= prefix_slots, key
        self.open: dict[str, Asked] = {}
        self.names: dict[Conversation, str] = {}
        self.parted: set[Conversation] = set()
        self.checked: list[TurnRecord] = []
        self.counts: Counter[str] = Counter()
        self.peak_bytes = 0
        self.num_asked = 0
        self._plan = self.engine.scheduler.schedule
        self.engine.scheduler.schedule = self._checked_plan

    # ---- operations --------------------------------------------------------------------------------------------------------

    def operate(self) -> str:
        """One random operation, some steps, every check. Returns the operation's name."""
        table: dict[Callable[[], None], int] = {
            self.ask: 30, self.burst: 4, self.wait: 30, self.abort: 8, self.prepare: 8, self.evict: 3, self.delete: 3,
            self.close: 4, self.expire: 2, self.brownout: 3, self.fault: 1, self.ask_too_much: 1, self.ask_nonsense: 2,
            self.replay: 8,
        }  # fmt: skip
        operation = self.rng.choices(list(table), list(table.values()))[0]
        self.counts["operations"] += 1
        operation()
        self.check()
        for _ in range(self.rng.choice((0, 1, 2, 3))):
            self.step()
        return operation.__name__

    def wait(self) -> None:
        for _ in range(self.rng.randint(2, 12)):
            self.step()

    def burst(self) -> None:
        for _ in range(self.rng.randint(2, 12)):
            self.ask()

    def ask(self, max_tokens: int | None = None, **options) -> None:
        rng, engine = self.rng, self.engine
        conversation_id = f"c{rng.randrange(12)}"
        conversation = engine.conversations.get(conversation_id)
        media_id = conversation.media_id if conversation is not None else rng.choice(sorted(MEDIA))
        turn = draw_turn(rng, self.num_asked, conversation_id, media_id, max_tokens, owner=owner_of(conversation_id), **options)
        self.num_asked += 1
        self.submit(turn)

    def replay(self) -> None:
        """Somebody goes on with an answer that was begun elsewhere: here, it is one that was given and checked."""
        free = [name for name in map("c{}".format, range(12)) if name not in self.engine.conversations._all]
        if self.checked and free:
            replayed = draw_replay(self.rng, self.rng.choice(self.checked), self.num_asked, self.rng.choice(free))
            self.submit(replace(replayed, owner=owner_of(replayed.conversation_id)))
            self.num_asked += 1

    def submit(self, turn: Turn) -> None:
        engine, scheduler, events = self.engine, self.engine.scheduler, []
        ahead = sum(asked.turn.owner == turn.owner for asked in self.open.values() if asked.turn.turn_id in engine.turns)
        busy = any(asked.turn.conversation_id == turn.conversation_id for asked in self.open.values())
        try:
            engine.submit(turn, events.append)
        except QueueFull:
            assert scheduler.full or scheduler.num_waiting_of(turn.owner) >= scheduler.bound_of(turn.owner)
            self.counts["refused"] += 1
            return
        except NotFound:
            assert turn.media_id not in engine.prefixes
            self.counts["not resident"] += 1
            if self._make(turn.media_id) is not None:
                self.submit(turn)
            return
        asked = self.open[turn.turn_id] = Asked(turn, engine.turns[turn.turn_id], events)
        if turn.replay is not None:
            asked.brownout = turn.replay.brownout
        if not busy:
            asked.start_by_step = self.counts["steps"] + 2 * (ahead + 1) * NUM_OWNERS * engine.config.slice_steps

    def ask_too_much(self) -> None:
        self.ask(max_tokens=self.rng.choice((300, 5000)))

    def ask_nonsense(self) -> None:
        """What must be refused at once, and leave no trace."""
        held = self.engine.conversations.arena.used_bytes, len(self.engine.turns)
        media_id = self.rng.choice(sorted(MEDIA))
        for turn in (
            Turn("x", "nobody", "no such media", "what?"),
            Turn("x", "nobody", media_id, "what " * 3000),
            Turn("x", "nobody", media_id, "<|im_end|>"),
        ):
            try:
                self.engine.submit(turn, lambda event: None)
            except (NotFound, TooLarge, BadRequest, QueueFull):
                continue
            raise AssertionError(f"{turn.question[:20]!r} about {turn.media_id!r} was accepted")
        assert held == (self.engine.conversations.arena.used_bytes, len(self.engine.turns))

    def abort(self) -> None:
        if (asked := self._some_turn()) is not None:
            asked.may_fail.add(Cancelled)
            assert self.engine.abort(asked.turn.turn_id) and not self.engine.abort(asked.turn.turn_id)
            self.counts["aborts"] += 1

    def expire(self) -> None:
        if (asked := self._some_turn()) is not None:
            asked.may_fail.add(DeadlineExceeded)
            asked.running.deadline_at_s = 0.0

    def prepare(self) -> None:
        """Make a prefix as the pipeline does; sometimes it is given up, sometimes two makers race."""
        key, fate = self.rng.choice(sorted(MEDIA)), self.rng.random()
        if fate < 0.2:
            self.evict(self.rng.randint(1, 100))
        elif fate < 0.4:
            twins = [self._make(key, publish=False) for _ in range(2)]
            for twin in twins:
                if twin is not None:
                    assert self.engine.prefixes.publish(twin) is self.engine.prefixes.get(key)
        else:
            self._make(key)

    def evict(self, length: int | None = None) -> None:
        extent = self._reserve(length or self.rng.randint(60, self.engine.prefixes.arena.num_slots))
        if extent is not None:
            self.engine.prefixes.cancel(extent)

    def delete(self) -> None:
        key = self.rng.choice(sorted(MEDIA))
        held = any(asked.turn.media_id == key for asked in self.open.values())
        free = key in self.engine.prefixes and not held
        assert self.engine.prefixes.remove(key) == free

    def close(self) -> None:
        conversation_id = f"c{self.rng.randrange(12)}"
        for asked in self.open.values():
            if asked.turn.conversation_id == conversation_id:
                asked.may_fail.add(Cancelled)
                self.counts["aborts"] += 1
        known = self.engine.conversations.get(conversation_id) is not None
        assert self.engine.close_conversation(conversation_id) == known

    def brownout(self) -> None:
        self.engine.set_brownout(self.rng.choice((0.0, 0.0, 0.3, 1.0)))

    def fault(self) -> None:
        """The next pass of the text model fails: what runs in it fails, what waits does not."""
        text = self.model.text
        plain, called = text.forward, []

        def forward(*args, **kwargs):
            called.append(True)
            for turn_id, asked in self.open.items():
                if turn_id in self.engine.turns and asked.running.room is not None:
                    asked.may_fail.add(Internal)
            raise RuntimeError("a fault of the storm")

        text.forward = forward
        try:
            self.step()
        finally:
            text.forward = plain
        self.counts["faults"] += bool(called)

    def _some_turn(self) -> Asked | None:
        return self.open[self.rng.choice(sorted(self.open))] if self.open else None

    def _reserve(self, length: int):
        try:
            return self.engine.prefixes.reserve(length)
        except QueueFull:
            assert any(map(self.engine.prefixes.holders, MEDIA)) or self.engine.prefixes._reserved
            return None

    def _make(self, key: str, publish: bool = True):
        prefixes = self.engine.prefixes
        if publish and prefixes.get(key) is not None:
            return None
        extent = self._reserve(self.mirror.engine.prefixes.get(key).length)
        if extent is None:
            return None
        made = self.mirror.copy_of(key, lambda length: extent)
        return prefixes.publish(made) if publish else made

    # ---- steps and checks --------------------------------------------------------------------------------------------------

    def _checked_plan(self) -> list[tuple[str, int]]:
        shares = self._plan()
        limits, rows = self.engine.config, [rows for _, rows in shares]
        assert sum(rows) <= limits.max_step_tokens and len(rows) <= limits.max_batch and min(rows, default=1) >= 1
        assert len(shares) == self.engine.scheduler.num_running, "a running turn was left out"
        return shares

    def step(self) -> None:
        turns, num_steps = len(self.engine.turns), self.engine.num_steps
        self.engine.step()
        self.counts["steps"] += 1
        assert not turns or self.engine.num_steps > num_steps or len(self.engine.turns) < turns, "turns wait and nothing runs"
        self.check()

    def check(self) -> None:
        engine = self.engine
        engine.check_integrity()
        self.peak_bytes = max(self.peak_bytes, engine.conversations.arena.used_bytes + engine.prefixes.arena.used_bytes)
        for turn_id, asked in list(self.open.items()):
            if turn_id not in engine.turns:
                del self.open[turn_id]
                self._judge(asked)
            elif asked.running.phase != "waiting":
                asked.brownout = engine.brownout if asked.brownout is None else asked.brownout
            elif asked.start_by_step is not None:
                assert self.counts["steps"] <= asked.start_by_step, f"{turn_id} waits for too long"
        for conversation in list(self.names):
            if engine.conversations._all.get(conversation.conversation_id) is not conversation:
                self.mirror.close(self.names.pop(conversation))

    def _judge(self, asked: Asked) -> None:
        last, turn, running = asked.events[-1], asked.turn, asked.running
        logits = self.heard.pop(running.sampler, [])
        if isinstance(last, Exception):
            assert type(last) in asked.may_fail or self._is_too_large(asked, last), f"{turn.turn_id} failed: {last!r}"
            self.counts[type(last).__name__] += 1
            return
        assert last.kind == "done" and running.room is None
        check_usage(running, last.usage, self.engine.brownout if asked.brownout is None else asked.brownout)
        self.counts["degraded"] += last.usage.degraded
        self.counts["preempted turns"] += bool(last.usage.num_preemptions)
        if running.conversation in self.parted:
            return
        name = self.names.setdefault(running.conversation, f"{turn.conversation_id}#{turn.turn_id}")
        said = TurnOutput(asked.events, logits)
        found = differences(said, self.mirror.answer(running, name))
        assert found in (None, "tie"), f"{turn.turn_id} ({turn}): {found}"
        self.counts["answers checked" if found is None else "ties"] += 1
        self.counts["replays checked"] += found is None and turn.replay is not None
        if found is None and turn.replay is None and running.conversation.num_turns == 1:
            self.checked.append(TurnRecord(turn, tuple(said.tokens), last.usage.brownout))
        if found:  # from here on the two conversations are about different things
            self.parted.add(running.conversation)

    def _is_too_large(self, asked: Asked, error: Exception) -> bool:
        tail, packed = asked.running.max_room()
        rounded = -(-tail // ROUND_SLOTS) * ROUND_SLOTS
        over = rounded + packed > self.engine.conversations.arena.num_slots or "position" in str(error)
        return isinstance(error, TooLarge) and over and asked.running.phase == "waiting"

    def end(self) -> None:
        """Let everything finish within a bounded number of steps, then give everything back."""
        for _ in range(10 + 4 * sum(asked.turn.sampling.max_tokens + 400 for asked in self.open.values())):
            if self.engine.idle:
                break
            self.step()
        assert self.engine.idle and not self.open, f"{sorted(self.open)} do not end"
        for i in range(12):
            self.engine.close_conversation(f"c{i}")
        for key in MEDIA:
            resident = key in self.engine.prefixes
            assert self.engine.prefixes.remove(key) == resident
        self.check()
        assert len(self.engine.conversations) == 0 and len(self.engine.prefixes) == 0
        assert self.engine.conversations.arena.used_bytes == 0 and self.engine.prefixes.arena.used_bytes == 0
        assert not self.heard, "logits of a turn that nobody asked for"

    def summary(self) -> Counter[str]:
        engine, counts = self.engine, self.counts
        return Counter({
            "operations": counts["operations"], "steps": counts["steps"], "turns": self.num_asked,
            "answers_checked": counts["answers checked"], "ties": counts["ties"],
            "preemptions": engine.scheduler.num_preempted, "answers_of_preempted_turns": counts["preempted turns"],
            "replays_checked": counts["replays checked"],
            "evictions": engine.prefixes.num_evicted, "aborts": counts["aborts"], "expired": counts["DeadlineExceeded"],
            "failed_by_faults": counts["Internal"], "too_large": counts["TooLarge"], "refused": counts["refused"],
            "parked_tails": engine.conversations.num_parked, "degraded": counts["degraded"], "peak_bytes": self.peak_bytes,
        })  # fmt: skip
