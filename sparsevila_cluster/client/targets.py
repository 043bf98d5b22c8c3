"""The servers that a client may call, in turn: one that failed is left alone until a probe finds it alive.

    healthy --a call fails--> avoided --a probe, after pauses that grow, or a call is answered--> healthy
A channel for each target, not gRPC's list of addresses in one (`ipv4:a:1,b:2`): that takes no DNS names, holds every certificate
against one name, and does not tell at which address a stream broke.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sparsevila_cluster.core.deadline import GRACE_S, wait_within
from sparsevila_cluster.core.errors import BadRequest
from sparsevila_cluster.core.lru_dict import LRUDict
from sparsevila_cluster.pb.video_qa_pb2_grpc import VideoQAStub

MAX_RECEIVE_BYTES = 64 * 2**20
# A server takes some hundred calls at a time on one connection; more go over further ones (gRFC A105), where else they would wait.
MAX_CONNECTIONS = 20
# Clients do not share connections: one that is closed, or blocked, is nobody else's. A lost server is looked for often; one that is
# silent counts as lost before the deadline of a short call.
CHANNEL_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES),
    ("grpc.max_send_message_length", -1),  # the server has a limit of its own
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 8_000),
    ("grpc.http2.ping_timeout_ms", 8_000),
    ("grpc.max_connections_per_subchannel_cap", MAX_CONNECTIONS),
    ("grpc.service_config", json.dumps({"connectionScaling": {"maxConnectionsPerSubchannel": MAX_CONNECTIONS}})),
)
MAX_TARGETS = 64
FIRST_PROBE_S, LONGEST_PROBE_S, PROBE_WITHIN_S = 0.5, 5.0, 2.0
# Conversations whose target is remembered.
MAX_SUBJECTS = 4096
ADDRESS = re.compile(r"[^\s,]+:(\d{1,5})|unix:[^\s,]+")


class Target:
    """One server: `name` is its address. Its channel connects when it is first used, and again whenever it is lost."""

    def __init__(self, name: str):
        self.name = name
        self.stub: Any = None
        self.channel: grpc.aio.Channel | None = None
        self.probing: asyncio.Task[None] | None = None

    @property
    def is_healthy(self) -> bool:
        """Whether it did not fail since it was last heard of."""
        return self.probing is None or self.probing.done()

    def open(self, credentials: grpc.ChannelCredentials | None) -> None:
        """Make the channel."""
        if credentials is None:
            self.channel = grpc.aio.insecure_channel(self.name, CHANNEL_OPTIONS)
        else:
            self.channel = grpc.aio.secure_channel(self.name, credentials, CHANNEL_OPTIONS)
        self.stub = VideoQAStub(self.channel)  # type: ignore[no-untyped-call]


class Targets:
    """The targets of one client, used within one event loop.

    Calls about one subject, a conversation, go to one target as long as that is healthy: its router keeps their order.
    """

    def __init__(self, text: str):
        """text: "host:port", or several with commas between them. Raises BadRequest."""
        self._targets = [Target(name) for name in parse_targets(text)]
        self._next = random.randrange(len(self._targets))  # clients that are given the same list do not all begin with its first
        self._homes: LRUDict[Target] = LRUDict(MAX_SUBJECTS)

    def open(self, credentials: grpc.ChannelCredentials | None) -> None:
        """Make the channels; nothing is sent yet."""
        for target in self._targets:
            target.open(credentials)

    def choose(self, subject: str = "", after: Target | None = None) -> Target:
        """The target of the next call: that of its subject, or the next healthy one in turn; any one if none is.

        after: where the call failed; it is made there again only if no other one is healthy.
        """
        home = self._homes.use(subject) if subject else None
        if home is not None and home.is_healthy and home is not after:
            return home
        self._next = (self._next + 1) % len(self._targets)
        in_turn = self._targets[self._next :] + self._targets[: self._next]
        chosen = min(in_turn, key=lambda target: (not target.is_healthy, target is after))
        self._next = self._targets.index(chosen)
        if subject:
            self.remember(subject, chosen)
        return chosen

    def remember(self, subject: str, target: Target) -> None:
        """Calls about `subject` go to `target` from now on."""
        self._homes.put(subject, target)

    def note_answer(self, target: Target) -> None:
        """It answered a call."""
        if target.probing is not None:
            target.probing.cancel()
            target.probing = None

    def note_failure(self, target: Target) -> None:
        """It could not be reached, broke off, or kept silent: others are asked instead, if there are any."""
        if target.is_healthy and len(self._targets) > 1:
            target.probing = asyncio.ensure_future(self._probe(target))

    @property
    def nobody_answers(self) -> bool:
        """Whether there are several targets, and all failed since they were last heard of."""
        return not any(target.is_healthy for target in self._targets)

    async def close(self) -> None:
        """End the channels and what runs on them. Idempotent."""
        targets, self._targets = self._targets, []
        for target in targets:
            self.note_answer(target)
        closing = (target.channel.close() for target in targets if target.channel is not None)
        await wait_within(asyncio.gather(*closing), GRACE_S, "closing connections")

    async def _probe(self, target: Target) -> None:
        pause_s = FIRST_PROBE_S
        while True:
            await asyncio.sleep(pause_s * random.uniform(0.75, 1.25))
            if await _is_alive(target):
                return
            pause_s = min(2 * pause_s, LONGEST_PROBE_S)


def parse_targets(text: str) -> list[str]:
    """["host:port", ...] of a list with commas. Raises BadRequest: a part that is empty, no address, or there twice; too many."""
    if not isinstance(text, str):
        raise BadRequest(f"target must be host:port, got {text!r}")
    names = text.split(",")
    if len(names) > MAX_TARGETS:
        raise BadRequest(f"target must be host:port, or up to {MAX_TARGETS} of them with commas between, got {len(names)}")
    for i, name in enumerate(names):
        which, found = "target" if len(names) == 1 else f"target {i + 1} of {text!r}", ADDRESS.fullmatch(name)
        if found is None or "://" in name or found[1] is not None and not 1 <= int(found[1]) <= 65535:
            raise BadRequest(f"{which} must be host:port, got {name!r}; a port is 1 to 65535")
        if name in names[:i]:
            raise BadRequest(f"{which} must not be there twice, got {name!r}")
    return names


async def _is_alive(target: Target) -> bool:
    """Whether its server takes calls. One without a health service does, if it says so."""
    assert target.channel is not None
    try:
        stub: Any = health_pb2_grpc.HealthStub(target.channel)
        reply = await stub.Check(health_pb2.HealthCheckRequest(), timeout=PROBE_WITHIN_S)
    except grpc.aio.AioRpcError as error:
        return error.code() is grpc.StatusCode.UNIMPLEMENTED
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)
