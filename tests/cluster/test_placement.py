"""Placement as decisions over plain reports: bytes, load, who failed, what is hot."""

import random

from sparsevila_cluster.cluster.messages import Load, WorkerReport
from sparsevila_cluster.cluster.routing.placement import (
    FIRST_COOLDOWN_S,
    LONGEST_COOLDOWN_S,
    CircuitBreaker,
    PlacementContext,
    choose_decode,
    choose_holder,
    choose_prefill,
    choose_replica,
    choose_source,
)


def decode(worker, used=0, budget=1000, **load):
    return WorkerReport(worker, "decode", load=Load(prefix_bytes=used, prefix_budget_bytes=budget, **load))


def prefill(worker, **load):
    return WorkerReport(worker, "prefill", load=Load(**load))


def test_the_least_busy_prefill_worker_makes_it_counting_what_was_sent_since_its_report():
    workers = [prefill("a", num_running=1), prefill("b", num_waiting=2), prefill("c")]
    assert choose_prefill(workers, PlacementContext()) == "c"
    assert choose_prefill(workers, PlacementContext(num_under_way={"c": 2})) == "a"
    assert (
        choose_prefill(workers, PlacementContext(excluded={"a", "b", "c"})) is None
        and choose_prefill([], PlacementContext()) is None
    )


def test_a_prefix_goes_where_it_fits_then_where_least_runs_then_where_most_is_free():
    workers = [decode("full", used=950), decode("busy", num_running=3), decode("calm", used=500)]
    assert choose_decode(workers, 100, PlacementContext()) == "calm"
    assert choose_decode(workers, 600, PlacementContext()) == "busy", "evicting is worse than waiting"
    assert choose_decode([decode("full", used=950), decode("fuller", used=960)], 100, PlacementContext()) == "full"
    assert choose_decode(workers, None, PlacementContext()) == "calm"
    assert choose_decode(workers, 1001, PlacementContext()) is None, "no budget could ever hold it"


def test_a_holder_is_chosen_by_load_then_by_room_for_text():
    holders = [decode("a", turn_bytes=90, turn_budget_bytes=100), decode("b", turn_bytes=10, turn_budget_bytes=100)]
    assert choose_holder(holders, PlacementContext()) == "b"
    assert choose_holder(holders, PlacementContext(num_under_way={"b": 1})) == "a"


def test_a_worker_that_cools_down_is_asked_only_when_nobody_else_is_left():
    workers = [decode("a"), decode("b", num_running=9)]
    assert choose_decode(workers, None, PlacementContext(cooling_down={"a"})) == "b"
    assert choose_decode(workers, None, PlacementContext(cooling_down={"a"}, excluded={"b"})) == "a"
    assert choose_decode(workers, None, PlacementContext(cooling_down={"a", "b"})) == "a"


def test_a_copy_is_sent_by_a_prefill_worker_rather_than_by_one_that_decodes():
    copies, holders = [prefill("p0", num_running=4), prefill("p1")], [decode("d0")]
    assert choose_source(copies, holders, PlacementContext()).worker == "p1"
    assert choose_source(copies, holders, PlacementContext(excluded={"p0", "p1"})).worker == "d0"
    assert choose_source([], holders, PlacementContext(), target="d0") is None, "nobody sends to itself"


def test_a_hot_prefix_earns_another_worker_only_where_it_evicts_nothing():
    workers = [decode("holder"), decode("full", used=950), decode("free", num_running=2)]

    def choose(running, after=8, num_bytes=100, context=None):
        return choose_replica(workers, {"holder"}, num_bytes, running, after, context or PlacementContext())

    assert choose(8) == "free" and choose(7) is None and choose(100, after=0) is None
    assert choose(8, num_bytes=40) == "full"
    assert choose(8, num_bytes=2000) is None and choose(8, context=PlacementContext(cooling_down={"free"})) is None


def test_the_cooldown_doubles_with_each_failure_up_to_a_bound_and_ends_with_a_success():
    breaker, now_s, lengths = CircuitBreaker(), 0.0, []
    for _ in range(9):
        breaker.failed("w", now_s)
        breaker.failed("w", now_s)  # the same event, seen by another turn
        end_s = now_s
        while "w" in breaker.cooling_down(end_s):
            end_s += FIRST_COOLDOWN_S
        lengths.append(end_s - now_s)
        now_s = end_s
    assert lengths[:4] == [FIRST_COOLDOWN_S * 2**i for i in range(4)] and lengths[-1] == LONGEST_COOLDOWN_S
    assert breaker.cooling_down(now_s) == set()
    breaker.failed("w", now_s)
    breaker.succeeded("w")
    assert breaker.cooling_down(now_s) == set()
    breaker.failed("w", now_s)
    assert breaker.cooling_down(now_s + FIRST_COOLDOWN_S) == set(), "a success did not end the doubling"


def test_the_breaker_forgets_workers_that_are_gone():
    breaker = CircuitBreaker()
    for i in range(100):
        breaker.failed(f"w{i}", 0.0)
    breaker.forget({"w1"}, 1.0)
    assert len(breaker._failures) == 1


def test_whatever_is_reported_the_choice_was_allowed():
    rng = random.Random(0)
    for _ in range(300):
        workers = [
            decode(f"w{i}", used=rng.randrange(1000), budget=rng.choice([500, 1000]), num_running=rng.randrange(5))
            for i in range(rng.randrange(6))
        ]
        names = [one.worker for one in workers]
        context = PlacementContext(
            {name: rng.randrange(3) for name in names},
            {name for name in names if rng.random() < 0.3},
            {name for name in names if rng.random() < 0.3},
        )
        num_bytes = rng.choice([None, 100, 700])
        able = {one.worker for one in workers if one.load.prefix_budget_bytes >= (num_bytes or 0)} - set(context.excluded)
        chosen = choose_decode(workers, num_bytes, context)
        assert (chosen is None) == (not able) and (chosen is None or chosen in able)
        assert chosen is None or chosen not in context.cooling_down or able <= set(context.cooling_down)
