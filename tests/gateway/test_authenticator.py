"""Keys, tenants and TLS: who comes in, what they may touch, and that nobody else's things are in reach."""

import asyncio
import json
from pathlib import Path

import grpc
import pytest

from sparsevila_cluster.core.api_keys import ApiKeyEntry, add_api_key, hash_api_key, make_api_key
from sparsevila_cluster.core.errors import NotFound, Unauthenticated
from sparsevila_cluster.gateway.audit_log import MAX_LINES
from sparsevila_cluster.gateway.authenticator import Principal
from sparsevila_cluster.pb import video_qa_pb2 as pb
from sparsevila_cluster.pb.video_qa_pb2_grpc import VideoQAStub
from tests.gateway.running_servers import ask, long_question, prepare, refused, run, running_server, slow_down, streamed, upload
from tests.gateway.test_health_service import SERVING, health_pb2, health_pb2_grpc

KEYS = {"key-of-ann": "ann", "key-of-bob": "bob", "other-key-of-ann": "ann"}


def key(name):
    return (("authorization", f"Bearer {name}"),)


ANN, BOB = key("key-of-ann"), key("key-of-bob")


def test_without_a_known_key_nothing_is_done(checkpoint, clips, caplog):
    async def work(served):
        stub = served.stub
        wrong = [(), key("nobody's"), key(""), (("authorization", "key-of-ann"),), (("authorization", "Basic key-of-ann"),)]
        wrong += [(*ANN, *BOB), (*ANN, *ANN), key("key-of-an"), key("key-of-ann key-of-ann")]
        for metadata in wrong:
            for call in (
                stub.Ask(ask("m"), metadata=metadata),
                stub.Answer(ask("m"), metadata=metadata),
                stub.GetServerInfo(pb.GetServerInfoRequest(), metadata=metadata),
                stub.PrepareMedia(pb.PrepareMediaRequest(), metadata=metadata),
                upload(stub, clips[0], metadata=metadata),
            ):
                code, error = await refused(call)
                assert code == "UNAUTHENTICATED" and type(error) is Unauthenticated and "key-of" not in str(error)
        assert (await health_pb2_grpc.HealthStub(served.channel).Check(health_pb2.HealthCheckRequest())).status == SERVING
        for metadata in (ANN, key("other-key-of-ann"), (("authorization", "bearer  key-of-bob "),)):
            assert (await stub.GetServerInfo(pb.GetServerInfoRequest(), metadata=metadata)).fingerprint
        assert served.sink.counts["requests_total", "Ask", "UNAUTHENTICATED"] == len(wrong)
        told = [record for record in caplog.records if getattr(record, "event", "") == "authentication_failed"]
        assert len(told) == MAX_LINES and all(record.peer.startswith("ipv4:127.0.0.1:") for record in told)

    run(checkpoint, work, api_keys=KEYS)


def test_one_tenants_things_are_out_of_the_others_reach(checkpoint, clips):
    async def work(served):
        stub = served.stub
        media = await prepare(stub, clips[0], ANN)
        assert (await prepare(stub, clips[0], key("other-key-of-ann"))).reused
        theirs = await prepare(stub, clips[0], BOB)
        assert not theirs.reused and theirs.media_id != media.media_id

        for call in (
            stub.Ask(ask(media.media_id), metadata=BOB),
            stub.Answer(ask(media.media_id), metadata=BOB),
            stub.GetMedia(pb.GetMediaRequest(media_id=media.media_id), metadata=BOB),
        ):
            code, error = await refused(call)
            assert code == "NOT_FOUND" and type(error) is NotFound
        assert not (await stub.DeleteMedia(pb.DeleteMediaRequest(media_id=media.media_id), metadata=BOB)).deleted

        sent = await upload(stub, clips[0], metadata=ANN)
        named = pb.PrepareMediaRequest(sources=[pb.MediaSource(upload_id=sent.upload_id)])
        assert (await refused(stub.PrepareMedia(named, metadata=BOB)))[0] == "NOT_FOUND"
        assert [status async for status in stub.PrepareMedia(named, metadata=ANN)][-1].media.reused

        # Turn ids are chosen by clients: equal ones are different turns.
        said, chats = {}, {}
        for metadata, of in ((ANN, media), (BOB, theirs)):
            texts, chat = [], ""
            for question in ("what is it?", "and then?"):
                request = ask(of.media_id, question, conversation_id=chat, turn_id="turn")
                text, _, events = await streamed(stub, request, metadata=metadata)
                assert events[0].accepted.turn_id == "turn"
                chat = events[0].accepted.conversation_id
                assert chat == events[-1].done.conversation_id
                texts.append(text)
            said[metadata], chats[metadata] = texts, chat
        assert said[ANN] == said[BOB] and (await served.pipeline.info())["conversations"] == 2
        for of in (media, theirs):
            request = ask(of.media_id, conversation_id=chats[ANN])
            assert (await refused(stub.Ask(request, metadata=BOB)))[0] == "NOT_FOUND"

        request = await long_question(stub, media.media_id, metadata=ANN, turn_id="mine")
        slow_down(served.pipeline)
        running = aiter(stub.Ask(request, metadata=ANN))
        await anext(running)
        assert not (await stub.Abort(pb.AbortRequest(turn_id="mine"), metadata=BOB)).aborted
        assert (await stub.Abort(pb.AbortRequest(turn_id="mine"), metadata=ANN)).aborted
        await served.settled()

    run(checkpoint, work, api_keys=KEYS)


def test_public_media_are_shared_and_uploads_are_not(checkpoint, clips):
    async def work(served):
        media = await prepare(served.stub, clips[0], ANN)
        assert (await prepare(served.stub, clips[0], BOB)).reused
        assert (await served.stub.Answer(ask(media.media_id), metadata=BOB)).text
        sent = await upload(served.stub, clips[0], metadata=ANN)
        named = pb.PrepareMediaRequest(sources=[pb.MediaSource(upload_id=sent.upload_id)])
        assert (await refused(served.stub.PrepareMedia(named, metadata=BOB)))[0] == "NOT_FOUND"

    run(checkpoint, work, api_keys=KEYS, public_media=True)


def test_ids_of_two_owners_never_meet():
    owners = ["", "a", "a/b", "a%2Fb", "b", "ü", "a b"]
    ids = ["x", "b/x", "/x", "a/x", "%2Fx"]
    inside = {Principal(owner, owner, True).pipeline_turn_id(name) for owner in owners for name in ids}
    assert len(inside) == len(owners) * len(ids)
    assert Principal().pipeline_turn_id("x") == "x"


def test_a_user_is_told_of_its_own_and_an_admin_of_everything(checkpoint, clips, tmp_path):
    file, admin = tmp_path / "keys.yaml", make_api_key()
    add_api_key(file, ApiKeyEntry(name="root", hash=hash_api_key(admin), tenant="ops", role="admin"))

    async def info(stub, metadata):
        reply = await stub.GetServerInfo(pb.GetServerInfoRequest(), metadata=metadata)
        return reply, json.loads(reply.details_json)

    async def work(served):
        media = await prepare(served.stub, clips[0], ANN)
        await streamed(served.stub, ask(media.media_id), metadata=ANN)
        await upload(served.stub, clips[0], metadata=ANN)
        reply, own = await info(served.stub, ANN)
        assert reply.model and reply.fingerprint == own["fingerprint"] and own["limits"]["calls"] == 750
        assert {name: own[name] for name in ("media", "media_bytes", "conversations")} == {
            "media": 1, "media_bytes": media.kv_bytes, "conversations": 1,
        }  # fmt: skip
        assert own["door"] == {"calls": 1, "spool_bytes": len(clips[0])}
        reply, others = await info(served.stub, BOB)
        assert not any(others[name] for name in ("media", "media_bytes", "conversations")) and others.keys() == own.keys()
        assert others["door"] == {"calls": 1, "spool_bytes": 0}
        _, everything = await info(served.stub, key(admin))
        assert everything["prefixes"] == everything["conversations"] == 1 and everything["steps"] > 0
        assert everything["door"]["spool_bytes"] == len(clips[0])
        assert "steps" not in own and "prefills" not in own

    run(checkpoint, work, api_keys=KEYS, keys_file=str(file))


# ---- TLS ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    pytest.importorskip("cryptography")
    from tests.gateway.certificates import Authority

    return Authority(tmp_path_factory.mktemp("tls"))


def trusting(authority, client=None):
    root = Path(authority.certificate).read_bytes()
    if client is None:
        return grpc.ssl_channel_credentials(root)
    certificate, key_file = (Path(path).read_bytes() for path in client)
    return grpc.ssl_channel_credentials(root, key_file, certificate)


async def info_over(address, credentials):
    channel = grpc.aio.insecure_channel(address) if credentials is None else grpc.aio.secure_channel(address, credentials)
    async with channel:
        return await VideoQAStub(channel).GetServerInfo(pb.GetServerInfoRequest(), timeout=5)


@pytest.mark.smoke
def test_tls_refuses_plain_text_and_strangers(authority, checkpoint, clips, tmp_path):
    from tests.gateway.certificates import Authority

    certificate, key_file = authority.sign("server", "127.0.0.1", "localhost")
    stranger = Authority(tmp_path, "stranger")

    async def work(served):
        media = await prepare(served.stub, clips[0])
        await streamed(served.stub, ask(media.media_id))
        for credentials in (None, trusting(stranger)):
            assert (await refused(info_over(served.address, credentials)))[0] == "UNAVAILABLE"

    run(checkpoint, work, tls_certificate=certificate, tls_key=key_file, credentials=trusting(authority))


def test_mtls_asks_clients_for_a_certificate_of_its_authority(authority, checkpoint, tmp_path):
    from tests.gateway.certificates import Authority

    certificate, key_file = authority.sign("server", "127.0.0.1")
    friend = trusting(authority, authority.sign("friend"))
    stranger = trusting(authority, Authority(tmp_path, "stranger").sign("friend"))
    fields = {"tls_certificate": certificate, "tls_key": key_file, "tls_client_ca": authority.certificate, "api_keys": KEYS}

    async def main():
        async with running_server(checkpoint, credentials=friend, **fields) as served:
            assert (await served.stub.GetServerInfo(pb.GetServerInfoRequest(), metadata=ANN)).version
            assert (await refused(served.stub.GetServerInfo(pb.GetServerInfoRequest())))[0] == "UNAUTHENTICATED"
            for credentials in (None, trusting(authority), stranger):
                assert (await refused(info_over(served.address, credentials)))[0] == "UNAVAILABLE"

    asyncio.run(asyncio.wait_for(main(), 60))
