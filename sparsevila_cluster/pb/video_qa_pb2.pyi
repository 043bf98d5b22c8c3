from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class MediaChunk(_message.Message):
    __slots__ = ("data", "file_name", "kind")
    DATA_FIELD_NUMBER: _ClassVar[int]
    FILE_NAME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    file_name: str
    kind: str
    def __init__(self, data: _Optional[bytes] = ..., file_name: _Optional[str] = ..., kind: _Optional[str] = ...) -> None: ...

class MediaUpload(_message.Message):
    __slots__ = ("upload_id", "num_bytes", "digest", "expires_in_s")
    UPLOAD_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_IN_S_FIELD_NUMBER: _ClassVar[int]
    upload_id: str
    num_bytes: int
    digest: str
    expires_in_s: float
    def __init__(self, upload_id: _Optional[str] = ..., num_bytes: _Optional[int] = ..., digest: _Optional[str] = ..., expires_in_s: _Optional[float] = ...) -> None: ...

class MediaSource(_message.Message):
    __slots__ = ("upload_id", "inline", "url", "file", "kind")
    UPLOAD_ID_FIELD_NUMBER: _ClassVar[int]
    INLINE_FIELD_NUMBER: _ClassVar[int]
    URL_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    upload_id: str
    inline: bytes
    url: str
    file: str
    kind: str
    def __init__(self, upload_id: _Optional[str] = ..., inline: _Optional[bytes] = ..., url: _Optional[str] = ..., file: _Optional[str] = ..., kind: _Optional[str] = ...) -> None: ...

class PrepareMediaRequest(_message.Message):
    __slots__ = ("sources", "fps", "max_frames", "prune_keep")
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    FPS_FIELD_NUMBER: _ClassVar[int]
    MAX_FRAMES_FIELD_NUMBER: _ClassVar[int]
    PRUNE_KEEP_FIELD_NUMBER: _ClassVar[int]
    sources: _containers.RepeatedCompositeFieldContainer[MediaSource]
    fps: float
    max_frames: int
    prune_keep: float
    def __init__(self, sources: _Optional[_Iterable[_Union[MediaSource, _Mapping]]] = ..., fps: _Optional[float] = ..., max_frames: _Optional[int] = ..., prune_keep: _Optional[float] = ...) -> None: ...

class MediaStatus(_message.Message):
    __slots__ = ("state", "stage", "done", "total", "media")
    class State(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STATE_UNSPECIFIED: _ClassVar[MediaStatus.State]
        WORKING: _ClassVar[MediaStatus.State]
        READY: _ClassVar[MediaStatus.State]
    STATE_UNSPECIFIED: MediaStatus.State
    WORKING: MediaStatus.State
    READY: MediaStatus.State
    STATE_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    MEDIA_FIELD_NUMBER: _ClassVar[int]
    state: MediaStatus.State
    stage: str
    done: int
    total: int
    media: Media
    def __init__(self, state: _Optional[_Union[MediaStatus.State, str]] = ..., stage: _Optional[str] = ..., done: _Optional[int] = ..., total: _Optional[int] = ..., media: _Optional[_Union[Media, _Mapping]] = ...) -> None: ...

class Media(_message.Message):
    __slots__ = ("media_id", "kind", "num_frames", "duration_s", "visual_tokens", "visual_tokens_kept", "prefix_tokens", "kv_bytes", "dense_kv_bytes", "reused", "ms")
    class MsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    MEDIA_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    NUM_FRAMES_FIELD_NUMBER: _ClassVar[int]
    DURATION_S_FIELD_NUMBER: _ClassVar[int]
    VISUAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VISUAL_TOKENS_KEPT_FIELD_NUMBER: _ClassVar[int]
    PREFIX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    DENSE_KV_BYTES_FIELD_NUMBER: _ClassVar[int]
    REUSED_FIELD_NUMBER: _ClassVar[int]
    MS_FIELD_NUMBER: _ClassVar[int]
    media_id: str
    kind: str
    num_frames: int
    duration_s: float
    visual_tokens: int
    visual_tokens_kept: int
    prefix_tokens: int
    kv_bytes: int
    dense_kv_bytes: int
    reused: bool
    ms: _containers.ScalarMap[str, float]
    def __init__(self, media_id: _Optional[str] = ..., kind: _Optional[str] = ..., num_frames: _Optional[int] = ..., duration_s: _Optional[float] = ..., visual_tokens: _Optional[int] = ..., visual_tokens_kept: _Optional[int] = ..., prefix_tokens: _Optional[int] = ..., kv_bytes: _Optional[int] = ..., dense_kv_bytes: _Optional[int] = ..., reused: _Optional[bool] = ..., ms: _Optional[_Mapping[str, float]] = ...) -> None: ...

class GetMediaRequest(_message.Message):
    __slots__ = ("media_id",)
    MEDIA_ID_FIELD_NUMBER: _ClassVar[int]
    media_id: str
    def __init__(self, media_id: _Optional[str] = ...) -> None: ...

class DeleteMediaRequest(_message.Message):
    __slots__ = ("media_id",)
    MEDIA_ID_FIELD_NUMBER: _ClassVar[int]
    media_id: str
    def __init__(self, media_id: _Optional[str] = ...) -> None: ...

class DeleteMediaReply(_message.Message):
    __slots__ = ("deleted",)
    DELETED_FIELD_NUMBER: _ClassVar[int]
    deleted: bool
    def __init__(self, deleted: _Optional[bool] = ...) -> None: ...

class Sampling(_message.Message):
    __slots__ = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_p: _Optional[float] = ..., top_k: _Optional[int] = ..., seed: _Optional[int] = ..., stop: _Optional[_Iterable[str]] = ...) -> None: ...

class Retrieval(_message.Message):
    __slots__ = ("keep", "mass", "refresh_every")
    KEEP_FIELD_NUMBER: _ClassVar[int]
    MASS_FIELD_NUMBER: _ClassVar[int]
    REFRESH_EVERY_FIELD_NUMBER: _ClassVar[int]
    keep: float
    mass: float
    refresh_every: int
    def __init__(self, keep: _Optional[float] = ..., mass: _Optional[float] = ..., refresh_every: _Optional[int] = ...) -> None: ...

class AskRequest(_message.Message):
    __slots__ = ("media_id", "conversation_id", "question", "sampling", "retrieval", "want_evidence", "turn_id", "said_token_ids", "said_brownout")
    MEDIA_ID_FIELD_NUMBER: _ClassVar[int]
    CONVERSATION_ID_FIELD_NUMBER: _ClassVar[int]
    QUESTION_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    RETRIEVAL_FIELD_NUMBER: _ClassVar[int]
    WANT_EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    TURN_ID_FIELD_NUMBER: _ClassVar[int]
    SAID_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAID_BROWNOUT_FIELD_NUMBER: _ClassVar[int]
    media_id: str
    conversation_id: str
    question: str
    sampling: Sampling
    retrieval: Retrieval
    want_evidence: bool
    turn_id: str
    said_token_ids: _containers.RepeatedScalarFieldContainer[int]
    said_brownout: float
    def __init__(self, media_id: _Optional[str] = ..., conversation_id: _Optional[str] = ..., question: _Optional[str] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., retrieval: _Optional[_Union[Retrieval, _Mapping]] = ..., want_evidence: _Optional[bool] = ..., turn_id: _Optional[str] = ..., said_token_ids: _Optional[_Iterable[int]] = ..., said_brownout: _Optional[float] = ...) -> None: ...

class AskEvent(_message.Message):
    __slots__ = ("accepted", "token", "evidence", "done")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    accepted: Accepted
    token: Token
    evidence: Evidence
    done: Done
    def __init__(self, accepted: _Optional[_Union[Accepted, _Mapping]] = ..., token: _Optional[_Union[Token, _Mapping]] = ..., evidence: _Optional[_Union[Evidence, _Mapping]] = ..., done: _Optional[_Union[Done, _Mapping]] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("turn_id", "conversation_id")
    TURN_ID_FIELD_NUMBER: _ClassVar[int]
    CONVERSATION_ID_FIELD_NUMBER: _ClassVar[int]
    turn_id: str
    conversation_id: str
    def __init__(self, turn_id: _Optional[str] = ..., conversation_id: _Optional[str] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("index", "token_ids", "text", "brownout")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    BROWNOUT_FIELD_NUMBER: _ClassVar[int]
    index: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    brownout: float
    def __init__(self, index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ..., brownout: _Optional[float] = ...) -> None: ...

class Evidence(_message.Message):
    __slots__ = ("frames",)
    FRAMES_FIELD_NUMBER: _ClassVar[int]
    frames: _containers.RepeatedCompositeFieldContainer[EvidenceFrame]
    def __init__(self, frames: _Optional[_Iterable[_Union[EvidenceFrame, _Mapping]]] = ...) -> None: ...

class EvidenceFrame(_message.Message):
    __slots__ = ("media", "frame", "time_s", "share", "rows", "cols", "heat")
    MEDIA_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    TIME_S_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    COLS_FIELD_NUMBER: _ClassVar[int]
    HEAT_FIELD_NUMBER: _ClassVar[int]
    media: int
    frame: int
    time_s: float
    share: float
    rows: int
    cols: int
    heat: bytes
    def __init__(self, media: _Optional[int] = ..., frame: _Optional[int] = ..., time_s: _Optional[float] = ..., share: _Optional[float] = ..., rows: _Optional[int] = ..., cols: _Optional[int] = ..., heat: _Optional[bytes] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("visual_tokens", "visual_tokens_kept", "visual_tokens_retrieved", "prompt_tokens", "completion_tokens", "effective_keep", "degraded", "num_preemptions", "ms", "brownout")
    class MsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    VISUAL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    VISUAL_TOKENS_KEPT_FIELD_NUMBER: _ClassVar[int]
    VISUAL_TOKENS_RETRIEVED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EFFECTIVE_KEEP_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    NUM_PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    MS_FIELD_NUMBER: _ClassVar[int]
    BROWNOUT_FIELD_NUMBER: _ClassVar[int]
    visual_tokens: int
    visual_tokens_kept: int
    visual_tokens_retrieved: int
    prompt_tokens: int
    completion_tokens: int
    effective_keep: float
    degraded: bool
    num_preemptions: int
    ms: _containers.ScalarMap[str, float]
    brownout: float
    def __init__(self, visual_tokens: _Optional[int] = ..., visual_tokens_kept: _Optional[int] = ..., visual_tokens_retrieved: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., completion_tokens: _Optional[int] = ..., effective_keep: _Optional[float] = ..., degraded: _Optional[bool] = ..., num_preemptions: _Optional[int] = ..., ms: _Optional[_Mapping[str, float]] = ..., brownout: _Optional[float] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ("finish_reason", "text", "usage", "conversation_id", "num_tokens")
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    CONVERSATION_ID_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    finish_reason: str
    text: str
    usage: Usage
    conversation_id: str
    num_tokens: int
    def __init__(self, finish_reason: _Optional[str] = ..., text: _Optional[str] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., conversation_id: _Optional[str] = ..., num_tokens: _Optional[int] = ...) -> None: ...

class AnswerReply(_message.Message):
    __slots__ = ("text", "token_ids", "finish_reason", "evidence", "usage", "turn_id", "conversation_id")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    EVIDENCE_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    TURN_ID_FIELD_NUMBER: _ClassVar[int]
    CONVERSATION_ID_FIELD_NUMBER: _ClassVar[int]
    text: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    finish_reason: str
    evidence: Evidence
    usage: Usage
    turn_id: str
    conversation_id: str
    def __init__(self, text: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., finish_reason: _Optional[str] = ..., evidence: _Optional[_Union[Evidence, _Mapping]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., turn_id: _Optional[str] = ..., conversation_id: _Optional[str] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("turn_id",)
    TURN_ID_FIELD_NUMBER: _ClassVar[int]
    turn_id: str
    def __init__(self, turn_id: _Optional[str] = ...) -> None: ...

class AbortReply(_message.Message):
    __slots__ = ("aborted",)
    ABORTED_FIELD_NUMBER: _ClassVar[int]
    aborted: bool
    def __init__(self, aborted: _Optional[bool] = ...) -> None: ...

class CloseConversationRequest(_message.Message):
    __slots__ = ("conversation_id",)
    CONVERSATION_ID_FIELD_NUMBER: _ClassVar[int]
    conversation_id: str
    def __init__(self, conversation_id: _Optional[str] = ...) -> None: ...

class CloseConversationReply(_message.Message):
    __slots__ = ("closed",)
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    closed: bool
    def __init__(self, closed: _Optional[bool] = ...) -> None: ...

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ServerInfo(_message.Message):
    __slots__ = ("version", "model", "fingerprint", "max_message_bytes", "max_inline_bytes", "max_upload_bytes", "details_json")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_INLINE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_UPLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    DETAILS_JSON_FIELD_NUMBER: _ClassVar[int]
    version: str
    model: str
    fingerprint: str
    max_message_bytes: int
    max_inline_bytes: int
    max_upload_bytes: int
    details_json: str
    def __init__(self, version: _Optional[str] = ..., model: _Optional[str] = ..., fingerprint: _Optional[str] = ..., max_message_bytes: _Optional[int] = ..., max_inline_bytes: _Optional[int] = ..., max_upload_bytes: _Optional[int] = ..., details_json: _Optional[str] = ...) -> None: ...
