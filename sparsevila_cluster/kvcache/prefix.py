"""Media prefixes: the immutable KV of a system prompt and pruned visual tokens, and what is known of it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sparsevila_cluster.core.requests import MediaHandle
from sparsevila_cluster.core.tenancy import may_use
from sparsevila_cluster.kvcache.arena import Extent, KVSpec


@dataclass(frozen=True, eq=False, kw_only=True)
class PrefixMetadata:
    """What a media prefix of n tokens is, wherever its KV lies: all but the KV itself.

    Attributes:
        key: its content key.
        tenant: who alone may use it, "" = everybody.
        owner: whose share of the budget it takes, "" = nobody's.
        spec: of its KV.
        is_visual: bool [n], False for text and for structural visual tokens (row ends), which always stay.
        positions: i64 [R, n].
        token_map: i32 [n, 3] = (group, row, col), -1 where not visual.
        next_pos: position of the first token after it.
        generation_floor: see PromptPlan.
        grids: (rows, cols) of each group.
        media: index of the media of each group.
        frames: frame of each group.
        times_s: time of each group.
        kind: "image" if all media are images, else "video".
        num_frames: over all media.
        duration_s: over all media.
        num_visual: visual tokens before pruning.
    """

    key: str
    tenant: str = ""
    owner: str = ""
    spec: KVSpec
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

    @property
    def length(self) -> int:
        """Tokens, n."""
        return len(self.is_visual)

    @property
    def kv_bytes(self) -> int:
        """Bytes that the prefix takes in an arena."""
        return self.length * self.spec.bytes_per_token

    def to(self, device: torch.device | str) -> PrefixMetadata:
        """The same with its tensors on `device`."""
        return replace(
            self,
            is_visual=self.is_visual.to(device),
            positions=self.positions.to(device),
            token_map=self.token_map.to(device),
        )


@dataclass(eq=False)
class MediaPrefix:
    """The immutable KV of `[system + pruned visual tokens]` in an extent, named by its content key.

    checksums: of parts of the KV, which never change, kept by whoever sends them; visual_index, other_index: i64, the rows that are
    visual and those that are not.
    """

    metadata: PrefixMetadata
    extent: Extent
    checksums: dict[Hashable, int] = field(default_factory=dict, repr=False)
    visual_index: Tensor = field(init=False)
    other_index: Tensor = field(init=False)

    def __post_init__(self) -> None:
        known = self.metadata
        assert self.extent.length == len(known.is_visual) == len(known.token_map) == known.positions.shape[1]
        self.visual_index = known.is_visual.nonzero()[:, 0]
        self.other_index = (~known.is_visual).nonzero()[:, 0]

    @property
    def key(self) -> str:
        """Its content key."""
        return self.metadata.key

    @property
    def spec(self) -> KVSpec:
        """What its KV means."""
        return self.metadata.spec

    @property
    def length(self) -> int:
        """Tokens, which are rows of the extent."""
        return self.extent.length

    @property
    def num_kept(self) -> int:
        """Visual tokens that survived pruning."""
        return len(self.visual_index)

    @property
    def kv_bytes(self) -> int:
        """Bytes that it takes in an arena."""
        return self.metadata.kv_bytes

    @property
    def dense_kv_bytes(self) -> int:
        """Bytes that it would take without pruning."""
        return (self.length - self.num_kept + self.metadata.num_visual) * self.spec.bytes_per_token

    def serves(self, tenant: str) -> bool:
        """Whether a caller of this tenant may know of it."""
        return may_use(self.metadata.tenant, tenant)

    def handle(self, reused: bool = False, ms: Mapping[str, float] | None = None) -> MediaHandle:
        """What callers are told of it. reused: nothing had to be made; ms: milliseconds of each stage that ran to make it."""
        known = self.metadata
        return MediaHandle(
            media_id=known.key,
            kind=known.kind,
            num_frames=known.num_frames,
            duration_s=known.duration_s,
            visual_tokens=known.num_visual,
            visual_tokens_kept=self.num_kept,
            prefix_tokens=self.length,
            kv_bytes=self.kv_bytes,
            dense_kv_bytes=self.dense_kv_bytes,
            reused=reused,
            tenant=known.tenant,
            ms=dict(ms or {}),
        )
