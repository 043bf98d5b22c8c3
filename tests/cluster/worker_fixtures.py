"""Real workers in one process, for tests: tiny checkpoints, clips, tickets, and what must be free again in the end."""

import asyncio
import threading
import time
import uuid
from contextlib import asynccontextmanager

from sparsevila_cluster.cluster.workers.decode_worker import DecodeWorker
from sparsevila_cluster.cluster.workers.prefill_job import PrefillJob
from sparsevila_cluster.cluster.workers.prefill_worker import PrefillWorker
from sparsevila_cluster.core.cluster_config import build_cluster_config
from sparsevila_cluster.core.metrics import Tally
from sparsevila_cluster.core.requests import MediaSource, PrepareRequest, SamplingParams, Turn
from sparsevila_cluster.engine.decode_engine import DecodeEngine
from sparsevila_cluster.media import DecoderSandbox
from sparsevila_cluster.transport import TransferTicket

QUESTIONS = ("what colour is the star?", "where is the circle?", "how many squares are there?")


def request_of(clip, **fields):
    return PrepareRequest((MediaSource(str(clip)),), **fields)


def turn_of(media_id, question=QUESTIONS[0], conversation="c", max_tokens=6, **fields):
    return Turn(uuid.uuid4().hex, conversation, media_id, question, SamplingParams(max_tokens=max_tokens), **fields)


def config_of(checkpoint, kind="inproc", engine=None, transport=None, **fields):
    lanes = {"kind": kind, "host": "127.0.0.1", "chunk_bytes": 64 * 1024, "op_timeout_s": 5.0, "silence_s": 2.0, "beat_s": 0.2}
    return build_cluster_config(
        engine={
            "model": str(checkpoint), "fps": 4.0, "prune_keep": 0.6, "retrieve_keep": 0.4, "prefill_chunk": 16,
            "prefix_bytes": 4 * 2**20, "turn_bytes": 4 * 2**20, "close_timeout_s": 10.0, **(engine or {}),
        },
        transport={**lanes, **(transport or {})},
        prefill={"copy_bytes": 4 * 2**20, **fields.pop("prefill", {})},
        content_secret="of the workers of a test, so that all agree",
        **fields,
    )  # fmt: skip


class SharedSandbox(DecoderSandbox):
    """One process that decodes for every worker of every test: starting one takes longer than most tests."""

    def close(self):
        pass


SANDBOX = SharedSandbox()


class LocalObjectStore:
    """An object store within one event loop: what is put lies in a dict, receivers are called through their workers' coroutines."""

    def __init__(self):
        self.loop, self.objects, self.receivers = asyncio.get_running_loop(), {}, {}

    def put(self, array):
        token = uuid.uuid4().hex
        self.objects[token] = array.copy()
        return token

    def get(self, token, within_s):
        return self.objects.pop(token)

    def exchange(self, receiver, lane_id, messages, wait_s):
        call = self.receivers[receiver.worker].exchange(lane_id, messages, wait_s)
        return asyncio.run_coroutine_threadsafe(call, self.loop).result(wait_s + 10)


@asynccontextmanager
async def workers(config, prefill=1, decode=1, **given):
    """(prefill workers, decode workers), closed at the end; then nothing of theirs may be left in an arena."""
    made = [PrefillWorker(f"prefill-{i}", config, sink=Tally(), **given) for i in range(prefill)]
    for worker in made:
        worker.engine.sandbox = SANDBOX
    held = [DecodeWorker(f"decode-{i}", config, sink=Tally(), **given) for i in range(decode)]
    if "object_store" in given:
        given["object_store"].receivers = {worker.name: worker for worker in held}
    try:
        yield made, held
        for worker in held:
            await settled(worker)
        for worker in made:
            await settled(worker)
    finally:
        for worker in [*made, *held]:
            await worker.close()
    for worker in held:
        worker.engine.check_integrity()
        assert worker.engine.prefixes.arena.used_bytes == worker.engine.conversations.arena.used_bytes == 0


async def settled(worker, within_s=10.0):
    """Wait until nothing is under way any more: every used byte is of a finished prefix or conversation."""
    until_s = time.monotonic() + within_s
    while True:
        try:
            if isinstance(worker, PrefillWorker):
                worker.copies.check_integrity()
                assert worker.copies.used_bytes == sum(prefix.kv_bytes for prefix in worker.copies.all())
                assert not worker._jobs
            elif not worker._closed:
                await worker.async_engine.call(DecodeEngine.check_integrity)
                resident = await worker.async_engine.call(lambda engine: sum(p.kv_bytes for p in engine.prefixes))
                assert worker.engine.prefixes.arena.used_bytes == resident
                assert not worker.engine.turns
            return
        except AssertionError:
            if time.monotonic() > until_s:
                raise
            await asyncio.sleep(0.01)


async def ticket_for(decode, key, transfer_id=None, num_bytes=None, lease_s=20.0, deadline_s=20.0):
    transfer_id = transfer_id or uuid.uuid4().hex
    return TransferTicket(transfer_id, await decode.reserve(transfer_id, key, num_bytes, lease_s), deadline_s)


async def made(prefill, request, key, ticket):
    """(handle, report, progress) of a whole `make`."""
    *progress, (last, handle, report) = [item async for item in prefill.make(request, key, ticket)]
    assert last == "made" and all(item[0] == "progress" for item in progress)
    return handle, report, progress


async def prepared(prefill, decode, request):
    """Prepare media the way a router does: reserve, then make."""
    key = await prefill.key_of(request)
    handle, report, _ = await made(prefill, request, key, await ticket_for(decode, key))
    assert handle.media_id == key
    return handle, report


async def events_of(stream):
    """(events, sizes of the lists) of an answer."""
    lists = [events async for events in stream]
    return [event for events in lists for event in events], [len(events) for events in lists]


def tokens_of(events):
    return tuple(token for event in events for token in event.token_ids)


async def answer(decode, turn, history=None):
    events, _ = await events_of(decode.ask(turn, history))
    assert events[-1].kind == "done"
    return tokens_of(events)


def rows_of(prefix):
    """Keys and values of all layers, copied."""
    return [rows.clone() for layer in range(prefix.spec.num_layers) for rows in prefix.extent.rows(layer)]


async def until(true, within_s=10.0):
    until_s = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < until_s
        await asyncio.sleep(0.005)


class Gate:
    """Stops prefills before the piece of layer `layer` that begins at row `start`, until it is opened."""

    def __init__(self, monkeypatch, start=16, layer=0):
        self.reached, self.opened = threading.Event(), threading.Event()
        on_rows = PrefillJob.on_rows

        def gated(job, at, first, stop):
            if at == layer and first >= start and not self.opened.is_set():
                self.reached.set()
                assert self.opened.wait(20)
            on_rows(job, at, first, stop)

        monkeypatch.setattr(PrefillJob, "on_rows", gated)

    async def wait(self):
        assert await asyncio.to_thread(self.reached.wait, 20)
