"""One cluster of real processes for all modules here; workers that die in a case are replaced for the next one."""

import asyncio

import pytest

from tests.chaos.checked_clients import film_of
from tests.chaos.kill_points import LATER
from tests.chaos.process_cluster import Town, config_of
from tests.chaos.worker_processes import Zygote
from tests.checkpoints.tiny_qwen2_5_vl import make_qwen2_5_vl
from tests.cluster.worker_fixtures import write_clip

TOLD: list[tuple[str, str]] = []


@pytest.fixture(scope="session")
def runner():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="session")
def world(runner, tmp_path_factory):
    """(town, the film of the client that is hit, the film of the neighbours)."""
    folder = tmp_path_factory.mktemp("chaos")
    checkpoint = make_qwen2_5_vl(folder / "tiny", seed=0)
    zygote = Zygote(checkpoint, folder)
    try:

        async def build():
            town = Town(zygote, config_of(checkpoint))
            films = [await film_of(write_clip(folder / f"{seed}.mp4", seed=seed), town.config) for seed in range(2)]
            assert films[0].answers != films[1].answers and len(films[0].answers[1]) > LATER, "too few tokens to see a wrong one"
            return town, *films

        made = runner.run(build())
        yield made
        runner.run(made[0].close())
    finally:
        zygote.close()


@pytest.fixture
def tell():
    """Notes a line for the table that is printed at the end."""
    return lambda case, what: TOLD.append((case, what))


def pytest_terminal_summary(terminalreporter):
    width = max((len(case) for case, _ in TOLD), default=0)
    if TOLD:
        terminalreporter.section("recovery")
    for case, what in TOLD:
        terminalreporter.write_line(f"{case:{width}}  {what}")
