"""GPU kernels in Triton, each beside a plain PyTorch path with the same name and arguments, and a reference that judges both.

Knows: tensors. Does not know: sparsevila_cluster, of which it imports nothing. CPU tensors take PyTorch's operators, CUDA tensors
the kernel; `backend` chooses otherwise.
"""

from .colreduce import colreduce
from .decode_attention import decode_attention

__all__ = ["colreduce", "decode_attention"]
