"""The owners of the two engines: what waits has a deadline, nothing that comes late is kept, and the closed say who they were."""

import asyncio
import threading
import time
from functools import partial

import pytest

from sparsevila_cluster.cluster.workers.warm_up import ROWS, tiny_prefix
from sparsevila_cluster.core.config import build_config
from sparsevila_cluster.core.errors import Cancelled, DeadlineExceeded, Internal, Unavailable, WorkerLost
from sparsevila_cluster.core.requests import MediaSource, PrepareRequest
from sparsevila_cluster.engine.async_engine import AsyncDecodeEngine, AsyncPrefillEngine
from sparsevila_cluster.engine.decode_engine import DecodeEngine
from sparsevila_cluster.engine.prefill_engine import PrefillEngine
from sparsevila_cluster.models import load_model
from tests.checkpoints.tiny_qwen2_5_vl import make_qwen2_5_vl

LOST = partial(WorkerLost, worker="w")
REQUEST = PrepareRequest((MediaSource(b"no media"),))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(make_qwen2_5_vl(tmp_path_factory.mktemp("tiny"), seed=0, layers=1, hidden=32))


def config(**fields):
    return build_config(model="unused", **{"prefix_bytes": 2**20, "turn_bytes": 2**20, "close_timeout_s": 5.0, **fields})


def test_room_that_is_granted_too_late_is_given_back(model):
    async def main():
        decode, go_on = AsyncDecodeEngine(DecodeEngine(model, config()), "worker w", LOST), threading.Event()
        blocked = decode.post(lambda engine: go_on.wait(20))
        with pytest.raises(DeadlineExceeded, match="worker w"):
            await asyncio.to_thread(decode.reserve, 10, 0.05)
        held = asyncio.ensure_future(decode.hold("unknown"))
        go_on.set()
        await asyncio.wrap_future(blocked)
        assert await held is None
        assert await decode.call(lambda engine: engine.prefixes.arena.used_bytes) == 0
        extent = await asyncio.to_thread(decode.reserve, 10, 5.0)
        assert await decode.call(lambda engine: engine.prefixes.arena.used_bytes) == 10 * model.spec.bytes_per_token
        decode.cancel(extent)
        assert await decode.call(lambda engine: engine.prefixes.arena.used_bytes) == 0
        await decode.close(5.0)

    asyncio.run(main())


def test_a_hold_that_is_granted_too_late_is_given_back(model):
    async def main():
        decode, go_on = AsyncDecodeEngine(DecodeEngine(model, config()), "worker w", LOST), threading.Event()
        extent = await asyncio.to_thread(decode.reserve, ROWS, 5.0)
        await asyncio.to_thread(decode.publish, tiny_prefix("a", extent, 3), 5.0)
        blocked = decode.post(lambda engine: go_on.wait(20))
        held = asyncio.ensure_future(decode.hold("a"))
        await asyncio.sleep(0.05)
        held.cancel()
        with pytest.raises(asyncio.CancelledError):
            await held
        go_on.set()
        await asyncio.wrap_future(blocked)
        await decode.call(lambda engine: None)  # behind what gives it back
        assert await decode.call(lambda engine: engine.prefixes.holders("a")) == 0
        await decode.close(5.0)

    asyncio.run(main())


@pytest.mark.parametrize("error", [Unavailable, WorkerLost])
def test_a_closed_engine_says_whose_it_was(model, error):
    async def main():
        unavailable = LOST if error is WorkerLost else Unavailable
        decode = AsyncDecodeEngine(DecodeEngine(model, config()), "worker w", unavailable)
        prefill = AsyncPrefillEngine(PrefillEngine(model, config()), "worker w", unavailable)
        await decode.close(5.0)
        await prefill.close()
        for call in (decode.call(lambda engine: 1), prefill.run(lambda engine: 1), prefill.key_of(REQUEST)):
            with pytest.raises(Unavailable, match="worker w is closed") as raised:
                await call
            assert type(raised.value) is error and getattr(raised.value, "worker", "w") == "w"
        with pytest.raises(Internal, match="thread has ended"):
            decode.check()

    asyncio.run(main())


def test_a_preparation_ends_at_its_next_report_when_nobody_waits(model):
    async def main():
        prefill, seen = AsyncPrefillEngine(PrefillEngine(model, config()), "worker w", LOST), []
        deadline = prefill.deadline(REQUEST)
        preparation = prefill.preparation(REQUEST, deadline, lambda *report: seen.append(report))
        preparation.stage("decode")
        deadline.cancel()
        with pytest.raises(Cancelled, match="'encode'"):
            preparation.stage("encode")
        await prefill.close()
        with pytest.raises(WorkerLost):
            preparation.stage("encode")
        assert seen == [("decode", 0, 1)]

    asyncio.run(main())


def test_keys_do_not_wait_for_a_prefill_and_silence_fails_the_check(model):
    async def main():
        engine, go_on = PrefillEngine(model, config(prepare_timeout_s=5.0)), threading.Event()
        engine.key_of = lambda request: "key"
        prefill = AsyncPrefillEngine(engine, "worker w", LOST)
        running = asyncio.ensure_future(prefill.run(lambda engine: go_on.wait(20)))
        while not prefill.num_running:
            await asyncio.sleep(0.001)
        assert await prefill.key_of(REQUEST) == "key"
        prefill.check()
        prefill._last_report_s = time.perf_counter() - 6
        with pytest.raises(Internal, match="no progress"):
            prefill.check()
        go_on.set()
        assert await running and not prefill.num_running
        prefill.check()
        await prefill.close()

    asyncio.run(main())
