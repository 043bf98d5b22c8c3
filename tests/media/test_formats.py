"""Every container, codec and depth: the frames and the times that were written come back."""

from __future__ import annotations

import io
import random
from fractions import Fraction

import av
import numpy as np
import pytest

from sparsevila_cluster.media import sample_times
from tests.media.media_files import can_encode, corners, load, quadrants, video_bytes

NUM, FPS = 12, 10
LEVEL, STEP = 30, 15


def flat(index: int) -> np.ndarray:
    return np.full((48, 64, 3), LEVEL + STEP * index, np.uint8)


def shown(media) -> list[int]:
    """Which frames these are, by their brightness; each is flat, and as bright as it was written."""
    levels = media.frames.reshape(len(media.frames), -1).astype(int)
    assert (np.ptp(levels, axis=1) <= 4).all()
    indices = np.rint((levels.mean(1) - LEVEL) / STEP).astype(int)
    assert np.abs(levels.mean(1) - LEVEL - STEP * indices).max() <= 5
    return indices.tolist()


KINDS = [
    ("mp4", "libx264", "yuv420p", {}), ("mp4", "libx264", "yuv420p10le", {}), ("matroska", "libx264", "yuv444p", {}),
    ("mov", "libx264", "yuv422p10le", {}), ("mp4", "libx265", "yuv420p", {}), ("matroska", "libx265", "yuv420p10le", {}),
    ("mp4", "libx265", "yuv420p12le", {}), ("webm", "libvpx-vp9", "yuv420p", {}), ("mp4", "libvpx-vp9", "yuv420p", {}),
    ("webm", "libvpx-vp9", "yuv420p10le", {"profile": "2"}), ("mp4", "libsvtav1", "yuv420p", {}),
    ("webm", "libsvtav1", "yuv420p10le", {}), ("mpegts", "libx265", "yuv420p10le", {}), ("mov", "prores_ks", "yuv422p10le", {}),
]  # fmt: skip


@pytest.mark.parametrize("container, codec, pix_fmt, options", KINDS)
def test_codecs_and_depths(container, codec, pix_fmt, options):
    if not can_encode(codec, pix_fmt):
        pytest.skip(f"no encoder {codec} for {pix_fmt}")
    quality = {"crf": "8"} if codec != "prores_ks" else {}
    data = video_bytes(NUM, fps=FPS, container=container, codec=codec, pix_fmt=pix_fmt, codec_options=quality | options, draw=flat)
    with av.open(io.BytesIO(data)) as file:
        assert next(file.decode(video=0)).format.name == pix_fmt
    media = load(data, fps=FPS)
    assert shown(media) == list(range(NUM)) and media.times_s == pytest.approx(np.arange(NUM) / FPS, abs=2e-3)
    assert media.duration_s == pytest.approx(NUM / FPS, abs=2e-3)
    assert shown(load(data, fps=2.5)) == [2, 6, 10]


@pytest.mark.parametrize("container, codec", [("mp4", "libx264"), ("mov", "libx265"), ("matroska", "libx264"),
                                              ("webm", "libvpx-vp9"), ("mpegts", "libx264"), ("mp4", "libsvtav1")])  # fmt: skip
def test_variable_frame_rate(container, codec):
    if not can_encode(codec):
        pytest.skip(f"no encoder {codec}")
    rng = random.Random(codec + container)
    for fps in (1, 3, 10):
        gaps = [rng.choice((20, 33, 40, 100, 400, 1000)) for _ in range(NUM)]
        pts = [sum(gaps[:i]) for i in range(NUM)]
        data = video_bytes(NUM, pts=pts, container=container, codec=codec, draw=flat)
        media = load(data, fps=fps)
        # By the definition: at each sample time the last frame that has started, and no frame twice.
        starts = written_starts(data)
        assert starts == pytest.approx([p / 1000 for p in pts], abs=2e-3)
        times_s = sample_times(media.duration_s, fps, 64)
        want = sorted({max(i for i, start in enumerate(starts) if start <= t or i == 0) for t in times_s})
        assert shown(media) == want and media.times_s == pytest.approx([starts[i] for i in want], abs=1e-9)
        assert starts[-1] < media.duration_s <= starts[-1] + 1.1


def written_starts(data: bytes) -> list[float]:
    with av.open(io.BytesIO(data)) as container:
        ticks = sorted(packet.pts for packet in container.demux(video=0) if packet.size)
        return [float((tick - ticks[0]) * container.streams.video[0].time_base) for tick in ticks]


@pytest.mark.smoke
@pytest.mark.parametrize("container", ["mp4", "matroska", "avi"])
def test_tags_need_not_be_utf8(container):
    data = video_bytes(NUM, fps=FPS, container=container, codec_options={"crf": "8"}, draw=flat, title="a plain title")
    broken = data.replace(b"a plain title", b"\xc0\xff\xfe in CP1251")
    assert len(broken) == len(data) and broken != data
    media = load(broken, fps=FPS)
    assert shown(media) == list(range(NUM))
    assert np.array_equal(media.frames, load(data, fps=FPS).frames)


@pytest.mark.parametrize("movflags", ["frag_keyframe+empty_moov", "frag_every_frame+empty_moov+default_base_moof", "dash"])
def test_fragments_tell_no_duration(movflags):
    data = video_bytes(30, fps=FPS, container_options={"movflags": movflags}, codec_options={"bf": "2", "g": "10"})
    media = load(data, fps=2)
    assert media.times_s == pytest.approx([0.2, 0.7, 1.2, 1.7, 2.2, 2.7]) and media.duration_s == pytest.approx(3.0)


@pytest.mark.parametrize("container, codec", [("matroska", "libx264"), ("webm", "libvpx-vp9"), ("mpegts", "libx264"),
                                              ("h264", "libx264"), ("hevc", "libx265")])  # fmt: skip
def test_what_cannot_tell_its_duration(container, codec):
    data = video_bytes(20, fps=25, container=container, codec=codec, seekable=False)
    with av.open(io.BytesIO(data)) as file:
        assert container == "mpegts" or (file.duration is None and file.streams.video[0].duration is None)
    media = load(data, fps=5)
    assert media.duration_s == pytest.approx(0.8, abs=2e-3) and len(media.frames) == 4


@pytest.mark.parametrize("container, codec", [("mp4", "libx264"), ("mp4", "libx265"), ("matroska", "libx264"), ("mp4", "mpeg4")])
def test_rotation_with_wide_pixels(container, codec):
    data = video_bytes(2, draw=quadrants, rotation=90, container=container, codec=codec, sar=Fraction(3, 2))
    media = load(data)
    assert media.frames.shape[1:] == (96, 48, 3) and corners(media.frames[0]) == "gwrb"
