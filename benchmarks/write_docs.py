"""Write the figures of `benchmarks/results/` into README.md and docs/benchmarks.md. `python -m benchmarks.write_docs [--check]`.

A page says where with a pair of comments; what stands between them is replaced:

    <!-- figures: engine -->
    <!-- /figures -->

`summary` is the one table of the README. `--check` writes nothing and fails where a page is not what the results say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/benchmarks.md")
BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n)(.*?)(<!-- /figures -->)", re.DOTALL)

PERCENT, RATIO, MS, GIB, PLAIN = "{:.1f} %", "{:.2f}x", "{:.1f} ms", "{:.2f} GiB", "{:.4g}"
SHARE = "{:.1%}"

# Names as a benchmark's last line has them -> (what it is, how it is written). Names that end alike are of one kind.
MEANINGS: dict[str, dict[str, tuple[str, str]]] = {
    "accuracy": {
        "questions": ("questions on three held-out ranges of the demo world", "{:.0f}"),
        "dense": ("right answers, everything kept", PERCENT),
        "sparse": ("right answers, our default", PERCENT),
        "random": ("right answers, the same shares chosen at random", PERCENT),
        "uniform": ("right answers, evenly spaced tokens kept", PERCENT),
        "worst_kind_gap": ("points that the kind loses most from dense to sparse, of kinds with 100 questions or more", "{:.1f}"),
        "long_answers_dense": ("dense, answers of twelve words and more", PERCENT),
        "long_answers_sparse": ("sparse, answers of twelve words and more", PERCENT),
        "sparse_turn1": ("sparse, first turns", PERCENT),
        "sparse_turn30": ("sparse, thirtieth turns", PERCENT),
        "twin_dense": ("dense, a twin that was always shown every token", PERCENT),
        "twin_sparse": ("sparse, that twin", PERCENT),
        "unsupervised_salience": ("pruned by the salience of a tower that was not told where to look", PERCENT),
        "unsupervised_random": ("that model, pruned at random", PERCENT),
    },
    "attack": {
        "p99_ratio": ("the victim's p99 under this attack / in quiet", RATIO),
        "worst_p99_ratio": ("the worst of them", RATIO),
        "victim_errors": ("errors and wrong answers that the victim was told", "{:.0f}"),
    },
    "engine": {
        "prefill_speedup_64f": ("prefill of the language model, 64 frames, dense / sparse", RATIO),
        "prefill_speedup_256f": ("prefill of the language model, 256 frames, dense / sparse", RATIO),
        "decode_speedup_b1": ("decode step, batch 1, dense / sparse", RATIO),
        "decode_speedup_b4": ("decode step, batch 4, dense / sparse", RATIO),
        "decode_speedup_b8": ("decode step, batch 8, dense / sparse", RATIO),
        "e2e_speedup_64f": ("from file to answer, 64 frames, dense / sparse", RATIO),
        "turn2_ttft_share_of_cold": ("first token of a later turn, as a share of the first turn's", SHARE),
        "demo_decode_vs_hf_b1": ("transformers' `generate` / dense engine, per token, demo model, batch 1", RATIO),
        "demo_decode_vs_hf_b8": ("the same, batch 8", RATIO),
        "mid_decode_vs_hf_b1": ("the same on the mid-size model, batch 1", RATIO),
        "salience_share_of_encode": ("time of salience in the vision encoder's", SHARE),
        "prefill_512f_peak_gib": ("most memory of a process that prefills 512 frames", GIB),
        "seek_speedup": ("64 frames of a ten-minute film: every frame decoded / by seeking", RATIO),
        "seek_speedup_long_gop": ("the same, up to 250 frames between key frames", RATIO),
        "w4_decode_speedup_b1": ("decode step of a 0.9 B text model, bfloat16 / 4-bit weights", RATIO),
    },
    "kernels": {
        "vs_reference": ("reference / ours", RATIO),
        "vs_peer": ("best of others / ours", RATIO),
        "share_of_ceiling": ("share of the machine's ceiling", SHARE),
    },
    "quantization": {
        "float_dense_percent": ("right answers of the demo model in float32, dense", PERCENT),
        "quantized_dense_percent": ("in 4 bits (tower in 8), dense", PERCENT),
        "float_sparse_percent": ("in float32, sparse", PERCENT),
        "quantized_sparse_percent": ("in 4 bits (tower in 8), sparse", PERCENT),
        "points_lost_dense": ("points lost, dense", "{:.2f}"),
        "points_lost_sparse": ("points lost, sparse", "{:.2f}"),
        "demo_kl": ("KL of the demo model's next token to float32", PLAIN),
        "kl_own": ("KL to float32, our quantizer", PLAIN),
        "kl_autoawq": ("KL to float32, AutoAWQ 0.2.9 on the same tokens", PLAIN),
        "kl_autoawq_there": ("KL to float32, AutoAWQ's own file", PLAIN),
    },
    "serving": {
        "goodput_vs_dense": ("best rate of good turns, sparse / dense", RATIO),
        "warm_ttft_share_of_cold": ("first token of a later turn, as a share of a new video's", SHARE),
        "router_ttft_ms": ("first token, cluster minus engine", MS),
        "router_ms_per_token": ("each further token, cluster minus engine", MS),
        "grpc_ttft_ms": ("first message of a plain grpc.aio server", MS),
        "grpc_ms_per_message": ("each further message of it", MS),
        "tokens_per_s_vs_engine": ("tokens per second in a crowd, cluster / engine", RATIO),
        "router_cpu_ms_per_token": ("processor time of the router, per token", MS),
    },
    "transfer": {
        "gloo_share_of_raw_64mib": ("lane over gloo, of a bare gloo send's rate, 64 MiB", SHARE),
        "gloo_share_of_raw_1gib": ("the same, 1 GiB", SHARE),
        "objectstore_share_of_raw_64mib": ("lane over Ray's object store, of its own put and get, 64 MiB", SHARE),
        "hidden_share": ("share of a transfer hidden behind the prefill, 256 frames", SHARE),
    },
}
SUMMARY = (
    ("accuracy", "dense"),
    ("accuracy", "sparse"),
    ("accuracy", "random"),
    ("engine", "prefill_speedup_64f"),
    ("engine", "prefill_speedup_256f"),
    ("engine", "decode_speedup_b8"),
    ("engine", "w4_decode_speedup_b1"),
    ("serving", "goodput_vs_dense"),
    ("serving", "warm_ttft_share_of_cold"),
    ("transfer", "gloo_share_of_raw_64mib"),
)


def read_results(folder: Path = RESULTS) -> dict[str, list[dict[str, Any]]]:
    """The documents of each benchmark, the latest of every kind of machine and number of threads; most threads last."""
    latest: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stem.rsplit("_", 1)[-1]):
        document = json.loads(path.read_text(encoding="utf-8"))
        latest[path.stem.rsplit("_", 1)[0], document["what"]] = document
    results: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for (_, what), document in sorted(latest.items()):
        results[what].append(document)
    return results


def meaning(what: str, name: str) -> tuple[str, str]:
    """What a figure is, and its format. Raises KeyError: nobody has said what it is."""
    known = MEANINGS[what]
    if name in known:
        return known[name]
    suffix = max((end for end in known if name.endswith(f"_{end}")), key=len, default=None)
    if suffix is None:
        raise KeyError(f"benchmarks/write_docs.py does not know the figure {name!r} of {what!r}")
    subject = name.removesuffix(f"_{suffix}")
    text, form = known[suffix]
    return f"`{subject}`: {text}", form


def table_of(what: str, documents: list[dict[str, Any]]) -> str:
    """One row for each figure, one column for each document."""
    heads = [f"{one['machine'].get('threads', '?')} threads, {one['machine'].get('date', '')}" for one in documents]
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    for name in dict.fromkeys(name for one in documents for name in one["figures"]):
        text, form = meaning(what, name)
        cells = [form.format(one["figures"][name]) if name in one["figures"] else "" for one in documents]
        lines.append(f"| {text} | {' | '.join(cells)} |")
    machine = documents[-1]["machine"]
    return f"{machine.get('cpu', '')}, {machine.get('cores', '?')} cores, torch {machine.get('torch', '?')}.\n\n" + "\n".join(lines)


def summary(results: dict[str, list[dict[str, Any]]]) -> str:
    """A few figures of all benchmarks: the newest value of each."""
    lines = ["| | |", "|---|---|"]
    for what, name in SUMMARY:
        values = [one["figures"][name] for one in results.get(what, []) if name in one["figures"]]
        if values:
            text, form = meaning(what, name)
            lines.append(f"| {text} | {form.format(values[-1])} |")
    return "\n".join(lines)


def filled(page: str, results: dict[str, list[dict[str, Any]]]) -> str:
    """`page` with every block made anew. Raises KeyError: a block of a benchmark without results."""

    def block(found: re.Match[str]) -> str:
        what = found[2]
        text = summary(results) if what == "summary" else table_of(what, results[what] if what in results else [])
        return f"{found[1]}{text}\n{found[4]}"

    return BLOCK.sub(block, page)


def main() -> int:
    """Returns the exit code: 1 if `--check` found a page that is not what the results say."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.write_docs", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page would change")
    options = parser.parse_args()
    results, stale = read_results(), []
    for name in PAGES:
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        after = filled(before, results)
        if after != before:
            stale.append(name)
            if not options.check:
                path.write_text(after, encoding="utf-8")
    print(f"{'stale' if options.check else 'written'}: {', '.join(stale) or 'nothing'}")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
