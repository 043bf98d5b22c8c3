"""One cluster of real processes for all modules here; workers that die in a case are replaced for the next one."""

import asyncio

import pytest

from tests.chaos.checked_clients import checked_clip
from tests.chaos.kill_points import LATER
from tests.chaos.process_cluster import ProcessCluster, config_of
from tests.chaos.worker_processes import WorkerForker
from tests.checkpoints.tiny_qwen2_5_vl import make_qwen2_5_vl
from tests.media.clips import write_clip

NOTES: list[tuple[str, str]] = []


@pytest.fixture(scope="session")
def runner():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="session")
def world(runner, tmp_path_factory):
    """(cluster, the clip of the client that is hit, the clip of the bystanders)."""
    folder = tmp_path_factory.mktemp("chaos")
    checkpoint = make_qwen2_5_vl(folder / "tiny", seed=0)
    forker = WorkerForker(checkpoint, folder)
    try:

        async def build():
            cluster = ProcessCluster(forker, config_of(checkpoint))
            clips = [await checked_clip(write_clip(folder / f"{seed}.mp4", seed=seed), cluster.config) for seed in range(2)]
            assert clips[0].answers != clips[1].answers and len(clips[0].answers[1]) > LATER, "too few tokens to see a wrong one"
            return cluster, *clips

        made = runner.run(build())
        yield made
        runner.run(made[0].close())
    finally:
        forker.close()


@pytest.fixture
def note():
    """Notes a line for the table that is printed at the end."""
    return lambda case, what: NOTES.append((case, what))


def pytest_terminal_summary(terminalreporter):
    width = max((len(case) for case, _ in NOTES), default=0)
    if NOTES:
        terminalreporter.section("recovery")
    for case, what in NOTES:
        terminalreporter.write_line(f"{case:{width}}  {what}")
