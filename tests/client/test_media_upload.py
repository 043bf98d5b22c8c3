"""How media reach the server: what is sent in which way, what is sent again, and what never leaves."""

import asyncio
import base64

import pytest

from sparsevila_cluster.client import Upload
from sparsevila_cluster.core.errors import BadMedia, BadRequest, NotFound, TooLarge, Unavailable
from sparsevila_cluster.core.requests import MediaHandle
from tests.client.scripted_server import MEDIA_ID, Scripted, connect, serving, wired

BIG = bytes(range(256)) * 10_000  # 2.56 MB: three pieces


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(BIG)
    return path


async def test_small_media_travel_in_the_request_and_large_ones_in_pieces(clip):
    servicer, told = Scripted(), []
    async with serving(servicer) as (_, port), connect(port) as client:
        upload = await client.upload(b"abc")
        mixed = [b"x" * 900, b"y" * 200, clip, "https://example.org/a.mp4", "file://clips/b.mp4", upload]
        media = await client.prepare(mixed, fps=2, max_frames=8, prune_keep=0.5, progress=lambda *stage: told.append(stage))
    assert isinstance(media, MediaHandle) and media.media_id == MEDIA_ID and media.ms == {"decode": 3.0, "transfer": 2.0}
    request = servicer.of("PrepareMedia")[0]
    kinds = [source.WhichOneof("source") for source in request.sources]
    # The inline limit of 1000 bytes holds for all of them together.
    assert kinds == ["inline", "upload_id", "upload_id", "url", "file", "upload_id"]
    assert (request.fps, request.max_frames, request.prune_keep) == (2, 8, 0.5)
    assert (request.sources[3].url, request.sources[4].file) == ("https://example.org/a.mp4", "clips/b.mp4")
    chunks = servicer.uploads[request.sources[2].upload_id]
    assert b"".join(chunk.data for chunk in chunks) == BIG and max(len(chunk.data) for chunk in chunks) <= 2**20
    assert [chunk.file_name for chunk in chunks] == ["clip.mp4", "", ""]
    assert request.sources[5].upload_id == upload.upload_id and upload.num_bytes == 3
    assert told[-3:] == [("upload", len(BIG), len(BIG)), ("decode", 1, 2), ("encode", 1, 2)]
    assert [stage[1] for stage in told if stage[2] == len(BIG)] == [2**20, 2**21, len(BIG)]


async def test_only_options_that_are_given_are_sent():
    servicer = Scripted()
    async with serving(servicer) as (_, port), connect(port) as client:
        await client.prepare(b"abc")
        await client.ask(MEDIA_ID, "What?")
        await client.ask(MEDIA_ID, "What?", evidence=False, seed=7, stop=("!", "?"), retrieve_keep=0.5, refresh_every=0, top_k=0)
    request, (plain, full) = servicer.of("PrepareMedia")[0], servicer.of("Ask")
    assert not any(request.HasField(name) for name in ("fps", "max_frames", "prune_keep"))
    assert plain.want_evidence and not any(plain.retrieval.HasField(name) for name in ("keep", "mass", "refresh_every"))
    assert not plain.sampling.HasField("seed") and plain.sampling.max_tokens == 256
    assert not full.want_evidence and (full.sampling.seed, list(full.sampling.stop)) == (7, ["!", "?"])
    assert full.retrieval.keep == 0.5 and full.retrieval.HasField("refresh_every") and not full.retrieval.HasField("mass")


async def test_a_data_url_is_media_that_is_here():
    servicer = Scripted()
    async with serving(servicer) as (_, port), connect(port) as client:
        for data in (b"abc", BIG):
            await client.prepare("data:image/png;base64," + base64.b64encode(data).decode())
        for bad in ("data:image/png,abc", "data:video/mp4;base64,%%%"):
            with pytest.raises(BadMedia, match="data URL|base64"):
                await client.prepare(bad)
    small, large = (request.sources[0] for request in servicer.of("PrepareMedia"))
    assert (small.inline, small.kind) == (b"abc", "image")
    chunks = servicer.uploads[large.upload_id]
    assert b"".join(chunk.data for chunk in chunks) == BIG and chunks[0].kind == "image"


async def test_media_that_cannot_be_sent_are_told_by_name(tmp_path):
    (tmp_path / "empty.mp4").write_bytes(b"")
    servicer = Scripted()
    async with serving(servicer) as (_, port), connect(port) as client:
        for source, told in [
            (tmp_path / "missing.mp4", "missing.mp4"),
            (tmp_path / "empty.mp4", "empty"),
            (tmp_path, "not a regular file"),
            (b"", "empty"),
            ("nul\0.mp4", "nul"),
        ]:
            with pytest.raises(BadMedia, match=told):
                await client.prepare(source)
            with pytest.raises(BadMedia, match=told):
                await client.upload(source)
        with pytest.raises(BadMedia, match="only what is here"):
            await client.upload("https://example.org/a.mp4")
        for source in ([], 7, [None]):
            with pytest.raises(BadRequest, match="source|media"):
                await client.prepare(source)
        with pytest.raises(BadRequest, match="prune_keep must be in"):
            await client.prepare(b"abc", prune_keep=2)
        with pytest.raises(BadRequest, match="unknown option 'fsp'"):
            await client.prepare(b"abc", fsp=2)
        with pytest.raises(BadRequest, match="out of range"):
            await client.prepare(b"abc", max_frames=2**40)
    assert not servicer.of("PrepareMedia") and not servicer.uploads


async def test_an_upload_that_the_server_lost_is_sent_again(clip):
    servicer = Scripted()

    async def lose(context):
        servicer.uploads.clear()

    async with serving(servicer) as (_, port), connect(port) as client:
        servicer.script["PrepareMedia"] = [lose]
        assert (await client.prepare(clip)).media_id == MEDIA_ID
        assert len(servicer.of("UploadMedia")) == 2 and len(servicer.of("PrepareMedia")) == 2
        kept = await client.upload(clip)
        servicer.uploads.clear()
        assert (await client.prepare([kept, b"abc"])).media_id == MEDIA_ID
        clip.write_bytes(BIG[:-1])
        servicer.uploads.clear()
        with pytest.raises(BadMedia, match="'clip.mp4' has changed"):
            await client.prepare(kept)
        with pytest.raises(NotFound, match="'elsewhere' is unknown"):
            await client.prepare(Upload("elsewhere", 3, "", 60))
        servicer.script["PrepareMedia"] = [lose] * 9
        servicer.calls.clear()
        with pytest.raises(NotFound):
            await client.prepare(clip)
        assert len(servicer.of("UploadMedia")) == 3


async def test_a_preparation_is_asked_for_again_at_any_point(clip):
    servicer = Scripted()
    async with wired(servicer) as wire, connect(wire.port) as client:

        async def cut(context):
            wire.cut()
            await asyncio.sleep(5)

        servicer.script = {"GetServerInfo": [cut], "UploadMedia": [cut], "PrepareMedia": [cut, Unavailable("no worker"), cut]}
        assert (await client.prepare(clip)).media_id == MEDIA_ID
    assert len(servicer.of("PrepareMedia")) == 4 and len(servicer.of("UploadMedia")) == 2


async def test_what_a_progress_function_raises_ends_the_preparation(clip):
    servicer = Scripted()

    def stop_at(stage):
        def progress(name, done, total):
            if name == stage:
                raise Unavailable("enough")  # a typed error is no reason to try again either

        return progress

    async with serving(servicer) as (_, port), connect(port) as client:
        for stage, num in (("upload", 0), ("decode", 1)):
            with pytest.raises(Unavailable, match="^enough$"):
                await client.prepare(clip, progress=stop_at(stage))
            assert len(servicer.of("PrepareMedia")) == num


async def test_an_upload_that_is_refused_says_why(clip):
    servicer = Scripted()
    servicer.script["UploadMedia"] = [TooLarge("512 bytes are the limit")] * 9
    async with serving(servicer) as (_, port), connect(port) as client:
        with pytest.raises(TooLarge, match=f"127.0.0.1:{port}: 512 bytes"):
            await client.upload(clip)
    assert 1 <= len(servicer.of("UploadMedia")) < 9 and not servicer.uploads  # gRPC may lose a status: see `_status_of`
