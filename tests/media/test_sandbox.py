"""Decoders that crash, hang or eat memory end alone, with a typed error; nothing is left behind. Real processes, real signals."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparsevila_cluster.core.config import MediaLimits
from sparsevila_cluster.core.errors import BadMedia, DeadlineExceeded, Internal, TooLarge, Unavailable
from sparsevila_cluster.core.requests import MediaSource
from sparsevila_cluster.media import DecoderSandbox, open_media
from sparsevila_cluster.media import sandbox as guard_module
from sparsevila_cluster.media.decoder_process import DecoderProcess
from sparsevila_cluster.media.media_source import DecodeDeadline, open_source
from tests.media.fuzz import child_pids
from tests.media.media_files import indices, load_here, picture_bytes, texture, video_bytes
from tests.media.process_helpers import PICTURE, in_thread, show
from tests.processes import is_running, stop, wait_for

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def one_guard():
    with DecoderSandbox(max_idle=1) as guard:
        yield guard


@pytest.fixture
def guard(one_guard):
    """Warm, with one process; tests that end it pay for the next one."""
    show(one_guard)
    return one_guard


@pytest.fixture
def handed_over(guard, monkeypatch):
    """Set when a process has got a job and its caller waits for the reply."""
    event, receive = threading.Event(), DecoderProcess.receive

    def noted(self, timeout_s):
        event.set()
        return receive(self, timeout_s)

    monkeypatch.setattr(DecoderProcess, "receive", noted)
    return event


def idles(pid):
    """Whether a decoding process has nothing open but stdin, stdout, stderr and its socket. It tidies up after it has replied."""
    return len(os.listdir(f"/proc/{pid}/fd")) == 4


def test_a_guarded_decode_is_the_plain_one(guard):
    for data in (video_bytes(20), PICTURE, picture_bytes(Image.effect_noise((50, 40), 90), "JPEG")):
        far, near = show(guard, data), load_here(data)
        assert np.array_equal(far.frames, near.frames) and far.frames.flags.writeable
        assert far.times_s.tolist() == near.times_s.tolist() and far.duration_s == near.duration_s


def test_nothing_is_left_behind(guard):
    (pid,) = guard.pids()
    gc.collect()
    before = set(os.listdir("/proc/self/fd"))
    data = video_bytes(20)
    kept = [show(guard, data) for _ in range(3)]
    for broken in (b"no video", data[: len(data) // 2], PICTURE[:45]):
        with pytest.raises(BadMedia):
            show(guard, broken)
    assert [indices(media) for media in kept] == [[2, 7, 12, 17]] * 3
    del kept
    assert set(os.listdir("/proc/self/fd")) == before
    wait_for(lambda: idles(pid))
    for process in ("self", pid):
        assert "memfd:" not in Path(f"/proc/{process}/maps").read_text()
    assert guard.pids() == [pid]


def test_frames_are_the_callers_alone(guard):
    first = show(guard, video_bytes(20))
    want = first.frames.copy()
    second = show(guard, video_bytes(20))
    second.frames[:] = 0
    assert np.array_equal(first.frames, want)


def test_an_idle_process_may_die(guard):
    (pid,) = guard.pids()
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not is_running(pid))
    assert show(guard).frames.shape == (1, 6, 8, 3) and pid not in guard.pids()


@pytest.mark.parametrize(
    "end, error, message",
    [
        (signal.SIGSEGV, BadMedia, r"crashes its decoder \(SIGSEGV\)"),
        (signal.SIGABRT, BadMedia, r"crashes its decoder \(SIGABRT\)"),
        (signal.SIGKILL, TooLarge, r"killed by the system \(SIGKILL\).* decode_memory_bytes = 4294967296"),
    ],
)
def test_a_crash_is_a_typed_error(guard, handed_over, end, error, message, tmp_path):
    path = tmp_path / "crash.png"
    path.write_bytes(PICTURE)
    (pid,) = guard.pids()
    stop(pid)  # so that it surely dies with the job in its hands
    thread, outcome = in_thread(lambda: show(guard, str(path)))
    assert handed_over.wait(20)
    os.kill(pid, end)
    os.kill(pid, signal.SIGCONT)
    thread.join(20)
    assert isinstance(outcome[0], error), outcome
    with pytest.raises(error, match=f"crash.png.*{message}"):
        raise outcome[0]
    assert show(guard).kind == "image" and pid not in guard.pids() and not is_running(pid)


def test_a_hang_ends_with_the_deadline(guard):
    (pid,) = guard.pids()
    stop(pid)
    begun_s = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=rf"{len(PICTURE)} bytes: decoding hung and was killed.*decode_timeout_s = 0.3 s"):
        show(guard, decode_timeout_s=0.3)
    assert 0.3 <= time.monotonic() - begun_s < 0.3 + guard_module.GRACE_S + 5
    assert not Path(f"/proc/{pid}").exists()  # killed and reaped
    assert show(guard).kind == "image" and pid not in guard.pids()


def test_the_decoder_sees_the_deadline_first(guard):
    data, before = video_bytes(300, size=(320, 240), codec="mpeg4", draw=texture), guard.pids()
    with pytest.raises(DeadlineExceeded, match="decoding took longer than decode_timeout_s = 0.05 s|not read within"):
        show(guard, data, decode_timeout_s=0.05)
    assert guard.pids() == before  # it was asked politely, and lives on


def test_memory_is_limited(guard):
    flat, before = picture_bytes(Image.new("P", (8000, 8000))), guard.pids()
    with pytest.raises(TooLarge, match=rf"{len(flat)} bytes does not decode within decode_memory_bytes = {256 << 20}"):
        show(guard, flat, decode_memory_bytes=256 << 20)
    assert guard.pids() == before
    video = video_bytes(4, size=(256, 256))
    starved = MediaLimits().model_copy(update={"decode_memory_bytes": 1 << 20})
    with pytest.raises((TooLarge, BadMedia)):
        open_media(MediaSource(video), fps=2.0, max_frames=4, limits=starved, sandbox=guard)
    assert len(show(guard, video).frames) == 1


def test_a_bug_of_ours_is_internal_and_logged(guard, caplog):
    with open_source(MediaSource(video_bytes(4)), MediaLimits()) as blob:
        with pytest.raises(Internal, match="bytes: TypeError"):
            guard.decode(blob, fps="two", max_frames=2, limits=MediaLimits(), deadline=DecodeDeadline("video", 60.0))
    assert "Traceback" in caplog.text and "decode_video" in caplog.text
    assert show(guard).kind == "image"


def test_many_threads_at_once(guard):
    videos = [video_bytes(n) for n in (4, 8, 12, 16)]
    with ThreadPoolExecutor(4) as pool:
        counts = list(pool.map(lambda i: len(show(guard, videos[i % 4]).frames), range(16)))
    assert counts == [1, 2, 2, 3] * 4 and len(guard.pids()) == guard.max_idle


def test_a_process_outlives_the_thread_that_asked_for_it(guard):
    for pid in guard.pids():
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda pid=pid: not is_running(pid))
    thread, outcome = in_thread(lambda: show(guard))
    thread.join(20)
    (pid,) = guard.pids()
    time.sleep(0.1)
    assert outcome[0].kind == "image" and is_running(pid)
    show(guard)
    assert guard.pids() == [pid]


def test_close_ends_everything(handed_over):
    gc.collect()
    files = set(os.listdir("/proc/self/fd"))
    guard = DecoderSandbox()
    show(guard)
    (pid,) = guard.pids()
    stop(pid)
    handed_over.clear()
    thread, outcome = in_thread(lambda: show(guard))
    assert handed_over.wait(20)
    guard.close()
    thread.join(20)
    assert isinstance(outcome[0], Unavailable) and guard.pids() == [] and not is_running(pid)
    with pytest.raises(Unavailable, match="closed"):
        show(guard)
    guard.close()
    del outcome
    assert set(os.listdir("/proc/self/fd")) == files


def test_a_forgotten_guard_ends_its_processes():
    guard = DecoderSandbox()
    show(guard)
    (pid,) = guard.pids()
    del guard
    wait_for(lambda: not Path(f"/proc/{pid}").exists())


def test_without_a_guard_there_is_one_for_the_call():
    before = child_pids()
    assert open_media(MediaSource(PICTURE), fps=2.0, max_frames=4, limits=MediaLimits()).kind == "image"
    assert child_pids() == before


def test_an_interrupted_caller_gets_out(guard, handed_over, interruptible):
    (pid,) = guard.pids()
    stop(pid)
    interrupting, _ = in_thread(lambda: handed_over.wait(20) and os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        show(guard)
    interrupting.join()
    assert not is_running(pid) and show(guard).kind == "image"


def test_a_file_must_not_change_while_it_is_read(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(PICTURE)
    with open_source(MediaSource(str(path)), MediaLimits()) as blob:
        blob.check_unchanged()
        with path.open("ab") as file:
            file.write(b"more")
        with pytest.raises(BadMedia, match="picture.png' changed while it was read"):
            blob.check_unchanged()


@pytest.mark.parametrize(
    "reply",
    [
        {}, {"shape": [1, 2, 2, 3]}, {"shape": [1, 2, 2, 3], "times_s": b"", "duration_s": 0.0},
        {"shape": [1, 2, 2, 4], "times_s": bytes(8), "duration_s": 0.0},
        {"shape": [1, 200, 200, 3], "times_s": bytes(8), "duration_s": 0.0},
        {"shape": [-1, -2, 2, 3], "times_s": bytes(8), "duration_s": 0.0},
        {"shape": "many", "times_s": bytes(8), "duration_s": 0.0}, {"shape": [1, 2, 2, 3], "times_s": bytes(8)},
        {"shape": [1, 2, 2, 3], "times_s": 8, "duration_s": 0.0}, {"error": "SystemExit", "message": ""},
    ],
)  # fmt: skip
def test_replies_are_not_trusted(reply):
    files = set(os.listdir("/proc/self/fd"))
    fd = None if "error" in reply else os.memfd_create("frames", os.MFD_ALLOW_SEALING)
    if fd is not None:
        os.ftruncate(fd, 12)
    with pytest.raises((ValueError, LookupError, TypeError)):
        guard_module._read(reply, fd, "video", guard_module._read_frames)
    assert set(os.listdir("/proc/self/fd")) == files


@pytest.mark.parametrize("reply", [{}, {"decoded": 1}, {"decoded": -1, "sampled": 0}, {"decoded": True, "sampled": 1.5}])
def test_costs_are_not_trusted(reply):
    with pytest.raises((ValueError, LookupError, TypeError)):
        guard_module._read(reply, None, "video", guard_module._read_cost)
