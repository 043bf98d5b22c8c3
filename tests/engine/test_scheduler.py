"""Admission order, row budgets, slices and the promises of the scheduler in numbers of steps. Plain integers; no torch."""

import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsevila_cluster.engine.scheduler import Scheduler


def make(**limits):
    return Scheduler(**{"max_batch": 4, "max_step_tokens": 100, "max_waiting": 10, **limits})


def add(scheduler, *turns):
    for turn in turns:
        scheduler.add(turn, turn[0])  # the first letter is the conversation


def admit(scheduler, rows=10, preempted=None):
    """Admit with questions of `rows` (a number or a function); turns that must make way are appended to `preempted`."""
    return scheduler.admit(rows if callable(rows) else lambda turn: rows, (preempted if preempted is not None else []).append)


def test_first_come_first_served_up_to_the_batch():
    scheduler = make(max_batch=2)
    add(scheduler, "a1", "b1", "c1")
    assert admit(scheduler) == ["a1", "b1"]
    assert admit(scheduler) == []
    scheduler.remove("a1")
    assert admit(scheduler) == ["c1"]


def test_a_turn_without_room_blocks_those_behind_it():
    scheduler = make()
    add(scheduler, "a1", "b1")
    assert admit(scheduler, lambda turn: None if turn == "a1" else 1) == []
    assert admit(scheduler) == ["a1", "b1"]


def test_turns_of_a_busy_conversation_wait_in_order():
    scheduler = make()
    add(scheduler, "a1", "a2", "b1", "a3")
    assert admit(scheduler) == ["a1", "b1"]
    scheduler.remove("a1")
    assert admit(scheduler) == ["a2"]


def test_a_step_has_its_rows_and_no_more():
    scheduler = make(max_step_tokens=20)
    add(scheduler, "a1", "b1", "c1")
    assert admit(scheduler, {"a1": 3, "b1": 30, "c1": 40}.__getitem__) == ["a1", "b1", "c1"]
    assert scheduler.schedule() == [("a1", 3), ("b1", 8), ("c1", 9)], "what the short one leaves goes to the others, equally"
    scheduler.update("a1")
    assert scheduler.schedule() == [("a1", 1), ("b1", 9), ("c1", 10)]
    assert scheduler.schedule() == [("a1", 1), ("b1", 9), ("c1", 10)]
    assert scheduler.schedule() == [("a1", 1), ("b1", 4), ("c1", 11)]


def test_decode_rows_come_first():
    scheduler = make()
    add(scheduler, "a1", "b1")
    admit(scheduler, 5)
    assert scheduler.schedule() == [("a1", 5), ("b1", 5)]
    scheduler.update("b1")
    add(scheduler, "c1")
    admit(scheduler, 5)
    scheduler.remove("a1")
    assert scheduler.schedule() == [("b1", 1), ("c1", 5)]


def test_running_turns_leave_half_of_the_rows_to_questions():
    assert make(max_batch=32, max_step_tokens=10).max_running == 5
    assert make(max_batch=3, max_step_tokens=10).max_running == 3
    assert make(max_batch=3, max_step_tokens=1).max_running == 1


def test_a_turn_that_fails_while_being_admitted_does_not_block():
    scheduler = make()
    add(scheduler, "a1", "b1")

    def try_admit(turn):
        if turn == "a1":
            scheduler.remove(turn)
            return None
        return 1

    assert admit(scheduler, try_admit) == ["b1"]


def test_waiting_limit():
    scheduler = make(max_waiting=2)
    add(scheduler, "a1")
    assert not scheduler.full
    add(scheduler, "b1")
    assert scheduler.full and not scheduler.idle


def test_the_last_in_line_makes_way_and_keeps_its_place():
    scheduler = make()
    add(scheduler, "a1", "b1", "c1", "d1")
    admit(scheduler, {"a1": 1, "b1": 1, "c1": 1, "d1": 1}.__getitem__)
    scheduler.update("a1")
    add(scheduler, "e1", "c2")
    assert [scheduler.preempt(), scheduler.preempt()] == ["d1", "c1"]
    # c1 is in the middle of its answer: c2 waits for it although c1 does not run, and e1 for both.
    assert admit(scheduler, lambda turn: None) == []
    assert admit(scheduler, lambda turn: 0) == ["c1", "d1"]
    assert sorted(scheduler.schedule()) == [("a1", 1), ("b1", 1), ("c1", 1), ("d1", 1)]
    assert scheduler.num_preempted == 2


def test_a_slice_that_is_over_ends_only_when_others_wait():
    scheduler = make(max_batch=2, slice_steps=3)
    add(scheduler, "a1", "b1")
    preempted = []
    for _ in range(10):
        admit(scheduler, 0, preempted)
        scheduler.schedule()
    assert preempted == []
    add(scheduler, "a2")
    admit(scheduler, 0, preempted)
    assert preempted == [], "a2 waits for its own conversation, which no seat would help"
    add(scheduler, "c1", "d1", "e1")
    assert admit(scheduler, 0, preempted) == ["c1", "d1"] and preempted == ["a1", "b1"]
    for _ in range(3):
        assert admit(scheduler, 0, preempted) == []
        scheduler.schedule()
    assert admit(scheduler, 0, preempted) == ["e1", "a1"], "they are behind e1 now, and a2 is still behind a1"


def test_a_slice_goes_on_after_a_preemption():
    scheduler = make(max_batch=1, slice_steps=4)
    add(scheduler, "a1", "b1")
    admit(scheduler, 0)
    for _ in range(3):
        scheduler.schedule()
    assert scheduler.preempt() == "a1" and admit(scheduler, 0) == ["a1"]
    scheduler.schedule()
    preempted = []
    assert admit(scheduler, 0, preempted) == ["b1"] and preempted == ["a1"]


# ---- the promises, against random loads ------------------------------------------------------------------------------------


class World:
    """A naive engine of integers: turns have question rows, answers and bytes that grow with them; `room` bytes in all."""

    def __init__(self, scheduler, room, seed):
        self.scheduler, self.room, self.rng = scheduler, room, random.Random(seed)
        self.turns, self.held, self.log = {}, {}, []
        self.num_steps, self.ended = 0, []

    def add(self, name, conversation, question, answer, weight, owner=""):
        ahead = sum(turn["owner"] == owner for turn in self.turns.values())
        free = all(turn["conversation"] != conversation for turn in self.turns.values())
        self.turns[name] = {
            "name": name, "owner": owner, "conversation": conversation, "free": free, "ahead": ahead, "weight": weight,
            "left": question, "rows": question, "answer": answer, "said": 0,
            "added": self.num_steps, "started": None, "asked": 0, "least": math.inf,
        }  # fmt: skip
        self.scheduler.add(name, conversation, owner)

    def bytes_of(self, turn):
        return turn["weight"] + (turn["rows"] + turn["said"]) // 4

    def try_admit(self, name):
        turn = self.turns[name]
        need = self.bytes_of(turn)
        if need > self.room - sum(self.held.values()):
            return None
        self.held[name] = need
        if turn["started"] is None:
            turn["started"] = self.num_steps
        return turn["left"]

    def give_way(self, name):
        del self.held[name]

    def grow(self):
        for name in list(self.held):
            while name in self.held and self.bytes_of(self.turns[name]) > self.held[name]:
                if sum(self.held.values()) < self.room:
                    self.held[name] += 1
                else:
                    num_of = Counter(self.turns[held]["owner"] for held in self.held)
                    last = max((num_of[seat.owner], seat.number, seat.turn_id) for seat in self.scheduler._running())
                    victim = self.scheduler.preempt()
                    assert victim == last[2], "the last in the line of who runs the most makes way"
                    self.give_way(victim)

    def step(self):
        self.grow()
        self.scheduler.admit(self.try_admit, self.give_way)
        shares = self.scheduler.schedule()
        self.check_rows(shares)
        self.num_steps += 1
        for name, rows in shares:
            turn = self.turns[name]
            if turn["left"]:
                turn["left"] -= rows
                turn["asked"] += 1
                if turn["left"] == 0:
                    self.scheduler.update(name)
                continue
            turn["said"] += 1
            if turn["said"] == turn["answer"]:
                self.end(name)

    def end(self, name):
        self.scheduler.remove(name)
        self.held.pop(name, None)
        self.ended.append(self.turns.pop(name))

    def check_rows(self, shares):
        budget, seats = self.scheduler.max_step_tokens, self.scheduler.max_running
        assert sum(rows for _, rows in shares) <= budget and len(shares) <= seats
        assert sorted(name for name, _ in shares) == sorted(self.held), "every running turn has a share of every step"
        asking = {name: rows for name, rows in shares if self.turns[name]["left"]}
        assert all(rows == 1 for name, rows in shares if name not in asking)
        assert [name in asking for name, _ in shares] == sorted(name in asking for name, _ in shares), "decode rows first"
        if not asking:
            return
        left, num_of = budget - (len(shares) - len(asking)), Counter(self.turns[name]["owner"] for name in asking)
        assert left >= math.ceil(budget / 2) >= len(asking) or budget == 1
        for owner, num in num_of.items():
            own = [name for name in asking if self.turns[name]["owner"] == owner]
            least = num + (left - len(asking)) // len(num_of)
            assert sum(asking[name] for name in own) >= min(sum(self.turns[name]["left"] for name in own), least), "by owner first"
            for name in own:
                assert asking[name] >= min(self.turns[name]["left"], least // num) >= 1, "an equal share, or all that it needs"
                promised = 1 + max(0, math.ceil(budget / 2) - len(asking)) // len(num_of) // num
                self.turns[name]["least"] = min(self.turns[name]["least"], promised)


def play(seed, max_batch, max_step_tokens, slice_steps, room, num_turns, abort_share, num_owners=1):
    rng = random.Random(seed)
    scheduler = Scheduler(max_batch, max_step_tokens, 10**6, slice_steps)
    world = World(scheduler, room, seed)
    for i in range(num_turns):
        most = room * 4 - 8
        question, weight = rng.choice((1, rng.randint(1, 40), rng.randint(1, 120))), rng.randint(0, room // 2)
        answer = rng.choice((1, rng.randint(1, 10), rng.randint(1, 150)))
        if weight + (question + answer) // 4 > room:
            question, answer, weight = min(question, most), 1, 0
        conversation = rng.randrange(6)
        world.add(f"t{i}", f"c{conversation}", question, answer, weight, f"o{conversation % num_owners}")
        for _ in range(rng.choice((0, 0, 1, 5))):
            world.step()
        if world.turns and rng.random() < abort_share:
            world.end(rng.choice(sorted(world.turns)))
            world.ended.pop()
    work = sum(t["left"] + t["answer"] for t in world.turns.values())
    for _ in range(4 * work + 10):
        if scheduler.idle:
            break
        world.step()
    assert scheduler.idle and not world.held, "somebody starves"
    return world


@settings(derandomize=True, deadline=None, max_examples=220)
@given(
    seed=st.integers(0, 2**32), max_batch=st.integers(1, 6), max_step_tokens=st.integers(1, 60), slice_steps=st.integers(1, 40),
    room=st.integers(8, 120), num_turns=st.integers(1, 25), abort_share=st.sampled_from((0.0, 0.2)), num_owners=st.integers(1, 4),
)  # fmt: skip
def test_nobody_starves_and_rows_are_shared(slice_steps, num_owners, **load):
    world = play(slice_steps=slice_steps, num_owners=num_owners, **load)
    for turn in world.ended:
        waited = turn["started"] - turn["added"]
        if turn["free"]:
            assert waited <= 2 * (turn["ahead"] + 1) * num_owners * slice_steps, f"{turn['name']} waited {waited} steps"
        if turn["asked"]:
            assert turn["asked"] <= math.ceil(turn["rows"] / turn["least"]), f"{turn['name']} was asked in {turn['asked']} steps"


@pytest.mark.parametrize("others", ["long answers", "long questions"])
def test_a_short_turn_beside_long_ones(others):
    """Four seats, four long turns, then a short one: it starts within a slice, and ends a few steps later."""
    scheduler = Scheduler(max_batch=4, max_step_tokens=40, max_waiting=10, slice_steps=16)
    world = World(scheduler, room=10**9, seed=0)
    long = {"question": 4, "answer": 10_000} if others == "long answers" else {"question": 40_000, "answer": 4}
    for i in range(4):
        world.add(f"long{i}", f"c{i}", **long, weight=1)
    for _ in range(10):
        world.step()
    world.add("short", "s", question=12, answer=8, weight=1)
    for _ in range(16 + 2 + 8):
        world.step()
    assert [turn["name"] for turn in world.ended] == ["short"]
    done = [long["answer"] - t["said"] if others == "long answers" else t["left"] for t in world.turns.values()]
    assert max(done) - min(done) <= 40 * 20, "the long ones go on, side by side"


def test_an_owner_who_comes_second_has_half_of_the_places_at_once():
    """Eight places taken by turns of one owner, and a hundred more in its queue: another owner's turns do not wait for a slice."""
    scheduler = Scheduler(max_batch=8, max_step_tokens=64, max_waiting=200, slice_steps=1000)
    world = World(scheduler, room=10**9, seed=0)
    for i in range(108):
        world.add(f"a{i}", f"a{i}", question=4, answer=10_000, weight=1, owner="anna")
    for _ in range(5):
        world.step()
    for i in range(6):
        world.add(f"b{i}", f"b{i}", question=4, answer=50, weight=1, owner="bert")
    world.step()
    assert Counter(world.turns[name]["owner"] for name in world.held) == {"anna": 4, "bert": 4}
    assert scheduler.num_preempted == 4 and {"a0", "a1", "a2", "a3"} <= set(world.held), "those that came last make way"
    for _ in range(2 * 51):
        world.step()
    assert [turn["name"] for turn in world.ended] == [f"b{i}" for i in range(6)]
    assert scheduler.num_preempted == 4, "nobody is sent away twice for one who comes once"
    assert Counter(world.turns[name]["owner"] for name in world.held) == {"anna": 8}
    assert {"a4", "a5", "a6", "a7"} <= set(world.held), "and has its place back first"


def test_owners_take_turns_where_there_are_fewer_places_than_owners():
    scheduler, order = Scheduler(max_batch=1, max_step_tokens=8, max_waiting=100, slice_steps=50), []
    world = World(scheduler, room=10**9, seed=0)
    for owner, num in (("anna", 12), ("bert", 4), ("carl", 2)):
        for i in range(num):
            world.add(f"{owner}{i}", f"{owner}{i}", question=1, answer=3, weight=1, owner=owner)
    while world.turns:
        world.step()
    order = [turn["owner"][0] for turn in world.ended]
    assert "".join(order) == "abc" * 2 + "ab" * 2 + "a" * 8


def test_a_turn_too_large_for_what_is_free_blocks_other_owners_for_a_slice_at_most():
    scheduler = Scheduler(max_batch=8, max_step_tokens=64, max_waiting=100, slice_steps=20)
    world = World(scheduler, room=100, seed=0)
    world.add("long", "l", question=1, answer=300, weight=10, owner="bert")
    world.step()
    world.add("large", "g", question=1, answer=5, weight=95, owner="anna")
    num_small = 0
    while "large" in world.turns:
        world.add(f"small{num_small}", f"s{num_small}", question=1, answer=2, weight=10, owner="bert")
        num_small += 1
        world.step()
    assert world.num_steps <= 20 + 10
    while world.turns:
        world.step()
    assert len(world.ended) == num_small + 2


def test_rows_of_a_step_are_shared_between_owners_first():
    scheduler = make(max_step_tokens=64, max_batch=8)
    for i in range(4):
        scheduler.add(f"a{i}", f"a{i}", "anna")
    scheduler.add("b0", "b0", "bert")
    admit(scheduler, 1000)
    rows = dict(scheduler.schedule())
    assert sum(rows.values()) == 64 and rows["b0"] == 1 + 59 // 2, "half of what is left when each has one"
    assert sorted(rows[f"a{i}"] for i in range(4)) == [8, 8, 9, 9]


def test_one_owner_has_its_share_of_the_queue():
    scheduler = make(max_waiting=8, max_share=0.75)
    assert [scheduler.bound_of(owner) for owner in ("", "anna")] == [8, 6]
    for i in range(6):
        scheduler.add(f"a{i}", f"a{i}", "anna")
    assert scheduler.num_waiting_of("anna") == 6 and scheduler.num_waiting_of("bert") == 0 and not scheduler.full


def test_a_long_answer_goes_on_beside_more_short_ones_than_there_are_seats_for():
    scheduler = Scheduler(max_batch=2, max_step_tokens=40, max_waiting=8, slice_steps=16)
    world = World(scheduler, room=10**9, seed=0)
    world.add("long", "l", question=4, answer=400, weight=1)
    while "long" in world.turns:
        if not scheduler.full:
            world.add(f"short{world.num_steps}", f"s{world.num_steps}", question=4, answer=5, weight=1)
        world.step()
    # 26 slices, each behind a line of at most 8 turns of 6 steps on two seats.
    assert world.num_steps <= 26 * (16 + 8 * 6)
    assert len(world.ended) > 400 / 5
