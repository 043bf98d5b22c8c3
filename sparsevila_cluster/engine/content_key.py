"""The name of a media prefix: equal names mean equal KV, on every worker."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

import msgpack

from sparsevila_cluster.kvcache.arena import KVSpec


def tenant_salt(secret: bytes, tenant: str) -> str:
    """HMAC-SHA256 of the tenant ("" = media for everybody) under a secret of the deployment, 64 hex digits.

    A name can be guessed, and so could the key of any file that somebody else may have prepared.
    """
    return hmac.digest(secret, tenant.encode("utf-8", "surrogateescape"), "sha256").hex()


def content_key(
    *,
    media_hashes: Sequence[str],
    processor_hash: str,
    spec: KVSpec,
    pruning: Sequence[object],
    positions: str,
    video_text_pos: str,
    prefix_ids: Sequence[int],
    salt: str = "",
    wire: str = "none",
) -> str:
    """BLAKE2b-256, 64 hex digits, over a canonical msgpack of its arguments.

    media_hashes: source bytes and sampling of each media, in prompt order; pruning: each media's method, whose repr names its
    parameters; prefix_ids: the template's tokens with one placeholder per media, so system prompt and chat template count; salt:
    of `tenant_salt`; wire: quantization on the wire.
    """
    payload = [
        "media-prefix",
        spec.layout_version,
        list(media_hashes),
        processor_hash,
        [spec.fingerprint, spec.num_layers, spec.num_kv_heads, spec.head_dim, str(spec.dtype)],
        [repr(method) for method in pruning],
        [positions, video_text_pos],
        list(prefix_ids),
        salt,
        wire,
    ]
    return hashlib.blake2b(msgpack.packb(payload), digest_size=32).hexdigest()
