"""The benchmark of transfers measures what it says, and ends with the document that machines read; at a toy size."""

import json

from benchmarks import transfer
from benchmarks.lib.stopwatch import Repeats
from tests.benchmarks.toy_checkpoint import TOY


def test_rows_and_figures(tmp_path, capsys):
    once = Repeats(least=1, most=2, budget_s=5.0)
    transfer.main(["--sizes", "1,64", "--no-ray", "--cache", str(tmp_path / "cache"), "--save", str(tmp_path)], (TOY, once))
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["what"] == "transfer" and set(document["figures"]) == {"gloo_share_of_raw_64mib", "hidden_share"}
    assert [(row["kind"], row.get("mib")) for row in document["rows"][:4]] == [
        ("gloo", 1), ("gloo", 64), ("gloo int8", 64), ("inproc", 64),
    ]  # fmt: skip
    row = document["rows"][1]
    assert document["figures"]["gloo_share_of_raw_64mib"] == row["share"] > 0.01
    assert abs(row["share"] - row["bare_ms"] / row["ms"]) < 0.01
    hidden = document["rows"][-1]
    assert hidden["together_ms"] >= hidden["tail_ms"] >= 0 and hidden["hidden_share"] <= 1
    assert list(tmp_path.glob("transfer_*.json")) and list(tmp_path.glob("transfer_*.md"))


def test_what_was_not_measured_is_absent():
    assert transfer.figures([]) == {}
    assert transfer.figures([{"kind": "objectstore", "mib": 64, "share": 0.5}]) == {"objectstore_share_of_raw_64mib": 0.5}
