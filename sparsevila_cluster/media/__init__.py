"""Media: what the user sent, decoded to frames. Re-exports `opening`, `guard` and `selection`."""

from sparsevila_cluster.media.frame_selection import sample_times
from sparsevila_cluster.media.opening import Media, identify, open_media
from sparsevila_cluster.media.sandbox import DecoderSandbox

__all__ = ["DecoderSandbox", "Media", "identify", "open_media", "sample_times"]
