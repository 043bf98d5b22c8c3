"""Broken files are refused, and files from cameras open. (Mutated ones: `fuzz`.)"""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest

from sparsevila_cluster.core.errors import BadMedia, SparseVilaError
from tests.media.media_files import load, video_bytes

SHARED = Path(os.environ.get("SPARSEVILA_TEST_MEDIA", Path(__file__).parents[3] / "shared" / "media"))


@pytest.mark.parametrize("container, options", [("mp4", {"movflags": "faststart"}), ("mp4", {}), ("matroska", {}), ("avi", {})])
def test_cut_files_are_refused(container, options):
    rng = np.random.default_rng(0)
    data = video_bytes(
        40, container=container, container_options=options,
        draw=lambda index: rng.integers(0, 256, (48, 64, 3), dtype=np.uint8),
    )  # fmt: skip
    assert len(load(data, fps=10).frames) == 40
    for share in (0.05, 0.3, 0.6, 0.8):
        with pytest.raises(BadMedia):
            load(data[: int(len(data) * share)])


@pytest.mark.smoke
def test_a_damaged_middle_is_refused(capfd):
    rng = np.random.default_rng(0)
    data = bytearray(video_bytes(40, draw=lambda index: rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)))
    data[len(data) // 2 : len(data) // 2 + 4000] = bytes(4000)
    with pytest.raises(BadMedia, match="of 40 damaged frames; at most 2%"):
        load(bytes(data), max_frames=1)
    assert capfd.readouterr().err == ""  # FFmpeg keeps quiet


@pytest.mark.smoke
def test_damaged_av1_is_refused_in_the_same_words_each_time():
    data = video_bytes(50, fps=25, codec="libsvtav1")
    frames = range(data.index(b"mdat") + 4, data.index(b"moov"))
    for seed in range(4):
        broken, rng = bytearray(data), random.Random(seed)
        for place in rng.sample(frames, 8):
            broken[place] ^= 1 + rng.randrange(255)
        assert len({what_is_said_of(bytes(broken)) for _ in range(6)}) == 1


def what_is_said_of(data: bytes) -> str:
    try:
        return f"{len(load(data, fps=2.5).frames)} frames"
    except SparseVilaError as error:
        return f"{type(error).__name__}: {error}"


def test_every_file_is_closed(tmp_path):
    path = tmp_path / "video.mp4"
    path.write_bytes(video_bytes())
    before = set(os.listdir("/proc/self/fd"))
    for data, limits in ((path, {}), (path, {"max_pixels": 5}), (path, {"max_bytes": 5}), (Path(__file__), {})):
        try:
            load(str(data), **limits)
        except SparseVilaError:
            pass
    assert set(os.listdir("/proc/self/fd")) == before


CAMERA_FILES = {
    "nasa_13013.mp4": ((26, 180, 320, 3), 13.0), "av1_video.mkv": ((10, 360, 640, 3), 5.0),
    "h265_video.mp4": ((2, 128, 128, 3), 1.0), "h264_10bits.mp4": ((2, 200, 200, 3), 1.0),
    "video_0.mov": ((1, 320, 568, 3), 0.1), "video_90.mov": ((1, 568, 320, 3), 0.1),
    "unordered.mov": ((1, 50, 50, 3), 0.125),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(name for name in CAMERA_FILES if (SHARED / name).exists()))
def test_camera_files_open(name):
    shape, duration_s = CAMERA_FILES[name]
    media = load(str(SHARED / name))
    assert media.frames.shape == shape and media.duration_s == pytest.approx(duration_s)


@pytest.mark.parametrize("name", [name for name in ["corrupted.mp4"] if (SHARED / name).exists()])
def test_a_corrupted_camera_file_is_refused(name):
    for max_frames in (1, 8, 64):
        with pytest.raises(BadMedia, match="damaged frames"):
            load(str(SHARED / name), max_frames=max_frames)
