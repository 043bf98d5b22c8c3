"""Who brings a thousand calls at once does not make the others wait for them."""

import asyncio
import time
from contextlib import ExitStack

from sparsevila_cluster.core.errors import QueueFull
from sparsevila_cluster.gateway import arrival_pace
from sparsevila_cluster.gateway.arrival_pace import BURST, MAX_OWED_S, ArrivalPace
from sparsevila_cluster.pb import video_qa_pb2 as pb
from tests.gateway.running_servers import refused, run
from tests.gateway.test_bad_calls import Broken


async def waits_s(pace, owner, num):
    """How long each of `num` calls that come at once waits until it may begin."""
    begun_s = time.monotonic()

    async def one():
        await pace.turn(owner)
        return time.monotonic() - begun_s

    return await asyncio.gather(*(one() for _ in range(num)))


def test_whoever_is_alone_does_not_wait():
    async def main():
        pace = ArrivalPace(per_s=1.0)
        with pace.call("a"):
            assert max(await waits_s(pace, "a", 500)) < 0.5

    asyncio.run(main())


def test_beside_others_calls_begin_at_a_rate_in_the_order_in_which_they_came():
    async def main():
        pace = ArrivalPace(per_s=100.0)
        with ExitStack() as calls:
            calls.enter_context(pace.call("few"))
            waits = asyncio.ensure_future(waits_s(pace, "many", 50))
            await asyncio.sleep(0.05)
            assert max(await waits_s(pace, "few", 5)) < 0.05
            waited = await waits
        assert waited == sorted(waited)
        first, later = waited[: int(BURST)], waited[int(BURST) :]
        assert max(first) < 0.1 and 0.25 < later[-1] < 2.0 and later[-1] - later[0] > 0.25

    asyncio.run(main())


def test_another_ones_calls_count_for_a_moment_after_their_end():
    now_s = [0.0]

    async def main():
        pace = ArrivalPace(per_s=1.0, clock=lambda: now_s[0])
        with pace.call("few"):
            pass
        for _ in range(int(BURST)):
            await pace.turn("many")
        waiting = asyncio.ensure_future(pace.turn("many"))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        waiting.cancel()
        now_s[0] += 5.0
        await asyncio.wait_for(asyncio.gather(*(pace.turn("many") for _ in range(100))), 1)

    asyncio.run(main())


def test_what_is_taken_back_takes_nobodys_turn():
    async def main():
        pace = ArrivalPace(per_s=10.0)
        with pace.call("few"):
            flood = [asyncio.ensure_future(pace.turn("many")) for _ in range(200)]
            await asyncio.sleep(0.05)
            for call in flood:
                call.cancel()
            await asyncio.gather(*flood, return_exceptions=True)
            assert max(await waits_s(pace, "many", 2)) < 0.5

    asyncio.run(main())


def test_what_could_not_begin_soon_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(arrival_pace, "MAX_WAIT_S", 0.25)

    async def main():
        pace = ArrivalPace(per_s=10.0)
        with pace.call("few"):
            told = await asyncio.gather(*(pace.turn("many") for _ in range(100)), return_exceptions=True)
            refused = [one for one in told if one is not None]
            assert len(told) - len(refused) == BURST + 2 and all(isinstance(one, QueueFull) for one in refused)
            assert "paced_calls_per_s" in str(refused[0]) and refused[0].retry_after_s > 0
            await pace.turn("few")
        await pace.turn("many")  # a tenth of a second later, for those that were refused owe nothing

    asyncio.run(main())


def test_what_was_read_in_vain_counts_for_calls_of_its_owner_up_to_a_bound():
    now_s = [0.0]

    async def main():
        pace = ArrivalPace(per_s=10.0, clock=lambda: now_s[0])
        with pace.call("few"):
            for num, num_bytes in ((1, 8_000_000), (1_000, 64 * 1024)):
                for _ in range(num):
                    pace.charge("many", num_bytes)
                waiting = asyncio.ensure_future(pace.turn("many"))
                await asyncio.wait_for(pace.turn("few"), 1)
                assert pace._bucket("many").wait_s(1.0) <= MAX_OWED_S + 0.2 and not waiting.done()
                waiting.cancel()
                await asyncio.gather(waiting, return_exceptions=True)
            now_s[0] += MAX_OWED_S + 0.1
            await asyncio.wait_for(pace.turn("many"), 1)
        # Who is alone owes it to nobody.
        now_s[0] += 5.0
        pace.charge("many", 8_000_000)
        await asyncio.wait_for(pace.turn("many"), 1)

    asyncio.run(main())


def test_a_question_as_long_as_a_message_makes_the_next_call_of_its_owner_wait():
    async def work(one):
        async def takes_s(key, method, request):
            begun_s = time.monotonic()
            metadata = (("authorization", f"Bearer {key}"),)
            code, _ = await refused(getattr(one.stub, method)(request, metadata=metadata, timeout=20))
            assert code == "INVALID_ARGUMENT"
            return time.monotonic() - begun_s

        await takes_s("b", "Abort", pb.AbortRequest())
        await takes_s("a", "Answer", pb.AskRequest(media_id="none", question="why " * 1_900_000))
        waits = asyncio.create_task(takes_s("a", "Abort", pb.AbortRequest()))
        assert await takes_s("b", "Abort", pb.AbortRequest()) < 0.5
        assert await waits > 0.8

    run("tiny", work, pipeline=Broken(None), api_keys={"a": "ann", "b": "bob"})
