"""A stream of training videos, rendered ahead in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import numpy as np

from sparsevila_cluster.core.errors import DeadlineExceeded, Unavailable
from sparsevila_cluster.demo.drawing import FPS, render_labelled, through_codec
from sparsevila_cluster.demo.world import HELD_OUT_STREAM, NUM_STEPS, TRAINING_STREAM, WorldScene, make_scene

SAMPLED = slice(FPS // 4, None, FPS // 2)  # what an engine samples: 2 frames per second, each from the middle of its interval
CODEC_SHARE = 0.6
NUM_AHEAD = 64
# How long one video, and the end of the process that renders, may take.
VIDEO_LIMIT_S = 120.0
END_LIMIT_S = 10.0


class TrainingVideo(NamedTuple):
    """A scene as a model samples it, and which glyph owns which cell of the grid."""

    scene: WorldScene
    frames: np.ndarray  # uint8 [2 * steps, px, px, 3]: as the model samples them
    owner: np.ndarray  # int8 [steps, grid, grid]


def make_training_video(rng: np.random.Generator, num_steps: int = NUM_STEPS) -> TrainingVideo:
    """Most training videos went through H.264 at one quality or another, as real ones do."""
    scene = make_scene(rng, num_steps)
    rendered = render_labelled(scene, rng)
    frames = rendered.frames
    if rng.random() < CODEC_SHARE:
        preset = "ultrafast" if rng.random() < 0.5 else "veryfast"
        frames = through_codec(frames, crf=int(rng.integers(16, 29)), preset=preset)
    return TrainingVideo(scene, np.ascontiguousarray(frames[SAMPLED]), rendered.owner)


def make_held_out_video(seed: int, num_steps: int = NUM_STEPS) -> TrainingVideo:
    """The video of `make_video(seed, held_out=True)`, after a round trip through MP4."""
    rng = np.random.default_rng((HELD_OUT_STREAM, seed))
    scene = make_scene(rng, num_steps)
    rendered = render_labelled(scene, rng, held_out=True)
    frames = through_codec(rendered.frames, crf=18, preset="medium")
    return TrainingVideo(scene, np.ascontiguousarray(frames[SAMPLED]), rendered.owner)


def training_videos(seed: int, num_steps: int) -> Iterator[TrainingVideo]:
    """Videos without end, in the order that `seed` fixes."""
    rng = np.random.default_rng((TRAINING_STREAM, seed, num_steps))
    while True:
        yield make_training_video(rng, num_steps)


def _produce(connection: Connection, seed: int, num_steps: int) -> None:
    ready: queue.Queue[TrainingVideo] = queue.Queue(NUM_AHEAD)
    threading.Thread(target=_send, args=(ready, connection), daemon=True).start()
    for video in training_videos(seed, num_steps):
        ready.put(video)


def _send(ready: queue.Queue[TrainingVideo], connection: Connection) -> None:
    while True:
        try:
            connection.send(ready.get())
        except OSError:  # nobody reads any more
            os._exit(1)


def _receive(connection: Connection, process: BaseProcess) -> Iterator[TrainingVideo]:
    while True:
        if not connection.poll(VIDEO_LIMIT_S):
            raise DeadlineExceeded(f"no training video was rendered within {VIDEO_LIMIT_S:g} s")
        try:
            video = connection.recv()
        except (EOFError, OSError) as error:
            process.join(END_LIMIT_S)
            raise Unavailable(f"the process that renders training videos ended (exit code {process.exitcode})") from error
        yield video


@contextmanager
def video_feed(seed: int, num_steps: int, *, ahead: bool = True) -> Iterator[Iterator[TrainingVideo]]:
    """Training videos in a fixed order; `ahead` renders them in a second process, which ends with the block.

    Reading raises Unavailable when that process died, DeadlineExceeded when it renders nothing for VIDEO_LIMIT_S.
    """
    if not ahead:
        yield training_videos(seed, num_steps)
        return
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_produce, args=(sending, seed, num_steps), daemon=True)
    process.start()
    sending.close()  # else its end is not noticed
    try:
        yield _receive(receiving, process)
    finally:
        process.terminate()
        process.join(END_LIMIT_S)
        if process.is_alive():
            process.kill()
            process.join(END_LIMIT_S)
        receiving.close()
