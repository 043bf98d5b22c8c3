"""What is concluded from marks: shares, classes, differences."""

import math
from fractions import Fraction

import pytest

from benchmarks.lib.exam_marks import TURNS, VIDEO_S, Mark, Score, by_class, changed, mcnemar, scores_by, worst_gap


def mark(right, dialogue=0, turn=0, kind="color", expected="red", **fields):
    return Mark(dialogue, turn, kind, right, "", expected, **fields)


def test_scores_and_their_intervals():
    score = Score(95, 100)
    low, high = score.interval
    assert score.percent == 95.0 and (round(low, 1), round(high, 1)) == (88.8, 97.8)
    assert (
        Score(0, 0).interval == (0.0, 100.0) and Score(4, 4).interval[1] == pytest.approx(100) and math.isnan(Score(0, 0).percent)
    )


def test_a_group_is_right_if_all_of_it_is():
    marks = [mark(True, group="g"), mark(False, group="g"), mark(True, group="h"), mark(True, group="h"), mark(True), mark(False)]
    assert Score.of(marks) == Score(2, 4)


def test_marks_are_sorted_into_classes():
    marks = [mark(i % 2 == 0, turn=turn, video_s=s) for i, (turn, s) in enumerate([(0, 8), (1, 16), (2, 16), (7, 64), (29, 64)])]
    turns = by_class(marks, lambda one: one.turn + 1, TURNS, "turn")
    assert turns == {"turn 1": Score(1, 1), "turn 2-3": Score(1, 2), "turn 4-20": Score(0, 1), "turn 21+": Score(1, 1)}
    lengths = by_class(marks, lambda one: one.video_s, VIDEO_S, "seconds")
    assert {name: score.total for name, score in lengths.items()} == {"seconds 0-12": 1, "seconds 12-48": 2, "seconds 48+": 2}


def test_what_changed_and_how_probable_that_is():
    before = [mark(True, turn=i) for i in range(3)] + [mark(False, turn=3)]
    after = [mark(False, turn=0), mark(True, turn=1), mark(True, turn=2), mark(True, turn=3)]
    assert changed(before, after) == (1, 1) and changed(before, before) == (0, 0)
    with pytest.raises(AssertionError):
        changed(before, after[::-1])


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (5, 0), (0, 10), (10, 3), (7, 7), (60, 31)])
def test_mcnemar_is_the_sign_test_counted_out(lost, won):
    num = lost + won
    tail = sum((Fraction(math.comb(num, i), 2**num) for i in range(min(lost, won) + 1)), Fraction(0))
    assert mcnemar(lost, won) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-9)


def test_mcnemar_of_many_does_not_overflow():
    assert mcnemar(50_000, 50_000) == 1.0 and 0 <= mcnemar(60_000, 40_000) < 1e-12


def test_the_worst_kind_is_found_among_those_with_enough_questions():
    dense = [mark(True, turn=i, kind=kind) for kind, num in (("color", 100), ("where", 100), ("rare", 5)) for i in range(num)]
    sparse = [mark(one.turn >= {"color": 1, "where": 7, "rare": 5}[one.kind], turn=one.turn, kind=one.kind) for one in dense]
    assert worst_gap(dense, sparse) == ("where", pytest.approx(7.0))
    assert worst_gap(dense[:50], sparse[:50]) is None
    assert list(scores_by(dense, lambda one: one.kind)) == ["color", "where", "rare"]
