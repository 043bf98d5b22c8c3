"""What decoding costs, and how much of it one request may ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsevila_cluster.core.errors import TooLarge

if TYPE_CHECKING:
    from sparsevila_cluster.core.config import MediaLimits

# A pixel that is sampled is also turned into RGB, copied, resized and encoded.
SAMPLED_WEIGHT = 8


@dataclass(frozen=True)
class MediaCost:
    """decoded: pixels of all frames that have to be decoded; sampled: of those that are kept."""

    decoded: int = 0
    sampled: int = 0

    def __add__(self, other: MediaCost) -> MediaCost:
        return MediaCost(self.decoded + other.decoded, self.sampled + other.sampled)

    @property
    def pixels(self) -> int:
        """One number: pixels that cost as much to decode."""
        return self.decoded + SAMPLED_WEIGHT * self.sampled


def check_cost(cost: MediaCost, num_sources: int, limits: MediaLimits) -> None:
    """Raises TooLarge: all sources of a request together are over a limit."""
    for what, pixels, field in (("decoded", cost.decoded, "max_decoded_pixels"), ("sampled", cost.sampled, "max_sampled_pixels")):
        if pixels > getattr(limits, field):
            raise TooLarge(
                f"{num_sources} sources have {pixels} pixels in all {what} frames; the limit of a request is {field} = "
                f"{getattr(limits, field)}. Fewer frames (fps, max_frames) make them fit"
            )
