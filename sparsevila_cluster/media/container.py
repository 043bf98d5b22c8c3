"""Video files opened for reading: which containers and decoders are trusted with untrusted bytes, and how."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import TYPE_CHECKING, Any, BinaryIO

import av
from av.codec.context import Flags

from sparsevila_cluster.core.errors import BadMedia, DeadlineExceeded, SparseVilaError
from sparsevila_cluster.media.frames import check_pixels, out_of_memory
from sparsevila_cluster.media.media_source import DecodeDeadline

if TYPE_CHECKING:
    from sparsevila_cluster.core.config import MediaLimits

# Containers that hold their own bytes. Playlists and lists of files (HLS, DASH, concat, SDP) would make FFmpeg open
# whatever path or address stands in them, so they are not on the list, and no protocol is allowed either.
# The audio formats are here only for a better message.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,h264,hevc,av1,obu,ivf,m4v,mxf,nut,dv,"
    "mp3,wav,flac,aac"
)
# A file may lose this share of its packets or frames (a capture that stops in mid-frame) before it is refused.
MAX_LOST_SHARE = 0.02
MAX_THREADS = 8  # each decoder thread holds a frame of its own
# Decoders that may work on several frames at once. FFmpeg's HEVC decoder is not one of them: on broken streams its threads
# wait for each other for ever (seen within seconds of fuzzing), where no deadline can be checked. Others split one frame.
FRAME_THREADS = frozenset({"h264"})
# PyAV 18 refuses a file with a tag that is not UTF-8, unless told otherwise. PyAV 19 takes it, and knows no such argument.
TAGS: dict[str, Any] = {"metadata_errors": "replace"} if hasattr(av.container.Container, "metadata_errors") else {}


@contextmanager
def open_video(
    file: BinaryIO, name: str, limits: MediaLimits, deadline: DecodeDeadline
) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The container and its first video stream, closed at the end of the block. PyAV logs nothing unless told to.

    Raises:
        BadMedia, TooLarge, DeadlineExceeded: whatever FFmpeg and PyAV raise about hostile bytes, here and in the block.
    """
    with _typed_errors(name, limits):
        deadline.check()
        file.seek(0)
        options = {
            "format_whitelist": CONTAINERS,
            "protocol_whitelist": "none",
            # The decoder's own check, before it allocates a frame; the option is an int of 32 bits.
            "max_pixels": str(min(limits.max_pixels, 2**31 - 1)),
            "err_detect": "explode",  # report damage instead of painting over it
        }
        with av.open(file, options=options, timeout=deadline.left_s(), **TAGS) as container:
            assert isinstance(container, av.container.InputContainer)
            # Attached pictures are the cover art of an audio file.
            videos = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
            if not videos:
                kinds = ", ".join(sorted({s.type for s in container.streams if s.type})) or "no stream"
                raise BadMedia(f"{name} holds no video (found: {kinds})")
            stream = videos[0]
            context = stream.codec_context
            if context is None:
                raise BadMedia(f"{name}: no decoder for its video codec")
            check_pixels(context.width, context.height, name, limits)
            context.options = {key: options[key] for key in ("max_pixels", "err_detect")}
            context.thread_type = "AUTO" if context.codec.canonical_name in FRAME_THREADS else "SLICE"
            if context.codec.canonical_name == "av1":
                # dav1d knows no thread types, and works on several frames at once unless it may not delay them. Where the file is
                # broken, FFmpeg 9 then takes one frame's error for another's, and now and then for a lack of memory.
                context.flags |= Flags.low_delay
            context.thread_count = min(MAX_THREADS, os.cpu_count() or 1)
            yield container, stream


@contextmanager
def _typed_errors(name: str, limits: MediaLimits) -> Iterator[None]:
    try:
        yield
    except SparseVilaError:
        raise
    except av.error.ExitError as error:  # the interrupt callback of `timeout`
        raise DeadlineExceeded(f"{name}: not read within decode_timeout_s = {limits.decode_timeout_s:g} s") from error
    except MemoryError as error:
        raise out_of_memory(name, limits) from error
    except (av.error.FFmpegError, ValueError, LookupError, ArithmeticError, EOFError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BadMedia(f"{name} is not a video that can be read: {reason[:1].lower()}{reason[1:]}") from error


def exact(ratio: Any, otherwise: Fraction) -> Fraction:
    """A ratio of PyAV's, and `otherwise` where it is not set: None or a Fraction in PyAV 18, an AVRational in PyAV 19."""
    return Fraction(ratio or otherwise)


def is_end(packet: av.Packet) -> bool:
    """Whether this is the empty packet that PyAV appends to each stream to flush its decoder."""
    return packet.size == 0 and packet.pts is None and packet.dts is None


def check_lost(lost: int, total: int, what: str, name: str) -> None:
    """Raises BadMedia: more than `MAX_LOST_SHARE` of a file's packets or frames are lost; `what` names them."""
    if lost > MAX_LOST_SHARE * total:
        raise BadMedia(f"{name}: {lost} of {total} {what}; at most {MAX_LOST_SHARE:.0%} are tolerated")
