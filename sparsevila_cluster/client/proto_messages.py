"""Messages of the service from our requests, and our results from its messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from sparsevila_cluster.core.errors import BadRequest, DataLoss
from sparsevila_cluster.core.evidence import Evidence, FrameEvidence
from sparsevila_cluster.core.requests import FinishReason, MediaHandle, PrepareRequest, SamplingParams, Turn, TurnEvent, Usage
from sparsevila_cluster.pb import video_qa_pb2 as pb

R = TypeVar("R")


def prepare_message(request: PrepareRequest, sources: Sequence[pb.MediaSource]) -> pb.PrepareMediaRequest:
    """How `sources` are to be prepared; those of `request` itself stay here."""
    return _filled(
        pb.PrepareMediaRequest, sources=sources, fps=request.fps, max_frames=request.max_frames, prune_keep=request.prune_keep
    )


def ask_message(turn: Turn, conversation_id: str, token_ids_so_far: Sequence[int], brownout: float) -> pb.AskRequest:
    """A question, or the rest of its answer behind the tokens `token_ids_so_far`, which came under this `brownout`."""
    wish = _filled(pb.Retrieval, keep=turn.retrieve_keep, mass=turn.retrieve_mass, refresh_every=turn.refresh_every)
    return _filled(
        pb.AskRequest,
        media_id=turn.media_id,
        conversation_id=conversation_id,
        question=turn.question,
        sampling=_sampling(turn.sampling),
        retrieval=wish,
        want_evidence=turn.want_evidence,
        turn_id=turn.turn_id,
        said_token_ids=token_ids_so_far,
        said_brownout=brownout,
    )


def _sampling(params: SamplingParams) -> pb.Sampling:
    fields = {name: getattr(params, name) for name in SamplingParams.__dataclass_fields__}
    return _filled(pb.Sampling, **fields)


def _filled(kind: type[R], **fields: object) -> R:
    """A message of what is not None. Raises BadRequest: a number or a text that the message cannot hold."""
    try:
        return kind(**{name: value for name, value in fields.items() if value is not None})
    except (ValueError, TypeError) as error:
        raise BadRequest(f"{kind.__name__}: {error}") from error


def to_handle(media: pb.Media) -> MediaHandle:
    """Prepared media as the server described it."""
    return MediaHandle(**_fields(media))


def to_event(turn_id: str, event: pb.AskEvent) -> TurnEvent | None:
    """An event of a turn; None for a kind that is newer than this client. Raises DataLoss: heat that does not fill its grid."""
    kind = event.WhichOneof("event")
    if kind == "accepted":
        return TurnEvent("accepted", turn_id, conversation_id=event.accepted.conversation_id)
    if kind == "token":
        token = event.token
        ids = tuple(token.token_ids)
        return TurnEvent("token", turn_id, index=token.index, token_ids=ids, text=token.text, brownout=token.brownout)
    if kind == "evidence":
        return TurnEvent("evidence", turn_id, evidence=Evidence(tuple(map(_frame, event.evidence.frames))))
    if kind == "done":
        done = event.done
        return TurnEvent(
            "done",
            turn_id,
            text=done.text,
            finish_reason=_finish_reason(done.finish_reason),
            usage=_usage(done.usage),
            conversation_id=done.conversation_id,
        )
    return None


def _finish_reason(reason: str) -> FinishReason:
    try:
        return FinishReason(reason)
    except ValueError:
        raise DataLoss(f"an answer ended for {reason!r}; legal: {', '.join(FinishReason)}") from None


def _usage(usage: pb.Usage) -> Usage:
    return Usage(**_fields(usage))


def _fields(message: pb.Media | pb.Usage) -> dict[str, Any]:
    """Every field of a message by its name; milliseconds by stage as a dict."""
    fields = {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}
    return {**fields, "ms": dict(message.ms)}


def _frame(seen: pb.EvidenceFrame) -> FrameEvidence:
    """The heat of a frame as shares of its tokens, which sum to the frame's share.

    Heat has 256 levels: a cell's share is exact to half of 1/255 of the hottest one's. The tokens that survived pruning are not
    distinguished from those that did not; only the retrieved ones are known to have.
    """
    rows, cols, heat = seen.rows, seen.cols, seen.heat
    if len(heat) != rows * cols:
        raise DataLoss(f"heat of {len(heat)} bytes for a grid of {rows} x {cols}")
    total = sum(heat)
    cells = tuple((i // cols, i % cols, seen.share * level / total) for i, level in enumerate(heat) if level)
    kept = tuple((row, col) for row, col, _ in cells)
    return FrameEvidence(seen.frame, seen.time_s, seen.share, (rows, cols), cells, kept, seen.media)
