"""Scenes without end, drawn ahead in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from sparsevila_cluster.core.errors import DeadlineExceeded, Unavailable
from sparsevila_cluster.demo.training.scene_videos import SampledScene, sample_scene, seed_of

NUM_AHEAD = 24
# How long one video may take.
VIDEO_LIMIT_S = 120.0
END_LIMIT_S = 10.0


def numbered_scene(stream: str, seed: int, number: int, num_steps: int, codec: bool | None = None) -> SampledScene:
    """Video `number` of a feed, whoever draws it."""
    return sample_scene(seed_of(stream, seed * 1_000_000 + number), num_steps, stream, codec=codec)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "it was spawned"

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def scene_feed(
    stream: str, seed: int, num_steps: int, *, first: int = 0, processes: int = 1, codec: bool | None = None
) -> Iterator[Iterator[SampledScene]]:
    """Videos `first` and later of a stream, in order; processes that were begun in the block end with it, or with this process.

    Reading raises Unavailable when a process died, DeadlineExceeded when a video takes longer than VIDEO_LIMIT_S.
    """
    context, others = multiprocessing.get_context("spawn"), set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_end_with_parent)
    try:

        def ask(number: int) -> Future[SampledScene]:
            return pool.submit(numbered_scene, stream, seed, number, num_steps, codec)

        def videos() -> Iterator[SampledScene]:
            ahead = deque(ask(first + i) for i in range(NUM_AHEAD))
            number = first + NUM_AHEAD
            while True:
                try:
                    yield ahead.popleft().result(VIDEO_LIMIT_S)
                except TimeoutError as error:
                    raise DeadlineExceeded(f"no training video was drawn within {VIDEO_LIMIT_S:g} s") from error
                except BrokenProcessPool as error:
                    raise Unavailable("a process that draws training videos ended") from error
                ahead.append(ask(number))
                number += 1

        yield videos()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        mine = set(multiprocessing.active_children()) - others
        for process in mine:
            process.kill()
        for process in mine:
            process.join(END_LIMIT_S)
