"""Replicas by name over a real Ray: pinned calls, streams, errors as values, cancelling, and what a lost worker looks like."""

import asyncio
import contextlib
import os
import signal
import subprocess
import time

import pytest
from ray import serve
from ray.serve.config import RequestRouterConfig

from sparsevila_cluster.cluster.on_ray.serve_caller import worker_pool
from sparsevila_cluster.core.cluster_config import ClusterConfig
from sparsevila_cluster.core.errors import DeadlineExceeded, Internal, NotFound, QueueFull, WorkerLost
from sparsevila_cluster.serve.local_ray import local_ray
from tests.cluster.ray_workers import FaultyApi, FaultyReplica
from tests.processes import stop
from tests.structure import ROOT

pytestmark = pytest.mark.slow
PIN_ROUTER = RequestRouterConfig(request_router_class="sparsevila_cluster.cluster.on_ray.replica_pinning:PinRouter")
SILENCE_S = 1.5


@pytest.fixture(scope="module")
def handle():
    os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'kernels'}"  # what replicas import
    with local_ray(ClusterConfig()) as folder:
        yield serve.run(faulty(2), name="faulty", route_prefix=None)
    assert not folder.exists()
    assert "ray" not in " ".join(line for line in children())


def faulty(num_replicas):
    deployment = serve.deployment(FaultyReplica, name="Faulty", num_replicas=num_replicas).options(
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0},
        health_check_period_s=1,
        health_check_timeout_s=2,
        graceful_shutdown_timeout_s=10,
        request_router_config=PIN_ROUTER,
    )
    return deployment.bind()


def children():
    done = subprocess.run(["ps", "-o", "args=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    return [line for line in done.stdout.splitlines() if not line.startswith("ps ")]


def run_with_replicas(handle, scenario):
    """Run `scenario(pool, {worker: process})` in an event loop of its own, with both replicas there."""

    async def run():
        pool = worker_pool(handle, FaultyApi, SILENCE_S)
        try:
            return await scenario(pool, await replicas_of(handle))
        finally:
            await pool.close()

    return asyncio.run(run())


async def replicas_of(handle, num=2, within_s=60):
    """{worker: process} of all replicas, once there are `num`."""
    until_s = time.monotonic() + within_s
    while time.monotonic() < until_s:
        answers = await handle.broadcast("call", None, "who", ()).results_async(timeout_s=5)
        if len(answers) == num:
            return dict(item for kind, item in answers)
        await asyncio.sleep(0.1)
    raise AssertionError(f"{num} replicas did not come within {within_s} s")


async def replaced(handle, victim, within_s=60):
    """Wait until another replica has taken the place of `victim`."""
    until_s = time.monotonic() + within_s
    while time.monotonic() < until_s:
        replicas = serve.status().applications["faulty"].deployments["Faulty"].replica_states
        if replicas.get("RUNNING") == 2 and len(replicas) == 1:
            with contextlib.suppress(Exception):  # the broadcast may still count on the victim
                if victim not in await replicas_of(handle, within_s=1):
                    return
        await asyncio.sleep(0.2)
    raise AssertionError(f"{victim} was not replaced within {within_s} s")


async def collect(pool, worker, *args, within_s=20.0):
    return [item async for item in pool.stream(worker, "count", *args, within_s=within_s)]


async def begun(stream):
    """A task that collects the rest of a stream whose first item has come."""
    first = await anext(stream)

    async def collect():
        return [first, *[item async for item in stream]]

    return asyncio.create_task(collect())


async def seen(pool, worker, entry, within_s=5.0):
    """Wait until the worker has logged `entry`."""
    until_s = time.monotonic() + within_s
    while entry not in (log := await pool.call(worker, "read_log", within_s=5)):
        assert time.monotonic() < until_s, log
        await asyncio.sleep(0.02)


def test_a_pinned_call_reaches_the_worker_it_names(handle):
    async def scenario(pool, workers):
        for name, process in workers.items():
            answers = await asyncio.gather(*(pool.call(name, "who", within_s=5) for _ in range(20)))
            assert answers == [(name, process)] * 20
        with pytest.raises(WorkerLost, match="worker nobody is gone"):
            await pool.call("nobody", "who", within_s=5)
        with pytest.raises(WorkerLost, match="worker nobody is gone"):
            await collect(pool, "nobody", 3)

    run_with_replicas(handle, scenario)


def test_errors_arrive_as_what_they_were(handle):
    async def scenario(pool, workers):
        with pytest.raises(QueueFull, match="no room") as full:
            await pool.call(None, "refuse", within_s=5)
        assert full.value.retry_after_s == 7.5
        with pytest.raises(Internal, match="RuntimeError: a bug"):
            await pool.call(None, "stumble", within_s=5)
        for method in ("secret", "__init__", "log"):
            with pytest.raises(Internal, match=f"has no method '{method}'"):
                await pool.call(None, method, within_s=5)
        items = []
        with pytest.raises(NotFound, match="no more"):
            async for item in pool.stream(None, "count", 3, 0.0, "refuse", within_s=5):
                items.append(item)
        assert items == [0, 1, 2]
        with pytest.raises(Internal, match="RuntimeError: a bug"):
            await collect(pool, None, 3, 0.0, "stumble")

    run_with_replicas(handle, scenario)


def test_a_stream_arrives_in_order_and_may_be_silent_while_its_worker_lives(handle):
    async def scenario(pool, workers):
        assert await collect(pool, None, 2000) == list(range(2000))
        # Every pause is longer than the silence that counts as death: beats bridge it.
        assert await collect(pool, None, 2, SILENCE_S * 1.4) == [0, 1]

    run_with_replicas(handle, scenario)


def test_a_message_over_serves_own_limit_arrives(handle):
    async def scenario(pool, workers):
        assert await pool.call(None, "weigh", os.urandom(20 << 20), within_s=20) == 20 << 20

    run_with_replicas(handle, scenario)


def test_leaving_ends_the_work_in_the_worker(handle):
    async def scenario(pool, workers):
        worker = next(iter(workers))
        with pytest.raises(DeadlineExceeded, match=f"sleep of worker {worker} of Faulty took longer than 1 s"):
            await pool.call(worker, "sleep", 30, within_s=1)
        await seen(pool, worker, "sleep cancelled")
        async with contextlib.aclosing(pool.stream(worker, "count", 1000, 0.02, within_s=20)) as stream:
            async for item in stream:
                if item == 3:
                    break
        await seen(pool, worker, "count left")
        task = await begun(pool.stream(next(w for w in workers if w != worker), "count", 1000, 0.02, within_s=20))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await seen(pool, next(w for w in workers if w != worker), "count left")
        start_s = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="took longer than 0.5 s"):
            await collect(pool, worker, 1000, 0.02, within_s=0.5)
        assert time.monotonic() - start_s < 1.4

    run_with_replicas(handle, scenario)


def test_a_killed_worker_is_lost_at_once_and_others_go_on(handle):
    async def scenario(pool, workers):
        (victim, process), (other, _) = workers.items()
        call = asyncio.create_task(pool.call(victim, "sleep", 30, within_s=30))
        stream = await begun(pool.stream(victim, "count", 1000, 0.02, within_s=20))
        bystander = await begun(pool.stream(other, "count", 50, 0.02, within_s=20))
        start_s = time.monotonic()
        os.kill(process, signal.SIGKILL)
        for lost in (stream, call):
            with pytest.raises(WorkerLost, match=f"worker {victim}"):
                await lost
        took_s = time.monotonic() - start_s
        with pytest.raises(WorkerLost):
            await pool.call(victim, "who", within_s=5)
        assert (await pool.call(None, "who", within_s=5))[0] != victim
        assert await bystander == list(range(50))
        print(f"killed worker known to be lost after {took_s * 1e3:.0f} ms")
        assert took_s < 2.0
        await replaced(handle, victim)  # Serve starts another one, under another name

    run_with_replicas(handle, scenario)


def test_a_stopped_worker_is_lost_after_a_silence(handle):
    async def scenario(pool, workers):
        victim, process = next(iter(workers.items()))
        stream = await begun(pool.stream(victim, "count", 10_000, 0.02, within_s=60))
        start_s = time.monotonic()
        await asyncio.to_thread(stop, process)
        with pytest.raises(DeadlineExceeded, match="took longer than 0.3 s"):
            await pool.call(victim, "who", within_s=0.3)
        with pytest.raises(WorkerLost, match="has not been heard of for 1.5 s"):
            await stream
        with pytest.raises(WorkerLost, match="has not been heard of"):
            await collect(pool, victim, 3)
        assert time.monotonic() - start_s < 3 * SILENCE_S
        assert (await collect(pool, None, 3, within_s=30)) == [0, 1, 2]
        await replaced(handle, victim)  # its health checks failed, and another one took its place

    run_with_replicas(handle, scenario)


def test_everything_listens_on_loopback_only(handle):
    async def scenario(pool, workers):
        done = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True)
        ours = [line for line in done.stdout.splitlines() if any(f"pid={process}," in line for process in workers.values())]
        assert len(ours) >= len(workers), done.stdout
        assert all(line.split()[3].startswith(("127.0.0.1:", "[::ffff:127.0.0.1]:")) for line in ours), ours

    run_with_replicas(handle, scenario)


def test_a_replica_that_serve_stops_lets_its_calls_end(handle):
    async def scenario(pool, workers):
        streams = [await begun(pool.stream(worker, "count", 60, 0.05, within_s=30)) for worker in workers]
        await asyncio.to_thread(serve.run, faulty(1), name="faulty", route_prefix=None)
        for stream in streams:
            assert await stream == list(range(60))
        (left,) = await replicas_of(handle, num=1)
        assert set(workers) - {left}  # Serve stopped one of them, or both for a new one
        for stopped in set(workers) - {left}:
            with pytest.raises(WorkerLost):
                await pool.call(stopped, "who", within_s=5)
        assert (await pool.call(left, "who", within_s=5))[0] == left

    run_with_replicas(handle, scenario)
