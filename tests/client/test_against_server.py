"""Client, gRPC server and both engines: the same answers as without a wire between them, also when it is cut in mid-answer."""

import asyncio
import json
import time
from contextlib import asynccontextmanager

import pytest

from sparsevila_cluster.api.video_qa import VideoQA
from sparsevila_cluster.cli import main as cli
from sparsevila_cluster.client import Client
from sparsevila_cluster.core.cluster_config import GatewayConfig
from sparsevila_cluster.core.config import build_config
from sparsevila_cluster.core.errors import BadMedia, BadRequest, DeadlineExceeded, NotFound, TooLarge, Unauthenticated
from sparsevila_cluster.engine.local_pipeline import LocalPipeline
from sparsevila_cluster.gateway.grpc import GrpcServer
from sparsevila_cluster.gateway.service import VideoQAService
from tests.api.test_async_video_qa import FIELDS, checkpoint, clips  # noqa: F401 (fixtures)
from tests.client.conftest import in_thread
from tests.client.scripted_server import Wire, connect

QUESTIONS = ("what colour is the star?", "where is the circle?", "how many squares are there?")
ASK = {"max_tokens": 24}


@asynccontextmanager
async def server_over(checkpoint, **fields):  # noqa: F811
    config = build_config(model=str(checkpoint), **FIELDS)
    pipeline = LocalPipeline(config)
    pipeline.model.chat.eos_ids = frozenset()  # answers of full length
    gateway = GatewayConfig(port=0, **fields)
    service = VideoQAService(pipeline, gateway, config)
    server = GrpcServer(service, gateway)
    try:
        await server.start()
        yield server.port, pipeline
    finally:
        await server.stop(0)
        await service.close()
        await pipeline.close()


@pytest.fixture(scope="module")
def expected(checkpoint, clips):  # noqa: F811
    """For each clip: its handle, and its conversation of three turns, from an engine in this process."""
    with VideoQA(checkpoint, **FIELDS) as qa:
        qa.pipeline.model.chat.eos_ids = frozenset()
        told = []
        for clip in clips:
            chat = qa.conversation(qa.prepare(clip))
            for question in QUESTIONS:
                chat.ask(question, **ASK)
            told.append(chat)
        return told


def same(turns, expected_turns):
    for (_, answer), (_, wanted) in zip(turns, expected_turns, strict=True):
        assert (answer.text, answer.token_ids, answer.finish_reason) == (wanted.text, wanted.token_ids, wanted.finish_reason)
        assert answer.usage.visual_tokens_retrieved == wanted.usage.visual_tokens_retrieved
        looked_at = [one for one in wanted.evidence.top()]
        assert [one.frame for one in answer.evidence.top()] == [one.frame for one in looked_at]
        assert [one.share for one in answer.evidence.top()] == pytest.approx([one.share for one in looked_at])
        for one, other in zip(answer.evidence.top(), looked_at, strict=True):
            shares = {cell[:2]: cell[2] for cell in other.cells if cell[2] > 0}
            found = {cell[:2]: cell[2] for cell in one.cells}
            assert found.keys() >= shares.keys()
            # 256 levels of heat, and what is seen faintly counts as seen.
            assert all(found[cell] == pytest.approx(share, abs=0.05 * one.share) for cell, share in shares.items())


async def test_concurrent_clients_get_the_answers_of_a_local_engine(checkpoint, clips, expected):  # noqa: F811
    async with server_over(checkpoint) as (port, pipeline):

        async def converse(clip, wanted, *, streams):
            async with connect(port) as client:
                media = await client.prepare(clip)
                assert media.kv_bytes == wanted.media.kv_bytes
                chat = client.conversation(media)
                for question in QUESTIONS:
                    if streams:
                        text = "".join([piece async for piece in chat.stream(question, **ASK)])
                        assert text == chat.turns[-1][1].text
                    else:
                        await chat.ask(question, **ASK)
                same(chat.turns, wanted.turns)
                await chat.close()

        clients = [converse(clip, wanted, streams=i % 2 == 0) for i, (clip, wanted) in enumerate(zip(clips, expected, strict=True))]
        again = [converse(clip, wanted, streams=True) for clip, wanted in zip(clips, expected, strict=True)]
        await asyncio.gather(*clients, *again)
        info = await pipeline.info()
    assert info["prefills"] == len(clips) and info["conversations"] == 0


def slow_down(pipeline):
    """Let a step take long enough for a client to do something about it in mid-answer."""
    step = pipeline.decode.engine.step

    def slowly():
        time.sleep(0.02)
        step()

    pipeline.decode.engine.step = slowly


@pytest.mark.parametrize("num_cuts", [1, 3])
async def test_an_answer_survives_a_cut_connection(checkpoint, clips, expected, num_cuts):  # noqa: F811
    async with server_over(checkpoint) as (port, pipeline):
        slow_down(pipeline)
        wire = Wire(port)
        await wire.start()
        async with connect(wire.port) as client:
            media = await client.prepare(clips[0])
            chat = client.conversation(media)
            for question in QUESTIONS:
                seen = 0
                async for _ in chat.stream(question, **ASK):
                    seen += 1
                    if seen % 4 == 0 and seen <= 4 * num_cuts:
                        wire.cut()
            same(chat.turns, expected[0].turns)
        assert wire.num_connections > num_cuts and (await pipeline.info())["prefills"] == 1
        await wire.stop()


async def test_an_answer_goes_on_under_the_pressure_that_it_began_with(checkpoint, clips):  # noqa: F811
    async with server_over(checkpoint) as (port, pipeline):
        slow_down(pipeline)
        wire = Wire(port)
        await wire.start()
        async with connect(wire.port) as client:
            media = await client.prepare(clips[0])
            easy = await client.ask(media, QUESTIONS[0], **ASK)
            await pipeline.set_brownout(1.0)
            whole = await client.ask(media, QUESTIONS[0], **ASK)
            pieces = []
            async for piece in client.stream(media, QUESTIONS[0], **ASK):
                pieces.append(piece)
                if len(pieces) == 4:
                    await pipeline.set_brownout(0.0)
                    wire.cut()
        assert "".join(pieces) == whole.text != easy.text and whole.usage.brownout == 1.0
        assert whole.usage.visual_tokens_retrieved < easy.usage.visual_tokens_retrieved and wire.num_connections == 2
        await wire.stop()


async def test_large_media_are_uploaded_and_found_again(checkpoint, clips, expected):  # noqa: F811
    async with server_over(checkpoint, max_inline_bytes=100) as (port, pipeline), connect(port) as client:
        stages = []
        media = await client.prepare(clips[1], progress=lambda stage, done, total: stages.append(stage))
        assert media.kv_bytes == expected[1].media.kv_bytes and not media.reused
        assert {"upload", "decode", "encode", "prefill"} <= set(stages)
        upload = await client.upload(clips[1])
        assert (await client.prepare(upload)).reused and (await client.media(media.media_id)).media_id == media.media_id
        both = await client.prepare([upload, clips[0]])
        assert both.media_id != media.media_id and both.num_frames == 2 * media.num_frames
        assert await client.delete_media(both.media_id) and not await client.delete_media(both.media_id)
        with pytest.raises(NotFound):
            await client.ask(both, "what?")
        assert (await pipeline.info())["prefills"] == 2


async def test_mistakes_over_the_wire_harm_nobody(checkpoint, clips, expected):  # noqa: F811
    async with server_over(checkpoint) as (port, pipeline), connect(port) as client:
        media = await client.prepare(clips[0])
        neighbour = asyncio.create_task(client.ask(media, QUESTIONS[0], **ASK))
        for kind, call in [
            (BadMedia, client.prepare(b"This is no video. " * 100)),
            (BadMedia, client.prepare(clips[0].read_bytes()[:1000])),
            (TooLarge, client.prepare(clips[0], max_frames=100_000)),
            (NotFound, client.ask("ab" * 32, "what?")),
            (BadRequest, client.ask("no id", "what?")),
            (TooLarge, client.ask(media, "word " * 5000)),
            (DeadlineExceeded, client.ask(media, "what?", max_tokens=4000, timeout_s=0.3)),
        ]:
            with pytest.raises(kind, match=f"127.0.0.1:{port}"):
                await call
        assert (await neighbour).token_ids == expected[0].turns[0][1].token_ids


async def test_keys_are_asked_for(checkpoint, clips):  # noqa: F811
    async with server_over(checkpoint, api_keys={"one": "a", "two": "b"}) as (port, _):
        for key in (None, "three"):
            async with connect(port, api_key=key) as client:
                with pytest.raises(Unauthenticated, match=f"127.0.0.1:{port}"):
                    await client.info()
        async with connect(port, api_key="one") as one, connect(port, api_key="two") as two:
            media = await one.prepare(clips[0])
            assert (await one.ask(media, "what?", max_tokens=2)).token_ids
            with pytest.raises(NotFound):
                await two.ask(media, "what?", max_tokens=2)


@pytest.mark.smoke
def test_the_blocking_client_and_the_command_line(checkpoint, clips, expected, capsys):  # noqa: F811
    with in_thread(lambda: server_over(checkpoint)) as (port, _):
        with Client.connect(f"127.0.0.1:{port}") as client:
            chat = client.conversation(client.prepare(clips[0]))
            for question in QUESTIONS:
                chat.ask(question, **ASK)
            same(chat.turns, expected[0].turns)
        words = ["ask", str(clips[0]), *QUESTIONS, "--json", "--max-tokens", "24", "--target", f"127.0.0.1:{port}"]
        capsys.readouterr()
        assert cli.main(["client", *words]) == 0
        document = json.loads(capsys.readouterr().out)
        assert [one["answer"] for one in document["answers"]] == [answer.text for _, answer in expected[0].turns]
        assert document["sparsity"]["prune_keep"] == pytest.approx(0.5, abs=0.05)
        assert cli.main(["client", "info", "--target", f"127.0.0.1:{port}"]) == 0
        assert "prefills: 1" in capsys.readouterr().out
