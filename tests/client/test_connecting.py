"""Statuses as typed errors, targets, keys and TLS; event loops and threads; what importing the client imports."""

import asyncio
import subprocess
import sys
import threading
from pathlib import Path

import grpc
import pytest

from sparsevila_cluster.client import AsyncClient, Client, Tls, call_errors
from sparsevila_cluster.client.call_errors import to_error
from sparsevila_cluster.core import errors
from sparsevila_cluster.core.errors import (
    BadRequest,
    Incompatible,
    NotFound,
    QueueFull,
    SparseVilaError,
    TooLarge,
    Unauthenticated,
    Unavailable,
)
from tests.client.scripted_server import MEDIA_ID, TEXT, Scripted, connect, serving, wired

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("code", "details", "kind"),
    [
        *((name, "why", kind) for name, kind in call_errors.OF_CODE.items()),
        ("RESOURCE_EXHAUSTED", "Received message larger than max (9 vs. 8)", TooLarge),
        ("RESOURCE_EXHAUSTED", "Concurrent RPC limit exceeded!", QueueFull),
        ("CANCELLED", "", Unavailable),
        ("INTERNAL", "Received RST_STREAM with error code 2", Unavailable),
        ("INTERNAL", "Exception deserializing response!", errors.Internal),
        ("UNKNOWN", "Stream removed", Unavailable),
        ("UNKNOWN", "Unexpected <class 'KeyError'>", errors.Internal),
    ],
)
def test_a_status_alone_becomes_an_error_of_the_house(code, details, kind):
    error = to_error(grpc.aio.AioRpcError(grpc.StatusCode[code], None, None, details), "h:1", "asking")
    assert type(error) is kind and str(error) == f"h:1: asking: {details or code}"


def all_errors(root=SparseVilaError):
    return [root, *(kind for child in root.__subclasses__() for kind in all_errors(child))]


async def test_the_servers_failure_arrives_as_what_it_was(monkeypatch):
    monkeypatch.setattr(call_errors, "RETRY_FOR_S", 0)
    monkeypatch.setattr(call_errors, "MAX_REFUSALS", 0)
    servicer = Scripted()
    async with serving(servicer) as (_, port), connect(port) as client:
        for kind in all_errors():
            servicer.script["GetMedia"] = [kind("of the server")]
            with pytest.raises(SparseVilaError) as told:
                await client.media(MEDIA_ID)
            assert type(told.value) is kind and str(told.value) == f"127.0.0.1:{port}: of the server"
            assert told.value.__cause__ is None


@pytest.mark.parametrize("blob", [b"", b"\xc1", b"\x93\x01\x02\x03", b"\x81"])
async def test_a_broken_failure_leaves_the_status(blob):
    async def fail(context):
        await context.abort(grpc.StatusCode.NOT_FOUND, "gone", trailing_metadata=(("sparsevila-failure-bin", blob),))

    servicer = Scripted()
    servicer.script["GetMedia"] = [fail]
    async with serving(servicer) as (_, port), connect(port) as client:
        with pytest.raises(NotFound, match="gone"):
            await client.media(MEDIA_ID)


async def test_another_service_is_incompatible():
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with connect(port) as client:
        with pytest.raises(Incompatible):
            await client.info()
    await server.stop(0)


# ---- who may connect -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["", "host", "http://host:1", "host:port", "host: 1", None, 8600])
def test_a_target_is_host_and_port(target):
    with pytest.raises(BadRequest, match="host:port"):
        AsyncClient.connect(target)


async def test_the_key_is_sent_and_never_told():
    servicer = Scripted()
    servicer.script["GetMedia"] = [Unauthenticated("no such key")]
    async with serving(servicer) as (_, port), connect(port, api_key="secret-7") as client:
        with pytest.raises(Unauthenticated) as told:
            await client.media(MEDIA_ID)
    assert servicer.metadata["authorization"] == "Bearer secret-7" and "secret-7" not in str(told.value) + repr(client)
    for key in ("", "ключ", "a\nb"):
        with pytest.raises(BadRequest, match="ASCII"):
            connect(1, api_key=key)


@pytest.fixture(scope="module")
def pems(tmp_path_factory):
    """A certificate for 127.0.0.1 that is its own authority, and its key."""
    folder = tmp_path_factory.mktemp("pems")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    command += " -addext subjectAltName=IP:127.0.0.1 -keyout key.pem -out cert.pem"
    try:
        subprocess.run(command.split(), cwd=folder, check=True, capture_output=True, timeout=60)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no openssl to make a certificate with")
    return folder / "cert.pem", folder / "key.pem"


async def test_tls_and_a_certificate_of_the_client(pems, monkeypatch):
    monkeypatch.setattr(call_errors, "RETRY_FOR_S", 0)
    cert, key = pems
    pair = (key.read_bytes(), cert.read_bytes())
    one_way = grpc.ssl_server_credentials([pair])
    both_ways = grpc.ssl_server_credentials([pair], cert.read_bytes(), require_client_auth=True)
    async with serving(Scripted(), credentials=one_way) as (_, port), serving(Scripted(), credentials=both_ways) as (_, strict):
        for target, tls, works in [
            (port, str(cert), True),
            (port, Tls(ca=cert), True),
            (port, True, False),  # nobody in the system's list signed it
            (port, None, False),
            (strict, str(cert), False),
            (strict, Tls(cert, cert, key), True),
        ]:
            async with connect(target, tls=tls) as client:
                if works:
                    assert (await client.info())["model"] == "tiny"
                else:
                    with pytest.raises(Unavailable):
                        await client.info(timeout_s=3)
    for tls, told in [("missing.pem", "'missing.pem'"), (Tls("missing.pem"), "'missing.pem'")]:
        with pytest.raises(BadRequest, match=told):
            connect(1, tls=tls)
    with pytest.raises(BadRequest, match="go together"):
        Tls(certificate=cert)


async def test_more_calls_than_one_connection_takes_go_over_others():
    servicer, num_calls = Scripted(), 24
    arrived = asyncio.Barrier(num_calls)

    async def together(_context):
        await asyncio.wait_for(arrived.wait(), 20)

    servicer.script["GetMedia"] = [together] * num_calls
    async with wired(servicer, options=[("grpc.max_concurrent_streams", 3)]) as wire, connect(wire.port) as client:
        await asyncio.gather(*(client.media(MEDIA_ID) for _ in range(num_calls)))
        assert wire.num_connections >= num_calls / 3


# ---- loops and threads -----------------------------------------------------------------------------------------------


async def test_it_belongs_to_one_event_loop():
    async with serving(Scripted()) as (_, port), connect(port) as client:
        await client.info()

        def elsewhere():
            with pytest.raises(BadRequest, match="event loop"):
                asyncio.run(client.info())

        await asyncio.to_thread(elsewhere)
        await client.info()


def test_the_blocking_face(served):
    servicer, port = served
    stages = []
    with Client.connect(f"127.0.0.1:{port}", api_key="k") as client:
        upload = client.upload(b"abc" * 10_000)
        media = client.prepare([upload, b"abc"], progress=lambda stage, done, total: stages.append(stage))
        assert client.media(media.media_id) == media and stages == ["decode", "encode"]
        chat = client.conversation(media)
        assert chat.ask("What?").text == TEXT and "".join(chat.stream("And?")) == TEXT
        assert len(chat.turns) == 2 and chat.conversation_id == servicer.of("Ask")[1].conversation_id
        pieces = chat.stream("Never read to its end")
        assert next(pieces) == "A "
        pieces.close()
        chat.close()
        assert client.ask(media, "What?").text == "".join(client.stream(media, "What?")) == TEXT
        assert client.info()["model"] == "tiny" and client.delete_media(MEDIA_ID)
        told = []

        def callback(*stage):
            with pytest.raises(BadRequest, match="progress function must not call methods of the Client"):
                client.info()
            told.append(stage)

        client.prepare(b"abc", progress=callback)
        assert told
    client.close()
    for call in (client.info, lambda: chat.ask("What?"), lambda: client.prepare(b"abc")):
        with pytest.raises(Unavailable, match="this Client is closed"):
            call()


def test_threads_share_a_blocking_client(served):
    _, port = served
    answers = []
    with Client.connect(f"127.0.0.1:{port}") as client:
        threads = [threading.Thread(target=lambda: answers.append(client.ask(MEDIA_ID, "What?").text)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert answers == [TEXT] * 8


def test_importing_it_imports_nothing_heavy():
    code = (
        "import sys; import sparsevila_cluster.client\n"
        "assert not {'torch', 'numpy', 'ray', 'av', 'transformers', 'PIL'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
