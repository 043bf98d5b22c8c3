"""Broken calls and broken HTTP/2 against a server, thousands of them: `python -m tests.gateway.fuzz_door --cases 100000 --seed 0`.

The server is a real one on a socket, over a real pipeline with a tiny model. Every call must end in time with a result or a typed
error; after each batch a valid call is answered rightly, and neither tasks, files, uploads, conversations nor turns are left. What
violates this is named with its number; `--only NUMBER` tries one case again.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import msgpack

from benchmarks.lib import http2_frames as h2
from sparsevila_cluster.core.errors import from_failure
from sparsevila_cluster.pb import video_qa_pb2 as pb
from tests.checkpoints.tiny_qwen2_5_vl import make_qwen2_5_vl
from tests.gateway.door_mutants import METHODS, Case, Known, case_of
from tests.gateway.running_servers import RunningServer, ask, clip, prepare, running_server

BATCH = 500
AT_ONCE = 24
# A call ends by itself long before this; a connection of frames is cut by us.
DEADLINE_S = 60.0
FRAMES_S = 0.15
KEY = (("authorization", "Bearer fuzz"),)
MAX_GROWTH_BYTES = 192 << 20
# What gRPC itself answers with where no method of ours is reached.
BY_GRPC = {"UNIMPLEMENTED", "RESOURCE_EXHAUSTED", "CANCELLED"}
# What grpc.aio's client makes of a status that comes while it still sends: the status is lost.
ENDED_EARLY = ("INTERNAL", "Internal error from Core")
ENGINE = {"max_answer_tokens": 16, "max_question_bytes": 2048, "prepare_timeout_s": 30.0}
DOOR = {
    "api_keys": {"fuzz": "fuzzers"},
    "max_message_bytes": 1 << 20,
    "max_inline_bytes": 65_536,
    "upload_ttl_s": 0.5,
    "request_timeout_s": 5.0,
}


@dataclass
class Outcomes:
    counts: Counter = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")

    def line(self, num: int, seed: int, took_s: float) -> str:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in self.counts.most_common())
        return (
            f"fuzz-door: {num} cases, seed {seed}, {took_s:.0f} s: {counts}; "
            f"slowest {self.slowest[0]:.2f} s ({self.slowest[1]}); {len(self.violations)} violations"
        )


class ErrorLog(logging.Handler):
    """What anybody logs as an error meanwhile."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        cause = (
            "" if not record.exc_info or record.exc_info[0] is None else f" ({record.exc_info[0].__name__}: {record.exc_info[1]})"
        )
        self.lines.append(f"{record.name}: {record.getMessage()[:300]}{cause}")


class DoorFuzzer:
    """Tries cases against one running server."""

    def __init__(self, served: RunningServer, seed: int):
        self._served, self._seed = served, seed
        self.outcomes, self._known, self._log = Outcomes(), Known(), ErrorLog()
        self._conversations: set[str] = set()
        self._replies = {h2.SERVICE + method.name: method.output_type for method in METHODS}

    async def start(self) -> None:
        """Learn what is right, and what there is before anything is wrong."""
        logging.getLogger().addHandler(self._log)
        self._known.clip = clip(0, num=2, side=56)
        media = await prepare(self._served.stub, self._known.clip, KEY)
        self._known.media_id, self._question = media.media_id, ask(media.media_id, max_tokens=4)
        self._answer = await self._control()
        gc.collect()
        await asyncio.sleep(0.2)
        self._num_tasks, self._num_files = len(asyncio.all_tasks()), self._count_files()

    def stop(self) -> None:
        logging.getLogger().removeHandler(self._log)

    async def batch(self, numbers: Sequence[int]) -> None:
        """Try these cases; where the batch as a whole is wrong, each again by itself to find out which."""
        wrong = await self._tried(numbers)
        if wrong and len(numbers) > 1:
            culprits = [(number, found) for number in numbers if (found := await self._tried([number]))]
            for number, found in culprits:
                self._violation(number, found)
            if not culprits:
                self.outcomes.violations.append(f"cases {numbers[0]} to {numbers[-1]} together: {wrong}")
        elif wrong:
            self._violation(numbers[0], wrong)

    def _violation(self, number: int, what: str) -> None:
        case = case_of(self._seed, number, self._known)
        self.outcomes.violations.append(f"--seed {self._seed} --only {number} ({case.label}): {what}")

    async def _tried(self, numbers: Sequence[int]) -> str:
        """What is wrong after these cases, "" if nothing."""
        gate = asyncio.Semaphore(AT_ONCE)
        wrong: list[str] = []

        async def one(number: int) -> None:
            async with gate:
                case = case_of(self._seed, number, self._known)
                begun_s = time.monotonic()
                told = await (self._send_frames(case) if case.frames else self._send_call(case))
                took_s = time.monotonic() - begun_s
                self.outcomes.slowest = max(self.outcomes.slowest, (took_s, f"{number} {case.label}"))
                if told is not None:
                    wrong.append(f"{number} ({case.label}) {told}")

        await asyncio.gather(*map(one, numbers))
        with suppress(AssertionError):
            wrong += await self._left_behind()
        if self._log.lines:
            wrong += [f"logged {line}" for line in self._log.lines[:3]]
            self._log.lines.clear()
        return "; ".join(wrong[:5])

    async def _send_call(self, case: Case) -> str | None:
        method = self._served.channel.stream_stream(case.path, request_serializer=bytes, response_deserializer=bytes)

        call = method(timeout=DEADLINE_S, metadata=case.metadata or KEY)
        replies, error = [], None
        with suppress(grpc.aio.AioRpcError, grpc.aio.InternalError, asyncio.InvalidStateError):  # it may have ended by then
            for message in case.messages:
                await call.write(message)
            await call.done_writing()
        try:
            while (reply := await call.read()) is not grpc.aio.EOF:
                replies.append(reply)
            if (code := await call.code()) is not grpc.StatusCode.OK:
                raise grpc.aio.AioRpcError(
                    code, await call.initial_metadata(), await call.trailing_metadata(), await call.details()
                )
        except grpc.aio.AioRpcError as failed:
            error = failed
        except UnicodeDecodeError as failed:
            return f"the status is no text: {failed}"
        if error is None:
            self.outcomes.counts["OK"] += 1
            return self._check_replies(case, replies)
        code = error.code().name
        if (code, error.details()) == ENDED_EARLY:
            self.outcomes.counts["ended while we sent"] += 1
            return None
        self.outcomes.counts[code] += 1
        failure = dict(error.trailing_metadata() or ()).get("sparsevila-failure-bin")
        if failure is None:
            return (
                None if code in BY_GRPC and "Traceback" not in (error.details() or "") else f"{code} of no kind: {error.details()}"
            )
        raised = from_failure(msgpack.unpackb(failure))
        if code in ("INTERNAL", "UNKNOWN") or raised.grpc_status != code or "Traceback" in str(raised) or not str(raised):
            return f"{code}: {type(raised).__name__}: {raised}"
        return None

    def _check_replies(self, case: Case, replies: list[bytes]) -> str | None:
        kind = self._replies.get(case.path)
        if kind is None:
            return None
        name = case.path.rpartition("/")[2]
        parsed = [getattr(pb, kind.name).FromString(reply) for reply in replies]
        if name in ("Ask", "Answer"):
            last = parsed[-1].done if name == "Ask" else parsed[-1]
            if last.finish_reason not in ("stop", "length"):
                return f"ended with {last.finish_reason!r}"
            self._conversations.add(last.conversation_id)
        return None if parsed else "succeeded without a message"

    async def _send_frames(self, case: Case) -> str | None:
        async with h2.connection(self._served.address, b"") as opened:
            await opened.send(case.frames)
            kinds: Counter = Counter()
            async for frame in opened.frames(FRAMES_S):
                kinds[frame.kind] += 1
                if frame.kind == h2.SETTINGS and not frame.flags & h2.ACK:
                    await opened.send(h2.frame(h2.SETTINGS, h2.ACK))
                if frame.kind == h2.RST_STREAM or frame.kind == h2.HEADERS and frame.flags & h2.END_STREAM:
                    break
        answer = {h2.RST_STREAM: "reset", h2.GOAWAY: "goaway", h2.HEADERS: "answered"}
        self.outcomes.counts["frames " + next((name for kind, name in answer.items() if kinds[kind]), "unanswered")] += 1
        return None

    async def _control(self) -> str:
        media = await prepare(self._served.stub, self._known.clip, KEY)
        assert media.media_id == self._known.media_id
        reply = await self._served.stub.Answer(self._question, metadata=KEY, timeout=DEADLINE_S)
        self._conversations.add(reply.conversation_id)
        return reply.text

    async def _left_behind(self) -> list[str]:
        """What is not as it was before."""
        served, wrong = self._served, []
        if not served.server.healthy:
            wrong.append("the server has ended")
        try:
            if (answer := await self._control()) != self._answer:
                wrong.append(f"answers {answer!r} instead of {self._answer!r}")
        except (grpc.aio.AioRpcError, AssertionError) as error:
            wrong.append(f"the control call fails: {error}")
        for name in self._conversations:
            await served.stub.CloseConversation(pb.CloseConversationRequest(conversation_id=name), metadata=KEY)
        self._conversations.clear()
        spool, deadline_s = served.service._spool, time.monotonic() + 10
        while left := await self._leftovers():
            if time.monotonic() > deadline_s:
                wrong.append(f"left: {left}")
                break
            await asyncio.to_thread(spool.sweep)
            await asyncio.sleep(0.05)
        return wrong

    async def _leftovers(self) -> str:
        info = await self._served.pipeline.info()
        counts = {name: info[name] for name in ("conversations", "turns_running", "turns_waiting", "turn_bytes")}
        spool = self._served.service._spool
        counts["calls"], counts["spool_bytes"] = self._served.service._shares.num_calls, spool.num_bytes
        counts["spool_files"] = sum(1 for path in spool._folder.glob("*/*"))
        counts["tasks"] = max(0, len(asyncio.all_tasks()) - self._num_tasks)
        counts["files"] = max(0, self._count_files() - self._num_files)
        return ", ".join(f"{count} {name}" for name, count in counts.items() if count)

    def _count_files(self) -> int:
        """Open files, without the two of each decoder process, of which some stay."""
        return len(os.listdir("/proc/self/fd")) - 2 * len(self._served.pipeline.prefill.engine.sandbox.pids())


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def fuzz(
    numbers: Sequence[int], seed: int, checkpoint: Path, advance: Callable[[int, Outcomes], None] = lambda *_: None
) -> tuple[Outcomes, str]:
    """Try these cases; what came of it and its summary line."""
    begun_s, settled_bytes = time.monotonic(), None
    async with running_server(checkpoint, engine=ENGINE, **DOOR) as served:
        fuzzer = DoorFuzzer(served, seed)
        await fuzzer.start()
        try:
            for at in range(0, len(numbers), BATCH):
                some = numbers[at : at + BATCH]
                await fuzzer.batch(some)
                advance(len(some), fuzzer.outcomes)
                if settled_bytes is None and at >= len(numbers) // 4:
                    settled_bytes = _resident_bytes()
        finally:
            fuzzer.stop()
        growth = _resident_bytes() - (settled_bytes or 0)
        if growth > MAX_GROWTH_BYTES and len(numbers) > 8 * BATCH:
            fuzzer.outcomes.violations.append(f"the process grew by {growth} bytes in the last three quarters")
    return fuzzer.outcomes, fuzzer.outcomes.line(len(numbers), seed, time.monotonic() - begun_s)


def main(argv: Sequence[str] | None = None) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    parser = argparse.ArgumentParser(prog="python -m tests.gateway.fuzz_door", description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=2000, help="how many (default 2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one case")
    options = parser.parse_args(argv)
    numbers = range(options.cases) if options.only is None else [options.only]
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=len(numbers))

        def advance(num: int, outcomes: Outcomes) -> None:
            progress.update(task, advance=num, description=f"{len(outcomes.violations)} violations")

        outcomes, line = asyncio.run(fuzz(numbers, options.seed, make_qwen2_5_vl(Path(folder), seed=0), advance))
    for violation in outcomes.violations:
        print(f"VIOLATION {violation}")
    print(line)
    return 1 if outcomes.violations else 0


if __name__ == "__main__":
    sys.exit(main())
