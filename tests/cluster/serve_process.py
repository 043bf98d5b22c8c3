"""`sparsevila serve` as users run it: a process of its own, its one line, and what is left when it has gone."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.structure import ROOT

START_S = 240  # two cores, shared with whatever else runs


class ServeProcess:
    """The process and, once `wait` has seen its line, its target."""

    def __init__(self, folder, *options):
        self.out, self.log = Path(folder) / "serve.out", Path(folder) / "serve.log"
        self.target = None
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "sparsevila_cluster", "serve", *options]
        with self.out.open("wb") as out, self.log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=log, start_new_session=True)

    def wait(self, within_s=START_S):
        """Until it serves; returns its target."""
        until_s = time.monotonic() + within_s
        while not (line := re.fullmatch(r"serving on (\S+) after [\d.]+ s\n", self.out.read_text())):
            assert self.process.poll() is None and time.monotonic() < until_s, self.log.read_text() + self.out.read_text()
            time.sleep(0.1)
        print(line[0])
        self.target = line[1]
        return self.target

    def replicas(self):
        """{kind: processes} of its replicas that live."""
        found = {}
        for process, name in _processes(self.process.pid):
            if match := re.match(r"ray::ServeReplica:[^:]+:(\w+)", name):
                found.setdefault(match[1], []).append(process)
        return found

    def stop(self, number=signal.SIGTERM, within_s=60):
        """Its exit code after a signal; the assertion is that nothing of it is left."""
        self.process.send_signal(number)
        try:
            code = self.process.wait(within_s)
        finally:
            self.kill()
        return code

    def left(self):
        """Names of processes of its session that live."""
        return [name for _, name in _processes(self.process.pid)]

    def kill(self):
        """The end of it, whatever happened."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def _processes(session):
    done = subprocess.run(["ps", "-eo", "pid=,sid=,stat=,args="], capture_output=True, text=True, check=True)
    rows = [line.split(None, 3) for line in done.stdout.splitlines()]
    return [(int(row[0]), row[3]) for row in rows if len(row) == 4 and row[1] == str(session) and not row[2].startswith("Z")]
