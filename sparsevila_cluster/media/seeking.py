"""Sparse sampling: decode around the sample times only.

    wanted frames -> the last key frame that each can be decoded from -> runs of packets -> cost -> seek, decode, take

What is decoded must be whole: the first damaged packet or frame sends the file to the full decode, which says how much is lost and
refuses more than a small part. Damage in what is skipped (between the runs, and frames that are no reference) is not found; packets
that are missing there, or that the container itself calls broken, are, by the survey.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import av
import numpy as np

from sparsevila_cluster.media.container import is_end
from sparsevila_cluster.media.frame_buffer import FrameBuffer
from sparsevila_cluster.media.frame_selection import pick
from sparsevila_cluster.media.frames import PixelMeter
from sparsevila_cluster.media.media_source import DecodeDeadline
from sparsevila_cluster.media.survey import BROKEN, ENTRY, HIDDEN, PacketIndex, Survey

# By which timestamp a container finds its way. Others (raw streams, AVI, program streams) have no index worth the name.
SEEK_BY = {"mov,mp4,m4a,3gp,3g2,mj2": "pts", "matroska,webm": "pts", "flv": "pts", "mpegts": "dts"}
# Codecs whose frames from a key frame on do not depend on what was decoded before.
CODECS = frozenset("h264 hevc vp8 vp9 av1 mpeg1video mpeg2video mpeg4 mjpeg prores".split())
# Of these also where pictures follow a key frame that show before it (an open GOP): only those are lost.
OPEN_GOP_CODECS = frozenset("hevc mpeg1video mpeg2video mpeg4".split())
# Where "not a reference" is strictly so: such frames need not be decoded to get at later ones.
SKIPPABLE_CODECS = frozenset("h264 mpeg1video mpeg2video mpeg4".split())

# In packets that could be decoded instead: what a seek costs, and how many a decoder wants to see before it gives a frame out.
SEEK_COST, DELAY_COST = 8, 8
# Less is not worth it; and a file that costs little is decoded as a whole, so that damage anywhere in it shows.
MIN_SAVED, MAX_COST_SHARE = 250, 0.7
# How far to read for a key frame after a seek, and to decode for a wanted frame after its packet, in packets.
MAX_TO_ENTRY, MAX_TO_FRAME = 1024, 64


@dataclass
class Run:
    """Packets to decode in one go: from row `entry` until the frames of the rows `wanted` are out; `last` is their largest."""

    entry: int
    wanted: list[int]
    last: int


def plan_runs(survey: Survey, codec: str, format_name: str, times_s: np.ndarray) -> list[Run] | None:
    """What to decode for the sample times, or None where seeking cannot be trusted or is not worth it."""
    index = survey.index
    if index is None or format_name not in SEEK_BY or codec not in CODECS:
        return None
    pts, flags = np.frombuffer(index.pts, np.int64), np.frombuffer(index.flags, np.uint8)
    shown = np.flatnonzero(flags & HIDDEN == 0)
    shown = shown[np.argsort(pts[shown], kind="stable")]
    if (flags & BROKEN).any() or (np.diff(pts[shown]) == 0).any():
        return None
    rows: list[int] = shown.tolist()
    chosen = pick(rows, times_s, lambda row: survey.start_s(index.pts[row]))
    runs = _merge(index, _entries(pts, flags, codec), [rows[i] for i in chosen])
    cost = sum(run.last - run.entry + 1 + DELAY_COST + SEEK_COST for run in runs)
    worth = len(index) - cost >= MIN_SAVED and cost <= MAX_COST_SHARE * len(index)
    return runs if worth else None


def take_around(
    container: av.container.InputContainer, stream: av.VideoStream, survey: Survey,
    runs: list[Run], buffer: FrameBuffer, meter: PixelMeter, deadline: DecodeDeadline,
) -> bool:  # fmt: skip
    """Put the wanted frames of all runs into `buffer`. False: something is damaged or not as surveyed; the buffer is no use then.

    container, stream: freshly opened. Raises TooLarge, DeadlineExceeded.
    """
    index = survey.index
    assert index is not None, "runs are planned with one"
    seek_by = getattr(index, SEEK_BY[container.format.name])
    try:
        if runs[0].entry > 0:
            # Some decoders learn from the first packet which encoder made the file, and mind its bugs from then on.
            first = next(container.demux(stream))
            if not index.holds(0, first):
                return False
            first.decode()
        for run in runs:
            if run.entry > 0:
                container.seek(seek_by[run.entry], stream=stream)
            if not all(_taken(run, container, stream, survey, index, buffer, meter, deadline)):
                return False
    except (av.error.MemoryError, av.error.ExitError):
        raise
    except av.error.FFmpegError:
        return False
    return True


def _taken(
    run: Run, container: av.container.InputContainer, stream: av.VideoStream, survey: Survey, index: PacketIndex,
    buffer: FrameBuffer, meter: PixelMeter, deadline: DecodeDeadline,
) -> Iterator[bool]:  # fmt: skip
    """True for each wanted frame that went into the buffer; a False ends it."""
    pts = index.pts
    wanted, rows = deque(pts[row] for row in run.wanted), set(run.wanted)
    last_pts = pts[run.entry] - 1 if run.entry > 0 else min(pts) - 1
    for row, packet in _packets(run.entry, container, stream, index, deadline):
        if row is None or row > run.last + MAX_TO_FRAME:
            yield False
            return
        if stream.codec_context.codec.canonical_name in SKIPPABLE_CODECS:
            stream.codec_context.skip_frame = "DEFAULT" if row in rows or row == run.entry else "NONREF"
        for frame in packet.decode():
            deadline.check()
            meter.add(frame.width, frame.height)
            if frame.pts is not None and run.entry > 0 and frame.pts < pts[run.entry]:
                continue  # shows before the key frame and needs what came before it
            bad_entry = frame.pts == pts[run.entry] and run.entry > 0 and not frame.key_frame
            if frame.is_corrupt or frame.pts is None or frame.pts <= last_pts or frame.pts > wanted[0] or bad_entry:
                yield False
                return
            last_pts = frame.pts
            if frame.pts == wanted[0]:
                buffer.put(frame, survey.start_s(wanted.popleft()))
                yield True
                if not wanted:
                    return
    yield False


def _packets(
    entry: int, container: av.container.InputContainer, stream: av.VideoStream, index: PacketIndex, deadline: DecodeDeadline
) -> Iterator[tuple[int | None, av.Packet]]:
    """Packets from row `entry` on with their rows, the last one to flush the decoder; row None: not the one surveyed."""
    row, num_read = entry, 0
    for packet in container.demux(stream):
        deadline.check()
        num_read += 1
        if is_end(packet):
            yield (row if row == len(index) else None), packet
            return
        if index.holds(row, packet):
            yield row, packet
            row += 1
        elif row > entry or num_read > MAX_TO_ENTRY:
            yield None, packet
            return


def _entries(pts: np.ndarray, flags: np.ndarray, codec: str) -> list[int]:
    """Rows, ascending in row and pts, from which frames that show later decode exactly: row 0, and key frames that show after all
    that comes before them and, but for open GOPs that do no harm, before all that comes after them.
    """
    entry = flags & ENTRY != 0
    entry[1:] &= pts[1:] > np.maximum.accumulate(pts)[:-1]
    if codec not in OPEN_GOP_CODECS:
        entry[:-1] &= pts[:-1] < np.minimum.accumulate(pts[::-1])[::-1][1:]
    entry[0] = True
    return np.flatnonzero(entry).tolist()


def _merge(index: PacketIndex, entries: list[int], rows: list[int]) -> list[Run]:
    """Runs for the wanted `rows`, ascending in pts. Where the next key frame is near, decoding on is cheaper than a seek."""
    starts = [index.pts[row] for row in entries]
    runs: list[Run] = []
    for row in rows:
        entry = entries[max(bisect_right(starts, index.pts[row]) - 1, 0)]
        if runs and entry <= runs[-1].last + SEEK_COST + DELAY_COST:
            runs[-1].wanted.append(row)
            runs[-1].last = max(runs[-1].last, row)
        else:
            runs.append(Run(entry, [row], row))
    return runs
