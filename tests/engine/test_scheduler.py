"""Admission order, row budgets, slices and the promises of the scheduler in numbers of steps. Plain integers; no torch."""

import math
import random

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

    def add(self, name, conversation, question, answer, weight):
        ahead = self.scheduler.num_waiting + self.scheduler.num_running
        free = all(turn["conversation"] != conversation for turn in self.turns.values())
        self.turns[name] = {
            "name": name, "conversation": conversation, "free": free, "ahead": ahead, "weight": weight,
            "left": question, "rows": question, "answer": answer, "said": 0,
            "added": self.num_steps, "started": None, "asked": 0, "most": 0,
        }  # fmt: skip
        self.scheduler.add(name, conversation)

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
                    numbers = {seat.turn_id: seat.number for seat in self.scheduler._running()}
                    victim = self.scheduler.preempt()
                    assert victim == max(numbers, key=numbers.get), "the last in line makes way"
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
        if asking:
            least = (budget - (len(shares) - len(asking))) // len(asking)
            assert least >= math.ceil(budget / 2) // len(asking) >= 1 or budget == 1
            for name, rows in asking.items():
                assert rows >= min(self.turns[name]["left"], least), "an equal share, or all that it needs"
                self.turns[name]["most"] = max(self.turns[name]["most"], len(asking))


def play(seed, max_batch, max_step_tokens, slice_steps, room, num_turns, abort_share):
    rng = random.Random(seed)
    scheduler = Scheduler(max_batch, max_step_tokens, 10**6, slice_steps)
    world = World(scheduler, room, seed)
    for i in range(num_turns):
        most = room * 4 - 8
        question, weight = rng.choice((1, rng.randint(1, 40), rng.randint(1, 120))), rng.randint(0, room // 2)
        answer = rng.choice((1, rng.randint(1, 10), rng.randint(1, 150)))
        if weight + (question + answer) // 4 > room:
            question, answer, weight = min(question, most), 1, 0
        world.add(f"t{i}", f"c{rng.randrange(6)}", question, answer, weight)
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


@settings(derandomize=True, deadline=None, max_examples=400)
@given(
    seed=st.integers(0, 2**32), max_batch=st.integers(1, 6), max_step_tokens=st.integers(1, 60), slice_steps=st.integers(1, 40),
    room=st.integers(8, 120), num_turns=st.integers(1, 25), abort_share=st.sampled_from((0.0, 0.2)),
)  # fmt: skip
def test_nobody_starves_and_rows_are_shared(seed, max_batch, max_step_tokens, slice_steps, room, num_turns, abort_share):
    world = play(seed, max_batch, max_step_tokens, slice_steps, room, num_turns, abort_share)
    for turn in world.ended:
        waited = turn["started"] - turn["added"]
        if turn["free"]:
            assert waited <= 2 * (turn["ahead"] + 1) * slice_steps, f"{turn['name']} waited {waited} steps"
        if max_step_tokens > 1:
            share = max(1, math.ceil(max_step_tokens / 2) // max(1, turn["most"]))
            assert turn["asked"] <= math.ceil(turn["rows"] / share), f"{turn['name']} was asked in {turn['asked']} steps"


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
