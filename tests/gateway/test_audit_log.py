"""One line for each thing that an operator may be asked about later, and no more than that for a flood."""

import asyncio
import json
import logging

import pytest

from sparsevila_cluster.core.cluster_config import GatewayConfig
from sparsevila_cluster.core.config import build_config
from sparsevila_cluster.core.errors import QueueFull, TooLarge, Unauthenticated
from sparsevila_cluster.core.json_logging import JsonLines
from sparsevila_cluster.gateway.audit_log import MAX_LINES, MAX_SUBJECTS, NAME, AuditLog, host_of
from sparsevila_cluster.gateway.media_sources import MediaReference
from sparsevila_cluster.gateway.service import VideoQAService
from tests.gateway.test_service import ANN, MEDIA_ID, Scripted, serve

KEYS = {"key-of-ann": "ann"}
PEER = "ipv4:10.1.2.3:50123"


def lines(caplog):
    """The audit lines as an operator's tools read them."""
    formatter = JsonLines("r1")
    return [json.loads(formatter.format(record)) for record in caplog.records if record.name == NAME]


def facts(line, *names):
    return {name: line[name] for name in names}


def test_refusals_limits_and_deletions_are_told_with_who_and_what(caplog):
    async def work(service, pipeline, sink):
        async def delete_media(media_id, tenant):
            return media_id == MEDIA_ID

        async def close_conversation(conversation_id, tenant):
            return conversation_id == "c"

        pipeline.delete_media, pipeline.close_conversation = delete_media, close_conversation
        with pytest.raises(Unauthenticated):
            async with service.call("Ask", ["Bearer key-of-bob"], lambda: None, PEER):
                pass
        async with service.call("Ask", ANN, lambda: None, PEER):
            with pytest.raises(QueueFull):
                async with service.call("Answer", ANN, lambda: None, PEER):
                    pass
        with pytest.raises(TooLarge):
            async with service.call("PrepareMedia", ANN, lambda: None, PEER) as call:
                async for _ in service.prepare(call, [MediaReference(inline=b"x" * 11)]):
                    pass
        for media_id in ("0" * 64, MEDIA_ID):
            async with service.call("DeleteMedia", ANN, lambda: None, PEER) as call:
                await service.delete_media(call, media_id)
        for conversation_id in ("d", "c"):
            async with service.call("CloseConversation", ANN, lambda: None, PEER) as call:
                await service.close_conversation(call, conversation_id)

    serve(work, api_keys=KEYS, max_streams=1, max_inline_bytes=10)
    told = lines(caplog)
    ann = {"owner": "ann", "key": "api_keys[0]"}
    assert [facts(line, "event", "method", "owner", "key") for line in told] == [
        {"event": "authentication_failed", "method": "Ask", "owner": "", "key": ""},
        {"event": "limit", "method": "Answer", **ann},
        {"event": "limit", "method": "PrepareMedia", **ann},
        {"event": "media_deleted", "method": "DeleteMedia", **ann},
        {"event": "conversation_closed", "method": "CloseConversation", **ann},
    ]
    assert all(line["peer"] == PEER and line["logger"] == "audit" for line in told)
    assert "max_streams=1" in told[1]["what"] and "max_inline_bytes" in told[2]["what"]
    assert [line["what"] for line in told[3:]] == [MEDIA_ID, "c"] and "key-of" not in json.dumps(told)


def test_a_flood_is_a_few_lines_and_a_number(caplog):
    async def work(service, pipeline, sink):
        for i in range(1000):
            with pytest.raises(Unauthenticated):
                async with service.call("Ask", [f"Bearer {i}"], lambda: None, f"ipv4:10.1.2.3:{50000 + i}"):
                    pass
        with pytest.raises(Unauthenticated):
            async with service.call("Ask", [], lambda: None, "ipv6:%5B::1%5D:1"):
                pass

    serve(work, api_keys=KEYS)
    told = lines(caplog)
    assert len(told) == MAX_LINES + 2  # of the flood, of the other peer, and the number
    assert sum(line.get("peer", "").startswith("ipv4") for line in told) == MAX_LINES
    assert facts(told[-1], "event", "subject", "left_out") == {
        "event": "authentication_failed",
        "subject": "ipv4:10.1.2.3",
        "left_out": 1000 - MAX_LINES,
    }


def test_windows_end_by_themselves_and_many_peers_are_one(caplog):
    async def main():
        audit = AuditLog(window_s=0.05)
        for i in range(MAX_SUBJECTS + 50):
            audit.refusal("e", "w", f"peer {i}", method="m", peer=f"peer {i}")
        for _ in range(MAX_LINES + 1):
            audit.refusal("e", "w", "peer 0", method="m", peer="peer 0")
        assert len(lines(caplog)) == MAX_SUBJECTS + MAX_LINES - 1
        await asyncio.sleep(0.1)
        left_out = {line["subject"]: line["left_out"] for line in lines(caplog) if "left_out" in line}
        assert left_out == {"others": 50, "peer 0": 2}
        caplog.clear()
        audit.refusal("e", "w", "peer 0", method="m", peer="peer 0")
        audit.close()
        audit.close()
        assert [line["what"] for line in lines(caplog)] == ["w"]

    asyncio.run(main())


def test_a_line_is_one_line(caplog):
    AuditLog().note("event", f"a\nb\r\u2028c{'x' * 1000}")
    ((line,), (record,)) = lines(caplog), caplog.records
    assert line["what"].startswith("a b cx") and len(line["what"]) <= 300 and "\n" not in record.getMessage()


def test_it_is_written_where_only_warnings_are(caplog):
    ours = logging.getLogger("sparsevila_cluster")
    before = ours.level
    ours.setLevel(logging.WARNING)  # as `serve` without -v does

    async def main():
        service = VideoQAService(Scripted(), GatewayConfig(), build_config())
        service._audit.note("event", "what")
        await service.close()

    try:
        asyncio.run(main())
    finally:
        ours.setLevel(before)
    assert [line["level"] for line in lines(caplog)] == ["info"]


def test_a_peer_is_its_host_whatever_its_port():
    hosts = {"ipv4:1.2.3.4:5": "ipv4:1.2.3.4", "ipv6:%5B::1%5D:5": "ipv6:%5B::1%5D", "unix:/run/x:y": "unix:/run/x:y", "": ""}
    assert {peer: host_of(peer) for peer in hosts} == hosts
