"""The benchmark of the cluster: its arithmetic, its clients against a real server, and the whole of it on a toy model."""

import asyncio
import json
import random
import statistics
import time

import numpy as np
import pytest

from benchmarks import serving
from benchmarks.lib import cluster_overhead, cpu_time, goodput, load_clients, load_levels
from benchmarks.lib.goodput import Run, Slo, TurnTimes
from benchmarks.lib.grpc_echo import echoing
from benchmarks.lib.load_clients import DENSE, SPARSE, ConversationPlan
from benchmarks.lib.load_levels import Level, Outcome
from benchmarks.lib.stopwatch import Repeats
from tests.benchmarks.toy_checkpoint import TOY
from tests.checkpoints.tiny_qwen2_5_vl import make_qwen2_5_vl
from tests.gateway.running_servers import clip, running_server

FIGURES = set("router_ms_per_token router_ttft_ms warm_ttft_share_of_cold goodput_vs_dense tokens_per_s_vs_engine".split())


# ---- arithmetic ----------------------------------------------------------------------------------------------------------------


def test_percentiles():
    assert goodput.percentile([3.0, 1.0, 2.0], 50) == 2.0 and goodput.percentile([1.0, 2.0], 95) == pytest.approx(1.95)
    assert goodput.percentile([7.0], 95) == 7.0 and goodput.spread_of([]) == (None, None)
    samples = random.Random(0).choices(range(1000), k=37)
    for percent in (0, 5, 50, 95, 100):
        assert goodput.percentile(samples, percent) == pytest.approx(np.percentile(samples, percent))
    with pytest.raises(ValueError):
        goodput.percentile([], 50)


def heard(kind="later", ttft_ms=10.0, tpot_ms=1.0, error="", num_tokens=4):
    return TurnTimes(kind, ttft_ms, tpot_ms, ttft_ms + 3.0, tuple(range(num_tokens)), error)


def test_an_slo_is_a_multiple_of_medians_by_kind():
    calm = [heard("cold", 900.0), heard(ttft_ms=8.0), heard(ttft_ms=12.0), heard(tpot_ms=None), heard("cold", 1.0, error="Gone")]
    slo = Slo.of(calm, 2.0)
    assert slo == Slo({"cold": 1800.0, "later": 20.0}, 2.0)
    assert slo.is_met(heard(ttft_ms=20.0, tpot_ms=2.0)) and slo.is_met(heard(tpot_ms=None))
    assert not slo.is_met(heard(ttft_ms=20.1)) and not slo.is_met(heard(tpot_ms=2.1))
    assert slo.is_met(heard("cold", 1000.0)) and slo.is_met(heard("warm", 1e9)), "a kind that was not measured is not limited"
    assert not slo.is_met(heard(error="QueueFull"))


def test_goodput_counts_good_turns_and_nothing_else():
    turns = (heard(), heard("cold", 100.0), heard(ttft_ms=50.0), heard(error="QueueFull", num_tokens=0))
    run = Run(turns, elapsed_s=2.0)
    assert run.goodput(Slo({"later": 20.0}, 5.0)) == 1.0  # the cold one is not limited, the slow and the failed one do not count
    assert run.tokens_per_s == 6.0 and run.num_failed == 1
    times = run.times()
    assert times["ttft_later_p50_ms"] == 30.0 and times["ttft_later_samples"] == 2
    assert times["ttft_warm_p50_ms"] is None and times["e2e_samples"] == 3


def test_arrivals_are_poisson_seeded_and_stretch_with_the_rate():
    slow, fast = goodput.poisson(2.0, 4000, 7), goodput.poisson(8.0, 4000, 7)
    assert slow[0] == 0.0 and slow == sorted(slow)
    assert fast == pytest.approx([at_s / 4 for at_s in slow]) and goodput.poisson(2.0, 4000, 8) != slow
    gaps = np.diff(slow)
    assert statistics.mean(gaps) == pytest.approx(0.5, rel=0.1) and statistics.stdev(gaps) == pytest.approx(0.5, rel=0.1)


def test_drift_of_the_machine_cancels_in_pairs():
    theirs = [10.0, 100.0, 20.0, 1000.0]
    assert goodput.paired_ms([one + 3.0 for one in theirs], theirs) == pytest.approx(3.0)
    with pytest.raises(ValueError):
        goodput.paired_ms([1.0], [])


def test_overhead_is_the_cluster_minus_the_engine():
    found = cluster_overhead.Overhead()
    for slow in (1.0, 5.0, 2.0):
        found.pairs.append((heard(ttft_ms=4.0 + slow, tpot_ms=1.5 * slow), heard(ttft_ms=slow, tpot_ms=slow)))
    found.pairs.append((heard(num_tokens=3), heard(num_tokens=2)))
    found.plain = [(1.0, 0.1), (3.0, 0.3)]
    found.crowd_tokens_per_s = {"cluster": [30.0, 50.0], "engine": [50.0]}
    found.cpu_s.update({"Router": 0.25, "Decode": 1.0})
    found.num_crowd_tokens = 1000
    assert found.num_equal == 3
    assert found.figures() == {
        "router_ttft_ms": 4.0,
        "router_ms_per_token": 0.75,
        "grpc_ttft_ms": 2.0,
        "grpc_ms_per_message": 0.2,
        "tokens_per_s_vs_engine": 0.8,
        "router_cpu_ms_per_token": 0.25,
    }
    assert [row["process"] for row in found.cpu_rows()] == ["Decode", "Router"]


def outcome(variant, clients, turns, elapsed_s=1.0):
    return Outcome(Level(2, 1, clients=clients), variant, Run(tuple(turns), elapsed_s), prefills=1, lane_bytes=100)


def test_figures_are_of_the_best_load_and_of_one_client():
    cold = heard("cold", 1000.0)
    outcomes = [
        outcome("dense", 1, [cold, heard()]),
        outcome("sparse", 1, [heard("cold", 400.0), heard(ttft_ms=8.0)]),
        outcome("sparse", 4, [heard()] * 8, 2.0),
        outcome("dense", 4, [heard(ttft_ms=90.0)] * 8, 1.0),
    ]
    rows = serving.load_rows(outcomes, serving.slo_of(outcomes, 2.0))
    assert [row["goodput_per_s"] for row in rows] == [2.0, 2.0, 4.0, 0.0]
    assert serving.figures(outcomes, 2.0) == {"goodput_vs_dense": 2.0, "warm_ttft_share_of_cold": 0.02}
    strict, mild = serving.goodput_rows(outcomes, (0.5, 10.0))
    assert strict == {"slo_scale": 0.5, "sparse_per_s": 0.0, "dense_per_s": 0.0, "ratio": None}
    assert (mild["sparse_per_s"], mild["dense_per_s"], mild["ratio"]) == (4.0, 8.0, 0.5)
    assert "goodput_vs_dense" not in serving.figures(outcomes, 0.5), "what cannot be said is absent"


def test_conversations_about_new_videos_stand_evenly_among_the_others():
    plans = load_levels.plan_conversations(Level(8, 2, clients=2), ["a", "b"], ["x", "y"], 3, seed=1)
    videos = [plan.video for plan in plans]
    assert videos[0] == "x" and videos[4] == "y" and {videos[i] for i in (1, 2, 3, 5, 6, 7)} == {"a", "b"}
    assert plans == load_levels.plan_conversations(Level(8, 2, clients=2), ["a", "b"], ["x", "y"], 3, seed=1)
    for plan in (serving.Plan(), serving.QUICK):
        assert all(level.num_new < level.num for level in plan.levels) and plan.levels[0].clients == 1


def test_a_message_of_one_token_is_small():
    assert 5 < cluster_overhead.message_bytes(heard(num_tokens=9)) < 20


# ---- clients -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_qwen2_5_vl(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    paths = [folder / f"{seed}.mp4" for seed in range(3)]
    for seed, path in enumerate(paths):
        path.write_bytes(clip(seed))
    return paths


def with_server(checkpoint, work):
    """`await work(served)` within a minute."""

    async def main():
        async with asyncio.timeout(60), running_server(checkpoint) as served:
            return await work(served)

    return asyncio.run(main())


def test_a_closed_loop_hears_cold_warm_and_later_turns(checkpoint, videos):
    async def work(served):
        plans = [ConversationPlan(video, 2) for video in (videos[0], videos[0], videos[1], videos[0], videos[1])]
        run = await load_clients.closed_loop(served.address, plans, 1, SPARSE, num_tokens=5)
        info = await served.pipeline.info()
        assert info["conversations"] == 0, "conversations are closed when they are over"
        return run

    run = with_server(checkpoint, work)
    assert [turn.kind for turn in run.turns] == "cold later warm later cold later warm later warm later".split()
    assert run.num_failed == 0 and all(0 < turn.ttft_ms <= turn.e2e_ms for turn in run.turns)
    first = [turn.token_ids for turn in run.turns[::2]]
    assert first[0] == first[1] == first[3] and first[2] == first[4]
    assert run.elapsed_s * 1e3 >= sum(turn.e2e_ms for turn in run.turns), "one client at a time"


def test_an_open_loop_waits_for_nobody(checkpoint, videos):
    async def work(served):
        plans = [ConversationPlan(videos[0], 1, at_s) for at_s in (0.0, 0.3, 0.31)]
        start_s = time.perf_counter()
        run = await load_clients.open_loop(served.address, plans, SPARSE, num_tokens=3)
        return run, time.perf_counter() - start_s

    run, elapsed_s = with_server(checkpoint, work)
    assert len(run.turns) == 3 and 0.31 < run.elapsed_s <= elapsed_s
    assert [turn.kind for turn in run.turns].count("cold") == 1


def test_a_conversation_ends_with_its_error_and_others_go_on(checkpoint, videos, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video at all" * 100)

    async def work(served):
        return await load_clients.closed_loop(
            served.address, [ConversationPlan(broken, 2), ConversationPlan(videos[0], 2)], 2, SPARSE, num_tokens=3
        )

    run = with_server(checkpoint, work)
    assert sorted(turn.error for turn in run.turns) == ["", "", "BadMedia"] and run.num_failed == 1


def test_dense_clients_keep_everything(checkpoint, videos):
    async def work(served):
        async with load_clients.connected_client(served.address) as one:
            told = []
            for variant in (SPARSE, DENSE):
                media = await one.client.prepare(videos[0], **variant.prepare)
                chat = one.client.conversation(media)
                told.append((media, (await chat.ask("What?", **variant.options(2))).usage))
        return told

    (sparse, few), (dense, many) = with_server(checkpoint, work)
    assert dense.visual_tokens_kept == dense.visual_tokens == many.visual_tokens_retrieved
    assert sparse.visual_tokens_kept < sparse.visual_tokens and few.visual_tokens_retrieved < few.visual_tokens_kept
    assert dense.kv_bytes == dense.dense_kv_bytes


def test_plain_messages_are_echoed_in_number():
    async def main():
        async with asyncio.timeout(60), echoing() as echo:
            return await echo.listen(50, 20, cluster_overhead.REQUEST_BYTES), await echo.listen(
                1, 20, cluster_overhead.REQUEST_BYTES
            )

    (first_ms, each_ms), (_, alone_ms) = asyncio.run(main())
    assert first_ms > 0 and each_ms > 0 and alone_ms == 0.0


def test_processor_time_is_counted():
    before, until_s = cpu_time.cpu_s(), time.process_time() + 0.3
    while time.process_time() < until_s:
        pass
    spent = cpu_time.cpu_since(before)
    assert set(spent) == {"client"} and spent["client"] >= 0.25  # user and system time are told in ticks of 10 ms each


# ---- the whole run -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_cluster_is_measured(tmp_path_factory, tmp_path, capsys):
    twice = Repeats(2, 2)
    plan = serving.Plan(
        frames=8,
        num_tokens=6,
        num_turns=2,
        levels=(Level(2, 1, clients=1), Level(4, 1, clients=2), Level(3, 1, share=0.9)),
        overhead=cluster_overhead.OverheadPlan(num_tokens=6, alone=twice, crowd=4, crowded=twice, limit_s=60.0),
        limit_s=60.0,
        decodes=1,
    )
    serving.main(["--cache", str(tmp_path_factory.mktemp("cache")), "--save", str(tmp_path)], (TOY, plan))
    shown = capsys.readouterr().out
    document = json.loads(shown.splitlines()[-1])
    assert document["what"] == "serving" and set(document["figures"]) >= FIGURES - {"goodput_vs_dense"}
    loads = [row for row in document["rows"] if row["part"] == "load"]
    assert [(row["load"], row["turns"], row["failed"]) for row in loads[::2]] == [
        ("closed, 1", 4, 0),
        ("closed, 2", 8, 0),
        ("open, 90%", 6, 0),
    ]
    assert all(row["prefills"] == 1 for row in loads), "only the new video is prefilled, and once"
    moved = {row["variant"]: row["lane_bytes"] for row in loads[:2]}
    assert 0 < moved["sparse"] < moved["dense"]
    assert "4 of 4 answers through the cluster equal the engine's" in shown
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md"}
