"""grpc.health.v1 and reflection as stock clients see them, and that generated code is that of the proto."""

import asyncio
import subprocess
import sys

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from sparsevila_cluster.core.cluster_config import GatewayConfig
from sparsevila_cluster.core.config import build_config
from sparsevila_cluster.core.errors import BadConfig
from sparsevila_cluster.gateway.grpc import GrpcServer
from sparsevila_cluster.gateway.grpc.health_service import MAX_WATCHERS, POLL_S, HealthService, Status
from sparsevila_cluster.gateway.refusal_pace import RefusalPace
from sparsevila_cluster.gateway.service import VideoQAService
from sparsevila_cluster.pb import video_qa_pb2 as pb
from tests import structure as rules
from tests.gateway.running_servers import refused, run, until
from tests.gateway.test_bad_calls import Broken

SERVICE = "sparsevila.v1.VideoQA"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class SometimesReady(Broken):
    """A pipeline whose workers come and go."""

    is_ready = False

    async def ready(self):
        return self.is_ready


def ask(name):
    return health_pb2.HealthCheckRequest(service=name)


def test_readiness_follows_the_pipeline_and_watchers_learn_of_changes():
    pipeline = SometimesReady(None)

    async def work(served):
        stub = health_pb2_grpc.HealthStub(served.channel)
        assert (await stub.Check(ask(""))).status == SERVING
        assert (await stub.Check(ask(SERVICE))).status == NOT_SERVING
        assert (await refused(stub.Check(ask("nobody"))))[0] == "NOT_FOUND"
        service, alive, nobody = (aiter(stub.Watch(ask(name))) for name in (SERVICE, "", "nobody"))
        assert (await anext(service)).status == NOT_SERVING
        assert (await anext(alive)).status == SERVING
        assert (await anext(nobody)).status == UNKNOWN
        for wanted in (True, False, True):
            pipeline.is_ready = wanted
            assert (await asyncio.wait_for(anext(service), 5)).status == (SERVING if wanted else NOT_SERVING)
        statuses = (await stub.List(health_pb2.HealthListRequest())).statuses
        assert {name: s.status for name, s in statuses.items()} == {"": SERVING, SERVICE: SERVING}
        stopping = asyncio.ensure_future(served.server.stop(20))
        assert [s.status async for s in service] == [s.status async for s in alive] == [NOT_SERVING]
        assert [s.status async for s in nobody] == []
        await asyncio.wait_for(stopping, 5)  # those who watch do not hold it up

    run("tiny", work, pipeline=pipeline)


def test_however_many_watch_the_pipeline_is_asked_by_one_at_a_time():
    """Watching needs no key: it must not cost a server that is busy anything."""

    class Slow(Broken):
        num_asked = num_at_once = most_at_once = 0

        async def ready(self):
            self.num_asked, self.num_at_once = self.num_asked + 1, self.num_at_once + 1
            self.most_at_once = max(self.most_at_once, self.num_at_once)
            await asyncio.sleep(0.3)
            self.num_at_once -= 1
            return True

    pipeline = Slow(None)

    async def work(served):
        stub = health_pb2_grpc.HealthStub(served.channel)
        watching = [aiter(stub.Watch(ask(SERVICE))) for _ in range(MAX_WATCHERS)]
        assert {(await anext(one)).status for one in watching} == {SERVING}
        assert (await refused(anext(aiter(stub.Watch(ask(SERVICE))))))[0] == "RESOURCE_EXHAUSTED"
        flips = [asyncio.ensure_future(anext(one)) for one in watching]
        await asyncio.sleep(1.2)
        assert not any(flip.done() for flip in flips), "it was told that the server is not ready"
        assert pipeline.most_at_once == 1 and pipeline.num_asked < 10
        assert (await stub.Check(ask(SERVICE))).status == SERVING
        for flip in flips:
            flip.cancel()

    run("tiny", work, pipeline=pipeline, max_streams_per_connection=300)


def test_a_pipeline_that_cannot_say_is_not_ready(caplog):
    async def work(served):
        stub = health_pb2_grpc.HealthStub(served.channel)
        assert (await stub.Check(ask(SERVICE))).status == NOT_SERVING and (await stub.Check(ask(""))).status == SERVING

    run("tiny", work, pipeline=Broken(RuntimeError("?")))


def test_a_local_pipeline_is_ready_until_it_is_closed(checkpoint):
    async def work(served):
        stub = health_pb2_grpc.HealthStub(served.channel)
        assert (await stub.Check(ask(SERVICE))).status == SERVING
        await served.pipeline.close()

        async def told():
            return (await stub.Check(ask(SERVICE))).status == NOT_SERVING

        await until(told, "still ready", 5)

    run(checkpoint, work)


def test_reflection_lists_the_services_and_describes_ours():
    async def work(served):
        stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)

        async def questions():
            yield reflection_pb2.ServerReflectionRequest(list_services="")
            yield reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE)

        listed, described = [answer async for answer in stub.ServerReflectionInfo(questions())]
        names = {service.name for service in listed.list_services_response.service}
        assert names == {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
        file = descriptor_pb2.FileDescriptorProto()
        file.ParseFromString(described.file_descriptor_response.file_descriptor_proto[0])
        assert file.package == "sparsevila.v1" and [s.name for s in file.service] == ["VideoQA"]
        assert {m.name for m in file.service[0].method} >= {"Ask", "Answer", "PrepareMedia", "UploadMedia", "GetServerInfo"}

    run("tiny", work, pipeline=Broken(None))


def test_generated_code_is_that_of_the_proto(tmp_path):
    pytest.importorskip("grpc_tools")
    outs = [f"--{kind}={tmp_path}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", "protos", *outs, "protos/sparsevila/v1/video_qa.proto"]
    subprocess.run(command, cwd=rules.ROOT, check=True, timeout=60)
    made = {path.name: path.read_text() for path in (tmp_path / "sparsevila" / "v1").iterdir()}
    kept = {path.name: path.read_text() for path in (rules.ROOT / rules.OURS / "pb").glob("video_qa_*")}
    # Modules live in our package; the descriptor keeps the file's public name. A newer protoc only says so in its first lines.
    versions = ("# Protobuf Python Version", "GRPC_GENERATED_VERSION =", "    ")
    assert sorted(made) == sorted(kept)
    for name, text in made.items():
        text = text.replace("from sparsevila.v1 import", "from sparsevila_cluster.pb import")
        wanted, found = ([line for line in t.splitlines() if not line.startswith(versions)] for t in (text, kept[name]))
        assert wanted == found, f"{name} is old: run `make protos`"
    assert pb.DESCRIPTOR.name == "sparsevila/v1/video_qa.proto"


def test_a_server_says_when_it_cannot_listen(tmp_path):
    async def work(served):
        (tmp_path / "file").write_text("not a folder")
        (tmp_path / "key.pem").write_text("not a key")
        (tmp_path / "pem.pem").write_text("-----BEGIN NONSENSE-----")
        name = {key: str(tmp_path / f"{key}.pem") for key in ("key", "none", "pem")}
        for fields, word in (
            ({"host": "203.0.113.7"}, "listen"),
            ({"host": "no host at all"}, "listen"),
            ({"tls_certificate": name["none"], "tls_key": name["none"]}, "tls_"),
            ({"tls_certificate": name["key"], "tls_key": name["key"]}, "PEM"),
            ({"tls_certificate": name["pem"], "tls_key": name["pem"]}, "TLS"),
        ):
            server = GrpcServer(served.service, GatewayConfig(port=0, **fields))
            with pytest.raises(BadConfig, match=word):
                await server.start()
            assert not server.healthy
            await server.stop()
        with pytest.raises(BadConfig, match="spool_dir"):
            VideoQAService(served.pipeline, GatewayConfig(spool_dir=str(tmp_path / "file" / "spool")), build_config())
        # several routers of one node share a port
        beside = GrpcServer(served.service, GatewayConfig(port=served.server.port))
        await beside.start()
        assert beside.port == served.server.port
        await beside.stop()
        assert (await health_pb2_grpc.HealthStub(served.channel).Check(ask(""))).status == SERVING

    run("tiny", work, pipeline=Broken(None))


def test_many_connections_come_and_go():
    async def work(served):
        for _ in range(20):
            async with grpc.aio.insecure_channel(served.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
                assert (await health_pb2_grpc.HealthStub(channel).Check(ask(""))).status == SERVING

    run("tiny", work, pipeline=Broken(None))


def test_who_began_to_watch_in_a_short_failure_is_told_of_its_end():
    class Context:
        def __init__(self):
            self.told = []

        async def write(self, message):
            self.told.append(message.status)

    async def main():
        answers = []

        async def ready():
            return answers.pop() if answers else True

        health, first, second = HealthService(ready, RefusalPace(lambda: False)), Context(), Context()
        watching = [asyncio.create_task(health.Watch(ask(SERVICE), first))]
        while not first.told:
            await asyncio.sleep(0.01)
        answers.append(False)
        health._known = -POLL_S, True
        watching.append(asyncio.create_task(health.Watch(ask(SERVICE), second)))
        while not second.told:
            await asyncio.sleep(0)
        health._known = -POLL_S, False  # the next to ask is late
        async with asyncio.timeout(10):
            while second.told[-1:] != [Status.SERVING]:
                await asyncio.sleep(0.01)
        assert second.told == [Status.NOT_SERVING, Status.SERVING]
        health.leave()
        await asyncio.gather(*watching)

    asyncio.run(main())
