"""`sparsevila client ask|prepare|info`: the same questions, to a server. No tensor library is imported."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsevila_cluster.cli.options import (
    OK,
    SAMPLING_OPTIONS,
    add_frame_options,
    add_media,
    add_output_options,
    add_sampling_options,
    add_sparsity_options,
    check_questions,
    given,
    read_sampling,
)
from sparsevila_cluster.cli.server_tables import show_info
from sparsevila_cluster.cli.turn_printer import print_turns
from sparsevila_cluster.core.call_options import AskOptions, PrepareOptions
from sparsevila_cluster.core.cluster_config import GatewayConfig
from sparsevila_cluster.core.errors import BadRequest
from sparsevila_cluster.core.progress_line import ProgressLine
from sparsevila_cluster.core.requests import MediaHandle
from sparsevila_cluster.core.summary import conversation_document, media_summary, summary_line

if TYPE_CHECKING:
    from sparsevila_cluster.client import Client

KEY_VARIABLE = "SPARSEVILA_API_KEY"
PREPARE_OPTIONS = ("fps", "max_frames", "prune_keep")
TURN_OPTIONS = (*SAMPLING_OPTIONS, "retrieve_keep", "retrieve_mass", "refresh_every")
MEDIA_ID = re.compile(r"[0-9a-f]{64}")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The actions of `client` and their options."""
    actions = parser.add_subparsers(metavar="ACTION", required=True)

    ask = _add_action(actions, "ask", "ask one or more questions about a video or an image", _ask)
    add_media(ask, "MEDIA", "path or https URL of a video or an image, or the id of prepared media")
    add_sampling_options(ask)

    prepare = _add_action(actions, "prepare", "have videos and images prepared for questions", _prepare)
    prepare.add_argument("files", metavar="MEDIA", nargs="+", help="paths or https URLs")
    prepare.add_argument("--together", action="store_true", help="one composite of all of them, to be asked about at once")

    for action in (ask, prepare):
        add_frame_options(action.add_argument_group("media", "As the server is configured, unless given."))
    add_sparsity_options(ask, methods=False)
    prepare.add_argument("--prune-keep", type=float, metavar="KEEP", help="fraction of the visual tokens that is kept, in (0, 1]")
    _add_action(actions, "info", "show pools, workers, prepared media, lanes and load", _info)


def _add_action(actions: Any, name: str, help: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    action: argparse.ArgumentParser = actions.add_parser(name, allow_abbrev=False, help=help)
    gateway = GatewayConfig()
    server = action.add_argument_group("server")
    server.add_argument(
        "--target",
        default=f"{gateway.host}:{gateway.port}",
        metavar="HOST:PORT[,...]",
        help="where the server listens, or its routers, with commas between (%(default)s)",
    )
    server.add_argument("--api-key", metavar="K", help=f"(default: what the environment variable {KEY_VARIABLE} holds)")
    server.add_argument(
        "--tls", nargs="?", const=True, metavar="CA", help="encrypt; CA is a PEM file of authorities to trust (those of the system)"
    )
    server.add_argument("--tls-certificate", metavar="FILE", help="this client's own certificate, if the server asks for one")
    server.add_argument("--tls-key", metavar="FILE", help="its key")
    server.add_argument("--timeout-s", type=float, metavar="S", help="deadline of each call (600 to prepare, 300 to answer, 20)")
    add_output_options(action)
    action.set_defaults(run=run)
    return action


def _connect(args: argparse.Namespace) -> Client:
    if not args.verbose:
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # read when gRPC is imported: it writes to stderr what errors say already
    from sparsevila_cluster.client import Client, Tls

    own = {name: value for name, value in (("certificate", args.tls_certificate), ("key", args.tls_key)) if value is not None}
    if own and args.tls is None:
        raise BadRequest("--tls-certificate and --tls-key need --tls")
    tls = None if args.tls is None else Tls(ca=None if args.tls is True else args.tls, **own)
    key = args.api_key if args.api_key is not None else os.environ.get(KEY_VARIABLE) or None
    return Client.connect(args.target, api_key=key, tls=tls, timeout_s=args.timeout_s)


def _ask(args: argparse.Namespace) -> int:
    sampling = read_sampling(args)
    check_questions(args.questions, sampling)
    options: AskOptions = given(args, TURN_OPTIONS)  # type: ignore[assignment]
    sources = [args.video, *args.also]
    with _connect(args) as client, ProgressLine() as progress:
        model = client.info()["model"] if args.json else ""
        media = _find(client, args, sources, progress)
        chat = client.conversation(media)
        print_turns(chat, args.questions, options, [Path(source).name for source in sources], silent=args.json)
        answers = [answer for _, answer in chat.turns]
        chat.close()
    if args.json:
        # What was done: what is configured, the server does not say.
        kept = media.visual_tokens_kept / media.visual_tokens if media.visual_tokens else 1.0
        sparsity = {"prune_keep": round(kept, 4), "retrieve_keep": round(answers[-1].usage.effective_keep, 4)}
        print(json.dumps(conversation_document(model, sparsity, media, chat.turns)))
    else:
        print(summary_line(media_summary(media, answers), answers[-1].text))
    return OK


def _find(client: Client, args: argparse.Namespace, sources: list[str], progress: ProgressLine) -> MediaHandle:
    """Media that are prepared already, by their id, or those that are prepared now."""
    if MEDIA_ID.fullmatch(args.video) and not args.also and not Path(args.video).exists():
        if typed := given(args, PREPARE_OPTIONS):
            raise BadRequest(f"media {args.video[:8]}... are prepared already: {', '.join(typed)} cannot be chosen any more")
        return client.media(args.video)
    media = client.prepare(sources, progress=progress.stage, **_prepare_options(args))
    progress.clear()  # reused media have no stages
    return media


def _prepare_options(args: argparse.Namespace) -> PrepareOptions:
    return given(args, PREPARE_OPTIONS)  # type: ignore[return-value]


def _prepare(args: argparse.Namespace) -> int:
    groups = [args.files] if args.together else [[file] for file in args.files]
    documents = []
    with _connect(args) as client, ProgressLine() as progress:
        for files in groups:
            media = client.prepare(files, progress=progress.stage, **_prepare_options(args))
            progress.clear()
            summary = media_summary(media, [])
            documents.append({"files": files, "media_id": media.media_id, "reused": media.reused, "trip": summary})
            if not args.json:
                print(
                    f"{media.media_id}\n   {' + '.join(files)}: {summary_line(summary, None)}{' (reused)' if media.reused else ''}"
                )
    if args.json:
        print(json.dumps({"media": documents}))
    return OK


def _info(args: argparse.Namespace) -> int:
    with _connect(args) as client:
        info = client.info()
    if args.json:
        print(json.dumps(info))
    else:
        show_info(args.target, info)
    return OK
