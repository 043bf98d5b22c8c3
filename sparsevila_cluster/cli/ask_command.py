"""`sparsevila ask`: questions about a video or an image, answered in this process.

Knows: its options, what it prints. Does not know: how answers are made. torch is imported only once it has checked all that it can
without it.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sparsevila_cluster.cli.options import (
    COMPUTE_CHOICES,
    OK,
    SAMPLING_OPTIONS,
    add_compute_options,
    add_frame_options,
    add_media,
    add_output_options,
    add_sampling_options,
    add_sparsity_options,
    check_questions,
    given,
    read_sampling,
)
from sparsevila_cluster.cli.turn_printer import hold_turns
from sparsevila_cluster.core.call_options import AskOptions
from sparsevila_cluster.core.config import EngineConfig, build_config, load_config
from sparsevila_cluster.core.errors import BadRequest
from sparsevila_cluster.core.progress_line import ProgressLine
from sparsevila_cluster.core.requests import MediaSource, SamplingParams

if TYPE_CHECKING:
    from sparsevila_cluster.api.video_qa import Chat

log = logging.getLogger(__name__)

CONFIG_OPTIONS = (
    "model", "device", *COMPUTE_CHOICES, "system_prompt", "fps", "max_frames", "prune", "prune_keep", "retrieve", "retrieve_keep",
    "retrieve_mass", "refresh_every",
)  # fmt: skip


def add_to(commands: Any) -> None:
    """The parser of `ask`."""
    ask = commands.add_parser("ask", allow_abbrev=False, help="ask one or more questions about a video or an image")
    add_media(ask, "VIDEO", "path of a video or an image")
    fields = EngineConfig.model_fields
    engine = ask.add_argument_group("model and media")
    engine.add_argument("--model", metavar="DIR", help=fields["model"].description)
    engine.add_argument("--config", metavar="FILE", help="YAML file of settings; options override it")
    add_compute_options(engine)
    engine.add_argument("--system-prompt", metavar="TEXT", help=fields["system_prompt"].description)
    add_frame_options(engine)
    add_sparsity_options(ask, methods=True)
    add_sampling_options(ask)
    add_output_options(ask)
    ask.add_argument("--heatmap", metavar="OUT.png", help="save a picture of where each question looked")
    ask.set_defaults(run=_ask)


def _ask(args: argparse.Namespace) -> int:
    base = load_config(args.config).model_dump() if args.config else {}
    config, sampling = build_config(**{**base, **given(args, CONFIG_OPTIONS)}), read_sampling(args)
    _check_before_loading(args, config, sampling)
    files = [args.video, *args.also]
    with ProgressLine() as progress:
        log.info("loading the model in %s", config.model_dir)
        progress.stage("load model", 0, 1)
        from sparsevila_cluster.api.video_qa import VideoQA

        with VideoQA(config=config) as qa:
            chat = qa.conversation(qa.prepare(files, progress=progress.stage))
            progress.clear()  # reused media have no stages
            options = cast(AskOptions, {name: getattr(sampling, name) for name in SAMPLING_OPTIONS})
            hold_turns(chat, args.questions, options, [Path(file).name for file in files], silent=args.json)
            return _report(args, config, chat)


def _check_before_loading(args: argparse.Namespace, config: EngineConfig, sampling: SamplingParams) -> None:
    """Find cheap mistakes before a model of many gigabytes is loaded."""
    check_questions(args.questions, sampling, config.system_prompt or "")
    if args.heatmap is not None:
        if Path(args.heatmap).suffix.lower() != ".png":
            raise BadRequest(f"--heatmap must name a .png file, got {args.heatmap!r}")
        if not Path(args.heatmap).absolute().parent.is_dir():
            raise BadRequest(f"--heatmap: {str(Path(args.heatmap).parent)!r} is not a directory")
    from sparsevila_cluster.media.media_source import open_source

    for file in (args.video, *args.also):
        with open_source(MediaSource(file), config.limits):
            pass


def _report(args: argparse.Namespace, config: EngineConfig, chat: Chat) -> int:
    """What follows the answers: the heat map if wanted, then the JSON document or the trip card as the last line."""
    from sparsevila_cluster.core.summary import ask_document, trip_card

    if args.heatmap is not None:
        from sparsevila_cluster.api.heatmap import save_picture

        save_picture(chat.show(), args.heatmap)
        print(f"heat map: {args.heatmap}", file=sys.stderr)
    document = ask_document(config, chat.media, chat.turns)
    print(json.dumps(document) if args.json else trip_card(document["trip"], chat.turns[-1][1].text))
    return OK
