"""Where a turn looked, as data: which places of which frames, with which share of its attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, overload

from sparsevila_cluster.core.display import ReprMixin
from sparsevila_cluster.core.errors import BadRequest, NotFound

if TYPE_CHECKING:
    from PIL import Image

    Draw = Callable[["Evidence"], Image.Image]
else:
    Draw = Callable

Cell = tuple[int, int]


@dataclass(frozen=True, repr=False)
class FrameEvidence(ReprMixin):
    """Where one frame (or temporal group of frames, or view of a frame) was looked at.

    frame: index among the sampled frames of its media; time_s: its time in the media; share: its part of the turn's retrieved
    visual attention, all frames summing to 1; cells: (row, col, share) of each retrieved visual token in the frame's `grid`
    (rows, cols), which is spread over the whole picture; kept: (row, col) of every token that survived pruning; media: index of
    the media among those that were prepared together.
    """

    frame: int
    time_s: float
    share: float
    grid: tuple[int, int]
    cells: tuple[tuple[int, int, float], ...]
    kept: tuple[Cell, ...]
    media: int = 0

    def _facts(self) -> Iterator[tuple[str, object]]:
        if self.media:
            yield "media", self.media
        yield from (("frame", self.frame), ("time_s", self.time_s), ("share", round(self.share, 4)), ("grid", self.grid))
        yield from (("num_retrieved", len(self.cells)), ("num_kept", len(self.kept)))


@dataclass(frozen=True, repr=False, eq=False)
class Evidence(ReprMixin, Sequence[FrameEvidence]):
    """The evidence of one turn: an immutable sequence of FrameEvidence in the order of the media prefix.

    Some models see one picture in several views (all of it at once, and in tiles): those are several entries with the same media
    and frame. `by_frame` and `top` count them as one. Equal to any sequence of the same entries that is an Evidence or a tuple.
    """

    frames: tuple[FrameEvidence, ...] = ()
    draw: Draw | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "frames", tuple(self.frames))

    def by_frame(self) -> tuple[FrameEvidence, ...]:
        """One entry for each sampled frame, its views laid over each other."""
        views: dict[tuple[int, int], list[FrameEvidence]] = {}
        for one in self.frames:
            views.setdefault((one.media, one.frame), []).append(one)
        return tuple(merge_views(group) for group in views.values())

    def top(self, num: int | None = None) -> list[FrameEvidence]:
        """The (at most `num`) frames with a share, the largest first."""
        looked_at = [one for one in self.by_frame() if one.share > 0]
        return sorted(looked_at, key=lambda one: -one.share)[:num]

    def show(self) -> Image.Image:
        """The frames as the model saw them: pruned patches dark and grey, retrieved ones tinted by their share.

        The media is decoded again for it, which takes as long as in `prepare`. In a notebook the picture shows itself; elsewhere
        use its `show()` or `save(path)`.

        Raises:
            BadRequest: the turn was asked with evidence=False. NotFound: not made by VideoQA or AsyncVideoQA, which record
            the source. BadMedia, TooLarge, DeadlineExceeded: the source is gone, has changed or can not be decoded any more.
        """
        if not self.frames:
            raise BadRequest("there is no evidence to show: ask with evidence=True")
        if self.draw is None:
            raise NotFound("the media of this evidence cannot be read again: only VideoQA and AsyncVideoQA record its source")
        return self.draw(self)

    def drawn_by(self, draw: Draw) -> Evidence:
        """The same evidence, which shows itself with `draw`."""
        return replace(self, draw=draw)

    def places(self, num: int = 3, names: Sequence[str] = ()) -> str:
        """The frames with the largest shares in a few words, `3.0 s (62%), 4.0 s (20%)`; nothing for a single picture.

        Of several media: `clip.mp4 at 3.0 s (62%), cup.png (20%)`, with `names` or their index.
        """
        moving = {one.media for one in self.frames if one.time_s > 0}
        if not any(one.media for one in self.frames):
            return ", ".join(f"{one.time_s:.1f} s ({one.share:.0%})" for one in self.top(num)) if moving else ""
        whose = {one.media: names[one.media] if names else f"media {one.media}" for one in self.frames}
        named = ((one, f" at {one.time_s:.1f} s" if one.media in moving else "") for one in self.top(num))
        return ", ".join(f"{whose[one.media]}{when} ({one.share:.0%})" for one, when in named)

    def _facts(self) -> Iterator[tuple[str, object]]:
        yield from (("num_frames", len(self.by_frame())), ("looked_at", self.places()))

    def __len__(self) -> int:
        return len(self.frames)

    def __iter__(self) -> Iterator[FrameEvidence]:
        return iter(self.frames)

    @overload
    def __getitem__(self, index: int) -> FrameEvidence: ...
    @overload
    def __getitem__(self, index: slice) -> Evidence: ...
    def __getitem__(self, index: int | slice) -> FrameEvidence | Evidence:
        return replace(self, frames=self.frames[index]) if isinstance(index, slice) else self.frames[index]

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Evidence):
            return self.frames == other.frames
        return self.frames == other if isinstance(other, tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.frames)


def merge_views(views: Sequence[FrameEvidence]) -> FrameEvidence:
    """Several views of one picture as one, on a grid as fine as the finest of them in each direction.

    A cell of a coarser view covers the fine cells whose middle lies in it, and its share is spread evenly over them: the sum of
    all shares stays. A fine cell is kept, and retrieved, if it is so in any view.
    """
    if len(views) == 1:
        return views[0]
    grid = max(one.grid[0] for one in views), max(one.grid[1] for one in views)
    kept: set[Cell] = set()
    shares: dict[Cell, float] = {}
    for one in views:
        rows, cols = (_covered(fine, coarse) for fine, coarse in zip(grid, one.grid, strict=True))
        kept.update((r, c) for row, col in one.kept for r in rows[row] for c in cols[col])
        for row, col, share in one.cells:
            part = share / (len(rows[row]) * len(cols[col]))
            for cell in ((r, c) for r in rows[row] for c in cols[col]):
                shares[cell] = shares.get(cell, 0.0) + part
    return replace(
        views[0],
        share=sum(one.share for one in views),
        grid=grid,
        cells=tuple((row, col, share) for (row, col), share in sorted(shares.items())),
        kept=tuple(sorted(kept)),
    )


def _covered(fine: int, coarse: int) -> list[list[int]]:
    """For each of `coarse` equal stretches: those of `fine` >= `coarse` equal stretches whose middle lies in it, at least one."""
    members: list[list[int]] = [[] for _ in range(coarse)]
    for i in range(fine):
        members[(2 * i + 1) * coarse // (2 * fine)].append(i)
    return members
