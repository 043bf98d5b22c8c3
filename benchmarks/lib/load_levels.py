"""The loads of a benchmark, one after the other, each on the sparse and on the dense configuration of the same cluster.

Knows: which conversations a load has and when they begin, and what the cluster counted meanwhile. Does not know: what clients do
(load.py), or what is made of it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.lib.goodput import Run, poisson
from benchmarks.lib.load_clients import DENSE, PREPARE_S, SPARSE, Variant, Visit, closed_loop, guest, open_loop
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


def make_films(folder: Path, num: int, num_frames: int, frame_px: int, say: Callable[[str], None]) -> list[Path]:
    """Videos of different content."""
    films = [folder / f"film-{number}.mp4" for number in range(num)]
    for number, film in enumerate(films):
        say(f"film {number + 1} of {num}")
        write_mp4(make_media(num_frames, frame_px, seed=number).frames, film, fps=round(FPS), crf=30)
    return films


def plan_visits(level: Level, known: Sequence[Path], new: Sequence[Path], num_turns: int, seed: int) -> list[Visit]:
    """The conversations of a level, in order: those about new videos evenly among those about known ones, drawn at random."""
    rng = random.Random(seed)
    films = [known[rng.randrange(len(known))] for _ in range(level.num)]
    for number, film in enumerate(new):
        films[number * level.num // len(new)] = film
    return [Visit(film, num_turns) for film in films]


class Loads:
    """Lays loads on the cluster at `target`. known: videos to prepare before the first load; new: for one conversation each;
    limit_s: for one load.
    """

    def __init__(self, target: str, known: Sequence[Path], new: Sequence[Path], num_turns: int, num_tokens: int, limit_s: float):
        self.outcomes: list[Outcome] = []
        self._target, self._known, self._new = target, known, list(new)
        self._num_turns, self._num_tokens, self._limit_s = num_turns, num_tokens, limit_s

    async def prepare(self) -> None:
        """Have the known videos there, as both configurations want them."""
        async with guest(self._target) as one:
            for film in self._known:
                for variant in VARIANTS:
                    await one.client.prepare(film, timeout_s=PREPARE_S, **variant.prepare)

    async def lay(self, level: Level, say: Callable[[str], None]) -> None:
        """One load, on both configurations in turn. Raises DeadlineExceeded."""
        number = len(self.outcomes)
        new, self._new = self._new[: level.num_new], self._new[level.num_new :]
        visits = plan_visits(level, self._known, new, self._num_turns, seed=number)
        if level.share:
            arrivals = poisson(level.share * self.best_per_s(), level.num, seed=number)
            visits = [replace(visit, at_s=at_s) for visit, at_s in zip(visits, arrivals, strict=True)]
        for variant in VARIANTS if number % 4 else VARIANTS[::-1]:
            say(f"{level.name}: {variant.name}")
            before = await counts(self._target)
            run = await wait_within(self._run(level, visits, variant), self._limit_s, f"the load {level.name!r}")
            after = await counts(self._target)
            self.outcomes.append(Outcome(level, variant.name, run, *(b - a for a, b in zip(before, after, strict=True))))

    async def _run(self, level: Level, visits: Sequence[Visit], variant: Variant) -> Run:
        if level.clients:
            return await closed_loop(self._target, visits, level.clients, variant, self._num_tokens)
        return await open_loop(self._target, visits, variant, self._num_tokens)

    def best_per_s(self) -> float:
        """Conversations per second of the best closed loop on the sparse configuration so far."""
        mine = [one for one in self.outcomes if one.variant == SPARSE.name and one.level.clients]
        return max(one.level.num / one.run.elapsed_s for one in mine)


async def counts(target: str) -> tuple[int, int]:
    """What the cluster has done so far: media prefixes made, bytes of KV that arrived over lanes."""
    async with guest(target) as one:
        pools = (await one.client.info())["details"]["pools"]
    prefills = sum(worker["info"]["prefills"] for worker in pools["prefill"])
    return prefills, sum(worker["info"]["receiver"]["bytes_received"] for worker in pools["decode"])
