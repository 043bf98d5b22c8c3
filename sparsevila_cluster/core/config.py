"""One frozen configuration for the engine, complete before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparsevila_cluster.core.errors import BadConfig

GIB, MIB, KIB = 1024**3, 1024**2, 1024

# What `None` and `auto` of a SparsityConfig stand for, by the kind of the media; ratios are the fraction kept.
DEFAULT_PRUNE_KEEP = {"video": 0.25, "image": 0.4}
DEFAULT_PRUNE_SCOPE: dict[str, Literal["global", "per_group"]] = {"video": "per_group", "image": "global"}
DEFAULT_RETRIEVE_KEEP = {"video": 0.10, "image": 0.25}
# The most that a mass may take where nobody names a `retrieve_keep`: above half, packing saves little.
DEFAULT_MASS_CAP = 0.5


class FrozenConfig(BaseModel):
    """Base of every configuration: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class MediaLimits(FrozenConfig):
    """What a media file may cost before it is refused."""

    max_bytes: int = Field(512 * MIB, ge=1, description="Largest source file, in bytes.")
    max_duration_s: float = Field(4 * 3600.0, gt=0, description="Longest video, in seconds.")
    max_pixels: int = Field(8192 * 8192, ge=1, description="Most pixels (width x height) of a decoded frame.")
    max_frames: int = Field(512, ge=1, description="Most frames after sampling; a request may ask for fewer.")
    max_images: int = Field(16, ge=1, description="Most images or videos in one composite prefix.")
    max_decoded_pixels: int = Field(
        2**37,
        ge=1,
        description="Most pixels of all frames that a request has decoded, over all its sources: 65,000 frames of 1920 x 1080, "
        "about two minutes of one core. Seeking spares most frames of a long video.",
    )
    max_sampled_pixels: int = Field(
        2**31,
        ge=1,
        description="Most pixels of all frames that a request has sampled, over all its sources: 1,000 frames of 1920 x 1080.",
    )
    max_visual_tokens: int = Field(
        2**18, ge=1, description="Most visual tokens, before pruning, of all sources of a request: 512 frames of 512 tokens."
    )
    decode_timeout_s: float = Field(60.0, gt=0, description="Deadline for decoding one source.")
    decode_memory_bytes: int = Field(
        4 * GIB, ge=256 * MIB, description="Most memory that decoding one source may take, besides the frames that it gives."
    )


class SparsityConfig(FrozenConfig):
    """Two-sided sparsity. Ratios are the fraction kept. None = 0.25 / 0.10 for video and 0.4 / 0.25 for images."""

    prune: str = Field("salience", description="Pruning method (prefill).")
    prune_keep: float | None = Field(None, gt=0, le=1, description="Fraction of visual tokens kept at prefill.")
    prune_scope: Literal["auto", "global", "per_group"] = Field(
        "auto", description="Cut over the whole media or per frame. auto: per_group for video, global for images."
    )
    retrieve: str = Field("query_topk", description="Retrieval method (decode).")
    retrieve_keep: float | None = Field(None, gt=0, le=1, description="Fraction of the pruned visual KV that a turn attends to.")
    retrieve_mass: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Attend to the smallest set with this share of a layer's visual attention; retrieve_keep is then the most that "
        "it may take (None: 0.5).",
    )
    refresh_every: int | None = Field(None, ge=0, description="Generated tokens between two choices; None or 0: once per turn.")
    retrieve_rows: Literal["all", "question", "last"] = Field(
        "all", description="Which rows score the visual KV: all after the prefix, the question's words, or the last row."
    )
    normalise: Literal["full_row", "visual"] = Field("full_row", description="Softmax denominator of the retrieval scores.")
    brownout_floor: float = Field(0.05, gt=0, le=1, description="Lowest retrieve_keep that an engine under pressure goes down to.")
    seed: int = Field(0, ge=0, description="Seed of the random methods.")

    def resolved(self, kind: str, retrieve_mass: float | None = None) -> SparsityConfig:
        """This configuration for media of `kind` ("video" or "image"), with every `None` keep and `auto` scope filled in.

        retrieve_mass: that of one turn, in place of the configured one. A mass of 1 is none: only `retrieve_keep` can cut.
        Keeping everything is a keep of 1, whatever was configured.
        """
        mass = self.retrieve_mass if retrieve_mass is None else retrieve_mass
        prune_keep = DEFAULT_PRUNE_KEEP[kind] if self.prune_keep is None else self.prune_keep
        retrieve_keep = self.retrieve_keep
        if retrieve_keep is None:
            retrieve_keep = DEFAULT_RETRIEVE_KEEP[kind] if mass in (None, 1.0) else DEFAULT_MASS_CAP
        return self.model_copy(
            update={
                "prune_keep": 1.0 if self.prune == "keep_all" else prune_keep,
                "prune_scope": DEFAULT_PRUNE_SCOPE[kind] if self.prune_scope == "auto" else self.prune_scope,
                "retrieve_keep": 1.0 if self.retrieve == "retrieve_all" else retrieve_keep,
                "retrieve_mass": mass,
            }
        )


class EngineConfig(FrozenConfig):
    """Everything that an engine needs to start. The same fields are keyword arguments of `VideoQA`."""

    model: str = Field("demo", description="Checkpoint directory, or `demo` for the bundled model.")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: float32 on a CPU, the checkpoint's own dtype on a GPU; bfloat16 for a quantized checkpoint."
    )
    text_backend: Literal["auto", "lean", "hf"] = Field(
        "auto", description="Text decoder. auto: lean where it supports the architecture, else hf."
    )
    attention: Literal["auto", "torch", "triton"] = Field(
        "auto", description="Kernels of the text decoder. auto: triton on a GPU, torch on a CPU."
    )
    quantization: Literal["auto", "none"] = Field(
        "auto",
        description="Weights of a quantized checkpoint. auto: as they are stored, where that is fast (a GPU in 16 bits, a CPU in "
        "bfloat16 with AVX-512); none: dequantized as they are loaded.",
    )
    decode_graphs: Literal["auto", "none"] = Field(
        "auto", description="CUDA graphs of decode steps. auto: one per batch size on a GPU with lean and triton; none: never."
    )
    system_prompt: str | None = Field(None, description="System message before the media. None: the chat template's own default.")
    positions: Literal["keep", "compact"] = Field(
        "keep", description="Positions of kept visual tokens: the original ones with gaps, or closed up."
    )
    video_text_pos: Literal["max+1", "hf5"] = Field(
        "max+1", description="Where text goes on after a Qwen2.5-VL video: after the largest position, or as transformers 5 does."
    )
    fps: float = Field(2.0, gt=0, le=240, description="Frames sampled per second of video.")
    max_frames: int = Field(64, ge=1, description="Default cap on sampled frames per video.")
    sparsity: SparsityConfig = SparsityConfig()
    limits: MediaLimits = MediaLimits()
    prefix_bytes: int = Field(2 * GIB, ge=1, description="Budget for resident media prefixes (KV bytes).")
    turn_bytes: int = Field(1 * GIB, ge=1, description="Budget for running turns: packed KV and text tails (KV bytes).")
    parked_bytes: int = Field(
        1 * GIB,
        ge=0,
        description="Budget for text tails outside of turn_bytes (host memory); beyond it the least recently used idle "
        "conversation is closed, and made again from its text when it goes on.",
    )
    prefill_chunk: int = Field(
        2048, ge=1, description="Most rows of a media prefix that go through the text model at once; bounds its activations."
    )
    max_batch: int = Field(32, ge=1, description="Most turns in one step.")
    max_step_tokens: int = Field(
        2048, ge=1, description="Most rows (question and decode) in one step; at most half of it are turns that run."
    )
    slice_steps: int = Field(256, ge=1, description="Steps that a turn runs before it makes way for turns that wait for room.")
    max_question_tokens: int = Field(2048, ge=1, description="Longest question, in tokens.")
    max_question_bytes: int = Field(64 * KIB, ge=1, description="Longest question, in bytes of UTF-8; it is tokenised if it fits.")
    max_answer_tokens: int = Field(16_384, ge=1, description="Largest max_tokens, and longest replay, that a turn may ask for.")
    max_waiting: int = Field(256, ge=1, description="Longest queue of turns before new ones are refused.")
    max_share: float = Field(
        0.75,
        gt=0,
        le=1,
        description="Most of max_waiting and prefix_bytes that one owner (an API key's tenant) may take, and of the turns that run "
        "while others have some. Without keys there are no shares.",
    )
    max_waiting_pixels: int = Field(
        2**39,
        ge=1,
        description="Most pixels (decoded ones, and eight for each that is sampled) of the preparations of one owner that wait: "
        "about what prepare_timeout_s leaves time for. Without keys there is no such limit.",
    )
    max_preparing: int = Field(
        4, ge=1, description="Preparations under way at once, each of another owner: they take turns with the engine."
    )
    max_conversations: int = Field(1024, ge=1, description="Conversations kept; the least recently used idle one is closed first.")
    turn_timeout_s: float = Field(300.0, gt=0, description="Deadline of a turn that names none.")
    prepare_timeout_s: float = Field(600.0, gt=0, description="Deadline of a preparation that names none.")
    load_timeout_s: float = Field(1800.0, gt=0, description="Deadline for loading the model.")
    close_timeout_s: float = Field(30.0, gt=0, description="Deadline for each engine to end what it does when it is closed.")

    @property
    def model_dir(self) -> Path:
        """The checkpoint directory; `demo` resolves to the bundled model."""
        if self.model == "demo":
            return Path(__file__).parents[1] / "demo" / "checkpoint"
        return Path(self.model)

    @property
    def loading(self) -> dict[str, str]:
        """How the checkpoint is to be loaded: what `load_model` takes besides the directory and the parts."""
        return {name: getattr(self, name) for name in ("device", "dtype", "text_backend", "quantization", "attention")}


_SPARSITY_FIELDS = frozenset(SparsityConfig.model_fields)
_LIMIT_FIELDS = frozenset(MediaLimits.model_fields) - {"max_frames"}


def build_config(**fields: Any) -> EngineConfig:
    """An EngineConfig from flat or nested fields: `prune_keep=0.25` is short for `sparsity={"prune_keep": 0.25}`.

    Raises:
        BadConfig: unknown key or illegal value; the message names both and the legal range.
    """
    top: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {"sparsity": {}, "limits": {}}
    for name, value in fields.items():
        if name in nested and isinstance(value, dict):
            nested[name].update(value)
        elif name in _SPARSITY_FIELDS:
            nested["sparsity"][name] = value
        elif name in _LIMIT_FIELDS:
            nested["limits"][name] = value
        else:
            top[name] = value
    for name, value in nested.items():
        if value:
            top[name] = value
    try:
        return EngineConfig(**top)
    except ValidationError as error:
        raise BadConfig(explain(error, EngineConfig)) from error


def load_config(path: str | Path) -> EngineConfig:
    """Read one YAML file.

    Raises:
        BadConfig: unreadable file, no YAML mapping, unknown key or illegal value.
    """
    return build_config(**read_yaml(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises BadConfig: unreadable, no YAML, or something else than a mapping."""
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise BadConfig(f"cannot read config {str(path)!r}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadConfig(f"{str(path)!r} is not YAML: {' '.join(str(error).split())}") from error
    if data is None:
        data = {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise BadConfig(f"{str(path)!r} must hold a mapping of config fields, got {type(data).__name__}")
    return data


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """What pydantic found wrong with fields of `root`, in one line that names keys, values and what is legal."""
    parts = []
    for item in error.errors():
        name = ".".join(str(p) for p in item["loc"])
        if item["type"] == "extra_forbidden":
            scope = _scope(root, item["loc"][:-1])
            legal = ", ".join(sorted(set(scope.model_fields) | (_SPARSITY_FIELDS if scope is EngineConfig else set())))
            parts.append(f"unknown config key {name!r}; legal keys: {legal}")
        else:
            # Pydantic hands out what was typed, also where a field is a secret, or a mapping that holds keys.
            field = _scope(root, item["loc"][:-1]).model_fields.get(str(item["loc"][-1])) if item["loc"] else None
            hidden = isinstance(item["input"], dict) or field is not None and not field.repr
            got = "" if hidden else f", got {item['input']!r}"
            parts.append(f"{name}: {item['msg'][0].lower() + item['msg'][1:]}{got}")
    return "; ".join(parts)


def _scope(root: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel]:
    """The model that holds the fields at `path` below `root`."""
    for name in path:
        field = root.model_fields.get(str(name))
        if field is not None and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            root = field.annotation
    return root
