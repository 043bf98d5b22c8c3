"""`sparsevila serve`: starts the application on a Ray of its own or a running one, watches it, and ends it on a signal."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve import RunTarget
from ray.serve.schema import ApplicationStatusOverview, ReplicaState

from sparsevila_cluster.cluster.check_cluster import check_cluster
from sparsevila_cluster.cluster.on_ray.replicas import REGISTRY, ROUTER
from sparsevila_cluster.cluster.on_ray.serve_caller import ServeCaller
from sparsevila_cluster.core.cluster_config import ClusterConfig
from sparsevila_cluster.core.deadline import GRACE_S
from sparsevila_cluster.core.errors import (
    BadCheckpoint,
    DeadlineExceeded,
    Internal,
    SparseVilaError,
    Unavailable,
    UserError,
    from_failure,
)
from sparsevila_cluster.core.progress_line import ProgressLine
from sparsevila_cluster.serve.application import application, with_routers
from sparsevila_cluster.serve.local_ray import REPLICA_ENV, call_within, local_ray, set_ray_log_level

POLL_S = 0.2
WATCH_S = 2.0


def serve_cluster(config: ClusterConfig, address: str | None = None, verbose: bool = False) -> None:
    """Run the cluster until SIGINT or SIGTERM; then let calls in progress finish, and end everything.

    address: of a Ray cluster that is there ("auto" or host:port), None = one of its own on this machine. When clients can be
    served, one line with the target goes to stdout; progress goes to stderr.

    Raises:
        BadConfig, BadCheckpoint: a configuration that cannot be started. Unavailable: the port is taken, no Ray at the address, or
        Ray is gone, or does not answer within `start_timeout_s`. DeadlineExceeded: not ready within `start_timeout_s`.
        KeyboardInterrupt: interrupted before it was ready.
    """
    check_cluster(config)
    start_s, stdout = time.perf_counter(), sys.stdout
    with ExitStack() as stack:
        stack.enter_context(_interrupted_by(signal.SIGTERM))
        # Ray prints what happens to its processes on stdout.
        stack.enter_context(redirect_stdout(sys.stderr if verbose else stack.enter_context(open(os.devnull, "w"))))
        progress = stack.enter_context(ProgressLine())
        if address is None:
            gateway = config.door.model_copy(update={"port": stack.enter_context(_reserved_port(config))})
            config = with_routers(config.model_copy(update={"door": gateway}), spool_follows=True)
            if not (config.engine.model_dir / "config.json").is_file():
                raise BadCheckpoint(f"{config.engine.model!r} is no checkpoint: there is no config.json in it")
            progress.stage("start Ray", 0, 1)
            folder = stack.enter_context(local_ray(config, verbose))
            if gateway.spool_dir is None:  # routers share it, and it goes with the rest
                gateway = gateway.model_copy(update={"spool_dir": str(folder / "spool")})
                config = config.model_copy(update={"door": gateway})
        else:
            progress.stage("connect to Ray", 0, 1)
            stack.enter_context(_connected(address, verbose, config.start_timeout_s))
            config = with_routers(config)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has put its own there
        app = application(config, {} if address is None else REPLICA_ENV, verbose)  # an own Ray hands its environment on
        serve.run_many([RunTarget(app, name=config.name, route_prefix=None)], wait_for_applications_running=False)
        stack.callback(call_within, config.drain_timeout_s + GRACE_S, lambda: serve.delete(config.name))
        port = _wait_until_ready(config, start_s + config.start_timeout_s, progress.stage)
        progress.clear()
        host = f"[{config.door.host}]" if ":" in config.door.host else config.door.host
        print(f"serving on {host}:{port} after {time.perf_counter() - start_s:.1f} s", file=stdout, flush=True)
        try:
            _watch(config)
        except KeyboardInterrupt:
            with _ignoring(signal.SIGINT, signal.SIGTERM):
                _drain(config)


@contextmanager
def _interrupted_by(number: int) -> Iterator[None]:
    """A signal that ends as Ctrl-C does."""
    before = signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@contextmanager
def _ignoring(*numbers: int) -> Iterator[None]:
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def _connected(address: str, verbose: bool, within_s: float) -> Iterator[None]:
    """Ray's own deadlines add up to minutes, so it is asked in a thread that nobody has to wait for. Raises Unavailable."""
    set_ray_log_level(verbose)
    connecting: Future[None] = Future()

    def connect() -> None:
        try:
            ray.init(address=address, log_to_driver=verbose, logging_level=logging.INFO if verbose else logging.CRITICAL)
            serve.start(proxy_location="Disabled")
            connecting.set_result(None)
        except BaseException as error:
            connecting.set_exception(error)

    threading.Thread(target=connect, name="connect to Ray", daemon=True).start()
    try:
        connecting.result(within_s)
    except (OSError, RuntimeError, ValueError, RayError) as error:  # also TimeoutError
        lines = str(error).strip().splitlines() or [f"no answer within {within_s:g} s"]
        raise Unavailable(f"no Ray cluster at {address!r}: {lines[0]}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _reserved_port(config: ClusterConfig) -> Iterator[int]:
    """The port that all routers listen on, now and when one of them starts again: nobody else gets it while the context lasts.

    Raises Unavailable: somebody has it, also one who would share it.
    """
    host, port = config.door.host, config.door.port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            reserved.bind((host, port))
        except OSError as error:
            raise Unavailable(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
        # Bound alone, in spite of connections of a former server that linger. Then shared with routers of this user, not
        # with whoever only allows addresses to be used again. It never listens: connections go to the routers.
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        yield int(reserved.getsockname()[1])


def _wait_until_ready(config: ClusterConfig, until_s: float, report: Callable[[str, int, int], None]) -> int:
    """The port that clients connect to, once they can be served."""
    num_wanted = config.prefill.replicas + config.decode.replicas + config.router.replicas + 1
    registry: ServeCaller | None = None
    state: dict[str, Any] = {"ready": False}
    missing = "nothing has started"
    while not state["ready"]:
        if time.perf_counter() > until_s:
            raise DeadlineExceeded(f"the cluster was not ready within {config.start_timeout_s:g} s: {missing}")
        time.sleep(POLL_S)
        status = serve.status().applications.get(config.name)
        if status is None:
            continue
        deployments = status.deployments
        num_running = {name: one.replica_states.get(ReplicaState.RUNNING, 0) for name, one in deployments.items()}
        starting = [name for name, one in deployments.items() if one.status != "HEALTHY"]
        failures: dict[str, dict[str, Any]] = {}
        if num_running.get(REGISTRY):
            registry = registry or _caller(config, REGISTRY)
            failures = _ask(registry, "start_failures", config) or {}
        _check_start(status, [failures[name] for name in starting if name in failures])
        missing = ", ".join(f"{name} is {deployments[name].status.value.lower()}" for name in starting)
        report("start workers", min(sum(num_running.values()), num_wanted - 1), num_wanted)
        if status.status == "RUNNING":
            missing = "the workers have not reported"
            state = _ask(_caller(config, ROUTER), "state", config) or state
    return int(state["port"])


def _check_start(status: ApplicationStatusOverview, failures: list[dict[str, Any]]) -> None:
    """Raise what a replica could not start from: at once if the user can fix it, else when Serve gives up."""
    given_up = status.status == "DEPLOY_FAILED"
    for error in map(from_failure, failures):
        if given_up or isinstance(error, UserError):
            raise error
    if given_up:
        messages = [status.message, *(one.message for one in status.deployments.values())]
        lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
        raise Internal(f"the application could not be started: {lines[-1] if lines else 'Serve does not say why'}")


def _ask(caller: ServeCaller, method: str, config: ClusterConfig) -> Any:
    """What a replica answers; None if none answers: it may be gone the next moment."""
    try:
        return asyncio.run(caller.call(None, method, within_s=config.router.call_timeout_s))
    except SparseVilaError:
        return None


def _caller(config: ClusterConfig, deployment: str) -> ServeCaller:
    return ServeCaller(serve.get_deployment_handle(deployment, app_name=config.name))


def _watch(config: ClusterConfig) -> None:
    """Never returns; Serve restarts its replicas. Raises Unavailable: the application or Ray is gone."""
    while True:
        time.sleep(WATCH_S)
        try:
            there = config.name in serve.status().applications
        except Exception as error:
            raise Unavailable(f"Ray is gone: {type(error).__name__}: {error}") from error
        if not there:
            raise Unavailable(f"the application {config.name!r} was deleted")


def _drain(config: ClusterConfig) -> None:
    """Let routers take no more calls and finish those in progress, while the workers run."""
    handle, grace_s = serve.get_deployment_handle(ROUTER, app_name=config.name), config.drain_timeout_s

    async def drain() -> list[Any]:
        draining = handle.broadcast("call", None, "drain", (grace_s,))
        return await draining.results_async(timeout_s=grace_s + GRACE_S, return_exceptions=True)

    try:
        ends = asyncio.run(drain())
    except Exception as error:
        ends = [error]
    for end in ends:  # a router that does not stop is stopped with its process; one that died has no calls
        if isinstance(end, Exception) and not isinstance(end, RayActorError):
            print(f"a router did not finish its calls within {grace_s:g} s: {type(end).__name__}", file=sys.stderr)
