"""Our own client and our own server: the same answers as without either, and errors of the same class."""

import asyncio

import pytest

from sparsevila_cluster.client import AsyncClient
from sparsevila_cluster.core.errors import BadMedia, NotFound, TooLarge, Unauthenticated
from tests.gateway.running_servers import locally, running_server, slow_down

QUESTIONS = ["what is it?", "and then?", "where is the star?"]


def test_the_client_tells_what_the_pipeline_says(checkpoint, clips):
    async def main():
        async with running_server(checkpoint, api_keys={"key": "ann"}) as served:
            wanted = await locally(served.pipeline, clips[0], QUESTIONS)
            async with AsyncClient.connect(served.address, api_key="key", timeout_s=30) as client:
                media = await client.prepare(await client.upload(clips[0]))
                whole, pieces = client.conversation(media), client.conversation(media)
                for question, answer in zip(QUESTIONS, wanted, strict=True):
                    got = await whole.ask(question, max_tokens=8)
                    assert (got.text, got.token_ids) == (answer.text, answer.token_ids)
                    assert "".join([piece async for piece in pieces.stream(question, max_tokens=8)]) == answer.text
                    assert [f.time_s for f in got.evidence] == [f.time_s for f in answer.evidence if f.cells]
                again = await client.prepare(clips[0])
                assert again.reused and again.media_id == media.media_id
                with pytest.raises(BadMedia, match="inline media of 8 bytes"):
                    await client.prepare(b"no video")
                with pytest.raises(TooLarge):
                    await whole.ask("why? " * 3000)
                slow_down(served.pipeline)
                stream = whole.stream("and?", max_tokens=100)
                await anext(stream)
                await stream.aclose()
                await served.settled()
                assert await client.delete_media(media.media_id)
                with pytest.raises(NotFound):
                    await client.conversation(media).ask("still there?")
            async with AsyncClient.connect(served.address, api_key="another", timeout_s=30) as stranger:
                with pytest.raises(Unauthenticated):
                    await stranger.prepare(clips[0])

    asyncio.run(asyncio.wait_for(main(), 60))
