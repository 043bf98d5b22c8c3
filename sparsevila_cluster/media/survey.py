"""What the packets of a video say, before any is decoded: how long it is, whether it is whole, where decoding can start."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from fractions import Fraction

import av

from sparsevila_cluster.core.errors import BadMedia
from sparsevila_cluster.media.container import MAX_LOST_SHARE, check_lost, exact, is_end
from sparsevila_cluster.media.keyframe import starts_anew
from sparsevila_cluster.media.media_source import DecodeDeadline

HIDDEN, ENTRY, BROKEN = 1, 2, 4


@dataclass(frozen=True, eq=False)
class PacketIndex:
    """One row per packet of the video stream, in decoding order: 29 bytes each.

    pts, dts: ticks; pos: place in the file, or -1; size: bytes; flags: HIDDEN (decoded, never shown), ENTRY (a key frame from which
    a fresh decoder can start), BROKEN.
    """

    pts: array = field(default_factory=lambda: array("q"))
    dts: array = field(default_factory=lambda: array("q"))
    pos: array = field(default_factory=lambda: array("q"))
    size: array = field(default_factory=lambda: array("i"))
    flags: array = field(default_factory=lambda: array("B"))

    def add(self, packet: av.Packet, stream: av.VideoStream) -> None:
        """Append the row of a packet that has a pts."""
        pts, dts, pos, corrupt = packet.pts, packet.dts, packet.pos, packet.is_corrupt
        self.pts.append(pts)
        self.dts.append(pts if dts is None else dts)
        self.pos.append(-1 if pos is None else pos)
        self.size.append(packet.size)
        entry = packet.is_keyframe and not corrupt and starts_anew(packet, stream)
        self.flags.append(HIDDEN * packet.is_discard | ENTRY * entry | BROKEN * corrupt)

    def holds(self, row: int, packet: av.Packet) -> bool:
        """Whether `packet` is the one that stood in this row when the file was surveyed."""
        return (
            row < len(self.pts)
            and (self.pts[row], self.size[row]) == (packet.pts, packet.size)
            and (self.pos[row] == (-1 if packet.pos is None else packet.pos))
        )

    def __len__(self) -> int:
        return len(self.pts)


@dataclass(frozen=True, eq=False)
class Survey:
    """num_shown: packets whose frames are not hidden; origin_s: the first frame's start; tick_s: the unit of timestamps.

    `frame_s` is set where timestamps are missing or unusable: frames are then counted, and there is no `index`.
    """

    num_shown: int
    origin_s: Fraction
    tick_s: Fraction
    duration_s: float
    frame_s: Fraction | None
    index: PacketIndex | None

    def start_s(self, pts: int) -> float:
        """When a frame starts to show, in seconds after the first one."""
        return max(0.0, float(pts * self.tick_s - self.origin_s))


def survey_packets(container: av.container.InputContainer, stream: av.VideoStream, name: str, deadline: DecodeDeadline) -> Survey:
    """One pass over all packets.

    Raises:
        BadMedia: no packet, or a file that ends early or has lost packets. DeadlineExceeded.
    """
    is_mkv = "matroska" in container.format.name
    declared = len(stream.index_entries) if "mp4" in container.format.name else 0
    num, num_bad, num_shown, num_untimed = 0, 0, 0, 0
    first, last, tail = None, None, 0  # ticks: first and last start, and how long the last one shows
    ends: dict[int, int] = {}  # by stream, in its ticks
    # AVI counts frames and has no order of presentation; what FFmpeg makes up for B-frames is wrong.
    index: PacketIndex | None = None if container.format.name == "avi" else PacketIndex()
    # Matroska tells how long the longest stream is, not how many frames there are: only then the others are read too.
    for packet in container.demux() if is_mkv else container.demux(stream):
        deadline.check()
        pts = packet.pts
        if pts is None and is_end(packet):
            if is_mkv:
                continue
            break
        number = packet.stream_index
        if is_mkv and pts is not None:
            ends[number] = max(ends.get(number, 0), pts + (packet.duration or 0))
        if number != stream.index:
            continue
        num += 1
        num_bad += packet.is_corrupt
        if pts is None:
            index = None
        elif index is not None:
            index.add(packet, stream)
        if packet.is_discard:  # cut away by an edit list: decoded, never shown
            continue
        num_shown += 1
        if pts is None:
            num_untimed += 1
            continue
        first = pts if first is None else min(first, pts)
        if last is None or pts >= last:
            last, tail = pts, packet.duration or 0
    if num == 0:
        raise BadMedia(f"{name} holds a video stream of 0 frames; at least 1 is needed")
    check_lost(num_bad, num, "broken packets", name)
    check_lost(declared - num, declared, "missing packets (the file ends early)", name)
    if is_mkv and container.duration and (header_s := container.duration / av.time_base):
        end_s = float(max(end * (container.streams[number].time_base or 0) for number, end in ends.items()) if ends else 0)
        if end_s < header_s * (1 - MAX_LOST_SHARE) - 0.5:
            raise BadMedia(f"{name} ends early: {end_s:.3f} s of the {header_s:.3f} s that its header declares")
    rate = exact(stream.guessed_rate or stream.average_rate, Fraction(25))
    tick_s = exact(stream.time_base, 1 / rate)
    if first is None or last is None or num_untimed or container.format.name == "avi":
        return Survey(num_shown, Fraction(0), tick_s, float(num / rate), 1 / rate, None)
    length_s = (last - first) * tick_s + (tail * tick_s or 1 / rate)
    return Survey(num_shown, first * tick_s, tick_s, float(length_s), None, index)
