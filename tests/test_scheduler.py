"""Admission order, limits and passing over busy conversations. Plain integers; no torch."""

from sparsevila_cluster.scheduler import Scheduler


def make(**limits):
    return Scheduler(**{"max_batch": 4, "max_step_tokens": 100, "max_waiting": 10, **limits})


def add(scheduler, *turns):
    for turn in turns:
        scheduler.add(turn, turn[0])  # the first letter is the conversation


def test_first_come_first_served_up_to_the_batch():
    scheduler = make(max_batch=2)
    add(scheduler, "a1", "b1", "c1")
    assert scheduler.admit(lambda turn: 10) == ["a1", "b1"]
    assert scheduler.admit(lambda turn: 10) == []
    scheduler.remove("a1")
    assert scheduler.admit(lambda turn: 10) == ["c1"]


def test_a_turn_without_room_blocks_those_behind_it():
    scheduler = make()
    add(scheduler, "a1", "b1")
    assert scheduler.admit(lambda turn: None if turn == "a1" else 1) == []
    assert scheduler.admit(lambda turn: 1) == ["a1", "b1"]


def test_turns_of_a_busy_conversation_wait_in_order():
    scheduler = make()
    add(scheduler, "a1", "a2", "b1", "a3")
    assert scheduler.admit(lambda turn: 1) == ["a1", "b1"]
    scheduler.remove("a1")
    assert scheduler.admit(lambda turn: 1) == ["a2"]


def test_rows_of_a_step_are_bounded_but_a_long_question_runs():
    scheduler = make()
    add(scheduler, "a1", "b1", "c1")
    assert scheduler.admit(lambda turn: 60) == ["a1", "b1"]  # 60 < 100: one more; 120 >= 100: stop
    scheduler.remove("a1")
    scheduler.remove("b1")
    add(scheduler, "d1")
    assert scheduler.admit(lambda turn: 500) == ["c1"]


def test_decode_rows_come_first_and_phases_move():
    scheduler = make()
    add(scheduler, "a1")
    scheduler.admit(lambda turn: 5)
    scheduler.answered("a1")
    add(scheduler, "b1")
    scheduler.admit(lambda turn: 5)
    assert scheduler.step() == [("a1", "decode"), ("b1", "question")]


def test_a_turn_that_fails_while_being_admitted_does_not_block():
    scheduler = make()
    add(scheduler, "a1", "b1")

    def try_admit(turn):
        if turn == "a1":
            scheduler.remove(turn)
            return None
        return 1

    assert scheduler.admit(try_admit) == ["b1"]


def test_waiting_limit():
    scheduler = make(max_waiting=2)
    add(scheduler, "a1")
    assert not scheduler.full
    add(scheduler, "b1")
    assert scheduler.full and not scheduler.idle
