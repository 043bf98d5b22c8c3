"""Media: from bytes that somebody sent to the frames that a model looks at."""

from sparsevila_cluster.media.frame_selection import sample_times
from sparsevila_cluster.media.opening import Media, identify, open_media
from sparsevila_cluster.media.sandbox import DecoderSandbox

__all__ = ["DecoderSandbox", "Media", "identify", "open_media", "sample_times"]
