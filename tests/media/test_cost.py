"""What a source costs is known before it is decoded, and is what it then costs; headers that promise less are found out."""

import io

import numpy as np
import pytest
from PIL import Image

from sparsevila_cluster.core.config import MediaLimits
from sparsevila_cluster.core.errors import BadMedia, TooLarge
from sparsevila_cluster.core.requests import MediaSource
from sparsevila_cluster.media import MediaCost, check_cost, decoding, measure_media, open_media, video
from sparsevila_cluster.media.media_source import DecodeDeadline, open_source
from tests.media.clips import write_clip
from tests.media.media_files import sandbox


def picture(format, size=(40, 30), num=1):
    file, rng = io.BytesIO(), np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(num)]
    frames[0].save(file, format, **({"save_all": True, "append_images": frames[1:], "duration": 100} if num > 1 else {}))
    return file.getvalue()


def both(data, fps=2.0, max_frames=16, **limits):
    """(what measuring says, the frames that decoding gives)."""
    options = {"fps": fps, "max_frames": max_frames, "limits": MediaLimits(**limits), "sandbox": sandbox()}
    return measure_media(MediaSource(data), **options), open_media(MediaSource(data), **options).frames


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_a_picture_costs_its_pixels(format):
    cost, frames = both(picture(format))
    assert cost == MediaCost(40 * 30, 40 * 30) and frames.shape == (1, 30, 40, 3)


def test_an_animation_costs_all_frames_up_to_the_last_one_that_is_wanted():
    cost, frames = both(picture("WEBP", num=10), max_frames=2)
    assert len(frames) == 2 and cost == MediaCost(8 * 40 * 30, 2 * 40 * 30)


def test_a_video_costs_what_is_decoded_of_it(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "clip.mp4", seed=0, frames=40, size=64)
    with open_source(MediaSource(str(path)), MediaLimits()) as blob:
        counted = []
        plain = video.PixelMeter.add
        monkeypatch.setattr(video.PixelMeter, "add", lambda self, *size: counted.append(size) or plain(self, *size))
        options = {"fps": 2.0, "max_frames": 4, "limits": MediaLimits(), "deadline": DecodeDeadline("clip", 60.0)}
        cost = decoding.measure(blob.file, "clip", "video", **options)
        assert not counted
        done = decoding.decode(blob.file, "clip", "video", **options)
    assert cost.decoded == sum(width * height for width, height in counted) > 0
    assert cost.sampled == done.frames[..., 0].size and cost.pixels == cost.decoded + 8 * cost.sampled


def test_more_than_headers_promise_is_refused_while_it_is_decoded(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", seed=0, frames=40, size=64)
    cost, frames = both(str(path))
    most = cost.decoded // 2
    with pytest.raises(TooLarge, match=f"more pixels are decoded than max_decoded_pixels = {most}"):
        open_media(MediaSource(str(path)), fps=2.0, max_frames=16, limits=MediaLimits(max_decoded_pixels=most), sandbox=sandbox())
    few = frames[..., 0].size - 1
    with pytest.raises(TooLarge, match=f"more than max_sampled_pixels = {few}"):
        open_media(MediaSource(str(path)), fps=2.0, max_frames=16, limits=MediaLimits(max_sampled_pixels=few), sandbox=sandbox())


def test_what_cannot_be_read_is_refused_when_it_is_measured():
    with pytest.raises(BadMedia):
        both(b"no media")
    with pytest.raises(TooLarge, match="max_pixels = 1000"):
        both(picture("PNG"), max_pixels=1000)


def test_all_sources_of_a_request_are_counted_together():
    limits = MediaLimits(max_decoded_pixels=100, max_sampled_pixels=50)
    check_cost(MediaCost(100, 50), 2, limits)
    with pytest.raises(TooLarge, match="2 sources have 101 pixels in all decoded frames; .* max_decoded_pixels = 100"):
        check_cost(MediaCost(101, 50), 2, limits)
    with pytest.raises(TooLarge, match="2 sources have 51 pixels in all sampled frames; .* max_sampled_pixels = 50"):
        check_cost(MediaCost(100, 51), 2, limits)
