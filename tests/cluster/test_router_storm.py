"""Clients, workers and the directory come and go at random: right answers or typed errors, and nothing left over."""

import asyncio
import random

import pytest

from sparsevila_cluster.core.errors import DeadlineExceeded, NotFound, PoisonRequest, QueueFull, SparseVilaError, Unavailable
from tests.cluster.scripted_cluster import NUM, ask, cluster_of, video
from tests.cluster.scripted_workers import Breakpoints, conversation


@pytest.mark.parametrize("seed", range(4))
def test_no_token_is_ever_wrong_in_a_storm_of_losses(seed, monkeypatch):
    """Clients ask, leave and come back while workers and the directory die and are replaced: right answers or typed errors."""

    async def main():
        rng = random.Random(seed)
        right, wrong = 0, []
        async with cluster_of(num_prefill=2, num_decode=3, router={"call_timeout_s": 0.3}) as cluster:
            routers = [cluster.router(f"r{i}") for i in range(2)]
            keys = [(await routers[0].prepare(video(b"%d" % i))).media_id for i in range(3)]
            over = False

            async def client(number):
                nonlocal right
                for _ in range(3):
                    which, name, questions = rng.randrange(3), "", []
                    for i in range(3):
                        question = f"{number} {i} {rng.random()}"
                        try:
                            if rng.random() < 0.2:
                                await rng.choice(routers).prepare(video(b"%d" % which))
                            answer, name = await ask(rng.choice(routers), keys[which], question, name, deadline_s=5)
                        except SparseVilaError as error:
                            wrong.append(error)
                            break
                        questions.append(question)
                        assert answer.token_ids == conversation(keys[which], questions, NUM)[-1]
                        right += 1

            async def fate():
                number = 10
                while not over:
                    await asyncio.sleep(rng.uniform(0.02, 0.08))
                    what = rng.random()
                    if what < 0.5:
                        cluster.kill(rng.choice(list(cluster.decode.workers)))
                        cluster.add_decode(f"d{number}")
                    elif what < 0.8:
                        cluster.kill(rng.choice(list(cluster.prefill.workers)))
                        cluster.add_prefill(f"p{number}")
                    elif what < 0.83:  # an empty one answers nothing for a second, until everybody has had time to report
                        cluster.directory_pool.kill("directory")
                        cluster.start_directory()
                    number += 1
                    cluster.clock.now_s += 0.2
                    cluster.report()

            monkeypatch.setattr(Breakpoints, "pace_s", 0.006)
            storm = asyncio.create_task(fate())
            try:
                for _ in range(8):  # until a loss has met an answer on its way; on a busy machine that may take a while
                    await asyncio.gather(*(client(i) for i in range(10)))
                    if cluster.count("turns_recovered_total"):
                        break
            finally:
                over = True
                await storm
            for error in wrong:
                assert isinstance(error, (Unavailable, NotFound, QueueFull, DeadlineExceeded, PoisonRequest)), repr(error)
            assert right > 20 and cluster.count("turns_recovered_total") > 0, [repr(error) for error in wrong]

    asyncio.run(asyncio.wait_for(main(), 60))
