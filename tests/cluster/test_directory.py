"""The directory: what it believes of whom, for how long, and what it forgets first."""

from dataclasses import replace

import pytest

from sparsevila_cluster.cluster.directory import (
    MAX_DEPLOYMENTS,
    MAX_ROUTERS,
    MAX_TURNS,
    MISSED_REPORTS,
    NOTE_REPORTS,
    OWNERS_S,
    SETTLE_REPORTS,
    Directory,
)
from sparsevila_cluster.cluster.messages import ConversationJournal, Load, WorkerReport
from sparsevila_cluster.core.errors import BadCheckpoint, QueueFull, from_failure, to_failure
from sparsevila_cluster.core.requests import MediaHandle, Turn, TurnRecord


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def directory(clock):
    return Directory(1.0, max_conversations=3, clock=clock)


def handle(key, tenant=""):
    return MediaHandle(key, "video", 8, 4.0, 100, 25, 30, 3000, 12000, tenant=tenant)


def report(worker, pool="decode", keys=None, records=(), **load):
    residents = None if keys is None else tuple(handle(key) for key in keys)
    return WorkerReport(worker, pool, address=f"address of {worker}", load=Load(**load), residents=residents, records=records)


def said(number, *token_ids, conversation="c"):
    return TurnRecord(Turn(f"t{number}", conversation, "m", f"question {number}?"), token_ids)


def worker_names(reports):
    return sorted(one.worker for one in reports)


def test_it_knows_who_holds_what_and_with_which_load(directory):
    directory.report(report("d0", keys=["m", "n"], num_running=2))
    directory.report(report("d1", keys=["m"]))
    directory.report(report("p0", "prefill", keys=["m"], records=None))
    found = directory.find(None, "m")
    assert worker_names(found.holders) == ["d0", "d1"] and worker_names(found.copies) == ["p0"] and found.handle == handle("m")
    assert {one.worker: one.load.num_running for one in found.holders} == {"d0": 2, "d1": 0}
    assert all(one.residents is None and one.records is None for one in found.holders), "the answer carries what nobody asked"
    assert worker_names(directory.holders("n")) == ["d0"] and directory.find(None, "unknown").handle is None
    assert worker_names(directory.snapshot().of("decode")) == ["d0", "d1"] and worker_names(directory.snapshot().of("prefill")) == [
        "p0"
    ]
    assert [(one.handle.media_id, one.holders, one.copies) for one in directory.list_media()] == [
        ("m", ("d0", "d1"), ("p0",)),
        ("n", ("d0",), ()),
    ]


def test_it_knows_whose_turns_there_are_anywhere(directory):
    directory.report(replace(report("d0", keys=["m"]), owners=frozenset({"ann", "bob"})))
    directory.report(replace(report("d1", keys=["n"]), owners=frozenset({"bob", "eve"})))
    assert directory.find(None, "m").owners == {"ann", "bob", "eve"} == directory.find(None, "unknown").owners
    directory.report(report("d0"))
    assert directory.find(None, "m").owners == {"bob", "eve"}


def test_it_knows_who_has_calls_at_other_routers(directory, clock):
    directory.report(replace(report("d0", keys=["m"]), owners=frozenset({"eve"})))
    assert directory.exchange_owners("r0", frozenset({"ann"})) == {"eve"}, "a router knows its own"
    assert directory.exchange_owners("r1", frozenset({"bob"})) == {"ann", "eve"}
    assert directory.exchange_owners("r0", frozenset()) == {"bob", "eve"}
    directory.report(report("d0"))
    clock.now_s += OWNERS_S
    assert directory.exchange_owners("r1", frozenset()) == frozenset(), "what nobody repeats is forgotten"
    for i in range(MAX_ROUTERS + 1):
        directory.exchange_owners(f"r{i}", frozenset({f"owner {i}"}))
    assert len(directory.exchange_owners("another", frozenset())) == MAX_ROUTERS - 1


def test_an_unchanged_report_keeps_residents_and_a_new_list_replaces_them(directory):
    directory.report(report("d0", keys=["m"]))
    assert directory.report(report("d0", num_waiting=5)).send_all is False
    assert directory.find(None, "m").holders[0].load.num_waiting == 5
    directory.report(report("d0", keys=["n"]))
    assert directory.holders("m") == () and worker_names(directory.holders("n")) == ["d0"]


def test_a_stranger_is_asked_for_everything_until_it_told_everything(directory):
    assert directory.report(report("d0", records=None)).send_all is True
    assert directory.report(report("d0", records=None)).send_all is True
    assert directory.report(report("d0", keys=["m"], records=None)).send_all is True, "its conversations are not known yet"
    assert directory.report(report("d0", keys=["m"], records=())).send_all is False
    assert directory.report(report("p0", "prefill", keys=[], records=None)).send_all is False


def test_silent_workers_are_dropped_and_asked_again_when_they_come_back(directory, clock):
    directory.report(report("d0", keys=["m"]))
    clock.now_s += MISSED_REPORTS
    assert worker_names(directory.find(None, "m").holders) == ["d0"]
    clock.now_s += 0.1
    assert directory.find(None, "m").holders == () and directory.snapshot().workers == ()
    assert directory.report(report("d0", records=None)).send_all is True


def test_a_worker_that_died_is_forgotten_at_once(directory):
    directory.report(report("d0", keys=["m"]))
    assert directory.forget_worker("d0") and not directory.forget_worker("d0")
    assert directory.holders("m") == ()


def test_what_a_router_noted_stands_until_the_worker_had_time_to_report_it(directory, clock):
    directory.report(report("d0", keys=[]))
    directory.note_held(handle("m"), ("d0", "stranger"), "digest")
    assert directory.find("digest", None).key == "m"
    directory.report(report("d0", keys=[]))  # was on its way before the prefix arrived
    assert worker_names(directory.holders("m")) == ["d0"] and directory.media("m") == handle("m")
    clock.now_s += NOTE_REPORTS
    directory.report(report("d0", keys=[]))
    assert directory.holders("m") == ()


def test_digests_lead_to_keys_until_the_media_is_dropped(directory):
    directory.report(report("d0", keys=["m"]))
    assert directory.find("digest", None).key is None
    directory.note_digest("digest", "m")
    assert worker_names(directory.find("digest", None).holders) == ["d0"]
    assert directory.drop_media("m") and not directory.drop_media("m")
    assert directory.find("digest", None).key is None and directory.find(None, "m").holders == ()


def test_one_owner_at_a_time_may_make_a_prefix(directory, clock):
    assert directory.claim("m", "a", 30) and not directory.claim("m", "b", 30) and directory.claim("n", "b", 30)
    clock.now_s += 29
    assert directory.claim("m", "a", 30), "renewing failed"
    clock.now_s += 29
    assert not directory.claim("m", "b", 30)
    clock.now_s += 1
    assert directory.claim("m", "b", 30), "a lease that ran out still counts"
    assert not directory.unclaim("m", "a") and directory.unclaim("m", "b") and directory.claim("m", "a", 30)


def test_turns_are_kept_in_order_and_one_made_again_replaces_what_followed(directory):
    assert directory.history("c") is None
    directory.open_conversation("c", "m", "tenant")
    assert directory.history("c") == ConversationJournal("c", "m", (), "tenant")
    assert directory.record("c", "m", 0, said(0, 1)) and directory.record("c", "m", 1, said(1, 2))
    assert not directory.record("c", "m", 3, said(3, 4)), "a turn is missing before it"
    assert directory.record("c", "m", 0, said(0, 1)) and len(directory.history("c").records) == 2, "told late, and again"
    assert directory.record("c", "m", 0, said(0, 9))
    assert directory.history("c").records == (said(0, 9),)
    directory.open_conversation("c", "m")
    assert directory.history("c").tenant == "tenant" and directory.history("c").records
    assert directory.forget_conversation("c") and directory.history("c") is None


def test_a_lost_directory_is_filled_by_reports_and_the_longer_memory_wins(directory):
    whole = ConversationJournal("c", "m", (said(0, 1), said(1, 2)))
    directory.report(report("d0", keys=["m"], records=(whole,)))
    directory.report(report("d1", keys=["m"], records=(ConversationJournal("c", "m", (said(0, 1),)),)))
    assert directory.history("c") == replace(whole, num_heard=1), "nobody can tell whether its last turn was heard"


def test_what_a_router_heard_is_not_replaced_by_what_a_worker_did_for_nobody(directory):
    directory.record("c", "m", 0, said(0, 1))
    unheard, other = (
        ConversationJournal("c", "m", (said(0, 1), said(1, 2))),
        ConversationJournal("c", "m", (said(0, 9), said(1, 2))),
    )
    directory.report(report("d0", keys=["m"], records=(other,)))
    assert directory.history("c") == ConversationJournal("c", "m", (said(0, 1),), num_heard=1)
    directory.report(report("d0", keys=["m"], records=(unheard,)))
    assert directory.history("c") == replace(unheard, num_heard=1)
    directory.record("c", "m", 1, said(1, 2))
    assert directory.history("c") == replace(unheard, num_heard=2)
    directory.record("c", "m", 0, said(0, 3))
    assert directory.history("c") == ConversationJournal("c", "m", (said(0, 3),), num_heard=1)


def test_it_says_whether_everybody_had_time_to_report(directory, clock):
    assert not directory.find("digest", None).settled and not directory.snapshot().settled
    clock.now_s += SETTLE_REPORTS
    assert directory.find("digest", None).settled and directory.is_settled()


def test_a_directory_that_stood_still_gives_everybody_time_to_report_again(directory, clock):
    """Silence that it could not have heard says nothing of the workers."""
    clock.now_s += SETTLE_REPORTS
    directory.report(report("d0"))
    assert directory.is_settled()
    clock.now_s += MISSED_REPORTS + 0.1
    snapshot = directory.snapshot()
    assert snapshot.workers == () and not snapshot.settled and not directory.find(None, "m").settled
    assert directory.report(report("d0")).send_all
    for _ in range(SETTLE_REPORTS):
        clock.now_s += 1
        directory.report(report("d0"))
    assert directory.snapshot().settled


def test_conversations_are_bounded_and_the_least_recently_used_goes_first(directory):
    for name in "abc":
        directory.record(name, "m", 0, said(0, 1))
    directory.history("a")
    directory.record("d", "m", 0, said(0, 1))
    assert [directory.history(name) is not None for name in "abcd"] == [True, False, True, True]
    assert directory.snapshot().num_conversations == 3


def test_a_conversation_is_kept_up_to_a_bound(directory):
    directory.report(
        report("d0", keys=[], records=(ConversationJournal("c", "m", tuple(said(i, i) for i in range(MAX_TURNS + 5))),))
    )
    assert len(directory.history("c").records) == MAX_TURNS and not directory.record("c", "m", MAX_TURNS, said(0, 1))


def test_a_worker_that_comes_back_is_told_which_conversations_it_has_no_more(directory):
    directory.report(report("d0"))
    directory.mark_stale("c", "d0", "d1")
    directory.mark_stale("closed", "d0")
    directory.mark_stale("b", "d1", "d0")
    directory.mark_stale("b", "d0", "d1")
    directory.mark_stale("b", "d1", "d0")  # it is back where it was
    stale = tuple(ConversationJournal(name, "m", (said(0, 1),)) for name in ("c", "closed", "kept"))
    assert directory.report(report("d0", records=stale)).close == ("c", "closed")
    assert directory.report(report("d0")).close == ()
    assert directory.report(report("d1")).close == ("b",)
    assert directory.history("closed") is None and directory.history("kept") is not None


def test_it_keeps_the_last_reason_why_a_deployment_does_not_start(directory):
    assert directory.start_failures() == {}
    for message in ("first", "last"):
        directory.note_start_failure("Decode", to_failure(BadCheckpoint(message)))
    for number in range(MAX_DEPLOYMENTS - 1):
        directory.note_start_failure(f"other {number}", to_failure(QueueFull("full")))
    failures = directory.start_failures()
    assert len(failures) == MAX_DEPLOYMENTS and str(from_failure(failures["Decode"])) == "last"
    assert isinstance(from_failure(failures["Decode"]), BadCheckpoint)
    directory.note_start_failure("one more", to_failure(QueueFull("full")))
    assert "Decode" not in directory.start_failures()


def test_what_is_told_of_a_closed_conversation_is_not_kept(directory):
    """By a router that records late, by one whose opening was on its way, by a worker that was not told."""
    directory.record("c", "m", 0, said(0, 1, 2))
    assert directory.forget_conversation("c")
    directory.open_conversation("c", "m")
    assert directory.record("c", "m", 0, said(0, 1, 2)) and directory.record("c", "m", 1, said(1, 3)), "nobody need tell it again"
    journal = ConversationJournal("c", "m", (said(0, 1, 2),))
    assert directory.report(report("d0", keys=["m"], records=[journal])).close == ("c",)
    assert directory.history("c") is None and directory.snapshot().num_conversations == 0
    directory.open_conversation("d", "m")
    assert directory.history("d") is not None


def test_a_conversation_that_nobody_goes_on_with_is_closed_wherever_it_is(clock):
    directory = Directory(10.0, max_conversations=9, conversation_idle_s=50.0, clock=clock)
    directory.open_conversation("opened", "m")
    directory.record("c", "m", 0, said(0, 1, 2))
    for _ in range(6):
        clock.now_s += 10.0
        for worker, pool in (("d0", "decode"), ("d1", "decode"), ("p0", "prefill")):
            told = directory.report(report(worker, pool, keys=["m"]))
            assert told.close == (("opened",) if clock.now_s > 150.0 and pool == "decode" else ())
        directory.record("c", "m", 0, said(0, 1, 2))  # goes on
    assert directory.history("opened") is None and directory.history("c") is not None
    clock.now_s += 50.1
    assert directory.report(report("d2", keys=[])).close == ("c",)
    assert directory.history("c") is None and directory.snapshot().num_conversations == 0
