"""Messages of the gRPC service as arguments of the service, and its results as messages.

An absent optional field becomes the dataclass's default.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from sparsevila_cluster.core.errors import BadRequest
from sparsevila_cluster.core.evidence import Evidence, FrameEvidence
from sparsevila_cluster.core.requests import Answer, MediaHandle, Replay, SamplingParams, Turn, TurnEvent, Usage
from sparsevila_cluster.gateway.media_sources import MediaChunk, MediaReference
from sparsevila_cluster.gateway.progress_queue import StageProgress
from sparsevila_cluster.gateway.service import ServerInfo
from sparsevila_cluster.gateway.spool import StoredUpload
from sparsevila_cluster.pb import video_qa_pb2 as pb


def given(message: Any, *names: str) -> dict[str, Any]:
    """The optional fields that were sent."""
    return {name: getattr(message, name) for name in names if message.HasField(name)}


def to_chunk(chunk: pb.MediaChunk) -> MediaChunk:
    """A piece of an upload."""
    return MediaChunk(chunk.data, chunk.kind)


def to_reference(source: pb.MediaSource) -> MediaReference:
    """Media as the client names it; none of the four ways if it names none."""
    return MediaReference(**given(source, "upload_id", "inline", "url", "file"), kind=source.kind)


def to_turn(message: pb.AskRequest, max_said_tokens: int) -> Turn:
    """A turn under the client's ids. Raises BadRequest: no question, or a value out of range."""
    if len(message.said_token_ids) > max_said_tokens:
        raise BadRequest(f"said_token_ids must hold at most {max_said_tokens} tokens, got {len(message.said_token_ids)}")
    sampling = given(message.sampling, "max_tokens", "temperature", "top_p", "top_k", "seed")
    retrieval = given(message.retrieval, "keep", "mass")
    return Turn(
        turn_id=message.turn_id,
        conversation_id=message.conversation_id,
        media_id=message.media_id,
        question=message.question,
        sampling=SamplingParams(**sampling, stop=tuple(message.sampling.stop)),
        want_evidence=message.want_evidence,
        replay=Replay(tuple(message.said_token_ids), message.said_brownout) if message.said_token_ids else None,
        **{f"retrieve_{name}": value for name, value in retrieval.items()},
        **given(message.retrieval, "refresh_every"),
    )


def to_upload(upload: StoredUpload) -> pb.MediaUpload:
    """A kept file."""
    return pb.MediaUpload(
        upload_id=upload.upload_id, num_bytes=upload.num_bytes, digest=upload.digest, expires_in_s=upload.expires_in_s
    )


def to_status(update: StageProgress | MediaHandle) -> pb.MediaStatus:
    """How far a preparation is; READY with its handle."""
    if isinstance(update, MediaHandle):
        return pb.MediaStatus(state=pb.MediaStatus.READY, media=to_media(update))
    return pb.MediaStatus(state=pb.MediaStatus.WORKING, stage=update.stage, done=update.done, total=update.total)


def to_media(handle: MediaHandle) -> pb.Media:
    """A media prefix."""
    return pb.Media(**_fields(pb.Media, handle))


def _fields(message: type[pb.Media] | type[pb.Usage], value: object) -> dict[str, Any]:
    """What a message takes from the fields of the same names."""
    return {field.name: getattr(value, field.name) for field in message.DESCRIPTOR.fields}


def to_event(event: TurnEvent, num_tokens: int) -> pb.AskEvent:
    """An event of a turn. num_tokens: of the answer so far, told by `done`."""
    if event.kind == "accepted":
        return pb.AskEvent(accepted=pb.Accepted(turn_id=event.turn_id, conversation_id=event.conversation_id))
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


def to_reply(events: Sequence[TurnEvent]) -> pb.AnswerReply:
    """All events of a turn as one message."""
    answer = Answer.from_events(events)
    return pb.AnswerReply(
        text=answer.text,
        token_ids=answer.token_ids,
        finish_reason=str(answer.finish_reason),
        evidence=to_evidence(answer.evidence),
        usage=to_usage(answer.usage),
        turn_id=events[-1].turn_id,
        conversation_id=events[-1].conversation_id,
    )


def to_usage(usage: Usage) -> pb.Usage:
    """The message has the fields of the dataclass."""
    return pb.Usage(**_fields(pb.Usage, usage))


def to_info(info: ServerInfo) -> pb.ServerInfo:
    """The details travel as JSON."""
    return pb.ServerInfo(
        version=info.version,
        model=info.model,
        fingerprint=info.fingerprint,
        max_message_bytes=info.max_message_bytes,
        max_inline_bytes=info.max_inline_bytes,
        max_upload_bytes=info.max_upload_bytes,
        details_json=json.dumps(info.details, default=str),
    )


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
