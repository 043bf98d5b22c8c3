"""One decoding process as its parent sees it: started, spoken to, killed, reaped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from sparsevila_cluster.core.errors import Unavailable
from sparsevila_cluster.media import fd_channel

MODULE = "sparsevila_cluster.media.decoder_main"
ROOT = str(Path(__file__).parents[2])
START_TIMEOUT_S = 60.0
END_TIMEOUT_S = 5.0
STDERR_BYTES = 2000


class DecoderProcess:
    """Starts at once; imports and gets ready in the background. Used by one thread at a time, but `kill` by any."""

    def __init__(self) -> None:
        self.ready = False
        self._stderr_bytes = b""
        self._sock, theirs = socket.socketpair()
        self._stderr, their_stderr = os.pipe()
        os.set_blocking(their_stderr, False)  # what the pipe does not hold is lost: it is read at the end
        os.set_blocking(self._stderr, False)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", MODULE, str(theirs.fileno()), str(os.getpid())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=their_stderr,
                env=_environment(),
                process_group=0,  # Ctrl-C in a terminal reaches the parent's group only
            )
        except BaseException:
            self._close_files()
            raise
        finally:
            theirs.close()
            os.close(their_stderr)
        self.pid = self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    def wait_ready(self) -> None:
        """Raises Unavailable: it does not get ready."""
        if self.ready:
            return
        try:
            message, _ = fd_channel.receive(self._sock, START_TIMEOUT_S)
            self.ready = bool(message["ready"])
        except (OSError, EOFError, ValueError, LookupError) as error:
            self.end()
            said = self.stderr_text() or f"{type(error).__name__}: {error}"
            raise Unavailable(f"the process to decode in does not start: {said}") from error

    def send(self, message: fd_channel.Message, fd: int) -> None:
        """Raises OSError: it is dead."""
        self._sock.settimeout(END_TIMEOUT_S)
        fd_channel.send(self._sock, message, fd)

    def receive(self, timeout_s: float) -> tuple[fd_channel.Message, int | None]:
        """As `fd_channel.receive`."""
        return fd_channel.receive(self._sock, timeout_s)

    def kill(self) -> None:
        """End it at once; `end` must follow."""
        self._process.kill()

    def wait_for_exit(self) -> str:
        """How a process that is about to end by itself did so: a signal's name, or an exit code."""
        try:
            code = self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return "gone silent"
        with suppress(ValueError):
            return signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"signal {-code}"

    def end(self) -> None:
        """Kill it, reap it, close what led to it. Idempotent."""
        if self._stderr < 0:
            return
        self.kill()
        with suppress(subprocess.TimeoutExpired):  # in the kernel, and killed as soon as it comes out
            self._process.wait(END_TIMEOUT_S)
        with suppress(OSError):
            self._stderr_bytes = os.read(self._stderr, 1 << 16)[-STDERR_BYTES:]
        self._close_files()

    def stderr_text(self) -> str:
        """What it said on stderr before it ended, for a log."""
        return self._stderr_bytes.decode(errors="replace").strip()

    def _close_files(self) -> None:
        self._sock.close()
        os.close(self._stderr)
        self._stderr = -1


def _environment() -> dict[str, str]:
    """Ours, but with this process's own search path for modules, and one thread where threads are of no use. glibc gives memory
    of large frames back only where threads share one arena.
    """
    path = [entry for entry in sys.path if isinstance(entry, str) and entry]  # "" was the working directory, and may be another
    path = path if ROOT in path else [ROOT, *path]
    alone = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    return os.environ | alone | {"PYTHONPATH": os.pathsep.join(path)}
