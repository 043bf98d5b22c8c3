"""The service without a protocol: what a translation gets from it, and that it needs none."""

import asyncio
import subprocess
import sys
from contextlib import aclosing

import pytest

from sparsevila_cluster.core.cluster_config import GatewayConfig
from sparsevila_cluster.core.config import build_config
from sparsevila_cluster.core.errors import BadRequest, Internal, NotFound, QueueFull, Unauthenticated
from sparsevila_cluster.core.evidence import Evidence
from sparsevila_cluster.core.metrics import Tally
from sparsevila_cluster.core.requests import FinishReason, MediaHandle, Replay, Turn, TurnEvent, Usage
from sparsevila_cluster.gateway.media_sources import MediaChunk, MediaReference
from sparsevila_cluster.gateway.progress_queue import StageProgress
from sparsevila_cluster.gateway.service import VideoQAService
from tests import structure as rules

MEDIA_ID = "m" * 64
ANN = ["Bearer key-of-ann"]


class Scripted:
    """A pipeline that answers "yes", and remembers what it was given."""

    def __init__(self):
        self.requests, self.turns, self.aborted = [], [], []

    async def prepare(self, request, progress=None):
        self.requests.append(request)
        progress("decode", 1, 2)
        await asyncio.sleep(0)
        return MediaHandle(MEDIA_ID, "video", 8, 2.0, 64, 32, 40, 1000, 2000, tenant=request.tenant)

    async def ask(self, turn):
        self.turns.append(turn)
        if turn.question == "bug?":
            raise ZeroDivisionError("a secret")
        try:
            yield TurnEvent("accepted", turn.turn_id, conversation_id="c")
            yield TurnEvent("token", turn.turn_id, token_ids=(1, 2), text="yes")
        except GeneratorExit:
            self.aborted.append(turn.turn_id)
            raise
        if turn.question != "no end?":
            usage = Usage(64, 32, 3, 5, 2, 0.1)
            yield TurnEvent("done", turn.turn_id, finish_reason=FinishReason.STOP, usage=usage, conversation_id="c")


def serve(work, **fields):
    async def main():
        pipeline, sink = Scripted(), Tally()
        service = VideoQAService(pipeline, GatewayConfig(**fields), build_config(), sink)
        try:
            await work(service, pipeline, sink)
        finally:
            await service.close()

    asyncio.run(asyncio.wait_for(main(), 30))


@pytest.mark.parametrize("keys, owner", [({"key-of-ann": "ann", "key-of-bob": "bob"}, "ann"), ({"key-of-ann": "ann"}, "")])
def test_public_media_are_everybodys_and_count_as_their_callers_where_there_are_others(keys, owner):
    async def work(service, pipeline, sink):
        async with service.call("Prepare", ANN, lambda: None) as call:
            _ = [item async for item in service.prepare(call, [MediaReference(inline=b"de", kind="image")])]
        (request,) = pipeline.requests
        assert (request.tenant, request.owner) == ("", owner)

    serve(work, api_keys=keys, public_media=True)


def test_a_turn_has_the_callers_tenant_and_deadline_and_the_clients_id():
    async def work(service, pipeline, sink):
        async with service.call("Ask", ANN, lambda: 7.5) as call:
            events = [event async for event in service.ask(call, Turn("mine", "", MEDIA_ID, "what is it?"))]
        (turn,) = pipeline.turns
        assert (turn.turn_id, turn.tenant, turn.owner, turn.deadline_s) == ("ann/mine", "ann", "ann", 7.5)
        assert [(event.kind, event.turn_id) for event in events] == [(kind, "mine") for kind in ("accepted", "token", "done")]
        assert events[1].evidence == Evidence() and sink.counts["requests_total", "Ask", "OK"] == 1
        assert sink.observed["request_ttft_seconds", "first", "warm"] == sink.observed["request_tpot_seconds",] == 1
        async with service.call("Ask", ANN, lambda: None) as call:
            async with aclosing(service.ask(call, Turn("", "c", MEDIA_ID, "and?"))) as leaving:
                made = (await anext(leaving)).turn_id
        assert made and pipeline.aborted == [f"ann/{made}"] and sink.observed["request_e2e_seconds", "later"] == 0

    serve(work, api_keys={"key-of-ann": "ann", "key-of-bob": "bob"})


def test_media_go_from_upload_to_handle():
    async def work(service, pipeline, sink):
        async def chunks():
            for data in (b"a", b"bc"):
                yield MediaChunk(data, "video")

        async with service.call("UploadMedia", [], lambda: None) as call:
            upload = await service.upload(call, chunks())
            named = [MediaReference(upload_id=upload.upload_id), MediaReference(inline=b"de", kind="image")]
            updates = [update async for update in service.prepare(call, named, max_frames=4)]
        assert updates[0] == StageProgress("decode", 1, 2) and updates[-1].media_id == MEDIA_ID
        (request,) = pipeline.requests
        assert [source.kind for source in request.sources] == ["video", "image"] and request.max_frames == 4

    serve(work)


@pytest.mark.parametrize(
    ("turn", "kind", "code"),
    [
        (Turn("t", "", "", "what?"), BadRequest, "INVALID_ARGUMENT"),
        (Turn("t", "", MEDIA_ID, "what?", replay=Replay((1, -1))), BadRequest, "INVALID_ARGUMENT"),
        (Turn("t", "", MEDIA_ID, "bug?"), Internal, "INTERNAL"),
        (Turn("t", "", MEDIA_ID, "no end?"), Internal, "INTERNAL"),
    ],
)
def test_errors_are_ours_counted_and_logged_only_where_they_are_bugs(turn, kind, code, caplog):
    async def work(service, pipeline, sink):
        with pytest.raises(kind) as raised:
            async with service.call("Ask", [], lambda: None) as call:
                async for _ in service.ask(call, turn):
                    pass
        assert "secret" not in str(raised.value) and sink.counts["requests_total", "Ask", code] == 1
        assert [record.getMessage() for record in caplog.records] == (["Ask failed"] if turn.question == "bug?" else [])
        caplog.clear()

    serve(work)


def test_keys_and_the_limit_of_calls_hold_for_every_protocol():
    async def work(service, pipeline, sink):
        with pytest.raises(Unauthenticated):
            async with service.call("Ask", ["Bearer nobody's"], lambda: None):
                pass
        async with service.call("Ask", ANN, lambda: None) as call:
            with pytest.raises(QueueFull, match="max_streams=1"):
                async with service.call("Ask", ANN, lambda: None):
                    pass
            with pytest.raises(NotFound):
                async for _ in service.prepare(call, [MediaReference(upload_id="0" * 32)]):
                    pass

    serve(work, api_keys={"key-of-ann": "ann"}, max_streams=1)


def test_the_service_needs_no_protocol():
    modules = "('grpc', 'google.protobuf', 'torch')"
    script = f"import sparsevila_cluster.gateway.service, sys; sys.exit(any(m in sys.modules for m in {modules}))"
    assert subprocess.run([sys.executable, "-c", script], cwd=rules.ROOT, timeout=120).returncode == 0
