"""`sparsevila quantize`: a checkpoint in 4 bits. torch is imported only once the paths are checked."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from sparsevila_cluster.cli.options import OK, add_output_options
from sparsevila_cluster.cli.quantization_inputs import add_input_options, check_numbers, read_inputs, reading_of
from sparsevila_cluster.core.errors import BadRequest
from sparsevila_cluster.core.progress_line import ProgressLine
from sparsevila_cluster.core.summary import megabytes

CALIBRATION_EXAMPLES = 32
ENGINES = ("own", "autoawq")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `quantize`."""
    parser.description = (
        "Writes SRC to the new directory DST with 4-bit weights (AutoAWQ's format). When it is interrupted, the same call goes on "
        "with what was finished; DST appears only once it is whole."
    )
    parser.add_argument("source", metavar="SRC", help="checkpoint with float weights")
    parser.add_argument("target", metavar="DST", help="directory to make")
    add_input_options(parser, "--calibration", CALIBRATION_EXAMPLES)
    how = parser.add_argument_group("how")
    how.add_argument(
        "--engine", choices=ENGINES, default="own", help="own, or AutoAWQ 0.2.9 in an environment of its own (%(default)s)"
    )
    how.add_argument("--group-size", type=int, metavar="G", help="inputs that share a scale (the largest of 128, 64, 32 that fits)")
    how.add_argument(
        "--vision",
        choices=("w8a8", "none"),
        default="none",
        help="the vision tower in 8 bits, a form of ours, or as it is (%(default)s)",
    )
    how.add_argument(
        "--keep", action="append", default=[], metavar="NAME", help="leave linears whose name ends so; may be repeated"
    )
    how.add_argument("--search-rows", type=int, default=2048, metavar="N", help="tokens to measure errors on (%(default)s)")
    how.add_argument("--no-clip", action="store_true", help="leave out the search for clipping")
    how.add_argument(
        "--alpha", type=float, default=0.5, help="8 bits: how much of an outlier goes to the weights, 0 to 1 (%(default)s)"
    )
    how.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    how.add_argument("--restart", action="store_true", help="throw unfinished work for DST away")
    autoawq = parser.add_argument_group(
        "--engine autoawq", "AutoAWQ reads text only, and needs other versions of its libraries than ours."
    )
    autoawq.add_argument("--create-env", action="store_true", help="install its environment first, if it is not there (some GB)")
    autoawq.add_argument("--env", metavar="DIR", help="where the environment is (in the user's cache directory)")
    autoawq.add_argument("--engine-timeout-s", type=float, default=7200.0, metavar="S", help="longest run of AutoAWQ (%(default)g)")
    add_output_options(parser)
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    source, target = Path(args.source), Path(args.target)
    check_numbers(args)
    if target.exists():
        from sparsevila_cluster.quantization.work_dir import check_target

        check_target(target)
    if args.engine == "autoawq" and (args.vision != "none" or args.keep):
        raise BadRequest("--vision and --keep are for --engine own")
    with ProgressLine() as progress:
        progress.stage("load", 0, 1)
        from sparsevila_cluster.models.loading.originals import read_vocabulary
        from sparsevila_cluster.quantization import autoawq_env, job

        vocabulary = read_vocabulary(source)
        reading = reading_of(args, pruned=True)
        inputs = read_inputs(args, vocabulary, reading, held_out=False)
        if args.engine == "own":
            settings = job.Settings(
                args.group_size, args.vision, not args.no_clip, search_rows=args.search_rows, alpha=args.alpha,
                keep=tuple(args.keep), reading=reading,
            )  # fmt: skip
            outcome = job.quantize_checkpoint(
                source, target, inputs, settings, device=args.device, restart=args.restart, report=progress.stage
            )
        else:
            env = autoawq_env.find_env(args.env, args.create_env, progress.stage)
            outcome = autoawq_env.run_autoawq(
                env, source, target, vocabulary, inputs, group_size=args.group_size, clip=not args.no_clip,
                text_tokens=args.text_tokens, deadline_s=args.engine_timeout_s, restart=args.restart, report=progress.stage,
            )  # fmt: skip
    facts = job.describe(outcome)
    print(
        json.dumps({"source": str(source), "target": str(target), "engine": args.engine, **facts})
        if args.json
        else _describe(target, facts)
    )
    return OK


def _describe(target: Path, facts: dict[str, Any]) -> str:
    tower = f", {facts['num_tower_linears']} of the vision tower in 8" if facts["num_tower_linears"] else ""
    resumed = f", {facts['resumed_layers']} layers of them found finished" if facts["resumed_layers"] else ""
    return (
        f"{target}: {facts['num_linears']} linears in 4 bits (groups of {facts['group_size']}){tower}{resumed}; "
        f"{megabytes(facts['source_bytes'])} -> {megabytes(facts['target_bytes'])}; "
        f"calibrated on {facts['num_samples']} sequences of {facts['num_tokens']} tokens in {facts['seconds']:.0f} s"
    )
