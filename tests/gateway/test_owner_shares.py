"""What one tenant may take of the server while others have keys, and how long it is told to wait."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from sparsevila_cluster.core.cluster_config import GatewayConfig
from sparsevila_cluster.core.errors import QueueFull, TooLarge, Unauthenticated
from sparsevila_cluster.core.metrics import Tally
from sparsevila_cluster.gateway.media_sources import MediaReference
from sparsevila_cluster.gateway.owner_shares import OwnerShares
from sparsevila_cluster.gateway.spool import Spool
from tests.gateway.running_servers import refused, run, upload
from tests.gateway.test_authenticator import ANN as ANN_METADATA
from tests.gateway.test_authenticator import BOB as BOB_METADATA
from tests.gateway.test_service import ANN, serve

BOB = ["Bearer key-of-bob"]
BOTH = {"key-of-ann": "ann", "other-key-of-ann": "ann", "key-of-bob": "bob"}


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


def enter(stack, service, key, method="Ask"):
    return stack.enter_async_context(service.call(method, key, lambda: None))


def test_one_tenants_calls_leave_room_for_another():
    async def work(service, pipeline, sink):
        async with AsyncExitStack() as stack:
            for key in (ANN, ["Bearer other-key-of-ann"], ANN):
                await enter(stack, service, key)
            with pytest.raises(QueueFull, match="3 calls of 'ann' .* max_share=0.75 of max_streams=4, which is 3"):
                await enter(stack, service, ANN)
            await enter(stack, service, BOB)
            with pytest.raises(QueueFull, match="4 calls are in progress; the limit is max_streams=4"):
                await enter(stack, service, BOB)
            # Who has no key is told so, however full it is.
            with pytest.raises(Unauthenticated):
                await enter(stack, service, ["Bearer nobody's"])
        async with AsyncExitStack() as stack:
            for _ in range(3):
                await enter(stack, service, ANN)
        assert service._shares.num_calls == 0

    serve(work, api_keys=BOTH, max_streams=4)


@pytest.mark.parametrize("keys", [{}, {"key-of-ann": "ann", "other-key-of-ann": "ann"}])
def test_who_is_alone_may_take_all(keys):
    async def work(service, pipeline, sink):
        async with AsyncExitStack() as stack:
            for _ in range(4):
                await enter(stack, service, ANN)

    serve(work, api_keys=keys, max_streams=4)


def test_requests_over_the_rate_are_told_when_to_come_back():
    clock = Clock()
    shares = OwnerShares(GatewayConfig(requests_per_s=2.5), lambda: True, clock)

    def served(owner, num):
        for i in range(num):
            try:
                with shares.call(owner):
                    pass
            except QueueFull as error:
                return i, error
        return num, None

    num, full = served("ann", 100)
    assert num == 2 and "requests_per_s=2.5" in str(full) and full.retry_after_s == 0.2
    assert served("bob", 2)[0] == 2
    clock.now_s += full.retry_after_s - 0.01
    assert served("ann", 1)[0] == 0
    clock.now_s += 0.01
    assert served("ann", 2)[0] == 1
    clock.now_s += 3600
    assert served("ann", 100)[0] == 2
    slow = OwnerShares(GatewayConfig(requests_per_s=0.01), lambda: False, clock)
    with slow.call(""), pytest.raises(QueueFull) as error, slow.call(""):
        pass
    assert error.value.retry_after_s == 100


def test_visual_tokens_over_the_rate_are_waited_for_by_the_next_media():
    clock = Clock()
    shares = OwnerShares(GatewayConfig(visual_tokens_per_minute=600), lambda: True, clock)
    for _ in range(2):  # what is found needs none
        shares.check_visual_tokens("ann")
    shares.count_visual_tokens("ann", 1600)
    with pytest.raises(QueueFull, match="visual_tokens_per_minute=600") as full:
        shares.check_visual_tokens("ann")
    assert full.value.retry_after_s == pytest.approx(100.1)
    shares.check_visual_tokens("bob")
    clock.now_s += full.value.retry_after_s - 0.1
    with pytest.raises(QueueFull):
        shares.check_visual_tokens("ann")
    clock.now_s += 0.1
    shares.check_visual_tokens("ann")


def test_only_media_that_were_made_count():
    async def work(service, pipeline, sink):
        async def prepare():
            async with service.call("PrepareMedia", ANN, lambda: None) as call:
                return [update async for update in service.prepare(call, [MediaReference(inline=b"x")])][-1]

        assert (await prepare()).visual_tokens == 64
        with pytest.raises(QueueFull, match="visual_tokens_per_minute=50"):
            await prepare()
        async with service.call("Ask", ANN, lambda: None):
            pass
        assert len(pipeline.requests) == 1

    serve(work, api_keys=BOTH, visual_tokens_per_minute=50)


# ---- the spool ---------------------------------------------------------------------------------------------------------------


def put(into, data, owner):
    part = into.begin(owner)
    try:
        part.write(data)
        return part.keep("video")
    except BaseException:
        part.discard()
        raise


def spool(share=0.75, **fields):
    return Spool(GatewayConfig(**{"spool_bytes": 1000} | fields), 10_000, Tally(), lambda budget: int(budget * share))


def test_one_tenants_uploads_leave_room_for_another():
    held = spool()
    put(held, bytes(700), "ann")
    with pytest.raises(QueueFull, match="one owner use 700 bytes, 51 more do not fit into max_share of spool_bytes = 750"):
        put(held, bytes(51), "ann")
    put(held, bytes(250), "bob")
    assert (held.num_bytes_of("ann"), held.num_bytes_of("bob"), held.num_bytes_of("cid")) == (700, 250, 0)
    put(held, bytes(50), "ann")
    with pytest.raises(QueueFull, match="uploads use 1000 bytes, 1 more do not fit into spool_bytes = 1000"):
        put(held, b"x", "bob")
    with pytest.raises(TooLarge, match="more than max_share of spool_bytes = 750"):
        put(held, bytes(751), "cid")
    held.close()


def test_a_share_holds_across_routers_with_one_folder(tmp_path):
    one, two = (spool(spool_dir=str(tmp_path / "spool")) for _ in range(2))
    put(one, bytes(700), "ann")
    with pytest.raises(QueueFull, match="max_share of spool_bytes = 750"):
        put(two, bytes(100), "ann")
    put(two, bytes(250), "bob")
    one.close()
    two.close()


def test_who_is_told_to_wait_for_an_upload_to_expire_waits_as_long_as_that_takes(monkeypatch):
    held = spool(upload_ttl_s=100)
    first = put(held, bytes(300), "ann")
    put(held, bytes(200), "bob")
    with held.hold("ann", first.upload_id) as (path, _):
        now_s = path.stat().st_mtime + 40
    monkeypatch.setattr("time.time", lambda: now_s)
    put(held, bytes(400), "ann")
    with pytest.raises(QueueFull) as full:
        put(held, bytes(200), "ann")
    assert full.value.retry_after_s == pytest.approx(60, abs=2)
    part = held.begin("ann")  # bytes of a preparation may go at any moment
    part.write(bytes(50))
    with pytest.raises(QueueFull) as full:
        put(held, bytes(50), "ann")
    assert full.value.retry_after_s == 1.0
    part.discard()
    held.close()


@pytest.mark.parametrize(("keys", "num"), [(BOTH, 1), ({"key-of-ann": "ann"}, 2)])
def test_shares_and_their_wait_reach_clients(checkpoint, keys, num):
    async def work(served):
        sent = 0
        while sent < 3:
            try:
                await upload(served.stub, bytes(400), metadata=ANN_METADATA)
            except Exception:
                break
            sent += 1
        assert sent == num
        code, error = await refused(upload(served.stub, bytes(400), metadata=ANN_METADATA))
        assert code == "RESOURCE_EXHAUSTED" and type(error) is QueueFull and "spool_bytes" in str(error)
        assert 3000 < error.retry_after_s <= 3600
        if "key-of-bob" in keys:
            assert (await upload(served.stub, bytes(400), metadata=BOB_METADATA)).num_bytes == 400

    run(checkpoint, work, api_keys=keys, spool_bytes=1000)


def test_who_waits_as_long_as_it_is_told_is_served():
    async def work(service, pipeline, sink):
        async with service.call("Ask", ANN, lambda: None):
            pass
        with pytest.raises(QueueFull) as full:
            async with service.call("Ask", ANN, lambda: None):
                pass
        await asyncio.sleep(full.value.retry_after_s)
        async with service.call("Ask", ANN, lambda: None):
            pass

    serve(work, api_keys=BOTH, requests_per_s=1.9)
