"""Videos: which frames are chosen, and how they look."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import pytest

from sparsevila_cluster.core.config import MediaLimits
from sparsevila_cluster.core.errors import TooLarge
from sparsevila_cluster.core.requests import MediaSource
from sparsevila_cluster.media import open_media, sample_times
from tests.media.media_files import corners, indices, load, quadrants, video_bytes


def test_sample_times_are_midpoints_of_equal_intervals():
    assert sample_times(4.0, 1.0, 64).tolist() == [0.5, 1.5, 2.5, 3.5]
    assert sample_times(4.0, 10.0, 2).tolist() == [1.0, 3.0]
    assert sample_times(0.01, 1.0, 64).tolist() == [0.005]
    assert sample_times(0.0, 1.0, 64).tolist() == [0.0]
    assert sample_times(10.0, 2.0, 64).dtype == np.float64


@pytest.mark.smoke
@pytest.mark.parametrize(
    "container, codec",
    [
        ("mp4", "libx264"), ("mp4", "mpeg4"), ("matroska", "libx264"), ("webm", "libvpx"), ("webm", "libvpx-vp9"),
        ("mpegts", "libx264"), ("avi", "libx264"), ("avi", "mjpeg"), ("h264", "libx264"), ("mov", "libx265"),
        ("mp4", "libsvtav1"), ("mpeg", "mpeg2video"), ("flv", "libx264"),
    ],
)  # fmt: skip
def test_selected_frames_are_exact(container, codec):
    data = video_bytes(
        50, fps=25, container=container, codec=codec,
        pix_fmt="yuvj420p" if codec == "mjpeg" else "yuv420p",
    )  # fmt: skip
    media = load(data, fps=2.5, max_frames=64)
    assert media.kind == "video" and media.frames.dtype == np.uint8 and media.frames.shape == (5, 48, 64, 3)
    assert media.duration_s == pytest.approx(2.0, abs=0.045)
    want = [int((i + 0.5) * 10 + 1e-6) for i in range(5)]
    assert indices(media) == want
    assert media.times_s == pytest.approx([i / 25 for i in want], abs=2e-3)
    assert media.times_s.dtype == np.float64


@pytest.mark.parametrize("num_wanted", [1, 2, 3, 7, 12, 49, 50])
def test_every_count_of_frames_is_exact(num_wanted):
    media = load(video_bytes(50, fps=10, codec_options={"bf": "3"}), fps=100, max_frames=num_wanted)
    assert indices(media) == [int((i + 0.5) * 50 / num_wanted + 1e-9) for i in range(num_wanted)]


def test_b_frames_come_in_presentation_order():
    data = video_bytes(30, codec_options={"bf": "3", "b_strategy": "0"})
    with av.open(io.BytesIO(data)) as container:
        packets = [p.pts for p in container.demux(video=0) if p.pts is not None]
    assert packets != sorted(packets)
    assert indices(load(data, fps=10)) == list(range(30))


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_variable_frame_rate_goes_by_time(container):
    # Frame 1 shows from 0.1 to 2 s; 8 samples of 0.5 s each, at 0.25, 0.75, ...; the last frame ends at 4 s.
    pts = [0, 100, 2000, 2100, 2200, 3000, 3900]
    media = load(video_bytes(7, pts=pts, container=container, codec_options={"bf": "0"}), fps=2)
    assert media.duration_s == pytest.approx(4.0, abs=0.11)
    assert indices(media) == [1, 4, 5]
    assert media.times_s == pytest.approx([0.1, 2.2, 3.0], abs=2e-3)


def test_time_counts_from_the_first_frame():
    media = load(video_bytes(10, pts=[5000 + 100 * i for i in range(10)], container="mpegts"), fps=10)
    assert media.times_s[0] == 0 and media.duration_s == pytest.approx(1.0, abs=1e-3)
    assert indices(media) == list(range(10))


def test_no_frame_comes_twice():
    media = load(video_bytes(3, fps=1), fps=30, max_frames=64)
    assert indices(media) == [0, 1, 2] and media.times_s.tolist() == [0.0, 1.0, 2.0]


def test_one_frame_and_odd_sizes():
    media = load(video_bytes(1), fps=0.001)
    assert media.frames.shape == (1, 48, 64, 3) and media.times_s.tolist() == [0.0]
    assert load(video_bytes(2, size=(2, 2))).frames.shape[1:] == (2, 2, 3)
    assert load(video_bytes(2, size=(35, 17), pix_fmt="yuv444p")).frames.shape[1:] == (17, 35, 3)


def test_duration_without_a_header():
    data = video_bytes(20, container="matroska", seekable=False)
    with av.open(io.BytesIO(data)) as container:
        assert container.duration is None and container.streams.video[0].duration is None
    media = load(data, fps=5)
    assert media.duration_s == pytest.approx(2.0, abs=1e-3) and len(media.frames) == 10


def test_the_limit_caps_the_frames():
    media = open_media(MediaSource(video_bytes(20)), fps=10, max_frames=50, limits=MediaLimits(max_frames=4))
    assert len(media.frames) == 4


@pytest.mark.parametrize("rotation, want", [(0, "rgbw"), (90, "gwrb"), (-90, "brwg"), (180, "wbgr")])
def test_rotation_metadata_is_honoured(rotation, want):
    data = video_bytes(2, draw=quadrants, rotation=rotation, pix_fmt="yuv444p")
    with av.open(io.BytesIO(data)) as container:
        assert abs(next(container.decode(video=0)).rotation) == abs(rotation)
    media = load(data)
    assert media.frames.shape[1:] == ((64, 48, 3) if abs(rotation) == 90 else (48, 64, 3))
    assert corners(media.frames[0]) == want  # a positive angle turns counter-clockwise


def test_pixel_shape_widens_the_picture():
    media = load(video_bytes(2, draw=quadrants, sar=Fraction(3, 2)))
    assert media.frames.shape[1:] == (48, 96, 3) and corners(media.frames[0]) == "rgbw"
    assert load(video_bytes(2, sar=Fraction(3, 2), rotation=90)).frames.shape[1:] == (96, 48, 3)


def test_ten_bits_become_eight():
    media = load(video_bytes(5, codec="libx265", pix_fmt="yuv420p10le"))
    assert media.frames.dtype == np.uint8 and indices(media) == [2]


def test_colours_survive():
    def red(index: int) -> np.ndarray:
        return np.full((48, 64, 3), (200, 40, 30), np.uint8)

    assert np.abs(load(video_bytes(2, draw=red)).frames[0].astype(int) - (200, 40, 30)).max() <= 4


def test_a_size_that_changes_is_scaled_to_the_first():
    data = video_bytes(10, container="h264") + video_bytes(10, container="h264", size=(128, 96))
    media = load(data, fps=5)
    assert media.frames.shape[1:] == (48, 64, 3) and len(media.frames) == 10
    with pytest.raises(TooLarge, match=r"128 x 96 .* max_pixels = 4000"):
        load(data, fps=5, max_pixels=4000)
