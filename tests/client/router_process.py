"""A scripted server in a process of its own, which shares its port as routers of one node do, and dies as they do."""

import asyncio
import os
import re
import signal
import subprocess
import sys

from tests.client.scripted_server import Scripted, serving
from tests.structure import ROOT

STEP_S = 0.02


class RouterProcess:
    """Serves on 127.0.0.1:`port` (0: a free one) once `wait` returns; its turns take STEP_S for each token."""

    def __init__(self, port=0):
        command = [sys.executable, "-m", "tests.client.router_process", str(port)]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        self.port = port

    def wait(self):
        self.port = int(re.fullmatch(r"(\d+)\n", self.process.stdout.readline())[1])
        return self

    def stop(self, number=signal.SIGKILL):
        self.process.send_signal(number)
        self.process.wait(20)
        self.process.stdout.close()


class Slow(Scripted):
    """Says by its version which process it is."""

    async def GetServerInfo(self, request, context):
        reply = await super().GetServerInfo(request, context)
        reply.version = str(os.getpid())
        return reply

    async def Ask(self, request, context):
        async for event in super().Ask(request, context):
            await asyncio.sleep(STEP_S)
            yield event


async def main(port):
    async with serving(Slow(), port, shared=True) as (_, port):
        print(port, flush=True)
        await asyncio.sleep(120)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
