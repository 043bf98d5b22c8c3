"""A checkpoint taken apart for quantizing: its text model layer by layer, the linears of its tower, and their names on disk.

h -> norm_in -> q, k, v -> attention -> o -> + -> norm_mlp -> gate, up -> * -> down -> +
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsevila_cluster.core.errors import BadCheckpoint
from sparsevila_cluster.models.adapter import Model
from sparsevila_cluster.models.chat_template import load_tokenizer
from sparsevila_cluster.models.checkpoint import Checkpoint
from sparsevila_cluster.models.loading.loader import family_class_of, load_model, load_modules, read_config
from sparsevila_cluster.models.loading.quantization_scheme import read_scheme
from sparsevila_cluster.models.loading.text_only import TEXT_MODELS, TextModel, load_text
from sparsevila_cluster.models.loading.weights import source_names
from sparsevila_cluster.models.text.hf import HFDecoder

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUT = "self_attn.o_proj"
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
DOWN = "mlp.down_proj"
LINEARS = (*QKV, OUT, *GATE_UP, DOWN)
NORM_IN, NORM_MLP = "input_layernorm", "post_attention_layernorm"

# Everything inside the blocks of a tower; not its patch embedding, mergers, projector, or heads beside the blocks.
_TOWER_BLOCK = re.compile(r"^model\.(visual|vision_tower)\.(.*\.)?(blocks|layers?)\.\d+\.")


class DecoderLayer:
    """One layer of the text model. `linears` and `norms` are its modules by their names within the layer.

    Raises:
        BadCheckpoint: the layer is built otherwise (fused projections, experts, norms in other places).
    """

    def __init__(self, module: Any, name: str, rotary: Any):
        self.module, self.name, self._rotary = module, name, rotary
        self.linears: dict[str, nn.Linear] = {}
        for path in LINEARS:
            linear = _at(module, path)
            if not isinstance(linear, nn.Linear):
                found = type(linear).__name__ if linear is not None else f"none in {type(module).__name__}"
                raise BadCheckpoint(
                    f"{name}: quantizing needs a plain linear {path!r}, found {found}; no fused projections or experts"
                )
            self.linears[path] = linear
        others = [path for path, one in module.named_modules() if isinstance(one, nn.Linear) and path not in self.linears]
        if others:
            raise BadCheckpoint(f"{name}: quantizing does not know the linear {others[0]!r}; no fused projections or experts")
        self.norms: dict[str, Any] = {path: _at(module, path) for path in (NORM_IN, NORM_MLP)}
        norms = {path for path, _ in module.named_children() if "norm" in path}
        if norms != set(self.norms):
            raise BadCheckpoint(
                f"{name}: quantizing knows the norms {', '.join(self.norms)}, found {', '.join(sorted(norms)) or 'none'}"
            )

    def attention(self, x: Tensor, positions: Tensor) -> Tensor:
        """Normed rows f32 [T, D] of one sequence, positions i64 [R, T] -> what attention adds to the residual, [T, D]."""
        rows = x[None]
        ids = positions[:, None] if len(positions) == 3 else positions
        found = self.module.self_attn(
            hidden_states=rows,
            position_embeddings=self._rotary(rows, ids),
            attention_mask=None,
            step_batch=WholeSequence(),
        )
        return found[0][0]

    def mlp(self, x: Tensor) -> Tensor:
        """Normed rows [T, D] -> what the MLP adds, [T, D]."""
        return self.module.mlp(x)

    @contextmanager
    def watch(self, path: str, seen: list[Tensor]) -> Iterator[None]:
        """Append what the linear at `path` is given, [T, K] each, to `seen` while the block runs."""
        hook = self.linears[path].register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
        try:
            yield
        finally:
            hook.remove()


class WholeSequence:
    """What of a `StepBatch` the backend "hf" calls: one sequence, whose rows see themselves and what comes before."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [T, Hq, D], k and v [T, Hkv, D] -> [T, Hq, D], causally."""
        queries, keys, values = (t.transpose(0, 1)[None] for t in (q, k, v))
        out = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1)


@dataclass(frozen=True)
class Original:
    """A checkpoint with float weights, in memory as transformers modules.

    layers: the text model's, in order; None once released. tower: linears of the vision tower's blocks by their names in memory, as
    far as the family runs the block. sources: names of tensors in memory -> on disk.
    """

    files: Checkpoint
    model: Model | TextModel
    vocabulary: Vocabulary
    layers: list[DecoderLayer | None]
    tower: dict[str, nn.Linear]
    sources: dict[str, str]

    def stored_dtype(self, name: str) -> torch.dtype:
        """How the tensor called `name` in memory is stored."""
        source = self.sources[name]
        return _STORED[self.files.shards[self.files.file_of[source]].dtypes[source]]

    def release(self, index: int) -> None:
        """Let the weights of a layer go."""
        layer = self.layers[index]
        assert layer is not None
        layer.module.to("meta")
        self.layers[index] = None


@dataclass(frozen=True)
class Vocabulary:
    """What a checkpoint takes, known before its weights are read. size: number of token ids; kinds: of media, none for a language
    model.
    """

    size: int
    kinds: tuple[str, ...]
    _tokenizer: Any

    def ids_of(self, text: str) -> list[int]:
        """Tokens of a text as it stands; what looks like a control token is one."""
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def plain_ids(self) -> list[int]:
        """All ids that are text and no control tokens, ascending."""
        added = set(self._tokenizer.added_tokens_decoder)
        return sorted(i for i in self._tokenizer.get_vocab().values() if i not in added and i < self.size)


_STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def open_original(directory: str | Path, device: str | torch.device = "auto", with_media: bool = True) -> Original:
    """Load a checkpoint that is to be quantized: float32 on a CPU, as stored on a GPU. Without `with_media`: its text model alone.

    Raises:
        BadCheckpoint: as `load_model`; or it is quantized already, or a layer is of a kind that cannot be taken apart.
    """
    files = Checkpoint.open(directory)
    vocabulary = read_vocabulary(files)
    model: Model | TextModel
    tower = {}
    if vocabulary.kinds and with_media:
        model, skeleton = load_modules(files, device=device, text_backend="hf")
        tower = {name: one for name, one in skeleton.named_modules() if isinstance(one, nn.Linear) and _TOWER_BLOCK.match(name)}
    else:
        model = load_text(files, device=device, text_backend="hf")
    sources = source_names(files, read_config(files), text_only=not vocabulary.kinds)
    assert isinstance(model.text, HFDecoder)
    text: Any = model.text.modules
    prefix = "model.language_model" if vocabulary.kinds else "model"
    layers = [DecoderLayer(module, f"{prefix}.layers.{i}", text.rotary_emb) for i, module in enumerate(text.layers)]
    return Original(files, model, vocabulary, list(layers), tower, sources)


def open_copy(directory: str | Path, device: str | torch.device = "auto", with_media: bool = True) -> Model | TextModel:
    """Load an original, or what was made of it, in float32, as transformers modules. Without `with_media`: its text model alone.

    Raises:
        BadCheckpoint: as `load_model`.
    """
    files = Checkpoint.open(directory)
    load = load_text if files.config.get("model_type") in TEXT_MODELS or not with_media else load_model
    return load(files, device=device, dtype="float32", text_backend="hf")


def read_vocabulary(directory: str | Path | Checkpoint) -> Vocabulary:
    """Raises BadCheckpoint: no checkpoint, one that is not supported or quantized already, or without a tokenizer."""
    files = directory if isinstance(directory, Checkpoint) else Checkpoint.open(directory)
    if read_scheme(files.config) is not None:
        raise BadCheckpoint(f"{str(files.directory)!r} is quantized already (config.json: quantization_config); take the original")
    text_only = files.config.get("model_type") in TEXT_MODELS
    family_class = None if text_only else family_class_of(files)
    config = read_config(files)
    kinds = () if family_class is None else tuple(family_class.slots(config))
    return Vocabulary(config.get_text_config().vocab_size, kinds, load_tokenizer(files))


def _at(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name, None)
    return module
