"""What users write in a call, as requests and turns."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike, fspath
from typing import Any, TypedDict

from sparsevila_cluster.core.errors import BadRequest
from sparsevila_cluster.core.requests import MediaSource, PrepareRequest, SamplingParams, Turn, with_defaults

# A path, the bytes of a file, or a data URL.
Source = str | bytes | PathLike[str]


class PrepareOptions(TypedDict, total=False):
    """How media is sampled and pruned: PrepareRequest documents each; `timeout_s` is its deadline."""

    fps: float | None
    max_frames: int | None
    prune_keep: float | None
    timeout_s: float | None


class AskOptions(TypedDict, total=False):
    """How a question is answered: SamplingParams and Turn document each; `timeout_s` is the deadline of the turn, and
    `evidence=False` saves the cost of finding out where it looked.
    """

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: str | Sequence[str]
    retrieve_keep: float | None
    retrieve_mass: float | None
    refresh_every: int | None
    evidence: bool
    timeout_s: float | None


_SAMPLING = frozenset(SamplingParams.__dataclass_fields__)
_GIVEN = {
    "turn_id", "conversation_id", "media_id", "question", "sampling", "want_evidence", "deadline_s", "tenant", "owner", "after",
    "replay",
}  # fmt: skip
_OF_TURN = frozenset(Turn.__dataclass_fields__) - _GIVEN
ASK_OPTIONS = _SAMPLING | _OF_TURN | {"evidence", "timeout_s"}
PREPARE_OPTIONS = frozenset(PrepareOptions.__annotations__)


def to_request(source: Source | Sequence[Source], options: PrepareOptions) -> PrepareRequest:
    """One source or several as a request. Raises BadRequest: an unknown option, a value out of range, no source."""
    _check_names(options, PREPARE_OPTIONS)
    given: dict[str, Any] = dict(options)
    deadline_s = given.pop("timeout_s", None)
    sources = tuple(MediaSource(one if isinstance(one, bytes) else fspath(one)) for one in list_sources(source))
    return PrepareRequest(sources=sources, deadline_s=deadline_s, **given)


def to_turn(conversation_id: str, media_id: str, question: str, options: AskOptions) -> Turn:
    """A question as a turn with a new id. Raises BadRequest: an unknown option, a value out of range, no question."""
    _check_names(options, ASK_OPTIONS)
    return Turn(
        turn_id=uuid.uuid4().hex,
        conversation_id=conversation_id,
        media_id=media_id,
        question=question,
        sampling=with_defaults(**_only(options, _SAMPLING)),
        want_evidence=options.get("evidence", True),
        deadline_s=options.get("timeout_s"),
        **_only(options, _OF_TURN),
    )


def list_sources(source: Source | Sequence[Source]) -> list[Source]:
    """The sources of one media, alone or composite. Raises BadRequest for what is no source."""
    sources: list[Source] = []
    if isinstance(source, Sequence) and not isinstance(source, (str, bytes)):
        sources += source
    else:
        sources.append(source)
    for one in sources:
        if not isinstance(one, (str, bytes, PathLike)):
            raise BadRequest(f"media must be a path, bytes or a data URL, or a list of them, got {type(one).__name__}")
    return sources


def _only(options: Mapping[str, object], names: Iterable[str]) -> dict[str, Any]:
    return {name: options[name] for name in names if name in options}


def _check_names(options: Mapping[str, object], legal: Iterable[str]) -> None:
    unknown = sorted(set(options) - set(legal))
    if unknown:
        raise BadRequest(f"unknown option {', '.join(map(repr, unknown))}; legal: {', '.join(sorted(legal))}")
