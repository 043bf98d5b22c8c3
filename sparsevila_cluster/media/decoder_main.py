"""The process that decodes: `python -m sparsevila_cluster.media.decoder_main <socket> <parent>`, started by `DecoderProcess`.

It imports neither torch nor models, and lives no longer than its parent. Frames are decoded into shared memory, whose descriptor
goes back with the reply. retire: the process should not be used again.

    job {name, kind, fps, max_frames, timeout_s, left_s, limits, measure} + source file
        ->  {shape, times_s, duration_s, retire} + frames
        or  {decoded, sampled, retire}, where it is only to be measured
        or  {error, message, retire}
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import signal
import socket
import sys
import tempfile
import traceback
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from sparsevila_cluster.core.errors import Internal, SparseVilaError, TooLarge
from sparsevila_cluster.media.decoding import decode, measure
from sparsevila_cluster.media.fd_channel import Message, receive, send
from sparsevila_cluster.media.frames import out_of_memory
from sparsevila_cluster.media.media_source import DecodeDeadline

PR_SET_PDEATHSIG = 1
# A process that keeps more than this share of its limit after a source has leaked or is in pieces; its successor starts small.
RETIRE_SHARE = 1 / 8
# What the allocator may keep between sources: new memory costs more than decoding a small picture.
KEEP_BYTES = 128 << 20
# Where processors are scarce, answers go before media, which may be anybody's and take seconds.
NICENESS = 10


class SharedFrames:
    """u8 frames in memory that another process can map. Written, not mapped here: that spares a page fault for every 4 KiB."""

    def __init__(self) -> None:
        self.fd: int | None = None
        self.shape: tuple[int, ...] = (0,)

    def allocate(self, shape: tuple[int, ...]) -> SharedFrames:
        """Make room for frames of this shape [F, H, W, 3], letting go of what was there."""
        self.close()
        self.fd, self.shape = _nameless_file(), shape
        os.ftruncate(self.fd, prod(shape))
        return self

    def __setitem__(self, number: int, picture: np.ndarray) -> None:
        assert self.fd is not None and picture.shape == self.shape[1:] and picture.dtype == np.uint8
        left, at = np.ascontiguousarray(picture).data.cast("B"), number * picture.size
        while left:
            written = os.pwrite(self.fd, left, at)
            left, at = left[written:], at + written

    def __getitem__(self, first: slice) -> SharedFrames:
        """[:n], and nothing else."""
        self.shape = (first.stop, *self.shape[1:])
        return self

    def close(self) -> None:
        """Only descriptors elsewhere keep the memory."""
        if self.fd is not None:
            os.close(self.fd)
        self.fd = None


def serve(sock: socket.socket) -> None:
    """Jobs until the other side hangs up. Tidying up is for when nobody waits."""
    fresh_bytes = _data_bytes()
    kept_bytes = 0
    while True:
        try:
            job, fd = receive(sock)
        except EOFError:
            return
        shared = SharedFrames()
        try:
            assert fd is not None, "a job comes with its file"
            reply = _reply(job, fd, shared)
            send(sock, reply | {"retire": kept_bytes > RETIRE_SHARE * job["limits"]["decode_memory_bytes"]}, shared.fd)
        finally:
            shared.close()
        gc.collect()  # PyAV's objects hold one another, and with them their decoders' threads and frames
        kept_bytes = _data_bytes() - fresh_bytes
        if kept_bytes > KEEP_BYTES:
            _give_back_memory()


def _reply(job: Message, fd: int, shared: SharedFrames) -> Message:
    limits: Any = SimpleNamespace(**job["limits"])
    deadline = DecodeDeadline(job["name"], job["timeout_s"], job["left_s"])
    sampling = {"fps": job["fps"], "max_frames": job["max_frames"]}
    try:
        with os.fdopen(fd, "rb") as file:
            _limit_memory(_data_bytes() + limits.decode_memory_bytes)
            if job["measure"]:
                cost = measure(file, job["name"], job["kind"], **sampling, limits=limits, deadline=deadline)
                return {"decoded": cost.decoded, "sampled": cost.sampled}
            done = decode(file, job["name"], job["kind"], **sampling, limits=limits, deadline=deadline, allocate=shared.allocate)
            return {"shape": done.frames.shape, "times_s": done.times_s.tobytes(), "duration_s": float(done.duration_s)}
    # Only names and texts leave these blocks: an error would keep frames alive through its traceback.
    except SparseVilaError as error:
        failed = type(error).__name__, str(error)
    except MemoryError:
        failed = TooLarge.__name__, str(out_of_memory(job["name"], limits))
    except Exception as error:
        traceback.print_exc()  # what is said here is logged by the sandbox
        failed = Internal.__name__, f"{job['name']}: {type(error).__name__}: {error}"
    finally:
        _limit_memory(None)
    shared.close()
    return dict(zip(("error", "message"), failed, strict=True))


def _limit_memory(num_bytes: int | None) -> None:
    """Private writable memory, where the system counts it (Linux). Frames are shared memory, with a limit of their own."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    wanted = hard if num_bytes is None else num_bytes if hard == resource.RLIM_INFINITY else min(num_bytes, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))


def _give_back_memory() -> None:
    """What the allocator keeps for later. Addresses may stay taken; the memory behind them does not."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
    if trim is not None:
        trim(0)


def _data_bytes() -> int:
    """What RLIMIT_DATA counts, now; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    except OSError:
        return 0


def _nameless_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("frames", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _end_with(parent: int) -> None:
    """Whatever this process is doing when its parent dies, the kernel ends it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)


def _prefer_for_oom() -> None:
    """When the machine runs out of memory, the kernel should end this process and not its parent."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
    except OSError:
        pass


def main() -> None:
    """Get ready, say so, and decode until the parent hangs up."""
    _end_with(int(sys.argv[2]))
    _prefer_for_oom()
    for end in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the parent's business; it will end us
        signal.signal(end, signal.SIG_IGN)
    os.nice(NICENESS)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    Image.preinit()  # now and not with the first picture
    gc.freeze()
    with socket.socket(fileno=int(sys.argv[1])) as sock:
        send(sock, {"ready": True})
        serve(sock)


if __name__ == "__main__":
    main()
