"""What callers are told of a media prefix that is ready.

Knows: which facts of a prefix leave the engines. Does not know: where the prefix lies, who asks, or how it was made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sparsevila_cluster.core.requests import MediaHandle

if TYPE_CHECKING:
    from sparsevila_cluster.kvcache.prefix import MediaPrefix


def handle_of(prefix: MediaPrefix, reused: bool = False, ms: Mapping[str, float] | None = None) -> MediaHandle:
    """The handle of a prefix. ms: milliseconds of each stage that ran to make it."""
    return MediaHandle(
        media_id=prefix.key,
        kind=prefix.kind,
        num_frames=prefix.num_frames,
        duration_s=prefix.duration_s,
        visual_tokens=prefix.num_visual,
        visual_tokens_kept=prefix.num_kept,
        prefix_tokens=prefix.length,
        kv_bytes=prefix.kv_bytes,
        dense_kv_bytes=prefix.dense_kv_bytes,
        reused=reused,
        tenant=prefix.tenant,
        ms=dict(ms or {}),
    )
