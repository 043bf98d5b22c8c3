"""GPU kernels in Triton, each beside a PyTorch path and a reference (`reference.py`) with the same name and arguments.

CPU tensors take the best PyTorch path, CUDA tensors the kernel; `backend` chooses otherwise.
"""

from ._launch import HAS_TRITON, INTERPRETED
from .awq_format import dequantize_gemm, from_pack_quantized, pack, quantize_rtn, unpack
from .awq_matmul import awq_matmul
from .awq_weight import AwqWeight
from .colreduce import colreduce
from .decode_attention import decode_attention
from .int8_matmul import Int8Weight, int8_matmul
from .kv_pack import kv_dequantize, kv_pack, kv_quantize
from .small_ops import rms_norm, rope_write, silu_mul

__all__ = [
    "HAS_TRITON",
    "INTERPRETED",
    "AwqWeight",
    "Int8Weight",
    "awq_matmul",
    "colreduce",
    "decode_attention",
    "dequantize_gemm",
    "from_pack_quantized",
    "int8_matmul",
    "kv_dequantize",
    "kv_pack",
    "kv_quantize",
    "pack",
    "quantize_rtn",
    "rms_norm",
    "rope_write",
    "silu_mul",
    "unpack",
]
