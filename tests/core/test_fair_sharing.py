"""Fair sharing between owners: virtual time, a lock between threads, places of an event loop. No engine."""

import asyncio
import random
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsevila_cluster.core import fair_sharing
from sparsevila_cluster.core.errors import Cancelled, QueueFull, Unavailable
from sparsevila_cluster.core.fair_sharing import (
    MAX_RECENT,
    RECENT_S,
    FairClock,
    FairLock,
    FairSlots,
    OwnerPlaces,
    RecentOwners,
    owner_bound,
)


@settings(derandomize=True, deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32), num_owners=st.integers(2, 5))
def test_owners_that_want_more_are_served_the_same_cost(seed, num_owners):
    rng, clock = random.Random(seed), FairClock()
    owners = [f"o{i}" for i in range(num_owners)]
    for _ in range(50):  # a past in which some had more, which counts for one piece at most
        clock.charge(min(rng.sample(owners, rng.randint(1, num_owners)), key=clock.start), rng.random() * 5)
    eager, served = rng.sample(owners, 2), dict.fromkeys(owners, 0.0)
    for _ in range(200):
        wanting = eager + [owner for owner in owners if owner not in eager and rng.random() < 0.5]
        owner = min(wanting, key=clock.start)
        cost = rng.random() * 5
        clock.charge(owner, cost)
        served[owner] += cost
        assert abs(served[eager[0]] - served[eager[1]]) <= 2 * 5
        assert len(clock._finished) <= num_owners
    assert served[eager[0]] >= sum(served.values()) / num_owners - 2 * 5


def test_nobody_saves_up_what_they_did_not_ask_for():
    clock = FairClock()
    for _ in range(1000):
        clock.charge("anna", 1.0)
    assert clock.start("bert") == 999.0 and clock.start("anna") == 1000.0
    clock.charge("bert", 3.0)
    assert min(("anna", "bert"), key=clock.start) == "anna"


def test_one_owner_has_a_share_and_everybody_has_all():
    assert [owner_bound("anna", 8, 0.75), owner_bound("", 8, 0.75), owner_bound("anna", 1, 0.1)] == [6, 8, 1]


def test_who_had_the_lock_for_less_time_has_it_next(monkeypatch):
    monkeypatch.setattr(fair_sharing, "SLICE_S", 0.0)
    lock, order, begun = FairLock(), [], threading.Event()

    def work(owner, num, seconds):
        lock.acquire(owner, lambda: None)
        for _ in range(num):
            order.append(owner)
            time.sleep(seconds)
            begun.set()
            lock.pause(owner, lambda: None)
        order.append(owner.upper())
        lock.release(owner)

    threads = [threading.Thread(target=work, args=("anna", 40, 0.01))]
    threads[0].start()
    assert begun.wait(10)
    threads += [threading.Thread(target=work, args=(owner, 5, 0.001)) for owner in ("bert", "carl")]
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join(10)
    last = max(order.index("BERT"), order.index("CARL"))
    assert order[:last].count("anna") < 20 and order[-1] == "ANNA", "".join(name[0] for name in order)


def test_waiting_for_the_lock_ends_when_nobody_waits_for_it():
    lock, calls = FairLock(), []

    def check():
        calls.append(1)
        if len(calls) > 1:
            raise Cancelled("gone")

    lock.acquire("anna", lambda: None)
    with pytest.raises(Cancelled):
        lock.acquire("bert", check)
    lock.release("anna")
    lock.acquire("carl", lambda: pytest.fail("nobody has it"))
    lock.pause("carl", lambda: pytest.fail("nobody waits"))
    lock.release("carl")


def test_who_is_ended_in_a_pause_takes_the_lock_from_nobody(monkeypatch):
    monkeypatch.setattr(fair_sharing, "SLICE_S", 0.0)
    lock, has_it, may_end = FairLock(), threading.Event(), threading.Event()

    def work():
        lock.acquire("bert", lambda: None)
        has_it.set()
        may_end.wait(10)
        lock.release("bert")

    def gone():
        if has_it.is_set():
            raise Cancelled("gone")

    lock.acquire("anna", lambda: None)
    thread = threading.Thread(target=work)
    thread.start()
    while not lock._waiting:
        time.sleep(0.001)
    time.sleep(0.01)  # anna has had some time, bert none
    with pytest.raises(Cancelled):
        lock.pause("anna", gone)
    lock.release("anna")  # as who began a block does at its end
    with pytest.raises(Cancelled):
        lock.acquire("carl", gone)
    may_end.set()
    thread.join(10)
    lock.acquire("carl", lambda: None)
    lock.release("carl")


def run(main):
    asyncio.run(asyncio.wait_for(main(), 20))


def test_an_owner_has_one_place_at_a_time_and_a_new_one_does_not_wait():
    async def main():
        slots, entered = FairSlots(3, 100), []

        async def work(name):
            await slots.enter(name[0])
            entered.append(name)

        tasks = [asyncio.create_task(work(name)) for name in ("a0", "a1", "a2", "b0", "b1")]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert entered == ["a0", "b0"] and slots.num_waiting == 3
        slots.leave("a")
        await asyncio.sleep(0)
        assert entered == ["a0", "b0", "a1"], "an owner's own wait in order"
        slots.leave("b")
        slots.leave("a")
        await asyncio.gather(*tasks)
        assert entered[3:] == ["a2", "b1"] or entered[3:] == ["b1", "a2"]

    run(main)


def test_owners_take_turns_where_there_are_fewer_places_than_owners():
    async def main():
        slots, entered = FairSlots(1, 100), []

        async def work(name):
            await slots.enter(name[0])
            entered.append(name[0])
            await asyncio.sleep(0.002)
            slots.leave(name[0])

        await asyncio.gather(*(work(name) for name in [f"a{i}" for i in range(8)] + ["b0", "b1", "c0", "c1"]))
        assert sorted(entered[:3]) == ["a", "b", "c"] and "b" not in entered[7:] and "c" not in entered[7:]

    run(main)


def test_who_leaves_while_waiting_gives_its_place_to_the_next():
    async def main():
        slots = FairSlots(1, 100)
        await slots.enter("a")
        waiting = [asyncio.create_task(slots.enter(owner)) for owner in "bcd"]
        await asyncio.sleep(0)
        waiting[0].cancel()
        slots.leave("a")
        waiting[1].cancel()  # it has the place, and does not know yet
        await asyncio.wait(waiting[:2])
        await waiting[2]
        assert slots.num_waiting == 0
        slots.leave("d")
        await slots.enter("a")
        late = asyncio.create_task(slots.enter("a"))
        await asyncio.sleep(0)
        slots.close(lambda: Unavailable("closed"))
        for call in (late, slots.enter("b")):
            with pytest.raises(Unavailable):
                await call

    run(main)


def test_bounds_of_what_waits_and_when_to_come_again():
    async def main():
        slots = FairSlots(1, max_waiting=4, max_share=0.5, max_waiting_cost=100)
        await slots.enter("a", 1000)
        waiting = [asyncio.create_task(slots.enter("a", 60))]
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="'a' has work of cost 60 waiting, and asks for 50 more; the limit is 100") as refused:
            await slots.enter("a", 50)
        assert refused.value.retry_after_s == 1.0, "nothing is known yet"
        waiting.append(asyncio.create_task(slots.enter("a", 40)))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="2 of 'a' wait already; its share is 2"):
            await slots.enter("a")
        waiting += [asyncio.create_task(slots.enter(owner, 500)) for owner in "bc"]  # the first of an owner may cost anything
        await asyncio.sleep(0)
        with pytest.raises(QueueFull, match="4 wait already; the limit is 4"):
            await slots.enter("d")
        slots._busy["a"] = time.perf_counter() - 50, 1000
        slots.leave("a")  # 20 a second
        await asyncio.sleep(0)
        with pytest.raises(QueueFull) as refused:
            slots.check_room("a", 90)
        assert refused.value.retry_after_s == pytest.approx((60 + 40) / 20 * 3, rel=0.1), "what it has there, shared by three"
        for task in waiting:
            task.cancel()

    run(main)


def test_everybody_together_has_no_share():
    async def main():
        slots = FairSlots(1, max_waiting=3, max_share=0.5, max_waiting_cost=1)
        tasks = [asyncio.create_task(slots.enter("", 10**9)) for _ in range(4)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert slots.num_waiting == 3 and not any(task.done() and task.exception() for task in tasks)
        for task in tasks:
            task.cancel()

    run(main)


def test_work_of_one_owner_waits_for_its_own_only_and_leaves_nothing():
    async def main():
        places, running, most, may_end = OwnerPlaces(2), [], 0, asyncio.Event()

        async def work(owner):
            nonlocal most
            async with places.place(owner):
                running.append(owner)
                most = max(most, running.count("a"))
                if owner == "a":
                    await may_end.wait()
                    await asyncio.sleep(0)
                running.remove(owner)

        flood = [asyncio.create_task(work("a")) for _ in range(12)]
        await asyncio.sleep(0)
        assert places.num_waiting == 10
        leaving = asyncio.create_task(work("a"))
        await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.gather(work("b"), *(work("") for _ in range(20)))
        assert running == ["a", "a"] and places.num_waiting == 10, "none of the flood is over"
        may_end.set()
        await asyncio.gather(*flood)
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert most == 2 and not running and not places.num_waiting and not places._queues and not places._num_taken

    run(main)


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


def test_an_owner_leaves_places_to_others_while_they_have_work_and_shortly_after():
    async def main():
        clock = Clock()
        places = OwnerPlaces(4, 2, RecentOwners(clock))
        may_end = {owner: asyncio.Event() for owner in "ab"}
        running = []

        async def work(owner):
            async with places.place(owner):
                running.append(owner)
                await may_end[owner].wait()
                running.remove(owner)

        async def settled():
            for _ in range(5):
                await asyncio.sleep(0)
            return running.count("a")

        others = [asyncio.create_task(work("b"))]
        await settled()
        flood = [asyncio.create_task(work("a")) for _ in range(20)]
        assert await settled() == 2 and places.num_waiting == 18
        clock.now_s += 10 * RECENT_S
        leaving = flood.pop()
        leaving.cancel()
        assert await settled() == 2, "b still runs"
        may_end["b"].set()
        await asyncio.gather(*others)
        more = asyncio.create_task(work("a"))
        assert await settled() == 2, "b has just gone"
        clock.now_s += RECENT_S
        flood.append(asyncio.create_task(work("a")))
        assert await settled() == 4, "a is alone"
        places.recent.note({"b"})  # at another router
        may_end["a"].set()
        await asyncio.gather(*flood, more)
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert not running and not places.num_waiting and not places._queues and not places._num_taken

    run(main)


@pytest.mark.parametrize("seed", range(4))
def test_places_are_never_lost_nor_given_twice_whoever_leaves_when(seed):
    async def main():
        rng, clock = random.Random(seed), Clock()
        places, running = OwnerPlaces(3, 1, RecentOwners(clock)), []

        async def work(owner, num_turns):
            async with places.place(owner):
                running.append(owner)
                assert running.count(owner) <= 3
                try:
                    for _ in range(num_turns):
                        await asyncio.sleep(0)
                finally:
                    running.remove(owner)

        tasks = []
        for _ in range(400):
            tasks.append(asyncio.create_task(work(rng.choice("aab"), rng.randrange(5))))
            clock.now_s += rng.choice((0.0, 0.0, RECENT_S))
            if rng.random() < 0.3:
                rng.choice(tasks).cancel()
            for _ in range(rng.randrange(3)):
                await asyncio.sleep(0)
        ended = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)
        assert {type(one) for one in ended} == {type(None), asyncio.CancelledError}
        assert not running and not places.num_waiting and not places._queues and not places._num_taken

    run(main)


def test_who_was_here_is_known_for_a_while_and_of_so_many_only():
    clock = Clock()
    recent = RecentOwners(clock)
    with recent.active("a"), recent.active("a"), recent.active(""):
        clock.now_s += 10 * RECENT_S
        assert recent.names() == {"a"} and recent.has_others("b") and not recent.has_others("a")
    recent.note(["b"])
    assert recent.names() == {"a", "b"}
    clock.now_s += RECENT_S
    assert not recent.names() and not recent.has_others("b")
    recent.note(map(str, range(2 * MAX_RECENT)))
    assert len(recent.names()) == MAX_RECENT
