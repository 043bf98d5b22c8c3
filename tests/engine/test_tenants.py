"""Whose media and whose conversation: what one tenant made, another cannot use, see or drop; and a conversation is as expected."""

import asyncio
import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from sparsevila_cluster.core.config import build_config
from sparsevila_cluster.core.errors import NotFound, QueueFull, TooLarge
from sparsevila_cluster.core.requests import MediaSource, PrepareRequest, SamplingParams, Turn
from sparsevila_cluster.engine.local_pipeline import LocalPipeline
from sparsevila_cluster.engine.prefill_engine import PrefillEngine, Preparation
from sparsevila_cluster.engine.prompt_rows import chunk_bounds
from sparsevila_cluster.models import load_model
from tests.checkpoints.tiny_qwen2_5_vl import make_qwen2_5_vl
from tests.checkpoints.transformers_oracle import Bench, random_media


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    model = load_model(make_qwen2_5_vl(tmp_path_factory.mktemp("tiny"), seed=0, layers=2, hidden=32))
    model.chat.eos_ids = frozenset()
    return model


def bench(model, **fields):
    return Bench(model, build_config(model="unused", **{"prefix_bytes": 2**24, "turn_bytes": 2**24, **fields}))


def picture(tenant=""):
    file = io.BytesIO()
    pixels = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels.repeat(14, 0).repeat(14, 1)).save(file, "PNG")
    return PrepareRequest((MediaSource(file.getvalue()),), tenant=tenant)


def turn(media_id, conversation="c", tenant="", name="t", **options):
    return Turn(name, conversation, media_id, "what is it?", SamplingParams(max_tokens=4), tenant=tenant, **options)


async def listen(pipeline, asked):
    return [event async for event in pipeline.ask(asked)]


def with_pipeline(model, scenario, **fields):
    async def main():
        pipeline = LocalPipeline(build_config(model="unused", **fields), model)
        try:
            return await scenario(pipeline)
        finally:
            await pipeline.close()

    return asyncio.run(main())


def test_every_tenant_has_a_key_of_its_own(model):
    config = build_config(model="unused")
    engine = PrefillEngine(model, config, secret=b"s" * 32)
    keys = [engine.key_of(picture(tenant)) for tenant in ("", "anna", "bert", "anna")]
    assert keys[1] == keys[3] and len(set(keys)) == 3
    assert PrefillEngine(model, config, "int8", b"s" * 32).key_of(picture()) != keys[0]


@pytest.mark.parametrize("tenant", ["", "anna"])
def test_who_has_the_model_and_the_file_cannot_compute_the_key_that_a_deployment_gives_it(model, tenant):
    config, request = build_config(model="unused"), picture(tenant)
    deployment = PrefillEngine(model, config, secret=b"s" * 32)
    assert deployment.key_of(request) == PrefillEngine(model, config, secret=b"s" * 32).key_of(request)
    outsiders = [PrefillEngine(model, config).key_of(request) for _ in range(2)]
    assert len({deployment.key_of(request), *outsiders}) == 3


def test_media_of_another_tenant_are_unknown(model):
    async def scenario(pipeline):
        ours, shared = await pipeline.prepare(picture("anna")), await pipeline.prepare(picture())
        assert (ours.tenant, shared.tenant) == ("anna", "") and ours.media_id != shared.media_id
        with pytest.raises(NotFound) as unknown:
            await pipeline.media("0" * 64, "bert")
        for call in (
            lambda: pipeline.media(ours.media_id, "bert"),
            lambda: pipeline.media(ours.media_id),
            lambda: listen(pipeline, turn(ours.media_id, tenant="bert")),
            lambda: listen(pipeline, turn(ours.media_id)),
        ):
            with pytest.raises(NotFound) as error:
                await call()
            assert str(error.value) == str(unknown.value).replace("0" * 64, ours.media_id)
        assert not await pipeline.delete_media(ours.media_id, "bert") and not await pipeline.delete_media(ours.media_id)
        found = await pipeline.media(ours.media_id, "anna")
        assert found.reused and found.tenant == "anna" and found.kv_bytes == ours.kv_bytes
        assert (await pipeline.media(shared.media_id, "bert")).media_id == shared.media_id
        told = await listen(pipeline, turn(ours.media_id, tenant="anna"))
        assert [e.conversation_id for e in told if e.kind in ("accepted", "done")] == ["c", "c"]
        for stranger in ("bert", ""):
            assert not await pipeline.close_conversation("c", stranger)
        assert (await pipeline.info())["conversations"] == 1 and await pipeline.close_conversation("c", "anna")
        assert await pipeline.delete_media(ours.media_id, "anna")
        with pytest.raises(NotFound):
            await pipeline.media(ours.media_id, "anna")
        assert (await pipeline.info())["prefills"] == 2
        assert await pipeline.ready()
        await pipeline.close()
        assert not await pipeline.ready()

    with_pipeline(model, scenario)


def test_nobody_has_the_evicted_media_of_another_tenant_made_again(model):
    async def scenario(pipeline):
        handle = await pipeline.prepare(picture("anna"))
        await pipeline.decode.call(lambda engine: engine.prefixes.remove(handle.media_id))
        with pytest.raises(NotFound):
            await listen(pipeline, turn(handle.media_id, tenant="bert"))
        assert not await pipeline.delete_media(handle.media_id, "bert")
        assert (await pipeline.info())["prefills"] == 1
        assert (await listen(pipeline, turn(handle.media_id, tenant="anna")))[-1].kind == "done"
        assert (await pipeline.info())["prefills"] == 2

    with_pipeline(model, scenario)


def test_a_conversation_is_its_tenant_s_also_on_shared_media(model):
    b = bench(model)
    b.prefix(random_media("video", 2, 56, 84, seed=0), key="m")
    b.decode.submit(turn("m", tenant="anna"), lambda event: None)
    b.run()
    with pytest.raises(NotFound, match="unknown"):
        b.decode.submit(turn("m", tenant="bert"), lambda event: None)
    b.decode.submit(turn("m", tenant="anna", after=1), lambda event: None)
    b.run()
    assert b.decode.conversations.get("c").num_turns == 2


# ---- owners ------------------------------------------------------------------------------------------------------------------


def test_an_owner_fills_its_share_of_the_queue_and_no_more(model):
    b, events = bench(model, max_waiting=4), []
    b.prefix(random_media("video", 2, 56, 84, seed=0), key="m")

    def ask(name, owner):
        b.decode.submit(turn("m", conversation=name, name=name, owner=owner), events.append)

    for i in range(3):
        ask(f"a{i}", "anna")
    with pytest.raises(QueueFull, match="3 turns of 'anna' wait already; its share of max_waiting=4 is 3"):
        ask("a3", "anna")
    ask("b0", "bert")
    with pytest.raises(QueueFull, match="4 turns wait already"):
        ask("b1", "bert")
    b.run()
    assert [event.kind for event in events].count("done") == 4
    b.decode.check_integrity()


def test_a_prefix_takes_its_owner_s_share_of_the_bytes(model):
    async def scenario(pipeline):
        handle = await pipeline.prepare(replace(picture("anna"), owner="anna"))
        return handle.prefix_tokens, await pipeline.decode.call(lambda engine: engine.prefixes.slots_of("anna"))

    num, taken = with_pipeline(model, scenario)
    assert taken == num
    size = model.spec.bytes_per_token

    async def too_large(pipeline):
        assert (await pipeline.prepare(picture())).prefix_tokens == num
        with pytest.raises(TooLarge, match="share of 'anna' in prefix_bytes"):
            await pipeline.prepare(replace(picture("anna"), owner="anna"))

    with_pipeline(model, too_large, prefix_bytes=(num + 1) * size)


# ---- after -----------------------------------------------------------------------------------------------------------------


def test_a_turn_may_say_how_many_came_before_it(model):
    b, events = bench(model), []
    b.prefix(random_media("video", 2, 56, 84, seed=0), key="m")
    with pytest.raises(NotFound, match="'c'.*0 turns behind it, not 2"):
        b.decode.submit(turn("m", after=2), events.append)
    assert b.decode.conversations.get("c") is None and not b.decode.turns, "a refused turn opens no conversation"
    for i in range(2):
        b.decode.submit(turn("m", name=f"t{i}", after=i), events.append)
        b.run()
    with pytest.raises(NotFound, match="2 turns behind it, not 1"):
        b.decode.submit(turn("m", after=1), events.append)
    b.decode.submit(turn("m", name="third"), events.append)
    b.decode.submit(turn("m", name="fourth", after=3), events.append)  # the third is under way: it cannot be known yet
    b.run()
    assert [e.kind for e in events].count("done") == 4 and b.decode.conversations.get("c").num_turns == 4
    b.decode.close_conversation("c")
    with pytest.raises(NotFound, match="0 turns behind it, not 4"):
        b.decode.submit(turn("m", after=4), events.append)
    b.decode.check_integrity()


def test_a_lost_conversation_does_not_cost_a_preparation(model):
    async def scenario(pipeline):
        handle = await pipeline.prepare(picture())
        with pytest.raises(NotFound, match="not here as it was"):
            await listen(pipeline, turn(handle.media_id, after=1))
        prepared, plain = [], pipeline.prepare
        pipeline.prepare = lambda request: prepared.append(request) or plain(request)
        with pytest.raises(NotFound, match="not here as it was"):
            await listen(pipeline, turn(handle.media_id, after=1))
        assert not prepared

    with_pipeline(model, scenario)


# ---- observing a prefill ---------------------------------------------------------------------------------------------------


class Copier:
    """Takes every piece at the moment when it is written."""

    def __init__(self):
        self.calls, self.kv, self.prefix = [], {}, None

    def on_start(self, prefix, bounds):
        assert not self.calls
        self.prefix, self.calls = prefix, [tuple(bounds)]

    def on_rows(self, layer, start, stop):
        self.calls.append((layer, start, stop))
        for which, rows in enumerate(self.prefix.extent.rows(layer)):
            self.kv[layer, which, start] = rows[start:stop].clone()


def make(b, observer):
    preparation = Preparation(picture("anna"))
    media = random_media("video", 4, 56, 84, seed=3)
    return b.prefill.prefill(preparation, [media], "m", b.decode.prefixes.reserve, observer)


def test_an_observer_has_the_whole_prefix_in_pieces(model):
    b, observer = bench(model, prefill_chunk=7), Copier()
    prefix = make(b, observer)
    bounds = chunk_bounds(prefix.length, 7)
    layers = range(model.spec.num_layers)
    pieces = [(layer, a, z) for a, z in zip(bounds, bounds[1:], strict=False) for layer in layers]
    assert observer.calls == [tuple(bounds), *pieces] and len(bounds) > 3
    assert observer.prefix is prefix and prefix.metadata.tenant == "anna"
    for (layer, which, start), piece in observer.kv.items():
        assert (prefix.extent.rows(layer)[which][start : start + len(piece)] == piece).all(), "a piece changed after it was written"


@pytest.mark.parametrize("when", ["on_start", "on_rows"])
def test_an_observer_may_end_the_prefill(when, model):
    b, observer = bench(model, prefill_chunk=7), Copier()
    setattr(observer, when, lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(b, observer)
    assert b.prefill.num_prefills == 0
