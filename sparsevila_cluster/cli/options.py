"""Options that several commands share, and the values that are read from them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, get_args

from sparsevila_cluster.core.config import EngineConfig, SparsityConfig
from sparsevila_cluster.core.errors import BadRequest
from sparsevila_cluster.core.requests import SamplingParams, Turn, check_ratio, with_defaults
from sparsevila_cluster.pruning import PRUNING
from sparsevila_cluster.retrieval import RETRIEVAL

OK = 0
SAMPLING_OPTIONS = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop")
COMPUTE_CHOICES = ("attention", "quantization", "decode_graphs")
# A parser of arguments, or one of its groups.
Parser = argparse._ActionsContainer


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How tokens are chosen, and when an answer ends."""
    sampling = parser.add_argument_group("answers")
    sampling.add_argument("--max-tokens", type=int, metavar="N", help="longest answer in tokens (256)")
    sampling.add_argument("--temperature", type=float, metavar="T", help="0 (the default) always takes the likeliest token")
    sampling.add_argument("--top-p", type=float, metavar="P", help="sample from the likeliest tokens of this probability (1)")
    sampling.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens (0 = all)")
    sampling.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answers")
    sampling.add_argument("--stop", action="append", metavar="TEXT", help="end an answer before this text; may be repeated")


def add_compute_options(parser: Parser) -> None:
    """What an engine computes with: device, kernels, weights."""
    fields = EngineConfig.model_fields
    parser.add_argument("--device", help=fields["device"].description)
    for name in COMPUTE_CHOICES:
        field = fields[name]
        parser.add_argument(f"--{name.replace('_', '-')}", choices=get_args(field.annotation), help=field.description)


def add_frame_options(parser: Parser) -> None:
    """How many frames of a video are sampled."""
    fields = EngineConfig.model_fields
    parser.add_argument("--fps", type=float, metavar="F", help=f"{fields['fps'].description} ({fields['fps'].default:g})")
    frames = fields["max_frames"]
    parser.add_argument("--max-frames", type=int, metavar="N", help=f"{frames.description} ({frames.default})")


def add_sparsity_options(parser: argparse.ArgumentParser, *, methods: bool) -> None:
    """How much is kept and retrieved; `methods`: also by which method, which only the owner of an engine chooses."""
    sparsity = SparsityConfig.model_fields
    knobs = parser.add_argument_group("sparsity", "Ratios are the fraction kept, in (0, 1].")
    sides = ("prune", PRUNING, "0.25 for video, 0.4 for images"), ("retrieve", RETRIEVAL, "0.10 for video, 0.25 for images")
    for side, table, kept in sides:
        keep, method = sparsity[f"{side}_keep"], sparsity[side]
        knobs.add_argument(f"--{side}-keep", type=_ratio, metavar="KEEP", help=f"{keep.description} ({kept})")
        if methods:
            knobs.add_argument(f"--{side}", choices=tuple(table), help=f"{method.description} ({method.default})")
    knobs.add_argument("--retrieve-mass", type=_ratio, metavar="SHARE", help=sparsity["retrieve_mass"].description)
    knobs.add_argument("--refresh-every", type=int, metavar="N", help=sparsity["refresh_every"].description)


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """What is printed."""
    parser.add_argument("--json", action="store_true", help="print exactly one JSON document on stdout")
    parser.add_argument("-v", "--verbose", action="store_true", help="logs and tracebacks on stderr")


def add_media(parser: argparse.ArgumentParser, name: str, what: str) -> None:
    """What is asked about, and the questions."""
    parser.add_argument("video", metavar=name, help=what)
    parser.add_argument(
        "--also", action="append", default=[], metavar="FILE", help="another video or image to ask about; may be repeated"
    )
    parser.add_argument("questions", metavar="QUESTION", nargs="+", help="several questions are turns of one conversation")


def given(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The values of those options that were typed."""
    return {name: value for name in names if (value := getattr(args, name, None)) is not None}


def read_sampling(args: argparse.Namespace) -> SamplingParams:
    """Raises BadRequest: a value out of range."""
    return with_defaults(**given(args, SAMPLING_OPTIONS))


def check_questions(questions: Sequence[str], sampling: SamplingParams, *others: str) -> None:
    """Find mistakes in texts before anything is loaded or sent. Raises BadRequest."""
    for question in questions:
        Turn("", "", "", question, sampling)
    for text in (*questions, *sampling.stop, *others):
        if any("\ud800" <= char <= "\udfff" for char in text):  # bytes of the command line that were no UTF-8
            raise BadRequest(f"text must be valid UTF-8, got {text!r}")


def _ratio(text: str) -> float:
    try:
        return check_ratio("the fraction", float(text))
    except ValueError:  # BadRequest is one
        raise argparse.ArgumentTypeError(f"must be in (0, 1], got {text!r}") from None
