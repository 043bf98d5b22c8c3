"""Journals: what a decode worker writes down of its conversations, and strikes out again."""

from sparsevila_cluster.cluster.workers.journals import Journals
from sparsevila_cluster.request import Turn, TurnRecord


def record(number, conversation="c"):
    return TurnRecord(Turn(f"{conversation}-{number}", conversation, "m", "what is it?"), (number,))


def test_a_turn_whose_end_nobody_heard_is_struck_out_if_it_is_the_last_one():
    journals = Journals(8)
    first, second = record(0), record(1)
    journals.add(first)
    journals.add(second)
    assert not journals.take_back(first.turn) and not journals.take_back(record(0, "unknown").turn)
    assert journals.take_back(second.turn) and not journals.take_back(second.turn)
    assert journals.all()[0].records == (first,)
    assert journals.take_back(first.turn) and not len(journals)
