"""Every metric of the system in one table: name, kind, unit in the name, help, labels and buckets."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

PREFIX = "sparsevila_"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
SHARES = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Metric:
    """One family. Its name on a dashboard is `sparsevila_` and its name here."""

    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = SECONDS


METRICS: Mapping[str, Metric] = {
    # requests, at the gateway
    "requests_total": Metric("counter", "Calls by how they ended.", ("method", "code")),
    "request_ttft_seconds": Metric("histogram", "From arrival to the first token.", ("turn", "media")),
    "request_tpot_seconds": Metric("histogram", "Mean time per token after the first."),
    "request_e2e_seconds": Metric("histogram", "From arrival to the last event of a turn.", ("turn",)),
    "turns_recovered_total": Metric("counter", "Turns that went on elsewhere after their worker was lost."),
    "conversations_replayed_total": Metric("counter", "Conversations made again from their text."),
    # stages
    "media_decode_seconds": Metric("histogram", "Decoding and sampling the sources of one media prefix."),
    "encode_seconds": Metric("histogram", "Vision encoder, per media prefix."),
    "prune_seconds": Metric("histogram", "Choosing the visual tokens that stay, per media prefix."),
    "prefill_seconds": Metric("histogram", "Text model over one media prefix."),
    "queue_wait_seconds": Metric("histogram", "Waiting for a place.", ("pool",)),
    "question_seconds": Metric("histogram", "Prefill of a question, up to its first token."),
    "retrieval_seconds": Metric("histogram", "Choosing and packing the visual KV of a turn."),
    "prefills_total": Metric("counter", "Media prefixes made: decoded, encoded, pruned and prefilled."),
    "media_kv_hits_total": Metric("counter", "Preparations that found their media prefix resident."),
    # transfers
    "kv_transfer_seconds": Metric("histogram", "From the offer of a transfer to its acknowledgement.", ("transport",)),
    "kv_transfer_bytes_total": Metric("counter", "Bytes of KV that crossed a lane.", ("direction", "transport")),
    "kv_transfers_total": Metric("counter", "Transfers by how they ended.", ("outcome",)),
    "kv_lane_rebuild_total": Metric("counter", "Lanes that were built anew after one broke."),
    "kv_lease_expired_total": Metric("counter", "Transfers given up because the other side fell silent."),
    # memory and load
    "kv_bytes": Metric("gauge", "Bytes of KV.", ("pool", "kind")),
    "kv_budget_bytes": Metric("gauge", "Bytes of KV that may be used.", ("pool", "kind")),
    "media_objects": Metric("gauge", "Media prefixes held.", ("pool",)),
    "conversations": Metric("gauge", "Conversations held."),
    "turns_running": Metric("gauge", "Turns in the batch."),
    "turns_waiting": Metric("gauge", "Turns in line."),
    "lanes": Metric("gauge", "Lanes that stand.", ("direction",)),
    # tokens
    "visual_tokens_total": Metric("counter", "Visual tokens by stage.", ("stage",)),
    "tokens_total": Metric("counter", "Text tokens.", ("kind",)),
    "retrieval_keep": Metric("histogram", "Share of the pruned visual KV that turns attended to.", (), SHARES),
    "retrieval_degraded_total": Metric("counter", "Turns that pressure gave less visual KV than they wished."),
    "preemptions_total": Metric("counter", "Times that a running turn made way for another one."),
    # uploads
    "spool_bytes": Metric("gauge", "Bytes of uploads that are kept."),
}


class MetricsSink(Protocol):
    """Where numbers go. Names are keys of `METRICS`, without the prefix; labels are given by name, all of them."""

    def count(self, name: str, value: float = 1.0, **labels: str) -> None:
        """Add to a counter."""
        ...

    def set(self, name: str, value: float, **labels: str) -> None:
        """Give a gauge its value."""
        ...

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add one observation to a histogram."""
        ...


class Tally:
    """A sink that keeps sums, last values and counts of observations in this process: for tests, and where no dashboard is."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, ...]] = Counter()
        self.values: dict[tuple[str, ...], float] = {}
        self.observed: Counter[tuple[str, ...]] = Counter()
        self._lock = threading.Lock()

    def count(self, name: str, value: float = 1.0, **labels: str) -> None:
        """Add to the sum."""
        with self._lock:
            self.counts[key_of(name, "counter", labels)] += value  # type: ignore[assignment]

    def set(self, name: str, value: float, **labels: str) -> None:
        """Replace the last value."""
        self.values[key_of(name, "gauge", labels)] = value

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Count one observation."""
        with self._lock:
            self.observed[key_of(name, "histogram", labels)] += 1


def key_of(name: str, kind: str, labels: Mapping[str, str]) -> tuple[str, ...]:
    """(name, label values in the table's order). Asserts that the table has the name with this kind and exactly these labels."""
    metric = METRICS[name]
    assert metric.kind == kind and set(labels) == set(metric.labels), (name, kind, labels)
    return (name, *(labels[label] for label in metric.labels))
