"""The loads of a benchmark, one after the other, each on the sparse and on the dense configuration of the same cluster."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.lib.goodput import Run, poisson
from benchmarks.lib.load_clients import (
    DENSE,
    PREPARE_S,
    SPARSE,
    ConversationPlan,
    Variant,
    closed_loop,
    connected_client,
    open_loop,
)
from benchmarks.lib.midsize_checkpoint import FPS, make_media
from sparsevila_cluster.core.deadline import wait_within
from sparsevila_cluster.demo.drawing import write_mp4

VARIANTS = (SPARSE, DENSE)


@dataclass(frozen=True)
class Level:
    """A load of `num` conversations, `num_new` of them about videos of their own. clients: of a closed loop; share: of an open one,
    of the conversations per second that the best closed loop held.
    """

    num: int
    num_new: int
    clients: int = 0
    share: float = 0.0

    @property
    def name(self) -> str:
        return f"closed, {self.clients}" if self.clients else f"open, {self.share:.0%}"


@dataclass(frozen=True)
class Outcome:
    """A load on one configuration. lane_bytes: of KV that arrived at decode workers."""

    level: Level
    variant: str
    run: Run
    prefills: int
    lane_bytes: int


def make_videos(folder: Path, num: int, num_frames: int, frame_px: int, say: Callable[[str], None]) -> list[Path]:
    """Videos of different content."""
    videos = [folder / f"video-{number}.mp4" for number in range(num)]
    for number, video in enumerate(videos):
        say(f"video {number + 1} of {num}")
        write_mp4(make_media(num_frames, frame_px, seed=number).frames, video, fps=round(FPS), crf=30)
    return videos


def plan_conversations(
    level: Level, known: Sequence[Path], new: Sequence[Path], num_turns: int, seed: int
) -> list[ConversationPlan]:
    """The conversations of a level, in order: those about new videos evenly among those about known ones, drawn at random."""
    rng = random.Random(seed)
    videos = [known[rng.randrange(len(known))] for _ in range(level.num)]
    for number, video in enumerate(new):
        videos[number * level.num // len(new)] = video
    return [ConversationPlan(video, num_turns) for video in videos]


class LoadRunner:
    """Lays loads on the cluster at `target`. known: videos to prepare before the first load; new: for one conversation each;
    limit_s: for one load.
    """

    def __init__(self, target: str, known: Sequence[Path], new: Sequence[Path], num_turns: int, num_tokens: int, limit_s: float):
        self.outcomes: list[Outcome] = []
        self._target, self._known, self._new = target, known, list(new)
        self._num_turns, self._num_tokens, self._limit_s = num_turns, num_tokens, limit_s

    async def prepare(self) -> None:
        """Have the known videos there, as both configurations want them."""
        async with connected_client(self._target) as one:
            for video in self._known:
                for variant in VARIANTS:
                    await one.client.prepare(video, timeout_s=PREPARE_S, **variant.prepare)

    async def run(self, level: Level, say: Callable[[str], None]) -> None:
        """One load, on both configurations in turn. Raises DeadlineExceeded."""
        number = len(self.outcomes)
        new, self._new = self._new[: level.num_new], self._new[level.num_new :]
        plans = plan_conversations(level, self._known, new, self._num_turns, seed=number)
        if level.share:
            arrivals = poisson(level.share * self.best_per_s(), level.num, seed=number)
            plans = [replace(plan, at_s=at_s) for plan, at_s in zip(plans, arrivals, strict=True)]
        for variant in VARIANTS if number % 4 else VARIANTS[::-1]:
            say(f"{level.name}: {variant.name}")
            before = await counts(self._target)
            run = await wait_within(self._run(level, plans, variant), self._limit_s, f"the load {level.name!r}")
            after = await counts(self._target)
            self.outcomes.append(Outcome(level, variant.name, run, *(b - a for a, b in zip(before, after, strict=True))))

    async def _run(self, level: Level, plans: Sequence[ConversationPlan], variant: Variant) -> Run:
        if level.clients:
            return await closed_loop(self._target, plans, level.clients, variant, self._num_tokens)
        return await open_loop(self._target, plans, variant, self._num_tokens)

    def best_per_s(self) -> float:
        """Conversations per second of the best closed loop on the sparse configuration so far."""
        mine = [one for one in self.outcomes if one.variant == SPARSE.name and one.level.clients]
        return max(one.level.num / one.run.elapsed_s for one in mine)


async def counts(target: str) -> tuple[int, int]:
    """What the cluster has done so far: media prefixes made, bytes of KV that arrived over lanes."""
    async with connected_client(target) as one:
        pools = (await one.client.info())["details"]["pools"]
    prefills = sum(worker["info"]["prefills"] for worker in pools["prefill"])
    return prefills, sum(worker["info"]["receiver"]["bytes_received"] for worker in pools["decode"])
