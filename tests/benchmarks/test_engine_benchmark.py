"""The benchmarks count and time what they say, and end with the document that machines read; at toy sizes."""

import json

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import engine
from benchmarks.lib import engine_comparison, hf_peer, machine, midsize_checkpoint, report, stopwatch, w4_decode
from benchmarks.lib.engine_pair import EnginePair, endless, time_round
from benchmarks.lib.flop_counts import TextShape, Work, encode_work
from benchmarks.lib.timing_table import Ledger
from sparsevila_cluster.models import load_model
from tests.benchmarks.toy_checkpoint import TOY

ENGINE_FIGURES = set(
    "prefill_speedup_64f prefill_speedup_256f decode_speedup_b1 decode_speedup_b4 decode_speedup_b8 e2e_speedup_64f "
    "demo_decode_vs_hf_b1 demo_decode_vs_hf_b8 mid_decode_vs_hf_b1 salience_share_of_encode turn2_ttft_share_of_cold "
    "seek_speedup seek_speedup_long_gop".split()
)
W4_FIGURES = {"w4_decode_speedup_b1"} if w4_decode.usable() else set()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def toy(cache):
    return midsize_checkpoint.make_checkpoint(cache, TOY)


@pytest.fixture(scope="module")
def model(toy):
    return load_model(toy, device="cpu")


# ---- the mid-size checkpoint ---------------------------------------------------------------------------------------------------


def test_checkpoint_is_made_once_and_named_by_its_recipe(cache, toy):
    stamp = (toy / "model.safetensors").stat().st_mtime_ns
    assert midsize_checkpoint.make_checkpoint(cache, TOY) == toy and (toy / "model.safetensors").stat().st_mtime_ns == stamp
    assert midsize_checkpoint.Recipe().name != TOY.name and not list(cache.glob(".making-*"))


def test_default_recipe_has_the_promised_size():
    assert 100e6 < TextShape.of(midsize_checkpoint.config_of(midsize_checkpoint.Recipe())).num_parameters < 200e6


def test_tokenizer_round_trip(model):
    text = "Was läuft im 3. Bild? 火"
    ids, first, stop = model.chat.question_ids(text, first=True, pending=None)
    assert model.chat.decode(ids[first:stop]) == text and max(ids) < TOY.vocab


def test_media_is_repeatable_and_moves():
    a, b = midsize_checkpoint.make_media(6, 40), midsize_checkpoint.make_media(6, 40)
    assert np.array_equal(a.frames, b.frames) and a.frames.shape == (6, 40, 40, 3) and a.duration_s == 3.0
    assert not np.array_equal(a.frames[0], a.frames[1])


# ---- bounds --------------------------------------------------------------------------------------------------------------------


def products(run):
    """Operations of matrix products, attention kernels left out."""
    with FlopCounterMode(display=False) as counter:
        run()
    return sum(n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op) and "baddbmm" not in str(op))


class NoAttention:
    def attend(self, layer, q, k, v, scale):
        return q

    def write(self, layer, k, v):
        pass


@pytest.mark.parametrize("num_rows", [1, 7])
def test_text_work_is_what_torch_counts(model, num_rows):
    shape = TextShape.of(model.config)
    hidden, positions = torch.zeros(num_rows, TOY.hidden), torch.zeros(3, num_rows, dtype=torch.int64)
    attention = shape._attention_flop(num_rows * (num_rows + 1) / 2, TOY.num_layers - 1)
    counted = products(lambda: model.text.forward(hidden, positions, NoAttention(), kv_only=True))
    assert counted == shape.prefill(num_rows).flop - attention
    counted = products(lambda: model.text.logits(model.text.forward(hidden, positions, NoAttention())))
    assert counted == shape.step(num_rows, 0).flop


def test_encode_work_is_what_torch_counts(model):
    inputs = model.family.patchify(midsize_checkpoint.make_media(4, TOY.frame_px))
    groups, rows, cols = inputs.grid
    assert (groups, rows, cols) == (2, 5, 5)
    # 10 patches a side: windows of 6 and 4, and whole frames in the full layer
    pairs = groups * (6 + 4) ** 2 * 100 + groups * (36 + 16) ** 2
    counted = products(lambda: model.family.encode([inputs], needs=()))
    assert counted == encode_work(model.config, inputs.grid).flop - 4 * TOY.vision_hidden * pairs


def test_kv_bytes_are_the_engines(model):
    assert TextShape.of(model.config).kv_row_bytes == model.spec.bytes_per_token


def test_a_bound_is_the_slower_of_two():
    ceilings = machine.Ceilings(matmul_gflops=100.0, read_gb_s=10.0, copy_gb_s=20.0)
    assert Work(1e9, 0).bound_ms(ceilings) == pytest.approx(10)
    assert Work(1e9, 1e9).bound_ms(ceilings) == pytest.approx(50)


# ---- watching the clock --------------------------------------------------------------------------------------------------------


def test_times():
    times = stopwatch.Times([4.0, 1.0, 2.0, 3.0])
    assert (times.median_ms, times.best_ms, times.num) == (2.5, 1.0, 4)
    assert stopwatch.Times([2.0, 3.0]).spread == pytest.approx(0.4)


class Clock:
    """Stands in for the module `time`."""

    now_s = 0.0

    def perf_counter(self):
        return self.now_s


@pytest.mark.parametrize(
    ("repeats", "rounds"),
    [
        (stopwatch.Repeats(least=2, most=4, budget_s=60), 4),
        (stopwatch.Repeats(least=1, most=9, budget_s=13), 3),  # a fourth would end after 16 s
        (stopwatch.Repeats(least=4, most=9, budget_s=9), 4),  # so would a third, but four are wanted
        (stopwatch.Repeats(least=2, most=9, budget_s=7), 1),  # one round is more than half the budget
    ],
)
def test_repeats(repeats, rounds, monkeypatch):
    clock, done = Clock(), 0
    monkeypatch.setattr(stopwatch, "time", clock)
    for _ in repeats.rounds():
        clock.now_s += 4.0
        done += 1
    assert done == rounds


def test_variants_take_turns():
    order = []
    times = stopwatch.in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, stopwatch.Repeats(2, 2))
    assert order == ["a", "b"] * 3 and times["a"].num == times["b"].num == 2


def test_generate_pauses_for_others(monkeypatch):
    fake = Clock()
    monkeypatch.setattr(hf_peer, "time", fake)

    def between():
        fake.now_s += 100.0

    clock = hf_peer._Clock(between, block=3)
    for _ in range(1 + 1 + 2 * 4):  # the prompt, the first token, and two rounds of one step that warms up and three that count
        clock.put(None)
        fake.now_s += 0.002
    assert fake.now_s > 200 and clock.steps.num == 6
    assert clock.steps.samples_ms == pytest.approx([2.0] * 6) and clock.first_ms == pytest.approx(2.0)
    assert clock.total_ms == pytest.approx(18.0)


# ---- subjects ------------------------------------------------------------------------------------------------------------------


def test_stands_fill_step_and_forget(model):
    video = midsize_checkpoint.make_media(4, TOY.frame_px)
    with endless(model):
        pairs = {variant: EnginePair(model, variant, 80, 4) for variant in ("dense", "sparse")}
        sessions = {variant: pair.run_session(video, 5) for variant, pair in pairs.items()}
        assert [sessions[v].prefix.num_kept for v in pairs] == [50, 12]
        assert len(sessions["dense"].tokens) == 5 and min(sessions["dense"].ms.values()) > 0
        times = {variant: stopwatch.Times() for variant in pairs}
        for variant, pair in pairs.items():
            pair.fill(sessions[variant].prefix, 3, 20)
            assert len({turn.prefix.extent.start for turn in pair.decode.turns.values()}) == 3
        time_round(pairs, times, 2)
        for variant, pair in pairs.items():
            pair.forget(keep=sessions[variant].prefix)
            assert pair.decode.idle and len(pair.decode.prefixes) == 1
    assert [times[v].num for v in pairs] == [2, 2] and model.chat.eos_ids


def test_ledger_compares():
    ledger = Ledger()
    ledger.add("m", 8, "step", "dense", stopwatch.Times([6.0]), batch=4, work=Work(3e6, 0))
    ledger.add("m", 8, "step", "sparse", stopwatch.Times([2.0]), batch=4)
    assert ledger.ratio("m", 8, "step", "dense", "sparse", 4) == 3.0
    assert ledger.ratio("m", 8, "step", "dense", "sparse", 1) is None
    ledger.settle(machine.Ceilings(1.0, 1.0, 1.0))
    assert ledger.rows[0]["share_of_bound"] == 0.5 and "bound_ms" not in ledger.rows[1]
    (line,) = ledger.table("m")
    assert line[:7] == [8, 4, "step", 6.0, 2.0, None, 3.0]


# ---- reports -------------------------------------------------------------------------------------------------------------------


def test_tables_are_markdown():
    text = report.table(("name", "ms"), [["a", 0.1234], ["bb", None], ["c", 1234.5]])
    assert text.splitlines() == ["| name |    ms |", "|------|------:|", "| a    | 0.123 |", "| bb   |       |", "| c    |  1234 |"]


def test_ceilings_and_card():
    ceilings = machine.measure_ceilings(side=64, mib=1, repeats=2)
    card = machine.card(ceilings)
    assert ceilings.matmul_gflops > 0 and ceilings.bytes_per_s >= ceilings.read_gb_s > 0
    assert {"cpu", "threads", "torch", "date"} <= set(card) and json.dumps(card)
    assert ceilings | machine.Ceilings(1e9, 0.0, 1e9) == machine.Ceilings(1e9, ceilings.read_gb_s, 1e9)
    assert machine.peak_rss_bytes() > 2**20


def last_line(text):
    document = json.loads(text.splitlines()[-1])
    assert set(document) == {"what", "machine", "figures", "rows"}
    assert all(isinstance(value, int | float) for value in document["figures"].values())
    return document


# ---- whole runs ----------------------------------------------------------------------------------------------------------------


def test_engine_measures_both_models(cache, toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(machine, "measure_ceilings", lambda: machine.Ceilings(10.0, 10.0, 10.0))
    once = stopwatch.Repeats(1, 1)
    plan = engine_comparison.Plan((4, 64), (1, 8), num_tokens=4, sessions=once, encodes=once, rounds=1, block=2, long_frames=0)
    argv = ["--cache", str(cache), "--model", str(toy), "--threads", "1", "--save", str(tmp_path)]
    engine.main(argv, (TOY, plan))
    shown = capsys.readouterr().out
    document = last_line(shown)
    assert ENGINE_FIGURES - set(document["figures"]) == {"prefill_speedup_256f", "decode_speedup_b4"}
    assert W4_FIGURES <= set(document["figures"]) <= ENGINE_FIGURES | W4_FIGURES
    weights = {row["variant"]: row["weight_bytes"] for row in document["rows"] if row["stage"] == "weights"}
    assert not W4_FIGURES or 0 < weights["w4"] < weights["bfloat16"]
    equal = [row["equal_tokens"] for row in document["rows"] if "equal_tokens" in row]
    assert equal and set(equal) == {4}, "dense tokens are not generate's"
    memory = {row["variant"]: row for row in document["rows"] if row["stage"] == "memory" and row["frames"] == 64}
    assert memory["sparse"]["attended_bytes"] < memory["sparse"]["prefix_bytes"] < memory["dense"]["prefix_bytes"]
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md"}
    assert json.loads(next(tmp_path.glob("engine_*.json")).read_text()) == document
    assert "hf/dense" in shown


def test_engine_without_a_demo_model(cache, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(machine, "measure_ceilings", lambda: machine.Ceilings(10.0, 10.0, 10.0))
    once = stopwatch.Repeats(1, 1)
    plan = engine_comparison.Plan(batches=(1,), num_tokens=2, sessions=once, encodes=once, rounds=1, block=1, long_frames=0)
    engine.main(["--cache", str(cache), "--model", str(tmp_path / "none"), "--frames", "4", "--json"], (TOY, plan))
    shown = capsys.readouterr().out
    assert shown.count("\n") == 1 and set(last_line(shown)["figures"]) == {"seek_speedup", "seek_speedup_long_gop"} | W4_FIGURES
