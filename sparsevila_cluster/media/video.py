"""One video to the frames that show at its sample times.

The first pass reads packets without decoding: the duration as the video stream itself tells it, and whether the file ends early.
The second decodes: around the sample times where that is exact and worth it, else from start to end. It holds one undecided frame
at a time, and converts to RGB only what is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, BinaryIO

import av
import numpy as np

from sparsevila_cluster.core.errors import TooLarge
from sparsevila_cluster.media.container import check_lost, exact, is_end, open_video
from sparsevila_cluster.media.frame_buffer import FrameBuffer
from sparsevila_cluster.media.frame_selection import choose, sample_times
from sparsevila_cluster.media.frames import Allocate, Decoded, PixelMeter, check_pixels
from sparsevila_cluster.media.media_source import DecodeDeadline
from sparsevila_cluster.media.seeking import Run, plan_runs, take_around
from sparsevila_cluster.media.survey import Survey, survey_packets

if TYPE_CHECKING:
    from sparsevila_cluster.core.config import MediaLimits

# Field-coded video has two packets per frame; with fewer frames than that, a decoder dropped some without saying so.
MIN_FRAMES_PER_PACKET = 0.49


@dataclass(frozen=True, eq=False)
class VideoPlan:
    """What packets and headers say: the sample times f64 [n], the runs to decode (None: all of it), the size of stored frames in
    pixels and, of one pixel, width over height.
    """

    survey: Survey
    times_s: np.ndarray
    runs: list[Run] | None
    width: int
    height: int
    aspect: Fraction

    @property
    def num_decoded(self) -> int:
        """Frames that have to be decoded to have those that are wanted."""
        index = self.survey.index
        if not self.runs:
            return self.survey.num_shown if index is None else len(index)
        return sum(run.last - run.entry + 1 for run in self.runs)


def video_plan(
    file: BinaryIO, name: str, *, fps: float, max_frames: int, limits: MediaLimits, deadline: DecodeDeadline
) -> VideoPlan:
    """One pass over the packets. Raises BadMedia, TooLarge, DeadlineExceeded: as `open_media`."""
    with open_video(file, name, limits, deadline) as (container, stream):
        survey = survey_packets(container, stream, name, deadline)
        context, format_name = stream.codec_context, container.format.name
        codec, width, height = context.codec.canonical_name, context.width, context.height
        aspect = exact(stream.sample_aspect_ratio, Fraction(1))
    if survey.duration_s > limits.max_duration_s:
        raise TooLarge(f"{name}: {survey.duration_s:.6g} s are longer than max_duration_s = {limits.max_duration_s:g}")
    times_s = sample_times(survey.duration_s, fps, max_frames)
    return VideoPlan(survey, times_s, plan_runs(survey, codec, format_name, times_s), width, height, aspect)


def decode_video(
    file: BinaryIO, name: str, *, fps: float, max_frames: int, limits: MediaLimits, deadline: DecodeDeadline, allocate: Allocate,
    seek: bool = True,
) -> Decoded:  # fmt: skip
    """The frames that show at the sample times, without repetition. `seek` False: always by the full decode.

    Raises:
        BadMedia, TooLarge, DeadlineExceeded: as `open_media`.
    """
    plan = video_plan(file, name, fps=fps, max_frames=max_frames, limits=limits, deadline=deadline)
    survey, runs = plan.survey, plan.runs
    meter = PixelMeter(name, limits)
    buffer = FrameBuffer(len(plan.times_s), plan.aspect, name, limits, allocate)
    if seek and runs:
        # A fresh container each time: raw streams cannot seek back, and parsers keep state.
        with open_video(file, name, limits, deadline) as (container, stream):
            done = take_around(container, stream, survey, runs, buffer, meter, deadline)
        if done:
            return buffer.decoded(survey.duration_s)
        buffer.clear()
    with open_video(file, name, limits, deadline) as (container, stream):
        whole = _whole_frames(container, stream, survey, name, limits, meter, deadline)
        for frame, start_s in choose(_timed(whole, survey), plan.times_s):
            buffer.put(frame, start_s)
    return buffer.decoded(survey.duration_s)


def _whole_frames(
    container: av.container.InputContainer, stream: av.VideoStream, survey: Survey,
    name: str, limits: MediaLimits, meter: PixelMeter, deadline: DecodeDeadline,
) -> Iterator[av.VideoFrame]:  # fmt: skip
    """Frames that decoded without damage, in order; at the end, refuses a file that lost more than its share.

    After an error every frame up to the next key frame builds on missing data and is lost with it.
    """
    context = stream.codec_context
    num_whole, num_errors, damaged, ended = 0, 0, False, False
    for packet in container.demux(stream):
        deadline.check()
        if ended:  # PyAV would go on to streams that appeared in mid-file, which it does not know
            break
        ended = is_end(packet)
        try:
            decoded = packet.decode()
        except av.error.MemoryError:
            raise
        except av.error.FFmpegError as error:
            check_pixels(context.width, context.height, name, limits)
            if isinstance(error, av.error.ArgumentError) and context.width == 0:
                # FFmpeg refused the size and forgot it.
                raise TooLarge(f"{name}: a frame's pixels are not in [1, max_pixels = {limits.max_pixels}]") from error
            num_errors, damaged = num_errors + 1, True
            continue
        for frame in decoded:
            deadline.check()
            meter.add(frame.width, frame.height)
            damaged = frame.is_corrupt or (damaged and not frame.key_frame)
            num_errors += frame.is_corrupt
            if not damaged:
                num_whole += 1
                yield frame
    if num_errors:
        check_lost(survey.num_shown - num_whole, survey.num_shown, "damaged frames", name)
    elif num_whole < MIN_FRAMES_PER_PACKET * survey.num_shown:
        check_lost(survey.num_shown - num_whole, survey.num_shown, "frames that do not decode", name)


def _timed(frames: Iterable[av.VideoFrame], survey: Survey) -> Iterator[tuple[av.VideoFrame, float]]:
    """Each frame with its start in seconds after the first, ascending; a frame that goes back in time never shows."""
    last_s = -1.0
    for index, frame in enumerate(frames):
        if survey.frame_s is not None:
            start_s = float(index * survey.frame_s)
        elif frame.pts is None:
            continue
        else:
            start_s = survey.start_s(frame.pts)
        if start_s > last_s:
            last_s = start_s
            yield frame, start_s
