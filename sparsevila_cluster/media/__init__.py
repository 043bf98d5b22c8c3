"""Media: what the user sent, decoded to frames. Re-exports `opening`, `guard` and `selection`."""

from sparsevila_cluster.media.guard import DecodeGuard
from sparsevila_cluster.media.opening import Media, identify, open_media
from sparsevila_cluster.media.selection import sample_times

__all__ = ["DecodeGuard", "Media", "identify", "open_media", "sample_times"]
