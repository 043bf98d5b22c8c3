"""Media: what the user sent, decoded to frames. Re-exports `opening` and `video`."""

from sparsevila_cluster.media.opening import Media, identify, open_media
from sparsevila_cluster.media.video import sample_times

__all__ = ["Media", "identify", "open_media", "sample_times"]
