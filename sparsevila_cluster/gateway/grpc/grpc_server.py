"""The gRPC server: address, TLS, keepalive, health, reflection, and a stop that lets calls finish."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from sparsevila_cluster.core.cluster_config import GatewayConfig
from sparsevila_cluster.core.errors import BadConfig
from sparsevila_cluster.gateway.grpc.aio_server import AioServer
from sparsevila_cluster.gateway.grpc.call_interceptor import SERVICE, CallInterceptor
from sparsevila_cluster.gateway.grpc.health_service import HealthService
from sparsevila_cluster.gateway.grpc.servicer import GrpcServicer
from sparsevila_cluster.gateway.service import VideoQAService
from sparsevila_cluster.pb.video_qa_pb2_grpc import add_VideoQAServicer_to_server

log = logging.getLogger(__name__)

# A connection whose ping is not answered for this long is lost, and with it all calls on it.
MAX_PING_ANSWER_S = 10.0
# gRPC takes milliseconds in 32 bits.
MAX_MS = 2**31 - 1


class GrpcServer:
    """The service on one address. Start and stop it in the event loop of the service, which stays the caller's.

    server = GrpcServer(service, config)
    await server.start()
    ... server.port ...
    await server.stop()
    """

    def __init__(self, service: VideoQAService, config: GatewayConfig):
        self._service, self._config = service, config
        self._server: Any = None
        self._running: asyncio.Task[bool] | None = None
        self.port = config.port

    @property
    def healthy(self) -> bool:
        """Whether the server runs."""
        return self._running is not None and not self._running.done()

    async def start(self) -> None:
        """Listen; `port` is known from here on.

        Raises:
            BadConfig: an address that cannot be listened on, TLS files that cannot be used.
        """
        assert self._server is None, "a server is started once"
        credentials = _credentials(self._config)
        self._warn()
        logging.getLogger("grpc._cython.cygrpc").addFilter(_is_ours)
        self._server = AioServer([CallInterceptor(self._service, self._config)], _options(self._config))
        add_VideoQAServicer_to_server(GrpcServicer(self._service), self._server)
        self._health = HealthService(self._service.ready, self._service.refusals)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        self.port = self._listen(credentials)
        await self._server.start()
        self._running = asyncio.create_task(self._server.wait_for_termination())

    async def stop(self, grace_s: float = 5.0) -> None:
        """Say NOT_SERVING, take no new calls, let those in progress finish for `grace_s`, cancel the rest. Idempotent."""
        if self._running is None:
            return
        self._health.leave()
        self._service.refusals.close()  # those who wait to be refused are told
        await asyncio.sleep(0)  # those who watch are told before anything is refused
        await self._server.stop(grace_s)
        await self._running

    def _listen(self, credentials: Any) -> int:
        host = f"[{self._config.host}]" if ":" in self._config.host else self._config.host
        address = f"{host}:{self._config.port}"
        try:
            if credentials is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, credentials)
        except RuntimeError:
            port = 0
        if not port:
            tls = "" if credentials is None else ", or the TLS files do not fit together"
            raise BadConfig(f"cannot listen on {address}: it is in use or not an address of this machine{tls}")
        return int(port)

    def _warn(self) -> None:
        host, config = self._config.host, self._config
        try:
            local = ipaddress.ip_address(host).is_loopback
        except ValueError:
            local = host == "localhost"
        if not local and config.tls_certificate is None:
            log.warning("the gRPC server listens on %s without TLS: what clients send can be read on the way", host)
        if not local and not config.api_keys and config.keys_file is None and config.tls_client_ca is None:
            log.warning("the gRPC server listens on %s without API keys: whoever reaches it may use it", host)


# What gRPC logs with a traceback because of a client, without a key and as often as it likes: headers that are no UTF-8, and a call
# that ended just when its answer was sent.
CLIENTS_DOING = ("Invalid encoding on", "ExecuteBatchError raised in core")


def _is_ours(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(CLIENTS_DOING)


def _options(config: GatewayConfig) -> list[tuple[str, int]]:
    ping_answer_s = min(MAX_PING_ANSWER_S, config.keepalive_s)
    return [
        ("grpc.so_reuseport", 1),  # several routers on one node share the port
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_allowed_incoming_connections", config.max_connections),
        # Also what gRPC holds for us of calls that were taken back: the queue in which a flood of those keeps others waiting.
        ("grpc.max_concurrent_streams", config.max_streams_per_connection),
        # What gRPC cuts off by itself ends as CANCELLED, without a time to try again (gRPC 1.85: above 1,000 calls that wait for
        # the event loop, or after 30 s). So the service refuses, and these are the last bound on memory.
        ("grpc.server.max_pending_requests", config.max_pending_calls),
        ("grpc.server.max_pending_requests_hard_limit", config.max_pending_calls + 1),
        ("grpc.server_max_unrequested_time_in_server", round(min(config.max_deadline_s + 1, MAX_MS))),
        # Between the two of them gRPC refuses at random.
        ("grpc.max_metadata_size", config.max_header_bytes),
        ("grpc.absolute_max_metadata_size", config.max_header_bytes),
        ("grpc.server_handshake_timeout_ms", _ms(config.handshake_timeout_s)),
        ("grpc.max_connection_idle_ms", _ms(config.max_connection_idle_s)),
        ("grpc.max_connection_age_ms", _ms(config.max_connection_age_s)),
        ("grpc.max_connection_age_grace_ms", _ms(config.max_deadline_s)),
        ("grpc.keepalive_time_ms", _ms(config.keepalive_s)),
        ("grpc.keepalive_timeout_ms", _ms(ping_answer_s)),
        # Without this one, whose default is a minute, a shorter keep-alive timeout has no effect (gRPC 1.85, measured).
        ("grpc.http2.ping_timeout_ms", _ms(ping_answer_s)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", _ms(min(config.min_ping_interval_s, config.keepalive_s))),
    ]


def _ms(seconds: float) -> int:
    return min(MAX_MS, max(1, round(seconds * 1000)))


def _credentials(config: GatewayConfig) -> Any:
    """TLS or mTLS, or None for neither. Raises BadConfig: a file that cannot be read."""
    if config.tls_certificate is None or config.tls_key is None:
        return None
    key, certificate = _read("tls_key", config.tls_key), _read("tls_certificate", config.tls_certificate)
    authority = None if config.tls_client_ca is None else _read("tls_client_ca", config.tls_client_ca)
    return grpc.ssl_server_credentials([(key, certificate)], authority, require_client_auth=authority is not None)


def _read(name: str, path: str) -> bytes:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise BadConfig(f"{name}: cannot read {path!r}: {error.strerror or error}") from error
    if b"-----BEGIN" not in data:
        raise BadConfig(f"{name}: {path!r} is no PEM file")
    return data
