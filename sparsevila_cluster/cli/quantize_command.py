"""`sparsevila quantize` and `sparsevila compare`: a checkpoint in 4 bits, and how far it is from its original.

Knows: their options, what they print. Does not know: how anything is quantized. torch is imported only once the paths are checked.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsevila_cluster.cli.options import OK, add_output_options
from sparsevila_cluster.cli.server_tables import WIDTH_IN_FILES
from sparsevila_cluster.core.errors import BadRequest
from sparsevila_cluster.core.progress_line import ProgressLine
from sparsevila_cluster.core.summary import megabytes

if TYPE_CHECKING:
    from sparsevila_cluster.models.loading.originals import Vocabulary
    from sparsevila_cluster.quantization.calibration import Reading
    from sparsevila_cluster.quantization.compare import Distance
    from sparsevila_cluster.quantization.materials import Material

CALIBRATION_EXAMPLES, HELD_OUT_EXAMPLES = 32, 8
ENGINES = ("own", "autoawq")


def add_to(commands: Any) -> None:
    """The parsers of `quantize` and `compare`."""
    quantize = commands.add_parser(
        "quantize",
        allow_abbrev=False,
        help="write a checkpoint in 4 bits (AWQ), its vision tower in 8",
        description="Writes SRC to the new directory DST with 4-bit weights (AutoAWQ's format). When it is interrupted, the same "
        "call goes on with what was finished; DST appears only once it is whole.",
    )
    quantize.add_argument("source", metavar="SRC", help="checkpoint with float weights")
    quantize.add_argument("target", metavar="DST", help="directory to make")
    _add_material_options(quantize, "--calibration", CALIBRATION_EXAMPLES)
    how = quantize.add_argument_group("how")
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
    peer = quantize.add_argument_group(
        "--engine autoawq", "AutoAWQ knows text only, and other versions of its libraries than ours."
    )
    peer.add_argument("--create-env", action="store_true", help="install its environment first, if it is not there (some GB)")
    peer.add_argument("--env", metavar="DIR", help="where the environment is (in the user's cache directory)")
    peer.add_argument("--engine-timeout-s", type=float, default=7200.0, metavar="S", help="longest run of AutoAWQ (%(default)g)")
    add_output_options(quantize)
    quantize.set_defaults(run=_quantize)

    compare = commands.add_parser(
        "compare",
        allow_abbrev=False,
        help="measure how far quantized checkpoints are from their original",
        description="Next-token distributions on inputs that were not calibrated on: KL is the mean divergence in nats a token.",
    )
    compare.add_argument("original", metavar="ORIGINAL", help="checkpoint with float weights")
    compare.add_argument("others", metavar="QUANTIZED", nargs="+", help="checkpoints made from it")
    _add_material_options(compare, "--inputs", HELD_OUT_EXAMPLES)
    compare.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (%(default)s)")
    add_output_options(compare)
    compare.set_defaults(run=_compare)


def _add_material_options(parser: argparse.ArgumentParser, directory: str, num: int) -> None:
    what = parser.add_argument_group("inputs", "A directory of media, .txt and .jsonl files, or synthetic ones.")
    one = what.add_mutually_exclusive_group(required=True)
    one.add_argument(
        directory, dest="directory", metavar="DIR", help="media (questions in a .txt of the same name), texts, dialogues"
    )
    one.add_argument("--synthetic", action="store_true", help="scenes of the demo world and random tokens")
    what.add_argument("--examples", type=int, default=num, metavar="N", help="how many synthetic ones (%(default)s)")
    what.add_argument("--no-media", action="store_true", help="random tokens only, of synthetic ones")
    what.add_argument("--seed", type=int, default=0, metavar="N", help="of synthetic ones (%(default)s)")
    what.add_argument("--text-tokens", type=int, default=512, metavar="N", help="longest piece of a text (%(default)s)")
    what.add_argument("--fps", type=float, default=2.0, metavar="F", help="frames per second of video (%(default)g)")
    what.add_argument("--max-frames", type=int, default=16, metavar="N", help="most frames of a video (%(default)s)")


def _quantize(args: argparse.Namespace) -> int:
    source, target = Path(args.source), Path(args.target)
    _check_numbers(args)
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
        reading = _reading(args, pruned=True)
        materials = _materials(args, vocabulary, reading, held_out=False)
        if args.engine == "own":
            settings = job.Settings(
                args.group_size, args.vision, not args.no_clip, search_rows=args.search_rows, alpha=args.alpha,
                keep=tuple(args.keep), reading=reading,
            )  # fmt: skip
            outcome = job.quantize_checkpoint(
                source, target, materials, settings, device=args.device, restart=args.restart, report=progress.stage
            )
        else:
            env = autoawq_env.find_env(args.env, args.create_env, progress.stage)
            outcome = autoawq_env.run_autoawq(
                env, source, target, vocabulary, materials, group_size=args.group_size, clip=not args.no_clip,
                text_tokens=args.text_tokens, deadline_s=args.engine_timeout_s, restart=args.restart, report=progress.stage,
            )  # fmt: skip
    facts = job.describe(outcome)
    print(
        json.dumps({"source": str(source), "target": str(target), "engine": args.engine, **facts})
        if args.json
        else _told(target, facts)
    )
    return OK


def _told(target: Path, facts: dict[str, Any]) -> str:
    tower = f", {facts['num_tower_linears']} of the vision tower in 8" if facts["num_tower_linears"] else ""
    resumed = f", {facts['resumed_layers']} layers of them found finished" if facts["resumed_layers"] else ""
    return (
        f"{target}: {facts['num_linears']} linears in 4 bits (groups of {facts['group_size']}){tower}{resumed}; "
        f"{megabytes(facts['source_bytes'])} -> {megabytes(facts['target_bytes'])}; "
        f"calibrated on {facts['num_samples']} sequences of {facts['num_tokens']} tokens in {facts['seconds']:.0f} s"
    )


def _compare(args: argparse.Namespace) -> int:
    _check_numbers(args)
    with ProgressLine() as progress:
        progress.stage("load", 0, 1)
        from sparsevila_cluster.models.loading.originals import read_vocabulary
        from sparsevila_cluster.quantization.compare import compare

        original, others = Path(args.original), [Path(other) for other in args.others]
        vocabulary, reading = read_vocabulary(original), _reading(args, pruned=False)
        materials = _materials(args, vocabulary, reading, held_out=True)
        found = compare(original, others, vocabulary, materials, reading, device=args.device, report=progress.stage)
    if args.json:
        print(json.dumps({"original": args.original, "distances": [one.as_dict() for one in found]}))
    else:
        _show(args.original, found)
    return OK


def _show(original: str, found: list[Distance]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"Distance from {original}, on {found[0].num_tokens} tokens", title_justify="left")
    table.add_column("checkpoint", overflow="fold")
    for name in ("KL (nats)", "logits off by", "same top token", "files"):
        table.add_column(name, justify="right")
    for one in found:
        size = megabytes(one.stored_bytes)
        table.add_row(one.checkpoint, f"{one.kl:.3e}", f"{100 * one.relative_error:.2f} %", f"{100 * one.same_top:.2f} %", size)
    Console(width=None if sys.stdout.isatty() else WIDTH_IN_FILES, highlight=False).print(table)


def _check_numbers(args: argparse.Namespace) -> None:
    for name in ("examples", "text_tokens", "max_frames", "search_rows"):
        if getattr(args, name, 1) < 1:
            raise BadRequest(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.seed < 0:
        raise BadRequest(f"--seed must be at least 0, got {args.seed}")


def _reading(args: argparse.Namespace, pruned: bool) -> Reading:
    from sparsevila_cluster.quantization.calibration import Reading

    return Reading(args.text_tokens, args.fps, args.max_frames, pruned)


def _materials(args: argparse.Namespace, vocabulary: Vocabulary, reading: Reading, held_out: bool) -> list[Material]:
    from sparsevila_cluster.quantization.materials import read_materials

    if not args.synthetic:
        return read_materials(args.directory)
    from sparsevila_cluster.demo.calibration_examples import make_examples

    return make_examples(vocabulary, reading, args.examples, media=not args.no_media, seed=args.seed, held_out=held_out)
