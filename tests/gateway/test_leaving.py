"""Clients that leave, wait too long or are too many, and a server that stops: nothing goes on for nobody."""

import asyncio
import os
import signal
import subprocess
import sys
import time

import grpc
import pytest

from sparsevila_cluster.core.errors import Cancelled, QueueFull
from sparsevila_cluster.gateway.progress_queue import ProgressQueue
from sparsevila_cluster.pb import video_qa_pb2 as pb
from tests import structure as rules
from tests.gateway.running_servers import (
    ask,
    long_question,
    prepare,
    refused,
    run,
    running_server,
    slow_down,
    streamed,
    until,
    upload,
)
from tests.processes import stop


async def turns(served):
    info = await served.pipeline.info()
    return info["turns_running"] + info["turns_waiting"]


@pytest.mark.parametrize("num_read", [0, 1, 2, 20])
def test_a_cancelled_call_frees_its_turn_and_its_conversation_is_as_before(checkpoint, clips, num_read):
    async def work(served):
        media = await prepare(served.stub, clips[0])
        _, _, events = await streamed(served.stub, ask(media.media_id))
        request = await long_question(served.stub, media.media_id)
        slow_down(served.pipeline)
        before, conversation_id = await served.pipeline.info(), events[-1].done.conversation_id
        calls = [served.stub.Ask(ask(media.media_id, "go on", 100, conversation_id=conversation_id))]
        calls += [served.stub.Ask(request) for _ in range(3)]
        for call in calls:
            reading = aiter(call)
            for _ in range(num_read):
                await anext(reading)
        for call in calls:
            call.cancel()
        await served.settled()
        after = await served.pipeline.info()
        assert after["prefix_bytes"] == before["prefix_bytes"]
        assert after["steps"] - before["steps"] < 100
        if num_read:
            assert served.sink.counts["requests_total", "Ask", "CANCELLED"] >= 3
        wanted, _, _ = await streamed(served.stub, ask(media.media_id, "and?", conversation_id=conversation_id))
        _, _, fresh = await streamed(served.stub, ask(media.media_id))
        again = ask(media.media_id, "and?", conversation_id=fresh[-1].done.conversation_id)
        assert (await streamed(served.stub, again))[0] == wanted

    run(checkpoint, work)


def test_a_deadline_ends_the_turn_on_both_sides(checkpoint, clips):
    async def work(served):
        media = await prepare(served.stub, clips[0])
        request = await long_question(served.stub, media.media_id)
        slow_down(served.pipeline)
        started = time.perf_counter()
        for method in (served.stub.Ask, served.stub.Answer):
            assert (await refused(method(request, timeout=0.3)))[0] == "DEADLINE_EXCEEDED"
        assert time.perf_counter() - started < 5
        await served.settled()
        assert (await refused(served.stub.Answer(ask(media.media_id), timeout=0)))[0] == "DEADLINE_EXCEEDED"
        source = pb.PrepareMediaRequest(sources=[pb.MediaSource(inline=clips[1])])
        assert (await refused(served.stub.PrepareMedia(source, timeout=0.0005)))[0] == "DEADLINE_EXCEEDED"

        async def freed():
            return served.service._spool.num_bytes == 0 and (await served.stub.GetServerInfo(pb.GetServerInfoRequest())) is not None

        await until(freed, "inline bytes stay")
        assert (await served.stub.Answer(ask(media.media_id), timeout=30)).finish_reason == "length"

    run(checkpoint, work)


def test_a_deadline_beyond_the_servers_is_cut(checkpoint, clips):
    async def work(served):
        media = await prepare(served.stub, clips[0])
        request = await long_question(served.stub, media.media_id)
        slow_down(served.pipeline)
        async with running_server(checkpoint, pipeline=served.pipeline, max_deadline_s=0.5) as strict:
            code, error = await refused(strict.stub.Answer(request, timeout=1000))
            assert code == "DEADLINE_EXCEEDED" and "took longer" in str(error)
            await strict.settled()

    run(checkpoint, work)


def test_the_engines_deadline_holds_where_a_client_names_none(checkpoint, clips):
    async def work(served):
        media = await prepare(served.stub, clips[0])
        request = await long_question(served.stub, media.media_id, 60)
        slow_down(served.pipeline, 0.05)
        code, error = await refused(served.stub.Ask(request))
        assert code == "DEADLINE_EXCEEDED" and error is not None

    run(checkpoint, work, engine={"turn_timeout_s": 3})


def test_abort_ends_the_stream_with_cancelled(checkpoint, clips):
    async def work(served):
        media = await prepare(served.stub, clips[0])
        request = await long_question(served.stub, media.media_id, turn_id="mine")
        slow_down(served.pipeline)
        call = served.stub.Ask(request)
        reading = aiter(call)
        accepted = (await anext(reading)).accepted
        assert accepted.turn_id == "mine"
        assert (await served.stub.Abort(pb.AbortRequest(turn_id="mine"))).aborted
        code, error = await refused(_drained(reading))
        assert code == "CANCELLED" and type(error) is Cancelled
        closing = pb.CloseConversationRequest(conversation_id=accepted.conversation_id)
        assert not (await served.stub.CloseConversation(closing)).closed  # it went with its only turn
        await served.settled()

    run(checkpoint, work)


async def _drained(events):
    return [event async for event in events]


CLIENT = """
import asyncio, sys, grpc
from sparsevila_cluster.pb import video_qa_pb2 as pb
from sparsevila_cluster.pb.video_qa_pb2_grpc import VideoQAStub
async def main(address, media_id):
    async with grpc.aio.insecure_channel(address) as channel:
        stub = VideoQAStub(channel)
        async def chunks():
            yield pb.MediaChunk(data=bytes(1000))
            await asyncio.sleep(60)
        sending = asyncio.ensure_future(asyncio.wait_for(stub.UploadMedia(chunks()), 60))
        request = pb.AskRequest(media_id=media_id, question="why?", sampling=pb.Sampling(max_tokens=150))
        async for event in stub.Ask(request):
            print("reading", flush=True)
            await asyncio.sleep(60)
asyncio.run(main(*sys.argv[1:]))
"""


def test_a_client_that_is_killed_leaves_nothing_behind(checkpoint, clips):
    async def work(served):
        media = await prepare(served.stub, clips[0])
        slow_down(served.pipeline)
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join((str(rules.ROOT), str(rules.ROOT / "kernels")))}
        command = [sys.executable, "-c", CLIENT, served.address, media.media_id]
        client = subprocess.Popen(command, stdout=subprocess.PIPE, env=environ, cwd=rules.ROOT)
        try:
            await asyncio.to_thread(client.stdout.readline)

            async def arrived():
                return served.service._spool.num_bytes == 1000

            await until(arrived, "the upload did not begin")
            client.send_signal(signal.SIGKILL)

            async def gone():
                return served.service._spool.num_bytes == 0

            await until(gone, "a partial upload stays")
            await served.settled()
        finally:
            client.kill()
            client.wait(10)
            client.stdout.close()
        assert not list(served.service._spool._folder.glob("*/*"))

    run(checkpoint, work)


def test_a_client_that_stands_still_is_given_up(checkpoint, clips):
    async def work(served):
        media = await prepare(served.stub, clips[0])
        request = await long_question(served.stub, media.media_id)
        slow_down(served.pipeline, 0.2)  # half a minute for the answer
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join((str(rules.ROOT), str(rules.ROOT / "kernels")))}
        command = [sys.executable, "-c", CLIENT.replace("why?", request.question), served.address, media.media_id]
        client = subprocess.Popen(command, stdout=subprocess.PIPE, env=environ, cwd=rules.ROOT)
        try:
            await asyncio.to_thread(client.stdout.readline)
            assert await turns(served) == 1
            await asyncio.to_thread(stop, client.pid)
            started = time.perf_counter()
            await served.settled()
            assert time.perf_counter() - started < 10 and served.service._spool.num_bytes == 0
        finally:
            client.kill()
            client.wait(10)
            client.stdout.close()

    run(checkpoint, work, keepalive_s=1.0)


def test_a_cancelled_preparation_ends_and_its_bytes_go(checkpoint, clips):
    async def work(served):
        call = served.stub.PrepareMedia(pb.PrepareMediaRequest(sources=[pb.MediaSource(inline=clips[0])]))
        await anext(aiter(call))
        call.cancel()

        async def gone():
            return served.service._spool.num_bytes == 0

        await until(gone, "bytes of a cancelled preparation stay")
        assert (await prepare(served.stub, clips[0])).num_frames
        await served.settled()

    run(checkpoint, work)


class Endless:
    """A pipeline whose preparations end only when they are cancelled, which takes a moment, and need their file until then."""

    def __init__(self):
        self.had_file = []

    async def prepare(self, request, progress=None):
        progress("decode", 0, 1)
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.1)
            self.had_file.append(os.path.exists(request.sources[0].data))

    async def ready(self):
        return True

    async def close(self):
        pass


def test_a_preparation_is_cancelled_with_its_call_and_has_its_file_until_it_ends(clips):
    pipeline = Endless()

    async def work(served):
        sent = await upload(served.stub, clips[0])
        for source in (pb.MediaSource(inline=clips[0]), pb.MediaSource(upload_id=sent.upload_id)):
            call = served.stub.PrepareMedia(pb.PrepareMediaRequest(sources=[source]))
            assert (await anext(aiter(call))).stage == "decode"
            call.cancel()

        async def gone():
            return len(pipeline.had_file) == 2 and served.service._spool.num_bytes == len(clips[0])

        await until(gone, "preparations go on for nobody", 5)
        assert pipeline.had_file == [True, True]

    run("tiny", work, pipeline=pipeline)


def test_too_many_calls_are_told_so_and_health_still_answers(checkpoint, clips):
    async def work(served):
        media = await prepare(served.stub, clips[0])
        request = await long_question(served.stub, media.media_id)
        slow_down(served.pipeline)
        async with grpc.aio.insecure_channel(served.address, options=[("grpc.use_local_subchannel_pool", 1)]) as other:
            calls = [aiter(served.stub.Ask(request)) for _ in range(3)]
            for call in calls:
                await anext(call)
            code, error = await refused(type(served.stub)(other).Answer(ask(media.media_id)))
            assert code == "RESOURCE_EXHAUSTED" and type(error) is QueueFull and "max_streams=3" in str(error)
            for call in calls:
                assert (await anext(call)).HasField("token")

    run(checkpoint, work, max_streams=3)


def test_a_stop_lets_calls_finish_within_its_grace(checkpoint, clips):
    async def work(served):
        media = await prepare(served.stub, clips[0])
        request = await long_question(served.stub, media.media_id)
        slow_down(served.pipeline, 0.02)
        short, long = (aiter(served.stub.Ask(one)) for one in (ask(media.media_id, request.question, 20), request))
        await anext(short)
        await anext(long)
        sent = await upload(served.stub, clips[0])
        folder = served.service._spool._folder
        assert sent.upload_id and folder.exists() and served.server.healthy
        stopping = asyncio.ensure_future(served.server.stop(1.5))
        events = [event async for event in short]
        assert events[-1].done.num_tokens == 20
        code, _ = await refused(_drained(long))
        assert code in ("CANCELLED", "UNAVAILABLE")
        await stopping
        await served.service.close()
        assert not served.server.healthy and not folder.exists()
        assert (await refused(served.stub.Answer(ask(media.media_id), timeout=5)))[0] in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
        await served.settled()
        await served.server.stop()

    run(checkpoint, work, engine={"turn_timeout_s": 60})


def test_reports_are_skipped_never_awaited_and_the_last_of_each_stage_arrives():
    async def main():
        reports = ProgressQueue()

        def work():
            for stage in ("decode", "prefill"):
                for done in range(10_000):
                    reports.put(stage, done + 1, 10_000)

        await asyncio.to_thread(work)
        asyncio.get_running_loop().call_later(0.01, reports.close)
        got = [report async for report in reports]
        assert got == [("decode", 10_000, 10_000), ("prefill", 10_000, 10_000)]
        return reports

    reports = asyncio.run(main())
    reports.put("late", 1, 1)  # whoever works outlives the loop
    reports.put("late", 2, 2)
