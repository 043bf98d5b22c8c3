"""Media prefixes: the immutable KV of a system prompt and pruned visual tokens."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from torch import Tensor

from sparsevila_cluster.core.tenancy import may_use
from sparsevila_cluster.kvcache.arena import Extent, KVSpec


@dataclass(eq=False)
class MediaPrefix:
    """The immutable KV of `[system + pruned visual tokens]`, named by its content key.

    is_visual bool [n], False for text and for structural visual tokens (row ends), which always stay; positions i64 [R, n];
    token_map i32 [n, 3] = (group, row, col), -1 where not visual; per group its grid (rows, cols), the index of its media, its
    frame and time_s; kind: "image" if all media are images; next_pos: position of the first token after it; generation_floor:
    see PromptPlan; tenant: who alone may use it, "" = everybody; sums: checksums of parts of the KV, which never change, kept by
    whoever sends them.
    """

    key: str
    spec: KVSpec
    extent: Extent
    is_visual: Tensor
    positions: Tensor
    token_map: Tensor
    next_pos: int
    generation_floor: int
    grids: tuple[tuple[int, int], ...]
    media: tuple[int, ...]
    frames: tuple[int, ...]
    times_s: tuple[float, ...]
    kind: str
    num_frames: int
    duration_s: float
    num_visual: int
    tenant: str = ""
    sums: dict[Hashable, int] = field(default_factory=dict, repr=False)
    visual_index: Tensor = field(init=False)
    other_index: Tensor = field(init=False)

    def __post_init__(self) -> None:
        assert self.extent.length == len(self.is_visual) == len(self.token_map) == self.positions.shape[1]
        self.visual_index = self.is_visual.nonzero()[:, 0]
        self.other_index = (~self.is_visual).nonzero()[:, 0]

    def serves(self, tenant: str) -> bool:
        """Whether a caller of this tenant may know of it."""
        return may_use(self.tenant, tenant)

    @property
    def length(self) -> int:
        return self.extent.length

    @property
    def num_kept(self) -> int:
        """Visual tokens that survived pruning."""
        return len(self.visual_index)

    @property
    def kv_bytes(self) -> int:
        return self.length * self.spec.bytes_per_token

    @property
    def dense_kv_bytes(self) -> int:
        """What the prefix would take without pruning."""
        return (self.length - self.num_kept + self.num_visual) * self.spec.bytes_per_token
