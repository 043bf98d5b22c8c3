"""What strangers may do before a key is asked for, each limit against a real server on a real socket."""

import asyncio
import logging
import os
import socket
import struct
import time
from contextlib import AsyncExitStack, suppress

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.lib import http2_frames as h2
from sparsevila_cluster.core.cluster_config import GatewayConfig
from sparsevila_cluster.core.errors import BadRequest, DeadlineExceeded, QueueFull, TooLarge, Unavailable
from sparsevila_cluster.gateway.grpc.call_interceptor import MAX_REFLECTIONS
from sparsevila_cluster.pb import video_qa_pb2 as pb
from sparsevila_cluster.pb.video_qa_pb2_grpc import VideoQAStub
from tests.gateway.running_servers import ask, blocking_upload, refused, run, until
from tests.gateway.test_bad_calls import Broken

HEALTH, REFLECTION = "/grpc.health.v1.Health/", "/grpc.reflection.v1alpha.ServerReflection/"
ABORT = pb.AbortRequest(turn_id="t").SerializeToString()


class Patient(Broken):
    """A pipeline whose turns last until they are left, and that knows no turn."""

    def __init__(self):
        super().__init__(None)
        self.num_asked = self.num_aborted = 0

    async def ask(self, turn):
        await asyncio.sleep(3600)
        yield

    async def abort(self, turn_id):
        self.num_aborted += 1
        return False

    async def ready(self):
        self.num_asked += 1
        return True


def served(work, **fields):
    run("tiny", work, pipeline=Patient(), **fields)


async def alive(one) -> None:
    assert not (await one.stub.Abort(pb.AbortRequest(turn_id="t"), timeout=20)).aborted


async def ends(connection, num, within_s=20) -> dict[int, h2.Frame]:
    """The frame that ended each of `num` streams, by stream."""
    ended = {}
    async for frame in connection.frames(within_s):
        if frame.kind == h2.SETTINGS and not frame.flags & h2.ACK:
            await connection.send(h2.frame(h2.SETTINGS, h2.ACK))
        if frame.kind == h2.RST_STREAM or frame.kind == h2.HEADERS and frame.flags & h2.END_STREAM:
            ended.setdefault(frame.stream, frame)
            if len(ended) == num:
                break
    return ended


# ---- overload --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_connections", [1, 10])
def test_calls_beyond_the_limit_are_told_when_to_try_again(num_connections):
    async def work(one):
        async with AsyncExitStack() as stack:
            options = [("grpc.use_local_subchannel_pool", 1)]
            channels = [grpc.aio.insecure_channel(one.address, options=options) for _ in range(num_connections)]
            stubs = [VideoQAStub(await stack.enter_async_context(channel)) for channel in channels]
            calls = [stubs[i % num_connections].Answer(ask("m"), timeout=60) for i in range(300)]
            pending = {asyncio.ensure_future(refused(call)) for call in calls}
            while len(pending) > 20:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED, timeout=20)
                assert done, "neither answered nor refused"
                for code, error in (each.result() for each in done):
                    assert code == "RESOURCE_EXHAUSTED" and type(error) is QueueFull and error.retry_after_s > 0
            assert one.service._shares.num_calls == 20
            for call in calls:
                call.cancel()
            await asyncio.wait(pending)

    served(work, max_streams=20, max_streams_per_connection=300)  # beyond those gRPC itself refuses, as UNAVAILABLE


def test_of_a_flood_of_calls_that_are_taken_back_few_stand_before_a_call_of_somebody_else():
    async def work(one):
        async with h2.connection(one.address) as connection:
            await connection.acknowledged()
            for start in range(0, 6000, 500):
                await connection.send(b"".join(map(resets, range(start, start + 500))))
            await alive(one)
            await until(lambda: _is(one.service._shares.num_calls == 0), "all have ended")
        begun = {code: num for (name, method, code), num in one.service._sink.counts.items() if method == "Abort"}
        most = GatewayConfig().max_streams_per_connection
        assert begun["OK"] == 1 and 0 < begun["CANCELLED"] <= most + 50 < 6000 / 10

    served(work)


async def _is(condition):
    return condition


def test_a_call_of_one_owner_does_not_wait_for_all_of_another_one_that_came_before():
    order = []

    class Noted(Patient):
        async def ask(self, turn):
            order.append(turn.owner)
            await asyncio.sleep(3600)
            yield

    async def work(one):
        host, _, port = one.address.rpartition(":")
        sockets = [socket.create_connection((host, int(port)), 20) for _ in range(4)]
        asked = pb.AskRequest(media_id="m", question="Why?").SerializeToString()
        for each, key, num in zip(sockets, ("few", "many", "many", "few"), (1, 90, 90, 1), strict=True):
            calls = (h2.call(2 * i + 1, "Ask", asked, ("authorization", f"Bearer {key}-key")) for i in range(num))
            each.sendall(h2.PREFACE + h2.frame(h2.SETTINGS) + b"".join(calls))
            time.sleep(0.2)  # this blocks the loop, gRPC's threads take all of them in
        await until(lambda: _is(order.count("few") == 2), "it begins")
        assert len(order) < 100, len(order)
        await until(lambda: _is(len(order) == 182), "all begin")
        for each in sockets:
            each.close()

    run("tiny", work, pipeline=Noted(), api_keys={"many-key": "many", "few-key": "few"}, max_streams=400)


def test_grpc_cuts_nothing_off_while_the_loop_is_late():
    """It did above a thousand calls of a method: CANCELLED, without a time to try again."""

    async def work(one):
        host, _, port = one.address.rpartition(":")
        sockets = [socket.create_connection((host, int(port)), 20) for _ in range(2)]
        for each in sockets:  # this blocks the loop, gRPC's threads take all of them in
            each.sendall(h2.PREFACE + h2.frame(h2.SETTINGS) + b"".join(h2.call(2 * i + 1, "Abort", ABORT) for i in range(900)))
        time.sleep(0.5)
        opened = [h2.Connection(*await asyncio.open_connection(sock=each)) for each in sockets]
        for ended in await asyncio.gather(*(ends(connection, 900) for connection in opened)):
            assert len(ended) == 900 and not [frame for frame in ended.values() if b"CANCELLED" in frame.payload]
        for connection in opened:
            connection.close()

    served(work)


def test_a_busy_loop_takes_several_calls_in_each_turn():
    """gRPC takes one in five turns: calls behind a thousand others then wait for as long as they are cut off after."""

    async def work(one):
        per_turn = []

        async def busy():
            while True:
                before = one.service._pipeline.num_aborted
                time.sleep(0.02)
                await asyncio.sleep(0)
                per_turn.append(one.service._pipeline.num_aborted - before)

        async with h2.connection(one.address) as connection:
            await connection.send(b"".join(h2.call(2 * i + 1, "Abort", ABORT) for i in range(40)))
            time.sleep(0.2)
            turning = asyncio.ensure_future(busy())
            assert len(await ends(connection, 40)) == 40
            turning.cancel()
        assert max(per_turn) > 2, per_turn

    served(work)


def test_a_late_loop_takes_no_new_calls():
    async def work(one):
        async def taken():
            with suppress(grpc.aio.AioRpcError):
                await alive(one)
                return True
            return False

        await until(lambda: _is(one.service._lag.lag_s < 0.2), "the loop is in time")
        time.sleep(0.5)
        code, error = await refused(one.stub.Abort(pb.AbortRequest(turn_id="t")))
        assert code == "RESOURCE_EXHAUSTED" and type(error) is QueueFull and "max_loop_lag_s = 0.3" in str(error)
        assert error.retry_after_s >= 1
        await until(lambda: _is(one.service._lag.lag_s < 0.2), "it is in time again")
        await until(taken, "new calls are taken again")  # a busy machine may make it late once more

    served(work, max_loop_lag_s=0.3)


def test_what_was_cancelled_behind_a_call_is_no_end_without_a_reason():
    class Dropping(Patient):
        async def abort(self, turn_id):
            raise asyncio.CancelledError

    async def work(one):
        code, error = await refused(one.stub.Abort(pb.AbortRequest(turn_id="t")))
        assert code == "UNAVAILABLE" and type(error) is Unavailable
        assert one.sink.counts["requests_total", "Abort", "UNAVAILABLE"] == 1

    run("tiny", work, pipeline=Dropping())


# ---- what never ends a server ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [b"\xff", b"/sparsevila.v1.VideoQA/\xed\xa0\x80", b"", b"/no.Service/Method"])
def test_no_path_ends_the_server(path):
    async def work(one):
        fields = [(name, path if name == ":path" else value) for name, value in h2.fields()]
        async with h2.connection(one.address) as connection:
            await connection.send(h2.frame(h2.HEADERS, h2.END_HEADERS | h2.END_STREAM, 1, h2.hpack(fields)))
            async for frame in connection.frames():
                if frame.stream == 1:
                    assert frame.kind == h2.HEADERS and b"grpc-status\x0212" in frame.payload  # UNIMPLEMENTED
                    break
        await alive(one)
        assert one.server.healthy

    served(work)


def test_headers_that_are_no_text_are_not_worth_a_line_in_the_log(caplog):
    async def work(one):
        async with h2.connection(one.address) as connection:
            await connection.send(h2.call(1, "Abort", ABORT, ("x-name", b"\xff\xfe")))
            assert (await ends(connection, 1))[1].kind == h2.HEADERS
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    served(work)


def test_what_clients_do_is_no_error_in_the_log_and_what_grpc_does_is_one(caplog):
    async def work(one):
        log = logging.getLogger("grpc._cython.cygrpc")
        log.error("ExecuteBatchError raised in core by servicer method [/sparsevila.v1.VideoQA/Abort]")
        log.error("Invalid encoding on %s", b"\xff")
        assert not caplog.records
        log.error("Unexpected [KeyError] raised by servicer method")
        assert len(caplog.records) == 1
        caplog.clear()

    served(work)


# ---- connections -----------------------------------------------------------------------------------------------------------


def test_connections_have_a_limit():
    async def work(one):
        await alive(one)
        async with AsyncExitStack() as stack:
            opened = [await stack.enter_async_context(h2.connection(one.address)) for _ in range(4)]
            closed = [await connection.closed(0.5) for connection in opened]
            assert closed.count(True) == 2, closed
            await alive(one)  # who was there before
            opened[closed.index(False)].close()

            async def room():
                async with h2.connection(one.address) as connection:
                    return not await connection.closed(0.3)

            await until(room, "a place that is free again is not given away", 10)

    served(work, max_connections=3)


def test_streams_of_one_connection_have_a_limit_and_their_requests_a_deadline():
    async def work(one):
        async with h2.connection(one.address) as connection:
            await connection.acknowledged()
            await connection.send(b"".join(h2.call(2 * i + 1) for i in range(4)))
            await until(lambda: num_calls(one, 3), "half-open calls are not counted", 10)
            ended = await ends(connection, 4)
            assert struct.unpack(">I", ended[7].payload) == (h2.REFUSED_STREAM,)
            assert b"grpc-status\x014" in ended[1].payload and len(ended) == 4  # DEADLINE_EXCEEDED
            await until(lambda: num_calls(one, 0), "they go on", 10)
        await alive(one)

    served(work, max_streams_per_connection=3, request_timeout_s=0.5)


async def num_calls(one, wanted):
    return one.service._shares.num_calls == wanted


def test_headers_have_a_limit():
    async def work(one):
        def abort(num_bytes):
            return one.stub.Abort(pb.AbortRequest(turn_id="t"), metadata=(("x-long", "x" * num_bytes),), timeout=20)

        assert not (await abort(1000)).aborted
        assert (await refused(abort(3000)))[0] == "RESOURCE_EXHAUSTED"
        await alive(one)

    served(work, max_header_bytes=2048)


@pytest.mark.parametrize("start", [b"", h2.PREFACE[:10], h2.PREFACE], ids=["nothing", "half a preface", "no settings"])
def test_a_connection_must_begin_in_time(start):
    async def work(one):
        async with h2.connection(one.address, start) as connection:
            assert await connection.closed(10)
        await alive(one)

    served(work, handshake_timeout_s=0.4)


def test_connections_that_do_nothing_and_old_ones_are_closed_and_calls_on_them_finish():
    async def work(one):
        async with h2.connection(one.address) as idle, h2.connection(one.address) as old:
            await old.acknowledged()
            await old.send(h2.call(1))  # half-open: it is not idle
            assert h2.GOAWAY in [frame.kind async for frame in idle.frames(10)]
            frames = [frame async for frame in old.frames(10)]
            assert h2.GOAWAY in [frame.kind for frame in frames]
            (status,) = [frame for frame in frames if frame.kind == h2.HEADERS]
            assert b"grpc-status\x014" in status.payload  # its own deadline, not the connection's
        await alive(one)

    served(work, max_connection_idle_s=0.5, max_connection_age_s=0.5, request_timeout_s=1.5)


def test_pings_close_together_close_the_connection():
    async def work(one):
        async with h2.connection(one.address) as connection:
            for _ in range(8):
                await connection.send(h2.frame(h2.PING, payload=b"8 bytes."))
            assert await connection.closed(10)
        async with h2.connection(one.address) as connection:
            for _ in range(4):
                await connection.send(h2.frame(h2.PING, payload=b"8 bytes."))
                await asyncio.sleep(0.2)
            assert not await connection.closed(0.2)

    served(work, min_ping_interval_s=0.1)


def test_an_upload_that_trickles_is_given_up():
    async def work(one):
        def trickle():
            for _ in range(100):
                yield pb.MediaChunk(data=b"x")
                time.sleep(0.05)

        code, error = await refused(blocking_upload(one.address, trickle()))
        assert code == "DEADLINE_EXCEEDED" and type(error) is DeadlineExceeded
        assert "min_upload_bytes_per_s = 1000" in str(error) and "upload_grace_s = 0.3" in str(error)
        assert one.service._spool.num_bytes == 0

        async def steady():
            for _ in range(12):
                yield pb.MediaChunk(data=b"x" * 1000)
                await asyncio.sleep(0.05)

        assert (await one.stub.UploadMedia(steady())).num_bytes == 12_000

    served(work, min_upload_bytes_per_s=1000, upload_grace_s=0.3)


# ---- floods ----------------------------------------------------------------------------------------------------------------


def resets(i):
    return h2.call(2 * i + 1, "Abort") + h2.frame(h2.RST_STREAM, 0, 2 * i + 1, struct.pack(">I", h2.CANCEL))


FLOODS = {
    "rapid reset": (b"", resets, 2000),
    "half-open": (b"", lambda i: h2.call(2 * i + 1), 400),
    "settings": (b"", lambda _: h2.frame(h2.SETTINGS, 0, 0, struct.pack(">HI", 4, 65_535)), 10_000),
    "pings": (b"", lambda _: h2.frame(h2.PING, payload=bytes(8)), 10_000),
    "continuation": (
        h2.frame(h2.HEADERS, 0, 1, h2.hpack(h2.fields())),
        lambda _: h2.frame(h2.CONTINUATION, 0, 1, h2.hpack([("x-more", "x" * 200)])),
        4000,
    ),
    "empty continuation": (h2.frame(h2.HEADERS, 0, 1, h2.hpack(h2.fields())), lambda _: h2.frame(h2.CONTINUATION, 0, 1), 4000),
    "window updates": (b"", lambda _: h2.frame(h2.WINDOW_UPDATE, 0, 0, struct.pack(">I", 1)), 10_000),
    "priorities": (b"", lambda i: h2.frame(h2.PRIORITY, 0, 2 * i + 1, bytes(5)), 10_000),
}


@pytest.mark.parametrize("kind", list(FLOODS))
def test_a_flood_of_frames_costs_who_sends_it(kind):
    """Another client's calls are answered meanwhile, and nothing stays."""
    head, frame_of, num = FLOODS[kind]

    async def work(one):
        await alive(one)
        before = len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())
        flooding = True

        async def victim():
            slowest_s = 0.0
            while flooding:
                begun_s = time.perf_counter()
                await alive(one)
                slowest_s = max(slowest_s, time.perf_counter() - begun_s)
                await asyncio.sleep(0.01)
            return slowest_s

        watching = asyncio.ensure_future(victim())
        async with h2.connection(one.address) as connection:
            await connection.acknowledged()
            await connection.send(head)
            for start in range(0, num, 200):
                if not await connection.send(b"".join(frame_of(i) for i in range(start, start + 200))):
                    break
                await asyncio.sleep(0)
            await connection.closed(0.2)
        flooding = False
        assert await watching < 5

        async def nothing_stays():
            return one.service._shares.num_calls == 0 and (len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())) <= before

        await until(nothing_stays, f"{before} files and tasks before, now {len(asyncio.all_tasks())} tasks")
        await alive(one)

    served(work, request_timeout_s=0.5)


# ---- what asks for no key --------------------------------------------------------------------------------------------------


def test_health_takes_no_calls_from_those_who_have_a_key_and_does_not_flap():
    async def work(one):
        health = health_pb2_grpc.HealthStub(one.channel)
        request = health_pb2.HealthCheckRequest(service="sparsevila.v1.VideoQA")
        watching = [health.Watch(request) for _ in range(150)]
        said = await asyncio.gather(*(_said(call) for call in watching))
        assert said.count(None) == 50 and set(said) == {None, 1}  # SERVING
        asked = one.service._pipeline.num_asked
        assert {(await health.Check(request)).status for _ in range(100)} == {1}
        assert one.service._pipeline.num_asked <= asked + 20  # five times a second, however many ask
        await alive(one)  # max_streams = 1
        flips = [asyncio.ensure_future(_said(call)) for call, first in zip(watching, said, strict=True) if first == 1]
        await asyncio.sleep(0.5)
        assert not any(flip.done() for flip in flips)
        for call in watching:
            call.cancel()
        await asyncio.gather(*flips, return_exceptions=True)

    served(work, max_streams=1, max_streams_per_connection=300)


async def _said(call):
    """The next status, None where the call is refused."""
    try:
        return (await call.read()).status
    except grpc.aio.AioRpcError as error:
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        return None


def test_one_silence_is_not_taken_for_an_end(monkeypatch):
    """A late event loop hears its answers late."""
    monkeypatch.setattr("sparsevila_cluster.gateway.grpc.health_service.ANSWER_S", 0.1)

    class Silent(Patient):
        pauses = [0.0, 1.0, 0.0, 1.0, 1.0]

        async def ready(self):
            await asyncio.sleep(self.pauses.pop(0) if self.pauses else 0.0)
            return True

    async def work(one):
        health = health_pb2_grpc.HealthStub(one.channel)
        said = []
        for _ in range(6):
            said.append((await health.Check(health_pb2.HealthCheckRequest(service="sparsevila.v1.VideoQA"))).status == 1)
            await asyncio.sleep(0.25)
        assert said == [True, True, True, True, False, True]

    run("tiny", work, pipeline=Silent())


def test_what_asks_for_no_key_is_bounded_and_typed(monkeypatch):
    monkeypatch.setattr("sparsevila_cluster.gateway.grpc.call_interceptor.KEYLESS_REQUEST_S", 0.3)

    async def work(one):
        check = one.channel.unary_unary(HEALTH + "Check", request_serializer=bytes, response_deserializer=bytes)
        code, error = await refused(check(b"\xff"))
        assert code == "INVALID_ARGUMENT" and type(error) is BadRequest and "parse" in str(error)
        async with h2.connection(one.address) as connection:
            await connection.send(
                b"".join(h2.call(2 * i + 1, name, service=HEALTH) for i, name in enumerate(("Check", "Watch", "List")))
            )
            ended = await ends(connection, 3)
            assert len(ended) == 3 and b"grpc-status\x014" in ended[1].payload  # DEADLINE_EXCEEDED
        reflect = one.channel.stream_stream(
            REFLECTION + "ServerReflectionInfo", request_serializer=bytes, response_deserializer=bytes
        )
        streams = [reflect(timeout=20) for _ in range(MAX_REFLECTIONS + 1)]
        codes = [(await stream.code()).name for stream in streams]
        assert sorted(codes) == ["DEADLINE_EXCEEDED"] * MAX_REFLECTIONS + ["RESOURCE_EXHAUSTED"]

    served(work)


def test_a_call_without_a_message_is_told_so():
    async def work(one):
        method = one.channel.stream_unary(h2.SERVICE + "Abort", request_serializer=bytes, response_deserializer=bytes)
        code, error = await refused(method(iter(())))
        assert code == "INVALID_ARGUMENT" and type(error) is BadRequest and "no message" in str(error)
        big = one.channel.unary_unary(h2.SERVICE + "Abort", request_serializer=bytes, response_deserializer=bytes)
        assert (await refused(big(bytes(200_000))))[0] == TooLarge.grpc_status
        await alive(one)

    served(work, max_message_bytes=100_000)
