"""The benchmark of kernels runs every operation, judges it, and says of which machine its figures are; at toy sizes."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import kernels
from benchmarks.lib import device_clock
from benchmarks.lib.flop_counts import Work
from benchmarks.lib.ops import attention_ops, matmul_ops, op_case
from benchmarks.lib.stopwatch import Repeats

CPU = torch.device("cpu")


def test_every_operation_is_measured_and_right(tmp_path, capsys):
    kernels.main(["--toy", "--threads", "1", "--device", "cpu", "--save", str(tmp_path), "--rows", str(tmp_path / "rows")])
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not [row for row in document["rows"] if "failed" in row]
    for op in kernels.OPS:
        ours = [row for row in document["rows"] if row["op"] == op and row["role"] == "op"]
        assert ours and all(row["ms"] > 0 and row["error"] < 5e-3 for row in ours), op
        assert {f"{op}_vs_reference", f"{op}_share_of_ceiling"} <= set(document["figures"])
    row = next(row for row in document["rows"] if row["op"] == "kv_pack" and row["headline"] and row["role"] == "op")
    assert document["figures"]["kv_pack_share_of_ceiling"] == row["share_of_ceiling"] > 0 and row["bound_by"] == "memory"
    assert [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()] == document["rows"]
    assert {"read_gb_s", "matmul_gflops_int8"} <= set(document["machine"])
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ["", ".json", ".md"]


def test_one_operation_and_no_time(capsys):
    kernels.main(["--toy", "--threads", "1", "--device", "cpu", "--ops", "silu_mul", "--stop-after", "0", "--json"])
    shown = capsys.readouterr().out
    assert shown.count("\n") == 1 and json.loads(shown)["figures"] == {}
    with pytest.raises(SystemExit):
        kernels.main(["--ops", "silu"])
    assert "no silu" in capsys.readouterr().err


@pytest.mark.parametrize("sizes", [op_case.GPU, op_case.CPU, op_case.QUICK, op_case.TOY])
def test_each_operation_has_one_headline(sizes):
    cases = kernels.cases(sizes)
    assert [each.op for each in cases if each.headline] == [each.op for each in cases[: len(kernels.OPS)]]
    assert sorted(each.op for each in cases if each.headline) == sorted(kernels.OPS)
    assert len({(each.op, each.shape) for each in cases}) == len(cases)


def row(role, ms, op="rms_norm", headline=True):
    return {"op": op, "role": role, "ms": ms, "headline": headline, "share_of_ceiling": 0.5}


def test_figures_are_of_the_headline_and_the_fastest_peer():
    rows = [
        row("op", 2.0),
        row("reference", 9.0),
        row("peer", 8.0),
        row("peer", 3.0),
        row("context", 1.0),
        row("op", 7.0, headline=False),
    ]
    assert kernels.figures(rows) == {"rms_norm_vs_reference": 4.5, "rms_norm_vs_peer": 1.5, "rms_norm_share_of_ceiling": 0.5}
    failed = {"op": "rms_norm", "role": "op", "failed": "out of memory"}
    assert kernels.figures([failed, row("peer", 3.0)]) == {}


def test_work_of_a_decode_step():
    subject = attention_ops.Step(op_case.TOY, [100, 100, 100])(CPU, ("torch",))
    subject.meet_peers()
    run = next(entry.run for entry in subject.entries if "groups as rows" in entry.name)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    sizes = op_case.TOY
    kv = 3 * 100 * sizes.num_kv_heads * sizes.head_dim * 2 * 4
    rows = 3 * sizes.num_heads * sizes.head_dim * 2 * 4
    assert subject.work == Work(float(counter.get_total_flops()), kv + rows)


def test_work_of_a_4_bit_product():
    sizes = op_case.TOY
    work = matmul_ops.Awq(sizes, 5, 128, 256)(CPU, ("torch",)).work
    groups = 128 // sizes.group_size
    assert work.bytes == 128 * 256 / 2 + groups * 256 / 2 + groups * 256 * 2 + 5 * (128 + 256) * 2
    assert work.flop == 2 * 5 * 128 * 256


def test_lse_that_is_given_normalises():
    shapes = replace(op_case.TOY, keys=(50,))
    given = attention_ops.Retrieval(shapes, 3, 50, lse=True)(CPU, ("torch",))
    plain = attention_ops.Retrieval(shapes, 3, 50, lse=False)(CPU, ("torch",))
    first, second = (next(e.run() for e in subject.entries if e.role == "reference") for subject in (given, plain))
    assert torch.allclose(first, second, atol=1e-5)


def test_absent_peers_are_told():
    subject = op_case.Subject(Work(1.0, 1.0), [])

    def absent():
        raise ImportError("no such package")

    def refuses():
        raise RuntimeError("CUDA only\nand more")

    subject.add_peer("here", lambda: lambda: 1)
    subject.add_peer("absent", absent)
    subject.add_peer("refuses", lambda: refuses)
    assert subject.meet_peers() == {"absent": "ImportError: no such package", "refuses": "RuntimeError: CUDA only"}
    assert [entry.name for entry in subject.entries] == ["here"]
    with pytest.raises(ImportError, match="not installed"):
        op_case.module_file("no_such_package", "a.py")


def test_one_file_of_a_package_without_the_package(tmp_path, monkeypatch):
    package = tmp_path / "breaks_on_import"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('wants another version')")
    (package / "good.py").write_text("ANSWER = 42")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert op_case.module_file("breaks_on_import", "good.py").ANSWER == 42


def test_errors_are_relative_and_see_nan():
    wanted = torch.tensor([3.0, 4.0])
    assert op_case.error_of((wanted * 1.1, wanted), (wanted, wanted)) == pytest.approx(0.1)
    nan = op_case.error_of(torch.tensor([float("nan"), 4.0]), wanted)
    assert nan != nan and op_case.error_of(torch.zeros(2), torch.zeros(2)) == 0


def test_ways_take_turns():
    clock = device_clock.Clock(CPU, Repeats(least=2, most=2, budget_s=5))
    calls = []
    times = clock.in_turns({"op": lambda: calls.append("op"), "peer": lambda: calls.append("peer")})
    assert calls == ["op", "peer"] * 2 and [times[n].num for n in ("op", "peer")] == [2, 2]


def test_ceilings_of_every_dtype():
    found = device_clock.ceilings(CPU, ("float32", "bfloat16", "int8"), 0.02)
    assert set(found) == {"float32", "bfloat16", "int8"} and all(each.matmul_gflops > 0 for each in found.values())
    assert len({each.read_gb_s for each in found.values()}) == 1
    card = device_clock.card(CPU, found)
    assert card["matmul_gflops_int8"] == found["int8"].matmul_gflops and "gpu" not in card
