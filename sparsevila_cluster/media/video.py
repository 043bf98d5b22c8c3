"""One video to the frames that show at its sample times.

Knows: containers, codecs, timestamps, rotation and pixel shape, and which files are too broken to be trusted.
Does not know: where the bytes came from, or any model.

Two passes over the same open file. `_survey` reads packets without decoding: the duration as the video stream itself
tells it (headers lie, count the audio, or say nothing), and whether the file ends early. `_decode` then decodes from
start to end, holds one undecided frame at a time, and converts to RGB only what is kept. Seeking can replace the second
pass: the survey sees every timestamp and key frame, and `_choose` needs only frames in order.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import BinaryIO

import av
import numpy as np

from sparsevila_cluster.config import MediaLimits
from sparsevila_cluster.errors import BadMedia, DeadlineExceeded, SparseVilaError, TooLarge
from sparsevila_cluster.media.source import Deadline

# Containers that hold their own bytes. Playlists and lists of files (HLS, DASH, concat, SDP) would make FFmpeg open
# whatever path or address a stranger wrote into them, so they are not on the list, and no protocol is allowed either.
# The audio formats are here only for a better message.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,h264,hevc,av1,obu,ivf,m4v,mxf,nut,dv,"
    "mp3,wav,flac,aac"
)
# A file may lose this share of its packets or frames (a capture that stops in mid-frame) before it is refused.
MAX_LOST_SHARE = 0.02
# Field-coded video has two packets per frame; with fewer frames than that, a decoder dropped some without saying so.
MIN_FRAMES_PER_PACKET = 0.49
# All kept frames live in memory at once: 512 frames of 1920 x 1080 are 3 GiB.
MAX_FRAMES_BYTES = 8 << 30
MAX_THREADS = 8  # each decoder thread holds a frame of its own
# Decoders that may work on several frames at once. FFmpeg's HEVC decoder is not one of them: on broken streams its threads
# wait for each other for ever (seen within seconds of fuzzing), where no deadline can be checked. Others split one frame.
FRAME_THREADS = frozenset({"h264"})
# Timestamps are ticks turned into float seconds; a frame that starts within a nanosecond of a sample time has started.
TOLERANCE_S = 1e-9


def sample_times(duration_s: float, fps: float, max_frames: int) -> np.ndarray:
    """Midpoints of n equal intervals over the duration: f64 [n], in seconds.

    n = round(duration_s * fps), clamped to [1, max_frames].
    """
    num = int(min(max(round(duration_s * fps), 1), max_frames))
    return (np.arange(num) + 0.5) * (duration_s / num)


def decode_video(
    file: BinaryIO, name: str, *, fps: float, max_frames: int, limits: MediaLimits, deadline: Deadline
) -> tuple[np.ndarray, np.ndarray, float]:
    """The frames that show at the sample times, without repetition.

    Returns:
        frames u8 [F, H, W, 3] RGB upright; times_s f64 [F], each frame's own start; the duration in seconds.

    Raises:
        BadMedia, TooLarge, DeadlineExceeded: as `open_media`.
    """
    with _typed_errors(name, limits), _open(file, name, limits, deadline) as (container, stream):
        survey = _survey(container, stream, name, deadline)
    if survey.duration_s > limits.max_duration_s:
        raise TooLarge(f"{name}: {survey.duration_s:.6g} s are longer than max_duration_s = {limits.max_duration_s:g}")
    times_s = sample_times(survey.duration_s, fps, max_frames)
    # A fresh container: raw streams cannot seek back, and parsers keep state.
    with _typed_errors(name, limits), _open(file, name, limits, deadline) as (container, stream):
        shown = _decode(container, stream, survey, times_s, name, limits, deadline)
    return *shown, survey.duration_s


@contextmanager
def _open(
    file: BinaryIO, name: str, limits: MediaLimits, deadline: Deadline
) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The container and its first video stream, closed at the end of the block. PyAV logs nothing unless told to."""
    deadline.check()
    file.seek(0)
    options = {
        "format_whitelist": CONTAINERS,
        "protocol_whitelist": "none",
        # The decoder's own guard, before it allocates a frame; the option is an int of 32 bits.
        "max_pixels": str(min(limits.max_pixels, 2**31 - 1)),
        "err_detect": "explode",  # report damage instead of painting over it
    }
    with av.open(file, options=options, metadata_errors="replace", timeout=deadline.left_s()) as container:
        # Attached pictures are the cover art of an audio file.
        videos = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not videos:
            kinds = ", ".join(sorted({s.type for s in container.streams if s.type})) or "no stream"
            raise BadMedia(f"{name} holds no video (found: {kinds})")
        stream = videos[0]
        context = stream.codec_context
        if context is None:
            raise BadMedia(f"{name}: no decoder for its video codec")
        _check_pixels(context.width, context.height, name, limits)
        context.options = {key: options[key] for key in ("max_pixels", "err_detect")}
        context.thread_type = "AUTO" if context.codec.canonical_name in FRAME_THREADS else "SLICE"
        context.thread_count = min(MAX_THREADS, os.cpu_count() or 1)
        yield container, stream


@contextmanager
def _typed_errors(name: str, limits: MediaLimits) -> Iterator[None]:
    """Whatever FFmpeg and PyAV raise about hostile bytes, as one of ours."""
    try:
        yield
    except SparseVilaError:
        raise
    except av.error.ExitError as error:  # the interrupt callback of `timeout`
        raise DeadlineExceeded(f"{name}: not opened within decode_timeout_s = {limits.decode_timeout_s:g} s") from error
    except MemoryError as error:
        raise TooLarge(f"{name} does not fit into memory") from error
    except (av.error.FFmpegError, ValueError, LookupError, ArithmeticError, EOFError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BadMedia(f"{name} is not a video that can be read: {reason[:1].lower()}{reason[1:]}") from error


@dataclass(frozen=True)
class _Survey:
    """What the packets say. `frame_s` is set where timestamps are missing or unusable: frames are then counted."""

    num_packets: int
    origin_s: Fraction
    duration_s: float
    frame_s: Fraction | None


def _survey(container: av.container.InputContainer, stream: av.VideoStream, name: str, deadline: Deadline) -> _Survey:
    is_mkv = "matroska" in container.format.name
    declared = len(stream.index_entries) if "mp4" in container.format.name else 0
    num, num_bad, num_untimed, end_s = 0, 0, 0, Fraction(0)
    first, last, tail = None, None, 0  # ticks: first and last start, and how long the last one shows
    # Matroska tells how long the longest stream is, not how many frames there are: only then the others are read too.
    for packet in container.demux() if is_mkv else container.demux(stream):
        deadline.check()
        if _is_end(packet):
            if is_mkv:
                continue
            break
        if packet.pts is not None and packet.time_base:
            end_s = max(end_s, (packet.pts + (packet.duration or 0)) * packet.time_base)
        if packet.stream_index != stream.index:
            continue
        num += 1
        num_bad += packet.is_corrupt
        if packet.is_discard:  # cut away by an edit list: decoded, never shown
            continue
        if packet.pts is None:
            num_untimed += 1
            continue
        first = packet.pts if first is None else min(first, packet.pts)
        if last is None or packet.pts >= last:
            last, tail = packet.pts, packet.duration or 0
    if num == 0:
        raise BadMedia(f"{name} holds a video stream of 0 frames; at least 1 is needed")
    _check_lost(num_bad, num, "broken packets", name)
    _check_lost(declared - num, declared, "missing packets (the file ends early)", name)
    if is_mkv and container.duration and (header_s := container.duration / av.time_base):
        if float(end_s) < header_s * (1 - MAX_LOST_SHARE) - 0.5:
            raise BadMedia(f"{name} ends early: {float(end_s):.3f} s of the {header_s:.3f} s that its header declares")
    rate = stream.guessed_rate or stream.average_rate or Fraction(25)
    # AVI counts frames and has no order of presentation; what FFmpeg makes up for B-frames is wrong.
    if first is None or num_untimed or container.format.name == "avi":
        return _Survey(num, Fraction(0), float(num / rate), 1 / rate)
    length_s = (last - first) * stream.time_base + (tail * stream.time_base or 1 / rate)
    return _Survey(num, first * stream.time_base, float(length_s), None)


def _decode(
    container: av.container.InputContainer, stream: av.VideoStream, survey: _Survey,
    times_s: np.ndarray, name: str, limits: MediaLimits, deadline: Deadline,
) -> tuple[np.ndarray, np.ndarray]:
    frames, starts_s = None, []
    timed = _timed(_whole_frames(container, stream, survey, name, limits, deadline), survey)
    for frame, start_s in _choose(timed, times_s):
        if frames is None:
            # Pixels may be wider than high. Later frames of another size are scaled to the first one's.
            width = max(1, round(frame.width * (stream.sample_aspect_ratio or 1)))
            height = frame.height
            _check_pixels(width, height, name, limits)
            if len(times_s) * width * height * 3 > MAX_FRAMES_BYTES:
                asked = f"{len(times_s)} frames of {width} x {height} pixels"
                raise TooLarge(f"{name}: {asked} are more than {MAX_FRAMES_BYTES} bytes; ask for fewer frames")
        picture = _upright(frame.reformat(width, height, "rgb24").to_ndarray(), _orientation(frame))
        if frames is None:
            frames = np.empty((len(times_s), *picture.shape), np.uint8)  # pages that stay unused cost nothing
        elif picture.shape != frames.shape[1:]:
            raise BadMedia(f"{name} turns its picture in mid-stream")
        frames[len(starts_s)] = picture
        starts_s.append(start_s)
    if frames is None:
        raise BadMedia(f"{name} decodes to 0 frames; at least 1 is needed")
    return frames[: len(starts_s)], np.array(starts_s)


def _whole_frames(
    container: av.container.InputContainer, stream: av.VideoStream, survey: _Survey,
    name: str, limits: MediaLimits, deadline: Deadline,
) -> Iterator[av.VideoFrame]:
    """Frames that decoded without damage, in order; at the end, refuses a file that lost more than its share.

    After an error every frame up to the next key frame builds on missing data and is lost with it.
    """
    context = stream.codec_context
    num_whole, num_errors, damaged, ended = 0, 0, False, False
    for packet in container.demux(stream):
        deadline.check()
        if ended:  # PyAV would go on to streams that appeared in mid-file, which it does not know
            break
        ended = _is_end(packet)
        try:
            decoded = packet.decode()
        except av.error.MemoryError:
            raise
        except av.error.FFmpegError as error:
            _check_pixels(context.width, context.height, name, limits)
            if isinstance(error, av.error.ArgumentError) and context.width == 0:
                # FFmpeg's guard refused the size and forgot it.
                raise TooLarge(f"{name}: a frame's pixels are not in [1, max_pixels = {limits.max_pixels}]") from error
            num_errors, damaged = num_errors + 1, True
            continue
        for frame in decoded:
            deadline.check()
            _check_pixels(frame.width, frame.height, name, limits)
            damaged = frame.is_corrupt or (damaged and not frame.key_frame)
            num_errors += frame.is_corrupt
            if not damaged:
                num_whole += 1
                yield frame
    if num_errors:
        _check_lost(survey.num_packets - num_whole, survey.num_packets, "damaged frames", name)
    elif num_whole < MIN_FRAMES_PER_PACKET * survey.num_packets:
        _check_lost(survey.num_packets - num_whole, survey.num_packets, "frames that do not decode", name)


def _timed(frames: Iterable[av.VideoFrame], survey: _Survey) -> Iterator[tuple[av.VideoFrame, float]]:
    """Each frame with its start in seconds after the first, ascending; a frame that goes back in time never shows."""
    last_s = -1.0
    for index, frame in enumerate(frames):
        if survey.frame_s is not None:
            start_s = float(index * survey.frame_s)
        elif frame.pts is None:
            continue
        else:
            start_s = max(0.0, float(frame.pts * frame.time_base - survey.origin_s))
        if start_s > last_s:
            last_s = start_s
            yield frame, start_s


def _choose(timed: Iterable[tuple[av.VideoFrame, float]], times_s: np.ndarray) -> Iterator[tuple[av.VideoFrame, float]]:
    """For each sample time the last frame that has started by then (or else the first frame), each frame once."""
    held, index = None, 0
    for frame, start_s in timed:
        started = int(np.searchsorted(times_s, start_s - TOLERANCE_S))  # times_s[:started] come before `frame`
        if held is not None and started > index:
            yield held
        index = max(index, started) if held is not None else index
        held = frame, start_s
    if held is not None and index < len(times_s):
        yield held


def _is_end(packet: av.Packet) -> bool:
    """Whether this is the empty packet that PyAV appends to each stream to flush its decoder."""
    return packet.size == 0 and packet.pts is None and packet.dts is None


def _orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """(transpose, flip vertically, flip horizontally), in this order, that the display matrix asks for.

    The matrix maps a stored pixel (x, y) to (a x + c y, b x + d y); turns are rounded to multiples of 90 degrees.
    """
    side = frame.side_data.get("DISPLAYMATRIX")
    if side is None:
        return False, False, False
    a, b, _, c, d = (int(v) for v in np.frombuffer(bytes(side), np.int32)[:5])
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return False, d < 0, a < 0
    return True, b < 0, c < 0


def _upright(picture: np.ndarray, orientation: tuple[bool, bool, bool]) -> np.ndarray:
    transpose, flip_rows, flip_columns = orientation
    if transpose:
        picture = picture.swapaxes(0, 1)
    return picture[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]


def _check_pixels(width: int, height: int, name: str, limits: MediaLimits) -> None:
    if width * height > limits.max_pixels:
        raise TooLarge(f"{name}: {width} x {height} pixels are more than max_pixels = {limits.max_pixels}")


def _check_lost(lost: int, total: int, what: str, name: str) -> None:
    if lost > MAX_LOST_SHARE * total:
        raise BadMedia(f"{name}: {lost} of {total} {what}; at most {MAX_LOST_SHARE:.0%} are tolerated")
