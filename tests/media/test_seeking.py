"""Sampling by seeking gives exactly the frames of the full decode, where it is worth it and only where it can be trusted."""

from __future__ import annotations

import io
import random
from fractions import Fraction

import av
import numpy as np
import pytest

from sparsevila_cluster.core.config import MediaLimits
from sparsevila_cluster.core.errors import BadMedia
from sparsevila_cluster.media import seeking, video
from sparsevila_cluster.media.container import open_video
from sparsevila_cluster.media.frame_selection import choose, pick, sample_times
from sparsevila_cluster.media.frames import Decoded, on_heap
from sparsevila_cluster.media.media_source import DecodeDeadline
from sparsevila_cluster.media.survey import ENTRY, Survey, survey_packets
from tests.media.media_files import can_encode, indices, load, load_here, texture, video_bytes

LIMITS = MediaLimits()
X265 = "log-level=none:bframes=3:keyint="


def sample(data: bytes, fps: float, max_frames: int, seek: bool) -> Decoded:
    """In this process, so that a test can look inside."""
    return video.decode_video(
        io.BytesIO(data), "video", fps=fps, max_frames=max_frames, limits=LIMITS, deadline=DecodeDeadline("video", 60.0),
        allocate=on_heap, seek=seek,
    )  # fmt: skip


@pytest.fixture
def seeks(monkeypatch) -> list[bool]:
    """Whether each attempt to seek came to an end; every video is tried, whatever it costs."""
    outcomes: list[bool] = []
    real = video.take_around

    def take_around(*args):
        outcomes.append(real(*args))
        return outcomes[-1]

    monkeypatch.setattr(video, "take_around", take_around)
    monkeypatch.setattr(seeking, "MIN_SAVED", -(10**9))
    monkeypatch.setattr(seeking, "MAX_COST_SHARE", 1e9)
    return outcomes


def assert_same(data: bytes, rng: random.Random, num_draws: int) -> None:
    for _ in range(num_draws):
        fps, max_frames = rng.choice((0.3, 1.0, 2.5, 7.3, 60.0)), rng.choice((1, 2, 3, 7, 12, 200))
        slow, fast = sample(data, fps, max_frames, False), sample(data, fps, max_frames, True)
        assert np.array_equal(slow.frames, fast.frames), (fps, max_frames)
        assert slow.times_s.tolist() == fast.times_s.tolist() and slow.duration_s == fast.duration_s


ALT_REF = {"auto-alt-ref": "1", "lag-in-frames": "9", "cpu-used": "5"}
CASES = [
    ("mp4", "libx264", {"bf": "3"}), ("matroska", "libx264", {"bf": "3"}), ("mpegts", "libx264", {"bf": "2"}),
    ("flv", "libx264", {}), ("mp4", "libx264", {"x264-params": "open-gop=1:scenecut=0"}),
    ("mp4", "libx264", {"x264-params": "intra-refresh=1"}), ("mpegts", "libx264", {"x264-params": "intra-refresh=1"}),
    ("mp4", "libx265", {"x265-params": X265}), ("mpegts", "libx265", {"x265-params": X265}),
    ("mov", "libx265", {"x265-params": "open-gop=0:" + X265}), ("webm", "libvpx", ALT_REF), ("webm", "libvpx-vp9", ALT_REF),
    ("mp4", "libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}), ("mp4", "libsvtav1", {}), ("webm", "libsvtav1", {}),
    ("mp4", "mpeg4", {"bf": "2"}), ("matroska", "mpeg4", {}), ("mpegts", "mpeg2video", {"bf": "2"}), ("mp4", "mjpeg", {}),
    ("mov", "prores_ks", {}),
]  # fmt: skip
PIX_FMT = {"mjpeg": "yuvj420p", "prores_ks": "yuv422p10le"}


@pytest.mark.parametrize("number, container, codec, options", [(i, *case) for i, case in enumerate(CASES)])
def test_seeking_gives_the_frames_of_the_full_decode(number, container, codec, options, seeks, monkeypatch):
    if not can_encode(codec):
        pytest.skip(f"no encoder {codec}")
    rng = random.Random(number)
    monkeypatch.setattr(seeking, "SEEK_COST", rng.choice((0, 8)))
    monkeypatch.setattr(seeking, "DELAY_COST", rng.choice((0, 8)))
    for gop in (rng.randint(2, 9), rng.randint(10, 40)):
        gop_options = {"x265-params": options["x265-params"] + str(gop)} if "x265-params" in options else {"g": str(gop)}
        data = video_bytes(
            rng.randint(50, 90), fps=25, container=container, codec=codec, draw=texture, codec_options=options | gop_options,
            pix_fmt=PIX_FMT.get(codec, "yuv420p"),
        )  # fmt: skip
        assert_same(data, rng, 4)
    assert seeks == [True] * 8


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts"])
@pytest.mark.parametrize("start_ms", [0, 7_000])
def test_variable_rate_and_late_starts(container, start_ms, seeks):
    rng = random.Random(start_ms)
    steps = [rng.choice((17, 33, 40, 40, 41, 200, 1500)) for _ in range(70)]
    pts = [start_ms + sum(steps[:i]) for i in range(70)]
    data = video_bytes(70, pts=pts, container=container, codec_options={"bf": "2", "g": "6"}, draw=texture)
    assert_same(data, rng, 8)
    assert seeks == [True] * 8


def shifted(data: bytes, by_s: float) -> bytes:
    """The same packets, but the film starts `by_s` later: an edit list hides what comes before."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(
        buffer, "w", format="mp4", options={"avoid_negative_ts": "disabled", "use_editlist": "1"}
    ) as out:  # fmt: skip
        stream = source.streams.video[0]
        copy = out.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is not None:
                back = round(by_s / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - back, packet.dts - back, copy
                out.mux(packet)
    return buffer.getvalue()


def test_edit_lists(seeks):
    data = shifted(video_bytes(80, fps=25, draw=texture, codec_options={"bf": "2", "g": "9"}), 0.52)
    with av.open(io.BytesIO(data)) as container:
        hidden = [packet.is_discard for packet in container.demux(video=0) if packet.size]
    assert sum(hidden) >= 4 and hidden[0]  # packets that are decoded, and never shown
    assert_same(data, random.Random(0), 8)
    assert seeks == [True] * 8


def test_a_film_may_be_cut_to_its_last_tenth():
    data = shifted(video_bytes(40, fps=25, codec_options={"g": "40", "bf": "0"}), 1.44)
    media = load(data, fps=25)
    assert indices(media) == [36, 37, 38, 39] and media.times_s == pytest.approx([0.0, 0.04, 0.08, 0.12])


@pytest.mark.parametrize("container, codec", [("avi", "mpeg4"), ("h264", "libx264"), ("mpeg", "mpeg2video"), ("gif", "gif")])
def test_what_has_no_trustworthy_index_is_decoded_as_a_whole(container, codec, seeks):
    pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
    data = video_bytes(60, fps=25, container=container, codec=codec, draw=texture, pix_fmt=pix_fmt)
    assert_same(data, random.Random(0), 2)
    assert seeks == []


# ---- planning ------------------------------------------------------------------------------------------------------------------


def surveyed(data: bytes) -> tuple[Survey, str, str]:
    with open_video(io.BytesIO(data), "video", LIMITS, DecodeDeadline("video", 60.0)) as (container, stream):
        survey = survey_packets(container, stream, "video", DecodeDeadline("video", 60.0))
        return survey, stream.codec_context.codec.canonical_name, container.format.name


def test_seeking_is_for_where_it_saves(monkeypatch):
    long = surveyed(video_bytes(900, fps=25, draw=texture, codec_options={"g": "10", "preset": "ultrafast"}))
    runs = seeking.plan_runs(*long, sample_times(36.0, 2.0, 8))
    assert len(runs) == 8 and sum(run.last - run.entry for run in runs) < 8 * 10
    assert seeking.plan_runs(*long, sample_times(36.0, 2.0, 64)) is None  # every third frame is decoded anyway
    short = surveyed(video_bytes(200, fps=25, draw=texture, codec_options={"g": "10", "preset": "ultrafast"}))
    assert seeking.plan_runs(*short, sample_times(8.0, 2.0, 1)) is None  # costs nothing, and shows all damage
    one_key = {"g": "900", "preset": "ultrafast", "sc_threshold": "0"}
    few_keys = surveyed(video_bytes(900, fps=25, draw=texture, codec_options=one_key))
    assert seeking.plan_runs(*few_keys, sample_times(36.0, 2.0, 8)) is None


def test_key_frames_that_need_the_past_are_no_entries():
    for container in ("mp4", "mpegts", "matroska"):
        # What a parser or a muxer calls a key frame here is a place where the picture starts to be refreshed, line by line.
        data = video_bytes(60, container=container, draw=texture, codec_options={"x264-params": "intra-refresh=1:keyint=10"})
        index = surveyed(data)[0].index
        assert [row for row, flags in enumerate(index.flags) if flags & ENTRY] == [0]
    open_gop = {"x265-params": X265 + "12:open-gop=1:scenecut=0"}
    survey, codec, _ = surveyed(video_bytes(60, codec="libx265", draw=texture, codec_options=open_gop))
    pts, flags = (np.frombuffer(column, kind) for column, kind in ((survey.index.pts, np.int64), (survey.index.flags, np.uint8)))
    assert len(seeking._entries(pts, flags, codec)) > len(seeking._entries(pts, flags, "h264")) >= 1


def test_picking_is_choosing():
    rng = np.random.default_rng(0)
    for _ in range(300):
        ticks = np.sort(rng.choice(400, rng.integers(1, 40), replace=False))
        ticks -= ticks[0] * rng.integers(0, 2)
        times_s = sample_times(float(rng.uniform(0, 12)), float(rng.choice([0.5, 1, 10, 33.3])), int(rng.integers(1, 50)))

        def start_s(tick) -> float:
            return float(int(tick) * Fraction(1, 30))

        chosen = [tick for tick, _ in choose([(tick, start_s(tick)) for tick in ticks], times_s)]
        assert [ticks[i] for i in pick(ticks, times_s, start_s)] == chosen


# ---- damage --------------------------------------------------------------------------------------------------------------------


def places(data: bytes) -> list[tuple[int, int]]:
    """(position, size) of every packet in the file."""
    with av.open(io.BytesIO(data)) as container:
        return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]


def spoiled(data: bytes, rows: list[int]) -> bytes:
    """Zeros in the middle of packets."""
    broken, where = bytearray(data), places(data)
    for row in rows:
        position, size = where[row]
        broken[position + size // 3 : position + size] = bytes(size - size // 3)
    return bytes(broken)


def test_damage_counts_where_frames_are_taken():
    data = video_bytes(800, fps=25, draw=texture, codec_options={"g": "10", "preset": "ultrafast", "bf": "0"})
    whole = load(data, max_frames=4)
    assert indices_of(whole.times_s) == [100, 300, 500, 700]
    # Nobody looks at frames 405 to 409.
    aside = load(spoiled(data, [405]), max_frames=4)
    assert np.array_equal(aside.frames, whole.frames) and aside.times_s.tolist() == whole.times_s.tolist()
    # Frame 300 is the first of its group; 5 of 800 frames are lost, not it.
    near = load(spoiled(data, [305]), max_frames=4)
    assert np.array_equal(near.frames, whole.frames)
    # Frame 700 itself: the full decode takes the last whole frame before it, and bears with 10 of 800.
    hit = load(spoiled(data, [700]), max_frames=4)
    assert indices_of(hit.times_s) == [100, 300, 500, 699] and np.array_equal(hit.frames[:3], whole.frames[:3])
    # The full decode counts all there is: 30 of 800 are too many, wherever they are, once one of them was met.
    with pytest.raises(BadMedia, match="30 of 800 damaged frames; at most 2%"):
        load(spoiled(data, [200, 400, 700]), max_frames=4)


def indices_of(times_s: np.ndarray) -> list[int]:
    return [round(time_s * 25) for time_s in times_s.tolist()]


def test_a_file_that_is_not_as_surveyed_is_decoded_as_a_whole(seeks, monkeypatch):
    data = video_bytes(80, fps=25, draw=texture, codec_options={"g": "10"})
    want = sample(data, 2.0, 5, False)
    real = video.survey_packets

    def survey_packets(*args):
        survey = real(*args)
        survey.index.size[42] += 1
        return survey

    monkeypatch.setattr(video, "survey_packets", survey_packets)
    got = sample(data, 2.0, 5, True)
    assert seeks == [False] and np.array_equal(got.frames, want.frames) and got.times_s.tolist() == want.times_s.tolist()


def test_a_cut_long_file_is_refused():
    for container in ("mp4", "matroska"):
        data = video_bytes(800, fps=25, container=container, draw=texture, codec_options={"g": "10", "preset": "ultrafast"})
        assert len(load_here(data, max_frames=2).frames) == 2
        with pytest.raises(BadMedia):
            load_here(data[: int(len(data) * 0.9)], max_frames=2)
