"""One frozen configuration for the whole cluster: pools, transport, router and gateway around one engine configuration."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, ValidationError, model_validator

from sparsevila_cluster.core.config import GIB, MIB, EngineConfig, FrozenConfig, build_config, explain, read_yaml
from sparsevila_cluster.core.errors import BadConfig


class TransportConfig(FrozenConfig):
    """Lanes between workers."""

    kind: str = Field("auto", description="How KV travels. auto: nccl between GPUs, else gloo. inproc: within one process only.")
    fallback: bool = Field(True, description="After a lane broke twice, send through Ray's object store.")
    host: str = Field("auto", description="Address that lanes, and calls between replicas, listen on. auto: that of the Ray node.")
    quantization: Literal["none", "int8"] = Field("none", description="KV on the wire: as it is, or int8 with scales.")
    checksum: bool = Field(True, description="One checksum per chunk, verified before a prefix may be used.")
    chunk_bytes: int = Field(16 * MIB, ge=64 * 1024, le=32 * MIB, description="Most bytes of one chunk.")
    credits: int = Field(4, ge=1, le=64, description="Chunks that a receiver grants ahead.")
    op_timeout_s: float = Field(10.0, gt=0, description="Deadline of a single send or receive.")
    dial_timeout_s: float = Field(10.0, gt=0, description="Deadline for building a lane.")
    beat_s: float = Field(1.0, gt=0, description="Seconds between two signs of life on a lane.")
    silence_s: float = Field(5.0, gt=0, description="A lane without a sign of life for this long is lost.")
    lease_s: float = Field(
        30.0, gt=0, description="A transfer without progress for this long is given up, and its bytes are freed."
    )
    max_lanes: int = Field(64, ge=1, description="Lanes of one worker; idle ones are closed first.")


class PoolConfig(FrozenConfig):
    """Workers of one kind."""

    replicas: int = Field(1, ge=1, description="Workers.")
    num_cpus: float = Field(1.0, ge=0, description="CPUs that Ray reserves for one worker.")
    num_gpus: float = Field(0.0, ge=0, description="GPUs that Ray reserves for one worker.")
    resources: dict[str, float] = Field(default_factory=dict, description="Custom Ray resources of one worker.")
    labels: dict[str, str] = Field(default_factory=dict, description="Ray node labels that a worker's node must have.")
    threads: int = Field(1, ge=1, description="Threads of torch in one worker.")


class PrefillConfig(PoolConfig):
    """The pool that makes media prefixes."""

    copy_bytes: int = Field(2 * GIB, ge=1, description="Host copies of media prefixes that one worker keeps, to send them again.")


class DecodeConfig(PoolConfig):
    """The pool that holds media prefixes and answers."""

    replicate_after: int = Field(8, ge=0, description="Turns under way on one prefix that earn it another worker; 0: never.")
    brownout_at: float = Field(
        1.0, gt=0, description="Turns in line, as a share of max_waiting, at which a worker begins to attend to less; 1: never."
    )


class RouterConfig(FrozenConfig):
    """The replicas that clients connect to."""

    replicas: int = Field(
        0, ge=0, description="Routers. 0: two on more than one core or node if they share a port and a spool_dir, else one."
    )
    num_cpus: float = Field(0.0, ge=0, description="CPUs that Ray reserves for one router.")
    max_attempts: int = Field(4, ge=1, description="Workers tried for one request before it fails.")
    call_timeout_s: float = Field(10.0, gt=0, description="Deadline of a call that should take milliseconds.")
    refuse_s: float = Field(600.0, gt=0, description="How long a request that two workers died of is refused.")
    max_conversations: int = Field(10_000, ge=1, description="Conversations whose text is kept for recovery.")
    conversation_idle_s: float = Field(
        86_400.0, gt=0, description="A conversation that nobody went on with for this long is closed, and its text forgotten."
    )
    max_turns_per_owner: int | None = Field(
        None,
        ge=1,
        description="Turns of one owner of keys that a router has with workers at a time; its others wait at the router. None: as "
        "many as all decode workers run, decode.replicas x engine.max_batch; where decode.brownout_at is below 1, which looks at "
        "their queues, also as many as wait there. While other owners have turns, engine.max_share of it, over all routers.",
    )


class GatewayConfig(FrozenConfig):
    """What clients reach: address, keys, TLS, limits and uploads."""

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8600, ge=0, le=65535, description="Port; 0 takes a free one.")
    api_keys: dict[str, str] = Field(default_factory=dict, description="API key -> tenant. Empty: no key is asked for.")
    keys_file: str | None = Field(None, description="YAML file of further keys, by hash; read again when it changes.")
    public_media: bool = Field(False, description="Share prefixes across tenants.")
    tls_certificate: str | None = Field(None, description="PEM file of the server's certificate chain.")
    tls_key: str | None = Field(None, description="PEM file of its key.")
    tls_client_ca: str | None = Field(None, description="PEM file of the authority that clients must be signed by (mTLS).")
    max_message_bytes: int = Field(8 * MIB, ge=64 * 1024, description="Largest message from a client.")
    max_inline_bytes: int = Field(4 * MIB, ge=0, description="Largest media inside a request; larger ones are uploaded.")
    max_streams: int = Field(1000, ge=1, description="Calls at the same time; more are refused.")
    max_connections: int = Field(1000, ge=1, description="Connections at the same time; more are closed at once.")
    max_streams_per_connection: int = Field(
        100, ge=1, description="Calls at the same time on one connection; a client's further ones wait, or go over another one."
    )
    max_pending_calls: int = Field(
        10_000, ge=1, description="Calls of one method that arrived and were not looked at yet; more are cut off without a status."
    )
    max_loop_lag_s: float = Field(5.0, gt=0, description="New calls are refused while the event loop is later than this.")
    max_header_bytes: int = Field(16 * 1024, ge=1024, le=MIB, description="Largest headers of one call, names and values.")
    handshake_timeout_s: float = Field(10.0, gt=0, description="Deadline of a new connection for TLS and HTTP/2 settings.")
    request_timeout_s: float = Field(60.0, gt=0, description="How long a call may take to bring its request, once it has begun.")
    max_connection_idle_s: float = Field(600.0, gt=0, description="A connection without calls is closed after this.")
    max_connection_age_s: float = Field(
        86_400.0, gt=0, description="A connection takes no new calls after this, and is closed max_deadline_s later at the latest."
    )
    min_ping_interval_s: float = Field(
        5.0, gt=0, description="Pings of a client closer together than this, a few times, close its connection."
    )
    min_upload_bytes_per_s: int = Field(1024, ge=0, description="An upload that is slower is given up; 0: never.")
    upload_grace_s: float = Field(30.0, gt=0, description="How long an upload may take before its speed counts.")
    keepalive_s: float = Field(30.0, gt=0, description="Seconds between two pings on an idle connection.")
    max_deadline_s: float = Field(3600.0, gt=0, description="Longest deadline that a client may set; what it names beyond is cut.")
    spool_dir: str | None = Field(None, description="Folder of uploads; routers and prefill workers reach it. None: a private one.")
    spool_bytes: int = Field(8 * GIB, ge=1, description="Quota of all uploads.")
    upload_ttl_s: float = Field(3600.0, gt=0, description="How long an upload is kept.")
    max_share: float = Field(
        0.75,
        gt=0,
        le=1,
        description="Most of max_streams, spool_bytes and conversations for one tenant, where there are several.",
    )
    paced_calls_per_s: float = Field(
        50.0,
        gt=0,
        description="Calls of one owner of keys that begin in each second at one router while others have calls at any router, "
        "beyond 20 at once; the next ones wait for their turn, up to 30 s.",
    )
    requests_per_s: float | None = Field(None, gt=0, description="Calls per second of one tenant at one router. None: any number.")
    visual_tokens_per_minute: int | None = Field(
        None, ge=1, description="Visual tokens, before pruning, of media made for one tenant at one router. None: any number."
    )
    file_root: str | None = Field(None, description="Folder below which clients may name files. None: nowhere.")

    @model_validator(mode="after")
    def _whole_tls(self) -> GatewayConfig:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together")
        if self.tls_client_ca is not None and self.tls_certificate is None:
            raise ValueError("tls_client_ca needs tls_certificate and tls_key")
        return self


class ClusterConfig(FrozenConfig):
    """Everything that a cluster needs to start."""

    name: str = Field("sparsevila", pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,62}$", description="Name of the Serve application.")
    engine: EngineConfig = EngineConfig()
    transport: TransportConfig = TransportConfig()
    prefill: PrefillConfig = PrefillConfig()
    decode: DecodeConfig = DecodeConfig(replicas=2)
    router: RouterConfig = RouterConfig()
    door: GatewayConfig = GatewayConfig()
    content_secret: SecretStr | None = Field(
        None,
        min_length=32,
        repr=False,
        description="Salts the ids of media, for all workers. None: drawn at start.",
    )
    metrics_port: int = Field(
        0, ge=0, le=65535, description="Port of Ray's metrics where `serve` starts Ray itself; 0 takes a free one."
    )
    report_s: float = Field(1.0, gt=0, description="Seconds between two reports of a worker.")
    health_period_s: float = Field(2.0, gt=0, description="Seconds between two health checks of a replica.")
    health_timeout_s: float = Field(5.0, gt=0, description="Deadline of a health check.")
    start_timeout_s: float = Field(600.0, gt=0, description="Deadline for the whole cluster to be ready.")
    drain_timeout_s: float = Field(20.0, gt=0, description="How long a replica that is told to stop may finish what it does.")

    @model_validator(mode="after")
    def _idle_for_longer_than_a_turn(self) -> ClusterConfig:
        idle_s, turn_s = self.router.conversation_idle_s, self.door.max_deadline_s
        if idle_s < turn_s:
            raise ValueError(
                f"router.conversation_idle_s = {idle_s:g} must be at least door.max_deadline_s = {turn_s:g}, the longest turn"
            )
        return self

    def with_secret(self) -> ClusterConfig:
        """This configuration with a `content_secret`: its own, or a new one of 256 bits."""
        drawn = self.content_secret or SecretStr(secrets.token_hex(32))
        return self.model_copy(update={"content_secret": drawn})

    @property
    def secret(self) -> bytes:
        """`content_secret`. Raises BadConfig: there is none yet, and one of a worker's own would fit to nobody else's."""
        if self.content_secret is None:
            raise BadConfig("content_secret: every worker needs that of its cluster, got None")
        return self.content_secret.get_secret_value().encode()


def build_cluster_config(**fields: Any) -> ClusterConfig:
    """A ClusterConfig from nested fields; `engine` takes what `build_config` takes. Raises BadConfig."""
    given = dict(fields)
    if isinstance(given.get("engine"), dict):
        given["engine"] = build_config(**given["engine"])
    try:
        return ClusterConfig(**given)
    except ValidationError as error:
        raise BadConfig(explain(error, ClusterConfig)) from error


def load_cluster_config(path: str | Path) -> ClusterConfig:
    """Read one YAML file. A file that holds an engine configuration alone is a cluster of defaults around it. Raises BadConfig."""
    return cluster_config_of(read_yaml(path))


def cluster_config_of(fields: dict[str, Any]) -> ClusterConfig:
    """What `load_cluster_config` does, from what stands in the file."""
    if fields and not set(fields) & set(ClusterConfig.model_fields) and set(fields) <= set(EngineConfig.model_fields):
        return build_cluster_config(engine=fields)
    return build_cluster_config(**fields)
