"""Messages of the service as requests and turns, and what comes of them as messages.

Knows: both vocabularies. Does not know: who calls, or who serves. An absent optional field becomes the dataclass's default.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sparsevila_cluster.core.errors import BadRequest
from sparsevila_cluster.core.evidence import Evidence, FrameEvidence
from sparsevila_cluster.core.requests import (
    Answer,
    MediaHandle,
    MediaSource,
    PrepareRequest,
    Replay,
    SamplingParams,
    Turn,
    TurnEvent,
    Usage,
)  # fmt: skip
from sparsevila_cluster.gateway.authenticator import check_id
from sparsevila_cluster.pb import video_qa_pb2 as pb


def to_prepare(message: pb.PrepareMediaRequest, sources: tuple[MediaSource, ...], deadline_s: float, tenant: str) -> PrepareRequest:
    """Raises BadRequest: no source, or a value out of range."""
    options = _given(message, "fps", "max_frames", "prune_keep")
    return PrepareRequest(sources=sources, deadline_s=deadline_s, tenant=tenant, **options)


def to_turn(message: pb.AskRequest, *, turn_id: str, conversation_id: str, deadline_s: float, tenant: str) -> Turn:
    """Raises BadRequest: no media, no question, or a value out of range."""
    if any(token < 0 for token in message.said_token_ids):
        raise BadRequest(f"said_token_ids must be >= 0, got {min(message.said_token_ids)}")
    sampling = _given(message.sampling, "max_tokens", "temperature", "top_p", "top_k", "seed")
    retrieval = _given(message.retrieval, "keep", "mass")
    return Turn(
        turn_id=turn_id,
        conversation_id=conversation_id,
        media_id=check_id("media_id", message.media_id, required=True),
        question=message.question,
        sampling=SamplingParams(**sampling, stop=tuple(message.sampling.stop)),
        want_evidence=message.want_evidence,
        deadline_s=deadline_s,
        tenant=tenant,
        replay=Replay(tuple(message.said_token_ids), message.said_brownout) if message.said_token_ids else None,
        **{f"retrieve_{name}": value for name, value in retrieval.items()},
        **_given(message.retrieval, "refresh_every"),
    )


def to_media(handle: MediaHandle) -> pb.Media:
    return pb.Media(
        media_id=handle.media_id,
        kind=handle.kind,
        num_frames=handle.num_frames,
        duration_s=handle.duration_s,
        visual_tokens=handle.visual_tokens,
        visual_tokens_kept=handle.visual_tokens_kept,
        prefix_tokens=handle.prefix_tokens,
        kv_bytes=handle.kv_bytes,
        dense_kv_bytes=handle.dense_kv_bytes,
        reused=handle.reused,
        ms=handle.ms,
    )


def to_event(event: TurnEvent, *, turn_id: str, num_tokens: int) -> pb.AskEvent:
    """An event under the turn id that the client knows. num_tokens: of the whole answer, told by `done`."""
    if event.kind == "accepted":
        return pb.AskEvent(accepted=pb.Accepted(turn_id=turn_id, conversation_id=event.conversation_id))
    if event.kind == "token":
        token = pb.Token(index=event.index, token_ids=event.token_ids, text=event.text, brownout=event.brownout)
        return pb.AskEvent(token=token)
    if event.kind == "evidence":
        return pb.AskEvent(evidence=to_evidence(event.evidence))
    assert event.finish_reason is not None and event.usage is not None
    return pb.AskEvent(
        done=pb.Done(
            finish_reason=str(event.finish_reason),
            text=event.text,
            usage=to_usage(event.usage),
            conversation_id=event.conversation_id,
            num_tokens=num_tokens,
        )
    )


def to_reply(answer: Answer, *, turn_id: str, conversation_id: str) -> pb.AnswerReply:
    return pb.AnswerReply(
        text=answer.text,
        token_ids=answer.token_ids,
        finish_reason=str(answer.finish_reason),
        evidence=to_evidence(answer.evidence),
        usage=to_usage(answer.usage),
        turn_id=turn_id,
        conversation_id=conversation_id,
    )


def to_usage(usage: Usage) -> pb.Usage:
    return pb.Usage(**{name: getattr(usage, name) for name in Usage.__dataclass_fields__})


def to_evidence(evidence: Evidence) -> pb.Evidence:
    """Every frame that was looked at, with a heat map of one byte per cell, row by row.

    255 is the cell of the turn with the largest share; a retrieved cell is at least 1, any other is 0.
    """
    frames = [frame for frame in evidence.by_frame() if frame.cells]
    most = max((share for frame in frames for _, _, share in frame.cells), default=0.0)
    return pb.Evidence(frames=_to_frames(frames, most))


def _to_frames(frames: list[FrameEvidence], most: float) -> Iterator[pb.EvidenceFrame]:
    for frame in frames:
        rows, cols = frame.grid
        heat = bytearray(rows * cols)
        for row, col, share in frame.cells:
            heat[row * cols + col] = max(1, round(255 * share / most)) if most > 0 else 1
        yield pb.EvidenceFrame(
            media=frame.media, frame=frame.frame, time_s=frame.time_s, share=frame.share, rows=rows, cols=cols, heat=bytes(heat)
        )


def _given(message: Any, *names: str) -> dict[str, Any]:
    """The optional fields that were sent."""
    return {name: getattr(message, name) for name in names if message.HasField(name)}
