"""Journals: what a decode worker records of its conversations, and removes again."""

from dataclasses import replace

from sparsevila_cluster.cluster.workers.conversation_journals import ConversationJournals
from sparsevila_cluster.core.requests import Turn, TurnRecord


def record(number, conversation="c"):
    return TurnRecord(Turn(f"{conversation}-{number}", conversation, "m", "what is it?"), (number,))


def test_a_conversation_whose_beginning_was_forgotten_is_not_listed():
    """Its later turns would stand where the first ones were."""
    journals = ConversationJournals(1)
    journals.add(0, record(0))
    journals.add(0, record(0, "d"))
    journals.add(1, record(1))
    assert [journal.conversation_id for journal in journals.all()] == ["d"]
    journals.add(2, record(2, "d"))
    assert not journals.all()


def test_turns_are_matched_by_their_ids_and_answers():
    journals = ConversationJournals(8)
    journals.add(0, record(0))
    assert journals.matches("c", [record(0)]) and journals.matches("unknown", [])
    assert not any(journals.matches("c", other) for other in ([], [record(1)], [record(0), record(1)]))
    assert not journals.matches("c", [replace(record(0), token_ids=(7,))])
    journals.restore(record(0).turn, [record(5), record(6)])
    assert journals.matches("c", [record(5), record(6)])


def test_a_turn_whose_end_nobody_heard_is_removed_if_it_is_the_last_one():
    journals = ConversationJournals(8)
    first, second = record(0), record(1)
    journals.add(0, first)
    journals.add(1, second)
    assert not journals.remove_last(first.turn) and not journals.remove_last(record(0, "unknown").turn)
    assert journals.remove_last(second.turn) and not journals.remove_last(second.turn)
    assert journals.all()[0].records == (first,)
    assert journals.remove_last(first.turn) and not len(journals)
