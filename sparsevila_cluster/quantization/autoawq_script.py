"""What runs inside AutoAWQ's own environment, as a program: reads a request, quantizes, saves.

python autoawq_script.py request.json      {"source", "target", "ids", "group_size", "clip", "length"}
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import Any


class NoProcessor:
    """AutoAWQ loads a vision-language model's processor only to save it again; that needs torchvision, and we copy the files."""

    @staticmethod
    def from_pretrained(*_args: Any, **_kwargs: Any) -> None:
        """Nothing."""
        return None


def end_with_parent() -> None:
    """Whoever started this holds the other end of stdin: when it is gone, however it went, so is this."""

    def wait() -> None:
        while os.read(0, 1):  # not sys.stdin, whose lock a waiting reader would hold when the interpreter ends
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main(path: str) -> None:
    """Quantize what the request in the JSON file at `path` names."""
    end_with_parent()
    with open(path, encoding="utf-8") as file:
        request = json.load(file)
    import torch
    from awq import AutoAWQForCausalLM
    from awq.models import base
    from awq.modules.linear import gemm

    base.AutoProcessor = NoProcessor
    on_gpu = torch.cuda.is_available()
    # Its Triton kernel asks for the current CUDA device whatever the tensors are on.
    gemm.TRITON_AVAILABLE = gemm.TRITON_AVAILABLE and on_gpu
    model = AutoAWQForCausalLM.from_pretrained(request["source"], device_map="auto" if on_gpu else "cpu")
    model.quantize(
        None,  # token ids need no tokenizer
        quant_config={"zero_point": True, "q_group_size": request["group_size"], "w_bit": 4, "version": "GEMM"},
        calib_data=request["ids"],
        max_calib_samples=len(request["ids"]),
        max_calib_seq_len=request["length"],
        apply_clip=request["clip"],
    )
    model.save_quantized(request["target"])


if __name__ == "__main__":
    main(sys.argv[1])
