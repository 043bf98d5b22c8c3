"""The command line: what a user types, as calls; what comes back, as text or as one JSON document.

Results go to stdout; progress, logs and errors to stderr. No tensor library is imported before a command that needs one has
checked its arguments.

Exit codes: 0 done; 1 an error of ours or of the machine, or a demo that scores too low; 2 the user's mistake, in one line that
begins with `error:`; 130 interrupted; 141 the reader of stdout went away.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import NoReturn

from sparsevila_cluster.cli import (
    ask_command,
    client_command,
    compare_command,
    config_command,
    demo_command,
    keys_command,
    quantize_command,
    serve_command,
)
from sparsevila_cluster.core.errors import Internal, SparseVilaError, UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Command:
    """One word after `sparsevila`. `add_options` also sets `run`, which gets the parsed arguments and returns the exit code."""

    help: str
    add_options: Callable[[argparse.ArgumentParser], None]


COMMANDS: Mapping[str, Command] = {
    "ask": Command("ask one or more questions about a video or an image", ask_command.add_options),
    "serve": Command("answer over gRPC, with pools of workers", serve_command.add_options),
    "client": Command("work with a server", client_command.add_options),
    "quantize": Command("write a checkpoint in 4 bits (AWQ), its vision tower in 8", quantize_command.add_options),
    "compare": Command("measure how far quantized checkpoints are from their original", compare_command.add_options),
    "demo": Command("answer questions about videos that the bundled model never saw", demo_command.add_options),
    "keys": Command("make, list and revoke API keys", keys_command.add_options),
    "config": Command("work with configuration files", config_command.add_options),
}

FAILED, USAGE, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141  # 0 is the commands' own


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
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:  # an error that was raised again may be among its own causes
        if isinstance(cause, KeyboardInterrupt):  # a library that was interrupted while it was imported wraps it
            return _fail(INTERRUPTED, "interrupted")
        seen.add(id(cause))
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


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line."""

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
    for name, command in COMMANDS.items():
        command.add_options(commands.add_parser(name, allow_abbrev=False, help=command.help))
    return parser


def _version() -> str:
    try:
        return f"sparsevila {version('sparsevila-cluster')}"
    except PackageNotFoundError:  # run from a source tree
        return "sparsevila (not installed)"
