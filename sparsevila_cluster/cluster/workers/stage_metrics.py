"""Which metrics a worker records of each media prefix, each turn and its memory."""

from __future__ import annotations

from collections.abc import Mapping

from sparsevila_cluster.core.metrics import MetricsSink
from sparsevila_cluster.core.requests import Usage
from sparsevila_cluster.kvcache.prefix import MediaPrefix

STAGE_METRICS = {
    "decode": "media_decode_seconds",
    "encode": "encode_seconds",
    "prune": "prune_seconds",
    "prefill": "prefill_seconds",
}


def count(sink: MetricsSink, name: str, value: float, **labels: str) -> None:
    """Add to a counter, unless there is nothing to add: some sinks refuse a zero."""
    if value > 0:
        sink.count(name, value, **labels)


def record_prefill(sink: MetricsSink, ms: Mapping[str, float], prefix: MediaPrefix) -> None:
    """A media prefix was made; `ms` by stage."""
    sink.count("prefills_total")
    for stage, spent_ms in ms.items():
        sink.observe(STAGE_METRICS[stage], spent_ms / 1e3)
    count(sink, "visual_tokens_total", prefix.metadata.num_visual, stage="encoded")
    count(sink, "visual_tokens_total", prefix.num_kept, stage="kept")


def record_turn(sink: MetricsSink, usage: Usage, num_replayed: int) -> None:
    """A turn ended well; the first `num_replayed` tokens of its answer were not new."""
    for stage, name in (("question", "question_seconds"), ("retrieve", "retrieval_seconds")):
        if stage in usage.ms:
            sink.observe(name, usage.ms[stage] / 1e3)
    if "queue" in usage.ms:
        sink.observe("queue_wait_seconds", usage.ms["queue"] / 1e3, pool="decode")
    sink.observe("retrieval_keep", usage.effective_keep)
    count(sink, "retrieval_degraded_total", float(usage.degraded))
    count(sink, "visual_tokens_total", usage.visual_tokens_retrieved, stage="retrieved")
    count(sink, "tokens_total", usage.prompt_tokens - usage.visual_tokens_kept, kind="prompt")
    count(sink, "tokens_total", usage.completion_tokens - num_replayed, kind="answer")


def record_memory(sink: MetricsSink, pool: str, num_media: int, kinds: Mapping[str, tuple[int, int]]) -> None:
    """`kinds`: name -> (bytes of KV in use, bytes that may be used)."""
    sink.set("media_objects", num_media, pool=pool)
    for kind, (used_bytes, budget_bytes) in kinds.items():
        sink.set("kv_bytes", used_bytes, pool=pool, kind=kind)
        sink.set("kv_budget_bytes", budget_bytes, pool=pool, kind=kind)
