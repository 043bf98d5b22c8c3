"""The command line: what a user types, as calls; what comes back, as text or as one JSON document.

Knows: options, exit codes, what goes to stdout (results) and what to stderr (progress, logs, errors).
Does not know: how answers are made. torch is imported only once a command has checked all that it can without it.

Exit codes: 0 done; 1 an error of ours or of the machine, or a demo that scores too low; 2 the user's mistake, told in
one line that begins with `error:`; 130 interrupted; 141 the reader of stdout went away.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, cast, get_args

from sparsevila_cluster.calls import AskOptions
from sparsevila_cluster.cli_serve import add_serve_options, run_serve
from sparsevila_cluster.cluster_config import ClusterConfig, cluster_config_of
from sparsevila_cluster.config import EngineConfig, SparsityConfig, build_config, load_config, read_yaml
from sparsevila_cluster.errors import BadRequest, Internal, SparseVilaError, UserError
from sparsevila_cluster.progress import ProgressLine
from sparsevila_cluster.request import MediaSource, SamplingParams, Turn, check_ratio, with_defaults

if TYPE_CHECKING:
    from sparsevila_cluster.video_qa import Chat

log = logging.getLogger(__name__)

OK, FAILED, USAGE, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 130, 141
# Options of `ask` that are config fields, and those that are sampling parameters.
CONFIG_OPTIONS = (
    "model", "device", "system_prompt", "fps", "max_frames", "prune", "prune_keep", "retrieve", "retrieve_keep",
    "retrieve_mass", "refresh_every",
)  # fmt: skip
SAMPLING_OPTIONS = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Nothing that a user can cause escapes as an exception."""
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as finished:  # --help, --version, or a mistake that argparse found
        return finished.code if isinstance(finished.code, int) else USAGE
    with _logging(args.verbose):
        try:
            if hasattr(sys.stdout, "reconfigure"):
                sys.stdout.reconfigure(errors="replace")  # an answer may hold what the terminal's encoding lacks
            code: int = args.run(args)
            sys.stdout.flush()
            return code
        except KeyboardInterrupt:
            return _fail(INTERRUPTED, "interrupted")
        except BrokenPipeError:
            # Python flushes stdout once more when it exits; let it do so where nobody complains.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return BROKEN_PIPE
        except Exception as error:
            return _explain(error)


def _explain(error: Exception) -> int:
    """One line for an error, and its exit code."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, KeyboardInterrupt):  # a library that was interrupted while it was imported wraps it
            return _fail(INTERRUPTED, "interrupted")
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, UserError):
        return _fail(USAGE, f"error: {error}")
    if isinstance(error, Internal):  # the engine has logged its cause
        return _fail(FAILED, f"internal error: {error} (-v shows where)")
    if isinstance(error, SparseVilaError):
        return _fail(FAILED, f"error: {error}")
    log.error("unexpected error", exc_info=error)
    return _fail(FAILED, f"internal error: {type(error).__name__}: {error} (-v shows where)")


def _fail(code: int, message: str) -> int:
    print(" ".join(message.split()), file=sys.stderr)
    return code


@contextmanager
def _logging(verbose: bool) -> Iterator[None]:
    """Logs and warnings on stderr with -v; without it the one line of an error is all that shows."""
    ours, handler = logging.getLogger("sparsevila_cluster"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    before = ours.level, ours.propagate
    ours.addHandler(handler)
    ours.setLevel(logging.INFO if verbose else logging.CRITICAL)
    ours.propagate = False
    try:
        with warnings.catch_warnings():
            if not verbose and not sys.warnoptions:
                warnings.simplefilter("ignore")  # other people's libraries
            yield
    finally:
        ours.removeHandler(handler)
        ours.setLevel(before[0])
        ours.propagate = before[1]


# ---- what can be typed -----------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Tells a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        sys.exit(_fail(USAGE, f"error: {message} ({self.prog} --help lists the options)"))


def build_parser() -> argparse.ArgumentParser:
    """All commands and options."""
    parser = _Parser(
        prog="sparsevila",
        allow_abbrev=False,
        description="Questions about videos, with tokens pruned before the question.",
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    ask = commands.add_parser("ask", allow_abbrev=False, help="ask one or more questions about a video or an image")
    ask.add_argument("video", metavar="VIDEO", help="path of a video or an image")
    ask.add_argument(
        "--also", action="append", default=[], metavar="FILE", help="another video or image to ask about; may be repeated"
    )
    ask.add_argument("questions", metavar="QUESTION", nargs="+", help="several questions are turns of one conversation")
    _add_engine_options(ask)
    sampling = ask.add_argument_group("answers")
    sampling.add_argument("--max-tokens", type=int, metavar="N", help="longest answer in tokens (256)")
    sampling.add_argument(
        "--temperature", type=float, metavar="T", help="0 (the default) always takes the likeliest token"
    )
    sampling.add_argument(
        "--top-p", type=float, metavar="P", help="sample from the likeliest tokens of this probability (1)"
    )
    sampling.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens (0 = all)")
    sampling.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answers")
    sampling.add_argument(
        "--stop", action="append", metavar="TEXT", help="end an answer before this text; may be repeated"
    )
    _add_output_options(ask)
    ask.add_argument("--heatmap", metavar="OUT.png", help="save a picture of where each question looked")
    ask.set_defaults(run=_ask)

    demo = commands.add_parser(
        "demo", allow_abbrev=False, help="answer questions about videos that the bundled model never saw"
    )
    demo.add_argument(
        "--out", default="sparsevila-demo", metavar="DIR", help="where videos and heat map go (%(default)s)"
    )
    demo.add_argument("--model", metavar="DIR", help="another checkpoint of the demo world")
    _add_output_options(demo)
    demo.set_defaults(run=_demo)

    serve = commands.add_parser("serve", allow_abbrev=False, help="answer over gRPC, with pools of workers")
    add_serve_options(serve)
    serve.add_argument("-v", "--verbose", action="store_true", help="logs on stderr")
    serve.set_defaults(run=run_serve)

    config = commands.add_parser("config", allow_abbrev=False, help="work with configuration files")
    actions = config.add_subparsers(metavar="ACTION", required=True)
    check = actions.add_parser("check", allow_abbrev=False, help="validate a YAML file and print it with all defaults")
    check.add_argument("file", metavar="FILE")
    _add_output_options(check)
    check.set_defaults(run=_config_check)
    return parser


def _add_engine_options(parser: argparse.ArgumentParser) -> None:
    fields, sparsity = EngineConfig.model_fields, SparsityConfig.model_fields
    engine = parser.add_argument_group("model and media")
    engine.add_argument("--model", metavar="DIR", help=fields["model"].description)
    engine.add_argument("--config", metavar="FILE", help="YAML file of settings; options override it")
    engine.add_argument("--device", help=fields["device"].description)
    engine.add_argument("--system-prompt", metavar="TEXT", help=fields["system_prompt"].description)
    engine.add_argument(
        "--fps", type=float, metavar="F", help=f"{fields['fps'].description} ({fields['fps'].default:g})"
    )
    frames = fields["max_frames"]
    engine.add_argument("--max-frames", type=int, metavar="N", help=f"{frames.description} ({frames.default})")
    knobs = parser.add_argument_group("sparsity", "Ratios are the fraction kept, in (0, 1].")
    for side, kept in (("prune", "0.25 for video, 0.4 for images"), ("retrieve", "0.10 for video, 0.25 for images")):
        policies = get_args(sparsity[side].annotation)
        knobs.add_argument(
            f"--{side}-keep", type=_ratio, metavar="KEEP", help=f"{sparsity[f'{side}_keep'].description} ({kept})"
        )
        knobs.add_argument(
            f"--{side}", choices=policies, help=f"{sparsity[side].description} ({sparsity[side].default})"
        )
    knobs.add_argument("--retrieve-mass", type=_ratio, metavar="SHARE", help=sparsity["retrieve_mass"].description)
    knobs.add_argument("--refresh-every", type=int, metavar="N", help=sparsity["refresh_every"].description)


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print exactly one JSON document on stdout")
    parser.add_argument("-v", "--verbose", action="store_true", help="logs and tracebacks on stderr")


def _ratio(text: str) -> float:
    try:
        return check_ratio("the fraction", float(text))
    except ValueError:  # BadRequest is one
        raise argparse.ArgumentTypeError(f"must be in (0, 1], got {text!r}") from None


def _version() -> str:
    try:
        return f"sparsevila {version('sparsevila-cluster')}"
    except PackageNotFoundError:  # run from a source tree
        return "sparsevila (not installed)"


# ---- commands --------------------------------------------------------------------------------------------------------


def _config_check(args: argparse.Namespace) -> int:
    given = read_yaml(args.file)
    config = cluster_config_of(given) if set(given) & set(ClusterConfig.model_fields) else load_config(args.file)
    fields = config.model_dump()
    if args.json:
        print(json.dumps({"file": args.file, "config": fields}))
    else:
        import yaml

        print(yaml.safe_dump(fields, sort_keys=False), end="")
    return OK


def _ask(args: argparse.Namespace) -> int:
    config, sampling = _read_options(args)
    _check_before_loading(args, config, sampling)
    with ProgressLine() as progress:
        log.info("loading the model in %s", config.model_dir)
        progress.stage("load model", 0, 1)
        from sparsevila_cluster.video_qa import VideoQA

        with VideoQA(config=config) as qa:
            chat = qa.conversation(qa.prepare(_files(args), progress=progress.stage))
            progress.clear()  # reused media have no stages
            for question in args.questions:
                if args.json:
                    chat.ask(question, **_options(sampling))
                else:
                    _show_turn(chat, question, sampling, [Path(file).name for file in _files(args)])
            return _report(args, config, chat)


def _files(args: argparse.Namespace) -> list[str]:
    return [args.video, *args.also]


def _read_options(args: argparse.Namespace) -> tuple[EngineConfig, SamplingParams]:
    given = {name: value for name, value in vars(args).items() if value is not None}
    fields = {name: given[name] for name in CONFIG_OPTIONS if name in given}
    base = load_config(args.config).model_dump() if args.config else {}
    return build_config(**{**base, **fields}), with_defaults(**{n: given[n] for n in SAMPLING_OPTIONS if n in given})


def _check_before_loading(args: argparse.Namespace, config: EngineConfig, sampling: SamplingParams) -> None:
    """Find cheap mistakes before a model of many gigabytes is loaded."""
    for question in args.questions:
        Turn("", "", "", question, sampling)
    for text in (*args.questions, *sampling.stop, config.system_prompt or ""):
        if any("\ud800" <= char <= "\udfff" for char in text):  # bytes of the command line that were no UTF-8
            raise BadRequest(f"text must be valid UTF-8, got {text!r}")
    if args.heatmap is not None:
        if Path(args.heatmap).suffix.lower() != ".png":
            raise BadRequest(f"--heatmap must name a .png file, got {args.heatmap!r}")
        if not Path(args.heatmap).absolute().parent.is_dir():
            raise BadRequest(f"--heatmap: {str(Path(args.heatmap).parent)!r} is not a directory")
    from sparsevila_cluster.media.source import open_source

    for file in _files(args):
        with open_source(MediaSource(file), config.limits):
            pass


def _options(sampling: SamplingParams) -> AskOptions:
    return cast(AskOptions, {name: getattr(sampling, name) for name in SAMPLING_OPTIONS})


def _show_turn(chat: Chat, question: str, sampling: SamplingParams, names: Sequence[str]) -> None:
    """Print a question, its answer as it grows, and where it looked."""
    lead = f"Q: {' '.join(question.split())}\nA: "  # shown with the first piece: a refused question prints nothing
    for piece in chat.stream(question, **_options(sampling)):
        print(lead + piece, end="", flush=True)
        lead = ""
    print(lead, end="")
    answer = chat.turns[-1][1]
    seen = answer.evidence.places(names=names)
    num = len(answer.token_ids)
    looked = f"looked at {seen}; " if seen else ""
    print(f"\n   {looked}{num} token{'s'[: num != 1]} in {answer.timeline['total']:.0f} ms\n", flush=True)


def _report(args: argparse.Namespace, config: EngineConfig, chat: Chat) -> int:
    """What follows the answers: the heat map if wanted, then the JSON document or the trip card as the last line."""
    from sparsevila_cluster.trip import ask_document, trip_card

    if args.heatmap is not None:
        from sparsevila_cluster.heatmap import save_picture

        save_picture(chat.show(), args.heatmap)
        print(f"heat map: {args.heatmap}", file=sys.stderr)
    document = ask_document(config, chat.media, chat.turns)
    print(json.dumps(document) if args.json else trip_card(document["trip"], chat.turns[-1][1].text))
    return OK


def _demo(args: argparse.Namespace) -> int:
    from sparsevila_cluster.demo.tour import run_tour

    with ProgressLine() as progress:
        return run_tour(Path(args.out), args.model or "demo", args.json, progress.stage)
