"""Training videos from a process of their own: the same ones, and an error when that process is gone."""

import multiprocessing
import os
import signal
from itertools import islice

import numpy as np
import pytest

from sparsevila_cluster.core.errors import Unavailable
from sparsevila_cluster.demo.video_feed import training_videos, video_feed


def test_a_feed_that_renders_ahead_has_the_same_videos_and_ends_with_its_block():
    with video_feed(3, 2) as ahead, video_feed(3, 2, ahead=False) as plain:
        for one, other, third in zip(islice(ahead, 4), plain, training_videos(3, 2), strict=False):
            assert one.scene == other.scene == third.scene and np.array_equal(one.frames, other.frames)
        assert len(multiprocessing.active_children()) == 1
    assert multiprocessing.active_children() == []


def test_the_reader_is_told_that_the_renderer_died():
    """Also in the middle of a video: one is larger than what a pipe holds."""
    with video_feed(3, 8) as videos:
        next(videos)
        (renderer,) = multiprocessing.active_children()
        os.kill(renderer.pid, signal.SIGKILL)
        with pytest.raises(Unavailable, match="exit code -9"):
            list(islice(videos, 1000))
    assert multiprocessing.active_children() == []
