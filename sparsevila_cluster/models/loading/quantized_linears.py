"""Quantized linears of a checkpoint: which ones the files hold, whether config.json agrees, and their tensors as weights.

What the files hold decides. Names in config.json are compared with it and never choose a module: they are written for other
loaders, whose rules of matching differ ("visual" is no module of a model that says "model.visual").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsevila_cluster.core.errors import BadCheckpoint
from sparsevila_cluster.models.adapter import Part
from sparsevila_cluster.models.checkpoint import Checkpoint
from sparsevila_cluster.models.loading.quantization_scheme import Scheme, TextScheme
from sparsevila_cluster.models.loading.tensor_names import STORED_AS, in_text_layer, part_of
from sparsevila_kernels import AwqWeight, Int8Weight, from_pack_quantized

_FLOATS = ("F16", "BF16", "F32")
_OPTIONAL = {"weight_g_idx", "smooth"}
_WORD = 8  # 4-bit codes in a 32-bit word


@dataclass(frozen=True)
class StoredLinear:
    """One nn.Linear [num_out, num_in] whose weight is quantized on disk. form: a key of `STORED_AS`; tensors: leaf -> name on disk;
    group_size: inputs that share a scale (all for w8a8).
    """

    path: str
    form: str
    tensors: dict[str, str]
    num_in: int
    num_out: int
    group_size: int

    def read(self, files: Checkpoint, device: torch.device) -> AwqWeight | Int8Weight:
        """The weight, on `device`.

        Raises:
            BadCheckpoint: scales that are no scales, or inputs in another order; names the tensor and its file.
        """
        leaf_of = {name: leaf for leaf, name in self.tensors.items()}
        found = {leaf_of[name]: tensor for name, tensor in files.read(leaf_of, device)}
        for leaf in ("scales", "weight_scale", "smooth"):
            if leaf in found:
                self._check_scales(files, leaf, found[leaf])
        if self.form == "w8a8":
            return Int8Weight(found["weight"], found["weight_scale"][:, 0].contiguous(), found.get("smooth"))
        if self.form == "gemm":
            return AwqWeight.from_gemm(found["qweight"], found["qzeros"], found["scales"])
        if "weight_g_idx" in found:
            self._check_order(files, found["weight_g_idx"])
        said, shape = found["weight_shape"].tolist(), [self.num_out, self.num_in]
        if said != shape:
            raise BadCheckpoint(_at(files, self.tensors["weight_shape"]) + f"says {said}; config.json calls for {shape}")
        converted = from_pack_quantized(found["weight_packed"], found["weight_scale"], found.get("weight_zero_point"))
        return AwqWeight.from_gemm(*converted)

    def _check_scales(self, files: Checkpoint, leaf: str, scales: Tensor) -> None:
        least = float(scales.float().min()) if torch.isfinite(scales).all() else -1.0
        if least < 0 or leaf == "smooth" and least == 0:
            raise BadCheckpoint(_at(files, self.tensors[leaf]) + "holds values that are no scales: NaN, infinite or negative ones")

    def _check_order(self, files: Checkpoint, group_of_input: Tensor) -> None:
        plain = torch.arange(self.num_in, device=group_of_input.device) // self.group_size
        if not torch.equal(group_of_input.to(torch.int64), plain):
            raise BadCheckpoint(_at(files, self.tensors["weight_g_idx"]) + "puts inputs in another order, which is not supported")


def find_linears(
    files: Checkpoint, scheme: Scheme | None, skeleton: Any, sources: dict[str, str], parts: Sequence[Part]
) -> dict[str, StoredLinear]:
    """Path in memory -> the linear, of all that `parts` need and the files hold quantized. Only headers are read.

    skeleton: the transformers model without memory; sources: name in memory -> name on disk.

    Raises:
        BadCheckpoint: a tensor is missing, superfluous or of a wrong shape or dtype, or config.json says otherwise.
    """
    stored: dict[str, dict[str, dict[str, str]]] = {}
    for name, source in sources.items():
        path, _, leaf = name.rpartition(".")
        if part_of(name) in parts and (form := _form_of(files, scheme, sources, path, leaf)) is not None:
            stored.setdefault(path, {}).setdefault(form, {})[leaf] = source
    if scheme is None:
        for forms in stored.values():
            source = next(iter(next(iter(forms.values())).values()))
            raise BadCheckpoint(_at(files, source) + "belongs to a quantized linear, but config.json has no quantization_config")
        return {}
    linears = {name: module for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)}
    found = {}
    for path, forms in sorted(stored.items()):
        found[path] = _one_linear(files, scheme, path, forms, linears.get(path), sources)
    _check_agreement(files, scheme, linears, found, sources, parts)
    return found


def _form_of(files: Checkpoint, scheme: Scheme | None, sources: dict[str, str], path: str, leaf: str) -> str | None:
    """The form that a tensor is a piece of, or None for a plain one. An 8-bit weight that nothing explains counts as plain."""
    weight = sources.get(f"{path}.weight")
    eight = weight is not None and files.shards[files.file_of[weight]].dtypes[weight] == "I8"
    if leaf == "weight":
        explained = f"{path}.weight_scale" in sources or scheme is not None and scheme.vision and part_of(path + ".") == "vision"
        return "w8a8" if eight and explained else None
    if leaf == "weight_scale":
        return "w8a8" if eight else "pack-quantized"
    return next((form for form, leaves in STORED_AS.items() if leaf in leaves), None)


def _one_linear(
    files: Checkpoint,
    scheme: Scheme,
    path: str,
    forms: dict[str, dict[str, str]],
    linear: nn.Linear | None,
    sources: dict[str, str],
) -> StoredLinear:
    some = [tensors for _, tensors in sorted(forms.items())]
    first = next(iter(some[0].values()))
    if linear is None or part_of(path + ".") not in ("llm", "vision"):
        what = "is quantized; only linears of decoder layers and of the vision tower may be, not the head or the embedding"
        raise BadCheckpoint(_at(files, first) + what)
    (form, tensors), *others = sorted(forms.items())
    plain = sources.get(f"{path}.weight") if "weight" not in tensors else None
    if others or plain is not None:
        other = plain if plain is not None else next(iter(others[0][1].values()))
        raise BadCheckpoint(_at(files, first) + f"and {other!r} are weights of the same linear; one of them must go")
    _check_form(files, scheme, path, form, first)
    group_size = linear.in_features if form == "w8a8" or scheme.text is None else scheme.text.group_of(linear.in_features)
    row = StoredLinear(path, form, tensors, linear.in_features, linear.out_features, group_size)
    base = first.rpartition(".")[0]
    if form != "w8a8" and (row.num_out % _WORD or row.num_in % group_size):
        raise BadCheckpoint(
            _at(files, first) + f"belongs to a linear of {row.num_in} inputs and {row.num_out} outputs, which 4 bits in groups of "
            f"{group_size} cannot store: outputs must be a multiple of {_WORD}, inputs of {group_size}"
        )
    for leaf, (shape, dtypes) in _layout(row, scheme.text).items():
        if leaf in tensors:
            _check_tensor(files, tensors[leaf], shape, dtypes, group_size)
        elif leaf not in _OPTIONAL:
            raise BadCheckpoint(f"tensor {f'{base}.{leaf}'!r} is missing beside {first!r} from {', '.join(files.shards)}")
    for leaf, source in tensors.items():
        if leaf not in _layout(row, scheme.text):
            raise BadCheckpoint(_at(files, source) + "must not be there: config.json calls the weights symmetric")
    return row


def _check_form(files: Checkpoint, scheme: Scheme, path: str, form: str, source: str) -> None:
    """The form must be the one that the config names for this part of the model."""
    if form == "w8a8":
        if part_of(path + ".") != "vision":
            raise BadCheckpoint(_at(files, source) + "is stored in 8 bits; that is supported in the vision tower only")
        if not scheme.vision:
            raise BadCheckpoint(_at(files, source) + "is stored in 8 bits, and quantization_config has no vision section")
    elif scheme.text is None or scheme.text.form != form:
        said = "nothing in 4 bits" if scheme.text is None else repr(scheme.text.form)
        raise BadCheckpoint(_at(files, source) + f"is stored as {form!r}; quantization_config speaks of {said}")


def _layout(row: StoredLinear, text: TextScheme | None) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Leaf -> (shape, dtypes) that a linear's tensors must have."""
    num_in, num_out, num_groups = row.num_in, row.num_out, row.num_in // row.group_size
    if row.form == "gemm":
        return {
            "qweight": ((num_in, num_out // _WORD), ("I32",)),
            "qzeros": ((num_groups, num_out // _WORD), ("I32",)),
            "scales": ((num_groups, num_out), _FLOATS),
        }
    if row.form == "w8a8":
        return {"weight": ((num_out, num_in), ("I8",)), "weight_scale": ((num_out, 1), ("F32",)), "smooth": ((num_in,), ("F32",))}
    layout = {
        "weight_packed": ((num_out, num_in // _WORD), ("I32",)),
        "weight_scale": ((num_out, num_groups), _FLOATS),
        "weight_zero_point": ((num_out // _WORD, num_groups), ("I32",)),
        "weight_shape": ((2,), ("I64", "I32")),
        "weight_g_idx": ((num_in,), ("I64", "I32")),
    }
    if text is not None and text.symmetric:
        del layout["weight_zero_point"]
    return layout


def _check_tensor(files: Checkpoint, source: str, shape: tuple[int, ...], dtypes: tuple[str, ...], group_size: int) -> None:
    shard = files.shards[files.file_of[source]]
    if shard.shapes[source] != shape:
        raise BadCheckpoint(
            _at(files, source) + f"has shape {list(shard.shapes[source])}; config.json calls for {list(shape)} "
            f"(groups of {group_size} inputs)"
        )
    if shard.dtypes[source] not in dtypes:
        raise BadCheckpoint(_at(files, source) + f"is stored as {shard.dtypes[source]}; it must be {' or '.join(dtypes)}")


def _check_agreement(
    files: Checkpoint,
    scheme: Scheme,
    linears: dict[str, nn.Linear],
    found: dict[str, StoredLinear],
    sources: dict[str, str],
    parts: Sequence[Part],
) -> None:
    """What the config says of each linear of the decoder layers must be so, and what it says of the model as a whole."""
    where = f"no tensor of {', '.join(files.shards)}"
    if scheme.text is not None and not any(in_text_layer(path + ".") for path in found):
        raise BadCheckpoint(f"config.json: quantization_config: {where} is a {STORED_AS[scheme.text.form][0]} of a decoder layer")
    if scheme.vision and "vision" in parts and not any(row.form == "w8a8" for row in found.values()):
        raise BadCheckpoint(f"config.json: quantization_config has a vision section, but {where} is stored in 8 bits")
    if scheme.text is None:
        return
    for path, row in found.items():
        source = next(iter(row.tensors.values()))
        if row.form != "w8a8" and scheme.text.spares((path, source.rpartition(".")[0])):
            raise BadCheckpoint(_at(files, source) + "is quantized; quantization_config says that this linear is not")
    for path in linears:
        source = sources.get(f"{path}.weight", "")
        if source and in_text_layer(path + ".") and path not in found:
            if not scheme.text.may_spare((path, source.rpartition(".")[0])):
                raise BadCheckpoint(_at(files, source) + "is not quantized; quantization_config says that this linear is")


def _at(files: Checkpoint, source: str) -> str:
    return f"{files.file_of[source]}: tensor {source!r} "
