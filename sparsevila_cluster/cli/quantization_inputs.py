"""Inputs that `quantize` calibrates on and `compare` measures with: a directory of the user, or synthetic ones."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from sparsevila_cluster.core.errors import BadRequest

if TYPE_CHECKING:
    from sparsevila_cluster.models.loading.originals import Vocabulary
    from sparsevila_cluster.quantization.calibration import Reading
    from sparsevila_cluster.quantization.materials import Material


def add_input_options(parser: argparse.ArgumentParser, directory: str, num: int) -> None:
    """directory: the option that names a directory; num: how many synthetic inputs there are by default."""
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


def check_numbers(args: argparse.Namespace) -> None:
    """Raises BadRequest: a number out of range."""
    for name in ("examples", "text_tokens", "max_frames", "search_rows"):
        if getattr(args, name, 1) < 1:
            raise BadRequest(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.seed < 0:
        raise BadRequest(f"--seed must be at least 0, got {args.seed}")


def reading_of(args: argparse.Namespace, pruned: bool) -> Reading:
    """How the inputs are read; `pruned`: with pruned visual tokens, as in serving."""
    from sparsevila_cluster.quantization.calibration import Reading

    return Reading(args.text_tokens, args.fps, args.max_frames, pruned)


def read_inputs(args: argparse.Namespace, vocabulary: Vocabulary, reading: Reading, held_out: bool) -> list[Material]:
    """The inputs that were named; `held_out`: synthetic ones that calibration does not use."""
    from sparsevila_cluster.quantization.materials import read_materials

    if not args.synthetic:
        return read_materials(args.directory)
    from sparsevila_cluster.demo.calibration_examples import make_examples

    return make_examples(vocabulary, reading, args.examples, media=not args.no_media, seed=args.seed, held_out=held_out)
