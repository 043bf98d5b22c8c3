"""A storm over `sparsevila serve`: `python -m tests.chaos.ray_storm --minutes 10 --seed 0`.

Clients of the library ask, leave, hurry, upload, prepare and delete over gRPC, while replicas of every kind and Serve's controller
are killed on a real Ray. Halfway and at the end everything that clients hold is given back: then nothing may take a byte, a file, a
descriptor or a thread more than before the storm, and memory may not have grown from one half to the other. Conversations whose
clients never heard their names, for a router was killed or a deadline had passed, are given back by being idle.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ray._private.ray_constants import LOG_MONITOR_MAX_OPEN_FILES

from sparsevila_cluster.client import AsyncClient
from sparsevila_cluster.core.errors import DeadlineExceeded, NotFound, QueueFull, SparseVilaError, Unavailable
from sparsevila_cluster.demo.drawing import write_mp4
from sparsevila_cluster.demo.questions import make_questions
from sparsevila_cluster.demo.scene_drawing import make_video
from tests.cluster.serve_process import ServeProcess

NUM_CLIENTS, NUM_CLIPS, NUM_QUESTIONS = 4, 3, 5
DEADLINE_S = 60.0
GRACE_S = 3.0  # of a client that was told later than its deadline
KINDS = {"Router": 20, "Registry": 15, "Prefill": 20, "Decode": 30, "Controller": 15}
FAULT_EVERY_S = (4.0, 16.0)
# What a client may be told in such a storm. Anything else, an Internal above all, is a bug.
LEGAL = (Unavailable, DeadlineExceeded, NotFound, QueueFull)
REFUSED_PAUSE_S = 0.3
UPLOAD_TTL_S, IDLE_S = 20.0, 60.0
CALM_S = 20.0
BACK_S = 240.0
SLACK = 16  # descriptors and threads that a process may have more than before the storm
LOG_MONITOR = "Ray _private/log_monitor.py"  # keeps the log of every dead replica open, up to a number of Ray's
CONFIG = f"""
door: {{upload_ttl_s: {UPLOAD_TTL_S:g}, max_deadline_s: {DEADLINE_S:g}}}
router: {{conversation_idle_s: {IDLE_S:g}}}
report_s: 0.5
"""


@dataclass(frozen=True)
class Clip:
    """A video, questions about it, and their answers, asked one after the other in a process that nothing happens to."""

    path: Path
    questions: tuple[str, ...]
    answers: tuple[tuple[int, ...], ...]


def make_clips(folder: Path) -> list[Clip]:
    from sparsevila_cluster.api.video_qa import VideoQA
    from sparsevila_cluster.core.config import EngineConfig

    clips = []
    with VideoQA(config=EngineConfig(device="cpu")) as qa:
        for seed in range(1, NUM_CLIPS + 1):
            scene, frames = make_video(seed)
            path = folder / f"{seed}.mp4"
            write_mp4(frames, path)
            questions = tuple(q.text for q in make_questions(scene, np.random.default_rng(seed), NUM_QUESTIONS))
            chat = qa.conversation(qa.prepare(path))
            clips.append(Clip(path, questions, tuple(tuple(chat.ask(question).token_ids) for question in questions)))
    return clips


class StormClient:
    """Holds one conversation at a time, and knows what it must hear. A turn that failed is as if it had never been."""

    def __init__(self, storm: Storm, client: AsyncClient, rng: random.Random):
        self._storm, self._client, self._rng = storm, client, rng
        self._chat: Any = None

    async def run(self) -> None:
        while not self._storm.over:
            await self._storm.may_run.wait()
            self._storm.num_running += 1
            try:
                await self._one_operation()
            finally:
                self._storm.num_running -= 1
            await asyncio.sleep(self._rng.random() * 0.2)

    async def _one_operation(self) -> None:
        operation = self._rng.choices(("ask", "leave", "hurry", "begin", "upload", "delete"), (60, 12, 8, 10, 6, 4))[0]
        begun_s, outcomes = time.monotonic(), self._storm.outcomes
        try:
            if self._chat is None or self._num_answers == NUM_QUESTIONS:
                await self._begin()
            await getattr(self, f"_{operation}")()
            outcomes[operation] += 1
        except LEGAL as error:
            outcomes[f"{operation}: {type(error).__name__}"] += 1
            self._storm.messages[f"{type(error).__name__}: {re.sub(r'[0-9a-f]{8,}|[0-9.]+', '#', str(error))[:110]}"] += 1
            if isinstance(error, NotFound):
                await self.leave_chat()
            if isinstance(error, Unavailable):
                await asyncio.sleep(REFUSED_PAUSE_S)
        late_s = time.monotonic() - begun_s - 3 * DEADLINE_S  # begin, ask and close have one each
        assert late_s < GRACE_S, f"{operation} told its client {late_s:.1f} s after its deadline"

    async def _begin(self, upload: bool = False) -> None:
        await self.leave_chat()
        self._clip = self._rng.choice(self._storm.clips)
        source = await self._client.upload(self._clip.path, timeout_s=DEADLINE_S) if upload else self._clip.path
        self._media = await self._client.prepare(source, timeout_s=DEADLINE_S)
        self._storm.media.add(self._media.media_id)
        self._chat, self._num_answers = self._client.conversation(self._media), 0

    async def leave_chat(self) -> None:
        chat, self._chat = self._chat, None
        if chat is not None and chat.conversation_id:
            self._storm.conversations[chat.conversation_id] = chat
            with suppress(*LEGAL):
                await chat.close()
                del self._storm.conversations[chat.conversation_id]

    async def _ask(self, timeout_s: float = DEADLINE_S) -> None:
        turn, chat = self._num_answers, self._chat
        answer = await chat.ask(self._clip.questions[turn], timeout_s=timeout_s, evidence=False)
        due = self._clip.answers[turn]
        assert answer.token_ids == due, f"the answer to question {turn} of {chat.conversation_id} is {answer.token_ids}, not {due}"
        self._num_answers += 1

    async def _leave(self) -> None:
        """What was left is forgotten, unless it was over before."""
        asking = asyncio.ensure_future(self._ask())
        await asyncio.wait((asking,), timeout=self._rng.random() * 0.2)
        asking.cancel()
        with suppress(asyncio.CancelledError):
            await asking

    async def _hurry(self) -> None:
        await self._ask(self._rng.choice((0.005, 0.02, 0.05, 0.2)))

    async def _upload(self) -> None:
        await self._begin(upload=True)

    async def _delete(self) -> None:
        await self._client.delete_media(self._media.media_id, timeout_s=DEADLINE_S)


class Storm:
    def __init__(self, served: ServeProcess, clips: Sequence[Clip], seed: int, say: Callable[[str], None]):
        self.served, self.clips, self._say = served, clips, say
        self.outcomes: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.conversations: dict[str, Any] = {}
        self.media: set[str] = set()
        self.num_running, self.over = 0, False
        self.may_run = asyncio.Event()
        self._rng = random.Random(seed)

    async def run(self, minutes: float) -> dict[str, Any]:
        """What was seen. Raises AssertionError: a wrong token, a client told too late, an error that must not be, anything kept."""
        async with AsyncClient.connect(self.served.target, timeout_s=DEADLINE_S) as client:
            for clip in self.clips:
                self.media.add((await client.prepare(clip.path)).media_id)
            self._storm_clients = [StormClient(self, client, random.Random(self._rng.random())) for _ in range(NUM_CLIENTS)]
            clients = [asyncio.ensure_future(one.run()) for one in self._storm_clients]
            try:
                await self._go_on(clients, CALM_S, with_faults=False)
                rest = [await self._rest(client, {})]
                for _ in range(2):
                    await self._go_on(clients, minutes * 30, with_faults=True)
                    await self._until_all_are_back(client)
                    await self._go_on(clients, CALM_S, with_faults=False)
                    rest.append(await self._rest(client, rest[0]))
            finally:
                self.over = True
                for task in clients:
                    task.cancel()
                await asyncio.gather(*clients, return_exceptions=True)
        first, second = (sum(each["memory_mib"].values()) for each in rest[1:])
        assert second <= 1.05 * first, f"memory grew from {first:.0f} to {second:.0f} MiB in the second half: {rest}"
        return {"memory_mib": [round(first), round(second)], "at_rest": rest}

    async def _go_on(self, clients: Sequence[asyncio.Task[None]], seconds: float, with_faults: bool) -> None:
        self.may_run.set()
        until_s = time.monotonic() + seconds
        fault_s = time.monotonic() + self._rng.uniform(*FAULT_EVERY_S)
        while time.monotonic() < until_s:
            for task in clients:
                if task.done():
                    task.result()
            await asyncio.sleep(0.1)
            if with_faults and time.monotonic() > fault_s:
                self._kill_something()
                fault_s = time.monotonic() + self._rng.uniform(*FAULT_EVERY_S)
            self._say(
                f"{sum(self.outcomes.values())} operations, {sum(self.faults.values())} kills, {until_s - time.monotonic():.0f} s"
            )
        self.may_run.clear()
        until_s = time.monotonic() + 4 * DEADLINE_S
        while self.num_running:
            assert time.monotonic() < until_s, "clients do not come to an end"
            await asyncio.sleep(0.05)

    def _kill_something(self) -> None:
        kind = self._rng.choices(tuple(KINDS), tuple(KINDS.values()))[0]
        processes = self._processes().get(kind)
        if processes:
            with suppress(ProcessLookupError):
                os.kill(self._rng.choice(processes), signal.SIGKILL)
            self.faults[kind] += 1

    def _processes(self) -> dict[str, list[int]]:
        """Those of the served cluster that live, by kind; "serve" is the command's own, "Ray ..." are all others, by program."""
        done = subprocess.run(["ps", "-eo", "pid=,sid=,stat=,args="], capture_output=True, text=True, check=True)
        found = defaultdict(list)
        for pid, session, state, name in (
            line.split(None, 3) for line in done.stdout.splitlines() if len(line.split(None, 3)) == 4
        ):
            if session == str(self.served.process.pid) and not state.startswith("Z"):
                replica = re.match(r"ray::ServeReplica:[^:]+:(\w+)", name)
                if replica:
                    kind = replica[1]
                elif name.startswith("ray::ServeController"):
                    kind = "Controller"
                else:
                    program = next((word for word in name.split() if word.endswith(".py")), name.split()[0])
                    kind = "serve" if int(pid) == self.served.process.pid else f"Ray {'/'.join(Path(program).parts[-2:])}"
                found[kind].append(int(pid))
        return found

    async def _until_all_are_back(self, client: AsyncClient) -> None:
        until_s = time.monotonic() + BACK_S
        while True:
            with suppress(SparseVilaError):
                pools = (await client.info())["details"]["pools"]
                if {name: len(pool) for name, pool in pools.items()} == {"prefill": 1, "decode": 2}:
                    return
            assert time.monotonic() < until_s, f"not everybody is back: {self._processes()}"
            await asyncio.sleep(0.5)

    async def _rest(self, client: AsyncClient, before: dict[str, Any]) -> dict[str, Any]:
        """Give everything back; what processes take then. Raises AssertionError: more of something than `before`."""
        for one in self._storm_clients:
            await one.leave_chat()
        until_s = time.monotonic() + IDLE_S + 60
        while kept := await self._kept(client):
            assert time.monotonic() < until_s, f"not given back: {kept}"
            await asyncio.sleep(1.0)
        now: dict[str, Any] = {"fds": {}, "threads": {}, "memory_mib": {}, "processes": {}}
        for kind, pids in self._processes().items():
            now["fds"][kind] = max(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)
            now["threads"][kind] = max(len(os.listdir(f"/proc/{pid}/task")) for pid in pids)
            now["memory_mib"][kind] = round(sum(anonymous_mib(pid) for pid in pids), 1)
            now["processes"][kind] = len(pids)
        for name in ("fds", "threads") if before else ():
            for kind, num in now[name].items():
                slack = LOG_MONITOR_MAX_OPEN_FILES if (name, kind) == ("fds", LOG_MONITOR) else SLACK
                most = before[name].get(kind, num) + slack
                assert num <= most, f"{kind} has {num} {name}; before the storm {most - slack}"
        return now

    async def _kept(self, client: AsyncClient) -> dict[str, Any]:
        with suppress(*LEGAL):
            for conversation_id, chat in list(self.conversations.items()):
                await chat.close()
                self.conversations.pop(conversation_id, None)
            for media_id in self.media:
                await client.delete_media(media_id)
        with suppress(*LEGAL):
            details = (await client.info())["details"]
            loads = [one["info"]["load"] if "load" in one["info"] else one["load"] for one in details["pools"]["decode"]]
            counts = {
                "prefix_bytes": sum(load["prefix_bytes"] for load in loads),
                "turn_bytes": sum(load["turn_bytes"] for load in loads),
                "running": sum(load["num_running"] + load["num_waiting"] for load in loads),
                "copy_bytes": sum(one["info"]["copy_bytes"] for one in details["pools"]["prefill"]),
                "media": len(details["media"]),
                "conversations in the registry": details["conversations"],
                "conversations of workers": sum(one["info"]["conversations"] for one in details["pools"]["decode"]),
                "turns": details["router"]["turns"],
                "calls": details["door"]["calls"] - 1,  # this one
                "spool_bytes": details["door"]["spool_bytes"],
            }
            return {name: num for name, num in counts.items() if num}
        return {"no answer": True}


def anonymous_mib(pid: int) -> float:
    """Memory that is this process's own. 0 where it has just ended."""
    with suppress(OSError):
        found = re.search(r"RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) / 1024 if found else 0.0
    return 0.0


def main(argv: Sequence[str] | None = None) -> int:
    import torch
    from rich.console import Console

    parser = argparse.ArgumentParser(prog="python -m tests.chaos.ray_storm", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    started_s, console = time.perf_counter(), Console(stderr=True)
    with tempfile.TemporaryDirectory() as name, console.status("start") as status:
        folder = Path(name)
        clips = make_clips(folder)
        (folder / "cluster.yaml").write_text(CONFIG)
        served = ServeProcess(folder, "--config", "cluster.yaml", "--port", "0")
        storm: Storm | None = None
        try:
            served.wait()
            storm = Storm(served, clips, options.seed, status.update)
            seen = asyncio.run(storm.run(options.minutes))
        except (AssertionError, SparseVilaError) as error:
            console.print_exception()
            console.print(served.log.read_text()[-3000:], markup=False)
            print(f"storm FAILED: seed {options.seed}: {type(error).__name__}: {error}")
            return 1
        finally:
            if storm is not None:
                for message, num in storm.messages.most_common(20):
                    console.print(f"{num:5}  {message}", markup=False)
            served.stop()
    text = ", ".join(f"{name} {num}" for name, num in sorted((storm.outcomes + storm.faults).items()))
    for moment, taken in zip(("before", "halfway", "at the end"), seen["at_rest"], strict=True):
        print(f"{moment}: {taken}")
    first, second = seen["memory_mib"]
    print(
        f"storm ok: seed {options.seed}, {options.minutes:g} minutes of storm in {time.perf_counter() - started_s:.0f} s: {text}; "
        f"memory {first} MiB after the first half, {second} MiB after the second ({second / first:.3f})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
