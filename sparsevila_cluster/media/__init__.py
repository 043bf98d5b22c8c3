"""Media: from bytes that somebody sent to the frames that a model looks at."""

from sparsevila_cluster.media.cost import MediaCost, check_cost
from sparsevila_cluster.media.frame_selection import sample_times
from sparsevila_cluster.media.opening import Media, identify, measure_media, open_media
from sparsevila_cluster.media.sandbox import DecoderSandbox

__all__ = [
    "DecoderSandbox",
    "Media",
    "MediaCost",
    "check_cost",
    "identify",
    "measure_media",
    "open_media",
    "sample_times",
]
