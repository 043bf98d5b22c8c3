"""A cluster on this machine for as long as a demo or a benchmark needs it: `sparsevila serve` in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

from sparsevila_cluster.core.cluster_config import ClusterConfig
from sparsevila_cluster.core.errors import DeadlineExceeded, Unavailable, UserError

READY = "serving on "
USER_MISTAKE = 2  # the exit code
POLL_S = 0.05
STOP_S = 60.0


@contextmanager
def serving(config: ClusterConfig, report: Callable[[str, int, int], None]) -> Iterator[str]:
    """The target, host:port, of a cluster that is ready; it is ended when the block is left.

    report: called with (stage, done, total) while it starts.

    Raises:
        UserError: a configuration that cannot be served. Unavailable: it ended instead of starting; the messages say why.
        DeadlineExceeded: not ready within `start_timeout_s`.
    """
    with tempfile.TemporaryDirectory(prefix="sparsevila-serve-") as folder:
        file, out, err = (Path(folder) / name for name in ("cluster.yaml", "out", "err"))
        file.write_text(yaml.safe_dump(config.model_dump()))
        with out.open("wb") as stdout, err.open("wb") as stderr:
            # A session of its own: Ctrl-C in a terminal reaches the one who started it, who ends it in order.
            process = subprocess.Popen(
                [sys.executable, "-m", "sparsevila_cluster", "serve", "--config", str(file)],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        try:
            yield _target(process, config, out, err, report)
        finally:
            _end(process)


def _target(
    process: subprocess.Popen[bytes], config: ClusterConfig, out: Path, err: Path, report: Callable[[str, int, int], None]
) -> str:
    until_s = time.monotonic() + config.start_timeout_s
    report("start the cluster", 0, 1)
    while True:
        for line in out.read_text().splitlines():
            if line.startswith(READY):
                report("start the cluster", 1, 1)
                return line.removeprefix(READY).split()[0]
        if process.poll() is not None:
            lines = err.read_text().strip().splitlines()
            reason = lines[-1].removeprefix("error: ") if lines else f"exit code {process.returncode}"
            raise UserError(reason) if process.returncode == USER_MISTAKE else Unavailable(f"the cluster did not start: {reason}")
        if time.monotonic() > until_s:
            raise DeadlineExceeded(f"the cluster was not ready within {config.start_timeout_s:g} s")
        time.sleep(POLL_S)


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(STOP_S)
