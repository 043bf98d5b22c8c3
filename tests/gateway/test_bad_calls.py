"""Every mistake of a client has its code, names what is wrong, and harms nobody else's turn."""

import asyncio
import os
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

import grpc
import pytest

from sparsevila_cluster.core.errors import (
    BadMedia,
    BadRequest,
    Internal,
    NotFound,
    PermissionDenied,
    QueueFull,
    SparseVilaError,
    TooLarge,
    Unavailable,
)
from sparsevila_cluster.gateway.audit_log import NAME
from sparsevila_cluster.gateway.grpc.status_codes import MAX_MESSAGE_BYTES, clipped, status_of
from sparsevila_cluster.pb import video_qa_pb2 as pb
from tests.gateway.running_servers import ask, locally, prepare, refused, run, streamed, upload

NAN = float("nan")
SERVICE = "/sparsevila.v1.VideoQA/"


def bad_asks(media_id):
    def sampling(**fields):
        return pb.AskRequest(media_id=media_id, question="what?", sampling=pb.Sampling(**fields))

    def retrieval(**fields):
        return pb.AskRequest(media_id=media_id, question="what?", retrieval=pb.Retrieval(**fields))

    yield from (
        (ask("no such media"), BadRequest, "media_id"),
        (ask(""), BadRequest, "media_id"),
        (ask("0" * 64), NotFound, "0000"),
        (ask("x" * 5000), BadRequest, "media_id"),
        (ask(media_id, ""), BadRequest, "question"),
        (ask(media_id, " \n" * 60_000), BadRequest, "question"),
        (ask(media_id, "why? " * 3000), TooLarge, "token"),
        # Each of these kept an engine's thread busy for minutes.
        (ask(media_id, "word " * 30_000), BadRequest, "max_question_bytes"),
        (ask(media_id, "word " * 1_580_000), BadRequest, "at most 294912 bytes, got 79000"),
        (ask(media_id, said_token_ids=[5] * 60_000), BadRequest, "said_token_ids"),
        (
            pb.AskRequest(media_id=media_id, question="?", sampling=pb.Sampling(max_tokens=2**31 - 1), said_token_ids=[5] * 9_000),
            BadRequest,
            "max_answer_tokens",
        ),
        (ask(media_id, said_token_ids=[5] * 300), BadRequest, "max_tokens"),
        (sampling(max_tokens=2**31 - 1), BadRequest, "max_answer_tokens"),
        (sampling(stop=["x" * 513]), BadRequest, "512"),
        (ask(media_id, turn_id="a b"), BadRequest, "turn_id"),
        (ask(media_id, turn_id="t" * 201), BadRequest, "turn_id"),
        (ask(media_id, conversation_id="\x00"), BadRequest, "conversation_id"),
        (ask(media_id, said_token_ids=[3, -1]), BadRequest, "said_token_ids"),
        *((ask(media_id, said_token_ids=[3], said_brownout=b), BadRequest, "brownout") for b in (-0.1, 1.5, NAN)),
        *((sampling(max_tokens=n), BadRequest, "max_tokens") for n in (0, -1)),
        *((sampling(temperature=t), BadRequest, "temperature") for t in (-0.1, 10.1, NAN, float("inf"))),
        *((sampling(top_p=p), BadRequest, "top_p") for p in (0, -1, 1.01, NAN)),
        (sampling(top_k=-1), BadRequest, "top_k"),
        (sampling(stop=["x"] * 17), BadRequest, "stop"),
        (sampling(stop=[""]), BadRequest, "stop"),
        *((retrieval(keep=k), BadRequest, "retrieve_keep") for k in (0, 1.5, -1, NAN)),
        *((retrieval(mass=m), BadRequest, "retrieve_mass") for m in (0, 2, NAN)),
        (retrieval(refresh_every=-1), BadRequest, "refresh_every"),
    )


def bad_preparations(clip):
    inline = pb.MediaSource(inline=clip)

    def of(*sources, **fields):
        return pb.PrepareMediaRequest(sources=sources, **fields)

    yield from (
        (of(), BadRequest, "sources"),
        (of(pb.MediaSource()), BadRequest, "none"),
        (of(*[inline] * 17), BadRequest, "16"),
        (of(pb.MediaSource(inline=b"")), BadMedia, "empty"),
        (of(pb.MediaSource(inline=b"no video")), BadMedia, "inline media of 8 bytes"),
        (of(pb.MediaSource(inline=clip[:700])), BadMedia, "inline media"),
        (of(pb.MediaSource(inline=b"x" * 70_000)), TooLarge, "max_inline_bytes"),
        (of(pb.MediaSource(inline=clip, kind="audio")), BadRequest, "kind"),
        (of(pb.MediaSource(inline=clip, kind="image")), BadMedia, "image"),
        (of(pb.MediaSource(upload_id="0" * 32)), NotFound, "upload"),
        (of(pb.MediaSource(upload_id="../../etc/passwd")), NotFound, "upload"),
        (of(pb.MediaSource(upload_id="")), NotFound, "upload"),
        (of(pb.MediaSource(file="clip.mp4")), PermissionDenied, "file_root"),
        (of(pb.MediaSource(url="http://example.org/x.mp4")), PermissionDenied, "https"),
        (of(pb.MediaSource(url="file:///etc/passwd")), PermissionDenied, "https"),
        (of(pb.MediaSource(url="https://127.0.0.1:1/x.mp4")), PermissionDenied, "public"),
        (of(pb.MediaSource(url="https://[::1]/x.mp4")), PermissionDenied, "public"),
        (of(pb.MediaSource(url="https://user:word@example.org/")), BadRequest, "user"),
        (of(pb.MediaSource(url="https:///x")), BadRequest, "host"),
        (of(pb.MediaSource(url="")), PermissionDenied, "https"),
        (of(pb.MediaSource(url="data:video/mp4;base64,???")), BadMedia, "base64"),
        (of(pb.MediaSource(url="data:video/mp4;base64," + "A" * 100_000)), TooLarge, "max_inline_bytes"),
        *((of(inline, fps=f), BadRequest, "fps") for f in (0, -1, 241, NAN)),
        *((of(inline, max_frames=n), BadRequest, "max_frames") for n in (0, -5)),
        (of(inline, max_frames=513), TooLarge, "512"),
        *((of(inline, prune_keep=k), BadRequest, "prune_keep") for k in (0, 1.1, NAN)),
    )


def test_every_mistake_has_its_code_and_the_neighbour_goes_on(checkpoint, clips):
    clip = clips[0]

    async def work(served):
        (wanted,) = await locally(served.pipeline, clip, ["and you?"], 40)
        media = await prepare(served.stub, clip)
        over, rounds = asyncio.Event(), 0

        async def neighbour():
            nonlocal rounds
            while not over.is_set():
                text, ids, _ = await streamed(served.stub, ask(media.media_id, "and you?", 40))
                assert (text, ids) == (wanted.text, wanted.token_ids)
                rounds += 1

        beside = asyncio.ensure_future(neighbour())
        calls = [(method, *bad) for bad in bad_asks(media.media_id) for method in (served.stub.Ask, served.stub.Answer)]
        calls += [(served.stub.PrepareMedia, *bad) for bad in bad_preparations(clip)]
        for stub in (served.stub.GetMedia, served.stub.DeleteMedia):
            calls += [(stub, pb.GetMediaRequest(media_id=name), BadRequest, "media_id") for name in ("", "a b", "x" * 300)]
        calls += [(served.stub.GetMedia, pb.GetMediaRequest(media_id="1" * 64), NotFound, "1111")]
        calls += [(served.stub.Abort, pb.AbortRequest(), BadRequest, "turn_id")]
        calls += [(served.stub.CloseConversation, pb.CloseConversationRequest(), BadRequest, "conversation_id")]
        for method, request, kind, word in calls:
            code, error = await refused(method(request))
            assert type(error) is kind and code == kind.grpc_status and word in str(error), (str(request)[:200], code, error)
            assert len(str(error).encode()) <= MAX_MESSAGE_BYTES and "/tmp" not in str(error)
        over.set()
        await beside
        assert rounds > 1 and served.service._spool.num_bytes == 0
        assert not (await served.stub.Abort(pb.AbortRequest(turn_id="nobody"))).aborted
        assert not (await served.stub.CloseConversation(pb.CloseConversationRequest(conversation_id="nobody"))).closed
        await served.settled()

    run(checkpoint, work, max_inline_bytes=65_536)


def test_a_turn_id_in_use_is_refused_and_the_first_turn_lives(checkpoint, clips):
    async def work(served):
        media = await prepare(served.stub, clips[0])
        first = aiter(served.stub.Ask(ask(media.media_id, max_tokens=400, turn_id="mine")))
        await anext(first)
        code, error = await refused(served.stub.Ask(ask(media.media_id, turn_id="mine")))
        assert code == "INVALID_ARGUMENT" and "already in use" in str(error)
        assert [event.WhichOneof("event") async for event in first][-1] == "done"

    run(checkpoint, work)


@pytest.fixture(params=["short", "long"])
def folder(request):
    """Its path is short or long whatever tmp_path is: messages shorten long paths."""
    with TemporaryDirectory() as name:
        path = Path(name) / ("a folder in a folder/" * 4 if request.param == "long" else "")
        path.mkdir(parents=True, exist_ok=True)
        yield path


def test_files_are_read_below_the_root_only(checkpoint, clips, folder):
    root, secret = folder / "media", folder / "secret.mp4"
    root.mkdir()
    (root / "deep").mkdir()
    for path in (root / "deep" / "clip.mp4", secret, folder / "media-too.mp4"):
        path.write_bytes(clips[0])
    (root / "inside.mp4").symlink_to(root / "deep" / "clip.mp4")
    (root / "outside.mp4").symlink_to(secret)
    (root / "up").symlink_to(folder)
    os.mkfifo(root / "pipe")
    cut = "a long name " * 15 + ".mp4"
    (root / cut).write_bytes(clips[0][:700])

    async def work(served):
        for name in ("deep/clip.mp4", "./deep/../inside.mp4", str(root / "inside.mp4")):
            assert (await prepare(served.stub, pb.MediaSource(file=name))).num_frames
        outside = ["../secret.mp4", str(secret), "outside.mp4", "up/secret.mp4", "/etc/passwd", "../media-too.mp4", "", "."]
        wrong = [(name, "PERMISSION_DENIED") for name in outside]
        wrong += [(name, "INVALID_ARGUMENT") for name in ("no such.mp4", "deep", "pipe", "a\0b", "x" * 5000, cut)]
        for name, wanted in wrong:
            source = pb.MediaSource(file=name)
            code, error = await refused(served.stub.PrepareMedia(pb.PrepareMediaRequest(sources=[source])))
            told = str(error).replace(name or "?", "")
            assert code == wanted and gettempdir() not in told and len(told) < 400, (name, error)

    run(checkpoint, work, file_root=str(root))


def test_bytes_that_are_no_message_are_refused(checkpoint, clips):
    def raw(served, method, kind="unary_unary"):
        return getattr(served.channel, kind)(SERVICE + method, request_serializer=bytes, response_deserializer=bytes)

    async def some(*messages):
        for message in messages:
            yield message

    async def work(served):
        media = await prepare(served.stub, clips[0])
        running = aiter(served.stub.Ask(ask(media.media_id, max_tokens=300)))
        await anext(running)
        for garbage in (b"\xff", b"\x0a\xff\xff\xff\xff\x0f", bytes(range(256))):
            for method in ("Answer", "GetMedia", "Abort"):
                code, error = await refused(raw(served, method)(garbage))
                assert code == "INVALID_ARGUMENT" and "parse" in str(error), (method, garbage)
            for method in ("Ask", "PrepareMedia"):
                assert (await refused(raw(served, method, "unary_stream")(garbage)))[0] == "INVALID_ARGUMENT"
            assert (await refused(raw(served, "UploadMedia", "stream_unary")(some(b"\x0a\x01x", garbage))))[0] == "INVALID_ARGUMENT"
        assert (await refused(raw(served, "Answer")(b"\x0a\x02\xc3\x28")))[0] == "INVALID_ARGUMENT"  # text that is no UTF-8
        # fields of another message are unknown fields: what is missing is what is wrong
        assert (await refused(raw(served, "Answer")(b"\x98\x06\x01")))[0] == "INVALID_ARGUMENT"
        big = b"\x0a" + b"\xff" * (2 << 20)
        for call in (raw(served, "Answer")(big), raw(served, "UploadMedia", "stream_unary")(some(b"\x0a\x01x", big))):
            assert (await refused(call))[0] == "RESOURCE_EXHAUSTED"
        assert (await refused(raw(served, "NoSuchMethod")(b"")))[0] == "UNIMPLEMENTED"
        reader, writer = await asyncio.open_connection("127.0.0.1", served.server.port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n" + bytes(range(256)) * 64)
        await asyncio.wait_for(reader.read(), 10)
        writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", served.server.port)
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 4096)
        await asyncio.wait_for(reader.read(), 10)
        writer.close()
        assert [event.WhichOneof("event") async for event in running][-1] == "done"
        assert served.service._spool.num_bytes == 0 and served.server.healthy

    run(checkpoint, work, max_message_bytes=1 << 20)


def test_chunks_have_a_limit_and_an_upload_needs_bytes(checkpoint):
    async def work(served):
        for data, step, kind, wanted in (
            (b"x" * ((1 << 20) + 1), 1 << 21, "", "1048576"),
            (b"", 1, "", "empty"),
            (b"x", 1, "sound", "kind"),
        ):
            code, error = await refused(upload(served.stub, data, step, kind))
            assert code == "INVALID_ARGUMENT" and wanted in str(error)
        assert (await upload(served.stub, b"x" * (1 << 20))).num_bytes == 1 << 20

    run(checkpoint, work)


class Broken:
    """A pipeline with a bug, and one whose queue is full."""

    def __init__(self, error):
        self.error = error

    async def prepare(self, request, progress=None):
        raise self.error

    async def ask(self, turn):
        raise self.error
        yield

    async def media(self, media_id, tenant=""):
        raise self.error

    async def ready(self):
        raise self.error

    async def exchange_owners(self, owners):
        return frozenset()

    async def close(self):
        pass


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ZeroDivisionError("secret path /etc/key"), "INTERNAL"),
        (Internal("a step failed"), "INTERNAL"),
        (QueueFull("256 turns wait", retry_after_s=2.5), "RESOURCE_EXHAUSTED"),
        (Unavailable("no worker"), "UNAVAILABLE"),
        (UnicodeError("ü" * 40), "INTERNAL"),
        (TooLarge("ü€😀" * 2000), "RESOURCE_EXHAUSTED"),
    ],
)
def test_what_the_pipeline_raises_is_told_and_bugs_are_logged_once(checkpoint, clips, caplog, error, code):
    async def work(served):
        media = pb.GetMediaRequest(media_id="m")
        for method, request in ((served.stub.Ask, ask("m")), (served.stub.Answer, ask("m")), (served.stub.GetMedia, media)):
            caplog.clear()
            got, told = await refused(method(request))
            assert got == code and "secret" not in str(told)
            known = isinstance(error, SparseVilaError)
            assert type(told) is (type(error) if known else Internal)
            logged = [record for record in caplog.records if record.name != NAME]
            assert [record.exc_info is not None for record in logged] == ([] if known else [True])
            if isinstance(error, QueueFull):
                assert told.retry_after_s == 2.5
        try:
            await served.stub.Answer(ask("m"))
        except grpc.aio.AioRpcError as failed:
            assert dict(failed.trailing_metadata()).get("retry-after") == ("2.5" if isinstance(error, QueueFull) else None)
        inline = pb.PrepareMediaRequest(sources=[pb.MediaSource(inline=clips[0])])
        assert (await refused(served.stub.PrepareMedia(inline)))[0] == code

    run(checkpoint, work, pipeline=Broken(error))


def test_statuses_fit_into_metadata():
    for text in ("x" * 100_000, "é" * 100_000, "\ud800" * 100_000, "😀" * 100_000, ""):
        assert len(clipped(text).encode()) <= MAX_MESSAGE_BYTES
        code, details, trailers = status_of(BadRequest(text))
        assert 3 * len(details.encode()) + sum(len(value) * 4 // 3 for _, value in trailers) < 8000
