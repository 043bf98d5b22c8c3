"""A `MetricsSink` that hands every number to Ray, which exports it to Prometheus as `ray_sparsevila_<name>`.

A family is made when it is first used, once per process; inside a replica Serve adds its own labels (application, deployment,
replica).
"""

from __future__ import annotations

import functools
from typing import Any

from ray.serve import metrics

from sparsevila_cluster.core.metrics import METRICS, PREFIX, key_of

KINDS = {"counter": metrics.Counter, "gauge": metrics.Gauge, "histogram": metrics.Histogram}


class RayMetricsSink:
    """See `MetricsSink`. Safe from any thread."""

    def count(self, name: str, value: float = 1.0, **labels: str) -> None:
        """Add to a counter."""
        key_of(name, "counter", labels)
        if value > 0:  # Ray refuses to count nothing
            _family(name).inc(value, tags=labels)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        key_of(name, "gauge", labels)
        _family(name).set(value, tags=labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add a sample to a histogram."""
        key_of(name, "histogram", labels)
        _family(name).observe(value, tags=labels)


@functools.cache
def _family(name: str) -> Any:
    metric = METRICS[name]
    given: dict[str, Any] = {"boundaries": list(metric.buckets)} if metric.kind == "histogram" else {}
    return KINDS[metric.kind](PREFIX + name, description=metric.help, tag_keys=metric.labels, **given)
