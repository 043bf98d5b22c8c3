"""Sources: paths, bytes and data URLs, what is refused with which words, limits, and the hash."""

from __future__ import annotations

import base64
import os

import numpy as np
import pytest
from PIL import Image

from sparsevila_cluster.core.config import MediaLimits
from sparsevila_cluster.core.errors import BadMedia, BadRequest, DeadlineExceeded, TooLarge
from sparsevila_cluster.core.requests import MediaSource
from sparsevila_cluster.media import frames as frames_module
from sparsevila_cluster.media import identify, open_media
from sparsevila_cluster.media import media_source as source_module
from tests.media.media_files import audio_bytes, load, load_here, picture_bytes, video_bytes


def test_path_bytes_and_data_url_are_one_media(tmp_path):
    data = video_bytes()
    path = tmp_path / "video.mp4"
    path.write_bytes(data)
    url = "data:video/mp4;base64," + base64.b64encode(data).decode()
    media = [load(source) for source in (str(path), data, url, url.rstrip("="), url.replace("data:", "DATA:"))]
    assert len({m.media_hash for m in media}) == 1
    assert all(np.array_equal(m.frames, media[0].frames) for m in media)


@pytest.mark.parametrize(
    "url, message",
    [
        ("data:video/mp4;base64,@@@@", "not base64"),
        ("data:video/mp4;base64,AAAAA", "not base64"),
        ("data:video/mp4,AAAA", "must look like"),
        ("data:video/mp4;base64", "must look like"),
        ("data:text/plain;base64,AAAA", "must be video/\\* or image/\\*"),
        ("data:;base64,AAAA", "got 'none'"),
        ("data:video/mp4;base64,", "empty"),
        ("data:", "must look like"),
    ],
)
def test_broken_data_urls(url, message):
    with pytest.raises(BadMedia, match=message):
        load(url)


@pytest.mark.parametrize(
    "url", ["https://example.org/a.mp4", "http://127.0.0.1/", "FILE:///etc/hostname", "rtsp://h/x", "s3://b/k"]
)
def test_urls_are_not_read(url):
    with pytest.raises(BadMedia, match="URLs are not read by the engine"):
        load(url)


def test_unreadable_sources(tmp_path):
    with pytest.raises(BadMedia, match="No such file"):
        load(str(tmp_path / "missing.mp4"))
    with pytest.raises(BadMedia, match="a directory"):
        load(str(tmp_path))
    with pytest.raises(BadMedia, match="no path"):
        load("a\0b")
    with pytest.raises(BadMedia):
        load("")
    with pytest.raises(BadMedia, match="got int"):
        load(7)
    with pytest.raises(BadMedia, match="kind must be"):
        load(b"x", kind="audio")
    (tmp_path / "empty.mp4").touch()
    for empty in (str(tmp_path / "empty.mp4"), b""):
        with pytest.raises(BadMedia, match="empty"):
            load(empty)
    os.mkfifo(tmp_path / "pipe")
    for special in (str(tmp_path / "pipe"), "/dev/zero"):
        with pytest.raises(BadMedia, match="regular file"):
            load(special)


@pytest.mark.parametrize(
    "data",
    [
        b"This is a text file, and no video.\n" * 100, b"\0" * 5000, bytes(range(256)) * 40, b"x",
        b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n/etc/hostname\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile /etc/hostname\n", b"v=0\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    ],
)  # fmt: skip
def test_what_is_no_video_is_refused(data):
    with pytest.raises(BadMedia, match="not a video that can be read"):
        load(data)


def test_audio_alone_is_refused():
    with pytest.raises(BadMedia, match=r"holds no video \(found: audio\)"):
        load(audio_bytes())


def test_the_kind_must_fit_the_bytes():
    picture, video = picture_bytes(Image.new("L", (2, 2))), video_bytes(2)
    with pytest.raises(BadMedia, match="sent as 'video' but is a PNG picture"):
        load(picture, kind="video")
    with pytest.raises(BadMedia, match="sent as 'image' but is not a PNG"):
        load(video, kind="image")
    with pytest.raises(BadMedia, match="sent as 'video'"):
        load("data:video/mp4;base64," + base64.b64encode(picture).decode())
    assert load(picture, kind="image").kind == "image" and load(video, kind="video").kind == "video"
    assert load("data:application/octet-stream;base64," + base64.b64encode(picture).decode()).kind == "image"


def test_limits_are_named(tmp_path, monkeypatch):
    data = video_bytes(20)
    path = tmp_path / "video.mp4"
    path.write_bytes(data)
    url = "data:video/mp4;base64," + base64.b64encode(data).decode()
    for source in (data, str(path), url):
        with pytest.raises(TooLarge, match=rf"bytes are more than max_bytes = {len(data) - 8}"):
            load(source, max_bytes=len(data) - 8)
        assert len(load(source, max_bytes=len(data)).frames) == 4
    with pytest.raises(TooLarge, match="2 s are longer than max_duration_s = 1.9"):
        load(data, max_duration_s=1.9)
    with pytest.raises(TooLarge, match="64 x 48 pixels are more than max_pixels = 3071"):
        load(data, max_pixels=3071)
    assert load(data, max_pixels=1 << 40).frames.shape[1:] == (48, 64, 3)
    monkeypatch.setattr(frames_module, "MAX_FRAMES_BYTES", 4 * 48 * 64 * 3 - 1)
    with pytest.raises(TooLarge, match="4 frames of 64 x 48 pixels are more than 36863 bytes; ask for fewer frames"):
        load_here(data)


@pytest.mark.parametrize("container, codec", [("webm", "libvpx"), ("webm", "libvpx-vp9"), ("mpegts", "libx264")])
def test_pixels_are_limited_whatever_the_codec(container, codec):
    with pytest.raises(TooLarge, match="max_pixels = 3071"):
        load(video_bytes(5, container=container, codec=codec), max_pixels=3071)


def test_the_deadline_counts_in_every_phase(monkeypatch):
    data = video_bytes(50)
    calls = []
    now_s = 0.0

    def clock() -> float:
        nonlocal now_s
        now_s += 1.0
        calls.append(now_s)
        return now_s

    monkeypatch.setattr(source_module.time, "monotonic", clock)
    load_here(data, decode_timeout_s=1e6)
    assert len(calls) > 100  # per packet of the survey, per packet and frame of the decoding
    for timeout_s in (0.5, 2, 30, 70, 100, 120):
        with pytest.raises(DeadlineExceeded, match=f"decode_timeout_s = {timeout_s:g} s"):
            load_here(data, decode_timeout_s=timeout_s)
    with pytest.raises(DeadlineExceeded):
        identify(MediaSource(data), fps=1, max_frames=1, limits=MediaLimits(decode_timeout_s=0.5))


@pytest.mark.parametrize("fps, max_frames", [(0, 4), (-1, 4), (float("nan"), 4), (241, 4), (True, 4), (1, 0), (1, 2.0)])
def test_sampling_parameters_have_a_legal_range(fps, max_frames):
    for call in (open_media, identify):
        with pytest.raises(BadRequest, match="must be"):
            call(MediaSource(video_bytes(2)), fps=fps, max_frames=max_frames, limits=MediaLimits())


def test_the_hash_comes_without_decoding_and_names_bytes_and_sampling():
    def name(data, kind="auto", fps=2.0, max_frames=8, limits=None):
        source, limits = MediaSource(data, kind), limits or MediaLimits()
        return identify(source, fps=fps, max_frames=max_frames, limits=limits)[0]

    data = video_bytes()
    base = name(data)
    assert base == load(data, max_frames=8).media_hash and len(base) == 64
    assert base == name(data, "video") == name(data, fps=2) == name(data, limits=MediaLimits(max_pixels=7))
    few = MediaLimits(max_frames=4)
    others = [name(data + b"\0"), name(data, fps=2.5), name(data, max_frames=9), name(data, max_frames=9, limits=few)]
    assert len({base, *others}) == 5
    assert name(data, max_frames=9, limits=few) == name(data, max_frames=4)
    assert len(name(b"no video at all")) == 64
    picture = picture_bytes(Image.new("L", (3, 3)))
    assert name(picture) == name(picture, fps=9.0, max_frames=1) == load(picture).media_hash
